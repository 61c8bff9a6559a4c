"""The index of who holds which chunks, against dictionaries; reports that continue, miss, repeat or overflow."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import cluster.prefix_index
from cluster.key_table import LOAD_AFTER_REBUILD, SLOTS, KeyTable, distinct, fingerprints
from cluster.prefix_index import (
    TABLE_WORKERS,
    TIERS,
    Ack,
    Coverage,
    IndexFeed,
    IndexSource,
    PrefixIndex,
    join_keys,
    num_leading,
    pack_changes,
)


def key(number: int) -> bytes:
    return hashlib.blake2b(number.to_bytes(8, "little"), digest_size=16).digest()


def keys(numbers: Iterable[int]) -> bytes:
    return join_keys(map(key, numbers))


def full(epoch: int, **tiers: Iterable[int]) -> dict[str, Any]:
    return changes(epoch, None, **tiers)


def changes(epoch: int, since: int | None, removed: Iterable[int] = (), **tiers: Iterable[int]) -> dict[str, Any]:
    added = [(key(number), tier) for tier, numbers in tiers.items() for number in numbers]
    body = {"epoch": epoch, "added": added, "removed": [key(n) for n in removed], "full": since is None}
    return pack_changes(body, since)


class Holdings:
    """A worker's own books: sets of tiers by key, a log of epochs. `memory`: how many epochs it can look back."""

    def __init__(self, memory: int = 3) -> None:
        self.tiers: dict[bytes, set[str]] = {}
        self.epoch, self.memory = 0, memory
        self._touched: dict[int, set[bytes]] = {}

    def change(self, name: bytes, tiers: set[str]) -> None:
        self.epoch += 1
        self._touched[self.epoch] = {name}
        self.tiers.pop(name, None)
        if tiers:
            self.tiers[name] = tiers

    def index_changes(self, since: int | None) -> Mapping[str, Any]:
        if since is None or since < self.epoch - self.memory:
            added = [(name, tier) for name, tiers in self.tiers.items() for tier in tiers]
            return {"epoch": self.epoch, "added": added, "removed": [], "full": True}
        touched = set().union(*(self._touched[n] for n in range(since + 1, self.epoch + 1)))
        added = [(name, tier) for name in touched for tier in self.tiers.get(name, ())]
        removed = [name for name in touched if name not in self.tiers]
        return {"epoch": self.epoch, "added": added, "removed": removed, "full": False}


def coverage_of(holdings: Holdings, incarnation: str, asked: list[bytes]) -> Coverage | None:
    bitmaps = {
        tier: sum(1 << i for i, name in enumerate(asked) if tier in holdings.tiers.get(name, ())) for tier in TIERS
    }
    return Coverage(incarnation=incarnation, **bitmaps) if any(bitmaps.values()) else None


# -- against a model ------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32), num_workers=st.integers(1, 5))
def test_the_index_says_what_the_workers_hold(seed: int, num_workers: int) -> None:
    """Workers change, report late, lose answers, restart; the controller restarts. Whoever has just been confirmed is
    known exactly, nobody else is known to hold more than at some time since he last was."""
    rng = random.Random(seed)
    index, names = PrefixIndex(), [key(n) for n in range(60)]
    lives = dict.fromkeys(range(num_workers), 0)
    books = {w: Holdings() for w in lives}
    feeds = {w: IndexFeed(books[w]) for w in lives}
    for _ in range(120):
        w = rng.randrange(num_workers)
        match rng.choices(("change", "report", "lost", "restart", "expire", "controller"), (60, 30, 5, 2, 2, 1))[0]:
            case "change":
                books[w].change(rng.choice(names), set(rng.sample(TIERS, rng.randint(0, 3))))
            case "report" | "lost" as what:
                body = feeds[w].next_changes()
                if what == "lost" and rng.random() < 0.5:
                    continue  # on its way there
                ack = index.apply(f"w{w}", f"life-{w}-{lives[w]}", body)
                if what == "lost":
                    continue  # on its way back
                feeds[w].confirmed(ack.epoch)
                if ack.epoch == books[w].epoch:
                    asked = rng.sample(names, 40)
                    found = index.holders(join_keys(asked)).get(f"w{w}")
                    assert found == coverage_of(books[w], f"life-{w}-{lives[w]}", asked)
            case "restart":
                lives[w] += 1
                books[w] = Holdings()
                feeds[w] = IndexFeed(books[w])
            case "expire":
                index.retain([f"life-{other}-{lives[other]}" for other in lives if other != w])
                assert f"w{w}" not in index.holders(join_keys(names))
            case "controller":
                index = PrefixIndex()
    for w in lives:  # two more reports bring everybody up to date, whatever was lost
        for _ in range(2):
            body = feeds[w].next_changes()
            feeds[w].confirmed(index.apply(f"w{w}", f"life-{w}-{lives[w]}", body).epoch)
        assert index.holders(join_keys(names)).get(f"w{w}") == coverage_of(books[w], f"life-{w}-{lives[w]}", names)
    index.check_integrity()


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_the_table_against_a_dictionary(seed: int) -> None:
    rng = np.random.default_rng(seed)
    table, model = KeyTable(1), dict[int, int]()
    for _ in range(25):
        # Few different buckets, so that they overflow into each other.
        fresh = distinct(rng.integers(1, 400, size=rng.integers(0, 200)).astype(np.uint64) * np.uint64(16))
        bit = int(rng.integers(0, 64))
        rows = table.insert(fresh)
        table.masks[rows, 0] |= np.uint64(1 << bit)
        model |= {int(k): model.get(int(k), 0) | 1 << bit for k in fresh}
        if rng.random() < 0.3:
            gone = int(rng.integers(0, 64))
            table.clear_bit(gone)
            model = {k: mask & ~(1 << gone) for k, mask in model.items()}
        if rng.random() < 0.3:
            table.rebuild()
        table.check_integrity()
        wanted = np.arange(1, 500, dtype=np.uint64) * np.uint64(16)
        rows = table.find(wanted)
        found = {int(k): int(table.masks[row, 0]) for k, row in zip(wanted, rows, strict=True) if row >= 0}
        assert {k: m for k, m in found.items() if m} == {k: m for k, m in model.items() if m}


def test_keys_that_nobody_held_come_back_into_a_full_table() -> None:
    table = KeyTable(1)
    many = fingerprints(keys(range(100)))
    table.insert(many)  # never held
    table.insert(fingerprints(keys(range(110))))
    table.check_integrity()
    assert (table.find(many) >= 0).all()


# -- what a report means --------------------------------------------------------------------------------------------


def test_leading_and_other_chunks() -> None:
    index = PrefixIndex()
    index.apply("w", "w1", full(1, pages=[0, 1, 5], ram=[2, 6], disk=[3, 6]))
    found = index.holders(keys(range(8)))["w"]
    assert (found.pages, found.ram, found.disk) == (0b0010_0011, 0b0100_0100, 0b0100_1000)
    assert found.leading == (2, 4) and found.stored == 0b0100_1100
    assert index.holders(keys([7, 8])) == {} and index.holders(b"") == {}
    assert Coverage.from_wire(found.to_wire()) == found


@pytest.mark.parametrize(("bitmap", "leading"), [(0, 0), (1, 1), (0b110, 0), (0b1011, 2), ((1 << 400) - 1, 400)])
def test_leading_ones(bitmap: int, leading: int) -> None:
    assert num_leading(bitmap) == leading


def test_a_key_that_is_added_again_changes_its_tiers() -> None:
    index = PrefixIndex()
    assert index.apply("w", "w1", full(1, pages=[0], ram=[0])) == Ack(epoch=1)
    assert index.apply("w", "w1", changes(2, 1, disk=[0])) == Ack(epoch=2)
    found = index.holders(keys([0]))["w"]
    assert (found.pages, found.ram, found.disk) == (0, 0, 1)
    assert index.apply("w", "w1", changes(3, 2, removed=[0, 0, 9])) == Ack(epoch=3)
    assert index.holders(keys([0])) == {}
    index.check_integrity()


def test_a_missing_epoch_changes_nothing_and_is_told() -> None:
    index = PrefixIndex()
    index.apply("w", "w1", full(4, ram=[0]))
    assert index.apply("w", "w1", changes(6, 5, ram=[1])) == Ack(epoch=4)
    assert index.holders(keys([0, 1]))["w"].ram == 0b01


def test_who_is_not_known_has_to_tell_all() -> None:
    index = PrefixIndex()
    assert index.apply("w", "w1", changes(6, 5, ram=[1])) == Ack(epoch=None)
    index.apply("w", "w1", full(4, ram=[0]))
    assert index.apply("w", "w2", changes(5, 4, ram=[1])) == Ack(epoch=None)
    assert index.holders(keys([0, 1])) == {}, "what an earlier life held is gone"


def test_a_full_report_replaces() -> None:
    index = PrefixIndex()
    index.apply("w", "w1", full(4, ram=[0, 1], pages=[2]))
    index.apply("w", "w1", full(2, disk=[1]))
    found = index.holders(keys([0, 1, 2]))["w"]
    assert (found.pages, found.ram, found.disk) == (0, 0, 0b010)
    index.check_integrity()


def test_more_workers_than_a_mask_has_bits() -> None:
    index, num = PrefixIndex(), 2 * TABLE_WORKERS + 3
    for w in range(num):
        index.apply(f"w{w}", f"w{w}", full(1, ram=[0, w + 1]))
    assert set(index.holders(keys([0]))) == {f"w{w}" for w in range(num)}
    assert set(index.holders(keys([100]))) == {"w99"}
    index.retain([f"w{w}" for w in range(num) if w != 70])
    index.apply("new", "new", full(1, ram=[5]))
    assert set(index.holders(keys([71]))) == set() and "new" in index.holders(keys([5]))
    index.check_integrity()
    assert len(index._tables) == 3, "the free place was taken"


# -- bounds ---------------------------------------------------------------------------------------------------------


def test_beyond_its_limit_a_worker_is_cut_and_told() -> None:
    index = PrefixIndex(max_keys_per_worker=10)
    assert index.apply("w", "w1", full(1, ram=range(8))) == Ack(epoch=1)
    assert index.apply("w", "w1", changes(2, 1, ram=range(6, 14))) == Ack(epoch=2, is_cut=True)
    assert index.stats()["index_entries"] == 10
    assert index.apply("w", "w1", changes(3, 2, disk=range(8))) == Ack(epoch=3, is_cut=True)
    assert index.holders(keys(range(8)))["w"].disk == 0xFF, "another tier of what is in needs no room"
    assert index.apply("w", "w1", changes(4, 3, pages=range(100, 200), ram=range(8))) == Ack(epoch=4, is_cut=True)
    held = index.holders(keys(range(8)))["w"]
    assert (held.pages, held.ram, held.disk) == (0, 0xFF, 0), "nor does it lose its place to new ones"
    index.apply("other", "other", full(1, ram=range(10)))
    index.check_integrity()


def test_a_worker_that_was_cut_tells_all_again_when_it_holds_less() -> None:
    index = PrefixIndex(max_keys_per_worker=10)
    index.apply("w", "w1", full(1, ram=range(12)))
    held = [n for n in range(12) if index.holders(keys([n]))]
    assert index.apply("w", "w1", changes(2, 1, removed=held[:2])) == Ack(epoch=2, is_cut=True)
    assert index.apply("w", "w1", changes(3, 2, removed=held[2:6])).epoch is None
    assert index.apply("w", "w1", full(3, ram=range(6, 12))) == Ack(epoch=3)
    assert index.stats()["index_entries"] == 6


def test_a_report_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster.prefix_index, "MAX_KEYS_PER_WORKER", 10)
    body = full(1, pages=range(4), ram=range(100, 200), disk=range(300, 400))
    assert [len(body[tier]) // 16 for tier in TIERS] == [4, 7, 0]
    assert PrefixIndex(max_keys_per_worker=10).apply("w", "w1", body).is_cut


def test_memory_follows_what_is_held() -> None:
    index = PrefixIndex()
    index.apply("a", "a", full(1, ram=range(40_000)))
    index.apply("b", "b", full(1, disk=range(40_000)))
    assert index.stats()["index_keys"] == 40_000
    per_key = index.stats()["index_bytes"] / 40_000
    assert per_key < 33 / LOAD_AFTER_REBUILD + 1, "one row for both, at the load of a table just built"
    epoch = 1
    for start in range(40_000, 400_000, 20_000):  # what comes, goes
        epoch += 1
        held = range(start - 40_000, start - 20_000)
        assert index.apply("a", "a", changes(epoch, epoch - 1, removed=held, ram=range(start, start + 20_000))).epoch
    assert index.stats()["index_entries"] == 80_000
    assert index.stats()["index_bytes"] < 4 * 40_000 * 33 / LOAD_AFTER_REBUILD
    index.retain(["b"])
    index.retain([])
    assert index.stats()["index_bytes"] < 64 * SLOTS * 33
    index.check_integrity()


# -- the worker's side ----------------------------------------------------------------------------------------------


def test_the_answer_says_where_the_next_report_begins() -> None:
    books = Holdings()
    assert isinstance(books, IndexSource) and not isinstance(object(), IndexSource)
    feed = IndexFeed(books)
    books.change(key(1), {"ram"})
    first = feed.next_changes()
    assert first["since"] is None and first["ram"] == key(1)
    feed.confirmed(1)
    books.change(key(2), {"pages"})
    second = feed.next_changes()
    assert (second["since"], second["epoch"], second["pages"]) == (1, 2, key(2))
    assert feed.next_changes() == second, "there was no answer"
    feed.confirmed(None)
    third = feed.next_changes()
    assert third["since"] is None and third["ram"] == key(1)


def test_fingerprints_tell_apart_what_differs_anywhere() -> None:
    one = key(1)
    others = [bytes([*one[:i], one[i] ^ 1, *one[i + 1 :]]) for i in range(16)]
    assert len(set(fingerprints(join_keys([one, *others])).tolist())) == 17
    assert fingerprints(bytes(16)).tolist() == [1], "0 is an empty slot"
