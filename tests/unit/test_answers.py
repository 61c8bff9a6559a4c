"""What a decode worker sends is what a gateway reads; and a request's events become pieces and one end."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import msgpack
import pytest

from cluster.completion import Done, run_request
from cluster.detokenize import OutputText, Piece
from cluster.metrics import GatewayMetrics
from decode.answers import failed_event, finished_event, prompt_logprobs_event, read_answer, refused_event, tokens_event
from decode.requests import (
    FailedEvent,
    FinishedEvent,
    GenerationRequest,
    PromptLogprobsEvent,
    RequestRefused,
    SamplingParams,
    TokenLogprobs,
    TokensEvent,
)

ONE = TokenLogprobs(logprob=-0.25, rank=1, top=((5, -0.25), (7, -3.5)))
TWO = TokenLogprobs(logprob=-9.0, rank=400, top=())
END = {"reason": "stop", "prompt_tokens": 3, "completion_tokens": 2, "receipt": {"x": 1}}
FINISHED = FinishedEvent(finish_reason="stop", prompt_tokens=3, completion_tokens=2, receipt={"x": 1})


def through_the_wire(answer: dict[str, Any]) -> list[Any]:
    return list(read_answer(msgpack.unpackb(msgpack.packb(answer))))


@pytest.mark.parametrize(
    ("answer", "events"),
    [
        (tokens_event(5), [TokensEvent(token_ids=(5,))]),
        (tokens_event(5, ONE), [TokensEvent(token_ids=(5,), logprobs=(ONE,))]),
        (prompt_logprobs_event(7, (ONE, TWO)), [PromptLogprobsEvent(start=7, logprobs=(ONE, TWO))]),
        (finished_event(5, **END), [TokensEvent(token_ids=(5,)), FINISHED]),
        (finished_event(5, TWO, **END), [TokensEvent(token_ids=(5,), logprobs=(TWO,)), FINISHED]),
        (
            failed_event(status=502, code="worker_lost", message="gone"),
            [FailedEvent(status=502, code="worker_lost", message="gone")],
        ),
    ],
)
def test_events_come_back(answer: dict[str, Any], events: list[Any]) -> None:
    assert through_the_wire(answer) == events


def test_a_refusal_is_raised() -> None:
    with pytest.raises(RequestRefused) as raised:
        through_the_wire(refused_event(RequestRefused("no", status=429, code="overloaded", param="n")))
    assert (raised.value.status, raised.value.code, raised.value.param) == (429, "overloaded", "n")


class Scripted:
    """A backend that gives these events."""

    def __init__(self, *events: Any) -> None:
        self.events = events

    async def generate(self, request: GenerationRequest) -> AsyncIterator[Any]:
        for event in self.events:
            yield event

    async def receipt(self, request_id: str) -> dict[str, Any]:
        return {}


def run(*events: Any, stops: tuple[str, ...] = ()) -> list[Piece | Done]:
    sampling = SamplingParams(prompt_logprobs=1, logprobs=1)
    request = GenerationRequest(request_id="r", token_ids=(1, 2, 3), sampling=sampling)
    output = OutputText(lambda ids: "".join(chr(64 + i) for i in ids), stops=stops)

    async def everything() -> list[Piece | Done]:
        backend: Any = Scripted(*events)
        return [item async for item in run_request(backend, request, output, GatewayMetrics())]

    return asyncio.run(everything())


def test_a_prompt_scored_anew_by_another_worker_counts_once() -> None:
    first, second = (PromptLogprobsEvent(start=start, logprobs=(item,)) for start, item in ((1, ONE), (2, TWO)))
    tokens = TokensEvent(token_ids=(5, 6), logprobs=(ONE, TWO))
    *pieces, done = run(first, second, first, second, tokens, FINISHED)
    assert isinstance(done, Done) and done.prompt_logprobs == (ONE, TWO)
    assert [piece.logprobs for piece in pieces if isinstance(piece, Piece)] == [(ONE, TWO)]


def test_a_stop_string_cuts_logprobs_too() -> None:
    scored = PromptLogprobsEvent(start=1, logprobs=(ONE, TWO))
    piece, done = run(scored, TokensEvent(token_ids=(1, 2, 3), logprobs=(ONE, TWO, ONE)), FINISHED, stops=("B",))
    assert isinstance(piece, Piece) and (piece.text, piece.logprobs) == ("A", (ONE, TWO))
    assert isinstance(done, Done) and done.prompt_logprobs == (ONE, TWO)
