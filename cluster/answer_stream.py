"""The merged pieces of a request's choices as one body, or as server-sent events."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

from cluster.completion import Done
from cluster.detokenize import Piece
from cluster.http_shell import sse
from cluster.metrics import GatewayMetrics
from cluster.openai_answers import AnswerFormat
from cluster.openai_errors import APIError

Item = tuple[int, Piece | Done]  # of a choice, by its index


async def collect(items: AsyncIterator[Item], answer: AnswerFormat) -> dict[str, Any]:
    """The body of an answer that is not streamed."""
    pieces: list[list[Piece]] = [[] for _ in range(answer.num_choices)]
    dones: dict[int, Done] = {}
    async for index, item in items:
        if isinstance(item, Done):
            dones[index] = item
        else:
            pieces[index].append(item)
    return answer.whole(pieces, [dones[i] for i in range(answer.num_choices)])


async def events(
    first: Item, rest: AsyncIterator[Item], answer: AnswerFormat, metrics: GatewayMetrics
) -> AsyncGenerator[bytes, None]:
    """Chunks in the order in which tokens come."""
    for i in range(answer.num_choices):
        for chunk in answer.first(i):
            yield sse(chunk)
    begun: set[int] = set()
    dones: dict[int, Done] = {}
    index, item = first
    try:
        while True:
            if isinstance(item, Done):
                dones[index] = item
                if len(dones) == answer.num_choices:
                    break
                yield sse(answer.last(index, item))
            else:
                yield sse(answer.piece(index, item, is_first=index not in begun))
                begun.add(index)
            index, item = await anext(rest)
        for chunk in answer.end(answer.last(index, item), [dones[i] for i in range(answer.num_choices)]):
            yield sse(chunk)
    except APIError as error:  # too late for a status
        metrics.failure.labels(status=str(error.status)).inc()
        yield sse(error.body())
    yield sse(b"[DONE]")
