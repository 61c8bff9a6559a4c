"""The chunk store's rules beyond plain keeping: quality, tenants, pins, continuations, time, what an index is told."""

from __future__ import annotations

import pytest
from store_cases import Clock

from prefill.leaf_lru import LeafLru
from prefill.store import MASTER_LEVEL, ChunkStore, StoreShares, TenantBytes
from prefill.store_changes import ChangeLog

A, B, C, D, E = (bytes([number]) * 16 for number in range(5))


def put(store: ChunkStore, key: bytes, size: int = 10, **about: object) -> bool:
    return store.put(key, MASTER_LEVEL, bytes(size), **about)  # type: ignore[arg-type]


def held(store: ChunkStore, *keys: bytes) -> list[bool]:
    store.check_integrity()
    return [store.sizes(key) is not None for key in keys]


# -- quality ----------------------------------------------------------------------------------------------------------


def test_a_better_master_replaces_and_a_worse_is_refused() -> None:
    store = ChunkStore(100)
    assert store.kl(A) is None
    assert store.put(A, MASTER_LEVEL, b"lossy", kl=0.02)
    assert not store.put(A, MASTER_LEVEL, b"worse", kl=0.03)
    assert (store.get(A, MASTER_LEVEL), store.kl(A)) == (b"lossy", 0.02)
    assert store.put(A, MASTER_LEVEL, b"exact")
    assert (store.get(A, MASTER_LEVEL), store.kl(A)) == (b"exact", 0.0)
    assert not store.put(A, MASTER_LEVEL, b"lossy", kl=0.02)
    assert store.stats().used_bytes == 5


def test_what_was_derived_of_a_worse_master_goes_with_it() -> None:
    store = ChunkStore(100)
    store.put(A, MASTER_LEVEL, b"lossy", kl=0.02)
    assert store.put(A, "q1", b"derived", kl=0.02)
    store.put(A, MASTER_LEVEL, b"exact")
    assert store.sizes(A) == {MASTER_LEVEL: 5}
    assert not store.put(A, "q1", b"late", kl=0.02), "made from the master that was replaced"
    assert store.put(A, "q1", b"of the new one")


def test_an_exact_master_put_again_keeps_what_is_derived() -> None:
    store = ChunkStore(100)
    put(store, A)
    store.put(A, "q1", b"q")
    put(store, A, 12)
    assert store.sizes(A) == {MASTER_LEVEL: 12, "q1": 1}


def test_a_better_master_that_has_no_room_leaves_the_old_one() -> None:
    store = ChunkStore(20)
    put(store, A, kl=0.5)
    assert not put(store, A, 21)
    assert store.kl(A) == 0.5


# -- continuations ----------------------------------------------------------------------------------------------------


def test_a_chunk_goes_after_what_continues_it() -> None:
    store = ChunkStore(40)
    put(store, A)
    put(store, B, parent=A)
    put(store, C, parent=B)
    put(store, D)
    put(store, E)  # A is unused longest, but the chain goes from its end
    assert held(store, A, B, C, D, E) == [True, True, False, True, True]
    put(store, C)
    assert held(store, A, B, C, D, E) == [True, False, True, True, True]


def test_a_chain_longer_than_the_store_keeps_its_beginning() -> None:
    """The end alone is of no use to anyone."""
    store = ChunkStore(30)
    keys = [bytes([number]) * 16 for number in range(6)]
    kept = [put(store, key, parent=parent) for key, parent in zip(keys, [None, *keys], strict=False)]
    assert kept == [True, True, True, False, False, False]
    assert held(store, *keys) == kept


def test_a_parent_that_comes_late_goes_late() -> None:
    store = ChunkStore(30)
    put(store, B, parent=A)
    put(store, A)
    put(store, C)
    store.get(B, MASTER_LEVEL)
    store.get(C, MASTER_LEVEL)
    put(store, D)
    assert held(store, A, B, C, D) == [True, False, True, True]


def test_the_heap_of_leaves_stays_small_and_right() -> None:
    leaves = LeafLru()
    for number in range(10):
        leaves.add(bytes([number]), bytes([number - 1]) if number % 3 else None, number)
    for seq in range(10, 3_000):
        leaves.touch(bytes([seq % 10]), seq)
        leaves.check_integrity()
    assert len(leaves._heap) <= 2 * 10 + 65
    assert leaves.oldest(skip=()) == (2992, bytes([2]))  # 0 <- 1 <- 2, 3 <- 4 <- 5, 6 <- 7 <- 8, 9
    assert leaves.oldest(skip={bytes([2]), bytes([5])}) == (2998, bytes([8]))


# -- tenants ----------------------------------------------------------------------------------------------------------


def test_a_tenant_at_its_cap_pays_with_its_own() -> None:
    store = ChunkStore(100, tenant_shares=StoreShares(tenants={"small": 0.3}))
    put(store, A, tenant="other")
    for key in (B, C, D):
        put(store, key, tenant="small")
    put(store, E, tenant="small")
    assert held(store, A, B, C, D, E) == [True, False, True, True, True]
    assert store.stats().tenants == {
        "other": TenantBytes(ram_bytes=10, disk_bytes=0),
        "small": TenantBytes(ram_bytes=30, disk_bytes=0),
    }
    assert not put(store, A[::-1] + b"x", 31, tenant="small")
    assert held(store, B, C, D, E) == [False, True, True, True], "a refused put evicts nothing"


def test_a_tenants_derived_levels_go_before_its_masters_and_count() -> None:
    store = ChunkStore(100, tenant_shares=StoreShares(tenants={"t": 0.3}))
    put(store, A, tenant="t")
    store.put(A, "q1", bytes(15))
    put(store, B, tenant="t")
    assert store.sizes(A) == {MASTER_LEVEL: 10}
    assert not store.put(A, "q1", bytes(15)), "masters leave 10 of the 30 bytes"
    assert store.put(A, "q1", bytes(9))


def test_the_master_decides_whose_a_chunk_is() -> None:
    store = ChunkStore(100)
    put(store, A, tenant="t")
    store.put(A, "q1", bytes(5), tenant="ignored")
    assert store.stats().tenants == {"t": TenantBytes(ram_bytes=15, disk_bytes=0)}
    put(store, A, 11, tenant="u")
    assert store.stats().tenants == {"u": TenantBytes(ram_bytes=11, disk_bytes=0)}
    store.check_integrity()


def test_a_share_of_everybody_holds_for_each_tenant_by_itself() -> None:
    store = ChunkStore(100, tenant_shares=StoreShares(tenants={"large": 1.0}, default=0.2))
    for number in range(4):
        for tenant in ("a", "b", "", "large"):
            put(store, f"{tenant} {number}".encode(), tenant=tenant)
    in_ram = {tenant: taken.ram_bytes for tenant, taken in store.stats().tenants.items()}
    assert in_ram == {"": 20, "a": 20, "b": 20, "large": 40}


def test_a_share_that_is_lowered_takes_the_tenants_own_chunks_and_nobody_elses() -> None:
    store = ChunkStore(100)
    put(store, A, tenant="other")
    for key, parent in ((B, None), (C, B), (D, None)):
        put(store, key, tenant="small", parent=parent)
    store.put(D, "q1", bytes(5))
    epoch = store.changes(-1).epoch
    store.set_shares(StoreShares(tenants={"small": 0.2}))
    assert held(store, A, B, C, D) == [True, True, False, True], "derived first, then the end of the older chain"
    assert store.sizes(D) == {MASTER_LEVEL: 10}
    assert store.changes(epoch).removed == [C] and store.stats().num_evictions == 2
    store.set_shares(StoreShares(tenants={"small": 0.3}))
    assert put(store, C, tenant="small", parent=B)


def test_what_is_pinned_outlives_a_lowered_share_until_it_is_unpinned() -> None:
    store = ChunkStore(100)
    for key in (A, B, C):
        put(store, key, tenant="t")
    store.pin([A, B])
    store.set_shares(StoreShares(default=0.1))
    assert held(store, A, B, C) == [True, True, False]
    assert not put(store, C, tenant="t")
    store.unpin([B])
    assert held(store, A, B) == [True, False]
    store.unpin([A])
    assert held(store, A) == [True]


# -- pins -------------------------------------------------------------------------------------------------------------


def test_a_pinned_chunk_stays_until_unpinned_as_often() -> None:
    store = ChunkStore(20)
    put(store, A)
    put(store, B)
    store.pin([A])
    store.pin([A])
    put(store, C)
    assert held(store, A, B, C) == [True, False, True]
    store.unpin([A])
    put(store, D)
    assert held(store, A, C, D) == [True, False, True]
    store.unpin([A])
    put(store, E)
    assert held(store, A, D, E) == [False, True, True]
    with pytest.raises(AssertionError, match="more often"):
        store.unpin([A])


def test_a_pin_keeps_what_the_chunk_continues() -> None:
    store = ChunkStore(30)
    put(store, A)
    put(store, B, parent=A)
    store.pin([B])
    put(store, C)
    put(store, D)
    assert held(store, A, B, C, D) == [True, True, False, True]


def test_what_only_pinned_chunks_could_make_room_for_is_refused_and_evicts_nothing() -> None:
    store = ChunkStore(30)
    for key in (A, B, C):
        put(store, key)
    store.pin([A, B])
    assert not put(store, D, 11)
    assert held(store, A, B, C) == [True, True, True]
    assert put(store, D, 10)


def test_a_pinned_chunk_can_be_replaced() -> None:
    store = ChunkStore(30)
    put(store, A, kl=0.1)
    store.pin([A])
    assert put(store, A, 30)
    assert store.kl(A) == 0.0


# -- time -------------------------------------------------------------------------------------------------------------


def test_what_is_not_used_for_the_time_to_live_goes() -> None:
    clock = Clock()
    store = ChunkStore(100, ttl_s=60.0, clock=clock)
    put(store, A)
    store.put(A, "q1", b"q")
    clock.now += 40
    put(store, B)
    store.peek(A, MASTER_LEVEL)  # no use
    clock.now += 19.9
    assert held(store, A, B) == [True, True]
    clock.now += 0.1
    assert store.get(A, "q1") is None and held(store, A, B) == [False, True]
    store.get(B, MASTER_LEVEL)
    clock.now += 59.9
    assert held(store, B) == [True]
    clock.now += 0.1
    assert held(store, B) == [False]
    assert store.stats().used_bytes == 0


def test_a_chunk_lives_as_long_as_what_continues_it_and_as_its_pins() -> None:
    clock = Clock()
    store = ChunkStore(100, ttl_s=60.0, clock=clock)
    put(store, A)
    put(store, B, parent=A)
    put(store, C)
    store.pin([C])
    clock.now += 30
    store.get(B, MASTER_LEVEL)
    clock.now += 30
    assert held(store, A, B, C) == [True, True, True]
    clock.now += 30
    assert held(store, A, B, C) == [False, False, True]
    store.unpin([C])
    clock.now += 5
    assert held(store, C) == [False]


def test_a_clock_that_goes_back_stands_still() -> None:
    clock = Clock(1_000.0)
    store = ChunkStore(100, ttl_s=60.0, clock=clock)
    put(store, A)
    clock.now = 0.0
    put(store, B)
    assert held(store, A, B) == [True, True]
    clock.now = 1_060.0
    assert held(store, A, B) == [False, False]


# -- what an index is told --------------------------------------------------------------------------------------------


def test_changes_say_what_came_and_went() -> None:
    store = ChunkStore(20)
    put(store, A)
    first = store.changes(-1)
    assert first.full and (first.added, first.removed) == ([(A, "ram")], [])
    put(store, B)
    put(store, C)
    second = store.changes(first.epoch)
    assert not second.full and (set(second.added), second.removed) == ({(B, "ram"), (C, "ram")}, [A])
    put(store, D)
    put(store, B)
    third = store.changes(second.epoch)
    assert (set(third.added), set(third.removed)) == ({(D, "ram"), (B, "ram")}, {C})
    assert store.changes(third.epoch).added == store.changes(third.epoch).removed == []


def test_an_epoch_of_another_store_gets_everything() -> None:
    old = ChunkStore(20)
    put(old, A)
    epoch = old.changes(-1).epoch
    new = ChunkStore(20)
    put(new, B)
    assert new.changes(epoch).full and new.changes(epoch).added == [(B, "ram")]
    assert new.changes(new.changes(-1).epoch + 1).full


def test_the_log_of_changes_is_bounded() -> None:
    log = ChangeLog(100, 3)
    for key in (A, B, C):
        log.note(key)
    assert set(log.since(100) or []) == {A, B, C}
    log.note(B)
    assert log.since(100) is None
    assert set(log.since(101) or []) == {B, C}
    assert log.since(104) == [] and log.since(105) is None
