"""Puts fused kernels in place of what transformers computes in many passes, where they are found to give the same.

Nothing is replaced by name alone. A module that looks like an RMSNorm or a gated MLP is run on random numbers beside
the kernel, and gives way only if both agree to the rounding of their dtype; others stay as they are. What is fused on a
GPU besides: cuda_fusions.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from kernels import fused_layer_numba
from kernels.rans_simd import LANES
from prefill.packed_linear import PackedLinear

Forward = Callable[[Tensor], Tensor]


class LayerKernels(Protocol):
    """fused_layer_numba.py or fused_layer_triton.py."""

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float, *, add_one: bool = False) -> Tensor: ...
    def silu_mul(self, gate: Tensor, up: Tensor) -> Tensor: ...


def fuse_for_cpu(model: nn.Module) -> int:
    """bf16 on the CPU: norms and gated activations, in place; how many. Once more changes nothing."""

    def norm(module: nn.Module) -> Forward | None:
        return norm_of(module, fused_layer_numba) if _fits(module) else None

    def mlp(module: nn.Module) -> Forward | None:
        return mlp_of(module, fused_layer_numba) if _fits(module) else None

    with torch.inference_mode():
        return replace_modules(model, norm) + replace_modules(model, mlp)


def _fits(module: nn.Module) -> bool:
    """bf16 on the CPU, whole vectors."""
    parameters = list(module.parameters())
    return bool(parameters) and all(
        p.dtype == torch.bfloat16 and p.device.type == "cpu" and all(n % LANES == 0 for n in p.shape)
        for p in parameters
    )


def replace_modules(model: nn.Module, find: Callable[[nn.Module], Forward | None]) -> int:
    """One module of a kind (class and shapes) is tried; the rest follow it. How many were replaced."""
    verdicts: dict[object, bool] = {}
    count = 0
    for module in model.modules():
        forward = None if "forward" in vars(module) else find(module)
        if forward is None:
            continue
        kind = (type(module), *(tuple(p.shape) for p in module.parameters()))
        if kind not in verdicts:
            verdicts[kind] = all(agree(module.forward, forward, _sample(rows, module)) for rows in (1, 3))
        if verdicts[kind]:
            module.forward = forward  # type: ignore[method-assign]
            count += 1
    return count


def _sample(rows: int, module: nn.Module) -> Tensor:
    parameter = next(module.parameters())
    channels = int(parameter.shape[-1])
    x = torch.randn(1, rows, channels, generator=torch.Generator().manual_seed(channels)) * 2 + 0.1
    return x.to(parameter.device, parameter.dtype)


def agree(plain: Callable[..., Any], ours: Callable[..., Any], *inputs: Tensor) -> bool:
    """To a few units in the last place of the largest value: sums may go in another order."""
    want, got = plain(*inputs), ours(*inputs)
    pairs = zip(want, got, strict=True) if isinstance(want, tuple) else [(want, got)]
    return all(
        a.shape == b.shape
        and a.dtype == b.dtype
        and float((a.float() - b.float()).abs().max()) <= 4 * torch.finfo(a.dtype).eps * float(a.float().abs().max())
        for a, b in pairs
    )


def norm_of(module: nn.Module, kernels: LayerKernels) -> Forward | None:
    if not type(module).__name__.endswith("RMSNorm") or [name for name, _ in module.named_parameters()] != ["weight"]:
        return None
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    weight = module.weight
    assert isinstance(weight, Tensor)
    if eps is None or weight.dim() != 1:
        return None
    add_one = "Gemma" in type(module).__name__
    return lambda x: kernels.rms_norm(x, weight, float(eps), add_one=add_one)


def mlp_of(module: nn.Module, kernels: LayerKernels) -> Forward | None:
    layers = (getattr(module, name, None) for name in ("gate_proj", "up_proj", "down_proj"))
    if not type(module).__name__.endswith("MLP") or not all(isinstance(x, nn.Linear | PackedLinear) for x in layers):
        return None
    # Looked up at each call: the layers may be replaced, too.
    return lambda x: module.down_proj(kernels.silu_mul(module.gate_proj(x), module.up_proj(x)))
