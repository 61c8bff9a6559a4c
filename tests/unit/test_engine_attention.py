"""The two kinds of attention over pages against one reference: prefill/tiled_attention.py with kernels/attention.py,
and prefill/cpu_attention.py with kernels/attention_numba.py, with pairs of bf16 and without."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch

from kernels.attention import HIDDEN_BIAS, TILE_TOKENS, merge_tiles, tile_partials
from kernels.attention_numba import MAX_ROWS, has_bf16_products
from kernels.attention_reference import attention_reference
from prefill.attention import AttentionRule, Batch, Span
from prefill.cpu_attention import CpuAttention
from prefill.kv_layout import KVLayout
from prefill.kv_pool import KVPool
from prefill.tiled_attention import TiledBatch

H, HQ, D, DV = 2, 6, 16, 8
NUM_BLOCKS = 80
LENGTHS = [1, 2, 63, TILE_TOKENS - 1, TILE_TOKENS, TILE_TOKENS + 1, 2 * TILE_TOKENS + 44]
RULES = {
    "plain": AttentionRule(scale=0.25, window=None, softcap=None),
    "window": AttentionRule(scale=0.25, window=50, softcap=None),
    "window-over-tiles": AttentionRule(scale=0.25, window=TILE_TOKENS + 20, softcap=None),
    "softcap": AttentionRule(scale=1.0, window=None, softcap=2.0),
}
MakeBatch = Callable[[Sequence[Span]], Batch]


def tiled(pool: KVPool) -> MakeBatch:
    return lambda spans: TiledBatch(pool, spans, row_multiple=4)


def kernel(pool: KVPool) -> MakeBatch:
    return CpuAttention(pool).batch


def kernel_without_pairs(pool: KVPool) -> MakeBatch:
    return CpuAttention(pool, paired=False).batch


KINDS = [tiled, kernel]
BF16_KINDS = [tiled, kernel_without_pairs, *([kernel] if has_bf16_products() else [])]


def randn(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def layout(dtype: str = "float32", heads: int = H, dim_k: int = D, dim_v: int = DV) -> KVLayout:
    return KVLayout(num_layers=1, num_kv_heads=heads, head_dim_k=dim_k, head_dim_v=dim_v, dtype=dtype)


class Case:
    """`length` random tokens in the pages of a pool, all written, and what attends to them."""

    def __init__(
        self,
        kind: Callable[[KVPool], MakeBatch],
        length: int,
        kv: KVLayout | None = None,
        *,
        group: int = HQ // H,
        stale: float = 0.0,
        block_tokens: int = 16,
    ) -> None:
        self.length, self.kv = length, kv or layout()
        self.pool = KVPool(self.kv, NUM_BLOCKS * 16 // block_tokens, block_tokens)
        self.pool.k.fill_(stale)
        self.pool.v.fill_(stale)
        self.table = torch.randperm(self.pool.num_blocks, generator=torch.Generator().manual_seed(3)).tolist()
        self.make_batch = kind(self.pool)
        heads, dtype = self.kv.num_kv_heads, self.kv.torch_dtype
        self.q = randn(length, heads * group, self.kv.head_dim_k, seed=0).to(dtype)
        self.k = randn(length, heads, self.kv.head_dim_k, seed=1).to(dtype)
        self.v = randn(length, heads, self.kv.head_dim_v, seed=2).to(dtype)

    def attend(self, chunks: list[int], rule: AttentionRule) -> torch.Tensor:
        """In chunks, the last tokens alone where chunks do not cover them: [N, Hq, Dv]."""
        out, start = [], 0
        for count in chunks + [1] * (self.length - sum(chunks)):
            batch = self.make_batch([Span(row=0, num_tokens=count, start=start, block_table=self.table)])
            part = [x[start : start + count].transpose(0, 1)[None] for x in (self.q, self.k, self.v)]
            out.append(batch.attend(0, *part, rule)[0])
            start += count
        return torch.cat(out)

    def reference(self, rule: AttentionRule) -> torch.Tensor:
        out = attention_reference(
            *(x.double().numpy() for x in (self.q, self.k, self.v)),
            np.arange(self.length),
            scale=rule.scale,
            window=rule.window,
            softcap=rule.softcap,
            tile_tokens=TILE_TOKENS,
        )
        return torch.from_numpy(out).float()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())
@pytest.mark.parametrize("length", LENGTHS)
def test_agrees_with_the_reference(kind, length: int, rule: AttentionRule) -> None:
    case = Case(kind, length)
    torch.testing.assert_close(case.attend([max(1, length - 3)], rule), case.reference(rule), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", BF16_KINDS)
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())
@pytest.mark.parametrize(("dim_k", "dim_v", "group"), [(64, 64, 2), (128, 128, 4), (80, 72, 1), (192, 128, 3)])
def test_agrees_in_bf16(kind, rule: AttentionRule, dim_k: int, dim_v: int, group: int) -> None:
    case = Case(kind, 2 * TILE_TOKENS + 11, layout("bfloat16", 2, dim_k, dim_v), group=group)
    rule = AttentionRule(scale=rule.scale / 4, window=rule.window, softcap=rule.softcap)
    # Weights and the result are rounded to 8 bits, of values up to 4; the products over tiles round scores as well.
    out = case.attend([300, 215], rule).float()
    torch.testing.assert_close(out, case.reference(rule), atol=0.06, rtol=0.02)
    assert (out - case.reference(rule)).abs().mean() < 2e-3


def test_the_reference_is_softmax() -> None:
    """The specification itself against the textbook."""
    case = Case(tiled, 300)
    q, k, v = (x.double().transpose(0, 1) for x in (case.q, case.k, case.v))
    k, v = (x.repeat_interleave(HQ // H, 0) for x in (k, v))
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.25)
    torch.testing.assert_close(case.reference(RULES["plain"]).double(), expected.transpose(0, 1), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())
def test_what_a_page_held_before_does_not_matter(kind, rule: AttentionRule) -> None:
    clean = Case(kind, 300).attend([200, 70], rule)
    assert torch.equal(clean, Case(kind, 300, stale=float("nan")).attend([200, 70], rule))


@pytest.mark.parametrize("kind", [kernel, kernel_without_pairs])
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_kernel_gives_a_row_the_same_bits_in_any_chunk(kind, rule: AttentionRule, dtype: str) -> None:
    kv, length = layout(dtype, 2, 64, 64), 2 * TILE_TOKENS + 30
    together = Case(kind, length, kv, group=2).attend([length], rule)
    for seed in range(3):
        sizes = torch.randint(1, 130, (length,), generator=torch.Generator().manual_seed(seed)).tolist()
        chunks: list[int] = []
        while sum(chunks) < length - 40:
            chunks.append(min(sizes[len(chunks)], length - 40 - sum(chunks)))
        block_tokens = (1, 16, 48)[seed]
        apart = Case(kind, length, kv, group=2, block_tokens=block_tokens).attend(chunks, rule)
        assert torch.equal(apart, together), f"seed {seed}"


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_threads_company_and_padding_change_no_bit(dtype: str) -> None:
    """Four sequences in one pass, on two threads, with padded rows, against each alone."""
    kv, rule = layout(dtype, 2, 64, 64), RULES["plain"]
    pool = KVPool(kv, 400)
    attention = CpuAttention(pool)
    spans, row = [], 0
    for i, (num_tokens, start) in enumerate([(300, 500), (1, 1000), (1, 0), (200, 0)]):
        table = list(range(100 * i, 100 * i + 100))
        spans.append(Span(row=row, num_tokens=num_tokens, start=start, block_table=table))
        row += num_tokens
    q, k, v = (randn(1, heads, row + 5, 64, seed=heads).to(kv.torch_dtype) for heads in (4, 2, 3))
    v = v[:, :2]
    pool.write(spans[0].block_table, 0, *(randn(1, 500, 2, 64, seed=7).to(kv.torch_dtype) for _ in "kv"))
    pool.write(spans[1].block_table, 0, *(randn(1, 1000, 2, 64, seed=8).to(kv.torch_dtype) for _ in "kv"))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        together = attention.batch(spans).attend(0, q, k, v, rule)[0]
    finally:
        torch.set_num_threads(threads)
    assert together.shape == (row + 5, 4, 64) and not together[row:].any()
    for span in spans:
        rows = slice(span.row, span.row + span.num_tokens)
        alone = Span(row=0, num_tokens=span.num_tokens, start=span.start, block_table=span.block_table)
        out = attention.batch([alone]).attend(0, q[:, :, rows], k[:, :, rows], v[:, :, rows], rule)[0]
        assert torch.equal(out, together[rows])


@pytest.mark.parametrize("kind", BF16_KINDS[1:])
def test_a_row_that_sees_one_key_gets_its_value(kind) -> None:
    """Bit for bit: the weights are divided by their sum as they were rounded."""
    case = Case(kind, 1, layout("bfloat16", 2, 64, 64), group=1)
    assert torch.equal(case.attend([1], RULES["plain"]), case.v)


def test_many_query_heads_on_a_kv_head_make_smaller_items() -> None:
    case = Case(kernel, 40, layout("float32", 1, 16, 16), group=71)
    assert MAX_ROWS < 40 * 71
    torch.testing.assert_close(case.attend([40], RULES["plain"]), case.reference(RULES["plain"]), atol=2e-5, rtol=1e-4)


def test_large_scores_do_not_overflow() -> None:
    case = Case(kernel, 300, layout("float32", 1, 16, 16), group=1)
    case.q *= 1e4
    rule = AttentionRule(scale=10.0, window=None, softcap=None)
    torch.testing.assert_close(case.attend([300], rule), case.reference(rule), atol=1e-4, rtol=1e-4)


def test_a_tile_with_nothing_visible_changes_no_bit() -> None:
    q, k, v = (randn(2, 5, 16, seed=4), randn(2, TILE_TOKENS, 16, seed=5), randn(2, TILE_TOKENS, 8, seed=6))
    seen = tile_partials(q, k, v, None, scale=0.25)
    hidden = tile_partials(q, k * 100, v, torch.full((1, TILE_TOKENS), HIDDEN_BIAS), scale=0.25)
    alone = merge_tiles(*(x[None] for x in seen))
    for order in ((seen, hidden, hidden), (hidden, seen), (hidden, hidden, seen, hidden)):
        merged = merge_tiles(*(torch.stack(x) for x in zip(*order, strict=True)))
        assert torch.equal(merged, alone)
