"""One chunk's K and V -> one blob. See chunk.py for the front door.

Legend: L layers, T tokens, H KV heads, D head dim, S = L * H segments a tensor.
"""

from __future__ import annotations

from types import ModuleType

import numpy as np
import torch

from codec import bitstream, shipped
from codec.bitstream import BlobInfo
from codec.errors import UnencodableTensor
from codec.levels import Level, LevelKind, TensorPlan
from codec.profile import Profile
from codec.quantize import bf16_to_float
from codec.rope import RopeTable, unrotate
from codec.tensor_rows import (
    BACKENDS,
    DTYPES,
    Array,
    Backend,
    StridedRows,
    check_rope,
    flat_plan,
    layout_of,
    rope_halves,
)
from kernels.rans_reference import LANES, MAX_MAGNITUDE, PROB_BITS

OK = 0


def encode_chunk(
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    level: str,
    profile: Profile,
    rope: RopeTable | None,
    backend: Backend = "numba",
) -> bytes:
    """k, v [L, T, H, D], bf16, fp16 or fp32, any strides; rope: the chunk's own positions, None only without RoPE.

    Lossy levels work on bf16: wider types are rounded to it first. Raises UnencodableTensor (NaN, Inf or absurd
    magnitudes at a lossy level, wrong shape or dtype), UnknownLevel, RopeRequired.
    """
    spec = profile.level(level)
    k, v = k.detach(), v.detach()
    dtype = _check_tensors(k, v, profile)
    num_tokens = k.shape[1]
    kind = spec.kind
    if kind is LevelKind.LOSSLESS and dtype == "float16":
        kind = LevelKind.RAW  # its 5-bit exponents save too little to be worth a format; exact all the same
    is_unrotated = kind is LevelKind.QUANTIZED and check_rope(rope, num_tokens, profile)
    if kind is LevelKind.RAW:
        parts: list[memoryview | bytes] = [_plain_bytes(k), _plain_bytes(v)]
    else:
        coder = BACKENDS[backend]
        halves = []
        for which, tensor, plan in (("K", k, spec.k), ("V", v, spec.v)):
            if kind is LevelKind.LOSSLESS:
                halves.append(_encode_lossless(coder, tensor, spec, plan))
            else:
                mean = profile.mean_k if which == "K" else profile.mean_v
                table = rope if which == "K" and is_unrotated else None
                halves.append(_encode_quantized(coder, which, tensor, spec, plan, mean, table))
        directory = b"".join(bitstream.pack_directory(words, escapes) for _, words, escapes in halves)
        parts = [directory, *(payload.data.cast("B") for payload, _, _ in halves)]
    info = BlobInfo(
        level=level, kind=kind, dtype=dtype, is_unrotated=is_unrotated,
        is_shipped=kind is not LevelKind.RAW and spec.is_shipped, profile_id=profile.id, layout=layout_of(profile),
        num_tokens=num_tokens, lanes=0 if kind is LevelKind.RAW else LANES,
        prob_bits=0 if kind is LevelKind.RAW else PROB_BITS,
        body_bytes=sum(memoryview(part).nbytes for part in parts),
    )  # fmt: skip
    return bitstream.assemble(info, parts)


def _check_tensors(k: torch.Tensor, v: torch.Tensor, profile: Profile) -> str:
    layers, heads, dim_k, dim_v = layout_of(profile)
    for which, tensor, dim in (("K", k, dim_k), ("V", v, dim_v)):
        wanted = f"[{layers}, T, {heads}, {dim}]"
        if tensor.ndim != 4 or tensor.shape[0] != layers or tensor.shape[2:] != (heads, dim):
            raise UnencodableTensor(f"{which} is {list(tensor.shape)}, the profile is for {wanted}")
        if tensor.dtype not in DTYPES or tensor.dtype != k.dtype:
            raise UnencodableTensor(f"{which} is {tensor.dtype}; want bfloat16, float16 or float32, K and V alike")
        if tensor.device.type != "cpu":
            raise UnencodableTensor(f"{which} is on {tensor.device}; this encoder takes CPU tensors")
        if not 1 <= tensor.shape[1] <= bitstream.MAX_TOKENS or tensor.shape[1] != k.shape[1]:
            raise UnencodableTensor(
                f"{which} has {tensor.shape[1]} tokens; want 1 to {bitstream.MAX_TOKENS}, K and V alike"
            )
    return DTYPES[k.dtype]


def _plain_bytes(tensor: torch.Tensor) -> memoryview:
    return memoryview(tensor.contiguous().view(torch.uint8).numpy()).cast("B")


def _row_contiguous(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.stride(3) == 1 or tensor.shape[3] == 1 else tensor.contiguous()


def _encode_quantized(
    coder: ModuleType,
    which: str,
    tensor: torch.Tensor,
    spec: Level,
    plan: TensorPlan | None,
    mean: Array,
    rope: RopeTable | None,
) -> tuple[Array, Array, Array]:
    """-> (payload words, stream words [S], escapes [S])"""
    book = spec.codebook
    assert book is not None
    layers, num_tokens, heads, dim = tensor.shape
    src = StridedRows.of(_row_contiguous(tensor.to(torch.bfloat16)))
    count = layers * heads
    icos, isin = rope_halves(rope, num_tokens, inverse=True)
    if plan is not None:
        index, step, group = flat_plan(plan, heads)
        mean = mean.reshape(count, dim)
        side = np.zeros((count, 0), np.uint16)
    else:
        measured = [
            shipped.measure(
                _finite(unrotate(bf16_to_float(src.segment(s)), icos, isin), which, s // heads, spec),
                spec.step_factor,
                book,
            )
            for s in range(count)
        ]
        mean, step, chosen = (np.stack(column) for column in zip(*measured, strict=True))
        index = np.repeat(chosen[:, None, :], 2, axis=1)
        group = np.zeros(count, np.int64)
        side = shipped.pack_side(mean, step, chosen)
    out = np.empty(count * (side.shape[1] + 2 * LANES + 3 * num_tokens * dim), np.uint16)
    words, escapes = np.zeros(count, np.int64), np.zeros(count, np.int64)
    code, segment, used = coder.encode_quantized(
        src.flat, src.pos, src.stride_t, icos, isin, mean, np.float32(1) / step, group, index, side, book.fs,
        out, words, escapes,
    )  # fmt: skip
    if code != OK:
        _finite(bf16_to_float(src.segment(segment)), which, segment // heads, spec)
        raise UnencodableTensor(
            f"{which} of layer {segment // heads} has values over {MAX_MAGNITUDE} steps of level "
            f"{spec.name}; use lossless or raw"
        )
    return out[:used], words, escapes


def _finite(x: Array, which: str, layer: int, spec: Level) -> Array:
    if not np.isfinite(x).all():
        raise UnencodableTensor(
            f"{which} of layer {layer} holds NaN or Inf, which level {spec.name} cannot code; use lossless or raw"
        )
    return x


def _encode_lossless(
    coder: ModuleType, tensor: torch.Tensor, spec: Level, plan: TensorPlan | None
) -> tuple[Array, Array, Array]:
    """-> (payload words, stream words [S], escapes [S])"""
    book = spec.codebook
    assert book is not None
    layers, num_tokens, heads, dim = tensor.shape
    count = layers * heads
    low = None
    if tensor.dtype is torch.float32:  # its upper half is bf16; the lower half is noise and goes plain
        bits = np.ascontiguousarray(tensor.numpy()).view(np.uint32)
        low = (bits & 0xFFFF).astype(np.uint16).transpose(0, 2, 1, 3).reshape(count, num_tokens * dim)
        tensor = torch.from_numpy((bits >> 16).astype(np.uint16).view(np.int16)).view(torch.bfloat16)
    src = StridedRows.of(_row_contiguous(tensor))
    if plan is not None:
        index = plan.index.reshape(count, 2, dim)
        side = np.zeros((count, 0), np.uint16)
    else:
        chosen = np.stack([shipped.measure_exponents(src.segment(s), book) for s in range(count)])
        index = np.repeat(chosen[:, None, :], 2, axis=1)
        side = shipped.pack_index(chosen)
    gap = 0 if low is None else num_tokens * dim
    out = np.empty(count * (side.shape[1] + 2 * LANES + 4 * num_tokens * dim + 1 + gap), np.uint16)
    words, escapes = np.zeros(count, np.int64), np.zeros(count, np.int64)
    _, _, used = coder.encode_lossless(
        src.flat,
        src.pos,
        src.stride_t,
        num_tokens,
        index,
        side,
        gap,
        book.fs,
        out,
        out.view(np.uint8),
        words,
        escapes,
    )
    if low is not None:
        sizes = side.shape[1] + 2 * min(LANES, dim) + words + 2 * escapes + (num_tokens * dim + 1) // 2 + gap
        for end, part in zip(np.cumsum(sizes), low, strict=True):
            out[end - gap : end] = part
    return out[:used], words, escapes
