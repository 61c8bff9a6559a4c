"""The chunk store under random use, restarts included, against what must hold of any store.

What a chunk's blob at a level must be follows from (chunk, level, quality of its master), so every answer can be judged
by itself: whatever was evicted, promoted, replaced or written late, a blob is the right one or it is not there.
"""

from __future__ import annotations

import random
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from store_cases import Clock, content, key_of, two_tiers

from prefill import disk_tier
from prefill.store import MASTER_LEVEL, ChunkStore, StoreShares

NUM_CHUNKS = 12
LEVELS = (MASTER_LEVEL, "q1", "raw")
KLS = (0.0, 0.01, 0.5)
TTL_S = 100.0
MAX_BLOB_BYTES = 120_000
DISK_SHARE = 0.2  # of the file, so that it is the books that are full, and never the file: that is another test's
SHARES = (0.5, 0.35, 1.0)  # of tenant b
KEYS = {key_of(number): number for number in range(NUM_CHUNKS)}


def parent_of(number: int) -> bytes | None:
    """Two binary trees, of the even and of the odd chunks, one of each tenant."""
    return key_of(2 * ((number // 2 - 1) // 2) + number % 2) if number >= 2 else None


def tenant_of(number: int) -> str:
    return "ab"[number % 2]


def right(number: int, level: str, kl: float) -> bytes:
    return content(number, level, kl=kl, max_bytes=MAX_BLOB_BYTES)


class Judged:
    """A store, what must be true of it, and a mirror kept by `changes` alone."""

    def __init__(self, path: Path | None) -> None:
        self.path, self.clock, self.shares = path, Clock(), StoreShares(tenants={"b": SHARES[0]})
        self.pins: Counter[bytes] = Counter()
        self.store = self.open()
        self.mirror: dict[bytes, str] = {}
        self.epoch = -1
        self.held: dict[bytes, float] = {}

    def open(self) -> ChunkStore:
        if self.path is None:
            return ChunkStore(300_000, tenant_shares=self.shares, ttl_s=TTL_S, clock=self.clock)
        return two_tiers(
            self.path,
            ram_bytes=300_000,
            disk_bytes=4 << 20,
            tenant_shares=self.shares,
            ttl_s=TTL_S,
            clock=self.clock,
        )

    def put(self, number: int, level: str, kl: float) -> None:
        key, before = key_of(number), self.store.kl(key_of(number))
        blob, sizes = right(number, level, kl), self.store.sizes(key)
        kept = self.store.put(key, level, blob, kl=kl, tenant=tenant_of(number), parent=parent_of(number))
        if before is not None and (kl > before or (level != MASTER_LEVEL and kl != before)):
            # A derived blob said to be better than its master is taken for the master's; do not try it here.
            assert not kept
            assert self.store.sizes(key) == sizes
        if before is None and level != MASTER_LEVEL:
            assert not kept
        if kept:
            assert self.store.kl(key) == kl
            assert self.store.peek(key, level) == blob

    def get(self, number: int, level: str) -> None:
        kl = self.store.kl(key_of(number))
        sizes = self.store.sizes(key_of(number))
        blob = self.store.get(key_of(number), level)
        assert (blob is None) == (level not in (sizes or {}))
        if blob is not None:
            assert kl is not None and blob == right(number, level, kl)
            assert sizes is not None and sizes[level] == len(blob)

    def restart(self) -> None:
        if self.path is None:
            return
        self.store.unpin(self.pins.elements())  # a pin ends with the process
        assert self.store.flush(20)
        on_disk = {key: self.store.kl(key) for key in KEYS if self._is_on_disk(key)}
        self.store.close()
        self.store = self.open()
        self.pins.clear()
        self.epoch, self.mirror, self.held = -1, {}, {}
        assert {key: self.store.kl(key) for key in on_disk} == on_disk

    def _is_on_disk(self, key: bytes) -> bool:
        assert self.store._disk is not None
        return (key, MASTER_LEVEL) in self.store._disk.index

    def judge(self, *, may_expire: bool) -> None:
        self.store.check_integrity()
        held = {key: kl for key in KEYS if (kl := self.store.kl(key)) is not None}
        for key, kl in self.held.items():
            assert held.get(key, kl) <= kl, "a better chunk gave way to a worse"
            assert key in held or not self.pins[key], "a pinned chunk went"
            if key not in held and self.path is None and not may_expire:
                assert all(parent_of(KEYS[other]) != key for other in held), "a chunk went before what continues it"
        self.held = held
        changes = self.store.changes(self.epoch)
        assert changes.full == (self.epoch == -1)
        self.mirror.update(changes.added)
        for key in changes.removed:
            self.mirror.pop(key, None)
        self.epoch = changes.epoch
        whole = self.store.changes(-1)
        assert whole.full and dict(whole.added) == self.mirror and self.mirror.keys() == held.keys()


numbers = st.integers(0, NUM_CHUNKS - 1)
steps = st.lists(
    st.one_of(
        st.tuples(st.just("put"), numbers, st.sampled_from(LEVELS), st.sampled_from(KLS)),
        st.tuples(st.just("put"), numbers, st.just(MASTER_LEVEL), st.just(0.0)),
        st.tuples(st.just("get"), numbers, st.sampled_from(LEVELS)),
        st.tuples(st.just("pin"), numbers),
        st.tuples(st.just("unpin"), numbers),
        st.tuples(st.just("wait"), st.floats(0.0, 60.0)),
        st.tuples(st.just("share"), st.sampled_from(SHARES)),
        st.tuples(st.just("flush")),
        st.tuples(st.just("restart")),
    ),
    max_size=40,
)


@pytest.fixture(autouse=True, scope="module")
def small_disk() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(disk_tier, "PAYLOAD_SHARE", DISK_SHARE)
        yield


@contextmanager
def directory() -> Iterator[Path]:
    path = Path(tempfile.mkdtemp())
    yield path
    shutil.rmtree(path)


def run(judged: Judged, todo: list[tuple]) -> None:
    for step in todo:
        what, *rest = step
        if what == "put":
            number, level, kl = rest
            held = judged.store.kl(key_of(number))
            judged.put(number, level, kl if level == MASTER_LEVEL or held is None else max(kl, held))
        elif what == "get":
            judged.get(*rest)
        elif what == "pin":
            judged.store.pin([key_of(rest[0])])
            judged.pins[key_of(rest[0])] += 1
        elif what == "unpin" and (pinned := sorted(+judged.pins)):
            judged.store.unpin([pinned[rest[0] % len(pinned)]])
            judged.pins[pinned[rest[0] % len(pinned)]] -= 1
        elif what == "wait":
            judged.clock.now += rest[0]
        elif what == "share":
            others = {
                key for key, number in KEYS.items() if judged.store.kl(key) is not None and tenant_of(number) == "a"
            }
            judged.shares = StoreShares(tenants={"b": rest[0]})
            judged.store.set_shares(judged.shares)
            assert all(judged.store.kl(key) is not None for key in others), "another tenant paid"
        elif what == "flush":
            assert judged.store.flush(20)
        elif what == "restart":
            judged.restart()
        judged.judge(may_expire=what == "wait")
    assert judged.store.close()


def draw_steps(draw: random.Random, number: int) -> list[tuple]:
    """The same in long, with no regard to shrinking: puts enough that both tiers are full all the time."""
    kinds = {"put": 10, "get": 8, "pin": 1, "unpin": 1.5, "wait": 1, "share": 0.5, "flush": 1, "restart": 0.3}
    todo: list[tuple] = []
    for what in draw.choices(list(kinds), list(kinds.values()), k=number):
        chunk, level = draw.randrange(NUM_CHUNKS), draw.choice(LEVELS)
        kl = draw.choice(KLS) if draw.random() < 0.2 else 0.0
        rest = {
            "put": (chunk, level, kl),
            "get": (chunk, level),
            "wait": (draw.choice([0.1, 1.0, 50.0]),),
            "share": (draw.choice(SHARES),),
        }
        todo.append((what, *rest.get(what, (chunk,) if what in ("pin", "unpin") else ())))
    return todo


@settings(deadline=None, max_examples=150)
@given(steps)
def test_any_use_in_ram(todo: list[tuple]) -> None:
    run(Judged(None), todo)


@settings(deadline=None, max_examples=40)
@given(steps)
def test_any_use_of_two_tiers(todo: list[tuple]) -> None:
    with directory() as path:
        run(Judged(path), todo)


@pytest.mark.parametrize("seed", range(6))
def test_long_use_in_ram(seed: int) -> None:
    judged = Judged(None)
    run(judged, draw_steps(random.Random(seed), 1_000))
    assert judged.store.stats().num_evictions > 30


@pytest.mark.parametrize("seed", range(6))
def test_long_use_of_two_tiers(seed: int, tmp_path: Path) -> None:
    judged = Judged(tmp_path)
    run(judged, draw_steps(random.Random(seed), 500))
    stats = judged.store.stats()
    assert stats.num_disk_failed_writes == stats.num_disk_damaged == 0
