"""What a fill machine knows of its sources: whether they answer, what they have, what was asked of them. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum

from decode.link_scheduler import LinkShare

# How long a source may take to answer, and how long a lost one is tried again, before the worker plans without it.
OPEN_TIMEOUT_S = 10.0
RETRY_S, MAX_RETRY_S = 0.25, 2.0
# Chunks asked for ahead: at least two (one arriving, one standing, which can still be amended), and on fast links
# as many as keep the link busy for this long beyond its latency, so that a round trip never leaves it idle.
MIN_AHEAD, MAX_AHEAD, AHEAD_S = 2, 32, 0.03


class SourceState(Enum):
    OPENING = "opening"
    OPEN = "open"
    LOST = "lost"  # tried again at `retry_at`
    GONE = "gone"


@dataclass(slots=True, kw_only=True, eq=False)
class FillSource:
    """One source of a fill. stored[i]: sizes by level of chunk i; None: it would have to compute it."""

    index: int
    share: LinkShare
    state: SourceState = SourceState.OPENING
    since: float = 0.0  # when it was opened, or lost for the first time since it last answered
    retry_at: float = 0.0
    retry_s: float = RETRY_S
    stored: Sequence[dict[str, int] | None] = ()
    kl: Sequence[float] = ()  # of what is stored, before a level makes it worse; empty: all exact
    encode_s: Mapping[str, float] = field(default_factory=dict)
    refused: set[int] = field(default_factory=set)  # chunks that it cannot give
    num_asked: int = 0  # chunks and refinements on their way
    left_bytes: float = 0.0  # of them
    moved_at: float | None = None  # when it last gave something, or was first asked; None when nothing is asked
    has_answered: bool = False  # something came since it was first asked
    bad_blobs: int = 0
    waits_for_use: bool = False  # it gives no more than a few blobs ahead of what is decoded

    @property
    def is_open(self) -> bool:
        return self.state is SourceState.OPEN

    @property
    def is_opening(self) -> bool:
        return self.state is SourceState.OPENING

    @property
    def is_hoped_for(self) -> bool:
        return self.state is not SourceState.GONE

    def used(self, now: float) -> None:
        """A blob of it was decoded. One that waited for that was not silent."""
        if self.waits_for_use and self.moved_at is not None:
            self.moved_at = now

    def lose(self, now: float, *, is_final: bool) -> None:
        if self.state is SourceState.OPEN:
            # One stretch of time is allowed in all: from the last that was heard of it to its next answer.
            self.since = now if self.moved_at is None else self.moved_at
        self.num_asked, self.left_bytes, self.moved_at = 0, 0.0, None
        if is_final or now - self.since >= OPEN_TIMEOUT_S:
            self.state = SourceState.GONE
            return
        self.state, self.retry_at = SourceState.LOST, now + self.retry_s
        self.retry_s = min(2 * self.retry_s, MAX_RETRY_S)

    def rate(self, now: float, *, patience_s: float = 0.0) -> float:
        """Bytes a second to expect. Silence counts against it, after `patience_s`; not what it brought for others."""
        since = None if self.moved_at is None else max(self.moved_at, self.share.link.moved_at) + patience_s
        return self.share.estimator.bytes_per_s(now, waiting_since=since)

    def quiet_s(self, now: float) -> float:
        """How long the link has brought nothing, although this transfer waits for something."""
        return 0.0 if self.moved_at is None else now - max(self.moved_at, self.share.link.moved_at)

    def latency_s(self, now: float) -> float:
        """Until something can come of it."""
        latency_s = self.share.estimator.latency_s
        if self.num_asked == 0 or self.moved_at is None:
            return latency_s
        return 0.0 if self.has_answered else max(0.0, latency_s - (now - self.moved_at))

    def has_room(self, rate: float) -> bool:
        """Whether to ask for one more."""
        if self.num_asked < MIN_AHEAD:
            return True
        ahead_bytes = (AHEAD_S + self.share.estimator.latency_s) * rate
        return self.left_bytes < ahead_bytes and self.num_asked < MAX_AHEAD

    def ask(self, num_bytes: float, now: float) -> None:
        if self.num_asked == 0:
            self.moved_at, self.has_answered = now, False
        self.num_asked += 1
        self.left_bytes += num_bytes

    def forget(self, left_bytes: float) -> None:
        """Something asked for has come, or will not."""
        self.num_asked -= 1
        self.left_bytes = max(0.0, self.left_bytes - left_bytes) if self.num_asked else 0.0
        if self.num_asked == 0:
            self.moved_at = None
