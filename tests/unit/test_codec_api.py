"""The codec for strangers: own tensors and transformers caches in, blobs out, and back."""

from __future__ import annotations

import pytest
import torch
from codec_cases import make_kv, make_layout, make_profile, make_rope, same_bits
from transformers import DynamicCache

from codec.api import KVCodec, cache_tensors
from codec.errors import CodecError, RopeRequired


def test_own_tensors_round_trip_in_chunks() -> None:
    k, v = make_kv(make_layout(2, 3, 32, 48), 150)
    codec = KVCodec.for_tensors(k, v, chunk_tokens=64)
    for level in codec.levels:
        blobs = codec.encode(k, v, level=level)
        assert len(blobs) == 3
        k2, v2 = codec.decode(blobs)
        if level in ("raw", "lossless"):
            assert same_bits(k2, k) and same_bits(v2, v)
        else:
            assert float((v2 - v).float().abs().max()) < 0.6 and k2.shape == k.shape


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_cache_comes_back(dtype: torch.dtype) -> None:
    layout = make_layout(3, 2, 64, 64)
    k, v = make_kv(layout, 40, dtype=dtype)
    cache = DynamicCache()
    for layer in range(3):
        both = [torch.stack([torch.zeros_like(x[layer]), x[layer]]).transpose(1, 2) for x in (k, v)]
        cache.update(both[0], both[1], layer)
    assert all(same_bits(a, b) for a, b in zip(cache_tensors(cache, row=1), (k, v), strict=True))
    codec = KVCodec.for_tensors(k, v, chunk_tokens=16)
    again = codec.decode_cache(codec.encode_cache(cache, level="lossless", row=1), into=DynamicCache())
    assert again.get_seq_length() == 40
    for layer in range(3):
        assert same_bits(again.layers[layer].keys[0], cache.layers[layer].keys[1])
        assert same_bits(again.layers[layer].values[0], cache.layers[layer].values[1])


def test_each_chunk_is_rotated_by_its_own_positions() -> None:
    layout = make_layout(1, 1)
    profile = make_profile(layout, needs_rope=True, step=0.01)
    rope = make_rope(100, 64)
    k, v = make_kv(layout, 60)
    codec = KVCodec(profile, rope=(rope.cos, rope.sin), chunk_tokens=32)
    k2, _ = codec.decode(codec.encode(k, v, level="q1", start=40), start=40)
    assert float((k2 - k).float().abs().max()) < 0.5
    shifted, _ = codec.decode(codec.encode(k, v, level="q1", start=40), start=0)
    assert float((shifted - k).float().abs().max()) > 1  # the test would notice wrong positions
    with pytest.raises(RopeRequired, match="101"):
        codec.encode(k, v, level="q1", start=41)


def test_what_is_not_kv_is_refused() -> None:
    k, v = make_kv(make_layout(2, 2), 8)
    with pytest.raises(CodecError, match="head_dim"):
        KVCodec.for_tensors(k[0], v[0])
    with pytest.raises(CodecError, match="no blob"):
        KVCodec.for_tensors(k, v).decode([])
    uneven = DynamicCache()
    uneven.update(torch.zeros(1, 2, 8, 64), torch.zeros(1, 2, 8, 64), 0)
    uneven.update(torch.zeros(1, 2, 4, 64), torch.zeros(1, 2, 4, 64), 1)
    with pytest.raises(CodecError, match="several shapes"):
        cache_tensors(uneven)
