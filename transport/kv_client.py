"""The receiver's shell: one thread with a ZeroMQ socket per link, around the pure Sink.

Calls from any thread run the machine under a lock and leave their commands to the thread, which carries them out in
order; what arrives goes the same way. Nothing here decides.
"""

from __future__ import annotations

import itertools
import logging
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import zmq
from zmq.utils.monitor import parse_monitor_message

from transport.curve import CurveKeys, secure_client
from transport.errors import MalformedMessage, TooMuch, TransportClosed
from transport.events import TransferEvent
from transport.limits import Limits, Pacing, Timing
from transport.messages import Buffer, Greeting
from transport.sink import Sink
from transport.sink_io import (
    CloseTransfer,
    Command,
    Connect,
    Disconnect,
    LinkDown,
    Notify,
    OpenTransfer,
    Received,
    RequestChunk,
    Send,
    Shutdown,
    SinkInput,
    Tick,
    WithdrawChunk,
)
from transport.sink_link import LinkStats
from transport.sockets import RECV_BATCH, Waker, configure, guarded, receive
from transport.wire import decode_packet, encode_packet, pack_body

log = logging.getLogger("kvstream.transport")

_MONITORED = (
    zmq.EVENT_HANDSHAKE_SUCCEEDED
    | zmq.EVENT_HANDSHAKE_FAILED_AUTH
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    | zmq.EVENT_DISCONNECTED
)


@dataclass(slots=True, kw_only=True, eq=False)
class _Wire:
    name: str
    endpoint: str
    socket: zmq.Socket
    monitor: zmq.Socket
    waiting: deque[list[Buffer]] = field(default_factory=deque)  # the socket was full
    shaken: bool = False


class KVClient:
    def __init__(
        self,
        *,
        greeting: Greeting,
        on_event: Callable[[TransferEvent], None],
        incarnation: str,
        curve: CurveKeys | None = None,
        limits: Limits | None = None,
        timing: Timing | None = None,
        pacing: Pacing | None = None,
    ) -> None:
        """`on_event` runs in the I/O thread and must return fast. A random tail makes the incarnation unique."""
        self.incarnation = f"{incarnation[:64]}-{secrets.token_hex(4)}"
        self._limits = limits or Limits()
        self._timing = timing or Timing()
        self._curve = curve
        self._on_event = guarded(on_event, log.error)  # type: ignore[arg-type]
        self._sink = Sink(
            greeting=greeting,
            incarnation=self.incarnation,
            limits=self._limits,
            timing=self._timing,
            pacing=pacing,
        )
        self._lock = threading.Lock()  # guards the machine and the order of its commands
        self._pending: deque[Command] = deque()
        self._closed = False
        self._ids = itertools.count(1)
        self._waker = Waker()
        self._context = zmq.Context()
        self._poller = zmq.Poller()
        self._poller.register(self._waker.fd, zmq.POLLIN)
        self._wires: dict[str, _Wire] = {}
        self._by_socket: dict[zmq.Socket, tuple[_Wire, bool]] = {}  # -> (wire, is its monitor)
        self._thread = threading.Thread(target=self._run, name="kv-client", daemon=True)
        self._thread.start()

    # -- calls from any thread --

    def open(self, endpoint: str, body: dict[str, Any], *, server_public_key: str | None = None) -> str:
        """Returns the transfer's id at once; Opened, Refused or TransferLost follows. Requests need not wait."""
        size = len(pack_body(body))
        if size > self._limits.body_bytes:
            raise TooMuch(f"the body has {size} bytes, the limit is {self._limits.body_bytes}")
        transfer_id = f"{self.incarnation}.{next(self._ids)}"
        event = OpenTransfer(transfer_id=transfer_id, endpoint=endpoint, body=body, server_public_key=server_public_key)
        self._do(event)
        return transfer_id

    def request(self, transfer_id: str, chunk: int, level: str, *, priority: int = 0) -> None:
        """A standing request; a lower priority (0 or more) is sooner. Again with another level: amends it until the
        source has taken it; with another priority: as long as any of it is unsent."""
        if chunk < 0 or not 0 < len(level) <= self._limits.level_chars or not 0 <= priority < 2**53:
            raise ValueError(f"no chunk {chunk} at level {level!r} with priority {priority}")
        self._do(RequestChunk(transfer_id=transfer_id, chunk=chunk, level=level, priority=priority))

    def withdraw(self, transfer_id: str, chunk: int) -> None:
        self._do(WithdrawChunk(transfer_id=transfer_id, chunk=chunk))

    def close(self, transfer_id: str, reason: str = "closed by the receiver") -> None:
        """Ends the transfer; no event of it follows, save one that is being delivered now. Twice is fine."""
        self._do(CloseTransfer(transfer_id=transfer_id, reason=reason[: self._limits.reason_chars]))

    def link_stats(self) -> list[LinkStats]:
        with self._lock:
            return self._sink.link_stats()

    @property
    def num_transfers(self) -> int:
        with self._lock:
            return self._sink.num_transfers

    def check_integrity(self) -> None:
        with self._lock:
            self._sink.check_integrity()

    def shutdown(self) -> None:
        """Says goodbye to all sources; TransferLost comes for what was open. Returns when the thread has ended."""
        with self._lock:
            if not self._closed:
                self._closed = True
                self._pending.extend(self._sink.handle(Shutdown(), time.monotonic()))
        self._waker.wake()
        if threading.current_thread() is not self._thread:
            self._thread.join(timeout=5)

    def _do(self, event: SinkInput) -> None:
        with self._lock:
            if self._closed:
                raise TransportClosed("this KVClient was shut down")
            self._pending.extend(self._sink.handle(event, time.monotonic()))
        self._waker.wake()

    # -- the thread --

    def _run(self) -> None:
        tick_s = self._timing.heartbeat_s / 2
        next_tick = time.monotonic() + tick_s
        while True:
            self._carry_out()
            if self._closed and not self._pending:
                break
            timeout_s = max(0.0, next_tick - time.monotonic())
            for ready, flags in self._poller.poll(timeout_s * 1000 + 1):
                if ready == self._waker.fd:
                    self._waker.clear()
                elif ready in self._by_socket:
                    self._on_ready(ready, flags)
            if time.monotonic() >= next_tick:
                next_tick = time.monotonic() + tick_s
                self._feed(Tick(), time.monotonic())
        for wire in list(self._wires.values()):
            self._disconnect(wire)
        self._waker.close()
        self._context.term()

    def _feed(self, event: SinkInput, now: float) -> None:
        with self._lock:
            if not self._closed:
                self._pending.extend(self._sink.handle(event, now))
        self._carry_out()

    def _carry_out(self) -> None:
        while self._pending:
            command = self._pending.popleft()
            if type(command) is Notify:
                self._on_event(command.event)
            elif type(command) is Send:
                wire = self._wires.get(command.link)
                if wire is not None:
                    wire.waiting.append(encode_packet(command.packet))
                    self._flush(wire)
            elif type(command) is Connect:
                self._connect(command)
            elif type(command) is Disconnect and command.link in self._wires:
                self._disconnect(self._wires[command.link])

    def _connect(self, command: Connect) -> None:
        socket = self._context.socket(zmq.DEALER)
        configure(socket, self._limits)
        socket.identity = command.link.encode()
        socket.immediate = True  # nothing is queued for a peer that is not there
        socket.reconnect_ivl = 50
        socket.reconnect_ivl_max = 500
        try:
            secure_client(socket, self._curve, command.server_public_key)
            monitor = socket.get_monitor_socket(_MONITORED)
            socket.connect(command.endpoint)
        except (zmq.ZMQError, ValueError) as error:
            socket.close()
            return self._fail_link(command.link, f"cannot connect to {command.endpoint}: {error}")
        wire = _Wire(name=command.link, endpoint=command.endpoint, socket=socket, monitor=monitor)
        self._wires[wire.name] = wire
        self._by_socket[socket] = (wire, False)
        self._by_socket[monitor] = (wire, True)
        self._poller.register(socket, zmq.POLLIN)
        self._poller.register(monitor, zmq.POLLIN)

    def _fail_link(self, link: str, reason: str) -> None:
        with self._lock:
            if not self._closed:
                self._pending.extend(self._sink.handle(LinkDown(link=link, reason=reason), time.monotonic()))

    def _disconnect(self, wire: _Wire) -> None:
        del self._wires[wire.name], self._by_socket[wire.socket], self._by_socket[wire.monitor]
        self._poller.unregister(wire.socket)
        self._poller.unregister(wire.monitor)
        wire.socket.disable_monitor()
        wire.monitor.close()
        wire.socket.close()

    def _flush(self, wire: _Wire) -> None:
        try:
            while wire.waiting:
                wire.socket.send_multipart(wire.waiting[0], zmq.NOBLOCK, copy=False)
                wire.waiting.popleft()
            flags = zmq.POLLIN
        except zmq.Again:
            flags = zmq.POLLIN | zmq.POLLOUT
        self._poller.modify(wire.socket, flags)

    def _on_ready(self, ready: zmq.Socket, flags: int) -> None:
        wire, is_monitor = self._by_socket[ready]
        if is_monitor:
            return self._on_monitor(wire)
        if flags & zmq.POLLOUT:
            self._flush(wire)
        if flags & zmq.POLLIN:
            self._read(wire)

    def _read(self, wire: _Wire) -> None:
        for _ in range(RECV_BATCH):
            if wire.name not in self._wires:
                return  # ended by what was read
            try:
                frames = receive(wire.socket, max_frames=2)
                at = time.monotonic()
                packet = decode_packet(frames, self._limits)
            except zmq.Again:
                return
            except MalformedMessage as error:
                # Its number is now missing from the sequence, so the next good message ends the session.
                log.warning("dropped a message from %s: %s", wire.endpoint, error)
                continue
            self._feed(Received(link=wire.name, packet=packet), at)

    def _on_monitor(self, wire: _Wire) -> None:
        event = parse_monitor_message(wire.monitor.recv_multipart())["event"]
        if event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
            wire.shaken = True
        elif event == zmq.EVENT_DISCONNECTED and wire.shaken:
            self._read(wire)  # what came before the end, first
            reason = f"the connection to {wire.endpoint} was cut"
            self._feed(LinkDown(link=wire.name, reason=reason), time.monotonic())
        elif event in (zmq.EVENT_HANDSHAKE_FAILED_AUTH, zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL):
            reason = f"{wire.endpoint} refused our key, or the two ends do not both use CURVE"
            self._feed(LinkDown(link=wire.name, reason=reason), time.monotonic())
        # Anything else before the handshake: the source may be starting; ZeroMQ tries again until the lease is over.
