"""What the estimators make of observations: they converge, forget, and never promise more than was seen."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from decode.estimator import LINK_MARGIN, CodecEstimator, ComputeEstimator, LinkEstimator

PART = 64 * 1024
rates = st.floats(1e4, 1e9)


def fed(rate: float, num_parts: int, prior: float = 50e6) -> LinkEstimator:
    link = LinkEstimator(prior)
    for _ in range(num_parts):
        link.on_part(PART, PART / rate)
    return link


def test_the_prior_is_the_first_guess() -> None:
    assert LinkEstimator(10e6).bytes_per_s(0.0) == pytest.approx(LINK_MARGIN * 10e6)


@given(rates, rates)
def test_a_steady_link_is_learned_whatever_the_prior(rate: float, prior: float) -> None:
    # A prior that is far too slow weighs by its seconds, so it takes more bytes to forget.
    link = fed(rate, 800, prior)
    assert link.bytes_per_s(0.0) == pytest.approx(LINK_MARGIN * rate, rel=0.05)


def test_a_drop_shows_within_a_few_parts() -> None:
    link = fed(10e6, 100)
    for _ in range(4):
        link.on_part(PART, PART / 1e6)
    assert link.bytes_per_s(0.0) < 3e6


@given(st.lists(st.tuples(st.integers(1, 1 << 20), st.floats(0, 10)), max_size=30))
def test_the_rate_is_always_positive_and_finite(parts: list[tuple[int, float]]) -> None:
    link = LinkEstimator()
    for size, seconds in parts:
        link.on_part(size, seconds)
        assert 0 < link.bytes_per_s(0.0) < float("inf")


def test_transfers_share_a_link() -> None:
    link = LinkEstimator(10e6)
    link.sharing = 4
    assert link.bytes_per_s(0.0) == pytest.approx(LINK_MARGIN * 10e6 / 4)


def test_silence_lowers_the_rate_and_ends_with_the_next_part() -> None:
    link = fed(10e6, 50)
    usual = link.bytes_per_s(1.0)
    assert link.bytes_per_s(1.01, waiting_since=1.0) == usual
    silent = [link.bytes_per_s(1.0 + quiet, waiting_since=1.0) for quiet in (0.1, 1.0, 10.0)]
    assert usual > silent[0] > silent[1] > silent[2]
    assert silent[2] < PART / 9
    assert link.bytes_per_s(11.0) == usual


def test_latency_moves_toward_what_is_seen() -> None:
    link = LinkEstimator(prior_latency_s=0.01)
    for _ in range(30):
        link.on_first_part(0.1)
    assert link.latency_s == pytest.approx(0.1, rel=0.01)


@given(st.floats(1e-6, 1e-2), st.floats(0, 1e-6))
def test_two_slices_give_both_terms(per_token: float, per_position: float) -> None:
    truth = ComputeEstimator(per_token, per_position)
    near, far = truth.seconds(0, 256), truth.seconds(1792, 2048)
    found = ComputeEstimator.from_two_slices((256, 0, near), (256, 1792, far))
    for start, stop in ((0, 16), (512, 768), (3000, 3500)):
        assert found.seconds(start, stop) == pytest.approx(truth.seconds(start, stop), rel=1e-3)


def test_a_far_slice_that_was_faster_gives_no_negative_times() -> None:
    found = ComputeEstimator.from_two_slices((256, 0, 0.1), (256, 1792, 0.05))
    assert found.seconds(0, 1) > 0 and found.seconds(4000, 4096) > 0


@given(st.integers(0, 4000), st.integers(1, 100), st.integers(1, 100))
def test_a_prompt_costs_what_its_parts_cost(start: int, first: int, second: int) -> None:
    compute = ComputeEstimator(1e-4, 1e-8)
    middle, stop = start + first, start + first + second
    whole = compute.seconds(start, stop)
    assert compute.seconds(start, middle) + compute.seconds(middle, stop) == pytest.approx(whole)


def test_a_slower_machine_is_noticed_and_one_hiccup_is_not_believed() -> None:
    compute = ComputeEstimator(1e-4, 0.0)
    compute.observe(0, 100, 10.0)  # a thousand times too slow, once
    assert compute.seconds(0, 100) <= 0.01 * 1.25 + 1e-9
    for _ in range(60):
        compute.observe(0, 100, 0.03)
    assert compute.seconds(0, 100) == pytest.approx(0.03, rel=0.01)
    compute.observe(5, 5, 1.0)  # nothing computed says nothing


def test_levels_not_seen_yet_cost_what_the_dearest_costs() -> None:
    codec = CodecEstimator(prior_s=0.004)
    assert codec.seconds("q1") == 0.004
    codec.observe("raw", 0.001)
    codec.observe("q3", 0.01)
    assert codec.seconds("q1") == 0.01
    for _ in range(40):
        codec.observe("q3", 0.02)
    assert codec.seconds("q3") == pytest.approx(0.02, rel=0.01)
    assert codec.seconds("raw") == 0.001
