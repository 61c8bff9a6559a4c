"""prefill/kv_pool.py: what is written through a block table is read through it, and nothing else changes."""

from __future__ import annotations

import pytest
import torch

from prefill.kv_layout import KVLayout
from prefill.kv_pool import KVPool

LAYOUT = KVLayout(num_layers=2, num_kv_heads=3, head_dim_k=8, head_dim_v=4, dtype="bfloat16")
TABLES = {"neighbours": [2, 3, 4, 5], "scattered": [7, 0, 3, 5]}


def random_kv(num_tokens: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shape = (LAYOUT.num_layers, num_tokens, LAYOUT.num_kv_heads)
    k = torch.randn(*shape, LAYOUT.head_dim_k, generator=generator).bfloat16()
    return k, torch.randn(*shape, LAYOUT.head_dim_v, generator=generator).bfloat16()


def test_layout_counts_bytes() -> None:
    assert LAYOUT.bytes_per_token == 2 * 3 * 12 * 2
    pool = KVPool(LAYOUT, num_blocks=8)
    assert pool.k.shape == (2, 8, 16, 3, 8) and pool.v.shape == (2, 8, 16, 3, 4)
    assert pool.num_bytes == pool.k.nbytes + pool.v.nbytes


@pytest.mark.parametrize("table", TABLES.values(), ids=TABLES.keys())
@pytest.mark.parametrize(("start", "stop"), [(0, 64), (0, 1), (15, 17), (5, 60), (16, 48), (63, 64)])
def test_read_gives_what_was_written(table: list[int], start: int, stop: int) -> None:
    pool = KVPool(LAYOUT, num_blocks=8)
    before_k, before_v = random_kv(64, seed=1)
    pool.write(table, 0, before_k, before_v)
    k, v = random_kv(stop - start)
    pool.write(table, start, k, v)
    after_k, after_v = pool.read(table, 0, 64)
    before_k[:, start:stop], before_v[:, start:stop] = k, v
    assert torch.equal(after_k, before_k) and torch.equal(after_v, before_v)
    others = [block for block in range(8) if block not in table]
    assert not pool.k[:, others].any() and not pool.v[:, others].any()


def test_a_token_stands_where_the_layout_says() -> None:
    pool = KVPool(LAYOUT, num_blocks=8)
    k, v = random_kv(64)
    pool.write(TABLES["scattered"], 0, k, v)
    assert torch.equal(pool.k[:, 3, 5], k[:, 37]) and torch.equal(pool.v[:, 3, 5], v[:, 37])


def test_a_view_of_neighbours_is_the_pages() -> None:
    pool = KVPool(LAYOUT, num_blocks=8)
    k, v = random_kv(40)
    pages = pool.view(TABLES["neighbours"], 10, 50)
    assert pages is not None
    pages[0].copy_(k)
    pages[1].copy_(v)
    assert torch.equal(pool.read(TABLES["neighbours"], 10, 50)[0], k)
    assert torch.equal(pool.v[:, 2, 10], v[:, 0])
    assert pool.view(TABLES["scattered"], 10, 50) is None
    assert pool.view(TABLES["scattered"], 1, 16) is not None, "one block is its own neighbour"


def test_tokens_beyond_the_table_are_our_bug() -> None:
    pool = KVPool(LAYOUT, num_blocks=8)
    with pytest.raises(AssertionError):
        pool.read([1, 2], 0, 33)
