"""What quantized pages need beside blocks: the rings of a decode worker's sequences, and copies of those that gave way.

A sequence has one ring. It is where tokens are computed: chunks that are loaded go into the pages, and of each its last
tokens are kept as they came, so that the ring can go on behind any of them as if it had seen them computed.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from torch import Tensor

from decode.page_table import PageTable
from prefill.quantized_pool import QuantizedKVPool, Snapshot
from prefill.runtime import SAVED_SHARE, recents_of


@dataclass(slots=True, kw_only=True, eq=False)
class SavedPages:
    """A preempted sequence of `num_tokens` tokens. kl: tags of its `num_blocks` blocks. recent_kl: see PageTable."""

    snapshot: Snapshot
    num_tokens: int
    num_blocks: int
    recent_kl: float
    kl: list[float] = field(default_factory=list)


class PageRings:
    """The caller holds the worker's lock, and no forward pass computes the tables that it names."""

    def __init__(self, pool: QuantizedKVPool) -> None:
        self._pool = pool
        self._max_saved_bytes = int(SAVED_SHARE * pool.num_bytes)
        self._saved_bytes = 0

    def settled_tokens(self, ring: int | None) -> int:
        """Of a sequence, those whose KV will not change in the pages any more: others may have it."""
        assert ring is not None
        return self._pool.rings.settled(ring)

    def continue_at(self, table: PageTable, start: int) -> None:
        """The ring computes the tokens from `start` on next."""
        assert table.ring is not None
        recents = table.recents.get(start)
        if self._pool.rings.length(table.ring) != start:
            assert start == 0 or recents is not None or start == table.cached_tokens, (start, table.cached_tokens)
            self._pool.continue_at(table.blocks, table.ring, start, recents)
        for stop in [stop for stop in table.recents if stop <= start]:  # all before `start` is in place
            del table.recents[stop]

    def replace(self, table: PageTable, start: int, k: Tensor, v: Tensor) -> None:
        """A loaded chunk's KV from `start` on, [L, T, H, D], by something better."""
        assert table.ring is not None
        stop = start + k.shape[1]
        # Before the ring has come there, only what it will begin with has to be changed too.
        is_behind = self._pool.rings.length(table.ring) >= stop
        self._pool.write(table.blocks, table.ring if is_behind else None, start, k, v)
        if stop in table.recents:
            table.recents[stop] = recents_of(k, v)

    def read(self, table: PageTable, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Copies of tokens in place, [L, T, H, Dk] and [L, T, H, Dv] in the model's dtype."""
        assert table.ring is not None
        has_come = self._pool.rings.length(table.ring) >= stop  # else they were loaded, behind what it has seen
        return self._pool.read(table.blocks, table.ring if has_come else None, start, stop)

    # -- those that gave way --------------------------------------------------------------------------------------

    def save(self, table: PageTable, num_tokens: int) -> SavedPages | None:
        """None while it was being filled, whose ring is elsewhere, or if the copies of others take all the memory."""
        rings = self._pool.rings
        if table.ring is None or rings.length(table.ring) != num_tokens:
            return None
        num_blocks = rings.settled(table.ring) // self._pool.block_tokens
        num_bytes = num_blocks * self._pool.block_tokens * self._pool.bytes_per_token + self._pool.ring_bytes
        if self._saved_bytes + num_bytes > self._max_saved_bytes:
            return None
        snapshot = self._pool.snapshot(table.blocks, table.ring)
        self._saved_bytes += snapshot.num_bytes
        return SavedPages(snapshot=snapshot, num_tokens=num_tokens, num_blocks=num_blocks, recent_kl=table.recent_kl)

    def restore(self, table: PageTable, saved: SavedPages) -> None:
        assert table.ring is not None
        self._pool.restore(table.blocks, table.ring, saved.snapshot)
        self.forget(saved)

    def forget(self, saved: SavedPages) -> None:
        self._saved_bytes -= saved.snapshot.num_bytes

    # -- the rest -------------------------------------------------------------------------------------------------

    @property
    def has_free(self) -> bool:
        return self._pool.rings.num_free > 0

    def usage(self) -> float:
        rings = self._pool.rings
        return 1 - rings.num_free / rings.num_rings

    def check_integrity(self, tables: Iterable[PageTable]) -> None:
        """These tables have all rings that are in use, one each."""
        self._pool.rings.check_integrity()
        rings = [table.ring for table in tables]
        assert len(set(rings)) == len(rings), "two sequences have one ring"
        assert set(rings) == self._pool.rings.in_use(), "a ring is in use that no sequence has"
        assert 0 <= self._saved_bytes <= self._max_saved_bytes, self._saved_bytes
