"""Quantization fused with range-ANS encoding, for one CPU core (numba). Touches arrays only.

The byte-identical fast twin of `rans_reference.py`, which defines the stream; `rans_decode_numba.py` has the shapes.
Functions return (code, segment, words written): code 0 is success. Nothing is raised here.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from kernels.rans_reference import CENTRE, ESCAPE, LANES, MAX_MAGNITUDE, PROB_BITS, STATE_LOW

OK = 0
VALUE_RANGE = 6  # a value is not finite, or beyond MAX_MAGNITUDE steps

u64 = np.uint64
PROB_SHIFT = u64(PROB_BITS)
_OPTIONS = {"nogil": True, "cache": True, "error_model": "numpy"}


@njit(**_OPTIONS)
def _table_offsets(index, bits, table):
    for d in range(index.size):
        table[d] = u64(index[d]) << u64(bits)


@njit(**_OPTIONS)
def _encode_row(q, fs, table, x, stack, num_words):
    """One token's D integers, last first, onto the stack. table [D] u64: offsets in fs. Returns (words, escapes)."""
    num_dims = u64(q.size)
    lanes = u64(x.size)
    n = u64(num_words)
    num_escapes = 0
    b = (num_dims + lanes - u64(1)) // lanes * lanes
    while b > u64(0):
        b -= lanes
        run = min(lanes, num_dims - b)
        for i in range(run):
            j = run - u64(1) - i
            symbol = min(np.uint32(q[b + j] + np.int32(CENTRE)), np.uint32(ESCAPE))  # below 0 wraps to far above
            entry = u64(fs[table[b + j] + u64(symbol)])
            if entry < u64(1 << 16):  # frequency 0: outside this table's support
                symbol = np.uint32(ESCAPE)
                entry = u64(fs[table[b + j] + u64(ESCAPE)])
            num_escapes += symbol == ESCAPE
            freq = entry >> u64(16)
            state = u64(x[j])
            full = u64(state >= (freq << (u64(32) - PROB_SHIFT)))
            stack[n] = np.uint16(state & u64(0xFFFF))  # kept only if full; a branch here would be mispredicted
            n += full
            state >>= full << u64(4)
            times = u64(np.uint32(state) // np.uint32(freq))
            x[j] = (times << PROB_SHIFT) + (state - times * freq) + (entry & u64(0xFFFF))
    return np.int64(n), num_escapes


@njit(**_OPTIONS)
def _encode_segment(q, num_tokens, fs, index, size, out, at, stack):
    """q [T * D] i32 (deltas already taken) -> out from `at`. Returns (stream words, escapes).

    Range-ANS is last in, first out: tokens and channels run backwards onto `stack` [T * D + 1], which is then turned.
    """
    num_dims = index.shape[1]
    lanes = min(LANES, num_dims)
    table = np.empty((2, num_dims), np.uint64)
    for r in range(2):
        _table_offsets(index[r], 8, table[r])
    x = np.full(lanes, STATE_LOW, np.uint32)
    num_words = 0
    num_escapes = 0
    for t in range(num_tokens - 1, -1, -1):
        r = 0 if size == 0 or t % size == 0 else 1
        num_words, escapes = _encode_row(q[t * num_dims : (t + 1) * num_dims], fs, table[r], x, stack, num_words)
        num_escapes += escapes
    for j in range(lanes):
        out[at + 2 * j] = x[j] & np.uint32(0xFFFF)
        out[at + 2 * j + 1] = x[j] >> np.uint32(16)
    at += 2 * lanes
    for i in range(num_words):
        out[at + i] = stack[num_words - 1 - i]
    at += num_words
    if num_escapes > 0:
        for t in range(num_tokens):
            r = 0 if size == 0 or t % size == 0 else 1
            for d in range(num_dims):
                v = q[t * num_dims + d]
                symbol = v + CENTRE
                if symbol < 0 or symbol >= ESCAPE or fs[table[r, d] + u64(symbol)] < 1 << 16:
                    raw = np.int64(v) & 0xFFFFFFFF
                    out[at] = raw & 0xFFFF
                    out[at + 1] = raw >> 16
                    at += 2
    return num_words, num_escapes


@njit(**_OPTIONS)
def quantize_rows(src, at, stride_t, icos, isin, mean, inv_step, q):
    """bf16 rows -> q [T * D] i32: unrotate, centre, divide, round to nearest even. False if one is refused."""
    num_tokens = icos.shape[0]
    half = icos.shape[1]
    num_dims = mean.size
    raw = np.empty(num_dims, np.float32)
    raw_bits = raw.view(np.uint32)
    value = np.empty(num_dims, np.float32)
    worst = True
    limit = np.float32(MAX_MAGNITUDE)
    for t in range(num_tokens):
        row = src[at + t * stride_t : at + t * stride_t + num_dims]
        for d in range(num_dims):
            raw_bits[d] = np.uint32(row[d]) << np.uint32(16)
        for d in range(half):
            a = raw[d]
            b = raw[d + half]
            c = icos[t, d]
            n = isin[t, d]
            value[d] = a * c + b * n
            value[d + half] = b * c - a * n
        for d in range(2 * half, num_dims):
            value[d] = raw[d]
        o = q[t * num_dims : (t + 1) * num_dims]
        good = True
        for d in range(num_dims):
            y = np.rint((value[d] - mean[d]) * inv_step)
            good &= np.abs(y) <= limit  # False for NaN
            o[d] = np.int32(y)
        worst &= good
    return worst


@njit(**_OPTIONS)
def encode_quantized(
    src, src_pos, stride_t, icos, isin, mean, inv_step, group, index, side, fs, out, seg_words, seg_escapes
):
    """bf16 rows -> payload. side [S, w] u16 is copied in front of each segment (w = 0: nothing shipped).

    src [*] u16; src_pos [S] i64; icos, isin [T, R] f32; mean [S, D] f32; inv_step [S] f32; group [S] i64;
    index [S, 2, D] u8; out [*] u16, large enough for S * (w + 2N + 3TD) words; seg_words, seg_escapes [S] i64 are
    written. Returns (code, segment, words written).
    """
    num_tokens = icos.shape[0]
    num_dims = mean.shape[1]
    lanes = min(LANES, num_dims)
    q = np.empty(num_tokens * num_dims, np.int32)
    stack = np.empty(num_tokens * num_dims + 1, np.uint16)
    at = 0
    for s in range(src_pos.size):
        if not quantize_rows(src, src_pos[s], stride_t, icos, isin, mean[s], inv_step[s], q):
            return VALUE_RANGE, s, at
        size = group[s]
        if size > 0:
            for t in range(num_tokens - 1, -1, -1):
                a = t - t % size
                if t != a:
                    for d in range(num_dims):
                        q[t * num_dims + d] -= q[a * num_dims + d]
        for i in range(side.shape[1]):
            out[at + i] = side[s, i]
        at += side.shape[1]
        n, e = _encode_segment(q, num_tokens, fs, index[s], size, out, at, stack)
        seg_words[s] = n
        seg_escapes[s] = e
        at += 2 * lanes + n + 2 * e
    return OK, -1, at


@njit(**_OPTIONS)
def encode_lossless(src, src_pos, stride_t, num_tokens, index, side, gap, fs, out, out_bytes, seg_words, seg_escapes):
    """bf16 rows -> payload, bit-exact. As encode_quantized; out_bytes is the same memory as `out`, as bytes.

    `gap` words are left free behind each segment (float32's low halves go there).
    """
    num_dims = index.shape[2]
    lanes = min(LANES, num_dims)
    q = np.empty(num_tokens * num_dims, np.int32)
    stack = np.empty(num_tokens * num_dims + 1, np.uint16)
    at = 0
    for s in range(src_pos.size):
        for t in range(num_tokens):
            row = src[src_pos[s] + t * stride_t : src_pos[s] + t * stride_t + num_dims]
            o = q[t * num_dims : (t + 1) * num_dims]
            for d in range(num_dims):
                o[d] = ((np.int32(row[d]) >> 7) & 0xFF) - CENTRE
        for i in range(side.shape[1]):
            out[at + i] = side[s, i]
        at += side.shape[1]
        n, e = _encode_segment(q, num_tokens, fs, index[s], 0, out, at, stack)
        seg_words[s] = n
        seg_escapes[s] = e
        at += 2 * lanes + n + 2 * e
        b = 2 * at
        for t in range(num_tokens):
            row = src[src_pos[s] + t * stride_t : src_pos[s] + t * stride_t + num_dims]
            o8 = out_bytes[b : b + num_dims]
            for d in range(num_dims):
                o8[d] = ((row[d] >> np.uint16(8)) & np.uint16(0x80)) | (row[d] & np.uint16(0x7F))
            b += num_dims
        if b % 2:
            out_bytes[b] = 0
            b += 1
        at = b // 2 + gap
    return OK, -1, at


@njit(**_OPTIONS)
def choose_tables(q, num_tokens, num_dims, cost, index):
    """The table that codes each channel of q [T * D] i32 in the fewest bits. cost [256, n] f32; writes index [D] u8."""
    hist = np.zeros((num_dims, 256), np.int32)
    for t in range(num_tokens):
        for d in range(num_dims):
            symbol = min(np.uint32(q[t * num_dims + d] + np.int32(CENTRE)), np.uint32(ESCAPE))
            hist[d, symbol] += 1
    total = np.empty(cost.shape[1], np.float32)
    for d in range(num_dims):
        total[:] = 0
        for i in range(256):
            count = np.float32(hist[d, i])
            if count > 0:
                row = cost[i]
                for n in range(total.size):
                    total[n] += count * row[n]
        index[d] = total.argmin()
