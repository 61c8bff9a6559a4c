"""Calibration: KV samples, their Fisher information and a loss -> a profile with levels that promise something.

    profile, report = calibrate(samples, fisher, loss, fingerprint="...", validate=(held_out_samples, held_out_loss))

1. Statistics of every head: means, covariance; and how much its errors cost (Fisher information).
2. Which steps are on for each (layer, K or V): transform, keys before RoPE, anchor deltas; by measured rate.
3. Steps: one constant c for all channels (allocate.py). The ladder has NUM_STAGES stages whose steps are thirds of each
   other; c is the largest at which all levels keep their bounds on KL with a margin and a standard error to spare.
4. Tables; exponent tables for lossless.
5. Every level is measured end to end (encode, decode, loss), on samples that were not used before.

Knows no model, opens no file.
Legend: L layers, T tokens, H KV heads, D head dim, M stages.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch

from codec.allocate import KV, Array, Fisher, Sample, Statistics, collect, fisher_floors
from codec.calibration_audit import audit
from codec.calibration_ladder import Ladder, build_tensor
from codec.calibration_tables import learn_lossless, learn_tables
from codec.chunk import decode_chunk, encode_chunk
from codec.decorrelate import inverse_error
from codec.delta_choice import Decision, choose_reg, choose_transform
from codec.levels import EXACT, Level, LevelKind, Lossy, Promise
from codec.profile import CodecLayout, Profile, default_lossless

__all__ = ["KV", "Fisher", "Loss", "Report", "Sample", "calibrate"]

# What c aims at, nats a token that depends on the context; finest first. Promises are what then comes of it.
BOUNDS = {"q1": 0.003, "q2": 0.015, "q3": 0.05}
NUM_STAGES = len(BOUNDS)
MARGIN = 1.5  # that a bound is at least this many times what the learning documents show
# A promise is at least this many times the worst measured: 64 other documents cost up to 2.3 times as much.
PROMISE_MARGIN = 2.5
SERIES = (1, 2, 3, 5)  # promises are one of these times a power of ten
# Scales of the curve, in units of the one where the Fisher information expects the coarsest bound.
CURVE = 3.0 ** (np.arange(-6, 3) / 2)
REG_TENSORS = 16  # that the regularisation is chosen on
CONTROL_TOKENS = 64
OTHER_DTYPES = ("float16", "float8_e4m3fn", "float8_e5m2")

Measures = Mapping[str, float]  # at least kl; also kl_error, delta_nll, greedy_agreement, recall, ...
Progress = Callable[[str, float], None]


class Loss(Protocol):
    """Runs the model with every sample's KV replaced and compares with the KV as it was."""

    def __call__(self, transform: Callable[[Sample], KV], *, keep_last_tokens: int | None = None) -> Measures:
        """keep_last_tokens: drop all older KV (the control that must fail)."""
        ...


@dataclass(slots=True, kw_only=True)
class Report:
    """What calibration saw, for people: plain rows. scale: c of the coarsest level; regs: bits by regularisation;
    inverse_error: the worst matrix pair's (decorrelate.inverse_error)."""

    levels: list[dict[str, Any]] = field(default_factory=list)
    curve: list[dict[str, float]] = field(default_factory=list)
    decisions: list[Decision] = field(default_factory=list)
    sensitivity: list[dict[str, Any]] = field(default_factory=list)
    audit: list[dict[str, Any]] = field(default_factory=list)
    control: dict[str, float] = field(default_factory=dict)
    regs: dict[float, float] = field(default_factory=dict)
    reg: float = 0.0
    scale: float = 0.0
    inverse_error: float = 0.0


Grid = list[list[Statistics]]  # [L][H]


def _collect(samples: Sequence[Sample], fisher: Fisher, which: int, *, is_turned: bool) -> Grid:
    layers, _, heads, _ = samples[0].k.shape
    return [
        [collect(samples, fisher, which, layer, head, is_turned=is_turned) for head in range(heads)]
        for layer in range(layers)
    ]


def _floors(grids: Sequence[Grid]) -> list[Array]:
    """[L, H] each."""
    shape = (len(grids[0]), len(grids[0][0]))
    flat = fisher_floors([one for grid in grids for heads in grid for one in heads])
    return [part.reshape(shape) for part in np.split(flat, len(grids))]


def _decide(samples: Sequence[Sample], fisher: Fisher, report: Report, progress: Progress) -> Ladder:
    has_rope = samples[0].rope is not None
    turned = [_collect(samples, fisher, which, is_turned=has_rope) for which in (0, 1)]
    plain = _collect(samples, fisher, 0, is_turned=False) if has_rope else None
    floors = _floors(turned)
    flat = [one for grid in turned for heads in grid for one in heads]
    everything = list(zip(flat, np.concatenate([f.ravel() for f in floors]), strict=True))
    some = everything[:: max(1, len(everything) // REG_TENSORS)]
    report.sensitivity = _sensitivities(turned)
    report.scale = scale = _expected_scale(turned)
    progress("transforms", 0.15)
    report.reg, report.regs = choose_reg([one for one, _ in some], np.array([f for _, f in some]), scale, NUM_STAGES)
    tensors, decisions = [], []
    for which in (0, 1):
        chosen = []
        for layer, heads in enumerate(turned[which]):
            other = plain[layer] if plain is not None and which == 0 else None
            floor = floors[which][layer]
            chosen.append(choose_transform(layer, "KV"[which], heads, other, floor, report.reg, scale, NUM_STAGES))
            progress("transforms", 0.15 + 0.1 * (which + layer / len(turned[which])))
        stats = [
            turned[which][layer] if one.is_turned or which or plain is None else plain[layer]
            for layer, one in enumerate(chosen)
        ]
        tensors.append(build_tensor(chosen, stats, floors[which], report.reg, scale))
        decisions += chosen
    k, v = samples[0].k, samples[0].v
    layout = CodecLayout(num_layers=k.shape[0], num_kv_heads=k.shape[2], head_dim_k=k.shape[3], head_dim_v=v.shape[3])
    return Ladder(layout=layout, tensors=(tensors[0], tensors[1]), decisions=decisions)


def _flat(matrices: Array) -> Array:
    return matrices.reshape(-1, *matrices.shape[2:])


def _sensitivities(turned: Sequence[Grid]) -> list[dict[str, Any]]:
    """What dropping a head's KV to its mean would cost to second order, nats a token."""
    return [
        {"layer": layer, "which": "KV"[which], "head": head, "kl": 0.5 * float((one.covariance * one.fisher).sum())}
        for which, grid in enumerate(turned)
        for layer, heads in enumerate(grid)
        for head, one in enumerate(heads)
    ]


def _expected_scale(turned: Sequence[Grid]) -> float:
    """c where errors of c^2 / 12 in every channel would cost the coarsest bound to second order."""
    channels = sum(len(one.mean) for grid in turned for heads in grid for one in heads)
    return float(np.sqrt(24 * max(BOUNDS.values()) / channels))


def _curve_at(curve: Sequence[Mapping[str, float]], scales: Array, *, errors: float = 0.0) -> Array:
    """KL at the scales by the measured curve, `errors` standard errors higher; below it, with the step's square."""
    c = np.array([row["scale"] for row in curve])
    kl = np.array([row["kl"] + errors * row.get("kl_error", 0.0) for row in curve])
    kl = np.maximum.accumulate(np.maximum(kl, 1e-12))
    inside = np.exp(np.interp(np.log(scales), np.log(c), np.log(kl)))
    return np.asarray(inside * np.minimum(scales / c[0], 1.0) ** 2)


def _choose_scale(curve: Sequence[Mapping[str, float]]) -> float:
    """The largest c at which MARGIN times each level's KL, and KL and its standard error, are within its bound."""
    fine = np.geomspace(curve[0]["scale"], curve[-1]["scale"], 400)
    good = np.ones(len(fine), bool)
    for number, bound in enumerate(reversed(BOUNDS.values())):
        scales = fine / 3.0**number
        good &= np.maximum(MARGIN * _curve_at(curve, scales), _curve_at(curve, scales, errors=1.0)) <= bound
    return float(fine[np.flatnonzero(good)[-1]]) if good.any() else float(fine[0])


def promised_kl(*measured: float) -> float:
    """PROMISE_MARGIN times the worst of what was measured, rounded up to SERIES."""
    worst = max(PROMISE_MARGIN * max(measured), 1e-6)
    decade = 10.0 ** np.floor(np.log10(worst))
    return float(next(f"{n * d:.0e}" for d in (decade, 10 * decade) for n in SERIES if n * d >= worst * (1 - 1e-9)))


def _through_codec(profile: Profile, level: str, chunk_tokens: int, count: list[int]) -> Callable[[Sample], KV]:
    """A transform that really encodes and decodes, chunk by chunk; adds [bytes, values] to `count`."""

    def transform(sample: Sample) -> KV:
        parts = []
        for start in range(0, sample.k.shape[1], chunk_tokens):
            rope = sample.rope
            if rope is not None:
                rope = rope.part(start, start + chunk_tokens)
            k, v = sample.k[:, start : start + chunk_tokens], sample.v[:, start : start + chunk_tokens]
            blob = encode_chunk(k, v, level=level, profile=profile, rope=rope)
            count[0] += len(blob)
            count[1] += k.numel() + v.numel()
            parts.append(decode_chunk(blob, profile=profile, rope=rope))
        return torch.cat([p[0] for p in parts], dim=1), torch.cat([p[1] for p in parts], dim=1)

    return transform


def calibrate(
    samples: Sequence[Sample],
    fisher: Fisher,
    loss: Loss,
    *,
    fingerprint: str,
    validate: tuple[Sequence[Sample], Loss] | None = None,
    provenance: Mapping[str, Any] | None = None,
    chunk_tokens: int = 256,
    progress: Progress = lambda what, share: None,
) -> tuple[Profile, Report]:
    """See the module's docstring. `loss` covers `samples`; `validate` (other documents) judges the levels."""
    if not samples:
        raise ValueError("calibration needs at least one sample")
    report = Report()
    progress("statistics", 0.0)
    ladder = _decide(samples, fisher, report, progress)
    report.inverse_error = max(
        inverse_error(*pair) for t in ladder.tensors for pair in zip(_flat(t.analysis), _flat(t.synthesis), strict=True)
    )
    for number, factor in enumerate(CURVE):
        progress("curve", 0.35 + 0.3 * number / len(CURVE))
        scale = float(report.scale * factor)
        report.curve.append({"scale": scale, **loss(lambda sample, c=scale: ladder.quantized(sample, c))})
    report.scale = _choose_scale(report.curve)
    progress("tables", 0.65)
    lossy, report.decisions = learn_tables(ladder, samples, report.scale, NUM_STAGES, chunk_tokens)
    progress("audit", 0.7)
    held_out = validate or (samples, loss)
    report.audit = audit(ladder, lossy, samples, held_out[0], report.scale, chunk_tokens)
    profile = _measure(ladder, lossy, samples, report, fingerprint, held_out, provenance or {}, chunk_tokens, progress)
    progress("done", 1.0)
    return profile, report


def _measure(
    ladder: Ladder, lossy: Lossy, samples: Sequence[Sample], report: Report, fingerprint: str,
    validate: tuple[Sequence[Sample], Loss], provenance: Mapping[str, Any], chunk_tokens: int, progress: Progress,
) -> Profile:  # fmt: skip
    """Promises and sizes of the finished levels, end to end; then the profile that carries them."""
    levels = [Level(name="raw", kind=LevelKind.RAW), Level(name="lossless", kind=LevelKind.LOSSLESS)]
    levels += [Level(name=n, kind=LevelKind.QUANTIZED, stages=NUM_STAGES - i) for i, n in enumerate(BOUNDS)]
    exponents = learn_lossless(samples, ladder.layout)
    lossless = {"bfloat16": exponents, "float32": exponents} | {d: default_lossless(d) for d in OTHER_DTYPES}
    bits: dict[str, float] = {}
    promise: dict[str, Promise] = {}

    def build(curve: Sequence[Mapping[str, Any]] = ()) -> Profile:
        return Profile(
            fingerprint=fingerprint, layout=ladder.layout, levels=tuple(levels), lossy=lossy, lossless=lossless,
            needs_rope=bool(ladder.tensors[0].is_turned.any()), bits_per_value=bits, promise=promise,
            provenance=provenance, curve=tuple(curve),
        )  # fmt: skip

    draft = build()
    _, loss = validate
    raw = loss(lambda sample: (sample.k, sample.v))
    report.control = dict(loss(lambda sample: (sample.k, sample.v), keep_last_tokens=CONTROL_TOKENS))
    for i, level in enumerate(levels):
        progress("promises", 0.75 + 0.25 * i / len(levels))
        size = [0, 0]
        got = loss(_through_codec(draft, level.name, chunk_tokens, size))
        bits[level.name] = round(8 * size[0] / size[1], 4)
        promise[level.name] = EXACT
        if level.kind is LevelKind.QUANTIZED:
            scale = report.scale / 3.0 ** (level.stages - 1)
            promise[level.name] = _promise(float(_curve_at(report.curve, np.array([scale]))[0]), raw, got)
        report.levels.append(
            {"level": level.name, "bits_per_value": bits[level.name], "promise": promise[level.name].kl, **got}
        )
    return build(report.levels)


def _promise(expected: float, raw: Measures, got: Measures) -> Promise:
    """expected: the KL of the documents that the scale was chosen on. All but kl as measured."""
    return Promise(
        kl=promised_kl(expected, got["kl"]), delta_nll=got.get("delta_nll"),
        greedy_agreement=got.get("greedy_agreement"),
        recall_drop=raw["recall"] - got["recall"] if "recall" in got else None,
    )  # fmt: skip
