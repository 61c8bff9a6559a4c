"""Prefixes shared in the pages of a decode worker: what is computed and what crosses the link, and that nobody gets the
tokens of another."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
from pair import LATEST_S, Gate, Pair, around, make_runtime, on_thread, running_pair, until

from decode.slo import SLOPolicy
from prefill.block_pool import BlockPool
from prefill.engine import Engine
from prefill.runtime import ModelRuntime
from prefill.store import ChunkStore

CHUNK = 32
BLOCK = 16
EXACT_ONLY = SLOPolicy(ttft_s=30.0, levels=("lossless",), floor="lossless", ceiling="lossless", allow_recompute=False)


def prompt(length: int, seed: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(3, 512) for _ in range(length)]


@pytest.fixture(scope="module")
def lasting() -> Iterator[Pair]:
    with running_pair(policy=EXACT_ONLY, chunk_tokens=CHUNK, num_blocks=512, prefix_caching=True) as running:
        yield running


@pytest.fixture
def pair(lasting: Pair) -> Iterator[Pair]:
    yield lasting
    lasting.check()


def computed(pair: Pair) -> float:
    return pair.decode.stats()["decode_computed_prompt_tokens_total"]


def test_a_prompt_that_is_there_is_not_loaded_again(pair: Pair) -> None:
    tokens = prompt(200, seed=1)
    first, receipt = pair.ask(tokens)
    assert receipt["cached_tokens"] == 0 and receipt["levels"] == {"lossless": 6}
    again, receipt = pair.ask(tokens)
    assert again == first == pair.reference(tokens, 8)
    assert receipt["cached_tokens"] == 192 and receipt["bytes"] == receipt["received_bytes"] == 0
    assert receipt["levels"] == {"cached": 6} and receipt["quality"]["at_end"] == 0.0
    assert receipt["plan"]["levels"] == ["text"] * 6, "exact KV is what computing it would give"
    assert sum(receipt["ttft_parts_ms"].values()) == pytest.approx(receipt["ttft_ms"], abs=0.01)


def test_ten_turns_compute_every_token_once(pair: Pair) -> None:
    tokens, before = prompt(70, seed=2), computed(pair)
    new_tokens = 0
    for turn in range(10):
        expected = pair.reference(tokens, 20)
        found, receipt = pair.ask(tokens, max_tokens=20, with_source=False)
        assert found == expected
        new_tokens += receipt["prompt_tokens"] - receipt["cached_tokens"]
        # The last block of the turn before may be half full, and the KV of its last token is nobody's.
        assert receipt["cached_tokens"] >= (len(tokens) - 20 - 13 - BLOCK if turn else 0)
        tokens = tokens + found + prompt(13, seed=100 + turn)
    assert computed(pair) - before == new_tokens < 70 + 9 * (13 + 1 + BLOCK)


def test_a_prefix_that_is_there_and_a_rest_that_is_loaded(pair: Pair) -> None:
    """The hit ends within a chunk: of that one, only what is missing is written."""
    front = prompt(3 * CHUNK + BLOCK + 3, seed=3)
    pair.ask(front, with_source=False)
    tokens = front[: 3 * CHUNK + BLOCK] + prompt(4 * CHUNK, seed=4)
    found, receipt = pair.ask(tokens, max_tokens=24)
    assert found == pair.reference(tokens, 24)
    assert receipt["cached_tokens"] == 3 * CHUNK + BLOCK
    assert receipt["levels"] == {"cached": 3, "lossless": 4}
    again, _ = pair.ask(front, with_source=False)
    assert again == pair.reference(front, 8), "what was loaded did not touch the shared pages"


def test_many_at_once_compute_their_prompt_once(pair: Pair) -> None:
    tokens, before = prompt(150, seed=5), computed(pair)
    bodies = [pair.body(tokens, request_id=f"at-once-{i}", with_source=False) for i in range(6)]
    answers = pair.ask_all(bodies)
    expected = pair.reference(tokens, 8)
    assert all(found == expected for found, _ in answers)
    assert computed(pair) - before <= 150 + 5 * BLOCK
    assert sorted(receipt["cached_tokens"] for _, receipt in answers) == [0, *[144] * 5]


def test_who_waits_for_a_prefix_goes_on_when_it_does_not_come(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = prompt(150, seed=6)
    gate = Gate(monkeypatch, Engine, "forward", on_thread("decode-engine"))
    leader = pair.begin(tokens, with_source=False)
    gate.wait()
    follower = pair.begin([*tokens, 5, 6, 7], with_source=False)
    until(lambda: pair.decode._scheduler.waiting())
    leader.leave()
    gate.open()
    assert follower.receipt()["cached_tokens"] < 150
    assert follower.tokens == pair.reference([*tokens, 5, 6, 7], 8)


def test_tenants_and_salts_share_nothing(pair: Pair) -> None:
    tokens = prompt(100, seed=7)
    for salt in ("", "one", "tenant\0one", "other\0one"):
        _, receipt = pair.ask(tokens, cache_salt=salt)
        assert receipt["cached_tokens"] == 0
    assert pair.ask(tokens, cache_salt="tenant\0one")[1]["cached_tokens"] == 96


def test_who_says_how_a_chunk_is_to_be_had_gets_it_so(pair: Pair) -> None:
    tokens = prompt(100, seed=8)
    pair.ask(tokens)
    for mode in ("q2", "text", "raw"):
        _, receipt = pair.ask(tokens, kv_mode=mode)
        assert receipt["levels"] == {mode: 3} and receipt["cached_tokens"] == 0
    _, receipt = pair.ask(tokens)
    assert receipt["cached_tokens"] == 96 and receipt["quality"]["at_end"] == 0.0, "and leaves nothing lossy behind"


def test_pages_are_forgotten_after_their_time_to_live() -> None:
    """One so short that it has passed when the next request comes; longer ones are in tests/unit."""

    def forgetful() -> ModelRuntime:
        runtime = make_runtime(num_blocks=64)
        runtime.allocator = BlockPool(64, ttl_s=1e-6)
        return runtime

    with around(forgetful, policy=EXACT_ONLY, chunk_tokens=CHUNK, prefix_caching=True) as pair:
        tokens = prompt(200, seed=8)
        for _ in range(2):
            found, receipt = pair.ask(tokens)
            assert receipt["cached_tokens"] == 0 and found == pair.reference(tokens, 8)
        until(lambda: pair.decode.stats()["kv_blocks_cached"] == 0)
        pair.check()


def test_a_pool_that_is_too_small_for_all_prefixes_forgets_the_oldest(pair: Pair) -> None:
    prompts = [prompt(700, seed=20 + i) for i in range(14)]  # 44 blocks each, of 512
    expected = [pair.reference(tokens, 4) for tokens in prompts]
    for _ in range(2):
        for tokens, reference in zip(prompts, expected):
            assert pair.ask(tokens, max_tokens=4, with_source=False)[0] == reference
    assert pair.ask(prompts[-1], max_tokens=4, with_source=False)[1]["cached_tokens"] == 688


# -- what a decode worker computed, in its store ------------------------------------------------------------------


@pytest.fixture(scope="module")
def keeping() -> Iterator[Pair]:
    """A decode worker that forgets its pages, and keeps chunks."""
    store = ChunkStore(64 << 20)
    with running_pair(policy=EXACT_ONLY, chunk_tokens=CHUNK, num_blocks=512, store=store) as running:
        yield running


def test_what_was_computed_is_loaded_from_the_own_store(keeping: Pair) -> None:
    tokens = prompt(200, seed=9)
    decode = keeping.decode
    found, _ = keeping.ask(tokens, max_tokens=70, with_source=False)
    assert decode.source is not None and decode.source.wait_until_idle(LATEST_S)
    before = computed(keeping)
    longer = tokens + found + prompt(9, seed=10)
    again, receipt = keeping.ask(longer, max_tokens=30, with_source=False)
    assert again == keeping.reference(longer, 30)
    assert receipt["levels"] == {"lossless": 8} and receipt["sources"] == ["decode-0"]
    assert computed(keeping) - before == len(longer) - 8 * CHUNK
    keeping.check()
    decode.source.check_integrity()
