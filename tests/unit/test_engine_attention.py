"""kernels/attention.py against its reference, and through pages with prefill/attention.py."""

from __future__ import annotations

import pytest
import torch

from kernels.attention import HIDDEN_BIAS, TILE_TOKENS, merge_tiles, tile_partials
from kernels.attention_reference import attention_reference
from prefill.attention import AttentionRule, PagedBatch, Span
from prefill.kv_layout import KVLayout
from prefill.kv_pool import KVPool

H, HQ, D, DV = 2, 6, 16, 8
LAYOUT = KVLayout(num_layers=1, num_kv_heads=H, head_dim_k=D, head_dim_v=DV, dtype="float32")
LENGTHS = [1, 2, 63, TILE_TOKENS - 1, TILE_TOKENS, TILE_TOKENS + 1, 2 * TILE_TOKENS + 44]


def randn(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def attend(length: int, chunks: list[int], rule: AttentionRule, *, stale: float = 0.0) -> torch.Tensor:
    """Attention of `length` tokens in `chunks`, the last ones alone where chunks do not cover them: [N, Hq, Dv]."""
    pool = KVPool(LAYOUT, num_blocks=80)
    pool.k.fill_(stale)
    pool.v.fill_(stale)
    table = torch.randperm(80, generator=torch.Generator().manual_seed(3)).tolist()
    q, k, v = randn(length, HQ, D, seed=0), randn(length, H, D, seed=1), randn(length, H, DV, seed=2)
    out, start = [], 0
    chunks = chunks + [1] * (length - sum(chunks))
    for count in chunks:
        batch = PagedBatch(pool, [Span(row=0, num_tokens=count, start=start, block_table=table)], row_multiple=4)
        part = [x[start : start + count].transpose(0, 1)[None] for x in (q, k, v)]
        out.append(batch.attend(0, *part, rule)[0])
        start += count
    return torch.cat(out)


def reference(length: int, rule: AttentionRule) -> torch.Tensor:
    q, k, v = randn(length, HQ, D, seed=0), randn(length, H, D, seed=1), randn(length, H, DV, seed=2)
    positions = torch.arange(length).numpy()
    out = attention_reference(
        q.double().numpy(),
        k.double().numpy(),
        v.double().numpy(),
        positions,
        scale=rule.scale,
        window=rule.window,
        softcap=rule.softcap,
        tile_tokens=TILE_TOKENS,
    )
    return torch.from_numpy(out).float()


RULES = {
    "plain": AttentionRule(scale=0.25, window=None, softcap=None),
    "window": AttentionRule(scale=0.25, window=50, softcap=None),
    "window-over-tiles": AttentionRule(scale=0.25, window=TILE_TOKENS + 20, softcap=None),
    "softcap": AttentionRule(scale=1.0, window=None, softcap=2.0),
}


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())
@pytest.mark.parametrize("length", LENGTHS)
def test_agrees_with_the_reference(length: int, rule: AttentionRule) -> None:
    expected = reference(length, rule)
    prompt = max(1, length - 3)
    torch.testing.assert_close(attend(length, [prompt], rule), expected, atol=2e-5, rtol=1e-4)


def test_the_reference_is_softmax() -> None:
    """The specification itself against the textbook."""
    rule = RULES["plain"]
    q, k, v = randn(300, HQ, D, seed=0), randn(300, H, D, seed=1), randn(300, H, DV, seed=2)
    k, v = k.repeat_interleave(HQ // H, 1), v.repeat_interleave(HQ // H, 1)
    expected = torch.nn.functional.scaled_dot_product_attention(
        q.transpose(0, 1).double(), k.transpose(0, 1).double(), v.transpose(0, 1).double(), is_causal=True, scale=0.25
    )
    torch.testing.assert_close(reference(300, rule).double(), expected.transpose(0, 1), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())
def test_what_a_page_held_before_does_not_matter(rule: AttentionRule) -> None:
    clean, poisoned = attend(300, [200, 70], rule), attend(300, [200, 70], rule, stale=float("nan"))
    assert torch.equal(clean, poisoned)


def test_a_tile_with_nothing_visible_changes_no_bit() -> None:
    q, k, v = (randn(2, 5, 16, seed=4), randn(2, TILE_TOKENS, 16, seed=5), randn(2, TILE_TOKENS, 8, seed=6))
    seen = tile_partials(q, k, v, None, scale=0.25)
    hidden = tile_partials(q, k * 100, v, torch.full((1, TILE_TOKENS), HIDDEN_BIAS), scale=0.25)
    alone = merge_tiles(*(x[None] for x in seen))
    for order in ((seen, hidden, hidden), (hidden, seen), (hidden, hidden, seen, hidden)):
        merged = merge_tiles(*(torch.stack(x) for x in zip(*order, strict=True)))
        assert torch.equal(merged, alone)
