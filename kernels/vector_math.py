"""Vectors of sixteen lanes for arithmetic on floats, which `rans_simd.py` lacks: LLVM IR by way of it. bf16 numbers are
u16 to numpy and numba.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from kernels.rans_simd import LANES, Step, f32, i64, u16, u32

# 2**f for |f| <= 1/2, 1 + f * (...): least relative error (9e-8) of degree 5.
EXP2 = (0.6931469775373723, 0.24022242043946807, 0.05550733832432385, 0.009671514539242195, 0.0013264700309122154)


class _BFloat(ir.Type):
    """llvmlite has no bf16 of its own."""

    def __str__(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _BFloat)

    def __hash__(self) -> int:
        return hash(_BFloat)


bf16 = _BFloat()
f32x16, u32x16, u16x16 = (ir.VectorType(kind, LANES) for kind in (f32, u32, u16))
bf16x16, bf16x32 = ir.VectorType(bf16, LANES), ir.VectorType(bf16, 2 * LANES)


def constant(kind: ir.VectorType, values: Any) -> ir.Constant:
    values = [values] * LANES if isinstance(values, int | float) else values
    return ir.Constant(kind, [ir.Constant(kind.element, value) for value in values])


def fma(s: Step, x: ir.Value, y: ir.Value, z: ir.Value) -> ir.Value:
    return s.call("llvm.fma.v16f32", f32x16, x, y, z)


def load_float(s: Step, array: ir.Value, index: ir.Value, count: ir.Value | None) -> ir.Value:
    """16 numbers (float32, or bf16 as u16) as float32; only the first `count` are touched, 0 behind them."""
    lanes = s.load(array, index) if count is None else s.load_leading(array, index, count)
    return lanes.value if lanes.value.type == f32x16 else from_bf16(s, lanes.value)


def has_bf16(context: Any) -> bool:
    """Whether numba compiles for a CPU with instructions for bf16 (its cache keeps the kinds apart)."""
    return {"+avx512f", "+avx512bf16"} <= set(context.codegen().magic_tuple()[2].split(","))


def to_bf16(s: Step, x: ir.Value) -> ir.Value:
    """Float32 to bf16 as u16, to the nearest, ties to even."""
    b = s.builder
    if has_bf16(s.context):
        return b.bitcast(b.fptrunc(x, bf16x16), u16x16)
    bits, sixteen = b.bitcast(x, u32x16), constant(u32x16, 16)
    odd = b.and_(b.lshr(bits, sixteen), constant(u32x16, 1))
    rounded = b.lshr(b.add(b.add(bits, odd), constant(u32x16, 0x7FFF)), sixteen)
    is_nan = b.fcmp_unordered("uno", x, x)
    return b.trunc(b.select(is_nan, constant(u32x16, 0x7FC0), rounded), u16x16)


def from_bf16(s: Step, x: ir.Value) -> ir.Value:
    b = s.builder
    return b.bitcast(b.shl(b.zext(x, u32x16), constant(u32x16, 16)), f32x16)


def for_sixteens(s: Step, count: ir.Value, emit: Callable[[ir.Value, ir.Value | None], None]) -> None:
    """emit(at, None) for each whole 16 of `count`, then emit(at, left) if some are left."""
    b = s.builder
    with cgutils.for_range(b, b.lshr(count, i64(4))) as loop:
        emit(b.shl(loop.index, i64(4)), None)
    rest = b.and_(count, i64(LANES - 1))
    with b.if_then(b.icmp_signed(">", rest, i64(0))):
        emit(b.sub(count, rest), rest)


def exp2(s: Step, x: ir.Value) -> ir.Value:
    """2**x for x <= 127, lane by lane; 0 below -126."""
    b = s.builder
    least = constant(f32x16, -126.0)
    is_small = b.fcmp_ordered("<", x, least)
    x = b.select(is_small, least, x)
    whole = s.call("llvm.rint.v16f32", f32x16, x)
    rest = b.fsub(x, whole)
    result = constant(f32x16, EXP2[-1])
    for factor in (*reversed(EXP2[:-1]), 1.0):
        result = fma(s, result, rest, constant(f32x16, factor))
    exponent = b.shl(b.fptosi(whole, u32x16), constant(u32x16, 23))
    result = b.bitcast(b.add(b.bitcast(result, u32x16), exponent), f32x16)
    return b.select(is_small, constant(f32x16, 0.0), result)


def across(s: Step, x: ir.Value, combine: Any) -> ir.Value:
    """All lanes combined, in an order that is always the same."""
    b = s.builder
    distance = LANES // 2
    while distance:
        turned = b.shuffle_vector(x, x, constant(u32x16, [(lane + distance) % LANES for lane in range(LANES)]))
        x = combine(x, turned)
        distance //= 2
    return x


def tanh(s: Step, x: ir.Value) -> ir.Value:
    """1 - 2 / (e**2x + 1), with an absolute error of some 1e-7."""
    b = s.builder
    one, two, most = (constant(f32x16, number) for number in (1.0, 2.0, 60.0))
    power = b.fmul(x, constant(f32x16, 2.8853900817779268))
    power = b.select(b.fcmp_ordered("<", power, most), power, most)
    return b.fsub(one, b.fdiv(two, b.fadd(exp2(s, power), one)))


@intrinsic
def take_ticket(typing, counter):  # type: ignore[no-untyped-def]
    """counter[0] += 1, atomically; its value before."""

    def emit(context, builder, signature, args):  # type: ignore[no-untyped-def]
        data = context.make_array(signature.args[0])(context, builder, args[0]).data
        return builder.atomic_rmw("add", data, i64(1), "monotonic")

    return types.int64(counter), emit


@intrinsic
def pointer(typing, address):  # type: ignore[no-untyped-def]
    """An address as what `carray` takes."""

    def emit(context, builder, signature, args):  # type: ignore[no-untyped-def]
        return builder.inttoptr(args[0], ir.IntType(8).as_pointer())

    return types.voidptr(types.int64), emit
