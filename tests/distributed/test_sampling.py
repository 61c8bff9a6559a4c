"""Sampling parameters through a real decode worker: what comes back over the stream."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from engine_models import random_prompt
from pair import Pair, running_pair

from decode.answers import read_answer
from decode.requests import PromptLogprobsEvent, SamplingParams, TokenLogprobs, TokensEvent
from decode.sampling import sample_batch
from decode.sampling_state import SamplingState
from prefill.block_pool import blocks_for
from prefill.engine import SequenceSlice

CHUNK = 64
PROMPT = random_prompt(5 * CHUNK + 10, seed=3)


@pytest.fixture(scope="module")
def pair() -> Iterator[Pair]:
    with running_pair(chunk_tokens=CHUNK) as pair:
        yield pair


@pytest.fixture(autouse=True)
def nothing_is_left(pair: Pair) -> Iterator[None]:
    yield
    pair.check()


def reference(pair: Pair, prompt: list[int], params: SamplingParams) -> list[int]:
    """The tokens of the same parameters on an engine without a server."""
    engine, allocator = pair.alone.engine, pair.alone.allocator
    table = allocator.allocate(blocks_for(len(prompt) + params.max_tokens, 16))
    state = SamplingState(params, prompt, eos_token_ids=pair.alone.model.eos_token_ids)
    tokens = list(prompt)
    for _ in range(params.max_tokens):
        start = 0 if len(tokens) == len(prompt) else len(tokens) - 1
        ids = tokens[start:]
        logits = engine.forward([SequenceSlice(token_ids=ids, start=start, block_table=table, need_logits=True)])
        (drawn,) = sample_batch(logits, [state])
        assert not isinstance(drawn, Exception), drawn
        tokens.append(drawn.token_id)
    allocator.release(table)
    return tokens[len(prompt) :]


def test_seeded_requests_get_the_same_tokens_alone_and_in_a_crowd(pair: Pair) -> None:
    every = [
        SamplingParams(max_tokens=12, ignore_eos=True, **fields)
        for fields in (
            {"seed": 1},
            {"seed": 1, "top_p": 0.8, "temperature": 1.5},
            {"seed": 2, "frequency_penalty": 1.0, "repetition_penalty": 1.2},
            {"temperature": 0.0, "logit_bias": ((7, 3.0),), "bad_words": ((7, 7),), "logprobs": 2},
        )
    ]  # fmt: skip
    expected = [reference(pair, PROMPT, params) for params in every]
    bodies = [pair.body(PROMPT, sampling=params, kv_mode="raw") for params in every]
    assert [tokens for tokens, _ in pair.ask_all(bodies)] == expected
    assert [pair.ask(PROMPT, sampling=params, kv_mode="text")[0] for params in every] == expected


def events_of(pair: Pair, **options: Any) -> list[Any]:
    asking = pair.begin(PROMPT, **options)
    asking.wait()
    return [event for answer in asking.answers for event in read_answer(answer)]


@pytest.mark.parametrize("with_source", [False, True])
def test_prompt_logprobs_come_before_the_first_token_and_cover_the_prompt(pair: Pair, with_source: bool) -> None:
    """Also when the same prompt stands in the pages already, and when a source has it."""
    params = SamplingParams(max_tokens=3, temperature=0.0, prompt_logprobs=1, logprobs=0, ignore_eos=True)
    pair.ask(PROMPT)
    events = events_of(pair, sampling=params, with_source=with_source)
    scored: list[TokenLogprobs] = []
    while isinstance(events[0], PromptLogprobsEvent):
        event = events.pop(0)
        assert event.start == len(scored) + 1
        scored += event.logprobs
    assert len(scored) == len(PROMPT) - 1
    tokens = [event for event in events if isinstance(event, TokensEvent)]
    assert len(events) == len(tokens) + 1 and len(tokens) == 3
    assert all(event.logprobs is not None and event.logprobs[0].rank == 1 for event in tokens)
    engine, table = pair.alone.engine, pair.alone.allocator.allocate(blocks_for(len(PROMPT), 16))
    logits = engine.forward([SequenceSlice(token_ids=PROMPT, start=0, block_table=table, all_logits=True)])
    pair.alone.allocator.release(table)
    expected = logits.double().log_softmax(-1)
    assert [item.logprob for item in scored] == pytest.approx(
        [float(row[token]) for row, token in zip(expected, PROMPT[1:])]
    )


def test_min_tokens_hold_back_the_end(pair: Pair) -> None:
    """The stop token is by far the likeliest, and comes as soon as it may."""
    end = 17
    params = SamplingParams(
        max_tokens=10, temperature=0.0, logit_bias=((end, 100.0),), stop_token_ids=(end,), min_tokens=4
    )
    tokens, _ = pair.ask(PROMPT, sampling=params)
    assert len(tokens) == 5 and tokens.index(end) == 4


def test_a_row_without_a_token_fails_alone(pair: Pair) -> None:
    bad = SamplingParams(max_tokens=4, temperature=0.0, allowed_token_ids=(5,), bad_words=((5,),))
    good = pair.body(PROMPT, max_tokens=6)
    answers = pair.ask_all([good, pair.body(PROMPT, sampling=bad), good | {}])
    failed = answers[1][1]["failed"]
    assert (failed["status"], failed["code"]) == (400, "no_token_allowed"), "it is the request's own doing"
    assert answers[0][0] == answers[2][0] == pair.reference(PROMPT, 6)
