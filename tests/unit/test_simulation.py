"""The simulated cluster: repeatable, complete, and true to what the workers do with stores, links and each other."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from cluster.cost_model import CostModel
from cluster.sim_decode import SimRequest
from cluster.simulate_run import BadWorkload, mooncake_arrivals, random_arrivals, run_workload
from cluster.simulation import Arrival, SimulatedCluster
from decode.fair_share import TenantShare
from decode.slo import SLOPolicy
from scripts.cli import app

COSTS = CostModel(
    chunk_tokens=256,
    chunk_bytes={"raw": 1_572_932, "lossless": 1_021_000, "q1": 134_000, "q2": 58_800, "q3": 21_800},
    nested=("q1", "q2", "q3"),
    promised_kl={"raw": 0.0, "lossless": 0.0, "q1": 0.01, "q2": 0.03, "q3": 0.1},
    token_s=1.3e-4,
    token_position_s=1.1e-7,
    slice_s=0.01,
    slice_position_s=4.6e-6,
    decode_s={"raw": 0.0006, "lossless": 0.002, "q1": 0.003, "q2": 0.002, "q3": 0.001},
    cut_s={"raw": 3e-5, "lossless": 3e-5, "q1": 3e-5, "q2": 0.0003, "q3": 0.0003},
    encode_s={"raw": 0.0006, "lossless": 0.002, "q1": 0.007, "q2": 0.007, "q3": 0.007},
    step_s=0.01,
    row_s=0.0015,
)
POLICY = SLOPolicy(floor="q3", refine_to=None)
RATE = 12.5e6  # 100 Mbit/s


def cluster_of(policy: SLOPolicy = POLICY, **options: Any) -> SimulatedCluster:
    return SimulatedCluster(COSTS, policy, **{"rate": RATE, **options})


def prompt(at: float, *, document: int = 1, chunks: int = 8, output_tokens: int = 4, **options: Any) -> Arrival:
    tokens = chunks * 256 + 100
    blocks = tuple(1000 * document + block for block in range(-(-tokens // 512)))
    name = options.pop("request_id", "")
    return Arrival(at=at, prompt_tokens=tokens, output_tokens=output_tokens, blocks=blocks, request_id=name, **options)


def settle(cluster: SimulatedCluster) -> None:
    """Closed transfers have been forgotten everywhere; then nothing is left."""
    cluster.network.run(until_s=cluster.network.now + 20)
    cluster.check_integrity()
    assert all(worker.num_requests == 0 for worker in cluster.decode.values())


def ended_well(state: SimRequest) -> bool:
    """Finished once, with all its tokens one after the other."""
    times = state.token_times
    return (
        state.ended == "finished"
        and len(times) == state.request.sampling.max_tokens
        and times == sorted(set(times))
        and times[0] == state.timeline.first_token_at
    )


# -- whole workloads ------------------------------------------------------------------------------------------------


def figures(seed: int, num: int, **options: Any) -> dict[str, Any]:
    arrivals = random_arrivals(
        num, prompt_tokens=700, output_tokens=3, rate=4.0, num_documents=max(num // 10, 1), seed=seed
    )
    found = run_workload(cluster_of(num_prefill=2, seed=seed, **options), arrivals, COSTS)
    return {name: value for name, value in found.items() if "wall" not in name}


def test_the_same_seed_gives_the_same_run() -> None:
    first = figures(3, 100)
    assert first == figures(3, 100)
    assert first["ttft_ms"] != figures(4, 100)["ttft_ms"]


def test_a_thousand_requests_all_end_once() -> None:
    found = figures(1, 1000, num_decode=2)
    assert found["requests"] == 1000 and found["failed"] == {}
    assert sum(found["levels"].values()) == pytest.approx(1)
    assert 0.5 < found["prefix_hits"] < 1 and found["slo_attainment"] > 0.9


def test_every_request_ends_with_all_its_tokens() -> None:
    cluster = cluster_of(num_prefill=2, num_decode=2)
    states = cluster.run([prompt(0.05 * n, document=n % 7, chunks=1 + n % 9) for n in range(60)])
    assert all(ended_well(state) for state in states)
    settle(cluster)


def test_what_cannot_be_in_time_is_refused_where_the_policy_says_so() -> None:
    policy = replace(POLICY, ttft_s=0.05, infeasible="reject")
    cluster = cluster_of(policy, rate=1e5)
    (state,) = cluster.run([prompt(0.0, stored=True)])
    assert state.ended and state.ended != "finished" and state.token_times == []
    settle(cluster)


# -- stores, workers, links -----------------------------------------------------------------------------------------


def test_the_second_request_for_a_document_is_a_prefix_hit() -> None:
    cluster = cluster_of(replace(POLICY, allow_recompute=False), num_prefill=1)
    first, second = cluster.run([prompt(0.0), prompt(5.0)])
    other = cluster.run([prompt(10.0, document=2)])[0]
    assert (first.num_stored, second.num_stored, other.num_stored) == (0, 8, 0)
    assert cluster.prefill["prefill-0"].computed_tokens == 2 * 8 * 256, "the second was computed, too"
    assert first.ttft_s is not None and second.ttft_s is not None
    assert first.ttft_s > COSTS.compute_s(0, 8 * 256)
    settle(cluster)


def test_a_shared_prefix_is_found_as_far_as_it_goes() -> None:
    cluster = cluster_of(replace(POLICY, allow_recompute=False))
    first = prompt(0.0)
    cluster.run([first])
    longer = replace(first, at=5.0, prompt_tokens=12 * 256 + 1, blocks=(*first.blocks[:4], 71, 72, 73))
    (state,) = cluster.run([longer])
    assert (len(state.keys), state.num_stored) == (12, 8)  # four blocks of 512 tokens are eight chunks


def test_two_decode_workers_share_the_load() -> None:
    def mean_ttft_s(num_decode: int) -> float:
        cluster = cluster_of(num_decode=num_decode)
        options = {"kv_mode": "text"}  # the engine alone decides
        states = [cluster.later(prompt(1.0, document=n, options=options)) for n in range(8)]
        cluster.network.run(until_s=1.001)
        assert [worker.num_requests for worker in cluster.decode.values()] == [8 // num_decode] * num_decode
        cluster.network.run(until_s=100)
        assert all(ended_well(state) for state in states)
        return sum(state.ttft_s or 0.0 for state in states) / 8

    one, two = mean_ttft_s(1), mean_ttft_s(2)
    assert two < 0.65 * one, (one, two)


@pytest.mark.parametrize("earlier_first", [True, False])
def test_on_one_link_the_earlier_deadline_is_served_first_and_neither_misreads_it(earlier_first: bool) -> None:
    cluster = cluster_of(replace(POLICY, allow_recompute=False), rate=RATE)
    cluster.run([prompt(0.0, document=9, stored=True, options={"kv_mode": "q1"})])  # the link is known
    alone = prompt(5.0, document=1, stored=True, options={"kv_mode": "q1"})
    alone_s = cluster.run([alone])[0].ttft_s
    hurried = prompt(10.0, document=2, stored=True, options={"kv_mode": "q1", "ttft_s": 0.3}, request_id="hurried")
    patient = prompt(10.0, document=3, stored=True, options={"kv_mode": "q1", "ttft_s": 3.0}, request_id="patient")
    pair = [cluster.later(one) for one in ((hurried, patient) if earlier_first else (patient, hurried))]
    rates: list[float] = []

    def look() -> None:
        loaders = [state.fill.loader for state in pair if state.fill is not None and not state.fill.ready]
        rates.extend(loader.rate(cluster.network.now) for loader in loaders)

    for step in range(1, 12):
        cluster.network.later(10.0 + 0.01 * step, look)
    cluster.network.run(until_s=20)
    by_name = {state.request.request_id: state for state in pair}
    first, second = by_name["hurried"].ttft_s, by_name["patient"].ttft_s
    assert alone_s is not None and first is not None and second is not None
    whole_s = 8 * COSTS.chunk_bytes["q1"] / RATE  # the link needs so long for one of them
    assert first < alone_s + 0.25 * whole_s, "the hurried one shared the link"
    assert second > first + 0.5 * whole_s, "the patient one was not behind"
    assert len(rates) >= 10 and all(0.75 * RATE < rate < 1.25 * RATE for rate in rates), rates
    settle(cluster)


# -- the batch scheduler --------------------------------------------------------------------------------------------


def test_requests_that_do_not_all_fit_the_pages_give_way_and_end() -> None:
    cluster = cluster_of(kv_tokens=8192)  # three or four at once, and their answers do not fit
    states = cluster.run([prompt(0.1 * n, document=n, chunks=6, output_tokens=900) for n in range(6)])
    assert all(ended_well(state) for state in states)
    assert 0 < sum(state.num_preempted for state in states) < 20
    settle(cluster)


def test_an_urgent_request_goes_before_those_that_wait_and_takes_pages_of_those_that_run() -> None:
    def run(priority: int) -> tuple[SimRequest, list[SimRequest]]:
        cluster = cluster_of(kv_tokens=8192)
        batch = [prompt(0.0, document=n, chunks=9, output_tokens=400) for n in range(5)]
        late = prompt(3.0, document=7, chunks=9, request_id="late", options={"priority": priority})
        *others, found = cluster.run([*batch, late])
        settle(cluster)
        assert all(ended_well(state) for state in (*others, found))
        return found, others

    urgent, gave_way = run(-5)
    patient, undisturbed = run(0)
    assert urgent.ttft_s is not None and patient.ttft_s is not None and urgent.ttft_s < 0.3 * patient.ttft_s
    assert sum(state.num_preempted for state in gave_way) > sum(state.num_preempted for state in undisturbed)


def test_a_tenants_share_holds() -> None:
    policy = replace(POLICY, tenants={"free": {"share": TenantShare(max_requests=1)}})
    cluster = cluster_of(policy)
    states = cluster.run([prompt(0.0, document=n, options={"tenant": "free"}) for n in range(3)])
    spans = sorted((state.timeline.admitted_at or 0.0, state.token_times[-1]) for state in states)
    assert all(ended <= begun for (_, ended), (begun, _) in itertools.pairwise(spans))
    settle(cluster)


def test_what_a_worker_would_refuse_is_refused() -> None:
    cluster = cluster_of(kv_tokens=4096)
    large, *many = cluster.run([prompt(0.0, chunks=20), *(prompt(0.1, chunks=8, document=n) for n in range(300))])
    assert large.ended == "kv_pool_too_small" and large.token_times == []
    ended = Counter(state.ended for state in many)
    assert ended.keys() == {"finished", "overloaded"} and ended["overloaded"] == 300 - 256 - 1
    settle(cluster)


def test_a_client_that_leaves_while_it_waits_leaves_nothing() -> None:
    cluster = cluster_of(kv_tokens=4096)
    states = [cluster.later(prompt(0.0, document=n, chunks=8, output_tokens=50)) for n in range(3)]
    cluster.network.later(0.5, lambda: cluster.decode["decode-0"].cancel(states[2]))
    cluster.network.run(until_s=100)
    assert [state.ended for state in states] == ["finished", "finished", "cancelled"]
    settle(cluster)


# -- costs ----------------------------------------------------------------------------------------------------------


def test_costs_come_back_from_their_file(tmp_path: Path) -> None:
    COSTS.save(tmp_path / "costs.json")
    assert CostModel.load(tmp_path / "costs.json") == COSTS


def test_a_whole_chunk_as_one_slice_costs_what_it_costs_in_a_prompt() -> None:
    assert COSTS.slice_seconds(512, 768) == COSTS.compute_s(512, 768)
    short = COSTS.slice_seconds(512, 520)
    assert COSTS.slice_s < short < COSTS.slice_seconds(512, 640) < COSTS.compute_s(512, 768)
    pieces = sum(COSTS.slice_seconds(start, start + 64) for start in range(512, 768, 64))
    assert pieces > COSTS.compute_s(512, 768) + 2 * COSTS.slice_s  # each pass has its price


# -- traces ---------------------------------------------------------------------------------------------------------


def row(**changes: Any) -> str:
    return json.dumps({"timestamp": 0, "input_length": 1100, "output_length": 5, "hash_ids": [1, 2, 3], **changes})


def test_a_mooncake_trace_as_arrivals() -> None:
    lines = [row(), row(timestamp=1500, output_length=0), row(timestamp=9000)]
    first, second = mooncake_arrivals(lines, time_scale=2.0, limit=2)
    assert (first.at, second.at, second.output_tokens, first.blocks) == (0.0, 3.0, 1, (1, 2, 3))
    assert first.keys(256) == second.keys(256) and len(first.keys(256)) == 4


def test_lengths_and_blocks_of_a_trace_scale_together() -> None:
    (arrival,) = mooncake_arrivals([row(input_length=11_000, hash_ids=list(range(22)))], length_scale=0.5)
    assert (arrival.prompt_tokens, arrival.block_tokens, arrival.output_tokens) == (5500, 256, 2)


@pytest.mark.parametrize(
    "bad",
    ["{", "[]", row(timestamp=None), row(input_length=0), row(hash_ids=[]), row(timestamp=-1)],
    ids=["broken", "list", "no time", "no prompt", "no blocks", "back in time"],
)
def test_a_bad_row_is_named_by_its_line(bad: str) -> None:
    with pytest.raises(BadWorkload, match="line 2"):
        list(mooncake_arrivals([row(), bad]))


def test_trace_figures_count_prefix_hits() -> None:
    lines = [row(), row(timestamp=5000), row(timestamp=9000, hash_ids=[7, 8, 9])]
    found = run_workload(cluster_of(), mooncake_arrivals(lines), COSTS)
    assert found["requests"] == 3 and found["prefix_hits"] == pytest.approx(1 / 3)
    assert found["stored_chunks"] == pytest.approx(4 / 12) and found["output_tokens"] == 15


def test_the_command_writes_its_figures(tmp_path: Path) -> None:
    COSTS.save(tmp_path / "costs.json")
    options = ["--costs", str(tmp_path / "costs.json"), "--beta", "0.5", "--json", str(tmp_path / "out.json")]
    done = CliRunner().invoke(app, ["simulate", "--requests", "5", "--rate", "2", "--documents", "2", *options])
    assert done.exit_code == 0 and "in time" in done.output, done.output
    assert json.loads((tmp_path / "out.json").read_text())["requests"] == 5


@pytest.mark.parametrize(
    "options",
    [
        [],
        ["--requests", "5"],
        ["--requests", "5", "--beta", "-1"],
        ["--requests", "5", "--beta", "1", "--link-mbps", "5"],
    ],
)
def test_what_the_command_cannot_do_is_said_in_one_message(options: list[str]) -> None:
    done = CliRunner().invoke(app, ["simulate", *options])
    assert done.exit_code == 2 and "Traceback" not in done.output
