"""The tensors of the paged KV pool, and copies in and out through block tables. Knows torch; no model, no I/O.

Layout: `k` [L, num_blocks, block_tokens, H, Dk], `v` likewise with Dv. Token `t` of a sequence lives in block
`table[t // block_tokens]` at offset `t % block_tokens`; `slot = block * block_tokens + offset`.
One block more than stated is kept behind the others. It always holds zeros; attention reads it for positions that
are not written, so that what a page held before can never reach another sequence (0 * NaN is NaN).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from prefill.attention import Batch, Span
from prefill.block_pool import blocks_for
from prefill.compute_device import completes
from prefill.cpu_attention import CpuAttention, can_attend
from prefill.kv_layout import KVLayout
from prefill.tiled_attention import TiledBatch

if TYPE_CHECKING:
    from prefill.cuda_attention import CudaPages


class KVPool:
    def __init__(
        self,
        layout: KVLayout,
        num_blocks: int,
        block_tokens: int = 16,
        device: str | torch.device = "cpu",
        *,
        gpu_kernels: bool | None = None,
    ) -> None:
        """`gpu_kernels`: whether batches attend by the kernels for GPUs. None: where the device is one; true elsewhere
        needs Triton's interpreter."""
        assert num_blocks > 0 and block_tokens > 0, (num_blocks, block_tokens)
        self.layout = layout
        self.num_blocks = num_blocks
        self.block_tokens = block_tokens
        self.device = torch.device(device)
        shape = (layout.num_layers, num_blocks + 1, block_tokens, layout.num_kv_heads)
        dtype = layout.torch_dtype
        self._k_all = torch.zeros(*shape, layout.head_dim_k, dtype=dtype, device=self.device)
        self._v_all = torch.zeros(*shape, layout.head_dim_v, dtype=dtype, device=self.device)
        self.k = self._k_all[:, :num_blocks]
        self.v = self._v_all[:, :num_blocks]
        self.null_slot = num_blocks * block_tokens
        self._cpu_attention: CpuAttention | None = None
        self.decode_pages: CudaPages | None = None
        if gpu_kernels or (gpu_kernels is None and self.device.type == "cuda"):
            from prefill.cuda_attention import CudaPages  # brings Triton along

            self.decode_pages = CudaPages(self)

    @property
    def num_bytes(self) -> int:
        return self.num_blocks * self.block_tokens * self.layout.bytes_per_token

    @property
    def bytes_per_token(self) -> float:
        return self.layout.bytes_per_token

    def blocks_for(self, num_tokens: int) -> int:
        """How many blocks the table of a sequence of so many tokens needs."""
        return blocks_for(num_tokens, self.block_tokens)

    def begin_sequence(self) -> None:
        """A sequence has nothing here but its blocks; in quantized pages it has a ring."""

    def end_sequence(self, ring: int | None) -> None:
        assert ring is None, ring

    @property
    def uses_torch_products(self) -> bool:
        """Whether attention's sums are torch's, whose order may depend on the number of rows."""
        return self.decode_pages is None and not can_attend(self.layout, self.device)

    def make_batch(self, spans: Sequence[Span], row_multiple: int = 1) -> Batch:
        """What one forward pass hands to every layer. The first one compiles the kernel, if it was never compiled on
        this machine: some seconds."""
        if self.decode_pages is not None:
            return self.decode_pages.batch(spans, row_multiple)
        if self.uses_torch_products:
            return TiledBatch(self, spans, row_multiple)
        if self._cpu_attention is None:
            self._cpu_attention = CpuAttention(self)
        return self._cpu_attention.batch(spans)

    def layer_slots(self, layer: int) -> tuple[Tensor, Tensor]:
        """One layer's keys and values as [num_slots, H, D] views, the null block's slots last."""
        return self._k_all[layer].flatten(0, 1), self._v_all[layer].flatten(0, 1)

    def slots(self, block_table: Sequence[int], start: int, stop: int) -> Tensor:
        """The slots of tokens `start..stop` [T] int64, on the CPU."""
        assert 0 <= start <= stop <= len(block_table) * self.block_tokens, (start, stop, len(block_table))
        first = start // self.block_tokens
        blocks = torch.tensor(block_table[first : -(-stop // self.block_tokens)], dtype=torch.int64)
        offsets = torch.arange(self.block_tokens)
        slots = (blocks[:, None] * self.block_tokens + offsets).flatten()
        return slots[start - first * self.block_tokens : stop - first * self.block_tokens]

    def view(self, block_table: Sequence[int], start: int, stop: int) -> tuple[Tensor, Tensor] | None:
        """Tokens `start..stop` as [L, T, H, D] views of the pages themselves, or None where the blocks are not
        neighbours in memory. A codec that decodes into these has written the pages."""
        assert 0 <= start < stop <= len(block_table) * self.block_tokens, (start, stop, len(block_table))
        first, last = start // self.block_tokens, (stop - 1) // self.block_tokens
        base = block_table[first]
        if any(block_table[first + i] != base + i for i in range(last - first + 1)):
            return None
        at = base * self.block_tokens + start - first * self.block_tokens
        return (
            self._k_all.flatten(1, 2)[:, at : at + stop - start],
            self._v_all.flatten(1, 2)[:, at : at + stop - start],
        )

    @completes
    def write(self, block_table: Sequence[int], start: int, k: Tensor, v: Tensor) -> None:
        """Copy `k` [L, T, H, Dk], `v` [L, T, H, Dv] to tokens `start..start + T`."""
        stop = start + k.shape[1]
        pages = self.view(block_table, start, stop)
        if pages is not None:
            pages[0].copy_(k)
            pages[1].copy_(v)
            return
        slots = self.slots(block_table, start, stop).to(self.device)
        self._k_all.flatten(1, 2).index_copy_(1, slots, k.to(self.k))
        self._v_all.flatten(1, 2).index_copy_(1, slots, v.to(self.v))

    @completes
    def read(self, block_table: Sequence[int], start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Copies of tokens `start..stop`: [L, T, H, Dk], [L, T, H, Dv]."""
        pages = self.view(block_table, start, stop)
        if pages is not None:
            return pages[0].clone(), pages[1].clone()
        slots = self.slots(block_table, start, stop).to(self.device)
        return self._k_all.flatten(1, 2).index_select(1, slots), self._v_all.flatten(1, 2).index_select(1, slots)
