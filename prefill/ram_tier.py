"""The chunk store's tier in RAM: the books (prefill/tier_index.py) and the memory (prefill/blob_arena.py). No locks."""

from __future__ import annotations

import logging

from prefill.blob_arena import BlobArena, BlobPlace
from prefill.tier_index import ChunkMeta, Name, StoreShares, TierIndex

log = logging.getLogger("kvstream.store")


class RamTier:
    def __init__(self, index: TierIndex) -> None:
        self.index = index
        self.num_evictions = 0
        self._arena = BlobArena()
        self._places: dict[Name, BlobPlace] = {}

    @property
    def taken_bytes(self) -> int:
        """Of the system's memory, for blobs."""
        return self._arena.taken_bytes

    def put(self, key: bytes, level: str, blob: bytes, meta: ChunkMeta, now: float) -> list[Name] | None:
        """-> what was evicted for it; None if it was refused."""
        evicted = self.index.admit(key, level, len(blob), meta, now)
        if evicted is None:
            return None
        self._free([*evicted, (key, level)])
        self.num_evictions += len(evicted)
        try:
            self._places[key, level] = self._arena.put(blob)
        except OSError as error:
            log.warning("the chunk store gets no more memory (%s): a chunk of %d bytes is not kept", error, len(blob))
            self.index.remove(key, level)
            evicted.append((key, level))
        return evicted

    def get(self, key: bytes, level: str) -> bytes | None:
        place = self._places.get((key, level))
        return None if place is None else self._arena.get(place)

    def remove(self, key: bytes, level: str) -> None:
        if self.index.remove(key, level):
            self._free([(key, level)])

    def expire(self, now: float) -> list[Name]:
        expired = self.index.expire(now)
        self._free(expired)
        return expired

    def set_shares(self, tenant_shares: StoreShares) -> list[Name]:
        return self._evicted(self.index.set_shares(tenant_shares))

    def unpinned(self) -> list[Name]:
        return self._evicted(self.index.unpinned())

    def _evicted(self, names: list[Name]) -> list[Name]:
        self._free(names)
        self.num_evictions += len(names)
        return names

    def _free(self, names: list[Name]) -> None:
        for name in names:
            place = self._places.pop(name, None)
            if place is not None:
                self._arena.free(place)

    def check_integrity(self) -> None:
        self.index.check_integrity()
        sizes = {(key, level): size for key in self.index.all_keys() for level, size in self.index.levels(key).items()}
        assert sizes == {name: place.num_bytes for name, place in self._places.items()}
        self._arena.check_integrity(list(self._places.values()))
