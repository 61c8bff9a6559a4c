"""What the estimators make of observations: they converge, forget, and say how sure they are."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from decode.estimator import (
    MIN_HALF_LIFE_BYTES,
    PRIOR_SIGMA,
    QUANTILE_Z,
    STEP_S,
    CodecEstimator,
    ComputeEstimator,
    LinkEstimator,
)

PART = 64 * 1024
rates = st.floats(1e4, 1e9)


def feed(link: LinkEstimator, rate: float, seconds: float) -> None:
    """Parts at this rate for so long; parts of small links are smaller."""
    size = min(PART, max(1, int(rate * 0.02)))
    for _ in range(max(1, round(seconds * rate / size))):
        link.on_part(size, size / rate)


def fed(rate: float, num_parts: int, prior: float = 50e6) -> LinkEstimator:
    link = LinkEstimator(prior)
    for _ in range(num_parts):
        link.on_part(PART, PART / rate)
    return link


# -- the rate -----------------------------------------------------------------------------------------------------


def test_the_prior_is_the_first_guess() -> None:
    assert LinkEstimator(10e6).bytes_per_s(0.0) == pytest.approx(10e6)


@given(rates, rates)
def test_a_steady_link_is_learned_whatever_the_prior(rate: float, prior: float) -> None:
    # A prior that is far too slow weighs by its seconds, so it takes more bytes to forget.
    link = fed(rate, 800, prior)
    assert link.bytes_per_s(0.0) == pytest.approx(rate, rel=0.05)


def test_a_drop_shows_within_a_few_parts() -> None:
    link = fed(10e6, 100)
    for _ in range(4):
        link.on_part(PART, PART / 1e6)
    assert link.bytes_per_s(0.0) < 3e6


@given(st.lists(st.tuples(st.integers(0, 1 << 20), st.floats(0, 10)), max_size=30), st.floats(0, 100))
def test_rate_and_share_are_always_possible(parts: list[tuple[int, float]], horizon_s: float) -> None:
    link = LinkEstimator()
    for size, seconds in parts:
        link.on_part(size, seconds)
        assert 0 < link.bytes_per_s(0.0) < float("inf")
        assert 0 < link.low_share(horizon_s) <= 1


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


# -- how sure -----------------------------------------------------------------------------------------------------


def test_a_link_never_seen_may_be_wrong_by_a_factor_of_e() -> None:
    sure = QUANTILE_Z * PRIOR_SIGMA
    assert LinkEstimator().low_share(0.0) == pytest.approx(math.exp(-sure), rel=0.01)


@pytest.mark.parametrize("rate", [1e4, 1e5, 1e6, 1e7, 1e8, 1e9])
@pytest.mark.parametrize("prior", [1e5, 1e7, 1e9])
def test_every_256_kib_halve_the_doubt(rate: float, prior: float) -> None:
    link = LinkEstimator(prior)
    before = link._doubt
    for _ in range(4):
        for _ in range(MIN_HALF_LIFE_BYTES // PART):
            link.on_part(PART, PART / rate)
        assert link._doubt <= 0.51 * before
        before = link._doubt
    assert link.low_share(0.0) > 0.8 or rate < 1e6  # so long on a slow link that its steps count as well


@pytest.mark.parametrize("rate", [1e5, 1e6, 1e7, 1e8])
@pytest.mark.parametrize("horizon_s", [0.05, 0.5, 2.0])
def test_a_constant_link_is_counted_on_almost_whole(rate: float, horizon_s: float) -> None:
    link = LinkEstimator(1e7)
    feed(link, rate, max(4.0, 2e6 / rate))
    assert link.low_share(horizon_s) >= 0.85


@given(
    rate=rates, moves=st.lists(st.floats(-1, 1), max_size=30), horizons=st.tuples(st.floats(0, 10), st.floats(0, 10))
)
def test_the_share_shrinks_with_the_horizon(rate: float, moves: list[float], horizons: tuple[float, float]) -> None:
    link = LinkEstimator(rate)
    for move in moves:
        size = max(1, int(rate * math.exp(move) * STEP_S))
        link.on_part(size, STEP_S)
    near, far = sorted(horizons)
    assert link.low_share(far) <= link.low_share(near)


def test_the_share_shrinks_with_how_much_the_rate_moves() -> None:
    shares = []
    for swing in (0.0, 0.1, 0.3, 0.6, 1.0):
        link = LinkEstimator(1e6)
        for step in range(60):
            feed(link, 1e6 * math.exp(swing if step % 2 else -swing), STEP_S)
        shares.append(link.low_share(0.5))
    assert shares == sorted(shares, reverse=True)
    assert shares[0] > 0.9 and shares[-1] < 0.4


def test_one_drop_is_forgotten_within_seconds() -> None:
    link = LinkEstimator(1e6)
    feed(link, 1e6, 4.0)
    calm = link.low_share(0.5)
    feed(link, 1e5, 0.3)
    assert link.low_share(0.5) < 0.8 * calm
    shaken = link.low_share(0.5)
    feed(link, 1e5, 6.0)
    assert link.low_share(0.5) > (shaken + 3 * calm) / 4


@pytest.mark.parametrize("rate", [2e5, 2e6, 5e7])
@pytest.mark.parametrize("sigma", [0.05, 0.15, 0.3])
@pytest.mark.parametrize("steps", [1, 4, 10])
def test_the_quantile_holds_nine_times_of_ten(rate: float, sigma: float, steps: int) -> None:
    """Random walks of the rate's logarithm: what the next tenths of a second bring, against what was counted on."""
    held = cases = 0
    for seed in range(12):
        rng = random.Random(seed)
        walk = [math.log(rate)]
        for _ in range(260):
            # Toward the middle a little: links do not wander off for ever.
            walk.append(walk[-1] + rng.gauss(0, sigma) - 0.02 * (walk[-1] - walk[0]))
        link = LinkEstimator(rate)
        for at, log_rate in enumerate(walk[:-steps]):
            feed(link, math.exp(log_rate), STEP_S)
            if at >= 40 and at % 10 == 0:
                counted_on = link.bytes_per_s(0.0) * link.low_share(steps * STEP_S)
                came = sum(map(math.exp, walk[at + 1 : at + 1 + steps])) / steps
                held, cases = held + (came >= counted_on), cases + 1
    assert cases >= 200
    assert 0.8 <= held / cases <= 0.97, (held, cases)


# -- computing and decoding ---------------------------------------------------------------------------------------


@given(st.floats(1e-6, 1e-2), st.floats(0, 1e-6))
def test_two_slices_give_both_terms(per_token: float, per_position: float) -> None:
    truth = ComputeEstimator(per_token, per_position)
    near, far = truth.seconds(0, 256), truth.seconds(1792, 2048)
    found = ComputeEstimator.from_slices((256, 0, near), (256, 1792, far))
    for start, stop in ((0, 16), (512, 768), (3000, 3500)):
        assert found.seconds(start, stop) == pytest.approx(truth.seconds(start, stop), rel=1e-3)


def test_a_far_slice_that_was_faster_gives_no_negative_times() -> None:
    found = ComputeEstimator.from_slices((256, 0, 0.1), (256, 1792, 0.05))
    assert found.seconds(0, 1) > 0 and found.seconds(4000, 4096) > 0


@given(st.integers(0, 4000), st.integers(1, 100), st.integers(1, 100))
def test_a_prompt_costs_what_its_parts_cost(start: int, first: int, second: int) -> None:
    compute = ComputeEstimator(1e-4, 1e-8)
    middle, stop = start + first, start + first + second
    whole = compute.seconds(start, stop)
    assert compute.seconds(start, middle) + compute.seconds(middle, stop) == pytest.approx(whole)


@given(start=st.integers(0, 4000), size=st.integers(1, 512), count=st.integers(0, 50), slowness=st.floats(0.01, 1.0))
def test_the_line_of_chunks_is_the_sum_of_their_seconds(start: int, size: int, count: int, slowness: float) -> None:
    compute = ComputeEstimator(1e-4, 1e-8)
    compute.observe(0, 100, slowness)
    per_chunk, growth = compute.line(start, size)
    assert count * (per_chunk + growth * count) == pytest.approx(compute.seconds(start, start + count * size))


def test_a_slower_machine_is_noticed_and_one_hiccup_is_not_believed() -> None:
    compute = ComputeEstimator(1e-4, 0.0)
    compute.observe(0, 100, 10.0)  # a thousand times too slow, once
    assert compute.seconds(0, 100) <= 0.01 * 1.25 + 1e-9
    for _ in range(60):
        compute.observe(0, 100, 0.03)
    assert compute.seconds(0, 100) == pytest.approx(0.03, rel=0.01)
    compute.observe(5, 5, 1.0)  # nothing computed says nothing


def test_a_deadline_counts_on_a_tail_that_seldom_takes_longer() -> None:
    steady, shaky = ComputeEstimator(1e-4, 0.0), ComputeEstimator(1e-4, 0.0)
    rng = random.Random(7)
    late = 0
    for _ in range(300):
        steady.observe_tail(0, 100, 0.015)  # 5 ms beyond its tokens
        seconds = 0.01 * math.exp(rng.gauss(0, 0.3))
        late += seconds > shaky.tail_seconds(0, 100)
        shaky.observe_tail(0, 100, seconds)
    assert late <= 0.2 * 300
    assert steady.tail_seconds(0, 100) == pytest.approx(0.015, rel=0.01)
    assert steady.tail_seconds(0, 1) == pytest.approx(0.0051, rel=0.01)
    assert shaky.tail_seconds(0, 100) > 1.15 * shaky.seconds(0, 100)
    before = steady.tail_seconds(0, 100)
    steady.observe_tail(0, 100, 10.0)
    assert steady.tail_seconds(0, 100) < before + 0.01, "one hiccup decided"


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
    assert codec.by_level(("raw", "q1")) == {"raw": 0.001, "q1": codec.seconds("q1")}
