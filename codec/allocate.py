"""Which step each channel gets: equal slopes. And what rate and distortion follow. Pure; numpy, tensors only as input.

An error e (one token's row of one head) costs 1/2 e F e nats, F the Fisher information of the head's values: KL to
second order. One nat then weighs the same wherever it is lost, so at the optimum every channel of every tensor trades
bits for nats at one slope, and at fine steps that means errors of equal cost: step = c / sqrt(sensitivity), with one
constant c for the whole model. Channels that vary less than their step fall to 0 bits by themselves.

Sources: Shoham & Gersho, "Efficient bit allocation for an arbitrary set of quantizers" (1988); Amari, "Natural
gradient works efficiently in learning" (1998), for Fisher information as the KL's metric.
Legend: L layers, T tokens, H KV heads, D head dim, N rows, G scales c.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from codec.codebook import entropy_bits
from codec.decorrelate import regularised, sensitivity
from codec.entropy import histogram
from codec.quantize import bf16_to_float, round_to_bf16
from codec.rope import RopeTable, unrotate

KV = tuple[torch.Tensor, torch.Tensor]
Array = np.ndarray
RATE_ROWS = 3000  # that a rate is measured on
MIN_EFFECT = 0.01  # of the median tensor's: nothing is declared free because the scores happened not to touch it
MIN_STEP = 2.0**-50


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One document's KV, k and v [L, T, H, D] bf16 as cached, and the rotation of its positions."""

    k: torch.Tensor
    v: torch.Tensor
    rope: RopeTable | None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Fisher:
    """[2, L, H, D, D] float64 each, one for each half of the documents (fold_of): a head's errors e_t cost
    1/2 * sum over a document's tokens of e_t F e_t nats a scored token. Keys before RoPE and as cached."""

    k_turned: Array
    k: Array
    v: Array

    def of(self, which: int, is_turned: bool) -> Array:
        return self.v if which else self.k_turned if is_turned else self.k


def fold_of(document: int) -> int:
    """The half that a document belongs to: what one half teaches, the other judges. (Kinds of documents alternate
    within four.)"""
    return document // 4 % 2


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Statistics:
    """One head of K or V in one frame. mean [D] bf16 values; covariance [D, D] of all documents; learn, judge: [D, D]
    pairs of one half's covariance and Fisher information; rows [N, D] centred, of the judging half; fisher [D, D]."""

    mean: Array
    covariance: Array
    fisher: Array
    learn: tuple[Array, Array]
    judge_fisher: Array
    rows: Array


def plain_rows(sample: Sample, which: int, layer: int, head: int, *, is_turned: bool) -> Array:
    """[T, D] float32; keys unrotated if is_turned."""
    rows = (sample.k, sample.v)[which][layer, :, head]
    x = bf16_to_float(rows.view(torch.int16).numpy().view(np.uint16))
    if which == 0 and is_turned and sample.rope is not None and sample.rope.turned(layer, layer + 1)[0]:
        x = unrotate(x, *sample.rope.inverse())
    return x


def collect(
    samples: Sequence[Sample], fisher: Fisher, which: int, layer: int, head: int, *, is_turned: bool
) -> Statistics:
    """Reads every sample once."""
    documents = [plain_rows(sample, which, layer, head, is_turned=is_turned) for sample in samples]
    mean = round_to_bf16(np.concatenate(documents).mean(axis=0, dtype=np.float64))
    halves: list[list[Array]] = [[], []]
    for number, x in enumerate(documents):
        halves[fold_of(number)].append(x - mean)
    learning = np.concatenate(halves[0])
    judging = np.concatenate(halves[1] or halves[0])
    both = fisher.of(which, is_turned)[:, layer, head]
    centred = np.concatenate([learning, *halves[1]])
    return Statistics(
        mean=mean, covariance=second_moment(centred), fisher=both.mean(axis=0),
        learn=(second_moment(learning), both[0]), judge_fisher=both[1],
        rows=judging[:: max(1, len(judging) // RATE_ROWS)],
    )  # fmt: skip


def second_moment(rows: Array) -> Array:
    """[N, D] -> [D, D] float64."""
    moment: Array = (rows.T @ rows).astype(np.float64) / max(len(rows), 1)
    return moment


def fisher_floors(tensors: Sequence[Statistics]) -> Array:
    """What to add to each tensor's F at least, so that an error of the tensor's own size is never nearly free."""
    spread = np.array([max(float(np.trace(t.covariance)) / len(t.mean), 1e-12) for t in tensors])
    effect = np.array([max(float((t.covariance * t.fisher).sum()) / len(t.mean), 0.0) for t in tensors])
    floors: Array = MIN_EFFECT * max(float(np.median(effect)), 1e-12) / spread
    return floors


def unit_steps(synthesis: Array, f: Array, reg: float, floor: float) -> Array:
    """[D] steps for c = 1."""
    weight = sensitivity(synthesis.astype(np.float64), regularised(f, reg, floor))
    steps: Array = 1 / np.sqrt(np.maximum(weight, 1e-30))
    return steps


def stored_steps(unit: Array, c: float) -> Array:
    """As a profile holds them: bf16 values."""
    return round_to_bf16(np.maximum(unit * c, MIN_STEP))


def rate_distortion(
    rows: Array, pair: tuple[Array, Array], unit: Array, f: Array, scales: Sequence[float], *, per_token: bool = False
) -> tuple[Array, Array]:
    """rows [N, D] centred, steps unit * c -> bits a value (entropy per channel) and nats a token of all rows' mean
    error, 1/2 tr(F E), [G] each. per_token: every row has its own step, in proportion to its size, as a bf16."""
    y = (rows @ pair[0].astype(np.float32)) / unit.astype(np.float32)
    extra = 0.0
    if per_token:
        size = np.sqrt(np.square(y).mean(axis=1, keepdims=True)) + 1e-9
        size /= np.sqrt(np.square(size).mean())
        extra = 16 / rows.shape[1]
    back = (pair[1] * unit[:, None]).astype(np.float32)
    rate, cost = np.empty(len(scales)), np.empty(len(scales))
    for g, c in enumerate(scales):
        step = c * size if per_token else np.float32(c)
        q = np.rint(y / step)
        rate[g] = entropy_bits(histogram(q)).mean() + extra
        error = (y - q * step) @ back
        cost[g] = 0.5 * float((second_moment(error) * f).sum())
    return rate, cost


def rate_at(rate: Array, cost: Array, wanted: Array) -> Array:
    """Bits a value where a curve reaches the wanted costs: interpolated in log cost, held at the curve's ends."""
    order = np.argsort(cost)
    at: Array = np.interp(np.log(np.maximum(wanted, 1e-30)), np.log(np.maximum(cost[order], 1e-30)), rate[order])
    return at
