"""Experts' products on a CPU, so that a token's result does not depend on who else chose its experts. Knows torch and
how transformers keeps experts: `gate_up_proj` [E, 2I, C] and `down_proj` [E, C, I], one tensor for all of a layer.

An expert sees as many rows as chose it, which changes with the batch: one row alone would be summed in another order
than two (kernels/row_invariance.py). Here each expert's rows are filled up with zeros to the engine's row multiple, as
the engine fills up its batches. What is added for a token is added in the order of the router's choice.

Shapes: T tokens, K experts a token, S = T * K, E experts, C channels of a row, I of the experts' inner rows, P rows
with those of padding.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from prefill.fusions import agree

TRIED_TOKENS = 9


def pad_experts(model: nn.Module, row_multiple: int) -> int:
    """In place, on the CPU: experts multiply by multiples of so many rows; how many layers. Once more: by the greater
    of both, which is a multiple of the lesser. Those that do not give what they gave before stay as they are."""
    count = 0
    with torch.inference_mode():
        for module in _experts_of(model):
            padded = vars(module).get("forward")
            if isinstance(padded, _Padded):
                padded.row_multiple = max(padded.row_multiple, row_multiple)
                count += 1
                continue
            padded = _Padded(module, row_multiple)
            if agree(module.forward, padded, *_sample(module)):
                module.forward = padded  # type: ignore[assignment]
                count += 1
    return count


def has_other_experts(model: nn.Module) -> bool:
    """Whether some are not computed here, so that nothing is known of their rows."""
    return any(not isinstance(vars(module).get("forward"), _Padded) for module in _with_experts(model))


def expert_shapes(model: nn.Module) -> list[tuple[int, int]]:
    """(depth, columns) of the experts' products."""
    return sorted({(x.shape[2], x.shape[1]) for m in _experts_of(model) for x in (m.gate_up_proj, m.down_proj)})


def router_shapes(model: nn.Module) -> list[tuple[int, int]]:
    """(depth, columns) of weights [columns, depth] that are neither linear layers' nor tables'. Some models multiply by
    them in float32."""
    found = {
        (parameter.shape[1], parameter.shape[0])
        for module in model.modules()
        if not isinstance(module, nn.Linear | nn.Embedding)
        for name, parameter in module.named_parameters(recurse=False)
        if name == "weight" and parameter.ndim == 2
    }
    return sorted(found)


def grouped_product(rows: Tensor, weights: Tensor, stops: Tensor) -> Tensor:
    """`rows` [P, C] up to `stops[e]` (int32 [E], ascending) times the transpose of `weights` [E, N, C] -> [P, N]."""
    return nn.functional.grouped_mm(rows, weights.transpose(1, 2), offs=stops)


def product_among_others(rows: Tensor, weight: Tensor) -> Tensor:
    """`rows` [1, R, C] times the transpose of `weight` [N, C], as one expert of three, behind another's rows: what
    `kernels/row_invariance.py` looks at."""
    before = 64 * (rows.shape[1] % 3)  # any multiple of a row multiple
    first = rows.new_zeros(before, rows.shape[2])
    stops = torch.tensor([before, before + rows.shape[1], before + rows.shape[1]], dtype=torch.int32)
    result = grouped_product(torch.cat((first, rows[0])), weight.expand(3, -1, -1), stops)
    return result[None, before:]


class _Padded:
    """Stands for `forward` of a layer's experts."""

    def __init__(self, module: nn.Module, row_multiple: int) -> None:
        self.module, self.row_multiple = module, row_multiple

    def __call__(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """`hidden_states` [T, C], `top_k_index`, `top_k_weights` [T, K] -> [T, C]."""
        experts, (num_tokens, num_chosen) = self.module, top_k_index.shape
        chosen = top_k_index.flatten()
        order = chosen.argsort(stable=True)
        counts = torch.bincount(chosen, minlength=experts.num_experts)
        padded = -(-counts // self.row_multiple) * self.row_multiple
        stops = padded.cumsum(0)
        # What is before an expert's rows: the padding of the experts before it.
        shift = stops - padded - (counts.cumsum(0) - counts)
        places = torch.arange(len(chosen)) + shift[chosen[order]]
        rows = hidden_states.new_zeros(int(stops[-1]), hidden_states.shape[1])
        rows[places] = hidden_states[order // num_chosen]
        stops = stops.int()
        inner = experts._apply_gate(grouped_product(rows, experts.gate_up_proj, stops))
        outer = grouped_product(inner, experts.down_proj, stops)
        results = torch.empty(len(chosen), outer.shape[1], dtype=outer.dtype)
        results[order] = outer[places]
        weighted = results.view(num_tokens, num_chosen, -1) * top_k_weights[..., None]
        total = weighted[:, 0].float()
        for choice in range(1, num_chosen):
            total += weighted[:, choice]
        return total.to(hidden_states.dtype)


def _with_experts(model: nn.Module) -> Iterator[nn.Module]:
    for module in model.modules():
        if any(parameter.ndim == 3 for parameter in module.parameters(recurse=False)):
            yield module


def _experts_of(model: nn.Module) -> Iterator[nn.Module]:
    """Those that are kept as this file knows them."""
    for module in _with_experts(model):
        names = {name for name, _ in module.named_parameters(recurse=False)}
        is_plain = not any(
            getattr(module, flag, False)
            for flag in ("has_bias", "is_transposed", "has_post_expert_norm", "_is_expert_parallel")
        )
        if (
            is_plain
            and names == {"gate_up_proj", "down_proj"}
            and getattr(module, "has_gate", False)
            and hasattr(module, "num_experts")
            and module.gate_up_proj.device.type == "cpu"
        ):
            yield module


def _sample(module: nn.Module) -> tuple[Tensor, Tensor, Tensor]:
    num_experts, channels = int(module.num_experts), int(module.gate_up_proj.shape[2])
    dtype = module.gate_up_proj.dtype
    generator = torch.Generator().manual_seed(channels)
    hidden = torch.randn(TRIED_TOKENS, channels, generator=generator).to(dtype)
    num_chosen = min(2, num_experts)
    chosen = torch.stack([torch.randperm(num_experts, generator=generator)[:num_chosen] for _ in range(TRIED_TOKENS)])
    return hidden, chosen, torch.rand(TRIED_TOKENS, num_chosen, generator=generator).to(dtype)
