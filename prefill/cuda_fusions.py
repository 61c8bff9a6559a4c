"""Puts fused kernels into a model on a GPU, where they are found to give the same (fusions.py): a decode step is so
short there that launching and rereading small tensors takes a third of it.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from kernels import fused_layer_triton as fused
from prefill.fusions import Forward, agree, mlp_of, norm_of, replace_modules


@dataclass(frozen=True, slots=True, kw_only=True)
class Fused:
    """How many modules were replaced."""

    norms: int
    mlps: int
    linears: int
    rotary: bool


def fuse(model: PreTrainedModel, *, row_products: bool = True) -> Fused:
    """In place. `row_products`: linear layers for a single row too (in float32 sums, as any product; but not the
    library's, so a row alone may differ in the last bit from the same row in company)."""
    device = model.device
    with torch.inference_mode():
        return Fused(
            norms=replace_modules(model, lambda module: norm_of(module, fused)),
            mlps=replace_modules(model, lambda module: mlp_of(module, fused)),
            linears=replace_modules(model, _linear_of) if row_products else 0,
            rotary=_replace_rotary(model, device),
        )


def _linear_of(module: nn.Module) -> Forward | None:
    if type(module) is not nn.Linear or module.bias is not None or not module.weight.is_contiguous():
        return None
    weight = module.weight

    def forward(x: Tensor) -> Tensor:
        if x.numel() == x.shape[-1]:
            return fused.row_product(x, weight)
        return nn.functional.linear(x, weight)

    return forward


def _replace_rotary(model: PreTrainedModel, device: torch.device) -> bool:
    """The family's `apply_rotary_pos_emb`, in its own module: all models of that family in this process."""
    family = sys.modules[type(model).__module__]
    plain = getattr(family, "apply_rotary_pos_emb", None)
    if plain is None or hasattr(plain, "kvstream_plain"):
        return plain is not None

    def apply(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *rest: Any, **options: Any) -> tuple[Tensor, Tensor]:
        is_ours = q.device.type == device.type and q.shape[0] == 1 and q.shape[-1] == cos.shape[-1]
        if rest or options or not is_ours or q.stride(-1) != 1 or k.stride(-1) != 1 or q.dtype != cos.dtype:
            result: tuple[Tensor, Tensor] = plain(q, k, cos, sin, *rest, **options)
            return result
        return fused.rotary(q, k, cos, sin)

    generator = torch.Generator().manual_seed(0)
    config = model.config
    heads = int(config.num_attention_heads), int(getattr(config, "num_key_value_heads", config.num_attention_heads))
    dim = int(getattr(config, "head_dim", None) or config.hidden_size // heads[0])
    q, k = (torch.randn(1, n, 3, dim, generator=generator).to(device, model.dtype) for n in heads)
    cos, sin = (torch.randn(1, 3, dim, generator=generator).to(device, model.dtype) for _ in range(2))
    if not agree(plain, apply, q, k, cos, sin):
        return False
    apply.kvstream_plain = plain  # type: ignore[attr-defined]
    family.apply_rotary_pos_emb = apply  # type: ignore[attr-defined]
    return True
