"""The proxy inside transport/shaper.py: it pumps bytes both ways at the link's rate, and does to them what TCP allows.

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
import struct
import termios
import time
from dataclasses import dataclass, field
from random import Random
from typing import Any

from transport.errors import BadTrace
from transport.rate_trace import RateTrace
from transport.shaper_link import BitFlips, Bucket, DelayLine, Pace, parse_rate

UNLIMITED_READ_BYTES = 1024 * 1024
READ_S = 0.004  # a read takes at most about this long on the link, so that a change of rate is felt at once
SHORTEST_SLEEP_S = 0.002  # shorter ones are saved up: the event loop's own clock ticks in milliseconds
LONG_SLEEP_S = 0.1  # longer ones (an outage) end early when the rate is changed
BUFFER_BYTES = 64 * 1024  # SO_SNDBUF and SO_RCVBUF; the kernel doubles it
RESET_ON_CLOSE = struct.pack("ii", 1, 0)  # SO_LINGER: on, for no time at all


def lies_there(end: socket.socket) -> bool:
    """Whether bytes wait to be read."""
    count = array.array("i", [0])
    fcntl.ioctl(end.fileno(), termios.FIONREAD, count)
    return count[0] > 0


@dataclass(slots=True, kw_only=True, eq=False)
class _Direction:
    flips: BitFlips
    jitter: Random
    bucket: Bucket = field(default_factory=Bucket)
    turn: asyncio.Lock = field(default_factory=asyncio.Lock)  # connections of one direction take turns


class Proxy:
    def __init__(self, target: tuple[str, int], seed: int) -> None:
        self.target = target
        self.delay_s = self.jitter_s = 0.0
        self.pace = Pace(math.inf)
        self.up, self.down = (
            _Direction(flips=BitFlips(Random(f"{seed} {name} flips")), jitter=Random(f"{seed} {name} jitter"))
            for name in ("up", "down")
        )
        self.num_cut = 0
        self._pace_changed = asyncio.Event()
        self._flowing = asyncio.Event()
        self._flowing.set()
        self._stall_ends: asyncio.TimerHandle | None = None
        self._cut_until = 0.0
        self._connections: dict[asyncio.Task[None], tuple[socket.socket, socket.socket]] = {}

    # -- what the control port asks for --

    def set_pace(self, pace: Pace) -> None:
        self.pace = pace
        now = time.monotonic()
        for direction in (self.up, self.down):
            direction.bucket.free_at = min(direction.bucket.free_at, now)  # it may lie behind an outage that is over
        self._pace_changed.set()
        self._pace_changed = asyncio.Event()

    def stall(self, for_s: float) -> None:
        """Nothing goes on, in either direction, and nobody is told."""
        if self._stall_ends is not None:
            self._stall_ends.cancel()
        self._flowing.clear()
        self._stall_ends = asyncio.get_running_loop().call_later(for_s, self._flowing.set)

    def cut(self, for_s: float) -> None:
        """All connections are reset at both ends, and new ones for as long."""
        self._cut_until = time.monotonic() + for_s
        for task, ends in self._connections.items():
            for end in ends:
                end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)
            task.cancel()
            self.num_cut += 1

    # -- connections --

    async def serve(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            client, _ = await loop.sock_accept(listener)
            if time.monotonic() < self._cut_until:
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)
                client.close()
                continue
            server = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
            task = asyncio.create_task(self._connect(client, server))
            self._connections[task] = (client, server)
            task.add_done_callback(self._closed)

    def _closed(self, task: asyncio.Task[None]) -> None:
        # Here and not in the task: one that is cancelled before its first step never runs.
        for end in self._connections.pop(task):
            end.close()

    async def _connect(self, client: socket.socket, server: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        pumps: list[asyncio.Task[None]] = []
        try:
            for end in (client, server):
                end.setblocking(False)
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, BUFFER_BYTES)
            server.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, BUFFER_BYTES)  # before the connect
            await loop.sock_connect(server, self.target)
            pumps += [
                asyncio.create_task(self._pump(client, server, self.up)),
                asyncio.create_task(self._pump(server, client, self.down)),
            ]
            await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
        except OSError:
            pass  # the target is not there: the client sees its connection closed
        finally:
            for pump in pumps:
                pump.cancel()
            await asyncio.gather(*pumps, return_exceptions=True)

    async def _pump(self, source: socket.socket, sink: socket.socket, direction: _Direction) -> None:
        """Ends when either side does; both are then closed, so an end is noticed at once on the other side."""
        loop = asyncio.get_running_loop()
        buffer = memoryview(bytearray(UNLIMITED_READ_BYTES))
        line = DelayLine(loop, sink)
        bucket = direction.bucket
        bucket.free_at = max(bucket.free_at, time.monotonic())  # what came before the connection is no lateness
        try:
            while True:
                rate_bps = self.pace.bps(time.monotonic())
                limited = rate_bps != math.inf
                wanted = int(rate_bps / 8 * READ_S) if limited else UNLIMITED_READ_BYTES
                size = max(1460, min(wanted, UNLIMITED_READ_BYTES))
                waiting = lies_there(source)
                count = await loop.sock_recv_into(source, buffer[:size])
                if count == 0:
                    await line.drained()
                    return
                waiting = waiting or direction.turn.locked()
                async with direction.turn:
                    await self._wait(bucket.reserve(count, self.pace, time.monotonic(), waiting=waiting))
                await self._flowing.wait()
                direction.flips.apply(buffer[:count])
                if self.delay_s > 0 or self.jitter_s > 0 or line.busy:
                    line.put(bytes(buffer[:count]), self.delay_s + self.jitter_s * direction.jitter.random())
                    longest_s = self.delay_s + self.jitter_s
                    await line.room(int(rate_bps / 8 * longest_s) if limited else 64 << 20)
                else:
                    await loop.sock_sendall(sink, buffer[:count])
        except OSError:
            return
        finally:
            line.close()

    async def _wait(self, wait_s: float) -> None:
        if wait_s > LONG_SLEEP_S:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._pace_changed.wait(), wait_s)
        elif wait_s > SHORTEST_SLEEP_S:
            await asyncio.sleep(wait_s)


# -- the control port: one JSON object a line, each key of it a setting or a fault --

WISHES = ("rate_mbps", "trace", "delay_ms", "jitter_ms", "corrupt_per_mb", "stall_s", "cut_s")


def apply_wish(proxy: Proxy, wish: dict[str, Any]) -> None:
    """Nothing is changed if anything in it is wrong. Raises ValueError, TypeError, KeyError or BadTrace."""
    unknown = [key for key in wish if key not in WISHES]
    if unknown or ("rate_mbps" in wish and "trace" in wish):
        raise ValueError(f"keys are {', '.join(WISHES)}, and a rate or a trace, not both; got {sorted(wish)}")
    pace: Pace | None = None
    if "trace" in wish:
        pace = Pace(RateTrace.from_mbps((float(at), float(mbps)) for at, mbps in wish["trace"]), time.monotonic())
    elif "rate_mbps" in wish:
        pace = Pace(parse_rate(wish["rate_mbps"]))
    numbers = {key: float(value) for key, value in wish.items() if key not in ("rate_mbps", "trace")}
    for key, number in numbers.items():
        if not 0 <= number < math.inf:
            raise ValueError(f"{key} must be 0 or more, not {wish[key]!r}")
    if pace is not None:
        proxy.set_pace(pace)
    proxy.delay_s = numbers.get("delay_ms", proxy.delay_s * 1000) / 1000
    proxy.jitter_s = numbers.get("jitter_ms", proxy.jitter_s * 1000) / 1000
    if "corrupt_per_mb" in numbers:
        proxy.up.flips.set_rate(numbers["corrupt_per_mb"])
        proxy.down.flips.set_rate(numbers["corrupt_per_mb"])
    if "stall_s" in numbers:
        proxy.stall(numbers["stall_s"])
    if "cut_s" in numbers:
        proxy.cut(numbers["cut_s"])


def describe(proxy: Proxy) -> dict[str, Any]:
    rate_bps = proxy.pace.bps(time.monotonic())
    return {
        "rate_mbps": 0 if rate_bps == math.inf else rate_bps / 1e6,
        "delay_ms": proxy.delay_s * 1000,
        "jitter_ms": proxy.jitter_s * 1000,
        "up_bytes": proxy.up.bucket.carried_bytes,
        "down_bytes": proxy.down.bucket.carried_bytes,
        "flipped_bits": proxy.up.flips.num_flipped + proxy.down.flips.num_flipped,
        "connections_cut": proxy.num_cut,
    }


async def serve_control(proxy: Proxy, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(ConnectionError, asyncio.LimitOverrunError, ValueError):
        while line := await reader.readline():
            try:
                apply_wish(proxy, json.loads(line))
                answer = {"ok": True, **describe(proxy)}
            except (ValueError, TypeError, KeyError, AttributeError, BadTrace) as error:
                answer = {"ok": False, "error": f'expected a line like {{"rate_mbps": 5}}: {error}'}
            writer.write(json.dumps(answer).encode() + b"\n")
            await writer.drain()
    writer.close()
