"""One blob -> one chunk's K and V, or some layers and heads of it. See chunk.py for the front door.

Legend: L layers, T tokens, H KV heads, D head dim, S = L * H segments a tensor, K stages.
"""

from __future__ import annotations

from types import ModuleType

import numpy as np
import torch

from codec import bitstream, shipped
from codec.bitstream import BlobInfo, Directory, Range
from codec.errors import CodecError, MalformedBlob, RopeRequired, WrongProfile
from codec.levels import LevelKind, Lossless, TensorPlan
from codec.lossless import join, plane_bytes
from codec.profile import Profile
from codec.rope import RopeTable
from codec.tensor_rows import (
    BACKENDS,
    TORCH_DTYPES,
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

OK = 0
LARGEST = {"float16": 65504.0, "float8_e4m3fn": 448.0, "float8_e5m2": 57344.0}


def decode_chunk(
    blob: bytes | bytearray | memoryview,
    *,
    profile: Profile,
    rope: RopeTable | None,
    layers: Range | None = None,
    heads: Range | None = None,
    out: tuple[torch.Tensor, torch.Tensor] | None = None,
    backend: Backend = "numba",
) -> tuple[torch.Tensor, torch.Tensor]:
    """-> k, v [L, T, H, D] in the blob's dtype; with `out`, written into those (any strides) and returned.

    layers, heads: (start, stop) of the model's, of those in the blob; what is not asked for is neither read nor
    checked (but raw blobs, which have one checksum, are whole). Raises BlobError subclasses for anything wrong with
    the blob; `out` then holds garbage, not to be used.
    """
    view = memoryview(blob).cast("B")
    info = bitstream.parse_header(view)
    check_profile(info, profile)
    if info.is_refinement:
        raise MalformedBlob(f"the blob refines stage {info.first_stage}; put it behind the coarser blob (refine_chunk)")
    part = ranges_of(layers, heads, (info.layers, info.heads))
    is_whole = part == (info.layers, info.heads)
    if is_whole or info.kind is LevelKind.RAW:  # raw blobs have one checksum, of everything
        bitstream.check_whole(view, info)
    if info.is_unrotated:
        if rope is None:
            raise RopeRequired("this blob's keys were coded before RoPE; pass the chunk's RopeTable")
        if rope.num_tokens != info.num_tokens:
            raise MalformedBlob(f"the blob holds {info.num_tokens} tokens, {rope.num_tokens} were expected")
        check_rope(rope, info.num_tokens, profile)
    directory = None
    if info.kind is not LevelKind.RAW:
        directory = bitstream.parse_directory(view, info)
        if not is_whole:
            directory.check_pieces(*(slice(a - first, b - first) for (a, b), first in _with_first(part, info)))
    k, v = _check_out(*out, info, part) if out is not None else _empty(info, part)
    if directory is None:
        _decode_raw(view[bitstream.HEADER_BYTES : -bitstream.CRC_BYTES], info, part, k, v)
        return k, v
    for which, tensor in enumerate((k, v)):
        _decode_tensor(directory, which, tensor, info, profile, rope, part, BACKENDS[backend])
    return k, v


def _with_first(part: tuple[Range, Range], info: BlobInfo) -> list[tuple[Range, int]]:
    return [(part[0], info.first_layer), (part[1], info.first_head)]


def check_profile(info: BlobInfo, profile: Profile) -> None:
    """That the header fits the profile. Raises WrongProfile, MalformedBlob."""
    if info.profile_id != profile.id:
        raise WrongProfile(f"the blob was coded with profile {info.profile_id}, this end has {profile.id}")
    layers, heads, dim_k, dim_v = layout_of(profile)
    if info.layers[1] > layers or info.heads[1] > heads or info.layout[2:] != (dim_k, dim_v):
        raise WrongProfile(f"the blob's layout is {info.layout}, the profile's {layout_of(profile)}")
    if info.level not in profile.level_names:
        raise MalformedBlob(f"the blob is of level {info.level!r}, which its own profile lacks")
    level = profile.level(info.level)
    if level.kind is not info.kind:
        raise MalformedBlob(f"the header contradicts what the profile says of level {info.level}")
    if info.kind is LevelKind.LOSSLESS and (
        info.dtype not in profile.lossless or profile.lossless[info.dtype].is_shipped != info.is_shipped
    ):
        raise MalformedBlob(f"the header contradicts what the profile says of lossless {info.dtype}")
    if info.kind is LevelKind.QUANTIZED and (
        profile.lossy.is_shipped != info.is_shipped or info.first_stage + info.stages != level.stages
    ):
        raise MalformedBlob(f"the header contradicts what the profile says of level {info.level}")


def _empty(info: BlobInfo, part: tuple[Range, Range]) -> tuple[torch.Tensor, torch.Tensor]:
    (layers, heads), dtype = (stop - start for start, stop in part), TORCH_DTYPES[info.dtype]
    shapes = [(layers, info.num_tokens, heads, dim) for dim in info.layout[2:]]
    return torch.empty(shapes[0], dtype=dtype), torch.empty(shapes[1], dtype=dtype)


def _check_out(
    k: torch.Tensor, v: torch.Tensor, info: BlobInfo, part: tuple[Range, Range]
) -> tuple[torch.Tensor, torch.Tensor]:
    layers, heads = (stop - start for start, stop in part)
    for which, tensor, dim in (("K", k, info.layout[2]), ("V", v, info.layout[3])):
        wanted = (layers, info.num_tokens, heads, dim)
        if tensor.ndim != 4 or tensor.shape[0] != layers or tensor.shape[2:] != (heads, dim):
            raise CodecError(f"out for {which} is {list(tensor.shape)}, the blob is for {list(wanted)}")
        if tensor.device.type != "cpu":
            raise CodecError(f"out for {which} is on {tensor.device}; this decoder writes CPU tensors")
        if tensor.shape[1] != info.num_tokens or tensor.dtype is not TORCH_DTYPES[info.dtype]:
            raise MalformedBlob(
                f"the blob holds {info.num_tokens} tokens of {info.dtype}, out for {which} wants "
                f"{tensor.shape[1]} of {tensor.dtype}"
            )
    return k, v


def _decode_raw(body: memoryview, info: BlobInfo, part: tuple[Range, Range], k: torch.Tensor, v: torch.Tensor) -> None:
    layers, heads = info.layout[:2]
    rows, cols = (slice(a - first, b - first) for (a, b), first in _with_first(part, info))
    at = 0
    for tensor, dim in ((k, info.layout[2]), (v, info.layout[3])):
        size = layers * info.num_tokens * heads * dim * tensor.element_size()
        kind = f"<u{tensor.element_size()}"
        plain = np.frombuffer(body[at : at + size], kind).reshape(layers, info.num_tokens, heads, dim)
        bits_of(tensor)[...] = plain[rows, :, cols]
        at += size


def _decode_tensor(
    directory: Directory, which: int, tensor: torch.Tensor, info: BlobInfo, profile: Profile, rope: RopeTable | None,
    part: tuple[Range, Range], coder: ModuleType,
) -> None:  # fmt: skip
    rows, cols = (slice(a - first, b - first) for (a, b), first in _with_first(part, info))
    entries = directory.entries[:, which, rows, cols].reshape(info.stages, -1)
    pos = np.ascontiguousarray(directory.start[:, which, rows, cols]).reshape(info.stages, -1)
    size, exceptions = (np.ascontiguousarray(entries[name]).astype(np.int64) for name in ("words", "exceptions"))
    if info.kind is LevelKind.LOSSLESS:
        lossless = profile.lossless[info.dtype]
        index = (lossless.k, lossless.v)[which]
        code, segment = _decode_lossless(
            coder, directory.words, pos, size, exceptions, info, lossless, index, part, tensor
        )
    else:
        plan = (profile.lossy.k, profile.lossy.v)[which]
        used_rope = rope if which == 0 and info.is_unrotated else None
        code, segment = _decode_quantized(
            coder, directory.words, pos, size, exceptions, info, profile, plan, used_rope, part, tensor
        )
    if code != OK:
        layer = part[0][0] + segment // (part[1][1] - part[1][0])
        raise MalformedBlob(f"{'KV'[which]} of layer {layer}: the stream is not what an encoder writes (code {code})")


def _skip_side(pos: Array, size: Array, width: int) -> tuple[Array, Array]:
    if (size[0] < width).any():
        raise MalformedBlob("a piece is shorter than its side information")
    pos, size = pos.copy(), size.copy()
    pos[0] += width
    size[0] -= width
    return pos, size


def _decode_quantized(
    coder: ModuleType, words: Array, pos: Array, size: Array, exceptions: Array, info: BlobInfo, profile: Profile,
    plan: TensorPlan | None, rope: RopeTable | None, part: tuple[Range, Range], tensor: torch.Tensor,
) -> tuple[int, int]:  # fmt: skip
    lossy, (_, num_tokens, _, dim) = profile.lossy, tensor.shape
    if plan is not None:
        flat = FlatPlan.of(plan, part, info.stages)
    else:
        width = shipped.side_words(dim, is_lossless=False)
        first = pos[0]
        pos, size = _skip_side(pos, size, width)
        side = shipped.read_side(words, first, width)
        flat = FlatPlan.of_shipped(
            *shipped.unpack_side(side, dim, lossy.codebook), info.stages, is_turned=rope is not None
        )
    cos, sin = rope_halves(rope, num_tokens, inverse=False)
    can_write = info.dtype == "bfloat16" and tensor.stride(3) == 1 and all(s >= 0 for s in tensor.stride())
    target = tensor if can_write else torch.empty(tensor.shape, dtype=torch.bfloat16)
    dst = StridedRows.of(target)
    result: tuple[int, int] = coder.decode_quantized(
        words, pos, size, exceptions, lossy.codebook.lut, flat.index, flat.group, packed_cuts(lossy, info.stages),
        flat.refine, flat.active, info.stages == lossy.num_stages, 3 ** (lossy.num_stages - info.stages), flat.step,
        flat.mean, flat.matrix, flat.synthesis, flat.turned & turned_segments(rope, part), cos, sin,
        dst.flat, dst.pos, dst.stride_t,
    )  # fmt: skip
    if target is not tensor:
        largest = LARGEST.get(info.dtype)
        tensor.copy_(target if largest is None else target.float().clamp(-largest, largest))
    return result


def _decode_lossless(
    coder: ModuleType, words: Array, pos: Array, size: Array, exceptions: Array, info: BlobInfo, lossless: Lossless,
    index: Array | None, part: tuple[Range, Range], tensor: torch.Tensor,
) -> tuple[int, int]:  # fmt: skip
    layers, num_tokens, heads, dim = tensor.shape
    count, width = layers * heads, num_tokens * dim
    if index is None:
        side = shipped.side_words(dim, is_lossless=True)
        first = pos[0]
        pos, size = _skip_side(pos, size, side)
        tables, _ = shipped.unpack_index(shipped.read_side(words, first, side), dim, lossless.codebook)
    else:
        tables = np.ascontiguousarray(index[slice(*part[0]), slice(*part[1])]).reshape(count, dim)
    bytes_each = plane_bytes(info.dtype, width)
    if (2 * size[1] != bytes_each).any() or exceptions[1].any():
        raise MalformedBlob("the plain planes are not of the layout's size")
    coded = np.empty((count, num_tokens, dim), np.uint8)
    result: tuple[int, int] = coder.decode_bytes(
        words, pos[0], size[0], exceptions[0], lossless.codebook.lut, tables, coded
    )
    if result[0] != OK:
        return result
    planes = np.stack([words[at : at + bytes_each // 2] for at in pos[1]]).view(np.uint8)
    can_write = tensor.stride(3) == 1 and all(s >= 0 for s in tensor.stride())
    if info.dtype == "bfloat16" and can_write and hasattr(coder, "join_bf16") and width % 2 == 0:
        dst = StridedRows.of(tensor)
        coder.join_bf16(coded, planes.reshape(coded.shape), dst.flat, dst.pos, dst.stride_t)
    else:
        bits = join(coded.reshape(count, width), planes, info.dtype).reshape(layers, heads, num_tokens, dim)
        bits_of(tensor)[...] = bits.transpose(0, 2, 1, 3)
    return result
