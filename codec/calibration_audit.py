"""Where the bits of each level go, on documents that calibration did not see, and what nesting costs. Pure, numpy.

Legend: D head dim, N tokens, M stages, W values a wide histogram tells apart; all results in bits a value.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from codec.allocate import Array, Sample
from codec.calibration_ladder import Ladder
from codec.calibration_tables import STATE_BITS, Counts, count_head
from codec.codebook import (
    conditional_bits,
    cuts_cost_bits,
    entropy_bits,
    learn_wide_tables,
    table_cost_bits,
)
from codec.entropy import EXCEPTION_BITS
from codec.levels import Lossy
from kernels.rans_reference import VALUE_LOW, lanes_of, stages_of

REACH = 1000  # integers that a wide histogram tells apart on each side of 0
MAX_COMPARED = 24  # heads whose integers are coded at once too
NAMES = ("chunk_entropy", "chunk_entropy_unbiased", "entropy", "nested_entropy", "coded", "exceptions", "states")


def audit(
    ladder: Ladder, lossy: Lossy, learned_on: Sequence[Sample], judged_on: Sequence[Sample], c: float, chunk_tokens: int
) -> list[dict[str, Any]]:
    """A row a level, coarsest first, in bits a value:

    chunk_entropy: of each channel in each chunk, by its own counts: what no static table can beat but by luck, and for
    many values in few tokens far too little; chunk_entropy_unbiased: with Miller and Madow's correction for that.
    entropy, nested_entropy: of each channel over all documents, coded at once or stage by stage in the format's three
    contexts. coded: what the profile's tables spend, exceptions included; states. nesting_cost: how much more that is,
    as a share, than the level's integers take at once with a codebook of their own, without limits on its values."""
    stages = lossy.num_stages
    finest = c / 3.0 ** (stages - 1)
    sums, compared = np.zeros((stages, len(NAMES))), np.zeros(stages)
    wide: list[tuple[list[Array], list[Array]]] = [([], []) for _ in range(stages)]
    values = 0
    heads = list(np.ndindex(2, ladder.layout.num_layers, ladder.layout.num_kv_heads))
    stride = -(-len(heads) // MAX_COMPARED) | 1  # odd, so that it does not pick one head of each layer
    for number, (which, layer, head) in enumerate(heads):
        plan = (lossy.k, lossy.v)[which]
        assert plan is not None
        learned, judged = (
            [ladder.tensors[which].integers(ladder.plain(s, which, layer, head), layer, head, finest) for s in part]
            for part in (learned_on, judged_on)
        )
        counts = count_head(judged, int(plan.group[layer]), stages)
        active = plan.active[:, layer, head]
        coded = np.cumsum(_coded(counts, lossy, active, plan.index[layer, head], plan.refine[:, layer, head]), axis=0)
        states = np.minimum(active, lanes_of(plan.index.shape[-1])) * STATE_BITS
        chunks = sum(-(-len(q) // chunk_tokens) for q in judged)
        at_once = _wide_histograms(judged, stages)
        sums[:, :2] += sum(_chunk_entropy(q, stages, chunk_tokens) for q in judged)
        sums[:, 2] += [(entropy_bits(part) * part.sum(axis=1)).sum() for part in at_once]
        sums[:, 3:] += np.stack([_nested_bits(counts), *coded.T, states * chunks], axis=1)
        values += sum(q.size for q in judged)
        if number % stride == 0:
            compared += coded[:, 0]
            for level, parts in enumerate(zip(_wide_histograms(learned, stages), at_once, strict=True)):
                for side, part in zip(wide[level], parts, strict=True):
                    side.append(part)
    rows = []
    for level, row in enumerate(sums / max(values, 1)):
        direct = learn_wide_tables(np.concatenate(wide[level][0]), np.concatenate(wide[level][1]))
        one = dict(zip(NAMES, (float(x) for x in row), strict=True))
        rows.append({"stages": level + 1, **one, "nesting_cost": float(compared[level] / direct - 1)})
    return rows


def _wide_histograms(documents: Sequence[Array], stages: int) -> list[Array]:
    """Counts [D, W] of each level's integers; the ends gather what lies beyond."""
    out = []
    for q in stages_of(np.concatenate(documents), stages):
        dim, width = q.shape[1], 2 * REACH + 1
        at = np.clip(q, -REACH, REACH) + REACH + np.arange(dim) * width
        out.append(np.bincount(at.ravel(), minlength=dim * width).reshape(dim, width))
    return out


def _nested_bits(counts: Counts) -> Array:
    """[M] bits of the stages up to each, every channel with tables of its own."""
    base = float((entropy_bits(counts.base) * counts.base.sum(axis=-1)).sum())
    return np.cumsum([base, *(float(conditional_bits(stage).sum()) for stage in counts.refine)])


def _chunk_entropy(q: Array, stages: int, chunk_tokens: int) -> Array:
    """[M, 2] bits of each level, each channel of each chunk by its own counts: plain, and corrected for few tokens."""
    total = np.zeros((stages, 2))
    for level, one in enumerate(stages_of(q, stages)):
        for start in range(0, len(one), chunk_tokens):
            part = np.sort(one[start : start + chunk_tokens].T, axis=1)
            dim, rows = part.shape
            new = np.concatenate([np.ones((dim, 1), bool), part[:, 1:] != part[:, :-1]], axis=1)
            run = np.diff(np.append(np.flatnonzero(new), new.size))  # how often each value of each channel occurs
            bits = float((run * np.log2(rows / run)).sum())
            total[level] += [bits, bits + (len(run) - dim) / (2 * np.log(2))]
    return total


def _coded(counts: Counts, lossy: Lossy, active: Array, index: Array, refine: Array) -> Array:
    """[M, 2] bits of each stage with the profile's tables, and those of them that exceptions take."""
    out = np.zeros((lossy.num_stages, 2))
    first = active[0]
    base = counts.base[:, :first].reshape(-1, counts.base.shape[-1])
    chosen = index[:, :first].ravel()
    unseen = np.concatenate([lossy.codebook.freqs[chosen] == 0, np.ones((len(chosen), 1), bool)], axis=1)
    outside = counts.base[:, first:].sum() - counts.base[:, first:, -VALUE_LOW].sum()
    out[0, 1] = EXCEPTION_BITS * (outside + (base * unseen).sum())
    out[0, 0] = table_cost_bits(base, lossy.codebook, chosen).sum() + EXCEPTION_BITS * outside
    for m in range(1, lossy.num_stages):
        stage, last = counts.refine[m - 1], active[m]
        outside = stage[last:].sum() - stage[last:, :, 1].sum()
        out[m, 1] = EXCEPTION_BITS * outside
        out[m, 0] = cuts_cost_bits(stage[:last], lossy.cuts[m - 1], refine[m - 1, :last]).sum() + out[m, 1]
    return out
