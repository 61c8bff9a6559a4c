"""Quantization fused with range-ANS encoding, for one CPU core (numba). Touches arrays only.

The byte-identical fast twin of `rans_reference.py`, which defines the stream; `rans_decode_numba.py` has the legend and
the way of working: WAYS segments side by side, 16 channels of a token at a time, steps that emit vector instructions.
Range-ANS is last in, first out: stages, tokens and channels run backwards, and words grow downwards on stacks.
Functions return (code, segment): 0 is success. Nothing is raised here.
"""

from __future__ import annotations

import numpy as np
from numba import njit
from numba.core import types

from kernels.rans_reference import MAX_MAGNITUDE, NUM_CONTEXTS, NUM_VALUES, PROB_BITS, PROB_SUM, STATE_LOW, VALUE_LOW
from kernels.rans_simd import (
    LANES,
    PAD,
    TILE,
    Lanes,
    Step,
    aligned,
    f32,
    i64,
    multiply_rows,
    padded,
    step,
    u8,
    u16,
    u32,
)

OK = 0
VALUE_RANGE = 6  # a value is not finite, or beyond MAX_MAGNITUDE steps
NO_ROOM = 7  # `out` is too small: come again with more

WAYS = 4
MAX_LANES = 32
DEAD_ENTRY = PROB_SUM << 16  # a symbol of probability 1: the state stays
DEAD_CUTS = PROB_SUM << 16  # three of them, of which only 0 has a probability
_OPTIONS = {"nogil": True, "cache": True, "error_model": "numpy"}


# Steps: what is emitted. Way g's part of an array starts g * stride further on.


def _advance(x: Lanes, freq: Lanes, start: Lanes) -> Lanes:
    """x // freq * 1024 + x % freq + start, for x < freq << 22.

    The quotient, below 2**22, is off by at most 1 in float32: two roundings of 2**-24 each.
    """
    guess = x.to(f32, "uitofp").fdiv(freq.to(f32, "uitofp")).to(u32, "fptoui")
    rest = x - guess * freq
    new = (guess << PROB_BITS) + rest + start
    short = freq.constant(PROB_SUM) - freq
    new = rest.signed_below(0).choose(new - short, new)
    return freq.signed_below(rest + 1).choose(new + short, new)


def _row(s: Step, lanes, x, count, stack, tops, encode):
    """A token's `count` vectors, last first: encode(way, vector) gives frequencies and starts.

    The states stay in registers. With two vectors of lanes these change places after each vector of channels.
    """
    b = s.builder
    s.keep_apart()
    each = lanes // LANES
    places = [i64(way * MAX_LANES + half * LANES) for way in range(WAYS) for half in range(each)]
    turned = b.mul(b.and_(s.add(count, -1), i64(each - 1)), i64(LANES))
    states = [s.load(x, b.xor(place, turned)).value for place in places]

    def vector(back, *held):
        tops, states = list(held[:WAYS]), list(held[WAYS:])
        v = b.sub(s.add(count, -1), back)
        for way in range(WAYS):
            freq, start = encode(way, v)
            old = Lanes(b, states.pop(way * each))
            full = old >> 32 - PROB_BITS >= freq
            tops[way] = s.push(old.to(u16, "trunc"), full, stack, tops[way])
            new = _advance(full.choose(old >> 16, old), freq, start)
            states.insert(way * each + each - 1, new.value)
        return [*tops, *states]

    after = s.loop(count, [*[s.element(tops, way) for way in range(WAYS)], *states], vector)
    for way in range(WAYS):
        s.set_element(after[way], tops, way)
    for place, state in zip(places, after[WAYS:], strict=True):
        s.store(Lanes(b, state), x, b.xor(place, i64((each - 1) * LANES)))


def _base_row(s: Step, lanes, x, count, stack, tops, enc, table, standin, rows, missed, q, to, block):
    """Stage 0 of q[to:]; tables and stand-ins at rows[way]. missed[way] |= 1 if a value was not in its table."""
    b = s.builder
    firsts = [s.element(rows, way) for way in range(WAYS)]

    def encode(way, v):
        d = b.mul(v, i64(LANES))
        value = s.load(q, to, d, b.mul(block, i64(way))) - VALUE_LOW
        inside = value < NUM_VALUES
        entry = s.look_up(enc, s.load(table, firsts[way], d) + inside.choose(value, 0))
        found = inside.choose(entry, 0) >= 1 << 16
        entry = found.choose(entry, s.load(standin, firsts[way], d))
        s.set_element(b.or_(s.element(missed, way), b.zext((~found).bits(), i64)), missed, way)
        return entry >> 16, entry & 0xFFFF

    _row(s, lanes, x, count, stack, tops, encode)


def _refine_row(s: Step, lanes, x, count, stack, tops, cuts, width, coarse, thirds, to, block):
    """A stage above: thirds[to:] given coarse[to:]. cuts: rows of width, (way, context): c1 | c2 << 16."""
    b = s.builder

    def encode(way, v):
        d = b.mul(v, i64(LANES))
        place = s.add(to, d, b.mul(block, i64(way)))
        q = s.load(coarse, place)
        third = s.load(thirds, place).to(u32, "sext")
        row = [s.load(cuts, d, b.mul(width, i64(NUM_CONTEXTS * way + c))) for c in range(NUM_CONTEXTS)]
        cut = q.equals(0).choose(row[0], (q + 1 < 3).choose(row[1], row[2]))
        first, second = cut & 0xFFFF, cut >> 16
        sign = q.signed_shift(31)
        symbol = first.equals(0).choose(0, (third ^ sign) - sign)  # a channel that is not coded
        low, high = symbol.signed_below(0), symbol.equals(1)
        start = high.choose(second, low.choose(0, first))
        stop = high.choose(PROB_SUM, low.choose(first, second))
        return stop - start, start

    _row(s, lanes, x, count, stack, tops, encode)


@step(types.void)
def base_row_16(s: Step, x, count, stack, tops, enc, table, standin, rows, missed, q, to, block):
    _base_row(s, 16, x, count, stack, tops, enc, table, standin, rows, missed, q, to, block)


@step(types.void)
def base_row_32(s: Step, x, count, stack, tops, enc, table, standin, rows, missed, q, to, block):
    _base_row(s, 32, x, count, stack, tops, enc, table, standin, rows, missed, q, to, block)


@step(types.void)
def refine_row_16(s: Step, x, count, stack, tops, cuts, width, coarse, thirds, to, block):
    _refine_row(s, 16, x, count, stack, tops, cuts, width, coarse, thirds, to, block)


@step(types.void)
def refine_row_32(s: Step, x, count, stack, tops, cuts, width, coarse, thirds, to, block):
    _refine_row(s, 32, x, count, stack, tops, cuts, width, coarse, thirds, to, block)


def _load_bf16(s: Step, src, at, count) -> Lanes:
    return (s.load_leading(src, at, count).to(u32, "zext") << 16).to(f32, "bitcast")


@step(types.void)
def plain_step(s: Step, src, at, mean, d, value, to, count):
    s.store_leading(_load_bf16(s, src, at, count).fsub(s.load(mean, d)), value, to, count)


@step(types.void)
def turn_step(s: Step, src, at, mean, d, half, icos, isin, angle, value, to, count):
    """Channels d and d + half, rotated by icos, isin[angle:]."""
    a, b = _load_bf16(s, src, at, count), _load_bf16(s, src, s.add(at, half), count)
    c, n = s.load_leading(icos, angle, count), s.load_leading(isin, angle, count)
    s.store_leading(a.fmul(c).fadd(b.fmul(n)).fsub(s.load(mean, d)), value, to, count)
    s.store_leading(b.fmul(c).fsub(a.fmul(n)).fsub(s.load(mean, d, half)), value, s.add(to, half), count)


@step(types.int64)
def quantize_step(s: Step, value, at, inv_step, d, q, to):
    """Returns 0 if all 16 are within MAX_MAGNITUDE."""
    y = s.rounded(s.load(value, at).fmul(s.load(inv_step, d)))
    size = (y.to(u32, "bitcast") & 0x7FFFFFFF).to(f32, "bitcast")
    s.store(y.to(u32, "fptosi"), q, to)
    return s.builder.zext((~size.at_most(float(MAX_MAGNITUDE))).bits(), i64)


@step(types.void)
def coarsen_step(s: Step, q, thirds, at):
    """q becomes its nearest third c, thirds q - 3 c. In float32: |q| <= 2**20 leaves q / 3 off by less than 1/6."""
    fine = s.load(q, at)
    coarse = s.rounded(fine.to(f32, "sitofp").fmul(1 / 3)).to(u32, "fptosi")
    s.store((fine - (coarse + coarse + coarse)).to(u8, "trunc"), thirds, at)
    s.store(coarse, q, at)


# Loops around the steps.


@njit(**_OPTIONS)
def _num_lanes(num_dims):
    return 32 if num_dims >= 128 else 16


@njit(**_OPTIONS)
def _base_rows(x, stack, tops, enc, table, standin, missed, group, s, ways, q, num_tokens, count, width, lanes):
    """Stage 0 of all tokens, `count` vectors."""
    rows = np.empty(WAYS, np.int64)
    block = num_tokens * width
    if count == 0:
        return
    for back in range(num_tokens):
        t = num_tokens - 1 - back
        for g in range(WAYS):
            rows[g] = 2 * g * width
            if g < ways and group[s + g] > 1 and t % group[s + g]:
                rows[g] += width
        if lanes == 16:
            base_row_16(x, count, stack, tops, enc, table, standin, rows, missed, q, t * width, block)
        else:
            base_row_32(x, count, stack, tops, enc, table, standin, rows, missed, q, t * width, block)


@njit(**_OPTIONS)
def _refine_rows(x, stack, tops, cut, q, thirds, num_tokens, count, width, lanes):
    """A stage above."""
    block = num_tokens * width
    if count == 0:
        return
    for back in range(num_tokens):
        to = (num_tokens - 1 - back) * width
        if lanes == 16:
            refine_row_16(x, count, stack, tops, cut, width, q, thirds, to, block)
        else:
            refine_row_32(x, count, stack, tops, cut, width, q, thirds, to, block)


@njit(**_OPTIONS)
def _coarsen(q, thirds):
    for at in range(0, q.size, LANES):
        coarsen_step(q, thirds, at)


@njit(**_OPTIONS)
def _take_deltas(q, size, num_tokens, width):
    for back in range(num_tokens):
        t = num_tokens - 1 - back
        anchor = (t - t % size) * width
        if t % size:
            for d in range(width):
                q[t * width + d] -= q[anchor + d]


@njit(**_OPTIONS)
def _fill_tables(table, standin, g, index, active, enc, fallback, width):
    """Tables and stand-ins of way g; index [2, D]. Behind the active channels: the table behind enc's last."""
    for r in range(2):
        row = (2 * g + r) * width
        for d in range(active):
            n = np.int64(index[r, d])
            table[row + d] = n * NUM_VALUES
            standin[row + d] = enc[n * NUM_VALUES + fallback[n] - VALUE_LOW]
        for d in range(active, width):
            table[row + d] = enc.size - NUM_VALUES
            standin[row + d] = DEAD_ENTRY


@njit(**_OPTIONS)
def _with_dead_table(enc):
    out = np.full(enc.size + NUM_VALUES, np.uint32(DEAD_ENTRY), np.uint32)
    out[: enc.size] = enc
    return out


@njit(**_OPTIONS)
def _strays(values, active, num_tokens, num_dims, width):
    """True if an integer that is not 0 stands in a channel that this stage does not code."""
    any_bits = np.int64(0)
    for t in range(num_tokens):
        for d in range(active, num_dims):
            any_bits |= np.int64(values[t * width + d])
    return any_bits != 0


@njit(**_OPTIONS)
def _write_exceptions(stage, values, active, enc, index, group, num_tokens, num_dims, out, at):
    """values [T * W]: integers (stage 0) or thirds. Returns the new at, or -1 if out is too small."""
    width = (num_dims + 15) // 16 * 16
    for t in range(num_tokens):
        kind = 1 if group > 0 and t % group else 0
        for d in range(num_dims):
            v = np.int64(values[t * width + d])
            if d >= active:
                plain = v == 0
            elif stage > 0:
                plain = True
            else:
                symbol = v - VALUE_LOW
                plain = 0 <= symbol < NUM_VALUES and enc[np.int64(index[kind, d]) * NUM_VALUES + symbol] >= 1 << 16
            if not plain:
                if at + 4 > out.size:
                    return -1
                place = t * num_dims + d
                out[at] = np.uint16(place & 0xFFFF)
                out[at + 1] = np.uint16(place >> 16)
                out[at + 2] = np.uint16(v & 0xFFFF)
                out[at + 3] = np.uint16((v >> 16) & 0xFFFF)
                at += 4
    return at


@njit(**_OPTIONS)
def _write_piece(side, x, first, last, stack, pos, end, out, at):
    """Side information, new states and stream words -> out from `at`. Returns the new at, or -1."""
    if at + side.size + 2 * max(0, last - first) + end - pos > out.size:
        return -1
    for i in range(side.size):
        out[at + i] = side[i]
    at += side.size
    for j in range(first, last):
        out[at] = np.uint16(x[j] & np.uint32(0xFFFF))
        out[at + 1] = np.uint16(x[j] >> np.uint32(16))
        at += 2
    out[at : at + end - pos] = stack[pos:end]
    return at + end - pos


@njit(**_OPTIONS)
def encode_quantized(
    src, src_pos, stride_t, icos, isin, turned, mean, inv_step, matrix, analysis, coarser, group, enc, standin,
    base_index, cuts, refine_index, active, side, out, piece_words, exceptions,
):  # fmt: skip
    """bf16 rows -> pieces. side [S, w] u16 is copied in front of stage 0's.

    src [*] u16; src_pos [S] i64; icos, isin [T, R] f32; turned [S] u8; mean, inv_step [S, D] f32; matrix [S] i64 (-1
    none), analysis [m, D, D] f32; coarser: how often to take the nearest third first; group [S] i64; enc [n * 256]
    u32: frequency << 16 | start; standin [n] i64; the rest as in decode_quantized. Writes out [K, cap] u16 (stage k's
    pieces one after another, by segment), piece_words and exceptions [K, S] i64.
    """
    num_stages, num_segments = active.shape
    num_tokens = icos.shape[0]
    num_dims = mean.shape[1]
    lanes = _num_lanes(num_dims)
    width = padded(num_dims)
    block = num_tokens * width
    full_enc = _with_dead_table(enc)
    x = aligned(WAYS * MAX_LANES, np.uint32)
    q, thirds = aligned(WAYS * block, np.int32), aligned(WAYS * block, np.int8)
    table, fallback = aligned(WAYS * 2 * width, np.uint32), aligned(WAYS * 2 * width, np.uint32)
    cut = aligned(WAYS * NUM_CONTEXTS * width, np.uint32)
    stack = np.empty(WAYS * block, np.uint16)
    tops, missed = np.empty(WAYS, np.int64), np.empty(WAYS, np.int64)
    centre, scale = aligned(width + PAD, np.float32), aligned(width + PAD, np.float32)
    value, product = aligned(TILE * width + PAD, np.float32), aligned(TILE * width + PAD, np.float32)
    square = aligned(num_dims * width if analysis.shape[0] else 0, np.float32)
    for floats in (centre, scale, value, product, square):
        floats[:] = 0
    at = np.zeros(num_stages, np.int64)
    for s in range(0, num_segments, WAYS):
        ways = min(WAYS, num_segments - s)
        x[:] = np.uint32(STATE_LOW)
        for g in range(ways):
            centre[:num_dims] = mean[s + g]
            scale[:num_dims] = inv_step[s + g]
            half = icos.shape[1] if turned[s + g] else 0
            if matrix[s + g] >= 0:
                for j in range(num_dims):
                    square[j * width : j * width + num_dims] = analysis[matrix[s + g], j]
            bad = 0
            for strip in range(0, num_tokens, TILE):
                rows = min(TILE, num_tokens - strip)
                for r in range(rows):
                    t = strip + r
                    first = src_pos[s + g] + t * stride_t
                    for d in range(0, half, LANES):
                        turn_step(
                            src, first + d, centre, d, half, icos, isin, t * half + d, value, r * width + d,
                            min(LANES, half - d),
                        )  # fmt: skip
                    for d in range(2 * half, num_dims, LANES):
                        plain_step(src, first + d, centre, d, value, r * width + d, min(LANES, num_dims - d))
                source = value
                if matrix[s + g] >= 0:
                    multiply_rows(value, square, num_dims, width, product)
                    source = product
                for r in range(rows):
                    for d in range(0, width, LANES):
                        to = g * block + (strip + r) * width + d
                        bad |= quantize_step(source, r * width + d, scale, d, q, to)
            if bad:
                return VALUE_RANGE, s + g
            for _ in range(coarser):
                _coarsen(q[g * block : (g + 1) * block], thirds)
        for back in range(num_stages):
            k = num_stages - 1 - back
            most = 0
            for g in range(WAYS):
                a = active[k, s + g] if g < ways else 0
                most = max(most, a)
                tops[g] = (g + 1) * block
                missed[g] = 0
                if k == 0:
                    _fill_tables(
                        table, fallback, g, base_index[min(s + g, num_segments - 1)], a, full_enc, standin, width
                    )
                    if g < ways and group[s + g] > 1:
                        _take_deltas(q[g * block : (g + 1) * block], group[s + g], num_tokens, width)
                else:
                    for c in range(NUM_CONTEXTS):
                        row = (NUM_CONTEXTS * g + c) * width
                        for d in range(a):
                            cut[row + d] = cuts[k - 1, refine_index[k - 1, s + g, d], c]
                        for d in range(a, width):
                            cut[row + d] = DEAD_CUTS
            count = padded(most) // LANES
            if k == 0:
                _base_rows(
                    x,
                    stack,
                    tops,
                    full_enc,
                    table,
                    fallback,
                    missed,
                    group,
                    s,
                    ways,
                    q,
                    num_tokens,
                    count,
                    width,
                    lanes,
                )
            else:
                _coarsen(q[: ways * block], thirds)
                _refine_rows(x, stack, tops, cut, q, thirds, num_tokens, count, width, lanes)
            for g in range(ways):
                a = active[k, s + g]
                before = min(lanes, active[k - 1, s + g]) if k > 0 else 0
                states = x[g * MAX_LANES : (g + 1) * MAX_LANES]
                front = side[s + g] if k == 0 else side[s + g, :0]
                begin = at[k]
                now = _write_piece(front, states, before, min(lanes, a), stack, tops[g], (g + 1) * block, out[k], begin)
                if now < 0:
                    return NO_ROOM, s + g
                plain = now
                if k > 0:
                    mine = thirds[g * block : (g + 1) * block]
                    if _strays(mine, a, num_tokens, num_dims, width):
                        now = _write_exceptions(
                            k, mine, a, enc, base_index[s + g], group[s + g], num_tokens, num_dims, out[k], now
                        )
                else:
                    whole = q[g * block : (g + 1) * block]
                    if missed[g] or _strays(whole, a, num_tokens, num_dims, width):
                        now = _write_exceptions(
                            k, whole, a, enc, base_index[s + g], group[s + g], num_tokens, num_dims, out[k], now
                        )
                if now < 0:
                    return NO_ROOM, s + g
                piece_words[k, s + g] = now - begin
                exceptions[k, s + g] = (now - plain) // 4
                at[k] = now
    return OK, -1


@njit(**_OPTIONS)
def encode_bytes(coded, enc, standin, index, out, piece_words, exceptions):
    """Lossless: coded bytes [S, T, D] u8 -> pieces in out [cap] u16. index [S, D] u8."""
    num_segments, num_tokens, num_dims = coded.shape
    lanes = _num_lanes(num_dims)
    width = padded(num_dims)
    block = num_tokens * width
    full_enc = _with_dead_table(enc)
    x = aligned(WAYS * MAX_LANES, np.uint32)
    q = aligned(WAYS * block, np.int32)
    table, fallback = aligned(WAYS * 2 * width, np.uint32), aligned(WAYS * 2 * width, np.uint32)
    stack = np.empty(WAYS * block, np.uint16)
    tops, missed = np.empty(WAYS, np.int64), np.empty(WAYS, np.int64)
    group = np.zeros(num_segments, np.int64)
    both = np.empty((num_segments, 2, num_dims), np.uint8)
    both[:, 0] = index
    both[:, 1] = index
    no_side = np.empty(0, np.uint16)
    at = np.int64(0)
    for s in range(0, num_segments, WAYS):
        ways = min(WAYS, num_segments - s)
        x[:] = np.uint32(STATE_LOW)
        for g in range(WAYS):
            tops[g] = (g + 1) * block
            missed[g] = 0
            _fill_tables(
                table, fallback, g, both[min(s + g, num_segments - 1)], num_dims if g < ways else 0, full_enc, standin,
                width,
            )  # fmt: skip
        for g in range(ways):
            for t in range(num_tokens):
                row = coded[s + g, t]
                o = q[g * block + t * width : g * block + t * width + num_dims]
                for d in range(num_dims):
                    o[d] = np.int32(row[d]) + np.int32(VALUE_LOW)
        _base_rows(
            x,
            stack,
            tops,
            full_enc,
            table,
            fallback,
            missed,
            group,
            s,
            ways,
            q,
            num_tokens,
            width // LANES,
            width,
            lanes,
        )
        for g in range(ways):
            states = x[g * MAX_LANES : (g + 1) * MAX_LANES]
            now = _write_piece(no_side, states, 0, min(lanes, num_dims), stack, tops[g], (g + 1) * block, out, at)
            plain = now
            if now >= 0 and missed[g]:
                mine = q[g * block : (g + 1) * block]
                now = _write_exceptions(0, mine, num_dims, enc, both[s + g], 0, num_tokens, num_dims, out, now)
            if now < 0:
                return NO_ROOM, s + g
            piece_words[s + g] = now - at
            exceptions[s + g] = (now - plain) // 4
            at = now
    return OK, -1


@njit(**_OPTIONS)
def split_bf16(src, src_pos, stride_t, coded, plane):
    """bf16 rows -> exponent bytes and sign/mantissa bytes [S, T, D] u8."""
    num_segments, num_tokens, num_dims = coded.shape
    for s in range(num_segments):
        for t in range(num_tokens):
            row = src[src_pos[s] + t * stride_t : src_pos[s] + t * stride_t + num_dims]
            high = coded[s, t]
            low = plane[s, t]
            for d in range(num_dims):
                high[d] = np.uint8((row[d] >> np.uint16(7)) & np.uint16(0xFF))
                low[d] = np.uint8(((row[d] >> np.uint16(8)) & np.uint16(0x80)) | (row[d] & np.uint16(0x7F)))


@njit(**_OPTIONS)
def choose_tables(q, num_tokens, num_dims, cost, index):
    """The table that codes each channel of q [T * D] i32 in the fewest bits. Writes index [D] u8.

    cost [257, n] f32: of each integer from -128 on; the last row is any exception's.
    """
    rows = cost.shape[0]
    hist = np.zeros((num_dims, rows), np.int32)
    for t in range(num_tokens):
        for d in range(num_dims):
            symbol = min(np.uint32(q[t * num_dims + d] - np.int32(VALUE_LOW)), np.uint32(rows - 1))
            hist[d, symbol] += 1
    total = np.empty(cost.shape[1], np.float32)
    for d in range(num_dims):
        total[:] = 0
        for i in range(rows):
            count = np.float32(hist[d, i])
            if count > 0:
                row = cost[i]
                for n in range(total.size):
                    total[n] += count * row[n]
        index[d] = total.argmin()
