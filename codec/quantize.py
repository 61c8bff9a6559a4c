"""Uniform mid-tread quantization of one segment in nested stages, and bf16 in numpy. Pure.

Channels are centred and divided by their own step, at the finest stage; a coarser stage's integer is the nearest third
of the finer one's, so a coarse value is the one that its own, three times larger step would have given, and bins nest
exactly. No dead zone: |y - q * step| <= step / 2 holds for every value, outliers included (they become exceptions, not
clipped values), and the reconstruction then rounds once to bf16.

Steps and means are bf16 numbers, so that q * step is exact in float32 and fused multiply-add could not change a bit.
Legend: T tokens, D head dim.
"""

from __future__ import annotations

import numpy as np

from kernels.rans_reference import MAX_MAGNITUDE


def bf16_to_float(bits: np.ndarray) -> np.ndarray:
    """uint16 bf16 patterns -> float32."""
    return np.asarray(bits.astype(np.uint32) << 16).view(np.float32)


def float_to_bf16(x: np.ndarray) -> np.ndarray:
    """float32 -> uint16 bf16 patterns, round to nearest even (finite input)."""
    u = np.asarray(x, np.float32, order="C").view(np.uint32)
    return np.asarray((u + 0x7FFF + ((u >> 16) & 1)) >> 16).astype(np.uint16)


def round_to_bf16(x: np.ndarray) -> np.ndarray:
    """float -> float32 holding bf16-representable values."""
    return bf16_to_float(float_to_bf16(np.asarray(x, np.float32)))


def quantize(y: np.ndarray, inv_step: np.ndarray) -> np.ndarray | None:
    """y [T, D] float32 centred, inv_step [D] -> int32 [T, D] of the finest stage; None: not finite or out of range."""
    with np.errstate(invalid="ignore", over="ignore"):
        z = np.rint(y * inv_step)
    if not bool((np.abs(z) <= MAX_MAGNITUDE).all()):  # also False for NaN
        return None
    q: np.ndarray = z.astype(np.int32)
    return q


def coarsen(q: np.ndarray, stages: int) -> np.ndarray:
    """Integers of a stage -> those `stages` stages coarser."""
    for _ in range(stages):
        q = (q + 1) // 3
    return q


def dequantize(q: np.ndarray, multiplier: int, step: np.ndarray) -> np.ndarray:
    """int32 [T, D] of a stage whose step is `multiplier` finest steps [D] -> float32 [T, D]."""
    y: np.ndarray = (q * np.int32(multiplier)).astype(np.float32) * step
    return y
