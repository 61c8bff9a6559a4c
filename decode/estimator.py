"""What a decode worker has learned about its links and its own speed. Pure: fed with observations and their times.

Throughput comes from arrivals only (nothing here ever sees a link's configured rate). Both estimators are shared by
all requests of a worker, so that a new request starts from what the last one saw.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

# Older observations lose half their weight after this many bytes. Counting bytes and not seconds makes the estimate
# quick where it matters: on a link that drops, one slow part outweighs all fast ones before it by its own seconds.
# On fast links 20 ms worth of parts average out the hiccups of busy cores.
HALF_LIFE_S, MIN_HALF_LIFE_BYTES, MAX_HALF_LIFE_BYTES = 0.02, 256 * 1024, 1024 * 1024
# A part that takes so many times longer than expected, and longer than a busy core's hiccups: the link dropped.
SURPRISE, SURPRISE_S = 3.0, 0.015
# Plans for a deadline count on the rate that the link exceeds nine times of ten (the normal quantile of 0.9).
QUANTILE_Z = 1.28
# The rate is taken for a random walk of its logarithm, in steps of this much link time.
STEP_S = 0.1
MAX_STEPS = 16  # beyond that links return to their mean
# A link never seen may be wrong by a factor of e either way (one standard deviation); every 256 KiB of it halve that.
PRIOR_SIGMA, PRIOR_STEP_SIGMA = 1.0, 0.08


class LinkEstimator:
    """Bytes a second that one source's link delivers while it has something to deliver, and how sure that is.

    The mean is the decayed ratio  sum(w * bytes) / sum(w * seconds)  over the parts that arrived, where a part's
    seconds are those it spent on the wire, without any idleness of the source. The spread comes from how much the rate
    moved from one tenth of a second of link time to the next. Shared by all transfers over the link.
    """

    def __init__(self, prior_bytes_per_s: float = 50e6, prior_latency_s: float = 0.005) -> None:
        # The prior weighs as much as one large part: enough for a first plan, gone after the first chunk.
        self._bytes = float(MIN_HALF_LIFE_BYTES)
        self._seconds = self._bytes / prior_bytes_per_s
        self._latency_s = prior_latency_s
        self._last_part_bytes = 64 * 1024
        self._doubt = PRIOR_SIGMA  # of the mean itself, while little was seen
        self._step_variance = PRIOR_STEP_SIGMA**2
        self._step_bytes = self._step_seconds = 0.0
        self._last_step_log: float | None = None

    def on_first_part(self, latency_s: float) -> None:
        """Time from asking an idle source to its first part."""
        self._latency_s += 0.3 * (latency_s - self._latency_s)

    def on_part(self, part_bytes: int, wire_s: float) -> None:
        """A part arrived that took `wire_s` on the wire."""
        part_bytes, wire_s = max(part_bytes, 1), max(wire_s, 1e-7)
        keep = 0.5 ** (part_bytes / self._half_life_bytes())
        expected_s = part_bytes * self._seconds / self._bytes
        if wire_s > SURPRISE * expected_s + SURPRISE_S:
            keep *= max(SURPRISE * expected_s / wire_s, 0.05)  # another link than before: its past says little
        self._seconds = self._seconds * keep + wire_s
        self._bytes = self._bytes * keep + part_bytes
        self._doubt *= 0.5 ** (part_bytes / MIN_HALF_LIFE_BYTES)
        self._last_part_bytes = part_bytes
        self._step_bytes += part_bytes
        self._step_seconds += wire_s
        if self._step_seconds >= STEP_S:
            self._end_step()

    def _end_step(self) -> None:
        steps = self._step_seconds / STEP_S
        log_rate = math.log(self._step_bytes / self._step_seconds)
        if self._last_step_log is not None:
            # Capped, so that one drop is remembered as a wild link for seconds and not for minutes.
            moved = min((log_rate - self._last_step_log) ** 2 / steps, 1.0)
            self._step_variance += 0.1 * (moved - self._step_variance)
        self._last_step_log = log_rate
        self._step_bytes = self._step_seconds = 0.0

    def _half_life_bytes(self) -> float:
        return min(max(HALF_LIFE_S * self._bytes / self._seconds, MIN_HALF_LIFE_BYTES), MAX_HALF_LIFE_BYTES)

    @property
    def latency_s(self) -> float:
        return self._latency_s

    @property
    def committed_bytes(self) -> float:
        """What a source has on the way at any time: transport keeps at least two parts in flight."""
        return 2.0 * self._last_part_bytes

    @property
    def last_part_bytes(self) -> int:
        return self._last_part_bytes

    def bytes_per_s(self, now: float, *, waiting_since: float | None = None) -> float:
        """The rate to expect. `waiting_since`: when something outstanding last moved, or None when nothing is.

        Silence is evidence too: a link that owes a part and has been quiet for longer than a part takes is at most
        as fast as one part in that time.
        """
        rate = self._bytes / self._seconds
        if waiting_since is not None:
            quiet_s = now - waiting_since - self._latency_s
            if quiet_s > 3.0 * self._last_part_bytes / rate and quiet_s > 0.02:
                rate = min(rate, self._last_part_bytes / quiet_s)
        return rate

    def low_share(self, horizon_s: float) -> float:
        """The share of the expected rate that the mean over the next `horizon_s` exceeds nine times of ten.

        The mean of a random walk of variance v a step over n steps has the variance v * (1/2 + n/3). The estimate
        itself lags behind: an average that forgets with a time constant of t steps is off by the variance v * t/2.
        """
        steps = min(horizon_s / STEP_S, MAX_STEPS)
        half_life_s = self._half_life_bytes() * self._seconds / self._bytes
        lag = min(half_life_s / math.log(2) / STEP_S / 2, MAX_STEPS)
        sigma = math.sqrt(self._doubt**2 + self._step_variance * (0.5 + lag + steps / 3.0))
        return math.exp(-QUANTILE_Z * sigma)


class ComputeEstimator:
    """Seconds that this worker takes to compute prompt tokens: n tokens at position s cost n * (a + b * (s + n/2)) in
    whole chunks. A forward pass costs something however short it is, and reads all KV before it once; a whole chunk's
    tokens pay for that, a shorter slice has the rest of it on top: (1 - n / chunk) * (slice_s + slice_position_s * s).

    All four come from timed slices at start-up; each observation then moves one common factor, because other requests
    on the same cores slow all of it alike.
    """

    def __init__(
        self,
        seconds_per_token: float,
        seconds_per_token_position: float,
        *,
        slice_s: float = 0.0,
        slice_position_s: float = 0.0,
        chunk_tokens: int = 256,
    ) -> None:
        assert seconds_per_token > 0 and seconds_per_token_position >= 0
        self._a = seconds_per_token
        self._b = seconds_per_token_position
        self._slice_s, self._slice_position_s, self._chunk_tokens = slice_s, slice_position_s, chunk_tokens
        self._factor = 1.0
        # What a tail takes beyond computing its tokens (sampling, threads), and the mean distance from that.
        self._tail_extra_s, self._tail_spread_s = 0.002, 0.005

    @classmethod
    def from_slices(
        cls,
        near: tuple[int, int, float],
        far: tuple[int, int, float],
        *,
        short_near: tuple[int, int, float] | None = None,
        short_far: tuple[int, int, float] | None = None,
    ) -> ComputeEstimator:
        """Each slice is (tokens, start, measured seconds): a chunk and a few tokens, early and late in the context."""
        (n0, s0, t0), (n1, s1, t1) = near, far
        per_token0, per_token1 = t0 / n0, t1 / n1
        middle0, middle1 = s0 + n0 / 2, s1 + n1 / 2
        slope = max(0.0, (per_token1 - per_token0) / (middle1 - middle0))
        a = max(per_token0 - slope * middle0, 1e-7)
        whole = cls(a, slope, chunk_tokens=n0)
        if short_near is None or short_far is None:
            return whole
        rest0, rest1 = (max(0.0, t - whole.seconds(s, s + n)) / (1.0 - n / n0) for n, s, t in (short_near, short_far))
        growth = max(0.0, (rest1 - rest0) / (short_far[1] - short_near[1]))
        return cls(a, slope, slice_s=rest0, slice_position_s=growth, chunk_tokens=n0)

    def seconds(self, start: int, stop: int) -> float:
        """Predicted seconds for the tokens [start, stop) of one prompt."""
        return self._factor * (stop - start) * (self._a + self._b * (start + stop) / 2)

    def slice_seconds(self, start: int, stop: int) -> float:
        """The same in one forward pass of its own."""
        rest = max(0.0, 1.0 - (stop - start) / self._chunk_tokens)
        return self.seconds(start, stop) + self._factor * rest * (self._slice_s + self._slice_position_s * start)

    def tail_seconds(self, start: int, stop: int) -> float:
        """A time that a request's tail, the tokens [start, stop) and the first sampled one, seldom takes longer than: a
        deadline is planned against it."""
        return max(0.0, self.slice_seconds(start, stop) + self._tail_extra_s) + 1.5 * self._tail_spread_s

    def observe_tail(self, start: int, stop: int, seconds: float) -> None:
        """From the last chunk in place to the first token it took `seconds`."""
        off_s = seconds - self.slice_seconds(start, stop) - self._tail_extra_s
        limit_s = 4.0 * self._tail_spread_s + 0.01  # so that one hiccup of the machine does not decide
        off_s = min(max(off_s, -limit_s), limit_s)
        self._tail_spread_s += 0.15 * (abs(off_s) - self._tail_spread_s)
        self._tail_extra_s += 0.15 * off_s

    def line(self, start: int, chunk_tokens: int) -> tuple[float, float]:
        """(p, q) such that the m chunks from token `start` on take m * (p + q * m) seconds."""
        p = self._factor * chunk_tokens * (self._a + self._b * start)
        return p, self._factor * self._b * chunk_tokens * chunk_tokens / 2

    def observe(self, start: int, stop: int, seconds: float) -> None:
        """A slice took `seconds`."""
        if stop > start:
            ratio = self._factor * seconds / self.slice_seconds(start, stop)
            # Move at most by a factor of two at a time, so that one hiccup of the machine does not decide.
            ratio = min(max(ratio, self._factor / 2), self._factor * 2)
            self._factor += 0.25 * (ratio - self._factor)


class CodecEstimator:
    """Seconds to decode one chunk, by level: what was seen of it, else what was measured at start-up and how much
    longer than that others turned out to take. Levels without either take the dearest one known."""

    def __init__(self, prior_s: float = 0.004, *, measured: Mapping[str, float] | None = None) -> None:
        self._prior_s = prior_s
        self._measured = dict(measured or {})
        self._extra_s = 0.0
        self._seen: dict[str, float] = {}

    def observe(self, level: str, seconds: float) -> None:
        """A chunk of this level took so long."""
        expected_s = self.seconds(level) if level in self._seen or level in self._measured else seconds
        if level in self._measured:
            self._extra_s += 0.3 * (seconds - self._measured[level] - self._extra_s)
        self._seen[level] = expected_s + 0.3 * (seconds - expected_s)

    def seconds(self, level: str) -> float:
        """What to expect of the next one."""
        seen = self._seen.get(level)
        if seen is not None:
            return seen
        if level in self._measured:
            return max(self._measured[level] + self._extra_s, 0.5 * self._measured[level])
        return max(self._seen.values(), default=self._prior_s)

    def by_level(self, levels: Sequence[str]) -> dict[str, float]:
        """The same for several levels."""
        return {level: self.seconds(level) for level in levels}
