"""Attention of decode rows over quantized pages, in Triton: int4, int8 and fp8; and blocks that leave a ring of recent
tokens to codes. `paged_attention_triton.py` explains splits, `kv_quant_reference.py` defines the format.

- Keys: k = code * scale + zero, a scale for each channel and block of 32. The product with the query is taken with the
  codes as they are, and the scales go into the query: q . k = (q * scale) . code + q . zero. A tensor core takes 16
  rows at least; the G queries are in them once for each block of the tile, with that block's scales.
- Values: the scale of a token goes into its weight.
- Codes are read as words of 16 bits, so that the matrix instructions' own loads can transpose them. A *plane* is the
  nth channel of every word; its product is taken alone, as the order of channels does not matter to a sum.
- A code of 4 bits becomes a float by one OR: 0x4300 | code is the bf16 pattern of 128 + code. The 128 are taken away
  from the sums, where they count once a row (keys) or token (values).

Legend: B rows, H KV heads, G = Hq / H, D, Dv head dims, W, WV words of a token and head, R rows (block, query).
"""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.paged_attention_triton import (
    HIDDEN,
    LEAST_EXPONENT,
    QUANT_BLOCK,
    QUANTIZED,
    find_work,
    key_range,
    new_weights,
    num_splits,
    softcapped,
)

INT4 = tl.constexpr(0)
INT8 = tl.constexpr(1)
FP8 = tl.constexpr(2)
_BF16_128 = tl.constexpr(0x4300)
# Two words of 16 bits at once: the nth code of each, OR 0x4300 (0xEA: (a & b) | c).
_UNPACK_0 = tl.constexpr("lop3.b32 $0, $1, 0x000F000F, 0x43004300, 0xEA;")
_UNPACK_1 = tl.constexpr("{.reg .b32 t; shr.u32 t, $1, 4; lop3.b32 $0, t, 0x000F000F, 0x43004300, 0xEA;}")
_UNPACK_2 = tl.constexpr("{.reg .b32 t; shr.u32 t, $1, 8; lop3.b32 $0, t, 0x000F000F, 0x43004300, 0xEA;}")
_UNPACK_3 = tl.constexpr("{.reg .b32 t; shr.u32 t, $1, 12; lop3.b32 $0, t, 0x000F000F, 0x43004300, 0xEA;}")
_ROUND = tl.constexpr(12582912.0)  # 1.5 * 2^23: adding and taking it away rounds |x| < 2^22 half to even
_HALF_MAX = tl.constexpr(65504.0)


@triton.jit
def _codes(words, nth: tl.constexpr, KIND: tl.constexpr, USE_ASM: tl.constexpr):
    """The nth of the codes in each word of 16 bits, as bf16; those of 4 bits plus 128."""
    if KIND == INT4:
        if USE_ASM:  # two words at once
            if nth == 0:
                return tl.inline_asm_elementwise(_UNPACK_0, "=r,r", [words], tl.bfloat16, is_pure=True, pack=2)
            elif nth == 1:
                return tl.inline_asm_elementwise(_UNPACK_1, "=r,r", [words], tl.bfloat16, is_pure=True, pack=2)
            elif nth == 2:
                return tl.inline_asm_elementwise(_UNPACK_2, "=r,r", [words], tl.bfloat16, is_pure=True, pack=2)
            else:
                return tl.inline_asm_elementwise(_UNPACK_3, "=r,r", [words], tl.bfloat16, is_pure=True, pack=2)
        else:
            return (((words >> (4 * nth)) & 0xF) | _BF16_128).to(tl.int16).to(tl.bfloat16, bitcast=True)
    else:
        byte = words >> (8 * nth)
        if KIND == INT8:
            return (byte & 0xFF).to(tl.float32).to(tl.bfloat16)
        else:
            return byte.to(tl.int8).to(tl.float8e4nv, bitcast=True).to(tl.float32).to(tl.bfloat16)


@triton.jit
def _half(words, nth: tl.constexpr, dtype: tl.constexpr):
    """The nth of the 16-bit floats in each integer, as float32."""
    return (words >> (16 * nth)).to(tl.int16).to(dtype, bitcast=True).to(tl.float32)


@triton.jit
def _scaled_query(query, scales, zeros, nth: tl.constexpr, KIND: tl.constexpr):
    """A plane of the queries times its key scales, and what each channel's zero (and the 128 by which a code of 4 bits
    is too large) adds to the score, [R, W] both."""
    if KIND == FP8:
        scaled = (query * scales[:, None]).to(tl.bfloat16)
        added = tl.zeros_like(query)
    else:
        scaled = (query * _half(scales, nth, tl.float16)).to(tl.bfloat16)
        added = query * _half(zeros, nth, tl.float16)
        if KIND == INT4:
            added -= 128.0 * scaled.to(tl.float32)
    return scaled, added


@triton.jit
def _store_plane(
    out, out_zero, unit, part_out, at, mask, nth: tl.constexpr, BLOCKS: tl.constexpr, QUERIES: tl.constexpr,
    W: tl.constexpr, PLANES: tl.constexpr,
):  # fmt: skip
    """Rows (block, query) of a plane of channels, added up by query: every PLANES-th value of part_out [*, DV]."""
    out = (out + out_zero[:, None]) * unit[:, None]
    joined = tl.sum(tl.reshape(out, (BLOCKS, QUERIES, W)), axis=0)
    tl.store(part_out + at[:, None] + PLANES * tl.arange(0, W)[None, :] + nth, joined, mask=mask[:, None])


@triton.jit(do_not_specialize=["table_stride", "num_rows", "window", "num_slots", "first_slot"])
def quantized_decode_kernel(
    q, k_codes, k_scale, k_zero, v_codes, v_scale, v_zero, tables, lengths, q_rows, part_m, part_total, part_out,
    q_row_stride, q_head_stride, table_stride, num_rows, window, factor, softcap, num_slots, first_slot,
    H: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, K_KIND: tl.constexpr,
    V_KIND: tl.constexpr, SPLIT: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_B: tl.constexpr, R: tl.constexpr,
    QUERIES: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_WINDOW: tl.constexpr, USE_ASM: tl.constexpr,
):  # fmt: skip
    """As `decode_kernel`, for the keys before the boundary. Word w of a token holds channels PLANES * w .., and plane p
    is channel p of every word. q, k_scale, k_zero: integers that hold a word's 16-bit floats (i64 for 4 bits, i32 for
    8), [*, Hq, W] and [pages, H, W]. k_codes i16 [pages, H, 32, W], v_codes likewise with DV; v_scale, v_zero f16
    [pages, H, 32]. fp8: scales f32 [pages, H], no zeros. D >= 64, DV, QUERIES >= G, R >= 16: powers of two."""
    tl.static_assert(R * QUANT_BLOCK >= QUERIES * BLOCK_N)
    PLANES: tl.constexpr = 4 if K_KIND == INT4 else 2
    PLANES_V: tl.constexpr = 4 if V_KIND == INT4 else 2
    BLOCKS: tl.constexpr = R // QUERIES
    W: tl.constexpr = D // PLANES
    WV: tl.constexpr = DV // PLANES_V
    b = tl.arange(0, BLOCK_B)
    lo_B, hi_B = key_range(tl.load(lengths + b, mask=b < num_rows, other=0), window, QUANTIZED)
    counts = num_splits(lo_B, hi_B, SPLIT, QUANTIZED)
    ends = tl.cumsum(counts, 0)
    r = tl.arange(0, R)
    block_of_r = r // QUERIES
    g_of_r = r % QUERIES
    w = tl.arange(0, W)
    wv = tl.arange(0, WV)
    n = tl.arange(0, BLOCK_N)
    not_own = tl.where(block_of_r[:, None] == (n // QUANT_BLOCK)[None, :], 0.0, HIDDEN)
    for item in range(tl.program_id(0), tl.sum(counts, 0) * H, tl.num_programs(0)):
        head = item % H
        row, nth, lo, hi = find_work(item // H, counts, ends, lengths, window, QUANTIZED, BLOCK_B)
        split = lo // SPLIT + nth
        begin = tl.maximum(split * SPLIT, lo // BLOCK_N * BLOCK_N)
        stop = tl.minimum((split + 1) * SPLIT, hi)
        q_at = tl.load(q_rows + row).to(tl.int64) * q_row_stride + (head * GROUP + g_of_r) * q_head_stride
        queries = tl.load(q + q_at[:, None] + w[None, :], mask=(g_of_r < GROUP)[:, None], other=0)
        q_0 = _half(queries, 0, tl.bfloat16) * factor
        q_1 = _half(queries, 1, tl.bfloat16) * factor
        if PLANES == 4:
            q_2 = _half(queries, 2, tl.bfloat16) * factor
            q_3 = _half(queries, 3, tl.bfloat16) * factor
        table = tables + row.to(tl.int64) * table_stride
        m = tl.full((R,), LEAST_EXPONENT, tl.float32)
        total = tl.zeros((R, BLOCK_N), tl.float32)
        out_zero = tl.zeros((R, BLOCK_N), tl.float32)
        out_0 = tl.zeros((R, WV), tl.float32)
        out_1 = tl.zeros((R, WV), tl.float32)
        out_2 = tl.zeros((R, WV), tl.float32)
        out_3 = tl.zeros((R, WV), tl.float32)
        for start in range(begin, stop, BLOCK_N):
            # `stop` is a multiple of 32, so keys end with a block. Codes need no mask: whatever is there is finite.
            seen = start + n < stop
            if HAS_WINDOW:
                seen = seen & (start + n >= lo // QUANT_BLOCK * QUANT_BLOCK)
            page_head = tl.load(table + (start + n) // QUANT_BLOCK, mask=seen, other=0).to(tl.int64) * H + head
            at = page_head * QUANT_BLOCK + n % QUANT_BLOCK
            if V_KIND == FP8:
                scale = tl.load(v_scale + page_head, mask=seen, other=0.0)
            else:  # asked for here, used after the scores
                scale = tl.load(v_scale + at, mask=seen, other=0.0).to(tl.float32)
                zero = tl.load(v_zero + at, mask=seen, other=0.0).to(tl.float32)
            block = start // QUANT_BLOCK + block_of_r
            is_block = (block * QUANT_BLOCK < stop) & (block_of_r < BLOCK_N // QUANT_BLOCK)
            if HAS_WINDOW:
                is_block = is_block & (block >= lo // QUANT_BLOCK)
            page_head_R = tl.load(table + block, mask=is_block, other=0).to(tl.int64) * H + head
            if K_KIND == FP8:
                scales = tl.load(k_scale + page_head_R, mask=is_block, other=0.0)
                zeros = scales
            else:
                scale_at = page_head_R[:, None] * W + w[None, :]
                scales = tl.load(k_scale + scale_at, mask=is_block[:, None], other=0)
                zeros = tl.load(k_zero + scale_at, mask=is_block[:, None], other=0)
            scaled_0, added = _scaled_query(q_0, scales, zeros, 0, K_KIND)
            scaled_1, added_1 = _scaled_query(q_1, scales, zeros, 1, K_KIND)
            added += added_1
            if PLANES == 4:
                scaled_2, added_2 = _scaled_query(q_2, scales, zeros, 2, K_KIND)
                scaled_3, added_3 = _scaled_query(q_3, scales, zeros, 3, K_KIND)
                added += added_2 + added_3
            scores = not_own + tl.where(is_block, tl.sum(added, axis=1), HIDDEN)[:, None]
            words = tl.load(k_codes + at[:, None] * W + w[None, :])
            scores = tl.dot(scaled_0, tl.trans(_codes(words, 0, K_KIND, USE_ASM)), scores)
            scores = tl.dot(scaled_1, tl.trans(_codes(words, 1, K_KIND, USE_ASM)), scores)
            if PLANES == 4:
                scores = tl.dot(scaled_2, tl.trans(_codes(words, 2, K_KIND, USE_ASM)), scores)
                scores = tl.dot(scaled_3, tl.trans(_codes(words, 3, K_KIND, USE_ASM)), scores)
            if HAS_SOFTCAP:  # which makes what is hidden finite
                is_hidden = scores < 0.5 * HIDDEN
                scores = tl.where(is_hidden, HIDDEN, softcapped(scores, softcap))
            if HAS_WINDOW:
                scores = tl.where((start + n >= lo)[None, :], scores, HIDDEN)
            weights, m, older = new_weights(scores, m)
            total = total * older[:, None] + weights
            scaled = (weights * scale[None, :]).to(tl.bfloat16)
            if V_KIND != FP8:
                out_zero = out_zero * older[:, None] + weights * zero[None, :]
                if V_KIND == INT4:
                    out_zero -= 128.0 * scaled.to(tl.float32)
            words = tl.load(v_codes + at[:, None] * WV + wv[None, :])
            out_0 = tl.dot(scaled, _codes(words, 0, V_KIND, USE_ASM), out_0 * older[:, None])
            out_1 = tl.dot(scaled, _codes(words, 1, V_KIND, USE_ASM), out_1 * older[:, None])
            if PLANES_V == 4:
                out_2 = tl.dot(scaled, _codes(words, 2, V_KIND, USE_ASM), out_2 * older[:, None])
                out_3 = tl.dot(scaled, _codes(words, 3, V_KIND, USE_ASM), out_3 * older[:, None])
        # A query has a row for each block of the tile: join them.
        m_of_block = tl.reshape(m, (BLOCKS, QUERIES))
        m_all = tl.max(m_of_block, axis=0)
        unit = tl.reshape(tl.exp2(m_of_block - m_all[None, :]), (R,))
        totals = tl.sum(tl.reshape(tl.sum(total, axis=1) * unit, (BLOCKS, QUERIES)), axis=0)
        g = tl.arange(0, QUERIES)
        at_partial = ((row.to(tl.int64) * num_slots + first_slot + nth) * H + head) * GROUP + g
        tl.store(part_m + at_partial, m_all, mask=g < GROUP)
        tl.store(part_total + at_partial, totals, mask=g < GROUP)
        zero_sum = tl.sum(out_zero, axis=1)
        out_at = at_partial * DV
        _store_plane(out_0, zero_sum, unit, part_out, out_at, g < GROUP, 0, BLOCKS, QUERIES, WV, PLANES_V)
        _store_plane(out_1, zero_sum, unit, part_out, out_at, g < GROUP, 1, BLOCKS, QUERIES, WV, PLANES_V)
        if PLANES_V == 4:
            _store_plane(out_2, zero_sum, unit, part_out, out_at, g < GROUP, 2, BLOCKS, QUERIES, WV, PLANES_V)
            _store_plane(out_3, zero_sum, unit, part_out, out_at, g < GROUP, 3, BLOCKS, QUERIES, WV, PLANES_V)


@triton.jit
def _block_codes(x, axis: tl.constexpr, levels: tl.constexpr):
    """float32 [32, D] -> codes as float32, scale and zero (fp16 along the other axis), bit for bit as the reference."""
    low = tl.min(x, axis=axis)
    high = tl.max(x, axis=axis)
    zero = tl.minimum(tl.maximum(low, -_HALF_MAX), _HALF_MAX).to(tl.float16)
    scale = tl.minimum(tl.div_rn(high - low, tl.full(low.shape, levels, tl.float32)), _HALF_MAX).to(tl.float16)
    wide = scale.to(tl.float32)
    wide = tl.where(wide > 0, wide, float("inf"))
    steps = tl.div_rn(
        x - tl.expand_dims(zero.to(tl.float32), axis), tl.broadcast_to(tl.expand_dims(wide, axis), x.shape)
    )
    steps = tl.minimum(tl.maximum(steps, -1.0), levels + 1.0)
    return tl.minimum(tl.maximum((steps + _ROUND) - _ROUND, 0.0), levels), scale, zero


@triton.jit
def _settle(
    ring, codes_out, scale_out, zero_out, slot_head, page_head, axis: tl.constexpr, D: tl.constexpr,
    KIND: tl.constexpr, LEVELS: tl.constexpr,
):  # fmt: skip
    """A block of one head: 32 rows of `ring` at slot_head [32] to a page's head. axis 0: keys, 1: values."""
    d = tl.arange(0, D)
    t = tl.arange(0, QUANT_BLOCK)
    x = tl.load(ring + slot_head[:, None] * D + d[None, :]).to(tl.float32)
    row = (page_head * QUANT_BLOCK + t)[:, None]
    if KIND == FP8:
        scale = tl.div_rn(tl.max(tl.max(tl.abs(x), axis=1), axis=0), LEVELS)
        codes = tl.div_rn(x, tl.full((QUANT_BLOCK, D), 1.0, tl.float32) * tl.where(scale > 0, scale, 1.0))
        tl.store(codes_out + row * D + d[None, :], codes.to(tl.float8e4nv).to(tl.uint8, bitcast=True))
        tl.store(scale_out + page_head, scale)
    else:
        codes, scale, zero = _block_codes(x, axis, LEVELS)
        if KIND == INT4:
            even, odd = tl.split(tl.reshape(codes.to(tl.int32), (QUANT_BLOCK, D // 2, 2)))
            at = row * (D // 2) + tl.arange(0, D // 2)[None, :]
            tl.store(codes_out + at, (even | (odd << 4)).to(tl.uint8))
        else:
            tl.store(codes_out + row * D + d[None, :], codes.to(tl.int32).to(tl.uint8))
        if axis == 0:
            at = page_head * D + d
        else:
            at = page_head * QUANT_BLOCK + t
        tl.store(scale_out + at, scale)
        tl.store(zero_out + at, zero)


@triton.jit(do_not_specialize=["table_stride"])
def settle_kernel(
    k_ring, v_ring, rings, tables, due, k_codes, k_scale, k_zero, v_codes, v_scale, v_zero, table_stride,
    H: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, RING: tl.constexpr, K_KIND: tl.constexpr, V_KIND: tl.constexpr,
    K_LEVELS: tl.constexpr, V_LEVELS: tl.constexpr,
):  # fmt: skip
    """Block due[b] (i32, negative: none) of each row from its ring into its page. k_ring [rings, RING, H, D]; pages as
    `kv_quant.quantize_blocks` makes them. Grid: (B, H)."""
    row = tl.program_id(0)
    head = tl.program_id(1)
    block = tl.load(due + row)
    if block >= 0:
        page = tl.load(tables + row.to(tl.int64) * table_stride + block)
        page_head = page.to(tl.int64) * H + head
        token = block * QUANT_BLOCK + tl.arange(0, QUANT_BLOCK)
        slot_head = (tl.load(rings + row).to(tl.int64) * RING + token % RING) * H + head
        _settle(k_ring, k_codes, k_scale, k_zero, slot_head, page_head, 0, D, K_KIND, K_LEVELS)
        _settle(v_ring, v_codes, v_scale, v_zero, slot_head, page_head, 1, DV, V_KIND, V_LEVELS)
