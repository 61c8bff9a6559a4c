"""The fill machine step by step: what each event leads to, in every state. tests/sim/ runs whole fills."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest

from decode.estimator import CodecEstimator, ComputeEstimator
from decode.fill import MAX_BAD_BLOBS, MAX_REASONS, FillMachine
from decode.fill_chunks import MAX_ASKED_LEVELS, TEXT, ChunkState
from decode.fill_events import (
    Ask,
    BlobArrived,
    BlobDecoded,
    BlobRejected,
    ChunkComputed,
    ChunkRefused,
    Command,
    Compute,
    Decode,
    Fail,
    FirstToken,
    FrontLoaded,
    FrontRejected,
    LoadFront,
    Open,
    Opened,
    PartArrived,
    Ready,
    Refine,
    Refined,
    RefinementRejected,
    SourceLost,
    Tick,
    Withdraw,
)
from decode.fill_loading import IDLE_ENGINE, EngineLoad, FillSpec
from decode.fill_sources import MAX_AHEAD, OPEN_TIMEOUT_S, RETRY_S
from decode.link_scheduler import Kind, LinkScheduler
from decode.replay import Replay, ReplayStep

SIZES = {"lossless": 400_000.0, "q1": 100_000.0, "q2": 70_000.0, "q3": 50_000.0}
NESTED = frozenset({"q1", "q2", "q3"})
SLOW_COMPUTE, FAST_COMPUTE = 1.0, 1e-6  # seconds a token


def machine(
    *,
    num_chunks: int = 4,
    levels: tuple[str, ...] = ("lossless", "q1", "q3"),
    refine_levels: tuple[str, ...] = (),
    target_s: float = 100.0,
    rate: float = 1e6,
    token_s: float = SLOW_COMPUTE,
    num_sources: int = 1,
    links: LinkScheduler | None = None,
    now: float = 0.0,
    load: Callable[[], EngineLoad] = lambda: IDLE_ENGINE,
    **options: Any,
) -> FillMachine:
    spec = FillSpec(
        num_chunks=num_chunks,
        chunk_tokens=64,
        levels=levels,
        chunk_bytes=dict(SIZES),
        nested=NESTED,
        exact=frozenset({"lossless"}),
        refine_levels=refine_levels,
        deadline=target_s,
        tail_s=0.01,
        **options,
    )
    links = links or LinkScheduler()
    sources = [links.join(f"s{i}", deadline=target_s, prior_bytes_per_s=rate) for i in range(num_sources)]
    compute = ComputeEstimator(token_s, 0.0)
    return FillMachine(spec, now=now, sources=sources, compute=compute, codec=CodecEstimator(), load=load)


def stored(num_chunks: int = 4, source: int = 0) -> Opened:
    return Opened(source=source, stored_bytes=({},) * num_chunks)


def opened(**options: Any) -> tuple[FillMachine, list[Command]]:
    fill = machine(**options)
    commands = fill.start(0.0)
    assert commands[: len(fill.sources)] == [Open(source=i) for i in range(len(fill.sources))]
    del commands[: len(fill.sources)]
    for source in range(len(fill.sources)):
        commands += tell(fill, stored(fill.spec.num_chunks, source), 0.001)
    return fill, commands


def tell(fill: FillMachine, event: Any, now: float) -> list[Command]:
    """What the machine answers; the first token comes as soon as it may."""
    commands = fill.handle(event, now)
    if Ready() in commands and not fill.done:
        commands += fill.handle(FirstToken(), now)
    fill.check_integrity()
    ends = [i for i, command in enumerate(commands) if isinstance(command, Fail)]
    assert not ends or ends == [len(commands) - 1], "commands after the end"
    return commands


def part(chunk: int, level: str, received: int, total: int, size: int, wire_s: float = 0.001, source: int = 0) -> Any:
    return PartArrived(
        source=source,
        chunk=chunk,
        level=level,
        received_bytes=received,
        total_bytes=total,
        part_bytes=size,
        wire_s=wire_s,
    )


def blob(chunk: int, level: str = "lossless", size: int = 1000, source: int = 0) -> BlobArrived:
    return BlobArrived(source=source, chunk=chunk, level=level, blob=bytes(size))


def place(fill: FillMachine, chunk: int, level: str, now: float, source: int = 0, rate: float = 1e6) -> list[Command]:
    """A chunk comes and is decoded."""
    size = int(SIZES[level])
    commands = tell(fill, part(chunk, level, size, size, size, size / rate, source), now)
    arrived = blob(chunk, level, size, source)
    decode = Decode(chunk=chunk, level=level, blob=arrived.blob)
    commands += [command for command in tell(fill, arrived, now) if command != decode]
    return commands + tell(fill, BlobDecoded(chunk=chunk, seconds=0.004), now)


def asked(commands: list[Command]) -> list[tuple[int, str]]:
    return [(command.chunk, command.level) for command in commands if isinstance(command, Ask)]


# -- from the start to Ready --------------------------------------------------------------------------------------


def test_no_chunks_is_ready_at_once() -> None:
    fill = machine(num_chunks=0, num_sources=0)
    assert fill.start(0.0) == [Ready()] and fill.ready and fill.done


def test_nothing_is_asked_before_the_source_answers() -> None:
    assert machine().start(0.0) == [Open(source=0)]


def test_a_stored_context_loads_from_the_back_two_ahead() -> None:
    _, commands = opened()
    assert commands == [Ask(chunk=3, level="lossless"), Ask(chunk=2, level="lossless")]


def test_a_fast_link_is_asked_for_more_ahead_but_not_for_everything() -> None:
    _, commands = opened(num_chunks=200, rate=1e12, levels=("q3",))
    assert asked(commands) == [(index, "q3") for index in range(199, 199 - MAX_AHEAD, -1)]


def test_a_live_prefill_loads_from_the_front() -> None:
    fill = machine(target_s=1000.0)
    fill.start(0.0)
    commands = tell(fill, Opened(stored_bytes=(None,) * 4), 0.001)
    assert commands == [Ask(chunk=0, level="lossless"), Ask(chunk=1, level="lossless")] and fill.live


def test_one_chunk_that_is_stored_nowhere_makes_a_prefill_live() -> None:
    fill = machine(num_sources=2)
    fill.start(0.0)
    tell(fill, Opened(source=0, stored_bytes=({}, {}, None, {})), 0.001)
    assert fill.live
    tell(fill, Opened(source=1, stored_bytes=(None, None, {}, None)), 0.002)
    assert not fill.live  # the other one has it
    tell(fill, SourceLost(source=1, reason="gone", is_final=True), 0.003)
    assert fill.live


def test_a_fill_from_blob_to_ready() -> None:
    fill, _ = opened(num_chunks=1)
    arrived = blob(0)
    assert tell(fill, arrived, 0.1) == [Decode(chunk=0, level="lossless", blob=arrived.blob)]
    assert not fill.done
    assert tell(fill, BlobDecoded(chunk=0, seconds=0.004), 0.2) == [Ready()]
    assert fill.done and fill.chunks[0].level == fill.chunks[0].first_level == "lossless"


def test_after_the_end_nothing_matters() -> None:
    fill, _ = opened(num_chunks=1)
    place(fill, 0, "lossless", 0.1)
    assert fill.done
    for event in (
        BlobRejected(chunk=0, reason="late"),
        BlobDecoded(chunk=0, seconds=0.1),
        SourceLost(reason="late"),
        ChunkRefused(chunk=0, reason="late"),
        ChunkComputed(chunk=0),
        Refined(chunk=0, seconds=0.1, after_tokens=1),
        RefinementRejected(chunk=0, reason="late"),
        part(0, "lossless", 1, 2, 1),
        Tick(),
        blob(0),
        stored(1),
    ):
        assert fill.handle(event, 0.3) == []
    assert fill.may_step(1) and fill.num_decisions == 5


def test_nothing_more_is_refined_while_the_tail_is_computed() -> None:
    """Decoding would take cores from it; from the first token on refinements go."""
    fill, _ = opened(num_chunks=1, levels=("q1", "q3"), target_s=0.0, refine_levels=("q1", "q3"))
    fill.handle(blob(0, "q3"), 0.1)
    assert fill.handle(BlobDecoded(chunk=0, seconds=0.004), 0.2) == [Ready()]
    assert fill.handle(Tick(), 0.9) == [] and not fill.done
    (ask,) = fill.handle(FirstToken(), 1.0)
    assert isinstance(ask, Ask) and ask.kind is Kind.LATER


def test_a_machine_that_has_ended_keeps_no_blobs() -> None:
    """The worker keeps it for the receipt, as long as the answer is."""
    fill, _ = opened(num_chunks=2, levels=("q3",), refine_levels=("q1", "q2", "q3"))
    place(fill, 1, "q3", 0.1)
    place(fill, 0, "q3", 0.1)
    assert fill.ready and not fill.done and all(log.blob is not None for log in fill.chunks)
    for chunk in (0, 1):
        tell(fill, blob(chunk, "q3>q1"), 0.2)
        tell(fill, Refined(chunk=chunk, seconds=0.004, after_tokens=3, blob=b"finer"), 0.3)
    assert fill.done and all(log.blob is None for log in fill.chunks)


def test_blobs_that_nothing_can_continue_are_not_kept() -> None:
    fill, _ = opened(num_chunks=2)
    place(fill, 1, "lossless", 0.1)
    assert fill.chunks[1].level == "lossless" and fill.chunks[1].blob is None


def test_what_arrived_predicts_what_comes() -> None:
    fill, _ = opened()
    tell(fill, blob(3, "lossless", 200_000), 0.1)
    assert fill.loader.chunk_bytes["lossless"] == 300_000
    assert fill.spec.chunk_bytes["lossless"] == SIZES["lossless"], "another request's predictions were changed"


def test_what_the_source_says_of_sizes_is_believed() -> None:
    fill = machine(target_s=0.25, rate=10e6)
    fill.start(0.0)
    sizes = {"lossless": 900_000, "q1": 10_000, "unheard of": 5}
    commands = tell(fill, Opened(stored_bytes=(sizes,) * 4), 0.001)
    assert commands[0] == Ask(chunk=3, level="q1")
    assert "unheard of" not in fill.loader.chunk_bytes


def test_the_sources_encoding_times_count() -> None:
    fill = machine(target_s=1.0, rate=1e9)
    fill.start(0.0)
    slow = {"lossless": 1.0, "q1": 0.001, "q3": 0.001}
    commands = tell(fill, Opened(stored_bytes=({},) * 4, encode_s=slow), 0.001)
    assert commands[0] == Ask(chunk=3, level="q1")


# -- levels change ------------------------------------------------------------------------------------------------


def test_a_standing_chunk_is_amended_when_the_plan_changes() -> None:
    fill, commands = opened(target_s=40.0, levels=("lossless", "q1"))
    assert asked(commands) == [(3, "lossless"), (2, "lossless")]
    later: list[Command] = []
    for number in range(1, 6):  # a hundredth of the rate
        later += tell(fill, part(3, "lossless", 16_000 * number, 400_000, 16_000, 1.0), 1.0 * number)
    amended = [command for command in later if isinstance(command, Ask) and command.chunk == 2]
    assert amended and amended[-1].level == "q1"
    assert fill.chunks[2].asked_levels[0] == "lossless" and fill.chunks[2].asked_levels[-1] == "q1"


def test_the_record_of_amendments_is_bounded() -> None:
    fill, _ = opened()
    for number in range(500):
        fill.loader._amend(2, "q1" if number % 2 else "q3")
    fill.check_integrity()
    levels = fill.chunks[2].asked_levels
    assert len(levels) <= MAX_ASKED_LEVELS and levels[0] == "lossless" and levels[-1] == "q1"


def test_the_record_of_reasons_is_bounded() -> None:
    fill, _ = opened()
    for number in range(3 * MAX_REASONS):
        fill._note(0.0, str(number))
    assert len(fill.reasons) == MAX_REASONS


def test_a_blob_at_the_level_of_before_an_amendment_is_taken() -> None:
    fill, _ = opened()
    fill.loader._amend(2, "q3")
    assert tell(fill, blob(2, "lossless"), 0.1)[0] == Decode(chunk=2, level="lossless", blob=bytes(1000))
    assert fill.chunks[2].level == "lossless"


def test_time_short_the_floor_is_asked_for_first_and_then_what_time_is_left_buys() -> None:
    """q1 for all takes 1.5 s on a link never seen, counted carefully: more than a quarter of the time."""
    fill, commands = opened(levels=("q1", "q2", "q3"), target_s=2.0, may_compute=False)
    assert asked(commands) == [(3, "q3"), (2, "q3")]
    assert fill.plan is not None and fill.plan.level == "q1"
    assert "first, then refine to" in fill.reasons[0][1]


def test_a_link_that_others_wait_for_is_given_the_floor_first() -> None:
    links = LinkScheduler()
    alone, _ = opened(levels=("q1", "q3"), links=links)
    assert alone.chunks[3].asked_levels == ["q1"]
    second, commands = opened(levels=("q1", "q3"), links=links)
    assert asked(commands)[0] == (3, "q3")


def test_parts_lead_to_a_new_plan_every_few_milliseconds_only() -> None:
    fill, _ = opened()
    before = fill.num_decisions
    for number in range(1, 21):
        tell(fill, part(3, "lossless", 1000 * number, 400_000, 1000), 0.001 + 0.001 * number)
    assert 3 <= fill.num_decisions - before <= 5


# -- computing ----------------------------------------------------------------------------------------------------


def test_a_link_known_to_be_slow_is_not_waited_for() -> None:
    assert machine(token_s=FAST_COMPUTE, target_s=0.0, rate=1e4).start(0.0) == [Open(source=0), Compute(chunk=0)]


def test_all_is_computed_without_a_source() -> None:
    fill = machine(num_sources=0, num_chunks=2)
    assert fill.start(0.0) == [Compute(chunk=0)]
    assert tell(fill, ChunkComputed(chunk=0), 1.0) == [Compute(chunk=1)]
    assert tell(fill, ChunkComputed(chunk=1), 2.0) == [Ready()]
    assert fill.done and [log.first_level for log in fill.chunks] == [TEXT, TEXT]


def test_both_ends_meet() -> None:
    """Each chunk takes 50 ms to load and 64 ms to compute."""
    fill, commands = opened(levels=("q3",), target_s=0.0, token_s=0.001)
    assert Compute(chunk=0) in commands and asked(commands) == [(3, "q3"), (2, "q3")]
    place(fill, 3, "q3", 0.05)
    later = tell(fill, ChunkComputed(chunk=0), 0.065)
    later += place(fill, 2, "q3", 0.1)
    if Compute(chunk=1) in later:
        end = tell(fill, ChunkComputed(chunk=1), 0.13)
    else:
        end = place(fill, 1, "q3", 0.15)
    assert end[-1] == Ready()
    assert fill.chunks[0].first_level == TEXT and [log.level for log in fill.chunks[2:]] == ["q3", "q3"]


def test_a_chunk_on_its_way_is_withdrawn_when_it_is_computed() -> None:
    fill, _ = opened(num_chunks=2, token_s=0.1, target_s=60.0, levels=("lossless",))
    assert {log.state for log in fill.chunks} == {ChunkState.ASKED}
    # The link dies: after enough silence computing is faster.
    commands: list[Command] = []
    while not commands:
        fill_at = fill._planned_at + 1.0
        assert fill_at < 60.0, "never computed"
        commands = tell(fill, Tick(), fill_at)
    assert commands == [Withdraw(chunk=0), Compute(chunk=0)]
    assert tell(fill, blob(0), fill_at + 0.1) == []  # it crossed the withdrawal
    assert fill.chunks[0].state is ChunkState.COMPUTING


def test_a_live_source_is_left_alone_once_this_worker_computes() -> None:
    """What it has not begun to send is withdrawn, or it would compute the whole prompt in vain."""
    fill = machine(token_s=0.01, target_s=0.0, rate=10e6, levels=("lossless",))
    fill.start(0.0)
    begun = tell(fill, Opened(stored_bytes=(None,) * 4), 0.001)
    assert [type(command) for command in begun] == [Ask, Ask]
    # The first part shows a link on which the chunk on its way alone would take a hundred times the computing.
    commands = tell(fill, part(0, "lossless", 1000, 400_000, 1000, 0.05), 0.06)
    commands += tell(fill, part(0, "lossless", 2000, 400_000, 1000, 5.0), 5.06)
    assert any(isinstance(command, Compute) for command in commands)
    assert Withdraw(chunk=1) in commands
    assert fill.chunks[1].state is ChunkState.MISSING


def test_a_bound_on_computing_counts_what_is_being_computed() -> None:
    fill, commands = opened(levels=("q3",), target_s=0.0, token_s=1e-4, rate=1e3, max_compute=1)
    assert Compute(chunk=0) in commands
    assert fill.loader.outlook(0.002, IDLE_ENGINE).max_compute == 0
    commands = tell(fill, ChunkComputed(chunk=0), 0.01)
    assert not any(isinstance(command, Compute) for command in commands)
    tell(fill, SourceLost(reason="gone", is_final=True), 0.02)
    assert fill.chunks[1].state is ChunkState.COMPUTING  # no source: no bound


def test_the_engines_other_work_makes_loading_better() -> None:
    """Each chunk takes 60 ms to compute, 50 ms to load: both ends, unless the engine is busy for a second."""
    idle, commands = opened(levels=("q3",), target_s=0.0, token_s=0.0009)
    assert Compute(chunk=0) in commands
    for load in (EngineLoad(wait_s=1.0), EngineLoad(factor=20.0), EngineLoad(num_others=1000)):
        _, commands = opened(levels=("q3",), target_s=0.0, token_s=0.0009, load=lambda load=load: load)
        assert not any(isinstance(command, Compute) for command in commands), load


# -- what may go wrong --------------------------------------------------------------------------------------------


def test_a_source_that_never_answers_is_given_up() -> None:
    fill = machine(may_compute=False)
    fill.start(0.0)
    assert tell(fill, Tick(), OPEN_TIMEOUT_S - 0.1) == []
    (end,) = tell(fill, Tick(), OPEN_TIMEOUT_S + 0.1)
    assert (
        isinstance(end, Fail)
        and "did not answer" in end.message
        and (end.status, end.code)
        == (
            502,
            "kv_transfer_failed",
        )
    )
    assert fill.done and tell(fill, stored(), 11.0) == []


def test_an_answer_after_the_source_was_given_up_comes_too_late() -> None:
    fill = machine(num_chunks=2)
    fill.start(0.0)
    assert tell(fill, Tick(), OPEN_TIMEOUT_S + 0.1) == [Compute(chunk=0)]
    assert tell(fill, stored(2), OPEN_TIMEOUT_S + 0.2) == []
    assert not fill.sources[0].is_open


def test_a_lost_source_is_opened_again_and_again_until_time_is_up() -> None:
    fill, _ = opened(may_compute=False)
    assert tell(fill, SourceLost(reason="cut"), 1.0) == []
    assert fill.wake_at == pytest.approx(1.0 + RETRY_S)
    tries, now = [], 1.0
    while not fill.done:
        now += 0.01
        commands = tell(fill, Tick(), now)
        if Open(source=0) in commands:
            tries.append(now)
            commands = tell(fill, SourceLost(reason="cut"), now)
    assert isinstance(commands[-1], Fail) and "cut" in commands[-1].message
    assert now == pytest.approx(1.0 + OPEN_TIMEOUT_S, abs=2.1)
    gaps = [later - earlier for earlier, later in itertools.pairwise(tries)]
    assert len(tries) >= 5 and gaps == sorted(gaps, key=lambda gap: round(gap, 1))


def test_a_source_that_comes_back_goes_on_at_what_is_missing() -> None:
    fill, _ = opened(may_compute=False)
    place(fill, 3, "lossless", 0.5)
    tell(fill, SourceLost(reason="cut"), 1.0)
    assert tell(fill, Tick(), 1.0 + RETRY_S) == [Open(source=0)]
    assert asked(tell(fill, stored(), 1.4)) == [(2, "lossless"), (1, "lossless")]


def test_a_source_lost_for_good_leaves_the_rest_to_compute_one_by_one() -> None:
    fill, _ = opened()
    tell(fill, blob(3), 0.1)
    assert tell(fill, SourceLost(reason="gone", is_final=True), 0.2) == [Compute(chunk=0)]
    assert not fill.sources[0].is_hoped_for
    assert tell(fill, BlobDecoded(chunk=3, seconds=0.004), 0.3) == []
    assert tell(fill, ChunkComputed(chunk=0), 0.4) == [Compute(chunk=1)]
    assert tell(fill, ChunkComputed(chunk=1), 0.5) == [Compute(chunk=2)]
    assert tell(fill, ChunkComputed(chunk=2), 0.6) == [Ready()]
    assert [log.level for log in fill.chunks] == [TEXT, TEXT, TEXT, "lossless"]


def test_a_source_lost_while_the_last_blob_is_decoded_changes_nothing() -> None:
    fill, _ = opened(num_chunks=1, may_compute=False)
    tell(fill, blob(0), 0.1)
    assert tell(fill, SourceLost(reason="gone"), 0.2) == []
    assert tell(fill, BlobDecoded(chunk=0, seconds=0.004), 0.3) == [Ready()]


def test_a_damaged_blob_is_asked_for_again() -> None:
    fill, _ = opened(num_chunks=1)
    tell(fill, blob(0), 0.1)
    assert tell(fill, BlobRejected(chunk=0, reason="checksum"), 0.2) == [Ask(chunk=0, level="lossless")]
    assert fill.chunks[0].bad_blobs == 1 and fill.chunks[0].level == ""


@pytest.mark.parametrize("may_compute", [True, False])
def test_a_source_of_damaged_blobs_is_given_up(may_compute: bool) -> None:
    fill, _ = opened(num_chunks=1, may_compute=may_compute)
    for number in range(MAX_BAD_BLOBS + 1):
        assert fill.sources[0].is_open
        tell(fill, blob(0), 0.1 * number)
        commands = tell(fill, BlobRejected(chunk=0, reason="checksum"), 0.1 * number + 0.05)
    if may_compute:
        assert commands == [Compute(chunk=0)]
    else:
        assert isinstance(commands[0], Fail) and "damaged" in commands[0].message


def test_damaged_blobs_count_for_the_source_that_sent_them() -> None:
    fill, commands = opened(num_chunks=8, num_sources=2)
    by_source = {command.source: command.chunk for command in commands if isinstance(command, Ask)}
    assert set(by_source) == {0, 1}
    for number in range(MAX_BAD_BLOBS + 1):
        chunk = next(i for i, log in enumerate(fill.chunks) if log.source == 1)
        tell(fill, blob(chunk, source=1), 0.1 * number)
        commands = tell(fill, BlobRejected(chunk=chunk, reason="checksum"), 0.1 * number + 0.05)
    assert fill.sources[0].is_open and not fill.sources[1].is_hoped_for
    assert {log.source for log in fill.chunks if log.state is ChunkState.ASKED} == {0}


@pytest.mark.parametrize("level", ["q5", "what is that", "raw", "q2", "q3>q1", ""])
def test_a_level_that_was_not_allowed_counts_as_damaged(level: str) -> None:
    """A blob below the floor must not reach the pages, and one of an unknown level must not stop the fill."""
    fill, _ = opened(num_chunks=1, may_compute=False)
    for number in range(MAX_BAD_BLOBS):
        assert tell(fill, blob(0, level), 0.1 * number) == [Ask(chunk=0, level="lossless")]
    (end,) = tell(fill, blob(0, level), 1.0)
    assert isinstance(end, Fail) and repr(level) in end.message


def test_events_of_a_source_that_was_given_up_change_nothing() -> None:
    fill, commands = opened(num_sources=2)
    chunk = next(command.chunk for command in commands if isinstance(command, Ask) and command.source == 1)
    commands = tell(fill, SourceLost(source=1, reason="gone", is_final=True), 0.1)
    assert fill.chunks[chunk].source == 0 or fill.chunks[chunk].state is ChunkState.MISSING
    before = [(log.state, log.left_bytes, log.level) for log in fill.chunks]
    assert tell(fill, part(chunk, "lossless", 1000, 400_000, 1000, source=1), 0.101) == []
    assert tell(fill, blob(chunk, source=1), 0.102) == []
    assert tell(fill, SourceLost(source=1, reason="again"), 0.103) == []
    assert tell(fill, stored(source=1), 0.104) == []
    assert [(log.state, log.left_bytes, log.level) for log in fill.chunks] == before
    assert fill.received_bytes == 1000  # it came all the same


def test_a_refused_chunk_is_asked_of_another_source() -> None:
    fill, commands = opened(num_sources=2, num_chunks=1)
    (ask,) = [command for command in commands if isinstance(command, Ask)]
    again = tell(fill, ChunkRefused(source=ask.source, chunk=0, reason="evicted"), 0.1)
    assert again == [Ask(source=1 - ask.source, chunk=0, level="lossless")]


def test_a_chunk_that_all_refuse_is_computed_and_the_others_are_loaded() -> None:
    fill, _ = opened()
    commands = tell(fill, ChunkRefused(chunk=3, reason="evicted"), 0.1)
    assert asked(commands) == [(1, "lossless")]
    for chunk in (2, 1):
        place(fill, chunk, "lossless", 0.2)
    assert place(fill, 0, "lossless", 0.3)[-1] == Compute(chunk=3)
    assert tell(fill, ChunkComputed(chunk=3), 70.0) == [Ready()]
    assert any("evicted" in what for _, what in fill.reasons)


def test_a_chunk_that_all_refuse_fails_the_request_where_computing_is_forbidden() -> None:
    fill, _ = opened(num_chunks=3, may_compute=False)
    tell(fill, ChunkRefused(chunk=2, reason="NaN"), 0.1)
    place(fill, 1, "lossless", 0.2)
    end = place(fill, 0, "lossless", 0.3)[-1]
    assert isinstance(end, Fail) and end.code == "kv_transfer_failed" and "Chunk 2" in end.message
    assert fill.done


def test_nothing_is_asked_for_after_the_end() -> None:
    """The front chunk is refused while others are still missing."""
    fill, _ = opened(num_chunks=8, may_compute=False, levels=("q3",))
    fill.sources[0].refused.add(0)
    commands = tell(fill, Tick(), 0.1)
    assert [type(command) for command in commands] == [Fail]
    replayed, _ = opened(num_chunks=8, may_compute=False, replay=Replay(levels=("q3",) * 8, steps=()))
    replayed.sources[0].refused.add(0)
    assert [type(command) for command in tell(replayed, Tick(), 0.1)] == [Fail]


def test_a_refusal_of_what_is_here_already_is_only_remembered() -> None:
    fill, _ = opened(num_chunks=2)
    place(fill, 1, "lossless", 0.1)
    assert tell(fill, ChunkRefused(chunk=1, reason="evicted"), 0.2) == []
    assert fill.chunks[1].state is ChunkState.FILLED


# -- silence ------------------------------------------------------------------------------------------------------


def test_a_source_that_has_to_compute_says_nothing_about_the_links_latency() -> None:
    fill = machine(target_s=1000.0)
    fill.start(0.0)
    before = fill.sources[0].share.estimator.latency_s
    tell(fill, Opened(stored_bytes=(None,) * 4), 0.001)
    tell(fill, part(0, "lossless", 1000, 400_000, 1000), 3.0)
    assert fill.sources[0].share.estimator.latency_s == before


def test_a_stored_chunk_teaches_the_links_latency() -> None:
    fill, _ = opened()
    before = fill.sources[0].share.estimator.latency_s
    tell(fill, part(3, "lossless", 1000, 400_000, 1000), 0.201)
    assert fill.sources[0].share.estimator.latency_s == pytest.approx(before + 0.3 * (0.2 - before))
    after = fill.sources[0].share.estimator.latency_s
    tell(fill, part(2, "lossless", 1000, 400_000, 1000), 0.4)  # waited for the first one, not for the link
    assert fill.sources[0].share.estimator.latency_s == after


def test_silence_makes_a_link_slow_and_the_next_part_ends_it() -> None:
    fill, _ = opened()
    tell(fill, part(3, "lossless", 64_000, 400_000, 64_000, 0.064), 0.07)
    usual = fill.loader.rate(0.1)
    assert fill.loader.rate(2.0) < 0.1 * usual
    tell(fill, part(3, "lossless", 128_000, 400_000, 64_000, 0.064), 2.0)
    assert fill.loader.rate(2.001) == pytest.approx(usual, rel=0.01)


def test_silence_counts_for_nothing_while_a_live_source_computes() -> None:
    fill = machine(token_s=0.01, may_compute=False)
    fill.start(0.0)
    tell(fill, Opened(stored_bytes=(None,) * 4), 0.001)
    assert fill.loader.rate(1.0) == fill.loader.rate(0.001)  # 0.64 s a chunk
    assert fill.loader.rate(10.0) < fill.loader.rate(0.001)


def test_a_link_that_serves_others_is_not_silent() -> None:
    """A transfer with a later deadline gets nothing for a second, because the link brings what is wanted sooner."""
    links = LinkScheduler()
    early, _ = opened(links=links, target_s=50.0, may_compute=False)
    late, _ = opened(links=links, target_s=60.0, token_s=0.05)
    usual = late.loader.rate(0.01)
    for number in range(1, 11):
        now = 0.1 * number
        tell(early, part(3, "lossless", 10_000 * number, 400_000, 100_000, 0.1), now)
        assert not [c for c in tell(late, Tick(), now + 0.01) if isinstance(c, Compute)], now
    assert late.loader.rate(1.05) == pytest.approx(usual, rel=0.05)
    latency_s = late.sources[0].share.estimator.latency_s
    tell(late, part(3, "lossless", 1000, 400_000, 1000), 1.1)
    assert late.sources[0].share.estimator.latency_s == latency_s, "waiting for others is no latency"
    assert late.loader.rate(9.0) < 0.5 * usual  # now nobody gets anything


# -- targets that cannot be met -----------------------------------------------------------------------------------


@pytest.mark.parametrize("target_s", [0.02, 0.005])
def test_an_infeasible_target_is_refused(target_s: float) -> None:
    """The second one is missed by the tail alone."""
    fill, commands = opened(target_s=target_s, infeasible="reject")
    (end,) = commands
    assert isinstance(end, Fail) and (end.code, end.status) == ("slo_infeasible", 503) and "(q3)" in end.message
    assert fill.done


@pytest.mark.parametrize("target_s", [0.02, 0.005])
def test_an_infeasible_target_is_answered_with_text(target_s: float) -> None:
    fill, commands = opened(target_s=target_s, infeasible="text")
    assert commands == [Compute(chunk=0)] and not fill.sources[0].is_hoped_for


def test_as_fast_as_possible_is_never_infeasible() -> None:
    for infeasible in ("reject", "text"):
        _, commands = opened(target_s=0.0, infeasible=infeasible)
        assert asked(commands)


def test_a_target_that_becomes_infeasible_later_is_served_all_the_same() -> None:
    fill, commands = opened(target_s=1.0, infeasible="reject", may_compute=False)
    assert asked(commands)
    tell(fill, part(3, "q3", 1000, 50_000, 1000, 1.0), 0.95)
    assert not fill.done


# -- refinements --------------------------------------------------------------------------------------------------

QUANTIZED = ("q1", "q2", "q3")


def short_of_time(**options: Any) -> FillMachine:
    """Two chunks at the floor in place and some of the target's time left: refinements have been asked for."""
    fill, _ = opened(**{"num_chunks": 2, "levels": QUANTIZED, "target_s": 0.5, "may_compute": False, **options})
    place(fill, 1, "q3", 0.05)
    place(fill, 0, "q3", 0.1)
    assert not fill.ready
    assert {log.upgrade_name for log in fill.chunks} == {"q3>q1"}
    return fill


def test_what_time_is_left_before_the_first_token_goes_into_refinements() -> None:
    fill, _ = opened(num_chunks=2, levels=QUANTIZED, target_s=0.5, may_compute=False)
    place(fill, 1, "q3", 0.05)
    commands = place(fill, 0, "q3", 0.1)
    assert Ready() not in commands
    short_of_time()
    fill = short_of_time()
    assert fill.wake_at == pytest.approx(fill.loader.deadline())
    coarse = fill.chunks[0].blob
    (refine,) = tell(fill, blob(0, "q3>q1"), 0.15)
    assert refine == Refine(chunk=0, level="q1", blob=bytes(1000), coarse=coarse)
    assert tell(fill, Refined(chunk=0, seconds=0.004, after_tokens=0, blob=b"q1"), 0.16) == []
    tell(fill, blob(1, "q3>q1"), 0.2)
    assert tell(fill, Refined(chunk=1, seconds=0.004, after_tokens=0, blob=b"q1"), 0.21) == [Ready()]
    assert [log.first_level for log in fill.chunks] == ["q1", "q1"] and fill.done


def test_refinements_are_asked_for_behind_what_others_need_first() -> None:
    fill, _ = opened(num_chunks=2, levels=QUANTIZED, target_s=0.5, may_compute=False)
    commands = place(fill, 1, "q3", 0.05) + place(fill, 0, "q3", 0.1)
    kinds = {command.level: command.kind for command in commands if isinstance(command, Ask)}
    assert kinds["q3>q1"] is Kind.BETTER and kinds.get("q3", Kind.BASE) is Kind.BASE


def test_upgrades_in_flight_are_postponed_at_ready() -> None:
    fill = short_of_time(refine_levels=QUANTIZED)
    commands = tell(fill, Tick(), fill.loader.deadline() + 1e-6)
    assert commands == [
        Ready(),
        Ask(chunk=0, level="q3>q1", kind=Kind.LATER),
        Ask(chunk=1, level="q3>q1", kind=Kind.LATER),
    ]
    assert [log.first_level for log in fill.chunks] == ["q3", "q3"] and not fill.done
    for chunk in (0, 1):
        tell(fill, blob(chunk, "q3>q1"), 0.7)
        tell(fill, Refined(chunk=chunk, seconds=0.004, after_tokens=5, blob=b"q1"), 0.8)
    assert fill.done and [log.level for log in fill.chunks] == ["q1", "q1"]
    assert [step.after_tokens for log in fill.chunks for step in log.refinements] == [5, 5]


def test_upgrades_in_flight_are_withdrawn_at_ready_where_nothing_is_refined_later() -> None:
    fill = short_of_time()
    commands = tell(fill, Tick(), fill.loader.deadline() + 1e-6)
    assert commands == [Ready(), Withdraw(chunk=0), Withdraw(chunk=1)]
    assert fill.done


def test_what_is_being_decoded_at_ready_still_goes_into_the_pages() -> None:
    fill = short_of_time()
    tell(fill, blob(0, "q3>q1"), 0.2)
    assert tell(fill, Tick(), fill.loader.deadline() + 1e-6) == [Ready(), Withdraw(chunk=1)]
    assert not fill.done
    assert tell(fill, Refined(chunk=0, seconds=0.004, after_tokens=1, blob=b"q1"), 0.6) == []
    assert fill.done and [log.level for log in fill.chunks] == ["q1", "q3"]
    assert [log.first_level for log in fill.chunks] == ["q3", "q3"]


def test_a_rejected_refinement_leaves_the_chunk_as_it_is() -> None:
    fill = short_of_time()
    tell(fill, blob(0, "q3>q1"), 0.2)
    assert tell(fill, RefinementRejected(chunk=0, reason="another encoding"), 0.21) == []
    assert (fill.chunks[0].state, fill.chunks[0].level, fill.chunks[0].upgrade) == (ChunkState.FILLED, "q3", "")
    assert fill.sources[0].bad_blobs == 1
    tell(fill, blob(1, "q3>q1"), 0.3)
    assert tell(fill, Refined(chunk=1, seconds=0.004, after_tokens=0, blob=b"q1"), 0.31) == [Ready()]
    assert [log.first_level for log in fill.chunks] == ["q3", "q1"]
    assert any("another encoding" in what for _, what in fill.reasons)


def test_a_source_of_rejected_refinements_is_given_up() -> None:
    fill, _ = opened(num_chunks=6, levels=("q3",), refine_levels=QUANTIZED, may_compute=False)
    for chunk in range(5, -1, -1):
        place(fill, chunk, "q3", 0.1)
    assert fill.ready
    for _ in range(MAX_BAD_BLOBS + 1):
        assert fill.sources[0].is_open
        chunk = next(i for i, log in enumerate(fill.chunks) if log.upgrade and not log.is_upgrade_here)
        tell(fill, blob(chunk, "q3>q1"), 0.2)
        tell(fill, RefinementRejected(chunk=chunk, reason="damaged"), 0.2)
    assert not fill.sources[0].is_hoped_for and fill.done
    assert [log.level for log in fill.chunks] == ["q3"] * 6


def test_another_refinement_than_the_one_asked_for_is_left_alone() -> None:
    fill = short_of_time()
    assert tell(fill, blob(0, "q3>q2"), 0.2) == []
    assert (fill.chunks[0].level, fill.chunks[0].upgrade) == ("q3", "")


def test_a_refused_refinement_leaves_the_chunk_as_it_is() -> None:
    fill = short_of_time()
    assert tell(fill, ChunkRefused(chunk=0, reason="evicted"), 0.2) == []
    assert (fill.chunks[0].level, fill.chunks[0].upgrade, fill.chunks[0].left_bytes) == ("q3", "", 0.0)


def test_late_parts_and_blobs_of_a_refinement_that_is_here_change_nothing() -> None:
    fill = short_of_time()
    tell(fill, blob(0, "q3>q1"), 0.2)
    before = fill.sources[0].left_bytes
    tell(fill, part(0, "q3>q1", 500, 1000, 500), 0.21)
    assert tell(fill, blob(0, "q3>q1"), 0.22) == []
    assert fill.sources[0].left_bytes == before
    tell(fill, Refined(chunk=0, seconds=0.004, after_tokens=0, blob=b"q1"), 0.23)
    assert fill.sources[0].left_bytes == before


def test_nothing_is_refined_below_what_is_being_computed() -> None:
    """A computed chunk rests on what lies before it: its KV belongs to the levels that were there."""
    fill, _ = opened(num_chunks=2, levels=QUANTIZED, token_s=0.001, target_s=0.9)
    tell(fill, ChunkRefused(chunk=1, reason="evicted"), 0.01)
    commands = place(fill, 0, "q3", 0.06)
    assert Compute(chunk=1) in commands and not asked(commands)
    assert tell(fill, ChunkComputed(chunk=1), 0.15) == [Ready()]
    assert [log.first_level for log in fill.chunks] == ["q3", TEXT]


def test_computing_waits_until_no_refinement_below_it_is_on_its_way() -> None:
    fill, _ = opened(num_chunks=3, levels=QUANTIZED, token_s=0.001, target_s=0.2, refine_levels=QUANTIZED, rate=1e7)
    place(fill, 1, "q3", 0.02, rate=1e7)
    place(fill, 0, "q3", 0.03, rate=1e7)
    assert {fill.chunks[0].upgrade, fill.chunks[1].upgrade} == {"q1"}
    tell(fill, blob(0, "q3>q1"), 0.04)
    commands = tell(fill, ChunkRefused(chunk=2, reason="evicted"), 0.05)
    assert commands == [Withdraw(chunk=1)]  # and chunk 0 is just being decoded
    assert tell(fill, Refined(chunk=0, seconds=0.004, after_tokens=0, blob=b"q1"), 0.06) == [Compute(chunk=2)]
    commands = tell(fill, ChunkComputed(chunk=2), 0.12)
    assert commands == [Ready(), Ask(chunk=1, level="q3>q1", kind=Kind.LATER)]
    assert [log.first_level for log in fill.chunks] == ["q1", "q3", TEXT]


def test_exact_chunks_are_not_sent_again_in_another_exact_form() -> None:
    sizes = {"raw": 500_000.0, **SIZES}
    fill, _ = opened(num_chunks=2, may_compute=False)
    assert fill.upgrades.num_waiting == 0
    spec = FillSpec(
        num_chunks=2,
        chunk_tokens=64,
        levels=("raw", "lossless", "q1"),
        chunk_bytes=sizes,
        nested=NESTED,
        exact=frozenset({"raw", "lossless"}),
        refine_levels=("raw", "lossless", "q1"),
        deadline=100.0,
        tail_s=0.01,
        may_compute=False,
    )
    share = LinkScheduler().join("s", deadline=100.0, prior_bytes_per_s=1e6)
    compute, codec = ComputeEstimator(SLOW_COMPUTE, 0.0), CodecEstimator()
    fill = FillMachine(spec, now=0.0, sources=[share], compute=compute, codec=codec)
    fill.start(0.0)
    tell(fill, stored(2), 0.001)
    place(fill, 1, "lossless", 0.4)
    assert place(fill, 0, "lossless", 0.8) == [Ready()] and fill.done


def test_a_chunk_is_refined_by_the_source_that_gave_it() -> None:
    by_chunk = {1: 1, 0: 0}
    fill = machine(num_chunks=2, num_sources=2, levels=("q3",), refine_levels=QUANTIZED, may_compute=False)
    fill.start(0.0)
    tell(fill, stored(2, source=1), 0.001)
    place(fill, 1, "q3", 0.1, 1)
    tell(fill, ChunkRefused(source=1, chunk=0, reason="evicted"), 0.2)
    assert tell(fill, stored(2, source=0), 0.3) == [Ask(source=0, chunk=0, level="q3")]
    later = place(fill, 0, "q3", 0.4)
    assert {c.chunk: c.source for c in later if isinstance(c, Ask) and c.kind is Kind.LATER} == by_chunk
    # With its source gone, a chunk stays; the other one goes on.
    tell(fill, SourceLost(source=1, reason="gone", is_final=True), 0.5)
    (left,) = [i for i, log in enumerate(fill.chunks) if log.upgrade]
    assert by_chunk[left] == 0 and not fill.done
    tell(fill, blob(left, "q3>q1"), 0.6)
    tell(fill, Refined(chunk=left, seconds=0.004, after_tokens=2, blob=b"q1"), 0.6)
    assert fill.done and sorted(log.level for log in fill.chunks) == ["q1", "q3"]


# -- what other transfers reckon with -----------------------------------------------------------------------------


def test_a_fill_tells_its_links_what_it_still_wants() -> None:
    fill, _ = opened(num_chunks=2, levels=("q3",), refine_levels=QUANTIZED)
    share = fill.sources[0].share
    assert share.base_bytes == 2 * SIZES["q3"]
    place(fill, 1, "q3", 0.1)
    assert share.base_bytes == SIZES["q3"]
    place(fill, 0, "q3", 0.2)
    assert share.base_bytes == 0 and share.refine_bytes == pytest.approx(fill.sources[0].left_bytes) and fill.ready
    assert share.refine_bytes > 0
    for chunk in (0, 1):
        tell(fill, ChunkRefused(chunk=chunk, reason="busy"), 0.3)
    assert fill.done and share.base_bytes == share.refine_bytes == 0


@pytest.mark.parametrize("is_final", [True, False])
def test_a_fill_that_failed_wants_nothing(is_final: bool) -> None:
    fill, _ = opened(may_compute=False)
    tell(fill, SourceLost(reason="gone", is_final=is_final), 0.1)
    if not is_final:
        assert fill.sources[0].share.base_bytes == 0
        tell(fill, Tick(), 5.0)
        tell(fill, SourceLost(reason="gone", is_final=True), 5.0)
    assert fill.done and fill.sources[0].share.base_bytes == 0


# -- a plan that is followed --------------------------------------------------------------------------------------


def followed(*levels: str, steps: tuple[ReplayStep, ...] = (), **options: Any) -> tuple[FillMachine, list[Command]]:
    replay = Replay(levels=levels, steps=steps)
    return opened(num_chunks=len(levels), levels=tuple(SIZES), replay=replay, **options)


def step(chunk: int, level: str, after_tokens: int) -> ReplayStep:
    return ReplayStep(chunk=chunk, level=level, after_tokens=after_tokens)


def test_a_plan_is_followed_chunk_by_chunk() -> None:
    fill, commands = followed(TEXT, "q3", "lossless")
    assert commands == [Compute(chunk=0), Ask(chunk=2, level="lossless"), Ask(chunk=1, level="q3")]
    assert fill.table.computing == 0  # begun before the source answered
    place(fill, 2, "lossless", 0.1)
    place(fill, 1, "q3", 0.2)
    assert not fill.ready
    assert tell(fill, ChunkComputed(chunk=0), 0.3) == [Ready()]
    assert fill.done and [log.first_level for log in fill.chunks] == [TEXT, "q3", "lossless"]


def test_another_level_than_the_plans_is_no_use() -> None:
    fill, _ = followed("q3")
    assert tell(fill, blob(0, "q1"), 0.1) == [Ask(chunk=0, level="q3")]
    assert fill.chunks[0].bad_blobs == 1


def test_silence_and_slow_links_change_nothing_of_a_plan() -> None:
    fill, _ = followed("lossless", "lossless", token_s=FAST_COMPUTE)
    for now in (1.0, 5.0, 20.0):
        assert tell(fill, Tick(), now) == []


def test_a_plan_holds_the_tokens_until_its_refinements_are_there() -> None:
    fill, _ = followed("q3", "q3", steps=(step(1, "q2", 3), step(1, "q1", 3), step(0, "q1", 8)))
    place(fill, 1, "q3", 0.1)
    commands = place(fill, 0, "q3", 0.2)
    assert commands[-2:] == [Ready(), Ask(chunk=1, level="q3>q2", kind=Kind.LATER)]
    assert fill.may_step(2) and not fill.may_step(3)
    (refine,) = tell(fill, blob(1, "q3>q2"), 0.3)
    assert isinstance(refine, Refine) and refine.after_tokens == 3 and not fill.may_step(3)
    commands = tell(fill, Refined(chunk=1, seconds=0.004, after_tokens=3, blob=b"q2"), 0.4)
    assert asked(commands) == [(1, "q2>q1"), (0, "q3>q1")]
    assert not fill.may_step(3)
    tell(fill, blob(1, "q2>q1"), 0.5)
    tell(fill, Refined(chunk=1, seconds=0.004, after_tokens=3, blob=b"q1"), 0.6)
    assert fill.may_step(3) and fill.may_step(7) and not fill.may_step(8) and not fill.done
    tell(fill, blob(0, "q3>q1"), 0.7)
    tell(fill, Refined(chunk=0, seconds=0.004, after_tokens=8, blob=b"q1"), 0.8)
    assert fill.done and fill.may_step(100)


def test_a_plans_refinements_are_asked_for_again_in_order_when_a_source_comes_back() -> None:
    fill, _ = followed("q3", "q3", "q3", steps=(step(0, "q1", 2), step(1, "q1", 5), step(2, "q1", 9)))
    for chunk in (2, 1, 0):
        place(fill, chunk, "q3", 0.1)
    assert fill.ready and sum(log.upgrade != "" for log in fill.chunks) >= 2
    tell(fill, SourceLost(reason="cut"), 0.5)
    assert fill.may_step(1) and not fill.may_step(2), "the first step would be passed over"
    assert tell(fill, Tick(), 0.5 + RETRY_S) == [Open(source=0)]
    commands = tell(fill, stored(3), 0.8)
    assert asked(commands)[:2] == [(0, "q3>q1"), (1, "q3>q1")]


@pytest.mark.parametrize(
    "event",
    [
        RefinementRejected(chunk=0, reason="damaged"),
        ChunkRefused(chunk=0, reason="evicted"),
        SourceLost(reason="gone", is_final=True),
        blob(0, "q3>q2"),
    ],
)
def test_a_refinement_that_cannot_be_had_ends_a_followed_plan(event: Any) -> None:
    fill, _ = followed("q3", steps=(step(0, "q1", 2),))
    place(fill, 0, "q3", 0.1)
    if isinstance(event, RefinementRejected):
        tell(fill, blob(0, "q3>q1"), 0.2)
    end = tell(fill, event, 0.3)[-1]
    assert isinstance(end, Fail) and end.code == "plan_not_followed" and fill.done


def test_a_chunk_that_cannot_be_had_ends_a_followed_plan_even_where_computing_is_allowed() -> None:
    fill, _ = followed("q3", token_s=FAST_COMPUTE)
    (end,) = tell(fill, ChunkRefused(chunk=0, reason="evicted"), 0.1)
    assert isinstance(end, Fail) and end.code == "plan_not_followed"


# -- a front that is kept here ------------------------------------------------------------------------------------


def test_the_tails_front_is_loaded_while_the_source_answers_and_waited_for() -> None:
    fill = machine(num_chunks=2, front_stop=2 * 64 + 32, target_s=0.0)
    assert fill.start(0.0) == [Open(source=0), LoadFront()]
    tell(fill, stored(2), 0.001)
    place(fill, 1, "lossless", 0.01)
    assert Ready() not in place(fill, 0, "lossless", 0.02) and not fill.ready
    assert tell(fill, FrontLoaded(seconds=0.002), 0.03) == [Ready()]
    assert (fill.front_stop, fill.num_front_tokens, fill.front_at) == (160, 32, 0.03)
    assert fill.done


def test_a_front_that_is_there_first_changes_nothing_about_the_chunks() -> None:
    fill, _ = opened(num_chunks=2, front_stop=2 * 64 + 32, target_s=0.0)
    assert Ready() not in tell(fill, FrontLoaded(seconds=0.002), 0.002)
    place(fill, 1, "lossless", 0.01)
    assert Ready() in place(fill, 0, "lossless", 0.02)


def test_a_tails_front_that_cannot_be_read_is_computed() -> None:
    fill = machine(num_chunks=0, num_sources=0, front_stop=48, target_s=0.0)
    assert fill.start(0.0) == [LoadFront()]
    assert tell(fill, FrontRejected(reason="it is not there any more"), 0.01) == [Ready()]
    assert fill.front_stop == fill.num_front_tokens == 0 and "not there any more" in fill.reasons[-1][1]


@pytest.mark.parametrize("is_there", [True, False])
def test_of_a_chunk_that_is_there_in_part_the_rest_is_computed(is_there: bool) -> None:
    fill = machine(num_chunks=3, num_sources=0, cached_tokens=64 + 16, front_stop=2 * 64 + 32, target_s=0.0)
    assert fill.start(0.0) == [Compute(chunk=1)], "a front is for its own chunk"
    assert fill.to_compute(1) == (80, 128)
    assert tell(fill, ChunkComputed(chunk=1), 0.1) == [LoadFront()]
    assert fill.table.computing == 2, "nobody else sees to it meanwhile"
    answer = FrontLoaded(seconds=0.002) if is_there else FrontRejected(reason="damaged")
    assert tell(fill, answer, 0.2) == [Compute(chunk=2)]
    assert fill.to_compute(2) == (160 if is_there else 128, 192)
    assert fill.num_front_tokens == (32 if is_there else 0)
    assert tell(fill, ChunkComputed(chunk=2), 0.3) == [Ready()]


def test_a_front_of_which_part_is_in_the_pages_counts_for_the_rest() -> None:
    fill = machine(num_chunks=1, num_sources=0, cached_tokens=64 + 16, front_stop=64 + 48, target_s=0.0)
    assert fill.start(0.0) == [LoadFront()] and tell(fill, FrontLoaded(seconds=0.002), 0.1) == [Ready()]
    assert fill.num_front_tokens == 32


def test_a_chunk_that_a_source_gives_whole_needs_no_front() -> None:
    fill, _ = opened(num_chunks=2, front_stop=64 + 32, target_s=0.0)
    commands = place(fill, 1, "lossless", 0.01) + place(fill, 0, "lossless", 0.02)
    assert Ready() in commands and LoadFront() not in commands and fill.front_stop == 0
