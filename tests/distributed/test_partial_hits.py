"""Prompts that leave what a decode worker has stored in the middle of a chunk: the same tokens as the engine alone, and
computed is only what is new."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from pair import LATEST_S, Gate, Pair, on_thread, running_pair, until

from decode import stored_front
from decode.slo import SLOPolicy
from prefill.store import ChunkStore, DiskOptions

CHUNK, BLOCK = 128, 16
EXACT_ONLY = SLOPolicy(ttft_s=0.0, levels=("lossless",), floor="lossless", ceiling="lossless")


def prompt(length: int, seed: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(3, 512) for _ in range(length)]


@contextmanager
def keeping(store: ChunkStore, **options: Any) -> Iterator[Pair]:
    """A decode worker that forgets its pages, and keeps what it can."""
    with running_pair(policy=EXACT_ONLY, chunk_tokens=CHUNK, store=store, **{"num_blocks": 512} | options) as running:
        yield running
        settle(running)
        running.check()
        assert running.decode.source is not None
        running.decode.source.check_integrity()


@pytest.fixture
def pair() -> Iterator[Pair]:
    with keeping(ChunkStore(64 << 20)) as running:
        yield running


def settle(pair: Pair) -> None:
    assert pair.decode.source is not None and pair.decode.source.wait_until_idle(LATEST_S)


def ask(pair: Pair, tokens: list[int], *, max_tokens: int = 8, **options: Any) -> dict[str, Any]:
    """The receipt of a request that got the right tokens, all that it left behind being stored."""
    found, receipt = pair.ask(tokens, max_tokens=max_tokens, with_source=False, **options)
    assert found == pair.reference(tokens, max_tokens)
    assert sum(receipt["ttft_parts_ms"].values()) == pytest.approx(receipt["ttft_ms"], abs=0.01)
    settle(pair)
    return receipt


def computed_by(pair: Pair, tokens: list[int], **options: Any) -> tuple[int, dict[str, Any]]:
    """How many prompt tokens a request computed that was not loaded in whole chunks, and its receipt."""
    before = pair.decode.stats()["decode_computed_prompt_tokens_total"]
    receipt = ask(pair, tokens, **options)
    computed = int(pair.decode.stats()["decode_computed_prompt_tokens_total"] - before)
    # A worker alone may compute a chunk from the front that it could have loaded, where that is faster.
    return computed - CHUNK * receipt["recomputed_chunks"], receipt


def test_a_document_with_another_question_computes_the_question(pair: Pair) -> None:
    document = prompt(2 * CHUNK + 75, seed=1)
    ask(pair, document + prompt(10, seed=2))
    before = pair.decode.stats()["decode_partial_prompt_tokens_total"]
    computed, receipt = computed_by(pair, document + prompt(13, seed=3))
    assert receipt["partial_tokens"] == 64 and receipt["tail_tokens"] == computed == 11 + 13
    assert pair.decode.stats()["decode_partial_prompt_tokens_total"] - before == 64
    assert receipt["quality"]["generated_on"] == 0.0 and receipt["plan"] is not None


def test_a_whole_chunk_that_goes_on_otherwise_serves_too(pair: Pair) -> None:
    document = prompt(CHUNK + 70, seed=4)
    ask(pair, document + prompt(100, seed=5))
    computed, receipt = computed_by(pair, document + prompt(9, seed=6))
    assert receipt["partial_tokens"] == 64 and computed == 6 + 9


def test_a_front_within_a_chunk_that_has_to_be_computed(pair: Pair) -> None:
    """The new question is so long that the prompt has chunks more than what it shares."""
    document = prompt(CHUNK + 70, seed=7)
    ask(pair, document + prompt(9, seed=8))
    before = pair.decode.stats()["decode_computed_prompt_tokens_total"]
    receipt = ask(pair, document + prompt(2 * CHUNK, seed=9))
    assert receipt["partial_tokens"] == 64
    computed = pair.decode.stats()["decode_computed_prompt_tokens_total"] - before
    # Chunk 1 is computed for its last 64 tokens, chunk 2 as a whole; chunk 0 is loaded, or faster to compute.
    assert computed == 3 * CHUNK + 70 - 64 - CHUNK * (receipt["levels"].get("lossless", 0))
    again = ask(pair, document + prompt(2 * CHUNK, seed=9))
    assert again["partial_tokens"] == 64 and again["tail_tokens"] == 6, "what was computed on it is stored as well"


def test_prompts_shorter_than_a_chunk(pair: Pair) -> None:
    tokens = prompt(90, seed=10)
    assert ask(pair, tokens)["partial_tokens"] == 0
    computed, receipt = computed_by(pair, tokens[:70] + prompt(7, seed=11))
    assert receipt["partial_tokens"] == 64 and computed == 13
    computed, receipt = computed_by(pair, tokens[:60] + prompt(7, seed=12))
    assert receipt["partial_tokens"] == 48 and computed == 19
    computed, receipt = computed_by(pair, tokens[:30] + prompt(7, seed=13))
    assert receipt["partial_tokens"] == 0 and computed == 37, "16 tokens are not worth an entry's decoding"
    computed, receipt = computed_by(pair, tokens[:64])
    assert receipt["partial_tokens"] == 48 and computed == 16, "the last token is always computed"


def test_turns_of_a_conversation_keep_one_tail(pair: Pair) -> None:
    tokens = prompt(150, seed=14)
    for turn in range(5):
        found, receipt = pair.ask(tokens, max_tokens=12, with_source=False)
        assert found == pair.reference(tokens, 12)
        settle(pair)
        new = 12 + 7 + 1 + BLOCK if turn else 150
        assert receipt["prompt_tokens"] - receipt["partial_tokens"] - CHUNK * (len(receipt["chunks"])) <= new
        tokens = tokens + found + prompt(7, seed=100 + turn)
    assert pair.decode.source is not None
    stats = pair.decode.source.store.stats()
    assert (stats.num_chunks, stats.num_tails) == (len(tokens) // CHUNK, 1)
    keys = {key for key, _ in pair.decode.index_changes(None)["added"]}
    assert len(keys) == stats.num_chunks, "no other worker hears of tails"


def test_nobody_takes_the_front_of_another_tenant_or_of_a_request_that_shares_nothing(pair: Pair) -> None:
    tokens = prompt(100, seed=15)
    ask(pair, tokens, cache_salt="one\0")
    assert ask(pair, tokens, cache_salt="two\0")["partial_tokens"] == 0
    assert ask(pair, tokens)["partial_tokens"] == 0
    assert ask(pair, tokens, kv_mode="text")["partial_tokens"] == 0
    assert ask(pair, tokens, cache_salt="one\0")["partial_tokens"] == 96
    explicit = prompt(100, seed=16)
    ask(pair, explicit, kv_mode="text")
    assert ask(pair, explicit)["partial_tokens"] == 0, "and leaves nothing behind"


def test_with_pages_that_are_shared_too() -> None:
    """A front counts for what is not in the pages."""
    with keeping(ChunkStore(64 << 20), prefix_caching=True) as pair:
        tokens = prompt(2 * CHUNK + 100, seed=17)
        ask(pair, tokens)
        with pair.decode._lock:
            pair.decode._pages.forget_cached()
        ask(pair, tokens[: CHUNK + 20] + prompt(5, seed=18))  # brings a chunk back, and computes some more
        receipt = ask(pair, tokens[:-1])
        assert receipt["cached_tokens"] == CHUNK + BLOCK and receipt["partial_tokens"] == 96
        assert ask(pair, tokens)["cached_tokens"] == 2 * CHUNK + 96


def test_what_was_preempted_comes_back_from_its_tail() -> None:
    prompts = [prompt(190 + 4 * i, seed=20 + i) for i in range(4)]
    with keeping(ChunkStore(64 << 20), num_blocks=64) as pair:
        expected = [pair.reference(tokens, 150) for tokens in prompts]
        bodies = [
            pair.body(tokens, max_tokens=150, with_source=False, request_id=f"r{i}") for i, tokens in enumerate(prompts)
        ]
        answers = pair.ask_all(bodies)
        assert [found for found, _ in answers] == expected
        assert sum(receipt["preemptions"] for _, receipt in answers) > 0, "they were not to fit"


# -- on disk ------------------------------------------------------------------------------------------------------


def on_disk(path: Path) -> ChunkStore:
    return ChunkStore(64 << 20, disk=DiskOptions(path=path, capacity_bytes=64 << 20, namespace="partial hits"))


def test_a_restart_loses_no_front(tmp_path: Path) -> None:
    document = prompt(2 * CHUNK + 75, seed=30)
    store = on_disk(tmp_path)
    with keeping(store) as pair:
        ask(pair, document + prompt(10, seed=31))
    assert store.close()
    store = on_disk(tmp_path)
    with keeping(store) as pair:
        computed, receipt = computed_by(pair, document + prompt(13, seed=32))
        assert receipt["partial_tokens"] == 64 and computed == 11 + 13
        assert store.stats().num_disk_hits > 0
    store.close()


@pytest.mark.parametrize("where", ["disk", "RAM"])
def test_a_damaged_entry_is_dropped_and_its_tokens_computed(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    document = prompt(CHUNK + 75, seed=33)
    store = on_disk(tmp_path)
    with keeping(store) as pair:
        ask(pair, document + prompt(10, seed=34))
    assert store.close()
    store = on_disk(tmp_path)
    with keeping(store) as pair:
        read, broken = store._disk.read if where == "disk" else store.get, []  # type: ignore[union-attr]

        def damaged(key: bytes, level: str) -> bytes | None:
            blob = read(key, level)
            if broken or blob is None or int.from_bytes(key[-2:], "little") == CHUNK:
                return blob
            broken.append(key)
            return None if where == "disk" else blob[:-1]

        monkeypatch.setattr(*((store._disk, "read") if where == "disk" else (store, "get")), damaged)
        computed, receipt = computed_by(pair, document + prompt(13, seed=35))
        assert broken and receipt["partial_tokens"] == 0 and computed == 75 + 13
        assert any("part of a stored chunk" in reason["what"] for reason in receipt["reasons"])
        assert store.kl(broken[0]) is None, "it is dropped"
        computed, receipt = computed_by(pair, document + prompt(13, seed=36))
        assert receipt["partial_tokens"] == 64 and computed == 11 + 13, "and the next one has what this one computed"
    store.close()


def test_a_request_that_leaves_while_its_front_is_read(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = prompt(100, seed=37)
    ask(pair, tokens)
    gate = Gate(monkeypatch, stored_front.StoredFront, "into_pages", on_thread("kv-decode"))
    asking = pair.begin(tokens + [7], with_source=False)
    gate.wait()
    asking.leave()
    until(lambda: not pair.decode._requests)
    assert pair.decode.stats()["kv_cache_usage_perc"] > 0, "the pages are still written to"
    gate.open()
    until(lambda: pair.decode.stats()["kv_cache_usage_perc"] == 0)
    assert ask(pair, tokens + [8])["partial_tokens"] == 96


def test_an_entry_that_is_evicted_in_between_is_computed(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = prompt(100, seed=38)
    ask(pair, tokens)
    assert pair.decode.source is not None
    store = pair.decode.source.store
    gate = Gate(monkeypatch, stored_front.StoredFront, "into_pages", on_thread("kv-decode"))
    asking = pair.begin(tokens + [7], with_source=False)
    gate.wait()
    front = store.longest_front(pair.decode._pages.chain(tokens, "").links(0, 96), 0.0)
    assert front is not None
    store.drop(front.key)
    gate.open()
    assert asking.receipt()["partial_tokens"] == 0
    assert asking.tokens == pair.reference([*tokens, 7], 8)
