"""One chunk's K and V -> one blob. See chunk.py for the front door.

Legend: L layers, T tokens, H KV heads, D head dim, S = L * H segments a tensor, K stages.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

import numpy as np
import torch

from codec import bitstream, shipped
from codec.bitstream import BlobInfo, Range
from codec.errors import UnencodableTensor
from codec.levels import Level, LevelKind, Lossless, TensorPlan
from codec.lossless import plane_bytes, split
from codec.profile import Profile
from codec.quantize import bf16_to_float
from codec.rope import RopeTable, unrotate
from codec.tensor_rows import (
    BACKENDS,
    DTYPES,
    Array,
    Backend,
    FlatPlan,
    StridedRows,
    bits_of,
    check_rope,
    layout_of,
    packed_cuts,
    ranges_of,
    rope_halves,
    turned_segments,
)
from kernels.rans_reference import MAX_MAGNITUDE, lanes_of

OK, NO_ROOM = 0, 7


@dataclass(frozen=True, slots=True, kw_only=True)
class _Coded:
    """One tensor's pieces. parts: one array of bytes a stage; words, exceptions [K, S]."""

    parts: list[Array]
    words: Array
    exceptions: Array


def encode_chunk(
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    level: str,
    profile: Profile,
    rope: RopeTable | None,
    layers: Range | None = None,
    heads: Range | None = None,
    backend: Backend = "numba",
) -> bytes:
    """k, v [L, T, H, D], bf16, fp16, fp32 or fp8, any strides; rope: the chunk's own positions, None only without RoPE.

    layers, heads: (start, stop) of the model's that the tensors hold, if not all. Lossy levels work on bf16: wider
    types are rounded to it first. Raises UnencodableTensor (NaN, Inf or absurd magnitudes at a lossy level, wrong
    shape or dtype), UnknownLevel, RopeRequired, CodecError.
    """
    spec = profile.level(level)
    k, v = k.detach(), v.detach()
    part = ranges_of(layers, heads, ((0, profile.layout.num_layers), (0, profile.layout.num_kv_heads)))
    dtype = _check_tensors(k, v, profile, part, spec)
    num_tokens = k.shape[1]
    is_unrotated = spec.kind is LevelKind.QUANTIZED and check_rope(rope, num_tokens, profile)
    info = BlobInfo(
        level=level, kind=spec.kind, dtype=dtype, is_unrotated=is_unrotated,
        is_shipped=(spec.kind is LevelKind.LOSSLESS and profile.lossless[dtype].is_shipped)
        or (spec.kind is LevelKind.QUANTIZED and profile.lossy.is_shipped),
        profile_id=profile.id, layout=(part[0][1] - part[0][0], part[1][1] - part[1][0], *layout_of(profile)[2:]),
        first_layer=part[0][0], first_head=part[1][0], num_tokens=num_tokens, first_stage=0,
        stages={LevelKind.RAW: 0, LevelKind.LOSSLESS: bitstream.LOSSLESS_PIECES}.get(spec.kind, spec.stages),
        body_bytes=0,
    )  # fmt: skip
    if spec.kind is LevelKind.RAW:
        return bitstream.assemble(info, None, [_plain_bytes(k), _plain_bytes(v)])
    coder = BACKENDS[backend]
    if spec.kind is LevelKind.LOSSLESS:
        lossless = profile.lossless[dtype]
        both = [
            _encode_lossless(coder, tensor, dtype, lossless, index, part)
            for tensor, index in ((k, lossless.k), (v, lossless.v))
        ]
    else:
        both = [
            _encode_quantized(coder, which, tensor, spec, profile, plan, used_rope, part)
            for which, tensor, plan, used_rope in (
                ("K", k, profile.lossy.k, rope if is_unrotated else None),
                ("V", v, profile.lossy.v, None),
            )
        ]
    return _assemble(info, both)


def _assemble(info: BlobInfo, both: list[_Coded]) -> bytes:
    """Stage by stage, K's pieces, then V's."""
    shape = (info.stages, 2, *info.layout[:2])
    words = np.stack([coded.words for coded in both], axis=1).reshape(shape)
    exceptions = np.stack([coded.exceptions for coded in both], axis=1).reshape(shape)
    parts = [coded.parts[stage] for stage in range(info.stages) for coded in both]
    return bitstream.assemble(
        info, bitstream.make_entries(words, exceptions, parts), [bitstream.bytes_of(part) for part in parts]
    )


def _check_tensors(k: torch.Tensor, v: torch.Tensor, profile: Profile, part: tuple[Range, Range], spec: Level) -> str:
    layers, heads = (stop - start for start, stop in part)
    for which, tensor, dim in (("K", k, profile.layout.head_dim_k), ("V", v, profile.layout.head_dim_v)):
        wanted = f"[{layers}, T, {heads}, {dim}]"
        if tensor.ndim != 4 or tensor.shape[0] != layers or tensor.shape[2:] != (heads, dim):
            raise UnencodableTensor(f"{which} is {list(tensor.shape)}, the profile is for {wanted}")
        if tensor.dtype not in DTYPES or tensor.dtype != k.dtype:
            raise UnencodableTensor(
                f"{which} is {tensor.dtype}; want {', '.join(str(d) for d in DTYPES)}, K and V alike"
            )
        if tensor.device.type != "cpu":
            raise UnencodableTensor(f"{which} is on {tensor.device}; this encoder takes CPU tensors")
        if not 1 <= tensor.shape[1] <= bitstream.MAX_TOKENS or tensor.shape[1] != k.shape[1]:
            raise UnencodableTensor(
                f"{which} has {tensor.shape[1]} tokens; want 1 to {bitstream.MAX_TOKENS}, K and V alike"
            )
    dtype = DTYPES[k.dtype]
    if spec.kind is LevelKind.LOSSLESS and dtype not in profile.lossless:
        raise UnencodableTensor(f"the profile has no lossless tables for {dtype}; use raw")
    return dtype


def _plain_bytes(tensor: torch.Tensor) -> memoryview:
    return memoryview(tensor.contiguous().view(torch.uint8).numpy()).cast("B")


def _row_contiguous(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.stride(3) == 1 or tensor.shape[3] == 1 else tensor.contiguous()


def _with_room(code: Callable[[int], tuple[int, int]], likely: int, most: int) -> tuple[int, int]:
    """Runs a coder with room for the usual, and again with room for the worst if that was too little."""
    result = code(min(likely, most))
    return code(most) if result[0] == NO_ROOM else result


def _encode_quantized(
    coder: ModuleType, which: str, tensor: torch.Tensor, spec: Level, profile: Profile, plan: TensorPlan | None,
    rope: RopeTable | None, part: tuple[Range, Range],
) -> _Coded:  # fmt: skip
    lossy = profile.lossy
    layers, num_tokens, heads, dim = tensor.shape
    src = StridedRows.of(_row_contiguous(tensor.to(torch.bfloat16)))
    count = layers * heads
    icos, isin = rope_halves(rope, num_tokens, inverse=True)
    turned = turned_segments(rope, part)
    first_layer = part[0][0]
    if plan is not None:
        flat, side = FlatPlan.of(plan, part, spec.stages), np.zeros((count, 0), np.uint16)
    else:
        rows = [bf16_to_float(src.segment(s)) for s in range(count)]
        for s, x in enumerate(rows):
            _finite(x, which, first_layer + s // heads, spec)
        with np.errstate(invalid="ignore", over="ignore"):
            plain = [unrotate(x, icos, isin) if turned[s] else x for s, x in enumerate(rows)]
        for s, x in enumerate(plain):
            if not np.isfinite(x).all():
                raise _too_large(which, first_layer + s // heads, spec)
        mean, step, table = (np.stack(part) for part in zip(*(shipped.measure(x, lossy) for x in plain), strict=True))
        side = shipped.pack_side(mean, step, table)
        flat = FlatPlan.of_shipped(
            *shipped.unpack_side(side, dim, lossy.codebook), spec.stages, is_turned=rope is not None
        )
    words, exceptions = (np.zeros((spec.stages, count), np.int64) for _ in range(2))
    fixed = count * (side.shape[1] + 2 * lanes_of(dim))
    book, room = lossy.codebook, np.empty((0, 0), np.uint16)

    def code(size: int) -> tuple[int, int]:
        nonlocal room
        room = np.empty((spec.stages, size), np.uint16)
        result: tuple[int, int] = coder.encode_quantized(
            src.flat, src.pos, src.stride_t, icos, isin, flat.turned & turned,
            flat.mean, np.float32(1) / flat.step, flat.matrix, flat.analysis, lossy.num_stages - spec.stages,
            flat.group, book.enc, book.standin, flat.index, packed_cuts(lossy, spec.stages), flat.refine,
            flat.active, side, room, words, exceptions,
        )  # fmt: skip
        return result

    status, segment = _with_room(code, fixed + count * num_tokens * dim, fixed + 5 * count * num_tokens * dim)
    if status != OK:
        layer = first_layer + segment // heads
        _finite(bf16_to_float(src.segment(segment)), which, layer, spec)
        raise _too_large(which, layer, spec)
    return _Coded(
        parts=[row[:used] for row, used in zip(room, words.sum(axis=1), strict=True)],
        words=words,
        exceptions=exceptions,
    )


def _finite(x: Array, which: str, layer: int, spec: Level) -> None:
    if not np.isfinite(x).all():
        raise UnencodableTensor(
            f"{which} of layer {layer} holds NaN or Inf, which level {spec.name} cannot code; use lossless or raw"
        )


def _too_large(which: str, layer: int, spec: Level) -> UnencodableTensor:
    return UnencodableTensor(
        f"{which} of layer {layer} has values over {MAX_MAGNITUDE} steps of level {spec.name}; use lossless or raw"
    )


def _encode_lossless(
    coder: ModuleType, tensor: torch.Tensor, dtype: str, lossless: Lossless, index: Array | None,
    part: tuple[Range, Range],
) -> _Coded:  # fmt: skip
    layers, num_tokens, heads, dim = tensor.shape
    count, width = layers * heads, num_tokens * dim
    if dtype == "bfloat16" and hasattr(coder, "split_bf16") and width % 2 == 0:
        src = StridedRows.of(_row_contiguous(tensor))
        coded, planes = np.empty((count, num_tokens, dim), np.uint8), np.empty((count, width), np.uint8)
        coder.split_bf16(src.flat, src.pos, src.stride_t, coded, planes.reshape(coded.shape))
    else:
        bits = np.ascontiguousarray(bits_of(tensor.contiguous()).transpose(0, 2, 1, 3)).reshape(count, width)
        coded, planes = split(bits, dtype)
        coded = coded.reshape(count, num_tokens, dim)
    book = lossless.codebook
    side = np.zeros((count, 0), np.uint16)
    if index is None:
        tables = np.stack([shipped.measure_bytes(rows, book) for rows in coded])
        side = shipped.pack_index(tables)
    else:
        tables = np.ascontiguousarray(index[slice(*part[0]), slice(*part[1])]).reshape(count, dim)
    words, exceptions = (np.zeros((bitstream.LOSSLESS_PIECES, count), np.int64) for _ in range(2))
    room = np.empty(0, np.uint16)

    def code(size: int) -> tuple[int, int]:
        nonlocal room
        room = np.empty(size, np.uint16)
        result: tuple[int, int] = coder.encode_bytes(
            coded, book.enc, book.standin, tables, room, words[0], exceptions[0]
        )
        return result

    states = count * 2 * lanes_of(dim)
    status, _ = _with_room(code, states + count * width, states + 5 * count * width)
    assert status == OK
    first: Array = room[: words[0].sum()]
    if side.size:
        cut = np.split(first, np.cumsum(words[0])[:-1])
        first = np.concatenate([piece for pair in zip(side, cut, strict=True) for piece in pair])
        words[0] += side.shape[1]
    words[1] = plane_bytes(dtype, width) // 2
    return _Coded(parts=[first, planes], words=words, exceptions=exceptions)
