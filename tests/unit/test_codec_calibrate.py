"""Calibration: transforms, steps, tables, decisions; and a whole calibration of a made-up model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from codec_cases import make_layout, make_rope

from codec.allocate import Fisher, Sample, rate_at, rate_distortion, stored_steps, unit_steps
from codec.calibrate import BOUNDS, _choose_scale, calibrate, promised_kl
from codec.calibration_tables import choose_active, count_head
from codec.chunk import decode_chunk, encode_chunk
from codec.codebook import (
    conditional_bits,
    cuts_cost_bits,
    entropy_bits,
    learn_codebook,
    learn_refinement,
    learn_wide_tables,
    table_cost_bits,
)
from codec.decorrelate import (
    apply_ordered,
    as_stored,
    fisher_klt,
    hadamard,
    inverse_error,
    klt,
    pack_matrix,
    regularised,
    sensitivity,
    sort_channels,
    unpack_matrix,
)
from codec.delta_choice import Decision, choose_group
from codec.entropy import histogram, refinement_histogram
from codec.levels import LevelKind
from codec.profile import load_profile
from kernels.rans_reference import stages_of

LAYOUT = make_layout(2, 2, 32, 16)


def random_spd(dim: int, seed: int, spread: float = 1.5) -> np.ndarray:
    rng = np.random.default_rng(seed)
    a = rng.normal(size=(dim, dim)) * np.exp(spread * rng.normal(size=dim))
    return a @ a.T / dim


@pytest.mark.parametrize("dim", [16, 64, 80, 128])
def test_transforms_do_what_they_say(dim: int) -> None:
    c, f = random_spd(dim, 1), random_spd(dim, 2)
    for analysis, synthesis in (klt(c), fisher_klt(c, f, 0.1), hadamard(dim)):
        assert np.allclose(analysis @ synthesis, np.eye(dim), atol=1e-8)
        assert np.allclose(np.linalg.norm(analysis, axis=0), 1)
    analysis, _ = klt(c)
    moved = analysis.T @ c @ analysis
    assert (
        np.abs(moved - np.diag(np.diag(moved))).max() < 1e-9 * moved.max() and (np.diff(np.diag(moved)) <= 1e-9).all()
    )
    analysis, synthesis = fisher_klt(c, f, 0.1)
    both = (analysis.T @ c @ analysis, synthesis @ regularised(f, 0.1) @ synthesis.T)
    for matrix in both:  # in its channels neither values nor errors' costs go together
        size = np.sqrt(np.outer(np.diag(matrix), np.diag(matrix)))
        assert np.abs(matrix / size - np.eye(dim)).max() < 1e-6
    mixed = hadamard(dim)[0]
    assert np.allclose(np.abs(mixed[mixed != 0][: dim & -dim]).min(), np.abs(mixed[0, 0]))


def test_stored_matrices_are_a_fixed_point_and_invert_each_other() -> None:
    for seed, dim in ((0, 64), (1, 128)):
        analysis, _ = fisher_klt(random_spd(dim, seed), random_spd(dim, seed + 9), 0.05)
        stored, back = as_stored(analysis)
        assert inverse_error(stored, back) < 2.0**-12
        for matrix in (stored, back, np.zeros((3, 3), np.float32), np.eye(5, dtype=np.float32) * 1e-7):
            packed, exponent = pack_matrix(matrix)
            again = unpack_matrix(packed, exponent)
            repacked, same = pack_matrix(again)
            assert packed.dtype == np.int16 and again.dtype == np.float32
            assert np.array_equal(repacked, packed) and np.array_equal(same, exponent)
        assert np.array_equal(unpack_matrix(*pack_matrix(stored)), stored)


def test_the_ordered_product_is_the_formats() -> None:
    rng = np.random.default_rng(0)
    x, m = rng.normal(size=(5, 48)).astype(np.float32), rng.normal(size=(48, 48)).astype(np.float32)
    out = apply_ordered(x, m)
    for t, j in ((0, 0), (4, 47), (2, 13)):
        total = np.float32(0)
        for i in range(48):
            total = np.float32(total + np.float32(x[t, i] * m[i, j]))
        assert out[t, j] == total
    assert np.allclose(out, x @ m, atol=1e-4)


def test_channels_are_sorted_so_that_idle_ones_come_last() -> None:
    analysis, synthesis = klt(random_spd(16, 3))
    spread = np.random.default_rng(0).uniform(0, 5, 16)
    a, s, order = sort_channels(analysis, synthesis, spread)
    assert (np.diff(spread[order]) <= 0).all() and np.allclose(a @ s, np.eye(16))


def test_the_fisher_klt_with_equal_slopes_costs_fewest_bits_at_equal_loss() -> None:
    rng = np.random.default_rng(0)
    c, f = random_spd(24, 5), random_spd(24, 6)
    rows = (rng.normal(size=(6000, 24)) @ np.linalg.cholesky(c + 1e-9 * np.eye(24)).T).astype(np.float32)
    one = np.eye(24, dtype=np.float32)
    scales = [0.3 * 1.6**i for i in range(9)]
    flat = 1 / np.sqrt(sensitivity(one.astype(float), f).mean()) * np.ones(24)
    candidates = {
        "flat": (one, one, flat),
        "none": (one, one, unit_steps(one, f, 1e-4, 0)),
        "klt": (*(pair := as_stored(klt(c)[0])), unit_steps(pair[1], f, 1e-4, 0)),
        "fisher": (*(pair := as_stored(fisher_klt(c, f, 1e-4)[0])), unit_steps(pair[1], f, 1e-4, 0)),
    }
    curves = {name: rate_distortion(rows, (a, s), unit, f, scales) for name, (a, s, unit) in candidates.items()}
    wanted = curves["fisher"][1][3:5]
    bits = {name: float(rate_at(*curve, wanted).mean()) for name, curve in curves.items()}
    assert bits["fisher"] < bits["klt"] < bits["none"] < bits["flat"]
    steps = stored_steps(candidates["klt"][2], 0.1)
    assert np.array_equal(steps.view(np.uint32) & 0xFFFF, np.zeros(24, np.uint32))


def test_a_learned_codebook_is_nearly_as_good_as_each_channels_own_table() -> None:
    rng = np.random.default_rng(0)
    spreads = np.exp2(rng.uniform(-3, 3, 300))
    draw = [histogram(np.rint(rng.laplace(0, spreads / 1.4, (3000, 300)))) for _ in range(2)]
    book, index = learn_codebook(draw[0], 32)
    for counts in draw:  # and no worse on new data
        excess = (table_cost_bits(counts, book, index) / counts.sum(axis=1) - entropy_bits(counts)).mean()
        assert 0 < excess < 0.04
    again, same = learn_codebook(draw[0], 32)
    assert np.array_equal(again.freqs, book.freqs) and np.array_equal(same, index)
    assert learn_wide_tables(draw[0], draw[1]) == pytest.approx(table_cost_bits(draw[1], book, index).sum(), rel=0.02)
    few, chosen = learn_codebook(np.concatenate([draw[0][:3], np.zeros((2, 257), np.int64)]), 32)
    assert few.num_tables == 3 and chosen[3] == chosen[4] == 0


def test_nesting_by_thirds_costs_next_to_nothing() -> None:
    rng = np.random.default_rng(1)
    spreads = np.exp2(rng.uniform(-2, 6, 200))
    fine = np.rint(rng.laplace(0, spreads / 1.4, (6000, 200))).astype(np.int64)
    coarse, middle, finest = stages_of(fine, 3)
    base = histogram(coarse)
    book, index = learn_codebook(base)
    bits = table_cost_bits(base, book, index).sum()
    for low, high in ((coarse, middle), (middle, finest)):
        counts = refinement_histogram(low, high)
        cuts, chosen = learn_refinement(counts)
        spent = cuts_cost_bits(counts, cuts, chosen).sum()
        assert spent < conditional_bits(counts).sum() * 1.01
        bits += spent
    wide = np.stack([np.bincount(np.clip(q, -999, 999) + 999, minlength=1999) for q in fine.T])
    assert bits < learn_wide_tables(wide, wide) * 1.02


def test_delta_is_chosen_where_tokens_resemble_their_anchor_and_only_there() -> None:
    rng = np.random.default_rng(0)
    drift = np.rint(np.cumsum(rng.normal(0, 1, (512, 16)), axis=0)).astype(np.int64)
    noise = np.rint(rng.normal(0, 5, (512, 16))).astype(np.int64)
    plain = Decision(layer=3, which="K", bits={}, chosen="klt")
    on, off = choose_group(plain, [[drift]], 0.5), choose_group(plain, [[noise]], 0.5)
    assert on.group and on.delta_bits[on.group] < 0.8 * on.delta_bits[0] and on.delta_over_spread < 0.5
    assert off.group == 0 and off.delta_over_spread > 1.2
    assert choose_group(plain, [[drift]], 1000.0).group == 0  # the other stages' bits count too


def test_idle_channels_are_left_out_of_coarse_stages() -> None:
    rng = np.random.default_rng(0)
    spread = np.concatenate([np.full(10, 30.0), np.full(10, 0.5), np.full(12, 0.01)])
    q = np.rint(rng.normal(0, spread, (4000, 32))).astype(np.int64)
    active = choose_active(count_head([q], 0, 3), 256)
    assert active.tolist() == [10, 20, 20]


def test_promises_are_round_and_the_scale_keeps_them() -> None:
    assert [promised_kl(x) for x in (0.00017, 0.0014, 0.012, 0.0121, 0.0)] == [5e-4, 5e-3, 0.03, 0.05, 1e-6]
    assert promised_kl(0.001, 0.002) == 0.005
    curve = [{"scale": s, "kl": s**2} for s in np.geomspace(0.001, 1, 9)]
    scale = _choose_scale(curve)
    levels = [(scale / 3.0**m) ** 2 for m in range(len(BOUNDS))]
    bounds = list(BOUNDS.values())[::-1]
    assert all(1.5 * kl <= bound * 1.05 for kl, bound in zip(levels, bounds, strict=True))
    assert any(1.5 * kl > bound * 0.8 for kl, bound in zip(levels, bounds, strict=True))
    assert _choose_scale([row | {"kl_error": 3 * row["kl"]} for row in curve]) < scale


WEIGHT = 0.002 * np.array([[1.0, 1.0], [1.0, 30.0]])  # of [K or V][layer]


def fake_samples(seed: int) -> list[Sample]:
    rng = np.random.default_rng(seed)
    mix = [np.linalg.qr(np.random.default_rng(9).normal(size=(d, d)))[0] for d in (32, 16)]
    samples = []
    for _ in range(6):
        x = []
        for d, m in zip((32, 16), mix, strict=True):
            y = rng.normal(0, 1, (2, 300, 2, d)) * np.exp2(-np.arange(d) / 4) @ m
            x.append(torch.from_numpy(y + np.arange(d) % 3).to(torch.bfloat16))
        samples.append(Sample(k=x[0], v=x[1], rope=make_rope(300, 32)))
    return samples


class FakeLoss:
    """A squared error with weights: what the Fisher information describes exactly."""

    def __init__(self, samples: list[Sample]):
        self.samples = samples

    def __call__(self, transform, *, keep_last_tokens=None) -> dict[str, float]:  # type: ignore[no-untyped-def]
        if keep_last_tokens is not None:
            return {"kl": 5.0, "recall": 0.1}
        total = 0.0
        for sample in self.samples:
            pairs = zip(transform(sample), (sample.k, sample.v), WEIGHT, strict=True)
            for new, old, weight in pairs:
                error = (new.float() - old.float()).square().sum(dim=(2, 3)).mean(dim=1).numpy()
                total += 0.5 * float((error * weight).sum()) / len(self.samples)
        return {"kl": total, "delta_nll": total / 2, "greedy_agreement": 1 - total, "recall": 0.9 - total}

    def fisher(self) -> Fisher:
        def of(which: int, dim: int) -> np.ndarray:
            return np.broadcast_to(WEIGHT[which][None, :, None, None, None] * np.eye(dim), (2, 2, 2, dim, dim))

        return Fisher(k_turned=of(0, 32), k=of(0, 32), v=of(1, 16))


def test_calibration_of_a_made_up_model(tmp_path: Path) -> None:
    samples, held_out = fake_samples(0), fake_samples(50)
    seen: list[float] = []
    loss = FakeLoss(samples)
    profile, report = calibrate(
        samples, loss.fisher(), loss, fingerprint="f", validate=(held_out, FakeLoss(held_out)),
        provenance={"model": "fake"}, progress=lambda what, share: seen.append(share),
    )  # fmt: skip
    assert seen == sorted(seen) and seen[-1] == 1.0
    assert profile.level_names == ("raw", "lossless", *BOUNDS)
    bits = [profile.bits_per_value[name] for name in profile.level_names]
    assert bits == sorted(bits, reverse=True) and bits[0] < 16.1 and bits[1] < 12
    kls = [float(profile.promise[name].kl or 0) for name in profile.level_names]
    assert kls == sorted(kls) and kls[1] == 0.0
    for row in report.levels:
        if profile.level(row["level"]).kind is LevelKind.QUANTIZED:
            assert row["kl"] <= row["promise"] / 1.5 * 1.001
            assert report.control["kl"] > row["promise"]
    assert profile.promise["q3"].recall_drop == pytest.approx(report.levels[4]["kl"], rel=1e-3)
    v = profile.lossy.v
    assert v is not None and v.step[1].max() < v.step[0].min() / 4  # thirty times the cost, a fifth of the step
    assert {d.transform for d in report.decisions} <= {"klt", "fisher"} and len(report.sensitivity) == 8
    assert [d.layer for d in report.decisions] == [0, 1, 0, 1] and all(d.group == 0 for d in report.decisions)
    for level, row in zip(reversed(BOUNDS), report.audit, strict=True):
        pieces = 8 * 12 * row["stages"] * 8 * 6 * 2 + 68 * 8 * 6 * 2  # directories and headers of the twelve chunks
        values = 6 * 300 * 4 * 48
        words = 8 * 6 * 2 * 16 * row["stages"]  # lanes end on half a word
        expected = (row["coded"] + row["states"]) * values + pieces
        assert profile.bits_per_value[level] * values == pytest.approx(expected, abs=words + 0.01 * expected)
        assert abs(row["nesting_cost"]) < 0.04 and row["chunk_entropy"] <= row["chunk_entropy_unbiased"]
    path = tmp_path / "p.kvp"
    profile.save(path)
    assert load_profile(path).id == profile.id
    check_steps(load_profile(path), fake_samples(99)[0])


def check_steps(profile, sample: Sample) -> None:  # type: ignore[no-untyped-def]
    blob = encode_chunk(sample.k, sample.v, level="q1", profile=profile, rope=sample.rope)
    k, v = decode_chunk(blob, profile=profile, rope=sample.rope)
    plan = profile.lossy.v
    bound = np.einsum("lhjd,lhj->lhd", np.abs(plan.synthesis[plan.matrix]), plan.step) / 2
    error = (v.float() - sample.v.float()).abs().amax(dim=1).numpy()
    assert (error <= bound * 1.01 + 0.02).all() and torch.isfinite(k).all()


def test_calibration_needs_samples() -> None:
    with pytest.raises(ValueError, match="at least one"):
        calibrate([], FakeLoss([]).fisher(), FakeLoss([]), fingerprint="f")
