"""Profiles on disk, codebooks, the delta choice, and a calibration of a made-up model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from codec_cases import make_kv, make_layout, make_profile, make_rope

from codec.allocate import RateTable, allocate
from codec.calibrate import NUM_LOSSY_LEVELS, Sample, calibrate
from codec.chunk import decode_chunk, encode_chunk
from codec.codebook import entropy_bits, learn_codebook, table_cost_bits
from codec.delta_choice import choose_group
from codec.entropy import histogram
from codec.errors import InvalidProfile
from codec.levels import EXACT
from codec.profile import default_profile, load_profile

LAYOUT = make_layout(2, 2, 64, 64)


def test_profiles_survive_the_disk(tmp_path: Path) -> None:
    for profile in (make_profile(LAYOUT), default_profile(LAYOUT, fingerprint="abc")):
        path = tmp_path / "p.kvp"
        profile.save(path)
        again = load_profile(path)
        assert again.id == profile.id and len(again.id) == 32
        assert (again.fingerprint, again.level_names) == (profile.fingerprint, profile.level_names)
        assert dict(again.bits_per_value) == dict(profile.bits_per_value)
        assert dict(again.promise) == dict(profile.promise) and again.promise["raw"] == EXACT
        k, v = make_kv(LAYOUT, 9)
        for level in profile.level_names:
            blob = encode_chunk(k, v, level=level, profile=profile, rope=None)
            assert encode_chunk(k, v, level=level, profile=again, rope=None) == blob
            decode_chunk(blob, profile=again, rope=None)


def test_profiles_differ_by_content() -> None:
    assert make_profile(LAYOUT, seed=1).id != make_profile(LAYOUT, seed=2).id
    assert default_profile(LAYOUT).id != default_profile(make_layout(3, 2)).id


def test_damaged_profiles_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "p.kvp"
    make_profile(LAYOUT).save(path)
    data = path.read_bytes()
    rng = np.random.default_rng(0)
    bad = [b"", b"hello", b"KVSP\x09\x00" + data[6:], data[:-20], data[:500], b"KVSP\x01\x00\xc1"]
    for at in rng.integers(6, len(data), 200):
        changed = bytearray(data)
        changed[at] ^= 0xFF
        bad.append(bytes(changed))
    refused = 0
    for content in bad:
        path.write_bytes(content)
        try:
            load_profile(path)  # a changed float may still make a legal profile, of another id
        except InvalidProfile:
            refused += 1
    assert refused > 100
    path.write_bytes(bad[0])
    with pytest.raises(InvalidProfile, match="kvstream calibrate"):
        load_profile(path)
    with pytest.raises(FileNotFoundError):
        load_profile(tmp_path / "none.kvp")


def test_a_learned_codebook_is_nearly_as_good_as_each_channels_own_table() -> None:
    rng = np.random.default_rng(0)
    spreads = np.exp2(rng.uniform(-3, 4, 300))
    counts = histogram(np.rint(rng.laplace(0, spreads / 1.4, (3000, 300))))
    book, index = learn_codebook(counts, 32)
    excess = (table_cost_bits(counts, book, index) / counts.sum(axis=1) - entropy_bits(counts)).mean()
    assert 0 < excess < 0.03
    again, same = learn_codebook(counts, 32)
    assert np.array_equal(again.freqs, book.freqs) and np.array_equal(same, index)


def test_delta_is_chosen_where_tokens_resemble_their_anchor_and_only_there() -> None:
    rng = np.random.default_rng(0)
    drift = np.rint(np.cumsum(rng.normal(0, 1, (512, 16)), axis=0))
    noise = np.rint(rng.normal(0, 5, (512, 16)))
    on, off = choose_group(3, "K", [[drift]]), choose_group(4, "V", [[noise]])
    assert on.is_on and on.delta_bits < 0.8 * on.plain_bits and on.delta_over_spread < 0.5
    assert not off.is_on and off.delta_over_spread > 1.2


def test_allocation_meets_its_rate_and_spares_the_sensitive() -> None:
    step = np.tile(2.0 ** np.arange(-8, 4)[None], (6, 1)).astype(np.float32)
    table = RateTable(step=step, rate=np.maximum(2 - np.log2(step), 0.1), distortion=step.astype(float) ** 2 / 12)
    sensitivity = np.array([1, 1, 1, 1, 64, 64.0])
    choice = allocate(table, sensitivity, 4.0)
    assert float(table.rate[np.arange(6), choice].mean()) == pytest.approx(4.0, abs=0.7)
    assert choice[4] == choice[5] == choice[0] - 3  # 64 times the cost: an eighth of the step


def fake_samples(seed: int) -> list[Sample]:
    samples = []
    for number in range(2):
        k, v = make_kv(LAYOUT, 300, seed=seed + number)
        samples.append(Sample(k=k, v=v, rope=make_rope(300, 64)))
    return samples


class FakeLoss:
    """Layer 1's V matters a hundred times more than the rest."""

    def __init__(self, samples: list[Sample]):
        self.samples = samples

    def __call__(self, transform, *, keep_last_tokens=None) -> dict[str, float]:  # type: ignore[no-untyped-def]
        if keep_last_tokens is not None:
            return {"kl": 5.0, "recall": 0.1}
        total = 0.0
        for sample in self.samples:
            k, v = transform(sample)
            total += float((k.float() - sample.k.float()).square().mean()) * 0.01
            error = (v.float() - sample.v.float()).square().mean(dim=(1, 2, 3))
            total += float(error[0]) * 0.01 + float(error[1])
        return {"kl": total, "delta_nll": total / 2, "greedy_agreement": 1 - total, "recall": 0.9 - total}


def test_calibration_of_a_made_up_model(tmp_path: Path) -> None:
    samples, held_out = fake_samples(0), fake_samples(50)
    seen: list[float] = []
    profile, report = calibrate(
        samples, FakeLoss(samples), fingerprint="f", validate=(held_out, FakeLoss(held_out)),
        provenance={"model": "fake"}, progress=lambda what, share: seen.append(share),
    )  # fmt: skip
    assert seen == sorted(seen) and seen[-1] == 1.0
    assert profile.level_names == ("raw", "lossless", *(f"q{i + 1}" for i in range(NUM_LOSSY_LEVELS)))
    bits = [profile.bits_per_value[name] for name in profile.level_names]
    assert bits == sorted(bits, reverse=True) and bits[0] < 16.1 and bits[1] < 12 and bits[-1] < 1.8
    kls = [profile.promise[name].kl for name in profile.level_names]
    assert kls == sorted(kls) and kls[1] == 0.0 and report.control["kl"] > 10 * kls[-1]
    assert profile.promise["q3"].recall_drop == pytest.approx(kls[4], rel=1e-3)
    steps = profile.level("q2").v.step
    assert steps[1].max() < steps[0].min() / 3
    assert len(report.delta) == 4 and len(report.probes) == 8 and profile.needs_rope
    profile.save(tmp_path / "p.kvp")
    assert load_profile(tmp_path / "p.kvp").id == profile.id
    k, v = make_kv(LAYOUT, 256, seed=99)
    blob = encode_chunk(k, v, level="q2", profile=profile, rope=make_rope(256, 64))
    got = decode_chunk(blob, profile=profile, rope=make_rope(256, 64))
    assert float((got[1] - v).abs().max()) <= steps.max() * 0.51 + 0.01
    assert torch.isfinite(got[0]).all()
