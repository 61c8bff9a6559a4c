"""Decode workers with quantized pages: every answer is what an engine alone gives over such pages, however its KV came
and whoever shares the pool, and nothing is left behind."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import AbstractContextManager
from functools import partial

import pytest
import torch
from pair import Asking, Gate, Pair, around, make_runtime, on_thread, until

from decode.page_rings import PageRings
from decode.slo import SLOPolicy
from prefill.engine import Engine, SequenceSlice, prefill
from prefill.quantized_pool import QuantizedKVPool
from prefill.runtime import ModelRuntime
from prefill.store import ChunkStore

CHUNK = 64
KINDS = ("int8", "int4")
PAGE_KL = 0.001
PROMISES = {"q1": 0.0005, "q2": 0.03, "q3": 0.1}
EXACT_ONLY = SLOPolicy(ttft_s=30.0, levels=("lossless",), floor="lossless", ceiling="lossless")
SHARING = SLOPolicy(ttft_s=30.0, levels=("lossless", "q1", "q2"), floor="q2", refine_to=None)


def prompt(length: int, seed: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(3, 512) for _ in range(length)]


def has_drawn(asking: Asking, num_tokens: int) -> bool:
    return len(asking.tokens) >= num_tokens or asking.end is not None


class Reference:
    """The engine alone over a pool of its own: chunk after chunk, as `levels` says of each, in one ring."""

    def __init__(self, kind: str) -> None:
        self.exact = make_runtime(num_blocks=256)
        self.quantized = make_runtime(num_blocks=128, pages=kind)

    def answer(self, tokens: list[int], levels: list[str], num_new: int, *, cached_tokens: int = 0) -> list[int]:
        """cached_tokens: computed by another ring before, and found in the pages."""
        k, v = self._exact_kv(tokens)
        runtime = self.quantized
        pool, table = runtime.pool, runtime.allocator.allocate(-(-(len(tokens) + num_new) // 32))
        assert isinstance(pool, QuantizedKVPool)
        ring = pool.begin_sequence()
        if cached_tokens:
            prefill(runtime.engine, tokens[:cached_tokens], table, ring=ring)
            pool.continue_at(table, ring, cached_tokens)
            pool.settle(table, ring)
            pool.rings.reset(ring)
            pool.resume(table, ring, cached_tokens)
        at = cached_tokens
        for chunk, level in enumerate(levels):
            if level == "lossless":
                start, stop = chunk * CHUNK, (chunk + 1) * CHUNK
                assert start >= at
                pool.write(table, ring, start, k[:, start:stop], v[:, start:stop])
            elif (chunk + 1) * CHUNK > at:
                start, stop = max(at, chunk * CHUNK), (chunk + 1) * CHUNK
                item = SequenceSlice(token_ids=tokens[start:stop], start=start, block_table=table, ring=ring)
                runtime.engine.forward([item])
            at = max(at, (chunk + 1) * CHUNK)
        found: list[int] = []
        logits = prefill(runtime.engine, tokens, table, start=at, ring=ring)
        while True:
            found.append(int(logits.argmax()))
            if len(found) == num_new:
                break
            row = SequenceSlice(
                token_ids=found[-1:],
                start=len(tokens) + len(found) - 1,
                block_table=table,
                ring=ring,
                need_logits=True,
            )
            logits = runtime.engine.forward([row])[0]
        runtime.allocator.release(table)
        pool.end_sequence(ring)
        return found

    def _exact_kv(self, tokens: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        runtime = self.exact
        table = runtime.allocator.allocate(-(-len(tokens) // 16))
        prefill(runtime.engine, tokens, table)
        kv = runtime.exact_pool.read(table, 0, len(tokens))
        runtime.allocator.release(table)
        return kv


def quantized_pair(
    kind: str, *, num_blocks: int = 256, num_rings: int = 16, **options: object
) -> AbstractContextManager[Pair]:
    def runtime() -> ModelRuntime:
        return make_runtime(num_blocks=num_blocks, pages=kind, num_rings=num_rings, page_kl=PAGE_KL, promises=PROMISES)

    given = {"policy": EXACT_ONLY, "chunk_tokens": CHUNK, **options}
    return around(runtime, prefill_runtime=lambda: make_runtime(promises=PROMISES), **given)


def check_empty(pair: Pair) -> None:
    pair.check()
    pool = pair.decode._runtime.pool
    assert isinstance(pool, QuantizedKVPool)
    assert pool.rings.num_free == pool.rings.num_rings, "a ring was left behind"
    assert pair.decode._pages._rings is not None and pair.decode._pages._rings._saved_bytes == 0


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def reference(kind: str) -> Reference:
    return Reference(kind)


@pytest.fixture(scope="module")
def lasting(kind: str) -> Iterator[Pair]:
    with quantized_pair(kind) as running:
        yield running


@pytest.fixture
def pair(lasting: Pair) -> Iterator[Pair]:
    yield lasting
    check_empty(lasting)


# -- how KV comes -------------------------------------------------------------------------------------------------


def test_many_at_once_live_and_alone(pair: Pair, reference: Reference, kind: str) -> None:
    """Live prefill beside prompts that are computed here; some too short for a chunk, or for a block."""
    lengths = (7, 31, 65, 130, 193, 260, 330, 471)
    prompts = [prompt(length, seed=length) for length in lengths]
    bodies = [
        pair.body(tokens, request_id=f"m{i}", max_tokens=70, with_source=i % 2 == 1) for i, tokens in enumerate(prompts)
    ]
    for tokens, (answer, receipt) in zip(prompts, pair.ask_all(bodies), strict=True):
        assert answer == reference.answer(tokens, receipt["plan"]["levels"], 70)
        assert receipt["kv_cache_dtype"] == kind
        if len(tokens) > CHUNK:
            assert receipt["quality"]["at_end"] == PAGE_KL, "pages are not exact, whatever came"


@pytest.mark.parametrize("seed", range(6))
def test_any_mixture_of_loading_and_computing(pair: Pair, reference: Reference, seed: int) -> None:
    """Chunks come in any order while others are computed before and behind them."""
    rng = random.Random(seed)
    tokens = prompt(8 * CHUNK + rng.randrange(1, CHUNK + 1), seed=50 + seed)
    levels = [rng.choice(["text", "lossless"]) for _ in range(8)]
    plan = {"chunk_tokens": CHUNK, "levels": levels}
    answer, receipt = pair.ask(tokens, plan=plan, max_tokens=40)
    assert receipt["plan"]["levels"] == levels
    assert answer == reference.answer(tokens, levels, 40)


def test_a_refined_chunk_is_what_it_would_have_been(pair: Pair) -> None:
    """Before its first token, and long after: then the pages are those of the better level."""
    tokens = prompt(5 * CHUNK + 3, seed=70)
    lossy = {"chunk_tokens": CHUNK, "levels": ["q2"] * 5}
    steps = [{"chunk": chunk, "level": "raw", "after_tokens": 1 + 20 * chunk} for chunk in range(5)]
    late = {**lossy, "refinements": steps}
    policy, pair.decode._policy = pair.decode._policy, SHARING
    try:
        first, receipt = pair.ask(tokens, plan=late, max_tokens=120)
        again, other = pair.ask(tokens, plan=late, max_tokens=120)
    finally:
        pair.decode._policy = policy
    assert first == again, "the same KV at the same tokens"
    assert receipt["levels_at_end"] == other["levels_at_end"] == {"raw": 5}
    assert receipt["quality"] == {
        "at_first_token": PROMISES["q2"],
        "at_end": PAGE_KL,
        "generated_on": PROMISES["q2"],
    }


def test_what_is_refined_stands_in_pages_and_ring(kind: str, reference: Reference) -> None:
    """After the last refinement the pages hold what loading the better level from the start puts there."""
    tokens = prompt(4 * CHUNK + 3, seed=71)
    steps = [{"chunk": chunk, "level": "raw", "after_tokens": 2} for chunk in range(4)]
    plan = {"chunk_tokens": CHUNK, "levels": ["q2"] * 4, "refinements": steps}
    with quantized_pair(kind, policy=SHARING) as pair:
        asking = pair.begin(tokens, plan=plan, max_tokens=3000)
        until(lambda: len(asking.tokens) > 2 * 64)  # all of the prompt has left the ring
        with pair.decode._lock:
            (sequence,) = pair.decode._scheduler.all()
            ours = pair.decode._runtime.read_pages(sequence.block_table, None, 0, 4 * CHUNK)
        asking.leave()
        held = reference.quantized
        assert isinstance(held.pool, QuantizedKVPool)
        k, v = reference._exact_kv(tokens)
        table = held.allocator.allocate(12)
        held.pool.write(table, None, 0, k[:, : 4 * CHUNK], v[:, : 4 * CHUNK])
        theirs = held.pool.read(table, None, 0, 4 * CHUNK)
        held.allocator.release(table)
        assert all(map(torch.equal, ours, theirs))
        check_empty(pair)


# -- prefixes that are shared -------------------------------------------------------------------------------------


@pytest.fixture
def sharing(kind: str) -> Iterator[Pair]:
    with quantized_pair(kind, policy=SHARING, prefix_caching=True, store=ChunkStore(64 << 20)) as running:
        yield running
        check_empty(running)


def test_a_hit_goes_on_from_the_pages(sharing: Pair, reference: Reference) -> None:
    tokens = prompt(200, seed=80)
    first, receipt = sharing.ask(tokens, max_tokens=40, with_source=False)
    assert receipt["cached_tokens"] == 0 and first == reference.answer(tokens, ["text"] * 3, 40)
    again, receipt = sharing.ask(tokens, max_tokens=40, with_source=False)
    assert receipt["cached_tokens"] == 192 and receipt["levels"] == {"cached": 3}
    assert again == reference.answer(tokens, ["text"] * 3, 40, cached_tokens=192)
    assert receipt["plan"] is None, "no plan gives this KV again"
    assert receipt["quality"]["at_first_token"] == PAGE_KL
    bodies = [sharing.body(tokens, request_id=f"h{i}", max_tokens=40, with_source=False) for i in range(5)]
    assert [found for found, _ in sharing.ask_all(bodies)] == [again] * 5


def test_what_others_load_or_compute_now_is_waited_for(sharing: Pair) -> None:
    tokens = prompt(400, seed=81)
    before = sharing.decode.stats()["decode_computed_prompt_tokens_total"]
    bodies = [sharing.body(tokens, request_id=f"w{i}", with_source=False) for i in range(6)]
    answers = sharing.ask_all(bodies)
    cached = sorted(receipt["cached_tokens"] for _, receipt in answers)
    assert cached[0] == 0 and min(cached[1:]) >= 400 - 64 - 32, "but for what is in the ring of the first"
    assert sharing.decode.stats()["decode_computed_prompt_tokens_total"] - before <= 400 + 5 * 96


def test_a_floor_that_pages_do_not_keep_shares_none(sharing: Pair, reference: Reference) -> None:
    tokens = prompt(200, seed=82)
    sharing.ask(tokens, with_source=False)
    answer, receipt = sharing.ask(tokens, max_tokens=40, with_source=False, floor="q1")
    assert receipt["cached_tokens"] == 0 and receipt["levels"] == {"text": 3}
    assert answer == reference.answer(tokens, ["text"] * 3, 40)
    bodies = [sharing.body(prompt(200, seed=83), request_id=f"s{i}", with_source=False, floor="q1") for i in range(3)]
    assert [receipt["cached_tokens"] for _, receipt in sharing.ask_all(bodies)] == [0] * 3


def test_who_wants_no_loss_is_refused(sharing: Pair) -> None:
    for options in ({"floor": "lossless"}, {"floor": "raw"}, {"kv_mode": "raw"}, {"kv_mode": "lossless"}):
        _, event = sharing.ask(prompt(100, seed=84), **options)
        refused = event["refused"]
        assert (refused["status"], refused["code"]) == (400, "kv_pages_quantized"), event
        assert "kv_cache_dtype" in refused["message"]


def test_what_is_kept_says_what_pages_lost(sharing: Pair) -> None:
    """Chunks read from quantized pages are not exact, and only good for those who take such."""
    tokens = prompt(300, seed=85)
    sharing.ask(tokens, with_source=False)
    source = sharing.decode.source
    assert source is not None and source.wait_until_idle(20)
    with sharing.decode._lock:
        keys = sharing.decode._pages.chain(tokens, "").chunks(CHUNK, 4)
        sharing.decode._pages.forget_cached()
    assert [source.store.kl(key) for key in keys] == [PAGE_KL] * 4
    _, receipt = sharing.ask(tokens, with_source=False, floor="q1")
    assert receipt["sources"] == [] or receipt["levels"] == {"text": 4}
    with sharing.decode._lock:
        sharing.decode._pages.forget_cached()
    _, receipt = sharing.ask(tokens, with_source=False)
    assert receipt["sources"] == ["decode-0"] and receipt["quality"]["at_end"] >= PAGE_KL


def test_many_turns(sharing: Pair) -> None:
    """Prompts that continue answers, with loads, hits and pages given away in between."""
    tokens = prompt(90, seed=86)
    for turn in range(8):
        found, receipt = sharing.ask(tokens, max_tokens=30, with_source=turn % 3 == 0)
        if turn:
            assert receipt["cached_tokens"] >= len(tokens) - 30 - 13 - 96
        tokens = tokens + found + prompt(13, seed=100 + turn)
        sharing.decode.check_integrity()


# -- room ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("caching", [True, False])
def test_who_gives_way_goes_on_as_if_nothing_had_been(kind: str, reference: Reference, caching: bool) -> None:
    prompts = [prompt(190 + 4 * i, seed=90 + i) for i in range(4)]
    with quantized_pair(
        kind, num_blocks=22, policy=SHARING, prefix_caching=caching, store=ChunkStore(64 << 20) if caching else None
    ) as pair:
        bodies = [
            pair.body(tokens, request_id=f"r{i}", max_tokens=110, with_source=i % 2 == 0)
            for i, tokens in enumerate(prompts)
        ]
        answers = pair.ask_all(bodies)
        for tokens, (answer, receipt) in zip(prompts, answers, strict=True):
            assert answer == reference.answer(tokens, receipt["plan"]["levels"], 110)
        assert sum(receipt["preemptions"] for _, receipt in answers) > 0, "they were not to fit"
        assert pair.decode.stats()["decode_generated_tokens_total"] == 4 * 110, "no token is drawn twice"
        check_empty(pair)


def test_without_memory_for_copies_what_was_computed_is_computed_again(
    kind: str, reference: Reference, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PageRings, "save", lambda *_: None)
    prompts = [prompt(190 + 4 * i, seed=94 + i) for i in range(4)]
    with quantized_pair(kind, num_blocks=22) as pair:
        answers = pair.ask_all(
            [
                pair.body(tokens, request_id=f"r{i}", max_tokens=110, with_source=False)
                for i, tokens in enumerate(prompts)
            ]
        )
        for tokens, (answer, _) in zip(prompts, answers, strict=True):
            assert answer == reference.answer(tokens, ["text"] * 2, 110)
        assert sum(receipt["preemptions"] for _, receipt in answers) > 0
        check_empty(pair)


def test_rings_are_what_requests_wait_for(kind: str, reference: Reference) -> None:
    prompts = [prompt(60 + i, seed=110 + i) for i in range(7)]
    with quantized_pair(kind, num_rings=2) as pair:
        answers = pair.ask_all(
            [
                pair.body(tokens, request_id=f"r{i}", max_tokens=20, with_source=False)
                for i, tokens in enumerate(prompts)
            ]
        )
        for tokens, (answer, _) in zip(prompts, answers, strict=True):
            assert answer == reference.answer(tokens, [], 20)
        askings = [pair.begin(tokens, max_tokens=300, with_source=False) for tokens in prompts[:3]]
        until(lambda: pair.decode.stats()["decode_sequences"] == 2)
        assert pair.decode.stats()["kv_cache_usage_perc"] == 1.0, "nobody else can be admitted"
        for asking in askings:
            asking.leave()
        check_empty(pair)


def test_who_leaves_in_the_middle_leaves_nothing(
    kind: str, reference: Reference, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = random.Random(7)
    with quantized_pair(kind, num_blocks=40, policy=SHARING, prefix_caching=True, store=ChunkStore(64 << 20)) as pair:
        # In the middle of a forward pass over its prompt, and of the loading of it.
        gate = Gate(monkeypatch, Engine, "forward", on_thread("decode-engine"))
        asking = pair.begin(prompt(300, seed=120), with_source=False)
        gate.wait()
        asking.leave()
        pair.decode.check_integrity()
        gate.open()
        check_empty(pair)
        gate = Gate(monkeypatch, ModelRuntime, "decode_into_pages", on_thread("kv-decode"))
        asking = pair.begin(prompt(300, seed=121), kv_mode="q2")
        gate.wait()
        asking.leave()
        gate.open()
        check_empty(pair)
        # Anywhere, among others, with pages that are short.
        askings: list[Asking] = []
        for i in range(16):
            tokens = prompt(rng.randrange(40, 400), seed=130 + i % 6)
            askings.append(pair.begin(tokens, request_id=f"l{i}", max_tokens=200, with_source=i % 2 == 0))
            if len(askings) >= 4:
                leaver, num_tokens = askings.pop(rng.randrange(4)), rng.randrange(40)
                until(partial(has_drawn, leaver, num_tokens))
                leaver.leave()
                pair.decode.check_integrity()
        for asking in askings:
            asking.leave()
        check_empty(pair)
        tokens = prompt(150, seed=150)
        assert pair.ask(tokens, max_tokens=20, with_source=False)[0] == reference.answer(tokens, ["text"] * 2, 20)
