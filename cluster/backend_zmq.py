"""The gateway's backend over real workers: routes, submits over ZeroMQ streams, retries what died early."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

from cluster.membership import WorkerInfo
from cluster.prefix_index import Coverage
from cluster.prefix_lookup import PrefixLookup
from cluster.routing import Route, choose_route, way_of
from cluster.sent_ledger import SentLedger
from decode.answers import read_answer
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
MAX_KNOWN_REQUESTS = MAX_KNOWN_GROUPS = 4096
CALL_TIMEOUT_S = 2.0
AVOID_S = 10.0  # as long as it takes the controller to forget a worker that is gone


class ClusterBackend:
    """See cluster/backend.py. `table` is replaced by whoever follows the controller; an old one keeps serving.
    `lookup`: the prefix index; without one, prompts go to the prefill workers that own them by hash."""

    def __init__(self, *, chunk_tokens: int, curve: CurveKeys | None = None) -> None:
        self._table: Sequence[WorkerInfo] = ()
        self.lookup: PrefixLookup | None = None
        self._chunk_tokens, self._curve = chunk_tokens, curve
        self._clients: dict[str, StreamClient] = {}  # by endpoint
        self._closing: set[asyncio.Task[None]] = set()
        self._sent = SentLedger()
        self._group_at: OrderedDict[str, str] = OrderedDict()  # by group, the incarnation that has it
        self._lost_at: dict[str, float] = {}  # when a stream to an incarnation broke
        self._served_by: OrderedDict[str, WorkerInfo] = OrderedDict()  # by request id, for receipts

    @property
    def table(self) -> Sequence[WorkerInfo]:
        return self._table

    @table.setter
    def table(self, table: Sequence[WorkerInfo]) -> None:
        self._table = table
        self._sent.follow(table, time.monotonic())

    async def generate(self, request: GenerationRequest) -> AsyncIterator[GenerationEvent]:
        """Tokens in order, then one end. A request whose worker died before its first token goes to another one."""
        error, refusal = "", None
        refusing: frozenset[str] = frozenset()
        holders = await self._holders(request)
        for _ in range(MAX_ATTEMPTS):
            route = self._route(request, holders, refusing)
            if route is None:
                break
            _remember(self._served_by, request.request_id, route.decode, MAX_KNOWN_REQUESTS)
            number, has_tokens = self._note(route), False
            try:
                async with contextlib.aclosing(self._attempt(request, route)) as events:
                    async for event in events:
                        if not has_tokens and isinstance(event, TokensEvent):
                            has_tokens = True
                            self._sent.first_token(number)
                        yield event
                return
            except RequestRefused as refused:
                if route.decode.companion_of is None:
                    raise
                # Its pages are fewer than a decode worker's, which may take what it cannot.
                refusal = refused
                refusing = frozenset(info.incarnation for info in self.table if info.companion_of is not None)
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
                self._sent.ended(number, time.monotonic())
        if refusal is not None and not error:
            raise refusal
        reason = f" The last error: {error}" if error else ""
        raise RequestRefused(
            f"No decode worker can be reached; try again in a few seconds.{reason}", status=503, code="no_worker"
        )

    async def metrics_text(self) -> str:
        """The workers' counters and gauges as last reported, labelled by worker. One that is reported as
        NAME;LABEL=VALUE has that label too."""
        lines = []
        for info in self.table:
            for stat, value in info.stats.items():
                name, *labels = stat.split(";")
                more = "".join(f',{label}="{text}"' for label, text in (item.split("=") for item in labels))
                lines.append(f'kvstream_{name}{{worker="{info.id}",role="{info.role}"{more}}} {_exactly(value)}')
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

    async def _holders(self, request: GenerationRequest) -> Mapping[str, Coverage]:
        if self.lookup is None or way_of(request) == "compute":
            return {}
        return await self.lookup.holders(request.token_ids, request.cache_salt)

    def _route(
        self, request: GenerationRequest, holders: Mapping[str, Coverage], refusing: frozenset[str]
    ) -> Route | None:
        route = choose_route(
            self.table,
            request.token_ids,
            chunk_tokens=self._chunk_tokens,
            cache_salt=request.cache_salt,
            in_flight=self._sent.in_flight(),
            avoid=self._lost_lately() | refusing,
            holders=holders,
            pending=self._sent.pending(time.monotonic()),
            way=way_of(request),
            prefer=self._group_at.get(request.group),
            max_tokens=request.sampling.max_tokens,
        )
        if route is not None and request.group:
            _remember(self._group_at, request.group, route.decode.incarnation, MAX_KNOWN_GROUPS)
        return route

    def _note(self, route: Route) -> int:
        tokens = {route.decode.id: route.decode_tokens}
        if route.prefill_tokens:
            tokens[route.sources[0].id] = route.prefill_tokens
        return self._sent.send(route.decode.id, tokens, time.monotonic())

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
        sources = [source.to_wire() for source in route.sources]
        body = {"kind": "generate", "request": request.to_wire(), "sources": sources}
        async with self._client(route.decode).submit(body) as stream:
            async for answer in stream:
                for event in read_answer(answer):
                    yield event
                    if isinstance(event, FailedEvent | FinishedEvent):
                        return

    async def _call(self, info: WorkerInfo, body: dict[str, Any]) -> dict[str, Any] | None:
        try:
            return await asyncio.wait_for(self._client(info).call(body), CALL_TIMEOUT_S)
        except (StreamError, TimeoutError):
            return None


def _remember(known: OrderedDict[str, Any], key: str, value: Any, limit: int) -> None:
    known[key] = value
    while len(known) > limit:
        known.popitem(last=False)


def _exactly(value: float) -> str:
    """In all its digits: of a counter with six, rates come out as nothing and then as jumps."""
    return repr(float(value)).removesuffix(".0")
