"""Learns a codebook: k-means over channel histograms, where the distance is the bits it costs. Pure, numpy.

Tables are learned once per model and shared by both ends, so that a chunk ships none: at 256 tokens a table a channel
would cost more than the symbols. Legend: M channels (every layer, K or V, head, channel, row kind), n tables.
"""

from __future__ import annotations

import numpy as np

from codec.entropy import NUM_SYMBOLS, CodeBook, normalize
from kernels.rans_reference import CENTRE, ESCAPE

ITERATIONS = 12
TAIL_SHARE = 3e-4  # of a table's mass, spread next to the values seen, so that a new one is no escape
TAIL_SYMBOLS = 3


def smooth(counts: np.ndarray) -> np.ndarray:
    """Counts [256] with a thin tail around what was seen, and the escape kept possible."""
    total = max(float(counts.sum()), 1.0)
    seen = np.flatnonzero(counts[:ESCAPE] > 0)
    out = counts.astype(np.float64)
    low, high = (int(seen[0]), int(seen[-1])) if seen.size else (CENTRE, CENTRE)
    reach = np.arange(max(0, low - TAIL_SYMBOLS), min(ESCAPE, high + TAIL_SYMBOLS + 1))
    out[reach] += TAIL_SHARE * total / reach.size
    out[ESCAPE] += 1e-5 * total
    return out


def float_cost(tables: np.ndarray) -> np.ndarray:
    """Bits [n, 256] of each symbol under weights [n, 256]; unseen symbols cost an escape."""
    share = tables / tables.sum(axis=1, keepdims=True)
    escape = -np.log2(np.maximum(share[:, ESCAPE : ESCAPE + 1], 1 / 4096)) + 32
    bits: np.ndarray = np.where(share > 1e-5, -np.log2(np.maximum(share, 1 / 4096)), escape)
    bits[:, ESCAPE] = escape[:, 0]
    return bits


def learn_codebook(histograms: np.ndarray, num_tables: int) -> tuple[CodeBook, np.ndarray]:
    """histograms [M, 256] -> the codebook and each channel's table [M] uint8."""
    counts = histograms.astype(np.float64)
    share = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    entropy = -(share * np.log2(np.maximum(share, 1e-12))).sum(axis=1)
    order = np.argsort(entropy, kind="stable")  # start from equal slices by entropy
    chosen = np.empty(len(counts), np.int64)
    chosen[order] = np.arange(len(counts)) * num_tables // len(counts)
    for _ in range(ITERATIONS):
        tables = np.stack([smooth(counts[chosen == n].sum(axis=0)) for n in range(num_tables)])
        cost = counts @ float_cost(tables).T
        best = cost.argmin(axis=1)
        for n in np.flatnonzero(np.bincount(best, minlength=num_tables) == 0):
            # An empty table takes over the channel that is served worst.
            worst = int((cost[np.arange(len(best)), best] - counts.sum(axis=1) * entropy).argmax())
            best[worst] = n
            cost[worst] = 0
        if np.array_equal(best, chosen):
            break
        chosen = best
    tables = np.stack([smooth(counts[chosen == n].sum(axis=0)) for n in range(num_tables)])
    book = CodeBook(freqs=np.stack([normalize(row) for row in tables]))
    index = (counts @ book.cost.T.astype(np.float64)).argmin(axis=1)
    return book, index.astype(np.uint8)


def table_cost_bits(histograms: np.ndarray, book: CodeBook, index: np.ndarray) -> np.ndarray:
    """Bits [M] that the codebook spends on each channel's histogram."""
    bits: np.ndarray = (histograms * book.cost[index]).sum(axis=1) / 256
    return bits


def entropy_bits(histograms: np.ndarray) -> np.ndarray:
    """Empirical entropy [M] of each histogram, bits a symbol."""
    total = np.maximum(histograms.sum(axis=-1, keepdims=True), 1)
    share = histograms / total
    bits: np.ndarray = -(share * np.log2(np.maximum(share, 1e-12))).sum(axis=-1)
    return bits


assert NUM_SYMBOLS == ESCAPE + 1
