"""Probability tables: what a profile carries, and the lookup arrays the coders read. Pure, numpy.

A base table gives whole frequencies, summing to 2**10, to at most 64 of the integers -128 to 127; anything else is an
exception. A refinement table gives three contexts a pair of cuts. Tables are chosen by whole-number costs, so every
machine chooses alike.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from codec.errors import InvalidProfile
from kernels.rans_reference import (
    MAX_SYMBOLS,
    MAX_TABLES,
    NUM_CONTEXTS,
    NUM_VALUES,
    PROB_BITS,
    PROB_SUM,
    VALUE_LOW,
    standin_of,
    starts_of,
)

EXCEPTION_BITS = 64  # position and value are written in full beside the stream
MIN_SHARE = 3e-5  # below it an exception now and then is cheaper than a slot
COST_UNIT = 256  # costs are whole 1/256 bits


@dataclass(frozen=True, slots=True, eq=False)
class CodeBook:
    """freqs [n, 256] uint16 -> what the coders read.

    lut [n << 10] uint32, for decoding: slot -> (value + 128) << 21 | frequency << 10 | slot - start.
    enc [n * 256] uint32, for encoding: value + 128 -> frequency << 16 | start.
    standin [n] int64. cost [n, 257] float32: see value_cost; cost_of_value [257, n] is the same, turned.
    """

    freqs: np.ndarray
    lut: np.ndarray = field(init=False)
    enc: np.ndarray = field(init=False)
    standin: np.ndarray = field(init=False)
    cost: np.ndarray = field(init=False)
    cost_of_value: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        freqs = np.ascontiguousarray(self.freqs, np.uint16)
        if freqs.ndim != 2 or freqs.shape[1] != NUM_VALUES or not 1 <= freqs.shape[0] <= MAX_TABLES:
            raise InvalidProfile(f"a codebook is [1..{MAX_TABLES}, {NUM_VALUES}], not {freqs.shape}")
        if (freqs.sum(axis=1, dtype=np.int64) != PROB_SUM).any() or ((freqs > 0).sum(axis=1) > MAX_SYMBOLS).any():
            raise InvalidProfile(f"a table's frequencies do not sum to 2**{PROB_BITS}, or are too many")
        wide = freqs.astype(np.int64)
        starts = starts_of(wide)
        value = np.concatenate([np.repeat(np.arange(NUM_VALUES), row) for row in wide])
        table = np.repeat(np.arange(len(wide)), PROB_SUM)
        slot = np.tile(np.arange(PROB_SUM), len(wide))
        lut = ((value << 21) | (wide[table, value] << 10) | (slot - starts[table, value])).astype(np.uint32)
        cost = value_cost(freqs)
        for name, array in (
            ("freqs", freqs), ("lut", lut), ("standin", standin_of(wide)), ("cost", cost),
            ("enc", np.ascontiguousarray(((wide << 16) | starts).astype(np.uint32).ravel())),
            ("cost_of_value", np.ascontiguousarray(cost.T)),
        ):  # fmt: skip
            object.__setattr__(self, name, array)

    @property
    def num_tables(self) -> int:
        return int(self.freqs.shape[0])


def value_cost(freqs: np.ndarray) -> np.ndarray:
    """Cost [n, 257] float32 of each integer, in whole 1/256 bits so that sums are exact; the last is any exception."""
    bits = PROB_BITS - np.log2(np.maximum(freqs, 1).astype(np.float64))
    most = bits.min(axis=1, keepdims=True) + EXCEPTION_BITS
    bits = np.concatenate([np.where(freqs == 0, most, bits), most], axis=1)
    cost: np.ndarray = np.rint(bits * COST_UNIT).astype(np.float32)
    return cost


def apportion(weights: np.ndarray, total: int, keep: np.ndarray) -> np.ndarray:
    """Whole shares of `total`, in proportion to weights, at least 1 where `keep`, 0 elsewhere."""
    weights = np.where(keep, np.maximum(weights, 1e-12), 0.0)
    weights = weights / weights.sum()
    freqs = np.where(keep, np.maximum(1, np.floor(weights * total)), 0).astype(np.int64)
    while (excess := int(freqs.sum()) - total) != 0:
        # Move one count at a time where it costs (or helps) the expected length most.
        if excess > 0:
            loss = np.where(freqs > 1, weights / np.maximum(freqs - 1, 1), np.inf)
            freqs[int(loss.argmin())] -= 1
        else:
            freqs[int((weights / np.maximum(freqs, 1)).argmax())] += 1
    return freqs


def normalize(counts: np.ndarray, *, min_share: float = MIN_SHARE) -> np.ndarray:
    """Counts [256] (any non-negative weights) -> frequencies that sum to 2**10, of at most 64 values."""
    weights = np.asarray(counts[:NUM_VALUES], np.float64)
    if weights.sum() <= 0:
        weights = np.eye(1, NUM_VALUES, -VALUE_LOW)[0]
    weights = weights / weights.sum()
    keep = weights >= min_share
    keep[np.argsort(-weights, kind="stable")[MAX_SYMBOLS:]] = False
    return apportion(weights, PROB_SUM, keep).astype(np.uint16)


def cuts_of(counts: np.ndarray) -> np.ndarray:
    """Counts [3 contexts, 3 symbols] -> cuts [3, 2] uint16."""
    freqs = np.stack([apportion(row + 1e-9, PROB_SUM, np.ones(3, bool)) for row in np.asarray(counts, np.float64)])
    return np.cumsum(freqs, axis=1)[:, :2].astype(np.uint16)


def check_cuts(cuts: np.ndarray) -> None:
    """cuts [M - 1, n, 3, 2]."""
    if cuts.ndim != 4 or cuts.shape[2:] != (NUM_CONTEXTS, 2) or not 1 <= cuts.shape[1] <= MAX_TABLES:
        raise InvalidProfile(f"refinement tables are [stages, 1..{MAX_TABLES}, 3, 2], not {cuts.shape}")
    wide = cuts.astype(np.int64)
    if not ((wide[..., 0] > 0) & (wide[..., 1] > wide[..., 0]) & (wide[..., 1] < PROB_SUM)).all():
        raise InvalidProfile("a refinement table has a symbol without probability")


def cuts_cost(cuts: np.ndarray) -> np.ndarray:
    """cuts [n, 3, 2] -> bits [n, 3, 3] of each symbol in each context."""
    edges = np.pad(cuts.astype(np.float64), ((0, 0), (0, 0), (1, 1)))
    edges[..., -1] = PROB_SUM
    bits: np.ndarray = PROB_BITS - np.log2(np.diff(edges, axis=-1))
    return bits


def histogram(q: np.ndarray) -> np.ndarray:
    """Counts [D, 257] of integers q [N, D]; the last column: outside the alphabet."""
    at = q.astype(np.int64) - VALUE_LOW
    at = np.where((at < 0) | (at >= NUM_VALUES), NUM_VALUES, at)
    num_dims = q.shape[1]
    flat = at + np.arange(num_dims) * (NUM_VALUES + 1)
    return np.bincount(flat.ravel(), minlength=num_dims * (NUM_VALUES + 1)).reshape(num_dims, NUM_VALUES + 1)


def refinement_histogram(coarse: np.ndarray, fine: np.ndarray) -> np.ndarray:
    """Counts [D, 3, 3] of (context, symbol) for integers coarse, fine [N, D] of two neighbouring stages."""
    r = fine - 3 * coarse
    symbol = np.where(coarse < 0, -r, r).astype(np.int64) + 1
    context = np.minimum(np.abs(coarse), NUM_CONTEXTS - 1).astype(np.int64)
    num_dims = fine.shape[1]
    flat = np.arange(num_dims) * 9 + context * 3 + symbol
    return np.bincount(flat.ravel(), minlength=num_dims * 9).reshape(num_dims, 3, 3)


def bell(spread: float, low: int, high: int) -> np.ndarray:
    """Weights of the integers low to high under a Laplace/Gaussian blend of standard deviation `spread`."""
    spread = max(spread, 1e-3)
    edges = np.arange(low, high + 2) - 0.5
    tail = 0.5 * np.exp(-np.abs(edges) * np.sqrt(2) / spread)
    laplace = np.where(edges < 0, tail, 1 - tail)
    grid = np.clip(edges / spread / np.sqrt(2), -6, 6)
    gauss = 0.5 * (1 + np.tanh(1.1283791671 * (grid + 0.0897 * grid**3)))  # erf to 4e-4, in elementary functions
    return np.maximum(np.diff(0.5 * laplace + 0.5 * gauss), 0)


def bell_table(spread: float) -> np.ndarray:
    """Base table of a channel of standard deviation `spread` steps, for use without calibration."""
    return normalize(bell(spread, VALUE_LOW, -VALUE_LOW - 1) + 1e-12)


def bell_cuts(spread: float, stage: int) -> np.ndarray:
    """Refinement cuts [3, 2] at a stage, where `spread` counts the steps of stage 0."""
    fine_spread = spread * 3.0**stage
    reach = int(min(3**stage * 128, 12 * fine_spread + 12)) // 3 * 3 + 1
    fine = np.arange(-reach, reach + 1)
    coarse = (fine + 1) // 3
    weights = bell(fine_spread, -reach, reach) + 1e-12
    counts = np.zeros((3, 3))
    symbol = np.where(coarse < 0, 3 * coarse - fine, fine - 3 * coarse) + 1
    np.add.at(counts, (np.minimum(np.abs(coarse), 2), symbol), weights)
    return cuts_of(counts / counts.sum(axis=1, keepdims=True) + 1e-3)
