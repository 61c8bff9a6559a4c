"""prefill/block_pool.py: every block is free, held or cached, whatever is done."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefill.block_pool import BlockPool, PoolExhausted, blocks_for
from prefill.chunks import KeyChain

BLOCK = 16


def keys_of(tokens: list[int]) -> list[bytes]:
    return KeyChain(tokens, fingerprint="f").blocks(BLOCK)


def chain(*names: str) -> list[bytes]:
    return ["/".join(names[: i + 1]).encode() for i in range(len(names))]


def held(pool: BlockPool, keys: list[bytes]) -> list[int]:
    """A table whose blocks are all known."""
    table = pool.allocate(len(keys))
    for i, (block, key) in enumerate(zip(table, keys, strict=True)):
        assert pool.register(block, key, keys[i - 1] if i else None) == block
    return table


def test_a_fresh_pool_gives_neighbours() -> None:
    pool = BlockPool(8)
    assert pool.allocate(3) == [0, 1, 2]
    assert (pool.num_available, pool.num_held) == (5, 3)


def test_too_many_blocks_take_none_and_say_the_numbers() -> None:
    pool = BlockPool(4)
    pool.allocate(3)
    with pytest.raises(PoolExhausted, match="2 KV blocks wanted, 1 of 4 free") as refused:
        pool.allocate(2)
    assert (refused.value.wanted_blocks, refused.value.free_blocks) == (2, 1)
    assert pool.num_available == 1
    pool.check_integrity()


@pytest.mark.parametrize(
    ("blocks", "words"), [([0, 0], "too often"), ([3], "too often"), ([4], "not of this pool"), ([-1], "not of")]
)
def test_our_own_bugs_are_caught(blocks: list[int], words: str) -> None:
    pool = BlockPool(4)
    pool.allocate(2)
    with pytest.raises(AssertionError, match=words):
        pool.release(blocks)


@pytest.mark.parametrize(("tokens", "blocks"), [(0, 0), (1, 1), (15, 1), (16, 1), (17, 2)])
def test_blocks_for(tokens: int, blocks: int) -> None:
    assert blocks_for(tokens, 16) == blocks


def test_a_released_prefix_is_found_again_and_shared() -> None:
    pool, keys = BlockPool(8), chain("a", "b", "c")
    table = held(pool, keys)
    assert pool.release(table) == [] and pool.num_cached == 3 and pool.num_available == 8
    found = pool.match([*keys[:2], b"else"])
    assert found == table[:2]
    pool.share(found)
    pool.share(found)
    assert pool.num_held == 2 and pool.num_holders(found[0]) == 2 and pool.num_cached == 1
    assert pool.match(keys, accept=lambda block: block != table[1]) == table[:1]
    pool.check_integrity()


def test_the_end_of_a_chain_goes_first_and_the_oldest_chain_before_the_newest() -> None:
    pool = BlockPool(6)
    old, new = chain("a", "b", "c"), chain("x", "y", "z")
    for keys in (old, new):
        pool.release(held(pool, keys))
    pool.allocate(1)
    assert len(pool.match(old)) == 2 and len(pool.match(new)) == 3
    pool.share(pool.match(old)[:1])  # used again, only its front
    pool.release(pool.match(old)[:1])
    pool.allocate(3)
    assert len(pool.match(old)) == 1 and len(pool.match(new)) == 1
    assert pool.num_evictions == 4


def test_a_pinned_prefix_stays_until_it_is_unpinned() -> None:
    pool, keys = BlockPool(4), chain("a", "b", "c")
    pool.pin(keys[:2])
    pool.release(held(pool, keys))
    assert pool.num_available == 2
    with pytest.raises(PoolExhausted):
        pool.allocate(3)
    pool.allocate(2)
    assert len(pool.match(keys)) == 2
    pool.check_integrity()
    pool.unpin(keys[:2])
    assert pool.forget_cached() and pool.num_available == 2


def test_what_is_cached_too_long_is_forgotten() -> None:
    pool, keys = BlockPool(4, ttl_s=10.0), chain("a", "b")
    table = held(pool, keys)
    pool.release(table, now=5.0)
    assert pool.expire(14.9) == []
    assert sorted(pool.expire(15.0)) == table and pool.match(keys) == []
    pool.check_integrity()


def test_a_second_block_of_the_same_content_is_not_known() -> None:
    pool, keys = BlockPool(8), chain("a", "b")
    first = held(pool, keys)
    other = pool.allocate(1)
    assert pool.register(other[0], keys[0], None) == first[0]
    assert pool.release(other) == other
    pool.check_integrity()


def test_better_content_replaces_worse_and_all_that_continues_it() -> None:
    pool, keys = BlockPool(8), chain("a", "b", "c")
    worse = held(pool, keys)
    pool.release(worse[1:])  # b and c are cached, a is held still
    better = pool.allocate(2)
    assert pool.register(better[0], keys[0], None, replace=True) == better[0]
    assert pool.match(keys) == better[:1]
    assert pool.num_cached == 0 and pool.num_held == 3
    assert pool.register(better[1], keys[1], keys[0]) == better[1]
    assert pool.release(worse[:1]) == worse[:1]
    pool.check_integrity()


def test_a_block_whose_front_is_unknown_is_not_known() -> None:
    pool = BlockPool(2)
    (block,) = pool.allocate(1)
    assert pool.register(block, b"b", b"a") is None
    assert pool.release([block]) == [block]


class Machine:
    """Requests on a pool, over few different tokens so that prefixes are often equal. Knows what stands in every block,
    as the engine does: a block that is written or handed out while another table reads it is seen."""

    def __init__(self, seed: int, num_blocks: int) -> None:
        self.random = random.Random(seed)
        self.pool = BlockPool(num_blocks, ttl_s=50.0)
        self.tables: list[tuple[list[int], list[int], bool]] = []  # tokens, blocks, whether it still registers
        self.content: dict[int, tuple[int, ...]] = {}  # by block: all tokens up to its end
        self.pinned: list[list[bytes]] = []
        self.now = 0.0

    def step(self) -> None:
        self.now += self.random.random()
        acts = [self.admit, self.admit, self.extend, self.extend, self.extend, self.fork, self.finish, self.finish]
        self.random.choice([*acts, self.preempt, self.pin, self.unpin, self.expire, self.clear])()

    def check(self) -> None:
        self.pool.check_integrity()
        assert self.pool.num_held == len({block for _, table, _ in self.tables for block in table})
        for tokens, table, _ in self.tables:
            assert len(table) == blocks_for(len(tokens), BLOCK)
            for i, block in enumerate(table[: len(tokens) // BLOCK]):
                assert self.content[block] == tuple(tokens[: (i + 1) * BLOCK]), "somebody else wrote into it"
        for key, _ in self.pool.known():
            block = self.pool.block_of(key)
            assert block is not None and keys_of(list(self.content[block]))[-1] == key

    def admit(self) -> None:
        # Long runs of the same token: few different prefixes.
        tokens = [self.random.randrange(2)] * self.random.randrange(1, 60)
        tokens += [self.random.randrange(3)] * self.random.randrange(40)
        found = self.pool.match(keys_of(tokens)[: (len(tokens) - 1) // BLOCK])
        self.pool.share(found)
        try:
            table = found + self.pool.allocate(blocks_for(len(tokens), BLOCK) - len(found))
        except PoolExhausted:
            self.pool.release(found, self.now)
            return
        self.tables.append(([], table, True))
        self.write(len(self.tables) - 1, tokens, first=len(found))

    def extend(self) -> None:
        if not self.tables:
            return
        index = self.random.randrange(len(self.tables))
        tokens, table, _ = self.tables[index]
        more = [self.random.randrange(2) for _ in range(self.random.randrange(1, 20))]
        missing = blocks_for(len(tokens) + len(more), BLOCK) - len(table)
        if not self.pool.can_allocate(missing):
            with pytest.raises(PoolExhausted):
                self.pool.allocate(missing)
            return
        table += self.pool.allocate(missing)
        self.write(index, tokens + more, first=len(tokens) // BLOCK)

    def write(self, index: int, tokens: list[int], first: int) -> None:
        """Fill the blocks from `first` on, and make them known."""
        _, table, registers = self.tables[index]
        keys = keys_of(tokens)
        for i in range(first, len(tokens) // BLOCK):
            assert self.pool.num_holders(table[i]) == 1, "a shared block is written"
            self.content[table[i]] = tuple(tokens[: (i + 1) * BLOCK])
            if registers:
                replace = self.random.random() < 0.1
                known = self.pool.register(table[i], keys[i], keys[i - 1] if i else None, replace=replace)
                if known is None or (known != table[i] and self.random.random() < 0.3):
                    registers = False
                elif known != table[i]:
                    self.pool.share([known])
                    self.pool.release([table[i]], self.now)
                    table[i] = known
        self.tables[index] = (tokens, table, registers)

    def fork(self) -> None:
        if not self.tables:
            return
        tokens, table, registers = self.random.choice(self.tables)
        num_full = len(tokens) // BLOCK
        try:
            rest = self.pool.allocate(len(table) - num_full)  # what is not full is copied
        except PoolExhausted:
            return
        self.pool.share(table[:num_full])
        self.tables.append((list(tokens), table[:num_full] + rest, registers))

    def finish(self) -> None:
        if self.tables:
            _, table, _ = self.tables.pop(self.random.randrange(len(self.tables)))
            for block in self.pool.release(table, self.now):
                self.content.pop(block, None)  # of one that was not full, nothing is known

    def preempt(self) -> None:
        """Gives its pages back and is admitted anew, if they are still there."""
        if self.tables:
            tokens, table, _ = self.tables.pop(self.random.randrange(len(self.tables)))
            self.pool.release(table, self.now)
            found = self.pool.match(keys_of(tokens))
            self.pool.share(found)
            self.tables.append((tokens[: len(found) * BLOCK], found, True))

    def pin(self) -> None:
        if self.tables and len(self.pinned) < 3:
            tokens, _, _ = self.random.choice(self.tables)
            keys = keys_of(tokens)[: self.random.randrange(4)]
            self.pool.pin(keys)
            self.pinned.append(keys)

    def unpin(self) -> None:
        if self.pinned:
            self.pool.unpin(self.pinned.pop(self.random.randrange(len(self.pinned))))

    def expire(self) -> None:
        self.pool.expire(self.now)

    def clear(self) -> None:
        if self.random.random() < 0.2:
            self.pool.forget_cached()


@pytest.mark.parametrize("seed", range(4))
def test_no_block_is_lost_in_20000_operations(seed: int) -> None:
    machine = Machine(seed, num_blocks=[12, 24, 40, 80][seed])
    for _ in range(5000):
        machine.step()
        machine.check()
    while machine.tables:
        machine.finish()
    while machine.pinned:
        machine.unpin()
    assert machine.pool.num_held == 0
    machine.pool.forget_cached()
    machine.check()
    assert machine.pool.allocate(machine.pool.num_blocks) == list(range(machine.pool.num_blocks))


@given(st.integers(1, 40), st.lists(st.tuples(st.booleans(), st.integers(0, 12)), max_size=60))
def test_no_block_is_given_twice(num_blocks: int, acts: list[tuple[bool, int]]) -> None:
    pool = BlockPool(num_blocks)
    owned: list[list[int]] = []
    for wants_blocks, number in acts:
        if wants_blocks:
            available = pool.num_available
            try:
                blocks = pool.allocate(number)
            except PoolExhausted:
                assert number > available
            else:
                assert len(blocks) == number
                owned.append(blocks)
        elif owned:
            pool.release(owned.pop(number % len(owned)))
        used = [block for blocks in owned for block in blocks]
        assert len(set(used)) == len(used) == pool.num_held
        pool.check_integrity()
