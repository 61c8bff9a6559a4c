"""The readable reference that defines the stream, and the numba twins against it, seen through the codec's front door.

tests/parity/test_rans_stream.py compares the coders themselves, piece by piece.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from codec_cases import check_round_trip, make_kv, make_layout, make_profile, make_rope, same_bits
from hypothesis import given, settings
from hypothesis import strategies as st

from codec.anchor_delta import add_anchors, take_deltas
from codec.chunk import cut_chunk, decode_chunk, encode_chunk
from codec.entropy import CodeBook, bell_cuts, bell_table, cuts_of, normalize
from codec.levels import LevelKind
from codec.profile import default_profile
from codec.tensor_rows import DTYPES
from kernels import rans_decode_numba, rans_encode_numba
from kernels.rans_reference import (
    MAX_EXCEPTION,
    MAX_MAGNITUDE,
    MAX_SYMBOLS,
    PROB_SUM,
    Coding,
    Piece,
    StreamError,
    decode_segment,
    encode_segment,
    lanes_of,
    new_lanes,
    stages_of,
)

BACKENDS = ["reference", "numba"]
SPREADS = (0.3, 3.0, 40.0)
FREQS = np.stack([bell_table(s) for s in SPREADS])


def make_coding(rng: np.random.Generator, dim: int, group: int, active: list[int]) -> Coding:
    stages = len(active)
    cuts = np.zeros((stages - 1, len(SPREADS), 3, 2), np.int64)
    for stage in range(1, stages):
        cuts[stage - 1] = np.stack([bell_cuts(s, stage) for s in SPREADS])
    return Coding(
        freqs=FREQS, index=rng.integers(0, 3, (2, dim)), group=group, active=active, cuts=cuts,
        refine=rng.integers(0, 3, (stages - 1, dim)),
    )  # fmt: skip


def cut(coding: Coding, stages: int) -> Coding:
    return replace(
        coding, active=coding.active[:stages], cuts=coding.cuts[: stages - 1], refine=coding.refine[: stages - 1]
    )


@given(
    tokens=st.integers(1, 9), dim=st.sampled_from([1, 2, 15, 16, 17, 64, 80, 128, 130]), stages=st.integers(1, 6),
    group=st.sampled_from([0, 1, 2, 5]), full=st.booleans(),
    spread=st.sampled_from([0.1, 2.0, 60.0, 1e5]), seed=st.integers(0, 2**32 - 1),
)  # fmt: skip
@settings(max_examples=60)
def test_reference_segment_round_trips(  # type: ignore[no-untyped-def]
    tokens, dim, stages, group, full, spread, seed
) -> None:
    rng = np.random.default_rng(seed)
    q = np.clip(np.rint(rng.normal(0, spread, (tokens, dim))), -MAX_MAGNITUDE, MAX_MAGNITUDE).astype(np.int32)
    active = [dim] * stages if full else sorted(rng.integers(0, dim + 1, stages).tolist())
    coding = make_coding(rng, dim, group, active)
    pieces = encode_segment(q, coding)
    again = []
    for stage, piece in enumerate(pieces):
        words = piece.to_words()
        assert len(words) == 2 * len(new_lanes(coding, stage)) + len(piece.words) + 4 * len(piece.exceptions)
        assert all(0 <= word < 1 << 16 for word in words)
        again.append(
            Piece.from_words(words, num_states=len(new_lanes(coding, stage)), num_exceptions=len(piece.exceptions))
        )
        assert again[-1] == piece
        assert all(abs(value) <= MAX_EXCEPTION for _, value in piece.exceptions)
    assert sum(len(piece.states) for piece in pieces) == min(lanes_of(dim), active[-1])
    for kept, expected in enumerate(stages_of(q, stages), start=1):
        out = decode_segment(again[:kept], cut(coding, kept), tokens, is_whole=kept == stages)
        assert np.array_equal(out, expected), kept


def test_coarser_integers_are_the_nearest_thirds() -> None:
    q = np.array([np.arange(-MAX_MAGNITUDE, MAX_MAGNITUDE + 1, 17)])
    levels = stages_of(q, 5)
    for coarse, fine in pairwise(levels):
        assert np.abs(fine - 3 * coarse).max() <= 1
    assert np.array_equal(levels[0], np.rint(q / 81).astype(int))  # so a coarse value is what its own step would give


def test_reference_notices_damage() -> None:
    rng = np.random.default_rng(1)
    coding = make_coding(rng, 40, 0, [30, 40])
    q = rng.integers(-9, 9, (20, 40)).astype(np.int32)
    q[3, 5] = 70_000
    good = encode_segment(q, coding)
    assert len(good[0].exceptions) > 5
    at, value = good[0].exceptions[0]
    bad: list[tuple[int, Piece]] = []
    for stage, piece in enumerate(good):
        bad += [
            (stage, replace(piece, words=piece.words[:-1])),
            (stage, replace(piece, words=[*piece.words, 1])),
            (stage, replace(piece, words=[w ^ 0x100 for w in piece.words])),
        ]
    bad += [
        (0, replace(good[0], states=[*good[0].states[:-1], 5])),
        (0, replace(good[0], states=[s ^ 0x40000 for s in good[0].states])),
        (0, replace(good[0], states=good[0].states[:-1])),
        (0, replace(good[0], exceptions=[(at, value), *good[0].exceptions])),
        (0, replace(good[0], exceptions=good[0].exceptions[::-1])),
        (0, replace(good[0], exceptions=[(800, 1)])),
        (0, replace(good[0], exceptions=[(0, MAX_EXCEPTION + 1)])),
        (0, replace(good[0], exceptions=[(0, -MAX_EXCEPTION - 1)])),
    ]
    for stage, piece in bad:
        with pytest.raises((StreamError, ValueError)):
            decode_segment([piece if i == stage else p for i, p in enumerate(good)], coding, 20, is_whole=True)
    with pytest.raises(StreamError):  # a cut stream that is said to be whole
        decode_segment(good[:1], cut(coding, 1), 20, is_whole=True)


def test_tables_sum_and_are_small() -> None:
    for counts in (np.zeros(256), np.eye(256)[127], np.full(256, 7), np.geomspace(1, 1e9, 256), np.eye(256)[255]):
        freqs = normalize(counts)
        assert int(freqs.sum()) == PROB_SUM and 1 <= int((freqs > 0).sum()) <= MAX_SYMBOLS
        CodeBook(freqs=freqs[None])
    for row in ([0, 0, 0], [1, 0, 0], [0, 0, 1e9], [1, 1, 1], [0, 1e-9, 1]):
        (first, second) = cuts_of(np.array([row] * 3))[0]
        assert 0 < first < second < PROB_SUM


def chunk_of(dtype: torch.dtype, layers: int, heads: int, dims: tuple[int, int], tokens: int, seed: int):  # type: ignore[no-untyped-def]
    """Mostly plain values, some outliers."""
    k, v = make_kv(make_layout(layers, heads, *dims), tokens, seed=seed, dtype=torch.float32)
    k[..., -1] /= 20
    generator = torch.Generator().manual_seed(seed)
    for x in (k, v):
        x[torch.rand(x.shape, generator=generator) < 0.01] *= 300
    return k.to(dtype), v.to(dtype)


@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 6), st.integers(1, 3)),
    dims=st.sampled_from([(64, 64), (80, 48), (6, 1), (33, 128), (72, 64), (130, 16)]), stages=st.integers(3, 6),
    level=st.sampled_from(["lossless", "q1", "q2", "q3"]), with_rope=st.booleans(), calibrated=st.booleans(),
    matrices=st.booleans(), dtype=st.sampled_from(list(DTYPES)), seed=st.integers(0, 2**32 - 1), data=st.data(),
)  # fmt: skip
@settings(max_examples=50)
def test_backends_agree_on_bytes_and_values(  # type: ignore[no-untyped-def]
    shape, dims, stages, level, with_rope, calibrated, matrices, dtype, seed, data
) -> None:
    layers, tokens, heads = shape
    layout = make_layout(layers, heads, *dims)
    profile = (
        make_profile(
            layout, group=seed % 4, seed=seed % 7, matrices=matrices, stages=stages, unturned=seed % (layers + 1)
        )
        if calibrated
        else default_profile(layout)
    )
    k, v = chunk_of(dtype, layers, heads, dims, tokens, seed)
    rope = make_rope(tokens, dims[0] // 4 * 2 or 2, start=100) if with_rope else None
    blobs = [encode_chunk(k, v, level=level, profile=profile, rope=rope, backend=b) for b in BACKENDS]
    assert blobs[0] == blobs[1]
    outs = [decode_chunk(blobs[0], profile=profile, rope=rope, backend=b) for b in BACKENDS]
    assert same_bits(outs[0][0], outs[1][0]) and same_bits(outs[0][1], outs[1][1])
    layer, head = data.draw(st.integers(0, layers - 1)), data.draw(st.integers(0, heads - 1))
    part = {"layers": (layer, layers), "heads": (head, head + 1)}
    names = [lev.name for lev in profile.levels if lev.kind is LevelKind.QUANTIZED]
    coarser = level if level == "lossless" else data.draw(st.sampled_from(names[names.index(level) :]))
    small = cut_chunk(blobs[0], profile=profile, level=coarser)
    both = [decode_chunk(small, profile=profile, rope=rope, backend=b, **part) for b in BACKENDS]
    assert same_bits(both[0][0], both[1][0]) and same_bits(both[0][1], both[1][1])


@given(
    tokens=st.sampled_from([1, 2, 5]), dims=st.sampled_from([(64, 64), (72, 64), (16, 7)]),
    backend=st.sampled_from(BACKENDS), level=st.sampled_from(["raw", "lossless", "q1", "q3"]),
    dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32]), calibrated=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)  # fmt: skip
@settings(max_examples=40)
def test_both_backends_keep_the_bound(tokens, dims, backend, level, dtype, calibrated, seed) -> None:  # type: ignore[no-untyped-def]
    layout = make_layout(2, 1, *dims)
    profile = make_profile(layout, matrices=True, group=2, seed=seed % 5) if calibrated else default_profile(layout)
    k, v = chunk_of(dtype, 2, 1, dims, tokens, seed)
    rope = make_rope(tokens, dims[0] // 4 * 2, start=seed % 999)
    check_round_trip(k, v, level=level, profile=profile, rope=rope, backend=backend)


def test_quantized_values_at_the_edges_of_the_alphabet() -> None:
    layout = make_layout(1, 1, 64, 64)
    edges = np.zeros(64)
    edges[:15] = [0, 126, 127, 128, 129, -126, -127, -128, -129, 1000, -1000, 2**15, -(2**16), 2**20, -(2**20)]
    for stages in (1, 3):
        profile = make_profile(layout, group=4, stages=stages)
        plan = profile.lossy.k
        assert plan is not None
        centred = replace(plan, mean=np.zeros_like(plan.mean))
        profile = replace(profile, lossy=replace(profile.lossy, k=centred, v=centred))
        for multiple in (1, 3, 9):  # the edges of stages 2, 1 and 0
            q = np.clip(edges * multiple, -(2**20), 2**20)
            k = torch.from_numpy((q * plan.step[0, 0]).astype(np.float32)).to(torch.bfloat16)
            k = torch.stack([k, -k, k / 2, k, k]).view(1, 5, 1, 64)
            blobs = {encode_chunk(k, k, level="q1", profile=profile, rope=None, backend=b) for b in BACKENDS}
            assert len(blobs) == 1
            outs = [decode_chunk(next(iter(blobs)), profile=profile, rope=None, backend=b) for b in BACKENDS]
            assert same_bits(outs[0][0], outs[1][0]) and same_bits(outs[0][1], outs[1][1])
            error = (outs[0][0] - k).float().abs() / torch.from_numpy(plan.step[0, 0])
            assert bool((error <= 0.51 + 2.0**-7 * torch.from_numpy(np.abs(q))).all())


def test_constants_are_one_truth() -> None:
    from codec import decode, encode, reference

    assert encode.OK == decode.OK == reference.OK == rans_encode_numba.OK == rans_decode_numba.OK
    assert reference.VALUE_RANGE == rans_encode_numba.VALUE_RANGE
    assert encode.NO_ROOM == reference.NO_ROOM == rans_encode_numba.NO_ROOM


@given(tokens=st.integers(1, 20), group=st.integers(1, 7), seed=st.integers(0, 2**32 - 1))
@settings(max_examples=25)
def test_the_streams_deltas_are_the_step_that_is_described(tokens: int, group: int, seed: int) -> None:
    """codec/anchor_delta.py is the readable step; the stream has it built in, with tables of its own for deltas."""
    rng = np.random.default_rng(seed)
    q = np.rint(rng.normal(0, 4, (tokens, 20))).astype(np.int64)
    coding = make_coding(rng, 20, group, [20])
    alike = replace(coding, index=np.stack([coding.index[0]] * 2))  # deltas with the tables of anchors
    assert encode_segment(q, alike) == encode_segment(take_deltas(q, group), replace(alike, group=0))
    assert np.array_equal(add_anchors(take_deltas(q, group), group), q)
