"""The numba coders against the stream's definition: the same bytes, the same values, and no damage crashes them."""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from codec.quantize import bf16_to_float, float_to_bf16
from kernels import rans_numba
from kernels.rans_reference import (
    MAX_EXCEPTION,
    NUM_VALUES,
    PROB_SUM,
    VALUE_LOW,
    Coding,
    Piece,
    StreamError,
    decode_segment,
    encode_segment,
    new_lanes,
    standin_of,
    starts_of,
)

DIMS = [1, 2, 15, 16, 17, 31, 33, 64, 80, 128, 130]
NUM_TABLES = 3


def random_table(rng: np.random.Generator) -> np.ndarray:
    """Frequencies [256] of 1 to 64 integers."""
    keep = rng.integers(1, 65)
    low = rng.integers(0, NUM_VALUES - keep + 1)
    weights = rng.dirichlet(np.full(keep, rng.choice([0.05, 1.0])))
    freqs = np.zeros(NUM_VALUES, np.int64)
    freqs[low : low + keep] = 1 + np.floor(weights * (PROB_SUM - keep))
    freqs[low + rng.integers(keep)] += PROB_SUM - freqs.sum()
    return freqs


def random_cuts(rng: np.random.Generator, stages: int) -> np.ndarray:
    cuts = np.sort(rng.integers(1, PROB_SUM - 1, (stages, NUM_TABLES, 3, 2)), axis=-1)
    cuts[..., 1] += cuts[..., 0] == cuts[..., 1]
    extremes = rng.choice(3, (stages, NUM_TABLES, 3), p=[0.6, 0.2, 0.2])
    cuts[extremes == 1] = (1, PROB_SUM - 1)
    cuts[extremes == 2] = (1, 2)
    return cuts


@dataclass(frozen=True, slots=True)
class Case:
    """Random segments with all that a profile would say about them, and the arrays the coders take."""

    q: np.ndarray  # [S, T, D], bf16 numbers
    codings: list[Coding]
    lut: np.ndarray
    enc: np.ndarray
    standin: np.ndarray
    base_index: np.ndarray
    group: np.ndarray
    cuts: np.ndarray
    refine_index: np.ndarray
    active: np.ndarray

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return len(self.active), *self.q.shape


def make_case(seed: int, segments: int, tokens: int, dims: int, stages: int, prefix: bool) -> Case:
    rng = np.random.default_rng(seed)
    freqs = np.stack([random_table(rng) for _ in range(NUM_TABLES)])
    cuts = random_cuts(rng, stages - 1)
    base_index = rng.integers(0, NUM_TABLES, (segments, 2, dims)).astype(np.uint8)
    refine_index = rng.integers(0, NUM_TABLES, (stages - 1, segments, dims)).astype(np.uint8)
    group = rng.choice([0, 1, 2, 5, 16], segments).astype(np.int64)
    active = np.full((stages, segments), dims, np.int64)
    if prefix:
        active = np.sort(rng.integers(0, dims + 1, (stages, segments)), axis=0).astype(np.int64)
    spread = rng.choice([0.3, 2.0, 100.0, 3e4, 3e5], (segments, tokens, dims), p=[0.4, 0.3, 0.2, 0.05, 0.05])
    q = np.clip(rng.normal(0, spread), -(2**20), 2**20)
    q = np.rint(bf16_to_float(float_to_bf16(np.rint(q)))).astype(np.int64)
    wide = freqs.astype(np.int64)
    starts = starts_of(wide)
    value = np.concatenate([np.repeat(np.arange(NUM_VALUES), row) for row in wide])
    table = np.repeat(np.arange(NUM_TABLES), PROB_SUM)
    slot = np.tile(np.arange(PROB_SUM), NUM_TABLES)
    return Case(
        q=q,
        codings=[
            Coding(
                freqs=freqs, index=base_index[s], group=int(group[s]), active=[int(a) for a in active[:, s]],
                cuts=cuts, refine=refine_index[:, s],
            )
            for s in range(segments)
        ],
        lut=(value << 21 | wide[table, value] << 10 | (slot - starts[table, value])).astype(np.uint32),
        enc=(wide << 16 | starts).astype(np.uint32).ravel(),
        standin=standin_of(wide).astype(np.int64),
        base_index=base_index,
        group=group,
        cuts=(cuts[..., 0] | cuts[..., 1] << 16).astype(np.uint32),
        refine_index=refine_index,
        active=active,
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Coded:
    """Pieces of a case, [stage][segment]."""

    words: list[list[np.ndarray]]
    exceptions: np.ndarray


def plain_arguments(case: Case) -> dict[str, np.ndarray]:
    _, segments, tokens, dims = case.shape
    return {
        "src": float_to_bf16(case.q.astype(np.float32)).ravel(),
        "mean": np.zeros((segments, dims), np.float32),
        "one": np.ones((segments, dims), np.float32),
        "matrix": np.full(segments, -1, np.int64),
        "matrices": np.zeros((0, dims, dims), np.float32),
        "turned": np.zeros(segments, np.uint8),
        "turn": np.zeros((tokens, 0), np.float32),
        "at": np.arange(segments, dtype=np.int64) * tokens * dims,
    }


def encode(case: Case, side_words: int = 0, room: int | None = None) -> tuple[int, Coded]:
    stages, segments, tokens, dims = case.shape
    p = plain_arguments(case)
    side = np.arange(segments * side_words, dtype=np.uint16).reshape(segments, side_words)
    room = segments * (6 * tokens * dims + 64 + side_words) if room is None else room
    out = np.zeros((stages, room), np.uint16)
    sizes, exceptions = np.zeros((stages, segments), np.int64), np.zeros((stages, segments), np.int64)
    code, _ = rans_numba.encode_quantized(
        p["src"], p["at"], dims, p["turn"], p["turn"], p["turned"], p["mean"], p["one"], p["matrix"], p["matrices"], 0,
        case.group, case.enc, case.standin, case.base_index, case.cuts, case.refine_index, case.active, side, out,
        sizes, exceptions,
    )  # fmt: skip
    words = [np.split(out[k], np.cumsum(sizes[k]))[:segments] for k in range(stages)]
    return int(code), Coded(words=words, exceptions=exceptions)


def decode(case: Case, coded: Coded, stages: int, *, is_whole: bool = True) -> tuple[int, np.ndarray]:
    _, segments, tokens, dims = case.shape
    p = plain_arguments(case)
    sizes = np.array([[len(piece) for piece in row] for row in coded.words[:stages]], np.int64)
    pos = (np.cumsum(sizes) - sizes.ravel()).reshape(sizes.shape)
    out = np.zeros(segments * tokens * dims, np.uint16)
    code, _ = rans_numba.decode_quantized(
        np.concatenate([piece for row in coded.words[:stages] for piece in row]), pos, sizes,
        np.ascontiguousarray(coded.exceptions[:stages]), case.lut, case.base_index, case.group, case.cuts[: stages - 1],
        case.refine_index[: stages - 1], case.active[:stages], is_whole, 1, p["one"], p["mean"], p["matrix"],
        p["matrices"], p["turned"], p["turn"], p["turn"], out, p["at"], dims,
    )  # fmt: skip
    return int(code), out.reshape(segments, tokens, dims)


def reference_pieces(case: Case) -> list[list[Piece]]:
    return [encode_segment(case.q[s], case.codings[s]) for s in range(len(case.q))]


cases = st.builds(
    make_case, seed=st.integers(0, 2**32 - 1), segments=st.integers(1, 6), tokens=st.integers(1, 40),
    dims=st.sampled_from(DIMS), stages=st.integers(1, 5), prefix=st.booleans(),
)  # fmt: skip
small_cases = st.builds(
    make_case, seed=st.integers(0, 2**32 - 1), segments=st.integers(1, 5), tokens=st.integers(1, 9),
    dims=st.sampled_from(DIMS), stages=st.integers(1, 4), prefix=st.booleans(),
)  # fmt: skip


@given(case=cases)
@settings(max_examples=60)
def test_same_pieces_as_the_reference(case: Case) -> None:
    code, coded = encode(case)
    assert code == rans_numba.OK
    for s, pieces in enumerate(reference_pieces(case)):
        for k, piece in enumerate(pieces):
            assert coded.words[k][s].tolist() == piece.to_words(), (k, s)
            assert coded.exceptions[k, s] == len(piece.exceptions)


@given(case=cases, data=st.data())
@settings(max_examples=60)
def test_same_integers_as_the_reference_at_every_cut(case: Case, data: st.DataObject) -> None:
    stages = data.draw(st.integers(1, len(case.active)))
    is_whole = stages == len(case.active)
    _, coded = encode(case)
    code, out = decode(case, coded, stages, is_whole=is_whole)
    assert code == rans_numba.OK
    for s, pieces in enumerate(reference_pieces(case)):
        coding = case.codings[s]
        cut = Coding(
            freqs=coding.freqs, index=coding.index, group=coding.group, active=coding.active[:stages],
            cuts=coding.cuts[: stages - 1], refine=coding.refine[: stages - 1],
        )  # fmt: skip
        q = decode_segment(pieces[:stages], cut, case.q.shape[1], is_whole=is_whole)
        assert np.array_equal(out[s], float_to_bf16(q.astype(np.float32)))


@given(case=small_cases, data=st.data())
@settings(max_examples=150)
def test_damage_is_noticed_or_decodes_as_the_reference_does(case: Case, data: st.DataObject) -> None:
    """Random words, cut or flipped ones, exceptions counted wrong: a code, or what the reference makes of it."""
    stages, segments, tokens, _ = case.shape
    _, coded = encode(case)
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    k, s = data.draw(st.integers(0, stages - 1)), data.draw(st.integers(0, segments - 1))
    piece = coded.words[k][s].copy()
    kind = data.draw(st.sampled_from(["flip", "cut", "longer", "random", "count"]))
    if kind == "flip" and piece.size:
        piece[rng.integers(piece.size)] ^= 1 << rng.integers(16)
    elif kind == "cut":
        piece = piece[: rng.integers(piece.size + 1)]
    elif kind == "longer":
        piece = np.append(piece, rng.integers(0, 1 << 16, rng.integers(1, 20)).astype(np.uint16))
    elif kind == "random":
        piece = rng.integers(0, 1 << 16, piece.size).astype(np.uint16)
    elif kind == "count":
        coded.exceptions[k, s] = rng.choice([0, coded.exceptions[k, s] + 1, 1 << 31])
    coded.words[k][s] = piece
    code, out = decode(case, coded, stages)
    for each in range(segments):
        coding = case.codings[each]
        try:
            pieces = [
                Piece.from_words(
                    coded.words[j][each].tolist(), num_states=len(new_lanes(coding, j)),
                    num_exceptions=int(coded.exceptions[j, each]),
                )
                for j in range(stages)
            ]  # fmt: skip
            q = decode_segment(pieces, coding, tokens, is_whole=True)
        except StreamError:
            assert code != rans_numba.OK
            return
        if code == rans_numba.OK:
            assert np.array_equal(out[each], float_to_bf16(q.astype(np.float32)))
    assert code == rans_numba.OK


def test_positions_outside_the_words_are_refused() -> None:
    case = make_case(5, 2, 4, 33, 1, False)
    _, coded = encode(case)
    p = plain_arguments(case)
    words = np.concatenate(coded.words[0])
    out = np.zeros(case.q.size, np.uint16)
    for pos, size in ((-1, 100), (0, words.size + 1), (words.size, 40), (1 << 40, 40), (0, -5), (0, 1 << 62)):
        code, _ = rans_numba.decode_quantized(
            words, np.full((1, 2), pos), np.full((1, 2), size), coded.exceptions, case.lut, case.base_index, case.group,
            case.cuts, case.refine_index, case.active, True, 1, p["one"], p["mean"], p["matrix"], p["matrices"],
            p["turned"], p["turn"], p["turn"], out, p["at"], 33,
        )  # fmt: skip
        assert code != rans_numba.OK


@pytest.mark.parametrize("value", [MAX_EXCEPTION + 1, -MAX_EXCEPTION - 1, 1 << 31])
def test_absurd_exceptions_are_refused(value: int) -> None:
    case = make_case(5, 1, 4, 33, 2, False)
    _, coded = encode(case)
    extra = [3, 0, value & 0xFFFF, (value >> 16) & 0xFFFF]
    piece = coded.words[1][0]
    coded.words[1][0] = np.append(piece, np.array(extra, np.uint16))
    coded.exceptions[1, 0] = 1
    assert decode(case, coded, 2)[0] == rans_numba.EXCEPTIONS


def test_the_encoder_says_when_there_is_no_room() -> None:
    case = make_case(7, 3, 20, 33, 3, True)
    _, coded = encode(case, side_words=3)
    need = max(sum(len(piece) for piece in row) for row in coded.words)
    assert encode(case, side_words=3, room=need)[0] == rans_numba.OK
    for room in (need - 1, need // 2, 1, 0):
        assert encode(case, side_words=3, room=room)[0] == rans_numba.NO_ROOM


def ordered_product(y: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    out = np.zeros_like(y)
    for j in range(y.shape[1]):
        out = out + y[:, j : j + 1] * matrix[j]
    return out


def turn(x: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> np.ndarray:
    half = cos.shape[1]
    a, b = x[:, :half], x[:, half : 2 * half]
    return np.concatenate([a * cos - b * sin, b * cos + a * sin, x[:, 2 * half :]], axis=1)


@given(
    case=small_cases, multiplier=st.sampled_from([1, 3, 27]), coarser=st.integers(0, 2), seed=st.integers(0, 2**32 - 1),
    rotary=st.sampled_from([0.0, 0.5, 1.0]), pad=st.integers(0, 5),
)  # fmt: skip
@settings(max_examples=80)
def test_transforms_are_exactly_numpys(
    case: Case, multiplier: int, coarser: int, seed: int, rotary: float, pad: int
) -> None:
    """Means, steps, matrices, rotation and rounding around the coder: bit for bit what numpy does in order."""
    stages, segments, tokens, dims = case.shape
    rng = np.random.default_rng(seed)
    half = int(dims // 2 * rotary)

    def bf16(shape: tuple[int, ...], scale: float) -> np.ndarray:
        return bf16_to_float(float_to_bf16(rng.normal(0, scale, shape).astype(np.float32)))

    mean, step = bf16((segments, dims), 3.0), np.abs(bf16((segments, dims), 0.2)) + np.float32(2.0**-6)
    step = bf16_to_float(float_to_bf16(step))
    matrix = rng.integers(-1, 2, segments).astype(np.int64)
    both = rng.normal(0, 0.3, (2, dims, dims)).astype(np.float32)
    angle = rng.uniform(0, 6, (tokens, half))
    cos, sin = np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)
    turned = rng.integers(0, 2, segments).astype(np.uint8)
    stride = segments * dims + pad
    src = float_to_bf16(rng.normal(0, 5, tokens * stride).astype(np.float32))
    at = np.arange(segments, dtype=np.int64) * dims
    inv_step = np.float32(1) / step

    expected = []
    for s in range(segments):
        x = bf16_to_float(np.stack([src[at[s] + t * stride :][:dims] for t in range(tokens)]))
        x = turn(x, cos, -sin) if turned[s] else x
        y = x - mean[s]
        y = ordered_product(y, both[matrix[s]]) if matrix[s] >= 0 else y
        q = np.rint(y * inv_step[s]).astype(np.int64)
        for _ in range(coarser):
            q = (q + 1) // 3
        expected.append(q)

    out = np.zeros((stages, segments * (6 * tokens * dims + 64)), np.uint16)
    sizes, exceptions = np.zeros((stages, segments), np.int64), np.zeros((stages, segments), np.int64)
    code, _ = rans_numba.encode_quantized(
        src, at, stride, cos, sin, turned, mean, inv_step, matrix, both, coarser, case.group, case.enc, case.standin,
        case.base_index, case.cuts, case.refine_index, case.active, np.zeros((segments, 0), np.uint16), out, sizes,
        exceptions,
    )  # fmt: skip
    assert code == rans_numba.OK
    ends = np.cumsum(sizes, axis=1)
    for s in range(segments):
        for k, piece in enumerate(encode_segment(expected[s], case.codings[s])):
            assert out[k, ends[k, s] - sizes[k, s] : ends[k, s]].tolist() == piece.to_words()

    pos = ends - sizes + np.arange(stages)[:, None] * out.shape[1]
    got = np.full(tokens * stride, 7, np.uint16)
    code, _ = rans_numba.decode_quantized(
        out.ravel(), pos, sizes, exceptions, case.lut, case.base_index, case.group, case.cuts, case.refine_index,
        case.active, True, multiplier, step, mean, matrix, both, turned, cos, sin, got, at, stride,
    )  # fmt: skip
    assert code == rans_numba.OK
    rows = np.full((tokens, stride), 7, np.uint16)
    for s in range(segments):
        y = (expected[s] * multiplier).astype(np.int32).astype(np.float32) * step[s]
        y = ordered_product(y, both[matrix[s]]) if matrix[s] >= 0 else y
        x = y + mean[s]
        x = turn(x, cos, sin) if turned[s] else x
        rows[:, at[s] : at[s] + dims] = float_to_bf16(x)
    assert np.array_equal(got.reshape(tokens, stride), rows)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1.5 * 2**20, -3e38])
def test_values_that_cannot_be_coded_are_refused(bad: float) -> None:
    case = make_case(9, 5, 6, 17, 2, False)
    p = plain_arguments(case)
    src = p["src"].copy()
    src[4 * 6 * 17 + 50] = np.float32(bad).view(np.uint32) >> 16
    out = np.zeros((2, 1 << 14), np.uint16)
    for matrix in (-1, 0):
        code, segment = rans_numba.encode_quantized(
            src, p["at"], 17, p["turn"], p["turn"], p["turned"], p["mean"], p["one"], np.full(5, matrix),
            np.eye(17, dtype=np.float32)[None], 0, case.group, case.enc, case.standin, case.base_index, case.cuts,
            case.refine_index, case.active, np.zeros((5, 0), np.uint16), out, np.zeros((2, 5), np.int64),
            np.zeros((2, 5), np.int64),
        )  # fmt: skip
        assert (code, segment) == (rans_numba.VALUE_RANGE, 4)


@given(case=small_cases, data=st.data())
@settings(max_examples=60)
def test_bytes_are_the_references(case: Case, data: st.DataObject) -> None:
    _, segments, tokens, dims = case.shape
    coded = (np.clip(case.q, VALUE_LOW, -VALUE_LOW - 1) - VALUE_LOW).astype(np.uint8)
    index = np.ascontiguousarray(case.base_index[:, 0])
    out = np.zeros(segments * (6 * tokens * dims + 64), np.uint16)
    sizes, exceptions = np.zeros(segments, np.int64), np.zeros(segments, np.int64)
    code, _ = rans_numba.encode_bytes(coded, case.enc, case.standin, index, out, sizes, exceptions)
    assert code == rans_numba.OK
    pos = np.cumsum(sizes) - sizes
    for s in range(segments):
        coding = Coding(
            freqs=case.codings[s].freqs, index=case.base_index[s], group=0, active=[dims],
            cuts=case.codings[s].cuts[:0], refine=case.codings[s].refine[:0],
        )  # fmt: skip
        (piece,) = encode_segment(coded[s].astype(np.int64) + VALUE_LOW, coding)
        assert out[pos[s] : pos[s] + sizes[s]].tolist() == piece.to_words()
    used = out[: sizes.sum()].copy()
    again = np.zeros_like(coded)
    assert rans_numba.decode_bytes(used, pos, sizes, exceptions, case.lut, index, again)[0] == rans_numba.OK
    assert np.array_equal(again, coded)
    assert (
        rans_numba.encode_bytes(coded, case.enc, case.standin, index, out[: used.size - 1], sizes, exceptions)[0]
        == rans_numba.NO_ROOM
    )
    for _ in range(5):
        damaged = used.copy()
        damaged[data.draw(st.integers(0, used.size - 1))] ^= 1 << data.draw(st.integers(0, 15))
        rans_numba.decode_bytes(damaged, pos, sizes, exceptions, case.lut, index, again)
    assert rans_numba.decode_bytes(used[:-1], pos, sizes, exceptions, case.lut, index, again)[0] != rans_numba.OK


def test_an_exception_that_is_no_byte_is_refused() -> None:
    case = make_case(5, 1, 4, 16, 1, False)
    symbol = int(case.standin[case.base_index[0, 0, 0]]) - VALUE_LOW
    coded = np.full((1, 4, 16), symbol, np.uint8)
    index = np.ascontiguousarray(case.base_index[:, 0])
    out = np.zeros(1000, np.uint16)
    sizes, exceptions = np.zeros(1, np.int64), np.zeros(1, np.int64)
    rans_numba.encode_bytes(coded, case.enc, case.standin, index, out, sizes, exceptions)
    n = int(sizes[0])
    words = np.append(out[: n - 4 * exceptions[0]], np.array([0, 0, 128, 0], np.uint16))
    sizes[0], exceptions[0] = words.size, 1
    zero = np.zeros(1, np.int64)
    code, _ = rans_numba.decode_bytes(words, zero, sizes, exceptions, case.lut, index, coded)
    assert code == rans_numba.EXCEPTIONS


def test_bf16_splits_and_joins() -> None:
    src = np.random.default_rng(1).integers(0, 1 << 16, 5 * 70).astype(np.uint16)
    pos = np.array([1, 33], np.int64)
    coded, plane = np.zeros((2, 5, 30), np.uint8), np.zeros((2, 5, 30), np.uint8)
    rans_numba.split_bf16(src, pos, 70, coded, plane)
    first = src.reshape(5, 70)[:, 1:31]
    assert np.array_equal(coded[0], (first >> 7) & 0xFF)
    assert np.array_equal(plane[0], (first >> 8) & 0x80 | first & 0x7F)
    out = src.copy()
    out.reshape(5, 70)[:, 1:63] = 0
    out.reshape(5, 70)[:, 31:33] = src.reshape(5, 70)[:, 31:33]
    rans_numba.join_bf16(coded, plane, out, pos, 70)
    assert np.array_equal(out, src)


def fingerprint() -> str:
    """Of what some cases are coded to and decoded to."""
    digest = hashlib.sha256()
    for seed, dims in ((1, 33), (2, 130)):
        case = make_case(seed, 5, 12, dims, 3, True)
        _, coded = encode(case)
        for row in coded.words:
            for piece in row:
                digest.update(piece.tobytes())
        digest.update(decode(case, coded, 3)[1].tobytes())
    return digest.hexdigest()


@pytest.mark.skipif(platform.machine() != "x86_64", reason="names an x86 CPU")
def test_a_plain_cpu_computes_the_same() -> None:
    """Without AVX-512 some instructions are emitted another way. (Half a minute to compile, the first time.)"""
    code = "import test_rans_stream; print(test_rans_stream.fingerprint())"
    env = os.environ | {"NUMBA_CPU_NAME": "x86-64", "NUMBA_CPU_FEATURES": "", "PYTHONPATH": os.pathsep.join(sys.path)}
    here = Path(__file__).parent
    run = subprocess.run([sys.executable, "-c", code], cwd=here, env=env, capture_output=True, text=True, timeout=300)
    assert run.stdout.strip() == fingerprint(), run.stderr
