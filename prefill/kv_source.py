"""A source of KV: keeps chunks encoded, and serves them at the level asked for.

A shell around the codec, the chunk store and a KVServer. Two threads: the server's I/O thread brings events in, the
encode thread makes blobs, the most urgent of all transfers first (prefill/transfers.py). Chunks come in as plain
tensors ("fresh"), from a worker that has computed them, and stay so until their master is in the store. A prefill
worker is a source that also computes what it has not (prefill/worker.py); a decode worker has one for what it computed
itself.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from codec.errors import CodecError
from prefill.chunk_levels import ChunkLevels
from prefill.chunks import split_level, split_part
from prefill.encode_times import EncodeTimes
from prefill.held_chunks import HeldChunks
from prefill.open_request import BadOpen, OpenRequest, read_open
from prefill.prompt import FreshChunk
from prefill.runtime import BLOCK_TOKENS, ModelRuntime
from prefill.store import ChunkStore
from prefill.transfers import Ask, Transfer, Transfers
from transport.curve import CurveKeys
from transport.errors import TransportClosed
from transport.events import BacklogLow, ChunkRequested, SourceEvent, TransferClosed, TransferOpened
from transport.kv_server import KVServer
from transport.local_transfers import LocalTransfers

log = logging.getLogger("kvstream.prefill")

MAX_FRESH_CHUNKS = 32  # computed and not yet in the store
MAX_BEFORE_TAIL = 8  # more of them, and a tail is not worth the encoder's time


class KVSource:
    """Serves until `shutdown`. Raises transport errors when it cannot bind."""

    computes = False  # whether it computes chunks that it has not

    def __init__(
        self,
        runtime: ModelRuntime,
        *,
        store: ChunkStore,
        bind: str = "tcp://127.0.0.1:0",
        worker_id: str = "source-0",
        curve: CurveKeys | None = None,
        insecure: bool = False,
    ) -> None:
        self.worker_id = worker_id
        self.store = store
        self._levels = ChunkLevels(runtime, store)
        self._held = HeldChunks(store)
        self._runtime = runtime
        self._lock = threading.Condition()
        self._transfers = Transfers()
        self._fresh: dict[bytes, FreshChunk] = {}
        self._masters: deque[bytes] = deque()  # fresh chunks to be stored, when nobody waits for a blob
        self._encode_times = EncodeTimes()
        self._stopping = self._encoding = False
        self._serving = threading.Event()  # the server's thread may call before `self.server` is set
        self._counters = {"sent_chunks_total": 0, "unkept_chunks_total": 0}
        self._threads = [self._thread("kv-encode", self._encode_loop)]
        self.server = KVServer(
            bind,
            greeting=runtime.greeting(),
            incarnation=worker_id,
            on_event=self._on_event,
            curve=curve,
            insecure=insecure,
        )
        self.local = LocalTransfers(self._on_event)  # of a receiver in this process
        self._begin()

    def _begin(self) -> None:
        for thread in self._threads:
            thread.start()
        self._serving.set()

    def _thread(self, name: str, loop: Callable[[], None]) -> threading.Thread:
        return threading.Thread(target=self._guarded, args=(loop,), name=name, daemon=True)

    @property
    def is_alive(self) -> bool:
        """Whether all its threads run. A worker that has lost one serves nothing and has to be started anew."""
        return not self._stopping and all(thread.is_alive() for thread in self._threads)

    @property
    def endpoint(self) -> str:
        return self.server.endpoint

    def source_stats(self, prefix: str) -> dict[str, float]:
        """Counters and gauges, by their metric name; those of the store have no prefix."""
        store = self.store.stats()
        with self._lock:
            return {
                **{f"{prefix}_{name}": value for name, value in self._counters.items()},
                f"{prefix}_encoded_chunks_total": self._levels.num_encoded,
                f"{prefix}_transfers_open": len(self._transfers),
                "store_used_bytes": store.used_bytes,
                "store_chunks": store.num_chunks,
                "store_tails": store.num_tails,
                "store_hits_total": store.num_hits,
                "store_evictions_total": store.num_evictions,
                "store_disk_used_bytes": store.disk_used_bytes,
                "store_disk_chunks": store.disk_chunks,
                "store_disk_tails": store.disk_tails,
                "store_disk_hits_total": store.num_disk_hits,
                "store_disk_damaged_total": store.num_disk_damaged,
                "store_disk_off": float(store.is_disk_off),
            }

    def index_changes(self, since: int | None) -> dict[str, Any]:
        """What it holds, for the cluster's index. See HeldChunks."""
        return self._held.changes(since)

    def offer(self, key: bytes, chunk: FreshChunk) -> bool:
        """Keep a chunk that was computed elsewhere in this process, as soon as there is time. False if too many wait
        already: then it is not kept."""
        with self._lock:
            if not self._wants(key, chunk.kl):
                return True
            most = MAX_BEFORE_TAIL if chunk.is_tail else MAX_FRESH_CHUNKS
            if self._stopping or len(self._fresh) >= most:
                self._counters["unkept_chunks_total"] += 1
                return False
            self._add_fresh(key, chunk)
            return True

    def wants(self, key: bytes, kl: float) -> bool:
        """Whether such a chunk would be anything new."""
        with self._lock:
            return self._wants(key, kl)

    def _wants(self, key: bytes, kl: float) -> bool:
        return key not in self._fresh and not self._is_here(key, kl)

    def _add_fresh(self, key: bytes, chunk: FreshChunk) -> None:
        self._fresh[key] = chunk
        self._masters.append(key)
        self._transfers.arrived(key)
        self._lock.notify_all()

    def wait_until_idle(self, timeout_s: float) -> bool:
        """Whether all work is done within `timeout_s`."""
        with self._lock:
            return self._lock.wait_for(lambda: not self._has_work(), timeout_s)

    def _has_work(self) -> bool:
        return bool(self._masters or self._fresh or self._transfers.most_urgent() or self._encoding)

    def check_integrity(self) -> None:
        """When idle: no transfer or fresh chunk left over."""
        self.store.check_integrity()
        self.server.check_integrity()
        with self._lock:
            self._transfers.check_integrity()
            if not self._fresh:
                self._levels.check_integrity()

    def shutdown(self) -> None:
        with self._lock:
            self._stopping = True
            self._lock.notify_all()
        self.server.shutdown()
        self.local.shutdown()
        for thread in self._threads:
            thread.join(timeout=10)

    # -- events, in the server's thread or in that of local transfers -----------------------------------------------

    def _link(self, transfer_id: str) -> KVServer | LocalTransfers:
        """What a transfer goes over."""
        return self.local if transfer_id in self.local else self.server

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
            self._link(event.transfer_id).refuse(event.transfer_id, str(error))
            return
        with self._lock:
            stored = [self._sizes(key, request.max_kl) for key in request.keys]
            kls = [0.0 if found is None else self._kl(key) for key, found in zip(request.keys, stored, strict=True)]
            encode_s = self._encode_times.of_chunk(request.chunk_tokens)
            self._transfers.open(event.transfer_id, request, kls)
        lossy = {"kl": kls} if any(kls) else {}
        self._link(event.transfer_id).accept(
            event.transfer_id,
            {"stored": stored, "computes": self.computes and not request.stored_only, "encode_s": encode_s, **lossy},
        )

    def _sizes(self, key: bytes, max_kl: float) -> dict[str, int] | None:
        """Bytes by level of what can be sent of a chunk without encoding; None: it is not here, or not good enough."""
        if not self._is_here(key, max_kl):
            return None
        return {} if key in self._fresh else self._levels.sizes(key)

    def _kl(self, key: bytes) -> float:
        """The promise of a chunk's KV, before any level makes it worse."""
        fresh = self._fresh.get(key)
        return fresh.kl if fresh is not None else self.store.kl(key) or 0.0

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
                self._link(event.transfer_id).fail(event.transfer_id, event.chunk, wrong)
                return
            ask = Ask(level=event.level, priority=event.priority)
            if self._has(transfer, event.chunk):
                transfer.make_ready(event.chunk, ask)
                self._lock.notify_all()
            else:
                self._want_computed(transfer, event.chunk, ask)

    def _has(self, transfer: Transfer, chunk: int) -> bool:
        """Whether a chunk is here as the receiver was told: it may have gone since, and come back worse."""
        return self._is_here(transfer.request.keys[chunk], transfer.kls[chunk])

    def _is_here(self, key: bytes, max_kl: float) -> bool:
        fresh = self._fresh.get(key)
        kl = fresh.kl if fresh is not None else self.store.kl(key)
        return kl is not None and kl <= max_kl

    def _want_computed(self, transfer: Transfer, chunk: int, ask: Ask) -> None:
        reason = self._transfers.want_computed(transfer, chunk, ask, computes=self.computes)
        if reason is not None:
            self._link(transfer.id).fail(transfer.id, chunk, reason)
        self._lock.notify_all()

    # -- the encode thread ----------------------------------------------------------------------------------------

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
            self.local.shutdown()
            raise

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
            fresh = self._fresh.get(key)
        if fresh is None:
            return  # it came twice, the second time in a better quality
        try:
            self._levels.store_master(key, fresh)
        except CodecError:
            log.exception("%s: a chunk cannot be stored", self.worker_id)
        with self._lock:
            if self._fresh.get(key) is fresh:
                del self._fresh[key]

    def _encode_for(self, transfer: Transfer, chunk: int) -> None:
        """Encode and supply a ready chunk, if it is still wanted."""
        with self._lock:
            ask = transfer.ready.pop(chunk, None)
            if ask is None or transfer.is_closed:
                return
            # Evicted since it was asked for?
            if not self._has(transfer, chunk):
                self._want_computed(transfer, chunk, ask)
                return
        level = self._link(transfer.id).take(transfer.id, chunk)
        blob = self._blob_or_fail(transfer, chunk, level) if level is not None else None
        if level is None or blob is None:
            return  # withdrawn, closed or failed
        with self._lock:
            self._counters["sent_chunks_total"] += 1
            transfer.supplied(ask)
        self._link(transfer.id).supply(transfer.id, chunk, level, blob)
        if self._link(transfer.id).backlog_bytes(transfer.id) == 0:
            with self._lock:  # withdrawn while it was encoded, or too large: then nothing will be said of it
                transfer.unsent_priority = None

    def _blob_or_fail(self, transfer: Transfer, chunk: int, name: str) -> bytes | None:
        begin = time.perf_counter()
        try:
            blob = self._blob(transfer, chunk, name)
        except CodecError as error:
            # For example KV with NaN at a lossy level: only this chunk fails, and the receiver computes it.
            self._link(transfer.id).fail(transfer.id, chunk, f"{type(error).__name__}: {error}")
            return None
        if blob is None:
            self._link(transfer.id).fail(transfer.id, chunk, "the chunk is no longer stored here")
            return None
        with self._lock:
            took_s = time.perf_counter() - begin
            level = split_level(split_part(name)[0])[1]
            self._encode_times.note(level, took_s, num_tokens=transfer.request.chunk_tokens)
        return blob

    def _blob(self, transfer: Transfer, chunk: int, name: str) -> bytes | None:
        key, (start, stop) = transfer.request.keys[chunk], transfer.request.span(chunk)
        with self._lock:
            fresh = self._fresh.get(key)
        return self._levels.blob(key, name, start=start, stop=stop, fresh=fresh)
