"""Attention over tiles of keys as one reads it: the specification of `kernels/attention.py`, in numpy float64.

Arithmetic only; slow. For a query at position `p` the visible keys are `max(0, p - window + 1) .. p`.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def attention_reference(
    q: Array,
    k: Array,
    v: Array,
    positions: NDArray[np.int64],
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    tile_tokens: int = 256,
) -> Array:
    """`q` [R, Hq, D] queries at `positions` [R]; `k` [T, H, D], `v` [T, H, Dv] for positions 0..T-1 -> [R, Hq, Dv]."""
    num_rows, num_q_heads, _ = q.shape
    num_keys, num_kv_heads, _ = k.shape
    group = num_q_heads // num_kv_heads
    out = np.zeros((num_rows, num_q_heads, v.shape[-1]))
    for row in range(num_rows):
        first = 0 if window is None else max(0, int(positions[row]) - window + 1)
        for head in range(num_q_heads):
            exponent, total, weighted = -np.inf, 0.0, np.zeros(v.shape[-1])
            for start in range(0, num_keys, tile_tokens):
                visible = np.arange(max(start, first), min(start + tile_tokens, num_keys, positions[row] + 1))
                if visible.size == 0:
                    continue
                scores = k[visible, head // group] @ q[row, head] * scale
                if softcap is not None:
                    scores = softcap * np.tanh(scores / softcap)
                scores = scores * np.log2(np.e)
                tile_exponent = np.ceil(scores.max())
                weights = np.exp2(scores - tile_exponent)
                top = max(exponent, tile_exponent)
                total = total * np.exp2(exponent - top) + weights.sum() * np.exp2(tile_exponent - top)
                weighted = weighted * np.exp2(exponent - top) + (weights @ v[visible, head // group]) * np.exp2(
                    tile_exponent - top
                )
                exponent = top
            out[row, head] = weighted / total
    return out
