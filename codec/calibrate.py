"""Calibration: KV samples and a loss -> a profile with levels that promise something. Knows no model, opens no file.

    profile, report = calibrate(samples, loss, fingerprint="...", validate=(held_out_samples, held_out_loss))

1. Means of every channel, keys before RoPE.
2. Sensitivity: each (layer, K or V, head) is quantized alone and the loss asked what that cost.
3. Rate-distortion allocation gives the steps for a target rate; the targets run from nearly transparent to coarse.
4. Anchor delta per (layer, K or V), by measured rate at equal distortion.
5. A codebook of tables per level; exponent tables for lossless.
6. Every level is measured end to end (encode, decode, loss), on samples that were not used before: its promise.

Legend: L layers, T tokens, H KV heads, D head dim, M = 2 * L * H tensors in the order [K or V][layer][head].
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch

from codec.allocate import RateTable, allocate, measure_rates, sensitivities
from codec.chunk import decode_chunk, encode_chunk
from codec.codebook import learn_codebook
from codec.delta_choice import DeltaRow, choose_group, delta_histograms
from codec.entropy import histogram
from codec.levels import EXACT, Level, LevelKind, Promise, TensorPlan
from codec.profile import CodecLayout, Profile
from codec.quantize import bf16_to_float, float_to_bf16, round_to_bf16
from codec.rope import RopeTable, rotate, unrotate
from kernels.rans_reference import CENTRE

NUM_TABLES = 32
NUM_EXPONENT_TABLES = 24
PROBE_GRID = 16  # of allocate.GRID: half a tensor's spread
COARSEST_RATE = 1.0  # bits a value of the last level: about a fifteenth of bf16 with its overhead
FINEST_RATES = (3.5, 5.0)  # the first level's rate lies in here, the coarsest that meets FINEST_KL
FINEST_KL = 0.001
CURVE_RATES = (5.0, 4.2, 3.5, 3.0, 2.6, 2.2, 1.8, 1.45, 1.15, 0.9)
NUM_LOSSY_LEVELS = 5
CONTROL_TOKENS = 64

KV = tuple[torch.Tensor, torch.Tensor]
Measures = Mapping[str, float]  # at least kl; also delta_nll, greedy_agreement, recall, ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One document's KV, k and v [L, T, H, D] bf16 as cached, and the rotation of its positions."""

    k: torch.Tensor
    v: torch.Tensor
    rope: RopeTable | None


class Loss(Protocol):
    """Runs the model with every sample's KV replaced and compares with the KV as it was."""

    def __call__(self, transform: Callable[[Sample], KV], *, keep_last_tokens: int | None = None) -> Measures:
        """keep_last_tokens: drop all older KV (the control that must fail)."""
        ...


@dataclass(slots=True, kw_only=True)
class Report:
    """What calibration saw, for people: plain rows."""

    levels: list[dict[str, Any]] = field(default_factory=list)
    curve: list[dict[str, float]] = field(default_factory=list)
    delta: list[DeltaRow] = field(default_factory=list)
    probes: list[dict[str, Any]] = field(default_factory=list)
    control: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Learned:
    """Statistics of the samples. documents[m]: tensor m's centred arrays [T, D], one a document."""

    layout: CodecLayout
    mean_k: np.ndarray
    mean_v: np.ndarray
    documents: list[list[np.ndarray]]
    rates: RateTable
    needs_rope: bool

    def steps(self, choice: np.ndarray) -> np.ndarray:
        """[2, L, H] float32."""
        lay = self.layout
        chosen: np.ndarray = self.rates.step[np.arange(len(choice)), choice]
        return chosen.reshape(2, lay.num_layers, lay.num_kv_heads)


def _plain(sample: Sample, which: int, layer: int, head: int) -> np.ndarray:
    """[T, D] float32, keys unrotated."""
    tensor = sample.k if which == 0 else sample.v
    x = bf16_to_float(tensor[layer, :, head].contiguous().view(torch.int16).numpy().view(np.uint16))
    if which == 0 and sample.rope is not None:
        x = unrotate(x, *sample.rope.inverse())
    return x


def _learn(samples: Sequence[Sample]) -> _Learned:
    layers, _, heads, dim_k = samples[0].k.shape
    layout = CodecLayout(num_layers=layers, num_kv_heads=heads, head_dim_k=dim_k, head_dim_v=samples[0].v.shape[3])
    means: list[list[np.ndarray]] = [[], []]
    documents = []
    for which in (0, 1):
        for layer in range(layers):
            for head in range(heads):
                raw = [_plain(sample, which, layer, head) for sample in samples]
                mean = round_to_bf16(np.concatenate(raw).mean(axis=0, dtype=np.float64))
                means[which].append(mean)
                documents.append([x - mean for x in raw])
    mean_k, mean_v = (np.stack(m).reshape(layers, heads, -1) for m in means)
    rates = measure_rates([np.concatenate(docs) for docs in documents])
    return _Learned(
        layout=layout, mean_k=mean_k, mean_v=mean_v, documents=documents, rates=rates,
        needs_rope=samples[0].rope is not None,
    )  # fmt: skip


def _coarsen(learned: _Learned, steps: np.ndarray, only: int | None = None) -> Callable[[Sample], KV]:
    """A transform that quantizes with steps [2, L, H] as the codec would, without coding; `only` one tensor m."""

    def transform(sample: Sample) -> KV:
        lay = learned.layout
        out = (sample.k.clone(), sample.v.clone())
        for m in range(steps.size) if only is None else (only,):
            which, layer, head = np.unravel_index(m, (2, lay.num_layers, lay.num_kv_heads))
            mean = (learned.mean_k, learned.mean_v)[which][layer, head]
            step = steps[which, layer, head]
            x = np.rint((_plain(sample, int(which), int(layer), int(head)) - mean) / step) * step + mean
            if which == 0 and sample.rope is not None:
                x = rotate(x, *sample.rope.forward())
            out[which][layer, :, head] = torch.from_numpy(float_to_bf16(x).view(np.int16)).view(torch.bfloat16)
        return out

    return transform


def _through_codec(profile: Profile, level: str, chunk_tokens: int, count: list[int]) -> Callable[[Sample], KV]:
    """A transform that really encodes and decodes, chunk by chunk; adds [bytes, values] to `count`."""

    def transform(sample: Sample) -> KV:
        parts = []
        for start in range(0, sample.k.shape[1], chunk_tokens):
            rope = sample.rope
            if rope is not None:
                rope = RopeTable(rope.cos[start : start + chunk_tokens], rope.sin[start : start + chunk_tokens])
            k, v = sample.k[:, start : start + chunk_tokens], sample.v[:, start : start + chunk_tokens]
            blob = encode_chunk(k, v, level=level, profile=profile, rope=rope)
            count[0] += len(blob)
            count[1] += k.numel() + v.numel()
            parts.append(decode_chunk(blob, profile=profile, rope=rope))
        return torch.cat([p[0] for p in parts], dim=1), torch.cat([p[1] for p in parts], dim=1)

    return transform


def _make_level(learned: _Learned, name: str, choice: np.ndarray) -> tuple[Level, list[DeltaRow]]:
    """Steps -> a level: deltas chosen, codebook learned."""
    lay = learned.layout
    steps = learned.steps(choice)
    q = [[np.rint(x / s) for x in docs] for docs, s in zip(learned.documents, steps.ravel(), strict=True)]
    rows = []
    for which in (0, 1):
        for layer in range(lay.num_layers):
            first = (which * lay.num_layers + layer) * lay.num_kv_heads
            rows.append(choose_group(layer, "KV"[which], q[first : first + lay.num_kv_heads]))
    groups = np.array([row.group if row.is_on else 0 for row in rows]).reshape(2, lay.num_layers)
    histograms = []
    for m, docs in enumerate(q):
        pairs = [delta_histograms(x, int(groups.ravel()[m // lay.num_kv_heads])) for x in docs]
        histograms += [np.sum([p[0] for p in pairs], axis=0), np.sum([p[1] for p in pairs], axis=0)]
    book, index = learn_codebook(np.concatenate(histograms), NUM_TABLES)
    plans = _split_plans(lay, index, steps, groups)
    return Level(name=name, kind=LevelKind.QUANTIZED, codebook=book, k=plans[0], v=plans[1]), rows


def _split_plans(lay: CodecLayout, index: np.ndarray, steps: np.ndarray, groups: np.ndarray) -> list[TensorPlan]:
    """index [M * 2 * D] flat, steps [2, L, H], groups [2, L] -> the plans of K and V."""
    shape = (lay.num_layers, lay.num_kv_heads, 2)
    cut = int(np.prod(shape)) * lay.head_dim_k
    flat = (index[:cut].reshape(*shape, lay.head_dim_k), index[cut:].reshape(*shape, lay.head_dim_v))
    return [
        TensorPlan(index=np.ascontiguousarray(flat[w]), step=steps[w].copy(), group=groups[w].astype(np.int64))
        for w in (0, 1)
    ]


def _make_lossless(samples: Sequence[Sample], lay: CodecLayout) -> Level:
    histograms = []
    for which in (0, 1):
        for layer in range(lay.num_layers):
            for head in range(lay.num_kv_heads):
                raw = [(s.k, s.v)[which][layer, :, head].contiguous().view(torch.int16).numpy() for s in samples]
                exponent = (np.concatenate(raw).view(np.uint16).astype(np.int32) >> 7) & 0xFF
                counts = histogram(exponent - CENTRE)
                histograms += [counts, np.zeros_like(counts)]  # the second set of rows is for deltas: unused
    book, index = learn_codebook(np.concatenate(histograms), NUM_EXPONENT_TABLES)
    steps = np.ones((2, lay.num_layers, lay.num_kv_heads), np.float32)
    plans = _split_plans(lay, index, steps, np.zeros((2, lay.num_layers), np.int64))
    return Level(name="lossless", kind=LevelKind.LOSSLESS, codebook=book, k=plans[0], v=plans[1])


def _rate_targets(curve: list[dict[str, float]]) -> list[float]:
    """Rates of q1..q5: KL falls by a constant factor a bit, so equal steps of rate are equal ratios of KL."""
    good = [row["rate"] for row in curve if row["kl"] <= FINEST_KL]
    finest = float(np.clip(min(good, default=FINEST_RATES[1]), *FINEST_RATES))
    return [float(r) for r in np.linspace(finest, COARSEST_RATE, NUM_LOSSY_LEVELS)]


def calibrate(
    samples: Sequence[Sample],
    loss: Loss,
    *,
    fingerprint: str,
    validate: tuple[Sequence[Sample], Loss] | None = None,
    provenance: Mapping[str, Any] | None = None,
    chunk_tokens: int = 256,
    progress: Callable[[str, float], None] = lambda what, share: None,
) -> tuple[Profile, Report]:
    """See the module's docstring. `loss` covers `samples`; `validate` (other documents) gives the promises."""
    if not samples:
        raise ValueError("calibration needs at least one sample")
    report = Report()
    progress("rates", 0.0)
    learned = _learn(samples)
    count = len(learned.documents)
    probe_kl = np.empty(count)
    probe_steps = learned.steps(np.full(count, PROBE_GRID))
    for m in range(count):
        progress("sensitivity", 0.1 + 0.4 * m / count)
        probe_kl[m] = loss(_coarsen(learned, probe_steps, only=m))["kl"]
    probe_distortion = learned.rates.distortion[:, PROBE_GRID]
    sensitivity = sensitivities(probe_kl, probe_distortion)
    for m in range(count):
        which, layer, head = np.unravel_index(m, probe_steps.shape)
        report.probes.append({"layer": int(layer), "which": "KV"[which], "head": int(head), "kl": float(probe_kl[m])})

    for i, rate in enumerate(CURVE_RATES):
        progress("curve", 0.5 + 0.15 * i / len(CURVE_RATES))
        choice = allocate(learned.rates, sensitivity, rate)
        report.curve.append({"rate": rate, **loss(_coarsen(learned, learned.steps(choice)))})

    levels = [Level(name="raw", kind=LevelKind.RAW), _make_lossless(samples, learned.layout)]
    for i, rate in enumerate(_rate_targets(report.curve)):
        progress("levels", 0.65 + 0.15 * i / NUM_LOSSY_LEVELS)
        level, rows = _make_level(learned, f"q{i + 1}", allocate(learned.rates, sensitivity, rate))
        levels.append(level)
        if i == NUM_LOSSY_LEVELS // 2:
            report.delta = rows
    profile = _measure(
        learned,
        levels,
        report,
        fingerprint,
        validate or (samples, loss),
        provenance or {},
        chunk_tokens,
        progress,
    )
    progress("done", 1.0)
    return profile, report


def _measure(
    learned: _Learned, levels: list[Level], report: Report, fingerprint: str, validate: tuple[Sequence[Sample], Loss],
    provenance: Mapping[str, Any], chunk_tokens: int, progress: Callable[[str, float], None],
) -> Profile:  # fmt: skip
    """Promises and sizes of the finished levels, end to end; then the profile that carries them."""
    bits: dict[str, float] = {}
    promise: dict[str, Promise] = {}

    def build(curve: Sequence[Mapping[str, Any]] = ()) -> Profile:
        return Profile(
            fingerprint=fingerprint, layout=learned.layout, levels=tuple(levels),
            mean_k=learned.mean_k, mean_v=learned.mean_v,
            needs_rope=learned.needs_rope, bits_per_value=bits, promise=promise, provenance=provenance,
            curve=tuple(curve),
        )  # fmt: skip

    draft = build()
    _, loss = validate
    raw = loss(lambda sample: (sample.k, sample.v))
    report.control = dict(loss(lambda sample: (sample.k, sample.v), keep_last_tokens=CONTROL_TOKENS))
    for i, level in enumerate(levels):
        progress("promises", 0.8 + 0.2 * i / len(levels))
        size = [0, 0]
        got = loss(_through_codec(draft, level.name, chunk_tokens, size))
        bits[level.name] = round(8 * size[0] / size[1], 4)
        promise[level.name] = EXACT
        if level.kind is LevelKind.QUANTIZED:
            promise[level.name] = Promise(
                kl=got["kl"], delta_nll=got.get("delta_nll"), greedy_agreement=got.get("greedy_agreement"),
                recall_drop=raw["recall"] - got["recall"] if "recall" in got else None,
            )  # fmt: skip
        report.levels.append({"level": level.name, "bits_per_value": bits[level.name], **got})
    return build(report.levels)
