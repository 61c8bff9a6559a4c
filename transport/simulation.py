"""Sources and sinks over links in memory and in virtual time, with seeded faults. Pure: no sockets, no clock, no sleep.

Messages really become bytes and back. A link carries them in order at a rate and after a delay, like a TCP connection
behind a slow line; faults then drop, duplicate, delay or corrupt single messages, which TCP would not do and the
protocol has to survive all the same.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from random import Random
from typing import Any

from transport import sink_io, source_io
from transport.errors import MalformedMessage
from transport.limits import Limits, Timing
from transport.messages import Buffer
from transport.sink import Sink
from transport.source import Source
from transport.wire import decode_packet, encode_packet


@dataclass(frozen=True, slots=True, kw_only=True)
class Faults:
    """Probabilities per message. Reordered means delayed by up to `reorder_s` without holding back the others."""

    drop: float = 0.0
    duplicate: float = 0.0
    reorder: float = 0.0
    corrupt: float = 0.0
    reorder_s: float = 0.05


@dataclass(slots=True, kw_only=True, eq=False)
class _Line:
    """One link: two directions, each with a rate of its own."""

    endpoint: str
    sink: str
    free_at: dict[bool, float] = field(default_factory=lambda: {True: 0.0, False: 0.0})


class SimulatedNetwork:
    def __init__(
        self, *, seed: int, rate_bytes_per_s: float = 1e9, delay_s: float = 0.001, faults: Faults | None = None
    ) -> None:
        self.now = 0.0
        self.rate_bytes_per_s = rate_bytes_per_s
        self.delay_s = delay_s
        self.faults = faults or Faults()
        self.partitioned = False  # messages vanish, nobody is told
        self.num_faults = 0
        self._random = Random(seed)
        self._limits = Limits()
        self._order = itertools.count()
        self._agenda: list[tuple[float, int, Callable[[], None]]] = []
        self._sources: dict[str, tuple[Source, Callable[[Any], None]]] = {}
        self._sinks: dict[str, tuple[Sink, Callable[[Any], None]]] = {}
        self._lines: dict[str, _Line] = {}  # by link name, which is also the peer name at the source

    def add_source(self, endpoint: str, source: Source, on_event: Callable[[Any], None]) -> None:
        self._sources[endpoint] = (source, on_event)
        self._tick(lambda: self._sources.get(endpoint, (None,))[0] is source, lambda: self._tick_source(endpoint))

    def add_sink(self, name: str, sink: Sink, on_event: Callable[[Any], None]) -> None:
        self._sinks[name] = (sink, on_event)
        self._tick(lambda: name in self._sinks, lambda: self.tell_sink(name, sink_io.Tick()))

    def tell_sink(self, name: str, event: sink_io.SinkInput) -> None:
        sink, on_event = self._sinks[name]
        for command in sink.handle(event, self.now):
            if isinstance(command, sink_io.Notify):
                on_event(command.event)
            elif isinstance(command, sink_io.Connect):
                self._lines[command.link] = _Line(endpoint=command.endpoint, sink=name)
            elif isinstance(command, sink_io.Disconnect):
                # What is under way still arrives; a send to this peer then fails, as ZeroMQ tells a ROUTER.
                line = self._lines[command.link]
                self.later(self._arrival(line, True, 0), partial(self._lines.pop, command.link, None))
            else:
                self._carry(command.link, True, encode_packet(command.packet))

    def tell_source(self, endpoint: str, event: source_io.SourceInput) -> None:
        if endpoint not in self._sources:
            return  # killed: its owner is dead too
        source, on_event = self._sources[endpoint]
        for command in source.handle(event, self.now):
            if isinstance(command, source_io.Notify):
                on_event(command.event)
            elif isinstance(command, source_io.Forget):
                continue  # lines hold what was sent; nothing waits outside them
            elif command.peer in self._lines:
                self._carry(command.peer, False, encode_packet(command.packet))
            else:
                gone = source_io.PeerGone(peer=command.peer, reason="the receiver is gone")
                self.later(self.now, partial(self.tell_source, endpoint, gone))

    def kill_source(self, endpoint: str, *, noticed: bool = True) -> None:
        """`noticed`: its kernel closes the connections. Else it just falls silent."""
        del self._sources[endpoint]
        for link, line in list(self._lines.items()):
            if line.endpoint == endpoint and noticed:
                down = sink_io.LinkDown(link=link, reason="the connection was cut")
                self.later(self.now + self.delay_s, partial(self.tell_sink, line.sink, down))

    def later(self, at: float, action: Callable[[], Any]) -> None:
        heapq.heappush(self._agenda, (at, next(self._order), action))

    def run(self, *, until_s: float, done: Callable[[], bool] = lambda: False) -> bool:
        """Run to `done` or to the time; True if done."""
        while not done():
            if not self._agenda or self._agenda[0][0] > until_s:
                self.now = max(self.now, until_s)
                return done()
            self.now, _, action = heapq.heappop(self._agenda)
            action()
        return True

    # -- inside --

    def _tick(self, alive: Callable[[], bool], act: Callable[[], None]) -> None:
        def beat() -> None:
            if alive():
                act()
                self.later(self.now + Timing().heartbeat_s / 2, beat)

        self.later(self.now, beat)

    def _tick_source(self, endpoint: str) -> None:
        self.tell_source(endpoint, source_io.Tick())

    def _arrival(self, line: _Line, up: bool, size: int) -> float:
        line.free_at[up] = max(self.now, line.free_at[up]) + size / self.rate_bytes_per_s
        return line.free_at[up] + self.delay_s

    def _carry(self, link: str, up: bool, frames: list[Buffer]) -> None:
        line = self._lines.get(link)
        if line is None or self.partitioned or line.endpoint not in self._sources:
            return
        at = self._arrival(line, up, sum(len(frame) for frame in frames))
        copies = 1
        frames = [bytes(frame) for frame in frames]
        if self._random.random() < self.faults.drop:
            self.num_faults, copies = self.num_faults + 1, 0
        if self._random.random() < self.faults.duplicate:
            self.num_faults, copies = self.num_faults + 1, copies * 2
        if self._random.random() < self.faults.corrupt:
            self.num_faults += 1
            damaged = bytearray(frames[0])
            damaged[self._random.randrange(len(damaged))] ^= 1 << self._random.randrange(8)
            frames[0] = bytes(damaged)
        for copy in range(copies):
            late_s = 0.0
            if self._random.random() < self.faults.reorder:
                self.num_faults += 1
                late_s = self._random.random() * self.faults.reorder_s
            self.later(at + late_s + copy * 1e-4, lambda: self._deliver(link, line, up, frames))

    def _deliver(self, link: str, line: _Line, up: bool, frames: list[Buffer]) -> None:
        try:
            packet = decode_packet(frames, self._limits)
        except MalformedMessage:
            return
        if up and line.endpoint in self._sources:
            self.tell_source(line.endpoint, source_io.Received(peer=link, packet=packet))
        elif not up and link in self._lines:
            self.tell_sink(line.sink, sink_io.Received(link=link, packet=packet))
