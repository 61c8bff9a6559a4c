"""The source of KV: computes prompts chunk by chunk, keeps them encoded, and serves chunks at the level asked for.

A shell around the engine, the codec, the chunk store and a KVServer. Three threads: the server's I/O thread brings
events in, the compute thread runs the model, the encode thread makes blobs. A chunk is encoded when it is asked for,
while the next one is computed; between the two a computed chunk waits as plain tensors ("fresh") until its master is
in the store.
"""

from __future__ import annotations

import heapq
import itertools
import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from codec.errors import CodecError
from prefill.block_allocator import blocks_for
from prefill.chunk_levels import ChunkLevels
from prefill.chunks import chunk_keys, num_loadable_chunks
from prefill.engine import SequenceSlice
from prefill.runtime import BLOCK_TOKENS, ModelRuntime
from prefill.store import MASTER_LEVEL, ChunkStore
from transport.curve import CurveKeys
from transport.errors import TransportClosed
from transport.events import BacklogLow, ChunkRequested, SourceEvent, TransferClosed, TransferOpened
from transport.kv_server import KVServer

log = logging.getLogger("kvstream.prefill")

MAX_WAITING_PREFILLS = 64
MAX_FRESH_CHUNKS = 32  # computed and not yet in the store; the compute thread waits for the encoder beyond that
# Transport tells when a transfer has sent what it had, but not when the receiver withdrew it: looked for this often.
OFFER_EVERY_S = 0.05
URGENT, LATER = 0, 1  # somebody waits for the blob, or it is only for the store


class BadOpen(ValueError):
    """The body of an open does not describe a prompt; the text goes back to the receiver."""


@dataclass(slots=True, kw_only=True)
class _Transfer:
    token_ids: list[int]
    keys: list[bytes]
    chunk_tokens: int
    waiting: set[int] = field(default_factory=set)  # chunks asked for that are not there yet
    ready: dict[int, None] = field(default_factory=dict)  # asked for and here, in the order of asking
    is_encoding: bool = False
    is_computing: bool = False  # or waits for its turn
    closed: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class _Fresh:
    k: Tensor
    v: Tensor
    start: int


class PrefillWorker:
    """Serves until `shutdown`. Raises transport errors when it cannot bind."""

    def __init__(
        self,
        runtime: ModelRuntime,
        *,
        bind: str = "tcp://127.0.0.1:0",
        store_bytes: int = 512 << 20,
        worker_id: str = "prefill-0",
        curve: CurveKeys | None = None,
        insecure: bool = False,
    ) -> None:
        self.worker_id = worker_id
        self.store = ChunkStore(store_bytes)
        self._levels = ChunkLevels(runtime, self.store)
        self._runtime = runtime
        self._lock = threading.Condition()
        self._transfers: dict[str, _Transfer] = {}
        self._prefills: deque[str] = deque()
        self._fresh: dict[bytes, _Fresh] = {}
        self._encodes: list[tuple[int, int, Any]] = []  # heap of (urgency, order, job)
        self._order = itertools.count()
        self._stopping = False
        self._computing = False
        self._serving = threading.Event()  # the server's thread may call before `self.server` is set
        self._counters = {"computed_tokens_total": 0, "sent_chunks_total": 0}
        self._threads = [
            threading.Thread(target=self._guarded, args=(loop,), name=name, daemon=True)
            for name, loop in (("prefill-compute", self._compute_loop), ("prefill-encode", self._encode_loop))
        ]
        self.server = KVServer(
            bind,
            greeting=runtime.greeting(),
            incarnation=worker_id,
            on_event=self._on_event,
            curve=curve,
            insecure=insecure,
        )
        for thread in self._threads:
            thread.start()
        self._serving.set()

    @property
    def is_alive(self) -> bool:
        """Whether all its threads run. A worker that has lost one serves nothing and has to be started anew."""
        return not self._stopping and all(thread.is_alive() for thread in self._threads)

    @property
    def endpoint(self) -> str:
        return self.server.endpoint

    def stats(self) -> dict[str, float]:
        """Counters and gauges, by their metric name without prefix."""
        store = self.store.stats()
        with self._lock:
            return {
                **{f"prefill_{name}": value for name, value in self._counters.items()},
                "prefill_encoded_chunks_total": self._levels.num_encoded,
                "prefill_transfers_open": len(self._transfers),
                "prefill_waiting": len(self._prefills),
                "store_used_bytes": store.used_bytes,
                "store_chunks": store.num_chunks,
                "store_hits_total": store.num_hits,
                "store_evictions_total": store.num_evictions,
            }

    def wait_until_idle(self, timeout_s: float) -> bool:
        """Whether all computing and encoding is done within `timeout_s`."""
        with self._lock:
            return self._lock.wait_for(
                lambda: not (self._prefills or self._encodes or self._fresh or self._computing), timeout_s
            )

    def check_integrity(self) -> None:
        """When idle: no page in use, no transfer or computed chunk left over."""
        self.store.check_integrity()
        self.server.check_integrity()
        with self._lock:
            self._runtime.allocator.check_integrity()
            if not self._computing:
                assert self._runtime.allocator.num_used == 0, "pages left behind"

    def shutdown(self) -> None:
        with self._lock:
            self._stopping = True
            self._lock.notify_all()
        self.server.shutdown()
        for thread in self._threads:
            thread.join(timeout=10)

    # -- events, in the server's thread ---------------------------------------------------------------------------

    def _on_event(self, event: SourceEvent) -> None:
        self._serving.wait()
        match event:
            case TransferOpened():
                self._on_opened(event)
            case ChunkRequested():
                self._on_requested(event)
            case BacklogLow():
                with self._lock:
                    transfer = self._transfers.get(event.transfer_id)
                    if transfer is not None and transfer.ready and not transfer.is_encoding:
                        self._encode_next(event.transfer_id, transfer)
            case TransferClosed():
                with self._lock:
                    transfer = self._transfers.pop(event.transfer_id, None)
                    if transfer is not None:
                        transfer.closed = True
                        if event.transfer_id in self._prefills:
                            self._prefills.remove(event.transfer_id)
                    self._lock.notify_all()

    def _on_opened(self, event: TransferOpened) -> None:
        try:
            transfer = self._read_open(event.body)
        except BadOpen as error:
            self.server.refuse(event.transfer_id, str(error))
            return
        with self._lock:
            stored = [self._sizes(key) for key in transfer.keys]
            self._transfers[event.transfer_id] = transfer
        self.server.accept(event.transfer_id, {"stored": stored})

    def _sizes(self, key: bytes) -> dict[str, int] | None:
        sizes = self._levels.sizes(key)
        return {} if sizes is None and key in self._fresh else sizes

    def _read_open(self, body: dict[str, Any]) -> _Transfer:
        tokens, chunk_tokens, salt = body.get("token_ids"), body.get("chunk_tokens"), body.get("cache_salt", "")
        model = self._runtime.model
        if not isinstance(tokens, list) or not 1 <= len(tokens) <= model.max_context:
            raise BadOpen(f"token_ids must be a list of 1 to {model.max_context} token ids")
        if not all(type(token) is int and 0 <= token < model.vocab_size for token in tokens):
            raise BadOpen(f"token_ids must lie in 0 .. {model.vocab_size - 1}")
        if type(chunk_tokens) is not int or not 16 <= chunk_tokens <= 4096 or chunk_tokens % BLOCK_TOKENS:
            raise BadOpen(f"chunk_tokens must be a multiple of {BLOCK_TOKENS} in 16 .. 4096, not {chunk_tokens!r}")
        if not isinstance(salt, str):
            raise BadOpen("cache_salt must be a string")
        keys = chunk_keys(tokens, chunk_tokens, fingerprint=model.fingerprint, cache_salt=salt)
        return _Transfer(token_ids=tokens, keys=keys, chunk_tokens=chunk_tokens)

    def _on_requested(self, event: ChunkRequested) -> None:
        with self._lock:
            transfer = self._transfers.get(event.transfer_id)
            if transfer is None:
                return
            if event.chunk >= len(transfer.keys) or event.level not in self._runtime.profile.level_names:
                names = ", ".join(self._runtime.profile.level_names)
                reason = f"chunk {event.chunk} of {len(transfer.keys)} at level {event.level!r}: levels are {names}"
                self.server.fail(event.transfer_id, event.chunk, reason)
            elif self._sizes(transfer.keys[event.chunk]) is not None:
                self._offer(event.transfer_id, transfer, event.chunk)
            else:
                self._want_computed(event.transfer_id, transfer, event.chunk)

    def _want_computed(self, transfer_id: str, transfer: _Transfer, chunk: int) -> None:
        """The prompt is computed only when a chunk of it is wanted: the receiver may compute it itself instead."""
        if not transfer.is_computing and len(self._prefills) >= MAX_WAITING_PREFILLS:
            self.server.fail(transfer_id, chunk, f"busy: {len(self._prefills)} prompts wait to be computed")
            return
        transfer.waiting.add(chunk)
        if not transfer.is_computing:
            self._queue_prefill(transfer_id, transfer)

    def _queue_prefill(self, transfer_id: str, transfer: _Transfer) -> None:
        transfer.is_computing = True
        self._prefills.append(transfer_id)
        self._lock.notify_all()

    def _offer(self, transfer_id: str, transfer: _Transfer, chunk: int | None = None) -> None:
        """Have the next chunk encoded, if the last one is on its way: until then its level can be amended."""
        if chunk is not None:
            transfer.ready[chunk] = None
        if transfer.ready and not transfer.is_encoding and self.server.backlog_bytes(transfer_id) == 0:
            self._encode_next(transfer_id, transfer)

    def _encode_next(self, transfer_id: str, transfer: _Transfer) -> None:
        transfer.is_encoding = True
        self._push(URGENT, transfer_id)

    def _push(self, urgency: int, job: Any) -> None:
        heapq.heappush(self._encodes, (urgency, next(self._order), job))
        self._lock.notify_all()

    # -- computing ------------------------------------------------------------------------------------------------

    def _guarded(self, loop: Callable[[], None]) -> None:
        try:
            loop()
        except TransportClosed:
            assert self._stopping
        except BaseException:
            # A worker without one of its threads would answer nothing for ever: let its supervisor see the end.
            log.exception("%s: a thread ended, shutting the worker down", self.worker_id)
            with self._lock:
                self._stopping = True
                self._lock.notify_all()
            self.server.shutdown()
            raise

    def _compute_loop(self) -> None:
        while True:
            with self._lock:
                self._computing = False
                self._lock.notify_all()
                self._lock.wait_for(lambda: self._prefills or self._stopping)
                if self._stopping:
                    return
                transfer_id = self._prefills.popleft()
                transfer = self._transfers.get(transfer_id)
                self._computing = True
                if transfer is not None and not transfer.waiting:
                    transfer.is_computing = False  # another transfer had the same chunks computed meanwhile
                    transfer = None
            if transfer is None:
                continue
            try:
                self._compute(transfer_id, transfer)
            except Exception as error:
                log.exception("%s: a prompt could not be computed", self.worker_id)
                self._end(transfer_id, f"the prompt could not be computed: {type(error).__name__}: {error}")

    def _compute(self, transfer_id: str, transfer: _Transfer) -> None:
        runtime, size = self._runtime, transfer.chunk_tokens
        num_chunks = num_loadable_chunks(len(transfer.token_ids), size)
        num_blocks = blocks_for(num_chunks * size, BLOCK_TOKENS)
        if not runtime.allocator.can_allocate(num_blocks):
            self._end(
                transfer_id,
                f"the prompt needs {num_blocks} KV blocks, the prefill worker has {runtime.pool.num_blocks}",
            )
            return
        table = runtime.allocator.allocate(num_blocks)
        try:
            for index, key in enumerate(transfer.keys):
                start, stop = index * size, (index + 1) * size
                with self._lock:
                    self._lock.wait_for(lambda: len(self._fresh) < MAX_FRESH_CHUNKS or self._stopping)
                    if transfer.closed or self._stopping:
                        return
                if self._reuse(key, table, start=start, stop=stop):
                    with self._lock:
                        self._wake_waiting(key)
                    continue
                tokens = transfer.token_ids[start:stop]
                runtime.engine.forward([SequenceSlice(token_ids=tokens, start=start, block_table=table)])
                k, v = runtime.pool.read(table, start, stop)
                with self._lock:
                    self._counters["computed_tokens_total"] += size
                    self._fresh[key] = _Fresh(k=k, v=v, start=start)
                    self._wake_waiting(key)
                    self._push(LATER, key)
        finally:
            with self._lock:
                runtime.allocator.free(table)
                transfer.is_computing = False
                if transfer.waiting and not transfer.closed and not self._stopping:
                    # Asked for after this run had passed it, and gone from a store that is too small for the prompt.
                    self._queue_prefill(transfer_id, transfer)

    def _reuse(self, key: bytes, table: list[int], *, start: int, stop: int) -> bool:
        """Put a chunk that was computed before into the pages, if it is here. The fresh ones are looked at first:
        a chunk leaves them only when its master is in the store."""
        with self._lock:
            fresh = self._fresh.get(key)
        if fresh is not None:
            self._runtime.pool.write(table, start, fresh.k, fresh.v)
            return True
        master = self.store.get(key, MASTER_LEVEL)
        if master is not None:
            self._runtime.decode_into_pages(master, table, start=start, stop=stop)
        return master is not None

    def _wake_waiting(self, key: bytes) -> None:
        """Whoever waits for this chunk, whichever transfer had it computed, can be served now."""
        for transfer_id, transfer in self._transfers.items():
            for chunk in sorted(transfer.waiting):
                if transfer.keys[chunk] == key:
                    transfer.waiting.discard(chunk)
                    self._offer(transfer_id, transfer, chunk)

    def _end(self, transfer_id: str, reason: str) -> None:
        with self._lock:
            self._transfers.pop(transfer_id, None)
        self.server.end(transfer_id, reason)

    # -- encoding -------------------------------------------------------------------------------------------------

    def _encode_loop(self) -> None:
        offered_at = time.monotonic()
        while True:
            with self._lock:
                self._lock.wait_for(lambda: self._encodes or self._stopping, OFFER_EVERY_S)
                if self._stopping:
                    return
                if time.monotonic() - offered_at >= OFFER_EVERY_S:
                    offered_at = time.monotonic()
                    for transfer_id, transfer in self._transfers.items():
                        self._offer(transfer_id, transfer)
                if not self._encodes:
                    continue
                urgency, _, job = heapq.heappop(self._encodes)
            if urgency == LATER:
                self._encode_master(job)
            else:
                self._encode_for(job)
            with self._lock:
                self._lock.notify_all()

    def _encode_master(self, key: bytes) -> None:
        with self._lock:
            fresh = self._fresh[key]
        try:
            self._levels.store_master(key, fresh.k, fresh.v, start=fresh.start)
        except CodecError:
            log.exception("%s: a chunk cannot be stored", self.worker_id)
        with self._lock:
            del self._fresh[key]

    def _encode_for(self, transfer_id: str) -> None:
        """Encode and supply the first ready chunk of a transfer that is still wanted."""
        while True:
            with self._lock:
                transfer = self._transfers.get(transfer_id)
                if transfer is None:
                    return
                if not transfer.ready:
                    transfer.is_encoding = False
                    return
                chunk = next(iter(transfer.ready))
                del transfer.ready[chunk]
                if self._sizes(transfer.keys[chunk]) is None:  # evicted since it was asked for
                    self._want_computed(transfer_id, transfer, chunk)
                    continue
            level = self.server.take(transfer_id, chunk)
            blob = self._blob_or_fail(transfer_id, transfer, chunk, level) if level is not None else None
            if level is None or blob is None:
                continue  # withdrawn, closed or failed
            with self._lock:
                self._counters["sent_chunks_total"] += 1
                transfer.is_encoding = False  # before the supply, whose end may already ask for the next
            self.server.supply(transfer_id, chunk, level, blob)
            with self._lock:
                self._offer(transfer_id, transfer)  # it may have been withdrawn meanwhile, and nothing was sent
            return

    def _blob_or_fail(self, transfer_id: str, transfer: _Transfer, chunk: int, level: str) -> bytes | None:
        try:
            blob = self._blob(transfer, chunk, level)
        except CodecError as error:
            # For example KV with NaN at a lossy level: only this chunk fails, and the receiver computes it.
            self.server.fail(transfer_id, chunk, f"{type(error).__name__}: {error}")
            return None
        if blob is None:
            self.server.fail(transfer_id, chunk, "the chunk is no longer stored here")
        return blob

    def _blob(self, transfer: _Transfer, chunk: int, level: str) -> bytes | None:
        key, size = transfer.keys[chunk], transfer.chunk_tokens
        with self._lock:
            fresh = self._fresh.get(key)
        kv = (fresh.k, fresh.v) if fresh is not None else None
        return self._levels.blob(key, level, start=chunk * size, stop=(chunk + 1) * size, fresh=kv)
