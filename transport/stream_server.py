"""The serving end of token streams (decode worker): one thread with a ROUTER socket; send() from any thread."""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import zmq

from transport.curve import CurveKeys, ZapHandler, secure_server
from transport.errors import MalformedMessage
from transport.limits import Timing
from transport.sockets import LINGER_MS, RECV_BATCH, Waker, bind, receive
from transport.stream_messages import (
    MAX_MESSAGE_BYTES,
    StreamMessage,
    decode_stream_message,
    encode_stream_message,
)

log = logging.getLogger("kvstream.transport")

MAX_STREAMS = 4096  # of one client
MAX_CLIENTS = 1024
MAX_QUEUED_MESSAGES = 65536  # for one client that does not read; then it is given up
RETRY_S = 0.002


@dataclass(slots=True, eq=False, kw_only=True)
class _Client:
    identity: bytes
    last_heard: float
    streams: set[int] = field(default_factory=set)
    waiting: deque[bytes] = field(default_factory=deque)


@dataclass(slots=True, eq=False, kw_only=True)
class _Stream:
    client: _Client
    number: int
    next_seq: int = 0


class StreamServer:
    def __init__(
        self,
        endpoint: str,
        *,
        on_submit: Callable[[str, dict[str, Any]], None],
        on_cancel: Callable[[str], None],
        curve: CurveKeys | None = None,
        insecure: bool = False,
        timing: Timing | None = None,
    ) -> None:
        """Callbacks run in the I/O thread and must return fast; an exception in `on_submit` refuses the request with
        its text. `on_cancel` also comes when the client died. Raises BindFailed, InsecureBind."""
        self.incarnation = secrets.token_hex(8)
        self._on_submit, self._on_cancel = on_submit, on_cancel
        self._timing = timing or Timing()
        self._lock = threading.Lock()  # guards clients and streams
        self._clients: dict[bytes, _Client] = {}
        self._streams: dict[str, _Stream] = {}
        self._dirty: set[bytes] = set()  # clients with something waiting
        self._closed = False
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        try:
            self._socket.linger = LINGER_MS
            self._socket.router_mandatory = True
            self._socket.setsockopt(zmq.MAXMSGSIZE, MAX_MESSAGE_BYTES)
            self._zap = ZapHandler(self._context, curve) if curve is not None else None
            secure_server(self._socket, endpoint, curve, insecure=insecure)
            self.endpoint = bind(self._socket, endpoint)
        except BaseException:
            self._context.destroy(linger=0)
            raise
        self._waker = Waker()
        self._thread = threading.Thread(target=self._run, name="stream-server", daemon=True)
        self._thread.start()

    # -- calls from any thread --

    def send(self, stream_id: str, body: dict[str, Any], last: bool = False) -> bool:
        """Queue one event; False if the stream has ended (cancelled, client gone): stop working for it."""
        return self._put(stream_id, "EVENT", body, last)

    def refuse(self, stream_id: str, reason: str) -> bool:
        """End the stream with an error: the client raises StreamRefused(reason)."""
        return self._put(stream_id, "FAILED", {"reason": reason[:4096]}, True)

    @property
    def num_streams(self) -> int:
        with self._lock:
            return len(self._streams)

    def shutdown(self) -> None:
        """Open streams end with StreamRefused at the client; what was queued is flushed for at most LINGER_MS."""
        for stream_id in list(self._streams):
            self.refuse(stream_id, "the server shut down")
        self._closed = True
        self._waker.wake()
        if threading.current_thread() is not self._thread:
            self._thread.join(timeout=5)

    def _put(self, stream_id: str, kind: Any, body: dict[str, Any], last: bool) -> bool:
        with self._lock:
            stream = self._streams.get(stream_id)
            if stream is None:
                return False
            message = StreamMessage(kind=kind, stream=stream.number, seq=stream.next_seq, last=last, body=body)
            stream.client.waiting.append(encode_stream_message(message))
            self._dirty.add(stream.client.identity)
            stream.next_seq += 1
            if last:
                self._forget(stream_id, stream)
        if threading.current_thread() is not self._thread:
            self._waker.wake()
        return True

    def _forget(self, stream_id: str, stream: _Stream) -> None:
        del self._streams[stream_id]
        stream.client.streams.discard(stream.number)

    # -- the thread --

    def _run(self) -> None:
        poller = zmq.Poller()
        poller.register(self._waker.fd, zmq.POLLIN)
        poller.register(self._socket, zmq.POLLIN)
        if self._zap is not None:
            poller.register(self._zap.socket, zmq.POLLIN)
        stuck = False
        next_check = time.monotonic()
        while not self._closed:
            for ready, _ in poller.poll(1000 * (RETRY_S if stuck else self._timing.heartbeat_s)):
                if ready == self._waker.fd:
                    self._waker.clear()
                elif ready is self._socket:
                    self._read()
                elif self._zap is not None:
                    self._zap.answer()
            stuck = self._flush()
            if time.monotonic() >= next_check:
                next_check = time.monotonic() + self._timing.heartbeat_s
                self._reap()
        self._flush()
        if self._zap is not None:
            self._zap.close()
        self._socket.close()
        self._waker.close()
        self._context.term()

    def _flush(self) -> bool:
        """True if some client's pipe is full."""
        with self._lock:
            dirty, self._dirty = self._dirty, set()
        stuck = False
        for identity in dirty:
            client = self._clients.get(identity)
            if client is None:
                continue
            try:
                while client.waiting:
                    self._socket.send_multipart([identity, client.waiting[0]], zmq.NOBLOCK)
                    client.waiting.popleft()
            except zmq.Again:
                if len(client.waiting) > MAX_QUEUED_MESSAGES:
                    self._drop(client, "reads too slowly")
                else:
                    stuck = True
                    with self._lock:
                        self._dirty.add(identity)
            except zmq.ZMQError as error:
                self._drop(client, f"is gone: {error.strerror}")
        return stuck

    def _read(self) -> None:
        for _ in range(RECV_BATCH):
            try:
                frames = receive(self._socket, max_frames=2)
                if len(frames) != 2:
                    raise MalformedMessage(f"{len(frames) - 1} frames")
                self._on_message(bytes(frames[0]), decode_stream_message(bytes(frames[1])))
            except zmq.Again:
                return
            except MalformedMessage as error:
                log.warning("dropped a stream message: %s", error)

    def _on_message(self, identity: bytes, message: StreamMessage) -> None:
        client = self._clients.get(identity)
        if client is None:
            if len(self._clients) >= MAX_CLIENTS:
                return
            client = _Client(identity=identity, last_heard=0.0)
            with self._lock:
                self._clients[identity] = client
        client.last_heard = time.monotonic()
        stream_id = f"{identity.decode('latin-1')}/{message.stream}"
        if message.kind == "PING":
            pong = StreamMessage(kind="PONG", body={"incarnation": self.incarnation})
            self._answer(client, pong)
        elif message.kind == "SUBMIT":
            self._submit(client, stream_id, message)
        elif message.kind == "CANCEL":
            with self._lock:
                stream = self._streams.get(stream_id)
                if stream is not None:
                    self._forget(stream_id, stream)
            if stream is not None:
                self._call(self._on_cancel, stream_id)

    def _submit(self, client: _Client, stream_id: str, message: StreamMessage) -> None:
        with self._lock:
            if stream_id in self._streams:
                return
            if len(client.streams) < MAX_STREAMS:
                self._streams[stream_id] = _Stream(client=client, number=message.stream)
                client.streams.add(message.stream)
        if stream_id not in self._streams:
            reason = f"{MAX_STREAMS} streams are open, the limit per client"
            body = {"reason": reason}
            failed = StreamMessage(kind="FAILED", stream=message.stream, last=True, body=body)
            return self._answer(client, failed)
        try:
            self._on_submit(stream_id, message.body)
        except Exception as error:
            log.error("on_submit failed", exc_info=True)
            self.refuse(stream_id, f"{type(error).__name__}: {error}")

    def _answer(self, client: _Client, message: StreamMessage) -> None:
        with self._lock:
            client.waiting.append(encode_stream_message(message))
            self._dirty.add(client.identity)

    def _reap(self) -> None:
        for client in list(self._clients.values()):
            # A ping of our own makes a dead client show itself as an unknown route.
            self._answer(client, StreamMessage(kind="PONG", body={"incarnation": self.incarnation}))
            if time.monotonic() - client.last_heard > self._timing.lease_s:
                self._drop(client, "is silent")

    def _drop(self, client: _Client, why: str) -> None:
        with self._lock:
            self._clients.pop(client.identity, None)
            ended = [f"{client.identity.decode('latin-1')}/{number}" for number in client.streams]
            for stream_id in ended:
                self._streams.pop(stream_id, None)
        if ended:
            log.warning("client %r %s: %d streams cancelled", client.identity, why, len(ended))
        for stream_id in ended:
            self._call(self._on_cancel, stream_id)

    def _call(self, callback: Callable[[str], None], stream_id: str) -> None:
        try:
            callback(stream_id)
        except Exception:
            log.error("callback failed for stream %s", stream_id, exc_info=True)
