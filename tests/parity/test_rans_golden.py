"""The bitstream is pinned: every backend writes and reads exactly the bytes that stand in golden/."""

from __future__ import annotations

import json

import pytest

from codec.chunk import decode_chunk, encode_chunk
from codec.profile import default_profile
from scripts.make_codec_vectors import CASES, FOLDER, digest, inputs, profile_of, rope


@pytest.mark.parametrize("backend", ["reference", "numba"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_golden(case: dict, backend: str) -> None:
    profile, used = profile_of(case), rope() if case["rope"] else None
    blob = (FOLDER / f"{case['name']}.kvsb").read_bytes()  # a missing vector fails
    expected = json.loads((FOLDER / "decoded.json").read_text(encoding="utf-8"))[case["name"]]
    assert (
        encode_chunk(*inputs(case["dtype"]), level=case["level"], profile=profile, rope=used, backend=backend) == blob
    )
    assert digest(*decode_chunk(blob, profile=profile, rope=used, backend=backend)) == expected


def test_no_vector_is_left_over() -> None:
    assert {path.stem for path in FOLDER.glob("*.kvsb")} == {case["name"] for case in CASES}


def test_the_default_profile_is_the_same_on_every_machine() -> None:
    stored = profile_of({"profile": "default"})
    assert default_profile(stored.layout).id == stored.id
