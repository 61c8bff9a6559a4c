"""Attention over pages of bf16 or float32 on the CPU, by the kernel in kernels/attention_numba.py: no copies of tiles,
no passes over scores. Knows torch and numpy.

`CpuAttention` belongs to a pool, for its life: views of the pages, threads and their memory. `CpuBatch` is one pass.

Shapes: `N` packed rows, `Hq` query heads, `H` KV heads, `G = Hq / H`, `D`/`Dv` head dims.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import chain
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kernels.attention_numba import (
    CALL,
    ITEM_FIELDS,
    MAX_ROWS,
    attention_thread,
    has_bf16_products,
    scratch_bytes,
    store_tokens,
)
from kernels.openmp import run_on_threads
from prefill.attention import AttentionRule, Pages, Span
from prefill.kv_layout import KVLayout

# Query rows times keys below which waking a second thread takes longer than it saves: some 0.1 ms of one thread.
MIN_SHARED_WORK = 1 << 14


def can_attend(layout: KVLayout, device: torch.device) -> bool:
    """Whether the kernel is built for such pages."""
    return device.type == "cpu" and layout.torch_dtype in (torch.bfloat16, torch.float32) and layout.head_dim_k % 2 == 0


class CpuAttention:
    """Not thread-safe, like the engine it works for. `paired`: multiply pairs of bf16 where the CPU can (a test may
    forbid it)."""

    def __init__(self, pool: Pages, *, paired: bool = True) -> None:
        layout = pool.layout
        assert can_attend(layout, pool.device), layout
        self._pool = pool
        self._paired = paired and layout.torch_dtype == torch.bfloat16 and has_bf16_products()
        self._layers = [tuple(_flat(side) for side in pool.layer_slots(i)) for i in range(layout.num_layers)]
        dims = {"dim_k": layout.head_dim_k, "dim_v": layout.head_dim_v}
        self._thread = attention_thread(is_bf16=layout.torch_dtype == torch.bfloat16, paired=self._paired)
        self._call = np.zeros((), CALL)
        for name, value in dims.items():
            self._call[name] = value
        self._call["block_tokens"], self._call["null_slot"] = pool.block_tokens, pool.null_slot
        self._call["num_kv_heads"] = layout.num_kv_heads
        self._call["scratch_bytes"] = scratch_bytes(paired=self._paired, **dims)
        self._call_address = int(self._call.ctypes.data)
        self._counters = np.zeros(2, np.int64)
        self._call["counter"] = self._counters.ctypes.data
        self._call["threads"] = self._counters[1:].ctypes.data
        self._page_addresses = [tuple(int(side.ctypes.data) for side in pages) for pages in self._layers]
        self._rules: dict[AttentionRule, NDArray[np.float32]] = {}
        self._scratch = torch.empty(0, dtype=torch.uint8)
        self._compile_store()

    def batch(self, spans: Sequence[Span]) -> CpuBatch:
        return CpuBatch(self, self._pool, spans)

    def store(self, layer: int, k: Tensor, v: Tensor, slots: NDArray[np.int64]) -> None:
        """`k` [N, H, D], `v` [N, H, Dv]: the first rows go to the slots."""
        for side, pages in zip((k, v), self._layers[layer], strict=True):
            store_tokens(_flat(side), slots, side.shape[1] * side.shape[2], pages)

    def attend(self, layer: int, q: Tensor, rule: AttentionRule, items: Items) -> Tensor:
        """`q` [N, Hq, D] -> [N, Hq, Dv]; rows of no item are left as they are."""
        num_rows, num_heads, _ = q.shape
        layout, call = self._pool.layout, self._call
        out = torch.empty(num_rows, num_heads, layout.head_dim_v, dtype=q.dtype)
        words = self._words(q)
        threads = min(torch.get_num_threads(), items.count) if items.work >= MIN_SHARED_WORK else 1
        call["items"], call["num_items"], call["tables"] = items.address, items.count, items.tables_address
        call["k_pages"], call["v_pages"] = self._page_addresses[layer]
        call["queries"], call["out"] = words.data_ptr(), out.data_ptr()
        call["rule"], call["is_capped"] = self._factors(rule), bool(rule.softcap)
        call["window"], call["group"] = rule.window or 0, num_heads // layout.num_kv_heads
        call["scratch"] = self._scratch_for(threads)
        self._counters[:] = 0
        run_on_threads(self._thread, self._call_address, threads)
        return out

    def _factors(self, rule: AttentionRule) -> int:
        """The address of what scores are multiplied with."""
        found = self._rules.get(rule)
        if found is None:
            cap = rule.softcap or 0.0
            factors = [rule.scale * _LOG2_E, rule.scale / cap if cap else 0.0, cap * _LOG2_E]
            found = self._rules[rule] = np.array(factors, np.float32)
        return int(found.ctypes.data)

    def _scratch_for(self, threads: int) -> int:
        """The address of memory for so many threads."""
        needed = threads * int(self._call["scratch_bytes"]) + _LINE_BYTES
        if len(self._scratch) < needed:
            self._scratch = torch.empty(needed, dtype=torch.uint8)
        return -(-self._scratch.data_ptr() // _LINE_BYTES) * _LINE_BYTES

    def _words(self, q: Tensor) -> Tensor:
        return q.contiguous() if self._paired else q.float().contiguous()

    def _compile_store(self) -> None:
        """Compile it, or read it from numba's cache, before the first pass."""
        layout = self._pool.layout
        k, v = (
            torch.zeros(0, layout.num_kv_heads, dim, dtype=layout.torch_dtype)
            for dim in (layout.head_dim_k, layout.head_dim_v)
        )
        self.store(0, k, v, np.zeros(0, np.int64))


class CpuBatch:
    """One forward pass over the pages (prefill/attention.py: Batch)."""

    def __init__(self, attention: CpuAttention, pool: Pages, spans: Sequence[Span]) -> None:
        self._attention = attention
        self._num_rows = sum(span.num_tokens for span in spans)
        self._tables = np.fromiter(chain.from_iterable(span.block_table for span in spans), np.int32)
        starts = np.cumsum([0, *(len(span.block_table) for span in spans)])
        self._slots = np.empty(self._num_rows, np.int64)
        for span, start in zip(spans, starts, strict=False):
            positions = np.arange(span.start, span.stop)
            blocks = self._tables[start + positions // pool.block_tokens]
            rows = slice(span.row, span.row + span.num_tokens)
            self._slots[rows] = blocks * np.int64(pool.block_tokens) + positions % pool.block_tokens
        self._spans = [(span, int(start)) for span, start in zip(spans, starts, strict=False)]
        self._items: Items | None = None

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, rule: AttentionRule) -> Tensor:
        q, k, v = (x[0].transpose(0, 1) for x in (q, k, v))
        if self._items is None:
            self._items = Items(self._spans, self._tables, q.shape[1] // k.shape[1], k.shape[1])
        self._attention.store(layer, k, v, self._slots)
        out = self._attention.attend(layer, q, rule, self._items)
        if len(out) > self._num_rows:
            out[self._num_rows :] = 0
        return out[None]


class Items:
    """What the threads take one by one, the longest first so that they end together: some rows of a sequence and one
    of its KV heads. `work`: query rows times keys."""

    def __init__(
        self, spans: Sequence[tuple[Span, int]], tables: NDArray[np.int32], group: int, num_kv_heads: int
    ) -> None:
        tokens = MAX_ROWS // group
        assert tokens, f"{group} query heads share a KV head: more than {MAX_ROWS}"
        items, costs = [], []
        for span, table_start in spans:
            for first in range(0, span.num_tokens, tokens):
                count = min(tokens, span.num_tokens - first)
                for head in range(num_kv_heads):
                    items.append((table_start, span.start + first, span.row + first, count, head))
                    costs.append(count * group * (span.start + first + count))
        order = np.argsort(-np.array(costs, np.int64), kind="stable")
        self._items = np.array(items, np.int64).reshape(-1, ITEM_FIELDS)[order]
        self._tables = tables
        self.count, self.work = len(items), sum(costs)
        self.address, self.tables_address = int(self._items.ctypes.data), int(tables.ctypes.data)


def _flat(x: Tensor) -> NDArray[Any]:
    """All elements in one row; bf16 as u16."""
    x = x.contiguous()
    return (x.view(torch.uint16) if x.dtype == torch.bfloat16 else x).numpy().reshape(-1)


_LINE_BYTES = 64
_LOG2_E = math.log2(math.e)
