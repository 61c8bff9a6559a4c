"""Pages of a decode worker and their tags, through the life of requests."""

from __future__ import annotations

import random
from types import SimpleNamespace

import pytest
import torch
from exact_pages import exact_runtime

from codec.profile import Promise
from decode.page_table import PageTable
from decode.tagged_pages import TaggedPages
from prefill.block_pool import PoolExhausted
from prefill.page_quality import PageQuality
from prefill.window_layers import layers_seen

CHUNK = 32
KL = {"lossless": 0.0, "q1": 0.01, "q2": 0.03, "q3": 0.1}


def tagged_pages(
    num_blocks: int = 64, ttl_s: float | None = None, windows: tuple[int | None, ...] = (40, 40)
) -> TaggedPages:
    profile = SimpleNamespace(
        level_names=(*KL, "q9"), promise={**{name: Promise(kl=kl) for name, kl in KL.items()}, "q9": Promise()}
    )
    return TaggedPages(exact_runtime(num_blocks, profile, ttl_s=ttl_s, windows=windows), chunk_tokens=CHUNK)


def private(pages: TaggedPages, num_tokens: int) -> PageTable:
    """Pages that take nothing from others."""
    return pages.begin(pages.chain([0] * num_tokens, ""), num_tokens, num_tokens, None)


def begin(pages: TaggedPages, tokens: list[int], max_kl: float = 0.0, *, salt: str = "") -> PageTable:
    return pages.begin(pages.chain(tokens, salt), len(tokens), len(tokens), max_kl)


def compute(pages: TaggedPages, table: PageTable, stop: int) -> None:
    """All that was not there."""
    pages.computed(table, table.cached_tokens, stop)
    pages.share(table, stop)


def new_kv() -> torch.Tensor:
    return torch.zeros(1, CHUNK, 1, 1)


def test_the_answer_inherits_what_it_was_computed_on_and_the_chunks_rise() -> None:
    pages = tagged_pages()
    table = private(pages, CHUNK + 20)
    pages.loaded(table, 0, CHUNK, "q3")
    pages.computed(table, CHUNK, CHUNK + 5)  # the tail
    pages.refine(table, 0, new_kv(), new_kv(), "q1")
    pages.computed(table, CHUNK + 5, CHUNK + 6)
    assert pages.worst_kl(table, 0, CHUNK) == 0.01
    assert pages.worst_kl(table, CHUNK, CHUNK + 6) == 0.1
    pages.check_integrity([table])
    pages.release(table)
    pages.check_integrity([])


def test_a_level_that_promises_nothing_makes_all_above_it_unknown() -> None:
    pages = tagged_pages()
    table = private(pages, 2 * CHUNK + 1)
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
    table = private(pages, first + num_tail + 100)
    held = table.blocks
    levels = {}
    for chunk in range(num_chunks):
        blocks = held[2 * chunk : 2 * chunk + 2]
        if rng.random() < 0.3:
            pages.computed(table, chunk * CHUNK, (chunk + 1) * CHUNK)
            every_token.computed(blocks, held[: 2 * chunk + 2])
        else:
            levels[chunk] = rng.choice(["q2", "q3"])
            pages.loaded(table, chunk * CHUNK, (chunk + 1) * CHUNK, levels[chunk])
            every_token.filled(blocks, KL[levels[chunk]])
    steps = [(first, first + num_tail), *((at, at + 1) for at in range(first + num_tail, first + num_tail + 100))]
    for start, stop in steps:
        pages.computed(table, start, stop)
        for token in range(start, stop):
            every_token.computed([held[token // 16]], held[: token // 16 + 1])
        if levels and rng.random() < 0.05:
            chunk = rng.choice(list(levels))
            level = "q1" if levels.pop(chunk) == "q2" else rng.choice(["q1", "lossless"])
            pages.refine(table, chunk * CHUNK, new_kv(), new_kv(), level)
            every_token.refined(held[2 * chunk : 2 * chunk + 2], KL[level])
    for block in range(-(-steps[-1][1] // 16)):
        assert pages.worst_kl(table, 16 * block, 16 * block + 16) == every_token.worst([held[block]])


# -- prefixes that are shared -------------------------------------------------------------------------------------

PROMPT = list(range(100))


def test_a_prefix_that_is_there_is_taken_and_its_last_token_is_computed() -> None:
    pages = tagged_pages()
    first = begin(pages, PROMPT)
    assert first.cached_tokens == 0
    compute(pages, first, 100)
    second = begin(pages, PROMPT)
    assert second.cached_tokens == 96 and second.blocks[:6] == first.blocks[:6]
    assert begin(pages, PROMPT[:96]).cached_tokens == 80, "its last token has to be computed"
    assert begin(pages, PROMPT[:50] + PROMPT[:50]).cached_tokens == 48
    assert begin(pages, PROMPT, salt="other tenant").cached_tokens == 0
    pages.release(first)
    pages.release(second)
    assert begin(pages, PROMPT + PROMPT).cached_tokens == 96, "also when nobody holds it any more"


def test_what_was_generated_is_found_by_the_next_turn() -> None:
    pages = tagged_pages()
    table = pages.begin(pages.chain(PROMPT, ""), 100, 130, 0.0)
    compute(pages, table, 100)
    for token in range(30):
        table.chain.extend([token])
        pages.computed(table, 100 + token, 101 + token)
        pages.share(table, 101 + token)
    pages.release(table)
    assert begin(pages, [*PROMPT, *range(30), 7, 7, 7]).cached_tokens == 128


def test_worse_kv_than_the_floor_is_not_taken_and_better_takes_its_place() -> None:
    pages = tagged_pages()
    lossy = begin(pages, PROMPT, KL["q3"])
    pages.loaded(lossy, 0, 3 * CHUNK, "q3")
    pages.computed(lossy, 96, 100)
    pages.share(lossy, 100)
    assert begin(pages, PROMPT, KL["q3"]).cached_tokens == 96
    strict = begin(pages, PROMPT, KL["q2"])
    assert strict.cached_tokens == 0
    pages.loaded(strict, 0, 2 * CHUNK, "lossless")
    pages.share(strict, 2 * CHUNK)
    later = begin(pages, PROMPT, KL["q3"])
    assert later.cached_tokens == 64 and later.blocks[:4] == strict.blocks[:4]
    pages.share(lossy, 100)
    assert begin(pages, PROMPT, KL["q3"]).cached_tokens == 64, "what continued the worse one is not found again"


def test_who_lost_its_place_to_something_better_does_not_continue_that() -> None:
    """Else a known block would be held by somebody who does not hold what it continues."""
    pages = tagged_pages(num_blocks=16)
    lossy = begin(pages, PROMPT[:65], KL["q3"])
    pages.loaded(lossy, 0, 64, "q3")
    pages.share(lossy, 64)
    strict = begin(pages, PROMPT[:65])
    compute(pages, strict, 65)  # takes the same 64 tokens' place
    lossy.chain.extend(range(31))
    pages.grow(lossy, 96)
    pages.computed(lossy, 64, 96)
    pages.share(lossy, 96)
    pages.release(strict)
    pages.check_integrity([lossy])
    private(pages, 16 * (16 - len(lossy.blocks)))  # all that is only cached can be had
    pages.release(lossy)


def test_a_refined_prefix_is_good_for_stricter_requests() -> None:
    pages = tagged_pages()
    table = begin(pages, PROMPT, KL["q3"])
    pages.loaded(table, 0, 3 * CHUNK, "q3")
    pages.share(table, 96)
    pages.refine(table, 0, new_kv(), new_kv(), "q1")
    assert begin(pages, PROMPT, KL["q1"]).cached_tokens == CHUNK


def test_a_refinement_does_not_touch_better_pages_of_others() -> None:
    """Who loaded a coarse level goes on with the exact pages of another, and what it had asked for still comes."""
    pages = tagged_pages()
    written: list[tuple[int, int]] = []
    pages._runtime.exact_pool.write = lambda table, start, k, v: written.append((start, k.shape[1]))  # type: ignore[method-assign]
    coarse, strict = begin(pages, PROMPT, KL["q3"]), begin(pages, PROMPT[:50])
    compute(pages, strict, 50)
    pages.loaded(coarse, 0, 3 * CHUNK, "q3")
    pages.share(coarse, 3 * CHUNK)
    assert coarse.blocks[:3] == strict.blocks[:3]
    pages.refine(coarse, 0, new_kv(), new_kv(), "q1")
    pages.refine(coarse, CHUNK, new_kv(), new_kv(), "q1")
    assert pages.worst_kl(strict, 0, 50) == 0.0
    assert written == [(48, 16)], "its own blocks alone"
    assert pages.worst_kl(coarse, 0, 2 * CHUNK) == KL["q1"]


def test_a_level_that_promises_nothing_is_no_measure() -> None:
    pages = tagged_pages()
    assert pages.max_kl("q9") == 0.0 and pages.max_kl("q2") == KL["q2"]


def test_two_that_computed_the_same_go_on_with_one_copy() -> None:
    pages = tagged_pages()
    one, two = begin(pages, PROMPT), begin(pages, PROMPT)
    assert not set(one.blocks) & set(two.blocks)
    compute(pages, one, 100)
    compute(pages, two, 100)
    assert two.blocks[:6] == one.blocks[:6] and two.blocks[6] != one.blocks[6]
    pages.check_integrity([one, two])
    for table in (one, two):
        pages.release(table)
    pages.check_integrity([])


def test_who_wants_nothing_of_others_gives_nothing() -> None:
    pages = tagged_pages()
    table = pages.begin(pages.chain(PROMPT, ""), 100, 100, None)
    compute(pages, table, 100)
    assert begin(pages, PROMPT).cached_tokens == 0
    assert pages.first_missing(pages.chain(PROMPT, ""), 100, None) is None


def test_no_room_leaves_everything_as_it_was() -> None:
    pages = tagged_pages(num_blocks=8)
    table = begin(pages, PROMPT)
    compute(pages, table, 100)
    with pytest.raises(PoolExhausted):
        begin(pages, PROMPT + PROMPT)
    pages.check_integrity([table])
    pages.release(table)
    big = begin(pages, PROMPT + PROMPT[:28])
    assert big.cached_tokens == 96, "its own prefix is not given away to make room for it"


def test_pages_unused_for_their_time_to_live_are_forgotten() -> None:
    pages = tagged_pages(num_blocks=8, ttl_s=10.0)
    table = begin(pages, PROMPT)
    compute(pages, table, 100)
    pages.expire(1_000.0)
    assert begin(pages, PROMPT[:90]).cached_tokens == 80, "what is held does not age"
    pages = tagged_pages(num_blocks=8, ttl_s=10.0)
    table = begin(pages, PROMPT)
    compute(pages, table, 100)
    pages.release(table, 100.0)
    with pytest.raises(PoolExhausted):
        pages.begin(pages.chain(PROMPT + PROMPT, ""), 200, 200, 0.0, 105.0)
    pages.expire(114.9)
    assert pages.num_cached == 6, "who looked for them used them"
    pages.expire(115.0)
    assert pages.num_cached == 0 and begin(pages, PROMPT).cached_tokens == 0


def test_pages_that_are_given_away_lose_their_tags() -> None:
    pages = tagged_pages(num_blocks=8)
    table = begin(pages, PROMPT, KL["q3"])
    pages.loaded(table, 0, 96, "q3")
    pages.share(table, 96)
    pages.release(table)
    other = begin(pages, [5] * 120)
    compute(pages, other, 120)
    assert pages.worst_kl(other, 0, 120) == 0.0
    pages.check_integrity([other])


def test_pages_that_lack_layers_are_shared_behind_their_windows_only() -> None:
    pages = tagged_pages(windows=(None, 40))
    tokens = list(range(5 * CHUNK))
    table = begin(pages, tokens)
    pages.loaded(table, 0, CHUNK, "lossless")
    pages.loaded(table, CHUNK, 2 * CHUNK, "lossless", layers=(0,))  # seen until 2 * CHUNK + 38 in the other one
    pages.computed(table, 2 * CHUNK, 5 * CHUNK)
    pages.share(table, 5 * CHUNK)
    whole = [pages.is_whole(table, at * CHUNK, (at + 1) * CHUNK) for at in range(5)]
    assert whole == [True, False, True, True, True]
    cached = {}
    for length in range(CHUNK, 5 * CHUNK, 16):
        other = begin(pages, [*tokens[:length], 7])
        cached[length], _ = other.cached_tokens, pages.release(other)
    behind = 2 * CHUNK + 39
    assert cached == {length: length if length >= behind else CHUNK for length in cached}
    # Who had it whole takes its place, with what continues it.
    better = private(pages, 5 * CHUNK)
    better.chain, better.max_kl = pages.chain(tokens, ""), 0.0
    compute(pages, better, 3 * CHUNK)
    other = begin(pages, [*tokens[: 2 * CHUNK], 7])
    assert other.cached_tokens == 2 * CHUNK and pages.is_whole(other, 0, 2 * CHUNK)
    for held in (table, better, other):
        pages.release(held)
    pages.check_integrity([])


def test_who_has_less_of_what_is_there_whole_goes_on_with_that() -> None:
    pages = tagged_pages(windows=(40, 40))
    tokens = list(range(3 * CHUNK))
    whole, part = begin(pages, tokens), begin(pages, tokens)
    pages.loaded(part, 0, CHUNK, "q3", layers=())  # nobody sees it: no loss
    pages.computed(part, CHUNK, 3 * CHUNK)
    assert pages.worst_kl(part, 0, 3 * CHUNK) == 0.0
    compute(pages, whole, 3 * CHUNK)
    pages.share(part, 3 * CHUNK)
    assert part.blocks == whole.blocks and pages.is_whole(part, 0, 3 * CHUNK)
    for held in (whole, part):
        pages.release(held)
    pages.check_integrity([])


@pytest.mark.parametrize("seed", range(60))
def test_no_prefix_that_is_found_lacks_what_is_seen_behind_it(seed: int) -> None:
    rng = random.Random(seed)
    windows = tuple(rng.choice([None, 1, rng.randint(2, 40), rng.randint(2, 120)]) for _ in range(3))
    pages = tagged_pages(200, windows=windows)
    tokens = list(range(6 * CHUNK))
    layers_of: dict[int, set[int]] = {}  # by block
    for _ in range(8):
        length = rng.randint(1, 6 * CHUNK)
        table = begin(pages, [*tokens[:length], 1000 + rng.randrange(3)])
        start = table.cached_tokens
        for layer, window in enumerate(windows):  # what its first query sees of what was found
            first = 0 if window is None else max(0, start - window + 1)
            assert all(layer in layers_of[table.blocks[key // 16]] for key in range(first, start)), seed
        num_loaded = length // CHUNK * CHUNK
        for begins in range(start // CHUNK * CHUNK, num_loaded, CHUNK):
            ends = begins + CHUNK
            layers = set(layers_seen(windows, begins, ends, first_query=num_loaded))
            if rng.random() < 0.3:
                layers = set(range(3))
            for block in table.blocks[max(start, begins) // 16 : ends // 16]:
                layers_of[block] = layers
            named = None if len(layers) == 3 else tuple(sorted(layers))
            pages.loaded(table, max(start, begins), ends, "lossless", layers=named)
        begins = max(start, num_loaded)
        for block in table.blocks[begins // 16 :]:
            layers_of[block] = set(range(3))
        pages.computed(table, begins, length + 1)
        before = list(table.blocks)
        pages.share(table, length + 1)
        for mine, other in zip(before, table.blocks, strict=True):  # what it goes on with lacks no more
            assert mine == other or layers_of[mine] <= layers_of[other]
        pages.release(table)
        pages.check_integrity([])


def test_what_is_discarded_has_no_tag_and_what_is_computed_there_is_exact() -> None:
    pages = tagged_pages()
    table = begin(pages, list(range(2 * CHUNK)))
    pages.loaded(table, 0, CHUNK, "q3", layers=(1,))
    pages.discarded(table, 0, CHUNK)
    pages.computed(table, 0, CHUNK)
    assert pages.worst_kl(table, 0, CHUNK) == 0.0 and pages.is_whole(table, 0, CHUNK)
