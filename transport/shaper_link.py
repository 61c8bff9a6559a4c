"""What the shaper's proxy is made of: the rate, a token bucket, flipped bits, a delay line. Knows RateTrace only."""

from __future__ import annotations

import asyncio
import math
import socket
import time
from collections import deque
from random import Random

from transport.limits import MB
from transport.rate_trace import RateTrace

HELD_BYTES = 64 * 1024  # in a delay line, beyond what its delay holds
BURST_S = 0.002  # after idleness: next to nothing, so that a small blob does not seem to meet a faster link
LATE_S = 0.05  # while data waits: what a busy processor may cost this process before the rate suffers
MIN_BURST_BYTES, MAX_BURST_BYTES = 3 * 1024, 64 * 1024


def parse_rate(value: object) -> float:
    """Bits per second from Mbit/s; 0 and "inf" mean no limit."""
    rate_mbps = float(value)  # type: ignore[arg-type]
    if math.isnan(rate_mbps) or rate_mbps < 0:
        raise ValueError(f"rate_mbps must be 0 (no limit) or more, not {value!r}")
    return math.inf if rate_mbps == 0 else rate_mbps * 1e6


class Pace:
    """How fast the link is: a constant rate in bits per second, or a trace that began at `since`."""

    def __init__(self, rate: float | RateTrace, since: float = 0.0) -> None:
        self._rate, self._since = rate, since

    def bps(self, now: float) -> float:
        return self._rate.rate_at(now - self._since) * 8 if isinstance(self._rate, RateTrace) else self._rate

    def finish_time(self, start: float, num_bytes: int) -> float:
        if isinstance(self._rate, RateTrace):
            return self._since + self._rate.finish_time(max(0.0, start - self._since), num_bytes)
        return start + num_bytes * 8 / self._rate


class Bucket:
    """The time at which the link is free again, with a burst allowed after idleness."""

    def __init__(self) -> None:
        self.free_at = 0.0
        self.carried_bytes = 0

    def reserve(self, num_bytes: int, pace: Pace, now: float, *, waiting: bool = False) -> float:
        """Seconds to wait before these bytes may go on. `waiting`: they lay there already, so the link was not idle
        and time that has passed since it was free is ours to catch up."""
        self.carried_bytes += num_bytes
        per_second = pace.bps(now) / 8
        if per_second == math.inf:
            self.free_at = now
            return 0.0
        burst_bytes = min(MAX_BURST_BYTES, max(MIN_BURST_BYTES, per_second * BURST_S))
        burst_s = burst_bytes / per_second if per_second else 0.0  # in an outage nothing bursts
        allowance_s = max(LATE_S if waiting else 0.0, burst_s)
        self.free_at = pace.finish_time(max(self.free_at, now - allowance_s), num_bytes)
        return max(0.0, self.free_at - now)


class BitFlips:
    """Flips single bits at seeded places of one direction's byte stream, wherever its reads begin and end."""

    def __init__(self, random: Random) -> None:
        self._random = random
        self._per_mb = 0.0
        self._next_in = math.inf  # bytes from here
        self.num_flipped = 0

    def set_rate(self, per_mb: float) -> None:
        """So many a megabyte, on average."""
        if per_mb != self._per_mb:
            self._per_mb = per_mb
            self._next_in = self._gap()

    def _gap(self) -> float:
        return self._random.expovariate(self._per_mb / MB) if self._per_mb > 0 else math.inf

    def apply(self, data: memoryview) -> None:
        while self._next_in < len(data):
            data[int(self._next_in)] ^= 1 << self._random.randrange(8)
            self.num_flipped += 1
            self._next_in += self._gap()
        self._next_in -= len(data)


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
        while self._held_bytes > in_flight_bytes + HELD_BYTES and not self._failed():
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
