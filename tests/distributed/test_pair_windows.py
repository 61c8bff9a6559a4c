"""Models with sliding windows between two workers: only what a window still sees is sent, the tokens stay the same."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from model_families import tiny_model
from pair import Gate, Pair, around, on_thread, until

from codec.profile import default_profile
from decode.slo import SLOPolicy
from prefill.block_pool import BlockPool
from prefill.chunk_levels import ChunkLevels
from prefill.chunks import split_part
from prefill.engine import Engine
from prefill.kv_pool import KVPool
from prefill.model import wrap_model
from prefill.runtime import BLOCK_TOKENS, ModelRuntime
from prefill.store import ChunkStore
from transport.shaper import Shaper

CHUNK, WINDOW, NUM_CHUNKS = 32, 40, 24
NUM_WHOLE = 2  # the tail's first query sees 39 tokens before it
LAYER_BYTES = CHUNK * 2 * 2 * 16 * 4  # keys and values of two heads of 16, float32
BLOB_BYTES = 68  # header and checksum
FAMILIES = ("gemma3", "mistral")
LAYERS_LEFT = {"gemma3": 2, "mistral": 0}  # of four, those without a window


def window_runtime(family: str) -> ModelRuntime:
    model = wrap_model(tiny_model(family), None, name=family, fingerprint=family)
    pool = KVPool(model.layout, 128, BLOCK_TOKENS)
    # What a page held before must never reach anybody.
    pool.k.fill_(torch.nan)
    pool.v.fill_(torch.nan)
    return ModelRuntime(
        model=model,
        profile=default_profile(model.layout, fingerprint=model.fingerprint),
        pool=pool,
        allocator=BlockPool(128),
        engine=Engine(model, pool),
    )


def window_pair(family: str, **options: Any) -> AbstractContextManager[Pair]:
    return around(lambda: window_runtime(family), chunk_tokens=CHUNK, **options)


@pytest.fixture(scope="module", params=FAMILIES)
def lasting(request: pytest.FixtureRequest) -> Iterator[tuple[str, Pair]]:
    with window_pair(request.param) as running:
        yield request.param, running


@pytest.fixture
def pair(lasting: tuple[str, Pair]) -> Iterator[Pair]:
    _, running = lasting
    yield running
    running.check()
    assert running.decode.is_alive and running.prefill.is_alive


@pytest.fixture
def layers_left(lasting: tuple[str, Pair]) -> int:
    return LAYERS_LEFT[lasting[0]]


def prompt(seed: int, length: int = NUM_CHUNKS * CHUNK + 7) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(3, 256) for _ in range(length)]


def layers_of(receipt: dict[str, Any]) -> list[int | None]:
    return [chunk["layers"] for chunk in receipt["chunks"]]


@pytest.mark.parametrize("mode", ["raw", "lossless"])
def test_the_tokens_of_the_engine_alone_with_the_bytes_that_windows_leave(
    pair: Pair, layers_left: int, mode: str
) -> None:
    tokens = prompt(1)
    found, receipt = pair.ask(tokens, kv_mode=mode)
    assert found == pair.reference(tokens, 8)
    assert layers_of(receipt) == [layers_left] * (NUM_CHUNKS - NUM_WHOLE) + [None] * NUM_WHOLE
    assert receipt["chunks_in_part"] == NUM_CHUNKS - NUM_WHOLE
    in_part = layers_left * (LAYER_BYTES + BLOB_BYTES)  # one layer a blob: no two are neighbours
    whole = 4 * LAYER_BYTES + BLOB_BYTES
    expected = in_part * (NUM_CHUNKS - NUM_WHOLE) + whole * NUM_WHOLE
    if mode == "raw":
        assert receipt["bytes"] == receipt["received_bytes"] == expected
    else:
        assert 0.5 * expected < receipt["received_bytes"] < expected


def test_a_stored_context_is_loaded_from_the_back_in_the_layers_that_count(pair: Pair, layers_left: int) -> None:
    tokens = prompt(2)
    for _ in range(2):  # computed for the first, stored for the second
        found, receipt = pair.ask(tokens, kv_mode="lossless", max_tokens=4)
        assert found == pair.reference(tokens, 4)
        assert layers_of(receipt).count(layers_left) == NUM_CHUNKS - NUM_WHOLE


def test_chunks_that_the_plan_computes_need_all_that_they_see(pair: Pair, layers_left: int) -> None:
    tokens = prompt(3)
    levels = ["lossless"] * 10 + ["text"] * 2 + ["raw"] * 12
    plan = {"chunk_tokens": CHUNK, "levels": levels}
    found, receipt = pair.ask(tokens, plan=plan)
    assert found == pair.reference(tokens, 8)
    assert receipt["plan"]["levels"] == levels
    left = layers_left
    assert layers_of(receipt) == [left] * 8 + [None] * 2 + [None, None] + [left] * 10 + [None] * 2


def store(pair: Pair, tokens: list[int]) -> None:
    pair.ask(tokens, kv_mode="raw", max_tokens=1)
    assert pair.prefill.wait_until_idle(10)


def num_filled(pair: Pair) -> int:
    return sum(
        log.filled_at is not None and log.layers != ()
        for state in pair.decode._requests.values()
        if state.fill is not None
        for log in state.fill.machine.chunks
    )


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("is_stored", [True, False])
def test_a_link_that_dies_leaves_the_text(family: str, is_stored: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("fill", "fill_sources"):
        monkeypatch.setattr(f"decode.{module}.OPEN_TIMEOUT_S", 1.0)
    policy = SLOPolicy(ttft_s=20.0, levels=("raw",), floor="raw", link_prior_bps=1e7)
    with window_pair(family, policy=policy) as pair:
        tokens = prompt(4)
        if is_stored:
            store(pair, tokens)
        with Shaper(pair.prefill.endpoint, rate_mbps=0.6) as link:
            asking = pair.begin(tokens, endpoints=[link.endpoint])
            until(lambda: num_filled(pair) >= 1)
            link.cut(60)
            receipt = asking.receipt()
        assert asking.tokens == pair.reference(tokens, 8)
        assert receipt["recomputed_chunks"] >= 1
        pair.check()


@pytest.mark.parametrize("family", FAMILIES)
def test_prefixes_are_found_where_nothing_that_is_seen_is_missing(family: str) -> None:
    """What follows a request whose pages lack layers: the same prompt, one that branches off early, the next turn."""
    with window_pair(family, prefix_caching=True, store=ChunkStore(64 << 20)) as pair:
        first = prompt(5)
        answer, receipt = pair.ask(first, max_tokens=70)
        assert answer == pair.reference(first, 70) and receipt["chunks_in_part"] > 0
        assert pair.decode.source is not None and pair.decode.source.wait_until_idle(10)
        early, turn = first[:300] + prompt(6, 200), first + answer
        for tokens, cached in ((first, len(first)), (early, 0), (turn + prompt(7, 90), len(turn))):
            found, receipt = pair.ask(tokens, max_tokens=20)
            assert found == pair.reference(tokens, 20)
            # The last token is computed in any case, and that of an answer is never written.
            assert receipt["cached_tokens"] == max(0, cached - 1) // BLOCK_TOKENS * BLOCK_TOKENS
        # Computed alone, it is whole, and then it is shared.
        text = prompt(8)
        for cached in (0, len(text) // BLOCK_TOKENS * BLOCK_TOKENS):
            found, receipt = pair.ask(text, with_source=False)
            assert found == pair.reference(text, 8) and receipt["cached_tokens"] == cached
        longer = text + prompt(9, 400)  # a shared front, and a rest that is loaded
        store_of = pair.ask(longer, kv_mode="raw", max_tokens=1)
        assert store_of[1]["cached_tokens"] == 0
        found, receipt = pair.ask(longer)
        assert found == pair.reference(longer, 8) and receipt["cached_tokens"] == cached
        pair.check()


@pytest.mark.parametrize("family", FAMILIES)
def test_who_gives_way_and_comes_back_goes_on_as_before(family: str) -> None:
    """The pages of both do not fit at their ends. Chunks that lack layers are not in the worker's own store."""
    with window_pair(family, prefix_caching=True, store=ChunkStore(64 << 20)) as pair:
        prompts = [prompt(seed) for seed in (20, 21)]
        answers = pair.ask_all([pair.body(tokens, max_tokens=350) for tokens in prompts])
        for tokens, (found, receipt) in zip(prompts, answers, strict=True):
            assert found == pair.reference(tokens, 350)
            assert receipt["chunks_in_part"] > 0
        assert sum(receipt["preemptions"] for _, receipt in answers) > 0
        pair.check()


@pytest.mark.parametrize("family", FAMILIES)
def test_refinements_are_of_the_layers_that_were_sent(family: str) -> None:
    coarse_first = SLOPolicy(ttft_s=30.0, ceiling="q3", floor="q3", refine_to="q1", allow_recompute=False)
    with window_pair(family, policy=coarse_first) as pair:
        tokens = prompt(10)
        asking = pair.begin(tokens, max_tokens=400)
        receipt = asking.receipt()
        steps = [step for chunk in receipt["chunks"] for step in chunk["refinements"]]
        left = NUM_CHUNKS if LAYERS_LEFT[family] else NUM_WHOLE
        assert 1 <= len(steps) <= left and receipt["refined_bytes"] > 0
        assert receipt["bytes"] + receipt["refined_bytes"] <= receipt["received_bytes"]
        again, _ = pair.ask(tokens, max_tokens=400, plan=receipt["plan"])
        assert again == asking.tokens
        pair.check()


@pytest.mark.parametrize("wrong", ["/3", "/1", "", "?"])
def test_a_source_that_sends_other_layers_than_asked_is_found_out(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Too many, too few, all of them, and no blob: the prompt is computed."""
    original = ChunkLevels.blob

    def other(self: ChunkLevels, key: bytes, name: str, **options: Any) -> bytes | None:
        level, layers = split_part(name)
        if layers is None:
            return original(self, key, name, **options)
        return b"?" * 200 if wrong == "?" else original(self, key, level + wrong, **options)

    monkeypatch.setattr(ChunkLevels, "blob", other)
    policy = SLOPolicy(ttft_s=20.0, levels=("raw",), floor="raw", link_prior_bps=1e10)
    with window_pair("gemma3", policy=policy) as pair:
        tokens = prompt(13)
        found, receipt = pair.ask(tokens)
        assert found == pair.reference(tokens, 8)
        assert receipt["recomputed_chunks"] and any("bad blob" in reason["what"] for reason in receipt["reasons"])
        pair.check()


@pytest.mark.parametrize("phase", ["arriving", "decoding"])
def test_cancelling_leaves_nothing_behind(pair: Pair, phase: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = prompt(11 + (phase == "decoding"))
    store(pair, tokens)
    if phase == "decoding":
        gate = Gate(monkeypatch, ModelRuntime, "_decode_runs", on_thread("kv-decode"))
        asking = pair.begin(tokens, kv_mode="raw")
        gate.wait()
        asking.leave()
        gate.open()
    else:
        with Shaper(pair.prefill.endpoint, rate_mbps=0.6) as link:
            asking = pair.begin(tokens, kv_mode="raw", endpoints=[link.endpoint])
            until(lambda: num_filled(pair) >= 1)
            asking.leave()
    until(lambda: not pair.decode._requests)
    found, _ = pair.ask(tokens, kv_mode="raw")
    assert found == pair.reference(tokens, 8)
