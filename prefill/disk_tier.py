"""The chunk store's tier on disk: the books (prefill/tier_index.py), the file (disk_store.py), the thread between them
(disk_writer.py). What the books hold is on disk or about to be; blobs are read from either."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from prefill.disk_records import ChunkRecord
from prefill.disk_store import DeleteBlob, DiskStore, PutBlob, StoreDamaged
from prefill.disk_writer import OFF_S, DiskWriter
from prefill.tier_index import MASTER_LEVEL, ChunkMeta, Name, StoreShares, TierIndex

log = logging.getLogger("kvstream.store")

PAYLOAD_SHARE = 0.85  # of the file: the rest are holes between blobs, the tree, and pages not yet free for reuse
MAX_BATCH_BYTES = 16 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskOptions:
    """path: a directory of this store's own. capacity_bytes: the file is never larger. namespace: in words, all that
    must agree for a blob to be of use (model fingerprint, layout, chunk tokens, profile, blob version). levels: what
    is kept beside masters, the finest quantized one as a rule. queue_bytes: of blobs that wait to be written."""

    path: Path
    capacity_bytes: int
    namespace: str
    levels: frozenset[str] = frozenset()
    queue_bytes: int = 64 << 20
    off_s: float = OFF_S


class DiskTier:
    """Every method but `read`, `flush` and `close` is called under `lock`. on_change(keys): called under it as well, by
    the writing thread, when these may have gone. Raises disk_store.StoreError when the path cannot be used."""

    def __init__(
        self,
        options: DiskOptions,
        *,
        pins: Mapping[bytes, int],
        tenant_shares: StoreShares | None,
        ttl_s: float | None,
        now: float,
        lock: AbstractContextManager[object],
        on_change: Callable[[Iterable[bytes]], None],
    ) -> None:
        self._store = DiskStore(options.path, capacity_bytes=options.capacity_bytes, namespace=options.namespace)
        self._levels = options.levels | {MASTER_LEVEL}
        self._payload_bytes = int(options.capacity_bytes * PAYLOAD_SHARE)
        self.index = TierIndex(self._payload_bytes, pins=pins, tenant_shares=tenant_shares, ttl_s=ttl_s)
        self.capacity_bytes = options.capacity_bytes
        self.num_evictions = self.num_damaged = self.num_skipped = 0
        self._lock, self._on_change = lock, on_change
        found = self._load(options.path)
        self.writer = DiskWriter(
            self._store,
            queue_bytes=options.queue_bytes,
            batch_bytes=max(1, min(MAX_BATCH_BYTES, options.capacity_bytes // 32)),
            on_cap=self._at_cap,
            on_failed=self._on_failed,
            on_reset=self._on_reset,
            off_s=options.off_s,
        )
        self._enter(found, now)
        log.info("the chunk store %s holds %d chunks, %d bytes", options.path, self.index.num_masters, self.used_bytes)

    @property
    def used_bytes(self) -> int:
        return self.index.used_bytes

    @property
    def file_bytes(self) -> int:
        return self._store.file_bytes

    def put(self, key: bytes, level: str, blob: bytes, meta: ChunkMeta, now: float) -> list[Name] | None:
        """-> what is evicted for it; None if it is not taken: no room, writing is off, or the queue is full."""
        if level not in self._levels or (level != MASTER_LEVEL and (key, MASTER_LEVEL) not in self.index):
            return None
        if not self.writer.has_room(len(blob)):
            self.num_skipped += 1
            return None
        evicted = self.index.admit(key, level, len(blob), meta, now)
        if evicted is None:
            return None
        self.num_evictions += len(evicted)
        self._delete(evicted)
        self.writer.write(PutBlob(key=key, level=level, blob=blob, meta=meta, used_at=now))
        return evicted

    def touch(self, key: bytes, level: str, now: float) -> None:
        if (key, MASTER_LEVEL) in self.index:
            self.index.touch(key, level, now)
            self.writer.touch(key, now)

    def remove(self, key: bytes, level: str) -> None:
        if self.index.remove(key, level):
            self._delete([(key, level)])

    def expire(self, now: float) -> list[Name]:
        expired = self.index.expire(now)
        self._delete(expired)
        return expired

    def set_shares(self, tenant_shares: StoreShares) -> list[Name]:
        return self._evicted(self.index.set_shares(tenant_shares))

    def unpinned(self) -> list[Name]:
        return self._evicted(self.index.unpinned())

    def drop_damaged(self, key: bytes, level: str) -> None:
        """What could not be read is computed again; without its master, a chunk goes as a whole."""
        self.num_damaged += 1
        log.warning("a chunk of the store on disk was damaged: its %s blob is dropped", level)
        for name in self.index.levels(key) if level == MASTER_LEVEL else [level]:
            self.remove(key, name)

    # -- without the lock: they may wait for the disk -------------------------------------------------------------

    def read(self, key: bytes, level: str) -> bytes | None:
        """The blob, verified; None if it is damaged, or gone."""
        queued = self.writer.queued(key, level)
        return queued.blob if queued is not None else self._store.read(key, level)

    def flush(self, timeout_s: float) -> bool:
        return self.writer.flush(timeout_s)

    def close(self, timeout_s: float) -> bool:
        is_flushed = self.writer.close(timeout_s)
        self._store.close()
        return is_flushed

    # -- inside ---------------------------------------------------------------------------------------------------

    def _evicted(self, names: list[Name]) -> list[Name]:
        self._delete(names)
        self.num_evictions += len(names)
        return names

    def _delete(self, names: Iterable[Name]) -> None:
        for key, level in names:
            self.writer.write(DeleteBlob(key=key, level=level))

    def _load(self, path: Path) -> list[tuple[bytes, ChunkRecord, float]]:
        try:
            try:
                return self._store.load()
            except StoreDamaged as error:
                log.warning("the chunk store %s starts empty: %s", path, error)
                self._store.reset()
                return []
        except BaseException:
            self._store.close()
            raise

    def _enter(self, found: list[tuple[bytes, ChunkRecord, float]], now: float) -> None:
        """What lies there, longest unused first, so that what is over the limits now set goes by the usual rules."""
        for is_master in (True, False):
            for key, record, used_at in sorted(found, key=lambda chunk: chunk[2]):
                for level, size in record.levels.items():
                    if (level == MASTER_LEVEL) != is_master:
                        continue
                    evicted = None
                    if level in self._levels and (is_master or (key, MASTER_LEVEL) in self.index):
                        evicted = self.index.admit(key, level, size, record.meta, min(used_at, now))
                    self._delete([(key, level)] if evicted is None else evicted)

    def _at_cap(self, wanted_bytes: int) -> None:
        """The file is full before the books are: small blobs, or holes. Count on a little less from now on."""
        with self._lock:
            capacity_bytes = max(self.index.capacity_bytes - self._payload_bytes // 50, self._payload_bytes // 2)
            self.index.capacity_bytes = capacity_bytes
            evicted = self.index.evict(wanted_bytes)
            self.index.capacity_bytes = max(capacity_bytes, self.index.used_bytes)
            self.num_evictions += len(evicted)
            self._delete(evicted)
            self._on_change({key for key, _ in evicted})

    def _on_failed(self, puts: list[PutBlob]) -> None:
        with self._lock:
            for put in puts:
                if self.writer.queued(put.key, put.level) is None:  # else it was put again
                    for level in self.index.levels(put.key) if put.level == MASTER_LEVEL else [put.level]:
                        self.remove(put.key, level)
            self._on_change({put.key for put in puts})

    def _on_reset(self) -> None:
        with self._lock:
            keys = list(self.index.masters())
            for key in keys:
                is_queued = self.writer.queued(key, MASTER_LEVEL) is not None
                for level in self.index.levels(key):
                    if not is_queued or self.writer.queued(key, level) is None:
                        self.remove(key, level)
            self._on_change(keys)
