"""One test body over every backend: the numba twins against the reference that defines the stream."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from codec_cases import make_kv, make_layout, make_profile, make_rope, same_bits
from hypothesis import given, settings
from hypothesis import strategies as st

from codec.anchor_delta import add_anchors, take_deltas
from codec.chunk import decode_chunk, encode_chunk
from codec.entropy import CodeBook, laplace_table, normalize
from codec.profile import default_profile
from kernels import rans_decode_numba, rans_encode_numba
from kernels.rans_reference import (
    ESCAPE,
    LANES,
    MAX_MAGNITUDE,
    Segment,
    StreamError,
    decode_segment,
    encode_segment,
)

BACKENDS = ["reference", "numba"]


@given(
    tokens=st.integers(1, 9), dim=st.sampled_from([1, 2, LANES - 1, LANES, LANES + 1, 64, 80]),
    group=st.sampled_from([0, 1, 2, 5]),
    spread=st.sampled_from([0.1, 2.0, 60.0, 1e5]), seed=st.integers(0, 2**32 - 1),
)  # fmt: skip
@settings(max_examples=40)
def test_reference_segment_round_trips(tokens: int, dim: int, group: int, spread: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    q = np.clip(np.rint(rng.normal(0, spread, (tokens, dim))), -MAX_MAGNITUDE, MAX_MAGNITUDE).astype(np.int32)
    book = CodeBook(freqs=np.stack([laplace_table(s) for s in (0.3, 3.0, 40.0)]))
    index = rng.integers(0, 3, (2, dim)).astype(np.uint8)
    coded = encode_segment(take_deltas(q, group), book.freqs, index, group)
    words = coded.to_words()
    assert len(words) == 2 * min(LANES, dim) + len(coded.words) + 2 * len(coded.escapes)
    again = Segment.from_words(words, num_dims=dim, num_words=len(coded.words), num_escapes=len(coded.escapes))
    assert again == coded
    out = decode_segment(again, book.freqs, index, group, (tokens, dim))
    assert np.array_equal(add_anchors(out, group), q)


def test_reference_notices_damage() -> None:
    book = CodeBook(freqs=laplace_table(3.0)[None])
    index = np.zeros((2, 40), np.uint8)
    q = np.random.default_rng(1).integers(-9, 9, (20, 40)).astype(np.int32)
    good = encode_segment(q, book.freqs, index, 0)
    for bad in (
        Segment(states=good.states, words=good.words[:-1], escapes=good.escapes),
        Segment(states=good.states, words=[*good.words, 1], escapes=good.escapes),
        Segment(states=good.states, words=good.words, escapes=[*good.escapes, 1]),
        Segment(states=[*good.states[:-1], 5], words=good.words, escapes=good.escapes),
        Segment(states=[s ^ 0x40000 for s in good.states], words=good.words, escapes=good.escapes),
    ):
        with pytest.raises(StreamError):
            decode_segment(bad, book.freqs, index, 0, (20, 40))


def test_tables_sum_and_keep_the_escape() -> None:
    for counts in (
        np.zeros(256),
        np.eye(256)[127],
        np.full(256, 7),
        np.geomspace(1, 1e9, 256),
        np.eye(256)[ESCAPE],
    ):
        freqs = normalize(counts)
        assert int(freqs.sum()) == 4096 and freqs[ESCAPE] >= 1
        CodeBook(freqs=freqs[None])


@given(
    shape=st.tuples(st.integers(1, 2), st.integers(1, 6), st.integers(1, 2)),
    dims=st.sampled_from([(64, 64), (80, 48), (6, 1), (33, 128)]),
    level=st.sampled_from(["lossless", "q1", "q3"]), with_rope=st.booleans(), calibrated=st.booleans(),
    dtype=st.sampled_from([torch.bfloat16, torch.float32]), seed=st.integers(0, 2**32 - 1),
)  # fmt: skip
@settings(max_examples=30)
def test_backends_agree_on_bytes_and_values(shape, dims, level, with_rope, calibrated, dtype, seed) -> None:  # type: ignore[no-untyped-def]
    layers, tokens, heads = shape
    layout = make_layout(layers, heads, *dims)
    profile = make_profile(layout, group=2, seed=seed % 7) if calibrated else default_profile(layout)
    k, v = make_kv(layout, tokens, seed=seed, dtype=dtype)
    rope = make_rope(tokens, dims[0] // 4 * 2 or 2, start=100) if with_rope else None
    blobs = [encode_chunk(k, v, level=level, profile=profile, rope=rope, backend=b) for b in BACKENDS]
    assert blobs[0] == blobs[1]
    outs = [decode_chunk(blobs[0], profile=profile, rope=rope, backend=b) for b in BACKENDS]
    assert same_bits(outs[0][0], outs[1][0]) and same_bits(outs[0][1], outs[1][1])


def test_quantized_values_at_the_edges_of_the_alphabet() -> None:
    layout = make_layout(1, 1, 64, 64)
    profile = make_profile(layout, group=4)
    step = float(profile.level("q2").k.step[0, 0])
    edges = np.array([0, 126, 127, 128, 129, -126, -127, -128, 1000, -1000, 2**15, -(2**16)])
    k = torch.from_numpy(profile.mean_k[0, 0][None, :12] + edges * step).to(torch.bfloat16)
    k = torch.cat([k, torch.zeros(1, 52, dtype=torch.bfloat16)], dim=1).view(1, 1, 1, 64).repeat(1, 5, 1, 1)
    for rope in (None, make_rope(5, 64)):
        blobs = {encode_chunk(k, k, level="q2", profile=profile, rope=rope, backend=b) for b in BACKENDS}
        assert len(blobs) == 1
        outs = [decode_chunk(next(iter(blobs)), profile=profile, rope=rope, backend=b) for b in BACKENDS]
        assert same_bits(outs[0][0], outs[1][0]) and same_bits(outs[0][1], outs[1][1])


def test_constants_are_one_truth() -> None:
    from codec import decode, encode, reference

    assert encode.OK == decode.OK == reference.OK == rans_encode_numba.OK == rans_decode_numba.OK
    assert reference.VALUE_RANGE == rans_encode_numba.VALUE_RANGE
