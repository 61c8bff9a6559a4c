"""The tensors of quantized KV: pages of codes, and rings of recent tokens as the model computed them. Knows torch; no
model, no I/O; decides nothing.

Shapes: `L` layers, `H` KV heads, `D` head dim, `Dc` bytes of its codes, `S` = tile.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kernels import kv_quant
from kernels.attention import TILE_TOKENS
from prefill.kv_layout import KVLayout
from prefill.quantized_layout import (
    BLOCK_TOKENS,
    CODE_BITS,
    RING_TOKENS,
    LayerKind,
    PageMix,
    check_kind,
    uniform,
)
from prefill.quantized_rings import RecentRings

BLOCKS_PER_TILE = TILE_TOKENS // BLOCK_TOKENS


class QuantizedPages:
    """Keys or values of one layer. `codes` uint8 [num_blocks, H, 32, Dc]; `scale` and `zero` float16 [num_blocks, H, D]
    for keys, [num_blocks, H, 32] for values; fp8: `scale` float32 [num_blocks, H], no zero."""

    def __init__(
        self, num_blocks: int, num_heads: int, head_dim: int, kind: LayerKind, buffer: TileBuffer, *, is_keys: bool
    ) -> None:
        self.kind = kind
        self.is_keys = is_keys
        self._buffer = buffer
        shape, device = (num_blocks, num_heads), buffer.device
        width = head_dim * CODE_BITS[kind] // 8
        self.codes = torch.zeros(*shape, BLOCK_TOKENS, width, dtype=torch.uint8, device=device)
        self.zero: Tensor | None = None
        if kind == "fp8":
            self.scale = torch.zeros(shape, device=device)
        else:
            groups = (*shape, head_dim if is_keys else BLOCK_TOKENS)
            self.scale = torch.zeros(groups, dtype=torch.float16, device=device)
            self.zero = torch.zeros(groups, dtype=torch.float16, device=device)

    def tensors(self) -> list[Tensor]:
        """All that a block consists of, [num_blocks, ...] each."""
        return [x for x in (self.codes, self.scale, self.zero) if x is not None]

    def write(self, blocks: Tensor, x: Tensor) -> None:
        """`x` [n * 32, H, D] into blocks [n]."""
        parts = kv_quant.quantize_blocks(x.unflatten(0, (-1, BLOCK_TOKENS)), self.kind, per_channel=self.is_keys)
        for target, part in zip(self.tensors(), [part for part in parts if part is not None], strict=True):
            target.index_copy_(0, blocks, part)

    def read(self, blocks: Tensor, dtype: torch.dtype) -> Tensor:
        """[n * 32, H, D], dequantized."""
        codes, scale, *zero = (x.index_select(0, blocks) for x in self.tensors())
        values = kv_quant.dequantize_blocks(
            codes, scale, zero[0] if zero else None, self.kind, per_channel=self.is_keys
        )
        return values.to(dtype).transpose(1, 2).flatten(0, 1)

    def tiles(self, num_tiles: int, blocks: Tensor, places: Tensor) -> Tensor:
        """Blocks [n] at `places` [n] (tile * BLOCKS_PER_TILE + block in it) of tiles [num_tiles, H, S, D]; what stands
        at other places is finite. Valid until the next call of any layer."""
        out = self._buffer.take(num_tiles)
        kv_quant.fill_tiles(out, self.codes, self.scale, self.zero, self.kind, blocks, places, per_channel=self.is_keys)
        return out


class TileBuffer:
    """Memory for dequantized tiles, one for all layers: fresh memory would cost more in page faults than filling it.
    Holds finite numbers at any time, so that hidden tokens weigh 0 whatever they are."""

    def __init__(self, num_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device) -> None:
        self.device = device
        self._data = torch.zeros(0, num_heads, TILE_TOKENS, head_dim, dtype=dtype, device=device)

    def take(self, num_tiles: int) -> Tensor:
        if num_tiles > len(self._data):
            self._data = self._data.new_zeros(num_tiles, *self._data.shape[1:])
        return self._data[:num_tiles]


class RecentTokens:
    """Keys or values of the rings, `data` [L, (num_rings + 1) * 64, H, D] in the model's dtype: token `t` of a ring
    stands in row `ring * 64 + t % 64`. The last ring is nobody's and always zero: what is not written reads it."""

    def __init__(self, shape: tuple[int, int, int], head_dim: int, dtype: torch.dtype, device: torch.device) -> None:
        """`shape`: layers, rings, heads."""
        num_layers, num_rings, num_heads = shape
        rows = (num_rings + 1) * RING_TOKENS
        self.data = torch.zeros(num_layers, rows, num_heads, head_dim, dtype=dtype, device=device)
        self.null_row = num_rings * RING_TOKENS

    @property
    def num_bytes(self) -> int:
        """Without the ring of zeros."""
        return int(self.data.nbytes) // (self.null_row + RING_TOKENS) * self.null_row


class QuantizedStore:
    """Pages, rings and their bookkeeping, together: what attention and pool share. `k` and `v`: pages by layer."""

    def __init__(
        self,
        layout: KVLayout,
        num_blocks: int,
        kind: str,
        max_sequences: int,
        device: str | torch.device,
        mix: PageMix | None,
    ) -> None:
        assert num_blocks > 0 and max_sequences > 0, (num_blocks, max_sequences)
        self.kind = check_kind(layout, kind, mix)
        self.layout = layout
        self.device = torch.device(device)
        self.rings = RecentRings(max_sequences)
        dtype, heads = layout.torch_dtype, layout.num_kv_heads
        mix = mix or uniform(layout, self.kind)
        sides = []
        for is_keys, dim, kinds in ((True, layout.head_dim_k, mix.keys), (False, layout.head_dim_v, mix.values)):
            tiles = TileBuffer(heads, dim, dtype, self.device)
            sides.append([QuantizedPages(num_blocks, heads, dim, each, tiles, is_keys=is_keys) for each in kinds])
        self.k, self.v = sides
        recent = (layout.num_layers, max_sequences, heads)
        self.recent_k = RecentTokens(recent, layout.head_dim_k, dtype, self.device)
        self.recent_v = RecentTokens(recent, layout.head_dim_v, dtype, self.device)
        nothing = torch.zeros(1, dtype=torch.int64, device=self.device)
        for pages in {(each.kind, each.is_keys): each for each in (*self.k, *self.v)}.values():
            pages.tiles(1, nothing, nothing)  # compiles what is compiled on a CPU: never in a request

    def tensors(self) -> list[Tensor]:
        """All that blocks consist of, in all layers, [num_blocks, ...] each."""
        return [x for pages in (*self.k, *self.v) for x in pages.tensors()]

    def rows(self, ring: int, start: int, stop: int) -> Tensor:
        """Where tokens `start .. stop` of a ring stand, [stop - start] int64."""
        assert stop - start <= RING_TOKENS, (start, stop)
        return torch.arange(start, stop, device=self.device) % RING_TOKENS + ring * RING_TOKENS

    def blocks(self, block_table: Sequence[int], start: int, stop: int) -> Tensor:
        """The blocks of tokens `start .. stop`, multiples of 32, [n] int64."""
        assert start % BLOCK_TOKENS == stop % BLOCK_TOKENS == 0, (start, stop)
        first, last = start // BLOCK_TOKENS, stop // BLOCK_TOKENS
        assert last <= len(block_table), (
            f"{last} blocks are needed for {stop} tokens, and the table has {len(block_table)}"
        )
        return torch.tensor(block_table[first:last], dtype=torch.int64, device=self.device)
