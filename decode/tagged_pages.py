"""A decode worker's KV pages: given to requests, shared by equal prefixes, tagged with how good the KV in them is.

Around the block pool, the tensors and the tags (prefill/page_quality.py). The caller holds the worker's lock.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor

from decode.startup import promised_kl
from prefill.block_pool import blocks_for
from prefill.chunks import KeyChain, chunk_key
from prefill.page_quality import EXACT, UNKNOWN, PageQuality
from prefill.runtime import BLOCK_TOKENS, ModelRuntime


@dataclass(slots=True, kw_only=True, eq=False)
class PageTable:
    """The pages of one sequence. blocks: in the sequence's order. cached_tokens: of its front, those whose KV was there
    already. chain: the keys of its tokens so far. max_kl: how good KV must be that it takes from others, nats a token;
    None: it takes none, and gives none. num_known: how many of its blocks others may find."""

    blocks: list[int]
    chain: KeyChain
    max_kl: float | None
    cached_tokens: int = 0
    num_known: int = 0


class TaggedPages:
    """Tokens [start, stop) are those of the sequence that `table` belongs to."""

    def __init__(self, runtime: ModelRuntime, *, chunk_tokens: int, shares_prefixes: bool = True) -> None:
        assert chunk_tokens % BLOCK_TOKENS == 0, "two chunks in one block would have one tag"
        self._pool, self._blocks = runtime.pool, runtime.allocator
        self._fingerprint = runtime.model.fingerprint
        self._shares_prefixes = shares_prefixes
        self._quality = PageQuality()
        self._kl = {level: UNKNOWN if kl is None else kl for level, kl in promised_kl(runtime.profile).items()}

    # -- tables ---------------------------------------------------------------------------------------------------

    def chain(self, token_ids: Sequence[int], cache_salt: str) -> KeyChain:
        return KeyChain(token_ids, fingerprint=self._fingerprint, cache_salt=cache_salt)

    def max_kl(self, floor: str) -> float:
        """What a request with this floor takes from others. A level that promises nothing is no measure: then exact KV
        only."""
        kl = self._kl[floor]
        return EXACT if kl == UNKNOWN else kl

    def first_missing(self, chain: KeyChain, num_prompt: int, max_kl: float | None) -> bytes | None:
        """The key of the first block of a prompt that is neither there nor the last: who else is filling that one is
        worth waiting for. None if there is none."""
        if max_kl is None or not self._shares_prefixes:
            return None
        keys = chain.blocks(BLOCK_TOKENS)[: (num_prompt - 1) // BLOCK_TOKENS]
        num_found = len(self._match(keys, max_kl))
        return keys[num_found] if num_found < len(keys) else None

    def begin(
        self, chain: KeyChain, num_prompt: int, num_tokens: int, max_kl: float | None, now: float = 0.0
    ) -> PageTable:
        """Pages for `num_tokens` tokens, the first of them with the KV that is here already of the prompt's; its last
        token is always computed, for its logits. Raises PoolExhausted."""
        found: list[int] = []
        if max_kl is None or not self._shares_prefixes:
            max_kl = None
        else:
            found = self._match(chain.blocks(BLOCK_TOKENS)[: (num_prompt - 1) // BLOCK_TOKENS], max_kl)
        table = PageTable(blocks=list(found), chain=chain, max_kl=max_kl)
        self._blocks.share(found)
        try:
            self.grow(table, num_tokens)
        except BaseException:
            self._release(found, now)
            raise
        table.num_known = len(found)
        table.cached_tokens = len(found) * BLOCK_TOKENS
        return table

    def lacking(
        self, chain: KeyChain, num_prompt: int, num_tokens: int, max_kl: float | None
    ) -> tuple[int, frozenset[int]]:
        """How many more pages would have to come free for `begin`, below 0 if there are more than enough, and which of
        those that are in use it would share."""
        found: list[int] = []
        if max_kl is not None and self._shares_prefixes:
            found = self._match(chain.blocks(BLOCK_TOKENS)[: (num_prompt - 1) // BLOCK_TOKENS], max_kl)
        num_cached = sum(not self._blocks.num_holders(block) for block in found)
        num_new = blocks_for(num_tokens, BLOCK_TOKENS) - len(found)
        return num_new - (self._blocks.num_available - num_cached), frozenset(found)

    def to_fill(self, table: PageTable, num_prompt: int) -> list[bytes]:
        """The keys of the prompt's blocks whose KV was not there."""
        return table.chain.blocks(BLOCK_TOKENS, first=table.cached_tokens // BLOCK_TOKENS)[
            : num_prompt // BLOCK_TOKENS - table.cached_tokens // BLOCK_TOKENS
        ]

    def grow(self, table: PageTable, num_tokens: int) -> None:
        """Pages for so many tokens. Raises PoolExhausted, and then changes nothing."""
        self.grow_by(table, max(0, blocks_for(num_tokens, BLOCK_TOKENS) - len(table.blocks)))

    def can_grow_by(self, num_blocks: int) -> bool:
        return self._blocks.can_allocate(num_blocks)

    def grow_by(self, table: PageTable, num_blocks: int) -> None:
        """So many pages more. Raises PoolExhausted, and then changes nothing."""
        new = self._blocks.allocate(num_blocks)
        self._quality.released(new)  # what was cached in them
        table.blocks += new

    def release(self, table: PageTable, now: float = 0.0) -> None:
        self._release(table.blocks, now)

    def _release(self, blocks: Sequence[int], now: float = 0.0) -> None:
        self._quality.released(self._blocks.release(blocks, now))

    def expire(self, now: float) -> None:
        """Forget what nobody has used for too long."""
        self._quality.released(self._blocks.expire(now))

    def forget_cached(self) -> None:
        """Forget all that nobody holds."""
        self._quality.released(self._blocks.forget_cached())

    def share(self, table: PageTable, num_tokens: int) -> None:
        """The KV of the first `num_tokens` tokens is in place: let others find it. Where another block holds the same
        in the same quality, the table goes on with that one."""
        if table.max_kl is None:
            return  # it shares nothing
        if table.num_known * BLOCK_TOKENS + BLOCK_TOKENS > num_tokens:
            return
        keys = table.chain.blocks(BLOCK_TOKENS, first=max(table.num_known - 1, 0))
        parent = keys.pop(0) if table.num_known else None
        if parent is not None and self._blocks.block_of(parent) != table.blocks[table.num_known - 1]:
            # What it continues was replaced by something better, which it does not hold: this sequence is of no use to
            # others any more.
            table.max_kl = None
            return
        for index in range(table.num_known, num_tokens // BLOCK_TOKENS):
            key, block = keys[index - table.num_known], table.blocks[index]
            known = self._blocks.block_of(key)
            is_better = known is not None and self._quality.worst([block]) < self._quality.worst([known])
            found = self._register(block, key, parent, replace=is_better)
            assert found is not None, "what it continues is known"
            if found != block:
                self._blocks.share([found])
                self._release([block])
                table.blocks[index] = found
            parent = key
        table.num_known = max(table.num_known, num_tokens // BLOCK_TOKENS)

    def _register(self, block: int, key: bytes, parent: bytes | None, *, replace: bool) -> int | None:
        before = self._blocks.num_cached
        found = self._blocks.register(block, key, parent, replace=replace)
        if self._blocks.num_cached < before:  # what was cached of the worse one is free now
            self._quality.forget_unless(self._blocks.is_used)
        return found

    def _match(self, keys: Sequence[bytes], max_kl: float) -> list[int]:
        return self._blocks.match(keys, lambda block: self._quality.meets([block], max_kl))

    # -- what is in them ------------------------------------------------------------------------------------------

    def loaded(self, table: Sequence[int], start: int, stop: int, level: str, base_kl: float = EXACT) -> None:
        """A chunk at this level was decoded into them. base_kl: the promise of what it was encoded from."""
        self._quality.filled(_blocks(table, start, stop), max(self._kl[level], base_kl))

    def refine(
        self, table: Sequence[int], start: int, k: Tensor, v: Tensor, level: str, base_kl: float = EXACT
    ) -> None:
        """Copy k, v [L, T, H, D] of a better level over those of a loaded chunk, but for the blocks in whose place the
        table took better ones of others meanwhile (see `share`)."""
        kl = max(self._kl[level], base_kl)
        for first, stop in self._quality.worse_runs(_blocks(table, start, start + k.shape[1]), kl):
            at, span = start + first * BLOCK_TOKENS, slice(first * BLOCK_TOKENS, stop * BLOCK_TOKENS)
            self._pool.write(table, at, k[:, span], v[:, span])
            self._quality.refined(_blocks(table, at, start + stop * BLOCK_TOKENS), kl)

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

    # -- the rest -------------------------------------------------------------------------------------------------

    def whole_chunks(self, chunk_tokens: int) -> set[bytes]:
        """The keys of the chunks all blocks of which are there."""
        step = chunk_tokens // BLOCK_TOKENS
        # A known block's front is known too: its last block stands for a chunk.
        return {chunk_key(key, chunk_tokens) for key, depth in self._blocks.known() if (depth + 1) % step == 0}

    @property
    def num_cached(self) -> int:
        """Pages that nobody uses and that later requests may find."""
        return self._blocks.num_cached

    def usage(self) -> float:
        """The share of pages that requests hold."""
        return self._blocks.num_held / self._blocks.num_blocks

    def check_integrity(self, tables: Iterable[Sequence[int]]) -> None:
        """These tables hold all pages that are in use, and no free page has a tag."""
        self._blocks.check_integrity()
        self._quality.check_integrity(self._blocks)
        held = [block for table in tables for block in table]
        assert self._blocks.num_held == len(set(held))
        assert all(held.count(block) == self._blocks.num_holders(block) for block in set(held))


def _blocks(table: Sequence[int], start: int, stop: int) -> Sequence[int]:
    return table[start // BLOCK_TOKENS : blocks_for(stop, BLOCK_TOKENS)]
