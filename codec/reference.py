"""The coders of kernels/rans_numba.py, with the same arguments and results, composed from the readable steps.

Slow (milliseconds a token), meant for tests and for people: this and kernels/rans_reference.py define the bytes.
Legend: S segments, T tokens, D head dim, K stages, n tables, R half the rotary dims.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from codec.decorrelate import apply_ordered
from codec.quantize import bf16_to_float, coarsen, dequantize, float_to_bf16, quantize
from codec.rope import rotate, unrotate
from kernels.rans_reference import (
    NUM_VALUES,
    PROB_BITS,
    VALUE_LOW,
    Coding,
    Piece,
    StreamError,
    decode_segment,
    encode_segment,
    new_lanes,
)

OK, DAMAGED, VALUE_RANGE, NO_ROOM = 0, 2, 6, 7
Array = np.ndarray[Any, Any]


def _rows(flat: Array, at: int, stride_t: int, num_tokens: int, num_dims: int) -> Array:
    """[T, D] view of flat memory."""
    return np.lib.stride_tricks.as_strided(flat[at:], (num_tokens, num_dims), (stride_t * flat.itemsize, flat.itemsize))


def _freqs(enc: Array) -> Array:
    """Frequencies [n, 256] from the encoder's lookup array."""
    return (enc.reshape(-1, NUM_VALUES) >> 16).astype(np.uint16)


def _freqs_of_slots(lut: Array) -> Array:
    """The same from the decoder's."""
    slots = (lut >> 21).reshape(-1, 1 << PROB_BITS)
    return np.stack([np.bincount(row, minlength=NUM_VALUES) for row in slots]).astype(np.uint16)


def _coding(freqs: Array, index: Array, group: int, cuts: Array, refine_index: Array, active: Array, s: int) -> Coding:
    pairs = np.stack([cuts & 0xFFFF, cuts >> 16], axis=-1)
    return Coding(
        freqs=freqs, index=index[s], group=group, active=[int(a) for a in active[:, s]],
        cuts=pairs, refine=refine_index[:, s],
    )  # fmt: skip


def _bytes_coding(freqs: Array, index: Array) -> Coding:
    """One stage, every channel."""
    return Coding(
        freqs=freqs, index=np.stack([index, index]), group=0, active=[index.size], cuts=np.zeros((0, 1, 3, 2)),
        refine=np.zeros((0, index.size)),
    )  # fmt: skip


def _write(out: Array, at: int, words: list[int]) -> int:
    out[at : at + len(words)] = np.array(words, np.uint16)
    return at + len(words)


def _read(words: Array, pos: int, size: int, exceptions: int, num_states: int) -> Piece:
    taken = [int(w) for w in words[pos : pos + size]]
    return Piece.from_words(taken, num_states=num_states, num_exceptions=int(exceptions))


def encode_quantized(
    src: Array, src_pos: Array, stride_t: int, icos: Array, isin: Array, turned: Array, mean: Array, inv_step: Array,
    matrix: Array, analysis: Array, coarser: int, group: Array, enc: Array, standin: Array, base_index: Array,
    cuts: Array, refine_index: Array, active: Array, side: Array, out: Array, piece_words: Array, exceptions: Array,
) -> tuple[int, int]:  # fmt: skip
    del standin  # follows from the tables
    freqs = _freqs(enc)
    at = [0] * len(active)
    for s in range(len(src_pos)):
        x = bf16_to_float(_rows(src, src_pos[s], stride_t, icos.shape[0], mean.shape[1]))
        with np.errstate(invalid="ignore", over="ignore"):
            if turned[s]:
                x = unrotate(x, icos, isin)
            y = x - mean[s]
            if matrix[s] >= 0:
                y = apply_ordered(y, analysis[matrix[s]])
        q = quantize(y, inv_step[s])
        if q is None:
            return VALUE_RANGE, s
        coding = _coding(freqs, base_index, int(group[s]), cuts, refine_index, active, s)
        for stage, piece in enumerate(encode_segment(coarsen(q, coarser), coding)):
            words = piece.to_words() if stage else [*side[s].tolist(), *piece.to_words()]
            piece_words[stage, s], exceptions[stage, s] = len(words), len(piece.exceptions)
            if at[stage] + len(words) > out.shape[1]:
                return NO_ROOM, s
            at[stage] = _write(out[stage], at[stage], words)
    return OK, -1


def decode_quantized(
    words: Array, pos: Array, size: Array, exceptions: Array, lut: Array, base_index: Array, group: Array,
    cuts: Array, refine_index: Array, active: Array, is_whole: bool, multiplier: int, step: Array, mean: Array,
    matrix: Array, synthesis: Array, turned: Array, cos: Array, sin: Array, out: Array, out_pos: Array, stride_t: int,
) -> tuple[int, int]:  # fmt: skip
    freqs = _freqs_of_slots(lut)
    num_tokens, num_dims = cos.shape[0], mean.shape[1]
    for s in range(pos.shape[1]):
        coding = _coding(freqs, base_index, int(group[s]), cuts, refine_index, active, s)
        try:
            pieces = [
                _read(words, pos[k, s], size[k, s], exceptions[k, s], len(new_lanes(coding, k)))
                for k in range(len(active))
            ]
            q = decode_segment(pieces, coding, num_tokens, is_whole=is_whole)
        except StreamError:
            return DAMAGED, s
        x = dequantize(q, multiplier, step[s])
        if matrix[s] >= 0:
            x = apply_ordered(x, synthesis[matrix[s]])
        x = x + mean[s]
        if turned[s]:
            x = rotate(x, cos, sin)
        _rows(out, out_pos[s], stride_t, num_tokens, num_dims)[:] = float_to_bf16(x)
    return OK, -1


def encode_bytes(
    coded: Array, enc: Array, standin: Array, index: Array, out: Array, piece_words: Array, exceptions: Array
) -> tuple[int, int]:
    del standin
    freqs = _freqs(enc)
    at = 0
    for s in range(len(coded)):
        (piece,) = encode_segment(coded[s].astype(np.int64) + VALUE_LOW, _bytes_coding(freqs, index[s]))
        words = piece.to_words()
        piece_words[s], exceptions[s] = len(words), len(piece.exceptions)
        if at + len(words) > out.size:
            return NO_ROOM, s
        at = _write(out, at, words)
    return OK, -1


def decode_bytes(
    words: Array, pos: Array, size: Array, exceptions: Array, lut: Array, index: Array, coded: Array
) -> tuple[int, int]:
    freqs = _freqs_of_slots(lut)
    for s in range(len(coded)):
        coding = _bytes_coding(freqs, index[s])
        try:
            piece = _read(words, pos[s], size[s], exceptions[s], len(new_lanes(coding, 0)))
            q = decode_segment([piece], coding, coded.shape[1], is_whole=True) - VALUE_LOW
        except StreamError:
            return DAMAGED, s
        if (q < 0).any() or (q >= NUM_VALUES).any():
            return DAMAGED, s
        coded[s] = q
    return OK, -1
