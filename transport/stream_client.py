"""The asking end of token streams (gateway): many concurrent streams over one connection, in one asyncio loop."""

from __future__ import annotations

import asyncio
import itertools
import logging
import secrets
import time
import weakref
from collections import deque
from typing import Any

import zmq
from zmq.utils.monitor import parse_monitor_message

from transport.curve import CurveKeys, secure_client
from transport.errors import MalformedMessage, StreamError, StreamLost, StreamOverflow, StreamRefused
from transport.limits import Timing
from transport.sockets import LINGER_MS
from transport.stream_messages import (
    MAX_MESSAGE_BYTES,
    StreamMessage,
    decode_stream_message,
    encode_stream_message,
)

log = logging.getLogger("kvstream.transport")

MAX_QUEUED_EVENTS = 4096  # of one stream; a consumer that falls further behind gets StreamOverflow
WORK_BATCH = 256
_FAILED = zmq.EVENT_HANDSHAKE_FAILED_AUTH | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
_MONITORED = zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED | _FAILED


class Stream:
    """`async for body in stream`. Ends after the last event; raises StreamLost, StreamRefused or StreamOverflow.
    Leaving early (break, cancellation, aclose) cancels the request at the server."""

    def __init__(self, client: StreamClient, number: int) -> None:
        self._client, self._number = client, number
        self._events: deque[dict[str, Any]] = deque()
        self._next_seq = 0
        self._ended = False  # no more comes
        self._error: StreamError | None = None
        self._arrival = asyncio.Event()

    def __aiter__(self) -> Stream:
        return self

    async def __anext__(self) -> dict[str, Any]:
        while not self._events:
            if self._error is not None:
                raise self._error
            if self._ended:
                raise StopAsyncIteration
            self._arrival.clear()
            await self._arrival.wait()
        return self._events.popleft()

    async def aclose(self) -> None:
        self._leave()

    async def __aenter__(self) -> Stream:
        return self

    async def __aexit__(self, *exc: object) -> None:
        self._leave()

    def __del__(self) -> None:
        if not self._ended:
            self._client._cancel_from_anywhere(self._number)

    def _leave(self) -> None:
        self._events.clear()
        if not self._ended:
            self._ended = True
            self._client._cancel(self._number)

    def _end(self, error: StreamError | None) -> None:
        self._ended, self._error = True, error
        self._arrival.set()


class StreamClient:
    def __init__(
        self,
        endpoint: str,
        *,
        curve: CurveKeys | None = None,
        server_public_key: str | None = None,
        timing: Timing | None = None,
        max_queued_events: int = MAX_QUEUED_EVENTS,
    ) -> None:
        """Connects at the first submit, and anew at the first submit after a loss."""
        self.endpoint = endpoint
        self._curve, self._server_public_key = curve, server_public_key
        self._timing = timing or Timing()
        self._max_queued_events = max_queued_events
        self._name = secrets.token_hex(8)
        self._connections = itertools.count(1)
        self._numbers = itertools.count(1)
        # Weak, so that a stream whose consumer has gone is collected, and cancelled.
        self._streams: dict[int, weakref.ref[Stream]] = {}
        self._outbox: deque[bytes] = deque()
        self._context: zmq.Context | None = None
        self._socket: zmq.Socket | None = None
        self._monitor: zmq.Socket | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._beat: asyncio.TimerHandle | None = None
        self._server_incarnation: str | None = None
        self._shaken = False
        self._last_heard = 0.0

    # -- the interface, from within the event loop --

    def submit(self, body: dict[str, Any]) -> Stream:
        """Sends the request now; iterate the answer. Raises LimitExceeded for a body that is too large."""
        number = next(self._numbers)
        frame = encode_stream_message(StreamMessage(kind="SUBMIT", stream=number, body=body))
        self._connect()
        stream = Stream(self, number)
        self._streams[number] = weakref.ref(stream)
        self._post(frame)
        return stream

    async def call(self, body: dict[str, Any]) -> dict[str, Any]:
        """A stream of one event."""
        async with self.submit(body) as stream:
            async for answer in stream:
                return answer
        raise StreamLost(f"{self.endpoint} ended the call without an answer")

    @property
    def num_streams(self) -> int:
        return len(self._streams)

    async def close(self) -> None:
        self._lose(f"the client of {self.endpoint} was closed")
        context, self._context = self._context, None
        if context is not None:
            await asyncio.to_thread(context.term)  # waits for what is still to be sent, at most LINGER_MS

    # -- the connection --

    def _connect(self) -> None:
        if self._socket is not None:
            return
        self._loop = asyncio.get_running_loop()
        self._context = self._context or zmq.Context()
        socket = self._context.socket(zmq.DEALER)
        socket.linger = LINGER_MS
        socket.immediate = True
        socket.reconnect_ivl, socket.reconnect_ivl_max = 50, 500
        socket.setsockopt(zmq.MAXMSGSIZE, MAX_MESSAGE_BYTES)
        socket.identity = f"{self._name}.{next(self._connections)}".encode()
        secure_client(socket, self._curve, self._server_public_key)
        self._monitor = socket.get_monitor_socket(_MONITORED)
        socket.connect(self.endpoint)
        self._socket = socket
        self._server_incarnation, self._shaken = None, False
        self._last_heard = time.monotonic()
        for watched in (self._socket, self._monitor):
            self._loop.add_reader(watched.getsockopt(zmq.FD), self._work)
        self._tick()

    def _disconnect(self) -> None:
        if self._socket is None:
            return
        assert self._loop is not None and self._monitor is not None
        for watched in (self._socket, self._monitor):
            self._loop.remove_reader(watched.getsockopt(zmq.FD))
        if self._beat is not None:
            self._beat.cancel()
        self._socket.disable_monitor()
        self._monitor.close()
        self._socket.close()
        self._socket = self._monitor = None
        self._outbox.clear()

    def _lose(self, reason: str) -> None:
        """All streams end; the next submit connects anew."""
        streams, self._streams = self._streams, {}
        for reference in streams.values():
            stream = reference()
            if stream is not None:
                stream._end(StreamLost(reason))
        self._disconnect()

    def _tick(self) -> None:
        assert self._loop is not None
        self._work()  # what has come already counts, however late this loop is
        if self._socket is None:
            return
        if time.monotonic() - self._last_heard > self._timing.lease_s:
            return self._lose(f"no answer from {self.endpoint} for {self._timing.lease_s:g} s")
        self._post(encode_stream_message(StreamMessage(kind="PING", body={})))
        self._beat = self._loop.call_later(self._timing.heartbeat_s, self._tick)

    def _post(self, frame: bytes) -> None:
        self._outbox.append(frame)
        self._work()

    def _work(self) -> None:
        """Send and read until there is nothing more to do. ZeroMQ's descriptor tells of changes only, and any call on
        the socket may consume one: reading in vain, that of a connection which one could send on by now. So what is
        possible is asked for at the end."""
        self._watch()
        for _ in range(WORK_BATCH):
            if self._socket is None:
                return
            if self._send_one() | self._read_one() or self._socket is None:
                continue
            events = int(self._socket.getsockopt(zmq.EVENTS))
            if not (events & zmq.POLLIN or (self._outbox and events & zmq.POLLOUT)):
                return
        assert self._loop is not None
        self._loop.call_soon(self._work)  # the other tasks of this loop get their turn

    def _send_one(self) -> bool:
        assert self._socket is not None
        if not self._outbox:
            return False
        try:
            self._socket.send(self._outbox[0], zmq.NOBLOCK)
        except zmq.Again:
            if len(self._outbox) > 65536:
                self._lose(f"{self.endpoint} takes nothing")
            return False
        self._outbox.popleft()
        return True

    def _read_one(self) -> bool:
        assert self._socket is not None
        try:
            frames = self._socket.recv_multipart(zmq.NOBLOCK)
        except zmq.Again:
            return False
        try:
            if len(frames) != 1:
                raise MalformedMessage(f"{len(frames)} frames")
            message = decode_stream_message(frames[0])
        except MalformedMessage as error:
            self._lose(f"{self.endpoint} sent what is no stream message: {error}")
            return False
        self._last_heard = time.monotonic()
        self._on_message(message)
        return True

    def _watch(self) -> None:
        while self._monitor is not None:
            try:
                event = parse_monitor_message(self._monitor.recv_multipart(zmq.NOBLOCK))["event"]
            except zmq.Again:
                return
            if event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
                self._shaken = True
            elif event == zmq.EVENT_DISCONNECTED and self._shaken:
                while self._socket is not None and self._read_one():
                    pass  # what came before the end, first
                self._lose(f"the connection to {self.endpoint} was cut")
            elif event & _FAILED:
                self._lose(f"{self.endpoint} refused our key, or the two ends do not both use CURVE")

    # -- messages --

    def _on_message(self, message: StreamMessage) -> None:
        if message.kind == "PONG":
            incarnation = str(message.body.get("incarnation"))
            if self._server_incarnation not in (None, incarnation):
                return self._lose(f"{self.endpoint} was restarted")
            self._server_incarnation = incarnation
            return
        reference = self._streams.get(message.stream)
        stream = reference() if reference is not None else None
        if stream is None or stream._ended:
            return
        if message.kind == "FAILED":
            del self._streams[message.stream]
            stream._end(StreamRefused(str(message.body.get("reason"))))
        elif message.seq != stream._next_seq:
            self._give_up(message.stream, stream, StreamLost(f"events of {self.endpoint} were lost on the way"))
        elif len(stream._events) >= self._max_queued_events:
            reason = f"{len(stream._events)} events wait to be read, the limit of a stream"
            self._give_up(message.stream, stream, StreamOverflow(reason))
        else:
            stream._next_seq += 1
            stream._events.append(message.body)
            if message.last:
                del self._streams[message.stream]
                stream._end(None)
            else:
                stream._arrival.set()

    def _give_up(self, number: int, stream: Stream, error: StreamError) -> None:
        stream._events.clear()
        stream._end(error)
        self._cancel(number)

    def _cancel(self, number: int) -> None:
        if self._streams.pop(number, None) is not None and self._socket is not None:
            self._post(encode_stream_message(StreamMessage(kind="CANCEL", stream=number, body={})))

    def _cancel_from_anywhere(self, number: int) -> None:
        """From a destructor, which may run in any thread."""
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._cancel, number)
