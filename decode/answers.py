"""The events of one request's token stream, as `cluster/` reads them. Plain values, for msgpack."""

from __future__ import annotations

from typing import Any

from decode.requests import FinishReason, RequestRefused


def tokens_event(token: int) -> dict[str, Any]:
    return {"tokens": [token]}


def finished_event(
    token: int, *, reason: FinishReason, prompt_tokens: int, completion_tokens: int, receipt: dict[str, Any]
) -> dict[str, Any]:
    """The last token and the end of a request that ended well."""
    finished = {
        "finish_reason": reason,
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "receipt": receipt,
    }
    return {**tokens_event(token), "finished": finished}


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
