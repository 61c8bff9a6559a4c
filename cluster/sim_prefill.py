"""A prefill worker in virtual time: the production transfer machine and request bookkeeping, with costs for work.

What a PrefillWorker does in threads happens here on two servers, one that computes and one that encodes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from cluster.cost_model import CostModel
from prefill.chunks import split_level
from prefill.open_request import OpenRequest
from prefill.transfers import Ask, Transfer, Transfers
from transport import source_io
from transport.events import BacklogLow, ChunkRequested, SourceEvent, TransferClosed, TransferOpened
from transport.messages import Greeting
from transport.simulation import SimulatedNetwork
from transport.source import Source

GREETING = Greeting(model_fingerprint="simulated", kv_layout="simulated", codec_profile="simulated")


class SimPrefillWorker:
    """Serves at `endpoint` of the network. `stored`: keys of chunks that it has from the start."""

    def __init__(
        self, endpoint: str, *, network: SimulatedNetwork, costs: CostModel, stored: Sequence[bytes] = ()
    ) -> None:
        self.endpoint, self._network, self._costs = endpoint, network, costs
        self.stored = set(stored)
        self._fresh: set[bytes] = set()  # computed and not yet in the store
        self._masters: deque[bytes] = deque()
        self._transfers = Transfers()
        self._source = Source(greeting=GREETING, incarnation=endpoint)
        self._is_computing = self._is_encoding = False
        self.computed_tokens = 0
        network.add_source(endpoint, self._source, self._on_event)

    def check_integrity(self) -> None:
        self._source.check_integrity()
        self._transfers.check_integrity()

    def _tell(self, event: source_io.SourceInput) -> None:
        self._network.tell_source(self.endpoint, event)

    def _on_event(self, event: SourceEvent) -> None:
        self._network.later(self._network.now + self._costs.event_s, lambda: self._handle(event))

    def _handle(self, event: SourceEvent) -> None:
        match event:
            case TransferOpened():
                request = OpenRequest(
                    token_ids=[],
                    keys=event.body["keys"],
                    chunk_tokens=self._costs.chunk_tokens,
                    stored_only=event.body.get("stored_only", False),
                )
                self._transfers.open(event.transfer_id, request)
                sizes = {level: int(size) for level, size in self._costs.chunk_bytes.items()}
                stored = [sizes if key in self.stored else {} if key in self._fresh else None for key in request.keys]
                body = {"stored": stored, "encode_s": dict(self._costs.cut_s)}
                self._tell(source_io.AcceptTransfer(transfer_id=event.transfer_id, body=body))
            case ChunkRequested():
                transfer = self._transfers.get(event.transfer_id)
                if transfer is not None:
                    self._on_requested(transfer, event.chunk, Ask(level=event.level, priority=event.priority))
            case BacklogLow():
                transfer = self._transfers.get(event.transfer_id)
                if transfer is not None:
                    transfer.unsent_priority = None
            case TransferClosed():
                self._transfers.close(event.transfer_id)
        self._work()

    def _on_requested(self, transfer: Transfer, chunk: int, ask: Ask) -> None:
        key = transfer.request.keys[chunk]
        if key in self.stored or key in self._fresh:
            transfer.make_ready(chunk, ask)
            return
        reason = self._transfers.want_computed(transfer, chunk, ask)
        if reason is not None:
            self._fail(transfer.id, chunk, reason)

    def _fail(self, transfer_id: str, chunk: int, reason: str) -> None:
        failed = source_io.FailChunk(transfer_id=transfer_id, chunk=chunk, reason=reason)
        self._network.later(self._network.now, lambda: self._tell(failed))

    # -- the two servers ------------------------------------------------------------------------------------------

    def _work(self) -> None:
        if not self._is_computing:
            transfer = self._transfers.next_prefill()
            if transfer is not None:
                self._is_computing = True
                self._compute(transfer, 0)
        if not self._is_encoding:
            self._encode_next()

    def _compute(self, transfer: Transfer, chunk: int) -> None:
        keys, size = transfer.request.keys, self._costs.chunk_tokens
        while chunk < len(keys) and (keys[chunk] in self.stored or keys[chunk] in self._fresh):
            self._transfers.arrived(keys[chunk])
            chunk += 1
        if chunk == len(keys) or transfer.is_closed:
            self._is_computing = False
            self._transfers.prefill_ended(transfer)
            self._work()
            return
        seconds = self._costs.compute_s(chunk * size, (chunk + 1) * size)

        def done() -> None:
            self.computed_tokens += size
            self._fresh.add(keys[chunk])
            self._masters.append(keys[chunk])
            self._transfers.arrived(keys[chunk])
            self._compute(transfer, chunk + 1)
            self._work()

        self._network.later(self._network.now + seconds, done)

    def _encode_next(self) -> None:
        due = self._transfers.most_urgent()
        if due is not None:
            self._encode(*due)
        elif self._masters:
            key = self._masters.popleft()
            self._is_encoding = True

            def stored() -> None:
                self._fresh.discard(key)
                self.stored.add(key)
                self._end_encoding()

            self._network.later(self._network.now + self._costs.encode_s.get("lossless", 0.0), stored)

    def _end_encoding(self) -> None:
        self._is_encoding = False
        self._work()

    def _encode(self, transfer: Transfer, chunk: int) -> None:
        ask = transfer.ready.pop(chunk)
        level = self._source.take(transfer.id, chunk)
        if level is None:
            self._work()
            return
        self._is_encoding = True
        have, wanted = split_level(level)
        is_fresh = transfer.request.keys[chunk] in self._fresh
        seconds = (self._costs.encode_s if is_fresh else self._costs.cut_s).get(wanted, 0.0) + self._costs.event_s
        sizes = self._costs.chunk_bytes
        size = int(sizes[wanted] - (sizes[have] if have is not None else 0.0))

        def done() -> None:
            transfer.supplied(ask)
            blob = _blob_of(size)
            self._tell(source_io.SupplyChunk(transfer_id=transfer.id, chunk=chunk, level=level, blob=blob))
            if self._source.backlog_bytes(transfer.id) == 0:
                transfer.unsent_priority = None
            self._end_encoding()

        self._network.later(self._network.now + seconds, done)


_ZEROS = memoryview(bytes(1 << 20))


def _blob_of(size: int) -> memoryview:
    """A blob's length is all that matters; one buffer serves all of them."""
    global _ZEROS
    if size > len(_ZEROS):
        _ZEROS = memoryview(bytes(2 * size))
    return _ZEROS[:size]
