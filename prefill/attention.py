"""Paged attention behind transformers' attention interface: what one forward pass tells every layer. Knows torch and
transformers; decides nothing.

A forward pass packs slices of several sequences (prefill chunks and single decode rows) into one row of N tokens. A
*batch* travels to every layer as the keyword `kv`; a layer writes its new keys and values into the pages and then
attends over pages only, so that prefill, decode and received KV all read the same bytes. The pool makes the batch
(`KVPool.make_batch`), of the kind that its device and its pages need:

    cpu_attention.py         pages of bf16 or float32 on the CPU: a kernel that reads them in place
    tiled_attention.py       everywhere else: torch products over gathered tiles
    quantized_attention.py   quantized pages

Shapes: `N` packed rows, `Hq` query heads, `H` KV heads, `D`/`Dv` head dims.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from prefill.kv_layout import KVLayout

ATTENTION_NAME = "kvstream_paged"


class AttentionUnsupported(Exception):
    """The model's attention asks for something that is not built; the text names it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """Rows `row .. row + num_tokens` of the packed batch are tokens `start ..` of the sequence in `block_table`.
    `ring`: where a pool of quantized pages keeps the sequence's recent tokens."""

    row: int
    num_tokens: int
    start: int
    block_table: Sequence[int]
    ring: int | None = None

    @property
    def stop(self) -> int:
        return self.start + self.num_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionRule:
    """A layer's parameters. A query at `p` sees keys `p - window + 1 .. p`, or all up to `p` without a window."""

    scale: float
    window: int | None
    softcap: float | None


class Pages(Protocol):
    """What the batches need of a pool (kv_pool.py)."""

    layout: KVLayout
    block_tokens: int
    null_slot: int
    device: torch.device

    def layer_slots(self, layer: int) -> tuple[Tensor, Tensor]: ...
    def slots(self, block_table: Sequence[int], start: int, stop: int) -> Tensor: ...


class Batch(Protocol):
    """One forward pass over the pages. Made by the pool, used by every layer, then thrown away."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, rule: AttentionRule) -> Tensor:
        """`q` [1, Hq, N, D], `k` [1, H, N, D], `v` [1, H, N, Dv], rotated -> [1, N, Hq, Dv].
        Rows beyond the spans are padding: not stored, and 0 in the result."""
        ...


def paged_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    kv: Batch | None = None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """What transformers calls in every layer; `kv` comes through `model(..., kv=batch)`."""
    assert kv is not None, "a model with kvstream's attention was called without `kv`"
    if s_aux is not None:
        raise AttentionUnsupported("attention sinks (s_aux) are not supported yet")
    if attention_mask is not None:
        raise AttentionUnsupported("the model brings an attention mask of its own")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    rule = AttentionRule(scale=scale, window=sliding_window, softcap=softcap)
    return kv.attend(int(module.layer_idx), query, key, value, rule), None


def register() -> None:
    """Make `ATTENTION_NAME` known to transformers. No mask function is registered, so every mask is None."""
    AttentionInterface.register(ATTENTION_NAME, paged_attention)
