"""From logits to the next tokens of a batch. Knows torch; no model. Shapes: R rows, V vocabulary.

A row's token depends on its own logits, parameters, seed and position: never, not by a bit, on the other rows. Sums
are what could break that (their order depends on shapes, threads, devices), so probabilities are integers: weights of
2^-40, whose sums are exact in any order. What floating-point work is left is elementwise and correctly rounded,
but for the exponential, which runs row by row on a CPU (vectorised loops may round a tail otherwise).
decode/sampling_reference.py is the definition, this the fast twin.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from decode.logprobs import LogitsInvalid, NoTokenAllowed, score_tokens
from decode.requests import TokenLogprobs
from decode.sampling_state import SamplingState

WEIGHT_BITS = 40  # the likeliest token's weight is 2^40; a vocabulary of 2^22 still sums within int64
CPU_GROUP = 1 << 18  # elements worked on at once on a CPU: they stay in its cache


@dataclass(frozen=True, slots=True)
class Drawn:
    """A token, with its logprobs if the request asked for them."""

    token_id: int
    logprobs: TokenLogprobs | None = None


def sample_batch(logits: Tensor, states: Sequence[SamplingState]) -> list[Drawn | Exception]:
    """The next token of every row of `logits`, float32 [R, V] (left as they are), each recorded in its state. An error
    in place of a row that has no token (NaN, nothing allowed); its state stays as it was."""
    assert logits.dim() == 2 and len(logits) == len(states), (logits.shape, len(states))
    found: list[int | Exception | None] = [None] * len(states)
    plain = [i for i, state in enumerate(states) if state.is_greedy and not state.edits_logits]
    if plain:
        best, values = _best(logits)
        for i in plain:
            found[i] = _checked(best[i], values[i])
    rest = [i for i, token in enumerate(found) if token is None]
    size = max(1, CPU_GROUP // logits.shape[1]) if logits.device.type == "cpu" else len(rest)
    for first in range(0, len(rest), max(size, 1)):
        rows = rest[first : first + size]
        for i, token in zip(rows, _sample_group(logits[rows], [states[i] for i in rows])):
            found[i] = token
    return _with_logprobs(logits, states, found)


def _with_logprobs(
    logits: Tensor, states: Sequence[SamplingState], tokens: list[int | Exception | None]
) -> list[Drawn | Exception]:
    drawn: list[Drawn | Exception] = []
    asked = []
    for i, (token, state) in enumerate(zip(tokens, states)):
        assert token is not None
        drawn.append(token if isinstance(token, Exception) else Drawn(token))
        if state.params.logprobs is not None and not isinstance(token, Exception):
            asked.append((i, token, state.params.logprobs))
    if asked:
        rows, chosen, num_top = zip(*asked)
        for i, token, scored in zip(rows, chosen, score_tokens(logits[list(rows)], chosen, num_top)):
            drawn[i] = scored if isinstance(scored, Exception) else Drawn(token, scored)
    for item, state in zip(drawn, states):
        if isinstance(item, Drawn):
            state.record(item.token_id)
    return drawn


def _best(logits: Tensor) -> tuple[list[int], list[float]]:
    """The likeliest token of each row (of equals the least id; a NaN before all others) and its logit."""
    if logits.device.type == "cpu":
        ids = torch.from_numpy(logits.numpy().argmax(-1))  # ten times as fast as torch's
    else:
        ids = logits.argmax(-1)
    return ids.tolist(), logits.gather(-1, ids[:, None])[:, 0].tolist()


def _checked(token: int, value: float) -> int | LogitsInvalid:
    if value != value:
        return LogitsInvalid("the logits have a NaN")
    if value == float("-inf"):
        return NoTokenAllowed("no token is allowed here")
    if value == float("inf"):
        return LogitsInvalid("a logit is infinite")
    return token


def _sample_group(logits: Tensor, states: Sequence[SamplingState]) -> list[int | Exception]:
    """The same of rows that are a copy, which is changed, and that all need more than an argmax."""
    errors: dict[int, Exception] = {}
    for i, (row, state) in enumerate(zip(logits, states)):
        try:
            edit_logits(row, state)
        except Exception as error:
            errors[i] = error
    best, values = _best(logits)
    found: list[int | Exception] = [
        errors[i] if i in errors else _checked(best[i], values[i]) for i in range(len(states))
    ]
    random = [i for i, item in enumerate(found) if not isinstance(item, Exception) and not states[i].is_greedy]
    if random:
        rows = logits if len(random) == len(states) else logits[random]
        for i, token in zip(random, _draw(rows, [values[i] for i in random], [states[i] for i in random])):
            found[i] = token
    return found


def edit_logits(row: Tensor, state: SamplingState) -> None:
    """Apply to `row` [V], in place, what changes logits: allowed tokens, forbidden ones, bias, penalties."""
    if not state.edits_logits:
        return
    params, device = state.params, row.device
    if state.allowed is not None:
        allowed = torch.from_numpy(state.allowed).to(device)
        kept = row[allowed]
        row.fill_(-torch.inf)
        row[allowed] = kept
    forbidden = state.forbidden()
    if len(forbidden):
        row[torch.from_numpy(forbidden).to(device)] = -torch.inf
    if len(state.bias_ids):
        row[torch.from_numpy(state.bias_ids).to(device)] += torch.from_numpy(state.bias).to(device)
    if state.seen is not None and len(state.seen.ids):
        ids = torch.from_numpy(state.seen.ids).to(device)
        counts = torch.from_numpy(state.seen.counts).to(device)
        seen = row[ids]
        seen = torch.where(seen > 0, seen / params.repetition_penalty, seen * params.repetition_penalty)
        seen -= counts * params.frequency_penalty
        seen -= (counts > 0) * params.presence_penalty
        row[ids] = seen


def _draw(logits: Tensor, best: list[float], states: Sequence[SamplingState]) -> list[int]:
    """A token of each row by its temperature and truncation. best: the rows' largest logits, finite."""
    params = [state.params for state in states]
    weights = weights_of(logits, best, [item.temperature for item in params])
    if any(item.min_p > 0 for item in params):
        least = [int(item.min_p * (1 << WEIGHT_BITS)) for item in params]
        weights.masked_fill_(weights < _column(least, torch.int64, logits.device), 0)
    cut = [i for i, item in enumerate(params) if item.top_k > 0 or item.top_p < 1]
    if cut:
        weights[cut] = _truncated(weights[cut], [params[i].top_k for i in cut], [params[i].top_p for i in cut])
    cumulative = weights.cumsum(-1)
    totals = cumulative[:, -1].tolist()
    targets = [(state.draw_bits() * total) >> 64 for state, total in zip(states, totals)]
    tokens = torch.searchsorted(cumulative, _column(targets, torch.int64, logits.device), right=True)
    drawn: list[int] = tokens[:, 0].tolist()
    return drawn


def weights_of(logits: Tensor, best: list[float], temperatures: list[float]) -> Tensor:
    """int64 [R, V]: 2^40 * exp((logit - best) / temperature), rounded down."""
    x = logits - _column(best, torch.float32, logits.device)
    x /= _column(temperatures, torch.float32, logits.device)
    if x.device.type == "cpu":
        for row in x:
            row.exp_()
    else:
        x.exp_()
    return x.mul_(float(1 << WEIGHT_BITS)).long()


def _truncated(weights: Tensor, top_k: list[int], top_p: list[float]) -> Tensor:
    """The weights with 0 for all but the `top_k` largest (0: no limit) and, of these, the largest that together have
    a share of `top_p`, at least one. Of equal weights the least ids stay."""
    size, device = weights.shape[1], weights.device
    limits = [min(k, size) if k > 0 else size for k in top_k]
    k, p = _column(limits, torch.int64, device), _column(top_p, torch.float64, device)
    total = weights.sum(-1, keepdim=True)
    descending = _largest(weights, limits, (total.double() * p).long())
    descending *= torch.arange(descending.shape[1], device=device) < k
    cumulative = descending.cumsum(-1)
    total = torch.where(k < size, cumulative[:, -1:], total)
    needed = torch.minimum((total.double() * p).long().clamp(min=1), cumulative[:, -1:])
    num_kept = (cumulative < needed).sum(-1, keepdim=True) + 1
    least = descending.gather(-1, num_kept - 1)
    is_last = weights == least
    num_last = num_kept - (weights > least).sum(-1, keepdim=True)
    if bool((is_last.sum(-1, keepdim=True) > num_last).any()):
        is_last &= is_last.cumsum(-1) <= num_last
    return weights * ((weights > least) | is_last)


def _largest(weights: Tensor, limits: list[int], needed: Tensor) -> Tensor:
    """The largest weights of each row, descending: as many as its limit, or if that is all, as sum up to `needed`, or
    more; zeros behind them. [R, N] with any N >= 1."""
    if weights.device.type != "cpu":
        return weights.sort(dim=-1, descending=True).values
    found = []
    for row, limit, target in zip(weights.numpy(), limits, needed[:, 0].tolist()):
        for bits in range(6, WEIGHT_BITS, 4):
            # Sorting 100,000 weights takes milliseconds; those within 2^-6 or 2^-10 of the largest are mostly enough.
            largest = row[row >= 1 << (WEIGHT_BITS - bits)]
            if len(largest) >= limit or (limit == len(row) and int(largest.sum()) >= target):
                break
        else:
            largest = row[row > 0]
        found.append(np.sort(largest)[::-1])
    descending = np.zeros((len(found), max(map(len, found))), dtype=np.int64)
    for row, largest in zip(descending, found):
        row[: len(largest)] = largest
    return torch.from_numpy(descending)


def _column(values: Sequence[float], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=dtype, device=device)[:, None]
