"""The proxy inside transport/shaper.py: token buckets, pumps, a delay line. Imports nothing of ours.

One bucket per direction is shared by all connections, as a link is. Little is hoarded: small kernel buffers and reads
of a few milliseconds, so the sender feels the rate as back-pressure.
"""

from __future__ import annotations

import array
import asyncio
import contextlib
import fcntl
import json
import math
import socket
import termios
import time
from collections import deque

READ_BYTES = 64 * 1024  # held per connection and direction, unless READ_S at a fast rate is more
UNLIMITED_READ_BYTES = 1024 * 1024
READ_S = 0.004  # a read takes at most about this long on the link, so that a change of rate is felt at once
BURST_S = 0.002  # after idleness: next to nothing, so that a small blob does not seem to meet a faster link
LATE_S = 0.05  # while data waits: what a busy processor may cost this process before the rate suffers
MIN_BURST_BYTES, MAX_BURST_BYTES = 3 * 1024, 64 * 1024
SHORTEST_SLEEP_S = 0.002  # shorter ones are saved up: the event loop's own clock ticks in milliseconds
BUFFER_BYTES = 64 * 1024  # SO_SNDBUF and SO_RCVBUF; the kernel doubles it


def parse_rate(value: object) -> float:
    """Bits per second from Mbit/s; 0 and "inf" mean no limit."""
    rate_mbps = float(value)  # type: ignore[arg-type]
    if math.isnan(rate_mbps) or rate_mbps < 0:
        raise ValueError(f"rate_mbps must be 0 (no limit) or more, not {value!r}")
    return math.inf if rate_mbps == 0 else rate_mbps * 1e6


class Bucket:
    """The time at which the link is free again, with a burst allowed after idleness."""

    def __init__(self) -> None:
        self.free_at = 0.0
        self.carried_bytes = 0

    def reserve(self, num_bytes: int, rate_bps: float, now: float, *, waiting: bool = False) -> float:
        """Seconds to wait before these bytes may go on. `waiting`: they lay there already, so the link was not idle
        and time that has passed since it was free is ours to catch up."""
        self.carried_bytes += num_bytes
        if rate_bps == math.inf:
            self.free_at = now
            return 0.0
        per_second = rate_bps / 8
        burst_bytes = min(MAX_BURST_BYTES, max(MIN_BURST_BYTES, per_second * BURST_S))
        allowance_s = max(LATE_S if waiting else 0.0, burst_bytes / per_second)
        start = max(self.free_at, now - allowance_s)
        self.free_at = start + num_bytes * 8 / rate_bps
        return max(0.0, self.free_at - now)


def lies_there(end: socket.socket) -> bool:
    """Whether bytes wait to be read."""
    count = array.array("i", [0])
    fcntl.ioctl(end.fileno(), termios.FIONREAD, count)
    return count[0] > 0


class Proxy:
    def __init__(self, target: tuple[str, int], rate_bps: float, delay_s: float) -> None:
        self.target = target
        self.rate_bps = rate_bps
        self.delay_s = delay_s
        self.up, self.down = Bucket(), Bucket()
        self._turns = {id(self.up): asyncio.Lock(), id(self.down): asyncio.Lock()}
        self._tasks: set[asyncio.Task[None]] = set()

    async def serve(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            client, _ = await loop.sock_accept(listener)
            task = asyncio.create_task(self._connect(client))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _connect(self, client: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        server = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        try:
            for end in (client, server):
                end.setblocking(False)
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, BUFFER_BYTES)
            server.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, BUFFER_BYTES)  # before the connect
            await loop.sock_connect(server, self.target)
            pumps = [
                asyncio.create_task(self._pump(client, server, self.up)),
                asyncio.create_task(self._pump(server, client, self.down)),
            ]
            await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
            for pump in pumps:
                pump.cancel()
            await asyncio.gather(*pumps, return_exceptions=True)
        except OSError:
            pass  # the target is not there: the client sees its connection closed
        finally:
            client.close()
            server.close()

    async def _pump(self, source: socket.socket, sink: socket.socket, bucket: Bucket) -> None:
        """Ends when either side does; both are then closed, so an end is noticed at once on the other side."""
        loop = asyncio.get_running_loop()
        buffer = memoryview(bytearray(UNLIMITED_READ_BYTES))
        line = DelayLine(loop, sink)
        bucket.free_at = max(bucket.free_at, time.monotonic())  # what came before the connection is no lateness
        try:
            while True:
                limited = self.rate_bps != math.inf
                wanted = int(self.rate_bps / 8 * READ_S) if limited else UNLIMITED_READ_BYTES
                size = max(1460, min(wanted, UNLIMITED_READ_BYTES))
                waiting = lies_there(source)
                count = await loop.sock_recv_into(source, buffer[:size])
                if count == 0:
                    await line.drained()
                    return
                if limited:
                    turn = self._turns[id(bucket)]
                    waiting = waiting or turn.locked()
                    async with turn:  # connections of one direction take turns
                        wait_s = bucket.reserve(count, self.rate_bps, time.monotonic(), waiting=waiting)
                        if wait_s > SHORTEST_SLEEP_S:
                            await asyncio.sleep(wait_s)
                else:
                    bucket.reserve(count, math.inf, time.monotonic())
                if self.delay_s > 0 or line.busy:
                    line.put(bytes(buffer[:count]), self.delay_s)
                    await line.room(int(self.rate_bps / 8 * self.delay_s) if limited else 64 << 20)
                else:
                    await loop.sock_sendall(sink, buffer[:count])
        except OSError:
            return
        finally:
            line.close()


class DelayLine:
    """Bytes on their way: delivered in order, each after its delay."""

    def __init__(self, loop: asyncio.AbstractEventLoop, sink: socket.socket) -> None:
        self._loop, self._sink = loop, sink
        self._items: deque[tuple[float, bytes]] = deque()
        self._held_bytes = 0
        self._changed = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    @property
    def busy(self) -> bool:
        return bool(self._items)

    def put(self, data: bytes, delay_s: float) -> None:
        self._items.append((time.monotonic() + delay_s, data))
        self._held_bytes += len(data)
        if self._task is None:
            self._task = asyncio.create_task(self._deliver())
        self._changed.set()

    async def room(self, in_flight_bytes: int) -> None:
        while self._held_bytes > in_flight_bytes + READ_BYTES and not self._failed():
            self._changed.clear()
            await self._changed.wait()
        if self._failed():
            raise ConnectionError

    async def drained(self) -> None:
        while self._items and not self._failed():
            self._changed.clear()
            await self._changed.wait()

    def close(self) -> None:
        if self._task is not None:
            self._task.cancel()

    def _failed(self) -> bool:
        return self._task is not None and self._task.done()

    async def _deliver(self) -> None:
        try:
            while True:
                while not self._items:
                    self._changed.clear()
                    await self._changed.wait()
                due, data = self._items[0]
                await asyncio.sleep(max(0.0, due - time.monotonic()))
                await self._loop.sock_sendall(self._sink, data)
                self._items.popleft()
                self._held_bytes -= len(data)
                self._changed.set()
        except OSError:
            pass
        finally:
            self._loop.call_soon(self._changed.set)


async def serve_control(proxy: Proxy, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(ConnectionError, asyncio.LimitOverrunError, ValueError):
        while line := await reader.readline():
            try:
                wish = json.loads(line)
                rate_bps = parse_rate(wish["rate_mbps"]) if "rate_mbps" in wish else proxy.rate_bps
                delay_s = float(wish["delay_ms"]) / 1000 if "delay_ms" in wish else proxy.delay_s
                proxy.rate_bps, proxy.delay_s = rate_bps, max(0.0, delay_s)
                answer = {
                    "ok": True,
                    "rate_mbps": 0 if rate_bps == math.inf else rate_bps / 1e6,
                    "delay_ms": proxy.delay_s * 1000,
                    "up_bytes": proxy.up.carried_bytes,
                    "down_bytes": proxy.down.carried_bytes,
                }
            except (ValueError, TypeError, KeyError) as error:
                answer = {"ok": False, "error": f'expected a line like {{"rate_mbps": 5}}: {error}'}
            writer.write(json.dumps(answer).encode() + b"\n")
            await writer.drain()
    writer.close()
