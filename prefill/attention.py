"""Paged attention behind transformers' attention interface: what one forward pass needs to know, and the glue to
`kernels/attention.py`. Knows torch and transformers; decides nothing.

A forward pass packs slices of several sequences (prefill chunks and single decode rows) into one row of N tokens.
`PagedBatch` travels to every layer as the keyword `kv`; a layer writes its new keys and values into the pages and then
attends over pages only, so that prefill, decode and received KV all read the same bytes.

Shapes: `N` packed rows, `Hq` query heads, `H` KV heads, `G = Hq / H`, `D`/`Dv` head dims, `S` = tile, `B` sequences.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from kernels.attention import (
    TILE_TOKENS,
    RunningSoftmax,
    padded_rows,
    scaled_queries,
    tile_partials,
)
from prefill.kv_pool import KVPool

ATTENTION_NAME = "kvstream_paged"
# Query tokens handled at once. Bounds the scores held in memory; 256 tokens x 2 query heads a KV head stay in L2.
QUERY_TOKENS = 256


class AttentionUnsupported(Exception):
    """The model's attention asks for something that is not built; the text names it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """Rows `row .. row + num_tokens` of the packed batch are tokens `start ..` of the sequence in `block_table`."""

    row: int
    num_tokens: int
    start: int
    block_table: Sequence[int]

    @property
    def stop(self) -> int:
        return self.start + self.num_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class _Mask:
    scale: float
    window: int | None
    softcap: float | None


class PagedBatch:
    """One forward pass over the pages. Built by the engine, used by every layer, then thrown away."""

    def __init__(self, pool: KVPool, spans: Sequence[Span]) -> None:
        self._pool = pool
        self._num_rows = sum(span.num_tokens for span in spans)
        self._row_slots = torch.cat([pool.slots(s.block_table, s.start, s.stop) for s in spans]).to(
            pool.device
        )
        self._jobs: list[_ChunkJob | _DecodeJob] = [_ChunkJob(pool, s) for s in spans if s.num_tokens > 1]
        # Single rows go together, padded to the longest of a bucket; hidden tiles change no bit of the result.
        buckets: dict[int, list[Span]] = {}
        for span in spans:
            if span.num_tokens == 1:
                buckets.setdefault(max(0, _num_tiles(span.stop) - 1).bit_length(), []).append(span)
        self._jobs.extend(_DecodeJob(pool, bucket) for bucket in buckets.values())

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, mask: _Mask) -> Tensor:
        """`q` [1, Hq, N, D], `k` [1, H, N, D], `v` [1, H, N, Dv], rotated -> [1, N, Hq, Dv]. Rows of padding give 0."""
        k_slots, v_slots = self._pool.layer_slots(layer)
        k_slots.index_copy_(0, self._row_slots, k[0, :, : self._num_rows].transpose(0, 1))
        v_slots.index_copy_(0, self._row_slots, v[0, :, : self._num_rows].transpose(0, 1))
        out = torch.zeros(q.shape[2], q.shape[1], v.shape[3], dtype=q.dtype, device=q.device)
        for job in self._jobs:
            job.run(q[0], k_slots, v_slots, mask, out)
        return out[None]


def paged_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    kv: PagedBatch | None = None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """What transformers calls in every layer; `kv` comes through `model(..., kv=batch)`."""
    assert kv is not None, "a model with kvstream's attention was called without `kv`"
    if s_aux is not None:
        raise AttentionUnsupported("attention sinks (s_aux) are not supported yet")
    if attention_mask is not None:
        raise AttentionUnsupported("the model brings an attention mask of its own")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    mask = _Mask(scale=scale, window=sliding_window, softcap=softcap)
    return kv.attend(int(module.layer_idx), query, key, value, mask), None  # type: ignore[arg-type]


def register() -> None:
    """Make `ATTENTION_NAME` known to transformers. No mask function is registered, so every mask is None."""
    AttentionInterface.register(ATTENTION_NAME, paged_attention)


def _num_tiles(num_tokens: int) -> int:
    return -(-num_tokens // TILE_TOKENS)


def _tile_rows(pool: KVPool, span: Span, num_tiles: int) -> Tensor:
    """Where to read the span's tiles: rows of a layer's pages seen as [num_slots * H, D] -> [tiles, H, S].
    Positions not written yet read the pool's zeros."""
    slots = torch.full((num_tiles * TILE_TOKENS,), pool.null_slot, dtype=torch.int64)
    slots[: span.stop] = pool.slots(span.block_table, 0, span.stop)
    heads = torch.arange(pool.layout.num_kv_heads)
    return slots.view(num_tiles, 1, TILE_TOKENS) * pool.layout.num_kv_heads + heads[:, None]


def _gather(slots: Tensor, rows: Tensor) -> Tensor:
    """[num_slots, H, D] read at `rows` [..., H, S] -> [..., H, S, D]."""
    return slots.flatten(0, 1).index_select(0, rows.flatten()).view(*rows.shape, slots.shape[-1])


class _ChunkJob:
    """A prefill chunk: several rows of one sequence, tile after tile."""

    def __init__(self, pool: KVPool, span: Span) -> None:
        self._span = span
        self._rows = _tile_rows(pool, span, _num_tiles(span.stop)).to(pool.device)
        self._hidden_cache: dict[tuple[int, int, int | None], Tensor | None] = {}

    def run(self, q: Tensor, k_slots: Tensor, v_slots: Tensor, mask: _Mask, out: Tensor) -> None:
        k_tiles, v_tiles = _gather(k_slots, self._rows), _gather(v_slots, self._rows)
        num_kv_heads = k_slots.shape[1]
        group = q.shape[0] // num_kv_heads
        for first in range(0, self._span.num_tokens, QUERY_TOKENS):
            count = min(QUERY_TOKENS, self._span.num_tokens - first)
            row, start = self._span.row + first, self._span.start + first
            q_rows = torch.zeros(num_kv_heads, padded_rows(group * count), q.shape[2], device=q.device)
            heads = q[:, row : row + count].reshape(num_kv_heads, group * count, -1)
            q_rows[:, : group * count] = scaled_queries(heads, mask.scale, mask.softcap)
            softmax: RunningSoftmax | None = None
            first_tile = 0 if mask.window is None else max(0, start - mask.window + 1) // TILE_TOKENS
            for tile in range(first_tile, _num_tiles(start + count)):
                hidden = self._hidden(first, count, tile, group, mask.window)
                partials = tile_partials(q_rows, k_tiles[tile], v_tiles[tile], hidden, mask.softcap)
                if softmax is None:
                    softmax = RunningSoftmax(*partials)
                else:
                    softmax.merge(*partials)
            assert softmax is not None
            result = softmax.result()[:, : group * count]
            out[row : row + count] = result.reshape(num_kv_heads * group, count, -1).transpose(0, 1)

    def _hidden(self, first: int, count: int, tile: int, group: int, window: int | None) -> Tensor | None:
        """[R, S] true where a key is in the future of the row's query or out of its window; None if nothing is."""
        key = (first, tile, window)
        if key not in self._hidden_cache:
            start, keys_start = self._span.start + first, tile * TILE_TOKENS
            behind = keys_start + TILE_TOKENS - 1 <= start
            in_window = window is None or keys_start > start + count - 1 - window
            if behind and in_window:
                self._hidden_cache[key] = None
            else:
                keys = torch.arange(keys_start, keys_start + TILE_TOKENS, device=self._rows.device)
                positions = torch.arange(start, start + count, device=self._rows.device).repeat(group)
                hidden = torch.zeros(
                    padded_rows(group * count), TILE_TOKENS, dtype=torch.bool, device=keys.device
                )
                hidden[: group * count] = _is_hidden(keys, positions[:, None], window)
                self._hidden_cache[key] = hidden
        return self._hidden_cache[key]


class _DecodeJob:
    """Single rows of several sequences, all tiles at once."""

    def __init__(self, pool: KVPool, spans: Sequence[Span]) -> None:
        num_tiles = max(_num_tiles(span.stop) for span in spans)
        self._rows = torch.stack([_tile_rows(pool, span, num_tiles) for span in spans]).to(pool.device)
        self._batch_rows = torch.tensor([span.row for span in spans], device=pool.device)
        self._positions = torch.tensor([span.start for span in spans], device=pool.device)
        self._hidden_cache: dict[int | None, Tensor] = {}

    def run(self, q: Tensor, k_slots: Tensor, v_slots: Tensor, mask: _Mask, out: Tensor) -> None:
        num_seqs, num_tiles, num_kv_heads, tile = self._rows.shape
        k_tiles = _gather(k_slots, self._rows).flatten(0, 2)
        v_tiles = _gather(v_slots, self._rows).flatten(0, 2)
        group, dim = q.shape[0] // num_kv_heads, q.shape[2]
        q_rows = torch.zeros(num_seqs, 1, num_kv_heads, padded_rows(group), dim, device=q.device)
        heads = q[:, self._batch_rows].view(num_kv_heads, group, num_seqs, dim).permute(2, 0, 1, 3)
        q_rows[:, 0, :, :group] = scaled_queries(heads, mask.scale, mask.softcap)
        q_tiles = q_rows.expand(-1, num_tiles, -1, -1, -1).flatten(0, 2)
        partials = tile_partials(q_tiles, k_tiles, v_tiles, self._hidden(mask.window), mask.softcap)
        m, total, o = (
            p.view(num_seqs, num_tiles, num_kv_heads, *p.shape[1:])[..., :group, :] for p in partials
        )
        softmax = RunningSoftmax(m[:, 0], total[:, 0], o[:, 0])
        for index in range(1, num_tiles):
            softmax.merge(m[:, index], total[:, index], o[:, index])
        out[self._batch_rows] = softmax.result().flatten(1, 2).to(out.dtype)

    def _hidden(self, window: int | None) -> Tensor:
        """[B * tiles * H, 1, S]."""
        if window not in self._hidden_cache:
            num_seqs, num_tiles, num_kv_heads, tile = self._rows.shape
            keys = torch.arange(num_tiles * tile, device=self._rows.device).view(1, num_tiles, 1, 1, tile)
            hidden = _is_hidden(keys, self._positions.view(num_seqs, 1, 1, 1, 1), window)
            self._hidden_cache[window] = hidden.expand(-1, -1, num_kv_heads, -1, -1).flatten(0, 2)
        return self._hidden_cache[window]


def _is_hidden(keys: Tensor, positions: Tensor, window: int | None) -> Tensor:
    hidden = keys > positions
    return hidden if window is None else hidden | (keys <= positions - window)
