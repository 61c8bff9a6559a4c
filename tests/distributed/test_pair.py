"""Prefill and decode worker over real sockets in one process: the way of a request, without Ray."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from pair import Pair, running_pair

from decode.requests import SamplingParams
from decode.slo import SLOPolicy
from transport.kv_client import KVClient


def prompt(length: int, seed: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(3, 512) for _ in range(length)]


@pytest.fixture(scope="module")
def pair():
    with running_pair() as running:
        yield running
        running.check()


@pytest.mark.parametrize("mode", ["raw", "lossless", "text"])
@pytest.mark.parametrize("length", [1, 255, 257, 300, 1025])
def test_exact_ways_give_the_tokens_of_the_engine_alone(pair: Pair, mode: str, length: int) -> None:
    tokens = prompt(length, seed=length)
    answer, receipt = pair.ask(tokens, kv_mode=mode)
    assert answer == pair.reference(tokens, 8)
    num_chunks = (length - 1) // 256
    assert receipt["levels"] == ({mode: num_chunks} if num_chunks else {})
    parts = receipt["ttft_parts_ms"]
    assert sum(parts.values()) == pytest.approx(receipt["ttft_ms"], abs=0.01)


def test_a_stored_context_is_not_computed_again(pair: Pair) -> None:
    context = prompt(768, seed=7)
    pair.ask([*context, 5, 6], kv_mode="lossless")
    before = pair.prefill.stats()["prefill_computed_tokens_total"]
    answer, receipt = pair.ask([*context, 9, 9, 9], kv_mode="raw")
    assert answer == pair.reference([*context, 9, 9, 9], 8)
    assert pair.prefill.stats()["prefill_computed_tokens_total"] == before
    assert not receipt["live_prefill"]


def test_lossy_levels_shrink_what_crosses_the_link(pair: Pair) -> None:
    tokens = prompt(800, seed=8)
    sizes = {}
    for level in ("raw", "lossless", "q1", "q3"):
        _, receipt = pair.ask(tokens, kv_mode=level)
        sizes[level] = receipt["bytes"]
    assert sizes["raw"] > sizes["lossless"] > sizes["q1"] > sizes["q3"]


def test_many_at_once_do_not_disturb_each_other(pair: Pair) -> None:
    modes = ["raw", "lossless", "text", "auto"] * 3
    prompts = [prompt(50 + 97 * index, seed=100 + index) for index in range(len(modes))]
    bodies = [pair.body(p, kv_mode=mode, floor="lossless") for p, mode in zip(prompts, modes, strict=True)]
    for tokens, (answer, _) in zip(prompts, pair.ask_all(bodies), strict=True):
        assert answer == pair.reference(tokens, 8)


def test_without_a_source_the_prompt_is_computed(pair: Pair) -> None:
    tokens = prompt(600, seed=11)
    answer, receipt = pair.ask(tokens, with_source=False)
    assert answer == pair.reference(tokens, 8)
    assert receipt["recomputed_chunks"] == 2


@pytest.mark.parametrize(
    ("options", "status", "says"),
    [
        ({"kv_mode": "q99"}, 400, "Unknown level"),
        ({"floor": "best"}, 400, "Unknown level"),
        ({"max_tokens": 4000}, 400, "context"),
        ({"kv_mode": "raw", "with_source": False}, 503, "no prefill worker"),
    ],
)
def test_refusals_say_why(pair: Pair, options: dict, status: int, says: str) -> None:
    _, event = pair.ask(prompt(600, seed=1), **options)
    assert event["refused"]["status"] == status
    assert says in event["refused"]["message"]


def test_a_seeded_request_repeats_itself(pair: Pair) -> None:
    sampling = SamplingParams(max_tokens=12, temperature=1.0, seed=42, ignore_eos=True)
    tokens = prompt(400, seed=12)
    first, _ = pair.ask(tokens, sampling=sampling, kv_mode="raw")
    again = pair.ask_all(
        [pair.body(prompt(300, seed=i), max_tokens=5) for i in range(3)] + [pair.body(tokens, sampling=sampling)]
    )
    assert again[-1][0] == first


def test_a_source_that_cannot_be_reached_leaves_the_text() -> None:
    with running_pair(policy=SLOPolicy(ttft_s=0.0)) as running:
        tokens = prompt(600, seed=13)
        running.prefill.shutdown()
        answer, receipt = running.ask(tokens)
        assert answer == running.reference(tokens, 8)
        assert receipt["recomputed_chunks"] == 2
        running.decode.check_integrity()


def test_float32_over_raw_equals_the_engine_alone() -> None:
    with running_pair(dtype=torch.float32) as running:
        tokens = prompt(700, seed=14)
        answer, _ = running.ask(tokens, kv_mode="raw")
        assert answer == running.reference(tokens, 8)
        running.check()


def test_a_source_is_told_of_the_other_holders_and_not_of_itself(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """It looks at the first of them for what it has not."""
    told: dict[str, list[str]] = {}
    opened = KVClient.open

    def open_and_note(self: KVClient, endpoint: str, body: dict[str, Any], **options: Any) -> str:
        if "holders" in body:  # and not the prefill worker's own question to another
            told[endpoint] = [holder["endpoint"] for holder in body["holders"]]
        return opened(self, endpoint, body, **options)

    monkeypatch.setattr(KVClient, "open", open_and_note)
    other = "tcp://127.0.0.1:1"
    body = pair.body(prompt(600, seed=77), endpoints=[pair.prefill.endpoint, other])
    for source in body["sources"]:
        source["is_holder"] = True
    pair.ask_all([body])
    assert told == {pair.prefill.endpoint: [other], other: [pair.prefill.endpoint]}
