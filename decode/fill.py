"""One prompt's KV on its way into pages: the machine that carries out the controller's plans. Pure.

Chunks are loaded from the back while the worker computes from the front, in parallel, until they meet (two-ended fill).
While the source itself still computes the prompt (live prefill), chunks are loaded from the front. What time is left
before the deadline goes into refinements, and after the first token these go on as long as the link has room.
decode/plan.py chooses levels and the meeting point, decode/refine.py the refinements, anew at every event.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from decode import fill_events as ev
from decode.estimator import CodecEstimator, ComputeEstimator
from decode.fill_chunks import TEXT, ChunkLog, ChunkState, ChunkTable, FrontState
from decode.fill_loading import IDLE_ENGINE, EngineLoad, FillSpec, Loader
from decode.fill_reasons import plan_in_words, why_infeasible
from decode.fill_sources import OPEN_TIMEOUT_S, FillSource, SourceState
from decode.fill_upgrades import Upgrades
from decode.link_scheduler import Kind, LinkShare
from decode.plan import Plan, choose
from decode.refine import UNLIMITED, Ladder
from prefill.chunks import part_name

MAX_BAD_BLOBS = 3  # of one source
# Parts come by the thousand on a fast link and change little; whole blobs and all else lead to a new plan at once.
PLAN_EVERY_S = 0.005
# What ticks are for: silence of a link for so long, and a plan that is so old.
QUIET_S, REPLAN_S = 0.015, 0.25
MAX_REASONS = 200
LEAST_WAIT_S = 0.001  # what is left of the time for refinements then is too little for any


class FillMachine:
    """See the module's docstring. The estimators are the worker's, shared by all its requests.

    `ready`: all chunks are in place and the tail may run. `done`: nothing more will come. `wake_at`: when to be told
    the time at the latest; None: whenever.
    """

    def __init__(
        self,
        spec: FillSpec,
        *,
        now: float,
        sources: Sequence[LinkShare],
        compute: ComputeEstimator,
        codec: CodecEstimator,
        load: Callable[[], EngineLoad] = lambda: IDLE_ENGINE,
    ) -> None:
        assert sources or spec.may_compute
        self.spec = spec
        self.sources = [FillSource(index=i, share=share, since=now) for i, share in enumerate(sources)]
        self.table = ChunkTable(spec.num_chunks, num_cached=spec.num_cached, now=now)
        self.loader = Loader(spec, self.table, self.sources, compute=compute, codec=codec, now=now)
        self.upgrades = Upgrades(self.table, self.sources)
        self.front = FrontState.KEPT if spec.front_stop else FrontState.ABSENT
        self.front_at: float | None = None  # when it was in place
        self.front_s: float | None = None  # what that took
        assert not (spec.front_stop and spec.replay is not None), "a plan that is given shares nothing"
        self.reasons: list[tuple[float, str]] = []
        self.plan: Plan | None = None
        self.ready = self.done = self._has_first_token = False
        self._first_token_at = 0
        self.received_bytes = 0  # all that came over the links, also what was not used in the end
        self.num_decisions = 0
        self.wake_at: float | None = None
        self._codec, self._load = codec, load
        self._planned_at = now

    @property
    def chunks(self) -> list[ChunkLog]:
        return self.table.logs

    @property
    def live(self) -> bool:
        return self.loader.live

    def start(self, now: float) -> list[ev.Command]:
        """The first commands. A fill that may load waits for `Opened` unless computing is the plan anyway."""
        commands: list[ev.Command] = [ev.Open(source=source.index) for source in self.sources]
        if self.spec.front_chunk == self.spec.num_chunks:
            commands.append(self._load_front())  # the tail's: while the sources answer
        return [*commands, *self._replan(now)]

    def handle(self, event: ev.Event, now: float) -> list[ev.Command]:
        if self.done:
            return []
        commands: list[ev.Command] = []
        match event:
            case ev.Opened():
                self._on_opened(event, now)
            case ev.PartArrived():
                self._on_part(event, now)
            case ev.BlobArrived():
                commands += self._on_blob(event, now)
            case ev.BlobDecoded():
                self._on_decoded(event, now)
            case ev.BlobRejected():
                self._reject(event.chunk, event.reason, now)
            case ev.Refined():
                log = self.chunks[event.chunk]
                self._codec.observe(log.upgrade, event.seconds / log.share)
                self.upgrades.refined(event, now)
                if self._has_first_token:
                    position = self._first_token_at + event.after_tokens - 1
                    commands += self.upgrades.drop_unless(lambda chunk: self.loader.is_seen(chunk, position))
            case ev.RefinementRejected():
                self._note(now, f"chunk {event.chunk}: not refined ({event.reason})")
                self.upgrades.failed(event.chunk)
                self._count_bad(self.chunks[event.chunk], event.reason, now)
            case ev.ChunkComputed():
                self.chunks[event.chunk].level = TEXT
                self._fill(event.chunk, now)
            case ev.FrontLoaded():
                self.front, self.front_at, self.front_s = FrontState.IN_PLACE, now, event.seconds
                commands += self._after_front()
            case ev.FrontRejected():
                self._note(now, f"part of a stored chunk: computed ({event.reason})")
                self.front = FrontState.ABSENT
                commands += self._after_front()
            case ev.ChunkRefused():
                self._on_refused(event, now)
            case ev.SourceLost():
                self._on_lost(self.sources[event.source], event.reason, now, is_final=event.is_final)
            case ev.FirstToken():
                self._has_first_token, self._first_token_at = True, event.position
                commands += self.upgrades.drop_unless(lambda chunk: self.loader.is_seen(chunk, event.position))
            case ev.Tick():
                if not self._is_due(now):
                    return []
        if isinstance(event, ev.PartArrived) and now - self._planned_at < PLAN_EVERY_S:
            return commands
        return commands + self._replan(now)

    def _is_due(self, now: float) -> bool:
        """Whether time alone is a reason for a new plan: no source has answered, a link that owes something is silent,
        a moment was waited for, or the last plan is old. Ticks come to every fill of a worker, many times a second."""
        if (
            not self.loader.has_opened
            or now - self._planned_at >= REPLAN_S
            or (self.wake_at is not None and self.wake_at <= now)
        ):
            return True
        # The longer the silence, the less another moment of it says.
        return any(quiet_s > QUIET_S and now - self._planned_at >= 0.25 * quiet_s for quiet_s in self._quiet_s(now))

    def _quiet_s(self, now: float) -> list[float]:
        return [source.quiet_s(now) for source in self.sources]

    def may_step(self, num_tokens: int) -> bool:
        """Whether the request may compute the token after `num_tokens`. Only a plan that is followed ever waits."""
        return self.done or not self.upgrades.must_wait(num_tokens)

    @property
    def front_stop(self) -> int:
        """Tokens before it need not be computed, in the chunk or tail where it lies; 0: no front is in place."""
        return self.spec.front_stop if self.front is FrontState.IN_PLACE else 0

    @property
    def num_front_tokens(self) -> int:
        """How many tokens it has put in place."""
        start, _ = self.spec.to_compute(self.spec.front_chunk)
        return max(0, self.front_stop - start)

    def to_compute(self, chunk: int) -> tuple[int, int]:
        """The tokens [start, stop) of a chunk that have to be computed."""
        start, stop = self.spec.to_compute(chunk)
        return (max(start, self.front_stop), stop) if chunk == self.spec.front_chunk else (start, stop)

    def base_kl(self, chunk: int) -> float:
        """The promise of the KV that a loaded chunk was encoded from."""
        log = self.chunks[chunk]
        if log.layers == ():
            return 0.0  # nothing of it was loaded
        assert log.source is not None
        kls = self.sources[log.source].kl
        return kls[chunk] if kls else 0.0

    def check_integrity(self) -> None:
        """Counts add up. Run at every test's end."""
        self.table.check_integrity()
        for source in self.sources:
            waiting = sum(
                log.upgrade != "" and not log.is_upgrade_here and log.source == source.index for log in self.chunks
            )
            assert source.num_asked == sum(1 for _ in self.table.asked_of(source.index)) + waiting, source
        assert self.upgrades.num_waiting == sum(log.upgrade != "" for log in self.chunks)

    # -- events ---------------------------------------------------------------------------------------------------

    def _on_opened(self, event: ev.Opened, now: float) -> None:
        assert len(event.stored_bytes) == self.spec.num_chunks
        source = self.sources[event.source]
        if not source.is_hoped_for:
            return  # given up meanwhile
        source.state, source.stored, source.since = SourceState.OPEN, event.stored_bytes, now
        source.encode_s, source.kl = event.encode_s, event.kl
        if not event.computes:
            source.refused.update(i for i, sizes in enumerate(event.stored_bytes) if sizes is None)
        self.loader.opened(source)

    def _on_part(self, event: ev.PartArrived, now: float) -> None:
        source, log = self.sources[event.source], self.chunks[event.chunk]
        link = source.share.link
        self.received_bytes += event.part_bytes
        link.estimator.on_part(event.part_bytes, event.wire_s)
        is_ours = log.source == event.source
        if is_ours and log.state is ChunkState.ASKED:
            if log.first_part_at is None:
                log.first_part_at = now
                # Only what an idle link was asked for says how long the way is.
                asked_at = log.asked_at
                if asked_at is not None and source.moved_at == asked_at >= link.moved_at and not self.live:
                    link.estimator.on_first_part(now - asked_at)
            log.bytes = event.total_bytes
        link.moved_at = now
        if source.num_asked:
            source.moved_at, source.has_answered = now, True
        if is_ours and (log.state is ChunkState.ASKED or (log.upgrade and not log.is_upgrade_here)):
            left_bytes = float(event.total_bytes - event.received_bytes)
            source.left_bytes = max(0.0, source.left_bytes + left_bytes - log.left_bytes)
            log.left_bytes = left_bytes

    def _on_blob(self, event: ev.BlobArrived, now: float) -> list[ev.Command]:
        log = self.chunks[event.chunk]
        if log.source != event.source:
            return []
        if log.upgrade:
            return [] if log.is_upgrade_here else self.upgrades.arrived(event)
        if log.state is not ChunkState.ASKED:
            return []  # computed in the meantime; the withdrawal crossed it
        self.sources[event.source].forget(log.left_bytes)
        self.table.move(event.chunk, ChunkState.DECODING)
        acceptable = (level for level in self._acceptable(event.chunk) if level in self.spec.chunk_bytes)
        level = next((level for level in acceptable if part_name(level, log.layers) == event.level), None)
        if level is None:
            self._reject(event.chunk, f"level {event.level!r} was not asked for", now)
            return []
        log.level, log.bytes, log.arrived_at = level, len(event.blob), now
        log.blob = event.blob if level in self.spec.nested else None  # else no refinement continues it
        # What really came is the best prediction for the next chunk of that level.
        sizes = self.loader.chunk_bytes
        sizes[level] += 0.5 * (len(event.blob) / log.share - sizes[level])
        return [ev.Decode(chunk=event.chunk, level=level, blob=event.blob, layers=log.layers)]

    def _acceptable(self, chunk: int) -> Sequence[str]:
        return self.spec.levels if self.spec.replay is None else (self.spec.replay.levels[chunk],)

    def _on_decoded(self, event: ev.BlobDecoded, now: float) -> None:
        log = self.chunks[event.chunk]
        log.decode_s = event.seconds
        self._fill(event.chunk, now)
        if log.layers == ():  # nothing of it is seen: nothing came
            return
        self._codec.observe(log.level, event.seconds / log.share)
        self.upgrades.add(event.chunk)
        assert log.source is not None
        self.sources[log.source].used(now)

    def _fill(self, chunk: int, now: float) -> None:
        self.table.move(chunk, ChunkState.FILLED).filled_at = now

    def _reject(self, chunk: int, reason: str, now: float) -> None:
        log = self.table.move(chunk, ChunkState.MISSING)
        log.level, log.first_part_at, log.blob = "", None, None
        log.bad_blobs += 1
        self._note(now, f"chunk {chunk}: bad blob, asked for again ({reason})")
        self._count_bad(log, reason, now)

    def _count_bad(self, log: ChunkLog, reason: str, now: float) -> None:
        assert log.source is not None
        source = self.sources[log.source]
        source.bad_blobs += 1
        if source.bad_blobs > MAX_BAD_BLOBS:
            self._on_lost(source, f"{source.bad_blobs} damaged blobs; the last: {reason}", now, is_final=True)

    def _on_refused(self, event: ev.ChunkRefused, now: float) -> None:
        source, log = self.sources[event.source], self.chunks[event.chunk]
        source.refused.add(event.chunk)
        self._note(now, f"chunk {event.chunk}: refused by its source ({event.reason})")
        if log.source != event.source:
            return
        if log.state is ChunkState.ASKED:
            self.loader.withdraw(event.chunk)
        elif log.upgrade and not log.is_upgrade_here:
            self.upgrades.failed(event.chunk)

    def _on_lost(self, source: FillSource, reason: str, now: float, *, is_final: bool) -> None:
        if not source.is_hoped_for:
            return
        for index in list(self.table.asked_of(source.index)):
            self.loader.withdraw(index)
        self.upgrades.source_lost(source)
        source.lose(now, is_final=is_final)
        given_up = "" if source.is_hoped_for else ", given up"
        self._note(now, f"source {source.index} lost{given_up}: {reason}")
        self.loader.see_whether_live()

    # -- what to do next ------------------------------------------------------------------------------------------

    def _replan(self, now: float) -> list[ev.Command]:
        self._planned_at, self.wake_at = now, None
        self.num_decisions += 1
        commands = self._next_commands(now)
        if self.done:
            for log in self.chunks:
                log.blob = None  # the machine is kept as long as the answer is, for its receipt
        self._tell_needs()
        return commands

    def _next_commands(self, now: float) -> list[ev.Command]:
        commands = self._revive(now)
        if not self.table.is_filled:
            if not self.spec.may_compute and not any(source.is_hoped_for for source in self.sources):
                return [self._fail("kv_transfer_failed", "The prompt's KV could not be loaded")]
            if self.spec.replay is not None:
                commands += self._follow(now)
            elif not self.table.is_here:
                commands += self._carry_out_plan(now)
            else:
                commands += self._compute(now, is_wanted=False)
        if not self.done:
            commands += self._refine(now)
        return commands

    def _revive(self, now: float) -> list[ev.Command]:
        """Lost sources are opened again after a while; those that do not answer are given up."""
        commands: list[ev.Command] = []
        for source in self.sources:
            if source.state is SourceState.OPENING and now - source.since >= OPEN_TIMEOUT_S:
                self._on_lost(source, "the source did not answer", now, is_final=True)
            elif source.state is SourceState.LOST and now >= source.retry_at:
                source.state = SourceState.OPENING
                commands.append(ev.Open(source=source.index))
            if source.state is SourceState.OPENING:
                self._wake(source.since + OPEN_TIMEOUT_S)
            if source.state is SourceState.LOST:
                self._wake(source.retry_at)
        return commands

    def _carry_out_plan(self, now: float) -> list[ev.Command]:
        loader, spec = self.loader, self.spec
        has_hope = any(source.is_hoped_for for source in self.sources)
        outlook = loader.outlook(now, self._load())
        if outlook.bytes_per_s <= 0 and not outlook.max_compute:
            # A source may come back; until then there is nothing to choose.
            return self._compute(now, is_wanted=False)
        plan = choose(spec.levels, outlook, loader.budget_s(now), current=self.plan)
        if has_hope and not loader.has_opened and not plan.compute_chunks:
            return []  # nothing to do before the source answers, unless the link is known to be slow
        if self.plan is None and not plan.meets_target and loader.has_target and has_hope:
            if spec.infeasible == "reject":
                left_s = max(0.0, loader.budget_s(now))
                why = why_infeasible(plan, left_s=left_s, floor=spec.levels[-1])
                return [self._fail("slo_infeasible", why, status=503)]
            if spec.infeasible == "text" and spec.may_compute:
                for source in self.sources:
                    self._on_lost(
                        source, "the floor cannot be in time, and the policy then wants text", now, is_final=True
                    )
                outlook = loader.outlook(now, self._load())
                plan = choose(spec.levels, outlook, loader.budget_s(now))
        if outlook.num_missing:
            self._note_plan(plan, now)
        self.plan = plan
        commands = self._compute(now, is_wanted=plan.compute_chunks > 0)
        if self.done:
            return commands
        num_again = sum(isinstance(command, ev.Discard) for command in commands)
        if num_again and plan.compute_chunks:
            plan = replace(plan, compute_chunks=plan.compute_chunks + num_again)
        commands += loader.commands(plan, now)
        for index in loader.given_up:
            self._note(now, f"chunk {index}: given up, asked for anew at {self.chunks[index].asked_levels[-1]}")
        return commands

    def _compute(self, now: float, *, is_wanted: bool) -> list[ev.Command]:
        """Compute the frontier's chunk, if the plan wants it or no source can give it."""
        if self.table.computing is not None or self.table.is_filled:
            return []
        frontier = self.table.frontier
        log = self.chunks[frontier]
        if log.state is ChunkState.DECODING or not (is_wanted or not self.loader.is_loadable(frontier)):
            return []  # in place in a moment, or to be loaded
        if not self.spec.may_compute:
            return [self._fail("kv_transfer_failed", f"Chunk {frontier} of the prompt's KV could not be loaded")]
        commands: list[ev.Command] = []
        if log.state is ChunkState.ASKED:
            commands.append(self.loader.withdraw(frontier))
        # It rests on what lies before it, so nothing of that may change any more before the first token.
        commands += self.upgrades.recall(frontier)
        if self.upgrades.num_waiting and any(log.upgrade for log in self.chunks[:frontier]):
            return commands  # being decoded
        lacking = self.loader.lacking(frontier)
        if lacking:
            for index in lacking:
                self.upgrades.forget(index)
                self.table.reopen(index)
                commands.append(ev.Discard(chunk=index))
            self._note(now, f"chunks {lacking}: had anew, chunk {frontier} needs layers that were not loaded")
            return commands + self._compute(now, is_wanted=is_wanted)
        self.table.move(frontier, ChunkState.COMPUTING).compute_at = now
        if frontier == self.spec.front_chunk and self.front is FrontState.KEPT:
            return [*commands, self._load_front()]
        return [*commands, ev.Compute(chunk=frontier)]

    def _load_front(self) -> ev.LoadFront:
        self.front = FrontState.LOADING
        return ev.LoadFront()

    def _after_front(self) -> list[ev.Command]:
        """A chunk's is loaded for the computing of its rest; for the tail's, only `Ready` has to wait."""
        computing = self.table.computing
        return [] if computing is None or computing != self.spec.front_chunk else [ev.Compute(chunk=computing)]

    def _follow(self, now: float) -> list[ev.Command]:
        """The same for a plan that was given."""
        replay = self.spec.replay
        assert replay is not None
        frontier = self.table.frontier
        is_text = replay.levels[frontier] == TEXT
        if not is_text and not self.loader.is_loadable(frontier):
            return [self._fail("plan_not_followed", f"Chunk {frontier} of the given plan could not be loaded")]
        commands = self._compute(now, is_wanted=is_text)
        if self.loader.has_opened and not self.done:
            wanted = [index for index in self.table.missing if replay.levels[index] != TEXT]
            commands += self.loader.ask_missing(wanted, replay.levels, now)
        return commands

    def _refine(self, now: float) -> list[ev.Command]:
        """Spend what time is left before the first token; say when that one may be computed; go on after it."""
        loader, upgrades, spec = self.loader, self.upgrades, self.spec
        if spec.replay is not None:
            return self._refine_as_given(now)
        commands: list[ev.Command] = []
        if not self.ready:
            budget_s = loader.budget_s(now)
            # What is computed rests on what lies before it: refining that would leave no level that holds for both.
            if budget_s > 0 and self.table.last_computed < self.table.first_loaded and not self.table.missing:
                ladder = self._ladder(spec.levels)
                commands += upgrades.ask(
                    ladder, loader.refine_budget(ladder, upgrades, budget_s, now), Kind.BETTER, now
                )
            if not self.table.is_filled or self.front is FrontState.LOADING:
                return commands
            if upgrades.num_waiting and budget_s > LEAST_WAIT_S:
                self._wake(loader.deadline())
                return commands
            commands += self._become_ready()
            if not spec.refine_levels:
                commands += upgrades.withdraw()
            commands += upgrades.postpone()
        if spec.refine_levels and not self._has_first_token:
            return commands  # decoding would take cores from the tail
        if spec.refine_levels:
            commands += upgrades.ask(self._ladder(spec.refine_levels), UNLIMITED, Kind.LATER, now)
        if not upgrades.num_waiting and not (
            spec.refine_levels and upgrades.is_anything_left(self._ladder(spec.refine_levels))
        ):
            self.done = True
        return commands

    def _refine_as_given(self, now: float) -> list[ev.Command]:
        assert self.spec.replay is not None
        if not self.table.is_filled:
            return []
        commands: list[ev.Command] = []
        if not self.ready:
            self.upgrades.follow(self.spec.replay.steps)
            commands += self._become_ready()
        commands += self.upgrades.ask_steps(self._ladder(tuple(self.spec.chunk_bytes)), now)
        if self.upgrades.is_lost:
            return [self._fail("plan_not_followed", "A refinement of the given plan could not be loaded")]
        self.done = not self.upgrades.is_following
        return commands

    def _ladder(self, levels: tuple[str, ...]) -> Ladder:
        return Ladder.of(levels, self.loader.chunk_bytes, nested=self.spec.nested, exact=self.spec.exact)

    def _become_ready(self) -> list[ev.Command]:
        self.ready = True
        for log in self.chunks:
            log.first_level = log.level
        return [ev.Ready()]

    def _fail(self, code: str, what: str, *, status: int = 502) -> ev.Fail:
        self.done = True
        why = f" ({self.reasons[-1][1]})" if self.reasons and status == 502 else ""
        return ev.Fail(code=code, message=f"{what}{why}.", status=status)

    def _wake(self, at: float) -> None:
        self.wake_at = at if self.wake_at is None else min(self.wake_at, at)

    def _tell_needs(self) -> None:
        """What other transfers over the same links have to reckon with."""
        opened = [source for source in self.sources if source.is_open]
        level = self.spec.levels[-1] if self.spec.levels else ""
        missing_bytes = self.loader.num_missing() * self.loader.chunk_bytes.get(level, 0.0) / max(len(opened), 1)
        for source in self.sources:
            share = source.share
            share.base_bytes = share.refine_bytes = 0.0
            if not source.is_open or self.done:
                continue
            if self.table.is_here:
                share.refine_bytes = source.left_bytes
            else:
                share.base_bytes = missing_bytes + source.left_bytes

    # -- why ------------------------------------------------------------------------------------------------------

    def _note(self, now: float, reason: str) -> None:
        if len(self.reasons) < MAX_REASONS:
            self.reasons.append((now, reason))

    def _note_plan(self, plan: Plan, now: float) -> None:
        old = self.plan
        if old is not None and old.level == plan.level and (old.compute_chunks > 0) == (plan.compute_chunks > 0):
            return
        left_s, rate = self.loader.budget_s(now), self.loader.rate(now)
        self._note(now, plan_in_words(plan, left_s=left_s, floor=self.spec.levels[-1], bytes_per_s=rate))
