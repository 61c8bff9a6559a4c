"""The vector steps of the CPU's paged attention (`attention_numba.py`), in LLVM IR by way of `rans_simd.py`.

Every matrix operand is made of 32-bit *words*. Where the model is bf16 and the CPU multiplies bf16 (AVX512-BF16), a
word is a pair of neighbours along the summed dimension and one instruction adds both products; else it is a float32.
A sum always runs over its words in ascending order from 0, in one lane: what a row gives does not depend on which rows
are computed beside it, nor on words of 0 behind the last.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from llvmlite import ir
from numba import types
from numba.core import cgutils

from kernels.rans_simd import LANES, Lanes, Step, has_avx512, i64, step, u16, u32
from kernels.vector_math import (
    across,
    bf16x32,
    constant,
    exp2,
    f32x16,
    fma,
    for_sixteens,
    from_bf16,
    load_float,
    tanh,
    to_bf16,
    u16x16,
    u32x16,
)

LEAST_EXPONENT = -1e20  # of a row that saw nothing yet: below every real one, above HIDDEN
HIDDEN = -1e30
TILE = 256  # keys
BLOCK_SIZES = (6, 4, 2, 1)  # query rows: 6 x 4 vectors of sums and 4 of the other operand fill the 32 registers
STATE = 3  # numbers a row keeps between tiles: its exponent m, its total, what to multiply its old sums with


# -- packing: 16 neighbours become words ------------------------------------------------------------------------------


def _transpose(b: ir.IRBuilder, rows: list[ir.Value]) -> list[ir.Value]:
    """16 vectors of 16: lane i of vector j becomes lane j of vector i. Swaps blocks of 8, 4, 2 and 1."""
    size = LANES // 2
    while size:
        low = [lane if not lane & size else LANES + lane - size for lane in range(LANES)]
        high = [lane + size if not lane & size else LANES + lane for lane in range(LANES)]
        low_mask, high_mask = (constant(u32x16, lanes) for lanes in (low, high))
        for i in range(LANES):
            if not i & size:
                first, second = rows[i], rows[i + size]
                rows[i] = b.shuffle_vector(first, second, low_mask)
                rows[i + size] = b.shuffle_vector(first, second, high_mask)
        size //= 2
    return rows


def _rows(
    s: Step, slots: ir.Value, first: ir.Value, heads: ir.Value, head: ir.Value, dim: ir.Value, count: int
) -> list:
    """Where a head's rows of slots[first : first + count] start in pages [slots, heads, dim]."""
    b = s.builder
    return [b.mul(b.add(b.mul(s.element(slots, s.add(first, i)), heads), head), dim) for i in range(count)]


@step(types.void)
def pack_keys(s: Step, pages, slots, first, heads, head, dim, words):
    """16 keys, those in slots[first : first + 16], become columns `first ..` of `words` [depth, 256]."""
    b = s.builder
    paired = words.type.pointee == u32
    starts = _rows(s, slots, first, heads, head, dim, LANES)

    def sixteen_words(at: ir.Value, left: ir.Value | None) -> None:
        vectors = []
        for start in starts:
            if paired:
                pairs = b.bitcast(pages, u32.as_pointer())
                index = b.add(b.lshr(start, i64(1)), at)
                vectors.append((s.load(pairs, index) if left is None else s.load_leading(pairs, index, left)).value)
            else:
                vectors.append(load_float(s, pages, b.add(start, at), left))
        for i, vector in enumerate(_transpose(b, vectors)):
            s.store(Lanes(b, vector), words, b.mul(s.add(at, i), i64(TILE)), first)

    for_sixteens(s, b.lshr(dim, i64(1)) if paired else dim, sixteen_words)


@step(types.void)
def pack_values(s: Step, pages, slots, first, heads, head, dim, words, width):
    """The values in slots[first : first + 16] become the rows of words `first ..` of `words` [.., width], which are
    half as many where words are pairs of neighbours."""
    b = s.builder
    paired = words.type.pointee == u32
    starts = _rows(s, slots, first, heads, head, dim, LANES)
    target = b.lshr(first, i64(1)) if paired else first

    def sixteen_columns(at: ir.Value, left: ir.Value | None) -> None:
        for i in range(LANES // 2 if paired else LANES):
            if paired:
                indices = (b.add(start, at) for start in starts[2 * i : 2 * i + 2])
                loaded = (s.load(pages, i) if left is None else s.load_leading(pages, i, left) for i in indices)
                low, high = (lanes.to(u32, "zext") for lanes in loaded)
                value = (low | (high << 16)).value
            else:
                value = load_float(s, pages, b.add(starts[i], at), left)
            s.store(Lanes(b, value), words, b.mul(s.add(target, i), width), at)

    for_sixteens(s, dim, sixteen_columns)


@step(types.void)
def copy_row(s: Step, source, source_at, count, target, target_at):
    """target[target_at :] = source[source_at : source_at + count]"""
    b = s.builder

    def sixteen(at: ir.Value, left: ir.Value | None) -> None:
        if left is None:
            s.store(s.load(source, source_at, at), target, target_at, at)
        else:
            lanes = s.load_leading(source, b.add(source_at, at), left)
            s.store_leading(lanes, target, b.add(target_at, at), left)

    for_sixteens(s, count, sixteen)


@step(types.void)
def prefetch(s: Step, pages, slots, first, heads, head, dim):
    """Begin to fetch a head's rows of slots[first : first + 16]: memory is slower than the arithmetic on it."""
    b = s.builder
    element_bytes = 2 if pages.type.pointee == u16 else 4
    starts = _rows(s, slots, first, heads, head, dim, LANES)
    lines = b.lshr(b.add(b.mul(dim, i64(element_bytes)), i64(63)), i64(6))
    for start in starts:
        with cgutils.for_range(b, lines) as loop:
            offset = b.mul(loop.index, i64(64 // element_bytes))
            at = s.pointer(pages, b.add(start, offset), ir.IntType(8))
            s.call("llvm.prefetch.p0", ir.VoidType(), at, u32(0), u32(2), u32(1))


# -- matrix products --------------------------------------------------------------------------------------------------


def _product(
    s: Step, a, a_at, a_width, b_, b_at, b_width, depth, c, c_at, c_width, rows, vectors, rescale=None
) -> None:
    """c[r, :] = sum over words of a[r, word] * b[word, :] for `rows` rows and `vectors` vectors of columns. With
    `rescale`, a factor a row: c[r, :] * factor + the sum."""
    # All registers: 6 x 4 sums in 32 of 512 bits, 6 x 1 in 16 of 256.
    together = vectors if has_avx512(s.context) else 1
    for first in range(0, vectors, together):
        _columns(s, a, a_at, a_width, b_, b_at, b_width, depth, c, c_at, c_width, rows, first, together, rescale)


def _columns(
    s: Step, a, a_at, a_width, b_, b_at, b_width, depth, c, c_at, c_width, rows, first, vectors, rescale
) -> None:
    b = s.builder
    lines = [b.add(a_at, b.mul(a_width, i64(r))) for r in range(rows)]

    def add_word(word: ir.Value, *sums: ir.Value) -> Sequence[ir.Value]:
        line = b.add(b_at, b.mul(word, b_width))
        columns = [s.load(b_, line, (first + v) * LANES).value for v in range(vectors)]
        factors = [s.spread(s.element(a, b.add(at, word))).value for at in lines]
        return [_multiply_add(s, factors[i // vectors], columns[i % vectors], total) for i, total in enumerate(sums)]

    sums = s.loop(depth, [constant(f32x16, 0.0)] * (rows * vectors), add_word)
    for i, total in enumerate(sums):
        row, at = i // vectors, (first + i % vectors) * LANES
        target = s.add(c_at, b.mul(c_width, i64(row)), at)
        if rescale is not None:
            total = s.load(c, target).fmul(s.spread(rescale[row])).fadd(Lanes(b, total)).value
        s.store(Lanes(b, total), c, target)


def _multiply_add(s: Step, x: ir.Value, y: ir.Value, total: ir.Value) -> ir.Value:
    if x.type == f32x16:
        return fma(s, x, y, total)
    b = s.builder
    pairs = (b.bitcast(operand, bf16x32) for operand in (x, y))
    return s.call("llvm.x86.avx512bf16.dpbf16ps.512", f32x16, total, *pairs)


def _for_row_count(s: Step, rows: ir.Value, emit: Callable[[int], None]) -> None:
    """emit(rows), with a loop of its own for each of BLOCK_SIZES."""
    b = s.builder
    behind, impossible = b.append_basic_block("behind"), b.append_basic_block("impossible")
    choice = b.switch(rows, impossible)
    for count in BLOCK_SIZES:
        block = b.append_basic_block(f"rows{count}")
        choice.add_case(i64(count), block)
        b.position_at_end(block)
        emit(count)
        b.branch(behind)
    b.position_at_end(impossible)
    b.unreachable()
    b.position_at_end(behind)


@step(types.void)
def score(s: Step, rows, queries, queries_at, depth, keys, first, scores):
    """scores[r, first : first + 64] of `rows` rows of queries [.., depth] and 64 of the keys [depth, 256]."""
    width = i64(TILE)

    def emit(count: int) -> None:
        _product(s, queries, queries_at, depth, keys, first, width, depth, scores, first, width, count, 4)

    _for_row_count(s, rows, emit)


def _weigh(s: Step, rows, weights, depth, values, column, width, sums, sums_at, state, state_at, vectors) -> None:
    b = s.builder
    line = i64(TILE // 2 if weights.type.pointee == u32 else TILE)

    def emit(count: int) -> None:
        factors = [s.element(state, s.add(state_at, STATE * row + 2)) for row in range(count)]
        target = b.add(sums_at, column)
        _product(s, weights, i64(0), line, values, column, width, depth, sums, target, width, count, vectors, factors)

    _for_row_count(s, rows, emit)


@step(types.void)
def weigh_64(s: Step, rows, weights, depth, values, column, width, sums, sums_at, state, state_at):
    """sums[r, column : column + 64] = old * the row's factor + weights[r, :depth] @ values[:depth]; [.., width]."""
    _weigh(s, rows, weights, depth, values, column, width, sums, sums_at, state, state_at, 4)


@step(types.void)
def weigh_16(s: Step, rows, weights, depth, values, column, width, sums, sums_at, state, state_at):
    _weigh(s, rows, weights, depth, values, column, width, sums, sums_at, state, state_at, 1)


# -- softmax ----------------------------------------------------------------------------------------------------------


def _softmax(
    s: Step, scores, at, first, stop, groups, rule, weights, weights_at, state, state_at, capped: bool
) -> None:
    """One row and one tile: scores[at : at + 16 * groups], of which [first, stop) may be seen, become weights in units
    of 2**m, and state (m, total, factor for what was summed before) moves on. rule: factor, the cap's two factors."""
    b = s.builder
    larger = lambda x, y: b.select(b.fcmp_ordered(">", x, y), x, y)  # noqa: E731
    lane = constant(u32x16, range(LANES))
    first_lane, stop_lane = (s.spread(b.trunc(number, u32)).value for number in (first, stop))
    hidden = constant(f32x16, HIDDEN)

    def hide(group: ir.Value, most: ir.Value) -> Sequence[ir.Value]:
        index = b.shl(group, i64(4))
        value = s.load(scores, at, index).value
        if capped:
            value = tanh(s, b.fmul(value, s.spread(s.element(rule, 1)).value))
        key = b.add(lane, s.spread(b.trunc(index, u32)).value)
        is_seen = b.and_(b.icmp_signed(">=", key, first_lane), b.icmp_signed("<", key, stop_lane))
        value = b.select(is_seen, value, hidden)
        s.store(Lanes(b, value), scores, at, index)
        return [larger(value, most)]

    def look(group: ir.Value, most: ir.Value) -> Sequence[ir.Value]:
        return [larger(s.load(scores, at, b.shl(group, i64(4))).value, most)]

    if capped:
        most = s.loop(groups, [hidden], hide)[0]
    else:  # most rows see all of most tiles
        sees_all = b.and_(b.icmp_signed("<=", first, i64(0)), b.icmp_signed(">=", stop, b.shl(groups, i64(4))))
        with b.if_else(sees_all) as (whole, part):
            with whole:
                of_whole, after_whole = s.loop(groups, [hidden], look)[0], b.block
            with part:
                of_part, after_part = s.loop(groups, [hidden], hide)[0], b.block
        phi = b.phi(f32x16)
        phi.add_incoming(of_whole, after_whole)
        phi.add_incoming(of_part, after_part)
        most = phi
    most = across(s, most, larger)
    factor = s.spread(s.element(rule, 2 if capped else 0)).value
    old = s.spread(s.element(state, state_at)).value
    m = s.call("llvm.ceil.v16f32", f32x16, b.fmul(most, factor))
    m = larger(m, old)
    minus_m = b.fneg(m)

    def weigh(group: ir.Value, total: ir.Value) -> Sequence[ir.Value]:
        index = b.shl(group, i64(4))
        weight = exp2(s, fma(s, s.load(scores, at, index).value, factor, minus_m))
        if weights.type.pointee == u32:
            # The total is one of the weights as they are used: a row that sees one key gets its value, bit for bit.
            short = to_bf16(s, weight)
            target = s.pointer(weights, s.add(weights_at, b.shl(group, i64(3))), u16x16)
            b.store(short, target, align=4)
            weight = from_bf16(s, short)
        else:
            s.store(Lanes(b, weight), weights, weights_at, index)
        return [b.fadd(total, weight)]

    total = across(s, s.loop(groups, [constant(f32x16, 0.0)], weigh)[0], b.fadd)
    rescale = exp2(s, b.fsub(old, m))
    old_total = s.spread(s.element(state, s.add(state_at, 1))).value
    total = b.fadd(b.fmul(old_total, rescale), total)
    for i, value in enumerate((m, total, rescale)):
        s.set_element(b.extract_element(value, u32(0)), state, s.add(state_at, i))


@step(types.void)
def softmax(s: Step, scores, at, first, stop, groups, rule, weights, weights_at, state, state_at):
    _softmax(s, scores, at, first, stop, groups, rule, weights, weights_at, state, state_at, capped=False)


@step(types.void)
def softmax_capped(s: Step, scores, at, first, stop, groups, rule, weights, weights_at, state, state_at):
    _softmax(s, scores, at, first, stop, groups, rule, weights, weights_at, state, state_at, capped=True)


@step(types.void)
def store_row(s: Step, sums, at, dim, total, total_at, out, out_at):
    """out[out_at :] = sums[at : at + dim] / total[total_at], rounded to bf16 where `out` holds u16."""
    b = s.builder
    divisor = s.spread(s.element(total, total_at))

    def sixteen(index: ir.Value, left: ir.Value | None) -> None:
        value = s.load(sums, at, index).fdiv(divisor)
        if out.type.pointee == u16:
            value = Lanes(b, to_bf16(s, value.value))
        if left is None:
            s.store(value, out, out_at, index)
        else:
            s.store_leading(value, out, b.add(out_at, index), left)

    for_sixteens(s, dim, sixteen)
