"""The GPU's coder: tables as the kernels want them, launch sizes, the kernels. Imports without a GPU or numba-cuda.

Legend: n base tables, N lanes, D channels, G groups (segments) a block.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from kernels.rans_decode_cuda import RANK_BYTES, RUNS, TABLE_WORDS, make_decode_kernel
from kernels.rans_encode_cuda import NUM_RECIPROCALS, VALUES, make_encode_kernel, pack_kernel
from kernels.rans_reference import MAX_SYMBOLS, NUM_VALUES, PROB_SUM, VALUE_LOW, lanes_of, standin_of, starts_of

__all__ = [
    "Launch", "by_quads", "decode_launch", "encode_image", "encode_launch", "index_words", "make_decode_kernel",
    "make_encode_kernel", "pack_kernel", "packed_cuts", "quads_of", "rows_of_scratch", "scratch_words", "shared_image",
    "word_capacity",
]  # fmt: skip

SHARED_BYTES = 48 << 10  # all that a launch may ask for without asking the driver first
MAX_THREADS = 128  # a block: on a chunk of its own, a few warps on every multiprocessor beat many on some


def shared_image(freqs: np.ndarray, cuts: np.ndarray) -> np.ndarray:
    """freqs [n, 256], cuts [M - 1, sets, 3, 2] -> uint64 [*], what the decoder keeps in shared memory.

    n base tables in two steps, 1.25 KB each: slot -> rank (1 byte, 1024 of them), rank -> value + 128 << 21 |
    frequency << 10 | start (64 words); then the cuts, c1 | c2 << 16.
    """
    count = freqs.shape[0]
    assert freqs.shape == (count, NUM_VALUES) and (freqs.sum(axis=1, dtype=np.int64) == PROB_SUM).all()
    tables = np.zeros((count, TABLE_WORDS), np.uint32)
    wide = freqs.astype(np.int64)
    starts = starts_of(wide)
    for table, row in enumerate(wide):
        values = np.flatnonzero(row)
        assert values.size <= MAX_SYMBOLS, values.size
        rank = np.repeat(np.arange(values.size, dtype=np.uint8), row[values])
        tables[table, : RANK_BYTES // 4] = rank.view("<u4")
        at = RANK_BYTES // 4
        tables[table, at : at + values.size] = values << 21 | row[values] << 10 | starts[table, values]
    words = np.concatenate([tables.ravel(), packed_cuts(cuts).ravel()])
    return np.pad(words, (0, words.size % 2)).view("<u8")


def index_words(index: np.ndarray) -> np.ndarray:
    """[.., D] uint8 -> uint32 [.., quads * N]: byte r of a lane's word is that of channel quad * 4N + r * N + lane,
    0 where there is no such channel."""
    dims = index.shape[-1]
    lanes = lanes_of(dims)
    spread = by_quads(index).astype(np.uint32)  # [.., quads, 4, N]
    out = spread[..., 0, :] | spread[..., 1, :] << 8 | spread[..., 2, :] << 16 | spread[..., 3, :] << 24
    return np.ascontiguousarray(out.reshape(*index.shape[:-1], quads_of(dims) * lanes))


def by_quads(rows: np.ndarray) -> np.ndarray:
    """[.., D] -> [.., quads, 4, N], padded with zeros."""
    dims = rows.shape[-1]
    lanes, quads = lanes_of(dims), quads_of(dims)
    pad = [(0, 0)] * (rows.ndim - 1) + [(0, quads * RUNS * lanes - dims)]
    return np.ascontiguousarray(np.pad(rows, pad).reshape(*rows.shape[:-1], quads, RUNS, lanes))


def quads_of(num_dims: int) -> int:
    return -(-num_dims // (RUNS * lanes_of(num_dims)))


def scratch_words(num_tokens: int, num_dims: int) -> int:
    """64-bit words of scratch a segment needs."""
    return num_tokens * quads_of(num_dims) * 2 * lanes_of(num_dims)


def rows_of_scratch(scratch: np.ndarray, num_tokens: int, num_dims: int) -> np.ndarray:
    """uint64 [S, scratch_words] -> int32 [S, T, D]: what MODE_ROWS leaves, in order. (On a GPU: gpu_decode.py.)"""
    lanes, quads = lanes_of(num_dims), quads_of(num_dims)
    pairs = scratch.view("<i4").reshape(-1, num_tokens, quads, 2, lanes, 2)
    rows = pairs.transpose(0, 1, 2, 3, 5, 4).reshape(-1, num_tokens, quads * RUNS * lanes)
    return np.ascontiguousarray(rows[..., :num_dims])


def encode_image(freqs: np.ndarray, cuts: np.ndarray) -> np.ndarray:
    """freqs [n, 256], cuts [M - 1, sets, 3, 2] -> uint64 [*], what the encoder keeps in shared memory, in 32-bit words:
    base tables [n, 256]: frequency << 16 | start | their stand-ins' entries [n] | 2^32 div f [1025] | cuts."""
    wide = freqs.astype(np.int64)
    enc = wide << 16 | np.where(wide > 0, starts_of(wide), 0)
    standins = enc[np.arange(len(enc)), standin_of(freqs) - VALUE_LOW]
    reciprocals = np.minimum((1 << 32) // np.maximum(np.arange(NUM_RECIPROCALS, dtype=np.int64), 1), (1 << 32) - 1)
    words = np.concatenate([part.ravel().astype(np.uint32) for part in (enc, standins, reciprocals, packed_cuts(cuts))])
    return np.pad(words, (0, words.size % 2)).view("<u8")


def packed_cuts(cuts: np.ndarray) -> np.ndarray:
    """cuts [M - 1, sets, 3, 2] -> u32 [M - 1, sets, 3]: c1 | c2 << 16."""
    wide = cuts.astype(np.uint32)
    return np.ascontiguousarray(wide[..., 0] | wide[..., 1] << 16)


def word_capacity(num_tokens: int, num_dims: int) -> int:
    """Words that no stream of a stage exceeds: a symbol costs at most 10.03 bits, and lanes may start and end full."""
    return num_tokens * num_dims * 21 // 32 + 2 * lanes_of(num_dims) + 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """blocks x threads, with shared_bytes of dynamic shared memory."""

    blocks: int
    threads: int
    shared_bytes: int


def decode_launch(num_jobs: int, num_dims: int, image_words: int) -> Launch:
    """image_words: 64-bit words of the shared image. The anchors of each group's segment lie behind it."""
    lanes = lanes_of(num_dims)
    each = 4 * quads_of(num_dims) * RUNS * lanes
    threads = MAX_THREADS
    while 8 * image_words + threads // lanes * each > SHARED_BYTES:
        threads -= 32
        assert threads > 0, "one warp always fits: 32 tables, 5 stages of 32 sets, 1,024 dims"
    groups = threads // lanes
    return Launch(blocks=-(-num_jobs // groups), threads=threads, shared_bytes=8 * image_words + groups * each)


def encode_launch(num_jobs: int, num_dims: int, image_words: int) -> Launch:
    """image_words: 64-bit words of the shared image."""
    groups = MAX_THREADS // lanes_of(num_dims)
    assert 8 * image_words <= SHARED_BYTES, "32 tables and 5 stages of 32 sets fit"
    return Launch(blocks=-(-num_jobs // groups), threads=MAX_THREADS, shared_bytes=8 * image_words)


assert VALUE_LOW == -128 and VALUES == NUM_VALUES  # the kernels say so in their own words
