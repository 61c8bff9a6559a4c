"""RateTrace.finish_time against a slow numeric integration, and the properties that a link's clock must have."""

from __future__ import annotations

from random import Random

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from transport.errors import BadTrace
from transport.rate_trace import RateTrace


def carried(trace: RateTrace, start: float, stop: float) -> float:
    """Bytes carried between two moments, step by step: the slow and plain integration."""
    total, at = 0.0, start
    while at < stop:
        # The next change, found by looking: a bisect here would repeat what is under test.
        period = int(at // trace.period_s)
        ends = [k * trace.period_s + end for k in (period, period + 1) for end in trace.until_s]
        end = next(end for end in ends if end > at + 1e-12)
        phase = (at + 1e-12) % trace.period_s
        rate = next(rate for until, rate in zip(trace.until_s, trace.bytes_per_s) if phase < until)
        total += rate * (min(end, stop) - at)
        at = end
    return total


durations = st.floats(0.01, 10)
rates = st.one_of(st.just(0.0), st.floats(1, 1e8))
steps = st.lists(st.tuples(durations, rates), min_size=1, max_size=12).filter(lambda s: any(rate for _, rate in s))


def trace_of(pairs: list[tuple[float, float]]) -> RateTrace:
    until, total = [], 0.0
    for duration, _ in pairs:
        total += duration
        until.append(total)
    return RateTrace(tuple(until), tuple(rate for _, rate in pairs))


@settings(max_examples=300, deadline=None)
@given(steps, st.floats(0, 200), st.floats(1e-4, 30))
def test_finish_time_is_when_so_much_was_carried(
    pairs: list[tuple[float, float]], start: float, periods: float
) -> None:
    trace = trace_of(pairs)
    num_bytes = periods * trace.mean_bytes_per_s * trace.period_s
    finish = trace.finish_time(start, num_bytes)
    assert finish >= start
    tolerance = 1e-6 * max(trace.bytes_per_s) + 1e-9 * num_bytes
    assert carried(trace, start, finish) == pytest.approx(num_bytes, abs=tolerance)
    # No earlier moment would do: it ends while the link carries, not in an outage that follows.
    slowest = min(rate for rate in trace.bytes_per_s if rate)
    is_visible = slowest * 1e-5 > 1e-14 * num_bytes  # else the sum's rounding is more than what it carries meanwhile
    if (earlier := finish - 1e-5) > start and is_visible:
        assert carried(trace, start, earlier) < num_bytes


@settings(max_examples=300, deadline=None)
@given(steps, st.floats(0, 100), st.floats(0, 1e8), st.floats(0, 1e8))
def test_two_messages_take_as_long_as_one_of_their_sizes_sum(
    pairs: list[tuple[float, float]], start: float, first: float, second: float
) -> None:
    trace = trace_of(pairs)
    total = trace.finish_time(start, first + second)
    in_two = trace.finish_time(trace.finish_time(start, first), second)
    slowest = min(rate for rate in trace.bytes_per_s if rate)
    rounding = 1e-6 + 1e-9 * total + 1e-6 * (first + second) / slowest * 1e-3
    near = abs(in_two - total) <= rounding
    # A sum that ends on the very edge of an outage may round to either side of it.
    edge = carried(trace, min(in_two, total), max(in_two, total)) <= 1e-6 * (first + second) + 1
    assert near or edge
    assert trace.finish_time(start, first) <= total + rounding


@settings(max_examples=200, deadline=None)
@given(steps, st.floats(0, 100))
def test_rate_and_next_change(pairs: list[tuple[float, float]], at: float) -> None:
    trace = trace_of(pairs)
    change = trace.next_change(at)
    assert at < change or change == pytest.approx(at)
    assume(change - at > 1e-6)
    rate = trace.rate_at(at)
    assert trace.rate_at((at + change) / 2) == rate
    assert carried(trace, at, change) == pytest.approx(rate * (change - at), rel=1e-6, abs=1e-3)


def test_by_hand() -> None:
    trace = RateTrace((5.0, 8.0, 10.0), (2e6, 0.0, 1e6))
    assert trace.finish_time(0, 2e6) == 1.0
    assert trace.finish_time(4.5, 1e6) == 5.0  # its last byte leaves as the outage begins
    assert trace.finish_time(4.5, 2e6) == 9.0  # half a second, three of outage, one at half the rate
    assert trace.finish_time(6.0, 0) == 6.0
    assert trace.finish_time(6.0, 1) == pytest.approx(8.000001)
    assert trace.finish_time(0, 12e6) == 10.0 and trace.finish_time(0, 24e6) == 20.0
    assert trace.finish_time(9.5, 0.5e6 + 12e6 + 2e6) == pytest.approx(21.0)
    assert (trace.rate_at(4.9), trace.rate_at(5), trace.rate_at(19.9), trace.rate_at(20)) == (2e6, 0, 1e6, 2e6)
    outage_last = RateTrace((1.0, 2.0), (1e6, 0.0))
    assert outage_last.finish_time(0, 1e6) == 1.0 and outage_last.finish_time(0, 3e6) == 5.0
    assert outage_last.finish_time(1.5, 1e6) == 3.0


def test_a_file() -> None:
    trace = RateTrace.parse("# seconds, Mbit/s\n1 20\n\n 2.5 0 # tunnel\n4 8\n")
    assert trace == RateTrace((1.0, 2.5, 4.0), (2.5e6, 0.0, 1e6))
    for wrong in (
        "",
        "0 20\n1 5",
        "1 20\n1 5",
        "2 1\n1 5",
        "1 -3",
        "1 0",
        "1 nan",
        "1 inf",
        "inf 3",
        "1",
        "1 2 3",
        "a b",
    ):
        with pytest.raises(BadTrace):
            RateTrace.parse(wrong)
    with pytest.raises(BadTrace, match="line 2"):
        RateTrace.parse("1 20\nx 3\n")
    with pytest.raises(BadTrace):
        RateTrace((1.0, 2.0), (1.0,))


def test_a_long_trace_at_a_late_time() -> None:
    random = Random(1)
    trace = RateTrace.from_mbps((0.5 * (k + 1), random.choice([0, 0.5, 4, 30])) for k in range(5000))
    at = 1e6
    for _ in range(200):
        size = 10 ** random.uniform(2, 7)
        finish = trace.finish_time(at, size)
        assert carried_fast(trace, at, finish) == pytest.approx(size, abs=2)
        at = finish


def carried_fast(trace: RateTrace, start: float, stop: float) -> float:
    total = 0.0
    while start < stop:
        end = min(stop, trace.next_change(start + 1e-9))
        total += trace.rate_at(start + 1e-9) * (end - start)
        start = end
    return total
