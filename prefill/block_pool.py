"""Which pages of the KV pool hold what, and for whom. Pure bookkeeping: no tensors, no clock, no I/O.

A block is *free*, *held* (by one table or several) or *cached*: held by nobody, but its content is known under a key,
so that a later request with the same prefix takes it as it is. A key is a link of a hash chain over model, salt and
tokens (prefill/chunks.py): equal keys mean equal KV, up to the quality it was filled with, which the caller keeps.

Cached blocks are given away least recently used first, and never before the blocks that continue them: a chain whose
front is gone is of no use to anybody.
"""

from __future__ import annotations

from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import takewhile


class PoolExhausted(Exception):
    """More pages were asked for than can be given. The caller waits, preempts or refuses."""

    def __init__(self, *, wanted_blocks: int, free_blocks: int, num_blocks: int) -> None:
        super().__init__(
            f"{wanted_blocks} KV blocks wanted, {free_blocks} of {num_blocks} free: "
            "wait for a request to end, or give the worker a larger pool"
        )
        self.wanted_blocks = wanted_blocks
        self.free_blocks = free_blocks
        self.num_blocks = num_blocks


@dataclass(slots=True, kw_only=True, eq=False)
class _Entry:
    """A block whose content is known. depth: its place in the chain, the first block's is 0."""

    block: int
    parent: bytes | None
    depth: int
    children: set[bytes] = field(default_factory=set)


class BlockPool:
    """`num_blocks` blocks, numbered from 0. `ttl_s`: cached blocks are forgotten so long after their last use."""

    def __init__(self, num_blocks: int, *, ttl_s: float | None = None) -> None:
        assert num_blocks > 0, num_blocks
        self.num_blocks = num_blocks
        self.num_evictions = 0
        self.ttl_s = ttl_s
        # The block freed longest ago is given out first.
        self._free = deque(range(num_blocks))
        self._holders = [0] * num_blocks
        self._entries: dict[bytes, _Entry] = {}
        self._keys: dict[int, bytes] = {}  # by block
        self._cached: OrderedDict[int, float] = OrderedDict()  # when last used; least recently used first
        self._pins: Counter[bytes] = Counter()
        self._num_kept = 0  # of the cached, those that are pinned

    # -- how many -------------------------------------------------------------------------------------------------

    @property
    def num_held(self) -> int:
        return self.num_blocks - len(self._free) - len(self._cached)

    @property
    def num_cached(self) -> int:
        return len(self._cached)

    @property
    def num_available(self) -> int:
        """How many blocks can be had at once, some of them at the price of what is cached in them."""
        return len(self._free) + len(self._cached) - self._num_kept

    def can_allocate(self, num_blocks: int) -> bool:
        return num_blocks <= self.num_available

    # -- tables ---------------------------------------------------------------------------------------------------

    def allocate(self, num_blocks: int) -> list[int]:
        """All of `num_blocks` blocks or, with `PoolExhausted`, none. Whatever was cached in them is forgotten."""
        assert num_blocks >= 0, num_blocks
        if num_blocks > self.num_available:
            raise PoolExhausted(wanted_blocks=num_blocks, free_blocks=self.num_available, num_blocks=self.num_blocks)
        while len(self._free) < num_blocks:
            self._evict_one()
        # In order: neighbours in a table are then often neighbours in memory, which `KVPool` turns into plain copies.
        blocks = sorted(self._free.popleft() for _ in range(num_blocks))
        for block in blocks:
            self._holders[block] = 1
        return blocks

    def share(self, blocks: Iterable[int]) -> None:
        """One more table holds these blocks, which are held or cached."""
        for block in blocks:
            if not self._holders[block]:
                assert block in self._cached, f"block {block} is free"
                self._leave_cache(block)
            self._holders[block] += 1

    def release(self, blocks: Sequence[int], now: float = 0.0) -> list[int]:
        """A table gives its blocks back, in its order. Returns those that hold nothing any more; the others are held
        by other tables still, or cached."""
        freed = []
        for block in reversed(blocks):  # the end of a chain is forgotten before what it continues
            assert 0 <= block < self.num_blocks, f"block {block} is not of this pool of {self.num_blocks}"
            assert self._holders[block] > 0, f"block {block} was released too often"
            self._holders[block] -= 1
            if self._holders[block]:
                continue
            if block in self._keys:
                self._cached[block] = now
                self._num_kept += self._is_pinned(block)
            else:
                freed.append(block)
        freed.reverse()  # so that a table's blocks are given out in its order again
        self._free.extend(freed)
        return freed

    def is_used(self, block: int) -> bool:
        """Whether something may stand in it: it is held or cached."""
        return 0 <= block < self.num_blocks and (self._holders[block] > 0 or block in self._cached)

    def num_holders(self, block: int) -> int:
        return self._holders[block]

    # -- what is known by its content -----------------------------------------------------------------------------

    def match(self, keys: Sequence[bytes], accept: Callable[[int], bool] = lambda _: True) -> list[int]:
        """The blocks of the longest known prefix of this chain all of which `accept` takes. Changes nothing: who wants
        them calls `share` next."""
        found = []
        for key in keys:
            entry = self._entries.get(key)
            if entry is None or not accept(entry.block):
                break
            found.append(entry.block)
        return found

    def register(self, block: int, key: bytes, parent: bytes | None, *, replace: bool = False) -> int | None:
        """A held block is full, and holds what `key` names. Returns the block that is known under this key from now
        on. That may be another one, which was there before: a table goes on with registering only if it takes that
        block in place of its own, so that whoever holds a known block holds all that it continues. With `replace` the
        other one (of worse quality) is forgotten, with all that continues it. None if `parent` is not known."""
        assert self._holders[block] > 0, f"block {block} is held by nobody"
        entry = self._entries.get(key)
        if entry is not None and (entry.block == block or not replace):
            return entry.block
        if parent is not None and parent not in self._entries:
            return None
        if entry is not None:
            self._forget_chain(key)
        assert block not in self._keys, f"block {block} is known under another key"
        depth = 0
        if parent is not None:
            above = self._entries[parent]
            above.children.add(key)
            depth = above.depth + 1
        self._entries[key] = _Entry(block=block, parent=parent, depth=depth)
        self._keys[block] = key
        return block

    def block_of(self, key: bytes) -> int | None:
        entry = self._entries.get(key)
        return None if entry is None else entry.block

    def known(self) -> Iterator[tuple[bytes, int]]:
        """Every known key, and its place in its chain."""
        return ((key, entry.depth) for key, entry in self._entries.items())

    def pin(self, chain: Sequence[bytes]) -> None:
        """Keep the blocks of this prefix, from its first one on, once they are known, until `unpin`; counted."""
        for key in chain:
            self._pins[key] += 1
            entry = self._entries.get(key)
            self._num_kept += self._pins[key] == 1 and entry is not None and entry.block in self._cached

    def unpin(self, chain: Sequence[bytes]) -> None:
        for key in chain:
            assert self._pins[key] > 0, "unpinned more often than pinned"
            self._pins[key] -= 1
            if not self._pins[key]:
                del self._pins[key]
                entry = self._entries.get(key)
                self._num_kept -= entry is not None and entry.block in self._cached

    def expire(self, now: float) -> list[int]:
        """Forget what has been cached for too long; the blocks that it was in."""
        freed: list[int] = []
        ttl_s = self.ttl_s
        if ttl_s is not None:
            for block, _ in list(takewhile(lambda used: now - used[1] >= ttl_s, self._cached.items())):
                if self._is_leaf(block):  # by now, unless it is pinned: its children stood before it
                    self._forget(block)
                    freed.append(block)
        return freed

    def forget_cached(self) -> list[int]:
        """Forget all that nobody holds and nobody pinned; the blocks that it was in."""
        return [self._evict_one() for _ in range(len(self._cached) - self._num_kept)]

    # -- the rest -------------------------------------------------------------------------------------------------

    def check_integrity(self) -> None:
        """Every block is free, held or cached, once; every known chain is whole from its front."""
        free, cached = set(self._free), set(self._cached)
        held = {block for block, count in enumerate(self._holders) if count}
        assert len(free) == len(self._free), "a block is in the free list twice"
        assert not free & held and not free & cached and not held & cached, "a block is in two states"
        assert len(free) + len(held) + len(cached) == self.num_blocks, "a block is lost"
        assert min(self._holders) >= 0
        assert {entry.block: key for key, entry in self._entries.items()} == self._keys
        assert cached <= self._keys.keys() and not free & self._keys.keys(), "what a free block holds is known"
        for key, entry in self._entries.items():
            for child in entry.children:
                assert self._entries[child].parent == key
                assert not self._pins[child] or self._pins[key], "pinned without what it continues"
                assert self._holders[entry.block] or not self._holders[self._entries[child].block], "held without it"
            if entry.parent is None:
                assert entry.depth == 0
            else:
                above = self._entries[entry.parent]
                assert key in above.children and above.depth == entry.depth - 1
        assert self._num_kept == sum(map(self._is_pinned, self._cached))

    def _is_pinned(self, block: int) -> bool:
        return self._keys[block] in self._pins

    def _is_leaf(self, block: int) -> bool:
        return not self._is_pinned(block) and not self._entries[self._keys[block]].children

    def _leave_cache(self, block: int) -> None:
        self._num_kept -= self._is_pinned(block)
        del self._cached[block]

    def _evict_one(self) -> int:
        # What continues a block was given back before it, so all before the first leaf is pinned.
        block = next(block for block in self._cached if self._is_leaf(block))
        self._forget(block)
        self.num_evictions += 1
        return block

    def _forget(self, block: int) -> None:
        """A known block without children is known no more; a cached one becomes free."""
        if block in self._cached:
            self._leave_cache(block)
            self._free.append(block)
        key = self._keys.pop(block)
        entry = self._entries.pop(key)
        assert not entry.children
        if entry.parent is not None:
            self._entries[entry.parent].children.remove(key)

    def _forget_chain(self, key: bytes) -> None:
        """This and all that continues it."""
        chain = [key]
        for at in chain:
            chain += sorted(self._entries[at].children)
        for at in reversed(chain):
            self._forget(self._entries[at].block)


def blocks_for(num_tokens: int, block_tokens: int) -> int:
    """How many blocks `num_tokens` tokens need."""
    return -(-num_tokens // block_tokens)
