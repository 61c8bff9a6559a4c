"""Damaged blobs and profile files, a few thousand of them; `python -m scripts.fuzz_codec` runs as many as wanted."""

from __future__ import annotations

from scripts.fuzz_codec import run_isolated


def test_damage_is_refused_or_decodes_to_bounded_numbers() -> None:
    summary = run_isolated(count=3000, profiles=300, seed=20261120, timeout_s=240)
    assert summary["failures"] == []
    outcomes, profiles = summary["outcomes"], summary["profile_outcomes"]
    assert outcomes["sealed"] > 1200 and outcomes["unsealed"] > 900
    # Every way in was taken, and more than the outermost checks were reached.
    for what in ("decoded", "part decoded", "part decoded beside damage", "cut, then decoded", "reduced"):
        assert outcomes[what] >= 20, what
    for error in ("ChecksumMismatch", "MalformedBlob", "TruncatedBlob", "BlobTooLarge", "WrongProfile", "WrongVersion"):
        assert outcomes[f"refused {error}"] >= 10, error
    assert outcomes["refined, then decoded"] >= 1
    assert profiles["refused"] > 150 and profiles["encoded and decoded"] > 30
    assert summary["memory_peak_mb"] < summary["memory_limit_mb"]
