"""Attention over quantized pages: what one forward pass needs to know. Knows torch; decides nothing.

`QuantizedBatch` stands where `prefill.attention.PagedBatch` stands. Each row attends to two sets of keys, and their
partials are merged as those of tiles are (kernels/attention.py):

    quantized   tiles of 256 at absolute positions, dequantized; a row sees those before its boundary
    recent      one tile of 64 from the boundary on, as the model computed them; the 32 rows of a block share it

Both are cut by position alone, so a row's bits do not depend on the chunk or the batch it is computed in. In a prefill
chunk the blocks that the chunk itself completes are quantized first and then read in both forms by different rows.

Shapes: `N` packed rows, `Hq` query heads, `H` KV heads, `G = Hq / H`, `D`/`Dv` head dims, `S` = tile, `B` sequences.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from kernels.attention import HIDDEN_BIAS, TILE_TOKENS, merge_tiles, tile_partials
from prefill.attention import AttentionRule, Span
from prefill.quantized_layout import BLOCK_TOKENS, RING_TOKENS, boundary
from prefill.quantized_pages import BLOCKS_PER_TILE, QuantizedPages, QuantizedStore

QUERY_TOKENS = 256  # handled at once in a chunk: bounds the scores held in memory
DECODE_TILES = 128  # dequantized at once for decode rows: bounds the buffer; fewer and larger products are faster


class QuantizedBatch:
    """One forward pass. Building it books the spans' tokens into their rings, so the pass has to follow."""

    def __init__(self, store: QuantizedStore, spans: Sequence[Span], row_multiple: int = 1) -> None:
        assert len({span.ring for span in spans}) == len(spans), "two spans of one sequence in a batch"
        self._jobs: list[_ChunkJob | _DecodeJob] = []
        single: list[_Booked] = []
        for span in spans:
            assert span.ring is not None, "a sequence in quantized pages has a ring"
            booked = _Booked(span, span.ring, *store.rings.extend(span.ring, span.start, span.stop))
            first = store.rings.state(span.ring).first
            assert first <= boundary(span.start), (
                f"a query at {span.start} reads tokens before {first}: no ring has them"
            )
            if span.num_tokens > 1:
                self._jobs.append(_ChunkJob(store, booked, row_multiple))
            else:
                single.append(booked)
        self._jobs.extend(_DecodeJob(store, group, row_multiple) for group in _groups(single))

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, rule: AttentionRule) -> Tensor:
        """`q` [1, Hq, N, D], `k` [1, H, N, D], `v` [1, H, N, Dv], rotated -> [1, N, Hq, Dv].
        Rows beyond the spans are padding: not stored, and 0 in the result."""
        out = torch.zeros(q.shape[2], q.shape[1], v.shape[3], dtype=q.dtype, device=q.device)
        for job in self._jobs:
            job.run(layer, q[0], k[0].transpose(0, 1), v[0].transpose(0, 1), rule, out)
        return out[None]


class _Booked(NamedTuple):
    """Tokens `settled .. settles` of the span's sequence are to be quantized in this pass."""

    span: Span
    ring: int
    settled: int
    settles: int


class _Partials(NamedTuple):
    """As `tile_partials` returns them."""

    m: Tensor
    total: Tensor
    weighted: Tensor


class _ChunkJob:
    """A prefill chunk: several rows of one sequence."""

    def __init__(self, store: QuantizedStore, booked: _Booked, row_multiple: int) -> None:
        span, ring, self._settled, self._settles = booked
        self._store, self._span, self._row_multiple = store, span, row_multiple
        # `fresh`: tokens of the ring, then the chunk's own, then one of zeros.
        self._first = min(self._settled, boundary(span.start))
        self._ring_rows = store.rows(ring, self._first, span.start)
        self._due = store.blocks(span.block_table, self._settled, self._settles)
        self._kept = min(span.num_tokens, RING_TOKENS)
        self._kept_rows = store.rows(ring, span.stop - self._kept, span.stop)
        first_group, last_group = span.start // BLOCK_TOKENS, (span.stop - 1) // BLOCK_TOKENS
        self._first_group = first_group
        starts = torch.tensor([boundary(group * BLOCK_TOKENS) for group in range(first_group, last_group + 1)])
        self._recent_keys = (starts[:, None] + torch.arange(RING_TOKENS)).to(store.device)  # [groups, 64] positions
        self._fresh_index = (self._recent_keys.clamp(max=span.stop) - self._first).flatten()
        self._read_until = boundary(span.stop - 1)
        self._pages = store.blocks(span.block_table, 0, self._read_until)
        self._biases: dict[tuple[int, int | None, int | None], Tensor | None] = {}

    def run(self, layer: int, q: Tensor, k: Tensor, v: Tensor, rule: AttentionRule, out: Tensor) -> None:
        store, span = self._store, self._span
        recent_k = self._take(store.recent_k.data[layer], store.k[layer], k)
        recent_v = self._take(store.recent_v.data[layer], store.v[layer], v)
        first_key = 0 if rule.window is None else max(0, span.start - rule.window + 1)
        first_tile = min(first_key, self._read_until) // TILE_TOKENS
        blocks = self._pages[first_tile * BLOCKS_PER_TILE :]
        places = torch.arange(len(blocks), device=store.device)
        num_tiles = -(-len(blocks) // BLOCKS_PER_TILE)
        k_tiles = store.k[layer].tiles(num_tiles, blocks, places)
        v_tiles = store.v[layer].tiles(num_tiles, blocks, places)
        for first in range(0, span.num_tokens, QUERY_TOKENS):
            count = min(QUERY_TOKENS, span.num_tokens - first)
            start, row = span.start + first, span.row + first
            heads = q[:, row : row + count].unflatten(0, (k.shape[1], -1))  # [H, G, rows, D]
            partials = [
                self._quantized(heads, start, first_tile + tile, k_tiles[tile], v_tiles[tile], rule)
                for tile in range(num_tiles)
                if (first_tile + tile) * TILE_TOKENS < boundary(start + count - 1)
                and (rule.window is None or (first_tile + tile + 1) * TILE_TOKENS > start - rule.window + 1)
            ]
            partials.append(self._recent(heads, start, recent_k, recent_v, rule))
            result = merge_tiles(*(torch.stack(parts) for parts in zip(*partials, strict=True)))
            out[row : row + count] = result.reshape(-1, count, out.shape[2]).transpose(0, 1)

    def _take(self, data: Tensor, pages: QuantizedPages, x: Tensor) -> Tensor:
        """Store the chunk's keys or values `x` [N, H, D], quantize what is due; the recent tiles [groups, H, 64, D]."""
        span = self._span
        x = x[span.row : span.row + span.num_tokens]
        fresh = torch.cat((data.index_select(0, self._ring_rows), x, torch.zeros_like(x[:1])))
        if len(self._due):
            due = fresh[self._settled - self._first : self._settles - self._first]
            pages.write(self._due, due)
        data.index_copy_(0, self._kept_rows, x[-self._kept :])
        return fresh.index_select(0, self._fresh_index).unflatten(0, (-1, RING_TOKENS)).transpose(1, 2).contiguous()

    def _quantized(
        self, heads: Tensor, start: int, tile: int, k_tile: Tensor, v_tile: Tensor, rule: AttentionRule
    ) -> _Partials:
        num_heads, group, count, _ = heads.shape
        key = (start, tile, rule.window)
        if key not in self._biases:
            self._biases[key] = self._quantized_bias(start, count, tile, rule.window, group)
        parts = tile_partials(
            _pad_rows(heads.flatten(1, 2), self._row_multiple),
            k_tile,
            v_tile,
            self._biases[key],
            scale=rule.scale,
            softcap=rule.softcap,
        )
        return _Partials(*(part[:, : group * count] for part in parts))

    def _quantized_bias(self, start: int, count: int, tile: int, window: int | None, group: int) -> Tensor | None:
        """[G * rows, S]; None where every row sees the whole tile."""
        first_key = tile * TILE_TOKENS
        seen = first_key + TILE_TOKENS <= boundary(start)
        if seen and (window is None or first_key > start + count - 1 - window):
            return None
        device = self._store.device
        keys = torch.arange(first_key, first_key + TILE_TOKENS, device=device)
        positions = torch.arange(start, start + count, device=device).repeat(group)[:, None]
        return _pad_rows(_hiding(keys >= _boundaries(positions), keys, positions, window), self._row_multiple)

    def _recent(self, heads: Tensor, start: int, k: Tensor, v: Tensor, rule: AttentionRule) -> _Partials:
        """Rows go to the tile of their block: [H, G, rows] -> [blocks, H, G, 32] and back."""
        num_heads, group, count, _ = heads.shape
        before = start % BLOCK_TOKENS
        first, stop = start // BLOCK_TOKENS, (start + count - 1) // BLOCK_TOKENS + 1
        num = stop - first
        cut = slice(first - self._first_group, stop - self._first_group)
        padded = nn.functional.pad(heads, (0, 0, before, num * BLOCK_TOKENS - before - count))
        padded = padded.unflatten(2, (num, BLOCK_TOKENS)).permute(2, 0, 1, 3, 4)
        key = (start, None, rule.window)
        if key not in self._biases:
            positions = torch.arange(first * BLOCK_TOKENS, stop * BLOCK_TOKENS, device=self._store.device)
            positions = positions.view(num, 1, BLOCK_TOKENS).expand(-1, group, -1).flatten(1)[..., None]
            keys = self._recent_keys[cut][:, None]
            bias = _pad_rows(_hiding(keys > positions, keys, positions, rule.window), self._row_multiple)
            self._biases[key] = bias.repeat_interleave(num_heads, 0)
        parts = tile_partials(
            _pad_rows(padded.flatten(2, 3).flatten(0, 1), self._row_multiple),
            k[cut].flatten(0, 1),
            v[cut].flatten(0, 1),
            self._biases[key],
            scale=rule.scale,
            softcap=rule.softcap,
        )

        def back(part: Tensor) -> Tensor:
            part = part[:, : group * BLOCK_TOKENS].view(num, num_heads, group, BLOCK_TOKENS, -1)
            part = part.permute(1, 2, 0, 3, 4).flatten(2, 3)[:, :, before : before + count]
            return part.flatten(1, 2)

        return _Partials(*map(back, parts))


class _Reach(NamedTuple):
    """Which tiles a group's rows read in layers of one window: `num_tiles` each, from tile `first` [B] of its own."""

    num_tiles: int
    blocks: Tensor
    places: Tensor
    bias: Tensor
    recent_bias: Tensor


class _DecodeJob:
    """Single rows of several sequences, all tiles at once."""

    def __init__(self, store: QuantizedStore, group: Sequence[_Booked], row_multiple: int) -> None:
        self._store, self._row_multiple = store, row_multiple
        self._spans = [booked.span for booked in group]
        device = store.device
        self._batch_rows = torch.tensor([span.row for span in self._spans], device=device)
        self._positions = torch.tensor([span.start for span in self._spans], device=device)
        self._new_rows = torch.cat([store.rows(ring, span.start, span.stop) for span, ring, *_ in group])
        due = [booked for booked in group if booked.settled < booked.settles]
        self._due = [store.blocks(span.block_table, settled, settles) for span, _, settled, settles in due]
        self._due_rows = [store.rows(ring, settled, settles) for _, ring, settled, settles in due]
        self._boundaries = torch.tensor([boundary(span.start) for span in self._spans], device=device)
        keys = self._boundaries[:, None] + torch.arange(RING_TOKENS, device=device)  # [B, 64]
        rings = torch.tensor([booked.ring for booked in group], device=device)[:, None]
        rows = keys % RING_TOKENS + rings * RING_TOKENS
        rows = torch.where(keys <= self._positions[:, None], rows, store.recent_k.null_row)
        self._recent_keys, self._recent_rows = keys, rows.flatten()
        self._reaches: dict[int | None, _Reach] = {}

    def run(self, layer: int, q: Tensor, k: Tensor, v: Tensor, rule: AttentionRule, out: Tensor) -> None:
        store, num_seqs, num_heads = self._store, len(self._spans), k.shape[1]
        recent_k = self._take(store.recent_k.data[layer], store.k[layer], k)
        recent_v = self._take(store.recent_v.data[layer], store.v[layer], v)
        if rule.window not in self._reaches:
            self._reaches[rule.window] = self._reach(rule.window, num_heads)
        reach = self._reaches[rule.window]
        heads = q[:, self._batch_rows].transpose(0, 1).unflatten(1, (num_heads, -1))  # [B, H, G, D]
        group = heads.shape[2]
        heads = _pad_rows(heads, self._row_multiple)[:, None]
        parts = tile_partials(
            heads.flatten(0, 2), recent_k, recent_v, reach.recent_bias, scale=rule.scale, softcap=rule.softcap
        )
        partials = [part.view(num_seqs, 1, num_heads, *part.shape[1:]) for part in parts]
        if reach.num_tiles:
            num = num_seqs * reach.num_tiles
            parts = tile_partials(
                heads.expand(-1, reach.num_tiles, -1, -1, -1).flatten(0, 2),
                store.k[layer].tiles(num, reach.blocks, reach.places).flatten(0, 1),
                store.v[layer].tiles(num, reach.blocks, reach.places).flatten(0, 1),
                reach.bias,
                scale=rule.scale,
                softcap=rule.softcap,
            )
            shape = (num_seqs, reach.num_tiles, num_heads)
            partials = [
                torch.cat((part.unflatten(0, shape), last), 1) for part, last in zip(parts, partials, strict=True)
            ]
        result = merge_tiles(*(part.transpose(0, 1) for part in partials))
        out[self._batch_rows] = result[:, :, :group].flatten(1, 2).to(out.dtype)

    def _take(self, data: Tensor, pages: QuantizedPages, x: Tensor) -> Tensor:
        """Quantize what is due, which the new token may replace in its ring; then the recent tiles [B * H, 64, D]."""
        if self._due:
            due = data.index_select(0, torch.cat(self._due_rows))
            pages.write(torch.cat(self._due), due)
        data.index_copy_(0, self._new_rows, x.index_select(0, self._batch_rows))
        tiles = data.index_select(0, self._recent_rows)
        return tiles.unflatten(0, (-1, RING_TOKENS)).transpose(1, 2).reshape(-1, RING_TOKENS, x.shape[-1])

    def _reach(self, window: int | None, num_heads: int) -> _Reach:
        device = self._store.device
        first_keys = [0 if window is None else max(0, span.start - window + 1) for span in self._spans]
        limits = [boundary(span.start) for span in self._spans]
        firsts = [min(key, limit) // TILE_TOKENS for key, limit in zip(first_keys, limits, strict=True)]
        num_tiles = max(-(-limit // TILE_TOKENS) - first for first, limit in zip(firsts, limits, strict=True))
        blocks, places = [], []
        for i, (span, first, limit) in enumerate(zip(self._spans, firsts, limits, strict=True)):
            found = self._store.blocks(span.block_table, min(first * TILE_TOKENS, limit), limit)
            blocks.append(found)
            places.append(torch.arange(len(found), device=device) + i * num_tiles * BLOCKS_PER_TILE)
        positions = self._positions[:, None]
        keys = torch.tensor(firsts, device=device)[:, None] * TILE_TOKENS
        keys = keys + torch.arange(num_tiles * TILE_TOKENS, device=device)
        bias = _hiding(keys >= self._boundaries[:, None], keys, positions, window)
        bias = bias.view(-1, 1, TILE_TOKENS).repeat_interleave(num_heads, 0)
        recent = _hiding(self._recent_keys > positions, self._recent_keys, positions, window)
        return _Reach(
            num_tiles=num_tiles,
            blocks=torch.cat(blocks),
            places=torch.cat(places),
            bias=bias,
            recent_bias=recent[:, None].repeat_interleave(num_heads, 0),
        )


def _groups(single: Sequence[_Booked]) -> list[list[_Booked]]:
    """Rows of like length go together, padded to the longest of their group: hidden tiles change no bit."""
    buckets: dict[int, list[_Booked]] = {}
    for booked in single:
        buckets.setdefault(max(_num_tiles(booked) - 1, 0).bit_length(), []).append(booked)
    groups = []
    for bucket in buckets.values():
        at_once = max(1, DECODE_TILES // max(1, *map(_num_tiles, bucket)))
        groups += [bucket[first : first + at_once] for first in range(0, len(bucket), at_once)]
    return groups


def _num_tiles(booked: _Booked) -> int:
    return -(-boundary(booked.span.start) // TILE_TOKENS)


def _boundaries(positions: Tensor) -> Tensor:
    """`quantized_layout.boundary`, of tensors."""
    return ((positions - BLOCK_TOKENS) // BLOCK_TOKENS * BLOCK_TOKENS).clamp(min=0)


def _hiding(hidden: Tensor, keys: Tensor, positions: Tensor, window: int | None) -> Tensor:
    """float32: `HIDDEN_BIAS` where hidden or out of the window, else 0."""
    if window is not None:
        hidden = hidden | (keys <= positions - window)
    return torch.zeros(hidden.shape, device=hidden.device).masked_fill_(hidden, HIDDEN_BIAS)


def _pad_rows(x: Tensor, multiple: int) -> Tensor:
    """[..., R, *] with zero rows up to a multiple."""
    missing = -x.shape[-2] % multiple
    return nn.functional.pad(x, (0, 0, 0, missing)) if missing else x
