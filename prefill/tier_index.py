"""The books of one tier of the chunk store: what it holds, whose it is, what goes next. Pure: no blobs, no I/O.

Both tiers keep the same rules. Derived levels go before any master and never cost one, because they can be rebuilt.
Masters go longest unused first, and none before the chunks that continue it (prefill/leaf_lru.py). A tenant at its cap
pays with its own entries. A pinned chunk stays, and with it all that it continues. What cannot be kept is refused
before anything is evicted for it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field

from prefill.leaf_lru import LeafLru

MASTER_LEVEL = "lossless"
MAX_REFUSED = 4096  # remembered, so that the end of a chain too long for the tier does not push out its beginning
Name = tuple[bytes, str]  # key, level


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkMeta:
    """Of a chunk, by its master. kl: promised loss in nats a token, 0.0 exact. parent: the chunk that it continues."""

    kl: float = 0.0
    tenant: str = ""
    parent: bytes | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreShares:
    """The most that a tenant may have of a tier, above 0 up to 1 of its capacity. default: each tenant not named."""

    tenants: Mapping[str, float] = field(default_factory=dict)
    default: float = 1.0

    def __post_init__(self) -> None:
        assert all(0 < share <= 1 for share in (self.default, *self.tenants.values())), self

    def of(self, tenant: str) -> float:
        return self.tenants.get(tenant, self.default)


@dataclass(slots=True)
class _Master:
    size_bytes: int
    meta: ChunkMeta
    used_at: float


@dataclass(slots=True)
class _Share:
    """What one tenant has here. derived: the number of the last use by name, longest unused first."""

    used_bytes: int = 0
    master_bytes: int = 0
    masters: LeafLru = field(default_factory=LeafLru)
    derived: OrderedDict[Name, int] = field(default_factory=OrderedDict)


class TierIndex:
    """At most `capacity_bytes` of payload. pins: counts by key, the caller's to change. ttl_s: since the last use."""

    def __init__(
        self,
        capacity_bytes: int,
        *,
        pins: Mapping[bytes, int],
        tenant_shares: StoreShares | None = None,
        ttl_s: float | None = None,
    ) -> None:
        assert capacity_bytes > 0 and (ttl_s is None or ttl_s > 0)
        self.capacity_bytes, self.used_bytes, self.master_bytes = capacity_bytes, 0, 0
        self._first_capacity_bytes = capacity_bytes  # shares are of this one: a tier whose file is full counts on less
        self._pins, self._caps, self._ttl_s = pins, tenant_shares or StoreShares(), ttl_s
        self._masters: dict[bytes, _Master] = {}
        self._derived: dict[bytes, dict[str, int]] = {}  # sizes by level
        self._tenant_of: dict[bytes, str] = {}  # of every key here; a derived blob's master may be in another tier
        self._shares: dict[str, _Share] = {}
        self._refused: OrderedDict[bytes, None] = OrderedDict()
        self._seq = 0
        self._next_expiry = float("inf")

    # -- what is here ---------------------------------------------------------------------------------------------

    def __contains__(self, name: Name) -> bool:
        key, level = name
        return key in self._masters if level == MASTER_LEVEL else level in self._derived.get(key, {})

    @property
    def num_masters(self) -> int:
        return len(self._masters)

    @property
    def num_blobs(self) -> int:
        return len(self._masters) + sum(map(len, self._derived.values()))

    def masters(self) -> Iterator[bytes]:
        return iter(self._masters)

    def all_keys(self) -> Iterator[bytes]:
        """Of all that has a blob here, master or not."""
        return iter(self._tenant_of)

    def meta(self, key: bytes) -> ChunkMeta | None:
        """Of a master that is here. The same object until the master is replaced."""
        master = self._masters.get(key)
        return None if master is None else master.meta

    def levels(self, key: bytes) -> dict[str, int]:
        """Bytes by level."""
        master = self._masters.get(key)
        return ({} if master is None else {MASTER_LEVEL: master.size_bytes}) | self._derived.get(key, {})

    def tenant_bytes(self) -> dict[str, int]:
        return {tenant: share.used_bytes for tenant, share in self._shares.items()}

    # -- changes --------------------------------------------------------------------------------------------------

    def admit(self, key: bytes, level: str, size_bytes: int, meta: ChunkMeta, now: float) -> list[Name] | None:
        """Enter a blob, in the place of one of that name. -> what had to go for it, or None: refused, nothing changed.

        A master takes any room but that of pinned chunks and of its own ancestors, and none when its parent was refused
        here; a derived level takes what masters leave. Whether that has a master somewhere is the caller's to know.
        """
        if level == MASTER_LEVEL:
            evicted = self._make_room_for_master(key, size_bytes, meta)
            self._refused.pop(key, None)
            if evicted is None:
                self._refused[key] = None
                if len(self._refused) > MAX_REFUSED:
                    self._refused.popitem(last=False)
        else:
            evicted = self._make_room_for_derived(key, level, size_bytes, meta)
        if evicted is None:
            return None
        self.remove(key, level)
        if self._tenant_of.get(key, meta.tenant) != meta.tenant:  # its derived blobs go with the old owner
            for name in list(self._derived.get(key, {})):
                self._evict((key, name), evicted)
        share = self._shares.setdefault(meta.tenant, _Share())
        self._seq += 1
        if level == MASTER_LEVEL:
            self._masters[key] = _Master(size_bytes, meta, now)
            share.masters.add(key, meta.parent, self._seq)
            share.master_bytes += size_bytes
            self.master_bytes += size_bytes
            if self._ttl_s is not None:
                self._next_expiry = min(self._next_expiry, now + self._ttl_s)
        else:
            self._derived.setdefault(key, {})[level] = size_bytes
            share.derived[key, level] = self._seq
        self._tenant_of[key] = meta.tenant
        share.used_bytes += size_bytes
        self.used_bytes += size_bytes
        return evicted

    def touch(self, key: bytes, level: str, now: float) -> None:
        """A use of a blob is one of its chunk. No matter whether they are here."""
        if key not in self._tenant_of:
            return
        share = self._shares[self._tenant_of[key]]
        self._seq += 1
        if key in self._masters:
            self._masters[key].used_at = now
            share.masters.touch(key, self._seq)
        if (key, level) in share.derived:
            share.derived[key, level] = self._seq
            share.derived.move_to_end((key, level))

    def remove(self, key: bytes, level: str) -> bool:
        """Whether it was here."""
        if (key, level) not in self:
            return False
        share = self._shares[self._tenant_of[key]]
        if level == MASTER_LEVEL:
            size_bytes = self._masters.pop(key).size_bytes
            share.masters.remove(key)
            share.master_bytes -= size_bytes
            self.master_bytes -= size_bytes
        else:
            size_bytes = self._derived[key].pop(level)
            del share.derived[key, level]
            if not self._derived[key]:
                del self._derived[key]
        share.used_bytes -= size_bytes
        self.used_bytes -= size_bytes
        if key not in self._masters and key not in self._derived:
            tenant = self._tenant_of.pop(key)
            if not share.masters and not share.derived:
                del self._shares[tenant]
        return True

    def evict(self, wanted_bytes: int) -> list[Name]:
        """So many bytes or more, and down to the capacity, as far as anything may go. -> what went."""
        kept, target_bytes = self._kept(None), min(self.used_bytes - wanted_bytes, self.capacity_bytes)
        evicted: list[Name] = []
        while self.used_bytes > max(target_bytes, 0):
            name = self._oldest(self._shares.values(), kept)
            if name is None:
                break
            self._evict(name, evicted)
        return evicted

    def expire(self, now: float) -> list[Name]:
        """Drop what was not used for the time to live. A chunk lives as long as one that continues it. -> what went."""
        expired: list[Name] = []
        if self._ttl_s is None or now < self._next_expiry:
            return expired
        self._next_expiry = float("inf")
        for share in list(self._shares.values()):
            while (oldest := share.masters.oldest(self._pins)) is not None:
                key = oldest[1]
                ends_at = self._masters[key].used_at + self._ttl_s
                if now < ends_at:
                    self._next_expiry = min(self._next_expiry, ends_at)
                    break
                for level in self.levels(key):
                    self._evict((key, level), expired)
        return expired

    def set_shares(self, tenant_shares: StoreShares) -> list[Name]:
        """From now on. -> what went of tenants that have more. What is pinned stays, above the cap if need be."""
        self._caps = tenant_shares
        return self._evict_above_caps()

    def unpinned(self) -> list[Name]:
        """Some pins are gone: what was overdue may go now. -> what went of tenants above their caps."""
        self._next_expiry = float("-inf")
        return self._evict_above_caps()

    # -- who goes -------------------------------------------------------------------------------------------------

    def _cap(self, tenant: str) -> int:
        share_bytes = int(self._caps.of(tenant) * self._first_capacity_bytes + 1e-6)
        return min(share_bytes, self.capacity_bytes)

    def _evict_above_caps(self) -> list[Name]:
        evicted: list[Name] = []
        above = [tenant for tenant, share in self._shares.items() if share.used_bytes > self._cap(tenant)]
        kept = self._kept(None) if above else set()
        for tenant in above:
            share = self._shares[tenant]
            while share.used_bytes > self._cap(tenant) and (name := self._oldest([share], kept)) is not None:
                self._evict(name, evicted)
        return evicted

    def _make_room_for_master(self, key: bytes, size_bytes: int, meta: ChunkMeta) -> list[Name] | None:
        old = self._masters.get(key)
        old_bytes = old.size_bytes if old is not None else 0
        own_old_bytes = old_bytes if old is not None and old.meta.tenant == meta.tenant else 0
        share, cap = self._shares.get(meta.tenant, _Share()), self._cap(meta.tenant)

        def lacks_own() -> bool:
            return share.used_bytes - own_old_bytes + size_bytes > cap

        def lacks_any() -> bool:
            return self.used_bytes - old_bytes + size_bytes > self.capacity_bytes

        if not lacks_own() and not lacks_any():
            return []
        if meta.parent in self._refused:
            return None
        kept = self._kept(meta.parent)
        others = [self._masters[name] for name in kept if name != key and name in self._masters]
        own_kept_bytes = sum(other.size_bytes for other in others if other.meta.tenant == meta.tenant)
        kept_bytes = sum(other.size_bytes for other in others)
        if own_kept_bytes + size_bytes > cap or kept_bytes + size_bytes > self.capacity_bytes:
            return None
        kept.add(key)
        evicted: list[Name] = []
        for lacks, shares in ((lacks_own, [share]), (lacks_any, None)):
            while lacks():
                name = self._oldest(shares or self._shares.values(), kept)
                assert name is not None, "what is not kept may go"
                self._evict(name, evicted)
        return evicted

    def _make_room_for_derived(self, key: bytes, level: str, size_bytes: int, meta: ChunkMeta) -> list[Name] | None:
        share, cap = self._shares.get(meta.tenant, _Share()), self._cap(meta.tenant)
        if share.master_bytes + size_bytes > cap or self.master_bytes + size_bytes > self.capacity_bytes:
            return None
        self.remove(key, level)  # it is replaced in any case: only derived blobs are in the way
        evicted: list[Name] = []
        while share.used_bytes + size_bytes > cap:
            self._evict(next(iter(share.derived)), evicted)
        while self.used_bytes + size_bytes > self.capacity_bytes:
            name = self._oldest(self._shares.values(), ())
            assert name is not None and name[1] != MASTER_LEVEL
            self._evict(name, evicted)
        return evicted

    def _kept(self, parent: bytes | None) -> set[bytes]:
        """Chunks that may not go: the pinned ones, `parent`, and all that these continue."""
        kept: set[bytes] = set()
        for first in [*self._pins, *([parent] if parent is not None else [])]:
            key: bytes | None = first
            while key is not None and key not in kept and key in self._masters:
                kept.add(key)
                key = self._masters[key].meta.parent
        return kept

    def _oldest(self, shares: Collection[_Share], kept: Collection[bytes]) -> Name | None:
        """The next to go of some tenants."""
        firsts = [next(iter(share.derived.items())) for share in shares if share.derived]
        if firsts:
            return min(firsts, key=lambda first: first[1])[0]
        masters = [oldest for share in shares if (oldest := share.masters.oldest(kept)) is not None]
        return (min(masters)[1], MASTER_LEVEL) if masters else None

    def _evict(self, name: Name, evicted: list[Name]) -> None:
        self.remove(*name)
        evicted.append(name)

    def check_integrity(self) -> None:
        """The bytes add up, in all and by tenant, and stay within capacity and caps."""
        sizes = {(key, level): size for key in self._tenant_of for level, size in self.levels(key).items()}
        assert sum(sizes.values()) == self.used_bytes <= self.capacity_bytes, (sizes, self.used_bytes)
        assert sum(m.size_bytes for m in self._masters.values()) == self.master_bytes
        assert set(self._tenant_of) == self._masters.keys() | self._derived.keys()
        for tenant, share in self._shares.items():
            own = {name: size for name, size in sizes.items() if self._tenant_of[name[0]] == tenant}
            assert own and sum(own.values()) == share.used_bytes, (tenant, own)
            if share.used_bytes > self._cap(tenant):
                assert self._oldest([share], self._kept(None)) is None, "above its cap, and not for pins"
            assert sum(size for name, size in own.items() if name[1] == MASTER_LEVEL) == share.master_bytes
            assert {name for name in own if name[1] != MASTER_LEVEL} == share.derived.keys()
            assert len(share.masters) == sum(name[1] == MASTER_LEVEL for name in own)
            assert list(share.derived.values()) == sorted(share.derived.values())
            share.masters.check_integrity()
        assert self._shares.keys() == set(self._tenant_of.values())
