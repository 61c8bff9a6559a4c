"""The choice of level and meeting point, against a readable cost model and trying everything."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from decode.plan import (
    BETTER_ROOM,
    CAREFUL_DECODE,
    COMPUTE_MUST_GAIN,
    COMPUTE_PRICE,
    COMPUTING_MUST_GAIN,
    DIRECT_SHARE,
    REASK,
    SAME_TIME,
    UPGRADE_ROOM,
    Outlook,
    Plan,
    _Costs,
    choose,
)

SIZES = {"raw": 1_500_000.0, "lossless": 1_000_000.0, "q1": 300_000.0, "q2": 150_000.0, "q3": 100_000.0}
LEVELS = tuple(SIZES)


def outlook(**changes: Any) -> Outlook:
    options: dict[str, Any] = {
        "num_missing": 10,
        "in_flight_bytes": (),
        "chunk_bytes": SIZES,
        "bytes_per_s": 10e6,
        "latency_s": 0.003,
        "decode_s": dict.fromkeys(LEVELS, 0.004),
        "encode_s": {},
        "compute_s": 0.06,
        **changes,
    }
    num_chunks = options["num_missing"] + len(options["in_flight_bytes"])
    return Outlook(**{"max_compute": num_chunks, **options})


def num_chunks(view: Outlook) -> int:
    return view.num_missing + len(view.in_flight_bytes)


def finish_s(view: Outlook, level: str, count: int, *, careful: bool = False) -> float:
    """Outlook's docstring in plain words: when all is in place if the first `count` chunks are computed."""
    size, rate = view.chunk_bytes[level], view.bytes_per_s * (view.low_share if careful else 1.0)
    loaded = [size] * max(0, view.num_missing - count)
    on_their_way = [min(left, REASK * (view.committed_bytes + size)) for left in view.in_flight_bytes]
    on_their_way = on_their_way[max(0, count - view.num_missing) :]
    computed_s = view.busy_s + count * (view.compute_s + view.compute_growth_s * count)
    if not loaded and not on_their_way:
        return computed_s
    if rate == 0:
        return math.inf
    wire_s = view.latency_s + (view.ahead_bytes + sum(loaded) + sum(on_their_way)) / rate
    encode_s, decode_s = (
        view.encode_s.get(level, 0.0),
        view.decode_s.get(level, 0.0) * (CAREFUL_DECODE if careful else 1),
    )
    first_bytes = min(view.in_flight_bytes[-1], REASK * (view.committed_bytes + size)) if view.in_flight_bytes else size
    decoding_from = max(view.latency_s + first_bytes / rate, view.queue_s)
    before_the_last = decoding_from + view.in_flight_decode_s + (view.num_missing - count - 1) * decode_s
    return max(computed_s, max(wire_s, len(loaded) * encode_s, before_the_last, view.source_s) + decode_s)


def counts_of(view: Outlook) -> list[int]:
    """What may be computed, 0 left out. While the source computes itself, all or nothing."""
    most = min(num_chunks(view), view.max_compute)
    return [most] * (most > 0) if view.live else list(range(1, most + 1))


# -- by hand ------------------------------------------------------------------------------------------------------


def test_slack_buys_the_best_level() -> None:
    plan = choose(LEVELS, outlook(), 10.0)
    assert (plan.level, plan.compute_chunks, plan.meets_target) == ("raw", 0, True)


def test_less_time_coarser_levels() -> None:
    found = [choose(LEVELS, outlook(max_compute=0), budget_s).level for budget_s in (2.0, 1.1, 0.4, 0.2, 0.05)]
    assert found == ["raw", "lossless", "q1", "q2", "q3"]


def test_computing_begins_only_where_no_level_fits_and_at_the_coarsest_one() -> None:
    view = outlook(num_missing=20)
    plan = choose(LEVELS, view, 0.19)
    assert (plan.level, plan.meets_target) == ("q3", True)
    assert plan.compute_chunks == 2  # 1.9 MB leave 190 ms of wire for 18 chunks and 7 ms
    assert finish_s(view, "q3", plan.compute_chunks - 1) > 0.19


def test_an_impossible_target_gets_the_fastest_plan() -> None:
    plan = choose(LEVELS, outlook(), 0.0)
    assert not plan.meets_target
    assert plan.predicted_s < 0.11


def test_equally_fast_levels_give_the_better_one() -> None:
    assert choose(LEVELS, outlook(bytes_per_s=1e12), 0.0).level == "raw"


def test_a_level_that_is_a_little_faster_does_not_win() -> None:
    """100 s for everything: the coarser level has to save more than 2 % of it."""
    for saved, winner in ((0.5 * SAME_TIME, "a"), (1.5 * SAME_TIME, "b")):
        view = outlook(
            num_missing=1, chunk_bytes={"a": 1e6, "b": 1e6 * (1 - saved)}, bytes_per_s=1e4, latency_s=0.0, max_compute=0
        )
        assert choose(("a", "b"), view, 0.0).level == winner


def test_gains_are_judged_against_the_whole_time() -> None:
    """The last chunk is not made coarse to save a tenth of a second of an hour."""
    view = outlook(num_missing=1, max_compute=0)
    assert choose(LEVELS, view, 0.0).level == "q3"
    assert choose(LEVELS, replace(view, spent_s=3600.0), 0.0).level == "raw"


def test_without_a_source_all_is_computed() -> None:
    plan = choose(LEVELS, outlook(bytes_per_s=0.0), 0.0)
    assert plan.compute_chunks == 10 and plan.predicted_s == pytest.approx(0.6)


def test_without_the_right_to_compute_all_is_loaded() -> None:
    assert choose(LEVELS, outlook(bytes_per_s=1.0, max_compute=0), 0.0).compute_chunks == 0


def test_a_bound_on_computing_is_kept() -> None:
    slow = outlook(bytes_per_s=1e4)
    assert choose(LEVELS, slow, 0.0).compute_chunks == 10
    assert choose(LEVELS, replace(slow, max_compute=3), 0.0).compute_chunks == 3
    assert choose(LEVELS, replace(slow, max_compute=3), 0.2).compute_chunks == 3


def test_a_source_that_may_come_back_and_a_bound_on_computing_leave_a_plan_without_an_end() -> None:
    plan = choose(LEVELS, outlook(bytes_per_s=0.0, max_compute=3), 1.0)
    assert (plan.compute_chunks, plan.meets_target) == (3, False)
    assert math.isinf(plan.predicted_s)


@pytest.mark.parametrize("rate", [1e4, 1e6, 1e8])
@pytest.mark.parametrize("budget_s", [0.0, 0.3, 5.0])
def test_a_live_prompt_is_loaded_or_computed_whole(rate: float, budget_s: float) -> None:
    plan = choose(LEVELS, outlook(live=True, bytes_per_s=rate, source_s=0.6), budget_s)
    assert plan.compute_chunks in (0, 10)


def test_an_upgrade_needs_room() -> None:
    view = outlook(max_compute=0)
    just_fits_s = finish_s(view, "lossless", 0, careful=True) + 1e-6
    current = Plan(level="q1", first_level="q1", compute_chunks=0, predicted_s=0.3, meets_target=True)
    assert choose(LEVELS, view, just_fits_s).level == "lossless"
    assert choose(LEVELS, view, just_fits_s, current=current).level == "q1"
    assert choose(LEVELS, view, just_fits_s / UPGRADE_ROOM, current=current).level == "lossless"
    late = replace(current, meets_target=False)
    assert choose(LEVELS, view, just_fits_s, current=late).level == "lossless"  # nothing to hold on to


def test_a_chunk_on_its_way_counts_with_what_is_left() -> None:
    view = outlook(num_missing=0, in_flight_bytes=(50_000.0,), max_compute=0)
    assert choose(LEVELS, view, 10.0).predicted_s == pytest.approx(0.003 + 0.005 + 0.004 * CAREFUL_DECODE)


def test_a_chunk_on_its_way_that_is_far_too_large_counts_as_asked_for_anew() -> None:
    view = outlook(num_missing=0, in_flight_bytes=(1.5e6,), committed_bytes=100_000.0)
    assert finish_s(view, "q3", 0) == pytest.approx(0.003 + REASK * 200_000 / 10e6 + 0.004)
    assert _Costs(view, "q3").finish_s(0) == pytest.approx(finish_s(view, "q3", 0))
    assert _Costs(view, "raw").finish_s(0) == pytest.approx(0.003 + 0.15 + 0.004)  # at its own level it goes on


def test_two_chunks_are_shared_between_loading_and_computing() -> None:
    """One chunk each halves the time, although computing one takes nearly as long as loading one."""
    view = outlook(num_missing=2, compute_s=0.45, latency_s=0.0, decode_s={}, chunk_bytes={"raw": 5e6})
    plan = choose(("raw",), view, 0.0)
    assert (plan.compute_chunks, plan.predicted_s) == (1, pytest.approx(0.5))


def test_a_deadline_is_planned_at_the_careful_rate_and_the_fastest_plan_at_the_expected_one() -> None:
    view = outlook(max_compute=0)
    fits_s = finish_s(view, "q1", 0, careful=True)
    assert choose(LEVELS, view, fits_s + 1e-6).level == "q1"
    careful = replace(view, low_share=0.8)
    plan = choose(LEVELS, careful, fits_s + 1e-6)
    assert (plan.level, plan.predicted_s) == ("q2", pytest.approx(finish_s(view, "q2", 0, careful=False), rel=0.3))
    assert plan.predicted_s == pytest.approx(finish_s(careful, "q2", 0, careful=True))
    assert choose(LEVELS, careful, 0.0) == choose(LEVELS, view, 0.0)


def test_others_that_wait_for_the_engine_make_computing_dearer() -> None:
    view = outlook(num_missing=2, compute_s=0.45, latency_s=0.0, decode_s={}, chunk_bytes={"raw": 5e6})
    assert choose(("raw",), replace(view, num_others=2), 0.0).compute_chunks == 1
    # One second for both alone, half a second and the price of 0.45 s shared: too little is gained.
    others = math.ceil((0.5 - COMPUTE_MUST_GAIN) / (COMPUTE_PRICE * 0.45))
    assert choose(("raw",), replace(view, num_others=others), 0.0).compute_chunks == 0


def test_computing_has_to_gain_to_begin_and_not_to_go_on() -> None:
    """One chunk of two: 1 s by loading both, a bit less by computing one of them."""
    gain = COMPUTE_MUST_GAIN / 2
    view = outlook(num_missing=2, compute_s=1 - gain, latency_s=0.0, decode_s={}, chunk_bytes={"raw": 5e6})
    assert choose(("raw",), view, 0.0).compute_chunks == 0
    computing = Plan(level="raw", first_level="raw", compute_chunks=1, predicted_s=1.0, meets_target=False)
    assert choose(("raw",), view, 0.0, current=computing).compute_chunks == 1
    assert choose(("raw",), view, 0.0, current=replace(computing, compute_chunks=0)).compute_chunks == 0


def test_of_exact_levels_the_faster_is_as_good() -> None:
    view = outlook(max_compute=0, exact=frozenset({"raw", "lossless"}))
    assert choose(LEVELS, view, 10.0).level == "lossless"
    slow_decoder = replace(view, decode_s={"lossless": 0.5})
    assert choose(LEVELS, slow_decoder, 10.0).level == "raw"


def test_what_the_expected_rate_brings_in_time_wins_over_a_small_gain() -> None:
    """No level is safe, and computing saves less than it has to: but it saves the target."""
    view = outlook(num_missing=2, compute_s=0.95, latency_s=0.0, decode_s={}, chunk_bytes={"raw": 5e6}, low_share=0.5)
    assert choose(("raw",), view, 0.94).compute_chunks == 0
    plan = choose(("raw",), view, 0.97)
    assert (plan.compute_chunks, plan.meets_target) == (1, True)


def test_a_plan_in_time_is_not_left_for_a_late_one_that_disturbs_nobody() -> None:
    view = outlook(
        num_missing=4,
        chunk_bytes={"a": 1e6, "b": 9e5},
        bytes_per_s=1e6,
        low_share=0.1,
        latency_s=0.0,
        decode_s={},
        compute_s=1.0,
        num_others=20,
    )
    plan = choose(("a", "b"), view, 2.5)
    assert plan.meets_target and plan.compute_chunks


def test_a_link_that_others_use_first_is_a_slow_start_and_not_a_slow_link() -> None:
    view = outlook(ahead_bytes=10e6, max_compute=0)
    for level in LEVELS:
        assert _Costs(view, level).finish_s(0) == pytest.approx(finish_s(outlook(max_compute=0), level, 0) + 1.0)
    assert choose(LEVELS, view, 1.2).level == "q2"


@pytest.mark.parametrize("stage", ["encode_s", "decode_s"])
def test_the_slowest_stage_sets_the_pace(stage: str) -> None:
    """On a fast link a source that encodes slowly, or a worker that decodes slowly, decides, and not the bytes."""
    seconds = {"lossless": 0.05, "q1": 0.2}
    view = outlook(bytes_per_s=1e9, max_compute=0, **{"decode_s": {}, stage: seconds})
    assert _Costs(view, "q1").finish_s(0) == pytest.approx(2.0 + (stage == "decode_s") * (0.003 + 3e5 / 1e9))
    assert choose(("lossless", "q1"), view, 0.0).level == "lossless"


def test_what_waits_to_be_decoded_comes_first() -> None:
    view = outlook(num_missing=1, bytes_per_s=1e9, max_compute=0, queue_s=3.0)
    assert _Costs(view, "q1").finish_s(0) == pytest.approx(3.004)


# -- what is asked for first --------------------------------------------------------------------------------------

NESTED = frozenset({"q1", "q2", "q3"})


def test_time_short_the_floor_comes_first() -> None:
    view = outlook(max_compute=0, nested=NESTED)
    needs_s = finish_s(view, "q1", 0)  # 0.307
    for share in (1.05 * DIRECT_SHARE, 0.7):
        plan = choose(LEVELS[2:], view, needs_s / share)
        assert (plan.level, plan.first_level) == ("q1", "q3")
    assert choose(LEVELS[2:], view, needs_s / (0.95 * DIRECT_SHARE)).first_level == "q1"


def test_a_floor_that_was_begun_with_is_left_later() -> None:
    view = outlook(max_compute=0, nested=NESTED)
    needs_s = finish_s(view, "q1", 0)
    begun = Plan(level="q1", first_level="q3", compute_chunks=0, predicted_s=1.0, meets_target=True)
    assert choose(LEVELS[2:], view, needs_s / (0.95 * DIRECT_SHARE), current=begun).first_level == "q3"
    assert choose(LEVELS[2:], view, needs_s / (0.45 * DIRECT_SHARE), current=begun).first_level == "q1"


def test_others_that_wait_get_the_link_after_the_floor() -> None:
    view = outlook(max_compute=0, nested=NESTED, is_contended=True)
    assert choose(LEVELS[2:], view, 100.0).first_level == "q3"


def test_levels_that_do_not_nest_are_asked_for_as_they_are() -> None:
    view = outlook(max_compute=0, is_contended=True)
    for budget_s in (0.5, 2.0, 100.0):
        plan = choose(("lossless", "q1"), view, budget_s)
        assert LEVELS.index(plan.first_level) <= LEVELS.index(plan.level)


def test_where_decoding_decides_chunks_are_asked_for_at_once_and_some_a_level_better() -> None:
    """The link is no risk then, and to decode the floor first would take half of the time."""
    view = outlook(
        max_compute=0, nested=NESTED, bytes_per_s=1e9, decode_s={"lossless": 0.05, "q1": 0.03, "q2": 0.02, "q3": 0.01}
    )
    needs_s = finish_s(view, "q2", 0, careful=True)
    assert choose(LEVELS[2:], view, needs_s + 1e-6).first_level == "q2"
    extra_s = CAREFUL_DECODE * 0.01
    for count in (1, 2):
        plan = choose(LEVELS[2:], view, (needs_s + count * extra_s) / BETTER_ROOM + 1e-6)
        assert (plan.level, plan.first_level, plan.num_first) == ("q2", "q1", count)


def test_a_level_has_to_pay_for_raising_what_is_in_place_below_it() -> None:
    view = outlook(num_missing=1, max_compute=0, nested=NESTED, exact=frozenset({"raw", "lossless"}))
    assert choose(LEVELS, view, 0.4).level == "lossless"
    in_place = replace(view, in_place={"q3": 40})
    assert choose(LEVELS, in_place, 0.4).level == "q2"  # 40 * 50 kB more take 0.2 s, q1 would take 0.8


def test_exact_is_never_asked_for_in_a_larger_form() -> None:
    view = outlook(max_compute=0, nested=NESTED, exact=frozenset({"raw", "lossless"}))
    plan = choose(LEVELS, view, 1e6)
    assert (plan.level, plan.first_level) == ("lossless", "lossless")


# -- against trying everything ------------------------------------------------------------------------------------

seconds_by_level = st.dictionaries(st.sampled_from(LEVELS), st.floats(0, 0.3))


@st.composite
def views(draw: st.DrawFn, *, both_ends: bool = False) -> Outlook:
    """both_ends: there is a source that has everything, and some computing is allowed."""
    num_missing = draw(st.integers(0, 30))
    in_flight = draw(st.lists(st.floats(0, 2e6), max_size=4, min_size=0 if num_missing else 1))
    live = not both_ends and draw(st.booleans())
    bytes_per_s = draw(st.floats(1e3, 1e10) if both_ends else st.one_of(st.just(0.0), st.floats(1e3, 1e10)))
    return outlook(
        num_missing=num_missing,
        in_flight_bytes=in_flight,
        max_compute=draw(st.integers(1 if both_ends or not bytes_per_s else 0, num_missing + len(in_flight))),
        bytes_per_s=bytes_per_s,
        low_share=draw(st.floats(0.02, 1.0)),
        latency_s=draw(st.floats(0, 0.2)),
        encode_s=draw(seconds_by_level),
        decode_s=draw(seconds_by_level),
        compute_s=draw(st.floats(1e-4, 1.0)),
        compute_growth_s=draw(st.floats(0, 0.05)),
        busy_s=draw(st.floats(0, 0.2)),
        queue_s=draw(st.floats(0, 0.5)),
        num_others=draw(st.integers(0, 5)),
        spent_s=draw(st.floats(0, 2)),
        committed_bytes=draw(st.floats(0, 3e5)),
        ahead_bytes=draw(st.floats(0, 3e6)),
        nested=NESTED if draw(st.booleans()) else frozenset(),
        is_contended=draw(st.booleans()),
        live=live,
        source_s=draw(st.floats(0, 2)) if live else 0.0,
    )


budgets = st.floats(-1, 20)
COMPUTING = Plan(level="q3", first_level="q3", compute_chunks=1, predicted_s=1.0, meets_target=False)


@given(view=views(), careful=st.booleans())
def test_the_closed_form_is_the_readable_model(view: Outlook, careful: bool) -> None:
    for level in LEVELS:
        costs = _Costs(view, level, careful=careful)
        for count in range(num_chunks(view) + 1):
            assert costs.finish_s(count) == pytest.approx(finish_s(view, level, count, careful=careful), abs=1e-9)


@settings(max_examples=500)
@given(view=views(both_ends=True))
@example(outlook(num_missing=0, in_flight_bytes=(5e5, 5e5), bytes_per_s=1e5, compute_s=4.0, committed_bytes=3e5))
@example(outlook(num_missing=1, in_flight_bytes=(0.0, 1e5), bytes_per_s=1e5, compute_s=0.5, decode_s={}))
def test_the_meeting_point_finishes_first(view: Outlook) -> None:
    for level in LEVELS:
        found, found_s = _Costs(view, level).meeting_point()
        best_s = min(finish_s(view, level, count) for count in [0, *counts_of(view)])
        assert found <= view.max_compute and found_s == pytest.approx(finish_s(view, level, found))
        assert finish_s(view, level, found) <= best_s * (1 + 1e-9) + 1e-9


@settings(max_examples=500)
@given(view=views(), budget_s=budgets)
def test_a_plan_in_time_is_the_best_level_alone_or_the_coarsest_with_the_fewest_computed(
    view: Outlook, budget_s: float
) -> None:
    plan = choose(LEVELS, view, budget_s)
    loads = [level for level in LEVELS if finish_s(view, level, 0, careful=True) <= budget_s]
    fewest = [count for count in counts_of(view) if finish_s(view, LEVELS[-1], count, careful=True) <= budget_s]
    if budget_s <= 0:
        return
    if view.bytes_per_s and loads:
        assert (plan.level, plan.compute_chunks, plan.meets_target) == (loads[0], 0, True)
        assert plan.predicted_s == pytest.approx(finish_s(view, plan.level, 0, careful=True))
    elif fewest:
        # A count that fits by the last bit only may be passed over for the next one.
        is_close = finish_s(view, LEVELS[-1], fewest[0], careful=True) > budget_s * (1 - 1e-9)
        assert (plan.level, plan.meets_target) == (LEVELS[-1], True) or is_close
        assert plan.compute_chunks == fewest[0] or is_close
        assert plan.predicted_s <= budget_s


@settings(max_examples=500)
@given(view=views(), budget_s=budgets, is_computing=st.booleans())
def test_a_plan_that_is_not_safe_is_about_the_fastest(view: Outlook, budget_s: float, is_computing: bool) -> None:
    counts = ([0] if view.bytes_per_s else []) + counts_of(view)
    ways = {(level, count): finish_s(view, level, count) for level in LEVELS for count in counts}
    view = replace(view, low_share=1e-9)
    plan = choose(LEVELS, view, budget_s, current=COMPUTING if is_computing else None)
    is_safe = any(finish_s(view, level, 0, careful=True) <= budget_s for level in LEVELS if view.bytes_per_s)
    if is_safe or finish_s(view, LEVELS[-1], counts_of(view)[-1] if view.max_compute else 0, careful=True) <= budget_s:
        return  # the test above
    found = (plan.level, plan.compute_chunks)
    assert plan.predicted_s == pytest.approx(ways[found])
    assert plan.meets_target == (plan.predicted_s <= budget_s)

    def cost_s(way: tuple[str, int]) -> float:
        price = COMPUTE_PRICE * view.num_others
        return ways[way] + price * way[1] * (view.compute_s + view.compute_growth_s * way[1])

    # Every step to a coarser level or to computing has to gain so much, or is left; being in time is worth any price.
    met = {level: _Costs(view, level).meeting_point()[0] for level in LEVELS}
    looked_at = [way for way in ways if way[1] in (0, met[way[0]])]
    assert plan.meets_target == any(ways[way] <= budget_s for way in looked_at)
    if plan.meets_target:
        looked_at = [way for way in looked_at if ways[way] <= budget_s]
    gain = max(SAME_TIME, COMPUTING_MUST_GAIN if is_computing else COMPUTE_MUST_GAIN)
    # Until a plan in time was found, any cost was less than this one's or gained too little.
    for way in looked_at:
        assert cost_s(found) * (1 - gain) <= cost_s(way) + gain * view.spent_s + 1e-9


@given(view=views(both_ends=True), budget_s=st.floats(1e-3, 20), more=st.floats(1.0, 10.0))
def test_more_time_never_gives_a_worse_level_to_load(view: Outlook, budget_s: float, more: float) -> None:
    first, later = choose(LEVELS, view, budget_s), choose(LEVELS, view, budget_s * more)
    if first.meets_target and not first.compute_chunks and first.predicted_s <= budget_s:
        careful_s = finish_s(view, first.level, 0, careful=True)
        if careful_s <= budget_s:
            assert LEVELS.index(later.level) <= LEVELS.index(first.level) and not later.compute_chunks


@given(view=views(), budget_s=budgets, level=st.sampled_from(LEVELS), was_in_time=st.booleans())
def test_with_a_current_plan_only_upgrades_change(
    view: Outlook, budget_s: float, level: str, was_in_time: bool
) -> None:
    current = Plan(level=level, first_level=level, compute_chunks=0, predicted_s=0.1, meets_target=was_in_time)
    plain, with_current = choose(LEVELS, view, budget_s), choose(LEVELS, view, budget_s, current=current)
    if replace(with_current, first_level=plain.first_level, num_first=plain.num_first) != plain:
        assert was_in_time and LEVELS.index(plain.level) < LEVELS.index(level)
        assert LEVELS.index(with_current.level) > LEVELS.index(plain.level) or with_current.compute_chunks
        assert plain.predicted_s > UPGRADE_ROOM * budget_s


@given(view=views(), budget_s=budgets)
def test_what_is_asked_for_first_is_the_floor_the_level_or_one_better(view: Outlook, budget_s: float) -> None:
    plan = choose(LEVELS, view, budget_s)
    at = LEVELS.index(plan.level)
    assert plan.first_level in (LEVELS[-1], plan.level, LEVELS[max(at - 1, 0)])
    if view.live or plan.compute_chunks or not plan.meets_target:
        assert plan.first_level == plan.level
    elif plan.level == LEVELS[-1]:
        assert plan.first_level in LEVELS[-2:]
    elif plan.first_level == LEVELS[-1]:
        # Never at the price of the target: all is decoded once more.
        again_s = view.num_missing * view.decode_s.get(LEVELS[-1], 0.0)
        assert view.nested and plan.predicted_s + again_s <= budget_s
