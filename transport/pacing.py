"""What a sink learns of a link from arrivals alone, and how much it lets the source commit to it. Pure, no clock.

Nothing that a socket has accepted can be recalled, so the unacknowledged bytes are kept near what the link holds
anyway: gain × delivery rate × (smallest round trip + scheduling slack), never under two parts. The *smallest* round
trip, because the usual one contains the queue that we ourselves build; nearly the *largest* of the last rates, because
a link that is slow for one sample is more often a busy processor (and one that is fast for one, its catching up).
"""

from __future__ import annotations

from collections import deque

from transport.limits import Pacing

SAMPLE_S = 0.02  # and at least a round trip ...
FAST_SAMPLE_S, FAST_SAMPLE_PARTS = 0.005, 16  # ... or this, where many parts smooth out how the processor served us
STARTUP_FLAT_SAMPLES = 3  # so many without growth end the start-up for good; 1.5 follows a faster link soon enough
IDLE_S = 0.01  # beyond two round trips: the source had nothing to send
RATE_SAMPLES = 8  # so a link that slowed is believed after 8 samples
MEMORY_S = 60.0


class RecentMin:
    """The smallest value of the last one to two memory periods."""

    def __init__(self) -> None:
        self._now: float | None = None
        self._before: float | None = None
        self._since = 0.0

    def add(self, value: float, now: float) -> None:
        if now - self._since > MEMORY_S:
            self._before, self._now, self._since = self._now, None, now
        self._now = value if self._now is None else min(self._now, value)

    @property
    def value(self) -> float | None:
        if self._now is None or self._before is None:
            return self._before if self._now is None else self._now
        return min(self._now, self._before)


class LinkPacer:
    def __init__(self, pacing: Pacing) -> None:
        self._pacing = pacing
        self._rates: deque[float] = deque(maxlen=RATE_SAMPLES)  # bytes per second
        self._sample_start: float | None = None
        self._sample_bytes = 0
        self._sample_parts = 0
        self._flat_samples = 0  # in a row
        self._last_part_at = float("-inf")
        self._rtt = RecentMin()
        # Smallest (arrival on our clock − departure on the source's): their clocks' offset plus the one-way delay.
        self._one_way = RecentMin()
        self._decide()

    def on_rtt(self, rtt_s: float, now: float) -> None:
        self._rtt.add(rtt_s, now)
        self._decide()

    def on_departure(self, sent_us: int, at: float) -> None:
        """A small message told when it left."""
        self._one_way.add(at - sent_us * 1e-6, at)

    def on_part(self, num_bytes: int, *, sent_us: int, at: float) -> float:
        """Returns wire_s: how long the link was busy with this part (at least a microsecond)."""
        one_way_s = self._one_way.value
        left_at = at if one_way_s is None else min(at, sent_us * 1e-6 + one_way_s)
        idle_s = left_at - self._last_part_at
        wire_s = max(1e-6, at - max(self._last_part_at, left_at))
        self._last_part_at = at
        self._sample(num_bytes, idle_s, at)
        return wire_s

    def _sample(self, num_bytes: int, idle_s: float, at: float) -> None:
        """Delivery rate over spans without idleness. Not bytes ÷ wire_s: a link with a burst allowance takes a small
        blob at once, which says nothing about how much may be committed to it."""
        rtt_s = self.rtt_s or 0.0
        if self._sample_start is None or idle_s > 2 * rtt_s + IDLE_S:
            self._sample_start, self._sample_bytes, self._sample_parts = at, 0, 0
            return
        self._sample_bytes += num_bytes
        self._sample_parts += 1
        elapsed_s = at - self._sample_start
        fast = elapsed_s >= FAST_SAMPLE_S and self._sample_parts >= FAST_SAMPLE_PARTS
        if elapsed_s >= rtt_s and (fast or elapsed_s >= SAMPLE_S):
            rate = self._sample_bytes / elapsed_s
            if self._starting:
                grew = not self._rates or rate > 1.25 * max(self._rates)
                self._flat_samples = 0 if grew else self._flat_samples + 1
            self._rates.append(rate)
            self._decide()
            self._sample_start, self._sample_bytes, self._sample_parts = at, 0, 0

    @property
    def rate(self) -> float | None:
        """Delivery rate in bytes per second; None before the first sample. The largest of the last ones at first, then
        the second largest."""
        if not self._rates:
            return None
        return max(self._rates) if self._starting else sorted(self._rates)[-2]

    @property
    def _starting(self) -> bool:
        return self._flat_samples < STARTUP_FLAT_SAMPLES

    @property
    def rtt_s(self) -> float | None:
        return self._rtt.value

    def _decide(self) -> None:
        """Part and window, from what was measured. The part is a power of two, so that it does not jitter with every
        sample."""
        pacing, rate = self._pacing, self.rate
        if rate is None:
            self.part_bytes = pacing.first_part_bytes
            self.window_bytes = pacing.min_window_parts * self.part_bytes
            return
        wanted = max(1, int(rate * pacing.part_s))
        self.part_bytes = min(pacing.max_part_bytes, max(pacing.min_part_bytes, 1 << (wanted.bit_length() - 1)))
        gain = pacing.startup_gain if self._starting else pacing.gain
        # One part more, because credit is used and given back in whole parts: without it a long slow link idles, looks
        # slower than it is, and is granted even less.
        wanted = int(gain * rate * ((self.rtt_s or 0.0) + pacing.scheduling_slack_s)) + self.part_bytes
        floor = pacing.min_window_parts * self.part_bytes
        self.window_bytes = min(pacing.max_window_bytes, max(floor, wanted))
