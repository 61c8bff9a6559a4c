"""Weights of linear layers in the order in which the CPU's matrix kernels read them. Knows torch.

oneDNN copies a bf16 weight into blocks of its own before every product. For few rows that takes longer than the
product: a decode step of the bundled model spends 2.4 of 6.6 ms on it, with 32 rows. Here the copy is made once. It
takes the place of the weight, so no memory is lost, except where the weight is used elsewhere as well (tied
embeddings). The products are the same oneDNN kernels and give the same bits.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class PackedLinear(nn.Module):
    """Stands for an `nn.Linear` with a bf16 weight on the CPU."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.bias = linear.bias
        self._weight = pack_weight(linear.weight)

    def forward(self, x: Tensor) -> Tensor:
        return packed_product(x, self._weight, self.bias)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


def pack_weight(weight: Tensor) -> Tensor:
    """`weight` [columns, depth] bf16 as an opaque tensor for `packed_product`."""
    with torch.no_grad():
        return torch.ops.mkldnn._reorder_linear_weight(weight.detach())


def packed_product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """As `nn.functional.linear`."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def can_pack() -> bool:
    """Whether this build of torch and this CPU multiply bf16 by oneDNN."""
    return torch.backends.mkldnn.is_available() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def pack_linears(model: nn.Module) -> None:
    """Replace every `nn.Linear` of bf16 on the CPU in place. Models that were packed before stay as they are."""
    if not can_pack():
        return
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            # Exactly this class: one derived from it may do something else with its weight.
            if type(child) is nn.Linear and child.weight.dtype == torch.bfloat16 and child.weight.device.type == "cpu":
                setattr(module, name, PackedLinear(child))
