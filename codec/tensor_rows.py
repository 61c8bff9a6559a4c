"""What encoding and decoding share: tensors as flat rows, the backends, plans as the coders want them.

Legend: L layers, T tokens, H KV heads, D head dim, S = L * H segments a tensor, M stages, K stages in hand.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import Any, Literal

import numpy as np
import torch

from codec import reference
from codec.bitstream import Range
from codec.errors import CodecError, RopeRequired
from codec.levels import Lossy, TensorPlan
from codec.profile import Profile
from codec.rope import RopeTable
from kernels import rans_numba

Backend = Literal["numba", "reference"]
BACKENDS: dict[str, ModuleType] = {"numba": rans_numba, "reference": reference}
DTYPES = {
    torch.bfloat16: "bfloat16", torch.float16: "float16", torch.float32: "float32",
    torch.float8_e4m3fn: "float8_e4m3fn", torch.float8_e5m2: "float8_e5m2",
}  # fmt: skip
TORCH_DTYPES = {name: dtype for dtype, name in DTYPES.items()}
BITS_DTYPES = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
Array = np.ndarray[Any, Any]


def bits_of(tensor: torch.Tensor) -> Array:
    """A CPU tensor's bit patterns as unsigned integers of its width; shares memory."""
    array: Array = tensor.view(BITS_DTYPES[tensor.element_size()]).numpy()
    return array.view(f"u{tensor.element_size()}")


@dataclass(frozen=True, slots=True, kw_only=True)
class StridedRows:
    """bf16 patterns of a [L, T, H, D] tensor as flat memory plus where each segment starts."""

    flat: Array
    pos: Array
    stride_t: int
    view: Array

    @staticmethod
    def of(tensor: torch.Tensor) -> StridedRows:
        """Shares memory. The innermost dimension must be contiguous."""
        view = bits_of(tensor)
        stride_l, stride_t, stride_h, _ = (s // 2 for s in view.strides)
        layers, tokens, heads, dim = view.shape
        span = (layers - 1) * stride_l + (tokens - 1) * stride_t + (heads - 1) * stride_h + dim
        flat = np.lib.stride_tricks.as_strided(view, (span,), (2,))
        pos = (np.arange(layers)[:, None] * stride_l + np.arange(heads) * stride_h).astype(np.int64).ravel()
        return StridedRows(flat=flat, pos=pos, stride_t=stride_t, view=view)

    def segment(self, s: int) -> Array:
        heads = self.view.shape[2]
        return np.asarray(self.view[s // heads, :, s % heads, :])


def layout_of(profile: Profile) -> tuple[int, int, int, int]:
    lay = profile.layout
    return lay.num_layers, lay.num_kv_heads, lay.head_dim_k, lay.head_dim_v


def ranges_of(layers: Range | None, heads: Range | None, whole: tuple[Range, Range]) -> tuple[Range, Range]:
    """The layers and heads asked for, in the model's numbers, inside what there is. Raises CodecError."""
    asked = (layers or whole[0], heads or whole[1])
    for what, (start, stop), (low, high) in zip(("layers", "heads"), asked, whole, strict=True):
        if not low <= start < stop <= high:
            raise CodecError(f"{what} {start} to {stop} are not in {low} to {high}")
    return asked


def check_rope(rope: RopeTable | None, num_tokens: int, profile: Profile) -> bool:
    """Whether keys are to be unrotated."""
    if rope is None:
        if profile.needs_rope:
            raise RopeRequired("this profile codes keys before RoPE; pass the chunk's RopeTable")
        return False
    if rope.num_tokens != num_tokens or 2 * rope.half_dim > profile.layout.head_dim_k:
        raise RopeRequired(
            f"the RopeTable is [{rope.num_tokens}, {2 * rope.half_dim}]; want the chunk's {num_tokens} "
            f"tokens and at most {profile.layout.head_dim_k} dims"
        )
    if rope.layers is not None and len(rope.layers) != profile.layout.num_layers:
        raise RopeRequired(f"the RopeTable knows {len(rope.layers)} layers; want {profile.layout.num_layers}")
    return True


def turned_segments(rope: RopeTable | None, part: tuple[Range, Range]) -> Array:
    """uint8 [S]: 1 for the segments of these layers and heads whose keys the table turns."""
    (first, stop), (low, high) = part
    turned = np.zeros(stop - first, bool) if rope is None else rope.turned(first, stop)
    return np.repeat(turned.astype(np.uint8), high - low)


def rope_halves(rope: RopeTable | None, num_tokens: int, *, inverse: bool) -> tuple[Array, Array]:
    if rope is None:
        none = np.zeros((num_tokens, 0), np.float32)
        return none, none
    return rope.inverse() if inverse else rope.forward()


@dataclass(frozen=True, slots=True, kw_only=True)
class FlatPlan:
    """A tensor's plan for some layers and heads and K stages, one row a segment, as the coders take it."""

    mean: Array
    step: Array
    turned: Array
    group: Array
    matrix: Array
    analysis: Array
    synthesis: Array
    active: Array
    index: Array
    refine: Array

    @staticmethod
    def of(plan: TensorPlan, part: tuple[Range, Range], stages: int) -> FlatPlan:
        rows, cols = slice(*part[0]), slice(*part[1])
        heads, dim = part[1][1] - part[1][0], plan.mean.shape[2]
        count = (part[0][1] - part[0][0]) * heads

        def flat(array: Array, *tail: int) -> Array:
            return np.ascontiguousarray(array).reshape(-1, *tail)

        return FlatPlan(
            mean=flat(plan.mean[rows, cols], dim), step=flat(plan.step[rows, cols], dim),
            turned=np.repeat(plan.is_turned[rows].astype(np.uint8), heads), group=np.repeat(plan.group[rows], heads),
            matrix=np.ascontiguousarray(plan.matrix[rows, cols]).reshape(-1),
            analysis=plan.analysis, synthesis=plan.synthesis,
            active=np.ascontiguousarray(plan.active[:stages, rows, cols]).reshape(stages, count),
            index=flat(plan.index[rows, cols], 2, dim),
            refine=np.ascontiguousarray(plan.refine[: stages - 1, rows, cols]).reshape(stages - 1, count, dim),
        )  # fmt: skip

    @staticmethod
    def of_shipped(mean: Array, step: Array, index: Array, stages: int, *, is_turned: bool) -> FlatPlan:
        """mean, step, index [S, D], as they travel in a blob."""
        count, dim = mean.shape
        none = np.zeros((0, dim, dim), np.float32)
        return FlatPlan(
            mean=mean, step=step, turned=np.full(count, is_turned, np.uint8), group=np.zeros(count, np.int64),
            matrix=np.full(count, -1, np.int64), analysis=none, synthesis=none,
            active=np.full((stages, count), dim, np.int64), index=np.repeat(index[:, None, :], 2, axis=1),
            refine=np.repeat(index[None], stages - 1, axis=0),
        )  # fmt: skip


def packed_cuts(lossy: Lossy, stages: int) -> Array:
    """cuts [M - 1, n, 3, 2] -> uint32 [K - 1, n, 3], first | second << 16."""
    wide = lossy.cuts[: stages - 1].astype(np.uint32)
    return np.ascontiguousarray(wide[..., 0] | (wide[..., 1] << 16))
