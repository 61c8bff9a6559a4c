"""Logprobs as the OpenAI endpoints answer them, and prompt logprobs as vLLM does. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from cluster.token_text import TokenTexts
from decode.requests import TokenLogprobs

LEAST = -9999.0  # stands for minus infinity, which JSON has not; as vLLM

Scored = tuple[int, TokenLogprobs | None]  # a token; a prompt's first has no logprobs


def chat_logprobs(scored: Iterable[Scored], texts: TokenTexts) -> dict[str, Any]:
    """One entry a token: itself, and the likeliest in its place."""

    def entry(token: int, logprob: float) -> dict[str, Any]:
        return {"token": texts.text_of(token), "logprob": _json(logprob), "bytes": list(texts.bytes_of(token))}

    content = [
        {**entry(token, own.logprob), "top_logprobs": [entry(*top) for top in own.top]}
        for token, own in scored
        if own is not None
    ]
    return {"content": content, "refusal": None}


def completion_logprobs(scored: Sequence[Scored], offsets: Sequence[int], texts: TokenTexts) -> dict[str, Any]:
    """Four lists with one item a token. The likeliest are keyed by their text; the token itself is always among them,
    so there may be one more than asked for."""

    def likeliest(token: int, own: TokenLogprobs) -> dict[str, float]:
        found: dict[str, float] = {}
        for other, logprob in own.top:
            found.setdefault(texts.text_of(other), _json(logprob))  # of two tokens that read alike, the likelier
        return (
            found if token in (other for other, _ in own.top) else {**found, texts.text_of(token): _json(own.logprob)}
        )

    return {
        "tokens": [texts.text_of(token) for token, _ in scored],
        "token_logprobs": [None if own is None else _json(own.logprob) for _, own in scored],
        "top_logprobs": [None if own is None else likeliest(token, own) for token, own in scored],
        "text_offset": list(offsets),
    }


def prompt_logprobs(token_ids: Sequence[int], found: Sequence[TokenLogprobs], texts: TokenTexts) -> list[Any]:
    """An item a prompt token: None for the first, then by token id the token itself and the likeliest."""

    def entry(token: int, logprob: float, rank: int) -> dict[str, Any]:
        return {"logprob": _json(logprob), "rank": rank, "decoded_token": texts.text_of(token)}

    answer: list[Any] = [None]
    for token, own in zip(token_ids[1:], found, strict=True):
        entries = {str(token): entry(token, own.logprob, own.rank)}
        for rank, (other, logprob) in enumerate(own.top, start=1):
            entries.setdefault(str(other), entry(other, logprob, rank))
        answer.append(entries)
    return answer


def _json(logprob: float) -> float:
    return max(logprob, LEAST)
