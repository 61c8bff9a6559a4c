"""The prefill worker: a source of KV that also computes prompts, chunk by chunk.

A third thread beside those of `KVSource`, the compute thread, runs the model, one prompt at a time. A chunk is encoded
when it is asked for, while the next one is computed.
"""

from __future__ import annotations

import logging
import time
from typing import Any

from prefill.block_pool import blocks_for
from prefill.busy_share import BusyShare
from prefill.kv_source import MAX_FRESH_CHUNKS, KVSource
from prefill.open_request import OpenRequest
from prefill.page_quality import EXACT
from prefill.peer_chunks import Fetch, PeerChunks
from prefill.prompt import FreshChunk, compute_chunks
from prefill.runtime import BLOCK_TOKENS, ModelRuntime
from prefill.store import ChunkStore
from prefill.transfers import Transfer

log = logging.getLogger("kvstream.prefill")


ANSWER_S = 0.1  # what a peer may take to answer
MEASURED_TOKENS = 256
FIRST_CHUNK_S = 0.2  # what computing a chunk is taken for until one was computed


class PrefillWorker(KVSource):
    """Serves until `shutdown`. Raises transport errors when it cannot bind."""

    computes = True

    def __init__(
        self, runtime: ModelRuntime, *, store: ChunkStore | None = None, worker_id: str = "prefill-0", **options: Any
    ) -> None:
        """options: as for KVSource."""
        self._computing = False
        self._num_computed_tokens = self._num_fetched_tokens = 0
        self._chunk_s = FIRST_CHUNK_S  # what computing the last one took
        # Alone, in whole chunks: what routes are chosen by (docs/routing.md).
        num_tokens = min(MEASURED_TOKENS, runtime.model.max_context, runtime.pool.num_blocks * BLOCK_TOKENS)
        self._tokens_per_s = num_tokens / runtime.time_slice(num_tokens, 0)
        self._busy = BusyShare()
        self._peers = PeerChunks(runtime, worker_id=worker_id, curve=options.get("curve"))
        try:
            super().__init__(runtime, store=store or ChunkStore(512 << 20), worker_id=worker_id, **options)
        except BaseException:
            self._peers.shutdown()
            raise

    def _begin(self) -> None:
        self._threads.append(self._thread("prefill-compute", self._compute_loop))
        super()._begin()

    def stats(self) -> dict[str, float]:
        """Counters and gauges, by their metric name without prefix."""
        with self._lock:
            return {
                **self.source_stats("prefill"),
                "prefill_computed_tokens_total": self._num_computed_tokens,
                "prefill_tokens_per_s": self._tokens_per_s,
                "prefill_busy": self._busy.share(time.monotonic()),
                "waiting_prompt_tokens": self._transfers.num_prefill_tokens,
                "prefill_fetched_tokens_total": self._num_fetched_tokens,
                "prefill_waiting": self._transfers.num_prefills,
            }

    def shutdown(self) -> None:
        super().shutdown()
        self._peers.shutdown()

    def _has_work(self) -> bool:
        return bool(self._transfers.num_prefills or self._computing or super()._has_work())

    def check_integrity(self) -> None:
        """When idle: no page in use, no transfer or computed chunk left over."""
        super().check_integrity()
        if not self._computing:
            self._peers.check_integrity()
        with self._lock:
            self._runtime.allocator.check_integrity()
            if not self._computing:
                assert self._runtime.allocator.num_held == 0, "pages left behind"

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
                runtime.allocator.release(table)
                self._transfers.prefill_ended(transfer)

    def _cannot_compute(self, transfer: Transfer, reason: str) -> None:
        with self._lock:
            for chunk in self._transfers.cannot_compute(transfer, reason):
                self._link(transfer.id).fail(transfer.id, chunk, reason)

    def _compute_chunks(self, transfer: Transfer, table: list[int]) -> None:
        fetch = self._begin_fetch(transfer.request)
        try:
            self._compute_each(transfer, table, fetch)
        finally:
            if fetch is not None:
                self._peers.close(fetch)

    def _begin_fetch(self, request: OpenRequest) -> Fetch | None:
        """Ask a peer for the front of the prompt, as far as it is not here."""
        wanted = [chunk for chunk, key in enumerate(request.keys) if not self._is_here(key, EXACT)]
        return self._peers.begin(request, request.holders[0], wanted) if request.holders and wanted else None

    def _compute_each(self, transfer: Transfer, table: list[int], fetch: Fetch | None) -> None:
        is_fetching = fetch is not None

        def from_peer(chunk: int) -> bytes | None:
            nonlocal is_fetching
            if fetch is None or not is_fetching:
                return None
            # Once it takes longer than computing, it is left for good; the first answer may take a little more.
            blob = fetch.take(chunk, self._chunk_s if fetch.stored is not None else self._chunk_s + ANSWER_S)
            is_fetching = blob is not None
            return blob

        chunks = compute_chunks(
            transfer.request,
            table,
            runtime=self._runtime,
            store=self.store,
            fresh_of=self._fresh_of,
            peer=from_peer,
        )
        while True:
            with self._lock:
                self._lock.wait_for(lambda: len(self._fresh) < MAX_FRESH_CHUNKS or self._stopping)
                if transfer.is_closed or self._stopping:
                    return
            begin = time.perf_counter()
            key, fresh = next(chunks, (None, None))
            if key is None:
                return
            with self._lock:
                if fresh is not None:
                    if fresh.is_fetched:
                        self._num_fetched_tokens += transfer.request.chunk_tokens
                    else:
                        self._num_computed_tokens += transfer.request.chunk_tokens
                        self._chunk_s = time.perf_counter() - begin
                        self._busy.worked(self._chunk_s - self._runtime.engine.waited_s, time.monotonic())
                    self._add_fresh(key, fresh)
                else:
                    self._transfers.arrived(key)
                    self._lock.notify_all()

    def _fresh_of(self, key: bytes) -> FreshChunk | None:
        with self._lock:
            return self._fresh.get(key)
