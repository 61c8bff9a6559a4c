"""Attention of query rows over fixed tiles of keys, in torch: the fast twin of `attention_reference`.

Arithmetic only. What makes it *schedule-invariant* (a row's bits do not depend on who shares the call):
- keys are cut at absolute positions 0, 256, 512, ...; a tile is computed as if it were alone;
- each tile's partial softmax is scaled by a power of two (2 to the ceiling of its own maximum), so that merging
  partials in ascending order rescales without rounding, and a tile with nothing visible changes no bit;
- query rows come in multiples of `ROW_MULTIPLE`, where the matrix kernels below treat every row alike.

Shapes: `X` independent matrices (sequence, tile, KV head), `R` query rows, `S = TILE_TOKENS` keys, `D`/`Dv` head dims.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

TILE_TOKENS = 256
ROW_MULTIPLE = 16
# Stands for "not visible". Finite, so that a row or tile with nothing visible gives no NaN; anything found with it is
# multiplied by an exact zero as soon as one visible key is merged.
HIDDEN = -1e30
LOG2_E = math.log2(math.e)


def padded_rows(rows: int) -> int:
    """`rows` rounded up to what the kernels want."""
    return -(-rows // ROW_MULTIPLE) * ROW_MULTIPLE


def scaled_queries(q: Tensor, scale: float, softcap: float | None) -> Tensor:
    """Queries in float32 with the scale (and, without a softcap, the change to base 2) folded in."""
    return q.float() * (scale if softcap is not None else scale * LOG2_E)


def tile_partials(
    q: Tensor, k: Tensor, v: Tensor, hidden: Tensor | None, softcap: float | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """One tile of keys for each of X matrices.

    `q` [X, R, D] float32 from `scaled_queries`; `k` [X, S, D] and `v` [X, S, Dv] in the cache's dtype, finite;
    `hidden` bool, broadcastable to [X, R, S], true where the key must not be seen.
    Returns the exponent `m` [X, R, 1] (integers as float32), the sum `l` [X, R, 1] and the weighted values
    `o` [X, R, Dv], all float32, both in units of 2**m.
    """
    scores = torch.bmm(q, k.float().transpose(1, 2))
    if softcap is not None:
        scores.div_(softcap).tanh_().mul_(softcap * LOG2_E)
    if hidden is not None:
        scores.masked_fill_(hidden, HIDDEN)
    m = scores.amax(-1, keepdim=True).ceil_()
    weights = scores.sub_(m).exp2_()
    total = weights.sum(-1, keepdim=True)
    return m, total, torch.bmm(weights.to(v.dtype), v).float()


class RunningSoftmax:
    """The merge of tiles, in ascending order of position."""

    def __init__(self, m: Tensor, total: Tensor, o: Tensor) -> None:
        self._m, self._total, self._o = m, total, o

    def merge(self, m: Tensor, total: Tensor, o: Tensor) -> None:
        """Add the next tile. All three tensors may be overwritten."""
        top = torch.maximum(self._m, m)
        keep, take = torch.exp2(self._m - top), torch.exp2(m - top)
        self._m = top
        self._total = self._total.mul_(keep).add_(total.mul_(take))
        self._o = self._o.mul_(keep).add_(o.mul_(take))

    def result(self) -> Tensor:
        """[X, R, Dv] float32."""
        return self._o / self._total
