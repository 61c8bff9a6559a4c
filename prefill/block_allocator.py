"""Which pages of the KV pool are free. Pure bookkeeping: no tensors, no I/O."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable


class PoolExhausted(Exception):
    """More pages were asked for than are free. The caller waits, preempts or refuses."""

    def __init__(self, *, wanted_blocks: int, free_blocks: int, num_blocks: int) -> None:
        super().__init__(
            f"{wanted_blocks} KV blocks wanted, {free_blocks} of {num_blocks} free: "
            "wait for a request to end, or give the worker a larger pool"
        )
        self.wanted_blocks = wanted_blocks
        self.free_blocks = free_blocks
        self.num_blocks = num_blocks


class BlockAllocator:
    """A free list. The block freed longest ago is given out first, and a fresh pool gives out 0, 1, 2, ...:
    neighbours in a table are then often neighbours in memory, which `KVPool` turns into plain copies."""

    def __init__(self, num_blocks: int) -> None:
        assert num_blocks > 0, num_blocks
        self.num_blocks = num_blocks
        self._free = deque(range(num_blocks))
        self._is_used = bytearray(num_blocks)

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_used(self) -> int:
        return self.num_blocks - len(self._free)

    def can_allocate(self, num_blocks: int) -> bool:
        return num_blocks <= len(self._free)

    def allocate(self, num_blocks: int) -> list[int]:
        """All of `num_blocks` blocks or, with `PoolExhausted`, none."""
        assert num_blocks >= 0, num_blocks
        if num_blocks > len(self._free):
            raise PoolExhausted(wanted_blocks=num_blocks, free_blocks=len(self._free), num_blocks=self.num_blocks)
        blocks = [self._free.popleft() for _ in range(num_blocks)]
        for block in blocks:
            self._is_used[block] = 1
        return blocks

    def free(self, blocks: Iterable[int]) -> None:
        for block in blocks:
            assert 0 <= block < self.num_blocks, f"block {block} is not of this pool of {self.num_blocks}"
            assert self._is_used[block], f"block {block} was freed twice"
            self._is_used[block] = 0
            self._free.append(block)

    def is_used(self, block: int) -> bool:
        return 0 <= block < self.num_blocks and bool(self._is_used[block])

    def check_integrity(self) -> None:
        """Every block is either used or in the free list, once."""
        assert len(set(self._free)) == len(self._free), "a block is in the free list twice"
        assert not any(self._is_used[block] for block in self._free), "a used block is in the free list"
        assert sum(self._is_used) + len(self._free) == self.num_blocks, "a block is lost"


def blocks_for(num_tokens: int, block_tokens: int) -> int:
    """How many blocks `num_tokens` tokens need."""
    return -(-num_tokens // block_tokens)
