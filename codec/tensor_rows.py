"""What encoding and decoding share: tensors as flat rows, the backends, plans as the coders want them.

Legend: L layers, T tokens, H KV heads, D head dim, S = L * H segments a tensor.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import Any, Literal

import numpy as np
import torch

from codec import reference
from codec.errors import RopeRequired
from codec.levels import TensorPlan
from codec.profile import Profile
from codec.rope import RopeTable
from kernels import rans_numba

Backend = Literal["numba", "reference"]
BACKENDS: dict[str, ModuleType] = {"numba": rans_numba, "reference": reference}
DTYPES = {torch.bfloat16: "bfloat16", torch.float16: "float16", torch.float32: "float32"}
TORCH_DTYPES = {name: dtype for dtype, name in DTYPES.items()}
Array = np.ndarray[Any, Any]


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
        view = tensor.view(torch.int16).numpy().view(np.uint16)
        stride_l, stride_t, stride_h, _ = (s // 2 for s in view.strides)
        layers, tokens, heads, dim = view.shape
        span = (layers - 1) * stride_l + (tokens - 1) * stride_t + (heads - 1) * stride_h + dim
        flat = np.lib.stride_tricks.as_strided(view, (span,), (2,))
        pos = (np.arange(layers)[:, None] * stride_l + np.arange(heads) * stride_h).astype(np.int64).ravel()
        return StridedRows(flat=flat, pos=pos, stride_t=stride_t, view=view)

    def segment(self, s: int) -> Array:
        heads = self.view.shape[2]
        return self.view[s // heads, :, s % heads, :]


def layout_of(profile: Profile) -> tuple[int, int, int, int]:
    lay = profile.layout
    return lay.num_layers, lay.num_kv_heads, lay.head_dim_k, lay.head_dim_v


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
    return True


def rope_halves(rope: RopeTable | None, num_tokens: int, *, inverse: bool) -> tuple[Array, Array]:
    if rope is None:
        none = np.zeros((num_tokens, 0), np.float32)
        return none, none
    return rope.inverse() if inverse else rope.forward()


def flat_plan(plan: TensorPlan, heads: int) -> tuple[Array, Array, Array]:
    """index [S, 2, D], step [S], group [S]."""
    dim = plan.index.shape[3]
    return plan.index.reshape(-1, 2, dim), plan.step.reshape(-1), np.repeat(plan.group, heads)
