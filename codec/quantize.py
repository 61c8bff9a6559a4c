"""Uniform mid-tread quantization of one segment, and bf16 in numpy. Pure.

One step for all channels of a (layer, K or V, head): equal steps are reverse water-filling, small channels get few
bits or none. Channel means are removed first. No dead zone: |x - mean - q * step| <= step / 2 holds for every value,
outliers included (they are escaped, not clipped), and the reconstruction then rounds once to bf16.

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


def quantize(x: np.ndarray, mean: np.ndarray, inv_step: np.float32) -> np.ndarray | None:
    """x [T, D] float32, mean [D] float32 -> int32 [T, D]; None if a value is not finite or out of range."""
    with np.errstate(invalid="ignore", over="ignore"):
        y = np.rint((x - mean) * inv_step)
    if not bool((np.abs(y) <= MAX_MAGNITUDE).all()):  # also False for NaN
        return None
    q: np.ndarray = y.astype(np.int32)
    return q


def dequantize(q: np.ndarray, mean: np.ndarray, step: np.float32) -> np.ndarray:
    """int32 [T, D] -> float32 [T, D]."""
    x: np.ndarray = q.astype(np.float32) * step + mean
    return x
