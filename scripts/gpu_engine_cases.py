"""Random cases for the paged attention kernels, each compared with the numpy reference. Used by the GPU report on a
GPU, and by tests/parity in Triton's interpreter. Outputs are NaN before each run, and so is what must not be read.

Every check returns what it found in words, and raises `AssertionError` where it is not as it should be.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kernels import paged_attention as paged
from kernels.kv_quant import quantize_blocks
from kernels.kv_quant_reference import Quantized
from kernels.paged_attention_reference import (
    QuantizedLayer,
    paged_decode_reference,
    quantized_decode_reference,
)

NAN = float("nan")
UNUSED_PAGE = -(1 << 20)  # in tables behind the last page: reading there would be far out of bounds


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """`lengths`: tokens of each row, 0 for no row."""

    kv_heads: int
    group: int
    head_dim: int
    lengths: Sequence[int]
    head_dim_v: int | None = None
    window: int | None = None
    softcap: float | None = None
    page_tokens: int = 16
    dtype: torch.dtype = torch.bfloat16
    seed: int = 0

    @property
    def dim_v(self) -> int:
        return self.head_dim_v or self.head_dim

    @property
    def scale(self) -> float:
        return float(self.head_dim**-0.5)


def check_paged(shape: Shape, device: torch.device, tolerance: float = 6e-3) -> str:
    """bf16 (or float32) pages: the relative error of the whole result."""
    case = _pages_for(shape, shape.page_tokens, device)
    k, v = (_normal(shape, case.num_pages, shape.page_tokens, shape.kv_heads, dim, device=device)
            for dim in (shape.head_dim, shape.dim_v))  # fmt: skip
    for row, length in enumerate(shape.lengths):  # the rest of a row's last page, and pages of nobody
        if length % shape.page_tokens:
            k[case.tables[row][-1], length % shape.page_tokens :] = NAN
            v[case.tables[row][-1], length % shape.page_tokens :] = NAN
    k[case.num_pages - 1] = v[case.num_pages - 1] = NAN
    out = run_paged(shape, case.q, k, v, case.rows)
    want = paged_decode_reference(
        _wide(case.q), _wide(k), _wide(v), case.tables, shape.lengths, scale=shape.scale, window=shape.window,
        softcap=shape.softcap,
    )  # fmt: skip
    return _compare(out, want, tolerance)


def run_paged(shape: Shape, q: Tensor, k: Tensor, v: Tensor, rows: paged.DecodeRows) -> Tensor:
    config = paged.config_for("bf16" if shape.dtype != torch.float32 else "wide", shape.head_dim)
    slots = paged.num_slots(rows.max_length, config, is_quantized=False)
    out, partials = _room(shape, len(q), slots, q.device)
    paged.paged_decode(
        q, k.flatten(0, 1), v.flatten(0, 1), shape.page_tokens, rows, out, partials,
        scale=shape.scale, window=shape.window, softcap=shape.softcap,
    )  # fmt: skip
    return out


def check_quantized(shape: Shape, kind: str, device: torch.device, tolerance: float = 1.5e-2) -> str:
    """Quantized pages and the ring of recent tokens."""
    case = _pages_for(shape, paged.QUANT_BLOCK_TOKENS, device)
    pages, k_ring, v_ring, rows, layer = quantized_layer(shape, case, kind)
    out = run_quantized(shape, case.q, pages, k_ring, v_ring, rows)
    want = quantized_decode_reference(
        _wide(case.q), layer, case.tables, rows.rings.tolist(), shape.lengths,  # type: ignore[union-attr]
        scale=shape.scale, window=shape.window, softcap=shape.softcap,
    )  # fmt: skip
    return _compare(out, want, tolerance)


def run_quantized(
    shape: Shape, q: Tensor, pages: paged.QuantizedPages, k_ring: Tensor, v_ring: Tensor, rows: paged.DecodeRows
) -> Tensor:
    config = paged.config_for(pages.k_kind, shape.head_dim)
    slots = paged.num_slots(rows.max_length, config, is_quantized=True)
    out, partials = _room(shape, len(q), slots, q.device)
    paged.quantized_decode(
        q, pages, k_ring, v_ring, rows, out, partials, scale=shape.scale, window=shape.window, softcap=shape.softcap
    )  # fmt: skip
    return out


def check_company(shape: Shape, kind: str, device: torch.device) -> str:
    """Every row alone, and all together with an empty row between, in another order: the same bits."""
    count = len(shape.lengths)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(shape.seed)).tolist()
    case = _pages_for(shape, shape.page_tokens if kind == "bf16" else paged.QUANT_BLOCK_TOKENS, device)
    if kind == "bf16":
        k, v = (_normal(shape, case.num_pages, shape.page_tokens, shape.kv_heads, dim, device=device)
                for dim in (shape.head_dim, shape.dim_v))  # fmt: skip
    else:
        pages, k_ring, v_ring, _, _ = quantized_layer(shape, case, kind)

    def run(members: list[int]) -> Tensor:
        rows = paged.DecodeRows(
            q_rows=case.rows.q_rows[members], tables=case.rows.tables[members], lengths=case.rows.lengths[members],
            max_length=max(shape.lengths), rings=case.rows.rings[members],  # type: ignore[index]
        )  # fmt: skip
        if kind == "bf16":
            return run_paged(shape, case.q, k, v, rows)
        return run_quantized(shape, case.q, pages, k_ring, v_ring, rows)

    together = run(order)
    for row in range(count):
        assert torch.equal(run([row])[row], together[row]), f"row {row} has other bits in company"
    return f"{count} rows, the same bits alone and together"


def check_write(device: torch.device) -> str:
    """New rows to their slots and nowhere else; negative slots to none."""
    k_slots, v_slots = torch.full((40, 3, 24), NAN, device=device), torch.full((40, 3, 16), NAN, device=device)
    k = torch.randn(1, 3, 6, 24, device=device)[0].transpose(0, 1)  # as a model gives them
    v = torch.randn(6, 3, 16, device=device)
    slots = torch.tensor([39, 0, -1, 7, 8, -1], device=device)
    paged.write_rows(k, v, k_slots, v_slots, slots)
    used = slots >= 0
    assert torch.equal(k_slots[slots[used]], k[used]) and torch.equal(v_slots[slots[used]], v[used]), "other values"
    written = tuple(int((~x.isnan()).flatten(1).any(1).sum()) for x in (k_slots, v_slots))
    assert written == (4, 4), written
    return "4 rows written, 2 left out"


def check_settle(kind: str, device: torch.device) -> str:
    """Blocks of the ring as `kv_quant.quantize_blocks` makes them, bit for bit, and no others."""
    shape = Shape(kv_heads=2, group=1, head_dim=64, head_dim_v=32, lengths=(32, 96, 50, 0, 64))
    due = (0, 2, -1, -1, 0)
    case = _pages_for(shape, paged.QUANT_BLOCK_TOKENS, device)
    pages, k_ring, v_ring, rows, _ = quantized_layer(shape, case, kind)
    before = [x.clone() for x in _tensors(pages)]
    for x in _tensors(pages):
        x.zero_()
    paged.settle_blocks(pages, k_ring, v_ring, rows, torch.tensor(due, dtype=torch.int32, device=device))
    wanted = {case.tables[row][block] for row, block in enumerate(due) if block >= 0}
    for got, want in zip(_tensors(pages), before, strict=True):
        for page in range(case.num_pages):
            expected = want[page] if page in wanted else torch.zeros_like(want[page])
            assert torch.equal(got[page], expected), f"page {page} of shape {tuple(got.shape)}"
    return f"{len(wanted)} blocks, bit for bit"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Case:
    q: Tensor
    num_pages: int
    tables: list[list[int]]
    rows: paged.DecodeRows


def _pages_for(shape: Shape, page_tokens: int, device: torch.device) -> _Case:
    """Queries, and pages all over the pool. Queries of row b stand in row b."""
    counts = [-(-length // page_tokens) for length in shape.lengths]
    num_pages = sum(counts) + 2
    order = np.random.default_rng(shape.seed).permutation(num_pages - 1)  # the last is nobody's
    ends = np.cumsum(counts)
    tables = [order[end - count : end].tolist() for end, count in zip(ends, counts, strict=True)]
    padded = torch.full((len(counts), max(counts) + 2), UNUSED_PAGE, dtype=torch.int32)
    for row, table in enumerate(tables):
        dead = max(0, shape.lengths[row] - (shape.window or 1 << 30)) // page_tokens  # given back already
        padded[row, dead : len(table)] = torch.tensor(table[dead:], dtype=torch.int32)
    count = len(counts)
    rows = paged.DecodeRows(
        q_rows=torch.arange(count, dtype=torch.int32, device=device), tables=padded.to(device),
        lengths=torch.tensor(shape.lengths, dtype=torch.int32, device=device), max_length=max(shape.lengths),
        rings=torch.arange(count, 0, -1, dtype=torch.int32, device=device),
    )  # fmt: skip
    heads = shape.kv_heads * shape.group
    q = 2 * _normal(shape, heads, count, shape.head_dim, device=device).transpose(0, 1)  # strided as a model's
    return _Case(q=q, num_pages=num_pages, tables=tables, rows=rows)


def quantized_layer(
    shape: Shape, case: _Case, kind: str
) -> tuple[paged.QuantizedPages, Tensor, Tensor, paged.DecodeRows, QuantizedLayer]:
    """Pages and rings of 96 tokens for rows of random keys (some channels larger, all off zero) and values. `kind`: of
    both, or as `int8+int4` of keys and of values."""
    k_kind, _, v_kind = kind.partition("+")
    kinds = {"k": k_kind, "v": v_kind or k_kind}
    device, tokens = case.q.device, paged.QUANT_BLOCK_TOKENS
    ring_tokens, parts, rings = 96, {}, []
    for name, dim, per_channel in (("k", shape.head_dim, True), ("v", shape.dim_v, False)):
        blocks = _normal(shape, case.num_pages, tokens, shape.kv_heads, dim, device=device)
        blocks = (blocks * torch.linspace(0.3, 3, dim, device=device) + 0.5).to(shape.dtype)
        ring = torch.full((len(shape.lengths) + 1, ring_tokens, shape.kv_heads, dim), NAN, device=device)
        ring = ring.to(shape.dtype)
        for row, length in enumerate(shape.lengths):
            for token in range(max(0, length - ring_tokens), length):
                slot = int(case.rows.rings[row]), token % ring_tokens  # type: ignore[index]
                ring[slot] = blocks[case.tables[row][token // tokens], token % tokens]
        parts[name] = quantize_blocks(blocks, kinds[name], per_channel=per_channel)
        rings.append(ring)
    pages = paged.QuantizedPages(
        k_kind=kinds["k"], v_kind=kinds["v"],
        k_codes=parts["k"][0], k_scale=parts["k"][1], k_zero=parts["k"][2],
        v_codes=parts["v"][0], v_scale=parts["v"][1], v_zero=parts["v"][2],
    )  # fmt: skip
    pages_by_number = [[_one(part, page) for page in range(case.num_pages)] for part in parts.values()]
    layer = QuantizedLayer(
        kinds["k"], kinds["v"], pages_by_number[0], pages_by_number[1], _wide(rings[0]), _wide(rings[1])
    )
    return pages, rings[0], rings[1], case.rows, layer


def _one(part: tuple[Tensor, Tensor, Tensor | None], page: int) -> Quantized:
    codes, scale, zero = part
    return Quantized(
        codes[page].cpu().numpy(), scale[page].cpu().numpy(), None if zero is None else zero[page].cpu().numpy()
    )


def _tensors(pages: paged.QuantizedPages) -> list[Tensor]:
    found = (pages.k_codes, pages.k_scale, pages.k_zero, pages.v_codes, pages.v_scale, pages.v_zero)
    return [x for x in found if x is not None]


def _room(shape: Shape, rows: int, slots: int, device: torch.device) -> tuple[Tensor, paged.Partials]:
    heads = shape.kv_heads * shape.group
    partials = paged.Partials.empty(rows, slots, heads, shape.dim_v, device)
    for x in (partials.m, partials.total, partials.out):
        x.fill_(NAN)
    return torch.full((rows, heads, shape.dim_v), NAN, dtype=shape.dtype, device=device), partials


def _normal(shape: Shape, *size: int, device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(shape.seed + sum(size))
    return torch.randn(*size, generator=generator).to(shape.dtype).to(device)


def _wide(x: Tensor) -> np.ndarray:
    return np.asarray(x.double().cpu())


def _compare(out: Tensor, want: np.ndarray, tolerance: float) -> str:
    got = _wide(out)
    assert np.isfinite(got).all(), "NaN or infinity in the result"
    error = float(np.linalg.norm(got - want) / np.linalg.norm(want))
    assert error <= tolerance, f"relative error {error:.2e}, tolerated {tolerance:.0e}"
    return f"relative error {error:.1e}"
