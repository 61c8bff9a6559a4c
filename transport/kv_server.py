"""The source's shell: one thread with a ZeroMQ ROUTER socket, around the pure Source.

Calls from any thread run the machine under a lock and leave their commands to the thread, which carries them out in
order; what arrives goes the same way. Nothing here decides.
"""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any

import zmq

from transport.curve import CurveKeys, ZapHandler, secure_server
from transport.errors import MalformedMessage, TooMuch, TransportClosed
from transport.events import SourceEvent
from transport.limits import Limits, Timing
from transport.messages import Buffer, Greeting
from transport.sockets import RECV_BATCH, Waker, bind, configure, guarded, receive
from transport.source import Source
from transport.source_io import (
    AcceptTransfer,
    Command,
    EndTransfer,
    FailChunk,
    Forget,
    Notify,
    PeerGone,
    Received,
    Send,
    Shutdown,
    SourceInput,
    SupplyChunk,
    Tick,
)
from transport.wire import decode_packet, encode_packet, pack_body

log = logging.getLogger("kvstream.transport")

RETRY_S = 0.002  # a ROUTER cannot say when a full peer has room again


class KVServer:
    def __init__(
        self,
        endpoint: str,
        *,
        greeting: Greeting,
        incarnation: str,
        on_event: Callable[[SourceEvent], None],
        curve: CurveKeys | None = None,
        insecure: bool = False,
        limits: Limits | None = None,
        timing: Timing | None = None,
    ) -> None:
        """Binds to e.g. tcp://127.0.0.1:0; `endpoint` then tells the port. `on_event` runs in the I/O thread and must
        return fast. Raises BindFailed, InsecureBind."""
        self.incarnation = f"{incarnation[:64]}-{secrets.token_hex(4)}"
        self._limits = limits or Limits()
        self._timing = timing or Timing()
        self._on_event = guarded(on_event, log.error)  # type: ignore[arg-type]
        self._source = Source(greeting=greeting, incarnation=self.incarnation, limits=self._limits, timing=self._timing)
        self._lock = threading.Lock()  # guards the machine and the order of its commands
        self._pending: deque[Command] = deque()
        self._waiting: dict[bytes, deque[list[Buffer]]] = {}  # peers whose pipe was full
        self._closed = False
        self.num_malformed = 0
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        try:
            configure(self._socket, self._limits)
            self._socket.router_mandatory = True  # else a full or unknown peer loses messages silently
            self._zap = ZapHandler(self._context, curve) if curve is not None else None
            secure_server(self._socket, endpoint, curve, insecure=insecure)
            self.endpoint = bind(self._socket, endpoint)
        except BaseException:
            self._context.destroy(linger=0)
            raise
        self._waker = Waker()
        self._poller = zmq.Poller()
        self._poller.register(self._waker.fd, zmq.POLLIN)
        self._poller.register(self._socket, zmq.POLLIN)
        if self._zap is not None:
            self._poller.register(self._zap.socket, zmq.POLLIN)
        self._thread = threading.Thread(target=self._run, name="kv-server", daemon=True)
        self._thread.start()

    # -- calls from any thread; a transfer that has ended meanwhile is no error --

    def accept(self, transfer_id: str, body: dict[str, Any] | None = None) -> None:
        size = len(pack_body(body or {}))
        if size > self._limits.body_bytes:
            raise TooMuch(f"the body has {size} bytes, the limit is {self._limits.body_bytes}")
        self._do(AcceptTransfer(transfer_id=transfer_id, body=body or {}))

    def refuse(self, transfer_id: str, reason: str) -> None:
        self._do(EndTransfer(transfer_id=transfer_id, reason=reason))

    def end(self, transfer_id: str, reason: str) -> None:
        """Ends an accepted transfer: the receiver is told TransferLost with this reason."""
        self._do(EndTransfer(transfer_id=transfer_id, reason=reason))

    def take(self, transfer_id: str, chunk: int) -> str | None:
        """The level to encode this chunk at, now; after this it cannot be amended. None: withdrawn, closed or taken."""
        with self._lock:
            return self._source.take(transfer_id, chunk)

    def supply(self, transfer_id: str, chunk: int, level: str, blob: Buffer) -> None:
        """The encoded chunk. It is sent from where it lies: do not change it afterwards."""
        self._do(SupplyChunk(transfer_id=transfer_id, chunk=chunk, level=level, blob=blob))

    def fail(self, transfer_id: str, chunk: int, reason: str) -> None:
        self._do(FailChunk(transfer_id=transfer_id, chunk=chunk, reason=reason))

    def backlog_bytes(self, transfer_id: str) -> int:
        with self._lock:
            return self._source.backlog_bytes(transfer_id)

    @property
    def num_transfers(self) -> int:
        with self._lock:
            return self._source.num_transfers

    def check_integrity(self) -> None:
        with self._lock:
            self._source.check_integrity()

    def shutdown(self, reason: str = "the source shut down") -> None:
        """Says goodbye to all receivers; TransferClosed comes for what was open. Returns when the thread has ended."""
        with self._lock:
            if not self._closed:
                self._closed = True
                self._pending.extend(self._source.handle(Shutdown(reason=reason), time.monotonic()))
        self._waker.wake()
        if threading.current_thread() is not self._thread:
            self._thread.join(timeout=5)

    def _do(self, event: SourceInput) -> None:
        with self._lock:
            if self._closed:
                raise TransportClosed("this KVServer was shut down")
            self._pending.extend(self._source.handle(event, time.monotonic()))
        self._waker.wake()

    # -- the thread --

    def _run(self) -> None:
        tick_s = self._timing.heartbeat_s / 2
        next_tick = time.monotonic() + tick_s
        while True:
            self._carry_out()
            if self._closed and not self._pending:
                break
            timeout_s = RETRY_S if self._waiting else max(0.0, next_tick - time.monotonic())
            for ready, _ in self._poller.poll(timeout_s * 1000 + 1):
                if ready == self._waker.fd:
                    self._waker.clear()
                elif ready is self._socket:
                    self._read()
                elif self._zap is not None:
                    self._zap.answer()
            for peer in list(self._waiting):
                self._flush(peer)
            if time.monotonic() >= next_tick:
                next_tick = time.monotonic() + tick_s
                self._feed(Tick(), time.monotonic())
        if self._zap is not None:
            self._zap.close()
        self._socket.close()
        self._waker.close()
        self._context.term()

    def _feed(self, event: SourceInput, now: float) -> None:
        with self._lock:
            if not self._closed:
                self._pending.extend(self._source.handle(event, now))
        self._carry_out()

    def _carry_out(self) -> None:
        while self._pending:
            command = self._pending.popleft()
            if type(command) is Notify:
                self._on_event(command.event)
            elif type(command) is Send:
                self._send(command.peer.encode("latin-1"), encode_packet(command.packet))
            elif type(command) is Forget:
                self._waiting.pop(command.peer.encode("latin-1"), None)

    def _send(self, peer: bytes, frames: list[Buffer]) -> None:
        waiting = self._waiting.setdefault(peer, deque())
        waiting.append(frames)
        self._flush(peer)

    def _flush(self, peer: bytes) -> None:
        waiting = self._waiting[peer]
        try:
            while waiting:
                self._socket.send_multipart([peer, *waiting[0]], zmq.NOBLOCK, copy=False)
                waiting.popleft()
            del self._waiting[peer]
        except zmq.Again:
            pass
        except zmq.ZMQError as error:
            del self._waiting[peer]
            gone = PeerGone(peer=peer.decode("latin-1"), reason=f"the receiver is gone: {error.strerror}")
            with self._lock:
                if not self._closed:
                    self._pending.extend(self._source.handle(gone, time.monotonic()))

    def _read(self) -> None:
        for _ in range(RECV_BATCH):
            try:
                frames = receive(self._socket, max_frames=3)
                at = time.monotonic()
                packet = decode_packet(frames[1:], self._limits)
            except zmq.Again:
                return
            except MalformedMessage as error:
                self.num_malformed += 1
                log.warning("dropped a message: %s", error)
                continue
            peer = bytes(frames[0]).decode("latin-1")
            self._feed(Received(peer=peer, packet=packet), at)
