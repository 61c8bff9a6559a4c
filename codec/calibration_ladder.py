"""What calibration found, before its constant c is known: a transform and unit steps for each head. And its effect.

Legend: L layers, T tokens, H KV heads, D head dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from codec.allocate import KV, Array, Sample, Statistics, plain_rows, stored_steps, unit_steps
from codec.decorrelate import regularised, sort_channels
from codec.delta_choice import Decision, transform_pair
from codec.profile import CodecLayout
from codec.rope import RopeTable

MAX_SPREAD = 8.0  # steps of the coarsest stage that a channel's spread may measure: a table names 64 integers, so with
# still smaller steps exceptions would eat what they save


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TensorLadder:
    """K or V. mean, unit [L, H, D] float32, analysis, synthesis [L, H, D, D] float32 as stored (1 where there is no
    matrix), has_matrix, is_turned [L]: steps at scale c are c * unit."""

    mean: Array
    unit: Array
    analysis: Array
    synthesis: Array
    has_matrix: Array
    is_turned: Array

    def integers(self, x: Array, layer: int, head: int, c: float) -> Array:
        """x [T, D] of plain_rows -> int32 [T, D]."""
        y = (x - self.mean[layer, head]) @ self.analysis[layer, head]
        inverse = np.float32(1) / stored_steps(self.unit[layer, head], c)
        return np.asarray(np.rint(y * inverse).astype(np.int32))

    def quantized(self, x: torch.Tensor, rope: RopeTable | None, c: float) -> torch.Tensor:
        """x [L, T, H, D] bf16 -> the same as its decoder would give it, steps c * unit."""
        wide = x.float().transpose(1, 2)
        turned = torch.from_numpy(self.is_turned.astype(bool))
        is_rotated = rope is not None and bool(turned.any())
        if is_rotated:
            assert rope is not None
            wide = torch.where(turned[:, None, None, None], _rotated(wide, *rope.inverse(), sign=-1), wide)
        mean = torch.from_numpy(self.mean)[:, :, None]
        step = torch.from_numpy(stored_steps(self.unit, c))[:, :, None]
        q = torch.round((wide - mean) @ torch.from_numpy(self.analysis) / step)
        wide = (q * step) @ torch.from_numpy(self.synthesis) + mean
        if is_rotated:
            assert rope is not None
            wide = torch.where(turned[:, None, None, None], _rotated(wide, *rope.forward(), sign=1), wide)
        return wide.transpose(1, 2).to(torch.bfloat16)


def _rotated(x: torch.Tensor, cos: Array, sin: Array, *, sign: int) -> torch.Tensor:
    """x [.., T, D]; see codec.rope."""
    c, s = torch.from_numpy(cos), torch.from_numpy(sin) * sign
    half = c.shape[1]
    a, b = x[..., :half], x[..., half : 2 * half]
    return torch.cat([a * c - b * s, b * c + a * s, x[..., 2 * half :]], dim=-1)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Ladder:
    """K and V, and the decisions [2 * L], K's layers first, that led here."""

    layout: CodecLayout
    tensors: tuple[TensorLadder, TensorLadder]
    decisions: list[Decision]

    def quantized(self, sample: Sample, c: float) -> KV:
        k, v = self.tensors
        return k.quantized(sample.k, sample.rope, c), v.quantized(sample.v, None, c)

    def plain(self, sample: Sample, which: int, layer: int, head: int) -> Array:
        turned = bool(self.tensors[which].is_turned[layer])
        return plain_rows(sample, which, layer, head, is_turned=turned)


def build_tensor(
    decisions: Sequence[Decision], stats: Sequence[Sequence[Statistics]], floors: Array, reg: float, scale: float
) -> TensorLadder:
    """decisions [L] of K or V, stats [L][H] in the frame that was chosen, floors [L, H], scale: about that of the
    coarsest stage. From all documents."""
    parts: dict[str, list[Array]] = {"mean": [], "unit": [], "analysis": [], "synthesis": []}
    for layer, heads in enumerate(stats):
        for head, one in enumerate(heads):
            kind, floor = decisions[layer].transform, floors[layer, head]
            pair = transform_pair(kind, one.covariance, regularised(one.fisher, reg, floor))
            unit = unit_steps(pair[1], one.fisher, reg, floor)
            spread = np.sqrt(np.maximum(np.diag(pair[0].T @ one.covariance @ pair[0]), 0))
            unit = np.maximum(unit, spread / (MAX_SPREAD * scale))
            if kind != "none":
                *pair_sorted, order = sort_channels(*pair, spread / unit)
                pair, unit = (pair_sorted[0], pair_sorted[1]), unit[order]
            for name, value in zip(parts, (one.mean, unit, *pair), strict=True):
                parts[name].append(value)
    shape = (len(stats), len(stats[0]))
    arrays = {
        name: np.stack(values).reshape(*shape, *values[0].shape).astype(np.float32) for name, values in parts.items()
    }
    return TensorLadder(
        **arrays,
        has_matrix=np.array([d.transform != "none" for d in decisions]),
        is_turned=np.array([d.is_turned for d in decisions]),
    )
