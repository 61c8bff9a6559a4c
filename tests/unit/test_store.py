"""The chunk store against a plain model of it: what is kept, what goes first, and that the bytes add up."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefill.store import MASTER_LEVEL, ChunkStore

KEYS = [bytes([number]) * 16 for number in range(5)]


def blob(size: int) -> bytes:
    return bytes(size)


def test_what_is_put_can_be_got() -> None:
    store = ChunkStore(100)
    assert store.get(KEYS[0], MASTER_LEVEL) is None
    assert store.put(KEYS[0], MASTER_LEVEL, b"master")
    assert store.put(KEYS[0], "q1", b"q")
    assert store.get(KEYS[0], MASTER_LEVEL) == b"master"
    assert store.get(KEYS[0], "q1") == b"q"
    assert store.sizes(KEYS[0]) == {MASTER_LEVEL: 6, "q1": 1}
    assert store.sizes(KEYS[1]) is None
    stats = store.stats()
    assert (stats.num_chunks, stats.num_blobs, stats.used_bytes) == (1, 2, 7)
    assert (stats.num_hits, stats.num_misses, stats.num_evictions) == (2, 1, 0)


def test_replacing_a_blob_frees_the_old_one() -> None:
    store = ChunkStore(100)
    store.put(KEYS[0], MASTER_LEVEL, blob(60))
    assert store.put(KEYS[0], MASTER_LEVEL, blob(90))
    assert store.stats().used_bytes == 90
    store.check_integrity()


def test_a_derived_level_needs_its_master() -> None:
    store = ChunkStore(100)
    assert not store.put(KEYS[0], "q1", blob(1))
    assert store.get(KEYS[0], "q1") is None


def test_a_blob_larger_than_the_store_is_not_kept() -> None:
    store = ChunkStore(100)
    store.put(KEYS[0], MASTER_LEVEL, blob(50))
    assert not store.put(KEYS[1], MASTER_LEVEL, blob(101))
    assert store.sizes(KEYS[0]) is not None


def test_the_master_used_longest_ago_goes_first() -> None:
    store = ChunkStore(100)
    for key in KEYS[:2]:
        store.put(key, MASTER_LEVEL, blob(50))
    store.get(KEYS[0], MASTER_LEVEL)
    store.put(KEYS[2], MASTER_LEVEL, blob(50))
    assert store.sizes(KEYS[1]) is None
    assert store.sizes(KEYS[0]) is not None


def test_serving_a_level_counts_as_a_use_of_the_chunk() -> None:
    store = ChunkStore(110)
    for key in KEYS[:2]:
        store.put(key, MASTER_LEVEL, blob(50))
    store.put(KEYS[0], "q1", blob(5))
    store.get(KEYS[0], "q1")
    store.put(KEYS[2], MASTER_LEVEL, blob(50))
    assert store.sizes(KEYS[0]) is not None
    assert store.sizes(KEYS[1]) is None


def test_derived_levels_go_before_any_master() -> None:
    store = ChunkStore(120)
    store.put(KEYS[0], MASTER_LEVEL, blob(50))
    store.put(KEYS[1], MASTER_LEVEL, blob(50))
    store.put(KEYS[1], "q1", blob(20))
    store.put(KEYS[2], MASTER_LEVEL, blob(20))
    assert [store.sizes(key) for key in KEYS[:3]] == [{MASTER_LEVEL: 50}, {MASTER_LEVEL: 50}, {MASTER_LEVEL: 20}]


def test_keeping_a_derived_level_never_costs_a_master() -> None:
    """It can be made again from its own master in milliseconds; a lost master has to be computed by the model."""
    store = ChunkStore(100)
    store.put(KEYS[0], MASTER_LEVEL, blob(50))
    store.put(KEYS[1], MASTER_LEVEL, blob(50))
    assert not store.put(KEYS[1], "q1", blob(20))
    assert store.sizes(KEYS[0]) == {MASTER_LEVEL: 50}
    assert store.sizes(KEYS[1]) == {MASTER_LEVEL: 50}


def test_a_failed_put_leaves_the_other_derived_levels() -> None:
    """Throwing away what may be asked for again, to then keep nothing, helps nobody."""
    store = ChunkStore(100)
    store.put(KEYS[0], MASTER_LEVEL, blob(80))
    store.put(KEYS[0], "q3", blob(10))
    assert not store.put(KEYS[0], "q1", blob(30))
    assert store.sizes(KEYS[0]) == {MASTER_LEVEL: 80, "q3": 10}


operations = st.lists(
    st.tuples(
        st.sampled_from(["put", "get"]),
        st.sampled_from(KEYS),
        st.sampled_from([MASTER_LEVEL, "raw", "q1", "q2"]),
        st.integers(1, 60),
    ),
    max_size=60,
)


@given(capacity=st.integers(1, 200), steps=operations)
def test_any_use_keeps_the_books_right(capacity: int, steps: list[tuple[str, bytes, str, int]]) -> None:
    store = ChunkStore(capacity)
    newest: dict[tuple[bytes, str], bytes] = {}
    for what, key, level, size in steps:
        if what == "put":
            content = bytes([size]) * size
            kept = store.put(key, level, content)
            assert store.get(key, level) == (content if kept else None) or not kept
            if kept:
                newest[key, level] = content
        else:
            found = store.get(key, level)
            assert found is None or found == newest[key, level]
        store.check_integrity()
        known = {(k, name): size for k in KEYS for name, size in (store.sizes(k) or {}).items()}
        assert sum(known.values()) == store.stats().used_bytes
        assert len(known) == store.stats().num_blobs


@pytest.mark.parametrize("num_blobs", [3, 10])
def test_a_scan_longer_than_the_store_keeps_its_end(num_blobs: int) -> None:
    store = ChunkStore(30)
    keys = [bytes([number]) * 16 for number in range(num_blobs)]
    for key in keys:
        assert store.put(key, MASTER_LEVEL, blob(10))
    assert [store.sizes(key) is not None for key in keys] == [False] * (num_blobs - 3) + [True] * 3
