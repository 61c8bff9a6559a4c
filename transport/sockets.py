"""What both ends' I/O threads share: socket options, frame by frame reading, a wake-up, a bind that explains itself."""

from __future__ import annotations

import contextlib
import socket as pysocket
import time
from collections.abc import Callable

import zmq

from transport.errors import BindFailed, MalformedMessage
from transport.limits import Limits
from transport.messages import Buffer

LINGER_MS = 500  # long enough for a goodbye; never −1 (hangs on a dead peer) or 0 (drops it)
SEND_HWM = 256  # messages; the credit window bounds the bytes, this bounds a bug
RECV_BATCH = 64  # messages read from one socket before the others get their turn


def configure(socket: zmq.Socket, limits: Limits) -> None:
    # The kernel's buffers stay as the kernel tunes them: the credit window bounds what we commit, and small fixed
    # buffers would cap a long link (256 KB over 50 ms is 40 Mbit/s).
    socket.linger = LINGER_MS
    socket.sndhwm = SEND_HWM
    socket.rcvhwm = SEND_HWM
    socket.setsockopt(zmq.MAXMSGSIZE, max(limits.body_bytes, limits.part_bytes, limits.header_bytes))
    socket.setsockopt(zmq.TCP_KEEPALIVE, 1)


def bind(socket: zmq.Socket, endpoint: str) -> str:
    """The endpoint in fact bound (port 0 or * becomes a number)."""
    try:
        socket.bind(endpoint)
    except zmq.ZMQError as error:
        raise BindFailed(f"cannot bind {endpoint}: {error.strerror}; is another process on this port?") from None
    return socket.getsockopt_string(zmq.LAST_ENDPOINT)


def receive(socket: zmq.Socket, max_frames: int) -> list[Buffer]:
    """One message; large frames are not copied. Raises zmq.Again when there is none, MalformedMessage (after the
    message is read to its end) when it has too many frames."""
    frames: list[Buffer] = [socket.recv(zmq.NOBLOCK)]
    excess = 0
    while socket.getsockopt(zmq.RCVMORE):
        frame = socket.recv(copy=False)
        if len(frames) < max_frames:
            frames.append(frame.buffer)
        else:
            excess += 1
    if excess:
        raise MalformedMessage(f"a message of {max_frames + excess} frames")
    return frames


class Waker:
    """Lets any thread wake a poller. The poller watches `fd` and calls clear() before it looks for work."""

    def __init__(self) -> None:
        self._reader, self._writer = pysocket.socketpair()
        self._reader.setblocking(False)
        self._writer.setblocking(False)
        self.fd = self._reader.fileno()

    def wake(self) -> None:
        with contextlib.suppress(OSError):  # full: it will wake anyway; closed: nobody is left to wake
            self._writer.send(b"\0")

    def clear(self) -> None:
        with contextlib.suppress(OSError):
            while self._reader.recv(4096):
                pass

    def close(self) -> None:
        self._reader.close()
        self._writer.close()


def guarded(callback: Callable[[object], None], log: Callable[..., None]) -> Callable[[object], None]:
    """An owner's callback that cannot kill the I/O thread, nor fill the log: one traceback a second at most."""
    logged_at = float("-inf")

    def call(event: object) -> None:
        nonlocal logged_at
        try:
            callback(event)
        except Exception:
            if time.monotonic() - logged_at >= 1.0:
                logged_at = time.monotonic()
                log("on_event failed for %s", type(event).__name__, exc_info=True)

    return call
