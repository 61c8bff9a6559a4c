"""Sources and sinks over links in memory and in virtual time, with seeded faults. Pure: no sockets, no clock, no sleep.

Each pair of a sink and a source's endpoint has a line of its own, which carries messages in order, at a rate (constant,
or a RateTrace) and after a delay, like a TCP connection behind a slow link. The lines of one sink may share a downlink.

Without faults, messages are handed over as they are, and only their sizes are computed; with faults they really become
bytes and back, while single ones are dropped, duplicated, delayed or corrupted, which TCP would not do and the protocol
has to survive all the same. `cut` ends connections as a reset does, `partition` lets messages vanish untold.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any

from transport import sink_io, source_io
from transport.errors import MalformedMessage
from transport.limits import Limits, Timing
from transport.messages import Accept, Buffer, Open, Packet, Part
from transport.rate_trace import RateTrace
from transport.sink import Sink
from transport.source import Source
from transport.wire import decode_packet, encode_packet, pack_body

Rate = float | RateTrace  # bytes per second
HEADER_BYTES = 96  # what a message is taken to need when it is not made into bytes; a part's header has 80 to 120


@dataclass(frozen=True, slots=True, kw_only=True)
class Faults:
    """Probabilities per message. Reordered means delayed by up to `reorder_s` without holding back the others."""

    drop: float = 0.0
    duplicate: float = 0.0
    reorder: float = 0.0
    corrupt: float = 0.0
    reorder_s: float = 0.05


@dataclass(slots=True, kw_only=True, eq=False)
class _SourceEnd:
    endpoint: str
    source: Source
    on_event: Callable[[Any], None]
    ticking: bool = False
    alive: bool = True


@dataclass(slots=True, kw_only=True, eq=False)
class _SinkEnd:
    name: str
    sink: Sink
    on_event: Callable[[Any], None]
    downlink: Rate | None  # shared by all its lines
    downlink_free_at: float = 0.0
    ticking: bool = False


@dataclass(slots=True, kw_only=True, eq=False)
class _Line:
    """One link: two directions, each busy until its own time."""

    link: str  # its name at the sink, and the peer's name at the source
    endpoint: str
    sink: _SinkEnd
    connects_at: float
    up_free_at: float
    down_free_at: float
    dead: bool = False  # cut: what was under way is lost


class SimulatedNetwork:
    def __init__(
        self,
        *,
        seed: int,
        rate_bytes_per_s: Rate = 1e9,
        delay_s: float = 0.001,
        faults: Faults | None = None,
        serialize: bool | None = None,
        timing: Timing | None = None,
    ) -> None:
        """`serialize`: make every message into bytes and back; by default only where there are faults."""
        self.now = 0.0
        self.rate_bytes_per_s = rate_bytes_per_s
        self.delay_s = delay_s
        self.faults = faults or Faults()
        self.partitioned = False  # messages vanish, nobody is told
        self.num_faults = 0
        self.num_messages = 0
        self._serialize = self.faults != Faults() if serialize is None else serialize
        self._tick_s = (timing or Timing()).heartbeat_s / 2
        self._random = Random(seed)
        self._limits = Limits()
        self._order = itertools.count()
        self._agenda: list[tuple[float, int, Callable[..., Any], tuple[Any, ...]]] = []
        self._sources: dict[str, _SourceEnd] = {}
        self._rates: dict[str, Rate] = {}  # by endpoint, where they differ from the network's
        self._cut_until: dict[str, float] = {}  # by endpoint
        self._partitioned: set[str] = set()  # endpoints
        self._sinks: dict[str, _SinkEnd] = {}
        self._lines: dict[str, _Line] = {}  # by link name, which is also the peer name at the source

    # -- who is there --

    def add_source(self, endpoint: str, source: Source, on_event: Callable[[Any], None]) -> None:
        self._sources[endpoint] = _SourceEnd(endpoint=endpoint, source=source, on_event=on_event)

    def add_sink(self, name: str, sink: Sink, on_event: Callable[[Any], None], *, downlink: Rate | None = None) -> None:
        """`downlink`: what all lines into this sink share, each behind its own rate."""
        self._sinks[name] = _SinkEnd(name=name, sink=sink, on_event=on_event, downlink=downlink)

    def set_rate(self, rate: Rate, endpoint: str | None = None) -> None:
        """Of the lines to one endpoint, or of all that have no rate of their own; for messages not yet sent."""
        if endpoint is None:
            self.rate_bytes_per_s = rate
        else:
            self._rates[endpoint] = rate

    # -- what goes wrong --

    def kill_source(self, endpoint: str, *, noticed: bool = True) -> None:
        """`noticed`: its kernel closes the connections. Else it just falls silent."""
        self._sources.pop(endpoint).alive = False
        if noticed:
            for line in self._lines_to(endpoint):
                self._tell_cut(line)

    def kill_sink(self, name: str) -> None:
        """Its connections close: its sources are told."""
        end = self._sinks.pop(name)
        for line in [line for line in self._lines.values() if line.sink is end]:
            self._break(line)

    def cut(self, endpoint: str, for_s: float) -> None:
        """Connections to this endpoint break, what is under way is lost, both ends are told. New ones are made when
        the time is over: until then what is sent waits, as ZeroMQ keeps trying to connect."""
        until = self._cut_until[endpoint] = max(self._cut_until.get(endpoint, 0.0), self.now + for_s)
        assert until >= self.now
        for line in self._lines_to(endpoint):
            self._break(line)

    def partition(self, endpoint: str) -> None:
        """From now on messages to and from this endpoint vanish, and nobody is told; until `heal`."""
        self._partitioned.add(endpoint)

    def heal(self, endpoint: str) -> None:
        self._partitioned.discard(endpoint)

    # -- time --

    def later(self, at: float, action: Callable[[], Any]) -> None:
        heapq.heappush(self._agenda, (at, next(self._order), action, ()))

    def run(self, *, until_s: float, done: Callable[[], bool] = lambda: False) -> bool:
        """Run to `done` or to the time; True if done."""
        agenda = self._agenda
        while not done():
            if not agenda or agenda[0][0] > until_s:
                self.now = max(self.now, until_s)
                return done()
            self.now, _, action, arguments = heapq.heappop(agenda)
            action(*arguments)
        return True

    def _soon(self, at: float, action: Callable[..., Any], *arguments: Any) -> None:
        heapq.heappush(self._agenda, (at, next(self._order), action, arguments))

    # -- the machines' inputs and commands --

    def tell_sink(self, name: str, event: sink_io.SinkInput) -> None:
        self._to_sink(self._sinks[name], event)

    def tell_source(self, endpoint: str, event: source_io.SourceInput) -> None:
        if (end := self._sources.get(endpoint)) is not None:  # else killed: its owner is dead too
            self._to_source(end, event)

    def _to_sink(self, end: _SinkEnd, event: sink_io.SinkInput) -> None:
        for command in end.sink.handle(event, self.now):
            if type(command) is sink_io.Notify:
                end.on_event(command.event)
            elif type(command) is sink_io.Send:
                if (line := self._lines.get(command.link)) is not None:
                    self._carry(line, True, command.packet)
            elif type(command) is sink_io.Connect:
                self._connect(end, command)
            elif type(command) is sink_io.Disconnect and (line := self._lines.get(command.link)) is not None:
                self._disconnect(line)

    def _to_source(self, end: _SourceEnd, event: source_io.SourceInput) -> None:
        for command in end.source.handle(event, self.now):
            if type(command) is source_io.Notify:
                end.on_event(command.event)
            elif type(command) is source_io.Send:
                if (line := self._lines.get(command.peer)) is not None:
                    self._carry(line, False, command.packet)
                else:
                    gone = source_io.PeerGone(peer=command.peer, reason="the receiver is gone")
                    self._soon(self.now, self._tell_peer_gone, end, gone)
            # Forget: lines hold what was sent, nothing waits outside them
        if not end.ticking and end.source.num_sessions:
            end.ticking = True
            self._soon(self.now + self._tick_s, self._tick_source, end)

    def _tell_peer_gone(self, end: _SourceEnd, event: source_io.PeerGone) -> None:
        if end.alive:
            self._to_source(end, event)

    def _tick_sink(self, end: _SinkEnd) -> None:
        end.ticking = bool(end.sink.num_links) and self._sinks.get(end.name) is end
        if end.ticking:
            self._soon(self.now + self._tick_s, self._tick_sink, end)
            self._to_sink(end, sink_io.Tick())

    def _tick_source(self, end: _SourceEnd) -> None:
        end.ticking = bool(end.source.num_sessions) and end.alive
        if end.ticking:
            self._soon(self.now + self._tick_s, self._tick_source, end)
            self._to_source(end, source_io.Tick())

    # -- lines --

    def _connect(self, end: _SinkEnd, command: sink_io.Connect) -> None:
        at = max(self.now, self._cut_until.get(command.endpoint, 0.0))
        self._lines[command.link] = _Line(
            link=command.link, endpoint=command.endpoint, sink=end, connects_at=at, up_free_at=at, down_free_at=at
        )
        if not end.ticking:
            end.ticking = True
            self._soon(self.now + self._tick_s, self._tick_sink, end)

    def _disconnect(self, line: _Line) -> None:
        # What is under way still arrives; a send to this peer then fails, as ZeroMQ tells a ROUTER.
        line.dead = self.now < line.connects_at
        gone_at = max(self.now, line.up_free_at) + self.delay_s
        self._soon(self.now if line.dead else gone_at, self._lines.pop, line.link, None)

    def _lines_to(self, endpoint: str) -> list[_Line]:
        return [line for line in self._lines.values() if line.endpoint == endpoint]

    def _break(self, line: _Line) -> None:
        line.dead = True
        del self._lines[line.link]
        self._tell_cut(line)
        if (end := self._sources.get(line.endpoint)) is not None:
            gone = source_io.PeerGone(peer=line.link, reason="the connection was cut")
            self._soon(self.now + self.delay_s, self._tell_peer_gone, end, gone)

    def _tell_cut(self, line: _Line) -> None:
        down = sink_io.LinkDown(link=line.link, reason="the connection was cut")
        self._soon(self.now + self.delay_s, self._tell_link_down, line.sink, down)

    def _tell_link_down(self, end: _SinkEnd, event: sink_io.LinkDown) -> None:
        if self._sinks.get(end.name) is end:
            self._to_sink(end, event)

    def _carry(self, line: _Line, up: bool, packet: Packet) -> None:
        self.num_messages += 1
        endpoint = line.endpoint
        if self.partitioned or endpoint not in self._sources or endpoint in self._partitioned:
            return
        cargo: Packet | list[Buffer] = packet
        if self._serialize:
            cargo = [bytes(frame) for frame in encode_packet(packet)]
            size = sum(map(len, cargo))
        else:
            size = size_of(packet)
        rate = self._rates.get(endpoint, self.rate_bytes_per_s) if self._rates else self.rate_bytes_per_s
        if up:
            at = line.up_free_at = finish_time(rate, max(self.now, line.up_free_at), size)
        else:
            at = line.down_free_at = finish_time(rate, max(self.now, line.down_free_at), size)
        at += self.delay_s
        if type(cargo) is list and self.faults != Faults():
            for late_s in self._suffer(cargo):
                self._arrive(line, up, cargo, size, at + late_s)
        else:
            self._arrive(line, up, cargo, size, at)

    def _suffer(self, frames: list[Buffer]) -> list[float]:
        """May damage the message; returns how much later than it should each copy of it comes."""
        copies = 1
        if self._random.random() < self.faults.drop:
            self.num_faults, copies = self.num_faults + 1, 0
        if self._random.random() < self.faults.duplicate:
            self.num_faults, copies = self.num_faults + 1, copies * 2
        if self._random.random() < self.faults.corrupt:
            self.num_faults += 1
            damaged = bytearray(frames[0])
            damaged[self._random.randrange(len(damaged))] ^= 1 << self._random.randrange(8)
            frames[0] = bytes(damaged)
        late: list[float] = []
        for copy in range(copies):
            late.append(copy * 1e-4)
            if self._random.random() < self.faults.reorder:
                self.num_faults += 1
                late[-1] += self._random.random() * self.faults.reorder_s
        return late

    def _arrive(self, line: _Line, up: bool, cargo: Packet | list[Buffer], size: int, at: float) -> None:
        if up:
            self._soon(at, self._deliver_up, line, cargo)
        elif line.sink.downlink is None:
            self._soon(at, self._deliver_down, line, cargo)
        else:
            self._soon(at, self._enter_downlink, line, cargo, size)

    def _enter_downlink(self, line: _Line, cargo: Packet | list[Buffer], size: int) -> None:
        end = line.sink
        assert end.downlink is not None
        end.downlink_free_at = finish_time(end.downlink, max(self.now, end.downlink_free_at), size)
        self._soon(end.downlink_free_at, self._deliver_down, line, cargo)

    def _deliver_up(self, line: _Line, cargo: Packet | list[Buffer]) -> None:
        end = self._sources.get(line.endpoint)
        packet = cargo if type(cargo) is Packet else self._decode(cargo)
        if packet is not None and end is not None and not line.dead:
            self._to_source(end, source_io.Received(peer=line.link, packet=packet))

    def _deliver_down(self, line: _Line, cargo: Packet | list[Buffer]) -> None:
        packet = cargo if type(cargo) is Packet else self._decode(cargo)
        if packet is not None and line.link in self._lines:
            self._to_sink(line.sink, sink_io.Received(link=line.link, packet=packet))

    def _decode(self, cargo: Any) -> Packet | None:
        try:
            return decode_packet(cargo, self._limits)
        except MalformedMessage:
            return None


def finish_time(rate: Rate, start: float, size: int) -> float:
    return rate.finish_time(start, size) if type(rate) is RateTrace else start + size / rate  # type: ignore[operator]


def size_of(packet: Packet) -> int:
    """About what its frames would have."""
    message = packet.message
    if type(message) is Part:
        return HEADER_BYTES + len(message.data)
    if type(message) is Open or type(message) is Accept:
        return HEADER_BYTES + len(pack_body(message.body))
    return HEADER_BYTES
