"""The lossless split: each value's bits -> one byte that is entropy coded, and plain planes. Pure, numpy.

SPEC.md has the table. The coded byte is what compresses (exponents); signs and mantissas are noise.
Legend: S segments, n values a segment.
"""

from __future__ import annotations

from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
BITS = {
    "bfloat16": np.uint16, "float16": np.uint16, "float32": np.uint32, "float8_e4m3fn": np.uint8,
    "float8_e5m2": np.uint8,
}  # fmt: skip


def even(size: int) -> int:
    return size + size % 2


def plane_bytes(dtype: str, count: int) -> int:
    """Bytes of a segment's plain planes."""
    two_bits = even((count + 3) // 4)
    return {
        "bfloat16": even(count), "float16": even(count) + two_bits, "float32": even(count) + 2 * count,
        "float8_e4m3fn": two_bits, "float8_e5m2": two_bits,
    }[dtype]  # fmt: skip


def _pack_two_bits(values: Array) -> Array:
    """[S, n] of 0..3 -> [S, even(ceil(n / 4))] uint8, the first value lowest."""
    count = values.shape[1]
    padded = np.zeros((values.shape[0], 4 * even((count + 3) // 4)), np.uint8)
    padded[:, :count] = values
    packed: Array = (padded.reshape(values.shape[0], -1, 4) << np.array([0, 2, 4, 6], np.uint8)).sum(
        axis=2, dtype=np.uint8
    )
    return packed


def _unpack_two_bits(packed: Array, count: int) -> Array:
    spread = (packed[:, :, None] >> np.array([0, 2, 4, 6], np.uint8)) & 3
    return np.asarray(spread.reshape(packed.shape[0], -1)[:, :count])


def _pad_bytes(values: Array) -> Array:
    return np.pad(values.astype(np.uint8), ((0, 0), (0, values.shape[1] % 2)))


def split(bits: Array, dtype: str) -> tuple[Array, Array]:
    """bits [S, n] (unsigned, as wide as the dtype) -> coded [S, n] uint8, planes [S, plane_bytes] uint8."""
    if dtype == "bfloat16":
        return ((bits >> 7) & 0xFF).astype(np.uint8), _pad_bytes(((bits >> 8) & 0x80) | (bits & 0x7F))
    if dtype == "float16":
        two = ((bits >> 14) & 2) | ((bits >> 8) & 1)
        return ((bits >> 9) & 0x3F).astype(np.uint8), np.concatenate(
            [_pad_bytes(bits & 0xFF), _pack_two_bits(two)], axis=1
        )
    if dtype == "float32":
        high, low = bits >> 16, np.ascontiguousarray((bits & 0xFFFF).astype("<u2")).view(np.uint8)
        coded, plane = split(high, "bfloat16")
        return coded, np.concatenate([plane, low], axis=1)
    return ((bits & 0x7F) >> 1).astype(np.uint8), _pack_two_bits(((bits >> 6) & 2) | (bits & 1))


def join(coded: Array, planes: Array, dtype: str) -> Array:
    """Inverse of split."""
    count = coded.shape[1]
    wide = coded.astype(np.uint32)
    if dtype == "bfloat16":
        plane = planes[:, :count].astype(np.uint32)
        return np.asarray(((plane & 0x80) << 8) | (wide << 7) | (plane & 0x7F)).astype(np.uint16)
    if dtype == "float16":
        low, two = planes[:, :count], _unpack_two_bits(planes[:, even(count) :], count).astype(np.uint32)
        return np.asarray(((two & 2) << 14) | ((wide & 0x3F) << 9) | ((two & 1) << 8) | low).astype(np.uint16)
    if dtype == "float32":
        high = join(coded, planes[:, : even(count)], "bfloat16").astype(np.uint32)
        low = np.ascontiguousarray(planes[:, even(count) :]).view("<u2")
        return np.asarray((high << 16) | low)
    two = _unpack_two_bits(planes, count).astype(np.uint32)
    return np.asarray(((two & 2) << 6) | ((wide & 0x3F) << 1) | (two & 1)).astype(np.uint8)
