"""The part of a fill that loads: what a plan has to know, and which chunk is asked of which source. Pure."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from decode import fill_events as ev
from decode.estimator import CodecEstimator, ComputeEstimator
from decode.fill_chunks import MAX_ASKED_LEVELS, TEXT, ChunkState, ChunkTable
from decode.fill_sources import FillSource
from decode.fill_upgrades import Upgrades
from decode.link_scheduler import Kind
from decode.plan import REASK, Outlook, Plan
from decode.refine import Ladder, RefineBudget
from decode.replay import Replay
from decode.window_chunks import Layers, WindowChunks
from prefill.chunks import part_name
from prefill.window_layers import Windows

# The share of the time left that plans may use. The doubts about link and tail have margins of their own; this is for
# what nobody predicts.
HOLD_BACK = 0.985
# How much better than computing on here it must be to ask a live source again that was left.
BACK_TO_LIVE = 1.25


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineLoad:
    """What else the worker's engine has to do: seconds of prompts with earlier deadlines, how many times longer than
    alone computing takes beside the running requests, and how many other requests there are."""

    wait_s: float = 0.0
    factor: float = 1.0
    num_others: int = 0


IDLE_ENGINE = EngineLoad()


@dataclass(frozen=True, slots=True, kw_only=True)
class FillSpec:
    """What one request asks of its fill.

    cached_tokens: at the front of the prompt, those whose KV is in the pages already. Whole chunks of them are done; of
    one that is there in part, only the rest is computed, or put into the pages when it is loaded.
    front_stop: the tokens before it, of the chunk or tail that it lies in, are kept here within another entry, which
    promises front_kl (0: there are none). They are loaded where that chunk is computed, and the rest is computed.
    levels: allowed, best first. chunk_bytes: predicted size of one chunk, by level; nested: the levels that refine one
    another; exact: those that lose nothing. refine_levels: best first, what chunks may be refined to after the first
    token (empty: not at all).
    deadline: on the worker's clock; tail_s: predicted time from the last chunk to the first token.
    may_load: whether sources are of use. may_compute: whether chunks may be computed; max_compute: how many of them
    while a source can be had (None: all).
    infeasible: what to do when the floor cannot be in time, see SLOPolicy. replay: a plan to be followed instead.
    windows [L]: of the layers, for which only what they see is loaded (see decode/window_chunks.py); empty: none.
    """

    num_chunks: int
    chunk_tokens: int
    levels: tuple[str, ...]
    chunk_bytes: Mapping[str, float]
    deadline: float
    tail_s: float
    cached_tokens: int = 0
    front_stop: int = 0
    front_kl: float = 0.0
    may_load: bool = True
    may_compute: bool = True
    max_compute: int | None = None
    nested: frozenset[str] = frozenset()
    exact: frozenset[str] = frozenset()
    refine_levels: tuple[str, ...] = ()
    infeasible: str = "best_effort"
    replay: Replay | None = None
    windows: Windows = ()

    @property
    def num_cached(self) -> int:
        """Chunks that are in place from the start."""
        return min(self.cached_tokens // self.chunk_tokens, self.num_chunks)

    @property
    def front_chunk(self) -> int:
        """The chunk of the front that is kept here; num_chunks: it is the tail's; -1: there is none."""
        return (self.front_stop - 1) // self.chunk_tokens

    def to_compute(self, chunk: int) -> tuple[int, int]:
        """The tokens [start, stop) that computing a chunk has to compute."""
        start = chunk * self.chunk_tokens
        return max(start, self.cached_tokens), start + self.chunk_tokens


class Loader:
    """Shares the chunks and sources of its fill machine."""

    def __init__(
        self,
        spec: FillSpec,
        table: ChunkTable,
        sources: Sequence[FillSource],
        *,
        compute: ComputeEstimator,
        codec: CodecEstimator,
        now: float,
    ) -> None:
        self.spec = spec
        self.live = False
        self.has_opened = False
        self._windows = WindowChunks(spec.windows, chunk_tokens=spec.chunk_tokens, num_chunks=spec.num_chunks)
        self.chunk_bytes = dict(spec.chunk_bytes)
        self._for_tail = self._windows.to_load(lambda chunk, is_seen: False)
        self._end_s = 0.0  # computing what no source can give, behind all that one can
        self.given_up: list[int] = []  # chunks on their way that the last commands asked for anew
        self._table, self._sources = table, sources
        self._compute, self._codec = compute, codec
        self._started_at = now

    def opened(self, source: FillSource) -> None:
        self.has_opened = True
        self.see_whether_live()
        known: dict[str, list[int]] = {}
        for sizes in source.stored:
            for level, size in (sizes or {}).items():
                known.setdefault(level, []).append(size)
        for level, sizes_seen in known.items():
            if level in self.chunk_bytes:
                self.chunk_bytes[level] = sum(sizes_seen) / len(sizes_seen)

    def see_whether_live(self) -> None:
        """Whether some chunk is stored nowhere, so that a source has to compute it, and one would."""
        opened = [source for source in self._sources if source.is_open]
        layers = self._to_load()
        self.live = any(
            layers[index] != ()
            and all(source.stored[index] is None for source in opened)
            and any(index not in source.refused for source in opened)
            for index in range(self.spec.num_cached, self.spec.num_chunks)
        )

    @property
    def has_target(self) -> bool:
        """Whether the first token is due at some time, and not just as soon as possible."""
        return self.spec.deadline > self._started_at

    def budget_s(self, now: float) -> float:
        """The time left for what comes before the tail, and before the last chunks if those can only be computed."""
        return HOLD_BACK * (self.spec.deadline - now) - self.spec.tail_s - self._end_s

    def deadline(self) -> float:
        """When budget_s is 0."""
        return self.spec.deadline - self.spec.tail_s / HOLD_BACK

    def refine_budget(self, ladder: Ladder, upgrades: Upgrades, budget_s: float, now: float) -> RefineBudget:
        """What can be spent on refinements within `budget_s`, with all else that is asked for."""
        # Each is a whole chunk to decode: on a fast link that is what the time goes into.
        decode_s = self._codec.seconds(ladder.levels[max(0, len(ladder.levels) - 2)])
        left_s = budget_s - (self.queue_s() + upgrades.num_here * decode_s)
        if left_s <= decode_s:
            return RefineBudget(sure_bytes=0.0, hoped_bytes=0.0, num_steps=0)
        rate = self.rate(now)
        opened = [source for source in self._sources if source.is_open]
        ahead_bytes = sum(source.share.ahead_bytes(Kind.BETTER) + source.left_bytes for source in opened)
        # What is on its way covers the latency of what is asked for now.
        latency_s = min((source.share.estimator.latency_s for source in opened), default=0.0)
        taken_bytes, wire_s = max(ahead_bytes, latency_s * rate), left_s - decode_s
        return RefineBudget(
            sure_bytes=wire_s * rate * self.low_share(left_s) - taken_bytes,
            hoped_bytes=wire_s * rate - taken_bytes,
            num_steps=int(left_s / decode_s) - (upgrades.num_waiting - upgrades.num_here),
        )

    # -- what plans are made of -----------------------------------------------------------------------------------

    def rate(self, now: float) -> float:
        """Bytes a second of all sources together. Those that have not answered count until one has."""
        return self._rate_of(self._able(), now)

    def _rate_of(self, sources: Sequence[FillSource], now: float) -> float:
        patience_s = self._patience_s()
        return sum([source.rate(now, patience_s=patience_s) for source in sources])

    def _able(self) -> list[FillSource]:
        opened = [source for source in self._sources if source.is_open]
        if opened or self.has_opened:
            return opened
        return [source for source in self._sources if source.is_hoped_for]

    def _patience_s(self) -> float:
        """Silence counts against a link, but not the time in which a live source computes a chunk."""
        return 2.0 * self.chunk_compute_s(self.spec.num_chunks - 1, 1) if self.live else 0.0

    def low_share(self, horizon_s: float) -> float:
        """The worst of the links': that of one of them alone is too careful for two, and not by much."""
        return self._low_share_of(self._able(), horizon_s)

    def _low_share_of(self, sources: Sequence[FillSource], horizon_s: float) -> float:
        return min([source.share.estimator.low_share(horizon_s) for source in sources], default=1.0)

    def chunk_compute_s(self, first: int, count: int) -> float:
        size = self.spec.chunk_tokens
        return self._compute.seconds(max(first * size, self.spec.cached_tokens), (first + count) * size)

    def standing(self, source: FillSource) -> list[int]:
        """Chunks asked for whose encoding has not begun as far as can be seen: they can still change their level.

        The oldest request is taken to be at work already, even before its first part is here.
        """
        logs, at = self._table.logs, source.index
        asked = [index for index in self._table.asked if logs[index].source == at]
        return [index for index in asked[1:] if logs[index].first_part_at is None]

    def outlook(self, now: float, load: EngineLoad) -> Outlook:
        table, spec = self._table, self.spec
        able = self._able()
        standing = {index for source in able for index in self.standing(source)}
        in_flight = sorted(index for index in table.asked if index not in standing)
        busy_s = load.wait_s
        if table.computing is not None:
            started = table.logs[table.computing].compute_at
            assert started is not None
            busy_s += max(0.0, load.factor * self.chunk_compute_s(table.computing, 1) - (now - started))
        num_end = self._look_at_end()
        first = min([*table.missing[:1], *table.asked], default=table.frontier)
        max_compute, again_s = self._max_compute(num_end, has_hope=any(s.is_hoped_for for s in self._sources))
        per_chunk_s, growth_s = self._compute.line(first * spec.chunk_tokens, spec.chunk_tokens)
        budget_s = self.budget_s(now)
        return Outlook(
            num_missing=len(table.missing) + len(standing) - num_end,
            left=self._left(standing, num_end),
            in_flight_bytes=[table.logs[index].left_bytes for index in in_flight],
            chunk_bytes=self.chunk_bytes,
            bytes_per_s=self._rate_of(able, now),
            low_share=self._low_share_of(able, max(budget_s, 0.05)) if budget_s > 0 else 1.0,
            latency_s=self._latency_s(able, now),
            encode_s=able[0].encode_s if able else {},
            decode_s=self._codec.by_level(spec.levels),
            compute_s=load.factor * per_chunk_s,
            compute_growth_s=load.factor * growth_s,
            max_compute=max_compute,
            again_s=again_s,
            queue_s=self.queue_s(),
            in_flight_decode_s=sum(
                [self._codec.seconds(table.logs[at].asked_levels[-1]) * table.logs[at].share for at in in_flight]
            ),
            busy_s=busy_s,
            num_others=load.num_others,
            source_s=self._live_source_s(now) if self.live else 0.0,
            spent_s=now - self._started_at,
            committed_bytes=max([s.share.estimator.committed_bytes for s in able], default=0.0),
            ahead_bytes=sum([source.share.ahead_bytes() for source in able]),
            exact=spec.exact,
            nested=spec.nested,
            in_place=self._in_place(in_flight) if budget_s > 0 and spec.levels[-1] in spec.nested else {},
            is_contended=any(source.is_open and source.share.is_contended() for source in self._sources),
            live=self.live,
        )

    def _look_at_end(self) -> int:
        """How many of the last missing chunks no source can give: a plan is about the others."""
        missing, count = self._table.missing, 0
        if any(source.refused for source in self._sources):
            while count < len(missing) and not self.is_loadable(missing[-1 - count]):
                count += 1
        self._end_s = self.chunk_compute_s(missing[-count], count) if count else 0.0
        return count

    def _left(self, standing: Collection[int], num_end: int) -> Sequence[float]:
        """See Outlook.left."""
        if not self._windows.has_windows:
            return ()
        table, layers = self._table, self._to_load()
        shares = {index: self._windows.share(layers[index]) for index in table.missing[: len(table.missing) - num_end]}
        shares.update((index, table.logs[index].share) for index in standing)
        left = list(itertools.accumulate((shares[index] for index in sorted(shares, reverse=True)), initial=0.0))
        return left[::-1]

    def _in_place(self, in_flight: Sequence[int]) -> Mapping[str, float]:
        logs, table = self._table.logs, self._table
        counts: dict[str, float] = dict(table.levels)
        for index in table.parts:
            if logs[index].state is ChunkState.FILLED:
                counts[logs[index].level] -= 1 - logs[index].share
        for index in table.decoding:
            counts[logs[index].level] = counts.get(logs[index].level, 0) + logs[index].share
        for index in in_flight:
            level = logs[index].asked_levels[-1]
            counts[level] = counts.get(level, 0) + logs[index].share
        return counts

    def queue_s(self) -> float:
        """What decoding all that is here takes."""
        logs = self._table.logs
        return sum(self._codec.seconds(logs[index].level) * logs[index].share for index in self._table.decoding)

    def _max_compute(self, num_end: int, *, has_hope: bool) -> tuple[int, float]:
        """How many chunks may be computed, and what has to be computed again for that, in seconds."""
        spec, table = self.spec, self._table
        num_left = len(table.missing) + len(table.asked) - num_end
        if not spec.may_compute or (has_hope and spec.max_compute == 0):
            return 0, 0.0
        most = left = num_left
        if has_hope and spec.max_compute is not None:
            left = max(0, spec.max_compute - table.num_computed)
            # A live source computes from the front as well: all or nothing.
            most = min(left, num_left) if not self.live or left >= num_left else 0
        if not table.parts or not most:
            return most, 0.0
        front = sorted([*table.missing, *table.asked])[:most]
        if not self.live and has_hope:
            # Those below the first that needs layers which were not loaded; if that is the very first, all again.
            below = bisect.bisect_right(front, min(table.parts))
            able = next((n for n in range(below, most) if self.lacking(front[n])), most)
            if able:
                return able, 0.0
        again = self._windows.again(front, table.parts)
        if has_hope and spec.max_compute is not None and most + len(again) > left:
            return 0, 0.0
        return most, sum(self.chunk_compute_s(index, 1) for index in again)

    # -- which layers ---------------------------------------------------------------------------------------------

    def lacking(self, chunk: int) -> list[int]:
        """The chunks in place that this one may not be computed on."""
        return self._windows.lacking(chunk, self._table.parts)

    def is_seen(self, chunk: int, position: int) -> bool:
        """Whether a query at this position or a later one sees any of it."""
        return not self._windows.has_windows or self._windows.seen(chunk, position) != ()

    def num_missing(self) -> float:
        """How many whole chunks what is missing amounts to."""
        if not self._windows.has_windows:
            return len(self._table.missing)
        layers = self._to_load()
        return sum(self._windows.share(layers[index]) for index in self._table.missing)

    def _to_load(self) -> list[Layers]:
        if self.spec.replay is None:
            refused = [source.refused for source in self._sources if source.is_open]
            if refused and not set.intersection(*refused):
                return self._for_tail  # all can be had
        return self._windows.to_load(self._has_to_be_computed)

    def _has_to_be_computed(self, chunk: int, is_seen: bool) -> bool:
        """As far as can be seen. A source that has not answered yet promises nothing."""
        if self._table.logs[chunk].state is not ChunkState.MISSING or not self.spec.may_compute:
            return False
        if self.spec.replay is not None:
            return self.spec.replay.levels[chunk] == TEXT
        return is_seen and not any(source.is_open and chunk not in source.refused for source in self._sources)

    def _live_source_s(self, now: float) -> float:
        """Until a live source has computed the last chunk. It takes about as long for a chunk as this worker would,
        and has been at the next one since the last one began to arrive."""
        logs, table = self._table.logs, self._table
        not_begun = sorted([*table.missing, *(index for index in table.asked if logs[index].first_part_at is None)])
        if not not_begun:
            return 0.0
        began = [log.first_part_at for log in logs if log.first_part_at is not None]
        asked = [log.asked_at for log in logs if log.asked_at is not None]
        since = max(began) if began else min(asked, default=now)
        left_s = max(0.0, self.chunk_compute_s(not_begun[0], len(not_begun)) - (now - since))
        # Once this worker computes, the source has been left alone: going back has to be worth it.
        return left_s * (BACK_TO_LIVE if table.num_computed or table.computing is not None else 1.0)

    def _latency_s(self, able: Sequence[FillSource], now: float) -> float:
        """Until the next byte can come. A source that has not answered yet is likely to take as long again."""
        latency_s = min((source.latency_s(now) for source in able), default=0.0)
        return latency_s if self.has_opened else max(latency_s, now - self._started_at)

    # -- asking ---------------------------------------------------------------------------------------------------

    def commands(self, plan: Plan, now: float) -> list[ev.Command]:
        table, logs = self._table, self._table.logs
        commands: list[ev.Command] = []
        self.given_up = []
        if self.live and plan.compute_chunks:
            # All is computed here; the source need not go on with what it has not begun to send.
            not_begun = [index for index in table.asked if logs[index].first_part_at is None]
            return [self.withdraw(index) for index in not_begun]
        standing = {index for source in self._sources if source.is_open for index in self.standing(source)}
        not_begun = sorted([*table.missing, *standing]) if standing else table.missing
        to_compute = set(not_begun[: plan.compute_chunks])
        # The floor comes first for all; a better level than the plan's is for one chunk.
        level = plan.first_level if plan.first_level == self.spec.levels[-1] else plan.level
        for index in list(table.asked):
            log = logs[index]
            if index in to_compute or log.asked_levels[-1] in (level, plan.first_level):
                continue  # the plan's level is for what it loads
            if index in standing:
                # It may be encoded already, at the level of the first request: then amending comes too late.
                if plan.gives_up and self._pays_anew(index, self.chunk_bytes[log.anew_level] * log.share, level):
                    commands.append(self.withdraw(index))
                    commands.append(self._ask(self._source_of(index), index, level, now))
                else:
                    commands.append(self._amend(index, level))
            elif plan.gives_up and self._pays_anew(index, log.left_bytes, level):
                # The link has become so slow that beginning again at the coarser level is faster than going on.
                self.given_up.append(index)
                source = self._source_of(index)
                commands += [self.withdraw(index), self._ask(source, index, level, now)]
        commands += self._even_out(standing - to_compute, now)
        wanted = table.missing[len(to_compute - standing) :]
        num_first = len(wanted)
        if plan.num_first is not None:
            num_first = plan.num_first - sum(logs[index].asked_levels[-1] == plan.first_level for index in standing)
        return commands + self.ask_missing(wanted, level, now, first_level=plan.first_level, num_first=num_first)

    def _even_out(self, standing: Collection[int], now: float) -> list[ev.Command]:
        """Give an idle source one of the chunks that stand at a busy one: the first to answer was asked for many."""
        idle = next((source for source in self._sources if source.is_open and source.num_asked == 0), None)
        if idle is None or not standing or self.live:
            return []
        busy = max((s for s in self._sources if s.is_open), key=lambda s: s.left_bytes / s.rate(now))
        movable = [
            index
            for index in standing
            if self._table.logs[index].source == busy.index
            and index not in idle.refused
            and idle.stored[index] is not None
        ]
        if not movable:
            return []
        index = min(movable)  # the last that the busy one would send
        size = self._table.logs[index].left_bytes
        if busy.left_bytes / busy.rate(now) <= idle.latency_s(now) + size / idle.rate(now):
            return []
        level = self._table.logs[index].asked_levels[-1]
        return [self.withdraw(index), self._ask(idle, index, level, now)]

    def ask_missing(
        self,
        wanted: Sequence[int],
        level: str | Sequence[str],
        now: float,
        *,
        first_level: str | None = None,
        num_first: int = 0,
    ) -> list[ev.Command]:
        """Ask for these missing chunks while a source has room: stored ones from the back, live ones from the front.

        level: of all of them, or by chunk; the first `num_first` that are asked for get `first_level`.
        """
        commands: list[ev.Command] = []
        layers = self._to_load()
        for index in list(wanted) if self.live else wanted[::-1]:
            wish = level if isinstance(level, str) else level[index]
            if first_level is not None and len(commands) < num_first:
                wish = first_level
            if layers[index] == ():
                continue
            num_bytes = self.chunk_bytes[wish] * self._windows.share(layers[index])
            source, is_hopeless = self._pick(index, num_bytes, now)
            if source is None and not is_hopeless:
                break
            if source is not None:
                log = self._table.logs[index]
                log.layers, log.share = layers[index], self._windows.share(layers[index])
                commands.append(self._ask(source, index, wish, now))
        if self.has_opened:
            unseen = [index for index in wanted if layers[index] == ()]
            commands += [
                self._take_nothing(index, level if isinstance(level, str) else level[index]) for index in unseen
            ]
        return commands

    def _take_nothing(self, index: int, level: str) -> ev.Decode:
        """Nobody sees this chunk: it is loaded at any level, without a byte."""
        log = self._table.logs[index]
        log.layers, log.share, log.level, log.source, log.bytes = (), 0.0, level, None, 0
        self._table.move(index, ChunkState.DECODING)
        return ev.Decode(chunk=index, level=level, blob=b"", layers=())

    def _pick(self, index: int, num_bytes: float, now: float) -> tuple[FillSource | None, bool]:
        """Who brings the chunk soonest, if that one has room; whether nobody ever will."""
        has_it = [s for s in self._sources if s.is_open and index not in s.refused]
        stored = [s for s in has_it if s.stored[index] is not None]
        best, best_s, best_rate = None, 0.0, 0.0
        for source in stored or has_it[:1]:  # what is stored nowhere is computed by the first
            rate = source.rate(now, patience_s=self._patience_s())
            time_s = (source.left_bytes + num_bytes) / rate
            if best is None or time_s < best_s:
                best, best_s, best_rate = source, time_s, rate
        if best is None:
            return None, True
        return (best if best.has_room(best_rate) else None), False

    def is_loadable(self, index: int) -> bool:
        """Whether some source may still give this chunk, or nothing of it is needed."""
        if any(source.is_hoped_for and index not in source.refused for source in self._sources):
            return True
        return self.has_opened and self._windows.has_windows and self._to_load()[index] == ()

    def _source_of(self, index: int) -> FillSource:
        at = self._table.logs[index].source
        assert at is not None
        return self._sources[at]

    def _pays_anew(self, index: int, left_bytes: float, level: str) -> bool:
        """Whether a chunk begun at another level comes sooner if it is given up and asked for at `level`.

        What is committed to the link cannot be recalled: that much comes in vain, and the new blob behind it.
        """
        committed_bytes = self._source_of(index).share.estimator.committed_bytes
        return left_bytes > REASK * (committed_bytes + self.chunk_bytes[level] * self._table.logs[index].share)

    def _ask(self, source: FillSource, index: int, level: str, now: float) -> ev.Ask:
        log = self._table.move(index, ChunkState.ASKED)
        num_bytes = self.chunk_bytes[level] * log.share
        source.ask(num_bytes, now)
        log.source, log.anew_level, log.left_bytes = source.index, level, num_bytes
        log.first_part_at, log.asked_at = None, now
        self._remember(index, level)
        return ev.Ask(source=source.index, chunk=index, level=part_name(level, log.layers))

    def _amend(self, index: int, level: str) -> ev.Ask:
        log, source = self._table.logs[index], self._source_of(index)
        num_bytes = self.chunk_bytes[level] * log.share
        source.left_bytes += num_bytes - log.left_bytes
        log.left_bytes = num_bytes
        self._remember(index, level)
        return ev.Ask(source=source.index, chunk=index, level=part_name(level, log.layers))

    def _remember(self, index: int, level: str) -> None:
        asked = self._table.logs[index].asked_levels
        asked.append(level)
        del asked[1 : len(asked) - MAX_ASKED_LEVELS + 1]  # the first and the last ones stay

    def withdraw(self, index: int) -> ev.Withdraw:
        source = self._source_of(index)
        source.forget(self._table.logs[index].left_bytes)
        self._table.move(index, ChunkState.MISSING)
        return ev.Withdraw(source=source.index, chunk=index)
