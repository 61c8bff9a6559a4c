"""The stream's definition: range-ANS in plain Python over one segment. Readable and slow; numpy only.

A segment is a [T, D] block of small integers (one layer, K or V, one head). Each integer is coded as a symbol in
0..255: value + CENTRE, or ESCAPE when that falls outside 0..254 or has no probability in the channel's table; an
escaped value is then written in full beside the stream.

N = min(LANES, D) coders ("lanes") share the work: channel d belongs to lane d % N. Each holds a 32-bit state in
[2**16, 2**32). Order of decoding: token by token, channel by channel; a lane whose state falls below 2**16 takes the
next 16-bit word of the segment's one stream at once. (Within a run of N channels the lanes are distinct, so a SIMD or
GPU decoder may do N symbols in one step and hand out words to the needy lanes in lane order: the same stream.)
Encoding runs in the exact reverse order, from state 2**16, so a decoder must end with every state at 2**16 and no
word or escape left: a free check.

Source: J. Duda, "Asymmetric numeral systems" (arXiv:1311.2540); shared stream as in DietGPU.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

LANES = 32
STATE_LOW = 1 << 16
CENTRE = 127
ESCAPE = 255
MAX_MAGNITUDE = 1 << 20
PROB_BITS = 12


class StreamError(ValueError):
    """The segment is not what an encoder would have written."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """One coded [T, D] block: the lanes' states, the shared stream, and the escaped values in decoding order."""

    states: list[int]
    words: list[int]
    escapes: list[int]

    def to_words(self) -> list[int]:
        """The segment as the payload's 16-bit words (little-endian: low half first)."""
        parts = [half for value in self.states for half in (value & 0xFFFF, value >> 16)]
        parts += self.words
        return parts + [half for value in self.escapes for half in (value & 0xFFFF, (value >> 16) & 0xFFFF)]

    @staticmethod
    def from_words(words: list[int], *, num_dims: int, num_words: int, num_escapes: int) -> Segment:
        lanes = min(LANES, num_dims)
        pairs = [
            low | (high << 16) for low, high in zip(words[0 : 2 * lanes : 2], words[1 : 2 * lanes : 2], strict=True)
        ]
        at = 2 * lanes + num_words
        tail = words[at : at + 2 * num_escapes]
        escapes = [low | (high << 16) for low, high in zip(tail[::2], tail[1::2], strict=True)]
        signed = [v - (1 << 32) if v >= 1 << 31 else v for v in escapes]
        return Segment(states=pairs, words=words[2 * lanes : at], escapes=signed)


def starts_of(freqs: np.ndarray) -> np.ndarray:
    """Cumulative starts [n, 256] of the tables [n, 256]."""
    return np.cumsum(freqs, axis=1) - freqs


def row_kind(token: int, group: int) -> int:
    """Which of a segment's two table rows codes this token: 0 for anchors (and plain segments), 1 for deltas."""
    return 0 if group == 0 or token % group == 0 else 1


def encode_segment(q: np.ndarray, freqs: np.ndarray, index: np.ndarray, group: int) -> Segment:
    """q [T, D] integers (deltas already taken), freqs [n, 256] summing to 2**PROB_BITS, index [2, D] table numbers."""
    num_tokens, num_dims = q.shape
    lanes = min(LANES, num_dims)
    starts = starts_of(freqs.astype(np.int64))
    states = [STATE_LOW] * lanes
    words: list[int] = []
    escapes: list[int] = []
    for t in reversed(range(num_tokens)):
        for d in reversed(range(num_dims)):
            table = int(index[row_kind(t, group), d])
            symbol = int(q[t, d]) + CENTRE
            if not 0 <= symbol < ESCAPE or freqs[table, symbol] == 0:
                symbol = ESCAPE
                escapes.append(int(q[t, d]))
            freq, start = int(freqs[table, symbol]), int(starts[table, symbol])
            state = states[d % lanes]
            if state >= freq << (32 - PROB_BITS):
                words.append(state & 0xFFFF)
                state >>= 16
            states[d % lanes] = ((state // freq) << PROB_BITS) + state % freq + start
    return Segment(states=states, words=words[::-1], escapes=escapes[::-1])


def decode_segment(
    segment: Segment, freqs: np.ndarray, index: np.ndarray, group: int, shape: tuple[int, int]
) -> np.ndarray:
    """Inverse of encode_segment: int32 [T, D]. Raises StreamError."""
    num_tokens, num_dims = shape
    lanes = min(LANES, num_dims)
    starts = starts_of(freqs.astype(np.int64))
    symbol_of = [np.repeat(np.arange(256), row) for row in freqs]
    states = list(segment.states)
    if any(state < STATE_LOW for state in states):
        raise StreamError("a lane starts below the legal range")
    words, escapes = iter(segment.words), iter(segment.escapes)
    q = np.zeros(shape, np.int32)
    for t in range(num_tokens):
        for d in range(num_dims):
            table = int(index[row_kind(t, group), d])
            state = states[d % lanes]
            slot = state & ((1 << PROB_BITS) - 1)
            symbol = int(symbol_of[table][slot])
            state = int(freqs[table, symbol]) * (state >> PROB_BITS) + slot - int(starts[table, symbol])
            if state < STATE_LOW:
                word = next(words, None)
                if word is None:
                    raise StreamError("the stream ends early")
                state = (state << 16) | word
            states[d % lanes] = state
            value = symbol - CENTRE
            if symbol == ESCAPE:
                escaped = next(escapes, None)
                if escaped is None or abs(escaped) > 2 * MAX_MAGNITUDE:
                    raise StreamError("too few escapes, or an escaped value out of range")
                value = escaped
            q[t, d] = value
    if next(words, None) is not None:
        raise StreamError("words are left over")
    if next(escapes, None) is not None:
        raise StreamError("escapes are left over")
    if any(state != STATE_LOW for state in states):
        raise StreamError("a lane does not end in the state every encoder starts from")
    return q
