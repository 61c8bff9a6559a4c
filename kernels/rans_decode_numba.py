"""Range-ANS decoding fused with what follows it, for one CPU core (numba). Touches arrays only.

The byte-identical fast twin of `rans_reference.py`, which defines the stream. Each of the two numba files keeps its
helpers to itself: numba's cache looks at the file of the outermost function only.

Shapes: S segments (one a layer and head), T tokens, D head dim, N = min(LANES, D) lanes, R = half the rotary dims.
`words` is the payload as uint16; a segment is [2N: states][seg_words: stream][2 * seg_escapes: escapes][rest], any
side information stands in front of it. Functions return (code, segment): 0 is success, the others are listed below.
Nothing is raised here, and no input can make these functions read or write outside their arrays.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from kernels.rans_reference import CENTRE, ESCAPE, LANES, MAX_MAGNITUDE, PROB_BITS, STATE_LOW

OK = 0
OUT_OF_WORDS = 1
BAD_STATE = 2
BAD_FINAL_STATE = 3
UNUSED_WORDS = 4
ESCAPE_COUNT = 5

u64 = np.uint64
FULL = u64(LANES)
LOW = u64(STATE_LOW)
PROB_SHIFT = u64(PROB_BITS)
SLOT_MASK = u64((1 << PROB_BITS) - 1)
_OPTIONS = {"nogil": True, "cache": True, "error_model": "numpy"}


@njit(**_OPTIONS)
def _start_segment(words, at, x):
    """Reads the lanes' states; False if one is below the legal range."""
    good = True
    for j in range(x.size):
        state = u64(words[at + 2 * j]) | (u64(words[at + 2 * j + 1]) << u64(16))
        x[j] = state
        good = good and state >= u64(STATE_LOW)
    return good


@njit(**_OPTIONS)
def _decode_symbol(x, j, entry):
    """Takes lane j one symbol on, before its refill. entry: symbol << 24 | frequency << 12 | slot - start."""
    return ((entry >> u64(12)) & SLOT_MASK) * (u64(x[j]) >> PROB_SHIFT) + (entry & SLOT_MASK)


@njit(**_OPTIONS)
def _decode_row(words, pos, end, x, table, lut, symbols):
    """One token's D symbols. table [D] u64: offset of each channel's table in lut. Returns the new pos, or -1.

    Unsigned loop variables spare numba's negative-index checks, which cost a third of the speed here.
    """
    num_dims = u64(symbols.size)
    lanes = u64(x.size)
    p = u64(pos)
    b = u64(0)
    # No symbol takes more than one word, so with D words left there are no bounds to check in this row.
    if end - pos >= symbols.size and x.size == LANES:
        while b + FULL <= num_dims:
            for j in range(FULL):
                entry = u64(lut[table[b + j] + (u64(x[j]) & SLOT_MASK)])
                state = _decode_symbol(x, j, entry)
                low = state < LOW
                refilled = (state << u64(16)) | u64(words[p])
                x[j] = refilled if low else state
                p += u64(low)
                symbols[b + j] = entry >> u64(24)
            b += FULL
    limit = u64(end)
    while b < num_dims:  # the row's last, partial run of lanes, or the segment's last rows
        for j in range(min(lanes, num_dims - b)):
            entry = u64(lut[table[b + j] + (u64(x[j]) & SLOT_MASK)])
            state = _decode_symbol(x, j, entry)
            if state < LOW:
                if p >= limit:
                    return np.int64(-1)
                state = (state << u64(16)) | u64(words[p])
                p += u64(1)
            x[j] = state
            symbols[b + j] = entry >> u64(24)
        b += lanes
    return np.int64(p)


@njit(**_OPTIONS)
def _to_values(symbols, q):
    """Symbols -> integers (escapes as ESCAPE - CENTRE). True if any is an escape."""
    escaped = False
    for d in range(q.size):
        q[d] = np.int32(symbols[d]) - np.int32(CENTRE)
        escaped |= symbols[d] == ESCAPE
    return escaped


@njit(**_OPTIONS)
def _fill_escapes(words, at, count_left, q):
    """Puts the row's escaped values in place. Returns how many, or -1 if there are too few or one is absurd."""
    used = 0
    for d in range(q.size):
        if q[d] == ESCAPE - CENTRE:
            if used >= count_left:
                return -1
            raw = np.int64(words[at + 2 * used]) | (np.int64(words[at + 2 * used + 1]) << 16)
            if raw >= 1 << 31:
                raw -= 1 << 32
            if raw > 2 * MAX_MAGNITUDE or raw < -2 * MAX_MAGNITUDE:
                return -1
            q[d] = raw
            used += 1
    return used


@njit(**_OPTIONS)
def _finish_segment(pos, end, x, escapes_left):
    if pos != end:
        return UNUSED_WORDS
    if escapes_left != 0:
        return ESCAPE_COUNT
    for j in range(x.size):
        if x[j] != STATE_LOW:
            return BAD_FINAL_STATE
    return OK


@njit(**_OPTIONS)
def _table_offsets(index, bits, table):
    for d in range(index.size):
        table[d] = u64(index[d]) << u64(bits)


@njit(**_OPTIONS)
def decode_quantized(
    words, seg_pos, seg_words, seg_escapes, lut, index, group, step, mean, cos, sin, out, out_pos, stride_t
):
    """Payload -> bf16 rows: entropy decode, anchor addition, dequantize, rotate, round, store; one pass.

    words [*] u16; seg_pos, seg_words, seg_escapes [S] i64; lut [n << 12] u32;
    index [S, 2, D] u8 (0 for anchors, 1 for the rest; plain segments use 0); group [S] i64, 0 = no delta;
    step [S] f32, mean [S, D] f32; cos, sin [T, R] f32 (R = 0: no rotation); out [*] u16, out_pos [S] i64, stride_t.
    """
    num_dims = mean.shape[1]
    num_tokens = cos.shape[0]
    half = cos.shape[1]
    lanes = min(LANES, num_dims)
    x = np.empty(lanes, np.uint32)
    q = np.empty(num_dims, np.int32)
    anchor = np.empty(num_dims, np.int32)
    value = np.empty(num_dims, np.float32)
    turned = np.empty(num_dims, np.float32)
    turned_bits = turned.view(np.uint32)
    symbols = np.empty(num_dims, np.uint8)
    table = np.empty((2, num_dims), np.uint64)
    for s in range(seg_pos.size):
        pos = seg_pos[s]
        if not _start_segment(words, pos, x):
            return BAD_STATE, s
        pos += 2 * lanes
        end = pos + seg_words[s]
        esc_pos = end
        esc_left = seg_escapes[s]
        for r in range(2):
            _table_offsets(index[s, r], PROB_BITS, table[r])
        size = group[s]
        scale = step[s]
        for t in range(num_tokens):
            r = 0 if size == 0 or t % size == 0 else 1
            pos = _decode_row(words, pos, end, x, table[r], lut, symbols)
            if pos < 0:
                return OUT_OF_WORDS, s
            if _to_values(symbols, q):
                used = _fill_escapes(words, esc_pos, esc_left, q)
                if used < 0:
                    return ESCAPE_COUNT, s
                esc_pos += 2 * used
                esc_left -= used
            if size > 0:
                if r == 0:
                    for d in range(num_dims):
                        anchor[d] = q[d]
                else:
                    for d in range(num_dims):
                        q[d] += anchor[d]
            for d in range(num_dims):
                value[d] = np.float32(q[d]) * scale + mean[s, d]
            for d in range(half):
                a = value[d]
                b = value[d + half]
                c = cos[t, d]
                n = sin[t, d]
                turned[d] = a * c - b * n
                turned[d + half] = b * c + a * n
            for d in range(2 * half, num_dims):
                turned[d] = value[d]
            at = out_pos[s] + t * stride_t
            row = out[at : at + num_dims]
            for d in range(num_dims):  # float32 -> bf16, round to nearest even
                u = turned_bits[d]
                row[d] = np.uint16((u + np.uint32(0x7FFF) + ((u >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16))
        code = _finish_segment(pos, end, x, esc_left)
        if code != OK:
            return code, s
    return OK, -1


@njit(**_OPTIONS)
def decode_lossless(words, payload, seg_pos, seg_words, seg_escapes, lut, index, out, out_pos, stride_t, num_tokens):
    """Payload -> bf16 rows, bit-exact. As decode_quantized; payload is the same memory as `words`, as bytes."""
    num_dims = index.shape[2]
    lanes = min(LANES, num_dims)
    x = np.empty(lanes, np.uint32)
    q = np.empty(num_dims, np.int32)
    symbols = np.empty(num_dims, np.uint8)
    table = np.empty(num_dims, np.uint64)
    for s in range(seg_pos.size):
        pos = seg_pos[s]
        if not _start_segment(words, pos, x):
            return BAD_STATE, s
        pos += 2 * lanes
        end = pos + seg_words[s]
        esc_pos = end
        esc_left = seg_escapes[s]
        rest_pos = 2 * (end + 2 * esc_left)
        _table_offsets(index[s, 0], PROB_BITS, table)
        for t in range(num_tokens):
            pos = _decode_row(words, pos, end, x, table, lut, symbols)
            if pos < 0:
                return OUT_OF_WORDS, s
            if _to_values(symbols, q):
                used = _fill_escapes(words, esc_pos, esc_left, q)
                if used < 0:
                    return ESCAPE_COUNT, s
                esc_pos += 2 * used
                esc_left -= used
            at = out_pos[s] + t * stride_t
            row = out[at : at + num_dims]
            rest = payload[rest_pos : rest_pos + num_dims]
            for d in range(num_dims):
                low = np.uint32(rest[d])
                exponent = np.uint32(q[d] + CENTRE) & np.uint32(0xFF)
                row[d] = np.uint16(
                    ((low & np.uint32(0x80)) << np.uint32(8)) | (exponent << np.uint32(7)) | (low & np.uint32(0x7F))
                )
            rest_pos += num_dims
        code = _finish_segment(pos, end, x, esc_left)
        if code != OK:
            return code, s
    return OK, -1
