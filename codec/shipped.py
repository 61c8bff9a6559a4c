"""Statistics measured on one chunk and shipped inside it: how a model without calibration is coded. Pure, numpy.

Side information in front of a segment's first piece, in 16-bit words: quantized [step bf16][D means bf16][table byte
* D, padded to even]; lossless [table byte * D, padded]. A table byte is the table in bits 0 to 4 and, quantized, e in
bits 5 to 7: the channel's step is step * 4**e, for outlier channels beyond the tables' reach.
Legend: S segments, T tokens, D head dim.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from codec.entropy import CodeBook
from codec.errors import MalformedBlob
from codec.levels import Lossy
from codec.profile import MAX_MEAN, MAX_STEP, MIN_STEP
from codec.quantize import bf16_to_float, coarsen, float_to_bf16, quantize, round_to_bf16
from kernels import rans_numba
from kernels.rans_reference import VALUE_LOW

Array = np.ndarray[Any, Any]
TABLE_MASK = 31
LARGEST_E = 7
LARGEST_SPREAD = 6.0  # of a channel, in steps of stage 0, before its step is made coarser


def side_words(num_dims: int, *, is_lossless: bool) -> int:
    index = (num_dims + 1) // 2
    return index if is_lossless else 1 + num_dims + index


def measure(x: Array, lossy: Lossy) -> tuple[Array, np.float32, Array]:
    """One segment x [T, D] float32 (finite) -> means [D], step of the last stage, table bytes [D] uint8."""
    with np.errstate(over="ignore"):
        mean = np.clip(round_to_bf16(x.mean(axis=0, dtype=np.float64)), -MAX_MEAN, MAX_MEAN)
        mean = round_to_bf16(mean)
        # The median over the channels that move: one outlier channel must not set everyone's step.
        spread = np.sqrt(np.square(x - mean, dtype=np.float64).mean(axis=0))
    moving = spread[spread > 0]
    typical = float(np.median(moving)) if moving.size else 1.0
    widest = LARGEST_SPREAD * 3.0 ** (lossy.num_stages - 1)  # spread that stage 0 takes, in finest steps
    least = float(spread.max()) / (widest * 4.0**LARGEST_E)  # else channels of next to nothing could set it
    step = np.float32(round_to_bf16(np.clip(max(lossy.step_factor * typical, least), MIN_STEP, MAX_STEP)))
    excess = np.maximum(spread / (widest * float(step)), 1e-9)
    e = np.clip(np.ceil(np.log2(excess) / 2), 0, LARGEST_E).astype(np.uint8)
    q = quantize(x - mean, np.float32(1) / steps_of(step, e))
    table = np.zeros(x.shape[1], np.uint8)
    if q is not None:  # else the coder refuses the segment in a moment
        table = choose_tables(coarsen(q, lossy.num_stages - 1), lossy.codebook)
    return mean, step, np.asarray(table | (e << 5), np.uint8)


def steps_of(step: Array | np.float32, e: Array) -> Array:
    """step [...] and e [..., D] -> steps [..., D] float32."""
    steps: Array = np.asarray(step, np.float32)[..., None] * np.exp2(2.0 * e).astype(np.float32)
    return steps


def choose_tables(q: Array, book: CodeBook) -> Array:
    """The table that codes each channel of q [T, D] in the fewest bits: [D] uint8."""
    best = np.empty(q.shape[1], np.uint8)
    rans_numba.choose_tables(np.ascontiguousarray(q, np.int32).reshape(-1), *q.shape, book.cost_of_value, best)
    return best


def measure_bytes(coded: Array, book: CodeBook) -> Array:
    """Coded bytes of one segment [T, D] -> table of each channel [D]."""
    return choose_tables(coded.astype(np.int32) + VALUE_LOW, book)


def pack_index(index: Array) -> Array:
    """[S, D] uint8 -> [S, ceil(D / 2)] uint16."""
    padded = np.pad(index, ((0, 0), (0, index.shape[1] % 2)))
    return np.ascontiguousarray(padded).view("<u2")


def pack_side(mean: Array, step: Array, table: Array) -> Array:
    """[S, D], [S], [S, D] -> [S, side_words] uint16."""
    return np.ascontiguousarray(
        np.concatenate([float_to_bf16(step)[:, None], float_to_bf16(mean), pack_index(table)], axis=1)
    )


def unpack_index(words: Array, num_dims: int, book: CodeBook) -> tuple[Array, Array]:
    """Inverse of pack_index, checked against the codebook: table [S, D], e [S, D]."""
    table = np.ascontiguousarray(words).view(np.uint8).reshape(words.shape[0], -1)[:, :num_dims]
    index, e = np.ascontiguousarray(table & TABLE_MASK), table >> 5
    if int(index.max(initial=0)) >= book.num_tables:
        raise MalformedBlob("a channel names a table that the codebook lacks")
    return index, e


def unpack_side(words: Array, num_dims: int, book: CodeBook) -> tuple[Array, Array, Array]:
    """Inverse of pack_side: means [S, D], steps [S, D], tables [S, D]."""
    step = bf16_to_float(words[:, 0])
    mean = bf16_to_float(np.ascontiguousarray(words[:, 1 : 1 + num_dims]))
    if not ((step >= MIN_STEP) & (step <= MAX_STEP)).all() or not (np.abs(mean) <= MAX_MEAN).all():
        raise MalformedBlob("a step or mean in the blob is out of range or not finite")
    index, e = unpack_index(words[:, 1 + num_dims :], num_dims, book)
    return mean, steps_of(step, e), index


def read_side(payload: Array, pos: Array, width: int) -> Array:
    """The side words [S, width] in front of each segment's first piece."""
    return np.asarray(payload[pos[:, None] + np.arange(width)])
