"""Attention of decode rows over pages, in Triton, split over the keys (flash-decoding).

Arithmetic only; `paged_attention.py` launches it, `paged_attention_reference.py` says what it computes; the twin for
quantized pages is `paged_attention_codes_triton.py`.

- A sequence's keys are cut into splits at absolute positions, a split into tiles. One program takes one split of one KV
  head at a time, for all G query heads of that head, and leaves a partial result; `merge_kernel` joins them in a fixed
  order. Where a row is cut does not depend on the other rows, so its bits do not either.
- Partial sums are in units of 2**m with an integer m, as in `attention.py`: rescaling does not round.
- One compiled kernel serves batches of all sizes up to 32 (arguments that vary are not specialized), so nothing is
  compiled while requests wait.
- The work list is not stored: every program finds its items from the lengths. So the grid is fixed, and one CUDA graph
  serves sequences of any length.

Legend: B rows, H KV heads, G = Hq / H, D, Dv head dims, R rows of a tensor core's tile: G, filled up to 16 or more.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Which keys of a row a launch is for: all, or of a quantized sequence the keys before the boundary or from it on.
ALL = tl.constexpr(0)
QUANTIZED = tl.constexpr(1)
RECENT = tl.constexpr(2)
QUANT_BLOCK = tl.constexpr(32)

HIDDEN = tl.constexpr(-1e30)  # the score of a key that must not be seen
LEAST_EXPONENT = tl.constexpr(-1e20)  # of a row that has seen nothing; above HIDDEN, so that nothing turns into NaN
_LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def key_range(length, window, PART: tl.constexpr):
    """The keys lo .. hi - 1 that the newest of `length` tokens sees in this part."""
    lo = tl.maximum(length - window, 0)
    hi = length
    if PART != ALL:
        boundary = tl.maximum(length - 1 - QUANT_BLOCK, 0) // QUANT_BLOCK * QUANT_BLOCK
        if PART == QUANTIZED:
            hi = boundary
        else:
            lo = tl.maximum(lo, boundary)
    return lo, hi


@triton.jit
def num_splits(lo, hi, SPLIT: tl.constexpr, PART: tl.constexpr):
    if PART == RECENT:  # 64 keys at most, wherever they start
        return tl.where(hi > lo, 1, 0)
    return tl.where(hi > lo, (hi + SPLIT - 1) // SPLIT - lo // SPLIT, 0)


@triton.jit
def softcapped(x, softcap):
    """softcap * tanh(x) = softcap * (1 - 2 / (e^2x + 1)), in units of log 2."""
    return softcap * _LOG2_E * (1.0 - 2.0 / (tl.exp2(x * (2.0 * _LOG2_E)) + 1.0))


@triton.jit
def new_weights(scores, m):
    """One more tile for the running softmax: weights, the exponent, and what to multiply older sums by."""
    m_new = tl.maximum(m, tl.ceil(tl.max(scores, axis=1)))
    return tl.exp2(scores - m_new[:, None]), m_new, tl.exp2(m - m_new)


@triton.jit
def find_work(work, counts, ends, lengths, window, PART: tl.constexpr, BLOCK_B: tl.constexpr):
    """Which row, which of its splits, and which keys the row sees."""
    row = tl.sum((ends <= work).to(tl.int32), 0)
    nth = work - tl.sum(tl.where(tl.arange(0, BLOCK_B) < row, counts, 0), 0)
    lo, hi = key_range(tl.load(lengths + row), window, PART)
    return row, nth, lo, hi


@triton.jit(do_not_specialize=["table_stride", "table_step", "num_rows", "window", "num_slots", "first_slot"])
def decode_kernel(
    q, k_pages, v_pages, tables, lengths, q_rows, part_m, part_total, part_out,
    q_row_stride, q_head_stride, table_stride, table_step, num_rows, window, factor, softcap, num_slots, first_slot,
    H: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, PAGE: tl.constexpr, PART: tl.constexpr,
    SPLIT: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_B: tl.constexpr, R: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr, HAS_SOFTCAP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """q [*, Hq, D]: row b at q_rows[b] (i32). k_pages [slots, H, D], v_pages [slots, H, DV]. tables i32: token t of
    row b is in page tables[b * table_stride + t // PAGE * table_step] at t % PAGE (step 0: a ring). lengths i32 [B]:
    the newest token's position + 1, 0 for no row. window: 2^30 for none. factor: scale * log2 e, or with a softcap
    scale / softcap. -> slots first_slot .. of part_m, part_total f32 [B, num_slots, Hq] and part_out f32 [B, num_slots,
    Hq, DV]. Grid: any number of programs."""
    b = tl.arange(0, BLOCK_B)
    lo_B, hi_B = key_range(tl.load(lengths + b, mask=b < num_rows, other=0), window, PART)
    counts = num_splits(lo_B, hi_B, SPLIT, PART)
    ends = tl.cumsum(counts, 0)
    g = tl.arange(0, R)
    g_mask = g < GROUP
    d = tl.arange(0, BLOCK_D)
    dv = tl.arange(0, BLOCK_DV)
    for item in range(tl.program_id(0), tl.sum(counts, 0) * H, tl.num_programs(0)):
        head = item % H  # neighbours in memory are read at the same time by neighbouring programs
        row, nth, lo, hi = find_work(item // H, counts, ends, lengths, window, PART, BLOCK_B)
        if PART == RECENT:
            begin = lo
            stop = hi
        else:
            split = lo // SPLIT + nth
            begin = tl.maximum(split * SPLIT, lo // BLOCK_N * BLOCK_N)
            stop = tl.minimum((split + 1) * SPLIT, hi)
        q_at = tl.load(q_rows + row).to(tl.int64) * q_row_stride + (head * GROUP + g) * q_head_stride
        queries = tl.load(q + q_at[:, None] + d[None, :], mask=g_mask[:, None] & (d < D)[None, :], other=0.0)
        table = tables + row.to(tl.int64) * table_stride
        m = tl.full((R,), LEAST_EXPONENT, tl.float32)
        total = tl.zeros((R, BLOCK_N), tl.float32)  # added up over the keys once, at the end: that needs barriers
        out = tl.zeros((R, BLOCK_DV), tl.float32)
        for start in range(begin, stop, BLOCK_N):
            token = start + tl.arange(0, BLOCK_N)
            seen = (token >= lo) & (token < stop)
            page = tl.load(table + token // PAGE * table_step, mask=seen, other=0)
            at = ((page.to(tl.int64) * PAGE + token % PAGE) * H + head)[:, None]
            keys = tl.load(k_pages + at * D + d[None, :], mask=seen[:, None] & (d < D)[None, :], other=0.0)
            values = tl.load(v_pages + at * DV + dv[None, :], mask=seen[:, None] & (dv < DV)[None, :], other=0.0)
            scores = tl.dot(queries, tl.trans(keys), input_precision=PRECISION)
            scores = scores * factor
            if HAS_SOFTCAP:
                scores = softcapped(scores, softcap)
            weights, m, older = new_weights(tl.where(seen[None, :], scores, HIDDEN), m)
            total = total * older[:, None] + weights
            out = tl.dot(weights.to(values.dtype), values, out * older[:, None], input_precision=PRECISION)
        at_partial = ((row.to(tl.int64) * num_slots + first_slot + nth) * H + head) * GROUP
        tl.store(part_m + at_partial + g, m, mask=g_mask)
        tl.store(part_total + at_partial + g, tl.sum(total, axis=1), mask=g_mask)
        out_at = (at_partial + g)[:, None] * DV + dv[None, :]
        tl.store(part_out + out_at, out, mask=g_mask[:, None] & (dv < DV)[None, :])


@triton.jit(do_not_specialize=["window", "num_slots"])
def merge_kernel(
    part_m, part_total, part_out, lengths, out_rows, out, out_row_stride, window, num_slots,
    HQ: tl.constexpr, DV: tl.constexpr, IS_QUANTIZED: tl.constexpr, SPLIT: tl.constexpr, BLOCK_S: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """Partials of a row's slots -> out [*, Hq, DV] at out_rows[b], 0 for a row of length 0. Slots are added BLOCK_S at
    a time; absent ones add exactly 0. Quantized: slot 0 is of the recent keys. Grid: (B, Hq)."""
    row = tl.program_id(0)
    head = tl.program_id(1)
    length = tl.load(lengths + row)
    if IS_QUANTIZED:
        lo, hi = key_range(length, window, QUANTIZED)
        used = num_splits(lo, hi, SPLIT, QUANTIZED) + tl.where(length > 0, 1, 0)
    else:
        lo, hi = key_range(length, window, ALL)
        used = num_splits(lo, hi, SPLIT, ALL)
    s = tl.arange(0, BLOCK_S)
    d = tl.arange(0, BLOCK_DV)
    base = row.to(tl.int64) * num_slots * HQ + head
    m_all = tl.full((), LEAST_EXPONENT, tl.float32)
    for first in range(0, used, BLOCK_S):
        slot = first + s
        m = tl.load(part_m + base + slot * HQ, mask=slot < used, other=LEAST_EXPONENT)
        m_all = tl.maximum(m_all, tl.max(m, axis=0))
    total = tl.zeros((), tl.float32)
    joined = tl.zeros((BLOCK_DV,), tl.float32)
    for first in range(0, used, BLOCK_S):
        slot = first + s
        at = base + slot * HQ
        unit = tl.exp2(tl.load(part_m + at, mask=slot < used, other=LEAST_EXPONENT) - m_all)
        total += tl.sum(unit * tl.load(part_total + at, mask=slot < used, other=0.0), axis=0)
        mask = (slot < used)[:, None] & (d < DV)[None, :]
        parts = tl.load(part_out + at[:, None] * DV + d[None, :], mask=mask, other=0.0)
        joined += tl.sum(parts * unit[:, None], axis=0)
    result = joined / tl.where(total > 0, total, 1.0)
    at_out = out + tl.load(out_rows + row).to(tl.int64) * out_row_stride + head * DV
    tl.store(at_out + d, result.to(out.dtype.element_ty), mask=d < DV)


@triton.jit
def write_kernel(
    k, v, k_slots, v_slots, slots, k_row_stride, k_head_stride, v_row_stride, v_head_stride,
    H: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """New keys and values into the pages: row i of k [N, H, D] and v [N, H, DV] (any strides) to slots[i] (i64) of
    k_slots [*, H, D], v_slots [*, H, DV]; a negative slot is no row. Grid: (N,)."""
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + row)
    h = tl.arange(0, BLOCK_H)[:, None]
    d = tl.arange(0, BLOCK_D)[None, :]
    is_head = h < tl.where(slot >= 0, H, 0)
    mask = is_head & (d < D)
    keys = tl.load(k + row * k_row_stride + h * k_head_stride + d, mask=mask, other=0.0)
    tl.store(k_slots + (slot * H + h) * D + d, keys, mask=mask)
    mask = is_head & (d < DV)
    values = tl.load(v + row * v_row_stride + h * v_head_stride + d, mask=mask, other=0.0)
    tl.store(v_slots + (slot * H + h) * DV + d, values, mask=mask)
