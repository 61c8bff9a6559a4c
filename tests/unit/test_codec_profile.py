"""Profiles on disk, what a profile may say, and codebooks. Calibration has its own tests."""

from __future__ import annotations

import zlib
from dataclasses import replace
from pathlib import Path

import msgpack
import numpy as np
import pytest
from codec_cases import make_kv, make_layout, make_profile, make_rope

from codec.chunk import decode_chunk, encode_chunk
from codec.decorrelate import pack_matrix, unpack_matrix
from codec.entropy import CodeBook
from codec.errors import InvalidProfile
from codec.levels import EXACT, Level, LevelKind, Promise
from codec.profile import Profile, default_profile, load_profile

LAYOUT = make_layout(2, 2, 64, 48)
STATIC = make_profile(LAYOUT, matrices=True, unturned=1)


@pytest.mark.parametrize(
    "profile", [STATIC, make_profile(LAYOUT, stages=1), default_profile(LAYOUT, fingerprint="abc")]
)
def test_profiles_survive_the_disk(profile: Profile, tmp_path: Path) -> None:
    path = tmp_path / "p.kvp"
    profile.save(path)
    again = load_profile(path)
    assert again.id == profile.id and len(again.id) == 32
    assert (again.fingerprint, again.level_names, again.layout) == (
        profile.fingerprint, profile.level_names, profile.layout,
    )  # fmt: skip
    assert dict(again.bits_per_value) == dict(profile.bits_per_value)
    assert dict(again.promise) == dict(profile.promise) and again.promise["raw"] == EXACT
    k, v = make_kv(LAYOUT, 9)
    for level in profile.level_names:
        blob = encode_chunk(k, v, level=level, profile=profile, rope=None)
        assert encode_chunk(k, v, level=level, profile=again, rope=None) == blob
        decode_chunk(blob, profile=again, rope=None)
    again.save(path)
    assert load_profile(path).id == profile.id


def test_profiles_differ_by_content() -> None:
    assert make_profile(LAYOUT, seed=1).id != make_profile(LAYOUT, seed=2).id
    assert default_profile(LAYOUT).id != default_profile(make_layout(3, 2)).id
    assert replace(STATIC, provenance={"by": "me"}).id != STATIC.id
    assert replace(STATIC).id == STATIC.id


def test_the_id_is_of_the_contents_not_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "p.kvp"
    STATIC.save(path)
    body = msgpack.unpackb(path.read_bytes()[6:])
    for entry in body["arrays"].values():
        entry[2] = zlib.compress(zlib.decompress(entry[2]), 0)
    path.write_bytes(path.read_bytes()[:6] + msgpack.packb(body))
    assert load_profile(path).id == STATIC.id


def test_damaged_profiles_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "p.kvp"
    STATIC.save(path)
    data = path.read_bytes()
    rng = np.random.default_rng(0)
    bad = [
        b"",
        b"hello",
        b"KVSP\x09\x00" + data[6:],
        b"KVSP\x01\x00" + data[6:],
        data[:-20],
        data[:500],
        b"KVSP\x02\x00\xc1",
    ]
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
    assert refused > 150
    path.write_bytes(bad[0])
    with pytest.raises(InvalidProfile, match="kvstream calibrate"):
        load_profile(path)
    with pytest.raises(FileNotFoundError):
        load_profile(tmp_path / "none.kvp")


def test_a_file_may_not_unpack_to_more_than_the_limit(tmp_path: Path) -> None:
    path = tmp_path / "p.kvp"
    STATIC.save(path)
    body = msgpack.unpackb(path.read_bytes()[6:])
    for number in range(40):  # 40 times 16 MB, a few KB in the file
        body["arrays"][f"more{number}"] = ["u1", [16 << 20], b""]
    path.write_bytes(path.read_bytes()[:6] + msgpack.packb(body))
    with pytest.raises(InvalidProfile, match="limit"):
        load_profile(path)


def changed(name: str, value: object, at: tuple[object, ...] = ()) -> Profile:
    """STATIC with one array of K's plan changed: one element, or all of it."""
    plan = STATIC.lossy.k
    assert plan is not None
    array = getattr(plan, name)
    if at:
        array = array.copy()
        array[at] = value
    else:
        array = value(array)  # type: ignore[operator]
    return replace(STATIC, lossy=replace(STATIC.lossy, k=replace(plan, **{name: array})))


@pytest.mark.parametrize(
    ("name", "value", "at"),
    [
        ("mean", np.nan, (0, 0, 0)),
        ("mean", 2.0**91, (0, 0, 0)),
        ("mean", 1 + 2.0**-12, (0, 0, 0)),  # no bfloat16 number
        ("mean", lambda x: x.astype(np.float64), ()),
        ("step", 0.0, (1, 1, 3)),
        ("step", -1.0, (1, 1, 3)),
        ("step", np.inf, (1, 1, 3)),
        ("step", 2.0**61, (1, 1, 3)),
        ("step", 0.3, (1, 1, 3)),
        ("step", lambda x: x[..., :-1], ()),
        ("group", -1, (0,)),
        ("group", 4097, (0,)),
        ("group", lambda x: x[:1], ()),
        ("group", lambda x: x.astype(np.int32), ()),
        ("matrix", -2, (0, 0)),
        ("matrix", 2, (0, 0)),
        ("matrix", -1, (0, 0)),  # but not every channel is coded
        ("analysis", np.nan, (0, 0, 0)),
        ("synthesis", 2.0**21, (0, 0, 0)),
        ("synthesis", lambda x: x[:1], ()),
        ("active", 65, (2, 0, 0)),
        ("active", -1, (0, 0, 0)),
        ("active", 64, (0, 0, 0)),  # then falls
        ("active", 63, (2, 1, 0)),  # without a matrix
        ("index", 8, (0, 0, 1, 5)),
        ("index", lambda x: x.astype(np.int8), ()),  # -1 would pass for a small number
        ("refine", 8, (1, 0, 0, 5)),
        ("refine", lambda x: x[:1], ()),
        ("refine", lambda x: x.astype(np.int8), ()),
        ("is_turned", lambda x: x.astype(np.int64), ()),
    ],
)
def test_what_a_plan_may_not_say(name: str, value: object, at: tuple[object, ...]) -> None:
    with pytest.raises(InvalidProfile):
        changed(name, value, at)


def test_what_a_profile_may_not_say() -> None:
    level = Level(name="q4", kind=LevelKind.QUANTIZED, stages=1)
    lossless = STATIC.lossless["bfloat16"]
    assert lossless.k is not None
    cuts = STATIC.lossy.cuts.copy()
    cuts[0, 0, 0] = (5, 5)
    shipped = default_profile(LAYOUT)
    for change in (
        {"levels": (*STATIC.levels, STATIC.levels[0])},
        {"levels": (replace(level, name="way too long"),)},
        {"levels": (replace(level, name=""),)},
        {"levels": (replace(level, name="a\0b"),)},
        {"levels": (replace(level, name="é"),)},
        {"levels": (replace(level, stages=0),)},
        {"levels": (replace(level, stages=4),)},
        {"layout": make_layout(3, 2, 64, 48)},
        {"layout": make_layout(2, 2, 64, 0)},
        {"layout": make_layout(70_000, 2, 64, 48)},
        {"fingerprint": 3},
        {"bits_per_value": {"raw": float("nan")}},
        {"promise": {"q1": Promise(kl=float("inf"))}},
        {"lossy": replace(STATIC.lossy, v=None)},
        {"lossy": replace(STATIC.lossy, num_stages=4)},
        {"lossy": replace(STATIC.lossy, cuts=cuts)},
        {"lossless": {"bfloat16": replace(lossless, k=lossless.k.astype(np.int8))}},
        {"lossless": {"bfloat16": replace(lossless, k=lossless.k + 31)}},
        {"lossless": {"bfloat16": replace(lossless, k=lossless.k[:1])}},
    ):
        with pytest.raises(InvalidProfile):
            replace(STATIC, **change)  # type: ignore[arg-type]
    for lossy in (
        replace(shipped.lossy, step_factor=float("nan")),
        replace(shipped.lossy, step_factor=-1.0),
        replace(shipped.lossy, cuts=shipped.lossy.cuts[:, :5]),
    ):
        with pytest.raises(InvalidProfile):
            replace(shipped, lossy=lossy)
    freqs = shipped.lossy.codebook.freqs
    for bad in (
        freqs[:0],
        freqs[:, :255],
        freqs * 2,
        np.full((1, 256), 4, np.uint16),
        np.repeat(freqs[:1], 33, axis=0),
    ):
        with pytest.raises(InvalidProfile):
            CodeBook(freqs=bad)


def test_matrices_survive_packing() -> None:
    rng = np.random.default_rng(0)
    for scale in (1.0, 1e-6, 1e6):
        matrix = rng.normal(0, scale, (3, 8, 8)) * np.exp2(rng.integers(-20, 20, (3, 8, 1)))
        matrix[0, 0] = 0
        once = unpack_matrix(*pack_matrix(matrix))
        assert np.array_equal(unpack_matrix(*pack_matrix(once)), once)
        assert (np.abs(once - matrix) <= np.abs(matrix).max(axis=-1, keepdims=True) / 32767).all()


def test_the_default_profile_serves_any_layout() -> None:
    for sizes in ((1, 1, 1, 1), (1, 1, 576, 512), (2, 1, 3, 130)):
        profile = default_profile(make_layout(*sizes))
        k, v = make_kv(profile.layout, 3)
        for level in profile.level_names:
            rope = make_rope(3, sizes[2] // 2 * 2)
            decode_chunk(encode_chunk(k, v, level=level, profile=profile, rope=rope), profile=profile, rope=rope)
