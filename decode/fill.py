"""Filling one prompt's pages: a pure machine that asks for chunks, has some computed, and says when all are there.

`handle(event, now) -> [command]`. It owns no page, no socket and no clock. Chunks of a stored context are asked for
from the back while the frontier (the first chunk not in place) is computed from the front; chunks of a live prefill
come from the front. Events lead to a new plan (decode/plan.py); standing requests are amended when the plan's
level changes.

    MISSING -> ASKED -> DECODING -> FILLED          a chunk that is loaded
       |         |
       +---------+----> COMPUTING -> FILLED         a chunk computed at the frontier (a standing request is withdrawn)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum

from decode.estimator import CodecEstimator, ComputeEstimator, LinkEstimator
from decode.fill_events import (
    Ask,
    BlobArrived,
    BlobDecoded,
    BlobRejected,
    ChunkComputed,
    Command,
    Compute,
    Decode,
    Event,
    Fail,
    Opened,
    PartArrived,
    Ready,
    SourceLost,
    Tick,
    Withdraw,
)
from decode.plan import REASK, Outlook, Plan, choose

TEXT = "text"  # how a computed chunk is named among the levels

# Chunks asked for ahead: at least two (one arriving, one standing, which can still be amended), and on fast links
# as many as keep the link busy for this long, so that a request's round trip never leaves it idle.
MIN_AHEAD = 2
MAX_AHEAD = 16
AHEAD_S = 0.03
MAX_BAD_BLOBS = 3
MAX_ASKED_LEVELS = 16  # of one chunk, kept for the receipt; an unsteady link may amend a request hundreds of times
# Parts come by the thousand on a fast link and change little; whole blobs and all else lead to a new plan at once.
PLAN_EVERY_S = 0.005
# The share of the time left that plans may use: predictions of the tail and of the link's end are off by a few percent.
HOLD_BACK = 0.95
# How much better than computing on here it must be to ask a live source again that was left.
BACK_TO_LIVE = 1.25
# How long a source may take to answer before the worker stops waiting for it and plans with text alone.
OPEN_TIMEOUT_S = 10.0


class ChunkState(Enum):
    MISSING = "missing"
    ASKED = "asked"
    DECODING = "decoding"
    COMPUTING = "computing"
    FILLED = "filled"


@dataclass(slots=True, kw_only=True)
class ChunkLog:
    """What happened to one chunk; times are seconds on the worker's clock. The receipt is made of these."""

    state: ChunkState = ChunkState.MISSING
    level: str = ""
    asked_levels: list[str] = field(default_factory=list)
    anew_level: str = ""  # of the last request that was no amendment
    bytes: int = 0
    bad_blobs: int = 0
    asked_at: float | None = None
    first_part_at: float | None = None
    arrived_at: float | None = None
    filled_at: float | None = None
    compute_at: float | None = None
    left_bytes: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class FillSpec:
    """What one request asks of its fill. `levels`: allowed, best first. `deadline`: on the worker's clock."""

    num_chunks: int
    chunk_tokens: int
    levels: tuple[str, ...]
    chunk_bytes: dict[str, float]  # predicted size of one chunk, by level
    deadline: float
    tail_s: float  # predicted time from the last chunk to the first token
    may_load: bool
    may_compute: bool


class FillMachine:
    """See the module's docstring. The estimators are the worker's, shared by all its requests."""

    def __init__(
        self,
        spec: FillSpec,
        *,
        now: float,
        link: LinkEstimator,
        compute: ComputeEstimator,
        codec: CodecEstimator,
    ) -> None:
        assert spec.may_load or spec.may_compute
        self.spec = spec
        self.chunks = [ChunkLog() for _ in range(spec.num_chunks)]
        self.reasons: list[tuple[float, str]] = []
        self.plan: Plan | None = None
        self.live = False
        self.done = False
        self.received_bytes = 0  # all that came over the link, also what was not used in the end
        self.link = link
        self._compute = compute
        self._codec = codec
        self._may_load = spec.may_load
        self._opened = False
        self._planned_at = now
        self._started_at = now
        self._moved_at: float | None = None  # when the link last gave something, or was first asked; None when idle
        self._chunk_bytes = dict(spec.chunk_bytes)

    @property
    def lost_source(self) -> bool:
        """Whether a source was given up: nothing that still comes from it will be used."""
        return self.spec.may_load and not self._may_load

    def start(self, now: float) -> list[Command]:
        """The first commands. A fill that may load waits for `Opened` unless computing is the plan anyway."""
        return self._replan(now)

    def handle(self, event: Event, now: float) -> list[Command]:
        if self.done:
            return []
        commands: list[Command] = []
        match event:
            case Opened():
                self._on_opened(event)
            case PartArrived():
                self._on_part(event, now)
            case BlobArrived():
                commands += self._on_blob(event, now)
            case BlobDecoded():
                self._codec.observe(self.chunks[event.chunk].level, event.seconds)
                self._fill(event.chunk, now)
            case BlobRejected():
                assert self.chunks[event.chunk].state is ChunkState.DECODING
                self._reject(event.chunk, event.reason, now)
            case ChunkComputed():
                self._fill(event.chunk, now)
            case SourceLost():
                self._on_lost(event, now)
            case Tick():
                if not self._opened and self._may_load and now - self._started_at > OPEN_TIMEOUT_S:
                    self._on_lost(SourceLost(reason="the source did not answer"), now)
        if self.done or (isinstance(event, PartArrived) and now - self._planned_at < PLAN_EVERY_S):
            return commands
        return commands + self._replan(now)

    # -- events ---------------------------------------------------------------------------------------------------

    def _on_opened(self, event: Opened) -> None:
        assert len(event.stored_bytes) == self.spec.num_chunks
        self._opened = True
        self.live = any(sizes is None for sizes in event.stored_bytes)
        known: dict[str, list[int]] = {}
        for sizes in event.stored_bytes:
            for level, size in (sizes or {}).items():
                known.setdefault(level, []).append(size)
        for level, sizes_seen in known.items():
            if level in self._chunk_bytes:
                self._chunk_bytes[level] = sum(sizes_seen) / len(sizes_seen)

    def _on_part(self, event: PartArrived, now: float) -> None:
        log = self.chunks[event.chunk]
        if log.first_part_at is None and log.state is ChunkState.ASKED:
            log.first_part_at = now
            if not self.live and self._moved_at is not None and self._moved_at == log.asked_at:
                self.link.on_first_part(now - log.asked_at)
        self.received_bytes += event.part_bytes
        self.link.on_part(event.part_bytes, event.wire_s)
        self._moved_at = now
        if log.state is ChunkState.ASKED:
            log.left_bytes = event.total_bytes - event.received_bytes
            log.bytes = event.total_bytes

    def _on_blob(self, event: BlobArrived, now: float) -> list[Command]:
        log = self.chunks[event.chunk]
        if log.state is not ChunkState.ASKED:
            return []  # computed in the meantime; the withdrawal crossed it
        if event.level not in self.spec.levels:
            self._reject(event.chunk, f"level {event.level!r} was not asked for", now)
            return []
        log.state = ChunkState.DECODING
        log.level, log.bytes, log.arrived_at, log.left_bytes = event.level, len(event.blob), now, 0.0
        # What really came is the best prediction for the next chunk of that level.
        self._chunk_bytes[event.level] += 0.5 * (len(event.blob) - self._chunk_bytes[event.level])
        return [Decode(chunk=event.chunk, level=event.level, blob=event.blob)]

    def _reject(self, chunk: int, reason: str, now: float) -> None:
        log = self.chunks[chunk]
        log.state, log.level, log.left_bytes = ChunkState.MISSING, "", 0.0
        log.first_part_at = None
        log.bad_blobs += 1
        self._note(now, f"chunk {chunk}: bad blob, asked for again ({reason})")
        if sum(chunk.bad_blobs for chunk in self.chunks) > MAX_BAD_BLOBS:
            self._on_lost(SourceLost(reason=f"{MAX_BAD_BLOBS + 1} damaged blobs; the last: {reason}"), now)

    def _on_lost(self, event: SourceLost, now: float) -> None:
        self._may_load = False
        self._note(now, f"source lost: {event.reason}")
        for log in self.chunks:
            if log.state is ChunkState.ASKED:
                log.state, log.left_bytes = ChunkState.MISSING, 0.0

    def _fill(self, chunk: int, now: float) -> None:
        log = self.chunks[chunk]
        assert log.state in (ChunkState.DECODING, ChunkState.COMPUTING), log.state
        if log.state is ChunkState.COMPUTING:
            log.level = TEXT
        log.state, log.filled_at = ChunkState.FILLED, now

    # -- the plan -------------------------------------------------------------------------------------------------

    def _in(self, *states: ChunkState) -> list[int]:
        return [index for index, log in enumerate(self.chunks) if log.state in states]

    def _replan(self, now: float) -> list[Command]:
        self._planned_at = now
        missing = self._in(ChunkState.MISSING)
        asked = self._in(ChunkState.ASKED)
        if not missing and not asked:
            if self._in(ChunkState.DECODING, ChunkState.COMPUTING):
                return []
            self.done = True
            return [Ready()]
        if not asked:
            self._moved_at = None
        if not self.spec.may_compute and not self._may_load:
            self.done = True
            reason = self.reasons[-1][1] if self.reasons else "no source"
            return [Fail(code="kv_transfer_failed", message=f"The prompt's KV could not be loaded ({reason}).")]
        outlook = self._outlook(missing, asked, now)
        plan = choose(self.spec.levels, outlook, self._budget_s(now), current=self.plan)
        if self._may_load and not self._opened and not plan.compute_chunks:
            return []  # nothing to do before the source answers, unless the link is known to be slow
        self._note_plan(plan, now)
        self.plan = plan
        commands = self._compute_commands(plan, now)
        if self._opened and self._may_load:
            commands += self._load_commands(plan, now)
        return commands

    def _budget_s(self, now: float) -> float:
        return HOLD_BACK * (self.spec.deadline - now) - self.spec.tail_s

    def _standing(self, asked: Sequence[int]) -> list[int]:
        """Chunks asked for whose encoding has not begun as far as can be seen: they can still change their level.

        The oldest request is taken to be at work already, even before its first part is here.
        """
        if not asked:
            return []
        oldest = min(asked, key=lambda index: self.chunks[index].asked_at or 0.0)
        return [index for index in asked if index != oldest and self.chunks[index].first_part_at is None]

    def _outlook(self, missing: Sequence[int], asked: Sequence[int], now: float) -> Outlook:
        standing = self._standing(asked)
        in_flight = [index for index in asked if index not in standing]
        computing = self._in(ChunkState.COMPUTING)
        busy_s = 0.0
        if computing:
            started = self.chunks[computing[0]].compute_at
            assert started is not None
            busy_s = max(0.0, self._chunk_compute_s(computing[0], 1) - (now - started))
        first = min([*missing, *asked])
        source_s = 0.0
        if self.live:
            not_begun = [*missing, *(index for index in asked if self.chunks[index].first_part_at is None)]
            source_s = self._live_source_s(sorted(not_begun), now)
        return Outlook(
            num_missing=len(missing) + len(standing),
            in_flight_bytes=[self.chunks[index].left_bytes for index in in_flight],
            chunk_bytes=self._chunk_bytes,
            bytes_per_s=self._rate(now) if self._may_load else 0.0,
            latency_s=self._latency_s(asked, now),
            decode_s=self._codec.seconds,
            compute_s=(lambda count: self._chunk_compute_s(first, count)) if self.spec.may_compute else None,
            busy_s=busy_s,
            source_s=source_s,
            spent_s=now - self._started_at,
            committed_bytes=self.link.committed_bytes,
            live=self.live,
        )

    def _live_source_s(self, not_begun: Sequence[int], now: float) -> float:
        """Until a live source has computed the last chunk. It takes about as long for a chunk as this worker would,
        and has been at the next one since the last one began to arrive."""
        if not not_begun:
            return 0.0
        began = [log.first_part_at for log in self.chunks if log.first_part_at is not None]
        asked = [log.asked_at for log in self.chunks if log.asked_at is not None]
        since = max(began) if began else min(asked, default=now)
        left_s = max(0.0, self._chunk_compute_s(not_begun[0], len(not_begun)) - (now - since))
        # Once this worker computes, the source has been left alone: going back has to be worth it.
        return left_s * (BACK_TO_LIVE if self.plan is not None and self.plan.compute_chunks else 1.0)

    def _rate(self, now: float) -> float:
        """The link's rate. Silence counts against it, but not the time in which a live source computes a chunk."""
        waiting_since = self._moved_at
        if self.live and waiting_since is not None:
            waiting_since += 2.0 * self._chunk_compute_s(self.spec.num_chunks - 1, 1)
        return self.link.bytes_per_s(now, waiting_since=waiting_since)

    def _latency_s(self, asked: Sequence[int], now: float) -> float:
        """Until the next byte can come. A source that has not answered yet is likely to take as long again."""
        if not self._opened:
            return max(self.link.latency_s, now - self._started_at)
        return self.link.latency_s if not asked else 0.0

    def _chunk_compute_s(self, first: int, count: int) -> float:
        size = self.spec.chunk_tokens
        return self._compute.seconds(first * size, (first + count) * size)

    def _compute_commands(self, plan: Plan, now: float) -> list[Command]:
        if plan.compute_chunks == 0 or self._in(ChunkState.COMPUTING):
            return []
        frontier = next(i for i, log in enumerate(self.chunks) if log.state is not ChunkState.FILLED)
        log = self.chunks[frontier]
        if log.state is ChunkState.DECODING:
            return []  # in place in a moment
        commands: list[Command] = []
        if log.state is ChunkState.ASKED:
            commands.append(Withdraw(chunk=frontier))
        log.state, log.compute_at, log.left_bytes = ChunkState.COMPUTING, now, 0.0
        return [*commands, Compute(chunk=frontier)]

    def _load_commands(self, plan: Plan, now: float) -> list[Command]:
        commands: list[Command] = []
        asked = self._in(ChunkState.ASKED)
        standing = self._standing(asked)
        if self.live and plan.compute_chunks:
            # All is computed here; the source need not go on with what it has not begun to send.
            not_begun = [index for index in asked if self.chunks[index].first_part_at is None]
            for index in not_begun:
                self.chunks[index].state, self.chunks[index].left_bytes = ChunkState.MISSING, 0.0
            return [Withdraw(chunk=index) for index in not_begun]
        not_begun = sorted([*self._in(ChunkState.MISSING), *standing])
        computed = not_begun[: plan.compute_chunks]
        for index in asked:
            if index in computed or self.chunks[index].asked_levels[-1] == plan.level:
                continue  # the plan's level is for what it loads
            if index in standing:
                # It may be encoded already, at the level of the first request: then amending comes too late.
                is_anew = self._pays_anew(self._chunk_bytes[self.chunks[index].anew_level], plan.level)
                commands += [Withdraw(chunk=index)] if is_anew else []
                commands.append(self._ask(index, plan.level, is_anew=is_anew))
            elif self._pays_anew(self.chunks[index].left_bytes, plan.level):
                # The link has become so slow that beginning again at the coarser level is faster than going on.
                self._note(now, f"chunk {index}: given up at {self.chunks[index].asked_levels[-1]}, asked for anew")
                self.chunks[index].first_part_at, self.chunks[index].asked_at = None, now
                commands += [Withdraw(chunk=index), self._ask(index, plan.level)]
        wanted = not_begun[plan.compute_chunks :]
        to_load = [index for index in (wanted if self.live else wanted[::-1]) if index not in standing]
        chunk_bytes = max(self._chunk_bytes[plan.level], 1.0)
        rate = self._rate(now)
        ahead = min(max(MIN_AHEAD, int(AHEAD_S * rate / chunk_bytes) + 1), MAX_AHEAD)
        for index in to_load[: max(0, ahead - len(asked))]:
            was_idle = not self._in(ChunkState.ASKED)
            commands.append(self._ask(index, plan.level))
            self.chunks[index].asked_at = now
            if was_idle:
                self._moved_at = now
        return commands

    def _pays_anew(self, left_bytes: float, level: str) -> bool:
        """Whether a chunk begun at another level comes sooner if it is given up and asked for at `level`.

        What is committed to the link cannot be recalled: that much comes in vain, and the new blob behind it.
        """
        return left_bytes > REASK * (self.link.committed_bytes + self._chunk_bytes[level])

    def _ask(self, index: int, level: str, *, is_anew: bool = True) -> Ask:
        log = self.chunks[index]
        log.anew_level = level if is_anew else log.anew_level
        log.state, log.left_bytes = ChunkState.ASKED, self._chunk_bytes[level]
        log.asked_levels.append(level)
        del log.asked_levels[1 : len(log.asked_levels) - MAX_ASKED_LEVELS + 1]  # the first and the last ones stay
        return Ask(chunk=index, level=level)

    # -- why ------------------------------------------------------------------------------------------------------

    def _note(self, now: float, reason: str) -> None:
        if len(self.reasons) < 200:
            self.reasons.append((now, reason))

    def _note_plan(self, plan: Plan, now: float) -> None:
        old = self.plan
        if old is not None and old.level == plan.level and (old.compute_chunks > 0) == (plan.compute_chunks > 0):
            return
        rate_mbps = self._rate(now) * 8e-6
        verdict = "in time" if plan.meets_target else "as fast as possible"
        how = f"compute {plan.compute_chunks} from the front, load the others" if plan.compute_chunks else "load"
        self._note(
            now,
            f"{how} at {plan.level}: {plan.predicted_s * 1e3:.0f} ms predicted, {self._budget_s(now) * 1e3:.0f} ms left"
            f" ({verdict}), link {rate_mbps:.1f} Mbit/s",
        )
