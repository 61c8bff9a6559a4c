"""Partial hits: the entry with the longest common front, against looking at all tokens; tails in the chunk store."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from store_cases import reopened, two_tiers

from prefill.chunks import KeyChain
from prefill.front_index import MAX_COMPARED, MIN_FRONT_TOKENS, FrontIndex
from prefill.store import MASTER_LEVEL, ChunkStore
from prefill.tier_index import ChunkMeta

SIZE = 256


def chain(tokens: list[int], salt: str = "") -> KeyChain:
    return KeyChain(tokens, fingerprint="m", cache_salt=salt)


def meta_of(tokens: list[int], start: int, stop: int, *, kl: float = 0.0, salt: str = "") -> ChunkMeta:
    return ChunkMeta(kl=kl, links=chain(tokens, salt).links(start, stop), is_tail=stop - start < SIZE)


def num_common(one: list[int], other: list[int]) -> int:
    return next((i for i, (a, b) in enumerate(zip(one, other)) if a != b), min(len(one), len(other)))


class Sequences:
    """Random ones that begin as others do, and what is kept of them."""

    def __init__(self, seed: int) -> None:
        self.draw = random.Random(seed)
        self.all = [self._fresh(600)]
        self.entries: dict[bytes, tuple[list[int], int, int, str, float]] = {}

    def _fresh(self, length: int) -> list[int]:
        return [self.draw.randrange(1000) for _ in range(length)]

    def new(self) -> list[int]:
        old = self.draw.choice(self.all)
        tokens = old[: self.draw.randrange(len(old))]
        self.all.append(tokens + self._fresh(self.draw.randrange(1, 300)))
        return self.all[-1]

    def add(self, index: FrontIndex) -> None:
        tokens, salt, kl = self.new(), self.draw.choice(["", "other"]), self.draw.choice([0.0, 0.0, 0.1])
        start = self.draw.randrange(len(tokens) // SIZE + 1) * SIZE
        stop = min(start + SIZE, len(tokens) // 16 * 16)
        if stop - start < MIN_FRONT_TOKENS:
            return
        key = chain(tokens, salt).key_of(start, stop)
        index.put(key, meta_of(tokens, start, stop, kl=kl, salt=salt))
        self.entries[key] = tokens, start, stop, salt, kl

    def longest(self, tokens: list[int], start: int, stop: int, max_kl: float) -> int:
        """Without links: how many tokens of [start, stop) the best entry shares; 0 if too few."""
        best = 0
        for theirs, their_start, their_stop, salt, kl in self.entries.values():
            if salt == "" and kl <= max_kl and their_start == start:
                shared = min(num_common(tokens, theirs), stop, their_stop)
                best = max(best, (shared - start) // 16 * 16)
        return best if best >= MIN_FRONT_TOKENS else 0


@pytest.mark.parametrize("seed", range(20))
def test_the_longest_common_front_is_found(seed: int) -> None:
    world, index, found_any = Sequences(seed), FrontIndex(), 0
    for _ in range(MAX_COMPARED):  # so that all under one mark are compared
        world.add(index)
        if world.entries and world.draw.random() < 0.2:
            key = world.draw.choice(list(world.entries))
            assert index.remove(key) is not None
            del world.entries[key]
        index.check_integrity()
        tokens, max_kl = world.draw.choice([world.new(), *world.all]), world.draw.choice([0.0, 0.1])
        for start in range(0, len(tokens), SIZE):
            stop = min(start + SIZE, (len(tokens) - 1) // 16 * 16)
            found = index.longest(chain(tokens).links(start, stop), max_kl)
            expected = world.longest(tokens, start, stop, max_kl)
            assert (found.num_tokens if found else 0) == expected, f"seed {seed}"
            if found is not None:
                theirs, their_start, their_stop, _, kl = world.entries[found.key]
                assert theirs[: start + found.num_tokens] == tokens[: start + found.num_tokens]
                assert (found.entry_tokens, found.kl) == (their_stop - their_start, kl) and their_start == start
                found_any += 1
    assert found_any > 20


def test_of_very_many_that_begin_alike_only_the_newest_are_compared() -> None:
    index, front = FrontIndex(), list(range(100))
    for number in range(3 * MAX_COMPARED):
        tokens = front + [1000 + number] * 100
        index.put(chain(tokens).key_of(0, 192), meta_of(tokens, 0, 192))
    old, new = (front + [1000 + number] * 100 for number in (0, 3 * MAX_COMPARED - 1))
    assert index.longest(chain(new).links(0, 192), 0.0).num_tokens == 192
    assert index.longest(chain(old).links(0, 192), 0.0).num_tokens == 192, "it is alone under the mark of 128 tokens"
    assert index.longest(chain(old).links(0, 112), 0.0).num_tokens == 96, "and not under that of 64"


def test_a_tail_goes_when_one_that_begins_with_it_comes(tmp_path: Path) -> None:
    tokens, other = list(range(700)), list(range(300)) + [9] * 300
    store = two_tiers(tmp_path)

    def put(tokens: list[int], start: int, stop: int, *, kl: float = 0.0) -> bytes:
        found = chain(tokens)
        key = found.key_of(start, stop)
        is_tail = stop - start < SIZE
        assert store.put(key, MASTER_LEVEL, b"x" * stop, kl=kl, links=found.links(start, stop), is_tail=is_tail)
        return key

    short, better = put(tokens, 256, 352), put(other, 256, 400)
    longer = put(tokens, 256, 448)
    assert store.kl(short) is None and store.kl(better) == 0.0
    lossy = put(tokens, 256, 480, kl=0.1)
    assert store.kl(longer) == 0.0, "a worse one does not replace it"
    whole = put(tokens, 256, 512)
    assert store.kl(longer) is None and store.kl(lossy) is None
    whole_first = put(tokens, 0, 256)
    stats = store.stats()
    assert (stats.num_chunks, stats.num_tails, stats.disk_chunks, stats.disk_tails) == (2, 1, 2, 1)
    assert {key for key, _ in store.changes(-1).added} == {whole, whole_first}, "tails are announced to nobody"
    store.check_integrity()

    store = reopened(store, tmp_path)
    links = chain(other).links(256, 592)
    found = store.longest_front(links, 0.0)
    assert found is not None
    assert (found.key, found.num_tokens, found.entry_tokens, found.kl) == (better, 144, 144, 0.0)
    assert store.get(found.key, MASTER_LEVEL) == b"x" * 400
    part = store.longest_front(chain(tokens[:330] + [7] * 100).links(256, 416), 0.0)
    assert part is not None and (part.key, part.num_tokens, part.entry_tokens) == (whole, 64, 256)
    assert {key for key, _ in store.changes(-1).added} == {whole, whole_first}
    store.check_integrity()
    store.close()


def test_the_index_hears_of_no_tail_that_comes_or_goes() -> None:
    store, found = ChunkStore(100_000), chain(list(range(600)))
    epoch = store.changes(-1).epoch
    store.put(found.key_of(0, 64), MASTER_LEVEL, b"tail", links=found.links(0, 64), is_tail=True)
    store.put(found.key_of(0, 128), MASTER_LEVEL, b"tail", links=found.links(0, 128), is_tail=True)
    store.drop(found.key_of(0, 128))
    changes = store.changes(epoch)
    assert (changes.added, changes.removed) == ([], [])
    assert store.longest_front(found.links(0, 256), 0.0) is None
    store.check_integrity()
