"""How good the KV in each block is: the worst quality that went into it. Pure bookkeeping: no tensors, no I/O.

Quality is a number `kl`: the promised loss in nats a token. 0 is exact, inf is unknown. A block's KV has two sources of
loss, kept apart because they end differently:

    own        what it was loaded at; a refinement replaces it by a better one
    inherited  the worst KV that tokens in it were computed on; it stays when that KV is refined, for it was used

The block's tag is the worse of the two. Blocks that hold nothing have none: to ask for it is a bug of ours.

Apart from that a block may lack layers (sliding windows) that no query sees from some position of the sequence on. It
is no loss to who computes nothing before that position, and of no use to anybody else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from prefill.block_pool import BlockPool

EXACT = 0.0
UNKNOWN = float("inf")


class PageQuality:
    """Tags of the blocks of one pool, from `filled` or `computed` to `released`."""

    def __init__(self) -> None:
        self._own: dict[int, float] = {}
        self._inherited: dict[int, float] = {}
        self._whole_from: dict[int, int] = {}  # by block, where that is not 0

    def filled(self, blocks: Iterable[int], kl: float, *, whole_from: int = 0) -> None:
        """All of these blocks was loaded at this quality, whatever was in them before. whole_from: the first query that
        sees nothing that is missing; 0: nothing is."""
        assert kl >= 0 and whole_from >= 0, (kl, whole_from)
        for block in blocks:
            self._own[block], self._inherited[block] = kl, EXACT
            self._whole_from.pop(block, None)
            if whole_from:
                self._whole_from[block] = whole_from

    def computed(self, blocks: Iterable[int], below: Iterable[int], at_least: float = EXACT) -> None:
        """Tokens in these blocks were computed; `below` has all KV that they attended to, none better than `at_least`.
        A block that already held something keeps the loss of that: it is filled token by token."""
        blocks = list(blocks)
        new = set(blocks) - self._own.keys()  # may stand in `below` too: their own tokens, which have no tag yet
        worst = max(at_least, self.worst(block for block in below if block not in new))
        for block in blocks:
            self._own.setdefault(block, EXACT)
            self._inherited[block] = max(self._inherited.get(block, EXACT), worst)

    def refined(self, blocks: Iterable[int], kl: float) -> None:
        """What was loaded into these blocks is now of this quality. What was computed on them before is not."""
        assert kl >= 0, kl
        for block in blocks:
            assert block in self._own, f"block {block} was refined and holds nothing"
            self._own[block] = kl

    def worse_runs(self, blocks: Sequence[int], kl: float) -> list[tuple[int, int]]:
        """[start, stop) of these blocks, in runs, whose own quality is not better than `kl`."""
        runs: list[tuple[int, int]] = []
        for index, block in enumerate(blocks):
            if self._own[block] < kl:
                continue
            if runs and runs[-1][1] == index:
                runs[-1] = runs[-1][0], index + 1
            else:
                runs.append((index, index + 1))
        return runs

    def released(self, blocks: Iterable[int]) -> None:
        """The blocks hold nothing any more. Those that never did may be among them."""
        for block in blocks:
            self._own.pop(block, None)
            self._inherited.pop(block, None)
            self._whole_from.pop(block, None)

    def forget_unless(self, is_used: Callable[[int], bool]) -> None:
        """`released`, for all blocks that are not in use."""
        self.released([block for block in self._own if not is_used(block)])

    def has_tag(self, block: int) -> bool:
        return block in self._own

    def worst(self, blocks: Iterable[int]) -> float:
        """The worst tag of these blocks; exact if there are none."""
        return max((self._tag(block) for block in blocks), default=EXACT)

    def meets(self, blocks: Iterable[int], kl: float) -> bool:
        """Whether every one of these blocks is at least as good as `kl`: a prefix hit counts only then."""
        assert kl >= 0, kl
        return self.worst(blocks) <= kl

    def whole_from(self, blocks: Iterable[int]) -> int:
        """The first query that sees nothing that is missing in these blocks; 0: nothing is."""
        if not self._whole_from:
            return 0
        return max((self._whole_from.get(block, 0) for block in blocks), default=0)

    def __len__(self) -> int:
        """How many blocks have a tag."""
        return len(self._own)

    def _tag(self, block: int) -> float:
        assert block in self._own, f"block {block} holds nothing"
        return max(self._own[block], self._inherited[block])

    def check_integrity(self, pool: BlockPool) -> None:
        """Every tag is a quality, and of a block that is in use."""
        assert self._own.keys() == self._inherited.keys() >= self._whole_from.keys()
        for block in self._own:
            assert self._own[block] >= 0 and self._inherited[block] >= 0, f"block {block} has no quality"
            assert pool.is_used(block), f"block {block} was freed and still has a tag"
