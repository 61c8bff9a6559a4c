"""How close the controller comes to an oracle that knows the link, and how far it is ahead of CacheGen's rule.

    python -m scripts.bench_stream --traces ../shared/data --policy examples/policy-bench.yaml --json stream.json

The controller runs as it does in production (fill machine, estimators, transfer protocol, link scheduler), in virtual
time on measured costs (cluster/simulation.py). Links follow measured bandwidth traces, rescaled to a stated

    beta = link rate / (raw KV bytes a token * prefill tokens a second)

which is below 1 where computing a prompt is faster than loading it raw, on a toy and on an H200 alike. What it is
compared with (scripts/stream_baselines.py) is in closed form and pays for nothing but bytes, decoding and computing.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import itertools
import json
import random
import statistics
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cluster.cost_model import CostModel
from cluster.policy import load_policy
from cluster.sim_decode import SimRequest
from cluster.simulation import Arrival, SimulatedCluster, promised_loss
from decode.slo import SLOPolicy
from scripts.stream_baselines import TEXT, Baselines, Job, Outcome
from transport.rate_trace import RateTrace

COSTS = Path(__file__).resolve().parent.parent / "docs" / "benchmarks" / "costs-epyc-2core-202611.json"
BETAS = (0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
FAMILIES = ("cloud", "mobile")
ORACLE_SHARES = (0.55, 0.75, 0.9, 0.97)  # of requests that the oracle can just serve in time: this sets the targets
DELAY_S = 0.01  # one way
CONSTANT_BETAS = tuple(0.01 * 10 ** (i / 4) for i in range(13))  # 0.01 to 10
# CacheGen's own setting: Mistral-7B (131,072 bytes of fp16 KV a token), 3 Gbit/s, an A40 that prefills some 4,000 to
# 6,000 tokens a second (14.5 GFLOP a token at half to three quarters of its 150 TFLOP/s): beta 0.48 to 0.72.
CACHEGEN_BETAS = (0.48, 0.72)
EIGHT_BIT = 8.5 / 16  # of raw: integers of 8 bits and their scales (scripts/bench_codec.py)


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    family: str
    beta: float
    recompute: bool
    num_requests: int
    seed: int

    @property
    def name(self) -> str:
        return f"{self.family} beta={self.beta:g} {'recompute' if self.recompute else 'load only'}"


# -- inputs -------------------------------------------------------------------------------------------------------


def read_traces(folder: Path) -> dict[str, list[tuple[tuple[float, ...], tuple[float, ...]]]]:
    """Bandwidth traces by family, each as (ends of its steps in seconds, Mbit/s)."""
    cloud: dict[tuple[str, ...], list[float]] = {}
    with gzip.open(folder / "bandwidth" / "cloudpilot_iperf3_1s.csv.gz", "rt") as file:
        for row in csv.DictReader(file):
            cloud.setdefault((row["src"], row["dst"]), []).append(float(row["bits_per_second"]) / 1e6)
    mobile = []
    for path in sorted((folder / "bandwidth" / "norway_3g").iterdir()):
        steps = [tuple(map(float, line.split())) for line in path.read_text().splitlines() if line.strip()]
        rising = [(at, mbps) for (before, _), (at, mbps) in itertools.pairwise(steps) if at > before]
        if len(rising) > 30 and any(mbps > 0 for _, mbps in rising):
            begin = rising[0][0] - 1.0
            mobile.append((tuple(at - begin for at, _ in rising), tuple(mbps for _, mbps in rising)))
    return {
        "cloud": [
            (tuple(float(i + 1) for i in range(len(rates))), tuple(rates))
            for rates in cloud.values()
            if len(rates) >= 30 and sum(rates) > 0
        ],
        "mobile": mobile,
    }


def read_lengths(folder: Path) -> list[int]:
    """Prompt lengths of the Mooncake trace that have at least two chunks to load."""
    with (folder / "traces" / "mooncake_conversation.jsonl").open() as file:
        lengths = [json.loads(line)["input_length"] for line in file]
    return [length for length in lengths if 600 <= length <= 32_000]


def jobs_of(setting: Setting, costs: CostModel, traces: Any, lengths: Sequence[int]) -> list[Job]:
    rng = random.Random(f"{setting.family}/{setting.beta}/{setting.seed}")
    jobs = []
    for _ in range(setting.num_requests):
        until_s, mbps = rng.choice(traces[setting.family])
        trace = RateTrace(until_s, tuple(mbps))
        scale = costs.link_bytes_per_s(setting.beta) / trace.mean_bytes_per_s
        trace = RateTrace(until_s, tuple(rate * scale for rate in mbps))
        prompt = rng.choice(lengths)
        num_chunks = (prompt - 1) // costs.chunk_tokens
        at = rng.uniform(1.0, trace.period_s)
        jobs.append(Job(at=at, prompt_tokens=prompt, num_chunks=num_chunks, trace=trace, delay_s=DELAY_S))
    return jobs


# -- the controller ------------------------------------------------------------------------------------------------


def last_rate(job: Job) -> float:
    """What the second before brought: all that anybody knows of the link, except the oracle."""
    trace, at = job.trace, job.at - 1.0
    low, high = 1.0, max(trace.bytes_per_s) + 1.0
    while high / low > 1.001:  # the bytes that one second carries
        middle = (low * high) ** 0.5
        low, high = (middle, high) if trace.finish_time(at, middle) <= job.at else (low, middle)
    return max(low, trace.mean_bytes_per_s / 100)


def run_controller(
    job: Job, costs: CostModel, policy: SLOPolicy, *, options: dict[str, Any]
) -> tuple[Outcome, SimRequest]:
    """One request through the production code. Its worker used the link during the second before, as in service."""
    cluster = SimulatedCluster(costs, policy, rate=job.trace, delay_s=job.delay_s)
    level = next((at for at in costs.chunk_bytes if costs.chunk_bytes[at] <= last_rate(job) / 4), costs.nested[-1])
    num_chunks = min(max(1, int(last_rate(job) / 2 / costs.chunk_bytes[level])), 64)
    before = Arrival(
        at=job.at - 1.0, prompt_tokens=num_chunks * costs.chunk_tokens + 1, output_tokens=1, blocks=(2,), stored=True,
        request_id="before", options={"kv_mode": level},
    )  # fmt: skip
    for i in range(12):  # short ones, so that it knows what a request takes from its last chunk to its first token
        short = Arrival(at=job.at - 2.5 + i / 10, prompt_tokens=60, output_tokens=1, blocks=(3,), request_id=f"s{i}")
        cluster.later(short)
    earlier = cluster.later(before)
    cluster.network.later(job.at - 1e-6, lambda: cluster.decode["decode-0"].cancel(earlier))
    arrival = Arrival(
        at=job.at, prompt_tokens=job.prompt_tokens, output_tokens=1, blocks=(1,), stored=True, request_id="r",
        options=options,
    )  # fmt: skip
    (state,) = cluster.run([arrival])
    assert state.ended == "finished" and state.ttft_s is not None and state.fill is not None, state.ended
    cluster.network.run(until_s=cluster.network.now + 10)
    cluster.check_integrity()
    return Outcome(ttft_s=state.ttft_s, levels=tuple(state.levels), num_bytes=state.fill.received_bytes), state


# -- settings on traces ---------------------------------------------------------------------------------------------


def run_setting(work: tuple[Setting, CostModel, SLOPolicy, Any, Sequence[int]]) -> list[dict[str, Any]]:
    """One row a target: what each policy did."""
    setting, costs, policy, traces, lengths = work
    levels = policy.allowed_levels()
    known = Baselines(costs, levels)
    jobs = jobs_of(setting, costs, traces, lengths)
    soonest = sorted(known.fastest(job, recompute=setting.recompute).ttft_s for job in jobs)
    policy = replace(policy, allow_recompute=setting.recompute, refine_to=None)
    rows = []
    for share in ORACLE_SHARES:
        first = min(int(share * len(soonest)), len(soonest) - 2)
        target_s = (soonest[first] + soonest[first + 1]) / 2  # between two requests: for none of them a matter of luck
        outcomes: dict[str, list[Outcome]] = {"controller": [], "oracle": [], "cachegen": []}
        for job in jobs:
            found, _ = run_controller(job, costs, policy, options={"ttft_s": target_s})
            outcomes["controller"].append(found)
            outcomes["oracle"].append(known.oracle(job, target_s, recompute=setting.recompute))
            outcomes["cachegen"].append(
                known.cachegen(job, target_s, recompute=setting.recompute, last_bytes_per_s=last_rate(job))
            )
            for level in levels:
                outcomes.setdefault(level, []).append(known.fixed(job, level))
            if setting.recompute:
                outcomes.setdefault(TEXT, []).append(known.text(job))
        rows.append(
            {
                "setting": setting.name,
                "family": setting.family,
                "beta": setting.beta,
                "recompute": setting.recompute,
                "target_ms": target_s * 1e3,
                "policies": {name: summary(found, target_s, costs) for name, found in outcomes.items()},
            }
        )
    return rows


def summary(outcomes: Sequence[Outcome], target_s: float, costs: CostModel) -> dict[str, Any]:
    times_ms = sorted(outcome.ttft_s * 1e3 for outcome in outcomes)
    kl = dict(costs.promised_kl)
    return {
        "slo_attainment": sum(outcome.ttft_s <= target_s for outcome in outcomes) / len(outcomes),
        "ttft_ms": {f"p{q}": times_ms[min(int(q / 100 * len(times_ms)), len(times_ms) - 1)] for q in (50, 95, 99)},
        "quality_loss": statistics.fmean(promised_loss(outcome.levels, kl) for outcome in outcomes),
        "bytes": statistics.fmean(outcome.num_bytes for outcome in outcomes),
        "recomputed_share": statistics.fmean(outcome.recomputed_share for outcome in outcomes),
    }


def over_settings(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Means over settings, by policy."""
    names = [name for name in rows[0]["policies"] if all(name in row["policies"] for row in rows)]
    found = {}
    for name in names:
        of = [row["policies"][name] for row in rows]
        found[name] = {
            key: statistics.fmean(one[key] for one in of)
            for key in ("slo_attainment", "quality_loss", "bytes", "recomputed_share")
        } | {"ttft_ms": {q: statistics.fmean(one["ttft_ms"][q] for one in of) for q in ("p50", "p95", "p99")}}
    return found


# -- constant links -------------------------------------------------------------------------------------------------


def constant_job(beta: float, costs: CostModel, num_chunks: int) -> Job:
    rate = costs.link_bytes_per_s(beta)
    return Job(
        at=2.0,
        prompt_tokens=num_chunks * costs.chunk_tokens + 100,
        num_chunks=num_chunks,
        trace=RateTrace((1.0,), (rate,)),
        delay_s=0.001,
    )


def constant_links(costs: CostModel, policy: SLOPolicy, num_chunks: int) -> list[dict[str, Any]]:
    """As fast as possible, and with slack, on links that never change. The fixed ways run in the simulator as well, so
    that the two differ by the choice alone."""
    rows = []
    levels = policy.allowed_levels()
    fast = replace(policy, ttft_s=0.0, refine_to=None)
    for beta in CONSTANT_BETAS:
        job = constant_job(beta, costs, num_chunks)
        ways = {mode: run_controller(job, costs, fast, options={"kv_mode": mode})[0].ttft_s for mode in (*levels, TEXT)}
        found = run_controller(job, costs, fast, options={})[0]
        best = min(ways, key=ways.__getitem__)
        row = {"beta": beta, "controller_ms": found.ttft_s * 1e3, "best": best, "best_ms": ways[best] * 1e3}
        row |= {"ratio": found.ttft_s / ways[best], "recomputed_share": found.recomputed_share, "slack": []}
        for level in levels:
            target_s = ways[level] * 1.1  # what just meets it, and a tenth
            slack = run_controller(job, costs, replace(fast, ttft_s=target_s), options={})[0]
            fixed_loss, loss = costs.promised_kl[level], promised_loss(slack.levels, dict(costs.promised_kl))
            row["slack"].append(
                {"level": level, "met": slack.ttft_s <= target_s, "loss": loss, "fixed_loss": fixed_loss}
            )
        rows.append(row)
    return rows


def break_even(costs: CostModel, policy: SLOPolicy, num_chunks: int) -> dict[str, float]:
    """Where loading at the floor takes as long as computing: both ends together against either one."""
    level = policy.allowed_levels()[-1]
    beta = costs.chunk_bytes[level] / costs.chunk_bytes["raw"]
    known = Baselines(costs, (level,))
    for _ in range(30):  # headers, latency and the positions' cost move it a little
        job = constant_job(beta, costs, num_chunks)
        beta *= known.fixed(job, level).ttft_s / known.text(job).ttft_s
    job = constant_job(beta, costs, num_chunks)
    fast = replace(policy, ttft_s=0.0, refine_to=None, levels=(level,), floor=level, ceiling=None)
    both, load, text = (
        run_controller(job, costs, fast, options=options)[0].ttft_s
        for options in ({}, {"kv_mode": level}, {"kv_mode": TEXT})
    )
    return {"beta": beta, "both_s": both, "load_s": load, "text_s": text, "gain": min(load, text) / both}


def against_peers(costs: CostModel, policy: SLOPolicy, num_chunks: int) -> dict[str, Any]:
    """Against 8-bit KV where the link is the bottleneck even for the codec, and against text at CacheGen's beta."""
    slow = constant_job(0.005, costs, num_chunks)
    rate = slow.trace.bytes_per_s[0]
    floor = policy.allowed_levels()[-1]
    fast = replace(policy, ttft_s=0.0, refine_to=None, allow_recompute=False)
    ours = run_controller(slow, costs, fast, options={})[0].ttft_s
    eight_s = Baselines(costs, (floor,)).tail_s(slow) + num_chunks * costs.chunk_bytes["raw"] * EIGHT_BIT / rate
    found: dict[str, Any] = {"eight_bit": {"beta": 0.005, "level": floor, "gain": eight_s / ours}, "text": []}
    for beta in CACHEGEN_BETAS:
        job = constant_job(beta, costs, num_chunks)
        allowed = replace(fast, allow_recompute=True)
        ours = run_controller(job, costs, allowed, options={})[0].ttft_s
        found["text"].append({"beta": beta, "gain": Baselines(costs, (floor,)).text(job).ttft_s / ours})
    return found


# -- the whole ------------------------------------------------------------------------------------------------------


def bars(rows: Sequence[dict[str, Any]], constant: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What the issue asks for, as figures."""

    def of(row: dict[str, Any], name: str, key: str) -> float:
        return float(row["policies"][name][key])

    load = [row for row in rows if not row["recompute"]]
    text = [row for row in rows if row["recompute"]]
    excess = {
        name: statistics.fmean(of(row, name, "quality_loss") - of(row, "oracle", "quality_loss") for row in load)
        for name in ("controller", "cachegen")
    }
    lead = [of(row, "controller", "slo_attainment") - of(row, "cachegen", "slo_attainment") for row in load]
    lead_text = [of(row, "controller", "slo_attainment") - of(row, "cachegen", "slo_attainment") for row in text]
    means = over_settings(load)
    better = [
        name
        for name in means
        if name not in ("controller", "oracle")
        and means[name]["slo_attainment"] >= means["controller"]["slo_attainment"]
        and means[name]["quality_loss"] <= means["controller"]["quality_loss"]
    ]
    shares = [of(row, "controller", "slo_attainment") / of(row, "oracle", "slo_attainment") for row in load]
    return {
        "attainment_of_oracle": statistics.fmean(shares),
        "attainment_of_oracle_worst_setting": min(shares),
        "lead_over_cachegen_worst_points": 100 * min(lead),
        "excess_loss_of_cachegens": excess["controller"] / excess["cachegen"],
        "recompute_settings_above_cachegen": sum(x > 0 for x in lead_text) / max(len(lead_text), 1),
        "recompute_lead_worst_points": 100 * min(lead_text, default=0.0),
        "recompute_attainment_of_oracle": statistics.fmean(
            of(row, "controller", "slo_attainment") / of(row, "oracle", "slo_attainment") for row in text
        ),
        "fixed_choices_better_on_both": better,
        "constant_links_worst_ratio": max(row["ratio"] for row in constant),
        "slack_missed": sum(not one["met"] for row in constant for one in row["slack"]),
        "slack_worse": sum(one["loss"] > one["fixed_loss"] + 1e-9 for row in constant for one in row["slack"]),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--traces", type=Path, required=True, help="folder with bandwidth/ and traces/")
    parser.add_argument("--policy", type=Path, required=True, help="policy file: levels, floor, recompute")
    parser.add_argument("--costs", type=Path, default=COSTS, help="from scripts/measure_costs.py")
    parser.add_argument("--json", type=Path, help="write everything here")
    parser.add_argument("--requests", type=int, default=60, help="per setting")
    parser.add_argument("--betas", type=float, nargs="+", default=BETAS)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    costs, policy = CostModel.load(options.costs), load_policy(options.policy)
    traces, lengths = read_traces(options.traces), read_lengths(options.traces)
    begin = time.monotonic()
    work = [
        (
            Setting(family=family, beta=beta, recompute=recompute, num_requests=options.requests, seed=options.seed),
            costs, policy, traces, lengths,
        )
        for recompute in (False, True)
        for family in FAMILIES
        for beta in options.betas
    ]  # fmt: skip
    with ProcessPoolExecutor(options.processes) as pool:
        rows = [row for found in pool.map(run_setting, work) for row in found]
    constant = constant_links(costs, policy, num_chunks=27)
    result = {
        "policies": over_settings([row for row in rows if not row["recompute"]]),
        "policies_with_recompute": over_settings([row for row in rows if row["recompute"]]),
        "bars": bars(rows, constant),
        "break_even": break_even(costs, policy, num_chunks=27),
        "peers": against_peers(costs, policy, num_chunks=27),
        "constant_links": constant,
        "settings": rows,
        "costs": costs.where,
        "seconds": time.monotonic() - begin,
    }
    if options.json is not None:
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    for title in ("policies", "policies_with_recompute"):
        print(f"\n{title}: {'':12s} attainment   loss     p50 ms   p95 ms   MB     text")
        for name, of in result[title].items():
            print(
                f"  {name:24s} {of['slo_attainment']:8.3f} {of['quality_loss']:9.4f} {of['ttft_ms']['p50']:9.0f}"
                f" {of['ttft_ms']['p95']:9.0f} {of['bytes'] / 1e6:7.2f} {of['recomputed_share']:6.2f}"
            )
    print(json.dumps({key: result[key] for key in ("bars", "break_even", "peers", "seconds")}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
