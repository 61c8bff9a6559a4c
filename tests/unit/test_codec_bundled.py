"""The profile that ships with the bundled model: it is this model's, and its levels are in order."""

from __future__ import annotations

import json
from pathlib import Path

from codec.levels import LevelKind
from codec.profile import load_profile
from prefill.model import load_model

ROOT = Path(__file__).resolve().parents[2]
REPORT = ROOT / "docs" / "benchmarks" / "profile-bundled-model-202611.json"
AGAIN = "the model or the codec changed: run `python -m scripts.calibrate_model`"


def test_the_bundled_profile_belongs_to_the_bundled_model() -> None:
    profile = load_profile(ROOT / "model" / "profile.kvp")
    loaded = load_model(ROOT / "model")
    assert profile.fingerprint == loaded.fingerprint, AGAIN
    lay = loaded.layout
    assert profile.layout.num_layers == lay.num_layers and profile.layout.num_kv_heads == lay.num_kv_heads
    assert (profile.layout.head_dim_k, profile.layout.head_dim_v) == (lay.head_dim_k, lay.head_dim_v)


def test_its_levels_are_a_ladder_and_the_control_fails_every_promise() -> None:
    profile = load_profile(ROOT / "model" / "profile.kvp")
    report = json.loads(REPORT.read_text(encoding="utf-8"))
    assert report["profile"] == profile.id, AGAIN
    bits = [profile.bits_per_value[name] for name in profile.level_names]
    assert bits == sorted(bits, reverse=True)
    lossy = [name for name in profile.level_names if profile.level(name).kind is LevelKind.QUANTIZED]
    assert len(lossy) >= 3 and 16 / bits[-1] >= 16 and 16 / profile.bits_per_value["lossless"] >= 1.35
    kls = [profile.promise[name].kl for name in lossy]
    assert all(kl is not None and kl * 10 < report["control"]["kl"] for kl in kls)
    assert kls[0] <= 0.01 and kls[0] < kls[-1]
