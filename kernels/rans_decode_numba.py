"""Range-ANS decoding fused with what follows it, for one CPU core (numba). Touches arrays only.

The byte-identical fast twin of `rans_reference.py`, which defines the stream. WAYS segments are decoded side by side,
so that one's latency hides behind another's work, each 16 channels of one token at a time (rans_simd.py). All that is
16 bits wide, which is twice as fast as 32: states are two halves, and integers are kept in `small` (int16), clipped to
+-LIMIT before they are refined. Since 3 q + r keeps q's sign, and a context is at most 2, clipping changes no symbol,
and where it changed something `wide` (int32) has the true integer:

    q = small + 3**n * (wide - clipped wide), n refinements later.

Then strips of TILE tokens are scaled, multiplied by the matrix, centred, rotated, rounded and stored.

Lanes and ways that have nothing to decode get tables with one symbol of probability 1: their states stay.

Legend: S segments of one tensor, T tokens, D channels, W = D rounded up to 16, K stages in hand, N lanes, R = half the
rotary dims, n tables. Functions return (code, segment): 0 is success, the others are listed below. Nothing is raised
here, and no stream can make these functions read or write outside their arrays (what a profile says, tables and their
numbers, is trusted).
"""

from __future__ import annotations

from functools import reduce

import numpy as np
from numba import njit
from numba.core import types

from kernels.rans_reference import MAX_EXCEPTION, MAX_STAGES, NUM_CONTEXTS, PROB_BITS, PROB_SUM, STATE_LOW, VALUE_LOW
from kernels.rans_simd import LANES, PAD, TILE, Lanes, Step, aligned, f32, i64, multiply_rows, padded, step, u16, u32

OK = 0
OUT_OF_WORDS = 1
BAD_STATE = 2
BAD_FINAL_STATE = 3
UNUSED_WORDS = 4
EXCEPTIONS = 5

WAYS = 4
MAX_LANES = 32
LIMIT = 128  # of a clipped integer: 128 * 3**(MAX_STAGES - 1) and what refinements add stay below 2**15
assert (LIMIT + 0.5) * 3 ** (MAX_STAGES - 1) < 1 << 15
_OPTIONS = {"nogil": True, "cache": True, "error_model": "numpy"}


# Steps: what is emitted. Way g's part of an array starts g * stride further on.


def _advance(low: Lanes, high: Lanes, freq: Lanes, offset: Lanes) -> tuple[Lanes, Lanes]:
    """Halves of frequency * (state >> 10) + slot - start, for frequency <= 1024."""
    times = freq << 16 - PROB_BITS
    tail = freq * (low >> PROB_BITS) + offset
    product = times * high
    new_low = product + tail
    carry = ((product & tail) | ((product | tail) & ~new_low)) >> 15
    # With frequency 1024 the state stays, but the product overflows to 0: then there is no carry either.
    return new_low, (freq >= PROB_SUM).choose(high, times.high_product(high)) + carry


def _row(s: Step, lanes, words, at, end, lows, highs, count, decode):
    """A token's `count` vectors: decode(way, vector, low halves) emits a symbol and returns frequencies and offsets.

    The states stay in registers. With two vectors of lanes these change places after each vector of channels.
    Returns 0, or 1 if there are too few words: then pos and states are as before.
    """
    b = s.builder
    s.keep_apart()
    each = lanes // LANES
    places = [i64(way * MAX_LANES + half * LANES) for way in range(WAYS) for half in range(each)]
    ends = [s.element(end, way) for way in range(WAYS)]
    pos = [s.element(at, way) for way in range(WAYS)]
    low, high = ([s.load(halves, place).value for place in places] for halves in (lows, highs))
    fail, done = b.append_basic_block("fail"), b.append_basic_block("done")

    def vector(v, *held):
        held = list(held)
        pos, low, high = held[:WAYS], held[WAYS : WAYS + len(places)], held[WAYS + len(places) :]
        news, needs, after = [], [], []
        for way in range(WAYS):
            old = Lanes(b, low.pop(way * each)), Lanes(b, high.pop(way * each))
            new = _advance(*old, *decode(way, v, old[0]))
            low.insert(way * each + each - 1, new[0].value)
            high.insert(way * each + each - 1, new[1].value)
            news.append(new)
            needs.append(new[1].equals(0))
            after.append(b.add(pos[way], s.count(needs[way])))
        left = [b.sub(stop, new) for stop, new in zip(ends, after, strict=True)]
        enough = b.append_basic_block("enough")
        b.cbranch(b.icmp_signed("<", reduce(b.or_, left), i64(0)), fail, enough)
        b.position_at_end(enough)
        for way, (new, need) in enumerate(zip(news, needs, strict=True)):
            last = way * each + each - 1
            low[last], high[last] = s.expand(words, pos[way], need, new[0]).value, need.choose(*new).value
        return [*after, *low, *high]

    after = s.loop(count, [*pos, *low, *high], vector)
    turned = b.mul(b.and_(count, i64(each - 1)), i64(LANES))
    for way in range(WAYS):
        s.set_element(after[way], at, way)
    for number, place in enumerate(places):
        s.store(Lanes(b, after[WAYS + number]), lows, b.xor(place, turned))
        s.store(Lanes(b, after[WAYS + len(places) + number]), highs, b.xor(place, turned))
    good = b.block
    b.branch(done)
    b.position_at_end(fail)
    b.branch(done)
    b.position_at_end(done)
    result = b.phi(i64)
    result.add_incoming(i64(0), good)
    result.add_incoming(i64(1), fail)
    return result


def _base_row(s: Step, lanes, words, at, end, lows, highs, count, lut, table, rows, small, to, block):
    """Stage 0: tables table[rows[way]:], integers to small[to:]. Returns as _row."""
    tables = [s.element(rows, way) for way in range(WAYS)]

    def decode(way, v, low):
        d = s.builder.mul(v, i64(LANES))
        slot = (low & PROB_SUM - 1).to(u32, "zext")
        entry = s.look_up(lut, s.load(table, tables[way], d) + slot)
        value = (entry >> 21).to(u16, "trunc") + VALUE_LOW
        s.store(value, small, to, d, s.builder.mul(block, i64(way)))
        return (entry >> 10).to(u16, "trunc") & 0x7FF, entry.to(u16, "trunc") & 0x3FF

    return _row(s, lanes, words, at, end, lows, highs, count, decode)


def _refine_row(s: Step, lanes, words, at, end, lows, highs, count, cuts, width, small, to, block):
    """A stage above: small[to:] becomes 3 q + r. cuts: rows of width, (way, context, c1 or c2). Returns as _row."""
    b = s.builder

    def decode(way, v, low):
        d = b.mul(v, i64(LANES))
        place = s.add(to, d, b.mul(block, i64(way)))
        q = s.load(small, place)
        zero, one = q.equals(0), q + 1 < 3  # the second is only asked where the first is not
        row = [s.load(cuts, d, b.mul(width, i64(2 * NUM_CONTEXTS * way + i))) for i in range(2 * NUM_CONTEXTS)]
        first = zero.choose(row[0], one.choose(row[2], row[4]))
        second = zero.choose(row[1], one.choose(row[3], row[5]))
        slot = low & PROB_SUM - 1
        middle, high = slot >= first, slot >= second
        start = high.choose(second, middle.choose(first, 0))
        stop = high.choose(PROB_SUM, middle.choose(second, first))
        sign = q.signed_shift(15) | 1
        triple = q + q + q
        s.store(middle.choose(high.choose(triple + sign, triple), triple - sign), small, place)
        return stop - start, slot - start

    return _row(s, lanes, words, at, end, lows, highs, count, decode)


@step(types.int64)
def base_row_16(s: Step, words, at, end, lows, highs, count, lut, table, rows, small, to, block):
    return _base_row(s, 16, words, at, end, lows, highs, count, lut, table, rows, small, to, block)


@step(types.int64)
def base_row_32(s: Step, words, at, end, lows, highs, count, lut, table, rows, small, to, block):
    return _base_row(s, 32, words, at, end, lows, highs, count, lut, table, rows, small, to, block)


@step(types.int64)
def refine_row_16(s: Step, words, at, end, lows, highs, count, cuts, width, small, to, block):
    return _refine_row(s, 16, words, at, end, lows, highs, count, cuts, width, small, to, block)


@step(types.int64)
def refine_row_32(s: Step, words, at, end, lows, highs, count, cuts, width, small, to, block):
    return _refine_row(s, 32, words, at, end, lows, highs, count, cuts, width, small, to, block)


@step(types.void)
def scale_step(s: Step, q, at, multiplier, scale, d, value, to):
    """q: small or wide."""
    whole = s.load(q, at)
    whole = (whole if whole.value.type.element == u32 else whole.to(u32, "sext")) * s.spread(
        s.builder.trunc(multiplier, u32)
    )
    s.store(whole.to(f32, "sitofp").fmul(s.load(scale, d)), value, to)


def _store_bf16(s: Step, value: Lanes, out, to, count):
    """Rounds to nearest even and stores the first `count`."""
    raw = value.to(u32, "bitcast")
    s.store_leading((raw + 0x7FFF + (raw >> 16 & 1) >> 16).to(u16, "trunc"), out, to, count)


@step(types.void)
def plain_step(s: Step, value, at, mean, d, out, to, count):
    _store_bf16(s, s.load(value, at).fadd(s.load(mean, d)), out, to, count)


@step(types.void)
def turn_step(s: Step, value, at, mean, d, half, cos, sin, angle, out, to, count):
    """Channels d and d + half, rotated by cos, sin[angle:]."""
    a = s.load(value, at).fadd(s.load(mean, d))
    b = s.load(value, at, half).fadd(s.load(mean, d, half))
    c, n = s.load_leading(cos, angle, count), s.load_leading(sin, angle, count)
    _store_bf16(s, a.fmul(c).fsub(b.fmul(n)), out, to, count)
    _store_bf16(s, b.fmul(c).fadd(a.fmul(n)), out, s.add(to, half), count)


# Loops around the steps.


@njit(**_OPTIONS)
def _num_lanes(num_dims):
    return 32 if num_dims >= 128 else 16


@njit(**_OPTIONS)
def _read_states(words, pos, first, last, lows, highs, at):
    """Reads the states of lanes first to last - 1; False if one is below the legal range."""
    good = True
    for j in range(first, last):
        lows[at + j] = words[pos + 2 * (j - first)]
        highs[at + j] = words[pos + 2 * (j - first) + 1]
        good = good and highs[at + j] > 0
    return good


@njit(**_OPTIONS)
def _finished(lows, highs, ways):
    """The first way whose lanes do not all end where every encoder starts, or -1."""
    for j in range(ways * MAX_LANES):
        if lows[j] != STATE_LOW & 0xFFFF or highs[j] != STATE_LOW >> 16:
            return j // MAX_LANES
    return -1


@njit(**_OPTIONS)
def _read_exceptions(words, pos, count, stage, num_tokens, num_dims, width, q, limit, write):
    """Puts exceptions in place, if `write`: q [T * W] of this stage.

    Returns the highest channel that has one, or -2 if they are malformed; and whether all integers are within limit.
    """
    last = np.int64(-1)
    highest = np.int64(-1)
    fits = True
    for i in range(count):
        e = pos + 4 * i
        place = np.int64(words[e]) | (np.int64(words[e + 1]) << 16)
        value = np.int64(np.int32(np.uint32(words[e + 2]) | (np.uint32(words[e + 3]) << np.uint32(16))))
        if place <= last or place >= num_tokens * num_dims or value > MAX_EXCEPTION or value < -MAX_EXCEPTION:
            return np.int64(-2), False
        last = place
        d = place % num_dims
        at = place // num_dims * width + d
        if stage > 0:
            value += 3 * ((np.int64(q[at]) + 1) // 3)
        fits = fits and -limit <= value <= limit
        if write:
            q[at] = value
        highest = max(highest, d)
    return highest, fits


@njit(**_OPTIONS)
def _widen(small, wide, is_wide, growth):
    """wide becomes the true integers; it was, `growth` = 3**n ago, if is_wide."""
    if is_wide:
        for i in range(small.size):
            over = wide[i] - min(max(wide[i], np.int32(-LIMIT)), np.int32(LIMIT))
            wide[i] = np.int32(small[i]) + np.int32(growth) * over
    else:
        for i in range(small.size):
            wide[i] = small[i]


@njit(**_OPTIONS)
def _narrow(small, wide):
    """small becomes wide, clipped. Returns whether that changed anything."""
    lost = np.int32(0)
    for i in range(small.size):
        clipped = min(max(wide[i], np.int32(-LIMIT)), np.int32(LIMIT))
        lost |= clipped ^ wide[i]
        small[i] = clipped
    return lost != 0


@njit(**_OPTIONS)
def _add_anchors(q, size, num_tokens, width):
    for t in range(num_tokens):
        anchor = (t - t % size) * width
        if t % size:
            for d in range(width):
                q[t * width + d] += q[anchor + d]


@njit(**_OPTIONS)
def _base_rows(words, at, end, lows, highs, lut, table, group, s, ways, small, num_tokens, count, width, lanes):
    """Stage 0 of all tokens, `count` vectors; zeros behind. False if there are too few words."""
    block = num_tokens * width
    rows = np.empty(WAYS, np.int64)
    short = 0
    for t in range(num_tokens):
        for g in range(WAYS):
            rows[g] = 2 * g * width
            if g < ways and group[s + g] > 1 and t % group[s + g]:
                rows[g] += width
        to = t * width
        if count > 0 and lanes == 16:
            short |= base_row_16(words, at, end, lows, highs, count, lut, table, rows, small, to, block)
        elif count > 0:
            short |= base_row_32(words, at, end, lows, highs, count, lut, table, rows, small, to, block)
        if count * LANES < width:
            for g in range(ways):
                small[g * block + to + count * LANES : g * block + to + width] = 0
    return short == 0


@njit(**_OPTIONS)
def _refine_rows(words, at, end, lows, highs, cut, small, num_tokens, count, width, lanes):
    """A stage above, likewise; behind, integers grow threefold."""
    block = num_tokens * width
    short = 0
    for t in range(num_tokens):
        to = t * width
        if count > 0 and lanes == 16:
            short |= refine_row_16(words, at, end, lows, highs, count, cut, width, small, to, block)
        elif count > 0:
            short |= refine_row_32(words, at, end, lows, highs, count, cut, width, small, to, block)
    return short == 0


@njit(**_OPTIONS)
def _decode_group(
    words, pos, size, exceptions, lut, base_index, group, cuts, refine_index, active, s, num_tokens, num_dims,
    lows, highs, table, cut, small, wide, is_wide, since, highest,
):  # fmt: skip
    """All stages of segments s to s + WAYS - 1. Returns (code, way).

    lows, highs [WAYS, 32] u16; table [WAYS, 2, W] u32; cut [WAYS, 3, 2, W] u16; small, wide [WAYS, T, W]. Per way:
    is_wide, since: the stage that wide is of; highest: the highest channel with an exception.
    """
    num_stages, num_segments = pos.shape
    lanes = _num_lanes(num_dims)
    width = padded(num_dims)
    block = num_tokens * width
    ways = min(WAYS, num_segments - s)
    at = np.zeros(WAYS, np.int64)
    end = np.zeros(WAYS, np.int64)
    lows[:] = STATE_LOW & 0xFFFF
    highs[:] = STATE_LOW >> 16
    is_wide[:] = 0
    since[:] = 0
    highest[:] = -1
    for k in range(num_stages):
        most = 0
        for g in range(ways):
            p = pos[k, s + g]
            n = size[k, s + g]
            e = exceptions[k, s + g]
            first = min(lanes, active[k - 1, s + g]) if k > 0 else 0
            last = min(lanes, active[k, s + g])
            at[g] = p + 2 * (last - first)
            end[g] = p + n - 4 * e
            if p < 0 or n < 0 or e < 0 or e > n or end[g] < at[g] or p > words.size - n:
                return OUT_OF_WORDS, g
            if not _read_states(words, p, first, last, lows, highs, g * MAX_LANES):
                return BAD_STATE, g
            most = max(most, active[k, s + g])
        for g in range(WAYS):
            a = active[k, s + g] if g < ways else 0
            if k == 0:
                for r in range(2):
                    row = (2 * g + r) * width
                    for d in range(a):
                        table[row + d] = np.uint32(base_index[s + g, r, d]) << np.uint32(PROB_BITS)
                    for d in range(a, width):
                        table[row + d] = lut.size - PROB_SUM
            else:
                for c in range(NUM_CONTEXTS):
                    row = 2 * (NUM_CONTEXTS * g + c) * width
                    for d in range(a):
                        both = cuts[k - 1, refine_index[k - 1, s + g, d], c]
                        cut[row + d] = both & np.uint32(0xFFFF)
                        cut[row + width + d] = both >> np.uint32(16)
                    for d in range(a, width):
                        cut[row + d] = 0
                        cut[row + width + d] = PROB_SUM
        count = padded(most) // LANES
        if k == 0:
            enough = _base_rows(
                words, at, end, lows, highs, lut, table, group, s, ways, small, num_tokens, count, width, lanes
            )
        else:
            # Exceptions may stand in channels that are not coded yet: those have to grow, too.
            for g in range(ways):
                count = max(count, padded(highest[g] + 1) // LANES)
            enough = _refine_rows(words, at, end, lows, highs, cut, small, num_tokens, count, width, lanes)
        if not enough:
            return OUT_OF_WORDS, 0
        for g in range(ways):
            if at[g] != end[g]:
                return UNUSED_WORDS, g
            e = exceptions[k, s + g]
            by_group = k == 0 and group[s + g] > 1
            if e == 0 and not by_group:
                continue
            mine = small[g * block : (g + 1) * block]
            true = wide[g * block : (g + 1) * block]
            growth = 3 ** (k - since[g])
            found, fits = _read_exceptions(
                words, end[g], e, k, num_tokens, num_dims, width, mine, LIMIT * growth, False
            )
            if found == -2:
                return EXCEPTIONS, g
            highest[g] = max(highest[g], found)
            if fits and not by_group and not is_wide[g]:
                _read_exceptions(words, end[g], e, k, num_tokens, num_dims, width, mine, 0, True)
                continue
            _widen(mine, true, is_wide[g], growth)
            since[g] = k
            _read_exceptions(words, end[g], e, k, num_tokens, num_dims, width, true, 0, True)
            if by_group:
                _add_anchors(true, group[s + g], num_tokens, width)
            is_wide[g] = _narrow(mine, true)
    return OK, -1


@njit(**_OPTIONS)
def _with_dead_table(lut):
    """lut and one more table: the integer 0, frequency 1,024."""
    out = np.empty(lut.size + PROB_SUM, np.uint32)
    out[: lut.size] = lut
    for slot in range(PROB_SUM):
        out[lut.size + slot] = np.uint32(-VALUE_LOW << 21 | PROB_SUM << 10 | slot)
    return out


@njit(**_OPTIONS)
def decode_quantized(
    words, pos, size, exceptions, lut, base_index, group, cuts, refine_index, active, is_whole, multiplier, step, mean,
    matrix, synthesis, turned, cos, sin, out, out_pos, stride_t,
):  # fmt: skip
    """Pieces -> bf16 rows: entropy decode, dequantize, transform, rotate, round, store.

    words [*] u16; pos, size, exceptions [K, S] i64: first word of each piece behind any side information, its words
    from there on, its exceptions. lut [n << 10] u32: (value + 128) << 21 | frequency << 10 | slot - start.
    base_index [S, 2, D] u8 (1: tokens coded as differences within `group` [S] i64); cuts [K - 1, n, 3] u32:
    c1 | c2 << 16; refine_index [K - 1, S, D] u8; active [K, S] i64. is_whole: no stage was cut off.
    An integer times `multiplier` times step [S, D] f32 (and matrix synthesis[matrix[s]] f32 [m, D, D], -1 none) plus
    mean [S, D] f32, rotated by cos, sin [T, R] f32 if turned[s]; out [*] u16, out_pos [S] i64, stride_t.
    """
    num_stages, num_segments = pos.shape
    num_tokens = cos.shape[0]
    num_dims = mean.shape[1]
    width = padded(num_dims)
    block = num_tokens * width
    full_lut = _with_dead_table(lut)
    lows, highs = aligned(WAYS * MAX_LANES, np.uint16), aligned(WAYS * MAX_LANES, np.uint16)
    table = aligned(WAYS * 2 * width, np.uint32)
    cut = aligned(WAYS * NUM_CONTEXTS * 2 * width, np.uint16)
    small, wide = aligned(WAYS * block, np.int16), aligned(WAYS * block, np.int32)
    is_wide, since, highest = np.empty(WAYS, np.int64), np.empty(WAYS, np.int64), np.empty(WAYS, np.int64)
    scale = aligned(width + PAD, np.float32)
    centre = aligned(width + PAD, np.float32)
    value = aligned(TILE * width + PAD, np.float32)
    product = aligned(TILE * width + PAD, np.float32)
    square = aligned(num_dims * width if synthesis.shape[0] else 0, np.float32)
    for s in range(0, num_segments, WAYS):
        ways = min(WAYS, num_segments - s)
        code, way = _decode_group(
            words, pos, size, exceptions, full_lut, base_index, group, cuts, refine_index, active, s, num_tokens,
            num_dims, lows, highs, table, cut, small, wide, is_wide, since, highest,
        )  # fmt: skip
        if code != OK:
            return code, s + way
        if is_whole:
            way = _finished(lows, highs, ways)
            if way >= 0:
                return BAD_FINAL_STATE, s + way
        for g in range(ways):
            scale[:num_dims] = step[s + g]
            centre[:num_dims] = mean[s + g]
            half = cos.shape[1] if turned[s + g] else 0
            used = max(active[num_stages - 1, s + g], highest[g] + 1)
            if matrix[s + g] >= 0:
                for j in range(used):
                    square[j * width : j * width + num_dims] = synthesis[matrix[s + g], j]
            if is_wide[g]:
                mine = small[g * block : (g + 1) * block]
                _widen(mine, wide[g * block : (g + 1) * block], True, 3 ** (num_stages - 1 - since[g]))
            for strip in range(0, num_tokens, TILE):
                rows = min(TILE, num_tokens - strip)
                first = g * block + strip * width
                if is_wide[g]:
                    for r in range(rows):
                        for d in range(0, width, LANES):
                            scale_step(wide, first + r * width + d, multiplier, scale, d, value, r * width + d)
                else:
                    for r in range(rows):
                        for d in range(0, width, LANES):
                            scale_step(small, first + r * width + d, multiplier, scale, d, value, r * width + d)
                source = value
                if matrix[s + g] >= 0:
                    multiply_rows(value, square, used, width, product)
                    source = product
                for r in range(rows):
                    t = strip + r
                    to = out_pos[s + g] + t * stride_t
                    for d in range(0, half, LANES):
                        turn_step(
                            source, r * width + d, centre, d, half, cos, sin, t * half + d, out, to + d,
                            min(LANES, half - d),
                        )  # fmt: skip
                    for d in range(2 * half, num_dims, LANES):
                        plain_step(source, r * width + d, centre, d, out, to + d, min(LANES, num_dims - d))
    return OK, -1


@njit(**_OPTIONS)
def decode_bytes(words, pos, size, exceptions, lut, index, coded):
    """Lossless: pieces -> coded bytes [S, T, D] u8. pos, size, exceptions [S] i64; index [S, D] u8."""
    num_segments, num_tokens, num_dims = coded.shape
    width = padded(num_dims)
    block = num_tokens * width
    full_lut = _with_dead_table(lut)
    lows, highs = aligned(WAYS * MAX_LANES, np.uint16), aligned(WAYS * MAX_LANES, np.uint16)
    table = aligned(WAYS * 2 * width, np.uint32)
    cut = np.empty(0, np.uint16)
    small, wide = aligned(WAYS * block, np.int16), aligned(WAYS * block, np.int32)
    is_wide, since, highest = np.empty(WAYS, np.int64), np.empty(WAYS, np.int64), np.empty(WAYS, np.int64)
    group = np.zeros(num_segments, np.int64)
    active = np.full((1, num_segments), num_dims, np.int64)
    both = np.empty((num_segments, 2, num_dims), np.uint8)
    both[:, 0] = index
    both[:, 1] = index
    for s in range(0, num_segments, WAYS):
        ways = min(WAYS, num_segments - s)
        code, way = _decode_group(
            words, pos.reshape(1, -1), size.reshape(1, -1), exceptions.reshape(1, -1), full_lut, both, group,
            np.zeros((0, 1, NUM_CONTEXTS), np.uint32), both[:0], active, s, num_tokens, num_dims, lows, highs, table,
            cut, small, wide, is_wide, since, highest,
        )  # fmt: skip
        if code != OK:
            return code, s + way
        way = _finished(lows, highs, ways)
        if way >= 0:
            return BAD_FINAL_STATE, s + way
        for g in range(ways):
            beyond = np.uint16(is_wide[g] << 15)
            for t in range(num_tokens):
                source = small[g * block + t * width : g * block + t * width + num_dims]
                row = coded[s + g, t]
                for d in range(num_dims):
                    byte = np.uint16(source[d] - np.int16(VALUE_LOW))
                    beyond |= byte
                    row[d] = np.uint8(byte)
            if beyond > 255:  # an exception that is no byte
                return EXCEPTIONS, s + g
    return OK, -1


@njit(**_OPTIONS)
def join_bf16(coded, plane, out, out_pos, stride_t):
    """Exponent bytes and sign/mantissa bytes [S, T, D] u8 -> bf16 rows."""
    num_segments, num_tokens, num_dims = coded.shape
    for s in range(num_segments):
        for t in range(num_tokens):
            high = coded[s, t]
            low = plane[s, t]
            row = out[out_pos[s] + t * stride_t : out_pos[s] + t * stride_t + num_dims]
            for d in range(num_dims):
                w = np.uint16(low[d])
                row[d] = np.uint16(((w & np.uint16(0x80)) << 8) | (np.uint16(high[d]) << 7) | (w & np.uint16(0x7F)))
