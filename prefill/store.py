"""The chunk store in RAM: encoded chunks by key and level, least recently used out first. Thread-safe, no torch.

An entry's *master* is its lossless encoding, from which any level can be made again. Other levels are kept beside it
in the room that masters leave: they are dropped before any master is and never cost one, because they can be rebuilt.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass

MASTER_LEVEL = "lossless"


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreStats:
    num_chunks: int
    num_blobs: int
    used_bytes: int
    capacity_bytes: int
    num_hits: int
    num_misses: int
    num_evictions: int


class ChunkStore:
    """Blobs under (chunk key, level), at most `capacity_bytes` of payload in all."""

    def __init__(self, capacity_bytes: int) -> None:
        assert capacity_bytes > 0
        self._capacity_bytes = capacity_bytes
        self._lock = threading.Lock()
        self._masters: OrderedDict[bytes, bytes] = OrderedDict()
        self._derived: OrderedDict[tuple[bytes, str], bytes] = OrderedDict()
        self._derived_sizes: dict[bytes, dict[str, int]] = {}  # by key: a look at one chunk must not scan all
        self._used_bytes = self._master_bytes = 0
        self._hits = self._misses = self._evictions = 0

    def put(self, key: bytes, level: str, blob: bytes) -> bool:
        """Keep a blob; the same key and level replaces. False if it is larger than the store (a derived level: than
        what masters leave of it), or a derived level without its master (which could not be rebuilt)."""
        with self._lock:
            is_master = level == MASTER_LEVEL
            taken_bytes = 0 if is_master else self._master_bytes
            if taken_bytes + len(blob) > self._capacity_bytes or not (is_master or key in self._masters):
                return False
            self._remove(key, level)
            self._make_room(len(blob))
            self._used_bytes += len(blob)
            if is_master:
                self._masters[key] = blob
                self._master_bytes += len(blob)
            else:
                self._derived[key, level] = blob
                self._derived_sizes.setdefault(key, {})[level] = len(blob)
            return True

    def get(self, key: bytes, level: str) -> bytes | None:
        """The blob, or None. Counts as a use of the chunk."""
        with self._lock:
            blob = self._masters.get(key) if level == MASTER_LEVEL else self._derived.get((key, level))
            if key in self._masters:
                self._masters.move_to_end(key)
            if blob is None:
                self._misses += 1
                return None
            self._hits += 1
            if level != MASTER_LEVEL:
                self._derived.move_to_end((key, level))
            return blob

    def peek(self, key: bytes, level: str) -> bytes | None:
        """The blob, or None, without counting as a use."""
        with self._lock:
            return self._masters.get(key) if level == MASTER_LEVEL else self._derived.get((key, level))

    def sizes(self, key: bytes) -> dict[str, int] | None:
        """Bytes by level of what is kept of a chunk; None if its master is not here."""
        with self._lock:
            master = self._masters.get(key)
            if master is None:
                return None
            return {MASTER_LEVEL: len(master), **self._derived_sizes.get(key, {})}

    def stats(self) -> StoreStats:
        with self._lock:
            return StoreStats(
                num_chunks=len(self._masters),
                num_blobs=len(self._masters) + len(self._derived),
                used_bytes=self._used_bytes,
                capacity_bytes=self._capacity_bytes,
                num_hits=self._hits,
                num_misses=self._misses,
                num_evictions=self._evictions,
            )

    def check_integrity(self) -> None:
        """The bytes add up and stay within the capacity; every derived blob has its master."""
        with self._lock:
            masters_bytes = sum(map(len, self._masters.values()))
            total = masters_bytes + sum(map(len, self._derived.values()))
            assert masters_bytes == self._master_bytes, (masters_bytes, self._master_bytes)
            assert total == self._used_bytes <= self._capacity_bytes, (total, self._used_bytes)
            assert all(key in self._masters for key, _ in self._derived), "a derived blob without its master"
            sizes = {(key, level): size for key, of in self._derived_sizes.items() for level, size in of.items()}
            assert sizes == {name: len(blob) for name, blob in self._derived.items()}

    def _remove(self, key: bytes, level: str) -> None:
        is_master = level == MASTER_LEVEL
        blob = self._masters.pop(key, None) if is_master else self._derived.pop((key, level), None)
        if blob is None:
            return
        self._used_bytes -= len(blob)
        if is_master:
            self._master_bytes -= len(blob)
            return
        del self._derived_sizes[key][level]
        if not self._derived_sizes[key]:
            del self._derived_sizes[key]

    def _make_room(self, wanted_bytes: int) -> None:
        while self._used_bytes + wanted_bytes > self._capacity_bytes:
            if self._derived:
                self._evict(*next(iter(self._derived)))
            else:
                self._evict(next(iter(self._masters)), MASTER_LEVEL)

    def _evict(self, key: bytes, level: str) -> None:
        self._remove(key, level)
        self._evictions += 1
