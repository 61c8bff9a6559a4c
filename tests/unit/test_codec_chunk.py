"""Round trips, error bounds, and what an encoder refuses."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from codec_cases import MB, check_round_trip, make_kv, make_layout, make_profile, make_rope, same_bits
from hypothesis import given, settings
from hypothesis import strategies as st

from codec.chunk import decode_chunk, encode_chunk, inspect_blob, warmup
from codec.errors import CodecError, MalformedBlob, RopeRequired, UnencodableTensor, UnknownLevel
from codec.levels import LevelKind
from codec.profile import default_profile
from kernels import rans_numba

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


@given(
    layers=st.integers(1, 3), tokens=st.sampled_from([1, 2, 15, 63, 64, 257]), heads=st.integers(1, 3),
    dims=st.sampled_from([(64, 64), (128, 128), (80, 80), (192, 64), (5, 3)]),
    level=st.sampled_from(["raw", "lossless", "q1", "q2", "q3"]),
    calibrated=st.booleans(), with_rope=st.booleans(), dtype=st.sampled_from(DTYPES), seed=st.integers(0, 2**32 - 1),
)  # fmt: skip
@settings(max_examples=60)
def test_round_trip(layers, tokens, heads, dims, level, calibrated, with_rope, dtype, seed) -> None:  # type: ignore[no-untyped-def]
    layout = make_layout(layers, heads, *dims)
    profile = make_profile(layout) if calibrated else default_profile(layout)
    k, v = make_kv(layout, tokens, seed=seed, dtype=dtype)
    rope = make_rope(tokens, dims[0] // 4 * 2, start=seed % 3000) if with_rope else None
    blob = check_round_trip(k, v, level=level, profile=profile, rope=rope)
    info = inspect_blob(blob)
    assert (info.level, info.num_tokens, info.total_bytes) == (level, tokens, len(blob))
    assert info.layout == (layers, heads, *dims) and info.decoded_bytes == (k.numel() + v.numel()) * k.element_size()


HARD = {
    "zeros": lambda x: x.zero_(),
    "constant": lambda x: x.fill_(-3.3),
    "denormals": lambda x: x.fill_(1e-39),
    "one outlier": lambda x: x[0, 0, 0, 0].fill_(1000.0 * x.float().std()),
    "outlier channel": lambda x: x[..., 3].mul_(1000),
    "outlier token": lambda x: x[:, 0].mul_(1000),
    "half zero": lambda x: x[..., ::2].zero_(),
    "huge bias": lambda x: x[..., 5].add_(5000),
    "negative zero": lambda x: x.fill_(-0.0),
}


@pytest.mark.parametrize("calibrated", [False, True])
@pytest.mark.parametrize("name", HARD)
def test_hard_tensors_keep_the_bound(name: str, calibrated: bool) -> None:
    layout = make_layout(2, 2, 64, 64)
    profile = make_profile(layout) if calibrated else default_profile(layout)
    k, v = make_kv(layout, 37, seed=3)
    k[..., -1] /= 20
    HARD[name](k)
    HARD[name](v)
    for level in profile.level_names:
        check_round_trip(k, v, level=level, profile=profile, rope=make_rope(37, 64))


def test_lossless_carries_every_bf16_pattern() -> None:
    layout = make_layout(1, 2, 64, 64)
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).view(1, 512, 2, 64)
    for profile in (default_profile(layout), make_profile(layout)):
        for level in ("raw", "lossless"):
            check_round_trip(every, every.clone(), level=level, profile=profile, rope=None)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("calibrated", [False, True])
def test_not_finite_is_refused_by_name_at_lossy_levels(dtype: torch.dtype, bad: float, calibrated: bool) -> None:
    layout = make_layout(3, 2, 64, 64)
    profile = make_profile(layout) if calibrated else default_profile(layout)
    for which in ("K", "V"):
        k, v = make_kv(layout, 5, dtype=dtype)
        (k if which == "K" else v)[1, 2, 0, 7] = bad
        with pytest.raises(UnencodableTensor, match=f"{which} of layer 1 .*lossless"):
            encode_chunk(k, v, level="q2", profile=profile, rope=make_rope(5, 64))
        for level in ("raw", "lossless"):
            check_round_trip(k, v, level=level, profile=profile, rope=None)


def test_magnitudes_beyond_the_alphabets_reach_are_refused() -> None:
    layout = make_layout(2, 1, 64, 64)
    k, v = make_kv(layout, 4)
    v[1, 0, 0, 0] = 3e38
    with pytest.raises(UnencodableTensor, match=r"V of layer 1 .*steps of level q1"):
        encode_chunk(k, v, level="q1", profile=make_profile(layout), rope=None)


@pytest.mark.parametrize("level", ["raw", "lossless", "q1"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_any_strides_in_and_out(level: str, dtype: torch.dtype) -> None:
    layout = make_layout(2, 2, 64, 64)
    profile = make_profile(layout)
    k, v = make_kv(layout, 12, dtype=dtype)
    plain = encode_chunk(k, v, level=level, profile=profile, rope=None)
    turned = [x.permute(2, 0, 3, 1).contiguous().permute(1, 3, 0, 2) for x in (k, v)]
    pool = [torch.zeros(2, 40, 2, 64, dtype=dtype)[:, 5:29:2] for _ in "kv"]
    heads_first = [torch.zeros(2, 2, 12, 64, dtype=dtype).transpose(1, 2) for _ in "kv"]
    for kv in (
        turned,
        [p.copy_(x) for p, x in zip(pool, (k, v))],
        [h.copy_(x) for h, x in zip(heads_first, (k, v))],
    ):
        assert encode_chunk(*kv, level=level, profile=profile, rope=None) == plain
    expected = decode_chunk(plain, profile=profile, rope=None)
    for out in (tuple(turned), tuple(pool), tuple(heads_first)):
        for x in out:
            x.fill_(float("nan"))
        got = decode_chunk(plain, profile=profile, rope=None, out=out)
        assert got[0] is out[0] and all(same_bits(a, b) for a, b in zip(got, expected))


def test_encoding_a_decoded_chunk_again_gives_the_same_bytes() -> None:
    """Holds for values within the alphabet; SPEC.md says where it need not."""
    layout = make_layout(2, 2, 64, 64)
    profile = make_profile(layout)
    k, v = make_kv(layout, 64)
    k[..., -1] /= 20
    for rope in (None, make_rope(64, 64, start=500)):
        for level in ("raw", "lossless", "q2", "q3"):
            first = encode_chunk(k, v, level=level, profile=profile, rope=rope)
            once = decode_chunk(first, profile=profile, rope=rope)
            assert encode_chunk(*once, level=level, profile=profile, rope=rope) == first


def test_levels_shrink_and_lossless_shrinks_too() -> None:
    layout = make_layout(4, 2, 64, 64)
    for profile in (make_profile(layout), default_profile(layout)):
        k, v = make_kv(layout, 256)
        k[..., -1] /= 20
        sizes = [
            len(encode_chunk(k, v, level=n, profile=profile, rope=make_rope(256, 64))) for n in profile.level_names
        ]
        assert sizes == sorted(sizes, reverse=True)
        assert sizes[0] < (k.numel() + v.numel()) * 2 + 100
        assert [profile.level(n).kind for n in profile.level_names[:2]] == [LevelKind.RAW, LevelKind.LOSSLESS]


def test_what_the_caller_gets_wrong() -> None:
    layout = make_layout(2, 2, 64, 64)
    profile = make_profile(layout, needs_rope=True)
    k, v = make_kv(layout, 8)
    rope = make_rope(8, 64)
    with pytest.raises(UnknownLevel, match="q9.*raw, lossless, q1"):
        encode_chunk(k, v, level="q9", profile=profile, rope=rope)
    for bad in (None, make_rope(7, 64), make_rope(8, 66)):
        with pytest.raises(RopeRequired):
            encode_chunk(k, v, level="q1", profile=profile, rope=bad)
    for bad_k in (k[:1], k[:, :0], k[:, :7], k[:, :, :1], k[..., :32], k[0], k.double(), k.to("meta")):
        with pytest.raises(UnencodableTensor):
            encode_chunk(bad_k, v, level="q1", profile=profile, rope=rope)
    blob = encode_chunk(k, v, level="q1", profile=profile, rope=rope)
    with pytest.raises(RopeRequired):
        decode_chunk(blob, profile=profile, rope=None)
    with pytest.raises(CodecError, match="out for V"):
        decode_chunk(blob, profile=profile, rope=rope, out=(k, v[:, :, :, :5]))
    for out in ((k, v[:, :5]), (k.float(), v.float())):
        with pytest.raises(MalformedBlob, match="8 tokens of bfloat16"):
            decode_chunk(blob, profile=profile, rope=rope, out=out)
    with pytest.raises(MalformedBlob, match="8 tokens, 9 were expected"):
        decode_chunk(blob, profile=profile, rope=make_rope(9, 64))
    assert len(blob) < MB


def test_threads_do_not_disturb_each_other() -> None:
    layout = make_layout(3, 2, 64, 64)
    profile = make_profile(layout)
    k, v = make_kv(layout, 128)
    rope = make_rope(128, 64)
    blobs = [encode_chunk(k, v, level=name, profile=profile, rope=rope) for name in profile.level_names] * 4
    alone = [decode_chunk(blob, profile=profile, rope=rope) for blob in blobs]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda blob: decode_chunk(blob, profile=profile, rope=rope), blobs))
    assert all(same_bits(a, b) for one, two in zip(alone, together) for a, b in zip(one, two))


def test_warmup_compiles_all_that_serving_needs() -> None:
    """A second compilation in mid-request would stall it for seconds."""
    layout = make_layout(2, 2, 64, 64)
    rope = make_rope(24, 64)
    k, v = make_kv(layout, 24)
    pages = [torch.zeros(2, 3, 16, 2, 64, dtype=torch.bfloat16).view(2, 48, 2, 64)[:, 8:32] for _ in "kv"]
    kernels = (
        rans_numba.encode_quantized, rans_numba.decode_quantized, rans_numba.encode_lossless,
        rans_numba.decode_lossless, rans_numba.choose_tables,
    )  # fmt: skip
    for profile in (make_profile(layout), default_profile(layout)):
        warmup(profile)
    compiled = [len(kernel.signatures) for kernel in kernels]
    for profile in (make_profile(layout), default_profile(layout)):
        for level in profile.level_names:
            for kv in ((k, v), [p.copy_(x) for p, x in zip(pages, (k, v))]):
                blob = encode_chunk(*kv, level=level, profile=profile, rope=rope)
                for form in (blob, bytearray(blob), memoryview(b"." + blob)[1:]):
                    for out in (None, tuple(pages)):
                        decode_chunk(form, profile=profile, rope=rope, out=out)
    assert [len(kernel.signatures) for kernel in kernels] == compiled == [1] * len(kernels)
