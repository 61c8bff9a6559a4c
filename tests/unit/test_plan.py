"""The choice of level and meeting point, against trying everything."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from decode.plan import COMPUTE_MUST_GAIN, Outlook, Plan, _finish_s, choose

SIZES = {"raw": 1_500_000.0, "lossless": 1_000_000.0, "q1": 300_000.0, "q2": 150_000.0, "q3": 100_000.0}
LEVELS = tuple(SIZES)


def outlook(**changes: Any) -> Outlook:
    token_s = changes.pop("chunk_s", 0.06)
    options: dict[str, Any] = {
        "num_missing": 10,
        "in_flight_bytes": (),
        "chunk_bytes": SIZES,
        "bytes_per_s": 10e6,
        "latency_s": 0.003,
        "decode_s": lambda level: 0.004,
        "compute_s": lambda count: token_s * count,
        **changes,
    }
    return Outlook(**options)


def test_slack_buys_the_best_level() -> None:
    plan = choose(LEVELS, outlook(), 10.0)
    assert (plan.level, plan.compute_chunks, plan.meets_target) == ("raw", 0, True)


def test_less_time_coarser_levels() -> None:
    found = [choose(LEVELS, outlook(compute_s=None), budget_s).level for budget_s in (2.0, 1.1, 0.4, 0.2, 0.05)]
    assert found == ["raw", "lossless", "q1", "q2", "q3"]


def test_computing_begins_only_where_no_level_fits_and_goes_no_further_than_needed() -> None:
    view = outlook(num_missing=20)
    plan = choose(LEVELS, view, 0.19)
    assert plan.meets_target and plan.compute_chunks > 0
    assert _finish_s(view, plan.level, plan.compute_chunks - 1) > 0.19


def test_an_impossible_target_gets_the_fastest_plan() -> None:
    plan = choose(LEVELS, outlook(), 0.0)
    assert not plan.meets_target
    assert plan.predicted_s < 0.11


def test_equally_fast_levels_give_the_better_one() -> None:
    assert choose(LEVELS, outlook(bytes_per_s=1e12), 0.0).level == "raw"


def test_without_a_source_all_is_computed() -> None:
    plan = choose(LEVELS, outlook(bytes_per_s=0.0), 0.0)
    assert plan.compute_chunks == 10 and plan.predicted_s == pytest.approx(0.6)


def test_without_the_right_to_compute_all_is_loaded() -> None:
    assert choose(LEVELS, outlook(bytes_per_s=1.0, compute_s=None), 0.0).compute_chunks == 0


@pytest.mark.parametrize("rate", [1e4, 1e6, 1e8])
@pytest.mark.parametrize("budget_s", [0.0, 0.3, 5.0])
def test_a_live_prompt_is_loaded_or_computed_whole(rate: float, budget_s: float) -> None:
    plan = choose(LEVELS, outlook(live=True, bytes_per_s=rate, source_s=0.6), budget_s)
    assert plan.compute_chunks in (0, 10)


def test_an_upgrade_needs_room() -> None:
    view = outlook(compute_s=None)
    just_fits_s = _finish_s(view, "lossless", 0) + 1e-6
    current = Plan(level="q1", compute_chunks=0, predicted_s=0.3, meets_target=True)
    assert choose(LEVELS, view, just_fits_s).level == "lossless"
    assert choose(LEVELS, view, just_fits_s, current=current).level == "q1"
    assert choose(LEVELS, view, just_fits_s * 1.1, current=current).level == "lossless"


def test_a_chunk_on_its_way_counts_with_what_is_left() -> None:
    view = outlook(num_missing=0, in_flight_bytes=(50_000.0,), compute_s=None)
    assert choose(LEVELS, view, 10.0).predicted_s == pytest.approx(0.003 + 0.005 + 0.004)


views = st.builds(
    outlook,
    num_missing=st.integers(0, 30),
    in_flight_bytes=st.lists(st.floats(0, 2e6), max_size=3),
    bytes_per_s=st.floats(1e3, 1e10),
    latency_s=st.floats(0, 0.2),
    busy_s=st.floats(0, 0.2),
    chunk_s=st.floats(1e-4, 1.0),
)


@given(view=views, budget_s=st.floats(-1, 20), can_compute=st.booleans())
def test_against_trying_everything(view: Outlook, budget_s: float, can_compute: bool) -> None:
    num_chunks = view.num_missing + len(view.in_flight_bytes)
    if num_chunks == 0:
        return
    if not can_compute:
        view = outlook(
            num_missing=view.num_missing,
            in_flight_bytes=view.in_flight_bytes,
            bytes_per_s=view.bytes_per_s,
            latency_s=view.latency_s,
            compute_s=None,
        )
    plan = choose(LEVELS, view, budget_s)
    counts = range(num_chunks + 1) if can_compute else [0]
    best_s = {level: min(_finish_s(view, level, count) for count in counts) for level in LEVELS}
    assert plan.predicted_s == pytest.approx(_finish_s(view, plan.level, plan.compute_chunks))
    assert plan.meets_target == (min(best_s.values()) <= budget_s)
    if plan.meets_target:
        assert plan.predicted_s <= budget_s
        loads = [level for level in LEVELS if _finish_s(view, level, 0) <= budget_s]
        fits = loads or [level for level in LEVELS if best_s[level] <= budget_s]
        assert plan.level == fits[0] and (plan.compute_chunks == 0) == bool(loads)
    else:
        # Every step to a coarser level or to computing has to gain so much, or is left.
        assert plan.predicted_s * (1 - COMPUTE_MUST_GAIN) <= min(best_s.values()) * (1 + 1e-9)


def test_two_chunks_are_shared_between_loading_and_computing() -> None:
    """One chunk each halves the time, although computing one takes nearly as long as loading one."""
    view = outlook(num_missing=2, chunk_s=0.45, latency_s=0.0, decode_s=lambda level: 0.0, chunk_bytes={"raw": 5e6})
    plan = choose(("raw",), view, 0.0)
    assert (plan.compute_chunks, plan.predicted_s) == (1, pytest.approx(0.5))
