"""Pages of a decode worker that are quantized: rings, tags, what is shared, and copies of sequences that gave way."""

from __future__ import annotations

import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from codec.profile import Promise
from decode.page_table import PageTable
from decode.tagged_pages import TaggedPages
from prefill.block_pool import BlockPool, PoolExhausted
from prefill.errors import ModelRefused
from prefill.kv_layout import KVLayout
from prefill.page_quality import UNKNOWN
from prefill.quantized_pool import QuantizedKVPool
from prefill.quantized_rings import RingsExhausted
from prefill.runtime import load_runtime, recents_of

LAYOUT = KVLayout(num_layers=1, num_kv_heads=1, head_dim_k=8, head_dim_v=8, dtype="bfloat16")
CHUNK = 64
PAGE_KL = 0.001
KL = {"lossless": 0.0, "q1": 0.01, "q2": 0.03, "q3": 0.1}
PROMPT = list(range(200))
MODEL = Path(__file__).parents[2] / "model"


def quantized_pages(num_blocks: int = 40, *, num_rings: int = 4, page_kl: float = PAGE_KL) -> TaggedPages:
    promise = {**{name: Promise(kl=kl) for name, kl in KL.items()}, "q0": Promise(kl=0.0005)}
    pool = QuantizedKVPool(LAYOUT, num_blocks, "int4", num_rings)
    runtime: Any = SimpleNamespace(
        pool=pool,
        kv_cache_dtype="int4",
        page_kl=page_kl,
        allocator=BlockPool(num_blocks),
        profile=SimpleNamespace(level_names=tuple(promise), promise=promise),
        model=SimpleNamespace(fingerprint="f"),
    )
    return TaggedPages(runtime, chunk_tokens=CHUNK)


def pool_of(pages: TaggedPages) -> QuantizedKVPool:
    assert isinstance(pages._pool, QuantizedKVPool)
    return pages._pool


def begin(pages: TaggedPages, tokens: list[int] = PROMPT, max_kl: float | None = KL["q2"]) -> PageTable:
    return pages.begin(pages.chain(tokens, ""), len(tokens), len(tokens) + 1, max_kl)


def kv(tokens: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.tensor(tokens, dtype=torch.bfloat16).view(1, -1, 1, 1)
    return x.repeat(1, 1, 1, 8), -x.repeat(1, 1, 1, 8)


def load(pages: TaggedPages, table: PageTable, chunk: int, level: str) -> None:
    k, v = kv(PROMPT[chunk * CHUNK : (chunk + 1) * CHUNK])
    pool_of(pages).write(table.blocks, None, chunk * CHUNK, k, v)
    pages.loaded(table, chunk * CHUNK, (chunk + 1) * CHUNK, level, recents=recents_of(k, v))


def compute(pages: TaggedPages, table: PageTable, start: int, stop: int, tokens: list[int] = PROMPT) -> None:
    """As the engine does it."""
    missing = pool_of(pages).blocks_for(stop) - len(table.blocks)
    pages.grow_by(table, max(0, missing))
    pages.continue_at(table, start)
    assert table.ring is not None
    pool_of(pages).write(table.blocks, table.ring, start, *kv(tokens[start:stop]))
    pages.computed(table, start, stop)
    pages.share(table, stop)


def in_ring(pages: TaggedPages, table: PageTable, start: int, stop: int) -> torch.Tensor:
    """The keys of these tokens, [L, T, H, D]."""
    assert table.ring is not None
    store = pool_of(pages).store
    return store.recent_k.data[:, store.rows(table.ring, start, stop)]


def test_what_is_in_the_ring_is_not_shared_and_what_is_shared_is_not_exact() -> None:
    pages = quantized_pages()
    first = begin(pages)
    compute(pages, first, 0, 200)
    assert pages.worst_kl(first, 0, 200) == PAGE_KL
    assert first.num_known == 5, "160 of 200 tokens are settled"
    assert begin(pages).cached_tokens == 160
    assert begin(pages, max_kl=KL["q3"]).cached_tokens == 160
    assert begin(pages, max_kl=0.0005).cached_tokens == 0, "what it may lose is less than pages do"
    chain = pages.chain(PROMPT, "")
    assert pages.first_missing(chain, 200, 0.0005) is None, "and it waits for nobody"
    assert pages.first_missing(chain, 200, KL["q2"]) == chain.blocks(32)[5]


def test_pages_of_unknown_loss_are_shared_with_nobody() -> None:
    pages = quantized_pages(page_kl=UNKNOWN)
    table = begin(pages, max_kl=KL["q3"])
    compute(pages, table, 0, 200)
    assert begin(pages, max_kl=KL["q3"]).cached_tokens == 0
    assert pages.worst_kl(table, 0, 200) is None, "so no chunk of it is kept either"


def test_every_block_has_the_tag_of_its_tokens_also_those_that_leave_the_ring_late() -> None:
    pages = quantized_pages()
    tokens = [*PROMPT, *([7] * 200)]
    table = begin(pages)
    for chunk, level in ((2, "q3"), (0, "q2")):
        load(pages, table, chunk, level)
    compute(pages, table, CHUNK, 2 * CHUNK)
    compute(pages, table, 3 * CHUNK, 200)
    table.chain.extend([7] * 200)
    for position in range(200, 400):
        if position == 230:
            pages.refine(table, 2 * CHUNK, *kv(PROMPT[128:192]), "q1")
        compute(pages, table, position, position + 1, tokens)
        assert pages.worst_kl(table, 192, position + 1) == KL["q3"], "computed on the worst"
        pages.check_integrity([table])
    assert pages.worst_kl(table, 0, 64) == pages.worst_kl(table, 64, 128) == KL["q2"]
    assert pages.worst_kl(table, 128, 192) == KL["q1"]
    assert len(table.blocks) == pool_of(pages).blocks_for(400)


def test_a_short_answer_on_lossy_kv_says_so_while_it_is_in_the_ring() -> None:
    pages = quantized_pages()
    table = begin(pages, PROMPT[:70])
    load(pages, table, 0, "q3")
    compute(pages, table, 64, 70)
    pages.refine(table, 0, *kv(PROMPT[:64]), "q1")
    assert pages.worst_kl(table, 0, 64) == KL["q1"]
    assert pages.worst_kl(table, 64, 70) == KL["q3"]


def test_what_is_loaded_behind_is_gone_on_from_as_it_came() -> None:
    pages = quantized_pages()
    table = begin(pages)
    load(pages, table, 2, "lossless")
    load(pages, table, 0, "lossless")
    compute(pages, table, 64, 128)
    for start in (0, 64, 128):  # from pages, from ring and pages, from behind the ring
        k, _ = pages.read(table, start, start + CHUNK)
        assert (k - kv(PROMPT[start : start + CHUNK])[0]).abs().max() <= 2.5
    compute(pages, table, 192, 200)
    assert not table.recents, "they are in the ring"
    assert torch.equal(in_ring(pages, table, 160, 200), kv(PROMPT[160:])[0])
    with pytest.raises(AssertionError):
        pages.continue_at(table, 96)  # what lies before it is nowhere as it came


def test_a_refined_chunk_is_begun_with_as_refined() -> None:
    pages = quantized_pages()
    table = begin(pages)
    for chunk in range(3):
        load(pages, table, chunk, "q3")
    better = [token + 100 for token in PROMPT[128:192]]
    pages.refine(table, 128, *kv(better), "q1")
    compute(pages, table, 192, 200)
    assert torch.equal(in_ring(pages, table, 160, 192), kv(better[32:])[0])


def test_rings_run_out_before_pages_do_and_nothing_is_taken() -> None:
    pages = quantized_pages(num_rings=2)
    tables = [begin(pages), begin(pages)]
    with pytest.raises(RingsExhausted):
        begin(pages, PROMPT[:40])
    assert pages.usage() == 1.0
    pages.check_integrity(tables)
    with pytest.raises(AssertionError, match="a ring is in use"):
        pages.check_integrity(tables[:1])
    for table in tables:
        pages.release(table)
    pages.check_integrity([])
    assert pages.usage() == 0.0


def test_no_room_for_pages_gives_no_ring_either() -> None:
    pages = quantized_pages(num_blocks=8)
    with pytest.raises(PoolExhausted):
        begin(pages, list(range(400)))
    assert pool_of(pages).rings.num_free == 4
    pages.check_integrity([])


@pytest.mark.parametrize("seed", range(8))
def test_who_gave_way_finds_all_as_it_was(seed: int) -> None:
    rng = random.Random(seed)
    pages = quantized_pages(num_blocks=100)
    num_tokens = rng.randrange(193, 500)
    tokens = [*PROMPT, *(rng.randrange(256) for _ in range(300))]
    table = begin(pages)
    load(pages, table, 1, "q2")
    compute(pages, table, 0, 64)
    compute(pages, table, 128, 192)
    table.chain.extend(tokens[200:num_tokens])
    for position in range(192, num_tokens):
        compute(pages, table, position, position + 1, tokens)
    before = pages.read(table, 0, num_tokens)
    tags = [pages.worst_kl(table, at, at + 1) for at in range(num_tokens)]
    assert pages.save(table, num_tokens - 1) is None, "it has got further"
    saved = pages.save(table, num_tokens)
    assert saved is not None
    pages.release(table)
    for other in [begin(pages, [5] * 300), begin(pages, [6] * 300)]:
        compute(pages, other, 0, 300, [9] * 300)
        pages.release(other)
    again = pages.begin_again(saved, table.chain, num_tokens + 60, KL["q2"])
    pages.restore(again, saved)
    assert again.cached_tokens == num_tokens
    assert all(map(torch.equal, pages.read(again, 0, num_tokens), before))
    assert [pages.worst_kl(again, at, at + 1) for at in range(num_tokens)] == tags
    compute(pages, again, num_tokens, num_tokens + 1, [*tokens, 1])
    pages.check_integrity([again])
    pages.release(again)
    pages.check_integrity([])


def test_copies_have_a_limit() -> None:
    pages = quantized_pages(num_blocks=28)
    tables = [begin(pages), begin(pages, [5] * 200)]
    for table in tables:
        compute(pages, table, 0, 200)
    saved = pages.save(tables[0], 200)
    assert saved is not None and pages.save(tables[1], 200) is None, "a quarter of the pages' bytes"
    pages.forget(saved)
    assert pages.save(tables[1], 200) is not None


def test_one_that_computed_what_another_has_keeps_its_own_bits() -> None:
    """Two that came to the same tokens need not have the same bits: an answer goes on with those that it began with."""
    pages = quantized_pages()
    one, two = begin(pages), begin(pages)
    compute(pages, one, 0, 200)
    compute(pages, two, 0, 200)
    assert not set(one.blocks) & set(two.blocks) and two.max_kl is None
    pages.check_integrity([one, two])


def test_the_bundled_model_in_quantized_pages() -> None:
    runtime = load_runtime(MODEL, kv_cache_dtype="int4", kv_memory_bytes=32 << 20, max_sequences=5)
    pool = runtime.pool
    assert isinstance(pool, QuantizedKVPool) and runtime.kv_cache_dtype == "int4"
    assert pool.rings.num_rings == 5 and (32 << 20) - pool.num_bytes < 32 * pool.bytes_per_token + 1
    assert 0 < runtime.page_kl < KL["q1"], "so that requests with the policy's floor share prefixes"
    with pytest.raises(ModelRefused, match="lower max_num_seqs"):
        load_runtime(MODEL, kv_cache_dtype="int4", kv_memory_bytes=1 << 20)
    with pytest.raises(ModelRefused, match="no kind of quantized pages"):
        load_runtime(MODEL, kv_cache_dtype="int3")
