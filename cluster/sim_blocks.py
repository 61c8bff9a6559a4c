"""KV blocks of a simulated decode worker: counted, and each with a name of its own. Pure."""

from __future__ import annotations

import itertools


class SimBlocks:
    """num_free of `num_blocks` can be had. A block that comes back has another name when it is given out again."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = self.num_free = num_blocks
        self._names = itertools.count()

    def take(self, num_blocks: int) -> list[int]:
        assert num_blocks <= self.num_free
        self.num_free -= num_blocks
        return list(itertools.islice(self._names, num_blocks))

    def give_back(self, blocks: list[int]) -> None:
        self.num_free += len(blocks)
        assert self.num_free <= self.num_blocks, "a block was given back twice"
        blocks.clear()
