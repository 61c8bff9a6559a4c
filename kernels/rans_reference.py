"""The stream's definition: range-ANS over one segment, in plain Python. Readable and slow; numpy only.

A segment is a [T, D] block of integers (one layer, K or V, one head), coded in stages. Stage 0 codes coarse integers;
each further stage splits every bin in three and codes which third. codec/SPEC.md is the text.

N lanes ("coders") share the work: channel i belongs to lane i % N, each a 32-bit state in [2**16, 2**32). Order of
decoding: stage by stage, token by token, channel by channel; a lane whose state falls below 2**16 takes the next
16-bit word of the stage's stream at once. (Within a run of N channels the lanes are distinct, so a SIMD or GPU decoder
may do N symbols in one step and hand out words to the needy lanes in lane order: the same stream.) The lanes' states
run on from stage to stage, so a stage costs no states of its own and any number of last stages can be cut off.

What the tables cannot say is an *exception*, written in full beside the stream.

Sources: J. Duda, "Asymmetric numeral systems" (arXiv:1311.2540); the shared stream as in DietGPU.
Legend: T tokens, D channels, K stages in hand, n tables.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

PROB_BITS = 10
PROB_SUM = 1 << PROB_BITS
STATE_LOW = 1 << 16
VALUE_LOW = -128  # the lowest integer that a base table can name; the highest is 127
NUM_VALUES = 256
MAX_SYMBOLS = 64  # of one base table with a frequency above 0: the GPU keeps tables in shared memory
MAX_TABLES = 32
NUM_CONTEXTS = 3
MAX_STAGES = 6
MAX_MAGNITUDE = 1 << 20  # of a quantized value at the finest stage
MAX_EXCEPTION = 1 << 21  # of an exception's value: a difference of two of those


class StreamError(ValueError):
    """The segment is not what an encoder would have written."""


def lanes_of(num_dims: int) -> int:
    """N: as many lanes as pay for their states."""
    return 32 if num_dims >= 128 else 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Coding:
    """How one segment is coded. With K stages in hand:

    freqs [n, 256]: base tables, frequency of each integer from VALUE_LOW on. index [2, D]: table of each channel, row
    1 for the deltas of an anchor group. group: 0 or the anchor group's size. active [K]: leading channels coded.
    cuts [K - 1, n, 3, 2] and refine [K - 1, D]: the refinement tables and which one each channel uses.
    """

    freqs: np.ndarray
    index: np.ndarray
    group: int
    active: Sequence[int]
    cuts: np.ndarray
    refine: np.ndarray

    @property
    def num_dims(self) -> int:
        return int(self.index.shape[1])


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """One stage of one segment: new lanes' states, stream words, exceptions (position, value)."""

    states: list[int]
    words: list[int]
    exceptions: list[tuple[int, int]]

    def to_words(self) -> list[int]:
        """As the blob's 16-bit words (low half first)."""
        parts = [half for state in self.states for half in (state & 0xFFFF, state >> 16)]
        parts += self.words
        for pair in self.exceptions:
            parts += [half for number in pair for half in (number & 0xFFFF, (number >> 16) & 0xFFFF)]
        return parts

    @staticmethod
    def from_words(words: Sequence[int], *, num_states: int, num_exceptions: int) -> Piece:
        tail = len(words) - 4 * num_exceptions
        if tail < 2 * num_states:
            raise StreamError("a piece is shorter than its states and exceptions")
        wide = [low | high << 16 for low, high in zip(words[tail::2], words[tail + 1 :: 2], strict=True)]
        return Piece(
            states=[words[2 * j] | words[2 * j + 1] << 16 for j in range(num_states)],
            words=list(words[2 * num_states : tail]),
            exceptions=[
                (at, value - (1 << 32) if value >= 1 << 31 else value)
                for at, value in zip(wide[::2], wide[1::2], strict=True)
            ],
        )


def starts_of(freqs: np.ndarray) -> np.ndarray:
    """Cumulative starts [n, 256] of the tables [n, 256]."""
    return np.cumsum(freqs, axis=1) - freqs


def standin_of(freqs: np.ndarray) -> np.ndarray:
    """[n] the value that holds an exception's place in the stream: the most frequent, of several the lowest."""
    return freqs.argmax(axis=1) + VALUE_LOW


def new_lanes(coding: Coding, stage: int) -> range:
    """The lanes whose states stand in this stage's piece."""
    lanes = lanes_of(coding.num_dims)
    before = min(lanes, coding.active[stage - 1]) if stage else 0
    return range(before, min(lanes, coding.active[stage]))


def _refinement(coding: Coding, stage: int, channel: int, coarse: int) -> tuple[int, int]:
    context = min(abs(coarse), NUM_CONTEXTS - 1)
    first, second = coding.cuts[stage - 1, coding.refine[stage - 1, channel], context]
    return int(first), int(second)


def stages_of(q: np.ndarray, num_stages: int) -> list[np.ndarray]:
    """The finest integers [T, D] -> q at every stage, coarsest first: each is the nearest third of the next."""
    out = [q]
    for _ in range(num_stages - 1):
        out.append((out[-1] + 1) // 3)
    return out[::-1]


def encode_segment(q: np.ndarray, coding: Coding) -> list[Piece]:
    """q [T, D] integers of the finest stage -> one piece a stage."""
    num_tokens, num_dims = q.shape
    num_stages = len(coding.active)
    levels = stages_of(q.astype(np.int64), num_stages)
    lanes = lanes_of(num_dims)
    states = [STATE_LOW] * lanes
    starts, standin = starts_of(coding.freqs.astype(np.int64)), standin_of(coding.freqs)
    pieces: list[Piece] = []
    for stage in reversed(range(num_stages)):
        words: list[int] = []
        exceptions: list[tuple[int, int]] = []
        for t in reversed(range(num_tokens)):
            anchor = t - t % coding.group if coding.group else t
            for d in reversed(range(num_dims)):
                if stage:
                    coarse = int(levels[stage - 1][t, d])
                    value = int(levels[stage][t, d]) - 3 * coarse
                else:
                    value = int(levels[0][t, d]) - (int(levels[0][anchor, d]) if anchor != t else 0)
                if d >= coding.active[stage]:
                    if value:
                        exceptions.append((t * num_dims + d, value))
                    continue
                if stage:
                    first, second = _refinement(coding, stage, d, coarse)
                    symbol = -value if coarse < 0 else value
                    start = (0, first, second)[symbol + 1]
                    freq = (first, second - first, PROB_SUM - second)[symbol + 1]
                else:
                    table = int(coding.index[int(anchor != t), d])
                    at = value - VALUE_LOW
                    if not 0 <= at < NUM_VALUES or coding.freqs[table, at] == 0:
                        exceptions.append((t * num_dims + d, value))
                        at = int(standin[table]) - VALUE_LOW
                    freq, start = int(coding.freqs[table, at]), int(starts[table, at])
                state = states[d % lanes]
                if state >= freq << (32 - PROB_BITS):
                    words.append(state & 0xFFFF)
                    state >>= 16
                states[d % lanes] = ((state // freq) << PROB_BITS) + state % freq + start
        new = [states[j] for j in new_lanes(coding, stage)]
        pieces.append(Piece(states=new, words=words[::-1], exceptions=exceptions[::-1]))
    return pieces[::-1]


def decode_segment(pieces: Sequence[Piece], coding: Coding, num_tokens: int, *, is_whole: bool) -> np.ndarray:
    """Inverse of encode_segment: int32 [T, D] at the last piece's stage. Raises StreamError.

    is_whole: no stage was cut off, so the lanes must end where every encoder starts.
    """
    num_dims = coding.num_dims
    lanes = lanes_of(num_dims)
    starts = starts_of(coding.freqs.astype(np.int64))
    value_of = [np.repeat(np.arange(NUM_VALUES) + VALUE_LOW, row) for row in coding.freqs]
    states = [STATE_LOW] * lanes
    q = np.zeros((num_tokens, num_dims), np.int64)
    for stage, piece in enumerate(pieces):
        for j, state in zip(new_lanes(coding, stage), piece.states, strict=True):
            if state < STATE_LOW:
                raise StreamError("a lane starts below the legal range")
            states[j] = state
        words = iter(piece.words)
        found = np.zeros((num_tokens, num_dims), np.int64)
        for t in range(num_tokens):
            kind = 1 if coding.group and t % coding.group else 0
            for d in range(coding.active[stage]):
                state = states[d % lanes]
                slot = state % PROB_SUM
                if stage:
                    first, second = _refinement(coding, stage, d, int(q[t, d]))
                    symbol = int(slot >= first) + int(slot >= second) - 1
                    start = (0, first, second)[symbol + 1]
                    freq = (first, second - first, PROB_SUM - second)[symbol + 1]
                    found[t, d] = -symbol if q[t, d] < 0 else symbol
                else:
                    table = int(coding.index[kind, d])
                    value = int(value_of[table][slot])
                    freq, start = int(coding.freqs[table, value - VALUE_LOW]), int(starts[table, value - VALUE_LOW])
                    found[t, d] = value
                state = freq * (state // PROB_SUM) + slot - start
                if state < STATE_LOW:
                    word = next(words, None)
                    if word is None:
                        raise StreamError("the stream ends early")
                    state = state << 16 | word
                states[d % lanes] = state
        if next(words, None) is not None:
            raise StreamError("words are left over")
        last = -1
        for at, value in piece.exceptions:
            if not last < at < q.size or abs(value) > MAX_EXCEPTION:
                raise StreamError("an exception is out of order or out of range")
            found[at // num_dims, at % num_dims] = value
            last = at
        if stage:
            q = 3 * q + found
        else:
            q = found
            if coding.group:
                anchor = np.arange(num_tokens) // coding.group * coding.group
                q = found + np.where((np.arange(num_tokens) != anchor)[:, None], found[anchor], 0)
    if is_whole and any(state != STATE_LOW for state in states):
        raise StreamError("a lane does not end in the state every encoder starts from")
    return q.astype(np.int32)
