"""Who holds pages on a decode worker and who waits for them: admission, growth, preemption, the end.

Around the scheduler, which decides, and the pages. The caller holds the worker's lock.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from decode.active_request import ActiveRequest
from decode.admission_times import AdmissionTimes
from decode.page_table import PageTable
from decode.scheduler import Lack, Phase, Scheduler, SchedulingPolicy, Sequence, Waiting
from decode.scheduling_policy import MAX_SEQUENCES
from decode.tagged_pages import TaggedPages
from prefill.block_pool import PoolExhausted
from prefill.quantized_rings import RingsExhausted


class HolderOwner(Protocol):
    """The decode worker. Called with the lock held."""

    def admitted(self, key: str, sequence: Sequence | None, arrival: int, now: float) -> Sequence: ...
    def begin_fill(self, sequence: Sequence, now: float) -> None: ...
    def gives_up(self, sequence: Sequence) -> None: ...


class PageHolders:
    """`requests`: the worker's, by key; one is in there from before `submit` until after `ended`."""

    def __init__(
        self,
        *,
        owner: HolderOwner,
        scheduler: Scheduler,
        pages: TaggedPages,
        requests: Mapping[str, ActiveRequest],
        max_sequences: int = MAX_SEQUENCES,
    ) -> None:
        self._max_sequences = min(max_sequences, MAX_SEQUENCES)
        self._owner, self._scheduler, self._pages, self._requests = owner, scheduler, pages, requests
        self._ended: dict[str, tuple[Sequence, PageTable]] = {}  # but somebody still uses their pages
        self._being_filled: dict[bytes, str] = {}  # blocks by key: the request that others wait for to have them
        self._arrivals = 0
        self._is_admitting, self._now = False, 0.0
        self._admissions = AdmissionTimes()

    def submit(self, key: str, *, deadline: float, now: float) -> None:
        """A new request waits to be admitted. Raises QueueRefused."""
        state = self._requests[key]
        self._arrivals += 1
        self._scheduler.add_waiting(
            key,
            arrival=self._arrivals,
            now=now,
            num_prompt=state.prompt_tokens,
            max_tokens=state.request.sampling.max_tokens,
            tenant=state.request.tenant,
            priority=state.request.priority,
            deadline=deadline,
        )

    def admit(self, now: float) -> None:
        """Give pages to who is next, as long as there are some. A request whose prefix another one is just filling
        waits for that: nothing is loaded or computed twice."""
        if self._is_admitting:
            return  # called from within by a request that ended at once; the loop below goes on
        self._is_admitting, self._now = True, now
        self._pages.expire(now)
        try:
            while True:
                waiting = self._scheduler.next_to_admit(
                    now,
                    self._take_pages,
                    is_deferred=self._can_join,
                    lacks=self._lacks,
                    spill=lambda sequence: self.spill(sequence, now),
                )
                if waiting is None:
                    return
                self._begin(waiting, now)
        finally:
            self._is_admitting = False

    def admission_s(self, now: float) -> float:
        """Between two admissions while requests wait; 0: none has waited yet."""
        longest_s = max((now - waiting.since for waiting in self._scheduler.waiting()), default=0.0)
        return self._admissions.seconds(longest_s, now)

    def _can_join(self, waiting: Waiting) -> bool:
        """Whether what it needs first is on its way into the pages for another request, in a quality that will do."""
        state = self._requests[waiting.key]
        if state.saved is not None:
            return False
        missing = self._pages.first_missing(state.chain, _num_to_fill(state, waiting), state.max_kl)
        other = self._being_filled.get(missing) if missing is not None else None
        if other is None:
            return False
        theirs, ours = self._requests[other].max_kl, state.max_kl
        return theirs is not None and ours is not None and theirs <= ours

    def _take_pages(self, waiting: Waiting) -> bool:
        if len(self._scheduler) >= self._max_sequences:
            return False
        state = self._requests[waiting.key]
        num_to_fill = _num_to_fill(state, waiting)
        try:
            state.pages = self._begin_pages(state, num_to_fill, waiting.num_tokens)
        except (PoolExhausted, RingsExhausted):
            return False
        if not self._pages.can_grow_by(SchedulingPolicy.spare_blocks(len(self._scheduler), self._pages.block_tokens)):
            self._pages.release(state.pages, self._now)
            state.pages = None
            return False
        if state.saved is not None:
            self._pages.restore(state.pages, state.saved)
            state.saved = None
        state.fill_tokens = num_to_fill
        return True

    def _begin_pages(self, state: ActiveRequest, num_to_fill: int, num_tokens: int) -> PageTable:
        if state.saved is not None:
            return self._pages.begin_again(state.saved, state.chain, num_tokens, state.max_kl, self._now)
        return self._pages.begin(state.chain, num_to_fill, num_tokens, state.max_kl, self._now)

    def _lacks(self, waiting: Waiting) -> Lack | None:
        """Of pages, if those are what it waits for."""
        if len(self._scheduler) >= self._max_sequences or not self._pages.has_ring:
            return None
        state = self._requests[waiting.key]
        num_lacking, found = self._pages.lacking(
            state.chain, _num_to_fill(state, waiting), waiting.num_tokens, None if state.saved else state.max_kl
        )

        def blocks(num_left: int) -> int:
            return num_lacking + SchedulingPolicy.spare_blocks(num_left, self._pages.block_tokens)

        return Lack(blocks=blocks, shared=found)

    def before_step(self, now: float) -> None:
        """When no forward pass uses anybody's pages, the more urgent of those who wait get theirs."""
        if self._scheduler.may_preempt_for_waiting():
            self.admit(now)

    def _begin(self, waiting: Waiting, now: float) -> None:
        key, state = waiting.key, self._requests[waiting.key]
        assert state.pages is not None
        self._admissions.admitted(now - waiting.since, now)
        sequence = self._owner.admitted(key, waiting.sequence, waiting.arrival, now)
        sequence.block_table, sequence.ring = state.pages.blocks, state.pages.ring
        self._scheduler.add(sequence, waiting)
        if state.pages.max_kl is not None:
            for block in self._pages.to_fill(state.pages, state.fill_tokens):
                self._being_filled.setdefault(block, key)
        self._owner.begin_fill(sequence, now)

    def filled(self, key: str) -> None:
        """Nobody needs to wait for this request's pages any more: they are there, or will not come."""
        # Not by its table, which shares nothing any more if something better took its place.
        for block in [block for block, filling in self._being_filled.items() if filling == key]:
            del self._being_filled[block]

    def grow(self, sequence: Sequence, num_blocks: int) -> bool:
        """So many pages more, if there are any."""
        table = self._requests[sequence.key].pages
        assert table is not None and table.blocks is sequence.block_table
        try:
            self._pages.grow_by(table, num_blocks)
        except PoolExhausted:
            return False
        return True

    def spill(self, sequence: Sequence, now: float) -> None:
        """It was preempted: its pages are given back. They can be had again from the pages themselves, until somebody
        else needs them, and from the store, after that. Of quantized pages neither gives the same bits: those are
        saved."""
        assert sequence.pins == 0 and sequence.phase is Phase.PREEMPTED
        state = self._requests[sequence.key]
        self._owner.gives_up(sequence)
        self.filled(sequence.key)
        assert state.pages is not None and state.saved is None
        if sequence.output:
            state.saved = self._pages.save(state.pages, sequence.num_tokens - 1)  # the last one's KV is not there yet
        self._pages.release(state.pages, now)
        state.pages, sequence.block_table, sequence.ring = None, [], None

    def ended(self, key: str, now: float) -> None:
        """It holds pages only as long as somebody still uses them."""
        self.filled(key)
        sequence, state = self._scheduler.remove(key), self._requests[key]
        if state.saved is not None:
            self._pages.forget(state.saved)
            state.saved = None
        if sequence is not None and state.pages is not None:
            sequence.work = None
            self._ended[key] = sequence, state.pages
            self.unpinned(sequence, now)

    def is_in_use(self, key: str) -> bool:
        return key in self._ended

    def unpinned(self, sequence: Sequence, now: float) -> None:
        """To be called whenever somebody is done with a sequence's pages."""
        ended, pages = self._ended.get(sequence.key, (None, None))
        if sequence.pins == 0 and ended is sequence:
            assert pages is not None
            del self._ended[sequence.key]
            self._pages.release(pages, now)
            self.admit(now)

    def pinned(self, key: str) -> Sequence:
        """The sequence whose pages somebody is using, also if it has ended."""
        return self._scheduler.get(key) or self._ended[key][0]

    def check_integrity(self) -> None:
        self._scheduler.check_integrity()
        admitted = self._scheduler.all()
        tables = [self._requests[sequence.key].pages for sequence in admitted] + [t for _, t in self._ended.values()]
        held = [*admitted, *(sequence for sequence, _ in self._ended.values())]
        assert all(s.block_table is t.blocks and s.ring == t.ring for s, t in zip(held, tables, strict=True) if t)
        self._pages.check_integrity(table for table in tables if table is not None)
        filling = {sequence.key for sequence in admitted if sequence.phase is not Phase.RUNNING}
        assert set(self._being_filled.values()) <= filling, "a block is waited for that nobody fills"
        waiting = {waiting.key for waiting in self._scheduler.waiting()}
        assert set(self._requests) == {sequence.key for sequence in admitted} | waiting


def _num_to_fill(state: ActiveRequest, waiting: Waiting) -> int:
    """Tokens that have to be in the pages before the next one is drawn."""
    return state.prompt_tokens if waiting.sequence is None else waiting.sequence.num_tokens
