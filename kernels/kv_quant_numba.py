"""Quantized blocks into bf16 tiles on one CPU core, in vectors of sixteen lanes (rans_simd.py). Arithmetic only.

Torch needs seven passes over memory for a block (unpack, widen, scale, add, round, copy into place); this needs one,
and takes a tenth of the time. Same bits as `kv_quant_reference.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import njit, types
from torch import Tensor

from kernels.kv_quant_reference import CODES_A_BYTE
from kernels.rans_simd import LANES, Lanes, Step, f32, i64, step, u16, u32


def can_fill(out: Tensor, kind: str) -> bool:
    """Whole vectors of codes, bf16, on the CPU."""
    width = CODES_A_BYTE[kind] * LANES
    return out.device.type == "cpu" and out.dtype == torch.bfloat16 and out.shape[-1] % width == 0


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
    """As `kv_quant.fill_tiles`; `scale` and `zero` are those of `blocks` alone."""
    _, num_heads, block_tokens, width = codes.shape
    run, scales, zeros = _FILL[kind, per_channel], scale.float(), scale if zero is None else zero.float()
    if kind == "int4" and per_channel:  # all even channels, then all odd ones: as they stand in a byte's nibbles
        scales, zeros = (x.unflatten(-1, (-1, 2)).transpose(-1, -2) for x in (scales, zeros))
    if kind == "fp8":
        steps = (1, 0, 0)
    else:
        steps = (out.shape[3], 0, 1) if per_channel else (block_tokens, 1, 0)
    run(
        out.view(torch.int16).numpy().reshape(-1).view(np.uint32 if kind == "int4" else np.uint16),
        codes.numpy().reshape(-1),
        scales.contiguous().numpy().reshape(-1),
        zeros.contiguous().numpy().reshape(-1),
        blocks.numpy(),
        places.numpy(),
        np.array([num_heads, block_tokens, width, out.shape[2] // block_tokens, *steps]),
    )


def _to_bf16(s: Step, values: Lanes) -> Lanes:
    """Finite float32 -> the upper halves of u32, rounded to the nearest, ties to even; lower halves not cleared."""
    wide = Lanes(s.builder, s.builder.bitcast(values.value, ir.VectorType(u32, LANES)))
    return wide + 0x7FFF + ((wide >> 16) & 1)


def _value(codes: Lanes, scale: Lanes, zero: Lanes) -> Lanes:
    return codes.to(f32, "uitofp").fmul(scale).fadd(zero)


def _store_pairs(s: Step, out, to, packed: Lanes, scales, zeros) -> None:
    """16 bytes of codes -> 32 neighbouring values, each pair one u32."""
    low = _to_bf16(s, _value(packed & 15, scales[0], zeros[0]))
    high = _to_bf16(s, _value(packed >> 4, scales[1], zeros[1]))
    s.store((low >> 16) | (high & 0xFFFF0000), out, to)


def _store_bytes(s: Step, out, to, value: Lanes) -> None:
    s.store((_to_bf16(s, value) >> 16).to(u16, "trunc"), out, to)


@step(types.void)
def _pairs_per_channel(s: Step, out, codes, scale, zero, at, to, group, width):
    """From `group` on: `width` even channels, then as many odd ones."""
    scales = [s.load(scale, group), s.load(scale, group, width)]
    zeros = [s.load(zero, group), s.load(zero, group, width)]
    _store_pairs(s, out, to, s.load(codes, at).to(u32, "zext"), scales, zeros)


@step(types.void)
def _pairs_per_token(s: Step, out, codes, scale, zero, at, to, group, width):
    one, other = s.spread(s.element(scale, group)), s.spread(s.element(zero, group))
    _store_pairs(s, out, to, s.load(codes, at).to(u32, "zext"), [one, one], [other, other])


@step(types.void)
def _bytes_per_channel(s: Step, out, codes, scale, zero, at, to, group, width):
    value = _value(s.load(codes, at).to(u32, "zext"), s.load(scale, group), s.load(zero, group))
    _store_bytes(s, out, to, value)


@step(types.void)
def _bytes_per_token(s: Step, out, codes, scale, zero, at, to, group, width):
    one, other = s.spread(s.element(scale, group)), s.spread(s.element(zero, group))
    _store_bytes(s, out, to, _value(s.load(codes, at).to(u32, "zext"), one, other))


def _store_quarters(s: Step, out, to, packed: Lanes, width, scales, zeros) -> None:
    """16 bytes of codes -> 16 neighbouring values in each quarter of a token's channels."""
    for i, (scale, zero) in enumerate(zip(scales, zeros, strict=True)):
        at = s.add(to, s.builder.mul(width, i64(i)))
        _store_bytes(s, out, at, _value((packed >> 2 * i) & 3, scale, zero))


@step(types.void)
def _quarters_per_channel(s: Step, out, codes, scale, zero, at, to, group, width):
    groups = [s.add(group, s.builder.mul(width, i64(i))) for i in range(4)]
    scales, zeros = [s.load(scale, at) for at in groups], [s.load(zero, at) for at in groups]
    _store_quarters(s, out, to, s.load(codes, at).to(u32, "zext"), width, scales, zeros)


@step(types.void)
def _quarters_per_token(s: Step, out, codes, scale, zero, at, to, group, width):
    one, other = s.spread(s.element(scale, group)), s.spread(s.element(zero, group))
    _store_quarters(s, out, to, s.load(codes, at).to(u32, "zext"), width, [one] * 4, [other] * 4)


@step(types.void)
def _fp8(s: Step, out, codes, scale, zero, at, to, group, width):
    """e4m3 without NaN. Its exponent and mantissa where float32 has them are the number times 2**-120, those of
    exponent 0 included; only the last product rounds."""
    code = s.load(codes, at).to(u32, "zext")
    bits = ((code & 0x7F) << 20) | ((code & 0x80) << 24)
    tiny = Lanes(s.builder, s.builder.bitcast(bits.value, ir.VectorType(f32, LANES)))
    _store_bytes(s, out, to, tiny.fmul(2.0**120).fmul(s.spread(s.element(scale, group))))


def _make_fill(store: Any, row_step: int = 1) -> Callable[..., None]:
    """`row_step`: elements of `out` that a token takes, over its bytes of codes."""

    @njit(nogil=True)
    def fill(out, codes, scale, zero, blocks, places, shape):
        num_heads, tokens, width, per_tile, block_step, token_step, code_step = shape
        for i in range(len(blocks)):
            tile, part = places[i] // per_tile, places[i] % per_tile
            for head in range(num_heads):
                at = (blocks[i] * num_heads + head) * tokens * width
                to = ((tile * num_heads + head) * per_tile + part) * tokens * width * row_step
                first = (i * num_heads + head) * block_step
                for token in range(tokens):
                    for column in range(0, width, LANES):
                        group = first + token * token_step + column * code_step
                        store(out, codes, scale, zero, at, to, group, width)
                        at += LANES
                        to += LANES
                    to += (row_step - 1) * width

    return fill


_fill_fp8 = _make_fill(_fp8)
_FILL = {
    ("int4", True): _make_fill(_pairs_per_channel),
    ("int4", False): _make_fill(_pairs_per_token),
    ("int2", True): _make_fill(_quarters_per_channel, 4),
    ("int2", False): _make_fill(_quarters_per_token, 4),
    ("int8", True): _make_fill(_bytes_per_channel),
    ("int8", False): _make_fill(_bytes_per_token),
    ("fp8", True): _fill_fp8,
    ("fp8", False): _fill_fp8,
}
