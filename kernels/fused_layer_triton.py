"""What lies between a decoder layer's matrix products, each as one kernel, and a matrix times one row. In Triton.

Arithmetic only. A decode step at batch 1 is a few milliseconds of reading weights; transformers' RMSNorm alone is
eight kernels, which take longer to launch than to compute. Roundings are those of transformers' own code, operation by
operation; only the order of a sum may differ. Launch with FUSION_OFF.

Shapes: N rows, C channels of a row.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

FUSION_OFF: dict[str, Any] = {"enable_fp_fusion": False}  # transformers multiplies, rounds, and adds


@triton.jit
def rms_norm_kernel(
    x, weight, out, x_row_stride, eps, C: tl.constexpr, BLOCK: tl.constexpr, ADD_ONE: tl.constexpr
):  # fmt: skip
    """out = weight * (x / rms(x)), the quotient rounded first; ADD_ONE (Gemma): (1 + weight) in float32, rounded once.
    Grid: (N,)."""
    row = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, BLOCK)
    dtype = out.dtype.element_ty
    values = tl.load(x + row * x_row_stride + c, mask=c < C, other=0.0).to(tl.float32)
    factor = 1.0 / tl.sqrt_rn(tl.sum(values * values, axis=0) / C + eps)
    scales = tl.load(weight + c, mask=c < C, other=0.0).to(tl.float32)
    if ADD_ONE:
        result = values * factor * (1.0 + scales)
    else:
        result = scales * (values * factor).to(dtype).to(tl.float32)
    tl.store(out + row * C + c, result.to(dtype), mask=c < C)


@triton.jit
def rotary_kernel(
    q, k, cos, sin, q_out, k_out, q_row_stride, q_head_stride, k_row_stride, k_head_stride, table_stride,
    HQ: tl.constexpr, H: tl.constexpr, HALF: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """x * cos + rotate_half(x) * sin of q [Hq, N, D] and k [H, N, D] (any strides) -> [N, Hq, D], [N, H, D]. cos, sin
    [N, D]. Grid: (N,)."""
    row = tl.program_id(0).to(tl.int64)
    h = tl.arange(0, BLOCK_H)[:, None]
    d = tl.arange(0, BLOCK_D)[None, :]
    dtype = q_out.dtype.element_ty
    is_d = d < HALF
    at = row * table_stride + d
    cos_low = tl.load(cos + at, mask=is_d, other=0.0).to(tl.float32)
    sin_low = tl.load(sin + at, mask=is_d, other=0.0).to(tl.float32)
    cos_high = tl.load(cos + at + HALF, mask=is_d, other=0.0).to(tl.float32)
    sin_high = tl.load(sin + at + HALF, mask=is_d, other=0.0).to(tl.float32)
    is_query = (h < HQ) & is_d
    is_key = (h >= HQ) & (h < HQ + H) & is_d
    q_at = q + row * q_row_stride + h * q_head_stride + d
    k_at = k + row * k_row_stride + (h - HQ) * k_head_stride + d
    low = tl.load(q_at, mask=is_query, other=0.0).to(tl.float32)
    low += tl.load(k_at, mask=is_key, other=0.0).to(tl.float32)
    high = tl.load(q_at + HALF, mask=is_query, other=0.0).to(tl.float32)
    high += tl.load(k_at + HALF, mask=is_key, other=0.0).to(tl.float32)
    # Each product is rounded, then their sum: as the operations of a model in bf16.
    new_low = (low * cos_low).to(dtype).to(tl.float32) + (-high * sin_low).to(dtype).to(tl.float32)
    new_high = (high * cos_high).to(dtype).to(tl.float32) + (low * sin_high).to(dtype).to(tl.float32)
    q_at = q_out + (row * HQ + h) * (2 * HALF) + d
    k_at = k_out + (row * H + h - HQ) * (2 * HALF) + d
    tl.store(q_at, new_low.to(dtype), mask=is_query)
    tl.store(q_at + HALF, new_high.to(dtype), mask=is_query)
    tl.store(k_at, new_low.to(dtype), mask=is_key)
    tl.store(k_at + HALF, new_high.to(dtype), mask=is_key)


@triton.jit
def silu_mul_kernel(gate, up, out, count, BLOCK: tl.constexpr):
    """silu(gate) * up, the first rounded before. Contiguous. Grid: (count / BLOCK,)."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    dtype = out.dtype.element_ty
    x = tl.load(gate + at, mask=at < count, other=0.0).to(tl.float32)
    y = tl.load(up + at, mask=at < count, other=0.0).to(tl.float32)
    tl.store(out + at, ((x / (1.0 + tl.exp(-x))).to(dtype).to(tl.float32) * y).to(dtype), mask=at < count)


@triton.jit
def row_product_kernel(
    x, weight, out, num_outputs, K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr
):  # fmt: skip
    """out [num_outputs] = weight [num_outputs, K] x [K], sums in float32: as fast as the weight can be read, which a
    matrix product for one row is not always. Grid: (num_outputs / BLOCK_N,)."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    rows = weight + n.to(tl.int64)[:, None] * K
    sums = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    for start in tl.range(0, K, BLOCK_K, num_stages=STAGES):
        at = start + k
        mask = (n < num_outputs)[:, None] & (at < K)[None, :]
        weights = tl.load(rows + at[None, :], mask=mask, other=0.0)
        values = tl.load(x + at, mask=at < K, other=0.0)
        sums += weights.to(tl.float32) * values.to(tl.float32)[None, :]
    tl.store(out + n, tl.sum(sums, axis=1).to(out.dtype.element_ty), mask=n < num_outputs)


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, add_one: bool = False) -> Tensor:
    """`x` [..., C], channels together."""
    channels = x.shape[-1]
    rows = x.reshape(-1, channels)
    out = torch.empty_like(rows, memory_format=torch.contiguous_format)
    block = triton.next_power_of_2(channels)
    rms_norm_kernel[(len(rows),)](
        rows, weight, out, rows.stride(0), eps, C=channels, BLOCK=block, ADD_ONE=add_one,
        num_warps=min(max(block // 512, 1), 16), **FUSION_OFF,
    )  # fmt: skip
    return out.view(x.shape)


def rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """`q` [1, Hq, N, D], `k` [1, H, N, D], `cos` and `sin` [1, N, D] -> the same shapes, rows together in memory."""
    _, num_q_heads, rows, dim = q.shape
    num_kv_heads = k.shape[1]
    q_out = torch.empty(rows, num_q_heads, dim, dtype=q.dtype, device=q.device)
    k_out = torch.empty(rows, num_kv_heads, dim, dtype=k.dtype, device=k.device)
    rotary_kernel[(rows,)](
        q, k, cos, sin, q_out, k_out, q.stride(2), q.stride(1), k.stride(2), k.stride(1), cos.stride(1),
        HQ=num_q_heads, H=num_kv_heads, HALF=dim // 2, BLOCK_H=triton.next_power_of_2(num_q_heads + num_kv_heads),
        BLOCK_D=triton.next_power_of_2(dim // 2), **FUSION_OFF,
    )  # fmt: skip
    return q_out.transpose(0, 1)[None], k_out.transpose(0, 1)[None]


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    out = torch.empty_like(gate)
    block = 1024
    silu_mul_kernel[(triton.cdiv(gate.numel(), block),)](gate, up, out, gate.numel(), BLOCK=block, **FUSION_OFF)
    return out


def row_product(x: Tensor, weight: Tensor) -> Tensor:
    """`x` [..., K] of one row, `weight` [outputs, K], both contiguous -> [..., outputs]."""
    outputs, depth = weight.shape
    out = torch.empty(*x.shape[:-1], outputs, dtype=x.dtype, device=x.device)
    block_n = 4 if outputs <= 2048 else 8  # some four programs a multiprocessor of a Hopper GPU at least
    row_product_kernel[(triton.cdiv(outputs, block_n),)](
        x, weight, out, outputs, K=depth, BLOCK_N=block_n, BLOCK_K=min(512, triton.next_power_of_2(depth)), STAGES=4
    )
    return out
