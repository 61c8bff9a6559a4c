"""Attention with quantized keys and values as one reads it: dense, in float64, one row after the other. For tests.

Stands where a batch stands (`model(..., kv=DenseQuantized(...))`) for one sequence computed in one go.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from kernels.kv_quant_reference import dequantize_block, quantize_block
from prefill.attention import AttentionRule
from prefill.quantized_layout import BLOCK_TOKENS, boundary


def through_blocks(x: Tensor, kind: str, *, is_keys: bool) -> Tensor:
    """`x` [T, H, D] -> what its blocks give back, in its dtype; the tokens of the last, partial block are not there."""
    out = []
    for start in range(0, len(x) // BLOCK_TOKENS * BLOCK_TOKENS, BLOCK_TOKENS):
        block = quantize_block(x[start : start + BLOCK_TOKENS].float().numpy(), kind, per_channel=is_keys)
        out.append(torch.from_numpy(dequantize_block(block, kind, per_channel=is_keys)).to(x.dtype))
    return torch.cat(out) if out else x[:0]


def dense_attention(q: Tensor, k: Tensor, v: Tensor, rule: AttentionRule, kind: str) -> Tensor:
    """`q` [T, Hq, D], `k` [T, H, D], `v` [T, H, Dv] -> [T, Hq, Dv] float64."""
    group = q.shape[1] // k.shape[1]
    old_k, old_v = through_blocks(k, kind, is_keys=True), through_blocks(v, kind, is_keys=False)
    out = np.zeros((q.shape[0], q.shape[1], v.shape[2]))
    for p in range(len(q)):
        first = 0 if rule.window is None else max(0, p - rule.window + 1)
        quantized = slice(min(first, boundary(p)), boundary(p))
        recent = slice(max(first, boundary(p)), p + 1)
        keys = torch.cat((old_k[quantized], k[recent])).double().numpy()
        values = torch.cat((old_v[quantized], v[recent])).double().numpy()
        for head in range(q.shape[1]):
            scores = keys[:, head // group] @ q[p, head].double().numpy() * rule.scale
            if rule.softcap is not None:
                scores = rule.softcap * np.tanh(scores / rule.softcap)
            weights = np.exp(scores - scores.max())
            out[p, head] = weights @ values[:, head // group] / weights.sum()
    return torch.from_numpy(out)


class DenseQuantized:
    def __init__(self, kind: str) -> None:
        self._kind = kind

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, rule: AttentionRule) -> Tensor:
        out = dense_attention(*(x[0].transpose(0, 1) for x in (q, k, v)), rule, self._kind)
        return out[None].to(q.dtype)
