"""The shape of a model's KV, and what of it sliding windows still read. Plain data over torch's dtypes; imports
nothing of ours but arithmetic.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from prefill.window_layers import first_key, layer_runs, layers_seen

__all__ = [
    "KVLayout", "dead_blocks", "first_key", "layer_runs", "layers_needed", "live_blocks", "window_groups",
]  # fmt: skip

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True, slots=True, kw_only=True)
class KVLayout:
    """The shape of one token's KV. `windows` [L]: a query at `p` sees keys `p - window + 1 .. p` of that layer; None is
    all of them. Left out, every layer sees everything."""

    num_layers: int
    num_kv_heads: int
    head_dim_k: int
    head_dim_v: int
    dtype: str
    windows: tuple[int | None, ...] = ()

    def __post_init__(self) -> None:
        if not self.windows:
            object.__setattr__(self, "windows", (None,) * self.num_layers)
        assert len(self.windows) == self.num_layers, (self.windows, self.num_layers)
        assert all(window is None or window > 0 for window in self.windows), self.windows

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    @property
    def values_per_layer(self) -> int:
        """Values of one token's keys and values in one layer."""
        return self.num_kv_heads * (self.head_dim_k + self.head_dim_v)

    @property
    def bytes_per_token(self) -> int:
        return self.num_layers * self.values_per_layer * int(self.torch_dtype.itemsize)

    @property
    def has_windows(self) -> bool:
        return any(window is not None for window in self.windows)


def layers_needed(layout: KVLayout, start: int, stop: int, *, first_query: int) -> tuple[int, ...]:
    """See prefill/window_layers.py: layers_seen."""
    return layers_seen(layout.windows, start, stop, first_query=first_query)


def window_groups(layout: KVLayout) -> dict[int | None, tuple[int, ...]]:
    """The layers of each window, in the order in which the windows first come. Layers of a group need the same blocks
    at any time, so a pool that keeps only windows has one block table a sequence and group."""
    groups: dict[int | None, list[int]] = {}
    for layer, window in enumerate(layout.windows):
        groups.setdefault(window, []).append(layer)
    return {window: tuple(layers) for window, layers in groups.items()}


def dead_blocks(window: int | None, next_token: int, block_tokens: int) -> int:
    """How many of a sequence's first blocks no query at `next_token` or later sees in layers of this window."""
    return first_key(window, next_token) // block_tokens


def live_blocks(window: int | None, num_tokens: int, block_tokens: int, chunk_tokens: int = 1) -> int:
    """The most blocks that a sequence of `num_tokens` holds at once in layers of this window, if blocks are given back
    as they die and tokens are computed `chunk_tokens` at a time: a chunk's first query sees its whole window while the
    chunk's last token is written."""
    whole = -(-num_tokens // block_tokens)
    if window is None:
        return whole
    span = window - 1 + min(chunk_tokens, num_tokens)  # tokens that must be there together
    return min(whole, (span + block_tokens - 2) // block_tokens + 1)  # wherever in a block they start
