"""Which of the codec's steps are on, per (layer, K or V): by measured rate at equal Fisher-weighted distortion.

Candidates: channels as they are, the KLT, the Fisher-weighted KLT, Hadamard; keys before or after RoPE; anchor deltas
in groups. Each is learned on one half of the documents and judged on the other. What costs decoding time has to save
something. Per-token scaling (one step a token, as CacheGen has it) is measured beside them; the format has none.

Deltas are taken between quantized values, so they change bits only; they see stage 0, the rest of the bits is the same.
Legend: L layers, H heads, N tokens, D head dim, M stages.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from codec.allocate import Array, Statistics, rate_at, rate_distortion, unit_steps
from codec.codebook import entropy_bits
from codec.decorrelate import as_stored, fisher_klt, hadamard, klt, regularised
from codec.entropy import histogram

TRANSFORMS = ("none", "klt", "fisher", "hadamard")
REGS = (0.03, 0.1, 0.3, 1.0)
MIN_SAVING = {"none": 0.0, "klt": 0.03, "fisher": 0.03, "hadamard": 0.03}
TURN_SAVING = 0.01
GROUPS = (2, 4, 8, 16)
DELTA_SAVING = 0.005  # of all stages' bits; below it the second set of tables is not worth having
GRID = 3.0 ** np.array([-3.4, -2.5, -1.6, -0.7, 0.3])  # scales, in units of the coarsest stage's


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """One line of the table. bits: mean over the levels of bits a value, by candidate ("after" RoPE: keys only), all at
    the distortion that "fisher" has; chosen: one of them. delta_bits by group, of all stages, 0 = off."""

    layer: int
    which: str
    bits: dict[str, float]
    chosen: str
    delta_bits: dict[int, float] = field(default_factory=dict)
    group: int = 0
    delta_over_spread: float = float("nan")

    @property
    def is_turned(self) -> bool:
        return self.which == "K" and not self.chosen.startswith("after ")

    @property
    def transform(self) -> str:
        return self.chosen.removeprefix("after ")

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def transform_pair(kind: str, covariance: Array, f: Array) -> tuple[Array, Array]:
    """(analysis, synthesis) as stored; f regularised."""
    dim = len(covariance)
    if kind == "none":
        one = np.eye(dim, dtype=np.float32)
        return one, one
    if kind == "hadamard":
        return as_stored(hadamard(dim)[0])
    return as_stored(klt(covariance)[0] if kind == "klt" else fisher_klt(covariance, f, 0.0)[0])


def _curve(stats: Statistics, kind: str, reg: float, floor: float, scale: float, per_token: bool = False) -> Array:
    """Learned on one half, judged on the other: [2, G] rate and cost."""
    covariance, f = stats.learn
    pair = transform_pair(kind, covariance, regularised(f, reg, floor))
    unit = unit_steps(pair[1], f, reg, floor)
    return np.stack(
        rate_distortion(
            stats.rows, pair, unit, stats.judge_fisher, [float(c) for c in scale * GRID], per_token=per_token
        )
    )


def _wanted(stats: Statistics, scale: float, stages: int) -> Array:
    """[M] costs that candidates are compared at: the Fisher KLT's, at the levels' scales."""
    covariance, f = stats.learn
    reg = REGS[1]
    pair = transform_pair("fisher", covariance, regularised(f, reg, 0.0))
    unit = unit_steps(pair[1], f, reg, 0.0)
    scales = [scale / 3.0**m for m in range(stages)]
    return rate_distortion(stats.rows, pair, unit, stats.judge_fisher, scales)[1]


def choose_reg(
    tensors: Sequence[Statistics], floors: Array, scale: float, stages: int
) -> tuple[float, dict[float, float]]:
    """How far to trust the Fisher information: the regularisation whose transforms and steps cost least where they were
    not learned, and the bits of all."""
    bits = {}
    wanted = [_wanted(stats, scale, stages) for stats in tensors]
    for reg in REGS:
        curves = [_curve(stats, "fisher", reg, floor, scale) for stats, floor in zip(tensors, floors, strict=True)]
        bits[reg] = float(np.mean([rate_at(*curve, want) for curve, want in zip(curves, wanted, strict=True)]))
    return min(bits, key=lambda reg: bits[reg]), bits


def choose_transform(
    layer: int, which: str, turned: Sequence[Statistics], plain: Sequence[Statistics] | None, floors: Array, reg: float,
    scale: float, stages: int,
) -> Decision:  # fmt: skip
    """turned: the heads' statistics, keys before RoPE; plain: keys after it, None for V or without RoPE."""
    wanted = [_wanted(stats, scale, stages) for stats in turned]

    def bits(heads: Sequence[Statistics], kind: str, per_token: bool = False) -> float:
        rates = [
            rate_at(*_curve(stats, kind, reg, floor, scale, per_token), want)
            for stats, floor, want in zip(heads, floors, wanted, strict=True)
        ]
        return float(np.mean(rates))

    table = {kind: bits(turned, kind) for kind in TRANSFORMS}
    if plain is not None:
        table |= {f"after {kind}": bits(plain, kind) for kind in TRANSFORMS}

    def price(name: str) -> float:
        is_turned = plain is not None and not name.startswith("after ")
        return table[name] * (1 + MIN_SAVING[name.removeprefix("after ")]) * (1 + TURN_SAVING * is_turned)

    chosen = min(table, key=price)
    table["per token"] = bits(turned, "none", per_token=True)
    return Decision(layer=layer, which=which, bits=table, chosen=chosen)


def delta_histograms(q: Array, group: int) -> tuple[Array, Array]:
    """q [N, D] of one document -> histograms [D, 257] of anchors and of deltas (plain: all in the first)."""
    if group == 0:
        return histogram(q), np.zeros((q.shape[1], 257), np.int64)
    anchor = np.arange(len(q)) // group * group
    rest = np.arange(len(q)) % group != 0
    return histogram(q[~rest]), histogram((q - q[anchor])[rest])


def choose_group(decision: Decision, heads: Sequence[Sequence[Array]], refinement_bits: float) -> Decision:
    """heads: for each head its documents' stage-0 integers [N, D]; refinement_bits: of the other stages, a value."""
    count = sum(q.size for docs in heads for q in docs)

    def bits(group: int) -> float:
        total = 0.0
        for docs in heads:
            pairs = [delta_histograms(q, group) for q in docs]
            for part in (sum(p[0] for p in pairs), sum(p[1] for p in pairs)):
                part = np.asarray(part)
                total += float((entropy_bits(part) * part.sum(axis=1)).sum())
        return total / count + refinement_bits

    by_group = {group: bits(group) for group in (0, *GROUPS)}
    best = min(GROUPS, key=lambda group: by_group[group])
    moved = np.mean([np.square(np.diff(q, axis=0), dtype=np.float64).mean() for d in heads for q in d if len(q) > 1])
    spread = np.mean([np.square(q - q.mean(axis=0), dtype=np.float64).mean() for docs in heads for q in docs])
    is_on = by_group[best] < by_group[0] * (1 - DELTA_SAVING)
    return replace(
        decision, delta_bits=by_group, group=best if is_on else 0,
        delta_over_spread=float(np.sqrt(moved / max(spread, 1e-12))),
    )  # fmt: skip
