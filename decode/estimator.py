"""What a decode worker has learned about its links and its own speed. Pure: fed with observations and their times.

Throughput comes from arrivals only (nothing here ever sees a link's configured rate). Both estimators are shared by
all requests of a worker, so that a new request starts from what the last one saw.
"""

from __future__ import annotations

# Older observations lose half their weight after this many bytes. Counting bytes and not seconds makes the estimate
# quick where it matters: on a link that drops, one slow part outweighs all fast ones before it by its own seconds.
# On fast links 20 ms worth of parts average out the hiccups of busy cores.
HALF_LIFE_S, MIN_HALF_LIFE_BYTES, MAX_HALF_LIFE_BYTES = 0.02, 256 * 1024, 1024 * 1024
# Planning against a little less than the mean keeps a jittery link from breaking the promise.
LINK_MARGIN = 0.92


class LinkEstimator:
    """Bytes a second that one source's link delivers while it has something to deliver.

    The decayed ratio  sum(w * bytes) / sum(w * seconds)  over the parts that arrived, where a part's seconds are those
    it spent on the wire, without any idleness of the source. Shared by all transfers over the link: `sharing` counts
    them, and a plan for one of them may hope for its share.
    """

    def __init__(self, prior_bytes_per_s: float = 50e6, prior_latency_s: float = 0.005) -> None:
        # The prior weighs as much as one large part: enough for a first plan, gone after the first chunk.
        self._bytes = float(MIN_HALF_LIFE_BYTES)
        self._seconds = self._bytes / prior_bytes_per_s
        self._latency_s = prior_latency_s
        self._last_part_bytes = 64 * 1024
        self.sharing = 0

    def on_first_part(self, latency_s: float) -> None:
        """Time from asking an idle source to its first part."""
        self._latency_s += 0.3 * (latency_s - self._latency_s)

    def on_part(self, part_bytes: int, wire_s: float) -> None:
        """A part arrived that took `wire_s` on the wire."""
        wire_s = max(wire_s, 1e-7)
        half_life_bytes = HALF_LIFE_S * self._bytes / self._seconds
        keep = 0.5 ** (part_bytes / min(max(half_life_bytes, MIN_HALF_LIFE_BYTES), MAX_HALF_LIFE_BYTES))
        self._seconds = self._seconds * keep + wire_s
        self._bytes = self._bytes * keep + part_bytes
        self._last_part_bytes = max(part_bytes, 1)

    @property
    def latency_s(self) -> float:
        return self._latency_s

    @property
    def committed_bytes(self) -> float:
        """What a source has on the way at any time: transport keeps at least two parts in flight."""
        return 2.0 * self._last_part_bytes

    def bytes_per_s(self, now: float, *, waiting_since: float | None = None) -> float:
        """The rate to plan with. `waiting_since`: when something outstanding last moved, or None when nothing is.

        Silence is evidence too: a link that owes a part and has been quiet for longer than a part takes is at most
        as fast as one part in that time.
        """
        rate = LINK_MARGIN * self._bytes / self._seconds / max(self.sharing, 1)
        if waiting_since is not None:
            quiet_s = now - waiting_since - self._latency_s
            if quiet_s > 3.0 * self._last_part_bytes / rate and quiet_s > 0.02:
                rate = min(rate, self._last_part_bytes / quiet_s)
        return rate


class ComputeEstimator:
    """Seconds that this worker takes to compute prompt tokens: n tokens at position s cost n * (a + b * (s + n/2)).

    `a` and `b` come from two timed slices at start-up; each observation then moves one common factor, because other
    requests on the same cores slow both terms alike.
    """

    def __init__(self, seconds_per_token: float, seconds_per_token_position: float) -> None:
        assert seconds_per_token > 0 and seconds_per_token_position >= 0
        self._a = seconds_per_token
        self._b = seconds_per_token_position
        self._factor = 1.0

    @classmethod
    def from_two_slices(cls, near: tuple[int, int, float], far: tuple[int, int, float]) -> ComputeEstimator:
        """Each slice is (tokens, start, measured seconds); the second lies at a larger start."""
        (n0, s0, t0), (n1, s1, t1) = near, far
        per_token0, per_token1 = t0 / n0, t1 / n1
        middle0, middle1 = s0 + n0 / 2, s1 + n1 / 2
        slope = max(0.0, (per_token1 - per_token0) / (middle1 - middle0))
        return cls(max(per_token0 - slope * middle0, 1e-7), slope)

    def seconds(self, start: int, stop: int) -> float:
        """Predicted seconds for the tokens [start, stop) of one prompt."""
        return self._factor * (stop - start) * (self._a + self._b * (start + stop) / 2)

    def observe(self, start: int, stop: int, seconds: float) -> None:
        """A slice took `seconds`."""
        if stop > start:
            ratio = self._factor * seconds / self.seconds(start, stop)
            # Move at most by a factor of two at a time, so that one hiccup of the machine does not decide.
            ratio = min(max(ratio, self._factor / 2), self._factor * 2)
            self._factor += 0.25 * (ratio - self._factor)


class CodecEstimator:
    """Seconds to decode one chunk of a level, learned by level; unseen levels take the dearest one seen."""

    def __init__(self, prior_s: float = 0.004) -> None:
        self._prior_s = prior_s
        self._seconds: dict[str, float] = {}

    def observe(self, level: str, seconds: float) -> None:
        old = self._seconds.get(level)
        self._seconds[level] = seconds if old is None else old + 0.3 * (seconds - old)

    def seconds(self, level: str) -> float:
        seen = self._seconds.get(level)
        if seen is not None:
            return seen
        return max(self._seconds.values(), default=self._prior_s)
