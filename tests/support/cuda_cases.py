"""Segments for the GPU coder's tests: random codings, integers with exceptions, and both kernels run on plain arrays.

Legend: S segments of one chunk, T tokens, D channels, K stages, n base tables, N lanes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from kernels import rans_cuda
from kernels.rans_decode_cuda import JOB_FIELDS, MODE_ROWS
from kernels.rans_reference import Coding, Piece, decode_segment, encode_segment, lanes_of, new_lanes, stages_of

TABLES, SETS = 5, 6


@dataclass(frozen=True, kw_only=True)
class Segments:
    """q [S, T, D] int32 at the finest stage, how each is coded, and its pieces' words by the reference."""

    q: np.ndarray
    codings: list[Coding]
    pieces: list[list[list[int]]]
    exceptions: np.ndarray  # [K, S]

    @property
    def lanes(self) -> int:
        return lanes_of(self.q.shape[2])


def make_freqs(rng: np.random.Generator, count: int = TABLES) -> np.ndarray:
    """Tables of all kinds: 64 symbols, a single one, narrow bells."""
    freqs = np.zeros((count, 256), np.int64)
    for table in range(count):
        kind = table % 5
        if kind == 0:
            freqs[table, 96:160] = 16
        elif kind == 1:
            freqs[table, 128] = 1024
        else:
            weight = np.exp(-np.abs(np.arange(-20, 21)) / (0.4 * kind))
            share = np.maximum(np.floor(weight / weight.sum() * 1024), 1).astype(np.int64)
            share[20] += 1024 - share.sum()
            freqs[table, 108:149] = share
    return freqs


def make_segments(
    *, seed: int, segments: int, tokens: int, dims: int, stages: int, group: int = 0, falling: bool = False,
    outliers: float = 0.01, lossless: bool = False,
) -> Segments:  # fmt: skip
    """falling: fewer active channels at coarse stages. outliers: share of values that no table says."""
    rng = np.random.default_rng(seed)
    freqs = make_freqs(rng)
    first = np.sort(rng.integers(1, 1023, (stages - 1, SETS, 3, 2)), axis=-1)
    first[..., 1] = np.maximum(first[..., 1], first[..., 0] + 1)
    scale = 3.0 ** (stages - 1)
    q = np.rint(rng.laplace(0, 1.2 * scale, (segments, tokens, dims))).astype(np.int64)
    hit = rng.random(q.shape) < outliers
    q[hit] = rng.integers(-(1 << 20), (1 << 20) + 1, int(hit.sum()))
    if lossless:
        q = np.clip(q, -128, 127)
    codings = []
    for s in range(segments):
        active = [dims] * stages
        if falling:
            active = [min(dims, max(1, dims * (k + 1) // (stages + s % 2) - 3 * (s % 2))) for k in range(stages)]
            q[s, :, active[-1] :][rng.random((tokens, dims - active[-1])) < 0.9] = 0
        codings.append(Coding(
            freqs=freqs, index=rng.integers(0, TABLES, (2, dims)).astype(np.uint8), group=group if s % 3 < 2 else 0,
            active=active, cuts=first, refine=rng.integers(0, SETS, (stages - 1, dims)).astype(np.uint8),
        ))  # fmt: skip
    coded = [encode_segment(q[s], codings[s]) for s in range(segments)]
    counts = np.array([[len(piece.exceptions) for piece in pieces] for pieces in coded]).T
    return Segments(
        q=q.astype(np.int32), codings=codings, exceptions=counts,
        pieces=[[piece.to_words() for piece in pieces] for pieces in coded],
    )  # fmt: skip


def coarser(case: Segments, stages: int) -> Segments:
    """The same chunk encoded at a coarser level, by the reference."""
    codings = [replace(c, active=c.active[:stages], cuts=c.cuts[: stages - 1], refine=c.refine[: stages - 1])
               for c in case.codings]  # fmt: skip
    q = stages_of(case.q.astype(np.int64), len(case.codings[0].active))
    q = np.asarray(q[stages - 1])
    coded = [encode_segment(q[s], codings[s]) for s in range(len(codings))]
    return Segments(
        q=q.astype(np.int32), codings=codings, pieces=[[piece.to_words() for piece in pieces] for pieces in coded],
        exceptions=np.array([[len(piece.exceptions) for piece in pieces] for pieces in coded]).T,
    )  # fmt: skip


def profile_arrays(case: Segments) -> dict[str, np.ndarray]:
    """The codings as the kernels' rows, one a segment."""
    codings = case.codings
    return {
        "base_index": np.stack([c.index for c in codings]).astype(np.uint8),
        "group": np.array([c.group for c in codings], np.int32),
        "refine_index": np.ascontiguousarray(np.stack([c.refine for c in codings], axis=1)),
        "active": np.array([c.active for c in codings], np.int32).T.copy(),
        "cuts": rans_cuda.packed_cuts(codings[0].cuts),
    }


def flat(array: np.ndarray) -> np.ndarray:
    """One dimension, and never empty: kernels take no empty arrays."""
    array = np.ascontiguousarray(array).reshape(-1)
    return array if array.size else np.zeros(1, array.dtype)


def run_decode(
    case: Segments, *, stages: int, mode: int = MODE_ROWS, step: np.ndarray | None = None,
    mean: np.ndarray | None = None, half: int = 0, cos: np.ndarray | None = None, sin: np.ndarray | None = None,
    row_pos: np.ndarray | None = None, out: np.ndarray | None = None, out_pos: np.ndarray | None = None,
    multiplier: int = 1, words: np.ndarray | None = None, planes: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:  # fmt: skip
    """-> integers [S, T, D] (MODE_ROWS), out, status [S]. planes u16 [S, w]: words behind each segment's piece."""
    count, tokens, dims = case.q.shape
    arrays = profile_arrays(case)
    pos, size = np.zeros((stages, count), np.int64), np.zeros((stages, count), np.int32)
    parts: list[int] = []
    for k in range(stages):
        for s in range(count):
            pos[k, s], size[k, s] = len(parts), len(case.pieces[s][k])
            parts += case.pieces[s][k]
            if planes is not None:
                parts += planes[s].tolist()
    jobs = np.zeros((count, JOB_FIELDS), np.int32)
    jobs[:, 0] = np.arange(count)
    jobs[:, 2], jobs[:, 3] = tokens, stages
    jobs[:, 4], jobs[:, 5] = stages == len(case.codings[0].active), multiplier
    jobs[:, 7], jobs[:, 8] = mode, half
    image = rans_cuda.shared_image(case.codings[0].freqs, case.codings[0].cuts)
    room = rans_cuda.scratch_words(tokens, dims)
    scratch = np.full((count, room), 0x8000000080000000, np.uint64)
    out = np.zeros(count * tokens * dims, np.uint16) if out is None else out
    if out_pos is None:
        out_pos = np.arange(count, dtype=np.int64) * tokens * dims
    status = np.zeros(count, np.int32)
    launch = rans_cuda.decode_launch(count, dims, image.size)
    ones = np.ones((count, dims), np.float32)
    rows = np.arange(tokens, dtype=np.int64) * dims if row_pos is None else row_pos
    cos = np.zeros((tokens, 0), np.float32) if cos is None else cos
    sin = np.zeros((tokens, 0), np.float32) if sin is None else sin
    buffer = np.array(parts, np.uint16) if words is None else words
    rans_cuda.make_decode_kernel(dims)[launch.blocks, launch.threads, 0, launch.shared_bytes](
        buffer, buffer.view(np.uint8), flat(pos), flat(size),
        flat(case.exceptions[:stages].astype(np.int32)), flat(jobs), out_pos,
        np.arange(count, dtype=np.int64) * room, count, 2 * (pos[0] + size[0]),
        image, TABLES, SETS, arrays["cuts"].shape[0],
        flat(rans_cuda.index_words(arrays["base_index"])), arrays["group"],
        flat(rans_cuda.index_words(arrays["refine_index"])), flat(arrays["active"]), count,
        flat(rans_cuda.by_quads(ones if step is None else step)),
        flat(rans_cuda.by_quads(0 * ones if mean is None else mean)),
        flat(cos), flat(sin), cos.shape[1], rows, out, np.zeros(1, np.uint16), scratch.reshape(-1), status,
    )  # fmt: skip
    return rans_cuda.rows_of_scratch(scratch, tokens, dims), out, status


def run_encode(
    case: Segments, *, stages: int, coarser: int = 0, room: int | None = None
) -> tuple[list[list[list[int]]], np.ndarray]:
    """-> pieces' words by segment and stage, status [S]. case.q is of the stage `stages - 1 + coarser`."""
    count, tokens, dims = case.q.shape
    arrays = profile_arrays(case)
    capacity = rans_cuda.word_capacity(tokens, dims)
    room = tokens * dims if room is None else room
    image = rans_cuda.encode_image(case.codings[0].freqs, case.codings[0].cuts)
    jobs = np.array([[s, tokens, stages, coarser] for s in range(count)], np.int32)
    slots = np.zeros(stages * count * capacity, np.uint16)
    pairs = np.zeros(stages * count * room * 2, np.int32)
    states = np.zeros(stages * count * case.lanes, np.uint32)
    num_words, num_exceptions = np.zeros(stages * count, np.int32), np.zeros(stages * count, np.int32)
    status = np.zeros(count, np.int32)
    launch = rans_cuda.encode_launch(count, dims, image.size)
    rans_cuda.make_encode_kernel(dims)[launch.blocks, launch.threads, 0, launch.shared_bytes](
        flat(case.q), np.arange(count, dtype=np.int64) * tokens * dims, flat(jobs), count,
        image, TABLES, SETS, arrays["cuts"].shape[0],
        flat(rans_cuda.index_words(arrays["base_index"])), arrays["group"],
        flat(rans_cuda.index_words(arrays["refine_index"])), flat(arrays["active"]), count,
        slots, capacity, pairs, room, states, num_words, num_exceptions, status,
    )  # fmt: skip
    size = num_words + 4 * num_exceptions
    for k in range(stages):
        for s, coding in enumerate(case.codings):
            size[k * count + s] += 2 * len(new_lanes(coding, k))
    ends = np.cumsum(size)
    out = np.zeros(max(int(ends[-1]), 1), np.uint16)
    if (status == 0).all():
        rans_cuda.pack_kernel[stages * count, 32, 0, 0](
            flat(jobs), count, flat(arrays["active"]), count, slots, capacity, pairs, room, states, num_words,
            num_exceptions, case.lanes, (ends - size).astype(np.int64), out,
        )  # fmt: skip
    parts = [out[end - width : end].tolist() for end, width in zip(ends, size, strict=True)]
    return [[parts[k * count + s] for k in range(stages)] for s in range(count)], status


def expected_integers(case: Segments, stages: int) -> np.ndarray:
    """[S, T, D] by the reference, decoding only the first stages."""
    out: list[Any] = []
    for s, coding in enumerate(case.codings):
        pieces = [
            Piece.from_words(
                case.pieces[s][k], num_states=len(new_lanes(coding, k)), num_exceptions=int(case.exceptions[k, s])
            )
            for k in range(stages)
        ]
        out.append(decode_segment(pieces, coding, case.q.shape[1], is_whole=stages == len(coding.active)))
    return np.stack(out)
