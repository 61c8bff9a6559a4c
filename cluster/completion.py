"""One request from backend events to text: stop strings, token counts, metrics, failures. No HTTP."""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import dataclass
from typing import Any

from cluster.backend import Backend
from cluster.detokenize import OutputText, Piece
from cluster.metrics import GatewayMetrics
from cluster.openai_errors import APIError
from decode.requests import (
    FailedEvent,
    FinishedEvent,
    GenerationEvent,
    GenerationRequest,
    PromptLogprobsEvent,
    RequestRefused,
    TokenLogprobs,
    TokensEvent,
)

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Done:
    """The end of a request that went well. `text`: what had been held back. `prompt_logprobs`: of the prompt's tokens
    but the first, if asked for."""

    text: str
    finish_reason: str
    prompt_tokens: int
    completion_tokens: int
    receipt: dict[str, Any] | None
    prompt_logprobs: tuple[TokenLogprobs, ...] | None = None


async def run_request(
    backend: Backend,
    request: GenerationRequest,
    output: OutputText,
    metrics: GatewayMetrics,
    *,
    counts_prompt: bool = True,
) -> AsyncGenerator[Piece | Done, None]:
    """Pieces of text and, last, Done. Raises APIError. Closing the generator cancels the request. counts_prompt: its
    prompt is not another's too, that counts it in the metrics."""
    arrived = first = last = time.monotonic()
    completion_tokens = 0
    prompt_logprobs: list[TokenLogprobs] | None = [] if request.sampling.prompt_logprobs is not None else None
    metrics.running.inc()
    events = backend.generate(request)
    try:
        async for event in events:
            if isinstance(event, FailedEvent):
                raise APIError(event.status, event.message, code=event.code)
            if isinstance(event, FinishedEvent):
                rest = output.flush()
                yield _done(metrics, (arrived, first), Done(
                    text=rest.text,
                    finish_reason="stop" if rest.stopped else event.finish_reason,
                    prompt_tokens=event.prompt_tokens,
                    completion_tokens=event.completion_tokens,
                    receipt=event.receipt,
                    prompt_logprobs=None if prompt_logprobs is None else tuple(prompt_logprobs),
                ))  # fmt: skip
                return
            if isinstance(event, PromptLogprobsEvent):
                assert prompt_logprobs is not None and event.start - 1 <= len(prompt_logprobs), event.start
                prompt_logprobs[event.start - 1 :] = event.logprobs  # anew, if another worker had begun
                continue
            assert isinstance(event, TokensEvent)
            if not event.token_ids:
                continue
            now = time.monotonic()
            if completion_tokens == 0:
                first = now
                metrics.ttft.observe(now - arrived)
                metrics.prompt_tokens.inc(len(request.token_ids) if counts_prompt else 0)
            else:
                metrics.token_gap(now - last, len(event.token_ids))
            last = now
            piece = output.push(event.token_ids, event.logprobs)
            completion_tokens += len(piece.token_ids)
            yield piece
            if piece.stopped:
                await _close(events)  # cancels; the tokens after the stop string are nobody's
                yield _done(metrics, (arrived, first), Done(
                    text="",
                    finish_reason="stop",
                    prompt_tokens=len(request.token_ids),
                    completion_tokens=completion_tokens,
                    receipt=await backend.receipt(request.request_id),
                    prompt_logprobs=None if prompt_logprobs is None else tuple(prompt_logprobs),
                ))  # fmt: skip
                return
        raise APIError(502, "the worker ended this request without saying why", code="worker_lost")
    except RequestRefused as refused:
        raise APIError(refused.status, refused.message, code=refused.code, param=refused.param) from None
    except APIError:
        raise
    except Exception:
        log.exception("request %s failed", request.request_id)
        raise APIError(500, "internal error; the server's log has the details", code="internal_error") from None
    finally:
        metrics.running.dec()
        await _close(events)


def _done(metrics: GatewayMetrics, times: tuple[float, float], done: Done) -> Done:
    arrived, first = times
    now = time.monotonic()
    metrics.finished(
        reason=done.finish_reason,
        e2e_s=now - arrived,
        decode_s=now - first,
        completion_tokens=done.completion_tokens,
        receipt=done.receipt,
    )
    return done


async def _close(events: AsyncIterator[GenerationEvent]) -> None:
    close = getattr(events, "aclose", None)
    if close is not None:
        await close()
