"""Quantized KV blocks as one reads them: the specification of `kernels/kv_quant.py`, in numpy. Arithmetic only; slow.

The layout is KIVI's (Liu et al., arXiv:2402.02750): keys share a scale per channel over a block's tokens, because a few
channels of keys are large for every token; values share one per token. A *group* is what shares a scale and a zero.

Integers (int8, int4, int2; `levels` = 255, 15, 3), for the float32 values x of a group:

    zero  = float16(min x)
    scale = float16((max x - min x) / levels)                        the division in float32
    code  = clamp(round_half_even((x - zero) / scale), 0, levels)    in float32; 0 where scale is 0
    value = code * scale + zero                                      in float32, then rounded to the model's dtype

`code * scale` is exact in float32 (8 bits times 11), so a fused multiply-add gives the same bits: every machine reads
the same values. Zero and scale are clamped to what float16 can hold (65,504); a group that spans less than about 1e-6
becomes constant. int4 puts channels 2c and 2c + 1 into byte c, the even one in the low nibble; int2 puts channels c,
c + D/4, c + D/2 and c + 3D/4 into byte c, the first in the lowest bits.

Floats (fp8): OCP e4m3 (1 sign, 4 exponent, 3 mantissa bits, largest 448, no infinities), one scale for all tokens and
channels of a head in a block: scale = float32(max |x| / 448), code = e4m3(x / scale), value = e4m3(code) * scale.

Shapes: T tokens of a block, H heads, D head dim.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

LEVELS = {"int8": 255, "int4": 15, "int2": 3}
CODES_A_BYTE = {"int8": 1, "int4": 2, "int2": 4, "fp8": 1}
FP8_MAX = 448.0
_HALF_MAX = 65504.0
Floats = NDArray[np.float32]


class Quantized(NamedTuple):
    """`codes` uint8 [H, T, Dc]. Keys: `scale`, `zero` float16 [H, D]; values: [H, T];
    fp8: `scale` float32 [H], no zero."""

    codes: NDArray[np.uint8]
    scale: NDArray[np.generic]
    zero: NDArray[np.float16] | None


def quantize_block(x: Floats, kind: str, *, per_channel: bool) -> Quantized:
    """One block `x` [T, H, D], finite. `per_channel`: a group is a channel (keys), else a token (values)."""
    heads = np.ascontiguousarray(x.astype(np.float32).transpose(1, 0, 2))
    if kind == "fp8":
        scale = np.abs(heads).max(axis=(1, 2)) / np.float32(FP8_MAX)
        safe = np.where(scale > 0, scale, np.float32(1))
        return Quantized(fp8_encode(heads / safe[:, None, None]), scale, None)
    levels = np.float32(LEVELS[kind])
    axis = 1 if per_channel else 2
    low, high = heads.min(axis=axis), heads.max(axis=axis)
    zero = np.clip(low, -_HALF_MAX, _HALF_MAX).astype(np.float16)
    scale = np.clip((high - low) / levels, 0, _HALF_MAX).astype(np.float16)
    wide_zero = np.expand_dims(zero.astype(np.float32), axis)
    wide_scale = np.expand_dims(scale.astype(np.float32), axis)
    steps = (heads - wide_zero) / np.where(wide_scale > 0, wide_scale, np.float32(np.inf))
    codes = np.clip(np.rint(steps), 0, levels).astype(np.uint8)
    return Quantized(pack(codes, kind), scale, zero)


def dequantize_block(block: Quantized, kind: str, *, per_channel: bool) -> Floats:
    """[T, H, D] float32, not yet rounded to the model's dtype."""
    if kind == "fp8":
        out = fp8_decode(block.codes) * block.scale.astype(np.float32)[:, None, None]
        return np.ascontiguousarray(out.transpose(1, 0, 2), dtype=np.float32)
    assert block.zero is not None, f"{kind} has a zero"
    codes = unpack(block.codes, kind)
    axis = 1 if per_channel else 2
    scale = np.expand_dims(block.scale.astype(np.float32), axis)
    zero = np.expand_dims(block.zero.astype(np.float32), axis)
    out = codes.astype(np.float32) * scale + zero
    return np.ascontiguousarray(out.transpose(1, 0, 2), dtype=np.float32)


def pack(codes: NDArray[np.uint8], kind: str) -> NDArray[np.uint8]:
    """[..., D] of 0 .. levels -> [..., Dc]."""
    if kind == "int4":
        return codes[..., 0::2] | (codes[..., 1::2] << 4)
    if kind == "int2":
        first, second, third, fourth = np.split(codes, 4, axis=-1)
        return first | (second << 2) | (third << 4) | (fourth << 6)
    return codes


def unpack(packed: NDArray[np.uint8], kind: str) -> NDArray[np.uint8]:
    """[..., Dc] -> [..., D] of 0 .. levels."""
    if kind == "int4":
        return np.stack([packed & 15, packed >> 4], axis=-1).reshape(*packed.shape[:-1], -1)
    if kind == "int2":
        return np.concatenate([packed & 3, packed >> 2 & 3, packed >> 4 & 3, packed >> 6], axis=-1)
    return packed


def fp8_decode(codes: NDArray[np.uint8]) -> Floats:
    """e4m3 -> float32. 0x7f and 0xff are NaN."""
    sign = np.where(codes & 0x80, np.float32(-1), np.float32(1))
    exponent, mantissa = ((codes >> 3) & 15).astype(np.int32), (codes & 7).astype(np.float32)
    small = mantissa * np.float32(2.0**-9)  # exponent 0: no hidden one
    normal = np.ldexp(np.float32(1) + mantissa / np.float32(8), exponent - 7).astype(np.float32)
    value = np.where(exponent == 0, small, normal)
    return (sign * np.where((codes & 0x7F) == 0x7F, np.float32(np.nan), value)).astype(np.float32)


def fp8_encode(x: Floats) -> NDArray[np.uint8]:
    """float32 -> e4m3, to the nearest, ties to the even code; |x| up to 448 and its rounding range, else NaN."""
    magnitudes = fp8_decode(np.arange(127, dtype=np.uint8)).astype(np.float64)  # ascending
    wide = np.abs(x.astype(np.float64))
    above = np.clip(np.searchsorted(magnitudes, wide), 1, 126)
    to_low, to_high = wide - magnitudes[above - 1], magnitudes[above] - wide
    odd_low = (above - 1) % 2 == 1
    codes = np.where((to_high < to_low) | ((to_high == to_low) & odd_low), above, above - 1)
    codes = np.where(wide > 464.0, 127, codes)  # past the middle between 448 and what would be 480
    return (codes | np.where(np.signbit(x), 0x80, 0)).astype(np.uint8)
