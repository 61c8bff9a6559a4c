"""The fill machine step by step: what each event leads to, in every state. tests/sim/ runs whole fills."""

from __future__ import annotations

from typing import Any

import pytest

from decode.estimator import CodecEstimator, ComputeEstimator, LinkEstimator
from decode.fill import MAX_ASKED_LEVELS, MAX_BAD_BLOBS, OPEN_TIMEOUT_S, TEXT, ChunkState, FillMachine, FillSpec
from decode.fill_events import (
    Ask,
    BlobArrived,
    BlobDecoded,
    BlobRejected,
    ChunkComputed,
    Command,
    Compute,
    Decode,
    Fail,
    Opened,
    PartArrived,
    Ready,
    SourceLost,
    Tick,
    Withdraw,
)

SIZES = {"lossless": 400_000.0, "q1": 100_000.0, "q3": 50_000.0}
SLOW_COMPUTE, FAST_COMPUTE = 1.0, 1e-6  # seconds a token


def machine(
    *,
    num_chunks: int = 4,
    levels: tuple[str, ...] = ("lossless", "q1", "q3"),
    target_s: float = 10.0,
    rate: float = 10e6,
    token_s: float = SLOW_COMPUTE,
    may_load: bool = True,
    may_compute: bool = True,
) -> FillMachine:
    spec = FillSpec(
        num_chunks=num_chunks,
        chunk_tokens=64,
        levels=levels,
        chunk_bytes=dict(SIZES),
        deadline=target_s,
        tail_s=0.01,
        may_load=may_load,
        may_compute=may_compute,
    )
    return FillMachine(
        spec, now=0.0, link=LinkEstimator(rate), compute=ComputeEstimator(token_s, 0.0), codec=CodecEstimator()
    )


def stored(num_chunks: int = 4) -> Opened:
    return Opened(stored_bytes=({},) * num_chunks)


def opened(**options: Any) -> tuple[FillMachine, list[Command]]:
    fill = machine(**options)
    assert fill.start(0.0) == []
    return fill, fill.handle(stored(fill.spec.num_chunks), 0.001)


def part(chunk: int, level: str, received: int, total: int, size: int, wire_s: float = 0.001) -> PartArrived:
    return PartArrived(
        chunk=chunk, level=level, received_bytes=received, total_bytes=total, part_bytes=size, wire_s=wire_s
    )


def blob(chunk: int, level: str = "lossless", size: int = 1000) -> BlobArrived:
    return BlobArrived(chunk=chunk, level=level, blob=bytes(size))


def test_no_chunks_is_ready_at_once() -> None:
    assert machine(num_chunks=0, may_load=False).start(0.0) == [Ready()]


def test_nothing_is_asked_before_the_source_answers() -> None:
    assert machine().start(0.0) == []


def test_a_stored_context_loads_from_the_back_two_ahead() -> None:
    _, commands = opened()
    assert commands == [Ask(chunk=3, level="lossless"), Ask(chunk=2, level="lossless")]


def test_a_live_prefill_loads_from_the_front() -> None:
    fill = machine(target_s=1000.0)
    fill.start(0.0)
    commands = fill.handle(Opened(stored_bytes=(None,) * 4), 0.001)
    assert commands == [Ask(chunk=0, level="lossless"), Ask(chunk=1, level="lossless")]


def test_a_fill_from_blob_to_ready() -> None:
    fill, _ = opened(num_chunks=1)
    arrived = blob(0)
    assert fill.handle(arrived, 0.1) == [Decode(chunk=0, level="lossless", blob=arrived.blob)]
    assert not fill.done
    assert fill.handle(BlobDecoded(chunk=0, seconds=0.004), 0.2) == [Ready()]
    assert fill.done and fill.chunks[0].level == "lossless"


def test_after_the_end_nothing_matters() -> None:
    fill, _ = opened(num_chunks=1)
    fill.handle(blob(0), 0.1)
    fill.handle(BlobDecoded(chunk=0, seconds=0.004), 0.2)
    for event in (BlobRejected(chunk=0, reason="late"), SourceLost(reason="late"), Tick(), blob(0), stored(1)):
        assert fill.handle(event, 0.3) == []


def test_a_source_that_never_answers_is_given_up() -> None:
    fill = machine(may_compute=False)
    fill.start(0.0)
    assert fill.handle(Tick(), OPEN_TIMEOUT_S - 0.1) == []
    (end,) = fill.handle(Tick(), OPEN_TIMEOUT_S + 0.1)
    assert isinstance(end, Fail) and "did not answer" in end.message


def test_a_lost_source_leaves_the_rest_to_compute_one_by_one() -> None:
    fill, _ = opened()
    fill.handle(blob(3), 0.1)
    assert fill.handle(SourceLost(reason="gone"), 0.2) == [Compute(chunk=0)]
    assert fill.lost_source
    assert fill.handle(BlobDecoded(chunk=3, seconds=0.004), 0.3) == []
    assert fill.handle(ChunkComputed(chunk=0), 0.4) == [Compute(chunk=1)]
    assert fill.handle(ChunkComputed(chunk=1), 0.5) == [Compute(chunk=2)]
    assert fill.handle(ChunkComputed(chunk=2), 0.6) == [Ready()]
    assert [log.level for log in fill.chunks] == [TEXT, TEXT, TEXT, "lossless"]


def test_a_source_lost_while_the_last_blob_is_decoded_changes_nothing() -> None:
    fill, _ = opened(num_chunks=1, may_compute=False)
    fill.handle(blob(0), 0.1)
    assert fill.handle(SourceLost(reason="gone"), 0.2) == []
    assert fill.handle(BlobDecoded(chunk=0, seconds=0.004), 0.3) == [Ready()]


def test_a_link_known_to_be_slow_is_not_waited_for() -> None:
    assert machine(token_s=FAST_COMPUTE, target_s=0.0, rate=1e4).start(0.0) == [Compute(chunk=0)]


def test_a_chunk_on_its_way_is_withdrawn_when_it_is_computed() -> None:
    fill, _ = opened(num_chunks=2, token_s=1e-3)
    assert {log.state for log in fill.chunks} == {ChunkState.ASKED}
    # The link dies: after enough silence computing is faster.
    commands = fill.handle(Tick(), 9.9)
    assert commands == [Withdraw(chunk=0), Compute(chunk=0)]
    assert fill.handle(blob(0), 9.91) == []  # it crossed the withdrawal


def test_a_damaged_blob_is_asked_for_again() -> None:
    fill, _ = opened(num_chunks=1)
    fill.handle(blob(0), 0.1)
    assert fill.handle(BlobRejected(chunk=0, reason="checksum"), 0.2) == [Ask(chunk=0, level="lossless")]
    assert fill.chunks[0].bad_blobs == 1 and fill.chunks[0].level == ""


@pytest.mark.parametrize("may_compute", [True, False])
def test_a_source_of_damaged_blobs_is_given_up(may_compute: bool) -> None:
    fill, _ = opened(num_chunks=1, may_compute=may_compute)
    for number in range(MAX_BAD_BLOBS + 1):
        fill.handle(blob(0), 0.1 * number)
        commands = fill.handle(BlobRejected(chunk=0, reason="checksum"), 0.1 * number + 0.05)
    if may_compute:
        assert commands == [Compute(chunk=0)]
    else:
        assert isinstance(commands[0], Fail) and "damaged" in commands[0].message


@pytest.mark.parametrize("level", ["q5", "what is that", "raw"])
def test_a_level_that_was_not_allowed_counts_as_damaged(level: str) -> None:
    """A blob below the floor must not reach the pages, and one of an unknown level must not stop the fill."""
    fill, _ = opened(num_chunks=1, may_compute=False)
    for number in range(MAX_BAD_BLOBS):
        assert fill.handle(blob(0, level), 0.1 * number) == [Ask(chunk=0, level="lossless")]
    (end,) = fill.handle(blob(0, level), 1.0)
    assert isinstance(end, Fail) and repr(level) in end.message


def test_a_standing_chunk_is_amended_when_the_plan_changes() -> None:
    fill, _ = opened(target_s=0.3)
    commands: list[Command] = []
    for number in range(1, 6):  # 2 Mbit/s instead of 80
        commands += fill.handle(part(3, "lossless", 16_000 * number, 400_000, 16_000, 0.06), 0.06 * number)
    assert any(isinstance(command, Ask) and command.chunk == 2 and command.level != "lossless" for command in commands)
    assert fill.chunks[2].asked_levels[0] == "lossless" and fill.chunks[2].asked_levels[-1] != "lossless"


def test_the_record_of_amendments_is_bounded() -> None:
    fill, _ = opened()
    for number in range(500):
        fill._ask(2, "q1" if number % 2 else "q3")
    assert len(fill.chunks[2].asked_levels) <= MAX_ASKED_LEVELS
    assert fill.chunks[2].asked_levels[-1] == "q1"


def test_a_source_that_has_to_compute_says_nothing_about_the_links_latency() -> None:
    fill = machine(target_s=1000.0)
    fill.start(0.0)
    before = fill.link.latency_s
    fill.handle(Opened(stored_bytes=(None,) * 4), 0.001)
    fill.handle(part(0, "lossless", 1000, 400_000, 1000), 3.0)
    assert fill.link.latency_s == before


def test_a_stored_chunk_teaches_the_links_latency() -> None:
    fill, _ = opened()
    before = fill.link.latency_s
    fill.handle(part(3, "lossless", 1000, 400_000, 1000), 0.201)
    assert fill.link.latency_s == pytest.approx(before + 0.3 * (0.2 - before))


def test_what_the_source_says_of_sizes_is_believed() -> None:
    fill = machine(target_s=0.25, rate=10e6)
    fill.start(0.0)
    sizes = {"lossless": 900_000, "q1": 10_000, "unheard of": 5}
    commands = fill.handle(Opened(stored_bytes=(sizes,) * 4), 0.001)
    assert commands[0] == Ask(chunk=3, level="q1")


def test_a_live_source_is_left_alone_once_this_worker_computes() -> None:
    """What it has not begun to send is withdrawn, or it would compute the whole prompt in vain."""
    fill = machine(token_s=0.002, target_s=0.0)
    fill.start(0.0)
    asked = fill.handle(Opened(stored_bytes=(None,) * 4), 0.001)
    assert [type(command) for command in asked] == [Ask, Ask]
    # The first part shows a link on which the chunk on its way alone would take a hundred times the computing.
    commands = fill.handle(part(0, "lossless", 1000, 400_000, 1000, 0.05), 0.06)
    commands += fill.handle(part(0, "lossless", 2000, 400_000, 1000, 5.0), 5.06)
    assert any(isinstance(command, Compute) for command in commands)
    assert Withdraw(chunk=1) in commands
    assert fill.chunks[1].state is ChunkState.MISSING
