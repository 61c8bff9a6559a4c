"""Attention of query rows over fixed tiles of keys, in torch: the fast twin of `attention_reference`.

Arithmetic only. What makes it *schedule-invariant* (a row's bits do not depend on who shares the call):
- keys are cut at absolute positions 0, 256, 512, ...; a tile is computed as if it were alone;
- a tile's partial softmax is scaled by a power of two (2 to the ceiling of its own maximum), so that merging
  partials in ascending order rescales without rounding, and a tile with nothing visible changes no bit;
- the two matrix products are of one fixed depth (head dim, tile) and treat every row alike, however many
  there are. That is measured, not promised by anyone: `row_invariance.py` checks it where the engine starts.

Scores of bf16 models are rounded to bf16 (as transformers' eager attention does; measured in docs/engine.md),
everything after that is float32 but for the operands of the product with the values.

Shapes: `X` independent matrices (sequence, tile, KV head), `R` query rows, `S = TILE_TOKENS` keys,
`D`, `Dv` head dims.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

TILE_TOKENS = 256
# Added to the score of a key that must not be seen: the sum is -1e30 whatever the score was, and weighs 0.
HIDDEN_BIAS = -1e30
# The exponent of a tile with nothing visible: below every real one, above HIDDEN_BIAS, so nothing turns into NaN.
_LEAST_EXPONENT = -1e20
_LOG2_E = math.log2(math.e)


def tile_partials(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, *, scale: float, softcap: float | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """One tile of keys for each of X matrices.

    `q` [X, R, D], `k` [X, S, D] and `v` [X, S, Dv] in the model's dtype, finite; `bias` float32, broadcastable to
    [X, R, S], 0 or `HIDDEN_BIAS`. Returns the exponent `m` [X, R, 1] (an integer) and the sum of weights
    [X, R, 1] in float32 and the weighted values [X, R, Dv] in `v`'s dtype, both in units of 2**m.
    """
    scores = torch.bmm(q, k.transpose(1, 2)).float()
    if softcap is None:
        factor = scale * _LOG2_E
    else:
        scores.mul_(scale / softcap).tanh_()
        factor = softcap * _LOG2_E
    if bias is not None:
        scores.add_(bias)
    m = scores.amax(-1, keepdim=True).mul_(factor).ceil_().clamp_(min=_LEAST_EXPONENT)
    weights = torch.add(-m, scores, alpha=factor, out=scores).exp2_()
    return m, weights.sum(-1, keepdim=True), torch.bmm(weights.to(v.dtype), v)


def merge_tiles(m: Tensor, total: Tensor, weighted: Tensor) -> Tensor:
    """The attention over all tiles from their partials, tiles first: `m`, `total` [tiles, ..., R, 1], `weighted`
    [tiles, ..., R, Dv] -> [..., R, Dv] float32. Adds in ascending order; the factors are powers of two, so only
    the additions round, and a tile with nothing visible adds exactly 0."""
    factors = torch.exp2(m - m.amax(0))
    merged_total = total[0] * factors[0]
    merged = weighted[0] * factors[0]
    for tile in range(1, len(m)):
        merged_total.addcmul_(total[tile], factors[tile])
        merged.addcmul_(weighted[tile].float(), factors[tile])
    return merged.div_(merged_total)
