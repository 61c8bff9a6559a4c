"""A decode worker in virtual time around the production scheduler: a page pool, a made-up model, a linear cost model.

Prompts are computed in chunks and then a tail, as the worker does. A preempted request keeps its whole chunks "in the
store" and loads them back at once. The model is a hash of all tokens before, so a token that is drawn on a wrong
history, twice or out of order differs from what the request should have got. Invariants are checked at every step.
"""

from __future__ import annotations

import zlib
from array import array
from collections import deque
from dataclasses import dataclass, field

from decode.requests import GenerationRequest, SamplingParams
from decode.scheduler import Lack, Phase, QueueRefused, Row, Scheduler, SchedulingPolicy, Sequence, Waiting

BLOCK_TOKENS = 16
CHUNK_TOKENS = 64
STEP_S, ROW_S, TOKEN_S = 0.005, 0.001, 0.0001


def next_token(tokens: list[int]) -> int:
    return zlib.crc32(array("Q", tokens).tobytes())


def blocks_for(num_tokens: int) -> int:
    return -(-num_tokens // BLOCK_TOKENS)


@dataclass
class Life:
    """What happened to one request."""

    request: GenerationRequest
    priority: int
    submitted_at: float
    admitted_at: list[float] = field(default_factory=list)
    drawn_at: list[float] = field(default_factory=list)
    drawn_in_step: list[int] = field(default_factory=list)
    num_preempted: int = 0
    num_gave_way: int = 0  # of them, to one that waited
    num_computed: int = 0
    ended_at: float | None = None
    tokens: list[int] | None = None

    @property
    def waited_s(self) -> float:
        return self.admitted_at[0] - self.submitted_at


class World:
    """max_requests: admitted at once, beside what the pages allow. gives_way: whether one that waits may make others
    give way. reserve: blocks that admission leaves free for each
    admitted sequence to grow into."""

    def __init__(
        self,
        policy: SchedulingPolicy | None = None,
        *,
        num_blocks: int = 1000,
        budget: int = 256,
        max_requests: int = 1000,
        reserve: int = 1,
        gives_way: bool = True,
    ) -> None:
        self.policy = policy or SchedulingPolicy()
        self.scheduler = Scheduler(self.policy, num_blocks=num_blocks, block_tokens=BLOCK_TOKENS)
        self.num_blocks, self.budget, self.max_requests, self.reserve = num_blocks, budget, max_requests, reserve
        self.gives_way = gives_way
        self.free = deque(range(num_blocks))
        self.now = 0.0
        self.num_steps = self.num_idle = 0
        self.lives: dict[str, Life] = {}
        self.kv: dict[str, list[int]] = {}  # the tokens whose KV lies in the pages of an admitted sequence
        self.stored: dict[str, list[int]] = {}  # the tokens whose KV a preempted one has in the store
        self.order: list[str] = []  # of admissions, the first of each
        self.log: list[tuple[object, ...]] = []

    # -- requests -------------------------------------------------------------------------------------------------

    def submit(
        self,
        key: str,
        *,
        prompt: int = 32,
        max_tokens: int = 16,
        tenant: str = "",
        priority: int = 0,
        ttft_s: float = 0.5,
    ) -> bool:
        """False if it was refused."""
        request = GenerationRequest(
            request_id=key,
            token_ids=tuple(next_token([len(self.lives), i]) for i in range(prompt)),
            sampling=SamplingParams(max_tokens=max_tokens),
            tenant=tenant,
        )
        try:
            self.scheduler.add_waiting(
                key,
                arrival=len(self.lives),
                now=self.now,
                num_prompt=prompt,
                max_tokens=max_tokens,
                tenant=tenant,
                priority=priority,
                deadline=self.now + ttft_s,
            )
        except QueueRefused:
            return False
        self.lives[key] = Life(request=request, priority=priority, submitted_at=self.now)
        return True

    def cancel(self, key: str) -> None:
        sequence = self.scheduler.remove(key)
        self.lives[key].ended_at = self.now
        if sequence is not None:
            self.ended(sequence)

    def has_room(self, waiting: Waiting) -> bool:
        reserved = self.reserve * len(self.scheduler)
        return len(self.scheduler) < self.max_requests and blocks_for(waiting.num_tokens) + reserved <= len(self.free)

    def lacks(self, waiting: Waiting) -> Lack | None:
        if not self.gives_way or len(self.scheduler) >= self.max_requests:
            return None
        missing = blocks_for(waiting.num_tokens) - len(self.free)
        return Lack(blocks=lambda num_left: missing + self.reserve * num_left)

    def give_way(self, sequence: Sequence) -> None:
        """To one that waits."""
        self.lives[sequence.key].num_gave_way += 1
        others = [other.priority for other in self.scheduler.waiting() if other.key != sequence.key]
        assert min(others) < sequence.priority, "to nobody more urgent"
        assert sequence.num_preempted <= self.policy.max_preemptions
        self.log.append(("gave way", sequence.key, self.now))
        self.spill(sequence)

    def admit(self) -> None:
        while True:
            waiting = self.scheduler.next_to_admit(self.now, self.has_room, lacks=self.lacks, spill=self.give_way)
            if waiting is None:
                return
            life = self.lives[waiting.key]
            self.log.append(("admit", waiting.key, self.now))
            if not life.admitted_at:
                self.order.append(waiting.key)
            life.admitted_at.append(self.now)
            sequence = waiting.sequence or Sequence(
                key=waiting.key,
                request=life.request,
                block_table=[],
                deadline=waiting.deadline,
                arrival=waiting.arrival,
            )
            assert sequence.block_table == []
            sequence.block_table = [self.free.popleft() for _ in range(blocks_for(waiting.num_tokens))]
            self.scheduler.add(sequence, waiting)
            self.kv[sequence.key] = self.stored.pop(sequence.key, [])
            self._fill(sequence)

    def _fill(self, sequence: Sequence) -> None:
        """The next chunk, or the tail: at least the last token runs."""
        start, num_tokens = len(self.kv[sequence.key]), sequence.num_tokens
        if start + CHUNK_TOKENS < num_tokens:
            sequence.work, sequence.work_chunk = (start, start + CHUNK_TOKENS), start // CHUNK_TOKENS
        else:
            sequence.phase, sequence.work, sequence.work_chunk = Phase.TAIL, (start, num_tokens), None

    # -- pages ----------------------------------------------------------------------------------------------------

    def _release(self, sequence: Sequence) -> None:
        assert sequence.pins == 0
        self.free.extend(sequence.block_table)
        sequence.block_table = []
        self.kv.pop(sequence.key, None)
        self.stored.pop(sequence.key, None)

    def grow(self, sequence: Sequence, num_blocks: int) -> bool:
        if num_blocks > len(self.free):
            return False
        sequence.block_table += [self.free.popleft() for _ in range(num_blocks)]
        return True

    def spill(self, sequence: Sequence) -> None:
        assert sequence.phase is Phase.PREEMPTED and sequence.pins == 0
        self.log.append(("preempt", sequence.key, self.now))
        self.lives[sequence.key].num_preempted += 1
        tokens = self.kv[sequence.key]
        whole = min(len(tokens), sequence.num_tokens - 1) // CHUNK_TOKENS * CHUNK_TOKENS
        self._release(sequence)
        self.stored[sequence.key] = tokens[:whole]

    def ended(self, sequence: Sequence) -> None:
        self._release(sequence)

    # -- steps ----------------------------------------------------------------------------------------------------

    def rows(self) -> list[Row]:
        self.admit()
        rows = self.scheduler.next_rows(self.budget)
        self._check_rows(rows)
        rows = self.scheduler.rows_with_pages(rows, self.now, grow=self.grow, spill=self.spill)
        for row in rows:
            assert blocks_for(row.stop) <= len(row.sequence.block_table)
        return rows

    def step(self) -> list[Row]:
        """One forward pass; none if there is nothing to do."""
        rows = self.rows()
        if not rows:
            self._check_idle()
            return rows
        num_rows = sum(row.sequence.phase is Phase.RUNNING for row in rows)
        num_prompt = sum(row.stop - row.start for row in rows if row.sequence.phase is not Phase.RUNNING)
        self.now += STEP_S + ROW_S * num_rows + TOKEN_S * num_prompt
        self.num_steps += 1
        self.log.append(("rows", *((row.sequence.key, row.start, row.stop) for row in rows)))
        for row in rows:
            self._after(row)
        self.check()
        return rows

    def run(self, *, until: float = float("inf"), most_steps: int = 100_000) -> None:
        """Until nothing is left, or no more time."""
        for _ in range(most_steps):
            if self.now >= until or not (self.scheduler.all() or self.scheduler.waiting()):
                return
            if not self.step():
                assert self.scheduler.num_preemptions, "nothing runs and nothing is admitted"
                self.num_idle += 1
        raise AssertionError(f"not done after {most_steps} steps")

    def _after(self, row: Row) -> None:
        sequence = row.sequence
        life, kv = self.lives[sequence.key], self.kv[sequence.key]
        assert row.start == len(kv), "a row on KV that is not there, or there already"
        kv += row.token_ids()
        life.num_computed += row.stop - row.start
        if sequence.phase is not Phase.RUNNING:
            was_filling = sequence.phase is Phase.FILLING
            if not self.scheduler.computed(row):
                assert not row.sample
                return
            if was_filling:
                assert not row.sample
                self._fill(sequence)
                return
            sequence.phase = Phase.RUNNING
        assert row.sample and kv == [*sequence.request.token_ids, *sequence.output]
        sequence.output.append(next_token(kv))
        life.drawn_at.append(self.now)
        life.drawn_in_step.append(self.num_steps)
        if len(sequence.output) == sequence.request.sampling.max_tokens:
            assert self.scheduler.remove(sequence.key) is sequence and sequence.phase is Phase.ENDED
            life.ended_at, life.tokens = self.now, sequence.output
            self.ended(sequence)

    # -- what must hold -------------------------------------------------------------------------------------------

    def check(self) -> None:
        """Blocks add up, nobody has one twice, tenants keep their quotas."""
        self.scheduler.check_integrity()
        admitted = self.scheduler.all()
        held = [block for sequence in admitted for block in sequence.block_table]
        assert sorted([*held, *self.free]) == list(range(self.num_blocks)), "a block is lost or held twice"
        assert len(admitted) <= self.max_requests
        for tenant in {sequence.tenant for sequence in admitted}:
            share = self.policy.shares.get(tenant, self.policy.default_share)
            ours = [sequence for sequence in admitted if sequence.tenant == tenant]
            assert share.max_requests is None or len(ours) <= share.max_requests
            if share.max_blocks_share is not None:
                assert sum(len(sequence.block_table) for sequence in ours) <= share.max_blocks_share * self.num_blocks
        assert set(self.kv) == {sequence.key for sequence in admitted}
        for waiting in self.scheduler.waiting():
            assert self.lives[waiting.key].ended_at is None
            assert (waiting.sequence is not None) == bool(self.lives[waiting.key].admitted_at)

    def check_end(self) -> None:
        """Nothing is left, and all got what the model says, as if each had been alone."""
        assert len(self.free) == self.num_blocks and not self.scheduler.waiting() and not len(self.scheduler)
        for key, life in self.lives.items():
            assert life.ended_at is not None, key
            if life.tokens is None:
                continue  # cancelled
            history = list(life.request.token_ids)
            for token in life.tokens:
                assert token == next_token(history), key
                history.append(token)
            assert len(life.tokens) == len(life.drawn_at) == life.request.sampling.max_tokens

    def _check_rows(self, rows: list[Row]) -> None:
        prompt = [row for row in rows if row.sequence.phase is not Phase.RUNNING]
        decode = [row for row in rows if row.sequence.phase is Phase.RUNNING]
        assert rows == [*decode, *prompt], "decode rows first"
        assert len({row.sequence.key for row in rows}) == len(rows)
        assert all(row.sequence.phase is not Phase.PREEMPTED and not row.sequence.is_held for row in decode)
        assert sum(row.stop - row.start for row in prompt) <= self.budget
        running = self.scheduler.in_phase(Phase.RUNNING)
        most = self.policy.max_rows
        wanted = sum(not sequence.is_held for sequence in running)
        assert len(decode) == (wanted if most is None else min(most, wanted))
        for row in prompt[1:]:
            whole = row.sequence.work is not None and row.stop == row.sequence.work[1]
            assert whole or row.stop - row.start >= self.policy.min_slice_tokens

    def _check_idle(self) -> None:
        """A step without rows: nothing could have run, and nothing that fits was left waiting."""
        for sequence in self.scheduler.all():
            could_run = sequence.work is not None or (sequence.phase is Phase.RUNNING and not sequence.is_held)
            assert not could_run or sequence.pins, f"{sequence.key} could have run"
        assert len(self.scheduler) or not self.scheduler.waiting(), "nothing is admitted though nothing runs"
