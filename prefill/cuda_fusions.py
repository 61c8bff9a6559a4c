"""Puts fused kernels in place of what transformers computes in many, where they are found to give the same. For models
on a GPU: a decode step is so short there that launching and rereading small tensors takes a third of it.

Nothing is replaced by name alone. A module that looks like an RMSNorm, a gated MLP or a linear layer is run on random
numbers beside the kernel, and gives way only if both agree to the rounding of their dtype; others stay as they are.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from kernels import fused_layer_triton as fused


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
            norms=_replace(model, _norm_of, device),
            mlps=_replace(model, _mlp_of, device),
            linears=_replace(model, _linear_of, device) if row_products else 0,
            rotary=_replace_rotary(model, device),
        )


Forward = Callable[[Tensor], Tensor]


def _replace(model: nn.Module, find: Callable[[nn.Module], Forward | None], device: torch.device) -> int:
    """One module of a kind (class and shapes) is tried; the rest follow it."""
    verdicts: dict[object, bool] = {}
    count = 0
    for module in model.modules():
        forward = find(module)
        if forward is None:
            continue
        kind = (type(module), *(tuple(p.shape) for p in module.parameters()))
        if kind not in verdicts:
            channels = _input_channels(module)
            verdicts[kind] = all(
                _agree(module.forward, forward, _sample(rows, channels, module, device)) for rows in (1, 3)
            )
        if verdicts[kind]:
            module.forward = forward  # type: ignore[method-assign]
            count += 1
    return count


def _input_channels(module: nn.Module) -> int:
    return int(next(module.parameters()).shape[-1])


def _sample(rows: int, channels: int, module: nn.Module, device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(channels)
    x = torch.randn(1, rows, channels, generator=generator) * 2 + 0.1
    return x.to(device, next(module.parameters()).dtype)


def _agree(plain: Callable[..., Any], ours: Callable[..., Any], *inputs: Tensor) -> bool:
    """To a few units in the last place of the largest value: sums may go in another order."""
    want, got = plain(*inputs), ours(*inputs)
    pairs = zip(want, got, strict=True) if isinstance(want, tuple) else [(want, got)]
    return all(
        a.shape == b.shape
        and a.dtype == b.dtype
        and float((a.float() - b.float()).abs().max()) <= 4 * torch.finfo(a.dtype).eps * float(a.float().abs().max())
        for a, b in pairs
    )


def _norm_of(module: nn.Module) -> Forward | None:
    if not type(module).__name__.endswith("RMSNorm") or [name for name, _ in module.named_parameters()] != ["weight"]:
        return None
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    weight = module.weight
    assert isinstance(weight, Tensor)
    if eps is None or weight.dim() != 1:
        return None
    add_one = "Gemma" in type(module).__name__
    return lambda x: fused.rms_norm(x, weight, float(eps), add_one=add_one)


def _mlp_of(module: nn.Module) -> Forward | None:
    gate, up, down = (getattr(module, name, None) for name in ("gate_proj", "up_proj", "down_proj"))
    layers_known = isinstance(gate, nn.Linear) and isinstance(up, nn.Linear) and isinstance(down, nn.Linear)
    if not type(module).__name__.endswith("MLP") or not layers_known:
        return None
    return lambda x: down(fused.silu_mul(gate(x), up(x)))  # type: ignore[misc]


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
    if not _agree(plain, apply, q, k, cos, sin):
        return False
    apply.kvstream_plain = plain  # type: ignore[attr-defined]
    family.apply_rotary_pos_emb = apply  # type: ignore[attr-defined]
    return True
