"""What lies between a decoder layer's matrix products, each in one pass over memory: for bf16 on the CPU.

Arithmetic only. transformers' RMSNorm is eight operations on float32 tensors; for the few rows of a decode step each
costs more in the call than in the work, for many rows they cross the caches eight times. Roundings are those of
transformers' own code, operation by operation; only the order of a sum differs. A row's bits do not depend on the
others.

Shapes: N rows, C channels of a row, a multiple of 16.
"""

from __future__ import annotations

import ctypes
import math
from functools import cache
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import carray, cfunc, njit, types
from numpy.typing import NDArray
from torch import Tensor

from kernels.openmp import run_on_threads
from kernels.rans_simd import LANES, Lanes, Step, i64, step
from kernels.vector_math import across, constant, exp2, f32x16, fma, from_bf16, pointer, take_ticket, to_bf16

# What the files of steps hold: numba's cache watches this file only (a test keeps it up to date).
STEPS = "841f3a00569a48d5"
# One call as its threads find it in memory: addresses of flat arrays, `factors` [2] float32 (C and epsilon).
CALL = np.dtype([(name, np.int64) for name in "x y out rows channels counter factors".split()])
ROWS = 16  # that a thread takes at once
MIN_SHARED_VALUES = 1 << 15  # below which torch does not share elementwise work either
_ANY = 1 << 40  # elements of an array whose length does not matter


def _load(s: Step, array: ir.Value, *index: Any) -> ir.Value:
    return from_bf16(s, s.load(array, *index).value)


def _store(s: Step, value: ir.Value, array: ir.Value, *index: Any) -> None:
    s.store(Lanes(s.builder, to_bf16(s, value)), array, *index)


def _norm(s: Step, x, weight, out, at, channels, factors, add_one: bool) -> None:
    b = s.builder
    vectors = b.lshr(channels, i64(4))

    def add_squares(group: ir.Value, total: ir.Value) -> list[ir.Value]:
        value = _load(s, x, at, b.shl(group, i64(4)))
        return [fma(s, value, value, total)]

    total = across(s, s.loop(vectors, [constant(f32x16, 0.0)], add_squares)[0], b.fadd)
    count, epsilon = (s.spread(s.element(factors, i)).value for i in range(2))
    mean = b.fadd(b.fdiv(total, count), epsilon)
    one = constant(f32x16, 1.0)
    factor = b.fdiv(one, s.call("llvm.sqrt.v16f32", f32x16, mean))

    def scale(group: ir.Value) -> list[ir.Value]:
        index = b.shl(group, i64(4))
        value = b.fmul(_load(s, x, at, index), factor)
        scales = _load(s, weight, index)
        if add_one:
            value = b.fmul(value, b.fadd(one, scales))
        else:
            value = b.fmul(from_bf16(s, to_bf16(s, value)), scales)
        _store(s, value, out, at, index)
        return []

    s.loop(vectors, [], scale)


@step(types.void)
def _norm_row(s: Step, x, weight, out, at, channels, factors):
    _norm(s, x, weight, out, at, channels, factors, add_one=False)


@step(types.void)
def _norm_row_add_one(s: Step, x, weight, out, at, channels, factors):
    _norm(s, x, weight, out, at, channels, factors, add_one=True)


@step(types.void)
def _silu_mul_row(s: Step, x, y, out, at, channels):
    """out = x / (1 + e**-x), rounded, times y"""
    b = s.builder
    one, most = constant(f32x16, 1.0), constant(f32x16, 126.0)

    def activate(group: ir.Value) -> list[ir.Value]:
        index = b.shl(group, i64(4))
        value = _load(s, x, at, index)
        power = b.fmul(value, constant(f32x16, -math.log2(math.e)))
        power = b.select(b.fcmp_ordered("<", power, most), power, most)
        value = b.fdiv(value, b.fadd(one, exp2(s, power)))
        _store(s, b.fmul(from_bf16(s, to_bf16(s, value)), _load(s, y, at, index)), out, at, index)
        return []

    s.loop(b.lshr(channels, i64(4)), [], activate)


@njit(nogil=True)
def _run(call, kind):
    x, y = carray(pointer(call.x), _ANY, np.uint16), carray(pointer(call.y), _ANY, np.uint16)
    out = carray(pointer(call.out), _ANY, np.uint16)
    factors, counter = carray(pointer(call.factors), 2, np.float32), carray(pointer(call.counter), 1, np.int64)
    while True:
        first = take_ticket(counter) * ROWS
        if first >= call.rows:
            break
        for row in range(first, min(first + ROWS, call.rows)):
            at = row * call.channels
            if kind == 0:
                _norm_row(x, y, out, at, call.channels, factors)
            elif kind == 1:
                _norm_row_add_one(x, y, out, at, call.channels, factors)
            else:
                _silu_mul_row(x, y, out, at, call.channels)


def _norm_thread(call):
    _run(carray(call, 1, CALL)[0], 0)


def _norm_add_one_thread(call):
    _run(carray(call, 1, CALL)[0], 1)


def _silu_mul_thread(call):
    _run(carray(call, 1, CALL)[0], 2)


@cache
def _compiled(function: Any) -> Any:
    return cfunc("void(voidptr)", cache=True)(function).ctypes


_Call = ctypes.c_int64 * (len(CALL) + 1)


@cache
def _factors(channels: int, epsilon: float) -> tuple[NDArray[np.float32], int]:
    """And their address."""
    factors = np.array((channels, epsilon), np.float32)
    return factors, int(factors.ctypes.data)


def _over_rows(function: Any, x: Tensor, y: Tensor, epsilon: float = 0.0) -> Tensor:
    assert x.dtype == y.dtype == torch.bfloat16 and x.shape[-1] % LANES == 0, (x.dtype, y.dtype, x.shape)
    x, y = x.contiguous(), y.contiguous()
    out = torch.empty_like(x)
    channels = x.shape[-1]
    call = _Call(
        x.data_ptr(), y.data_ptr(), out.data_ptr(), x.numel() // channels, channels, 0, _factors(channels, epsilon)[1]
    )
    address = ctypes.addressof(call)
    call[5] = address + 7 * 8  # the counter: the array's last number
    threads = torch.get_num_threads() if x.numel() >= MIN_SHARED_VALUES else 1
    run_on_threads(_compiled(function), address, threads)
    return out


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, add_one: bool = False) -> Tensor:
    """weight * (x / rms(x)), the quotient rounded first; `add_one` (Gemma): (1 + weight) in float32, rounded once.
    `x` [..., C], `weight` [C]."""
    return _over_rows(_norm_add_one_thread if add_one else _norm_thread, x, weight, eps)


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate), rounded, times up: [..., C] each."""
    return _over_rows(_silu_mul_thread, gate, up)
