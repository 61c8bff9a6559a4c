"""Attention over pages on a GPU: decode rows by the Triton kernels, prefill chunks by torch's attention. Knows torch.

`CudaPages` and `CudaQuantizedPages` belong to a pool, for its life: they know how new rows are stored and how rows of
one token attend. The batches here use them for one eager forward pass, and decode_graphs.py in captured ones.

A decode row's attention has the same bits whoever shares the batch (kernels/paged_attention.py). Torch's attention
promises nothing of the kind, so on a GPU the bits of a prompt's KV do depend on how it was cut into chunks.

Shapes: `N` packed rows, `B` of them single rows of sequences, `Hq` query heads, `H` KV heads, `D`/`Dv` head dims.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right

from kernels import paged_attention as paged
from prefill.attention import AttentionRule, Pages, Span
from prefill.quantized_attention import QuantizedBatch
from prefill.quantized_layout import BLOCK_TOKENS, RING_TOKENS
from prefill.quantized_pages import QuantizedStore
from prefill.tiled_attention import TiledBatch

# In the order of preference. cuDNN's is the only one of them that uses Hopper's own matrix instructions, but it makes a
# plan for each new shape, so it gets chunks of a few lengths only: multiples of 256.
_CUDNN = SDPBackend.CUDNN_ATTENTION
_BACKENDS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
CUDNN_TOKENS = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class NewRows:
    """What a forward pass adds, on the GPU. `slots` int64 [N]: where each packed row's key and value go in a layer's
    pages or rings; negative: nowhere (padding, or somebody else stores it). `rows`: the single rows, which attend by
    the kernels. `due` int32 [B]: quantized pages only, the block of each that leaves its ring now, or -1."""

    slots: Tensor
    rows: paged.DecodeRows
    due: Tensor | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RowPlan:
    """`NewRows` for single rows, still on the host: lists over B of the rows' positions in the packed batch, the slots
    of their keys, their block tables as far as they are needed, and of quantized pages rings and due blocks."""

    lengths: list[int]
    slots: list[int]
    tables: list[Sequence[int]]
    rings: list[int] | None = None
    due: list[int] | None = None


class DecodePages(Protocol):
    """Pages of either kind, as single rows see them."""

    is_quantized: bool
    config: paged.DecodeConfig
    device: torch.device

    def plan(self, spans: Sequence[Span]) -> RowPlan: ...
    def store(self, layer: int, k: Tensor, v: Tensor, new: NewRows) -> None: ...
    def attend(
        self, layer: int, q: Tensor, new: NewRows, rule: AttentionRule, out: Tensor, partials: paged.Partials
    ) -> None: ...


class CudaPages:
    """The pages of a `KVPool`, on a GPU."""

    is_quantized = False

    def __init__(self, pool: Pages) -> None:
        self.pool = pool
        self.device = pool.device
        kind = "bf16" if pool.layout.torch_dtype.itemsize == 2 else "wide"
        self.config = paged.config_for(kind, pool.layout.head_dim_k)

    def batch(self, spans: Sequence[Span], row_multiple: int = 1) -> CudaBatch:
        return CudaBatch(self, spans, row_multiple)

    def plan(self, spans: Sequence[Span]) -> RowPlan:
        tokens = self.pool.block_tokens
        return RowPlan(
            lengths=[span.stop for span in spans],
            slots=[span.block_table[span.start // tokens] * tokens + span.start % tokens for span in spans],
            tables=[span.block_table[: -(-span.stop // tokens)] for span in spans],
        )

    def store(self, layer: int, k: Tensor, v: Tensor, new: NewRows) -> None:
        """`k` [N, H, D], `v` [N, H, Dv]."""
        paged.write_rows(k, v, *self.pool.layer_slots(layer), new.slots)

    def attend(
        self, layer: int, q: Tensor, new: NewRows, rule: AttentionRule, out: Tensor, partials: paged.Partials
    ) -> None:
        """`q` [N, Hq, D] -> the single rows of `out` [N, Hq, Dv]."""
        k_slots, v_slots = self.pool.layer_slots(layer)
        paged.paged_decode(
            q, k_slots, v_slots, self.pool.block_tokens, new.rows, out, partials,
            scale=rule.scale, window=rule.window, softcap=rule.softcap, config=self.config,
        )  # fmt: skip


class CudaQuantizedPages:
    """Pages and rings of a `QuantizedStore`, on a GPU."""

    is_quantized = True

    def __init__(self, quantized: QuantizedStore) -> None:
        assert can_attend(quantized), "int2 pages, or head dims that are no powers of two"
        self.quantized = quantized
        self.device = quantized.device
        self.config = paged.config_for(quantized.kind, quantized.layout.head_dim_k)

    def batch(self, spans: Sequence[Span], row_multiple: int = 1) -> CudaQuantizedBatch:
        return CudaQuantizedBatch(self, spans, row_multiple)

    def plan(self, spans: Sequence[Span]) -> RowPlan:
        """Books the spans' tokens into their rings, so the pass has to follow."""
        rings, due = [], []
        for span in spans:
            assert span.ring is not None, "a sequence in quantized pages has a ring"
            settled, settles = self.quantized.rings.extend(span.ring, span.start, span.stop)
            assert settles - settled in (0, BLOCK_TOKENS), (settled, settles)
            rings.append(span.ring)
            due.append(settled // BLOCK_TOKENS if settled < settles else -1)
        return RowPlan(
            lengths=[span.stop for span in spans],
            slots=[ring * RING_TOKENS + span.start % RING_TOKENS for ring, span in zip(rings, spans, strict=True)],
            tables=[span.block_table[: -(-span.stop // BLOCK_TOKENS)] for span in spans],
            rings=rings,
            due=due,
        )

    def store(self, layer: int, k: Tensor, v: Tensor, new: NewRows) -> None:
        assert new.due is not None
        pages, k_ring, v_ring = self._layer(layer)
        paged.settle_blocks(pages, k_ring, v_ring, new.rows, new.due)
        paged.write_rows(k, v, k_ring.flatten(0, 1), v_ring.flatten(0, 1), new.slots)

    def attend(
        self, layer: int, q: Tensor, new: NewRows, rule: AttentionRule, out: Tensor, partials: paged.Partials
    ) -> None:
        pages, k_ring, v_ring = self._layer(layer)
        paged.quantized_decode(
            q, pages, k_ring, v_ring, new.rows, out, partials,
            scale=rule.scale, window=rule.window, softcap=rule.softcap, config=self.config,
        )  # fmt: skip

    def _layer(self, layer: int) -> tuple[paged.QuantizedPages, Tensor, Tensor]:
        k, v = self.quantized.k[layer], self.quantized.v[layer]
        pages = paged.QuantizedPages(
            k_kind=k.kind, v_kind=v.kind, k_codes=k.codes, k_scale=k.scale, k_zero=k.zero,
            v_codes=v.codes, v_scale=v.scale, v_zero=v.zero,
        )  # fmt: skip
        rings = (
            x.data[layer].unflatten(0, (-1, RING_TOKENS)) for x in (self.quantized.recent_k, self.quantized.recent_v)
        )
        return pages, *rings


def can_attend(quantized: QuantizedStore) -> bool:
    """Whether the kernels are built for such pages."""
    layout = quantized.layout
    kinds = {pages.kind for pages in (*quantized.k, *quantized.v)}
    dims = (layout.head_dim_k, layout.head_dim_v)
    return (
        kinds <= paged.KINDS.keys()
        and layout.dtype == "bfloat16"
        and dims[0] >= 64
        and all(d.bit_count() == 1 for d in dims)
    )


class CudaBatch:
    """One eager forward pass over a `KVPool` (prefill/attention.py: Batch)."""

    def __init__(self, pages: CudaPages, spans: Sequence[Span], row_multiple: int = 1) -> None:
        self._pages = pages
        self._chunks = [_ChunkJob(pages.pool, span, row_multiple) for span in spans if span.num_tokens > 1]
        slots = [pages.pool.slots(span.block_table, span.start, span.stop) for span in spans]
        self._num_rows = sum(span.num_tokens for span in spans)
        self._slots = torch.cat(slots).to(pages.device) if slots else torch.empty(0, dtype=torch.int64)
        self._single = _SingleRows(pages, [span for span in spans if span.num_tokens == 1], self._slots)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, rule: AttentionRule) -> Tensor:
        k_rows, v_rows = k[0].transpose(0, 1), v[0].transpose(0, 1)
        paged.write_rows(k_rows, v_rows, *self._pages.pool.layer_slots(layer), self._slots)
        is_padded = q.shape[2] > self._num_rows
        out = (torch.zeros if is_padded else torch.empty)(
            q.shape[2], q.shape[1], v.shape[3], dtype=q.dtype, device=q.device
        )
        for chunk in self._chunks:
            chunk.run(layer, q, k, v, rule, out)
        self._single.attend(layer, q[0].transpose(0, 1), rule, out)
        return out[None]


class CudaQuantizedBatch:
    """One eager forward pass over quantized pages. Building it books the spans' tokens into their rings. Chunks go by
    quantized_attention.py, whose products run on any device."""

    def __init__(self, pages: CudaQuantizedPages, spans: Sequence[Span], row_multiple: int = 1) -> None:
        self._pages = pages
        chunks = [span for span in spans if span.num_tokens > 1]
        self._chunks = QuantizedBatch(pages.quantized, chunks, row_multiple) if chunks else None
        single = [span for span in spans if span.num_tokens == 1]
        self._single = _SingleRows(pages, single, None)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, rule: AttentionRule) -> Tensor:
        if self._chunks is None:
            out = torch.zeros(q.shape[2], q.shape[1], v.shape[3], dtype=q.dtype, device=q.device)
        else:
            out = self._chunks.attend(layer, q, k, v, rule)[0]
        self._single.store(layer, k[0].transpose(0, 1), v[0].transpose(0, 1))
        self._single.attend(layer, q[0].transpose(0, 1), rule, out)
        return out[None]


class _SingleRows:
    """The rows of one token of an eager pass. `slots`: of all rows, if somebody else stores them."""

    def __init__(self, pages: DecodePages, spans: Sequence[Span], slots: Tensor | None) -> None:
        self._pages = pages
        self._partials: paged.Partials | None = None
        self._new: NewRows | None = None
        if not spans:
            return
        plan, device = pages.plan(spans), pages.device

        def ints(values: Sequence[int], dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.tensor(values, dtype=dtype).to(device)

        tables = np.zeros((len(spans), max(1, *map(len, plan.tables))), np.int32)
        for i, table in enumerate(plan.tables):
            tables[i, : len(table)] = table
        rows = [span.row for span in spans]
        if slots is None:  # rows of chunks in between are not ours
            packed = [-1] * (max(rows) + 1)
            for row, slot in zip(rows, plan.slots, strict=True):
                packed[row] = slot
            slots = ints(packed, torch.int64)
        self._new = NewRows(
            slots=slots,
            rows=paged.DecodeRows(
                q_rows=ints(rows), tables=torch.from_numpy(tables).to(device), lengths=ints(plan.lengths),
                max_length=max(plan.lengths), rings=None if plan.rings is None else ints(plan.rings),
            ),
            due=None if plan.due is None else ints(plan.due),
        )  # fmt: skip

    def store(self, layer: int, k: Tensor, v: Tensor) -> None:
        if self._new is not None:
            self._pages.store(layer, k, v, self._new)

    def attend(self, layer: int, q: Tensor, rule: AttentionRule, out: Tensor) -> None:
        if self._new is None:
            return
        if self._partials is None:
            slots = paged.num_slots(
                self._new.rows.max_length, self._pages.config, is_quantized=self._pages.is_quantized
            )
            self._partials = paged.Partials.empty(len(self._new.rows), slots, out.shape[1], out.shape[2], q.device)
        self._pages.attend(layer, q, self._new, rule, out, self._partials)


class _ChunkJob:
    """A prefill chunk: several rows of one sequence, whose keys and values are in the pages already."""

    def __init__(self, pool: Pages, span: Span, row_multiple: int) -> None:
        self._pool, self._span, self._row_multiple = pool, span, row_multiple
        self._slots = pool.slots(span.block_table, 0, span.stop).to(pool.device) if span.start else None
        self._tiled: TiledBatch | None = None

    def run(self, layer: int, q: Tensor, k: Tensor, v: Tensor, rule: AttentionRule, out: Tensor) -> None:
        span = self._span
        rows = slice(span.row, span.row + span.num_tokens)
        if rule.softcap is not None:  # torch's attention has none
            if self._tiled is None:
                self._tiled = TiledBatch(self._pool, [replace(span, row=0)], self._row_multiple)
            out[rows] = self._tiled.attend(layer, q[:, :, rows], k[:, :, rows], v[:, :, rows], rule)[0]
            return
        first = 0 if rule.window is None else max(0, span.start - rule.window + 1)
        if self._slots is None:
            k, v = k[:, :, rows], v[:, :, rows]
        else:  # what the pages hold, computed or received
            k, v = (x.index_select(0, self._slots[first:]).transpose(0, 1)[None]
                    for x in self._pool.layer_slots(layer))  # fmt: skip
        num_keys = span.stop - first
        if rule.window is None or span.stop <= rule.window:
            mask: Tensor = causal_lower_right(span.num_tokens, num_keys)
        else:
            mask = _window_mask(span, first, rule.window, q.device)
        backends = _BACKENDS if span.num_tokens % CUDNN_TOKENS else [_CUDNN, *_BACKENDS]
        with sdpa_kernel(backends, set_priority=True):
            result = nn.functional.scaled_dot_product_attention(
                q[:, :, rows], k, v, attn_mask=mask, scale=rule.scale, enable_gqa=q.shape[1] != k.shape[1]
            )
        out[rows] = result[0].transpose(0, 1)


def _window_mask(span: Span, first: int, window: int, device: torch.device) -> Tensor:
    """[rows, keys] of what each row sees, keys from `first` on."""
    queries = torch.arange(span.start, span.stop, device=device)[:, None]
    keys = torch.arange(first, span.stop, device=device)
    return (keys <= queries) & (keys > queries - window)
