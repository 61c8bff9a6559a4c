"""HTTP around the endpoints: request ids, keys, body limits, errors in OpenAI's form, disconnects. Plain ASGI."""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import re
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any, TypeVar

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cluster.openai_errors import APIError
from cluster.openai_schema import REQUEST_ID

log = logging.getLogger(__name__)
T = TypeVar("T")
ID_KEY = "kvstream.request_id"  # in the ASGI scope; an endpoint may replace it
TENANT_KEY = "kvstream.tenant"  # in the ASGI scope: whose key the request came with


class ClientGone(Exception):
    """The client closed the connection; there is nobody to answer."""


def to_json(value: Any) -> bytes:
    """Compact UTF-8 JSON."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")


def error_response(error: APIError) -> Response:
    """An APIError as HTTP."""
    headers = {"www-authenticate": "Bearer"} if error.status == 401 else None
    return Response(to_json(error.body()), status_code=error.status, media_type="application/json", headers=headers)


class FrontDoor:
    """Middleware: checks the key, knows by it the tenant, bounds the body, gives every request an id and echoes it."""

    def __init__(self, app: ASGIApp, *, api_keys: Mapping[str, str], max_body_bytes: int) -> None:
        self._app = app
        self._tenants = {key.encode(): tenant for key, tenant in api_keys.items()}
        self._max_body_bytes = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        given = headers.get(b"x-request-id", b"").decode("latin-1")
        scope[ID_KEY] = given if REQUEST_ID.fullmatch(given) else uuid.uuid4().hex

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"x-request-id", scope[ID_KEY].encode())]
            await send(message)

        refusal = self._too_large() if self._says_too_large(headers) else None
        if self._tenants and scope["path"] != "/health":
            tenant = self._tenant(headers)
            if tenant is None:
                message = "a valid API key is needed: send `Authorization: Bearer KEY`"
                refusal = APIError(401, message, code="invalid_api_key")
            scope[TENANT_KEY] = tenant
        if refusal is not None:
            await error_response(refusal)(scope, receive, send_with_id)
            return
        await self._app(scope, self._bounded(receive), send_with_id)

    def _tenant(self, headers: dict[bytes, bytes]) -> str | None:
        """Whose key was sent; None: nobody's. Every key is compared, so that the time taken tells nothing."""
        scheme, _, key = headers.get(b"authorization", b"").partition(b" ")
        allowed = [tenant for ours, tenant in self._tenants.items() if hmac.compare_digest(key.strip(), ours)]
        return allowed[0] if allowed and scheme.lower() == b"bearer" else None

    def _says_too_large(self, headers: dict[bytes, bytes]) -> bool:
        length = headers.get(b"content-length", b"")
        return bool(re.fullmatch(rb"\d{1,18}", length)) and int(length) > self._max_body_bytes

    def _too_large(self) -> APIError:
        return APIError(413, f"the body is larger than {self._max_body_bytes} bytes", code="body_too_large")

    def _bounded(self, receive: Receive) -> Receive:
        seen_bytes = 0

        async def bounded() -> Message:
            nonlocal seen_bytes
            message = await receive()
            seen_bytes += len(message.get("body", b""))
            if seen_bytes > self._max_body_bytes:
                raise self._too_large()
            return message

        return bounded


async def unless_client_leaves(receive: Receive, work: Awaitable[T]) -> T:
    """The result of `work`, which is cancelled as soon as the client disconnects (then raises ClientGone).

    Only for requests whose body has been read: what `receive` then has to say is the disconnect.
    """
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone
        return task.result()
    finally:
        gone.cancel()
        task.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """Server-sent events. Ends, and closes, when the client leaves or takes nothing for `stall_s`."""

    def __init__(self, events: AsyncIterator[bytes], *, close: Callable[[], Awaitable[None]], stall_s: float) -> None:
        super().__init__(
            media_type="text/event-stream", headers={"cache-control": "no-cache", "x-accel-buffering": "no"}
        )
        del self.headers["content-length"]
        self._events = events
        self._close = close
        self._stall_s = stall_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await unless_client_leaves(receive, self._send_all(send))
        except (ClientGone, TimeoutError, OSError):
            pass
        finally:
            await self._close()

    async def _send_all(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async for event in self._events:
            async with asyncio.timeout(self._stall_s):
                await send({"type": "http.response.body", "body": event, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def sse(value: Any) -> bytes:
    """One server-sent event."""
    return b"data: " + (value if isinstance(value, bytes) else to_json(value)) + b"\n\n"


async def on_http_error(request: Request, error: Exception) -> Response:
    """Unknown paths and methods, in the form of every other error."""
    assert isinstance(error, HTTPException)
    message = {
        404: f"there is no {request.url.path} here",
        405: f"{request.method} is not allowed on {request.url.path}",
    }.get(error.status_code, str(error.detail))
    return error_response(APIError(error.status_code, message, code=error.detail.lower().replace(" ", "_")))


async def on_client_gone(request: Request, error: Exception) -> Response:
    """Nobody reads this answer; the access log does."""
    return Response(status_code=499)


async def on_unexpected(request: Request, error: Exception) -> Response:
    """A bug: the details go to the log only."""
    log.error("%s %s failed", request.method, request.url.path, exc_info=error)
    return error_response(APIError(500, "internal error; the server's log has the details", code="internal_error"))
