"""A decode worker's KV pages: given to requests, shared by equal prefixes, tagged with how good the KV in them is.

Around the block pool, the tensors and the tags (prefill/page_quality.py). The caller holds the worker's lock. What
quantized pages add, rings and a loss of their own, stands in decode/page_rings.py.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence

from torch import Tensor

from decode.page_rings import PageRings, SavedPages
from decode.page_table import PageTable
from decode.startup import promised_kl
from prefill.chunks import KeyChain, chunk_key
from prefill.page_quality import EXACT, UNKNOWN, PageQuality
from prefill.quantized_pool import QuantizedKVPool, Recents
from prefill.runtime import ModelRuntime
from prefill.window_layers import whole_from


class TaggedPages:
    """Tokens [start, stop) are those of the sequence that `table` belongs to. kv_cache_dtype: what the pages hold."""

    def __init__(self, runtime: ModelRuntime, *, chunk_tokens: int, shares_prefixes: bool = True) -> None:
        self._runtime, self._pool, self._blocks = runtime, runtime.pool, runtime.allocator
        self._model = runtime.model
        self.block_tokens = self._pool.block_tokens
        assert chunk_tokens % self.block_tokens == 0, "two chunks in one block would have one tag"
        self.kv_cache_dtype, self._page_kl = runtime.kv_cache_dtype, runtime.page_kl
        self._rings = PageRings(self._pool) if isinstance(self._pool, QuantizedKVPool) else None
        self._shares_prefixes = shares_prefixes
        self._quality = PageQuality()
        self._kl = {level: UNKNOWN if kl is None else kl for level, kl in promised_kl(runtime.profile).items()}

    # -- tables ---------------------------------------------------------------------------------------------------

    @property
    def is_quantized(self) -> bool:
        return self._rings is not None

    @property
    def has_ring(self) -> bool:
        """Whether one more sequence could begin as far as rings go, which only quantized pages need."""
        return self._rings is None or self._rings.has_free

    def chain(self, token_ids: Sequence[int], cache_salt: str) -> KeyChain:
        return KeyChain(token_ids, fingerprint=self._model.fingerprint, cache_salt=cache_salt)

    def max_kl(self, floor: str) -> float:
        """What a request with this floor takes from others. A level that promises nothing is no measure: then exact KV
        only."""
        kl = self._kl[floor]
        return EXACT if kl == UNKNOWN else kl

    def first_missing(self, chain: KeyChain, num_prompt: int, max_kl: float | None) -> bytes | None:
        """The key of the first block of a prompt that is neither there nor the last: who else is filling that one is
        worth waiting for. None if there is none."""
        if not self._takes_from_others(max_kl):
            return None
        assert max_kl is not None
        keys = chain.blocks(self.block_tokens)[: (num_prompt - 1) // self.block_tokens]
        num_found = len(self._match(keys, max_kl))
        return keys[num_found] if num_found < len(keys) else None

    def begin(
        self, chain: KeyChain, num_prompt: int, num_tokens: int, max_kl: float | None, now: float = 0.0
    ) -> PageTable:
        """Pages for `num_tokens` tokens, the first of them with the KV that is here already of the prompt's; its last
        token is always computed, for its logits. Raises PoolExhausted, RingsExhausted."""
        found: list[int] = []
        if max_kl is not None and self._takes_from_others(max_kl):
            found = self._match(chain.blocks(self.block_tokens)[: (num_prompt - 1) // self.block_tokens], max_kl)
        table = PageTable(blocks=list(found), chain=chain, max_kl=max_kl if self._shares_prefixes else None)
        self._blocks.share(found)
        # What is loaded stands in pages as a whole, also where a ring would do for the last of it.
        self._begin(table, max(self._pool.blocks_for(num_tokens), num_prompt // self.block_tokens), now)
        table.num_known = len(found)
        table.cached_tokens = len(found) * self.block_tokens
        return table

    def lacking(
        self, chain: KeyChain, num_prompt: int, num_tokens: int, max_kl: float | None
    ) -> tuple[int, frozenset[int]]:
        """How many more pages would have to come free for `begin`, below 0 if there are more than enough, and which of
        those that are in use it would share."""
        found: list[int] = []
        if max_kl is not None and self._takes_from_others(max_kl):
            found = self._match(chain.blocks(self.block_tokens)[: (num_prompt - 1) // self.block_tokens], max_kl)
        num_cached = sum(not self._blocks.num_holders(block) for block in found)
        num_new = max(self._pool.blocks_for(num_tokens), num_prompt // self.block_tokens) - len(found)
        return num_new - (self._blocks.num_available - num_cached), frozenset(found)

    def _begin(self, table: PageTable, num_blocks: int, now: float) -> None:
        try:
            self.grow_by(table, max(0, num_blocks - len(table.blocks)))
            table.ring = self._pool.begin_sequence()
        except BaseException:
            self._release(table.blocks, now)
            raise

    def _takes_from_others(self, max_kl: float | None) -> bool:
        """Not if what the pages themselves lose is too much already."""
        return max_kl is not None and self._shares_prefixes and self._page_kl <= max_kl

    def to_fill(self, table: PageTable, num_prompt: int) -> list[bytes]:
        """The keys of the prompt's blocks whose KV was not there."""
        first = table.cached_tokens // self.block_tokens
        return table.chain.blocks(self.block_tokens, first=first)[: num_prompt // self.block_tokens - first]

    def grow(self, table: PageTable, num_tokens: int) -> None:
        """Pages for so many tokens. Raises PoolExhausted, and then changes nothing."""
        self.grow_by(table, max(0, self._pool.blocks_for(num_tokens) - len(table.blocks)))

    def can_grow_by(self, num_blocks: int) -> bool:
        return self._blocks.can_allocate(num_blocks)

    def grow_by(self, table: PageTable, num_blocks: int) -> None:
        """So many pages more. Raises PoolExhausted, and then changes nothing."""
        new = self._blocks.allocate(num_blocks)
        self._quality.released(new)  # what was cached in them
        table.blocks += new

    def release(self, table: PageTable, now: float = 0.0) -> None:
        self._release(table.blocks, now)
        self._pool.end_sequence(table.ring)
        table.ring = None
        table.recents.clear()

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
        if self._rings is not None:
            num_tokens = min(num_tokens, self._rings.settled_tokens(table.ring))
        num_blocks = num_tokens // self.block_tokens
        if table.num_known >= num_blocks:
            return
        keys = table.chain.blocks(self.block_tokens, first=max(table.num_known - 1, 0))
        parent = keys.pop(0) if table.num_known else None
        if parent is not None and self._blocks.block_of(parent) != table.blocks[table.num_known - 1]:
            # What it continues was replaced by something better, which it does not hold: this sequence is of no use to
            # others any more.
            table.max_kl = None
            return
        for index in range(table.num_known, num_blocks):
            key, block = keys[index - table.num_known], table.blocks[index]
            known = self._blocks.block_of(key)
            # Who goes on with the other one must not miss a layer, so what lacks less comes before what is better.
            is_better = known is not None and self._rank(block) < self._rank(known)
            found = self._register(block, key, parent, replace=is_better)
            assert found is not None, "what it continues is known"
            if found != block and self._rings is not None:
                # Two that came to the same tokens need not have the same bits: going on with those of another would
                # change this answer.
                table.max_kl = None
                return
            if found != block:
                self._blocks.share([found])
                self._release([block])
                table.blocks[index] = found
            parent = key
        table.num_known = num_blocks

    def _register(self, block: int, key: bytes, parent: bytes | None, *, replace: bool) -> int | None:
        before = self._blocks.num_cached
        found = self._blocks.register(block, key, parent, replace=replace)
        if self._blocks.num_cached < before:  # what was cached of the worse one is free now
            self._quality.forget_unless(self._blocks.is_used)
        return found

    def _rank(self, block: int) -> tuple[int, float]:
        return self._quality.whole_from([block]), self._quality.worst([block])

    def _match(self, keys: Sequence[bytes], max_kl: float) -> list[int]:
        """The longest known prefix that will do: good enough, and with all layers that queries behind it see."""
        found = self._blocks.match(keys, lambda block: self._quality.meets([block], max_kl))
        if self._quality.whole_from(found):
            needs = list(itertools.accumulate((self._quality.whole_from([block]) for block in found), max))
            while found and needs[len(found) - 1] > len(found) * self.block_tokens:
                found.pop()
        return found

    # -- quantized pages ------------------------------------------------------------------------------------------

    def continue_at(self, table: PageTable, start: int) -> None:
        """Tokens from `start` on are computed next: the sequence's ring has to be there."""
        if self._rings is not None:
            self._rings.continue_at(table, start)

    def save(self, table: PageTable, num_tokens: int) -> SavedPages | None:
        """Copies of all that a sequence of so many tokens has here, with which it goes on bit for bit. None where other
        ways are as good, or where there is no memory for it."""
        if self._rings is None:
            return None
        saved = self._rings.save(table, num_tokens)
        if saved is not None:
            saved.kl = [self._quality.worst([block]) for block in table.blocks[: saved.num_blocks]]
        return saved

    def begin_again(
        self, saved: SavedPages, chain: KeyChain, num_tokens: int, max_kl: float | None, now: float = 0.0
    ) -> PageTable:
        """Pages for what was saved, which `restore` puts there. Raises PoolExhausted, RingsExhausted."""
        table = PageTable(blocks=[], chain=chain, max_kl=max_kl if self._shares_prefixes else None)
        self._begin(table, max(self._pool.blocks_for(num_tokens), saved.num_blocks), now)
        return table

    def restore(self, table: PageTable, saved: SavedPages) -> None:
        """That is used up then."""
        assert self._rings is not None
        table.cached_tokens, table.recent_kl = saved.num_tokens, saved.recent_kl
        self._rings.restore(table, saved)
        for block, kl in zip(table.blocks, saved.kl):
            self._quality.filled([block], kl)
        if rest := self._of(table, 0, saved.num_tokens)[saved.num_blocks :]:  # whose tokens are in the ring
            self._quality.computed(rest, table.blocks[: saved.num_blocks], at_least=table.recent_kl)

    def forget(self, saved: SavedPages) -> None:
        """It will not be used."""
        assert self._rings is not None
        self._rings.forget(saved)

    # -- what is in them ------------------------------------------------------------------------------------------

    def loaded(
        self,
        table: PageTable,
        start: int,
        stop: int,
        level: str,
        base_kl: float = EXACT,
        *,
        layers: Sequence[int] | None = None,
        recents: Recents | None = None,
    ) -> None:
        """A chunk at this level was decoded into them. base_kl: the promise of what it was encoded from. layers: that
        came (None: all); if some are missing, these pages are of use only to who goes on behind their windows.
        recents: its last tokens, see PageTable."""
        kl = max(self._kl[level], base_kl) if layers is None or layers else EXACT
        behind = 0 if layers is None else whole_from(self._model.layout.windows, stop, layers)
        self._quality.filled(self._of(table, start, stop), kl, whole_from=behind)
        if recents is not None:
            table.recents[stop] = recents

    def discarded(self, table: PageTable, start: int, stop: int) -> None:
        """What was loaded is not used; something else will be put in its place."""
        self._quality.released(self._of(table, start, stop))

    def refine(self, table: PageTable, start: int, k: Tensor, v: Tensor, level: str, base_kl: float = EXACT) -> None:
        """Copy k, v [L, T, H, D] of a better level over those of a loaded chunk, but for the blocks in whose place the
        table took better ones of others meanwhile (see `share`)."""
        kl = max(self._kl[level], base_kl)
        if self._rings is not None:  # none of another's
            self._rings.replace(table, start, k, v)
            self._quality.refined(self._of(table, start, start + k.shape[1]), kl)
            return
        for first, stop in self._quality.worse_runs(self._of(table, start, start + k.shape[1]), kl):
            at, span = start + first * self.block_tokens, slice(first * self.block_tokens, stop * self.block_tokens)
            self._runtime.exact_pool.write(table.blocks, at, k[:, span], v[:, span])
            self._quality.refined(self._of(table, at, start + stop * self.block_tokens), kl)

    def computed(self, table: PageTable, start: int, stop: int) -> None:
        """They were computed on all that lies before them."""
        blocks, below = self._of(table, start, stop), self._of(table, 0, stop)
        # KV only gets better once it is in place: what comes later into the same block rests on nothing worse than its
        # first token did. So a tag is looked up once a block, and not at every token.
        is_new_block = stop - start > 1 or start % self.block_tokens == 0
        if self._rings is None:
            if is_new_block:
                self._quality.computed(blocks, below)
        elif is_new_block or (below and not self._quality.has_tag(below[-1])):
            # A block gets tokens when they have left the ring, so some of `below` may be new.
            new = [block for block in below if not self._quality.has_tag(block)]
            self._quality.computed([*new, *blocks], below, at_least=table.recent_kl)
            table.recent_kl = max(table.recent_kl, self._quality.worst(below))

    def read(self, table: PageTable, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Copies, [L, T, H, Dk] and [L, T, H, Dv] in the model's dtype."""
        if self._rings is not None:
            return self._rings.read(table, start, stop)
        return self._runtime.exact_pool.read(table.blocks, start, stop)

    def worst_kl(self, table: PageTable, start: int, stop: int) -> float | None:
        """The worst promise of these tokens' KV, nats a token; None if some of it promises nothing. In quantized pages
        none is better than what these lose."""
        blocks = self._of(table, start, stop)
        worst = max(self._quality.worst(blocks), self._page_kl if blocks else EXACT)
        if start < stop and stop > len(table.blocks) * self.block_tokens:
            worst = max(worst, table.recent_kl)  # in the ring
        return None if worst == UNKNOWN else worst

    def is_whole(self, table: PageTable, start: int, stop: int) -> bool:
        """Whether all layers of these tokens' KV are there."""
        return self._quality.whole_from(self._of(table, start, stop)) == 0

    def _of(self, table: PageTable, start: int, stop: int) -> list[int]:
        """Their blocks; tokens that only a ring has are in none."""
        return table.blocks[start // self.block_tokens : -(-stop // self.block_tokens)]

    # -- the rest -------------------------------------------------------------------------------------------------

    def whole_chunks(self, chunk_tokens: int) -> set[bytes]:
        """The keys of the chunks all blocks of which are there."""
        step = chunk_tokens // self.block_tokens
        # A known block's front is known too: its last block stands for a chunk.
        return {chunk_key(key, chunk_tokens) for key, depth in self._blocks.known() if (depth + 1) % step == 0}

    @property
    def num_cached(self) -> int:
        """Pages that nobody uses and that later requests may find."""
        return self._blocks.num_cached

    def usage(self) -> float:
        """The share of pages that requests hold, or of rings where these are scarcer."""
        blocks = self._blocks.num_held / self._blocks.num_blocks
        return blocks if self._rings is None else max(blocks, self._rings.usage())

    def check_integrity(self, tables: Iterable[PageTable]) -> None:
        """These tables hold all pages and rings that are in use, and no free page has a tag."""
        tables = list(tables)
        self._blocks.check_integrity()
        self._quality.check_integrity(self._blocks)
        if self._rings is not None:
            self._rings.check_integrity(tables)
        held = [block for table in tables for block in table.blocks]
        assert self._blocks.num_held == len(set(held))
        assert all(held.count(block) == self._blocks.num_holders(block) for block in set(held))
