"""The gateway's backend over real workers: routes, submits over ZeroMQ streams, retries what died early."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import Counter, OrderedDict
from collections.abc import AsyncIterator, Sequence
from typing import Any

from cluster.routing import Route, WorkerInfo, choose_route
from decode.requests import (
    FailedEvent,
    FinishedEvent,
    GenerationEvent,
    GenerationRequest,
    RequestRefused,
    TokensEvent,
)
from transport.curve import CurveKeys
from transport.errors import StreamError, StreamLost
from transport.stream_client import StreamClient

log = logging.getLogger("kvstream.gateway")

MAX_ATTEMPTS = 3
MAX_KNOWN_REQUESTS = 4096
CALL_TIMEOUT_S = 2.0
AVOID_S = 10.0  # as long as it takes the controller to forget a worker that is gone


class ClusterBackend:
    """See cluster/backend.py. `table` is replaced by whoever follows the controller; an old one keeps serving."""

    def __init__(self, *, chunk_tokens: int, curve: CurveKeys | None = None) -> None:
        self.table: Sequence[WorkerInfo] = ()
        self._chunk_tokens, self._curve = chunk_tokens, curve
        self._clients: dict[str, StreamClient] = {}  # by endpoint
        self._closing: set[asyncio.Task[None]] = set()
        self._in_flight: Counter[str] = Counter()
        self._lost_at: dict[str, float] = {}  # when a stream to an incarnation broke
        self._served_by: OrderedDict[str, WorkerInfo] = OrderedDict()  # by request id, for receipts

    async def generate(self, request: GenerationRequest) -> AsyncIterator[GenerationEvent]:
        """Tokens in order, then one end. A request whose worker died before its first token goes to another one."""
        error = ""
        for _ in range(MAX_ATTEMPTS):
            route = self._route(request)
            if route is None:
                break
            self._served_by[request.request_id] = route.decode
            while len(self._served_by) > MAX_KNOWN_REQUESTS:
                self._served_by.popitem(last=False)
            has_tokens = False
            self._in_flight[route.decode.id] += 1
            try:
                async with contextlib.aclosing(self._attempt(request, route)) as events:
                    async for event in events:
                        has_tokens = True
                        yield event
                return
            except StreamError as lost:
                error = str(lost)
                log.warning("%s: %s was lost: %s", request.request_id, route.decode.id, lost)
                if isinstance(lost, StreamLost):  # and not for one slow reader or one odd request
                    self._lost_at[route.decode.incarnation] = time.monotonic()
                if has_tokens:
                    message = f"The decode worker was lost after some tokens ({error}); ask again."
                    yield FailedEvent(status=502, code="worker_lost", message=message)
                    return
            finally:
                self._in_flight[route.decode.id] -= 1
        reason = f" The last error: {error}" if error else ""
        raise RequestRefused(
            f"No decode worker can be reached; try again in a few seconds.{reason}", status=503, code="no_worker"
        )

    async def metrics_text(self) -> str:
        """The workers' counters and gauges as last reported, labelled by worker."""
        lines = [
            f'kvstream_{name}{{worker="{info.id}",role="{info.role}"}} {value:g}'
            for info in self.table
            for name, value in info.stats.items()
        ]
        return "\n".join(sorted(lines)) + "\n" if lines else ""

    async def health(self) -> dict[str, Any]:
        """Whether requests can be served, and by whom."""
        usable = [info for info in self.table if not info.is_suspect and info.incarnation not in self._lost_lately()]
        status = "ok" if any(info.role == "decode" for info in usable) else "no decode worker"
        return {
            "status": status,
            "workers": {info.id: "suspect" if info not in usable else "ok" for info in self.table},
        }

    async def receipt(self, request_id: str) -> dict[str, Any] | None:
        """Asked of the worker that served the request."""
        info = self._served_by.get(request_id)
        if info is None or all(other.incarnation != info.incarnation for other in self.table):
            return None  # receipts end with the worker that keeps them
        answer = await self._call(info, {"kind": "receipt", "request_id": request_id})
        return answer.get("receipt") if answer is not None else None

    async def close(self) -> None:
        for client in self._clients.values():
            await client.close()
        await asyncio.gather(*self._closing)

    # -- inside ---------------------------------------------------------------------------------------------------

    def _route(self, request: GenerationRequest) -> Route | None:
        return choose_route(
            self.table,
            request.token_ids,
            chunk_tokens=self._chunk_tokens,
            cache_salt=request.cache_salt,
            in_flight=self._in_flight,
            avoid=self._lost_lately(),
        )

    def _lost_lately(self) -> frozenset[str]:
        """Incarnations to leave alone for a while: a dead one is out of the table by then, a cut may have healed."""
        now = time.monotonic()
        self._lost_at = {name: at for name, at in self._lost_at.items() if now - at < AVOID_S}
        return frozenset(self._lost_at)

    def _client(self, info: WorkerInfo) -> StreamClient:
        if info.endpoint not in self._clients:
            self._close_unused()
            client = StreamClient(info.endpoint, curve=self._curve, server_public_key=info.public_key)
            self._clients[info.endpoint] = client
        return self._clients[info.endpoint]

    def _close_unused(self) -> None:
        """A worker that restarts leaves its old endpoint behind, and a client is a connection and two threads."""
        current = {info.endpoint for info in self.table}
        for endpoint in [e for e, client in self._clients.items() if e not in current and not client.num_streams]:
            task = asyncio.create_task(self._clients.pop(endpoint).close())
            self._closing.add(task)
            task.add_done_callback(self._closing.discard)

    async def _attempt(self, request: GenerationRequest, route: Route) -> AsyncIterator[GenerationEvent]:
        sources = [
            {"id": found.id, "endpoint": found.endpoint, "public_key": found.public_key} for found in route.sources
        ]
        body = {"kind": "generate", "request": request.to_wire(), "sources": sources}
        async with self._client(route.decode).submit(body) as stream:
            async for answer in stream:
                if "refused" in answer:
                    raise RequestRefused(**answer["refused"])
                if "failed" in answer:
                    yield FailedEvent(**answer["failed"])
                    return
                if answer.get("tokens"):
                    yield TokensEvent(token_ids=tuple(answer["tokens"]))
                if "finished" in answer:
                    yield FinishedEvent(**answer["finished"])
                    return

    async def _call(self, info: WorkerInfo, body: dict[str, Any]) -> dict[str, Any] | None:
        try:
            return await asyncio.wait_for(self._client(info).call(body), CALL_TIMEOUT_S)
        except (StreamError, TimeoutError):
            return None
