"""How a model turns its keys by position, found by looking at the keys. Knows torch and transformers' rotary modules.

The codec codes keys before RoPE (codec/rope.py) where they are turned by the rotate-half convention over the first
channels, with a table that the model's own rotary module gives. Rather than to trust a family's name, `find_rotation`
takes keys of one token at several positions, with attention silenced so that nothing else depends on the position, and
asks of each table which layers' keys it makes equal again. Layers that none does (interleaved pairs, rotated channels
behind plain ones as in latent attention, no rotation, the other kind of RoPE of a model with two) are coded as they
are stored: right, only larger.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

# Of a key's norm. Keys and tables are rounded to bf16 (0.3 %); a wrong table misses by 100 %.
TOLERANCE = 0.03


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyRotation:
    """`rotary` turns the keys of the layers whose `layers` [L] flag is set; without one, the codec turns nothing."""

    rotary: nn.Module | None
    layer_type: str | None
    layers: tuple[bool, ...]

    def tables(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos, sin [T, R] float32 of `positions` [T] int64, on their device; R = 0 without a rotation. A pure rotation
        (cos² + sin² = 1), also where the model scales its tables (yarn), so that rotating by -sin and again by +sin
        gives the key back."""
        if self.rotary is None:
            return torch.zeros(len(positions), 0), torch.zeros(len(positions), 0)
        extra = {} if self.layer_type is None else {"layer_type": self.layer_type}
        with torch.inference_mode():
            cos, sin = self.rotary(torch.zeros(1, device=positions.device), positions[None], **extra)
        name = "attention_scaling" if self.layer_type is None else f"{self.layer_type}_attention_scaling"
        scaling = float(getattr(self.rotary, name, 1.0))
        return cos[0] / scaling, sin[0] / scaling


def probe_positions(max_context: int) -> list[int]:
    """Near ones turn the fast channels, far ones the slow ones, in which tables of different bases differ most."""
    return sorted({0, *(p for p in (1, 23, max_context // 2, max_context - 1) if p < max_context)})


def find_rotation(
    model: PreTrainedModel, keys: Sequence[Tensor], positions: Sequence[int], windows: Sequence[int | None]
) -> KeyRotation:
    """`keys`: for each layer [N, P, H, D], of N tokens at each of P `positions`, the first of them 0, with attention
    silenced. Of several tables the one is taken that turns most of what a long sequence keeps."""
    best, best_weight = KeyRotation(rotary=None, layer_type=None, layers=(False,) * len(keys)), 0
    at = torch.tensor(positions, device=model.device)
    longest = positions[-1] + 1
    for rotary, layer_type in _candidates(model):
        rotation = KeyRotation(rotary=rotary, layer_type=layer_type, layers=())
        cos, sin = rotation.tables(at)
        layers = tuple(_is_undone(k.float(), cos, sin) for k in keys)
        kept = (min(longest, window or longest) for window, is_turned in zip(windows, layers, strict=True) if is_turned)
        weight = sum(kept)
        if weight > best_weight:
            best, best_weight = KeyRotation(rotary=rotary, layer_type=layer_type, layers=layers), weight
    return best


def _candidates(model: PreTrainedModel) -> list[tuple[nn.Module, str | None]]:
    """Rotary modules, each with the layer types that it tells apart, that give tables as `codec.rope` takes them."""
    found: list[tuple[nn.Module, str | None]] = []
    for name, module in model.named_modules():
        if not name.rpartition(".")[2].startswith("rotary_emb"):
            continue
        types: list[str | None] = [None]
        if "layer_type" in inspect.signature(module.forward).parameters:
            types = sorted(set(getattr(model.config, "layer_types", None) or ()))
        found += [(module, layer_type) for layer_type in types if _gives_halves(module, layer_type, model.device)]
    return found


def _gives_halves(rotary: nn.Module, layer_type: str | None, device: torch.device) -> bool:
    """Whether it gives cos and sin [1, T, R] whose halves are equal, as rotating by halves needs."""
    extra = {} if layer_type is None else {"layer_type": layer_type}
    with torch.inference_mode():
        out: Any = rotary(torch.zeros(1, device=device), torch.arange(3, device=device)[None], **extra)
    if not (isinstance(out, tuple) and len(out) == 2 and all(x.ndim == 3 and not x.is_complex() for x in out)):
        return False
    return all(x.shape[-1] % 2 == 0 and torch.equal(*x.chunk(2, dim=-1)) for x in out)


def _is_undone(keys: Tensor, cos: Tensor, sin: Tensor) -> bool:
    """Whether turning `keys` [N, P, H, D] back makes a token's keys equal at all positions."""
    width = cos.shape[-1]
    if width > keys.shape[-1] or keys.shape[1] == 1:
        return False
    cos, sin = cos[:, None].to(keys.device), sin[:, None].to(keys.device)
    turned, rest = keys[..., :width], keys[..., width:]
    half = width // 2
    back = turned * cos - torch.cat((-turned[..., half:], turned[..., :half]), dim=-1) * sin
    plain = torch.cat((back, rest), dim=-1)
    norm = plain[:, :1].norm(dim=-1)
    return bool((norm > 0).all() and ((plain - plain[:, :1]).norm(dim=-1) <= TOLERANCE * norm).all())
