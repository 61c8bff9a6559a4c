"""The next token of one row, readably: the definition that decode/sampling.py is tested against. Lists and integers.

1. Tokens outside `allowed_token_ids`, tokens that would complete a bad word and, before `min_tokens`, tokens that end
   the answer cannot come.
2. `logit_bias` is added; then the repetition penalty divides positive and multiplies negative logits of tokens seen in
   prompt or output; then generated tokens lose frequency_penalty for each time, and presence_penalty once.
3. Temperature below 1e-5: the likeliest token, of equals the least id. That is all for greedy requests.
4. Weights 2^40 * exp((logit - largest) / temperature), rounded down.
5. min_p: weights below that share of the largest become 0.
6. Tokens are ranked by weight, of equals the least id first. The top_k first stay; of these, the first that together
   reach top_p of their sum, at least one.
7. The draw: 64 bits from (seed, position), as a fraction of the sum of the weights that are left; the token where the
   running sum, in the order of token ids, first exceeds it.
Arithmetic is in float32, rounded after each operation.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

from decode.requests import SamplingParams
from decode.sampling_state import split_mix

_UNIT = 1 << 40


def sample_one(
    logits: Sequence[float],
    params: SamplingParams,
    prompt: Sequence[int],
    output: Sequence[int],
    *,
    seed: int,
    eos_token_ids: Sequence[int] = (),
) -> int:
    """The token after `output`. Raises ValueError if no token can come."""
    edited = _edited(logits, params, prompt, output, eos_token_ids)
    best = max(edited)
    if not math.isfinite(best) or any(value != value for value in edited):
        raise ValueError("no token")
    if params.temperature < 1e-5:
        return edited.index(best)
    weights = _weights(edited, best, params.temperature)
    if params.min_p > 0:
        weights = [weight if weight >= int(params.min_p * _UNIT) else 0 for weight in weights]
    by_rank = sorted(range(len(edited)), key=lambda token: (-weights[token], token))
    kept = by_rank[: params.top_k] if params.top_k > 0 else by_rank
    if params.top_p < 1:
        kept = _nucleus(kept, weights, params.top_p)
    left = [weight if token in set(kept) else 0 for token, weight in enumerate(weights)]
    bits = split_mix(split_mix(seed % 2**64) ^ len(output))
    return _first_beyond(left, bits * sum(left) // 2**64)


def _edited(
    logits: Sequence[float],
    params: SamplingParams,
    prompt: Sequence[int],
    output: Sequence[int],
    eos_token_ids: Sequence[int],
) -> list[float]:
    forbidden = set()
    if params.allowed_token_ids is not None:
        forbidden |= set(range(len(logits))) - set(params.allowed_token_ids)
    for word in params.bad_words:
        if tuple(output[len(output) - len(word) + 1 :]) == word[:-1] and len(output) >= len(word) - 1:
            forbidden.add(word[-1])
    if len(output) < params.min_tokens:
        forbidden |= {*eos_token_ids, *params.stop_token_ids}
    bias = dict(params.logit_bias)
    f32 = np.float32
    edited = []
    for token, logit in enumerate(logits):
        x = f32(-math.inf if token in forbidden else logit)
        if token in bias:
            x = x + f32(bias[token])
        if params.repetition_penalty != 1 and (token in output or token in prompt):
            penalty = f32(params.repetition_penalty)
            x = x / penalty if x > 0 else x * penalty
        if token in output:
            x = x - f32(output.count(token)) * f32(params.frequency_penalty)
            x = x - f32(params.presence_penalty)
        edited.append(float(x))
    return edited


def _weights(logits: Sequence[float], best: float, temperature: float) -> list[int]:
    x = (np.array(logits, dtype=np.float32) - np.float32(best)) / np.float32(temperature)
    powers = torch.exp(torch.from_numpy(x))  # numpy's differs in the last bit
    return [int(power * _UNIT) for power in powers.tolist()]


def _nucleus(by_rank: Sequence[int], weights: Sequence[int], top_p: float) -> list[int]:
    needed = max(1, int(float(sum(weights[token] for token in by_rank)) * top_p))
    kept, so_far = [], 0
    for token in by_rank:
        kept.append(token)
        so_far += weights[token]
        if so_far >= needed:
            break
    return kept


def _first_beyond(weights: Sequence[int], target: int) -> int:
    so_far = 0
    for token, weight in enumerate(weights):
        so_far += weight
        if so_far > target:
            return token
    raise AssertionError("the target lies below the sum")
