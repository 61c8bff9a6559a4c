"""The bitstream is pinned: every backend writes and reads exactly the bytes that stand in golden/."""

from __future__ import annotations

import json

import pytest

from codec import bitstream
from codec.chunk import cut_chunk, inspect_blob, refine_chunk
from codec.profile import default_profile
from scripts.make_codec_vectors import CASES, FOLDER, LAYOUTS, Case, decoded_digest, make_blob, profile_of

BACKENDS = ["reference", "numba"]
DECODED = json.loads((FOLDER / "decoded.json").read_text(encoding="utf-8"))


def stored(case: Case) -> bytes:
    return (FOLDER / f"{case.name}.kvsb").read_bytes()  # a missing vector fails


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_golden(case: Case, backend: str) -> None:
    blob = stored(case)
    assert make_blob(case, backend) == blob
    assert decoded_digest(case, blob, backend) == DECODED[case.name]
    assert inspect_blob(blob).is_refinement == bool(case.have)


def test_refinements_restore_what_they_were_taken_from() -> None:
    by_name = {case.name: case for case in CASES}
    refinements = [case for case in CASES if case.have]
    assert len(refinements) >= 3
    for case in refinements:
        profile = profile_of(case.profile)
        fine = stored(by_name[Case(profile=case.profile, level=case.level, rope=case.rope).name])
        fine = cut_chunk(fine, profile=profile, layers=case.layers, heads=case.heads)
        coarse = cut_chunk(fine, profile=profile, level=case.have)
        assert refine_chunk(coarse, stored(case)) == fine


def test_the_vectors_force_every_step() -> None:
    """Exceptions, also in channels that a stage does not code; matrices, deltas, a layer of unturned keys, 32 lanes."""
    blob = stored(Case(profile="static", level="q1", rope=True))
    exceptions = bitstream.parse_directory(memoryview(blob), inspect_blob(blob)).entries["exceptions"]
    assert (exceptions[:-1].sum(axis=(1, 2, 3)) > 0).all()  # the last stage codes every channel
    profile = profile_of("static")
    for plan in (profile.lossy.k, profile.lossy.v):
        assert plan is not None
        assert (plan.matrix[0] >= 0).all() and (plan.group > 0).tolist() == [False, True]
        assert (plan.active[0, 0] < plan.active[-1, 0]).all()
    assert profile.lossy.k.is_turned.tolist() == [True, False]  # type: ignore[union-attr]
    assert inspect_blob(blob).is_unrotated and profile.lossy.num_stages == 3
    assert max(LAYOUTS["wide"]) == 128


def test_no_vector_is_left_over_or_large() -> None:
    assert {path.stem for path in FOLDER.glob("*.kvsb")} == {case.name for case in CASES} == set(DECODED)
    assert len(DECODED) == len(CASES)
    assert {path.stem for path in FOLDER.glob("*.kvp")} == set(LAYOUTS)
    assert sum(path.stat().st_size for path in FOLDER.glob("*")) < 300_000


@pytest.mark.parametrize("name", ["default", "wide-default"])
def test_the_default_profile_is_the_same_on_every_machine(name: str) -> None:
    profile = profile_of(name)
    assert default_profile(profile.layout).id == profile.id
