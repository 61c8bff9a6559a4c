"""Which codec a worker's KV goes through: the CPU's, with copies where pages are on a GPU, or the GPU's own.

The GPU's is taken only after it has coded random KV at every level beside the CPU's, with the same bytes; that also
compiles its kernels. Legend: L layers, T tokens, H KV heads, D head dim.
"""

from __future__ import annotations

import logging
import threading
from typing import Protocol

import torch
from torch import Tensor

from codec.chunk import decode_chunk, encode_chunk
from codec.errors import CodecError
from codec.levels import LevelKind
from codec.profile import Profile
from codec.rope import RopeTable
from prefill.compute_device import completed

log = logging.getLogger("kvstream.runtime")

Blob = bytes | memoryview
Pair = tuple[Tensor, Tensor]
TRIED_TOKENS = 40
TOLERANCE = 1e-2  # of decoded values, relative: matrix levels may differ by a bf16 ulp (codec/SPEC.md)


class ChunkCodec(Protocol):
    """`k`, `v` [L, T, H, D] of one chunk. Calls return when the device has done it."""

    def encode(self, k: Tensor, v: Tensor, *, level: str, profile: Profile, rope: RopeTable) -> bytes: ...
    def decode(self, blob: Blob, *, profile: Profile, rope: RopeTable) -> Pair:
        """On the device of the pages."""
        ...

    def decode_into(self, blob: Blob, pages: Pair, *, profile: Profile, rope: RopeTable) -> None:
        """Into views of the pages; they hold garbage after an error."""
        ...


class HostCodec:
    """The CPU's. `device`: where pages are."""

    def __init__(self, device: str | torch.device = "cpu") -> None:
        self.device = torch.device(device)

    def encode(self, k: Tensor, v: Tensor, *, level: str, profile: Profile, rope: RopeTable) -> bytes:
        return encode_chunk(k.cpu(), v.cpu(), level=level, profile=profile, rope=rope)

    def decode(self, blob: Blob, *, profile: Profile, rope: RopeTable) -> Pair:
        k, v = decode_chunk(blob, profile=profile, rope=rope)
        return k.to(self.device), v.to(self.device)

    def decode_into(self, blob: Blob, pages: Pair, *, profile: Profile, rope: RopeTable) -> None:
        if self.device.type == "cpu":
            decode_chunk(blob, profile=profile, rope=rope, out=pages)
            return
        for side, decoded in zip(pages, decode_chunk(blob, profile=profile, rope=rope), strict=True):
            side.copy_(decoded)


class DeviceCodec:
    """The GPU's (codec/gpu.py). One call at a time: its tables on the device are shared. Raises
    codec.gpu.GpuUnavailable when used where numba-cuda is missing or does not work."""

    def __init__(self, device: str | torch.device) -> None:
        from codec import gpu  # brings numba's CUDA side along

        self.device = torch.device(device)
        self._gpu = gpu
        self._lock = threading.Lock()

    def encode(self, k: Tensor, v: Tensor, *, level: str, profile: Profile, rope: RopeTable) -> bytes:
        with self._lock, completed(self.device):
            k, v = k.to(self.device), v.to(self.device)
            return self._gpu.encode_chunks([(k, v)], level=level, profile=profile, ropes=[rope])[0]

    def decode(self, blob: Blob, *, profile: Profile, rope: RopeTable) -> Pair:
        with self._lock, completed(self.device):
            return self._gpu.decode_chunks([blob], profile=profile, ropes=[rope], device=self.device)[0]

    def decode_into(self, blob: Blob, pages: Pair, *, profile: Profile, rope: RopeTable) -> None:
        with self._lock, completed(self.device):
            self._gpu.decode_chunks([blob], profile=profile, ropes=[rope], out=pages)


def codec_for(device: torch.device, profile: Profile, rope: RopeTable, dtype: torch.dtype) -> ChunkCodec:
    """`rope`: of `TRIED_TOKENS` tokens; `dtype`: of the model's KV."""
    host = HostCodec(device)
    if device.type != "cuda":
        return host
    try:
        own = DeviceCodec(device)
        problem = difference(host, own, profile, rope, dtype)
    except (CodecError, ImportError) as error:
        problem = f"{type(error).__name__}: {error}"
    if problem:
        log.warning("KV is coded on the CPU, not on %s: %s", device, problem)
        return host
    return own


def difference(host: HostCodec, own: ChunkCodec, profile: Profile, rope: RopeTable, dtype: torch.dtype) -> str:
    """Where two codecs disagree on random KV; "" if nowhere."""
    layout = profile.layout
    generator = torch.Generator().manual_seed(0)
    k, v = (
        torch.randn(layout.num_layers, rope.num_tokens, layout.num_kv_heads, dim, generator=generator)
        .to(dtype)
        .to(host.device)
        for dim in (layout.head_dim_k, layout.head_dim_v)
    )
    for level in profile.levels:
        blob = host.encode(k, v, level=level.name, profile=profile, rope=rope)
        if own.encode(k, v, level=level.name, profile=profile, rope=rope) != blob:
            return f"other bytes at level {level.name}"
        want = host.decode(blob, profile=profile, rope=rope)
        pages = torch.full_like(k, float("nan")), torch.full_like(v, float("nan"))
        own.decode_into(blob, pages, profile=profile, rope=rope)
        exact = level.kind is not LevelKind.QUANTIZED
        for got in (own.decode(blob, profile=profile, rope=rope), pages):
            if not all(_agree(a, b, exact=exact) for a, b in zip(got, want, strict=True)):
                return f"other values at level {level.name}"
    return ""


def _agree(got: Tensor, want: Tensor, *, exact: bool) -> bool:
    if exact:
        return torch.equal(got, want)
    difference, norm = (got.float() - want.float()).norm(), want.float().norm()
    return bool(difference <= TOLERANCE * norm)  # false with a NaN
