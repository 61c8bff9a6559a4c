"""What GPU decoding and encoding share: buffers that one copy uploads, arrays as numba wants them, a profile's tables.

Imports without a GPU; GpuUnavailable is raised on first use. In numba's CUDA simulator and Triton's interpreter the
same code runs on CPU tensors (tests/parity/test_cuda_simulator.py).
Legend: L layers, H KV heads, D head dim, M stages, P rows (K's layers and heads, then V's), W index words a row.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numba import config, cuda

from codec.errors import CodecError
from codec.levels import Lossy
from codec.profile import Profile
from codec.tensor_rows import FlatPlan, layout_of
from kernels import rans_cuda

Array = np.ndarray[Any, Any]
ALIGNMENT = 16
_TORCH_OF = {
    np.dtype(np.uint8): torch.uint8, np.dtype(np.uint16): torch.int16, np.dtype(np.int16): torch.int16,
    np.dtype(np.uint32): torch.int32, np.dtype(np.int32): torch.int32, np.dtype(np.uint64): torch.int64,
    np.dtype(np.int64): torch.int64, np.dtype(np.float32): torch.float32,
}  # fmt: skip


class GpuUnavailable(CodecError):
    """There is no CUDA device here, or numba-cuda cannot use it."""


class _Pointer:
    """Device memory for numba, by CUDA's array interface; without a stream in it, so that numba does not wait."""

    def __init__(self, tensor: torch.Tensor, dtype: np.dtype[Any], count: int) -> None:
        self.tensor = tensor  # keeps the memory
        self.__cuda_array_interface__ = {
            "shape": (count,), "typestr": dtype.str, "data": (tensor.data_ptr(), False), "strides": None, "version": 3,
        }  # fmt: skip


class Device:
    """Where kernels run: a CUDA device, or the simulator on CPU tensors."""

    def __init__(self, device: str | torch.device = "cuda") -> None:
        self.is_simulated = bool(config.ENABLE_CUDASIM)
        self.device = torch.device("cpu" if self.is_simulated else device)
        if self.is_simulated:
            return
        if self.device.type != "cuda" or not torch.cuda.is_available():
            raise GpuUnavailable(
                f"no CUDA device for {self.device} here; codec.chunk.encode_chunk and decode_chunk run on the CPU"
            )
        if self.device.index is None:
            self.device = torch.device("cuda", torch.cuda.current_device())
        torch.zeros(1, device=self.device)  # makes torch's context the primary one
        try:
            cuda.select_device(self.device.index)
        except Exception as error:  # whatever the driver or numba-cuda says
            raise GpuUnavailable(f"numba cannot use {self.device}: {error}; pip install 'kvstream[gpu]'") from error
        config.CUDA_LOW_OCCUPANCY_WARNINGS = 0  # a lone chunk is a small grid, and known to be
        config.CUDA_WARN_ON_IMPLICIT_COPY = 0

    def view(self, tensor: torch.Tensor, dtype: Any) -> Any:
        """A contiguous tensor's memory as a flat array of another type, for numba."""
        kind = np.dtype(dtype)
        count = tensor.numel() * tensor.element_size() // kind.itemsize
        assert tensor.is_contiguous() and count > 0, "kernels take no empty arrays"
        if self.is_simulated:
            flat: Array = tensor.reshape(-1).view(torch.uint8).numpy().view(kind)
            return flat
        return cuda.as_cuda_array(_Pointer(tensor, kind, count), sync=False)

    def span(self, tensor: torch.Tensor) -> Any:
        """All memory that a strided tensor touches, from its first element on, as uint16."""
        extent = 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
        size = extent * tensor.element_size() // 2
        if self.is_simulated:
            flat = tensor.view(torch.int16).as_strided((size,), (1,))
            return flat.numpy().view(np.uint16)
        return cuda.as_cuda_array(_Pointer(tensor, np.dtype(np.uint16), size), sync=False)

    def run(self, kernel: Any, launch: rans_cuda.Launch, *args: Any) -> None:
        """Enqueues on torch's current stream."""
        stream = 0 if self.is_simulated else _stream(torch.cuda.current_stream(self.device).cuda_stream)
        kernel[launch.blocks, launch.threads, stream, launch.shared_bytes](*args)

    def empty(self, *shape: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=self.device)

    def zeros(self, *shape: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype, device=self.device)


@lru_cache(maxsize=64)
def _stream(handle: int) -> Any:
    return cuda.external_stream(handle) if handle else cuda.default_stream()


class Upload:
    """Host arrays side by side in one buffer, so that one copy takes all of them to the device."""

    def __init__(self) -> None:
        self._parts: list[tuple[str, int, Array]] = []
        self._size = 0
        self._device: torch.Tensor | None = None
        self._where: dict[str, tuple[int, Array]] = {}

    def add(self, name: str, array: Array) -> None:
        """Empty arrays become one zero: kernels take no empty ones."""
        flat = np.ascontiguousarray(array).reshape(-1)
        flat = flat if flat.size else np.zeros(1, flat.dtype)
        self._parts.append((name, self._size, flat))
        self._where[name] = (self._size, flat)
        self._size += -(-flat.nbytes // ALIGNMENT) * ALIGNMENT

    def send(self, device: Device) -> None:
        """Copies everything; the arrays themselves may change afterwards."""
        is_cuda = not device.is_simulated
        host = torch.empty(max(self._size, ALIGNMENT), dtype=torch.uint8, pin_memory=is_cuda)
        room = host.numpy()
        for _, at, flat in self._parts:
            room[at : at + flat.nbytes] = flat.view(np.uint8)
        self._device = host.to(device.device, non_blocking=True) if is_cuda else host
        self._host = host  # until the copy is over
        self._parts = []

    def tensor(self, name: str) -> torch.Tensor:
        """Unsigned types come as the signed ones of their width."""
        assert self._device is not None
        at, flat = self._where[name]
        return self._device[at : at + flat.nbytes].view(_TORCH_OF[flat.dtype])

    def view(self, name: str, device: Device, dtype: Any = None) -> Any:
        at, flat = self._where[name]
        return device.view(self.tensor(name), dtype or flat.dtype)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Rows:
    """What a profile (or a blob) says of P segments, on the device. `half_turned` [P]: whether keys are unrotated."""

    upload: Upload
    num_rows: int
    num_tables: int
    num_sets: int
    num_refined: int
    image_words: int
    num_dims: int
    active: Array
    matrix: Array
    is_turned: Array


def make_rows(flats: list[FlatPlan], lossy: Lossy, device: Device, *, for_encoding: bool) -> Rows:
    """flats: segments of one head dim, one behind the other, for all stages of `lossy`."""
    image = (rans_cuda.encode_image if for_encoding else rans_cuda.shared_image)(lossy.codebook.freqs, lossy.cuts)
    cat = {
        name: np.concatenate([getattr(flat, name) for flat in flats], axis=axis)
        for name, axis in (
            ("mean", 0), ("step", 0), ("turned", 0), ("group", 0), ("matrix", 0), ("active", 1), ("index", 0),
            ("refine", 1),
        )
    }  # fmt: skip
    matrices = np.concatenate([flat.analysis if for_encoding else flat.synthesis for flat in flats])
    at, matrix = 0, []
    for flat in flats:  # each plan numbers its own matrices
        matrix.append(np.where(flat.matrix >= 0, flat.matrix + at, -1))
        at += len(flat.analysis)
    cat["matrix"] = np.concatenate(matrix)
    upload = Upload()
    upload.add("image", image)
    upload.add("base_index", rans_cuda.index_words(cat["index"]))
    upload.add("refine_index", rans_cuda.index_words(cat["refine"]))
    for name in ("group", "active", "matrix"):
        upload.add(name, cat[name].astype(np.int32))
    for name in ("step", "mean"):
        upload.add(name, cat[name])
        upload.add(f"{name}_by_quads", rans_cuda.by_quads(cat[name]))
    upload.add("inv_step", np.float32(1) / cat["step"])
    upload.add("matrices", matrices)
    upload.send(device)
    return Rows(
        upload=upload, num_rows=len(cat["group"]), num_tables=lossy.codebook.num_tables, num_sets=lossy.cuts.shape[1],
        num_refined=lossy.cuts.shape[0], image_words=image.size, num_dims=cat["mean"].shape[1], active=cat["active"],
        matrix=cat["matrix"], is_turned=cat["turned"].astype(bool),
    )  # fmt: skip


def plain_flat(index: Array, *, stages: int = 1) -> FlatPlan:
    """index [S, D]: for a coded byte plane: no steps, means or stages."""
    ones = np.ones(index.shape, np.float32)
    return FlatPlan.of_shipped(0 * ones, ones, index, stages, is_turned=False)


def whole(profile: Profile) -> tuple[tuple[int, int], tuple[int, int]]:
    layers, heads, _, _ = layout_of(profile)
    return (0, layers), (0, heads)


_CACHE_SIZE = 16
_cached: dict[tuple[Any, ...], Rows] = {}


def cached_rows(key: tuple[Any, ...], make: Any) -> Rows:
    """The rows of a profile's tables, kept on the device; the oldest go first."""
    rows = _cached.get(key)
    if rows is None:
        rows = make()
        while len(_cached) >= _CACHE_SIZE:
            _cached.pop(next(iter(_cached)))
        _cached[key] = rows
    return rows
