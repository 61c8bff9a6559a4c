"""Pages of a decode worker and their tags, through the life of requests."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from codec.profile import Promise
from decode.tagged_pages import TaggedPages
from prefill.block_allocator import BlockAllocator
from prefill.page_quality import PageQuality

CHUNK = 32
KL = {"lossless": 0.0, "q1": 0.01, "q2": 0.03, "q3": 0.1}


def tagged_pages(num_blocks: int = 64) -> TaggedPages:
    profile = SimpleNamespace(
        level_names=(*KL, "q9"), promise={**{name: Promise(kl=kl) for name, kl in KL.items()}, "q9": Promise()}
    )
    pool = SimpleNamespace(write=lambda *_: None)
    runtime: Any = SimpleNamespace(pool=pool, allocator=BlockAllocator(num_blocks), profile=profile)
    return TaggedPages(runtime, chunk_tokens=CHUNK)


def new_kv() -> torch.Tensor:
    return torch.zeros(1, CHUNK, 1, 1)


def test_the_answer_inherits_what_it_was_computed_on_and_the_chunks_rise() -> None:
    pages = tagged_pages()
    table = pages.allocate(CHUNK + 20)
    pages.loaded(table, 0, CHUNK, "q3")
    pages.computed(table, CHUNK, CHUNK + 5)  # the tail
    pages.refine(table, 0, new_kv(), new_kv(), "q1")
    pages.computed(table, CHUNK + 5, CHUNK + 6)
    assert pages.worst_kl(table, 0, CHUNK) == 0.01
    assert pages.worst_kl(table, CHUNK, CHUNK + 6) == 0.1
    pages.check_integrity([table])
    pages.free(table)
    pages.check_integrity([])
    assert pages.worst_kl([], 0, 0) == 0.0


def test_a_level_that_promises_nothing_makes_all_above_it_unknown() -> None:
    pages = tagged_pages()
    table = pages.allocate(2 * CHUNK + 1)
    pages.loaded(table, 0, CHUNK, "q9")
    pages.loaded(table, CHUNK, 2 * CHUNK, "q1")
    pages.computed(table, 2 * CHUNK, 2 * CHUNK + 1)
    assert pages.worst_kl(table, 0, CHUNK) is None
    assert pages.worst_kl(table, CHUNK, 2 * CHUNK) == 0.01
    assert pages.worst_kl(table, 2 * CHUNK, 2 * CHUNK + 1) is None


@pytest.mark.parametrize("seed", range(20))
def test_a_look_at_each_block_finds_what_a_look_at_each_token_finds(seed: int) -> None:
    rng = random.Random(seed)
    pages, every_token = tagged_pages(), PageQuality()
    num_chunks, num_tail = rng.randrange(1, 5), rng.randrange(1, CHUNK + 1)
    first = num_chunks * CHUNK
    table = pages.allocate(first + num_tail + 100)
    levels = {}
    for chunk in range(num_chunks):
        blocks = table[2 * chunk : 2 * chunk + 2]
        if rng.random() < 0.3:
            pages.computed(table, chunk * CHUNK, (chunk + 1) * CHUNK)
            every_token.computed(blocks, table[: 2 * chunk + 2])
        else:
            levels[chunk] = rng.choice(["q2", "q3"])
            pages.loaded(table, chunk * CHUNK, (chunk + 1) * CHUNK, levels[chunk])
            every_token.filled(blocks, KL[levels[chunk]])
    steps = [(first, first + num_tail), *((at, at + 1) for at in range(first + num_tail, first + num_tail + 100))]
    for start, stop in steps:
        pages.computed(table, start, stop)
        for token in range(start, stop):
            every_token.computed([table[token // 16]], table[: token // 16 + 1])
        if levels and rng.random() < 0.05:
            chunk = rng.choice(list(levels))
            level = "q1" if levels.pop(chunk) == "q2" else rng.choice(["q1", "lossless"])
            pages.refine(table, chunk * CHUNK, new_kv(), new_kv(), level)
            every_token.refined(table[2 * chunk : 2 * chunk + 2], KL[level])
    for block in range(-(-steps[-1][1] // 16)):
        assert pages.worst_kl(table, 16 * block, 16 * block + 16) == every_token.worst([table[block]])
