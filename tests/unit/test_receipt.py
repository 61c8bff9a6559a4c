"""The receipt of fills that ended in every way: it adds up, counts only what was used, and can be followed."""

from __future__ import annotations

import json
from typing import Any

import pytest
from fill_world import LEVELS as WORLD_LEVELS
from fill_world import World
from hypothesis import given
from hypothesis import strategies as st

from decode.estimator import CodecEstimator, ComputeEstimator
from decode.fill import FillMachine
from decode.fill_chunks import CACHED, TEXT
from decode.fill_events import (
    BlobArrived,
    BlobDecoded,
    BlobRejected,
    ChunkComputed,
    FirstToken,
    FrontLoaded,
    Opened,
    PartArrived,
    Refined,
    SourceLost,
    Tick,
)
from decode.fill_loading import FillSpec
from decode.link_scheduler import LinkScheduler
from decode.receipt import Timeline, build_receipt, mean_kl, worst_kl
from decode.replay import read_replay

KL = {"lossless": 0.0, "q1": 0.01, "q2": 0.04, "q3": None}
LEVELS = ("lossless", "q1", "q2", "q3")
NESTED = frozenset({"q1", "q2", "q3"})


def fill(
    num_chunks: int = 2, *, refine_levels: tuple[str, ...] = (), deadline: float = 11.5, num_sources: int = 1
) -> FillMachine:
    spec = FillSpec(
        num_chunks=num_chunks,
        chunk_tokens=64,
        levels=LEVELS,
        chunk_bytes=dict.fromkeys(LEVELS, 1000.0),
        nested=NESTED,
        exact=frozenset({"lossless"}),
        refine_levels=refine_levels,
        deadline=deadline,
        tail_s=0.01,
    )
    links = LinkScheduler()
    machine = FillMachine(
        spec,
        now=11.0,
        sources=[links.join(f"s{i}", deadline=deadline, prior_bytes_per_s=50e6) for i in range(num_sources)],
        compute=ComputeEstimator(10.0, 0.0),
        codec=CodecEstimator(),
    )
    machine.start(11.0)
    for source in range(num_sources):
        machine.handle(Opened(source=source, stored_bytes=({},) * num_chunks), 11.01)
    return machine


def arrive(machine: FillMachine, chunk: int, level: str, size: int, now: float) -> None:
    source = machine.chunks[chunk].source
    assert source is not None
    part = PartArrived(
        source=source,
        chunk=chunk,
        level=level,
        received_bytes=size,
        total_bytes=size,
        part_bytes=size,
        wire_s=0.001,
    )
    machine.handle(part, now)
    machine.handle(BlobArrived(source=source, chunk=chunk, level=level, blob=bytes(size)), now)


def receipt(machine: FillMachine, *, sources: tuple[str, ...] | None = None, **times: float | None) -> dict[str, Any]:
    timeline = Timeline(
        **{
            "received_at": 10.0,
            "admitted_at": 11.0,
            "opened_at": 11.01,
            "filled_at": 11.22,
            "first_token_at": 11.25,
            **times,
        }
    )
    return build_receipt(
        request_id="r",
        kv_mode="auto",
        prompt_tokens=64 * len(machine.chunks) + 5,
        chunk_tokens=64,
        sources=[f"prefill-{i}" for i in range(len(machine.sources))] if sources is None else sources,
        timeline=timeline,
        fill=machine,
        promised_kl=KL,
        ended_at=12.0,
    )


def loaded(*levels: str, **options: Any) -> FillMachine:
    """Chunks 0, 1, ... at these levels, of 700, 701, ... bytes, in place at 11.2."""
    machine = fill(len(levels), **options)
    for chunk, level in reversed(list(enumerate(levels))):
        arrive(machine, chunk, level, 700 + chunk, 11.1)
        machine.handle(BlobDecoded(chunk=chunk, seconds=0.001), 11.2)
    machine.handle(FirstToken(), 11.2)
    return machine


def refine(machine: FillMachine, chunk: int, size: int, now: float, after_tokens: int) -> None:
    log = machine.chunks[chunk]
    assert log.upgrade
    arrive(machine, chunk, log.upgrade_name, size, now)
    machine.handle(Refined(chunk=chunk, seconds=0.001, after_tokens=after_tokens, blob=b"finer"), now + 0.01)


def test_a_loaded_prompt() -> None:
    found = receipt(loaded("lossless", "q1"))
    assert found["levels"] == {"lossless": 1, "q1": 1}
    assert found["bytes"] == found["received_bytes"] == 1401 and found["refined_bytes"] == 0
    assert (found["tail_tokens"], found["recomputed_chunks"], found["promised_kl"]) == (5, 0, 0.01)
    assert found["mean_promised_kl"] == 0.005
    assert found["chunks"][1]["arrived_ms"] == 1100.0 and found["chunks"][1]["decode_ms"] == 1.0
    assert (found["source"], found["sources"]) == ("prefill-0", ["prefill-0"])
    assert found == json.loads(json.dumps(found))


def test_the_parts_add_up_and_the_target_counts_from_admission() -> None:
    found = receipt(loaded("lossless"))
    assert found["ttft_ms"] == 1250.0
    assert found["ttft_parts_ms"] == {"queue": 1000.0, "open": 10.0, "fill": 190.0, "refine": 20.0, "tail": 30.0}
    assert found["target_ms"] == 500.0 and found["opened_ms"] == 1010.0


times = st.floats(0, 5)


@given(
    opened=st.one_of(st.none(), times),
    filled=times,
    last_chunk=st.one_of(st.none(), times),
    first=times,
    admitted=times,
)
def test_the_parts_add_up_whatever_the_order_of_events(
    opened: float | None, filled: float, last_chunk: float | None, first: float, admitted: float
) -> None:
    """A source may answer after computing filled everything, or never; a prompt may have no chunks."""
    machine = loaded("lossless") if last_chunk is not None else loaded()
    if last_chunk is not None:
        machine.chunks[0].filled_at = 10.0 + last_chunk
    found = receipt(
        machine,
        admitted_at=10.0 + admitted,
        opened_at=None if opened is None else 10.0 + opened,
        filled_at=10.0 + admitted + filled,
        first_token_at=10.0 + admitted + filled + first,
    )
    parts = found["ttft_parts_ms"]
    assert all(value >= 0 for value in parts.values())
    assert sum(parts.values()) == pytest.approx(found["ttft_ms"], abs=0.01)


def test_one_level_that_promises_nothing_leaves_no_promise() -> None:
    found = receipt(loaded("q1", "q3"))
    assert found["promised_kl"] is None and found["mean_promised_kl"] is None


def test_promises_are_of_the_worst_and_on_average() -> None:
    assert worst_kl(["q1", "q2", "lossless", TEXT], KL) == 0.04
    assert mean_kl(["q1", "q2", "lossless", TEXT], KL) == pytest.approx(0.05 / 4)
    assert worst_kl([TEXT], KL) == mean_kl([TEXT], KL) == 0.0
    assert worst_kl([], KL) == mean_kl([], KL) == 0.0
    assert worst_kl(["unknown"], KL) is mean_kl(["unknown", "q1"], KL) is None


def test_a_computed_prompt_is_exact_and_free() -> None:
    machine = fill()
    machine.handle(SourceLost(reason="gone", is_final=True), 11.05)
    for chunk in range(2):
        machine.handle(ChunkComputed(chunk=chunk), 11.1)
    found = receipt(machine)
    assert found["levels"] == found["levels_at_end"] == {TEXT: 2}
    assert (found["bytes"], found["recomputed_chunks"], found["promised_kl"]) == (0, 2, 0.0)
    assert found["link_mbps"] is None
    assert [chunk["source"] for chunk in found["chunks"]] == [None, None]
    assert found["plan"] == {"chunk_tokens": 64, "levels": [TEXT, TEXT], "refinements": []}
    assert any("gone" in reason["what"] for reason in found["reasons"])


def test_no_chunks_at_all() -> None:
    found = receipt(loaded(), sources=())
    assert (found["levels"], found["bytes"], found["promised_kl"], found["tail_tokens"]) == ({}, 0, 0.0, 5)
    assert (found["source"], found["sources"]) == (None, [])
    assert found["ttft_parts_ms"]["fill"] == 0.0


def test_every_chunk_names_its_source() -> None:
    machine = fill(8, num_sources=2)
    while not machine.ready:
        chunk = next(iter(machine.table.asked))
        arrive(machine, chunk, "lossless", 1000, 11.1)
        machine.handle(BlobDecoded(chunk=chunk, seconds=0.001), 11.2)
    found = receipt(machine)
    assert found["sources"] == ["prefill-0", "prefill-1"]
    assert [chunk["source"] for chunk in found["chunks"]] == [f"prefill-{log.source}" for log in machine.chunks]


@pytest.mark.parametrize("rejected", [False, True])
def test_what_did_not_reach_the_pages_is_received_and_not_used(rejected: bool) -> None:
    """Cancelled, or failed, with one chunk half here and another one damaged."""
    machine = fill()
    half = PartArrived(chunk=1, level="lossless", received_bytes=300, total_bytes=900, part_bytes=300, wire_s=0.001)
    machine.handle(half, 11.1)
    if rejected:
        arrive(machine, 0, "lossless", 800, 11.15)
        machine.handle(BlobRejected(chunk=0, reason="checksum"), 11.2)
    found = receipt(machine, filled_at=None, first_token_at=None)
    assert found["levels"] == found["levels_at_end"] == {}
    assert found["bytes"] == 0
    assert found["received_bytes"] == (1100 if rejected else 300)
    assert found["ttft_ms"] is None and found["plan"] is None
    parts = {"queue": 1000.0, "open": None, "fill": None, "refine": None, "tail": None}
    assert found["ttft_parts_ms"] == parts


# -- refinements --------------------------------------------------------------------------------------------------


def test_what_came_after_the_first_token_is_counted_apart() -> None:
    machine = loaded("q3", "q2", refine_levels=("q1", "q2", "q3"), deadline=11.0)
    assert machine.ready
    refine(machine, 0, 50, 11.3, 4)
    refine(machine, 1, 60, 11.4, 6)
    found = receipt(machine)
    assert found["levels"] == {"q3": 1, "q2": 1} and found["levels_at_end"] == {"q1": 2}
    assert (found["bytes"], found["refined_bytes"], found["received_bytes"]) == (1401, 110, 1511)
    assert found["promised_kl"] is None  # of what the first token saw
    assert [chunk["level"] for chunk in found["chunks"]] == ["q3", "q2"]
    (step,) = found["chunks"][0]["refinements"]
    assert (step["level"], step["bytes"], step["after_tokens"], step["applied_ms"]) == ("q1", 50, 4, 1310.0)
    assert found["plan"] == {
        "chunk_tokens": 64,
        "levels": ["q3", "q2"],
        "refinements": [
            {"chunk": 0, "level": "q1", "after_tokens": 4},
            {"chunk": 1, "level": "q1", "after_tokens": 6},
        ],
    }
    assert found == json.loads(json.dumps(found))


def test_what_came_before_the_first_token_counts_as_its_level() -> None:
    """Sizes that say that a refinement fits into the time that is left."""
    machine = fill(1)
    machine.loader.chunk_bytes.update(lossless=1e12, q1=2000.0, q2=1500.0)
    arrive(machine, 0, "q3", 700, 11.1)
    machine.handle(BlobDecoded(chunk=0, seconds=0.001), 11.15)
    assert not machine.ready
    refine(machine, 0, 50, 11.2, 0)
    machine.handle(Tick(), 11.49)
    assert machine.ready
    found = receipt(machine, filled_at=11.21)
    assert found["levels"] == found["levels_at_end"] == {"q1": 1}
    assert (found["bytes"], found["refined_bytes"], found["promised_kl"]) == (750, 0, 0.01)
    assert found["plan"]["levels"] == ["q1"] and found["plan"]["refinements"] == []
    assert found["ttft_parts_ms"]["refine"] == pytest.approx(60.0)


@pytest.mark.parametrize("seed", range(12))
def test_receipts_of_whole_fills_add_up(seed: int) -> None:
    """Everything that travelled is accounted for, and the plan can be followed."""
    quantized = ("q1", "q2", "q3")
    rate = 10 ** (4.5 + seed / 4)
    world = World(
        rate=lambda now: rate if now < 0.3 else rate / 5,
        more_rates=((lambda now: rate),) * (seed % 3),
        ttft_s=(0.0, 0.4, 2.0)[seed % 3],
        levels=quantized,
        refine_levels=quantized if seed % 2 else (),
    )
    machine = world.run()
    assert world.ready_at is not None
    found = build_receipt(
        request_id="r",
        kv_mode="auto",
        prompt_tokens=256 * 13 + 1,
        chunk_tokens=256,
        sources=[f"p{i}" for i in range(len(world.pipes))],
        timeline=Timeline(
            received_at=0.0,
            admitted_at=0.0,
            opened_at=world.latency_s,
            filled_at=world.ready_at,
            first_token_at=world.ttft_s_reached,
        ),
        fill=machine,
        promised_kl=dict.fromkeys(WORLD_LEVELS, 0.1),
        ended_at=world.now,
    )
    assert found == json.loads(json.dumps(found))
    assert sum(found["levels"].values()) == sum(found["levels_at_end"].values()) == 13
    assert found["levels"].get(TEXT, 0) == found["levels_at_end"].get(TEXT, 0) == found["recomputed_chunks"]
    assert found["bytes"] + found["refined_bytes"] <= found["received_bytes"] <= world.sent_bytes
    assert sum(found["ttft_parts_ms"].values()) == pytest.approx(found["ttft_ms"], abs=0.01)
    assert found["num_decisions"] >= 13 and len(found["chunks"]) == 13
    read_replay(found["plan"], num_chunks=13, chunk_tokens=256, known=WORLD_LEVELS)


def test_a_part_of_a_stored_chunk_is_told_of_and_counts_as_filling() -> None:
    spec = FillSpec(
        num_chunks=1, chunk_tokens=64, levels=LEVELS, chunk_bytes=dict.fromkeys(LEVELS, 1000.0), nested=NESTED,
        exact=frozenset({"lossless"}), deadline=11.0, tail_s=0.01, cached_tokens=64, front_stop=64 + 48, front_kl=0.01,
    )  # fmt: skip
    machine = FillMachine(spec, now=11.0, sources=[], compute=ComputeEstimator(10.0, 0.0), codec=CodecEstimator())
    machine.start(11.0)
    machine.handle(FrontLoaded(seconds=0.004), 11.02)
    assert machine.ready
    found = build_receipt(
        request_id="r", kv_mode="auto", prompt_tokens=120, chunk_tokens=64, sources=[], fill=machine,
        timeline=Timeline(received_at=10.0, admitted_at=11.0, filled_at=11.02, first_token_at=11.05),
        promised_kl=KL | {CACHED: 0.0}, ended_at=12.0,
    )  # fmt: skip
    assert (found["cached_tokens"], found["partial_tokens"], found["tail_tokens"]) == (64, 48, 8)
    assert found["partial_decode_ms"] == 4.0
    assert found["ttft_parts_ms"] == {"queue": 1000.0, "open": 0.0, "fill": 20.0, "refine": 0.0, "tail": 30.0}
    assert found["plan"] is None, "computing everything would not give what lossy KV gave"
