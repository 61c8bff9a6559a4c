"""Whether anchor delta pays, per (layer, K or V): measured rate with and without it. Pure, numpy.

The reconstruction is the same either way (see anchor_delta.py), so distortion is equal by construction and only bits
count. Legend: L layers, H heads, N tokens, D head dim.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from codec.codebook import entropy_bits
from codec.entropy import histogram

GROUPS = (2, 4, 8, 16)
MIN_GAIN = 0.005  # of the plain rate; below it the second set of tables is not worth having


@dataclass(frozen=True, slots=True, kw_only=True)
class DeltaRow:
    """One line of the table: bits a value plain and with the best group, and why (spread of deltas over spread)."""

    layer: int
    which: str
    plain_bits: float
    delta_bits: float
    group: int
    delta_over_spread: float
    is_on: bool

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def delta_histograms(q: np.ndarray, group: int) -> tuple[np.ndarray, np.ndarray]:
    """q [N, D] of one document -> histograms [D, 256] of anchors and of deltas (plain: all in the first)."""
    if group == 0:
        return histogram(q), np.zeros((q.shape[1], 256), np.int64)
    anchor = np.arange(len(q)) // group * group
    rest = np.arange(len(q)) % group != 0
    return histogram(q[~rest]), histogram((q - q[anchor])[rest])


def choose_group(layer: int, which: str, heads: list[list[np.ndarray]]) -> DeltaRow:
    """heads: for each head its documents' q [N, D]. Tries every group size."""
    count = sum(q.size for docs in heads for q in docs)

    def bits(group: int) -> float:
        total = 0.0
        for docs in heads:
            pairs = [delta_histograms(q, group) for q in docs]
            for part in (sum(p[0] for p in pairs), sum(p[1] for p in pairs)):
                part = np.asarray(part)
                total += float((entropy_bits(part) * part.sum(axis=1)).sum())
        return total / count

    plain = bits(0)
    best = min(GROUPS, key=bits)
    with_delta = bits(best)
    moved = np.mean(
        [np.square(np.diff(q, axis=0), dtype=np.float64).mean() for docs in heads for q in docs if len(q) > 1]
    )
    spread = np.mean([np.square(q - q.mean(axis=0), dtype=np.float64).mean() for docs in heads for q in docs])
    is_on = with_delta < plain * (1 - MIN_GAIN)
    return DeltaRow(
        layer=layer, which=which, plain_bits=plain, delta_bits=with_delta, group=best,
        delta_over_spread=float(np.sqrt(moved / max(spread, 1e-12))), is_on=is_on,
    )  # fmt: skip
