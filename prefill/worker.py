"""The source of KV: computes prompts chunk by chunk, keeps them encoded, and serves chunks at the level asked for.

A shell around the engine, the codec, the chunk store and a KVServer. Three threads: the server's I/O thread brings
events in, the compute thread runs the model, the encode thread makes blobs, the most urgent of all transfers first
(prefill/transfers.py). A chunk is encoded when it is asked for, while the next one is computed; between the two a
computed chunk waits as plain tensors ("fresh") until its master is in the store.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from codec.errors import CodecError
from prefill.block_allocator import blocks_for
from prefill.chunk_levels import ChunkLevels
from prefill.chunks import split_level
from prefill.encode_times import EncodeTimes
from prefill.open_request import BadOpen, OpenRequest, read_open
from prefill.prompt import FreshChunk, compute_chunks
from prefill.runtime import BLOCK_TOKENS, ModelRuntime
from prefill.store import ChunkStore
from prefill.transfers import Ask, Transfer, Transfers
from transport.curve import CurveKeys
from transport.errors import TransportClosed
from transport.events import BacklogLow, ChunkRequested, SourceEvent, TransferClosed, TransferOpened
from transport.kv_server import KVServer

log = logging.getLogger("kvstream.prefill")

MAX_FRESH_CHUNKS = 32  # computed and not yet in the store; the compute thread waits for the encoder beyond that


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
        self._transfers = Transfers()
        self._fresh: dict[bytes, FreshChunk] = {}
        self._masters: deque[bytes] = deque()  # fresh chunks to be stored, when nobody waits for a blob
        self._encode_times = EncodeTimes()
        self._stopping = self._computing = self._encoding = False
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
                "prefill_waiting": self._transfers.num_prefills,
                "store_used_bytes": store.used_bytes,
                "store_chunks": store.num_chunks,
                "store_hits_total": store.num_hits,
                "store_evictions_total": store.num_evictions,
            }

    def wait_until_idle(self, timeout_s: float) -> bool:
        """Whether all computing and encoding is done within `timeout_s`."""
        with self._lock:
            return self._lock.wait_for(lambda: not self._has_work(), timeout_s)

    def _has_work(self) -> bool:
        queued = self._transfers.num_prefills or self._masters or self._fresh or self._transfers.most_urgent()
        return bool(queued or self._computing or self._encoding)

    def check_integrity(self) -> None:
        """When idle: no page in use, no transfer or computed chunk left over."""
        self.store.check_integrity()
        self.server.check_integrity()
        with self._lock:
            self._runtime.allocator.check_integrity()
            self._transfers.check_integrity()
            if not self._fresh:
                self._levels.check_integrity()
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
                    if transfer is not None:
                        transfer.unsent_priority = None
                        self._lock.notify_all()
            case TransferClosed():
                with self._lock:
                    self._transfers.close(event.transfer_id)
                    self._lock.notify_all()

    def _on_opened(self, event: TransferOpened) -> None:
        try:
            request = self._read_open(event.body)
        except BadOpen as error:
            self.server.refuse(event.transfer_id, str(error))
            return
        with self._lock:
            sizes = {key: self._levels.sizes(key) for key in request.keys}
            stored = [{} if sizes[key] is None and key in self._fresh else sizes[key] for key in request.keys]
            encode_s = self._encode_times.of_chunk(request.chunk_tokens)
            self._transfers.open(event.transfer_id, request)
        self.server.accept(event.transfer_id, {"stored": stored, "encode_s": encode_s})

    def _read_open(self, body: dict[str, Any]) -> OpenRequest:
        model = self._runtime.model
        return read_open(
            body, max_context=model.max_context, vocab_size=model.vocab_size, block_tokens=BLOCK_TOKENS,
            fingerprint=model.fingerprint,
        )  # fmt: skip

    def _on_requested(self, event: ChunkRequested) -> None:
        with self._lock:
            transfer = self._transfers.get(event.transfer_id)
            if transfer is None:
                return
            num_chunks = len(transfer.request.keys)
            wrong = self._levels.check(event.level)
            if event.chunk >= num_chunks:
                wrong = f"there is no chunk {event.chunk}: this prompt has {num_chunks}"
            if wrong is not None:
                transfer.drop(event.chunk)
                self.server.fail(event.transfer_id, event.chunk, wrong)
                return
            ask = Ask(level=event.level, priority=event.priority)
            if self._is_here(transfer.request.keys[event.chunk]):
                transfer.make_ready(event.chunk, ask)
                self._lock.notify_all()
            else:
                self._want_computed(transfer, event.chunk, ask)

    def _is_here(self, key: bytes) -> bool:
        return key in self._fresh or self.store.sizes(key) is not None

    def _want_computed(self, transfer: Transfer, chunk: int, ask: Ask) -> None:
        reason = self._transfers.want_computed(transfer, chunk, ask)
        if reason is not None:
            self.server.fail(transfer.id, chunk, reason)
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
                self._lock.wait_for(lambda: self._transfers.num_prefills or self._stopping)
                if self._stopping:
                    return
                self._computing = True
                transfer = self._transfers.next_prefill()
            if transfer is not None:
                self._compute(transfer)

    def _compute(self, transfer: Transfer) -> None:
        """Chunk by chunk from the first. What cannot be computed fails; the transfer goes on with what is stored."""
        runtime = self._runtime
        num_blocks = blocks_for(len(transfer.request.keys) * transfer.request.chunk_tokens, BLOCK_TOKENS)
        table: list[int] = []
        try:
            if runtime.allocator.can_allocate(num_blocks):
                table = runtime.allocator.allocate(num_blocks)
                self._compute_chunks(transfer, table)
            else:
                room = f"the prompt needs {num_blocks} KV blocks, the prefill worker has {runtime.pool.num_blocks}"
                self._cannot_compute(transfer, room)
        except Exception as error:
            log.exception("%s: a prompt could not be computed", self.worker_id)
            self._cannot_compute(transfer, f"the prompt could not be computed: {type(error).__name__}: {error}")
        finally:
            with self._lock:
                runtime.allocator.free(table)
                self._transfers.prefill_ended(transfer)

    def _cannot_compute(self, transfer: Transfer, reason: str) -> None:
        with self._lock:
            for chunk in self._transfers.cannot_compute(transfer, reason):
                self.server.fail(transfer.id, chunk, reason)

    def _compute_chunks(self, transfer: Transfer, table: list[int]) -> None:
        chunks = compute_chunks(
            transfer.request, table, runtime=self._runtime, store=self.store, fresh_of=self._fresh_of
        )
        while True:
            with self._lock:
                self._lock.wait_for(lambda: len(self._fresh) < MAX_FRESH_CHUNKS or self._stopping)
                if transfer.is_closed or self._stopping:
                    return
            key, fresh = next(chunks, (None, None))
            if key is None:
                return
            with self._lock:
                if fresh is not None:
                    self._counters["computed_tokens_total"] += transfer.request.chunk_tokens
                    self._fresh[key] = fresh
                    self._masters.append(key)
                self._transfers.arrived(key)
                self._lock.notify_all()

    def _fresh_of(self, key: bytes) -> FreshChunk | None:
        with self._lock:
            return self._fresh.get(key)

    # -- encoding -------------------------------------------------------------------------------------------------

    def _encode_loop(self) -> None:
        while True:
            with self._lock:
                self._encoding = False
                self._lock.notify_all()
                self._lock.wait_for(lambda: self._masters or self._stopping or self._transfers.most_urgent())
                if self._stopping:
                    return
                self._encoding = True
                due = self._transfers.most_urgent()
                key = self._masters.popleft() if due is None else None
            if due is not None:
                self._encode_for(*due)
            elif key is not None:
                self._encode_master(key)

    def _encode_master(self, key: bytes) -> None:
        with self._lock:
            fresh = self._fresh[key]
        try:
            self._levels.store_master(key, fresh.k, fresh.v, start=fresh.start)
        except CodecError:
            log.exception("%s: a chunk cannot be stored", self.worker_id)
        with self._lock:
            del self._fresh[key]

    def _encode_for(self, transfer: Transfer, chunk: int) -> None:
        """Encode and supply a ready chunk, if it is still wanted."""
        with self._lock:
            ask = transfer.ready.pop(chunk, None)
            if ask is None or transfer.is_closed:
                return
            if not self._is_here(transfer.request.keys[chunk]):  # evicted since it was asked for
                self._want_computed(transfer, chunk, ask)
                return
        level = self.server.take(transfer.id, chunk)
        blob = self._blob_or_fail(transfer, chunk, level) if level is not None else None
        if level is None or blob is None:
            return  # withdrawn, closed or failed
        with self._lock:
            self._counters["sent_chunks_total"] += 1
            transfer.supplied(ask)
        self.server.supply(transfer.id, chunk, level, blob)
        if self.server.backlog_bytes(transfer.id) == 0:
            with self._lock:  # withdrawn while it was encoded, or too large: then nothing will be said of it
                transfer.unsent_priority = None

    def _blob_or_fail(self, transfer: Transfer, chunk: int, name: str) -> bytes | None:
        begin = time.perf_counter()
        try:
            blob = self._blob(transfer, chunk, name)
        except CodecError as error:
            # For example KV with NaN at a lossy level: only this chunk fails, and the receiver computes it.
            self.server.fail(transfer.id, chunk, f"{type(error).__name__}: {error}")
            return None
        if blob is None:
            self.server.fail(transfer.id, chunk, "the chunk is no longer stored here")
            return None
        with self._lock:
            took_s = time.perf_counter() - begin
            self._encode_times.note(split_level(name)[1], took_s, num_tokens=transfer.request.chunk_tokens)
        return blob

    def _blob(self, transfer: Transfer, chunk: int, name: str) -> bytes | None:
        key, (start, stop) = transfer.request.keys[chunk], transfer.request.span(chunk)
        fresh = self._fresh_of(key)
        kv = (fresh.k, fresh.v) if fresh is not None else None
        return self._levels.blob(key, name, start=start, stop=stop, fresh=kv)
