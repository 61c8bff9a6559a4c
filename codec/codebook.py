"""Learns tables: k-means over channels' counts, where the distance is the bits it costs. Pure, numpy.

Tables are learned once per model and shared by both ends, so that a chunk ships none: at 256 tokens a table a channel
would cost more than the symbols. Base tables code integers, refinement tables code thirds in three contexts.
Legend: R rows (every layer, K or V, head, channel, row kind), n tables.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from codec.entropy import COST_UNIT, EXCEPTION_BITS, CodeBook, cuts_cost, cuts_of, normalize
from kernels.rans_reference import MAX_SYMBOLS, MAX_TABLES, NUM_VALUES, PROB_SUM, VALUE_LOW

ITERATIONS = 15
TAIL_REACH = 2  # values beside those seen that get a share of what is yet unseen
DRIFT = 2.0  # other documents bring this many times the new values that held-out counting expects
WIDE_PRIOR = 0.05  # occurrences that every value has beforehand
Array = np.ndarray


def smooth(counts: Array) -> Array:
    """Counts [256] with values yet unseen beside those seen: by Good and Turing's estimate, as many occurrences of new
    values are to come as there are values seen once."""
    seen = np.flatnonzero(counts > 0)
    out = counts.astype(np.float64)
    if not seen.size:
        out[-VALUE_LOW] = 1.0
        return out
    once = float((counts == 1).sum()) + 0.5
    near = np.arange(max(0, seen[0] - TAIL_REACH), min(NUM_VALUES, seen[-1] + TAIL_REACH + 1))
    fresh = near[counts[near] == 0]
    out[fresh] += DRIFT * once / max(fresh.size, 1)
    return out


def float_cost(tables: Array) -> Array:
    """Bits [n, 257] of each integer under weights [n, 256], as the frequencies will have it: at least 1 in 1,024 where
    kept, an exception elsewhere."""
    share = tables / tables.sum(axis=1, keepdims=True)
    standin = -np.log2(share.max(axis=1, keepdims=True))
    bits = np.where(share > EXCEPTION_SHARE, -np.log2(np.maximum(share, 1 / PROB_SUM)), standin + EXCEPTION_BITS)
    out: Array = np.concatenate([bits, standin + EXCEPTION_BITS], axis=1)
    return out


EXCEPTION_SHARE = 3e-5  # entropy.MIN_SHARE: rarer values are exceptions


def entropy_bits(counts: Array) -> Array:
    """Empirical entropy [..] of counts [.., values], bits a symbol."""
    total = np.maximum(counts.sum(axis=-1, keepdims=True), 1)
    share = counts / total
    bits: Array = -(share * np.log2(np.maximum(share, 1e-12))).sum(axis=-1)
    return bits


def conditional_bits(counts: Array) -> Array:
    """Bits [..] in all, that counts [.., contexts, symbols] take at best."""
    bits: Array = (entropy_bits(counts) * counts.sum(axis=-1)).sum(axis=-1)
    return bits


def _cluster(rows: Array, order: Array, num_tables: int, cost_of: Callable[[Array], Array], best: Array) -> Array:
    """k-means. rows [R, X] counts, order [R] a first sorting, cost_of(summed counts [n, X]) -> bits [n, X], best [R]
    the bits a row's own table would take. Returns each row's cluster [R]."""
    chosen = np.empty(len(rows), np.int64)
    chosen[order] = np.arange(len(rows)) * num_tables // max(len(rows), 1)
    for _ in range(ITERATIONS):
        sums = np.zeros((num_tables, rows.shape[1]))
        np.add.at(sums, chosen, rows)
        cost = rows @ cost_of(sums).T
        nearest = cost.argmin(axis=1)
        for n in np.flatnonzero(np.bincount(nearest, minlength=num_tables) == 0):
            # An empty table takes over the row that is served worst.
            worst = int((cost[np.arange(len(rows)), nearest] - best).argmax())
            nearest[worst] = n
            cost[worst] = -np.inf
        if np.array_equal(nearest, chosen):
            break
        chosen = nearest
    return chosen


def learn_codebook(histograms: Array, num_tables: int = MAX_TABLES) -> tuple[CodeBook, Array]:
    """histograms [R, 257] (entropy.histogram) -> the codebook and each row's table [R] uint8. Empty rows: table 0."""
    used = np.flatnonzero(histograms.sum(axis=1) > 0)
    rows = histograms[used].astype(np.float64)
    num_tables = max(min(num_tables, len(rows)), 1)
    entropy = entropy_bits(rows)
    spread = np.log2(1e-6 + _spread(rows))

    def summed(sums: Array) -> Array:
        return np.stack([_keep_most(smooth(row[:NUM_VALUES])) for row in sums])

    chosen = _cluster(
        rows, np.argsort(spread, kind="stable"), num_tables, lambda sums: float_cost(summed(sums)),
        entropy * rows.sum(axis=1),
    )  # fmt: skip
    sums = np.zeros((num_tables, histograms.shape[1]))
    np.add.at(sums, chosen, rows)
    book = CodeBook(freqs=np.stack([normalize(row) for row in summed(sums)]))
    index = np.zeros(len(histograms), np.uint8)
    index[used] = (rows @ book.cost.T.astype(np.float64)).argmin(axis=1)
    return book, index


def _spread(rows: Array) -> Array:
    """Standard deviation [R] of histograms [R, 257]."""
    values = np.arange(VALUE_LOW, VALUE_LOW + rows.shape[1])
    total = np.maximum(rows.sum(axis=1), 1)
    mean = rows @ values / total
    spread: Array = np.sqrt(np.maximum(rows @ np.square(values) / total - mean**2, 0))
    return spread


def _keep_most(weights: Array) -> Array:
    """[256] with all but the MAX_SYMBOLS largest at 0."""
    out = weights.copy()
    out[np.argsort(-weights, kind="stable")[MAX_SYMBOLS:]] = 0
    return out


def learn_refinement(counts: Array, num_tables: int = MAX_TABLES) -> tuple[Array, Array]:
    """counts [R, 3 contexts, 3 symbols] -> cuts [n, 3, 2] uint16 and each row's table [R] uint8."""
    used = np.flatnonzero(counts.sum(axis=(1, 2)) > 0)
    num_tables = max(min(num_tables, len(used)), 1)
    rows = counts[used].reshape(-1, 9).astype(np.float64)
    best = conditional_bits(counts[used])
    prior = 0.5 + 1e-3 * rows.sum(axis=0)[None] / max(len(rows), 1)  # contexts that a table never met look average

    def learned(sums: Array) -> Array:
        return np.stack([cuts_of(row.reshape(3, 3)) for row in sums + prior])

    order = np.argsort(best / np.maximum(rows.sum(axis=1), 1), kind="stable")
    chosen = _cluster(rows, order, num_tables, lambda sums: cuts_cost(learned(sums)).reshape(-1, 9), best)
    sums = np.zeros((num_tables, 9))
    np.add.at(sums, chosen, rows)
    cuts = learned(sums)
    index = np.zeros(len(counts), np.uint8)
    index[used] = np.rint(rows @ np.rint(cuts_cost(cuts).reshape(-1, 9) * COST_UNIT).T).argmin(axis=1)
    return cuts, index


def table_cost_bits(histograms: Array, book: CodeBook, index: Array) -> Array:
    """Bits [R] that the codebook spends on each row's histogram [R, 257], exceptions included."""
    bits: Array = (histograms * book.cost[index]).sum(axis=1) / COST_UNIT
    return bits


def cuts_cost_bits(counts: Array, cuts: Array, index: Array) -> Array:
    """Bits [R] that refinement tables spend on counts [R, 3, 3]."""
    bits: Array = (counts * cuts_cost(cuts)[index]).sum(axis=(1, 2))
    return bits


def learn_wide_tables(learned_on: Array, judged_on: Array, num_tables: int = MAX_TABLES) -> float:
    """Bits that the histograms [R, W] of judged_on take with tables learned on others: the same clustering, without the
    format's limits on values and precision. Something to compare with."""
    rows = learned_on.astype(np.float64)
    num_tables = max(min(num_tables, len(rows)), 1)
    values = np.arange(rows.shape[1])
    total = np.maximum(rows.sum(axis=1), 1)
    spread = rows @ np.square(values) / total - np.square(rows @ values / total)

    def cost(sums: Array) -> Array:
        share = sums + WIDE_PRIOR
        out: Array = -np.log2(share / share.sum(axis=1, keepdims=True))
        return out

    best = entropy_bits(rows) * total
    chosen = _cluster(rows, np.argsort(spread, kind="stable"), num_tables, cost, best)
    sums = np.zeros((num_tables, rows.shape[1]))
    np.add.at(sums, chosen, rows)
    bits = cost(sums)
    index = (rows @ bits.T).argmin(axis=1)
    return float((judged_on * bits[index]).sum())
