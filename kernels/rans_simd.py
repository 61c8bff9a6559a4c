"""Vectors of sixteen lanes for numba functions: LLVM IR, where numba has no words for it. For the codec's CPU coders.

numba compiles loops; it cannot say "expand these words into the lanes that need one", and it cannot be relied on to
vectorize a loop with masks. A *step* here is a numba intrinsic: its Python code runs at compile time and emits vector
instructions by way of llvmlite, numba's own code generator. The IR is portable: every CPU runs it, and one with
AVX-512 (VBMI2) three to five times as fast as one with AVX2. Two instructions have no portable fast form: `expand` and
`push` ask has_avx512.

numba's cache watches the file of the outermost function only: after an edit here, touch the files that import this one.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit
from numba.core import cgutils, types
from numba.core.errors import TypingError
from numba.extending import intrinsic

LANES = 16
PAD = LANES  # elements behind an array's last that a step may read
TILE = 4  # tokens that multiply_rows takes at once
bit, u8, u16, u32, i64 = (ir.IntType(bits) for bits in (1, 8, 16, 32, 64))
f32 = ir.FloatType()


def _vector(element: ir.Type) -> ir.VectorType:
    return ir.VectorType(element, LANES)


def _align(element: ir.Type) -> int:
    return 4 if element == f32 else element.width // 8


def _suffix(kind: ir.VectorType) -> str:
    return f"v{LANES}{'f32' if kind.element == f32 else f'i{kind.element.width}'}"


def has_avx512(context: Any) -> bool:
    """Whether numba compiles for a CPU that expands and compresses words (its cache keeps the kinds apart)."""
    features = context.codegen().magic_tuple()[2].split(",")
    return {"+avx512f", "+avx512bw", "+avx512vl", "+avx512vbmi2"} <= set(features)


class Lanes:
    """A vector of 16 numbers and its operators. Integers are unsigned unless said otherwise; a mask is 16 bits."""

    __slots__ = ("builder", "value")

    def __init__(self, builder: ir.IRBuilder, value: ir.Value) -> None:
        self.builder, self.value = builder, value

    def constant(self, number: float) -> Lanes:
        """A number in all lanes of a vector like this one."""
        element = self.value.type.element
        return Lanes(self.builder, ir.Constant(_vector(element), [ir.Constant(element, number)] * LANES))

    def _with(self, emit: Callable[..., ir.Value], other: Any) -> Lanes:
        return Lanes(
            self.builder, emit(self.value, (other if isinstance(other, Lanes) else self.constant(other)).value)
        )

    def __add__(self, other: Any) -> Lanes:
        return self._with(self.builder.add, other)

    def __sub__(self, other: Any) -> Lanes:
        return self._with(self.builder.sub, other)

    def __mul__(self, other: Any) -> Lanes:
        return self._with(self.builder.mul, other)

    def __and__(self, other: Any) -> Lanes:
        return self._with(self.builder.and_, other)

    def __or__(self, other: Any) -> Lanes:
        return self._with(self.builder.or_, other)

    def high_product(self, other: Lanes) -> Lanes:
        """The upper 16 bits of the products of u16 numbers."""
        return ((self.to(u32, "zext") * other.to(u32, "zext")) >> 16).to(u16, "trunc")

    def __xor__(self, other: Any) -> Lanes:
        return self._with(self.builder.xor, other)

    def __invert__(self) -> Lanes:
        return Lanes(self.builder, self.builder.not_(self.value))

    def __lshift__(self, bits: int) -> Lanes:
        return self._with(self.builder.shl, bits)

    def __rshift__(self, bits: int) -> Lanes:
        return self._with(self.builder.lshr, bits)

    def signed_shift(self, bits: int) -> Lanes:
        return self._with(self.builder.ashr, bits)

    def __lt__(self, other: Any) -> Lanes:
        return self._with(lambda a, b: self.builder.icmp_unsigned("<", a, b), other)

    def __ge__(self, other: Any) -> Lanes:
        return self._with(lambda a, b: self.builder.icmp_unsigned(">=", a, b), other)

    def signed_below(self, other: Any) -> Lanes:
        return self._with(lambda a, b: self.builder.icmp_signed("<", a, b), other)

    def at_most(self, other: Any) -> Lanes:
        """Of floats; False for NaN."""
        return self._with(lambda a, b: self.builder.fcmp_ordered("<=", a, b), other)

    def equals(self, other: Any) -> Lanes:
        return self._with(lambda a, b: self.builder.icmp_unsigned("==", a, b), other)

    def fadd(self, other: Any) -> Lanes:
        return self._with(self.builder.fadd, other)

    def fsub(self, other: Any) -> Lanes:
        return self._with(self.builder.fsub, other)

    def fmul(self, other: Any) -> Lanes:
        return self._with(self.builder.fmul, other)

    def fdiv(self, other: Any) -> Lanes:
        return self._with(self.builder.fdiv, other)

    def choose(self, yes: Any, no: Any) -> Lanes:
        """Of a mask: lane by lane yes or no."""
        yes = yes if isinstance(yes, Lanes) else no.constant(yes)
        return Lanes(self.builder, self.builder.select(self.value, yes.value, (yes._with(lambda a, b: b, no)).value))

    def to(self, element: ir.Type, instruction: str) -> Lanes:
        return Lanes(self.builder, getattr(self.builder, instruction)(self.value, _vector(element)))

    def bits(self) -> ir.Value:
        """Of a mask: its bits as one u16."""
        return self.builder.bitcast(self.value, u16)


class Step:
    """What a step's body is written with. Arrays are addressed from their first element, in elements."""

    def __init__(self, context: Any, builder: ir.IRBuilder, signature: Any, args: Sequence[ir.Value]) -> None:
        self.context, self.builder = context, builder
        self.args = [
            context.make_array(kind)(context, builder, value).data if isinstance(kind, types.Array) else value
            for kind, value in zip(signature.args, args, strict=True)
        ]

    def add(self, *numbers: Any) -> ir.Value:
        return reduce(self.builder.add, [i64(n) if isinstance(n, int) else n for n in numbers])

    def pointer(self, array: ir.Value, index: ir.Value, kind: ir.Type) -> ir.Value:
        return self.builder.bitcast(self.builder.gep(array, [index]), kind.as_pointer())

    def element(self, array: ir.Value, index: Any) -> ir.Value:
        return self.builder.load(self.builder.gep(array, [i64(index) if isinstance(index, int) else index]))

    def set_element(self, value: ir.Value, array: ir.Value, index: Any) -> None:
        self.builder.store(value, self.builder.gep(array, [i64(index) if isinstance(index, int) else index]))

    def load(self, array: ir.Value, *index: Any) -> Lanes:
        """16 neighbouring elements; an index is the sum of its terms."""
        kind = _vector(array.type.pointee)
        value = self.builder.load(self.pointer(array, self.add(*index), kind), align=_align(kind.element))
        return Lanes(self.builder, value)

    def store(self, lanes: Lanes, array: ir.Value, *index: Any) -> None:
        kind = lanes.value.type
        self.builder.store(lanes.value, self.pointer(array, self.add(*index), kind), align=_align(kind.element))

    def load_leading(self, array: ir.Value, index: ir.Value, count: ir.Value) -> Lanes:
        """The first `count` of 16 elements; no others are touched."""
        kind = _vector(array.type.pointee)
        mask = self.leading(count).value
        at = self.pointer(array, index, kind)
        name = f"llvm.masked.load.{_suffix(kind)}.p0"
        nothing = ir.Constant(kind, None)
        return Lanes(self.builder, self.call(name, kind, at, u32(_align(kind.element)), mask, nothing))

    def store_leading(self, lanes: Lanes, array: ir.Value, index: ir.Value, count: ir.Value) -> None:
        """The same, the other way round."""
        part = lanes.value
        full = self.builder.icmp_signed(">=", count, i64(LANES))
        with self.builder.if_else(full) as (whole, some):
            with whole:
                self.store(lanes, array, index)
            with some:
                self._store_masked(part, array, index, self.leading(count).value)

    def spread(self, number: ir.Value) -> Lanes:
        """A number in all lanes."""
        one = self.builder.insert_element(ir.Constant(_vector(number.type), ir.Undefined), number, u32(0))
        zero = ir.Constant(_vector(u32), [u32(0)] * LANES)
        return Lanes(self.builder, self.builder.shuffle_vector(one, one, zero))

    def leading(self, count: ir.Value) -> Lanes:
        """The mask of the first `count` lanes."""
        lane = Lanes(self.builder, ir.Constant(_vector(u32), [u32(j) for j in range(LANES)]))
        return lane < self.spread(self.builder.trunc(count, u32))

    def call(self, name: str, result: ir.Type, *args: ir.Value) -> ir.Value:
        """An LLVM intrinsic."""
        kinds = ir.FunctionType(result, [arg.type for arg in args])
        function = self.builder.module.globals.get(name) or ir.Function(self.builder.module, kinds, name)
        return self.builder.call(function, args)

    def count(self, mask: Lanes) -> ir.Value:
        """How many lanes are set."""
        return self.builder.zext(self.call("llvm.ctpop.i32", u32, self.builder.zext(mask.bits(), u32)), i64)

    def look_up(self, array: ir.Value, indices: Lanes) -> Lanes:
        """array[index] lane by lane. Plain loads: on Zen 4 they beat its gather, and any CPU has them."""
        b = self.builder
        found: ir.Value = ir.Constant(_vector(array.type.pointee), ir.Undefined)
        for lane in range(LANES):
            index = b.zext(b.extract_element(indices.value, u32(lane)), i64)
            found = b.insert_element(found, self.element(array, index), u32(lane))
        return Lanes(b, found)

    def expand(self, words: ir.Value, index: ir.Value, mask: Lanes, rest: Lanes) -> Lanes:
        """The next words, in lane order, in the lanes of the mask, `rest` elsewhere; reads no other words."""
        b = self.builder
        if has_avx512(self.context):
            at = self.pointer(words, index, u16)
            return Lanes(b, self.call(f"llvm.masked.expandload.v{LANES}i16", _vector(u16), at, mask.value, rest.value))
        spare = cgutils.alloca_once(b, u16)
        found = rest.value
        for lane in range(LANES):
            wanted = b.extract_element(mask.value, u32(lane))
            word = b.load(b.select(wanted, self.pointer(words, index, u16), spare))
            word = b.select(wanted, word, b.extract_element(rest.value, u32(lane)))
            found = b.insert_element(found, word, u32(lane))
            index = b.add(index, b.zext(wanted, i64))
        return Lanes(b, found)

    def push(self, value: Lanes, mask: Lanes, stack: ir.Value, top: ir.Value) -> ir.Value:
        """The mask's lanes of u16 numbers, in lane order, below stack[top]; writes no others. Returns the new top."""
        b = self.builder
        kind = _vector(u16)
        if has_avx512(self.context):  # Zen 4 takes a hundred cycles to compress straight to memory
            left = self.call(
                f"llvm.experimental.vector.compress.v{LANES}i16", kind, value.value, mask.value, value.value
            )
            count = self.count(mask)
            top = b.sub(top, count)
            low = b.trunc(b.sub(b.shl(i64(1), count), i64(1)), u16)
            self._store_masked(left, stack, top, b.bitcast(low, _vector(bit)))
            return top
        spare = cgutils.alloca_once(b, u16)
        for lane in reversed(range(LANES)):
            wanted = b.extract_element(mask.value, u32(lane))
            top = b.sub(top, b.zext(wanted, i64))
            word = b.extract_element(value.value, u32(lane))
            b.store(word, b.select(wanted, self.pointer(stack, top, u16), spare))
        return top

    def _store_masked(self, value: ir.Value, array: ir.Value, index: ir.Value, mask: ir.Value) -> None:
        at = self.pointer(array, index, value.type)
        name = f"llvm.masked.store.{_suffix(value.type)}.p0"
        self.call(name, ir.VoidType(), value, at, u32(_align(value.type.element)), mask)

    def rounded(self, lanes: Lanes) -> Lanes:
        """Floats to whole numbers, half to even."""
        return Lanes(self.builder, self.call(f"llvm.rint.{_suffix(lanes.value.type)}", lanes.value.type, lanes.value))

    def loop(
        self, stop: ir.Value, carried: Sequence[ir.Value], body: Callable[..., Sequence[ir.Value]]
    ) -> list[ir.Value]:
        """carried = body(i, *carried) for i from 0 to stop - 1, stop > 0."""
        b = self.builder
        before = b.block
        around, behind = b.append_basic_block("around"), b.append_basic_block("behind")
        b.branch(around)
        b.position_at_end(around)
        index, *held = (b.phi(value.type) for value in (stop, *carried))
        new = [b.add(index, i64(1)), *body(index, *held)]
        for phi, first, value in zip((index, *held), (i64(0), *carried), new, strict=True):
            phi.add_incoming(first, before)
            phi.add_incoming(value, b.block)
        b.cbranch(b.icmp_signed("<", new[0], stop), around, behind)
        b.position_at_end(behind)
        return new[1:]

    def keep_apart(self) -> None:
        """The numba function that this step is in becomes one of its own: its loop gets all the registers."""
        self.builder.function.attributes.add("noinline")


def step(result: Any) -> Callable[[Callable[..., Any]], Any]:
    """Makes a numba function of body(step, *arrays and integers), which emits its code. result: its numba type."""

    def decorate(body: Callable[..., Any]) -> Any:
        def typed(typing: Any, *kinds: Any) -> Any:
            if any(isinstance(kind, types.Array) and kind.layout != "C" for kind in kinds):
                raise TypingError("a step takes contiguous arrays")
            signature = result(*[kind if isinstance(kind, types.Array) else types.int64 for kind in kinds])

            def emit(context: Any, builder: ir.IRBuilder, signature: Any, args: Sequence[ir.Value]) -> ir.Value:
                made = Step(context, builder, signature, args)
                value = body(made, *made.args)
                return context.get_dummy_value() if value is None else value

            return signature, emit

        typed.__name__, typed.__doc__ = body.__name__, body.__doc__
        parameters = list(inspect.signature(body).parameters.values())
        typed.__signature__ = inspect.Signature([p.replace(annotation=p.empty) for p in parameters])  # type: ignore
        return intrinsic(typed)

    return decorate


@njit(inline="always")
def padded(count):
    """Rounded up to whole vectors."""
    return (count + LANES - 1) // LANES * LANES


@njit(nogil=True)
def aligned(count, kind):
    """An uninitialized array on a cache line's boundary: vectors that straddle lines cost three times as much."""
    raw = np.empty(count + 64, kind)
    first = (64 - raw.ctypes.data % 64) // raw.itemsize
    return raw[first : first + count]


def _multiply(s: Step, y, square, used, width, column, out, vectors):
    """out[r * width + column:] for TILE rows r, `vectors` vectors: all sums stay in registers."""
    b = s.builder
    rows = [b.mul(width, i64(r)) for r in range(TILE)]
    zero = ir.Constant(_vector(f32), [f32(0.0)] * LANES)

    def add_term(j, *sums):
        terms = [s.load(square, b.mul(j, width), column, v * LANES) for v in range(vectors)]
        factors = [s.spread(s.element(y, s.add(row, j))) for row in rows]
        products = [factor.fmul(term) for factor in factors for term in terms]
        return [Lanes(b, old).fadd(product).value for old, product in zip(sums, products, strict=True)]

    sums = s.loop(used, [zero] * (TILE * vectors), add_term)
    for at, value in enumerate(sums):
        s.store(Lanes(b, value), out, rows[at // vectors], column, at % vectors * LANES)


@step(types.void)
def _multiply_wide(s: Step, y, square, used, width, column, out):
    _multiply(s, y, square, used, width, column, out, 4)


@step(types.void)
def _multiply_narrow(s: Step, y, square, used, width, column, out):
    _multiply(s, y, square, used, width, column, out, 1)


@njit(nogil=True)
def multiply_rows(y, square, used, width, out):
    """TILE rows: out[r, d] = sum over j < used, ascending, of y[r, j] * square[j, d], from 0; y, out [TILE, width].

    Each product is rounded, then added: the IR carries no leave to fuse them.
    """
    if used <= 0:
        out[: TILE * width] = np.float32(0)
        return
    column = 0
    while column + 4 * LANES <= width:
        _multiply_wide(y, square, used, width, column, out)
        column += 4 * LANES
    while column < width:
        _multiply_narrow(y, square, used, width, column, out)
        column += LANES
