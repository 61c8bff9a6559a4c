"""A decode worker's KV pages: given to requests, tagged with how good the KV in them is, taken back.

Around the allocator, the pool and the tags (prefill/page_quality.py). The caller holds the worker's lock.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import Tensor

from decode.startup import promised_kl
from prefill.block_allocator import blocks_for
from prefill.page_quality import UNKNOWN, PageQuality
from prefill.runtime import BLOCK_TOKENS, ModelRuntime


class TaggedPages:
    """Tokens [start, stop) are those of the sequence that `table` belongs to."""

    def __init__(self, runtime: ModelRuntime, *, chunk_tokens: int) -> None:
        assert chunk_tokens % BLOCK_TOKENS == 0, "two chunks in one block would have one tag"
        self._pool, self._allocator = runtime.pool, runtime.allocator
        self._quality = PageQuality()
        self._kl = {level: UNKNOWN if kl is None else kl for level, kl in promised_kl(runtime.profile).items()}

    def can_allocate(self, num_tokens: int) -> bool:
        return self._allocator.can_allocate(blocks_for(num_tokens, BLOCK_TOKENS))

    def allocate(self, num_tokens: int) -> list[int]:
        return self._allocator.allocate(blocks_for(num_tokens, BLOCK_TOKENS))

    def free(self, table: Sequence[int]) -> None:
        self._quality.released(table)
        self._allocator.free(table)

    def loaded(self, table: Sequence[int], start: int, stop: int, level: str) -> None:
        """A chunk at this level was decoded into them."""
        self._quality.filled(_blocks(table, start, stop), self._kl[level])

    def refine(self, table: Sequence[int], start: int, k: Tensor, v: Tensor, level: str) -> None:
        """Copy k, v [L, T, H, D] of a better level over those of a loaded chunk."""
        self._pool.write(table, start, k, v)
        self._quality.refined(_blocks(table, start, start + k.shape[1]), self._kl[level])

    def computed(self, table: Sequence[int], start: int, stop: int) -> None:
        """They were computed on all that lies before them."""
        # KV only gets better once it is in place: what comes later into the same block rests on nothing worse than its
        # first token did. So a tag is looked up once a block, and not at every token.
        if stop - start > 1 or start % BLOCK_TOKENS == 0:
            self._quality.computed(_blocks(table, start, stop), _blocks(table, 0, stop))

    def worst_kl(self, table: Sequence[int], start: int, stop: int) -> float | None:
        """The worst promise of these tokens' KV, nats a token; None if some of it promises nothing."""
        worst = self._quality.worst(_blocks(table, start, stop))
        return None if worst == UNKNOWN else worst

    def usage(self) -> float:
        return self._allocator.num_used / self._allocator.num_blocks

    def check_integrity(self, tables: Iterable[Sequence[int]]) -> None:
        """These tables hold all pages that are in use, and no other page has a tag."""
        self._allocator.check_integrity()
        self._quality.check_integrity(self._allocator)
        assert self._allocator.num_used == sum(len(table) for table in tables)


def _blocks(table: Sequence[int], start: int, stop: int) -> Sequence[int]:
    return table[start // BLOCK_TOKENS : blocks_for(stop, BLOCK_TOKENS)]
