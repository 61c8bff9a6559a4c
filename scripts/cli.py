"""The `kvstream` command. Options, clear errors and exit codes; the work is elsewhere.

Exit codes: 0 done, 1 a bug (with its traceback), 2 something the user can put right (with one message).
Commands import what they need when they run, so that `kvstream --help` does not wait for torch.
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import socket
from enum import StrEnum
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from scripts.cli_errors import clean_errors, err, fail
from scripts.explain_command import explain
from scripts.plan_command import plan
from scripts.simulate_command import simulate

app = typer.Typer(
    help="LLM serving with prefill and decode on different workers and the KV cache streamed between them.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

SERVE, TRAFFIC, TRACE, REPORT = "Serving", "Traffic", "Trace replay", "Report"


class SchemaOf(StrEnum):
    """The files that users write."""

    POLICY = "policy"
    SERVE = "serve"


def check_environment() -> None:
    """Refuses to run beside the PyPI package `kernels`, whose import name is ours."""
    with contextlib.suppress(PackageNotFoundError):
        fail(
            f"the package `kernels` {version('kernels')} is installed in this environment and takes the name of "
            "kvstream's own `kernels`; remove it (pip uninstall kernels) or use the .venv that scripts/setup.sh makes"
        )


def check_port(host: str, port: int) -> None:
    """Refuses a port that cannot be listened on."""
    if port == 0:
        return
    try:
        family, kind, proto, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, proto) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except socket.gaierror:
        fail(f"--host {host} is no address of this machine")
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            fail(f"port {port} on {host} is in use; stop what uses it, or choose another with --port (0: any free one)")
        fail(f"cannot listen on {host}:{port}: {error.strerror}; choose another --host or --port")


def check_model(path: str) -> None:
    """Refuses a folder that holds no model."""
    folder = Path(path)
    if not folder.is_dir():
        fail(f"model folder {path} does not exist; --model takes a folder that transformers can load")
    if not (folder / "config.json").is_file():
        fail(f"{path} holds no model: config.json is missing; --model takes a folder that transformers can load")


def check_writable(path: Path | None) -> None:
    """Refuses a place that cannot be written, before minutes are spent on what should stand there."""
    if path is None:
        return
    nearest = path.absolute()
    while not nearest.exists():
        nearest = nearest.parent
    if not os.access(nearest, os.W_OK) or (nearest.is_file() and nearest != path.absolute()):
        fail(f"{path} cannot be written")


@app.command()
def serve(
    config: Annotated[Path | None, typer.Option(help="YAML file; see examples/serve.yaml.")] = None,
    model: Annotated[str | None, typer.Option(help="Model folder. Default: the bundled model.")] = None,
    host: Annotated[str | None, typer.Option(help="Where to listen. Default: 127.0.0.1.")] = None,
    port: Annotated[int | None, typer.Option(help="Default: 8000. 0: any free one.", min=0, max=65535)] = None,
    address: Annotated[
        str | None, typer.Option(help="local: a Ray of its own (default); auto or HOST:PORT: a running cluster.")
    ] = None,
    policy: Annotated[
        Path | None, typer.Option(help="SLO policy, YAML, reread when it changes; see examples/policy-*.yaml.")
    ] = None,
    num_prefill: Annotated[int | None, typer.Option(help="Prefill workers. Default: 1.", min=0)] = None,
    num_decode: Annotated[int | None, typer.Option(help="Decode workers. Default: 1.", min=1)] = None,
    dtype: Annotated[str | None, typer.Option(help="bfloat16 (default) or float32.")] = None,
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda, or auto (default): a GPU where there is one for every worker.")
    ] = None,
    kv_cache_dtype: Annotated[
        str | None, typer.Option(help="Pages of decode workers: auto (default: as --dtype), int8, int4 or fp8.")
    ] = None,
    api_key: Annotated[
        str | None, typer.Option(help="Asked for on every path but /health.", envvar="KVSTREAM_API_KEY")
    ] = None,
) -> None:
    """Serve a model over the OpenAI API. Without options: the bundled model, one worker of each kind, port 8000."""
    check_environment()
    from cluster.config import StartRefused, load_config
    from cluster.yaml_file import ConfigError

    with clean_errors(ConfigError):
        settings = load_config(
            config,
            model=model,
            host=host,
            port=port,
            address=address,
            policy=policy,
            num_prefill=num_prefill,
            num_decode=num_decode,
            dtype=dtype,
            device=device,
            kv_cache_dtype=kv_cache_dtype,
            api_keys=[api_key] if api_key else None,
        )
    check_model(settings.model)
    check_port(settings.host, settings.port)

    from cluster.launch import serve as serve_cluster
    from prefill.model import ModelRefused

    with clean_errors(ConfigError, StartRefused, ModelRefused), contextlib.suppress(KeyboardInterrupt):
        serve_cluster(settings)


@app.command()
def demo(
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the numbers to this file.")] = None,
    report: Annotated[Path, typer.Option(help="Folder of the HTML report.")] = Path("demo-report"),
    repeats: Annotated[int, typer.Option(help="Ask each question so often: slower, less noisy.", min=1)] = 1,
) -> None:
    """Questions about stored documents over links of several speeds, each served in four ways. Takes minutes."""
    check_environment()
    from cluster.config import StartRefused
    from cluster.yaml_file import ConfigError
    from prefill.model import ModelRefused
    from scripts.demo_run import run_demo

    for target in (json_file, report):
        check_writable(target)
    with clean_errors(ConfigError, StartRefused, ModelRefused):
        raise typer.Exit(run_demo(json_file, report, repeats) or 0)


@app.command()
def bench(
    base_url: Annotated[str, typer.Option(help="The server.", rich_help_panel=SERVE)] = "http://127.0.0.1:8000",
    endpoint: Annotated[str, typer.Option(rich_help_panel=SERVE)] = "/v1/completions",
    model: Annotated[str | None, typer.Option(help="Default: the first one served.", rich_help_panel=SERVE)] = None,
    api_key: Annotated[str | None, typer.Option(envvar="OPENAI_API_KEY", rich_help_panel=SERVE)] = None,
    extra_body: Annotated[
        str,
        typer.Option(help="""JSON put into every request, such as '{"kv": {"mode": "raw"}}'.""", rich_help_panel=SERVE),
    ] = "{}",
    dataset_name: Annotated[str, typer.Option(help="random or mooncake.", rich_help_panel=TRAFFIC)] = "random",
    random_input_len: Annotated[int, typer.Option(min=1, rich_help_panel=TRAFFIC)] = 1024,
    random_output_len: Annotated[int, typer.Option(min=1, rich_help_panel=TRAFFIC)] = 128,
    random_range_ratio: Annotated[
        float, typer.Option(help="Lengths within (1 ± this) of those.", rich_help_panel=TRAFFIC)
    ] = 0.0,
    random_prefix_len: Annotated[
        int, typer.Option(help="Tokens that all prompts begin with.", min=0, rich_help_panel=TRAFFIC)
    ] = 0,
    num_prompts: Annotated[int, typer.Option(rich_help_panel=TRAFFIC)] = 1000,
    request_rate: Annotated[
        float, typer.Option(help="Requests per second; inf: all at once.", rich_help_panel=TRAFFIC)
    ] = math.inf,
    burstiness: Annotated[
        float, typer.Option(help="1: Poisson; less: burstier; more: steadier.", rich_help_panel=TRAFFIC)
    ] = 1.0,
    max_concurrency: Annotated[int | None, typer.Option(rich_help_panel=TRAFFIC)] = None,
    num_warmups: Annotated[int, typer.Option(min=0, rich_help_panel=TRAFFIC)] = 0,
    temperature: Annotated[float, typer.Option(min=0, rich_help_panel=TRAFFIC)] = 0.0,
    ignore_eos: Annotated[bool, typer.Option(help="Always generate the full length.", rich_help_panel=TRAFFIC)] = True,
    seed: Annotated[int, typer.Option(min=0, rich_help_panel=TRAFFIC)] = 0,
    dataset_path: Annotated[Path | None, typer.Option(help="Mooncake trace, JSONL.", rich_help_panel=TRACE)] = None,
    trace_speed: Annotated[float, typer.Option(help="2: twice as fast as it was.", rich_help_panel=TRACE)] = 1.0,
    trace_start: Annotated[float, typer.Option(help="Window of trace time, seconds.", rich_help_panel=TRACE)] = 0.0,
    trace_end: Annotated[float, typer.Option(rich_help_panel=TRACE)] = math.inf,
    trace_length_scale: Annotated[
        float, typer.Option(help="Lengths and blocks times this, for models of short context.", rich_help_panel=TRACE)
    ] = 1.0,
    goodput: Annotated[
        list[str] | None, typer.Option(help="Goals in ms: --goodput ttft:500 tpot:100", rich_help_panel=REPORT)
    ] = None,
    more_goals: Annotated[list[str] | None, typer.Argument(hidden=True)] = None,
    percentile_metrics: Annotated[str, typer.Option(rich_help_panel=REPORT)] = "ttft,tpot,itl,e2el",
    metric_percentiles: Annotated[str, typer.Option(rich_help_panel=REPORT)] = "99",
    save_result: Annotated[bool, typer.Option(help="Write JSON.", rich_help_panel=REPORT)] = False,
    save_detailed: Annotated[bool, typer.Option(help="With every request in it.", rich_help_panel=REPORT)] = False,
    result_filename: Annotated[Path | None, typer.Option(rich_help_panel=REPORT)] = None,
) -> None:
    """Load an OpenAI-compatible server: open loop, with the flags and JSON names of vLLM's `bench serve`."""
    from scripts.loadgen import LoadConfig, LoadError, run_load, save_report, table_of

    if more_goals and not goodput:
        fail(f"unexpected argument {more_goals[0]!r}")
    with clean_errors(LoadError):
        config = LoadConfig(
            base_url=base_url,
            endpoint=endpoint,
            model=model,
            api_key=api_key,
            dataset_name=dataset_name,
            dataset_path=dataset_path,
            random_input_len=random_input_len,
            random_output_len=random_output_len,
            random_range_ratio=random_range_ratio,
            random_prefix_len=random_prefix_len,
            trace_speed=trace_speed,
            trace_start_s=trace_start,
            trace_end_s=trace_end,
            trace_length_scale=trace_length_scale,
            num_prompts=num_prompts,
            request_rate=request_rate,
            burstiness=burstiness,
            max_concurrency=max_concurrency,
            num_warmups=num_warmups,
            seed=seed,
            temperature=temperature,
            ignore_eos=ignore_eos,
            extra_body=_json_object("--extra-body", extra_body),
            goodput=(*(goodput or ()), *(more_goals or ())),
            percentile_metrics=tuple(percentile_metrics.split(",")),
            metric_percentiles=_numbers("--metric-percentiles", metric_percentiles),
        )
        report, results = run_load(config, console=err)
    Console().print(table_of(report, metrics=config.percentile_metrics))
    if save_result or save_detailed or result_filename:
        path = result_filename or Path(f"openai-{report['model_id']}-{report['date']}.json")
        save_report(report, results, path=path, detailed=save_detailed, config=config)
        err.print(f"written to {path}", markup=False)
    for error in sorted({result.error for result in results if result.error})[:5]:
        err.print(f"failed: {error}", markup=False)
    if not report["completed"]:
        raise typer.Exit(2)


@app.command()
def calibrate(
    model: Annotated[Path, typer.Option(help="Model folder.")],
    out: Annotated[Path, typer.Option(help="File for the profile.")],
    text: Annotated[
        Path | None,
        typer.Option(
            help="Text that the model was not trained on, a file or a folder. Default: heldout.txt beside it."
        ),
    ] = None,
    report: Annotated[Path | None, typer.Option(help="Also write what was measured, as Markdown.")] = None,
) -> None:
    """Measure what each level of the codec costs a model, and write its profile. Takes minutes."""
    check_environment()
    check_model(str(model))
    text = text if text is not None else model / "heldout.txt"
    if not text.exists():
        fail(f"calibration text {text} does not exist; give a text file or a folder of .txt files with --text")
    for target in (out, report):
        check_writable(target)
    from rich.progress import Progress

    from prefill.model import ModelRefused
    from scripts.calibrate_model import calibrate_model

    with Progress(console=err, transient=True) as bars, clean_errors(ModelRefused):
        bar = bars.add_task("calibrating", total=1.0)
        calibrate_model(
            model,
            out,
            text,
            report_path=report,
            progress=lambda what, share: bars.update(bar, description=what, completed=share),
        )
    err.print(f"written to {out}", markup=False)


app.command()(explain)
app.command()(simulate)
app.command()(plan)


@app.command()
def schema(
    file: Annotated[SchemaOf, typer.Argument(help="Which file: policy or serve.")] = SchemaOf.POLICY,
) -> None:
    """Print the JSON Schema of a policy file or a serve file, for editors and for checks of your own."""
    from cluster.config import serve_json_schema
    from cluster.policy_schema import policy_json_schema

    typer.echo(json.dumps(policy_json_schema() if file is SchemaOf.POLICY else serve_json_schema(), indent=2))


@app.command("version")
def show_version() -> None:
    """Print the version."""
    try:
        typer.echo(version("kvstream"))
    except PackageNotFoundError:
        typer.echo("unknown (not installed; run scripts/setup.sh)")


def _json_object(option: str, text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        fail(f"{option}: not valid JSON: {error}")
    if not isinstance(value, dict):
        fail(f"{option}: must be a JSON object")
    return value


def _numbers(option: str, text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        fail(f"{option}: {text!r} is no list of numbers such as 50,90,99")


def main() -> None:
    """Entry point."""
    app()


if __name__ == "__main__":
    main()
