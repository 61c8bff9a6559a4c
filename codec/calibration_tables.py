"""From a ladder and its constant to what a profile holds: deltas, active channels, tables. Pure, numpy.

Legend: L layers, H KV heads, D head dim, N tokens, M stages, n tables.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from codec.allocate import Array, Sample, stored_steps
from codec.calibration_ladder import Ladder
from codec.codebook import conditional_bits, entropy_bits, learn_codebook, learn_refinement
from codec.delta_choice import Decision, choose_group, delta_histograms
from codec.entropy import EXCEPTION_BITS, histogram, refinement_histogram
from codec.levels import Lossless, Lossy, TensorPlan
from codec.profile import CodecLayout
from kernels.rans_reference import VALUE_LOW, lanes_of, stages_of

LEAST_BITS = 0.002  # a coded symbol's: of 1,024 slots at least one or two are not its own
TIME_PRICE = 0.01  # bits that a coded symbol's decoding time is held to be worth
STATE_BITS = 24  # 32 bits of which a lane has used about 8 when it ends


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Counts:
    """One head of K or V. base [2, D, 257], refine [M - 1, D, 3, 3]: of all documents; tokens N."""

    base: Array
    refine: Array
    tokens: int


def count_head(documents: Sequence[Array], group: int, stages: int) -> Counts:
    """documents: finest integers [N, D]."""
    levels = [stages_of(q, stages) for q in documents]
    pairs = [delta_histograms(one[0], group) for one in levels]
    dim = documents[0].shape[1]
    refine = np.zeros((stages - 1, dim, 3, 3), np.int64)
    for m in range(stages - 1):
        refine[m] = sum(refinement_histogram(one[m], one[m + 1]) for one in levels)
    base = np.stack([np.sum([pair[kind] for pair in pairs], axis=0) for kind in (0, 1)])
    return Counts(base=base, refine=refine, tokens=sum(len(q) for q in documents))


def choose_active(counts: Counts, chunk_tokens: int) -> Array:
    """[M] leading channels to code at each stage: a channel that hardly ever leaves 0 is cheaper as exceptions."""
    dim = counts.base.shape[1]
    chunks = counts.tokens / chunk_tokens
    base_bits = (entropy_bits(counts.base) * counts.base.sum(axis=-1)).sum(axis=0)
    moved = [(counts.base.sum(axis=-1) - counts.base[..., -VALUE_LOW]).sum(axis=0)]
    coded = [base_bits]
    for stage in counts.refine:
        coded.append(conditional_bits(stage))
        moved.append(stage.sum(axis=(1, 2)) - stage[:, :, 1].sum(axis=1))
    prefix = np.arange(dim + 1)
    states = np.minimum(prefix, lanes_of(dim)) * STATE_BITS * chunks
    active = np.empty(len(coded), np.int64)
    for stage, (bits, nonzero) in enumerate(zip(coded, moved, strict=True)):
        bits = np.maximum(bits, LEAST_BITS * counts.tokens) + TIME_PRICE * counts.tokens
        total = np.concatenate([[0], np.cumsum(bits)]) + states
        total += EXCEPTION_BITS * (nonzero.sum() - np.concatenate([[0], np.cumsum(nonzero)]))
        active[stage] = int(total.argmin())
    out: Array = np.maximum.accumulate(active)
    return out


def learn_tables(
    ladder: Ladder, samples: Sequence[Sample], c: float, stages: int, chunk_tokens: int
) -> tuple[Lossy, list[Decision]]:
    """c: scale of the coarsest stage. The decisions come back with their anchor groups."""
    finest = c / 3.0 ** (stages - 1)
    lay = ladder.layout
    decisions: list[Decision] = []
    counts: list[Counts] = []
    actives: list[Array] = []
    for decision in ladder.decisions:
        which = "KV".index(decision.which)
        tensor = ladder.tensors[which]
        heads = [
            [
                tensor.integers(ladder.plain(sample, which, decision.layer, head), decision.layer, head, finest)
                for sample in samples
            ]
            for head in range(lay.num_kv_heads)
        ]
        plain = [count_head(docs, 0, stages) for docs in heads]
        decision = _with_group(decision, heads, plain, stages)
        decisions.append(decision)
        for docs, one in zip(heads, plain, strict=True):
            one = count_head(docs, decision.group, stages) if decision.group else one
            has_matrix = tensor.has_matrix[decision.layer]
            full = np.full(stages, one.base.shape[1], np.int64)
            counts.append(one)
            actives.append(choose_active(one, chunk_tokens) if has_matrix else full)
    return _lossy(ladder, decisions, counts, actives, finest), decisions


def _with_group(decision: Decision, heads: list[list[Array]], plain: list[Counts], stages: int) -> Decision:
    coarse = [[stages_of(q, stages)[0] for q in docs] for docs in heads]
    values = sum(one.tokens for one in plain) * heads[0][0].shape[1]
    rest = sum(float(conditional_bits(one.refine).sum()) for one in plain) / values
    return choose_group(decision, coarse, rest)


def _masked(counts: Counts, active: Array) -> tuple[Array, Array]:
    base, refine = counts.base.copy(), counts.refine.copy()
    base[:, active[0] :] = 0
    for m in range(len(refine)):
        refine[m, active[m + 1] :] = 0
    return base, refine


def _lossy(
    ladder: Ladder, decisions: list[Decision], counts: list[Counts], actives: list[Array], finest: float
) -> Lossy:
    masked = [_masked(one, active) for one, active in zip(counts, actives, strict=True)]
    stages = len(actives[0])
    book, index = learn_codebook(np.concatenate([base.reshape(-1, base.shape[-1]) for base, _ in masked]))
    learned = [learn_refinement(np.concatenate([refine[m] for _, refine in masked])) for m in range(stages - 1)]
    most = max(len(cuts) for cuts, _ in learned)
    cuts = np.stack([np.concatenate([c, np.repeat(c[-1:], most - len(c), axis=0)]) for c, _ in learned])
    lay = ladder.layout
    layers, heads = lay.num_layers, lay.num_kv_heads
    split = layers * heads * lay.head_dim_k
    refine = np.stack([i for _, i in learned])
    plans = []
    for which, dim in ((0, lay.head_dim_k), (1, lay.head_dim_v)):
        tensor = ladder.tensors[which]
        base_part = (index[: 2 * split], index[2 * split :])[which]
        refine_part = (refine[:, :split], refine[:, split:])[which]
        active = np.stack(actives[which * layers * heads :][: layers * heads], axis=1)
        has = np.repeat(tensor.has_matrix, heads).reshape(layers, heads)
        matrix = np.where(has, (np.cumsum(has) - 1).reshape(has.shape), -1).astype(np.int64)
        plans.append(
            TensorPlan(
                mean=tensor.mean, step=stored_steps(tensor.unit, finest), is_turned=tensor.is_turned.copy(),
                group=np.array([d.group for d in decisions if d.which == "KV"[which]], np.int64),
                matrix=matrix, analysis=tensor.analysis[has], synthesis=tensor.synthesis[has],
                active=active.reshape(stages, layers, heads),
                index=np.ascontiguousarray(base_part.reshape(layers, heads, 2, dim)),
                refine=np.ascontiguousarray(refine_part.reshape(stages - 1, layers, heads, dim)),
            )
        )  # fmt: skip
    return Lossy(num_stages=stages, codebook=book, cuts=cuts.astype(np.uint16), k=plans[0], v=plans[1])


def learn_lossless(samples: Sequence[Sample], lay: CodecLayout) -> Lossless:
    """Tables of bf16 exponents (coded as exponent - 128), keys as cached."""
    histograms = []
    for which in (0, 1):
        for layer in range(lay.num_layers):
            for head in range(lay.num_kv_heads):
                raw = [(s.k, s.v)[which][layer, :, head].contiguous().view(torch.int16).numpy() for s in samples]
                exponent = (np.concatenate(raw).view(np.uint16).astype(np.int32) >> 7) & 0xFF
                histograms.append(histogram(exponent + VALUE_LOW))
    book, index = learn_codebook(np.concatenate(histograms))
    shape = (lay.num_layers, lay.num_kv_heads)
    cut = shape[0] * shape[1] * lay.head_dim_k
    return Lossless(
        codebook=book, k=index[:cut].reshape(*shape, lay.head_dim_k), v=index[cut:].reshape(*shape, lay.head_dim_v)
    )
