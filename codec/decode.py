"""One blob -> one chunk's K and V. See chunk.py for the front door.

Legend: L layers, T tokens, H KV heads, D head dim, S = L * H segments a tensor.
"""

from __future__ import annotations

from types import ModuleType

import numpy as np
import torch

from codec import bitstream, shipped
from codec.bitstream import BlobInfo, SegmentTable
from codec.errors import CodecError, MalformedBlob, RopeRequired, WrongProfile
from codec.levels import Level, LevelKind, TensorPlan
from codec.profile import Profile
from codec.rope import RopeTable
from codec.tensor_rows import (
    BACKENDS,
    TORCH_DTYPES,
    Array,
    Backend,
    StridedRows,
    check_rope,
    flat_plan,
    layout_of,
    rope_halves,
)
from kernels.rans_reference import LANES

OK = 0


def decode_chunk(
    blob: bytes | bytearray | memoryview,
    *,
    profile: Profile,
    rope: RopeTable | None,
    out: tuple[torch.Tensor, torch.Tensor] | None = None,
    backend: Backend = "numba",
) -> tuple[torch.Tensor, torch.Tensor]:
    """-> k, v [L, T, H, D] in the blob's dtype; with `out`, written into those (any strides) and returned.

    Raises BlobError subclasses for anything wrong with the blob; `out` then holds garbage and must not be used.
    """
    view = memoryview(blob).cast("B")
    info = bitstream.parse_header(view)
    if info.profile_id != profile.id:
        raise WrongProfile(f"the blob was coded with profile {info.profile_id}, this end has {profile.id}")
    if info.layout != layout_of(profile):
        raise WrongProfile(f"the blob's layout is {info.layout}, the profile's {layout_of(profile)}")
    body = bitstream.check_body(view, info)
    if info.is_unrotated:
        if rope is None:
            raise RopeRequired("this blob's keys were coded before RoPE; pass the chunk's RopeTable")
        if rope.num_tokens != info.num_tokens:
            raise MalformedBlob(f"the blob holds {info.num_tokens} tokens, {rope.num_tokens} were expected")
        check_rope(rope, info.num_tokens, profile)
    if info.kind is LevelKind.RAW:
        _check_raw(body, info)
        k, v = _check_out(*out, info) if out is not None else _empty(info)
        _decode_raw(body, k, v)
        return k, v
    spec = _level_of(info, profile)
    payload, *tables = bitstream.parse_directory(body, info)
    k, v = _check_out(*out, info) if out is not None else _empty(info)
    sides = (("K", k, spec.k, profile.mean_k, tables[0]), ("V", v, spec.v, profile.mean_v, tables[1]))
    for which, tensor, plan, mean, table in sides:
        target = _bf16_target(tensor, info)
        if info.kind is LevelKind.LOSSLESS:
            code, segment = _decode_lossless(BACKENDS[backend], payload, table, info, spec, plan, target)
        else:
            used_rope = rope if which == "K" and info.is_unrotated else None
            code, segment = _decode_quantized(
                BACKENDS[backend], payload, table, info, spec, plan, mean, used_rope, target
            )
        if code != OK:
            raise MalformedBlob(
                f"{which} of layer {segment // info.layout[1]}: the stream is not what an encoder writes (code {code})"
            )
        if target is not tensor:
            _store(tensor, target, info, payload, table)
    return k, v


def _empty(info: BlobInfo) -> tuple[torch.Tensor, torch.Tensor]:
    layers, heads, dim_k, dim_v = info.layout
    dtype = TORCH_DTYPES[info.dtype]
    k = torch.empty(layers, info.num_tokens, heads, dim_k, dtype=dtype)
    return k, torch.empty(layers, info.num_tokens, heads, dim_v, dtype=dtype)


def _level_of(info: BlobInfo, profile: Profile) -> Level:
    """The profile's level, if the header agrees with it."""
    if info.level not in profile.level_names:
        raise MalformedBlob(f"the blob is of level {info.level!r}, which its own profile lacks")
    spec = profile.level(info.level)
    if spec.codebook is None or spec.kind is not info.kind or spec.is_shipped != info.is_shipped:
        raise MalformedBlob(f"the header contradicts what the profile says of level {info.level}")
    return spec


def _check_out(k: torch.Tensor, v: torch.Tensor, info: BlobInfo) -> tuple[torch.Tensor, torch.Tensor]:
    layers, heads, dim_k, dim_v = info.layout
    for which, tensor, dim in (("K", k, dim_k), ("V", v, dim_v)):
        wanted = (layers, info.num_tokens, heads, dim)
        if tensor.ndim != 4 or tensor.shape[0] != layers or tensor.shape[2:] != (heads, dim):
            raise CodecError(f"out for {which} is {list(tensor.shape)}, the profile is for {list(wanted)}")
        if tensor.device.type != "cpu":
            raise CodecError(f"out for {which} is on {tensor.device}; this decoder writes CPU tensors")
        if tensor.shape[1] != info.num_tokens or tensor.dtype is not TORCH_DTYPES[info.dtype]:
            raise MalformedBlob(
                f"the blob holds {info.num_tokens} tokens of {info.dtype}, out for {which} wants "
                f"{tensor.shape[1]} of {tensor.dtype}"
            )
    return k, v


def _check_raw(body: memoryview, info: BlobInfo) -> None:
    if info.is_shipped or info.is_unrotated or info.lanes or info.prob_bits:
        raise MalformedBlob("a raw body needs none of the header's coding fields")
    if body.nbytes != info.decoded_bytes:
        raise MalformedBlob(f"{body.nbytes} raw bytes, the layout needs {info.decoded_bytes}")


def _decode_raw(body: memoryview, k: torch.Tensor, v: torch.Tensor) -> None:
    at = 0
    for tensor in (k, v):
        size = tensor.numel() * tensor.element_size()
        plain = np.frombuffer(body[at : at + size], np.uint8)
        if tensor.is_contiguous():
            tensor.view(torch.uint8).numpy().reshape(-1)[:] = plain
        else:
            tensor.copy_(torch.from_numpy(plain.copy()).view(tensor.dtype).view(tensor.shape))
        at += size


def _bf16_target(tensor: torch.Tensor, info: BlobInfo) -> torch.Tensor:
    """Where the coder may write bf16 rows: the tensor itself if it can, else a fresh one."""
    if info.dtype == "bfloat16" and tensor.stride(3) == 1 and all(s >= 0 for s in tensor.stride()):
        return tensor
    return torch.empty(tensor.shape, dtype=torch.bfloat16)


def _decode_quantized(
    coder: ModuleType, payload: Array, table: SegmentTable, info: BlobInfo, spec: Level, plan: TensorPlan | None,
    mean: Array, rope: RopeTable | None, target: torch.Tensor,
) -> tuple[int, int]:  # fmt: skip
    book = spec.codebook
    assert book is not None
    _, num_tokens, heads, dim = target.shape
    pos = table.pos
    if plan is not None:
        index, step, group = flat_plan(plan, heads)
        mean = mean.reshape(-1, dim)
    else:
        width = bitstream.side_words(info.kind, True, dim)
        mean, step, chosen = shipped.unpack_side(shipped.read_side(payload, pos, width), dim, book)
        index, group, pos = (
            np.repeat(chosen[:, None, :], 2, axis=1),
            np.zeros(len(pos), np.int64),
            pos + width,
        )
    cos, sin = rope_halves(rope, num_tokens, inverse=False)
    dst = StridedRows.of(target)
    result: tuple[int, int] = coder.decode_quantized(
        payload, pos, table.words, table.escapes, book.lut, index, group, step, mean, cos, sin,
        dst.flat, dst.pos, dst.stride_t,
    )  # fmt: skip
    return result


def _decode_lossless(
    coder: ModuleType,
    payload: Array,
    table: SegmentTable,
    info: BlobInfo,
    spec: Level,
    plan: TensorPlan | None,
    target: torch.Tensor,
) -> tuple[int, int]:
    book = spec.codebook
    assert book is not None
    dim = target.shape[3]
    pos = table.pos
    if plan is not None:
        index = plan.index.reshape(-1, 2, dim)
    else:
        width = bitstream.side_words(info.kind, True, dim)
        chosen = shipped.unpack_index(shipped.read_side(payload, pos, width), dim, book)
        index, pos = np.repeat(chosen[:, None, :], 2, axis=1), pos + width
    dst = StridedRows.of(target)
    result: tuple[int, int] = coder.decode_lossless(
        payload, payload.view(np.uint8), pos, table.words, table.escapes, book.lut, index,
        dst.flat, dst.pos, dst.stride_t, info.num_tokens,
    )  # fmt: skip
    return result


def _store(tensor: torch.Tensor, target: torch.Tensor, info: BlobInfo, payload: Array, table: SegmentTable) -> None:
    """From the coder's bf16 into what was asked for: other strides, fp16, or fp32 (lossless: plus the low halves)."""
    if info.kind is LevelKind.LOSSLESS and info.dtype == "float32":
        layers, num_tokens, heads, dim = target.shape
        width = num_tokens * dim
        head = bitstream.side_words(info.kind, info.is_shipped, dim) + 2 * min(LANES, dim) + (width + 1) // 2
        start = table.pos + head + table.words + 2 * table.escapes
        low = (
            np.stack([payload[at : at + width] for at in start])
            .reshape(layers, heads, num_tokens, dim)
            .transpose(0, 2, 1, 3)
        )
        high = target.view(torch.int16).numpy().view(np.uint16)
        tensor.copy_(torch.from_numpy(((high.astype(np.uint32) << 16) | low).view(np.float32)))
    elif info.dtype == "float16":
        tensor.copy_(target.float().clamp(-65504, 65504))
    else:
        tensor.copy_(target)
