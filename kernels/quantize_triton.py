"""What lies between bf16 rows and the coder's integers, in Triton: both directions, and histograms.

- quantize: bf16 rows -> undo RoPE, centre, [matrix], round to steps: int32 of the finest stage. Bits are those of the
  CPU's coder, so launch with FUSION_OFF: SPEC.md forbids fused multiply-add, and a matrix's sums go in order.
- histogram: counts per channel of the coarsest stage's integers, for the choice of tables.
- synthesize: what the decode kernel left in MODE_ROWS -> steps, [matrix], mean, RoPE, bf16 rows. A matrix's sums may go
  in any order here, so they go to the tensor cores (3 x tf32); IS_ORDERED gives the CPU's very bits, more slowly.

Legend: S segments, T tokens, D channels (BLOCK_D: the next power of two), R half the rotary dims, J jobs, P matrices.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

FUSION_OFF: dict[str, Any] = {"enable_fp_fusion": False}
MAX_MAGNITUDE = tl.constexpr(1 << 20)
HISTOGRAM = tl.constexpr(257)  # values -128 to 127, and all others
ROUND = tl.constexpr(12582912.0)  # 1.5 * 2^23: adding and taking it away rounds |x| < 2^22 half to even


@triton.jit
def _from_bf16(bits):
    """int16 bf16 patterns -> float32."""
    return (bits.to(tl.int32) << 16).to(tl.float32, bitcast=True)


@triton.jit
def _to_bf16(x):
    """float32 (finite) -> int16 bf16 patterns, to nearest even."""
    bits = x.to(tl.int32, bitcast=True)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).to(tl.int16)


@triton.jit
def _nearest_third(q):
    """floor((q + 1) / 3) for |q| <= 2^20."""
    return (q + 1 + 3 * MAX_MAGNITUDE) // 3 - MAX_MAGNITUDE


@triton.jit
def _centred(src, base, stride_t, token, t_mask, d, d_mask, cos, sin, mean, half, num_angles):
    """Channels d of tokens `token` (two shapes that broadcast): unrotated, less the mean."""
    mask = t_mask & d_mask
    x = _from_bf16(tl.load(src + base + token * stride_t + d, mask=mask, other=0))
    if num_angles > 0:
        is_first = d < half
        pair = tl.where(is_first, d + half, d - half)
        turns = mask & (d < 2 * half)
        other = _from_bf16(tl.load(src + base + token * stride_t + pair, mask=turns, other=0))
        at = token * num_angles + tl.minimum(d, pair)
        c = tl.load(cos + at, mask=turns, other=1.0)
        s = tl.load(sin + at, mask=turns, other=0.0)
        along = x * c
        across = other * s
        x = tl.where(d < 2 * half, tl.where(is_first, along + across, along - across), x)
    return x - tl.load(mean + d, mask=d_mask, other=0.0)


@triton.jit
def quantize_kernel(
    src, src_pos, stride_t, cos, sin, half_dims, mean, inv_step, matrix, analysis, q, flags,
    num_tokens, num_angles, num_dims: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """src int16 [*]: bf16 patterns, segment s's row t at src_pos[s] + t * stride_t. cos, sin [T, R]: inverse tables.
    half_dims i32 [S]: R where the segment is to be unrotated, else 0. mean, inv_step f32 [S, D]. matrix i32 [S]: which
    of analysis f32 [P, D, D], or -1. -> q i32 [S, T, D] of the finest stage; flags i32 [S, blocks]: 1 if a value is
    not finite or beyond 2^20 steps. Grid: (S, blocks of BLOCK_T tokens)."""
    s = tl.program_id(0)
    block = tl.program_id(1)
    token = (block * BLOCK_T + tl.arange(0, BLOCK_T))[:, None]
    t_mask = token < num_tokens
    d = tl.arange(0, BLOCK_D)[None, :]
    d_mask = d < num_dims
    base = tl.load(src_pos + s)
    half = tl.load(half_dims + s)
    which = tl.load(matrix + s)
    angles = tl.where(half > 0, num_angles, 0)
    row = s.to(tl.int64) * num_dims
    if which < 0:
        y = _centred(src, base, stride_t, token, t_mask, d, d_mask, cos, sin, mean + row, half, angles)
    else:
        y = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
        entries = analysis + which.to(tl.int64) * num_dims * num_dims
        for i in range(num_dims):
            column = _centred(
                src, base, stride_t, token, t_mask, tl.full((1, 1), i, tl.int32), tl.full((1, 1), 1, tl.int1),
                cos, sin, mean + row, half, angles,
            )  # fmt: skip
            y += column * tl.load(entries + i * num_dims + d, mask=d_mask, other=0.0)
    z = y * tl.load(inv_step + row + d, mask=d_mask, other=0.0)
    rounded = (z + ROUND) - ROUND
    is_good = (tl.abs(z) <= 2 * MAX_MAGNITUDE) & (tl.abs(rounded) <= MAX_MAGNITUDE)  # False for NaN
    mask = t_mask & d_mask
    tl.store(q + row * num_tokens + token * num_dims + d, tl.where(is_good, rounded, 0.0).to(tl.int32), mask=mask)
    bad = tl.where(mask & (is_good == 0), 1, 0)
    tl.store(flags + s * tl.num_programs(1) + block, tl.max(tl.max(bad, axis=1), axis=0))


@triton.jit
def histogram_kernel(
    q, group, counts, num_tokens, coarser, num_dims: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr
):
    """q i32 [S, T, D]; group i32 [S]: anchor groups, 0 none; coarser: thirds to take first. -> counts i32
    [S, 2, D, 257] (zeros before) of what stage 0 codes: [:, 0] anchors and plain tokens, [:, 1] deltas. Grid:
    (S, blocks)."""
    s = tl.program_id(0).to(tl.int64)
    token = (tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T))[:, None]
    d = tl.arange(0, BLOCK_D)[None, :]
    mask = (token < num_tokens) & (d < num_dims)
    size = tl.load(group + s)
    phase = tl.where(size > 0, token % tl.maximum(size, 1), 0)
    rows = q + s * num_tokens * num_dims + d
    value = tl.load(rows + token * num_dims, mask=mask, other=0)
    anchor = tl.load(rows + (token - phase) * num_dims, mask=mask & (phase > 0), other=0)
    for _ in range(coarser):
        value = _nearest_third(value)
        anchor = _nearest_third(anchor)
    at = value - anchor + 128
    at = tl.where((at < 0) | (at > 255), HISTOGRAM - 1, at)
    kind = tl.where(phase > 0, num_dims, 0)
    tl.atomic_add(counts + (s * 2 * num_dims + kind + d) * HISTOGRAM + at, tl.full(at.shape, 1, tl.int32), mask=mask)


@triton.jit
def _scratch_at(token, d, quads, lanes: tl.constexpr):
    """Where the decode kernel left channel d of a token, in 32-bit words: [T, quads, 2, N, 2] (rans_decode_cuda.py)."""
    run = d // lanes
    quad = run // 4
    return ((token * quads + quad) * 2 + (run // 2) % 2) * (2 * lanes) + (d % lanes) * 2 + run % 2


@triton.jit
def _values(
    ints, at, token, t_mask, first: tl.constexpr, count: tl.constexpr, step, mean, multiplier, entries,
    quads, num_dims: tl.constexpr, lanes: tl.constexpr, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr,
    HAS_MATRIX: tl.constexpr, IS_ORDERED: tl.constexpr,
):  # fmt: skip
    """Channels first to first + count - 1 of the decoded rows, before RoPE: float32 [BLOCK_T, BLOCK]."""
    d = first + tl.arange(0, BLOCK)[None, :]
    d_mask = tl.arange(0, BLOCK)[None, :] < count
    if HAS_MATRIX:
        if IS_ORDERED:
            x = tl.zeros((token.shape[0], BLOCK), tl.float32)
            for j in range(num_dims):
                n = tl.load(ints + at + _scratch_at(token, j, quads, lanes), mask=t_mask, other=0)
                y = (n * multiplier).to(tl.float32) * tl.load(step + j)
                x += y * tl.load(entries + j * num_dims + d, mask=d_mask, other=0.0)
        else:
            x = tl.zeros((token.shape[0], BLOCK), tl.float32)
            for first_j in range(0, num_dims, BLOCK_K):
                j = first_j + tl.arange(0, BLOCK_K)
                j_mask = j < num_dims
                n = tl.load(
                    ints + at + _scratch_at(token, j[None, :], quads, lanes), mask=t_mask & j_mask[None, :], other=0
                )
                y = (n * multiplier).to(tl.float32) * tl.load(step + j, mask=j_mask, other=0.0)[None, :]
                m = tl.load(entries + j[:, None] * num_dims + d, mask=j_mask[:, None] & d_mask, other=0.0)
                x = tl.dot(y, m, x, input_precision="tf32x3")
    else:
        n = tl.load(ints + at + _scratch_at(token, d, quads, lanes), mask=t_mask & d_mask, other=0)
        x = (n * multiplier).to(tl.float32) * tl.load(step + d, mask=d_mask, other=0.0)
    return x + tl.load(mean + d, mask=d_mask, other=0.0)


@triton.jit
def synthesize_kernel(
    ints, jobs, out_pos, scratch_pos, matrix, step, mean, synthesis, cos, sin, row_pos, out, num_angles,
    num_dims: tl.constexpr, lanes: tl.constexpr, half: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_HALF: tl.constexpr, BLOCK_REST: tl.constexpr, HAS_MATRIX: tl.constexpr, IS_ORDERED: tl.constexpr,
):  # fmt: skip
    """ints i32 [*]: the decoder's scratch. jobs i32 [J, 4]: row, first token, tokens, multiplier; all of one kind:
    with or without a matrix, rotated (half > 0) or not. out_pos, scratch_pos i64 [J] (the latter in 64-bit words).
    matrix i32 [P]. step, mean f32 [rows, D]. synthesis f32 [P, D, D]. cos, sin f32 [tokens, R]. row_pos i64 [tokens].
    -> out int16 [*]: bf16 patterns. Grid: (J, blocks of BLOCK_T tokens)."""
    job = tl.program_id(0)
    row = tl.load(jobs + job * 4).to(tl.int64)
    first_token = tl.load(jobs + job * 4 + 1).to(tl.int64)
    num_tokens = tl.load(jobs + job * 4 + 2)
    multiplier = tl.load(jobs + job * 4 + 3)
    quads = (num_dims + 4 * lanes - 1) // (4 * lanes)
    token = (tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T))[:, None]
    t_mask = token < num_tokens
    at = 2 * tl.load(scratch_pos + job)
    entries = synthesis
    if HAS_MATRIX:
        entries = synthesis + tl.load(matrix + row).to(tl.int64) * num_dims * num_dims
    rows = tl.load(row_pos + first_token + token, mask=t_mask, other=0) + tl.load(out_pos + job)
    steps = step + row * num_dims
    means = mean + row * num_dims
    if half > 0:
        a = _values(
            ints, at, token, t_mask, 0, half, steps, means, multiplier, entries, quads, num_dims, lanes, BLOCK_HALF,
            BLOCK_K, HAS_MATRIX, IS_ORDERED,
        )  # fmt: skip
        b = _values(
            ints, at, token, t_mask, half, half, steps, means, multiplier, entries, quads, num_dims, lanes, BLOCK_HALF,
            BLOCK_K, HAS_MATRIX, IS_ORDERED,
        )  # fmt: skip
        d = tl.arange(0, BLOCK_HALF)[None, :]
        mask = t_mask & (d < half)
        c = tl.load(cos + (first_token + token) * num_angles + d, mask=mask, other=1.0)
        s = tl.load(sin + (first_token + token) * num_angles + d, mask=mask, other=0.0)
        tl.store(out + rows + d, _to_bf16(a * c - b * s), mask=mask)
        tl.store(out + rows + half + d, _to_bf16(b * c + a * s), mask=mask)
    if num_dims > 2 * half:
        rest = num_dims - 2 * half
        x = _values(
            ints, at, token, t_mask, 2 * half, rest, steps, means, multiplier, entries, quads, num_dims, lanes,
            BLOCK_REST, BLOCK_K, HAS_MATRIX, IS_ORDERED,
        )  # fmt: skip
        d = tl.arange(0, BLOCK_REST)[None, :]
        tl.store(out + rows + 2 * half + d, _to_bf16(x), mask=t_mask & (d < rest))


def block_of(size: int) -> int:
    """The power of two that covers `size` channels, at least what a matrix unit takes."""
    return max(16, triton.next_power_of_2(size))
