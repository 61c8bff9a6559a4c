"""The thread that writes to the disk store: a bounded queue, a commit for each batch, and what happens when one fails.

Nobody who puts a chunk waits for the disk. A blob can be read from the moment it is queued. When the disk is full,
writing is off for a while: what is put meanwhile is kept in RAM only, and what is on disk is still read.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence

from prefill.disk_store import DeleteBlob, DiskStore, PutBlob, StoreDamaged, StoreError, Write, WriteFailed
from prefill.tier_index import Name

log = logging.getLogger("kvstream.store")

OFF_S = 30.0  # without writes after one failed
TOUCH_S = 10.0  # uses are written with the next batch, or after so long
MAX_TRIES = 4  # of a batch that meets the cap: after its deletions, then each with more room


class DiskWriter:
    """on_cap(bytes): the file is at its cap, evict at least so much. on_failed(puts): these are not on disk.
    on_reset(): nothing written so far is on disk any more. All are called without a lock, by the writing thread."""

    def __init__(
        self,
        store: DiskStore,
        *,
        queue_bytes: int,
        batch_bytes: int,
        on_cap: Callable[[int], None],
        on_failed: Callable[[list[PutBlob]], None],
        on_reset: Callable[[], None],
        off_s: float = OFF_S,
    ) -> None:
        self._store, self._queue_bytes, self._batch_bytes, self._off_s = store, queue_bytes, batch_bytes, off_s
        self._on_cap, self._on_failed, self._on_reset = on_cap, on_failed, on_reset
        self._lock = threading.Condition(threading.RLock())
        self._queue: deque[Write] = deque()
        self._queued_bytes = 0  # of blobs in the queue and in the batch at hand
        self._newest: dict[Name, Write] = {}  # of what is queued or being written
        self._used_at: dict[bytes, float] = {}
        self._touched_since: float | None = None
        self._off_until = float("-inf")
        self._is_busy = self._stopping = self._flushing = False
        self.num_written_bytes = self.num_failed_writes = 0
        self._thread = threading.Thread(target=self._run, name="store-writer", daemon=True)
        self._thread.start()

    # -- by any thread --------------------------------------------------------------------------------------------

    @property
    def is_off(self) -> bool:
        """Whether a write failed a short while ago."""
        return time.monotonic() < self._off_until

    def has_room(self, num_bytes: int) -> bool:
        """Whether a blob of that size can be queued now."""
        with self._lock:
            return not (self.is_off or self._stopping) and self._queued_bytes + num_bytes <= self._queue_bytes

    def write(self, write: Write) -> None:
        with self._lock:
            if isinstance(write, PutBlob):
                self._queued_bytes += len(write.blob)
            self._queue.append(write)
            self._newest[write.key, write.level] = write
            self._lock.notify_all()

    def touch(self, key: bytes, used_at: float) -> None:
        with self._lock:
            self._used_at[key] = used_at
            if self._touched_since is None:
                self._touched_since = time.monotonic()
                self._lock.notify_all()

    def queued(self, key: bytes, level: str) -> PutBlob | None:
        """What is about to be written under the name; None: nothing, or its deletion."""
        with self._lock:
            newest = self._newest.get((key, level))
            return newest if isinstance(newest, PutBlob) else None

    def flush(self, timeout_s: float) -> bool:
        """Whether all that was queued is on the disk. False at once when writing is off."""
        with self._lock:
            self._flushing = True
            self._lock.notify_all()
            self._lock.wait_for(lambda: self._is_done() or self.is_off, timeout_s)
            self._flushing = False
            return self._is_done() and not self.is_off

    def close(self, timeout_s: float) -> bool:
        """Flush and end the thread. Whether all was written."""
        is_flushed = self.flush(timeout_s)
        with self._lock:
            self._stopping = True
            self._lock.notify_all()
        self._thread.join(timeout_s)
        return is_flushed and not self._thread.is_alive()

    def _is_done(self) -> bool:
        return not (self._queue or self._used_at or self._is_busy)

    # -- the writing thread ---------------------------------------------------------------------------------------

    def _run(self) -> None:
        while True:
            with self._lock:
                self._is_busy = False
                self._lock.notify_all()
                while not self._is_due() and not self._stopping:
                    self._lock.wait(self._until_due_s())
                if self._stopping:
                    return
                self._is_busy = True
                batch, used_at = self._next_batch()
            try:
                self._write(batch, used_at)
            except Exception:
                log.exception("the chunk store's writer met an error of its own; writing is off for a while")
                self._failed(batch)

    def _is_due(self) -> bool:
        return not self.is_off and (bool(self._queue) or (bool(self._used_at) and self._until_touch_s() <= 0))

    def _until_touch_s(self) -> float:
        if self._flushing or self._touched_since is None:
            return 0.0
        return self._touched_since + TOUCH_S - time.monotonic()

    def _until_due_s(self) -> float | None:
        if not (self._queue or self._used_at):
            return None
        return max(self._off_until - time.monotonic(), 0.0 if self._queue else self._until_touch_s(), 0.001)

    def _next_batch(self) -> tuple[list[Write], dict[bytes, float]]:
        batch: list[Write] = []
        num_bytes = 0
        while self._queue and num_bytes < self._batch_bytes:
            write = self._queue.popleft()
            num_bytes += len(write.blob) if isinstance(write, PutBlob) else 0
            batch.append(write)
        batch = self._without_overtaken(batch)
        waiting = {write.key for write in self._queue}  # their time is written when they are there
        used_at = {key: at for key, at in self._used_at.items() if key not in waiting}
        self._used_at = {key: at for key, at in self._used_at.items() if key in waiting}
        self._touched_since = None
        return batch, used_at

    def _write(self, batch: list[Write], used_at: dict[bytes, float]) -> None:
        for attempt in range(MAX_TRIES):
            num_bytes = sum(len(write.blob) for write in batch if isinstance(write, PutBlob))
            try:
                self._store.commit(batch, used_at)
            except WriteFailed as error:
                if not error.is_cap or attempt == MAX_TRIES - 1:
                    log.warning("the chunk store cannot write: %s; kept in RAM only for %.0f s", error, self._off_s)
                    break
                if attempt:
                    self._on_cap(2 * num_bytes)
                batch = self._deletes_first(batch)
            except StoreDamaged as error:
                self._reset(error, batch)
                return
            else:
                self.num_written_bytes += num_bytes
                self._settle(batch)
                return
        self._failed(batch)

    def _deletes_first(self, batch: list[Write]) -> list[Write]:
        """Commit all deletions, of the batch and of the queue. -> what is left of the batch. No put of theirs comes
        before them: it would have been overtaken. Pages freed by a commit can be written by the next but one."""
        with self._lock:
            deletes = [write for write in (*batch, *self._queue) if isinstance(write, DeleteBlob)]
            self._queue = deque(write for write in self._queue if isinstance(write, PutBlob))
        try:
            self._store.commit(deletes, {})
            self._store.release_freed()
        except WriteFailed:
            with self._lock:
                self._queue.extendleft(reversed(deletes))
        else:
            self._settle(deletes)
        return self._without_overtaken([write for write in batch if isinstance(write, PutBlob)])

    def _without_overtaken(self, batch: Sequence[Write]) -> list[Write]:
        """Less the puts that were deleted or replaced meanwhile: their deletion may be on the disk already."""
        with self._lock:
            left: list[Write] = []
            for write in batch:
                if not isinstance(write, PutBlob) or self._newest.get((write.key, write.level)) is write:
                    left.append(write)
                else:
                    self._queued_bytes -= len(write.blob)
            return left

    def _settle(self, batch: Sequence[Write]) -> list[PutBlob]:
        """A batch is done with. -> the puts that were not overtaken meanwhile."""
        current = []
        with self._lock:
            for write in batch:
                name = (write.key, write.level)
                if isinstance(write, PutBlob):
                    self._queued_bytes -= len(write.blob)
                if self._newest.get(name) is write:
                    del self._newest[name]
                    if isinstance(write, PutBlob):
                        current.append(write)
        return current

    def _failed(self, batch: list[Write]) -> None:
        """Nothing of it was written: the puts are given up, the deletions tried again later."""
        deletes = [write for write in batch if isinstance(write, DeleteBlob)]
        with self._lock:
            self.num_failed_writes += 1
            self._off_until = time.monotonic() + self._off_s
            self._queue.extendleft(reversed(deletes))
            self._lock.notify_all()
        self._on_failed(self._settle([write for write in batch if isinstance(write, PutBlob)]))

    def _reset(self, error: StoreDamaged, batch: list[Write]) -> None:
        log.warning("the chunk store starts empty: %s", error)
        self._settle(batch)
        try:
            self._store.reset()
        except (StoreError, OSError) as reason:
            log.warning("the chunk store cannot be begun anew: %s; tried again in %.0f s", reason, self._off_s)
            self._failed([])
        self._on_reset()
