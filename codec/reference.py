"""The four coders of kernels/rans_numba.py, with the same arguments and results, composed from the readable steps.

Slow (milliseconds a token), meant for tests and for people: this and kernels/rans_reference.py define the bytes.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from codec.anchor_delta import add_anchors, take_deltas
from codec.quantize import bf16_to_float, dequantize, float_to_bf16, quantize
from codec.rope import rotate, unrotate
from kernels.rans_reference import (
    CENTRE,
    LANES,
    PROB_BITS,
    Segment,
    StreamError,
    decode_segment,
    encode_segment,
)

OK, DAMAGED, VALUE_RANGE = 0, 2, 6
Array = np.ndarray[Any, Any]


def _rows(flat: Array, at: int, stride_t: int, num_tokens: int, num_dims: int) -> Array:
    """[T, D] view of flat memory."""
    return np.lib.stride_tricks.as_strided(flat[at:], (num_tokens, num_dims), (stride_t * flat.itemsize, flat.itemsize))


def _tables(fs: Array) -> Array:
    """Frequencies [n, 256] from the encoder's lookup array."""
    return (fs.reshape(-1, 256) >> 16).astype(np.uint16)


def _tables_of_slots(lut: Array) -> Array:
    """The same from the decoder's."""
    slots = (lut >> 24).reshape(-1, 1 << PROB_BITS)
    return np.stack([np.bincount(row, minlength=256) for row in slots]).astype(np.uint16)


def _read(words: Array, pos: int, num_words: int, num_escapes: int, num_dims: int) -> Segment:
    size = 2 * min(LANES, num_dims) + num_words + 2 * num_escapes
    taken = [int(w) for w in words[pos : pos + size]]
    return Segment.from_words(taken, num_dims=num_dims, num_words=num_words, num_escapes=num_escapes)


def _write(out: Array, at: int, values: list[int]) -> int:
    out[at : at + len(values)] = np.array(values, np.uint16)
    return at + len(values)


def encode_quantized(
    src: Array,
    src_pos: Array,
    stride_t: int,
    icos: Array,
    isin: Array,
    mean: Array,
    inv_step: Array,
    group: Array,
    index: Array,
    side: Array,
    fs: Array,
    out: Array,
    seg_words: Array,
    seg_escapes: Array,
) -> tuple[int, int, int]:
    at = 0
    for s in range(len(src_pos)):
        x = bf16_to_float(_rows(src, src_pos[s], stride_t, icos.shape[0], mean.shape[1]))
        q = quantize(unrotate(x, icos, isin), mean[s], inv_step[s])
        if q is None:
            return VALUE_RANGE, s, at
        coded = encode_segment(take_deltas(q, int(group[s])), _tables(fs), index[s], int(group[s]))
        seg_words[s], seg_escapes[s] = len(coded.words), len(coded.escapes)
        at = _write(out, at, [*side[s].tolist(), *coded.to_words()])
    return OK, -1, at


def decode_quantized(
    words: Array,
    seg_pos: Array,
    seg_words: Array,
    seg_escapes: Array,
    lut: Array,
    index: Array,
    group: Array,
    step: Array,
    mean: Array,
    cos: Array,
    sin: Array,
    out: Array,
    out_pos: Array,
    stride_t: int,
) -> tuple[int, int]:
    tables = _tables_of_slots(lut)
    shape = (cos.shape[0], mean.shape[1])
    for s in range(len(seg_pos)):
        try:
            coded = _read(words, seg_pos[s], seg_words[s], seg_escapes[s], shape[1])
            q = add_anchors(decode_segment(coded, tables, index[s], int(group[s]), shape), int(group[s]))
        except StreamError:
            return DAMAGED, s
        _rows(out, out_pos[s], stride_t, *shape)[:] = float_to_bf16(rotate(dequantize(q, mean[s], step[s]), cos, sin))
    return OK, -1


def encode_lossless(
    src: Array,
    src_pos: Array,
    stride_t: int,
    num_tokens: int,
    index: Array,
    side: Array,
    gap: int,
    fs: Array,
    out: Array,
    out_bytes: Array,
    seg_words: Array,
    seg_escapes: Array,
) -> tuple[int, int, int]:
    at = 0
    num_dims = index.shape[2]
    for s in range(len(src_pos)):
        raw = _rows(src, src_pos[s], stride_t, num_tokens, num_dims)
        exponent = (raw.astype(np.int32) >> 7) & 0xFF
        coded = encode_segment(exponent - CENTRE, _tables(fs), index[s], 0)
        seg_words[s], seg_escapes[s] = len(coded.words), len(coded.escapes)
        at = _write(out, at, [*side[s].tolist(), *coded.to_words()])
        rest = (((raw >> 8) & 0x80) | (raw & 0x7F)).astype(np.uint8).tobytes()
        rest += b"\0" * (len(rest) % 2)
        out_bytes[2 * at : 2 * at + len(rest)] = np.frombuffer(rest, np.uint8)
        at += len(rest) // 2 + gap
    return OK, -1, at


def decode_lossless(
    words: Array,
    payload: Array,
    seg_pos: Array,
    seg_words: Array,
    seg_escapes: Array,
    lut: Array,
    index: Array,
    out: Array,
    out_pos: Array,
    stride_t: int,
    num_tokens: int,
) -> tuple[int, int]:
    tables = _tables_of_slots(lut)
    num_dims = index.shape[2]
    for s in range(len(seg_pos)):
        try:
            coded = _read(words, seg_pos[s], seg_words[s], seg_escapes[s], num_dims)
            q = decode_segment(coded, tables, index[s], 0, (num_tokens, num_dims))
        except StreamError:
            return DAMAGED, s
        at = 2 * (seg_pos[s] + 2 * min(LANES, num_dims) + seg_words[s] + 2 * seg_escapes[s])
        rest = payload[at : at + q.size].reshape(q.shape).astype(np.uint32)
        exponent = ((q + CENTRE) & 0xFF).astype(np.uint32)
        _rows(out, out_pos[s], stride_t, num_tokens, num_dims)[:] = (
            ((rest & 0x80) << 8) | (exponent << 7) | (rest & 0x7F)
        )
    return OK, -1
