"""`kvstream simulate`: the whole cluster in virtual time, on costs and a workload from files."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from scripts.cli_errors import clean_errors, fail

COSTS = Path(__file__).resolve().parent.parent / "docs" / "benchmarks" / "costs-epyc-2core-202611.json"
WORKLOAD, LINK, CLUSTER = "Workload", "Link", "Cluster"


def simulate(
    policy: Annotated[Path | None, typer.Option(help="SLO policy, YAML. Default: its defaults.")] = None,
    costs: Annotated[Path, typer.Option(help="What things take, from scripts/measure_costs.py.")] = COSTS,
    trace: Annotated[
        Path | None,
        typer.Option(
            help="Mooncake trace, JSONL: when requests come, lengths, shared blocks.", rich_help_panel=WORKLOAD
        ),
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Only so many rows of it.", min=1, rich_help_panel=WORKLOAD)] = None,
    time_scale: Annotated[
        float, typer.Option(help="2: every wait of the trace twice as long.", rich_help_panel=WORKLOAD)
    ] = 1.0,
    length_scale: Annotated[
        float, typer.Option(help="Its lengths and blocks times this, for small models.", rich_help_panel=WORKLOAD)
    ] = 1.0,
    requests: Annotated[
        int | None, typer.Option(help="Instead of a trace: so many at random times.", min=1, rich_help_panel=WORKLOAD)
    ] = None,
    prompt_tokens: Annotated[
        int, typer.Option(help="Mean; within half of it.", min=2, rich_help_panel=WORKLOAD)
    ] = 3000,
    output_tokens: Annotated[int, typer.Option(min=1, rich_help_panel=WORKLOAD)] = 50,
    rate: Annotated[float, typer.Option(help="Requests a second.", rich_help_panel=WORKLOAD)] = 1.0,
    documents: Annotated[
        int | None,
        typer.Option(help="So many different prompts. Default: no two alike.", min=1, rich_help_panel=WORKLOAD),
    ] = None,
    stored: Annotated[
        bool, typer.Option(help="All sources have them from the start.", rich_help_panel=WORKLOAD)
    ] = False,
    link_mbps: Annotated[
        float | None, typer.Option(help="Of each source's link to each decode worker.", rich_help_panel=LINK)
    ] = None,
    link_trace: Annotated[
        Path | None, typer.Option(help="Or as a file says: lines of `until_s Mbit/s`, repeated.", rich_help_panel=LINK)
    ] = None,
    beta: Annotated[
        float | None,
        typer.Option(
            help="Or link rate / (raw KV bytes a token * prefill tokens a second); scales a --link-trace.",
            rich_help_panel=LINK,
        ),
    ] = None,
    delay_ms: Annotated[float, typer.Option(help="One way.", min=0, rich_help_panel=LINK)] = 0.5,
    num_prefill: Annotated[int, typer.Option(min=0, rich_help_panel=CLUSTER)] = 1,
    num_decode: Annotated[int, typer.Option(min=1, rich_help_panel=CLUSTER)] = 1,
    kv_tokens: Annotated[
        int, typer.Option(help="That a decode worker's pages hold.", min=16, rich_help_panel=CLUSTER)
    ] = 1 << 22,
    seed: Annotated[int, typer.Option(help="The same seed gives the same run.")] = 0,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures to this file.")] = None,
) -> None:
    """A workload through a cluster in virtual time: what a policy would give, before it is served."""
    from cluster.cost_model import CostModel
    from cluster.policy import load_policy
    from cluster.simulate_run import BadWorkload, mooncake_arrivals, random_arrivals, run_workload
    from cluster.simulation import SimulatedCluster
    from cluster.yaml_file import ConfigError
    from decode.slo import SLOPolicy
    from transport.errors import BadTrace

    if (trace is None) == (requests is None):
        fail("give a trace with --trace, or a number of requests at random times with --requests")
    positive = {"--rate": rate, "--time-scale": time_scale, "--length-scale": length_scale}
    for name, value in (positive | {"--link-mbps": link_mbps, "--beta": beta}).items():
        if value is not None and not 0 < value < math.inf:
            fail(f"{name} {value:g}: must be more than 0")
    try:
        known = CostModel.load(costs)
    except (OSError, ValueError, TypeError, KeyError) as error:
        fail(f"{costs}: no costs as scripts/measure_costs.py writes them: {error}")
    with clean_errors(ConfigError):
        slo = SLOPolicy() if policy is None else load_policy(policy, known_levels=tuple(known.chunk_bytes))
    with clean_errors(BadTrace, BadWorkload, OSError):
        link = _link(known, link_mbps, link_trace, beta)
        cluster = SimulatedCluster(
            known, slo, rate=link, delay_s=delay_ms / 1e3, num_prefill=num_prefill, num_decode=num_decode,
            kv_tokens=kv_tokens, seed=seed,
        )  # fmt: skip
        if trace is not None:
            with trace.open() as lines:
                rows = mooncake_arrivals(lines, time_scale=time_scale, length_scale=length_scale, limit=limit)
                found = run_workload(cluster, rows, known)
        else:
            arrivals = random_arrivals(
                requests or 0, prompt_tokens=prompt_tokens, output_tokens=output_tokens, rate=rate,
                num_documents=documents, stored=stored, seed=seed,
            )  # fmt: skip
            found = run_workload(cluster, arrivals, known)
    found["costs"] = known.where
    _print(found)
    if json_file is not None:
        try:
            json_file.write_text(json.dumps(found, indent=1) + "\n")
        except OSError as error:
            fail(f"{json_file} cannot be written: {error.strerror}")


def _link(costs: Any, link_mbps: float | None, link_trace: Path | None, beta: float | None) -> Any:
    """Bytes a second, or a trace of them."""
    from transport.rate_trace import RateTrace

    if link_mbps is not None and (link_trace is not None or beta is not None):
        fail("--link-mbps is the link's rate already; leave out --link-trace and --beta")
    if link_trace is None:
        if link_mbps is None and beta is None:
            fail("say how fast the links are, with --link-mbps, --beta or --link-trace")
        return link_mbps * 125_000 if link_mbps is not None else costs.link_bytes_per_s(beta)
    found = RateTrace.parse(link_trace.read_text())
    if beta is None:
        return found
    scale = costs.link_bytes_per_s(beta) / found.mean_bytes_per_s
    return RateTrace(found.until_s, tuple(rate * scale for rate in found.bytes_per_s))


def _print(found: dict[str, Any]) -> None:
    console = Console(highlight=False)

    def line(name: str, text: str) -> None:
        console.print(f"{name:18s} {text}", soft_wrap=True, markup=False)

    def times(of: dict[str, float] | None) -> str:
        return "none" if of is None else "  ".join(f"{name} {value:.1f} ms" for name, value in of.items())

    failed = ", ".join(f"{count} {why}" for why, count in found["failed"].items())
    line("requests", f"{found['requests']}" + (f", of which failed: {failed}" if failed else ""))
    in_time = found["slo_attainment"]
    line("in time", "no target: the policy says as fast as possible" if in_time is None else f"{in_time:.1%}")
    line("TTFT", times(found["ttft_ms"]))
    line("ITL", times(found["itl_ms"]))
    loss = found["quality_loss"]
    line("quality loss", "none" if loss is None else f"{loss:.4f} nats a token promised, mean")
    line("chunks by level", "  ".join(f"{level} {share:.1%}" for level, share in found["levels"].items()) or "none")
    line("recomputed", f"{found['recomputed_share']:.1%} of the chunks")
    line("loaded", f"{found['bytes_per_request'] / 1e6:.2f} MB a request")
    line("prefix hits", f"{found['prefix_hits']:.1%} of the requests, {found['stored_chunks']:.1%} of the chunks")
    speed = f"{found['requests_per_wall_s']:.0f} requests a second"
    line("simulated", f"{found['simulated_s']:.1f} s in {found['wall_s']:.1f} s: {speed}")
