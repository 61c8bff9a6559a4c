"""The chunk store: encoded chunks by key and level, in RAM and, given a directory, on disk. Thread-safe, no torch.

An entry's *master* is its lossless encoding, from which any level can be made again. Other levels, *derived* ones, are
kept beside it in the room that masters leave: they are dropped before any master is and never cost one. A chunk is held
while its master is in some tier; then what is derived of it goes too. docs/store.md says what is kept where, and what
happens on failure.
"""

from __future__ import annotations

import math
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace

from prefill.disk_tier import DiskOptions, DiskTier
from prefill.ram_tier import RamTier
from prefill.store_changes import ChangeLog, Changes, StoreTier
from prefill.tier_index import MASTER_LEVEL, ChunkMeta, Name, StoreShares, TierIndex

__all__ = ["MASTER_LEVEL", "Changes", "ChunkStore", "DiskOptions", "StoreShares", "StoreStats", "TenantBytes"]

MAX_CHANGES = 100_000  # remembered for `changes`
READ_TRIES = 3  # of a blob that is replaced while it is read from disk


@dataclass(frozen=True, slots=True, kw_only=True)
class TenantBytes:
    """Payload in each tier, of a tenant."""

    ram_bytes: int = 0
    disk_bytes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreStats:
    """num_chunks to taken_bytes, num_evictions: of the tier in RAM; taken_bytes: what it has from the system.
    num_hits: in either tier. disk_skipped: puts that the disk did not take at once; damaged: blobs found so."""

    num_chunks: int
    num_blobs: int
    used_bytes: int
    capacity_bytes: int
    num_hits: int
    num_misses: int
    num_evictions: int
    taken_bytes: int = 0
    num_disk_hits: int = 0
    disk_chunks: int = 0
    disk_used_bytes: int = 0
    disk_file_bytes: int = 0
    disk_capacity_bytes: int = 0
    num_disk_evictions: int = 0
    num_disk_skipped: int = 0
    num_disk_failed_writes: int = 0
    num_disk_damaged: int = 0
    disk_written_bytes: int = 0
    is_disk_off: bool = False
    tenants: Mapping[str, TenantBytes] = field(default_factory=dict)


class ChunkStore:
    """Blobs under (chunk key, level), at most `capacity_bytes` of payload in RAM.

    tenant_shares: of each tier, None: no caps. ttl_s: chunks unused for so long are dropped. clock: seconds since the
    epoch; it may stand still, and going back counts as that. Raises disk_store.StoreError when the disk tier's
    directory cannot be used.
    """

    def __init__(
        self,
        capacity_bytes: int,
        *,
        disk: DiskOptions | None = None,
        tenant_shares: StoreShares | None = None,
        ttl_s: float | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._lock = threading.RLock()
        self._clock, self._now = clock, clock()
        self._pins: Counter[bytes] = Counter()
        self._ram = RamTier(TierIndex(capacity_bytes, pins=self._pins, tenant_shares=tenant_shares, ttl_s=ttl_s))
        # An epoch of an earlier process must not pass for one of this.
        self._changes = ChangeLog(time.time_ns() // 1000, MAX_CHANGES)
        self._hits = self._disk_hits = self._misses = 0
        self._disk: DiskTier | None = None
        if disk is not None:
            self._disk = DiskTier(
                disk, pins=self._pins, tenant_shares=tenant_shares, ttl_s=ttl_s, now=self._now, lock=self._lock,
                on_change=self._settle,
            )  # fmt: skip

    # -- blobs ----------------------------------------------------------------------------------------------------

    def put(
        self, key: bytes, level: str, blob: bytes, *, kl: float = 0.0, tenant: str = "", parent: bytes | None = None
    ) -> bool:
        """Keep a blob; the same key and level replaces. Whether it is kept, in RAM or on disk (or about to be there).

        kl: of a master, what it promises (nats a token, 0.0 exact); of a derived blob, that of the master it was made
        from. Worse than the chunk's is refused; a better master replaces, and what was derived of the old one goes.
        parent: the key of the chunk that this one continues. tenant: whose bytes they are. Both go by the master.
        Also refused: what is larger than a tier (a derived level: than what masters leave of it) or than its tenant's
        cap, what only pinned chunks or its own ancestors could make room for, a derived level without its master.
        """
        assert kl >= 0.0 and not math.isnan(kl), kl
        blob = bytes(blob)  # no copy of bytes; of a view, its owner may write into it
        with self._lock:
            self._tick()
            held, is_master = self._held(key), level == MASTER_LEVEL
            if (held is None and not is_master) or (held is not None and kl > held.kl):
                return False
            if is_master and held is not None and kl == held.kl and self._has_already(key, level, blob):
                self._touch(key, level)
                return True
            meta = ChunkMeta(kl=kl, tenant=tenant, parent=parent) if is_master or held is None else held
            evicted = [tier.put(key, level, blob, meta, self._now) for tier in self._tiers()]
            if evicted == [None] * len(evicted):
                return False
            if is_master and held is not None and (kl, held.kl) != (0.0, 0.0):
                self._drop_outdated(key, meta)
            self._settle([key, *(name[0] for names in evicted for name in names or [])])
            return any((key, level) in tier.index for tier in self._tiers())

    def get(self, key: bytes, level: str) -> bytes | None:
        """A copy of the blob, or None. Counts as a use of the chunk. What only the disk has is read, verified, and kept
        in RAM again."""
        blob, on_disk = self._look(key, level)
        with self._lock:
            if blob is None:
                self._misses += 1
                return None
            self._hits += 1
            self._touch(key, level)
            if on_disk is not None:
                self._disk_hits += 1
                self._promote(key, level, blob, on_disk)
            return blob

    def peek(self, key: bytes, level: str) -> bytes | None:
        """The blob, or None, without counting as a use. May read from the disk: `sizes` and `kl` never do."""
        return self._look(key, level)[0]

    def sizes(self, key: bytes) -> dict[str, int] | None:
        """Bytes by level of what is kept of a chunk in RAM or on disk; None if its master is in neither."""
        with self._lock:
            self._tick()
            if self._held(key) is None:
                return None
            sizes: dict[str, int] = {}
            for tier in self._tiers():
                sizes = tier.index.levels(key) | sizes
            return sizes

    def kl(self, key: bytes) -> float | None:
        """What a chunk's master promises; None if the chunk is not held."""
        with self._lock:
            self._tick()
            held = self._held(key)
            return None if held is None else held.kl

    # -- chunks ---------------------------------------------------------------------------------------------------

    def pin(self, keys: Iterable[bytes]) -> None:
        """These, and what they continue, are not evicted and do not expire, in no tier, until unpinned as often. Their
        derived levels may go. A key may be pinned before it is put. Pins end with the process."""
        with self._lock:
            self._pins.update(keys)

    def unpin(self, keys: Iterable[bytes]) -> None:
        with self._lock:
            for key in keys:
                assert self._pins[key] > 0, "unpinned more often than pinned"
                self._pins[key] -= 1
                if not self._pins[key]:
                    del self._pins[key]
            self._settle_evicted(name for tier in self._tiers() for name in tier.unpinned())

    def set_shares(self, tenant_shares: StoreShares) -> None:
        """Caps from now on: a tenant that has more loses its own chunks at once, those unused longest first. What is
        pinned stays until it is not."""
        with self._lock:
            self._settle_evicted(name for tier in self._tiers() for name in tier.set_shares(tenant_shares))

    def drop(self, key: bytes) -> None:
        """Forget a chunk in all tiers, pinned or not."""
        with self._lock:
            for tier in self._tiers():
                for level in tier.index.levels(key):
                    tier.remove(key, level)
            self._settle([key])

    def changes(self, since_epoch: int) -> Changes:
        """What is held, or no more, since an earlier answer's epoch; everything, marked `full`, where that is too long
        ago or the epoch was never given (-1 to begin with). An answer may repeat what was said before."""
        with self._lock:
            self._tick()
            keys = self._changes.since(since_epoch)
            named = {key for tier in self._tiers() for key in tier.index.masters()} if keys is None else keys
            tiers = {key: self._tier_of(key) for key in named}
            return Changes(
                epoch=self._changes.epoch,
                added=[(key, tier) for key, tier in tiers.items() if tier is not None],
                removed=[key for key, tier in tiers.items() if tier is None],
                full=keys is None,
            )

    def flush(self, timeout_s: float) -> bool:
        """Whether all that was put before is on the disk now, as far as the disk took it. True without a disk tier."""
        return self._disk is None or self._disk.flush(timeout_s)

    def close(self, timeout_s: float = 10.0) -> bool:
        """Flush, and give the directory back. The store may not be used any more. Whether all was written."""
        return self._disk is None or self._disk.close(timeout_s)

    def stats(self) -> StoreStats:
        with self._lock:
            self._tick()
            ram, disk = self._ram, self._disk
            in_ram, on_disk = ram.index.tenant_bytes(), disk.index.tenant_bytes() if disk is not None else {}
            stats = StoreStats(
                num_chunks=ram.index.num_masters,
                num_blobs=ram.index.num_blobs,
                used_bytes=ram.index.used_bytes,
                capacity_bytes=ram.index.capacity_bytes,
                num_hits=self._hits,
                num_misses=self._misses,
                num_evictions=ram.num_evictions,
                taken_bytes=ram.taken_bytes,
                tenants={
                    tenant: TenantBytes(ram_bytes=in_ram.get(tenant, 0), disk_bytes=on_disk.get(tenant, 0))
                    for tenant in sorted(in_ram.keys() | on_disk.keys())
                },
            )
            if disk is None:
                return stats
            return replace(
                stats,
                num_disk_hits=self._disk_hits,
                disk_chunks=disk.index.num_masters,
                disk_used_bytes=disk.index.used_bytes,
                disk_file_bytes=disk.file_bytes,
                disk_capacity_bytes=disk.capacity_bytes,
                num_disk_evictions=disk.num_evictions,
                num_disk_skipped=disk.num_skipped,
                num_disk_failed_writes=disk.writer.num_failed_writes,
                num_disk_damaged=disk.num_damaged,
                disk_written_bytes=disk.writer.num_written_bytes,
                is_disk_off=disk.writer.is_off,
            )

    def check_integrity(self) -> None:
        """The bytes add up and stay within the limits; every derived blob has its master; each page has one owner."""
        with self._lock:
            self._ram.check_integrity()
            for tier in self._tiers():
                tier.index.check_integrity()
                for key in tier.index.all_keys():
                    held = self._held(key)
                    assert held is not None, "a derived blob without its master"
                    meta = tier.index.meta(key)
                    assert meta is None or meta.kl == held.kl, "two masters of one chunk"
            if self._disk is not None:
                assert all((key, MASTER_LEVEL) in self._disk.index for key in self._disk.index.all_keys())

    # -- inside, under the lock -----------------------------------------------------------------------------------

    def _tiers(self) -> list[RamTier | DiskTier]:
        return [self._ram] if self._disk is None else [self._ram, self._disk]

    def _held(self, key: bytes) -> ChunkMeta | None:
        metas = [tier.index.meta(key) for tier in self._tiers()]
        return next((meta for meta in metas if meta is not None), None)

    def _tier_of(self, key: bytes) -> StoreTier | None:
        if (key, MASTER_LEVEL) in self._ram.index:
            return "ram"
        return "disk" if self._disk is not None and (key, MASTER_LEVEL) in self._disk.index else None

    def _has_already(self, key: bytes, level: str, blob: bytes) -> bool:
        """Nothing would change, in no tier."""
        return all((key, level) in tier.index for tier in self._tiers()) and self._ram.get(key, level) == blob

    def _tick(self) -> None:
        """Time goes on: what is not used any more goes."""
        self._now = max(self._now, self._clock())
        self._settle_evicted(name for tier in self._tiers() for name in tier.expire(self._now))

    def _touch(self, key: bytes, level: str) -> None:
        self._ram.index.touch(key, level, self._now)
        if self._disk is not None:
            self._disk.touch(key, level, self._now)

    def _settle(self, keys: Iterable[bytes]) -> None:
        """After any change to these: what is derived goes with the last master; the index hears of it."""
        for key in dict.fromkeys(keys):
            if self._held(key) is None:
                for tier in self._tiers():
                    for level in tier.index.levels(key):
                        tier.remove(key, level)
            self._changes.note(key)

    def _settle_evicted(self, names: Iterable[Name]) -> None:
        self._settle([key for key, _ in names])

    def _drop_outdated(self, key: bytes, meta: ChunkMeta) -> None:
        """A master was replaced: the old one where the new one was not taken, and all that was made from it."""
        for tier in self._tiers():
            for level in tier.index.levels(key):
                if level != MASTER_LEVEL or tier.index.meta(key) is not meta:
                    tier.remove(key, level)

    def _promote(self, key: bytes, level: str, blob: bytes, on_disk: ChunkMeta) -> None:
        if self._disk is None or self._disk.index.meta(key) is not on_disk or (key, level) in self._ram.index:
            return
        evicted = self._ram.put(key, level, blob, on_disk, self._now)
        if evicted is not None:
            self._settle([key, *(name[0] for name in evicted)])

    # -- reading, which may wait for the disk ---------------------------------------------------------------------

    def _look(self, key: bytes, level: str) -> tuple[bytes | None, ChunkMeta | None]:
        """-> the blob, and the chunk's data if it was read from disk. A damaged one is dropped."""
        for _ in range(READ_TRIES):
            with self._lock:
                self._tick()
                blob = self._ram.get(key, level)
                if blob is not None or self._disk is None or (key, level) not in self._disk.index:
                    return blob, None
                meta = self._disk.index.meta(key)
            blob = self._disk.read(key, level)
            with self._lock:
                if self._disk.index.meta(key) is not meta or (key, level) not in self._disk.index:
                    continue  # replaced or evicted meanwhile
                if blob is None:
                    self._disk.drop_damaged(key, level)
                    self._settle([key])
                    continue
                return blob, meta
        return None, None
