"""Logprobs of tokens and the likeliest tokens of a row. Knows torch. Shapes: R rows, V vocabulary.

Nothing here depends on the other rows of a batch: sums run row by row, everything else is comparing and exact.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from decode.requests import TokenLogprobs


class LogitsInvalid(ArithmeticError):
    """A row of logits that no token can be drawn from; the text says why."""


class NoTokenAllowed(LogitsInvalid):
    """What the request forbids leaves no token."""


def ranked(values: Tensor, num: int) -> Tensor:
    """The ids of the `num` largest of each row, largest first, of equals the least id first: [R, V] -> int64 [R, num].
    Of -inf, which stand for tokens that cannot come, any may follow in any order."""
    size = values.shape[-1]
    if num == 0:
        return torch.empty(values.shape[0], 0, dtype=torch.int64, device=values.device)
    if num >= size:
        return values.sort(dim=-1, descending=True, stable=True).indices
    ids = values.topk(num, dim=-1).indices.sort(dim=-1).values
    found, order = values.gather(-1, ids).sort(dim=-1, descending=True, stable=True)
    ids = ids.gather(-1, order)
    # topk takes any of those that equal the last: where not all of them fit in, the row is sorted as a whole.
    last = found[:, -1:]
    is_open = ((values >= last).sum(-1) > num) & (last[:, 0] > -math.inf)
    rows = is_open.nonzero()[:, 0]
    if len(rows):
        ids[rows] = ranked(values[rows], size)[:, :num]
    return ids


def score_tokens(logits: Tensor, tokens: Sequence[int], num_top: Sequence[int]) -> list[TokenLogprobs | LogitsInvalid]:
    """Logprobs of `tokens` [R] under `logits` float32 [R, V], with so many of the likeliest in each row. An error in
    place of a row that is not finite."""
    if not len(tokens):
        return []
    chosen = logits.gather(-1, torch.tensor(tokens, device=logits.device)[:, None])
    ranks = ((logits > chosen).sum(-1) + 1).tolist()
    ids = ranked(logits, min(max(num_top), logits.shape[-1]))
    tops = logits.gather(-1, ids).tolist()
    # float64 and one row a call: the order of a sum may depend on a tensor's shape.
    norms = [float(torch.logsumexp(row.double(), 0)) for row in logits]
    found: list[TokenLogprobs | LogitsInvalid] = []
    for own, rank, norm, row_ids, row_top, num in zip(chosen[:, 0].tolist(), ranks, norms, ids.tolist(), tops, num_top):
        if not math.isfinite(norm):
            found.append(LogitsInvalid(f"the logits are not finite: their logsumexp is {norm}"))
            continue
        top = tuple((token, value - norm) for token, value in zip(row_ids[:num], row_top[:num]))
        found.append(TokenLogprobs(logprob=own - norm, rank=rank, top=top))
    return found
