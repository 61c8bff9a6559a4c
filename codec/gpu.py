"""The codec on a GPU: K and V that are there already <-> blobs, many chunks in flight. Bytes are the CPU codec's.

    blobs = encode_chunks([(k, v), ...], level="q3", profile=profile, ropes=[RopeTable(cos, sin), ...])
    decode_chunks(blobs, profile=profile, ropes=ropes, out=(pool.k, pool.v), slots=[slots of each chunk's tokens, ...])

Values without a matrix are the CPU's bit for bit; with one, within a bf16 ulp of a row's largest term (SPEC.md).
Needs `pip install 'kvstream[gpu]'` and a CUDA device when used, not when imported. Neither Ray nor pyzmq.
Legend: C chunks, L layers, T tokens, H KV heads, D head dim, X rows of a pool.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from codec import bitstream, gpu_decode, gpu_encode
from codec.errors import CodecError
from codec.gpu_decode import DecodePlan
from codec.gpu_device import Device, GpuUnavailable
from codec.gpu_encode import EncodePlan, NoRoom
from codec.levels import LevelKind
from codec.profile import Profile
from codec.rope import RopeTable
from codec.tensor_rows import TORCH_DTYPES

__all__ = [
    "DecodePlan", "Device", "EncodePlan", "GpuUnavailable", "decode_chunks", "encode_chunks", "is_available",
    "prepare_decode", "prepare_encode",
]  # fmt: skip

Pair = tuple[torch.Tensor, torch.Tensor]
Slots = Sequence[Any]


def is_available(device: str | torch.device = "cuda") -> bool:
    """Whether there is a device to run on (or the simulator)."""
    try:
        Device(device)
    except GpuUnavailable:
        return False
    return True


def prepare_decode(
    blobs: Sequence[bytes | bytearray | memoryview],
    *,
    profile: Profile,
    ropes: Sequence[RopeTable | None],
    out: Pair | None = None,
    slots: Slots | None = None,
    device: str | torch.device = "cuda",
) -> tuple[DecodePlan, Pair]:
    """Checks the blobs and uploads them -> a plan, whose run() enqueues the decoding, and where it writes."""
    where = Device(device if out is None else out[0].device)
    if not blobs or len(blobs) != len(ropes) or (slots is not None and (out is None or len(slots) != len(blobs))):
        raise CodecError("want one RopeTable (or None) and, if slots are given, out and one sequence, for each blob")
    places = None if slots is None else [np.asarray(torch.as_tensor(s).cpu().numpy(), np.int64) for s in slots]
    chunks = gpu_decode.open_chunks(blobs, profile, ropes, places)
    if out is None:
        info = chunks[0].info
        layers, heads, *dims = info.layout
        rows = sum(c.info.num_tokens for c in chunks)
        dtype = TORCH_DTYPES[info.dtype]
        k, v = (where.empty(layers, rows, heads, dim, dtype=dtype) for dim in dims)
        out = (k, v)
    return gpu_decode.prepare(chunks, profile, out, where), out


def decode_chunks(
    blobs: Sequence[bytes | bytearray | memoryview],
    *,
    profile: Profile,
    ropes: Sequence[RopeTable | None],
    out: Pair | None = None,
    slots: Slots | None = None,
    device: str | torch.device = "cuda",
) -> list[Pair]:
    """-> each chunk's k, v [L, T, H, D] on the device, in the blobs' dtype; all blobs hold the same layers and heads.

    out: k, v [L, X, H, D] with contiguous rows (a paged pool's memory), to write into instead; slots: for each blob the
    rows of X that its tokens go to (default: one chunk behind the other). Then views of `out` are returned where a
    chunk's slots are neighbours, else copies. Raises BlobError subclasses (`out` then holds garbage), RopeRequired,
    GpuUnavailable, CodecError.
    """
    plan, (k, v) = prepare_decode(blobs, profile=profile, ropes=ropes, out=out, slots=slots, device=device)
    plan.run()
    plan.check()
    pairs, at = [], 0
    for number in range(len(blobs)):
        size = bitstream.parse_header(memoryview(blobs[number]).cast("B")).num_tokens
        if slots is None:
            pairs.append((k[:, at : at + size], v[:, at : at + size]))
        else:
            place = torch.as_tensor(slots[number]).to(k.device, torch.int64)
            first = int(place[0])
            if bool((place == first + torch.arange(size, device=k.device)).all()):
                pairs.append((k[:, first : first + size], v[:, first : first + size]))
            else:
                pairs.append((k[:, place], v[:, place]))
        at += size
    return pairs


def prepare_encode(
    chunks: Sequence[Pair],
    *,
    level: str,
    profile: Profile,
    ropes: Sequence[RopeTable | None],
    room_for_all: bool = False,
) -> EncodePlan:
    """A plan whose run() enqueues the encoding of chunks that stay where they are; gpu_encode.collect takes the blobs.

    Not for raw levels. Profiles without calibration measure each chunk here, not in run().
    """
    spec = profile.level(level)
    if spec.kind is LevelKind.RAW or not chunks or len(chunks) != len(ropes):
        raise CodecError("want a coded level, and one RopeTable (or None) for each chunk")
    device = Device(chunks[0][0].device)
    return gpu_encode.prepare(chunks, ropes, spec, profile, device, room_for_all=room_for_all)


def encode_chunks(
    chunks: Sequence[Pair], *, level: str, profile: Profile, ropes: Sequence[RopeTable | None]
) -> list[bytes]:
    """chunks: k, v [L, T, H, D] each, on one CUDA device, any strides, one dtype -> a blob each, as the CPU makes it.

    ropes: each chunk's own positions, None only without RoPE. Raises UnencodableTensor, UnknownLevel, RopeRequired,
    GpuUnavailable, CodecError.
    """
    spec = profile.level(level)
    if spec.kind is LevelKind.RAW and chunks:
        dtype = gpu_encode.check_chunks(chunks, profile, spec, Device(chunks[0][0].device))
        return gpu_encode.encode_raw(chunks, spec, profile, dtype)
    for room_for_all in (False, True):
        plan = prepare_encode(chunks, level=level, profile=profile, ropes=ropes, room_for_all=room_for_all)
        plan.run()
        try:
            return gpu_encode.collect(plan)
        except NoRoom:
            continue
    raise CodecError("a chunk needs more room than any encoding takes; this is a bug")
