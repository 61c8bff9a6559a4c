"""Range-ANS and the fused coders around it, for one CPU core (numba). Touches arrays only.

The byte-identical fast twin of `rans_reference.py`, which defines the stream. All of it stands in one file because
numba's cache looks at the file of the outermost function only.

Shapes: S segments (one a layer and head), T tokens, D head dim, N = min(LANES, D) lanes, R = half the rotary dims.
`words` is the payload as uint16; a segment is [side info][2N: states][seg_words: stream][2*seg_escapes: escapes][rest].
Every function returns (code, segment): code 0 is success, the others are listed below; nothing is raised here, and no
input can make these functions read or write outside their arrays.
"""

from __future__ import annotations

import numpy as np
from numba import njit

LANES = 32
STATE_LOW = 1 << 16  # a state lives in [2**16, 2**32); both ends start and finish here
CENTRE = 127  # symbol = value + CENTRE
ESCAPE = 255
MAX_MAGNITUDE = 1 << 20  # of a quantized value; beyond it float32 could not keep the error bound

OK = 0
OUT_OF_WORDS = 1
BAD_STATE = 2
BAD_FINAL_STATE = 3
UNUSED_WORDS = 4
ESCAPE_COUNT = 5
VALUE_RANGE = 6
NOT_FINITE = 7

PROB_BITS = 12  # fixed in version 1, so that shifts and masks are constants

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
    if (
        end - pos >= symbols.size and x.size == LANES
    ):  # no symbol takes more than one word: no bounds to check in this row
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
    """Puts the row's escaped values in place. Returns how many were used, or -1 if there are too few or one is absurd."""
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
                row[d] = np.uint16(
                    (u + np.uint32(0x7FFF) + ((u >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
                )
        code = _finish_segment(pos, end, x, esc_left)
        if code != OK:
            return code, s
    return OK, -1


@njit(**_OPTIONS)
def decode_lossless(
    words, payload, seg_pos, seg_words, seg_escapes, lut, index, out, out_pos, stride_t, num_tokens
):
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
                    ((low & np.uint32(0x80)) << np.uint32(8))
                    | (exponent << np.uint32(7))
                    | (low & np.uint32(0x7F))
                )
            rest_pos += num_dims
        code = _finish_segment(pos, end, x, esc_left)
        if code != OK:
            return code, s
    return OK, -1


@njit(**_OPTIONS)
def _encode_row(q, fs, table, x, stack, num_words):
    """One token's D integers, last channel first, onto the stack. table [D] u64: offsets in fs. Returns (words, escapes)."""
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
            symbol = min(
                np.uint32(q[b + j] + np.int32(CENTRE)), np.uint32(ESCAPE)
            )  # below 0 wraps to far above
            entry = u64(fs[table[b + j] + u64(symbol)])
            if entry < u64(1 << 16):  # frequency 0: outside this table's support
                symbol = np.uint32(ESCAPE)
                entry = u64(fs[table[b + j] + u64(ESCAPE)])
            num_escapes += symbol == ESCAPE
            freq = entry >> u64(16)
            state = u64(x[j])
            full = u64(state >= (freq << (u64(32) - PROB_SHIFT)))
            stack[n] = np.uint16(
                state & u64(0xFFFF)
            )  # kept only if full; a branch here would be mispredicted
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
        num_words, escapes = _encode_row(
            q[t * num_dims : (t + 1) * num_dims], fs, table[r], x, stack, num_words
        )
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
    """bf16 rows -> q [T * D] i32: unrotate, centre, divide, round to nearest even. False if out of range or not finite."""
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
def encode_lossless(
    src, src_pos, stride_t, num_tokens, index, side, gap, fs, out, out_bytes, seg_words, seg_escapes
):
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
    """For each channel the table that codes q [T * D] i32 in the fewest bits; cost [n, 256] f32. Writes index [D] u8."""
    hist = np.zeros(256, np.float32)
    for d in range(num_dims):
        lo = 255
        hi = 0
        hist[:] = 0
        for t in range(num_tokens):
            symbol = q[t * num_dims + d] + CENTRE
            if symbol < 0 or symbol > ESCAPE:
                symbol = ESCAPE
            hist[symbol] += 1
            lo = min(lo, symbol)
            hi = max(hi, symbol)
        best = np.float32(np.inf)
        for n in range(cost.shape[0]):
            total = np.float32(0)
            for i in range(lo, hi + 1):
                total += hist[i] * cost[n, i]
            if total < best:
                best = total
                index[d] = n
