"""The codebook of probability tables: what a profile carries, and the lookup arrays the coders read. Pure, numpy.

A table gives each of 256 symbols a whole frequency, summing to 2**12. Symbol s stands for the value s - 127;
symbol 255 is the escape, and always has frequency >= 1. A symbol of frequency 0 is outside the table's support and
is escaped. Tables are chosen by whole-number costs, so every machine chooses alike.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from codec.errors import InvalidProfile
from kernels.rans_reference import CENTRE, ESCAPE, PROB_BITS, starts_of

NUM_SYMBOLS = 256
MAX_TABLES = 256
ESCAPE_EXTRA_BITS = 32  # an escaped value is written in full beside the stream


@dataclass(frozen=True, slots=True, eq=False)
class CodeBook:
    """freqs [n, 256] uint16 -> what the coders read.

    lut [n << 12] uint32, for decoding: slot -> symbol << 24 | frequency << 12 | slot - start.
    fs [n * 256] uint32, for encoding: symbol -> frequency << 16 | start.
    cost [n, 256]: see symbol_cost; cost_of_symbol [256, n] is the same, turned.
    """

    freqs: np.ndarray
    lut: np.ndarray = field(init=False)
    fs: np.ndarray = field(init=False)
    cost: np.ndarray = field(init=False)
    cost_of_symbol: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        freqs = np.ascontiguousarray(self.freqs, np.uint16)
        if freqs.ndim != 2 or freqs.shape[1] != NUM_SYMBOLS or not 1 <= freqs.shape[0] <= MAX_TABLES:
            raise InvalidProfile(f"a codebook is [1..{MAX_TABLES}, {NUM_SYMBOLS}], not {freqs.shape}")
        if (freqs.sum(axis=1, dtype=np.int64) != 1 << PROB_BITS).any() or (freqs[:, ESCAPE] == 0).any():
            raise InvalidProfile("a table's frequencies do not sum to 2**12, or its escape has none")
        wide = freqs.astype(np.int64)
        starts = starts_of(wide)
        symbol = np.concatenate([np.repeat(np.arange(NUM_SYMBOLS), row) for row in wide])
        table = np.repeat(np.arange(len(wide)), 1 << PROB_BITS)
        slot = np.tile(np.arange(1 << PROB_BITS), len(wide))
        lut = ((symbol << 24) | (wide[table, symbol] << 12) | (slot - starts[table, symbol])).astype(np.uint32)
        object.__setattr__(self, "freqs", freqs)
        object.__setattr__(self, "lut", lut)
        object.__setattr__(self, "fs", np.ascontiguousarray(((wide << 16) | starts).astype(np.uint32).ravel()))
        cost = symbol_cost(freqs)
        object.__setattr__(self, "cost", cost)
        object.__setattr__(self, "cost_of_symbol", np.ascontiguousarray(cost.T))

    @property
    def num_tables(self) -> int:
        return int(self.freqs.shape[0])


def symbol_cost(freqs: np.ndarray) -> np.ndarray:
    """Cost [n, 256] float32 of each symbol, in whole 1/256 bits, so that sums are exact everywhere."""
    bits = PROB_BITS - np.log2(np.maximum(freqs, 1).astype(np.float64))
    escape = bits[:, ESCAPE : ESCAPE + 1] + ESCAPE_EXTRA_BITS
    bits = np.where(freqs == 0, escape, bits)
    bits[:, ESCAPE] = escape[:, 0]
    cost: np.ndarray = np.rint(bits * 256).astype(np.float32)
    return cost


def normalize(counts: np.ndarray, *, min_share: float = 1e-5) -> np.ndarray:
    """Counts [256] (any non-negative weights, escape included) -> frequencies that sum to 2**12.

    Symbols whose share is under `min_share` leave the support; the escape keeps at least 1.
    """
    total = 1 << PROB_BITS
    weights = np.asarray(counts, np.float64).copy()
    weights /= max(weights.sum(), 1e-300)
    lost = weights[(weights < min_share)].sum()
    weights[weights < min_share] = 0
    weights[ESCAPE] = max(weights[ESCAPE] + lost, 1e-9)
    freqs = np.where(weights > 0, np.maximum(1, np.floor(weights * total)), 0).astype(np.int64)
    while (excess := int(freqs.sum()) - total) != 0:
        # Move one count at a time where it costs (or helps) the expected length most.
        if excess > 0:
            loss = np.where(freqs > 1, weights / np.maximum(freqs - 1, 1), np.inf)
            freqs[int(loss.argmin())] -= 1
        else:
            freqs[int((weights / np.maximum(freqs, 1)).argmax())] += 1
    return freqs.astype(np.uint16)


def histogram(q: np.ndarray) -> np.ndarray:
    """Symbol counts [D, 256] of integers q [N, D]; out-of-alphabet values count as escapes."""
    symbols = q.astype(np.int64) + CENTRE
    symbols = np.where((symbols < 0) | (symbols >= ESCAPE), ESCAPE, symbols)
    num_dims = q.shape[1]
    flat = symbols + np.arange(num_dims) * NUM_SYMBOLS
    return np.bincount(flat.ravel(), minlength=num_dims * NUM_SYMBOLS).reshape(num_dims, NUM_SYMBOLS)


def laplace_table(spread: float) -> np.ndarray:
    """Table of a rounded Laplace/Gaussian blend of standard deviation `spread` steps, for use without calibration."""
    edges = np.arange(-CENTRE, CENTRE + 2) - 0.5
    scale = max(spread, 1e-3) / np.sqrt(2)
    tail = 0.5 * np.exp(-np.abs(edges) / scale)
    laplace = np.where(edges < 0, tail, 1 - tail)
    grid = np.clip(edges / max(spread, 1e-3) / np.sqrt(2), -6, 6)
    gauss = 0.5 * (1 + np.tanh(1.1283791671 * (grid + 0.0897 * grid**3)))  # erf to 4e-4, in elementary functions
    inside = np.diff(0.5 * laplace + 0.5 * gauss)
    counts = np.append(inside, max(1e-4, 1 - inside.sum()))
    return normalize(np.maximum(counts, 1e-9), min_share=1e-5)


def exponent_table(peak: float) -> np.ndarray:
    """Table of the bf16 exponent bytes of a Gaussian whose spread has exponent byte `peak` (may be fractional)."""
    e = np.arange(255, dtype=np.float64)
    low, high = 2.0 ** (e - peak), 2.0 ** (e + 1 - peak)
    density = np.exp(-0.5 * np.minimum(low, 40) ** 2) * np.minimum(high - low, 40)
    counts = np.append(density + 1e-7, 1e-6)
    counts[0] += 1e-4  # zeros
    return normalize(counts / counts.sum(), min_share=1e-5)
