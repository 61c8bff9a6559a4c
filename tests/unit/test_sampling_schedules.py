"""Seeded requests with every kind of parameter on a bf16 engine: the same tokens and logprobs, to the bit, whatever the
chunks of the prompts, whoever shares the batch, and in whatever order."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from engine_models import random_engine, random_prompt

from decode.requests import GenerationRequest, SamplingParams, TokenLogprobs
from decode.sampling import Drawn
from decode.sampling_state import SamplingState
from decode.scheduler import Row, Sequence
from decode.step_outcome import Outcome, outcomes, scores_prompt
from prefill.block_pool import BlockPool, blocks_for
from prefill.engine import Engine, SequenceSlice

NUM_NEW = 6
PARAMS = [
    SamplingParams(temperature=0.0, prompt_logprobs=2),
    SamplingParams(seed=1, logprobs=3),
    SamplingParams(seed=2, top_p=0.9, temperature=0.7),
    SamplingParams(seed=3, top_k=20, min_p=0.01, prompt_logprobs=0),
    SamplingParams(seed=1, repetition_penalty=1.3, frequency_penalty=0.5, presence_penalty=0.2, logprobs=0),
    SamplingParams(seed=4, logit_bias=((5, 4.0),), bad_words=((5, 5),), min_tokens=3, prompt_logprobs=1, logprobs=1),
    SamplingParams(temperature=0.0, frequency_penalty=2.0),
]


@pytest.fixture(scope="module")
def bf16() -> tuple[Engine, BlockPool]:
    return random_engine(dtype=torch.bfloat16, num_blocks=512)


@dataclass
class Running:
    """One request on the engine, and all that came of it."""

    sequence: Sequence
    state: SamplingState
    done: int = 0
    drawn: list[Drawn] = field(default_factory=list)
    prompt: list[TokenLogprobs] = field(default_factory=list)

    def next_row(self, most: int) -> Row:
        num_prompt = len(self.sequence.request.token_ids)
        stop = self.done + (min(most, num_prompt - self.done) if self.done < num_prompt else 1)
        return Row(sequence=self.sequence, start=self.done, stop=stop, sample=stop >= num_prompt)

    def advance(self, row: Row, outcome: Outcome) -> None:
        assert len(self.prompt) == row.start or not outcome.prompt_logprobs
        self.prompt += outcome.prompt_logprobs
        self.done = row.stop
        if outcome.drawn is not None:
            self.drawn.append(outcome.drawn)
            self.sequence.output.append(outcome.drawn.token_id)


def running(number: int, table: list[int]) -> Running:
    prompt = tuple(random_prompt(40 + 61 * number, seed=number))
    request = GenerationRequest(request_id=str(number), token_ids=prompt, sampling=PARAMS[number])
    return Running(
        sequence=Sequence(key=str(number), request=request, block_table=table, deadline=0.0, arrival=number),
        state=SamplingState(request.sampling, prompt, eos_token_ids=(2,)),
    )


def generate(bf16: tuple[Engine, BlockPool], numbers: list[int], seed: int) -> dict[int, Any]:
    """Tokens and logprobs of these requests, together, by a random schedule."""
    engine, allocator = bf16
    rng = random.Random(seed)
    tables = {i: allocator.allocate(blocks_for(40 + 61 * i + NUM_NEW, 16)) for i in numbers}
    requests = {i: running(i, table) for i, table in tables.items()}
    while left := [item for item in requests.values() if len(item.drawn) < NUM_NEW]:
        chosen = rng.sample(left, rng.randint(1, len(left)))
        rows = [item.next_row(rng.choice([1, 2, 17, 64, 256])) for item in chosen]
        states = [item.state for item in chosen]
        is_scored = [scores_prompt(row, state) for row, state in zip(rows, states)]
        logits = engine.forward(
            [
                SequenceSlice(
                    token_ids=row.token_ids(),
                    start=row.start,
                    block_table=row.sequence.block_table,
                    need_logits=row.sample,
                    all_logits=scored,
                )
                for row, scored in zip(rows, is_scored)
            ]
        )
        for item, row, outcome in zip(chosen, rows, outcomes(rows, states, is_scored, logits)):
            assert isinstance(outcome, Outcome), outcome
            item.advance(row, outcome)
    for table in tables.values():
        allocator.release(table)
    return {i: (item.drawn, item.prompt) for i, item in requests.items()}


@pytest.fixture(scope="module")
def alone(bf16: tuple[Engine, BlockPool]) -> dict[int, Any]:
    return {i: found for i in range(len(PARAMS)) for found in generate(bf16, [i], seed=i).values()}


@pytest.mark.parametrize("seed", range(100, 108))
def test_company_and_chunks_change_nothing(bf16: tuple[Engine, BlockPool], alone: dict[int, Any], seed: int) -> None:
    numbers = random.Random(seed).sample(range(len(PARAMS)), 5)
    assert generate(bf16, numbers, seed) == {i: alone[i] for i in numbers}


def test_what_was_asked_for_is_there(bf16: tuple[Engine, BlockPool], alone: dict[int, Any]) -> None:
    """Prompt logprobs are those of one pass over the whole prompt."""
    engine, allocator = bf16
    for i, params in enumerate(PARAMS):
        drawn, found = alone[i]
        assert [item.logprobs is not None for item in drawn] == [params.logprobs is not None] * NUM_NEW
        if params.prompt_logprobs is None:
            assert not found
            continue
        prompt = random_prompt(40 + 61 * i, seed=i)
        table = allocator.allocate(blocks_for(len(prompt), 16))
        logits = engine.forward([SequenceSlice(token_ids=prompt, start=0, block_table=table, all_logits=True)])
        allocator.release(table)
        expected = torch.log_softmax(logits.double(), -1)
        assert logits.shape == (len(prompt), engine.model.vocab_size) and len(found) == len(prompt) - 1
        for row, token, item in zip(expected, prompt[1:], found):
            assert item.logprob == pytest.approx(float(row[token]))
            assert len(item.top) == params.prompt_logprobs
            assert [value for _, value in item.top] == pytest.approx(row.topk(len(item.top)).values.tolist())
            assert item.rank == 1 + int((row > row[token]).sum())


def row(number: int, start: int, stop: int, *, sample: bool = False) -> Row:
    return Row(sequence=running(number, []).sequence, start=start, stop=stop, sample=sample)


def test_outcomes_fit_their_rows_when_others_fail_or_have_ended() -> None:
    logits = torch.randn(7, 512, generator=torch.Generator().manual_seed(1))
    rows = [row(1, 100, 101, sample=True), row(0, 0, 3), row(1, 0, 5), row(2, 161, 162, sample=True), row(0, 38, 40)]
    states = [SamplingState(PARAMS[1]), running(0, []).state, None, None, running(0, []).state]
    is_scored = [scores_prompt(item, state) for item, state in zip(rows, states)]
    assert is_scored == [False, True, False, False, True]
    found = outcomes(rows, states, is_scored, logits)
    first, scored, not_wanted, ended, end = found
    assert isinstance(first, Outcome) and first.drawn is not None
    assert isinstance(scored, Outcome) and len(scored.prompt_logprobs) == 3
    assert (not_wanted, ended) == (Outcome(), Outcome())
    assert isinstance(end, Outcome) and len(end.prompt_logprobs) == 1, "the last prompt token predicts none of them"
    assert states[4] is not None and not states[4].scores_prompt

    logits[2] = torch.nan
    states = [SamplingState(PARAMS[1]), running(0, []).state, None, None, running(0, []).state]
    broken = outcomes(rows, states, is_scored, logits)
    assert isinstance(broken[1], ArithmeticError)
    assert [broken[i] for i in (0, 2, 3, 4)] == [found[i] for i in (0, 2, 3, 4)]
