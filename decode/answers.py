"""The events of one request's token stream: as the decode worker sends them and as `cluster/` reads them. Plain values,
for msgpack."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from decode.requests import (
    FailedEvent,
    FinishedEvent,
    FinishReason,
    GenerationEvent,
    PromptLogprobsEvent,
    RequestRefused,
    TokenLogprobs,
    TokensEvent,
)


def tokens_event(token: int, logprobs: TokenLogprobs | None = None) -> dict[str, Any]:
    event: dict[str, Any] = {"tokens": [token]}
    return event if logprobs is None else {**event, "logprobs": [logprobs.to_wire()]}


def prompt_logprobs_event(start: int, logprobs: Iterable[TokenLogprobs]) -> dict[str, Any]:
    """Those of the prompt tokens from `start` on: of one slice of the prompt, so that no message grows with it."""
    return {"prompt_logprobs": {"start": start, "logprobs": [item.to_wire() for item in logprobs]}}


def finished_event(
    token: int,
    logprobs: TokenLogprobs | None = None,
    *,
    reason: FinishReason,
    prompt_tokens: int,
    completion_tokens: int,
    receipt: dict[str, Any],
) -> dict[str, Any]:
    """The last token and the end of a request that ended well."""
    finished = {
        "finish_reason": reason,
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "receipt": receipt,
    }
    return {**tokens_event(token, logprobs), "finished": finished}


def failed_event(*, status: int, code: str, message: str) -> dict[str, Any]:
    """The end of a request that was admitted and ended badly."""
    return {"failed": {"status": status, "code": code, "message": message}}


def refused_event(refused: RequestRefused) -> dict[str, Any]:
    """The only event of a request that cannot be served."""
    return {
        "refused": {
            "message": refused.message,
            "status": refused.status,
            "code": refused.code,
            "param": refused.param,
        }
    }


def read_answer(answer: dict[str, Any]) -> list[GenerationEvent]:
    """The inverse of all of these. Raises RequestRefused for a refusal."""
    if "refused" in answer:
        raise RequestRefused(**answer["refused"])
    if "failed" in answer:
        return [FailedEvent(**answer["failed"])]
    events: list[GenerationEvent] = []
    if "prompt_logprobs" in answer:
        scored = answer["prompt_logprobs"]
        events.append(PromptLogprobsEvent(start=scored["start"], logprobs=_logprobs(scored["logprobs"])))
    if answer.get("tokens"):
        logprobs = _logprobs(answer["logprobs"]) if "logprobs" in answer else None
        events.append(TokensEvent(token_ids=tuple(answer["tokens"]), logprobs=logprobs))
    if "finished" in answer:
        events.append(FinishedEvent(**answer["finished"]))
    return events


def _logprobs(items: Sequence[list[Any]]) -> tuple[TokenLogprobs, ...]:
    return tuple(TokenLogprobs.from_wire(item) for item in items)
