"""Statistics measured on one chunk and shipped inside it: how a model without calibration is coded. Pure, numpy.

A segment's side information, in 16-bit words: quantized [step bf16][D means bf16][table index u8 * D, padded to even];
lossless [table index u8 * D, padded]. Legend: S segments, T tokens, D head dim.
"""

from __future__ import annotations

import numpy as np

from codec.entropy import CodeBook
from codec.errors import MalformedBlob
from codec.profile import MAX_MEAN, MAX_STEP, MIN_STEP
from codec.quantize import bf16_to_float, float_to_bf16, quantize, round_to_bf16
from kernels.rans_numba import choose_tables
from kernels.rans_reference import CENTRE


def measure_step(x: np.ndarray, mean: np.ndarray, factor: float) -> np.float32:
    """factor times the median spread of the channels that move: one outlier channel must not set everyone's step."""
    spread = np.sqrt(np.square(x - mean, dtype=np.float64).mean(axis=0))
    moving = spread[spread > 0]
    typical = float(np.median(moving)) if moving.size else 1.0
    return np.float32(round_to_bf16(np.clip(factor * typical, MIN_STEP, MAX_STEP)))


def measure(x: np.ndarray, factor: float, book: CodeBook) -> tuple[np.ndarray, np.float32, np.ndarray]:
    """One segment x [T, D] float32 (finite) -> means [D], step, table index [D]."""
    with np.errstate(over="ignore"):
        mean = np.clip(round_to_bf16(x.mean(axis=0, dtype=np.float64)), -MAX_MEAN, MAX_MEAN)
        mean = round_to_bf16(mean)
        step = measure_step(x, mean, factor)
    q = quantize(x, mean, np.float32(1) / step)
    index = np.zeros(x.shape[1], np.uint8)
    if q is not None:  # else the coder refuses the segment in a moment
        choose_tables(q.ravel(), x.shape[0], x.shape[1], book.cost_of_symbol, index)
    return mean, step, index


def measure_exponents(raw: np.ndarray, book: CodeBook) -> np.ndarray:
    """One segment of bf16 patterns [T, D] -> table index [D]."""
    q = ((raw.astype(np.int32) >> 7) & 0xFF) - CENTRE
    index = np.zeros(raw.shape[1], np.uint8)
    choose_tables(np.ascontiguousarray(q).ravel(), raw.shape[0], raw.shape[1], book.cost_of_symbol, index)
    return index


def pack_index(index: np.ndarray) -> np.ndarray:
    """[S, D] uint8 -> [S, ceil(D / 2)] uint16."""
    even = np.pad(index, ((0, 0), (0, index.shape[1] % 2)))
    return np.ascontiguousarray(even).view("<u2")


def pack_side(mean: np.ndarray, step: np.ndarray, index: np.ndarray) -> np.ndarray:
    """[S, D], [S], [S, D] -> [S, 1 + D + ceil(D / 2)] uint16."""
    return np.ascontiguousarray(
        np.concatenate([float_to_bf16(step)[:, None], float_to_bf16(mean), pack_index(index)], axis=1)
    )


def unpack_index(words: np.ndarray, num_dims: int, book: CodeBook) -> np.ndarray:
    """Inverse of pack_index, checked against the codebook."""
    index = np.ascontiguousarray(words).view(np.uint8).reshape(words.shape[0], -1)[:, :num_dims]
    if int(index.max(initial=0)) >= book.num_tables:
        raise MalformedBlob("a channel names a table that the codebook lacks")
    return np.ascontiguousarray(index)


def unpack_side(words: np.ndarray, num_dims: int, book: CodeBook) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Inverse of pack_side: means [S, D], steps [S], index [S, D]."""
    step = bf16_to_float(words[:, 0])
    mean = bf16_to_float(np.ascontiguousarray(words[:, 1 : 1 + num_dims]))
    if not ((step >= MIN_STEP) & (step <= MAX_STEP)).all() or not (np.abs(mean) <= MAX_MEAN).all():
        raise MalformedBlob("a step or mean in the blob is out of range or not finite")
    return mean, step, unpack_index(words[:, 1 + num_dims :], num_dims, book)


def read_side(payload: np.ndarray, pos: np.ndarray, width: int) -> np.ndarray:
    """The side words [S, width] in front of each segment."""
    return payload[pos[:, None] + np.arange(width)]
