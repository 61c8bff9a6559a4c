"""An open-loop load generator for OpenAI-compatible servers, with the flags and JSON names of vLLM's `bench serve`.

Open loop: requests start when they are scheduled, whatever the server does, and latency counts from the scheduled
start, so that a slow server cannot hide its queue.
"""

from __future__ import annotations

import asyncio
import json
import math
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from scripts.load_metrics import METRICS, TITLES, RequestResult, details, parse_goodput, summarize
from scripts.load_workload import (
    SAMPLE_TEXT,
    PlannedRequest,
    arrival_times,
    random_requests,
    read_mooncake,
    replay,
)

CHAT_ENDPOINT = "/v1/chat/completions"


class LoadError(Exception):
    """A load test that cannot run; the message says what to do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadConfig:
    """One load test; field names are vLLM's flags."""

    base_url: str = "http://127.0.0.1:8000"
    endpoint: str = "/v1/completions"
    model: str | None = None
    api_key: str | None = None
    dataset_name: str = "random"
    dataset_path: Path | None = None
    random_input_len: int = 1024
    random_output_len: int = 128
    random_range_ratio: float = 0.0
    random_prefix_len: int = 0
    trace_speed: float = 1.0
    trace_start_s: float = 0.0
    trace_end_s: float = math.inf
    trace_length_scale: float = 1.0
    num_prompts: int = 1000
    request_rate: float = math.inf
    burstiness: float = 1.0
    max_concurrency: int | None = None
    num_warmups: int = 0
    seed: int = 0
    temperature: float = 0.0
    ignore_eos: bool = True
    extra_body: dict[str, Any] = field(default_factory=dict)
    goodput: tuple[str, ...] = ()
    percentile_metrics: tuple[str, ...] = METRICS
    metric_percentiles: tuple[float, ...] = (99.0,)
    request_timeout_s: float = 600.0


def run_load(config: LoadConfig, *, console: Console | None = None) -> tuple[dict[str, Any], list[RequestResult]]:
    """The report and the single results. Raises LoadError."""
    return asyncio.run(run_load_async(config, console=console or Console(stderr=True)))


async def run_load_async(config: LoadConfig, *, console: Console) -> tuple[dict[str, Any], list[RequestResult]]:
    """The same inside a running event loop."""
    _check(config)
    headers = {"authorization": f"Bearer {config.api_key}"} if config.api_key else {}
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    timeout = httpx.Timeout(config.request_timeout_s, pool=None)
    async with httpx.AsyncClient(base_url=config.base_url, headers=headers, limits=limits, timeout=timeout) as client:
        model, max_context = await _served_model(client, config.model)
        pool = await _token_pool(client, model)
        planned = _plan(config, pool)
        fitting = [p for p in planned if max_context is None or len(p.prompt) + p.output_tokens <= max_context]
        if not fitting:
            raise LoadError(
                f"no request fits the model's context of {max_context} tokens; ask for shorter ones "
                "(--random-input-len, or --trace-length-scale for a trace)"
                if planned
                else "the workload has no request: see --num-prompts, --trace-start and --trace-end"
            )
        if len(fitting) < len(planned):
            console.print(f"left out {len(planned) - len(fitting)} requests longer than the context of {max_context}")
        for _ in range(config.num_warmups):
            warmup = await _send(client, config, model, fitting[0], time.monotonic())
            if not warmup.ok:
                raise LoadError(f"the warm-up request failed: {warmup.error}")
        results, duration_s = await _run(client, config, model, fitting, console)
    numbers = summarize(
        results,
        duration_s=duration_s,
        percentiles=config.metric_percentiles,
        goals_ms=parse_goodput(config.goodput),
    )
    report = {
        "date": datetime.now().strftime("%Y%m%d-%H%M%S"),
        "backend": "openai-chat" if config.endpoint == CHAT_ENDPOINT else "openai",
        "model_id": model,
        "num_prompts": len(fitting),
        "request_rate": config.request_rate if math.isfinite(config.request_rate) else "inf",
        "burstiness": config.burstiness,
        "max_concurrency": config.max_concurrency,
        **numbers,
    }
    return report, results


def _check(config: LoadConfig) -> None:
    problems = {
        "--num-prompts must be at least 1": config.num_prompts < 1,
        "--request-rate must be positive": not config.request_rate > 0,
        "--burstiness must be positive": not config.burstiness > 0,
        "--max-concurrency must be at least 1": config.max_concurrency is not None and config.max_concurrency < 1,
        "--random-range-ratio must be in [0, 1)": not 0 <= config.random_range_ratio < 1,
        "--trace-speed and --trace-length-scale must be positive": min(config.trace_speed, config.trace_length_scale)
        <= 0,
        "--dataset-name is random or mooncake": config.dataset_name not in ("random", "mooncake"),
        "--dataset-path must name the trace file": config.dataset_name == "mooncake" and config.dataset_path is None,
        f"--percentile-metrics: {', '.join(METRICS)}": not set(config.percentile_metrics) <= set(METRICS),
        "--metric-percentiles must be within 0 and 100": any(not 0 <= p <= 100 for p in config.metric_percentiles),
    }
    for problem, wrong in problems.items():
        if wrong:
            raise LoadError(problem)
    try:
        parse_goodput(config.goodput)
    except ValueError as error:
        raise LoadError(str(error)) from None


def _plan(config: LoadConfig, pool: Sequence[int]) -> list[PlannedRequest]:
    rng = np.random.default_rng(config.seed)
    if config.dataset_name == "random":
        starts = arrival_times(config.num_prompts, rate=config.request_rate, burstiness=config.burstiness, rng=rng)
        return random_requests(
            starts,
            pool=pool,
            input_tokens=config.random_input_len,
            output_tokens=config.random_output_len,
            range_ratio=config.random_range_ratio,
            prefix_tokens=config.random_prefix_len,
            rng=rng,
        )
    assert config.dataset_path is not None
    try:
        rows = read_mooncake(config.dataset_path.read_text().splitlines())
    except (OSError, ValueError) as error:
        raise LoadError(f"{config.dataset_path}: {error}") from None
    window_s = (config.trace_start_s, config.trace_end_s)
    planned = replay(
        rows,
        pool=pool,
        speed=config.trace_speed,
        window_s=window_s,
        length_scale=config.trace_length_scale,
        seed=config.seed,
    )
    return planned[: config.num_prompts]


async def _served_model(client: httpx.AsyncClient, wanted: str | None) -> tuple[str, int | None]:
    try:
        response = await client.get("/v1/models")
    except httpx.HTTPError as error:
        raise LoadError(f"no server answers at {client.base_url}: {error or type(error).__name__}") from None
    if response.status_code != 200:
        raise LoadError(f"the server at {client.base_url} refuses: {_error_of(response.status_code, response.content)}")
    cards = response.json()["data"]
    for card in cards:
        if wanted in (None, card["id"]):
            return str(card["id"]), card.get("max_model_len")
    raise LoadError(f"the server has no model {wanted!r}; models: {', '.join(card['id'] for card in cards)}")


async def _token_pool(client: httpx.AsyncClient, model: str) -> list[int]:
    response = await client.post("/tokenize", json={"model": model, "prompt": SAMPLE_TEXT, "add_special_tokens": False})
    if response.status_code != 200:
        raise LoadError(f"the server cannot tokenize: {_error_of(response.status_code, response.content)}")
    return sorted(set(response.json()["tokens"]))


async def _run(
    client: httpx.AsyncClient, config: LoadConfig, model: str, planned: Sequence[PlannedRequest], console: Console
) -> tuple[list[RequestResult], float]:
    slots = asyncio.Semaphore(config.max_concurrency or len(planned))
    columns = (TextColumn("requests"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        bar = progress.add_task("requests", total=len(planned))
        began = time.monotonic()

        async def one(request: PlannedRequest) -> RequestResult:
            await asyncio.sleep(max(0.0, began + request.start_s - time.monotonic()))
            async with slots:
                result = await _send(client, config, model, request, began + request.start_s)
            result.scheduled_s = request.start_s
            progress.advance(bar)
            return result

        results = await asyncio.gather(*(one(request) for request in planned))
        return results, time.monotonic() - began


async def _send(
    client: httpx.AsyncClient, config: LoadConfig, model: str, request: PlannedRequest, scheduled: float
) -> RequestResult:
    """One request; `scheduled` is the monotonic time it was due. Failures are results, too."""
    result = RequestResult(prompt_tokens=len(request.prompt), scheduled_s=0.0)
    try:
        async with client.stream("POST", config.endpoint, json=_body(config, model, request)) as response:
            if response.status_code != 200:
                result.error = _error_of(response.status_code, await response.aread())
                return result
            await _read_stream(response, result, scheduled)
    except httpx.HTTPError as error:
        result.error = f"{type(error).__name__}: {error}"
    if result.ok and not result.output_tokens:
        result.error = "the answer has no tokens"
    return result


async def _read_stream(response: httpx.Response, result: RequestResult, scheduled: float) -> None:
    texts: list[str] = []
    chunks, last, finished = 0, scheduled, False
    async for data in _sse(response):
        if data == "[DONE]":
            finished = True
            break
        now = time.monotonic()
        event = json.loads(data)
        if error := event.get("error"):
            result.error = str(error.get("message") if isinstance(error, dict) else error)
            return
        result.receipt = event.get("kv_receipt") or result.receipt
        if usage := event.get("usage"):
            result.output_tokens = usage["completion_tokens"]
            result.prompt_tokens = usage["prompt_tokens"] or result.prompt_tokens
        for choice in event.get("choices") or ():
            text = choice.get("text", (choice.get("delta") or {}).get("content")) or ""
            is_empty_end = choice.get("finish_reason") and not text
            is_role_only = bool((choice.get("delta") or {}).get("role")) and not text
            if is_empty_end or is_role_only:
                continue
            if chunks == 0:
                result.ttft_s = now - scheduled
            else:
                result.itl_s.append(now - last)
            chunks, last = chunks + 1, now
            texts.append(text)
    result.e2e_s = last - scheduled
    result.text = "".join(texts)
    result.output_tokens = result.output_tokens or chunks
    if not finished:
        result.error = "the stream ended without [DONE]"


async def _sse(response: httpx.Response) -> AsyncIterator[str]:
    async for line in response.aiter_lines():
        if line.startswith("data:"):
            yield line[5:].strip()


def _body(config: LoadConfig, model: str, request: PlannedRequest) -> dict[str, Any]:
    body: dict[str, Any] = {
        "model": model,
        "max_tokens": request.output_tokens,
        "temperature": config.temperature,
        "stream": True,
        "stream_options": {"include_usage": True},
        "ignore_eos": config.ignore_eos,
        **config.extra_body,
    }
    if config.endpoint == CHAT_ENDPOINT:  # chats take text: words picked by the same random numbers
        words = SAMPLE_TEXT.split()
        text = " ".join(words[token % len(words)] for token in request.prompt)
        return {**body, "messages": [{"role": "user", "content": text}]}
    return {**body, "prompt": list(request.prompt)}


def _error_of(status: int, content: bytes) -> str:
    try:
        return f"HTTP {status}: {json.loads(content)['error']['message']}"
    except (ValueError, KeyError, TypeError):
        return f"HTTP {status}"


def save_report(
    report: dict[str, Any], results: Sequence[RequestResult], *, path: Path, detailed: bool, config: LoadConfig
) -> None:
    """The JSON file of --save-result."""
    extra = details(results) if detailed else {}
    settings = {k: v for k, v in asdict(config).items() if k in ("dataset_name", "seed", "trace_speed", "extra_body")}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**report, **settings, **extra}, indent=2, default=str) + "\n")


def table_of(report: dict[str, Any], *, metrics: Sequence[str]) -> Table:
    """The report as vLLM prints it."""
    table = Table(title="Serving Benchmark Result", show_header=False, min_width=50)
    table.add_column()
    table.add_column(justify="right")
    rows = [
        ("Successful requests", f"{report['completed']}"),
        ("Failed requests", f"{report['failed']}"),
        ("Request rate (req/s)", f"{report['request_rate']}"),
        ("Benchmark duration (s)", f"{report['duration']:.2f}"),
        ("Total input tokens", f"{report['total_input_tokens']}"),
        ("Total generated tokens", f"{report['total_output_tokens']}"),
        ("Request throughput (req/s)", f"{report['request_throughput']:.2f}"),
        ("Output token throughput (tok/s)", f"{report['output_throughput']:.2f}"),
        ("Total token throughput (tok/s)", f"{report['total_token_throughput']:.2f}"),
    ]
    if report["request_goodput"] is not None:
        rows.append(("Request goodput (req/s)", f"{report['request_goodput']:.2f}"))
    for level, entry in report["kv_levels"].items():
        rows.append((f"KV as {level}", f"{entry['chunks']} chunks, {entry['bytes'] / 1e6:.2f} MB"))
    for row in rows:
        table.add_row(*row)
    for metric in metrics:
        table.add_section()
        table.add_row(f"[bold]{TITLES[metric]}[/]", "")
        for key, value in report.items():
            if key.endswith(f"_{metric}_ms") and not key.startswith("std"):
                table.add_row(f"{key.split('_')[0].capitalize()} {metric.upper()} (ms)", f"{value:.2f}")
    return table
