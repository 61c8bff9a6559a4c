"""Refinements of one prompt's chunks: what is asked for, on its way, and put into the pages. Pure.

Part of the fill machine. Only chunks in place are refined, from the source that gave them: a refinement continues one
encoding. Whether there is time for it is the caller's to say, in bytes.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence

from decode import fill_events as ev
from decode.fill_chunks import ChunkLog, ChunkState, ChunkTable, Refinement
from decode.fill_sources import FillSource
from decode.link_scheduler import Kind
from decode.refine import Ladder, RefineBudget, next_step
from decode.replay import ReplayStep
from prefill.chunks import REFINES, part_name, refinement_name


class Upgrades:
    """`num_waiting`: refinements asked for or being decoded; `num_here`: the latter."""

    def __init__(self, table: ChunkTable, sources: Sequence[FillSource]) -> None:
        self._table, self._sources = table, sources
        # Chunks in place that no refinement is on its way for, by level and in the order in which they came.
        self._raisable: dict[str, dict[int, None]] = {}
        self._steps: list[ReplayStep] = []  # of a followed plan, those not asked for yet
        self._due: dict[int, ReplayStep] = {}  # by chunk, those asked for
        self._has_failed_step = False
        self.num_waiting = self.num_here = 0

    def add(self, chunk: int) -> None:
        """A loaded chunk is in place."""
        self._raisable.setdefault(self._table.logs[chunk].level, {})[chunk] = None

    def forget(self, chunk: int) -> None:
        """It is in place no more."""
        self._raisable.get(self._table.logs[chunk].level, {}).pop(chunk, None)

    def drop_unless(self, is_seen: Callable[[int], bool]) -> list[ev.Command]:
        """Chunks that no window reaches any more are left as they are. A followed plan says itself what is refined."""
        commands: list[ev.Command] = []
        for index, log in self._on_their_way():
            if index not in self._due and not is_seen(index):
                commands.append(self._withdraw(index, log))
        for chunks in self._raisable.values():
            for chunk in [chunk for chunk in chunks if not is_seen(chunk)]:
                del chunks[chunk]
        return commands

    def follow(self, steps: Sequence[ReplayStep]) -> None:
        """Ask for exactly these from now on."""
        self._steps, self._raisable = list(steps), {}

    def must_wait(self, num_tokens: int) -> bool:
        """Whether a followed plan refines something before the next token."""
        return any(step.after_tokens <= num_tokens for step in [*self._steps[:1], *self._due.values()])

    @property
    def is_lost(self) -> bool:
        """Whether a step of a followed plan can never be taken."""
        return self._has_failed_step or any(not self._is_hoped_for(step.chunk) for step in self._steps)

    @property
    def is_following(self) -> bool:
        return bool(self._steps or self._due)

    # -- asking ---------------------------------------------------------------------------------------------------

    def ask(self, ladder: Ladder, budget: RefineBudget, kind: Kind, now: float) -> list[ev.Command]:
        """As many refinements as the sources have room for and the budget pays (see next_step)."""
        sure_bytes, hoped_bytes = budget.sure_bytes, budget.hoped_bytes
        logs, table = self._table.logs, self._table
        coming: defaultdict[str, float] = defaultdict(float)
        for index in table.asked:
            coming[logs[index].asked_levels[-1]] += logs[index].share
        for index in table.decoding:
            coming[logs[index].level] += logs[index].share
        commands: list[ev.Command] = []
        while any(source.is_open and source.has_room(source.rate(now)) for source in self._sources):
            if len(commands) >= budget.num_steps:
                break
            able = self._able()
            counts = {level: self._weight(chunks) for level, chunks in able.items()}
            step = next_step(ladder, counts, sure_bytes, hoped_bytes=hoped_bytes, coming=coming)
            if step is None:
                break
            have, level = step
            chunk = next((index for index in able[have] if self._can_ask(index, now)), None)
            if chunk is None:
                break
            num_bytes = ladder.step_bytes(have, level) * logs[chunk].share
            sure_bytes, hoped_bytes = sure_bytes - num_bytes, hoped_bytes - num_bytes
            commands.append(self._ask(chunk, level, num_bytes, kind, now, nested=ladder.is_nested(have, level)))
        return commands

    def _weight(self, chunks: Collection[int]) -> float:
        """How many whole chunks these amount to."""
        if not self._table.parts:
            return len(chunks)
        return sum(self._table.logs[index].share for index in chunks)

    def _able(self) -> Mapping[str, Collection[int]]:
        """The raisable chunks whose source can give more now."""
        if all(source.is_open and not source.refused for source in self._sources):
            return self._raisable
        logs = self._table.logs
        usable = [source.refused if source.is_open else None for source in self._sources]
        able: dict[str, list[int]] = {}
        for level, chunks in self._raisable.items():
            for index in chunks:
                refused = usable[logs[index].source or 0]
                if refused is not None and index not in refused:
                    able.setdefault(level, []).append(index)
        return able

    def ask_steps(self, ladder: Ladder, now: float) -> list[ev.Command]:
        """The next steps of a followed plan."""
        commands: list[ev.Command] = []
        while self._steps:
            step = self._steps[0]
            if step.chunk in self._due or not self._can_ask(step.chunk, now):
                break
            have = self._table.logs[step.chunk].level
            num_bytes = ladder.step_bytes(have, step.level) * self._table.logs[step.chunk].share
            nested = ladder.is_nested(have, step.level)
            commands.append(self._ask(step.chunk, step.level, num_bytes, Kind.LATER, now, nested=nested))
            self._due[step.chunk] = self._steps.pop(0)
        return commands

    def _can_ask(self, chunk: int, now: float) -> bool:
        at = self._table.logs[chunk].source
        assert at is not None
        source = self._sources[at]
        return source.is_open and chunk not in source.refused and source.has_room(source.rate(now))

    def _ask(self, chunk: int, level: str, num_bytes: float, kind: Kind, now: float, *, nested: bool) -> ev.Ask:
        log = self._table.logs[chunk]
        assert log.source is not None and log.state is ChunkState.FILLED and not log.upgrade
        self._raisable.get(log.level, {}).pop(chunk, None)
        name = part_name(refinement_name(log.level, level) if nested else level, log.layers)
        log.upgrade, log.upgrade_name, log.upgrade_kind, log.upgrade_asked_at = level, name, kind, now
        log.left_bytes, log.upgrade_bytes = num_bytes, 0
        self._sources[log.source].ask(num_bytes, now)
        self.num_waiting += 1
        return ev.Ask(source=log.source, chunk=chunk, level=name, kind=kind)

    def postpone(self) -> list[ev.Command]:
        """The first token waits no longer: what is still on its way for it goes behind what others wait for."""
        commands: list[ev.Command] = []
        for index, log in self._on_their_way():
            log.upgrade_kind = Kind.LATER
            assert log.source is not None
            commands.append(ev.Ask(source=log.source, chunk=index, level=log.upgrade_name, kind=Kind.LATER))
        return commands

    def withdraw(self) -> list[ev.Command]:
        """No refinement is wanted any more; what is being decoded still goes into the pages."""
        commands = self.recall(len(self._table))
        self._raisable.clear()
        return commands

    def recall(self, stop: int) -> list[ev.Command]:
        """Withdraw what is on its way for the chunks before `stop`; they may be refined another time."""
        commands: list[ev.Command] = []
        for index, log in self._on_their_way():
            if index < stop:
                commands.append(self._withdraw(index, log))
        return commands

    def _withdraw(self, chunk: int, log: ChunkLog) -> ev.Withdraw:
        assert log.source is not None
        self._sources[log.source].forget(log.left_bytes)
        self._end(log)
        self.add(chunk)
        return ev.Withdraw(source=log.source, chunk=chunk)

    def _on_their_way(self) -> list[tuple[int, ChunkLog]]:
        if not self.num_waiting:
            return []
        return [(i, log) for i, log in enumerate(self._table.logs) if log.upgrade and not log.is_upgrade_here]

    # -- what happens to them -------------------------------------------------------------------------------------

    def arrived(self, event: ev.BlobArrived) -> list[ev.Command]:
        log = self._table.logs[event.chunk]
        self._sources[event.source].forget(log.left_bytes)
        log.left_bytes = 0.0
        if event.level != log.upgrade_name:
            self._end(log)  # not what was asked for: leave the chunk as it is
            self._has_failed_step |= self._due.pop(event.chunk, None) is not None
            return []
        log.is_upgrade_here, log.upgrade_bytes = True, len(event.blob)
        self.num_here += 1
        step = self._due.get(event.chunk)
        return [
            ev.Refine(
                chunk=event.chunk,
                level=log.upgrade,
                blob=event.blob,
                coarse=log.blob if REFINES in log.upgrade_name else None,
                layers=log.layers,
                after_tokens=step.after_tokens if step is not None else None,
            )
        ]

    def refined(self, event: ev.Refined, now: float) -> None:
        log = self._table.logs[event.chunk]
        assert log.is_upgrade_here
        log.refinements.append(
            Refinement(
                level=log.upgrade,
                bytes=log.upgrade_bytes,
                asked_at=log.upgrade_asked_at,
                applied_at=now,
                after_tokens=event.after_tokens,
            )
        )
        self._table.levels[log.level] -= 1
        self._table.levels[log.upgrade] += 1
        log.level, log.blob = log.upgrade, event.blob
        self._end(log)
        self._due.pop(event.chunk, None)
        if not self.is_following:
            self.add(event.chunk)

    def failed(self, chunk: int) -> None:
        """Refused by the source, or damaged: the chunk stays as it is."""
        log = self._table.logs[chunk]
        if not log.is_upgrade_here and log.source is not None:
            self._sources[log.source].forget(log.left_bytes)
        self._end(log)
        self._has_failed_step |= self._due.pop(chunk, None) is not None

    def source_lost(self, source: FillSource) -> None:
        """What was asked of it will not come; it is asked for again if the source comes back."""
        for index, log in self._on_their_way():
            if log.source == source.index:
                step = self._due.pop(index, None)
                if step is not None:
                    self._steps.insert(0, step)
                else:
                    self.add(index)
                self._end(log)
        self._steps.sort(key=lambda step: step.after_tokens)

    def _end(self, log: ChunkLog) -> None:
        self.num_here -= log.is_upgrade_here
        log.upgrade, log.upgrade_name, log.is_upgrade_here, log.left_bytes = "", "", False, 0.0
        self.num_waiting -= 1

    def is_anything_left(self, ladder: Ladder) -> bool:
        """Whether a chunk could still be refined, now or when its source comes back."""
        return any(
            level in ladder.levels[1:] and any(self._is_hoped_for(index) for index in chunks)
            for level, chunks in self._raisable.items()
        )

    def _is_hoped_for(self, chunk: int) -> bool:
        at = self._table.logs[chunk].source
        return at is not None and self._sources[at].is_hoped_for and chunk not in self._sources[at].refused
