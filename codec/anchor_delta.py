"""CacheGen's first idea as a codec step: in groups of G tokens, the first is coded as it is, the rest as differences.

Pure, numpy. The differences are taken between *quantized* values, so the loop is closed: the decoder adds what the
encoder subtracted, errors do not accumulate, and the reconstruction is bit for bit that of coding without deltas. So
on or off is purely a question of rate, and calibration asks it per (layer, K or V).

Source: Liu et al., "CacheGen" (arXiv:2310.07240), section 5.1.   Legend: T tokens, D head dim.
"""

from __future__ import annotations

import numpy as np


def take_deltas(q: np.ndarray, group: int) -> np.ndarray:
    """q [T, D] quantized integers -> the same with deltas in place of non-anchors. group 0: unchanged."""
    if group == 0:
        return q.copy()
    anchor = np.arange(q.shape[0]) // group * group
    out: np.ndarray = q - q[anchor]
    out[::group] = q[::group]
    return out


def add_anchors(delta: np.ndarray, group: int) -> np.ndarray:
    """Inverse of take_deltas."""
    if group == 0:
        return delta.copy()
    anchor = np.arange(delta.shape[0]) // group * group
    out: np.ndarray = delta + delta[anchor]
    out[::group] = delta[::group]
    return out
