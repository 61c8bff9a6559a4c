"""codec/rope.py: tables that turn some channels of some layers, or none; through every level and both backends."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from codec_cases import make_rope  # cos and sin of a run of positions

from codec.allocate import Sample, plain_rows
from codec.chunk import decode_chunk, encode_chunk
from codec.errors import CodecError, RopeRequired
from codec.profile import CodecLayout, default_profile
from codec.rope import RopeTable, rotate

LAYOUT = CodecLayout(num_layers=3, num_kv_heads=2, head_dim_k=32, head_dim_v=16)
PROFILE = default_profile(LAYOUT)
LOSSY = [level.name for level in PROFILE.levels if level.name not in ("raw", "lossless")]


def smooth_keys(rope: RopeTable, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """[L, T, H, D] bf16: each channel varies little about a constant, and is turned where the table says so."""
    rng = np.random.default_rng(seed)
    k = rng.normal(0, 4, (3, 1, 2, 32)) + rng.normal(0, 0.3, (3, rope.num_tokens, 2, 32))
    k = k.astype(np.float32)
    for layer in np.flatnonzero(rope.turned(0, 3)):
        for head in range(2):
            k[layer, :, head] = rotate(k[layer, :, head], *rope.forward())
    v = rng.normal(0, 1, (3, rope.num_tokens, 2, 16)).astype(np.float32)
    return torch.from_numpy(k).bfloat16(), torch.from_numpy(v).bfloat16()


@pytest.mark.parametrize("level", ["lossless", *LOSSY])
@pytest.mark.parametrize("layers", [None, (True, False, True), (False, False, False)])
@pytest.mark.parametrize("dims", [32, 24, 2, 0])
def test_backends_agree_and_bounds_hold(dims: int, layers: tuple | None, level: str) -> None:
    full = make_rope(50, dims) if dims else RopeTable(np.zeros((50, 0)), np.zeros((50, 0)))
    rope = RopeTable(full.cos, full.sin, layers)
    k, v = smooth_keys(rope)
    blob = encode_chunk(k, v, level=level, profile=PROFILE, rope=rope)
    assert blob == encode_chunk(k, v, level=level, profile=PROFILE, rope=rope, backend="reference")
    got = decode_chunk(blob, profile=PROFILE, rope=rope)
    slow = decode_chunk(blob, profile=PROFILE, rope=rope, backend="reference")
    assert torch.equal(got[0], slow[0]) and torch.equal(got[1], slow[1])
    if level == "lossless":
        assert torch.equal(got[0], k) and torch.equal(got[1], v)
    else:
        assert (got[0].float() - k.float()).abs().max() < 2.0
    part = decode_chunk(blob, profile=PROFILE, rope=rope, layers=(1, 3), heads=(1, 2))
    assert torch.equal(part[0], got[0][1:, :, 1:])
    own = encode_chunk(k[1:, :, 1:], v[1:, :, 1:], level=level, profile=PROFILE, rope=rope, layers=(1, 3), heads=(1, 2))
    assert torch.equal(decode_chunk(own, profile=PROFILE, rope=rope)[0], part[0])


def test_all_layers_named_is_the_same_as_none_named() -> None:
    rope = make_rope(60, 32)
    k, v = smooth_keys(rope)
    named = RopeTable(rope.cos, rope.sin, (True, True, True))
    for level in LOSSY:
        plain = encode_chunk(k, v, level=level, profile=PROFILE, rope=rope)
        assert plain == encode_chunk(k, v, level=level, profile=PROFILE, rope=named)


def test_the_layers_that_are_turned_are_the_cheaper_for_it() -> None:
    """Keys turned in layers 0 and 2 alone: a table for just these beats one for all and none at all."""
    full = make_rope(256, 32)
    mixed = RopeTable(full.cos, full.sin, (True, False, True))
    k, v = smooth_keys(mixed)

    def error_bytes(rope: RopeTable | None) -> tuple[float, int]:
        blob = encode_chunk(k, v, level=LOSSY[0], profile=PROFILE, rope=rope)
        return float((decode_chunk(blob, profile=PROFILE, rope=rope)[0].float() - k.float()).norm()), len(blob)

    right, all_layers, none = error_bytes(mixed), error_bytes(full), error_bytes(None)
    # The steps follow each head's spread, so a wrong frame shows as error at about the same size.
    assert right[0] < 0.8 * all_layers[0] and right[0] < 0.6 * none[0]
    assert right[1] < 1.1 * min(all_layers[1], none[1])


def test_parts_and_frames_know_their_layers() -> None:
    full = make_rope(40, 32)
    rope = RopeTable(full.cos, full.sin, (False, True, True))
    assert rope.part(10, 30).num_tokens == 20 and rope.part(10, 30).turned(0, 3).tolist() == [False, True, True]
    assert rope.turned(1, 2).tolist() == [True] and full.turned(0, 2).tolist() == [True, True]
    k, v = smooth_keys(rope)
    sample = Sample(k=k, v=v, rope=rope)
    assert np.array_equal(plain_rows(sample, 0, 0, 1, is_turned=True), plain_rows(sample, 0, 0, 1, is_turned=False))
    assert not np.array_equal(plain_rows(sample, 0, 1, 1, is_turned=True), plain_rows(sample, 0, 1, 1, is_turned=False))


def test_wrong_flags_are_refused() -> None:
    full = make_rope(8, 32)
    k, v = smooth_keys(full)
    short = RopeTable(full.cos, full.sin, (True, False))
    with pytest.raises(RopeRequired, match="knows 2 layers; want 3"):
        encode_chunk(k, v, level=LOSSY[0], profile=PROFILE, rope=short)
    with pytest.raises(CodecError, match="one flag for each layer"):
        RopeTable(full.cos, full.sin, np.ones((3, 2), bool))
