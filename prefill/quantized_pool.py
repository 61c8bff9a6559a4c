"""The paged KV pool with int8, int4 or fp8 pages: copies in and out through block tables. Knows torch; no model.

Beside its block table, a sequence has a *ring* of recent tokens (`rings.allocate()`, `rings.release(ring)`), without
which it cannot be continued. Token `t` is in block `table[t // 32]` once it is old enough (quantized_layout.py); a
table needs `blocks_for(num_tokens)` blocks, which is one or two fewer than the tokens would fill.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from prefill.attention import Batch, Span
from prefill.compute_device import completes
from prefill.kv_layout import KVLayout
from prefill.quantized_attention import QuantizedBatch
from prefill.quantized_layout import BLOCK_TOKENS, RING_TOKENS, PageMix, block_bytes, blocks_for, ring_bytes
from prefill.quantized_pages import QuantizedStore
from prefill.quantized_rings import RecentRings, RingState

if TYPE_CHECKING:
    from prefill.cuda_attention import CudaQuantizedPages

Recents = tuple[Tensor, Tensor]  # keys and values of a sequence's last tokens, [L, T, H, D]


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """All that a sequence has in a pool: the tensors of its settled blocks, its ring, and how far both go."""

    state: RingState
    pages: list[Tensor]
    recents: Recents

    @property
    def num_bytes(self) -> int:
        return sum(int(x.nbytes) for x in (*self.pages, *self.recents))


class QuantizedKVPool:
    def __init__(
        self,
        layout: KVLayout,
        num_blocks: int,
        kind: str,
        max_sequences: int,
        device: str | torch.device = "cpu",
        *,
        mix: PageMix | None = None,
        gpu_kernels: bool | None = None,
    ) -> None:
        """`mix`: which layers differ from `kind` (`read_page_mix` has it for a model). `gpu_kernels`: as for `KVPool`;
        pages that they are not built for go by torch. Raises `QuantizedPagesUnsupported`."""
        self.store = QuantizedStore(layout, num_blocks, kind, max_sequences, device, mix)
        self._mix = mix
        self.layout = layout
        self.kind = self.store.kind
        self.num_blocks = num_blocks
        self.block_tokens = BLOCK_TOKENS
        self.device = self.store.device
        self.decode_pages: CudaQuantizedPages | None = None
        if gpu_kernels or (gpu_kernels is None and self.device.type == "cuda"):
            from prefill.cuda_attention import CudaQuantizedPages, can_attend  # brings Triton along

            self.decode_pages = CudaQuantizedPages(self.store) if can_attend(self.store) else None

    @property
    def rings(self) -> RecentRings:
        return self.store.rings

    @property
    def uses_torch_products(self) -> bool:
        """Whether attention's sums are torch's, whose order may depend on the number of rows."""
        return True

    @property
    def num_bytes(self) -> int:
        """Pages and rings."""
        pages = sum(int(x.nbytes) for x in self.store.tensors())
        return pages + self.store.recent_k.num_bytes + self.store.recent_v.num_bytes

    @property
    def bytes_per_token(self) -> float:
        """Of a token in pages, scales and zeros included; a ring comes on top (`ring_bytes`)."""
        return block_bytes(self.layout, self.kind, self._mix) / BLOCK_TOKENS

    @property
    def ring_bytes(self) -> int:
        return ring_bytes(self.layout)

    def blocks_for(self, num_tokens: int) -> int:
        """How many blocks the table of a sequence of so many tokens needs."""
        return blocks_for(num_tokens)

    def begin_sequence(self) -> int:
        """A ring for a new sequence. Raises `RingsExhausted`."""
        return self.rings.allocate()

    def end_sequence(self, ring: int | None) -> None:
        assert ring is not None
        self.rings.release(ring)

    def make_batch(self, spans: Sequence[Span], row_multiple: int = 1) -> Batch:
        """What one forward pass attends with; the pass has to follow, for the spans' tokens are booked here."""
        if self.decode_pages is not None:
            return self.decode_pages.batch(spans, row_multiple)
        return QuantizedBatch(self.store, spans, row_multiple)

    @completes
    def write(self, block_table: Sequence[int], ring: int | None, start: int, k: Tensor, v: Tensor) -> None:
        """Copy received `k` [L, T, H, Dk], `v` [L, T, H, Dv] to tokens `start .. start + T`.

        Without a ring: whole blocks, into the pages. With one: tokens behind those that the ring has seen, or a fresh
        ring's first (from a multiple of 32 on), exactly as if they had been computed; or, to replace what is there by
        something better, whole blocks (the last may be a part) of what it has seen."""
        stop = start + k.shape[1]
        if ring is None:
            assert start % BLOCK_TOKENS == stop % BLOCK_TOKENS == 0, (start, stop)
            self._write_pages(block_table, start, stop, k, v)
        elif self.rings.is_fresh(ring) or start == self.rings.length(ring):
            settled, settles = self.rings.extend(ring, start, stop)
            if settled < settles:
                from_ring = min(settled, start)
                old_k, old_v = self._read_ring(ring, from_ring, start)
                due = slice(settled - from_ring, settles - from_ring)
                due_k, due_v = torch.cat((old_k, k.to(old_k)), 1)[:, due], torch.cat((old_v, v.to(old_v)), 1)[:, due]
                self._write_pages(block_table, settled, settles, due_k, due_v)
            self._write_ring(ring, start, stop, k, v)
        else:
            self._replace(block_table, ring, start, stop, k, v)

    @completes
    def read(self, block_table: Sequence[int], ring: int | None, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Copies of tokens `start .. stop`, [L, T, H, Dk] and [L, T, H, Dv] in the model's dtype: dequantized where
        they are in pages, from the ring (if there is one) where they are not yet."""
        in_pages = stop if ring is None else max(start, min(stop, self.rings.settled(ring)))
        first, last = start // BLOCK_TOKENS * BLOCK_TOKENS, -(-in_pages // BLOCK_TOKENS) * BLOCK_TOKENS
        parts = []
        if start < in_pages:
            blocks, cut = self.store.blocks(block_table, first, last), slice(start - first, in_pages - first)
            dtype, sides = self.layout.torch_dtype, (self.store.k, self.store.v)
            parts.append(tuple(torch.stack([pages.read(blocks, dtype)[cut] for pages in side]) for side in sides))
        if ring is not None and in_pages < stop:
            assert stop <= self.rings.length(ring), (stop, self.rings.length(ring))
            parts.append(self._read_ring(ring, in_pages, stop))
        k, v = zip(*parts, strict=True)
        return torch.cat(k, 1), torch.cat(v, 1)

    @completes
    def settle(self, block_table: Sequence[int], ring: int) -> None:
        """Quantize all whole blocks now (the table has to have room for them): then they can be shared."""
        settled, settles = self.rings.settle(ring)
        if settled < settles:
            self._write_pages(block_table, settled, settles, *self._read_ring(ring, settled, settles))

    @completes
    def resume(self, block_table: Sequence[int], ring: int, length: int, recents: Recents | None = None) -> None:
        """A fresh ring continues a sequence of `length` tokens that is in pages. recents: its last tokens as they were
        computed or received, at least those from `boundary(length)` on: then it goes on as if its own ring had been
        kept. Without them they are dequantized, so what follows differs by as much as quantizing loses."""
        first = self.rings.resume(ring, length)
        k, v = self.read(block_table, None, first, length) if recents is None else recents
        assert k.shape[1] >= length - first, (k.shape, length)
        self._write_ring(ring, first, length, k, v)

    def continue_at(self, block_table: Sequence[int], ring: int, start: int, recents: Recents | None = None) -> None:
        """Tokens from `start` on are computed next in this ring. If it is elsewhere, because what is between came into
        the pages in another way, it gives its own tokens to the pages and resumes; `recents` as there."""
        if self.rings.length(ring) == start:
            return
        assert self.rings.length(ring) % BLOCK_TOKENS == 0, f"a ring leaves in the middle of a block for {start}"
        self.settle(block_table, ring)
        self.rings.reset(ring)
        if start:
            self.resume(block_table, ring, start, recents)

    @completes
    def fork(self, ring: int, into: int) -> None:
        """`into`, fresh, continues the same sequence by itself. Settled blocks are shared; from there on each of the
        two needs blocks of its own."""
        self._restore_ring(into, self._copy_ring(ring), self.rings.state(ring))

    @completes
    def snapshot(self, block_table: Sequence[int], ring: int) -> Snapshot:
        """Copies of all that a sequence has here, for one that gives up its pages and ring and comes back later."""
        state = self.rings.state(ring)
        blocks = self.store.blocks(block_table, 0, state.settled)
        pages = [x.index_select(0, blocks) for x in self.store.tensors()]
        return Snapshot(state=state, pages=pages, recents=self._copy_ring(ring))

    @completes
    def restore(self, block_table: Sequence[int], ring: int, snapshot: Snapshot) -> None:
        """Into other blocks and a fresh ring, bit for bit."""
        blocks = self.store.blocks(block_table, 0, snapshot.state.settled)
        for pages, saved in zip(self.store.tensors(), snapshot.pages, strict=True):
            pages.index_copy_(0, blocks, saved)
        self._restore_ring(ring, snapshot.recents, snapshot.state)

    def _replace(self, block_table: Sequence[int], ring: int, start: int, stop: int, k: Tensor, v: Tensor) -> None:
        length, settled = self.rings.length(ring), self.rings.settled(ring)
        assert start % BLOCK_TOKENS == 0 and stop <= length, (start, stop, length)
        in_pages = max(start, min(stop, settled))
        if start < in_pages:
            self._write_pages(block_table, start, in_pages, k[:, : in_pages - start], v[:, : in_pages - start])
        recent = max(start, length - RING_TOKENS)
        if recent < stop:
            self._write_ring(ring, recent, stop, k[:, recent - start :], v[:, recent - start :])

    def _write_pages(self, block_table: Sequence[int], start: int, stop: int, k: Tensor, v: Tensor) -> None:
        blocks = self.store.blocks(block_table, start, stop)
        for side, x in ((self.store.k, k), (self.store.v, v)):
            for pages, layer in zip(side, x.to(self.device), strict=True):
                pages.write(blocks, layer)

    def _write_ring(self, ring: int, start: int, stop: int, k: Tensor, v: Tensor) -> None:
        """The last 64 of tokens `start .. stop`."""
        kept = min(stop - start, RING_TOKENS)
        rows = self.store.rows(ring, stop - kept, stop)
        for recent, x in ((self.store.recent_k, k), (self.store.recent_v, v)):
            recent.data.index_copy_(1, rows, x[:, x.shape[1] - kept :].to(recent.data))

    def _read_ring(self, ring: int, start: int, stop: int) -> tuple[Tensor, Tensor]:
        rows = self.store.rows(ring, start, stop)
        return self.store.recent_k.data.index_select(1, rows), self.store.recent_v.data.index_select(1, rows)

    def _copy_ring(self, ring: int) -> tuple[Tensor, Tensor]:
        return self._read_ring(ring, 0, RING_TOKENS)  # all of it, in the order of its rows

    def _restore_ring(self, ring: int, recents: tuple[Tensor, Tensor], state: RingState) -> None:
        self.rings.restore(ring, state)
        self._write_ring(ring, 0, RING_TOKENS, *recents)
