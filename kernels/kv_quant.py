"""Quantized KV blocks in torch: the fast twin of `kv_quant_reference.py`, which defines the format. Arithmetic only.

Bit for bit what the reference gives, on any device. On a CPU, `fill_tiles` hands bf16 integers to `kv_quant_numba`.

Shapes: `n` blocks of T tokens, `H` KV heads, `D` head dim, `Dc` bytes of its codes, `S = TILE_TOKENS`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels import kv_quant_numba
from kernels.attention import TILE_TOKENS
from kernels.kv_quant_reference import FP8_MAX, LEVELS

_HALF_MAX = 65504.0


def quantize_blocks(x: Tensor, kind: str, *, per_channel: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """`x` [n, T, H, D], finite -> codes uint8 [n, H, T, Dc], scale and zero float16 [n, H, D] with `per_channel` (keys)
    or [n, H, T] (values); fp8: scale float32 [n, H] and no zero."""
    heads = x.transpose(1, 2).to(torch.float32)
    if kind == "fp8":
        scale = heads.abs().amax((2, 3)) / FP8_MAX
        safe = torch.where(scale > 0, scale, 1.0)[:, :, None, None]
        return (heads / safe).to(torch.float8_e4m3fn).view(torch.uint8).contiguous(), scale, None
    levels, dim = LEVELS[kind], 2 if per_channel else 3
    low, high = heads.aminmax(dim=dim)
    zero = low.clamp(-_HALF_MAX, _HALF_MAX).half()
    scale = ((high - low) / levels).clamp(max=_HALF_MAX).half()
    wide = scale.float()
    wide = torch.where(wide > 0, wide, torch.inf)
    steps = (heads - zero.float().unsqueeze(dim)) / wide.unsqueeze(dim)
    codes = steps.round_().clamp_(0, levels).to(torch.uint8)
    if kind == "int4":
        codes = codes[..., 0::2] | (codes[..., 1::2] << 4)
    elif kind == "int2":
        first, second, third, fourth = codes.chunk(4, dim=-1)
        codes = first | (second << 2) | (third << 4) | (fourth << 6)
    return codes.contiguous(), scale, zero


def dequantize_blocks(codes: Tensor, scale: Tensor, zero: Tensor | None, kind: str, *, per_channel: bool) -> Tensor:
    """What `quantize_blocks` made -> [n, H, T, D] float32, not yet rounded to the model's dtype."""
    if kind == "fp8":
        return codes.view(torch.float8_e4m3fn).float().mul_(scale[:, :, None, None])
    assert zero is not None, f"{kind} has a zero"
    if kind == "int4":
        codes = torch.stack((codes & 15, codes >> 4), dim=-1).flatten(-2)
    elif kind == "int2":
        codes = torch.cat((codes & 3, codes >> 2 & 3, codes >> 4 & 3, codes >> 6), dim=-1)
    dim = 2 if per_channel else 3
    return torch.addcmul(zero.float().unsqueeze(dim), codes.float(), scale.float().unsqueeze(dim))


def fill_tiles(
    out: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    kind: str,
    blocks: Tensor,
    places: Tensor,
    *,
    per_channel: bool,
) -> None:
    """Dequantize blocks `blocks` [n] int64 of a layer's `codes` [num_blocks, H, T, Dc] into `out` [X, H, S, D], block
    i to tokens `places[i] * T ..` of the row of tiles (place = tile * S / T + block within the tile). Other tokens of
    `out` stay as they are. `blocks` and `places` on the CPU may be numpy-viewed; all on one device."""
    _, num_heads, block_tokens, _ = codes.shape
    assert out.is_contiguous() and out.shape[1:3] == (num_heads, TILE_TOKENS), out.shape
    if not len(blocks):
        return
    scale_n, zero_n = scale.index_select(0, blocks), None if zero is None else zero.index_select(0, blocks)
    if kv_quant_numba.can_fill(out, kind):
        kv_quant_numba.fill_tiles(out, codes, scale_n, zero_n, kind, blocks, places, per_channel=per_channel)
        return
    values = dequantize_blocks(codes.index_select(0, blocks), scale_n, zero_n, kind, per_channel=per_channel)
    per_tile = TILE_TOKENS // block_tokens
    slots = out.view(len(out), num_heads, per_tile, block_tokens, -1)
    slots[places // per_tile, :, places % per_tile] = values.to(out.dtype)
