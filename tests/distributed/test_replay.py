"""An answer over lossy, refined KV is had again, token for token, by sending the plan of its receipt."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from pair import Pair, running_pair

from decode.requests import SamplingParams
from decode.slo import SLOPolicy
from transport.shaper import Shaper

CHUNK = 32
NUM_CHUNKS = 8
NUM_TOKENS = 150
POLICY = SLOPolicy(ttft_s=30.0, ceiling="q3", floor="q3", refine_to="q1", allow_recompute=False)


def prompt(seed: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(3, 512) for _ in range(NUM_CHUNKS * CHUNK + 7)]


@pytest.fixture(scope="module")
def pair() -> Iterator[Pair]:
    with running_pair(policy=POLICY, chunk_tokens=CHUNK, num_blocks=128) as running:
        yield running
        running.check()


@pytest.fixture(scope="module")
def slow_link(pair: Pair) -> Iterator[str]:
    with Shaper(pair.prefill.endpoint, rate_mbps=4) as shaper:
        yield shaper.endpoint


def sampling(**options: Any) -> SamplingParams:
    return SamplingParams(max_tokens=NUM_TOKENS, ignore_eos=True, **options)


GREEDY = sampling(temperature=0.0)
SEEDED = sampling(temperature=1.0, top_p=0.95, seed=11)


@pytest.mark.parametrize("how", [GREEDY, SEEDED], ids=["greedy", "seeded"])
def test_the_plan_of_a_receipt_gives_the_same_tokens(pair: Pair, slow_link: str, how: SamplingParams) -> None:
    tokens = prompt(1)
    pair.ask(tokens, kv_mode="q1")  # it is stored
    plain, _ = pair.ask(tokens, kv_mode="q3", sampling=how)
    first, receipt = pair.ask(tokens, endpoints=[slow_link], sampling=how)
    plan = receipt["plan"]
    moments = {step["after_tokens"] for step in plan["refinements"]}
    assert plan["levels"] == ["q3"] * NUM_CHUNKS and len(moments) > 2, "nothing to be followed"
    assert first != plain, "the refinements changed nothing"
    # Over a fast link all is there long before its moment, over the slow one the answer has to wait for it.
    for endpoints in (None, [slow_link]):
        again, followed = pair.ask(tokens, endpoints=endpoints, sampling=how, plan=plan)
        assert followed["plan"] == plan
        assert again == first


def test_a_plan_with_computed_chunks_and_exact_refinements_is_followed(pair: Pair) -> None:
    """The computed chunks rest on the lossy ones below them, as they did the first time."""
    tokens = prompt(2)
    levels = ["q3", "text", "q1", "text", "q2", "raw", "text", "q3"]
    steps = [(0, "q2", 3), (4, "lossless", 3), (7, "q1", 10), (0, "lossless", 20)]
    refinements = [{"chunk": chunk, "level": level, "after_tokens": after} for chunk, level, after in steps]
    plan = {"chunk_tokens": CHUNK, "levels": levels, "refinements": refinements}
    first, receipt = pair.ask(tokens, plan=plan, sampling=GREEDY)
    assert receipt["plan"] == plan
    assert receipt["levels_at_end"] == {"lossless": 2, "text": 3, "q1": 2, "raw": 1}
    assert pair.ask(tokens, plan=receipt["plan"], sampling=GREEDY)[0] == first
    other = {**plan, "refinements": refinements[1:]}
    assert pair.ask(tokens, plan=other, sampling=GREEDY)[0] != first, "the refinements changed nothing"


def test_a_plan_of_exact_chunks_gives_the_tokens_of_the_engine_alone(pair: Pair) -> None:
    tokens = prompt(3)
    levels = ["text", "lossless", "text", "raw"] * 2
    answer, _ = pair.ask(tokens, plan={"chunk_tokens": CHUNK, "levels": levels}, max_tokens=20)
    assert answer == pair.reference(tokens, 20)


LEVELS = ["q3"] * NUM_CHUNKS


def step(**changes: Any) -> dict[str, Any]:
    return {"levels": LEVELS, "refinements": [{"chunk": 0, "level": "q1", "after_tokens": 1, **changes}]}


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"chunk_tokens": 256}, "chunks of 256 tokens, this server uses 32"),
        ({"levels": LEVELS[1:]}, "it has 7 chunks, this prompt has 8"),
        ({"levels": ["q9", *LEVELS[1:]]}, "it names level 'q9'"),
        ({"levels": None}, "a plan has chunk_tokens, levels and refinements"),
        (step(chunk=8), "it refines chunk 8 after 1 tokens"),
        (step(after_tokens=0), "it refines chunk 0 after 0 tokens"),
        (step(level="q3"), "it refines chunk 0 from q3 to q3: not better"),
    ],
)
def test_a_plan_that_does_not_fit_is_refused_and_says_why(pair: Pair, changes: dict[str, Any], says: str) -> None:
    plan = {"chunk_tokens": CHUNK, "levels": LEVELS, "refinements": [], **changes}
    _, event = pair.ask(prompt(4), plan=plan)
    assert event["refused"]["status"] == 400 and event["refused"]["param"] == "kv.plan"
    assert says in event["refused"]["message"]


def test_a_plan_below_the_policys_floor_is_refused(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pair.decode, "_policy", replace(POLICY, floor="q1", ceiling=None))
    _, event = pair.ask(prompt(4), plan={"chunk_tokens": CHUNK, "levels": LEVELS})
    assert event["refused"]["status"] == 400 and "floor is q1" in event["refused"]["message"]


def test_a_plan_without_a_source_is_refused_if_it_loads(pair: Pair) -> None:
    _, event = pair.ask(prompt(4), plan={"chunk_tokens": CHUNK, "levels": LEVELS}, with_source=False)
    assert event["refused"]["status"] == 503
    tokens = prompt(4)
    text = {"chunk_tokens": CHUNK, "levels": ["text"] * NUM_CHUNKS}
    assert pair.ask(tokens, plan=text, with_source=False)[0] == pair.reference(tokens, 8)
