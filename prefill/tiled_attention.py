"""Attention over pages by torch's products over copied tiles: runs on any device, in any dtype.

Schedule-invariant wherever torch's products treat every row alike (kernels/attention.py), which the engine measures.

Shapes: `N` packed rows, `Hq` query heads, `H` KV heads, `G = Hq / H`, `D`/`Dv` head dims, `S` = tile, `B` sequences.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from kernels.attention import HIDDEN_BIAS, TILE_TOKENS, merge_tiles, tile_partials
from prefill.attention import AttentionRule, Pages, Span

# Query tokens handled at once. Bounds the scores held in memory.
QUERY_TOKENS = 256


class TiledBatch:
    """One forward pass over the pages (prefill/attention.py: Batch)."""

    def __init__(self, pool: Pages, spans: Sequence[Span], row_multiple: int = 1) -> None:
        self._pool = pool
        self._num_rows = sum(span.num_tokens for span in spans)
        slots = [pool.slots(span.block_table, span.start, span.stop) for span in spans]
        self._row_slots = torch.cat(slots).to(pool.device)
        self._jobs: list[_ChunkJob | _DecodeJob] = [
            _ChunkJob(pool, span, row_multiple) for span in spans if span.num_tokens > 1
        ]
        # Single rows go together, padded to the longest of their bucket: hidden tiles change no bit.
        buckets: dict[int, list[Span]] = {}
        for span in spans:
            if span.num_tokens == 1:
                buckets.setdefault((_num_tiles(span.stop) - 1).bit_length(), []).append(span)
        self._jobs.extend(_DecodeJob(pool, bucket, row_multiple) for bucket in buckets.values())

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, rule: AttentionRule) -> Tensor:
        k_slots, v_slots = self._pool.layer_slots(layer)
        k_slots.index_copy_(0, self._row_slots, k[0, :, : self._num_rows].transpose(0, 1))
        v_slots.index_copy_(0, self._row_slots, v[0, :, : self._num_rows].transpose(0, 1))
        out = torch.zeros(q.shape[2], q.shape[1], v.shape[3], dtype=q.dtype, device=q.device)
        for job in self._jobs:
            job.run(q[0], k_slots, v_slots, rule, out)
        return out[None]


class _ChunkJob:
    """A prefill chunk: several rows of one sequence, tile after tile."""

    def __init__(self, pool: Pages, span: Span, row_multiple: int) -> None:
        self._span = span
        self._row_multiple = row_multiple
        self._tiles = _TileReader(pool, _tile_rows(pool, span, _num_tiles(span.stop)))
        self._device = pool.device
        self._biases: dict[tuple[int, int, int | None], Tensor | None] = {}

    def run(self, q: Tensor, k_slots: Tensor, v_slots: Tensor, rule: AttentionRule, out: Tensor) -> None:
        k_tiles, v_tiles = self._tiles.read(k_slots, v_slots)
        num_kv_heads = k_slots.shape[1]
        group = q.shape[0] // num_kv_heads
        for first in range(0, self._span.num_tokens, QUERY_TOKENS):
            count = min(QUERY_TOKENS, self._span.num_tokens - first)
            row, start = self._span.row + first, self._span.start + first
            heads = q[:, row : row + count].reshape(num_kv_heads, group * count, -1)
            heads = _pad_rows(heads, self._row_multiple)
            first_tile = 0 if rule.window is None else max(0, start - rule.window + 1) // TILE_TOKENS
            partials = [
                tile_partials(
                    heads,
                    k_tiles[tile],
                    v_tiles[tile],
                    self._bias(first, count, tile, rule.window, group),
                    scale=rule.scale,
                    softcap=rule.softcap,
                )
                for tile in range(first_tile, _num_tiles(start + count))
            ]
            m, total, weighted = zip(*partials, strict=True)
            result = merge_tiles(torch.stack(m), torch.stack(total), torch.stack(weighted))[:, : group * count]
            out[row : row + count] = result.reshape(num_kv_heads * group, count, -1).transpose(0, 1)

    def _bias(self, first: int, count: int, tile: int, window: int | None, group: int) -> Tensor | None:
        """[R, S], the same for all layers of a window; None where every query sees the whole tile."""
        key = (first, tile, window)
        if key not in self._biases:
            start, keys_start = self._span.start + first, tile * TILE_TOKENS
            all_past = keys_start + TILE_TOKENS - 1 <= start
            all_in_window = window is None or keys_start > start + count - 1 - window
            if all_past and all_in_window:
                self._biases[key] = None
            else:
                keys = torch.arange(keys_start, keys_start + TILE_TOKENS, device=self._device)
                positions = torch.arange(start, start + count, device=self._device).repeat(group)
                bias = _hiding_bias(keys, positions[:, None], window)
                self._biases[key] = _pad_rows(bias, self._row_multiple)
        return self._biases[key]


class _DecodeJob:
    """Single rows of several sequences, all tiles at once."""

    def __init__(self, pool: Pages, spans: Sequence[Span], row_multiple: int) -> None:
        self._row_multiple = row_multiple
        num_tiles = max(_num_tiles(span.stop) for span in spans)
        self._tiles = _TileReader(pool, torch.stack([_tile_rows(pool, span, num_tiles) for span in spans]))
        self._num_tiles = num_tiles
        self._batch_rows = torch.tensor([span.row for span in spans], device=pool.device)
        self._positions = torch.tensor([span.start for span in spans], device=pool.device)
        self._biases: dict[int | None, Tensor] = {}

    def run(self, q: Tensor, k_slots: Tensor, v_slots: Tensor, rule: AttentionRule, out: Tensor) -> None:
        num_seqs, num_tiles, num_kv_heads = len(self._positions), self._num_tiles, k_slots.shape[1]
        k_tiles, v_tiles = self._tiles.read(k_slots, v_slots)
        group = q.shape[0] // num_kv_heads
        heads = q[:, self._batch_rows].transpose(0, 1).reshape(num_seqs, 1, num_kv_heads, group, -1)
        heads = _pad_rows(heads, self._row_multiple).expand(-1, num_tiles, -1, -1, -1).flatten(0, 2)
        partials = tile_partials(
            heads,
            k_tiles.flatten(0, 2),
            v_tiles.flatten(0, 2),
            self._bias(rule.window, num_kv_heads),
            scale=rule.scale,
            softcap=rule.softcap,
        )
        shape = (num_seqs, num_tiles, num_kv_heads)
        result = merge_tiles(*(partial.unflatten(0, shape).transpose(0, 1) for partial in partials))
        out[self._batch_rows] = result[:, :, :group].flatten(1, 2).to(out.dtype)

    def _bias(self, window: int | None, num_kv_heads: int) -> Tensor:
        """[B * tiles * H, 1, S], the same for all layers of a window."""
        if window not in self._biases:
            keys = torch.arange(self._num_tiles * TILE_TOKENS, device=self._positions.device)
            bias = _hiding_bias(keys, self._positions[:, None], window)
            bias = bias.view(len(self._positions), self._num_tiles, 1, 1, TILE_TOKENS)
            self._biases[window] = bias.expand(-1, -1, num_kv_heads, -1, -1).flatten(0, 2)
        return self._biases[window]


def _num_tiles(num_tokens: int) -> int:
    return -(-num_tokens // TILE_TOKENS)


def _tile_rows(pool: Pages, span: Span, num_tiles: int) -> Tensor:
    """Where a span's tiles stand among the rows of a layer's pages seen as [num_slots * H, D]: [tiles, H, S].
    Positions not written yet read the pool's zeros."""
    slots = torch.full((num_tiles * TILE_TOKENS,), pool.null_slot, dtype=torch.int64)
    slots[: span.stop] = pool.slots(span.block_table, 0, span.stop)
    heads = torch.arange(pool.layout.num_kv_heads)
    return slots.view(num_tiles, 1, TILE_TOKENS) * pool.layout.num_kv_heads + heads[:, None]


class _TileReader:
    """Copies of a layer's pages, tile by tile. One pair of buffers serves all layers of a forward pass: fresh
    ones would cost more in page faults than the copy itself."""

    def __init__(self, pool: Pages, slot_rows: Tensor) -> None:
        """`slot_rows` [..., H, S] as from `_tile_rows`."""
        self._index = slot_rows.flatten().to(pool.device)
        layout, shape = pool.layout, slot_rows.shape
        self._k = torch.empty(*shape, layout.head_dim_k, dtype=pool.k.dtype, device=pool.device)
        self._v = torch.empty(*shape, layout.head_dim_v, dtype=pool.v.dtype, device=pool.device)

    def read(self, k_slots: Tensor, v_slots: Tensor) -> tuple[Tensor, Tensor]:
        """[..., H, S, D], [..., H, S, Dv]; valid until the next call."""
        torch.index_select(k_slots.flatten(0, 1), 0, self._index, out=self._k.flatten(0, -2))
        torch.index_select(v_slots.flatten(0, 1), 0, self._index, out=self._v.flatten(0, -2))
        return self._k, self._v


def _pad_rows(x: Tensor, multiple: int) -> Tensor:
    """[..., R, *] with zero rows up to a multiple."""
    missing = -x.shape[-2] % multiple
    return nn.functional.pad(x, (0, 0, 0, missing)) if missing else x


def _hiding_bias(keys: Tensor, positions: Tensor, window: int | None) -> Tensor:
    hidden = keys > positions
    if window is not None:
        hidden = hidden | (keys <= positions - window)
    return torch.zeros(hidden.shape, device=hidden.device).masked_fill_(hidden, HIDDEN_BIAS)
