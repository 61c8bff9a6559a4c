"""The fill machine in virtual time: it ends, as fast as the best fixed way, and spends slack on quality."""

from __future__ import annotations

import random
from typing import Any

import pytest
from fill_world import LEVELS, NESTED, SIZES, World

from decode.fill_chunks import TEXT
from decode.fill_events import Ask, Compute, Fail, Opened, Ready, SourceLost
from decode.link_scheduler import Kind
from decode.replay import Replay, ReplayStep, plan_of, read_replay

MBIT = 1e6 / 8
QUANTIZED = ("q1", "q2", "q3")


def run_s(**options: Any) -> float:
    world = World(**options)
    world.run()
    assert world.ready_at is not None
    return world.ready_at


@pytest.mark.parametrize("mbps", [0.3, 1, 3, 10, 20, 50, 100, 200, 400, 1000, 3000, 10000])
def test_as_fast_as_the_best_fixed_way_on_a_constant_link(mbps: float) -> None:
    rate = lambda now: mbps * MBIT  # noqa: E731
    auto = run_s(rate=rate)
    text = run_s(rate=rate, may_load=False)
    fixed = [run_s(rate=rate, levels=(level,), may_compute=False) for level in LEVELS]
    # One part of a chunk may be under way or computed when the plans change, hence the small allowance.
    assert auto <= 1.05 * min(text, *fixed) + 0.005, (auto, text, fixed)


@pytest.mark.parametrize("mbps", [10, 50, 200, 1000])
def test_slack_buys_quality(mbps: float) -> None:
    """At least the level that just fits, and what is left over lifts some chunks further."""
    rate = lambda now: mbps * MBIT  # noqa: E731
    fixed = {level: run_s(rate=rate, levels=(level,), may_compute=False) for level in LEVELS}
    for level in LEVELS:
        world = World(rate=rate, ttft_s=1.3 * fixed[level] + 0.15)  # the tail takes 0.03
        machine = world.run()
        worst = max(LEVELS.index(chunk.first_level) for chunk in machine.chunks if chunk.first_level != TEXT)
        assert worst <= max(LEVELS.index(level), LEVELS.index("lossless"))  # raw is no better
        assert world.ttft_s_reached <= world.ttft_s


def test_between_two_levels_some_chunks_get_the_better_one() -> None:
    rate = lambda now: 20 * MBIT  # noqa: E731
    q2, q1 = (run_s(rate=rate, levels=(level,), may_compute=False) for level in ("q2", "q1"))
    world = World(rate=rate, ttft_s=(q1 + q2) / 2 + 0.1, levels=QUANTIZED)
    levels = [chunk.first_level for chunk in world.run().chunks]
    assert levels.count("q1") >= 3 and levels.count("q2") >= 3 and "q3" not in levels, levels


def test_time_short_the_floor_comes_first_for_all() -> None:
    """A link that then drops tenfold finds nothing missing: the target is met all the same."""
    q1 = run_s(rate=lambda now: 100 * MBIT, levels=("q1",), may_compute=False)
    world = World(rate=lambda now: (100 if now < 0.06 else 1) * MBIT, ttft_s=1.2 * q1 + 0.03, may_compute=False)
    machine = world.run()
    bases = [command for _, command in world.log if isinstance(command, Ask) and command.kind is Kind.BASE]
    assert [ask.level for ask in bases[:8]] == ["q3"] * 8
    assert world.ttft_s_reached <= world.ttft_s
    assert {chunk.first_level for chunk in machine.chunks} <= set(LEVELS)


def test_a_link_that_drops_tenfold_changes_level_and_recomputes() -> None:
    world = World(rate=lambda now: (6 if now < 0.1 else 0.4) * MBIT, ttft_s=0.9)
    machine = world.run()
    used = {chunk.first_level for chunk in machine.chunks}
    assert TEXT in used and used - {TEXT}, used
    assert world.ttft_s_reached < 1.1


@pytest.mark.parametrize("not_here", [{2, 5}, {0}, {7}, set(range(8))])
def test_a_source_that_lacks_chunks_and_is_lost_leaves_the_text(not_here: set[int]) -> None:
    world = World(rate=lambda now: 0.3 * MBIT, num_chunks=8, not_here=(frozenset(not_here),))
    world.cut(0, 0.1, 100.0, is_final=True)
    assert {chunk.level for chunk in world.run().chunks} == {TEXT}


def test_a_large_chunk_on_a_link_that_became_slow_is_asked_for_anew() -> None:
    world = World(rate=lambda now: (4000 if now < 0.02 else 3) * MBIT, ttft_s=0.9, may_compute=False)
    machine = world.run()
    assert any("asked for anew" in reason for _, reason in machine.reasons)
    # 3 Mbit/s bring a coarsest chunk in 0.06 s; sticking to the raw chunk on its way would take 4 s alone.
    assert world.ttft_s_reached < 1.4


def test_a_link_that_dies_is_finished_by_computing() -> None:
    world = World(rate=lambda now: 5 * MBIT if now < 0.1 else 0.0, ttft_s=0.6)
    machine = world.run()
    assert machine.chunks[0].first_level == TEXT
    assert world.ready_at is not None and world.ready_at < 0.1 + 13 * 256 * world.token_s + 0.5


def test_a_lost_source_without_the_right_to_compute_fails() -> None:
    world = World(rate=lambda now: 1 * MBIT, may_compute=False, levels=("raw",))
    world.at(1.0, SourceLost(reason="peer gone", is_final=True))
    machine = world.run()
    assert machine.done
    assert isinstance(world.log[-1][1], Fail) and "peer gone" in world.log[-1][1].message


def test_all_text_without_a_source() -> None:
    machine = World(rate=lambda now: 1.0, may_load=False).run()
    assert {chunk.first_level for chunk in machine.chunks} == {TEXT}


def test_computing_and_loading_at_break_even_take_little_more_than_half() -> None:
    """CacheGen's and Cake's two halves together: neither end alone comes near."""
    text = 13 * 256 * 2.5e-4
    mbps = 13 * SIZES["q3"] / text / MBIT
    both = run_s(rate=lambda now: mbps * MBIT, levels=("q3",))
    load = run_s(rate=lambda now: mbps * MBIT, levels=("q3",), may_compute=False)
    assert load == pytest.approx(text, rel=0.05)
    assert min(load, text) / both >= 1.6


# -- several sources ----------------------------------------------------------------------------------------------


def test_two_sources_bring_a_prompt_in_half_the_time() -> None:
    rate = lambda now: 20 * MBIT  # noqa: E731
    one = run_s(rate=rate, levels=("q1",), may_compute=False)
    two = run_s(rate=rate, more_rates=(rate,), levels=("q1",), may_compute=False)
    assert two < 0.6 * one


def test_a_second_source_that_answers_later_takes_over_what_stands_at_the_first() -> None:
    """The first was taken for a fast link and asked for everything."""
    rate = lambda now: 8 * MBIT  # noqa: E731
    world = World(rate=rate, more_rates=(rate,), levels=("q1",), may_compute=False, prior_rate=400 * MBIT)
    world.pipes[1].is_up = False
    world.at(0.1, lambda: setattr(world.pipes[1], "is_up", True))
    world.at(0.1, lambda: world.tell(Opened(source=1, stored_bytes=({},) * 13)))
    machine = world.run()
    share = [chunk.source for chunk in machine.chunks].count(1)
    assert share >= 4, share


def test_a_slow_second_source_does_no_harm() -> None:
    fast, slow = (lambda now: 40 * MBIT), (lambda now: 0.5 * MBIT)
    one = run_s(rate=fast, levels=("q1",), may_compute=False)
    two = run_s(rate=fast, more_rates=(slow,), levels=("q1",), may_compute=False)
    assert two < 1.1 * one


@pytest.mark.parametrize("is_final", [False, True])
def test_the_second_source_takes_over_from_the_first(is_final: bool) -> None:
    rate = lambda now: 10 * MBIT  # noqa: E731
    world = World(rate=rate, more_rates=(rate,), levels=("q1",), may_compute=False)
    world.cut(0, 0.3, 1e9, is_final=is_final)
    machine = world.run()
    assert {chunk.first_level for chunk in machine.chunks} == {"q1"}
    assert {chunk.source for chunk in machine.chunks} == {0, 1}


def test_a_healed_link_resumes_at_the_first_missing_chunk() -> None:
    world = World(rate=lambda now: 10 * MBIT, levels=("q1",), may_compute=False)
    world.cut(0, 0.5, 1.0)
    machine = world.run()
    assert {chunk.first_level for chunk in machine.chunks} == {"q1"}
    sent_twice = world.sent_bytes - 13 * SIZES["q1"]
    assert sent_twice <= 2 * SIZES["q1"], "chunks that were here came again"
    assert world.ready_at is not None and world.ready_at < 13 * SIZES["q1"] / (10 * MBIT) + 1.0 + 2.0


def test_a_cut_without_the_right_to_compute_fails_within_the_bound() -> None:
    world = World(rate=lambda now: 1 * MBIT, levels=("q1",), may_compute=False)
    world.cut(0, 0.5, 1e9)
    world.run()
    at, end = world.log[-1]
    assert isinstance(end, Fail) and end.code == "kv_transfer_failed"
    assert at < 0.5 + 10.0 + 0.1


def test_a_cut_with_the_right_to_compute_is_finished_by_computing() -> None:
    world = World(rate=lambda now: 1 * MBIT, levels=("q1",), ttft_s=20.0)
    world.cut(0, 0.5, 1e9)
    machine = world.run()
    assert TEXT in {chunk.first_level for chunk in machine.chunks}
    assert world.ready_at is not None and world.ready_at < 3.0


# -- refinement after the first token -----------------------------------------------------------------------------


def test_after_the_first_token_all_loaded_chunks_rise_to_the_ceiling() -> None:
    world = World(rate=lambda now: 20 * MBIT, levels=QUANTIZED, refine_levels=QUANTIZED, may_compute=False)
    machine = world.run()
    assert {chunk.first_level for chunk in machine.chunks} == {"q3"}
    assert set(world.pages.values()) == {"q1"}
    assert all(step.after_tokens > 0 for chunk in machine.chunks for step in chunk.refinements)
    total = 13 * SIZES["q1"]
    assert world.sent_bytes == pytest.approx(total, rel=0.01), "a refinement sends what is lacking and no more"


def test_computed_chunks_are_not_refined() -> None:
    world = World(rate=lambda now: 0.4 * MBIT, levels=QUANTIZED, refine_levels=QUANTIZED)
    machine = world.run()
    assert TEXT in {chunk.first_level for chunk in machine.chunks}
    assert all(not chunk.refinements for chunk in machine.chunks if chunk.first_level == TEXT)


def test_without_refinement_nothing_is_sent_after_the_first_token() -> None:
    world = World(rate=lambda now: 20 * MBIT, levels=QUANTIZED, may_compute=False)
    world.run()
    assert world.now == world.ready_at


@pytest.mark.parametrize("for_s", [1.0, 1e9])
def test_a_cut_while_refining_leaves_the_answer_alone(for_s: float) -> None:
    world = World(rate=lambda now: 3 * MBIT, levels=QUANTIZED, refine_levels=QUANTIZED, may_compute=False)
    world.cut(0, 1.2, for_s)
    world.run()
    assert world.ready_at is not None and world.ready_at < 1.2
    assert not any(isinstance(command, Fail) for _, command in world.log)
    if for_s < 10:
        assert set(world.pages.values()) == {"q1"}


# -- bounds and infeasible targets --------------------------------------------------------------------------------


def test_a_bound_on_computing_holds_as_long_as_there_is_a_source() -> None:
    machine = World(rate=lambda now: 0.4 * MBIT, max_compute=3).run()
    assert sum(chunk.first_level == TEXT for chunk in machine.chunks) == 3


def test_an_infeasible_target_is_refused_where_the_policy_says_so() -> None:
    world = World(rate=lambda now: 0.1 * MBIT, ttft_s=0.3, infeasible="reject")
    world.run()
    end = world.log[-1][1]
    assert isinstance(end, Fail) and (end.code, end.status) == ("slo_infeasible", 503) and "q3" in end.message


def test_an_infeasible_target_is_served_as_text_where_the_policy_says_so() -> None:
    machine = World(rate=lambda now: 3 * MBIT, ttft_s=0.1, infeasible="text").run()
    assert {chunk.first_level for chunk in machine.chunks} == {TEXT}


def test_a_feasible_target_is_not_refused() -> None:
    world = World(rate=lambda now: 100 * MBIT, ttft_s=0.3, infeasible="reject")
    world.run()
    assert world.ready_at is not None


# -- a plan that is followed --------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(30))
def test_what_happened_can_be_had_again_on_another_link(seed: int) -> None:
    rng = random.Random(seed)
    first_rate, later_rate = 10 ** rng.uniform(5, 7.5), 10 ** rng.uniform(5, 7.5)
    options: dict[str, Any] = {"num_chunks": rng.randint(1, 20), "ttft_s": rng.choice([0.0, 0.3, 1.0])}
    world = World(
        rate=lambda now: first_rate if now < 0.2 else later_rate, levels=QUANTIZED, refine_levels=QUANTIZED, **options
    )
    first = world.run()
    plan = plan_of(first.chunks, 256)
    replay = read_replay(plan, num_chunks=len(first.chunks), chunk_tokens=256, known=LEVELS)
    again = World(rate=lambda now: 10 ** rng.uniform(5, 7), levels=LEVELS, replay=replay, **options).run()
    assert plan_of(again.chunks, 256) == plan


def test_a_plan_that_cannot_be_followed_fails() -> None:
    replay = Replay(levels=("q1",) * 13, steps=())
    world = World(rate=lambda now: 1 * MBIT, replay=replay)
    world.cut(0, 0.5, 1e9, is_final=True)
    world.run()
    end = world.log[-1][1]
    assert isinstance(end, Fail) and end.code == "plan_not_followed"


def test_a_followed_plan_holds_the_request_until_its_refinements_are_there() -> None:
    replay = Replay(levels=("q3",) * 13, steps=(ReplayStep(chunk=2, level="q1", after_tokens=3),))
    world = World(rate=lambda now: 3 * MBIT, replay=replay)
    machine = world.machine = world.make()
    world._carry_out(machine.start(0.0))
    while not machine.ready:
        world.now, _, event = __import__("heapq").heappop(world.events)
        event() if callable(event) else world.tell(event)
    assert machine.may_step(2) and not machine.may_step(3)


# -- anything -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(150))
def test_random_links_always_end_and_never_compute_above_a_hole(seed: int) -> None:
    rng = random.Random(seed)
    steps = sorted((rng.uniform(0, 3), 10 ** rng.uniform(5, 9)) for _ in range(rng.randint(1, 8)))
    first = 10 ** rng.uniform(5, 9)

    def rate(now: float) -> float:
        current = first
        for at, value in steps:
            if now >= at:
                current = value
        return current

    world = World(
        rate=rate,
        more_rates=(rate,) * rng.randint(0, 2),
        num_chunks=rng.randint(0, 40),
        ttft_s=rng.choice([0.0, 0.2, 1.0, 5.0]),
        prior_rate=10 ** rng.uniform(5, 9),
        stored=rng.random() < 0.7,
        token_s=10 ** rng.uniform(-5, -3),
        levels=rng.choice([LEVELS, QUANTIZED, ("raw",), ("lossless", "q3")]),
        refine_levels=rng.choice([(), QUANTIZED, ("lossless", *QUANTIZED)]),
        max_compute=rng.choice([None, 2]),
    )
    for source in range(len(world.pipes)):
        if rng.random() < 0.4:
            world.cut(source, rng.uniform(0, 2), rng.choice([0.5, 3.0, 1e9]), is_final=rng.random() < 0.3)
    world.run()
    ready = [command for _, command in world.log if isinstance(command, Ready)]
    assert len(ready) == 1 and not any(isinstance(command, Fail) for _, command in world.log)


@pytest.mark.parametrize("ttft_s", [0.0, 0.3, 1.0, 3.0])
def test_a_live_prefill_is_loaded_or_computed_but_not_both(ttft_s: float) -> None:
    """On a fast link the source's work is used; nothing flips to and fro."""
    world = World(rate=lambda now: 1000 * MBIT, stored=False, ttft_s=ttft_s, live_chunk_s=0.066)
    machine = world.run()
    assert sum(chunk.first_level == TEXT for chunk in machine.chunks) in (0, len(machine.chunks))
    assert len(machine.reasons) <= 4, machine.reasons
    assert world.ready_at is not None and world.ready_at < max(1.15 * 13 * 0.066, ttft_s)


def test_a_live_prefill_over_a_slow_link_keeps_pace_with_a_coarser_level() -> None:
    """Raw would take a second and a half; the level is chosen so that the last chunk follows the computing at once."""
    world = World(rate=lambda now: 20 * MBIT, stored=False, live_chunk_s=0.066, may_compute=False)
    machine = world.run()
    assert {chunk.first_level for chunk in machine.chunks} <= NESTED
    assert world.ready_at is not None and world.ready_at < 1.15 * 13 * 0.066
    assert not any(isinstance(command, Compute) for _, command in world.log)
