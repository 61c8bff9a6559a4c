"""`kvstream explain`: gets a request's receipt from the server, or from a file, and prints an account of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import quote

import typer
from rich.console import Console

from scripts.cli_errors import fail

DEFAULT_URL = "http://127.0.0.1:8000"
TIMEOUT_S = 10.0


def explain(
    request_id: Annotated[
        str | None, typer.Argument(help="`id` of the answer, or the request id; with or without cmpl- or chatcmpl-.")
    ] = None,
    base_url: Annotated[str, typer.Option(help="The server.")] = DEFAULT_URL,
    api_key: Annotated[str | None, typer.Option(envvar="OPENAI_API_KEY")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the receipt as it is.")] = False,
    file: Annotated[
        Path | None, typer.Option(help="A receipt, or a whole answer, saved as JSON; instead of the id.")
    ] = None,
    plan_only: Annotated[
        bool, typer.Option("--plan-only", help="Print the plan that a request can follow (`kv.plan`).")
    ] = False,
) -> None:
    """What a request's KV cost, chunk by chunk, and why: an account of its receipt."""
    from scripts.explain import NotAReceipt, account, read_receipt

    if (request_id is None) == (file is None):
        fail("name one request id, or a file with --file")
    if as_json and plan_only:
        fail("--json prints the whole receipt and --plan-only its plan; choose one")
    url = base_url.rstrip("/").removesuffix("/v1")
    where = str(file) if file is not None else url
    found = _from_file(file) if file is not None else fetch_receipt(request_id or "", url, api_key)
    try:
        receipt = read_receipt(found)
    except NotAReceipt as error:
        fail(f"{where}: not a KV receipt: {error}")
    if as_json:
        typer.echo(json.dumps(receipt, indent=2))
        return
    if plan_only:
        if receipt.get("plan") is None:
            fail("the request was over before its KV was in place, so there is no plan to follow")
        typer.echo(json.dumps(receipt["plan"], separators=(",", ":")))
        return
    how_to_ask = f"--file {file}" if file is not None else str(request_id)
    if file is None and url != DEFAULT_URL:
        how_to_ask += f" --base-url {url}"
    console = Console(highlight=False)
    for line in account(receipt, width=console.width, how_to_ask=how_to_ask):
        console.print(line, soft_wrap=True)


def _from_file(file: Path) -> Any:
    try:
        return json.loads(file.read_text())
    except OSError as error:
        fail(f"{file} cannot be read: {error.strerror}")
    except ValueError as error:
        fail(f"{file}: not valid JSON: {error}")


def fetch_receipt(request_id: str, url: str, api_key: str | None) -> Any:
    """`/v1/receipts/ID`; ends with a message and exit code 2 if it cannot be had."""
    import httpx

    headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
    try:
        response = httpx.get(f"{url}/v1/receipts/{quote(request_id, safe='')}", headers=headers, timeout=TIMEOUT_S)
    except (httpx.HTTPError, httpx.InvalidURL, UnicodeError) as error:
        fail(f"no server answers at {url} ({error or type(error).__name__}); give its address with --base-url")
    try:
        body = response.json()
        message = body["error"]["message"] if response.status_code != 200 else ""
    except (ValueError, KeyError, TypeError):
        fail(f"{url} answered HTTP {response.status_code}, and not as kvstream does; check --base-url")
    if response.status_code == 401:
        wrong = "does not take this key" if api_key else "asks for a key"
        fail(f"the server at {url} {wrong}: give one of its `api_keys` with --api-key or OPENAI_API_KEY")
    if response.status_code == 404:
        fail(
            f"the server at {url} keeps no receipt of {request_id}: ids are the `id` of an answer, each decode worker "
            "keeps its last 1,024 receipts, and they end with it"
        )
    if response.status_code != 200:
        fail(f"the server at {url} answered HTTP {response.status_code}: {message}")
    return body
