"""The chunk store in RAM: encoded chunks by key and level, least recently used out first. Thread-safe, no torch.

An entry's *master* is its lossless encoding, from which any level can be made again. Other levels are kept beside it
while there is room: they are dropped before any master is, because they can be rebuilt.
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
        self._used_bytes = 0
        self._hits = self._misses = self._evictions = 0

    def put(self, key: bytes, level: str, blob: bytes) -> bool:
        """Keep a blob; the same key and level replaces. False if it alone is larger than the store, or it is a derived
        level without its master (it would be the first to go and could not be rebuilt)."""
        with self._lock:
            if len(blob) > self._capacity_bytes or (level != MASTER_LEVEL and key not in self._masters):
                return False
            self._remove(key, level)
            self._make_room(len(blob), keep=key)
            if self._used_bytes + len(blob) > self._capacity_bytes:
                return False  # only this chunk's own master is left, and both do not fit
            self._used_bytes += len(blob)
            if level == MASTER_LEVEL:
                self._masters[key] = blob
            else:
                self._derived[key, level] = blob
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

    def sizes(self, key: bytes) -> dict[str, int] | None:
        """Bytes by level of what is kept of a chunk; None if its master is not here."""
        with self._lock:
            master = self._masters.get(key)
            if master is None:
                return None
            known = {level: len(blob) for (other, level), blob in self._derived.items() if other == key}
            return {MASTER_LEVEL: len(master), **known}

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
            total = sum(map(len, self._masters.values())) + sum(map(len, self._derived.values()))
            assert total == self._used_bytes <= self._capacity_bytes, (total, self._used_bytes)
            assert all(key in self._masters for key, _ in self._derived), "a derived blob without its master"

    def _remove(self, key: bytes, level: str) -> None:
        blob = self._masters.pop(key, None) if level == MASTER_LEVEL else self._derived.pop((key, level), None)
        self._used_bytes -= len(blob) if blob is not None else 0

    def _make_room(self, wanted_bytes: int, *, keep: bytes) -> None:
        while self._used_bytes + wanted_bytes > self._capacity_bytes and self._derived:
            self._evict(*next(iter(self._derived)))
        while self._used_bytes + wanted_bytes > self._capacity_bytes:
            victim = next((key for key in self._masters if key != keep), None)
            if victim is None:
                return
            self._evict(victim, MASTER_LEVEL)

    def _evict(self, key: bytes, level: str) -> None:
        self._remove(key, level)
        self._evictions += 1
