"""Rate-distortion allocation: which step each (layer, K or V, head) gets. Pure, numpy.

Each of M tensors has a measured rate R(step) and distortion D(step) on a grid, and a sensitivity s: how much KL one
unit of its squared error costs. KL is taken to add up over tensors, KL = sum s * D, which the finished levels are then
measured against. For a given slope the best choice is, tensor by tensor, argmin R + slope * s * D.

Source: Shoham & Gersho, "Efficient bit allocation for an arbitrary set of quantizers" (1988).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from codec.codebook import entropy_bits
from codec.entropy import histogram
from codec.quantize import round_to_bf16

GRID = 2.0 ** (np.arange(-20, 11) / 4)  # steps in units of a tensor's rms spread: 1/32 to 5.7
MAX_RATE_TOKENS = 3000
MIN_SENSITIVITY_SHARE = 0.03  # of the median: nothing is declared free because a probe happened not to touch it


@dataclass(frozen=True, slots=True, kw_only=True)
class RateTable:
    """step, rate (bits a value), distortion (mean squared error): [M, G] each, G the grid."""

    step: np.ndarray
    rate: np.ndarray
    distortion: np.ndarray


def measure_rates(tensors: list[np.ndarray]) -> RateTable:
    """tensors: M centred arrays [N, D]. Entropy per channel, so tables are assumed to fit (they nearly do)."""
    step = np.empty((len(tensors), len(GRID)), np.float32)
    rate, distortion = np.empty(step.shape), np.empty(step.shape)
    for m, whole in enumerate(tensors):
        x = whole[:: max(1, len(whole) // MAX_RATE_TOKENS)]
        spread = max(float(np.sqrt(np.square(x, dtype=np.float64).mean())), 1e-6)
        step[m] = round_to_bf16(GRID * spread)
        for g, size in enumerate(step[m]):
            q = np.rint(x / size)
            rate[m, g] = entropy_bits(histogram(q)).mean()
            distortion[m, g] = float(np.square(x - q * size, dtype=np.float64).mean())
    return RateTable(step=step, rate=rate, distortion=distortion)


def sensitivities(kl: np.ndarray, distortion: np.ndarray) -> np.ndarray:
    """KL [M] that each tensor's probe cost, over the squared error [M] of that probe; floored, never zero."""
    raw: np.ndarray = np.maximum(kl, 0) / np.maximum(distortion, 1e-30)
    # The floor is relative to what an error of the tensor's own size would cost, so that scale plays no part.
    effect = raw * distortion
    floor = MIN_SENSITIVITY_SHARE * max(float(np.median(effect)), 1e-9)
    sensitivity: np.ndarray = np.maximum(effect, floor) / np.maximum(distortion, 1e-30)
    return sensitivity


def allocate(table: RateTable, sensitivity: np.ndarray, target_rate: float) -> np.ndarray:
    """Grid choice [M] whose mean rate is nearest to the target from below, at the least sum of s * D."""
    low, high = -40.0, 40.0
    for _ in range(60):
        middle = (low + high) / 2
        score = table.rate + np.exp2(middle) * sensitivity[:, None] * table.distortion
        choice = score.argmin(axis=1)
        if float(np.take_along_axis(table.rate, choice[:, None], 1).mean()) > target_rate:
            high = middle
        else:
            low = middle
    score = table.rate + np.exp2(low) * sensitivity[:, None] * table.distortion
    return np.asarray(score.argmin(axis=1))
