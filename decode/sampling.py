"""From logits to the next token. Knows torch; no state, no model. A seeded draw depends on the row of logits, the
request's parameters, its seed and the step: never on the batch or on what ran before.
"""

from __future__ import annotations

import random

import torch
from torch import Tensor

from decode.requests import SamplingParams

_MASK_64 = (1 << 64) - 1


def sample(logits: Tensor, params: SamplingParams, step: int, rng: random.Random | None = None) -> int:
    """The token after a row of `logits` [vocab].

    `step` counts the request's generated tokens from 0. Temperature 0 takes the likeliest token (of equals, the
    least id). With a seed the draw is a function of (seed, step); without one it comes from `rng`.
    """
    assert logits.dim() == 1, logits.shape
    if params.temperature <= 0:
        return int(logits.argmax())
    scaled = logits.double() / params.temperature
    order = None
    if params.top_k > 0 or params.top_p < 1:
        scaled, order = scaled.sort(descending=True, stable=True)
        if params.top_k > 0:
            scaled = scaled[: params.top_k]
    weights = torch.softmax(scaled, dim=-1)
    if params.top_p < 1:
        # The likeliest tokens that together reach top_p, and always one.
        num_kept = int((weights.cumsum(-1) < params.top_p).sum()) + 1
        weights = weights[:num_kept]
    cumulative = weights.cumsum(-1)
    draw = _uniform(params.seed, step, rng) * float(cumulative[-1])
    choice = min(int(torch.searchsorted(cumulative, draw, right=True)), len(cumulative) - 1)
    return choice if order is None else int(order[choice])


def _uniform(seed: int | None, step: int, rng: random.Random | None) -> float:
    """A number in [0, 1)."""
    if seed is None:
        assert rng is not None, "a request without a seed needs a random generator"
        return rng.random()
    return (_split_mix(_split_mix(seed & _MASK_64) ^ step) >> 11) / (1 << 53)


def _split_mix(x: int) -> int:
    """SplitMix64 (Steele, Lea and Flood 2014): one 64-bit integer well mixed into another."""
    x = (x + 0x9E3779B97F4A7C15) & _MASK_64
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK_64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK_64
    return x ^ (x >> 31)
