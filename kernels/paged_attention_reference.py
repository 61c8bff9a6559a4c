"""Attention of decode rows over pages as one reads it: the specification of `paged_attention.py`, in numpy float64.

Arithmetic only; slow. A row is the newest token of a sequence of `length` tokens, at position `length - 1`; it sees
the keys `max(0, length - window) .. length - 1`. Keys are cut at multiples of `split_tokens`, each split is a softmax
of its own in units of 2**m with an integer m, and the splits are added in ascending order.

Quantized sequences (block of 32 tokens, `kv_quant_reference.py`): keys before `boundary(position)` are read as their
codes say, those from there on (33 to 64, the row's own among them) as they were, from a ring. The rule depends on the
position alone, and not on when a block was quantized.

Shapes: B rows, Hq query heads, H KV heads, D, Dv head dims, P pages of T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from kernels.kv_quant_reference import Quantized, dequantize_block

QUANT_BLOCK_TOKENS = 32
Array = NDArray[np.float64]


class Partial(NamedTuple):
    """One split for one query: `exponent` m, and the sum of weights and the weighted values [Dv] in units of 2**m."""

    exponent: float
    total: float
    weighted: Array


class QuantizedLayer(NamedTuple):
    """Pages of a layer, by their numbers, and the rings [rings, ring_tokens, H, D] of recent tokens: token t of a
    sequence stands in its ring at `t % ring_tokens`."""

    k_kind: str
    v_kind: str
    k_pages: Sequence[Quantized]
    v_pages: Sequence[Quantized]
    k_rings: Array
    v_rings: Array


def boundary(position: int) -> int:
    """The first key that a query at `position` reads unquantized."""
    return max(0, (position - QUANT_BLOCK_TOKENS) // QUANT_BLOCK_TOKENS * QUANT_BLOCK_TOKENS)


def split_partial(q: Array, k: Array, v: Array, *, scale: float, softcap: float | None) -> Partial:
    """`q` [D], `k` [n, D], `v` [n, Dv], n > 0."""
    scores = k @ q * scale
    if softcap is not None:
        scores = softcap * np.tanh(scores / softcap)
    scores = scores * np.log2(np.e)
    exponent = float(np.ceil(scores.max()))
    weights = np.exp2(scores - exponent)
    return Partial(exponent, float(weights.sum()), weights @ v)


def merge_partials(partials: Sequence[Partial]) -> Array:
    """[Dv]; zeros if there are none."""
    if not partials:
        return np.zeros(0)
    top = max(partial.exponent for partial in partials)
    total = sum(partial.total * np.exp2(partial.exponent - top) for partial in partials)
    weighted = sum(partial.weighted * np.exp2(partial.exponent - top) for partial in partials)
    return np.asarray(weighted / total)


def paged_decode_reference(
    q: Array,
    k_pages: Array,
    v_pages: Array,
    tables: Sequence[Sequence[int]],
    lengths: Sequence[int],
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    split_tokens: int = 256,
) -> Array:
    """`q` [B, Hq, D], `k_pages` [P, T, H, D], `v_pages` [P, T, H, Dv] -> [B, Hq, Dv]; 0 for rows of length 0."""
    out = np.zeros((*q.shape[:2], v_pages.shape[-1]))
    for row, length in enumerate(lengths):
        if length:
            tokens = np.arange(length)
            pages = np.asarray(tables[row])[tokens // k_pages.shape[1]]
            k, v = k_pages[pages, tokens % k_pages.shape[1]], v_pages[pages, tokens % k_pages.shape[1]]
            cuts = _cuts(0 if window is None else max(0, length - window), length, split_tokens)
            out[row] = _attend(q[row], k, v, cuts, scale, softcap)
    return out


def quantized_decode_reference(
    q: Array,
    layer: QuantizedLayer,
    tables: Sequence[Sequence[int]],
    rings: Sequence[int],
    lengths: Sequence[int],
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    split_tokens: int = 512,
) -> Array:
    """As `paged_decode_reference`; row b's recent tokens are in ring `rings[b]`, which counts as the first split."""
    ring_tokens = layer.k_rings.shape[1]
    out = np.zeros((*q.shape[:2], layer.v_rings.shape[-1]))
    for row, length in enumerate(lengths):
        if not length:
            continue
        first, edge = 0 if window is None else max(0, length - window), boundary(length - 1)
        recent = np.arange(edge, length)
        k, v = layer.k_rings[rings[row], recent % ring_tokens], layer.v_rings[rings[row], recent % ring_tokens]
        for block in reversed(range(edge // QUANT_BLOCK_TOKENS)):
            page = tables[row][block]
            k = np.concatenate([dequantize_block(layer.k_pages[page], layer.k_kind, per_channel=True), k])
            v = np.concatenate([dequantize_block(layer.v_pages[page], layer.v_kind, per_channel=False), v])
        cuts = [(max(first, edge), length), *_cuts(first, edge, split_tokens)]
        out[row] = _attend(q[row], k, v, cuts, scale, softcap)
    return out


def _cuts(start: int, stop: int, split_tokens: int) -> list[tuple[int, int]]:
    """`start .. stop` cut at multiples of `split_tokens`."""
    edges = range(start // split_tokens * split_tokens, stop, split_tokens)
    return [(max(start, edge), min(stop, edge + split_tokens)) for edge in edges if start < stop]


def _attend(
    q: Array, k: Array, v: Array, cuts: Sequence[tuple[int, int]], scale: float, softcap: float | None
) -> Array:
    """`q` [Hq, D], `k` [n, H, D], `v` [n, H, Dv] -> [Hq, Dv]. Query heads `h * G .. (h + 1) * G` share KV head `h`."""
    group = len(q) // k.shape[1]
    return np.stack(
        [
            merge_partials(
                [
                    split_partial(q[i], k[a:b, i // group], v[a:b, i // group], scale=scale, softcap=softcap)
                    for a, b in cuts
                ]
            )
            for i in range(len(q))
        ]
    )
