"""Continuous batching: who is admitted, which rows the next forward pass computes, who gives way when pages run out.
Pure bookkeeping: no tensors, no clock. The rules and what they guarantee: docs/scheduler.md.

A request waits (waiting_queue.py), and once admitted its sequence is FILLING (its prompt's chunks are loaded or
computed, decode/fill.py decides), then TAIL (the last prompt tokens run), then RUNNING (one row a step), then ENDED.
From each of the three it may be PREEMPTED: it waits again, with its output, and fills again when it is back.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping

from decode.fair_share import FairShare, TenantShare
from decode.scheduling_policy import SchedulingPolicy
from decode.sequence import Phase, Row, Sequence
from decode.victims import Lack, Victims
from decode.waiting_queue import QueueRefused, Room, Waiting, WaitingQueue

__all__ = [
    "Lack",
    "Phase",
    "QueueRefused",
    "Row",
    "Scheduler",
    "SchedulingPolicy",
    "Sequence",
    "TenantShare",
    "Waiting",
]


class Scheduler:
    """Holds the requests of one worker. The caller tells it what happened and carries out what it plans.

    num_blocks: of the worker's pool, which shares are shares of; 0 if it is not known, then no share may have one.
    blocks_for: how many blocks so many tokens of a sequence need; default: one for every `block_tokens`.
    """

    def __init__(
        self,
        policy: SchedulingPolicy | None = None,
        *,
        num_blocks: int = 0,
        block_tokens: int = 16,
        blocks_for: Callable[[int], int] | None = None,
    ) -> None:
        self._policy = policy or SchedulingPolicy()
        self._num_blocks = num_blocks
        self._fair = FairShare({}, default=TenantShare())
        self._queue = WaitingQueue(self._policy, self._fair)
        self._sequences: dict[str, Sequence] = {}  # admitted
        self._victims = Victims(
            self._sequences,
            self._policy,
            self._fair,
            num_blocks=num_blocks,
            blocks_for=blocks_for or (lambda num_tokens: -(-num_tokens // block_tokens)),
        )
        self._step = 0
        self.num_preemptions = 0  # so far
        self.set_shares(self._policy.shares, default=self._policy.default_share)

    def set_shares(self, shares: Mapping[str, TenantShare], *, default: TenantShare) -> None:
        """Weights and quotas from now on; who waits or runs stays."""
        has_share = any(share.max_blocks_share is not None for share in (default, *shares.values()))
        assert self._num_blocks or not has_share, "a share of an unknown number of blocks"
        self._fair.set_shares(shares, default=default)

    # -- what is there --------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        """Admitted sequences."""
        return len(self._sequences)

    def all(self) -> list[Sequence]:
        """Admitted sequences: those that hold pages. Preempted ones wait; some may not have given theirs back yet."""
        return list(self._sequences.values())

    def waiting(self) -> list[Waiting]:
        return self._queue.all()

    def get(self, key: str) -> Sequence | None:
        """Admitted or preempted; None if it has not begun."""
        found = self._queue.get(key)
        return self._sequences.get(key) if found is None else found.sequence

    def in_phase(self, phase: Phase) -> list[Sequence]:
        """Of the admitted."""
        return [sequence for sequence in self._sequences.values() if sequence.phase is phase]

    @property
    def is_any_running(self) -> bool:
        return any(sequence.phase is Phase.RUNNING for sequence in self._sequences.values())

    def service(self, tenant: str) -> float:
        """Tokens over weight, as fairness counts them."""
        self._settle()
        return self._fair.counter(tenant)

    # -- admission ------------------------------------------------------------------------------------------------

    def add_waiting(
        self,
        key: str,
        *,
        arrival: int,
        now: float,
        num_prompt: int,
        max_tokens: int,
        tenant: str = "",
        priority: int = 0,
        deadline: float | None = None,
    ) -> Waiting:
        """A new request. deadline: of its first token; None is now. Raises QueueRefused, see there."""
        assert key not in self._sequences and num_prompt > 0 and max_tokens > 0
        total = num_prompt + max_tokens
        self._queue.check_new(
            tenant=tenant,
            priority=priority,
            max_total_blocks=self._victims.blocks_for(total),
            share_blocks=self._victims.share_blocks(tenant),
        )
        waiting = Waiting(
            key=key,
            tenant=tenant,
            priority=priority,
            arrival=arrival,
            deadline=now if deadline is None else deadline,
            num_tokens=num_prompt + 1,
            max_total_tokens=total,
            since=now,
        )
        self._settle()
        self._queue.put(waiting, present=self._tenants())
        return waiting

    def next_to_admit(
        self,
        now: float,
        has_room: Callable[[Waiting], bool],
        *,
        is_deferred: Callable[[Waiting], bool] = lambda waiting: False,
        lacks: Callable[[Waiting], Lack | None] = lambda waiting: None,
        spill: Callable[[Sequence], None] = lambda sequence: None,
    ) -> Waiting | None:
        """Who is admitted now; it leaves the queue. The caller gives it pages and `add`s its sequence, then asks again.

        has_room: whether pages for `num_tokens` tokens, and whatever else a request needs, are there. It may take them:
        the one for which it returns True is the one that is returned.
        is_deferred: whether a request waits of its own accord, say for a prefix that another one is just computing.
        Others pass it freely, so that must come to an end.
        lacks: what a request without room lacks; None: what preempting others does not give. They are preempted for it
        if it is first, was given a more urgent priority than they have, and they have enough; never those that were
        preempted `max_preemptions` times. spill: as in `rows_with_pages`.
        """
        self._settle()
        return self._queue.take_next(
            now,
            self._top(),
            has_room=has_room,
            is_deferred=is_deferred,
            is_within_quota=self._is_within_quota,
            make_room=lambda waiting: self._make_room(waiting, now, has_room, lacks, spill),
        )

    def may_preempt_for_waiting(self) -> bool:
        """Whether anybody who waits could make somebody give way who is admitted. To be asked before each step, when
        nobody's pages are in use, and if so, `next_to_admit`."""
        best, top = self._queue.best_priority(), self._top()
        if best is None:
            return False
        return any(self._victims.may_give_way_to(best, sequence, top) for sequence in self._sequences.values())

    def add(self, sequence: Sequence, waiting: Waiting | None = None) -> None:
        """It is admitted, as `waiting` if it came through the queue. A preempted one is FILLING again: up to its
        `num_tokens` with the output so far."""
        assert sequence.key not in self._sequences and self._queue.get(sequence.key) is None
        if waiting is not None:
            assert (waiting.key, waiting.tenant) == (sequence.key, sequence.tenant)
            sequence.priority, sequence.waited_s = waiting.priority, waiting.credit_s + waiting.gain_s
        self._sequences[sequence.key] = sequence
        if sequence.phase is Phase.PREEMPTED:
            sequence.phase = Phase.FILLING
            if sequence.num_preempted >= self._policy.max_preemptions:
                headroom = self._policy.headroom_tokens(sequence.num_preempted)
                sequence.protected_until = len(sequence.output) + headroom
        else:
            self._fair.charge(sequence.tenant, len(sequence.request.token_ids))

    def remove(self, key: str) -> Sequence | None:
        """It ended, in whatever state it was. None if it had not begun."""
        waiting = self._queue.pop(key)
        sequence = self._sequences.pop(key) if waiting is None else waiting.sequence
        if sequence is not None:
            self._charge(sequence)
            sequence.phase = Phase.ENDED
        return sequence

    # -- the next step --------------------------------------------------------------------------------------------

    def work_before(self, sequence: Sequence) -> list[tuple[int, int]]:
        """Prompt tokens [start, stop) of others that are computed before this sequence's turn comes."""
        top = self._top()
        ours = self._turn(sequence, top)
        return [
            other.work for other in self._sequences.values() if other.work is not None and self._turn(other, top) < ours
        ]

    def next_rows(self, prompt_tokens: int) -> list[Row]:
        """The rows of the next step: running sequences, all of them or `max_rows` in turn, then at most `prompt_tokens`
        tokens of prompts, the most urgent first."""
        self._step += 1
        rows = []
        for sequence in self._running():
            last = sequence.num_tokens - 1
            rows.append(Row(sequence=sequence, start=last, stop=last + 1, sample=True))
        top = self._top()
        with_work = [sequence for sequence in self._sequences.values() if sequence.work is not None]
        is_first = True
        for sequence in sorted(with_work, key=lambda item: self._turn(item, top)):
            assert sequence.work is not None
            start, stop = sequence.work
            least = 1 if is_first else min(self._policy.min_slice_tokens, stop - start)
            if prompt_tokens < least:
                continue  # a shorter piece further back may fit
            end = min(stop, start + prompt_tokens)
            prompt_tokens -= end - start
            is_first = False
            is_last = sequence.phase is Phase.TAIL and end == stop
            rows.append(Row(sequence=sequence, start=start, stop=end, sample=is_last))
        for row in rows:
            row.sequence.last_step = self._step
        return rows

    def computed(self, row: Row) -> bool:
        """A prompt row is done; whether that finishes the sequence's piece of work."""
        sequence = row.sequence
        assert sequence.work is not None and sequence.work[0] == row.start
        sequence.work = None if row.stop == sequence.work[1] else (row.stop, sequence.work[1])
        return sequence.work is None

    # -- pages ----------------------------------------------------------------------------------------------------

    def blocks_needed(self, rows: list[Row]) -> list[tuple[Sequence, int]]:
        """How many blocks each of these rows' sequences lacks, of those that lack some; the least likely victim first,
        so that blocks are not given to who gives them up in the same step."""
        lacking = [
            (row.sequence, missing)
            for row in rows
            if (missing := self._victims.blocks_for(row.stop) - len(row.sequence.block_table)) > 0
        ]
        if len(lacking) < 2:
            return lacking
        likely = self._victims.likelihood(self._top())
        return sorted(lacking, key=lambda item: likely(item[0]))

    def may_grow(self, sequence: Sequence, num_blocks: int) -> bool:
        """Whether its tenant's share of the blocks allows it. It always does if no other of the tenant has blocks: the
        share may have been lowered since it was admitted."""
        return self._victims.may_grow(sequence, num_blocks)

    def choose_victim(self, needs: Sequence, num_blocks: int = 1, *, protect: Container[str] = ()) -> Sequence | None:
        """Who gives up its pages so that `needs` gets some: the least urgent; of the tenant that has the most blocks
        for its weight; the latest. It may be `needs` itself. `protect`: keys that must not be chosen.

        Never one that is more urgent than `needs`, never one that is pinned, and no protected one unless `needs` is of
        a more urgent level. None: wait, pages will come free without a victim; leave the row out of this step.
        """
        if self._is_any_releasing():
            return None
        return self._victims.choose(needs, num_blocks, top=self._top(), protect=protect)

    def preempt(self, key: str, now: float, *, for_waiting: bool = False) -> Sequence:
        """It gives up its pages: the caller keeps what it can of them (in the store), gives them back and then empties
        `block_table`; only then is it admitted again. Until then no further victim is chosen.

        It waits before all of its level that have not begun, and one level higher than before. for_waiting: a request
        that waits is to have the pages; then it gains that level only when it is back, so that it does not stand before
        that one.
        """
        sequence = self._sequences.pop(key)
        assert sequence.pins == 0 and sequence.phase in (Phase.FILLING, Phase.TAIL, Phase.RUNNING)
        self._charge(sequence)
        sequence.phase, sequence.work, sequence.work_chunk = Phase.PREEMPTED, None, None
        sequence.is_held = False
        sequence.num_preempted += 1
        if not for_waiting:
            sequence.waited_s += self._policy.age_s
        self.num_preemptions += 1
        total = sequence.max_total_tokens
        wanted = sequence.num_tokens + self._policy.headroom_tokens(sequence.num_preempted)
        self._queue.put(
            Waiting(
                key=key,
                tenant=sequence.tenant,
                priority=sequence.priority,
                arrival=sequence.arrival,
                deadline=sequence.deadline,
                num_tokens=min(wanted, total),
                max_total_tokens=total,
                since=now,
                credit_s=sequence.waited_s,
                gain_s=self._policy.age_s if for_waiting else 0.0,
                is_reserved=True,
                sequence=sequence,
            ),
            present=self._tenants(),
        )
        return sequence

    def rows_with_pages(
        self,
        rows: list[Row],
        now: float,
        *,
        grow: Callable[[Sequence, int], bool],
        spill: Callable[[Sequence], None],
    ) -> list[Row]:
        """Those of the rows that have the pages they write to, after preempting whom it takes.

        grow: append so many blocks to the sequence's table, or return False. spill: of a sequence just preempted, see
        `preempt`; the pages may come free later, the row that needs them then waits for another step.
        """
        left_out: set[str] = set()
        for sequence, num_blocks in self.blocks_needed(rows):
            while sequence.phase is not Phase.PREEMPTED:
                if self.may_grow(sequence, num_blocks) and grow(sequence, num_blocks):
                    break
                victim = self.choose_victim(sequence, num_blocks)
                if victim is None:
                    left_out.add(sequence.key)
                    break
                spill(self.preempt(victim.key, now))
        return [row for row in rows if row.sequence.phase is not Phase.PREEMPTED and row.sequence.key not in left_out]

    def check_integrity(self) -> None:
        self._queue.check_integrity()
        for key, sequence in self._sequences.items():
            assert sequence.key == key and self._queue.get(key) is None
            assert sequence.phase in (Phase.FILLING, Phase.TAIL, Phase.RUNNING)
            assert sequence.phase is not Phase.RUNNING or sequence.work is None
            assert sequence.pins >= 0 and 0 <= sequence.num_charged <= len(sequence.output)

    # -- inside ---------------------------------------------------------------------------------------------------

    def _make_room(
        self,
        waiting: Waiting,
        now: float,
        has_room: Callable[[Waiting], bool],
        lacks: Callable[[Waiting], Lack | None],
        spill: Callable[[Sequence], None],
    ) -> Room:
        lack = lacks(waiting) if self.may_preempt_for_waiting() else None
        victims = None if lack is None else self._victims.for_waiting(waiting.priority, lack, top=self._top())
        if victims is None:
            return "none"
        if self._is_any_releasing() or any(victim.pins for victim in victims):
            return "coming"
        for victim in victims:
            spill(self.preempt(victim.key, now, for_waiting=True))
            if has_room(waiting):
                return "made"
        return "coming"  # their pages are on their way

    def _is_any_releasing(self) -> bool:
        """Whether a victim's pages are on their way."""
        return any(waiting.sequence and waiting.sequence.block_table for waiting in self._queue.all())

    def _running(self) -> list[Sequence]:
        """Those that continue their answers in the next step: who had a row longest ago goes first."""
        running = [sequence for sequence in self.in_phase(Phase.RUNNING) if not sequence.is_held]
        most = self._policy.max_rows
        if most is None or len(running) <= most:
            return running
        by_turn = sorted(running, key=lambda sequence: (sequence.last_step, sequence.arrival))
        chosen = {sequence.key for sequence in by_turn[:most]}
        return [sequence for sequence in running if sequence.key in chosen]

    def _top(self) -> int:
        """The best priority present, beyond which waiting lifts no one."""
        admitted = min((sequence.priority for sequence in self._sequences.values()), default=None)
        return min((best for best in (admitted, self._queue.best_priority()) if best is not None), default=0)

    def _turn(self, sequence: Sequence, top: int) -> tuple[int, float, int]:
        return self._victims.level(sequence, top), sequence.deadline, sequence.arrival

    def _is_within_quota(self, waiting: Waiting) -> bool:
        admitted = self._victims.of_tenant(waiting.tenant)
        share, share_blocks = self._fair.share(waiting.tenant), self._victims.share_blocks(waiting.tenant)
        if share.max_requests is not None and len(admitted) >= share.max_requests:
            return False
        if share_blocks is None or not admitted:
            return True
        return self._victims.blocks_held(waiting.tenant) + self._victims.blocks_for(waiting.num_tokens) <= share_blocks

    def _tenants(self) -> set[str]:
        return {sequence.tenant for sequence in self._sequences.values()}

    def _charge(self, sequence: Sequence) -> None:
        """To its tenant, what it was served since the last time."""
        new = len(sequence.output) - sequence.num_charged
        if new:
            self._fair.charge(sequence.tenant, new * self._policy.output_weight)
            sequence.num_charged = len(sequence.output)

    def _settle(self) -> None:
        """The caller draws the tokens, so they are counted when service is asked for."""
        for sequence in self._sequences.values():
            self._charge(sequence)
