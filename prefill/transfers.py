"""What receivers have asked a source for, what it computes and encodes next. Pure bookkeeping: no threads, no I/O.

A chunk that is asked for *waits* until it is here (stored or just computed), is then *ready*, and leaves when it is
taken up to be encoded. A prompt is computed only when a chunk of it waits: the receiver may compute it itself instead.
Until a chunk is taken up its level can be amended, so a transfer's next chunk is taken up only when little of
what was supplied for it is unsent, or when it is more urgent than all of that.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from prefill.chunks import split_level
from prefill.open_request import OpenRequest

MAX_WAITING_PREFILLS = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """A chunk asked for at a level or as a refinement; lower priorities are sooner."""

    level: str
    priority: int


@dataclass(slots=True, kw_only=True, eq=False)
class Transfer:
    """kls: of each chunk, the promise that the receiver counts on; 0, exact, of those that were not here."""

    id: str
    request: OpenRequest
    kls: Sequence[float]
    waiting: dict[int, Ask] = field(default_factory=dict)
    ready: dict[int, Ask] = field(default_factory=dict)
    unsent_priority: int | None = None  # the most urgent of what was supplied, until little of it is unsent
    is_computing: bool = False  # or waits for its turn
    compute_failure: str = ""  # why its prompt cannot be computed here
    is_closed: bool = False

    def make_ready(self, chunk: int, ask: Ask) -> None:
        """Also with another level or priority than before."""
        self.waiting.pop(chunk, None)
        self.ready[chunk] = ask

    def drop(self, chunk: int) -> None:
        self.waiting.pop(chunk, None)
        self.ready.pop(chunk, None)

    def supplied(self, ask: Ask) -> None:
        self.unsent_priority = ask.priority if self.unsent_priority is None else min(self.unsent_priority, ask.priority)


class Transfers:
    """All transfers that are open, in the order of their opening."""

    def __init__(self) -> None:
        self._by_id: dict[str, Transfer] = {}
        self._prefills: deque[Transfer] = deque()  # to be computed, first come, first served

    def __len__(self) -> int:
        return len(self._by_id)

    def __iter__(self) -> Iterator[Transfer]:
        return iter(self._by_id.values())

    def open(self, transfer_id: str, request: OpenRequest, kls: Sequence[float] | None = None) -> Transfer:
        """kls: see Transfer; None: all exact."""
        assert transfer_id not in self._by_id, transfer_id
        kls = (0.0,) * len(request.keys) if kls is None else kls
        transfer = self._by_id[transfer_id] = Transfer(id=transfer_id, request=request, kls=kls)
        return transfer

    def get(self, transfer_id: str) -> Transfer | None:
        return self._by_id.get(transfer_id)

    def close(self, transfer_id: str) -> Transfer | None:
        transfer = self._by_id.pop(transfer_id, None)
        if transfer is not None:
            transfer.is_closed = True
            if transfer in self._prefills:
                self._prefills.remove(transfer)
        return transfer

    # -- computing --

    @property
    def num_prefills(self) -> int:
        return len(self._prefills)

    @property
    def num_prefill_tokens(self) -> int:
        """Of the prompts that wait to be computed."""
        return sum(len(transfer.request.keys) * transfer.request.chunk_tokens for transfer in self._prefills)

    def want_computed(self, transfer: Transfer, chunk: int, ask: Ask, *, computes: bool = True) -> str | None:
        """Let a chunk that is not here wait until it is computed. If it will not be: why."""
        transfer.drop(chunk)
        if not computes:
            return "the chunk is not stored here, and this worker computes nothing for others"
        if transfer.request.stored_only:
            return "the chunk is not stored here, and this transfer is for stored chunks only"
        if split_level(ask.level)[0] is not None:
            return f"the chunk is not stored here any more, and is not computed for a refinement ({ask.level})"
        if transfer.compute_failure:
            return transfer.compute_failure
        if not transfer.is_computing:
            if len(self._prefills) >= MAX_WAITING_PREFILLS:
                return f"busy: {len(self._prefills)} prompts wait to be computed"
            self._queue_prefill(transfer)
        transfer.waiting[chunk] = ask
        return None

    def next_prefill(self) -> Transfer | None:
        """The transfer whose prompt is to be computed now."""
        while self._prefills:
            transfer = self._prefills.popleft()
            if transfer.waiting:
                return transfer
            transfer.is_computing = False  # another transfer had the same chunks computed meanwhile
        return None

    def prefill_ended(self, transfer: Transfer) -> None:
        """After `next_prefill`, when all chunks have been here once."""
        transfer.is_computing = False
        if transfer.waiting and not transfer.is_closed:
            # Asked for after this run had passed it, and gone from a store that is too small for the prompt.
            self._queue_prefill(transfer)

    def cannot_compute(self, transfer: Transfer, reason: str) -> list[int]:
        """The chunks that fail with it. What is stored can still be had."""
        transfer.compute_failure = reason
        failed = list(transfer.waiting)
        transfer.waiting.clear()
        return failed

    def _queue_prefill(self, transfer: Transfer) -> None:
        transfer.is_computing = True
        self._prefills.append(transfer)

    # -- encoding --

    def arrived(self, key: bytes) -> None:
        """A chunk is here: whoever waits for it, whichever transfer had it computed, can be served."""
        for transfer in self:
            for chunk in [chunk for chunk in transfer.waiting if transfer.request.keys[chunk] == key]:
                transfer.make_ready(chunk, transfer.waiting[chunk])

    def most_urgent(self) -> tuple[Transfer, int] | None:
        """The ready chunk to encode now: the lowest priority of all transfers; of equals, who opened or asked first."""
        best: tuple[Transfer, int] | None = None
        lowest = 0
        for transfer in self:
            for chunk, ask in transfer.ready.items():
                is_due = transfer.unsent_priority is None or ask.priority < transfer.unsent_priority
                if is_due and (best is None or ask.priority < lowest):
                    best, lowest = (transfer, chunk), ask.priority
        return best

    def check_integrity(self) -> None:
        for transfer_id, transfer in self._by_id.items():
            assert transfer.id == transfer_id and not transfer.is_closed
            assert not transfer.waiting.keys() & transfer.ready.keys(), "a chunk waits and is ready"
            num_chunks = len(transfer.request.keys)
            assert all(0 <= chunk < num_chunks for chunk in (*transfer.waiting, *transfer.ready))
            assert not transfer.waiting or transfer.is_computing, "a chunk waits for nobody"
        assert all(transfer.is_computing and transfer.id in self._by_id for transfer in self._prefills)
        assert len(self._prefills) <= MAX_WAITING_PREFILLS + len(self._by_id)
