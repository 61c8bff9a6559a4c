"""prefill/block_allocator.py: every block is free or used, whatever is done."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefill.block_allocator import BlockAllocator, PoolExhausted, blocks_for


def test_a_fresh_pool_gives_neighbours() -> None:
    allocator = BlockAllocator(8)
    assert allocator.allocate(3) == [0, 1, 2]
    assert (allocator.num_free, allocator.num_used) == (5, 3)


def test_too_many_blocks_take_none_and_say_the_numbers() -> None:
    allocator = BlockAllocator(4)
    allocator.allocate(3)
    with pytest.raises(PoolExhausted, match="2 KV blocks wanted, 1 of 4 free") as refused:
        allocator.allocate(2)
    assert (refused.value.wanted_blocks, refused.value.free_blocks) == (2, 1)
    assert allocator.num_free == 1
    allocator.check_integrity()


@pytest.mark.parametrize(
    ("blocks", "words"), [([0, 0], "freed twice"), ([3], "freed twice"), ([4], "not of this pool"), ([-1], "not of")]
)
def test_our_own_bugs_are_caught(blocks: list[int], words: str) -> None:
    allocator = BlockAllocator(4)
    allocator.allocate(2)
    with pytest.raises(AssertionError, match=words):
        allocator.free(blocks)


@pytest.mark.parametrize(("tokens", "blocks"), [(0, 0), (1, 1), (15, 1), (16, 1), (17, 2)])
def test_blocks_for(tokens: int, blocks: int) -> None:
    assert blocks_for(tokens, 16) == blocks


@given(st.integers(1, 40), st.lists(st.tuples(st.booleans(), st.integers(0, 12)), max_size=60))
def test_no_block_is_lost_or_given_twice(num_blocks: int, acts: list[tuple[bool, int]]) -> None:
    allocator = BlockAllocator(num_blocks)
    owned: list[list[int]] = []
    for wants_blocks, number in acts:
        if wants_blocks:
            free = allocator.num_free
            try:
                blocks = allocator.allocate(number)
            except PoolExhausted:
                assert number > free
            else:
                assert len(blocks) == number
                owned.append(blocks)
        elif owned:
            allocator.free(owned.pop(number % len(owned)))
        used = [block for blocks in owned for block in blocks]
        assert len(set(used)) == len(used) == allocator.num_used
        allocator.check_integrity()
