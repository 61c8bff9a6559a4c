"""The virtual half of scripts/bench_sockets.py: the same requests in the simulated cluster, and figures of both."""

from __future__ import annotations

import itertools
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cluster.cost_model import CostModel
from cluster.sim_decode import SimRequest
from cluster.simulation import Arrival, SimulatedCluster, promised_loss
from decode.slo import SLOPolicy

LEVELS = ("raw", "lossless", "q1", "q2", "q3")
POLICY = SLOPolicy(ttft_s=0.0, levels=LEVELS, floor="q3", refine_to=None)
LENGTHS = (700, 900, 1100, 1400, 1700, 2000, 2300, 2700)  # of the documents, tokens
TIE = 0.05  # two policies whose means are closer than this are not in any order
GAP_S = 0.005  # between an answer and the next question


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """at: seconds from the start of the run, None: after the one before. policy "": not counted."""

    policy: str
    document: int
    options: Mapping[str, Any]
    at: float | None = None
    output_tokens: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """What became of it."""

    ttft_s: float
    levels: Sequence[str]
    num_bytes: float
    parts_ms: Mapping[str, float | None]


# -- in virtual time ------------------------------------------------------------------------------------------------


def simulate(costs: CostModel, bytes_per_s: float, asked: Sequence[Question]) -> list[Found]:
    cluster = SimulatedCluster(
        costs, POLICY, rate=max(50 * bytes_per_s, 1.25e9), downlink=bytes_per_s, delay_s=0.0001, num_prefill=2
    )
    states: list[SimRequest] = []
    for number, question in enumerate(asked):
        arrival = Arrival(
            at=cluster.network.now + GAP_S if question.at is None else question.at,
            prompt_tokens=LENGTHS[question.document],
            output_tokens=question.output_tokens,
            blocks=tuple(1000 * (question.document + 1) + block for block in range(16)),
            stored=True,
            request_id=f"r{number}",
            options=dict(question.options),
        )
        if question.at is None:
            states += cluster.run([arrival])
        else:
            states.append(cluster.later(arrival))
    cluster.network.run(until_s=1e9, done=lambda: all(state.ended for state in states))
    cluster.network.run(until_s=cluster.network.now + 10)
    cluster.check_integrity()
    return [_found(state) for state in states]


def _found(state: SimRequest) -> Found:
    assert state.ended == "finished" and state.ttft_s is not None and state.fill is not None, state.ended
    line = state.timeline
    parts: dict[str, float | None] = {}
    if line.filled_at is not None and line.first_token_at is not None:
        opened_at = line.opened_at if line.opened_at is not None else line.received_at
        parts = {
            "open": 1e3 * (opened_at - line.received_at),
            "fill": 1e3 * (line.filled_at - opened_at),
            "tail": 1e3 * (line.first_token_at - line.filled_at),
        }
    return Found(ttft_s=state.ttft_s, levels=state.levels, num_bytes=state.fill.received_bytes, parts_ms=parts)


# -- figures --------------------------------------------------------------------------------------------------------


def summary(found: Sequence[Found], target_s: float, costs: CostModel) -> dict[str, Any]:
    times_ms = sorted(1e3 * one.ttft_s for one in found)
    kl = dict(costs.promised_kl)
    names = {name for one in found for name in one.parts_ms}
    return {
        "slo_attainment": sum(one.ttft_s <= target_s for one in found) / len(found),
        "ttft_ms": {"mean": statistics.fmean(times_ms)}
        | {f"p{q}": times_ms[min(int(q / 100 * len(times_ms)), len(times_ms) - 1)] for q in (50, 95, 99)},
        "parts_ms": {name: statistics.fmean(one.parts_ms.get(name) or 0.0 for one in found) for name in sorted(names)},
        "quality_loss": statistics.fmean(promised_loss(one.levels, kl) for one in found),
        "bytes": statistics.fmean(one.num_bytes for one in found),
        "recomputed_share": statistics.fmean(one.levels.count("text") / max(len(one.levels), 1) for one in found),
    }


def by_policy(
    asked: Sequence[Question], real: Sequence[Found], simulated: Sequence[Found], target_s: float, costs: CostModel
) -> dict[str, Any]:
    rows: dict[str, Any] = {}
    for policy in dict.fromkeys(question.policy for question in asked if question.policy):
        mine = [index for index, question in enumerate(asked) if question.policy == policy]
        measured = summary([real[index] for index in mine], target_s, costs)
        expected = summary([simulated[index] for index in mine], target_s, costs)
        ratio = expected["ttft_ms"]["mean"] / measured["ttft_ms"]["mean"]
        rows[policy] = {"requests": len(mine), **measured, "simulated": expected, "simulated_over_measured": ratio}
    return rows


def misordered(rows: Mapping[str, Any]) -> list[str]:
    """Pairs of policies that the simulator has the other way round, those aside whose measured means tie."""
    means = {name: (row["ttft_ms"]["mean"], row["simulated"]["ttft_ms"]["mean"]) for name, row in rows.items()}
    return [
        f"{a} / {b}"
        for a, b in itertools.combinations(means, 2)
        if abs(means[a][0] / means[b][0] - 1) > TIE and (means[a][0] < means[b][0]) != (means[a][1] < means[b][1])
    ]


def show(title: str, run: Mapping[str, Any]) -> None:
    heads = "n  TTFT ms  simulated  ratio  in time  simulated   loss   text   parts, measured/simulated"
    print(f"\n{title}\n  {'':22s} {heads}")
    for name, row in run["policies"].items():
        sim = row["simulated"]
        parts = " ".join(
            f"{part} {row['parts_ms'].get(part, 0.0):.1f}/{sim['parts_ms'].get(part, 0.0):.1f}"
            for part in ("open", "fill", "tail")
        )
        print(
            f"  {name:20s} {row['requests']:4d} {row['ttft_ms']['mean']:8.1f} {sim['ttft_ms']['mean']:10.1f}"
            f" {row['simulated_over_measured']:6.3f} {row['slo_attainment']:8.2f} {sim['slo_attainment']:10.2f}"
            f" {row['quality_loss']:7.4f} {row['recomputed_share']:5.2f}   {parts}"
        )
    if run["misordered"]:
        print("  misordered:", ", ".join(run["misordered"]))
    sys.stdout.flush()
