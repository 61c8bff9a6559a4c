"""How fast a link is at each moment: piecewise-constant steps that repeat. Pure; the simulated network and the shaper
follow it.

    until_s      5     8        10        rate in [0, 5) is the first, in [5, 8) the second (an outage), in [8, 10) the
    bytes_per_s  2e6   0        1e6       third; then it starts again

A file has a line for each step, `until_s Mbit/s`; empty lines and what follows a # are passed over.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import accumulate, pairwise

from transport.errors import BadTrace

MAX_STEPS = 1_000_000


@dataclass(frozen=True, slots=True)
class RateTrace:
    """`until_s` rises and starts above 0; its last value is the period. Rates may be 0, but not all of them: a link
    that never carries anything would keep a message for ever. Raises BadTrace."""

    until_s: tuple[float, ...]
    bytes_per_s: tuple[float, ...]
    _bytes_until: tuple[float, ...] = field(init=False, repr=False, compare=False)  # carried at the end of each step

    def __post_init__(self) -> None:
        if not 0 < len(self.until_s) == len(self.bytes_per_s) <= MAX_STEPS:
            num_times, num_rates = len(self.until_s), len(self.bytes_per_s)
            raise BadTrace(
                f"a trace has 1 to {MAX_STEPS} steps, each with its end and its rate; {num_times}, {num_rates}"
            )
        starts_s = (0.0, *self.until_s)
        if not all(a < b < math.inf for a, b in pairwise(starts_s)):
            raise BadTrace("the ends of a trace's steps must rise, from above 0: each says until when its rate holds")
        if not all(0 <= rate < math.inf for rate in self.bytes_per_s) or not any(self.bytes_per_s):
            raise BadTrace("the rates of a trace must be numbers of 0 or more, and one of them more than 0")
        sizes = ((b - a) * rate for (a, b), rate in zip(pairwise(starts_s), self.bytes_per_s, strict=True))
        object.__setattr__(self, "_bytes_until", tuple(accumulate(sizes)))

    @classmethod
    def parse(cls, text: str) -> RateTrace:
        """From the lines of a file."""
        steps: list[tuple[float, float]] = []
        for number, line in enumerate(text.splitlines(), 1):
            words = line.partition("#")[0].split()
            if not words:
                continue
            try:
                until_s, mbps = map(float, words)
            except ValueError:
                raise BadTrace(f"line {number}: expected `until_s Mbit/s`, two numbers, not {line[:80]!r}") from None
            steps.append((until_s, mbps))
        return cls.from_mbps(steps)

    @classmethod
    def from_mbps(cls, steps: Iterable[tuple[float, float]]) -> RateTrace:
        """From (until_s, Mbit/s) pairs."""
        pairs = list(steps)
        return cls(tuple(until_s for until_s, _ in pairs), tuple(mbps * 125_000 for _, mbps in pairs))

    @property
    def period_s(self) -> float:
        return self.until_s[-1]

    @property
    def mean_bytes_per_s(self) -> float:
        return self._bytes_until[-1] / self.until_s[-1]

    def rate_at(self, at: float) -> float:
        return self.bytes_per_s[bisect_right(self.until_s, at % self.period_s)]

    def next_change(self, at: float) -> float:
        """The end of the step that holds at this moment."""
        phase_s = at % self.period_s
        return at - phase_s + self.until_s[bisect_right(self.until_s, phase_s)]

    def finish_time(self, start: float, num_bytes: float) -> float:
        """When a link that is free from `start` on has carried so many bytes."""
        if num_bytes <= 0:
            return start
        phase_s = start % self.period_s
        step = bisect_right(self.until_s, phase_s)
        end = phase_s + num_bytes / rate if (rate := self.bytes_per_s[step]) else math.inf
        if end <= self.until_s[step]:
            return start + (end - phase_s)  # within one step, the usual case
        # Counted from the start of this period: find the moment by which so much has been carried.
        wanted = self._bytes_until[step] - rate * (self.until_s[step] - phase_s) + num_bytes
        whole_periods, rest = divmod(wanted, self._bytes_until[-1])
        # What ends with a step must not wait out the outage that follows because a sum was rounded up.
        rounding = 1e-12 * (wanted + self._bytes_until[-1])
        if rest <= rounding:
            whole_periods, rest = whole_periods - 1, self._bytes_until[-1]
        step = bisect_left(self._bytes_until, rest - rounding)
        until_end_s = max(0.0, self._bytes_until[step] - rest) / self.bytes_per_s[step]
        return max(start, start - phase_s + whole_periods * self.period_s + self.until_s[step] - until_end_s)
