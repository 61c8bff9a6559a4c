"""Attention of decode rows over pages on a GPU: what to launch for a shape, and the launches. Arithmetic only.

The kernels are in `paged_attention_triton.py` and `paged_attention_codes_triton.py`; what they compute is written down
in `paged_attention_reference.py`. Nothing here waits for the GPU or looks at a value on it, so all of it can be
captured in a CUDA graph.

Legend: B rows, H KV heads, G = Hq / H, D, Dv head dims, L layers. A *slot* of `Partials` is the result of one split.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from kernels import paged_attention_codes_triton as code_kernels
from kernels import paged_attention_triton as kernels
from kernels.kv_quant_reference import CODES_A_BYTE, FP8_MAX, LEVELS

RECENT_TOKENS = 64  # the most keys from the boundary on
QUANT_BLOCK_TOKENS = 32
NO_WINDOW = 1 << 30
_MERGE_SLOTS = 16
KINDS = {"int4": code_kernels.INT4, "int8": code_kernels.INT8, "fp8": code_kernels.FP8}
_LOG2_E = math.log2(math.e)


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeConfig:
    """How a split is computed. `split_tokens` decides where sums are cut, so it is part of the result's bits: one value
    for a pool's life. The others change speed only. `programs_per_sm`: the grid, in programs a multiprocessor."""

    split_tokens: int
    block_n: int
    num_warps: int
    num_stages: int
    programs_per_sm: int = 4
    max_registers: int | None = None

    def __post_init__(self) -> None:
        assert self.split_tokens % self.block_n == 0, (self.split_tokens, self.block_n)


# Chosen by reasoning, not measured (docs/gpu-engine.md); `scripts/gpu_engine_report.py` sweeps the alternatives.
# Triton keeps (num_stages - 1) // 2 tiles in flight here, because a tile's addresses come from the block table, which
# is itself fetched ahead. By (kind, head dim).
CONFIGS: Mapping[tuple[str, int], DecodeConfig] = {
    ("bf16", 64): DecodeConfig(split_tokens=256, block_n=128, num_warps=4, num_stages=5),
    ("bf16", 128): DecodeConfig(split_tokens=256, block_n=64, num_warps=4, num_stages=5),
    ("bf16", 256): DecodeConfig(split_tokens=256, block_n=32, num_warps=4, num_stages=5),
    ("int4", 64): DecodeConfig(split_tokens=512, block_n=128, num_warps=4, num_stages=5),
    ("int4", 128): DecodeConfig(split_tokens=512, block_n=128, num_warps=4, num_stages=5, max_registers=168),
    ("int4", 256): DecodeConfig(split_tokens=512, block_n=64, num_warps=4, num_stages=5),
    ("int8", 64): DecodeConfig(split_tokens=512, block_n=128, num_warps=4, num_stages=5),
    ("int8", 128): DecodeConfig(split_tokens=512, block_n=128, num_warps=4, num_stages=3),
    ("int8", 256): DecodeConfig(split_tokens=512, block_n=64, num_warps=4, num_stages=3),
}
_SMALL = DecodeConfig(split_tokens=256, block_n=32, num_warps=4, num_stages=2)


def config_for(kind: str, head_dim: int) -> DecodeConfig:
    """`kind`: bf16 (also float16), int4, int8, fp8, or another for wide floats."""
    return CONFIGS.get(("int8" if kind == "fp8" else kind, triton.next_power_of_2(head_dim)), _SMALL)


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizedPages:
    """One layer's pages as `kv_quant.quantize_blocks` makes them; kinds are of `KINDS`. k_codes uint8 [pages, H, 32, D
    or D / 2], v_codes likewise; k_scale, k_zero float16 [pages, H, D]; v_scale, v_zero float16 [pages, H, 32]; fp8:
    scales float32 [pages, H], no zeros."""

    k_kind: str
    v_kind: str
    k_codes: Tensor
    k_scale: Tensor
    k_zero: Tensor | None
    v_codes: Tensor
    v_scale: Tensor
    v_zero: Tensor | None

    @property
    def head_dims(self) -> tuple[int, int]:
        return (
            self.k_codes.shape[-1] * CODES_A_BYTE[self.k_kind],
            self.v_codes.shape[-1] * CODES_A_BYTE[self.v_kind],
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeRows:
    """Which rows attend to what; all on the GPU. `q_rows` int32 [B]: their rows in q and in the result. `tables` int32
    [B, max_blocks]. `lengths` int32 [B]: the position of the row's token + 1; 0 is no row, and its result 0.
    `max_length`: no length is greater. `rings` int32 [B]: quantized pages only, who has which ring of recent tokens."""

    q_rows: Tensor
    tables: Tensor
    lengths: Tensor
    max_length: int
    rings: Tensor | None = None

    def __len__(self) -> int:
        return len(self.lengths)


@dataclass(frozen=True, slots=True)
class Partials:
    """Room for the results of splits: one for all layers."""

    m: Tensor
    total: Tensor
    out: Tensor

    @classmethod
    def empty(cls, rows: int, slots: int, num_q_heads: int, head_dim_v: int, device: torch.device) -> Partials:
        shape = (rows, slots, num_q_heads)
        return cls(
            torch.empty(shape, dtype=torch.float32, device=device),
            torch.empty(shape, dtype=torch.float32, device=device),
            torch.empty(*shape, head_dim_v, dtype=torch.float32, device=device),
        )


def num_slots(max_length: int, config: DecodeConfig, *, is_quantized: bool) -> int:
    return -(-max_length // config.split_tokens) + is_quantized


def paged_decode(
    q: Tensor,
    k_slots: Tensor,
    v_slots: Tensor,
    page_tokens: int,
    rows: DecodeRows,
    out: Tensor,
    partials: Partials,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    config: DecodeConfig | None = None,
) -> None:
    """`q` [*, Hq, D] (any strides, channels together) over pages k_slots [slots, H, D], v_slots [slots, H, Dv] ->
    rows `rows.q_rows` of `out` [*, Hq, Dv], contiguous."""
    config = config or config_for(_kind_of(k_slots.dtype), k_slots.shape[-1])
    assert partials.m.shape[1] >= num_slots(rows.max_length, config, is_quantized=False), "too few slots"
    _launch_decode(
        q, k_slots, v_slots, rows.tables, 1, page_tokens, rows, partials, config, kernels.ALL.value,
        scale, window, softcap,
    )  # fmt: skip
    _merge(rows, out, partials, window, config, is_quantized=False)


def quantized_decode(
    q: Tensor,
    pages: QuantizedPages,
    k_ring: Tensor,
    v_ring: Tensor,
    rows: DecodeRows,
    out: Tensor,
    partials: Partials,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    config: DecodeConfig | None = None,
) -> None:
    """As `paged_decode`, over quantized pages before a row's boundary and the ring from it on: `k_ring` [rings,
    ring_tokens, H, D], token t at t % ring_tokens."""
    assert rows.rings is not None, "quantized pages need rings"
    head_dim, head_dim_v = pages.head_dims
    config = config or config_for(pages.k_kind, head_dim)
    assert partials.m.shape[1] >= num_slots(rows.max_length, config, is_quantized=True), "too few slots"
    assert head_dim.bit_count() == 1 and head_dim_v.bit_count() == 1, "head dims of quantized pages are powers of two"
    ring_tokens = k_ring.shape[1]
    assert ring_tokens >= RECENT_TOKENS, ring_tokens
    small = DecodeConfig(split_tokens=RECENT_TOKENS, block_n=RECENT_TOKENS, num_warps=4, num_stages=1)
    _launch_decode(
        q, k_ring.flatten(0, 1), v_ring.flatten(0, 1), rows.rings[:, None], 0, ring_tokens, rows, partials, small,
        kernels.RECENT.value, scale, window, softcap,
    )  # fmt: skip
    num_kv_heads = pages.k_codes.shape[1]
    group = q.shape[1] // num_kv_heads
    queries = triton.next_power_of_2(group)
    packed = torch.int64 if pages.k_kind == "int4" else torch.int32  # the floats of the channels in 16 bits of codes
    k_scale = pages.k_scale if pages.k_zero is None else pages.k_scale.view(packed)
    k_zero = pages.k_scale if pages.k_zero is None else pages.k_zero.view(packed)
    q_words = q.view(packed)
    code_kernels.quantized_decode_kernel[(_programs(q.device, config),)](
        q_words, pages.k_codes.view(torch.int16), k_scale, k_zero, pages.v_codes.view(torch.int16),
        pages.v_scale, pages.v_scale if pages.v_zero is None else pages.v_zero, rows.tables, rows.lengths,
        rows.q_rows, partials.m, partials.total, partials.out,
        q_words.stride(0), q_words.stride(1), rows.tables.stride(0), len(rows),
        window or NO_WINDOW, *_factors(scale, softcap), partials.m.shape[1], 1,
        H=num_kv_heads, GROUP=group, D=head_dim, DV=head_dim_v, K_KIND=KINDS[pages.k_kind].value,
        V_KIND=KINDS[pages.v_kind].value, SPLIT=config.split_tokens, BLOCK_N=config.block_n,
        BLOCK_B=_block_of_rows(len(rows)), R=max(16, queries * config.block_n // QUANT_BLOCK_TOKENS),
        QUERIES=queries, HAS_SOFTCAP=softcap is not None,
        HAS_WINDOW=window is not None, USE_ASM=q.is_cuda,
        num_warps=config.num_warps, num_stages=config.num_stages, maxnreg=config.max_registers,
    )  # fmt: skip
    _merge(rows, out, partials, window, config, is_quantized=True)


def write_rows(k: Tensor, v: Tensor, k_slots: Tensor, v_slots: Tensor, slots: Tensor) -> None:
    """Row i of `k` [N, H, D], `v` [N, H, Dv] (channels together) to slot `slots[i]` (int64); negative: nowhere."""
    assert k.stride(-1) == 1 and v.stride(-1) == 1, (k.stride(), v.stride())
    _, num_heads, head_dim = k_slots.shape
    head_dim_v = v_slots.shape[-1]
    kernels.write_kernel[(len(slots),)](
        k, v, k_slots, v_slots, slots, k.stride(0), k.stride(1), v.stride(0), v.stride(1),
        H=num_heads, D=head_dim, DV=head_dim_v, BLOCK_H=triton.next_power_of_2(num_heads),
        BLOCK_D=triton.next_power_of_2(max(head_dim, head_dim_v)),
    )  # fmt: skip


def settle_blocks(pages: QuantizedPages, k_ring: Tensor, v_ring: Tensor, rows: DecodeRows, due: Tensor) -> None:
    """Block `due[b]` (int32, negative: none) of row b from its ring into its page, before the row's new token takes its
    place in the ring."""
    assert rows.rings is not None, "quantized pages need rings"
    head_dim, head_dim_v = pages.head_dims
    num_kv_heads, ring_tokens = k_ring.shape[2], k_ring.shape[1]
    assert ring_tokens % QUANT_BLOCK_TOKENS == 0, ring_tokens
    code_kernels.settle_kernel[(len(rows), num_kv_heads)](
        k_ring, v_ring, rows.rings, rows.tables, due,
        pages.k_codes, pages.k_scale, pages.k_scale if pages.k_zero is None else pages.k_zero,
        pages.v_codes, pages.v_scale, pages.v_scale if pages.v_zero is None else pages.v_zero, rows.tables.stride(0),
        H=num_kv_heads, D=head_dim, DV=head_dim_v, RING=ring_tokens, K_KIND=KINDS[pages.k_kind].value,
        V_KIND=KINDS[pages.v_kind].value, K_LEVELS=LEVELS.get(pages.k_kind, FP8_MAX),
        V_LEVELS=LEVELS.get(pages.v_kind, FP8_MAX), enable_fp_fusion=False,
    )  # fmt: skip


def _launch_decode(
    q: Tensor, k_slots: Tensor, v_slots: Tensor, tables: Tensor, table_step: int, page_tokens: int, rows: DecodeRows,
    partials: Partials, config: DecodeConfig, part: int, scale: float, window: int | None, softcap: float | None,
) -> None:  # fmt: skip
    _, num_kv_heads, head_dim = k_slots.shape
    head_dim_v = v_slots.shape[-1]
    group = q.shape[1] // num_kv_heads
    assert q.stride(-1) == 1 and k_slots.is_contiguous() and v_slots.is_contiguous()
    kernels.decode_kernel[(_programs(q.device, config),)](
        q, k_slots, v_slots, tables, rows.lengths, rows.q_rows, partials.m, partials.total, partials.out,
        q.stride(0), q.stride(1), tables.stride(0), table_step, len(rows), window or NO_WINDOW,
        *_factors(scale, softcap), partials.m.shape[1], 0,
        H=num_kv_heads, GROUP=group, D=head_dim, DV=head_dim_v, PAGE=page_tokens, PART=part,
        SPLIT=config.split_tokens, BLOCK_N=config.block_n, BLOCK_B=_block_of_rows(len(rows)),
        R=max(16, triton.next_power_of_2(group)), BLOCK_D=_block_of(head_dim), BLOCK_DV=_block_of(head_dim_v),
        HAS_SOFTCAP=softcap is not None, PRECISION="ieee" if q.dtype == torch.float32 else "tf32",
        num_warps=config.num_warps, num_stages=config.num_stages, maxnreg=config.max_registers,
    )  # fmt: skip


def _merge(
    rows: DecodeRows, out: Tensor, partials: Partials, window: int | None, config: DecodeConfig, *, is_quantized: bool
) -> None:
    _, num_q_heads, head_dim_v = out.shape
    assert out.is_contiguous()
    kernels.merge_kernel[(len(rows), num_q_heads)](
        partials.m, partials.total, partials.out, rows.lengths, rows.q_rows, out, out.stride(0), window or NO_WINDOW,
        partials.m.shape[1],
        HQ=num_q_heads, DV=head_dim_v, IS_QUANTIZED=is_quantized, SPLIT=config.split_tokens, BLOCK_S=_MERGE_SLOTS,
        BLOCK_DV=triton.next_power_of_2(head_dim_v), num_warps=2,
    )  # fmt: skip


def _factors(scale: float, softcap: float | None) -> tuple[float, float]:
    return (scale * _LOG2_E, 1.0) if softcap is None else (scale / softcap, softcap)


def _kind_of(dtype: torch.dtype) -> str:
    return "bf16" if dtype.itemsize == 2 else "wide"


def _block_of_rows(rows: int) -> int:
    return max(32, int(triton.next_power_of_2(rows)))


def _block_of(dim: int) -> int:
    return max(16, int(triton.next_power_of_2(dim)))


def _programs(device: torch.device, config: DecodeConfig) -> int:
    return config.programs_per_sm * _multiprocessors(device)


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    """3 where there is no GPU: the interpreter goes through the programs one after the other."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 3
