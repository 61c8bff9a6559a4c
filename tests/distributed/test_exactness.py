"""The bundled model through prefill worker, sockets and decode worker: exact levels leave no trace."""

from __future__ import annotations

import random

import pytest
import torch
from pair import Pair, around
from transformers import AutoModelForCausalLM

from cluster.config import BUNDLED_MODEL
from decode.slo import SLOPolicy
from prefill.engine import prefill
from prefill.runtime import load_runtime

NUM_PROMPTS = 20


def prompts() -> list[list[int]]:
    rng = random.Random(0)
    lengths = [300 + index * 3200 // (NUM_PROMPTS - 1) for index in range(NUM_PROMPTS)]
    return [[rng.randrange(300, 4000) for _ in range(length)] for length in lengths]


@pytest.fixture(scope="module")
def pair():
    def runtime():
        return load_runtime(BUNDLED_MODEL, num_blocks=2048)

    with around(runtime, policy=SLOPolicy(ttft_s=60.0)) as running:
        yield running
        running.check()


@pytest.fixture
def pages(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
    """KV [L, T, H, D] of each request's loaded chunks at the moment its fill is ready, by prompt length."""
    seen: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    ready = pair.decode.fill_ready

    def fill_ready(key: str, now: float) -> None:
        sequence = pair.decode._scheduler.get(key)
        num_prompt = len(sequence.request.token_ids)
        loaded = (num_prompt - 1) // 256 * 256
        seen[num_prompt] = pair.decode._runtime.pool.read(sequence.block_table, 0, loaded)
        ready(key, now)

    monkeypatch.setattr(pair.decode, "fill_ready", fill_ready)
    return seen


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["lossless", "raw"])
def test_pages_and_tokens_equal_the_engine_alone(pair: Pair, pages: dict, mode: str) -> None:
    """All prompts at once, so the rest of the batch differs; the engine alone computes in other chunk sizes."""
    wanted = prompts()
    answers = pair.ask_all([pair.body(tokens, kv_mode=mode, max_tokens=5) for tokens in wanted])
    engine, allocator = pair.alone.engine, pair.alone.allocator
    for tokens, (answer, receipt) in zip(wanted, answers, strict=True):
        assert set(receipt["levels"]) == {mode}
        table = allocator.allocate(-(-(len(tokens) + 8) // 16))
        prefill(engine, tokens, table, chunk_tokens=300)
        k, v = pair.alone.pool.read(table, 0, (len(tokens) - 1) // 256 * 256)
        allocator.release(table)
        assert torch.equal(k.view(torch.int16), pages[len(tokens)][0].view(torch.int16))
        assert torch.equal(v.view(torch.int16), pages[len(tokens)][1].view(torch.int16))
        assert answer == pair.reference(tokens, 5)


def test_float32_over_raw_gives_what_transformers_generates() -> None:
    plain = AutoModelForCausalLM.from_pretrained(BUNDLED_MODEL, dtype=torch.float32)
    with around(lambda: load_runtime(BUNDLED_MODEL, dtype="float32", num_blocks=512)) as pair:
        for tokens in prompts()[:3]:
            answer, receipt = pair.ask(tokens, kv_mode="raw", max_tokens=8)
            assert set(receipt["levels"]) == {"raw"}
            ids = torch.tensor([tokens])
            out = plain.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)
            expected = out[0, len(tokens) :].tolist()
            assert answer[: len(expected)] == expected  # generate stops at the end token, the request ignores it
        pair.check()
