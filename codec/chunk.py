"""The codec's front door: one chunk's K and V <-> one blob. CPU tensors; no model, no sockets.

Legend: L layers, T tokens, H KV heads, D head dim (K's and V's may differ), S = L * H segments a tensor.

    blob = encode_chunk(k, v, level="q3", profile=profile, rope=RopeTable(cos, sin))
    k, v = decode_chunk(blob, profile=profile, rope=RopeTable(cos, sin))
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import Any, Literal

import numpy as np
import torch

from codec import bitstream, reference, shipped
from codec.bitstream import BlobInfo, SegmentTable
from codec.errors import CodecError, MalformedBlob, RopeRequired, UnencodableTensor, WrongProfile
from codec.levels import Level, LevelKind, TensorPlan
from codec.profile import Profile
from codec.quantize import bf16_to_float
from codec.rope import RopeTable, unrotate
from kernels import rans_numba

Backend = Literal["numba", "reference"]
_BACKENDS: dict[str, ModuleType] = {"numba": rans_numba, "reference": reference}
_DTYPES = {torch.bfloat16: "bfloat16", torch.float16: "float16", torch.float32: "float32"}
_TORCH = {name: dtype for dtype, name in _DTYPES.items()}
Array = np.ndarray[Any, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Strided:
    """bf16 patterns of a [L, T, H, D] tensor as flat memory plus where each segment starts."""

    flat: Array
    pos: Array
    stride_t: int
    view: Array

    @staticmethod
    def of(tensor: torch.Tensor) -> _Strided:
        """Shares memory. The innermost dimension must be contiguous."""
        view = tensor.view(torch.int16).numpy().view(np.uint16)
        stride_l, stride_t, stride_h, _ = (s // 2 for s in view.strides)
        layers, tokens, heads, dim = view.shape
        span = (layers - 1) * stride_l + (tokens - 1) * stride_t + (heads - 1) * stride_h + dim
        flat = np.lib.stride_tricks.as_strided(view, (span,), (2,))
        pos = (np.arange(layers)[:, None] * stride_l + np.arange(heads) * stride_h).astype(np.int64).ravel()
        return _Strided(flat=flat, pos=pos, stride_t=stride_t, view=view)

    def segment(self, s: int) -> Array:
        heads = self.view.shape[2]
        return self.view[s // heads, :, s % heads, :]


def inspect_blob(blob: bytes | bytearray | memoryview) -> BlobInfo:
    """Level, layout, dtype, tokens and sizes, from the header alone. Raises BlobError subclasses."""
    return bitstream.parse_header(memoryview(blob).cast("B"))


def warmup(profile: Profile) -> None:
    """Compiles (or loads from numba's cache) every coder the profile's levels use; call it before serving."""
    lay = profile.layout
    k = torch.zeros(lay.num_layers, 1, lay.num_kv_heads, lay.head_dim_k, dtype=torch.bfloat16)
    v = torch.zeros(lay.num_layers, 1, lay.num_kv_heads, lay.head_dim_v, dtype=torch.bfloat16)
    rope = RopeTable(np.ones((1, 2), np.float32), np.zeros((1, 2), np.float32))
    for name in profile.level_names:
        blob = encode_chunk(k, v, level=name, profile=profile, rope=rope)
        decode_chunk(blob, profile=profile, rope=rope)


# ---- encoding ----


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
    dtype = _check_tensors(k, v, profile)
    num_tokens = k.shape[1]
    kind = spec.kind
    if kind is LevelKind.LOSSLESS and dtype == "float16":
        kind = LevelKind.RAW  # its 5-bit exponents save too little to be worth a format; exact all the same
    is_unrotated = kind is LevelKind.QUANTIZED and _check_rope(rope, num_tokens, profile)
    if kind is LevelKind.RAW:
        parts = [_plain_bytes(k), _plain_bytes(v)]
    else:
        coder = _BACKENDS[backend]
        halves = []
        for which, tensor, plan in (("K", k, spec.k), ("V", v, spec.v)):
            if kind is LevelKind.LOSSLESS:
                halves.append(_encode_lossless(coder, tensor, spec, plan))
            else:
                mean = profile.mean_k if which == "K" else profile.mean_v
                table = rope if which == "K" and is_unrotated else None
                halves.append(_encode_quantized(coder, which, tensor, spec, plan, mean, table))
        directory = b"".join(bitstream.pack_directory(words, escapes) for _, words, escapes in halves)
        parts = [directory, *(memoryview(payload).cast("B") for payload, _, _ in halves)]
    info = BlobInfo(
        level=level, kind=kind, dtype=dtype, is_unrotated=is_unrotated,
        is_shipped=kind is not LevelKind.RAW and spec.is_shipped, profile_id=profile.id, layout=_layout_of(profile),
        num_tokens=num_tokens, lanes=0 if kind is LevelKind.RAW else rans_numba.LANES, prob_bits=0 if kind is LevelKind.RAW else rans_numba.PROB_BITS,
        body_bytes=sum(memoryview(part).nbytes for part in parts),
    )  # fmt: skip
    return bitstream.assemble(info, parts)


def _layout_of(profile: Profile) -> tuple[int, int, int, int]:
    lay = profile.layout
    return lay.num_layers, lay.num_kv_heads, lay.head_dim_k, lay.head_dim_v


def _check_tensors(k: torch.Tensor, v: torch.Tensor, profile: Profile) -> str:
    layers, heads, dim_k, dim_v = _layout_of(profile)
    for which, tensor, dim in (("K", k, dim_k), ("V", v, dim_v)):
        wanted = f"[{layers}, T, {heads}, {dim}]"
        if tensor.ndim != 4 or tensor.shape[0] != layers or tensor.shape[2:] != (heads, dim):
            raise UnencodableTensor(f"{which} is {list(tensor.shape)}, the profile is for {wanted}")
        if tensor.dtype not in _DTYPES or tensor.dtype != k.dtype:
            raise UnencodableTensor(
                f"{which} is {tensor.dtype}; want bfloat16, float16 or float32, K and V alike"
            )
        if tensor.device.type != "cpu":
            raise UnencodableTensor(f"{which} is on {tensor.device}; this encoder takes CPU tensors")
        if not 1 <= tensor.shape[1] <= bitstream.MAX_TOKENS or tensor.shape[1] != k.shape[1]:
            raise UnencodableTensor(
                f"{which} has {tensor.shape[1]} tokens; want 1 to {bitstream.MAX_TOKENS}, K and V alike"
            )
    return _DTYPES[k.dtype]


def _check_rope(rope: RopeTable | None, num_tokens: int, profile: Profile) -> bool:
    """Whether keys are to be unrotated."""
    if rope is None:
        if profile.needs_rope:
            raise RopeRequired("this profile codes keys before RoPE; pass the chunk's RopeTable")
        return False
    if rope.num_tokens != num_tokens or 2 * rope.half_dim > profile.layout.head_dim_k:
        raise RopeRequired(
            f"the RopeTable is [{rope.num_tokens}, {2 * rope.half_dim}]; want the chunk's {num_tokens} tokens and at most "
            f"{profile.layout.head_dim_k} dims"
        )
    return True


def _plain_bytes(tensor: torch.Tensor) -> memoryview:
    return memoryview(tensor.contiguous().view(torch.uint8).numpy()).cast("B")


def _rope_halves(rope: RopeTable | None, num_tokens: int, *, inverse: bool) -> tuple[Array, Array]:
    if rope is None:
        none = np.zeros((num_tokens, 0), np.float32)
        return none, none
    return rope.inverse() if inverse else rope.forward()


def _row_contiguous(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.stride(3) == 1 or tensor.shape[3] == 1 else tensor.contiguous()


def _flat_plan(plan: TensorPlan, heads: int) -> tuple[Array, Array, Array]:
    """index [S, 2, D], step [S], group [S]."""
    dim = plan.index.shape[3]
    return plan.index.reshape(-1, 2, dim), plan.step.reshape(-1), np.repeat(plan.group, heads)


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
    src = _Strided.of(_row_contiguous(tensor.to(torch.bfloat16)))
    count = layers * heads
    icos, isin = _rope_halves(rope, num_tokens, inverse=True)
    if plan is not None:
        index, step, group = _flat_plan(plan, heads)
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
    out = np.empty(count * (side.shape[1] + 2 * rans_numba.LANES + 3 * num_tokens * dim), np.uint16)
    words, escapes = np.zeros(count, np.int64), np.zeros(count, np.int64)
    code, segment, used = coder.encode_quantized(
        src.flat, src.pos, src.stride_t, icos, isin, mean, np.float32(1) / step, group, index, side, book.fs,
        out, words, escapes,
    )  # fmt: skip
    if code != rans_numba.OK:
        _finite(bf16_to_float(src.segment(segment)), which, segment // heads, spec)
        raise UnencodableTensor(
            f"{which} of layer {segment // heads} has values over {rans_numba.MAX_MAGNITUDE} steps of level {spec.name}; use lossless or raw"
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
    src = _Strided.of(_row_contiguous(tensor))
    if plan is not None:
        index = plan.index.reshape(count, 2, dim)
        side = np.zeros((count, 0), np.uint16)
    else:
        chosen = np.stack([shipped.measure_exponents(src.segment(s), book) for s in range(count)])
        index = np.repeat(chosen[:, None, :], 2, axis=1)
        side = shipped.pack_index(chosen)
    gap = 0 if low is None else num_tokens * dim
    out = np.empty(count * (side.shape[1] + 2 * rans_numba.LANES + 4 * num_tokens * dim + 1 + gap), np.uint16)
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
        sizes = (
            side.shape[1]
            + 2 * min(rans_numba.LANES, dim)
            + words
            + 2 * escapes
            + (num_tokens * dim + 1) // 2
            + gap
        )
        for end, part in zip(np.cumsum(sizes), low, strict=True):
            out[end - gap : end] = part
    return out[:used], words, escapes


# ---- decoding ----


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
    if info.layout != _layout_of(profile):
        raise WrongProfile(f"the blob's layout is {info.layout}, the profile's {_layout_of(profile)}")
    body = bitstream.check_body(view, info)
    if info.is_unrotated:
        _check_rope(rope, info.num_tokens, profile)
        if rope is None:
            raise RopeRequired("this blob's keys were coded before RoPE; pass the chunk's RopeTable")
    k, v = out if out is not None else _empty(info)
    _check_out(k, v, info)
    if info.kind is LevelKind.RAW:
        _decode_raw(body, info, k, v)
        return k, v
    spec = profile.level(info.level)
    if spec.codebook is None or spec.kind is not info.kind or spec.is_shipped != info.is_shipped:
        raise MalformedBlob(f"the header contradicts what the profile says of level {info.level}")
    payload, *tables = bitstream.parse_directory(body, info)
    sides = (("K", k, spec.k, profile.mean_k, tables[0]), ("V", v, spec.v, profile.mean_v, tables[1]))
    for which, tensor, plan, mean, table in sides:
        target = _bf16_target(tensor, info)
        if info.kind is LevelKind.LOSSLESS:
            code, segment = _decode_lossless(_BACKENDS[backend], payload, table, info, spec, plan, target)
        else:
            used_rope = rope if which == "K" and info.is_unrotated else None
            code, segment = _decode_quantized(
                _BACKENDS[backend], payload, table, info, spec, plan, mean, used_rope, target
            )
        if code != rans_numba.OK:
            raise MalformedBlob(
                f"{which} of layer {segment // info.layout[1]}: the stream is not what an encoder writes (code {code})"
            )
        if target is not tensor:
            _store(tensor, target, info, payload, table)
    return k, v


def _empty(info: BlobInfo) -> tuple[torch.Tensor, torch.Tensor]:
    layers, heads, dim_k, dim_v = info.layout
    dtype = _TORCH[info.dtype]
    k = torch.empty(layers, info.num_tokens, heads, dim_k, dtype=dtype)
    return k, torch.empty(layers, info.num_tokens, heads, dim_v, dtype=dtype)


def _check_out(k: torch.Tensor, v: torch.Tensor, info: BlobInfo) -> None:
    layers, heads, dim_k, dim_v = info.layout
    for which, tensor, dim in (("K", k, dim_k), ("V", v, dim_v)):
        wanted = (layers, info.num_tokens, heads, dim)
        if (
            tuple(tensor.shape) != wanted
            or tensor.dtype is not _TORCH[info.dtype]
            or tensor.device.type != "cpu"
        ):
            raise CodecError(
                f"out for {which} is {list(tensor.shape)} {tensor.dtype} on {tensor.device}; want {list(wanted)} {info.dtype} on cpu"
            )


def _decode_raw(body: memoryview, info: BlobInfo, k: torch.Tensor, v: torch.Tensor) -> None:
    if info.is_shipped or info.is_unrotated or info.lanes or info.prob_bits:
        raise MalformedBlob("a raw body needs none of the header's coding fields")
    if body.nbytes != info.decoded_bytes:
        raise MalformedBlob(f"{body.nbytes} raw bytes, the layout needs {info.decoded_bytes}")
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
    coder: ModuleType, payload: Array, table: SegmentTable, info: BlobInfo, spec: Level, plan: TensorPlan | None, mean: Array,
    rope: RopeTable | None, target: torch.Tensor,
) -> tuple[int, int]:  # fmt: skip
    book = spec.codebook
    assert book is not None
    _, num_tokens, heads, dim = target.shape
    pos = table.pos
    if plan is not None:
        index, step, group = _flat_plan(plan, heads)
        mean = mean.reshape(-1, dim)
    else:
        width = bitstream.side_words(info.kind, True, dim)
        mean, step, chosen = shipped.unpack_side(shipped.read_side(payload, pos, width), dim, book)
        index, group, pos = (
            np.repeat(chosen[:, None, :], 2, axis=1),
            np.zeros(len(pos), np.int64),
            pos + width,
        )
    cos, sin = _rope_halves(rope, num_tokens, inverse=False)
    dst = _Strided.of(target)
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
    dst = _Strided.of(target)
    result: tuple[int, int] = coder.decode_lossless(
        payload, payload.view(np.uint8), pos, table.words, table.escapes, book.lut, index,
        dst.flat, dst.pos, dst.stride_t, info.num_tokens,
    )  # fmt: skip
    return result


def _store(
    tensor: torch.Tensor, target: torch.Tensor, info: BlobInfo, payload: Array, table: SegmentTable
) -> None:
    """From the coder's bf16 into what was asked for: other strides, fp16, or fp32 (lossless: plus the low halves)."""
    if info.kind is LevelKind.LOSSLESS and info.dtype == "float32":
        layers, num_tokens, heads, dim = target.shape
        width = num_tokens * dim
        head = (
            bitstream.side_words(info.kind, info.is_shipped, dim)
            + 2 * min(rans_numba.LANES, dim)
            + (width + 1) // 2
        )
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
