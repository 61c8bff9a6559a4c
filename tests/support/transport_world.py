"""One source and one sink over a simulated link, for the tests of the transfer protocol."""

from __future__ import annotations

from random import Random
from typing import Any

from transport import events as ev
from transport import sink_io, source_io
from transport.limits import KB, Limits
from transport.messages import Greeting
from transport.simulation import SimulatedNetwork
from transport.sink import Sink
from transport.source import Source

GREETING = Greeting(model_fingerprint="m1", kv_layout="12x2x64", codec_profile="p1")
SOURCE = "tcp://source"


def blob_of(chunk: int, level: str, size: int) -> bytes:
    return Random(f"{chunk}{level}").randbytes(size)


class World:
    """One source and one sink; the source's owner supplies at once unless told not to."""

    def __init__(self, *, size: int = 300 * KB, limits: Limits | None = None, **network: Any) -> None:
        # Through bytes and back, so that no promise is kept only because both ends share memory.
        self.net = SimulatedNetwork(seed=1, **{"serialize": True, **network})
        self.size = size
        self.supplies = True
        self.accepts = True
        self.source = Source(greeting=GREETING, incarnation="s1", limits=limits)
        self.sink = Sink(greeting=GREETING, incarnation="d1", limits=limits)
        self.source_events: list[Any] = []
        self.sink_events: list[Any] = []
        self.net.add_source(SOURCE, self.source, self.on_source_event)
        self.net.add_sink("sink", self.sink, self.sink_events.append)

    def on_source_event(self, event: Any) -> None:
        self.source_events.append(event)
        if isinstance(event, ev.TransferOpened) and self.accepts:
            self.net.later(
                self.net.now, lambda: self.tell(source_io.AcceptTransfer(transfer_id=event.transfer_id, body={"ok": 1}))
            )
        elif isinstance(event, ev.ChunkRequested) and self.supplies:
            self.net.later(self.net.now, lambda: self.supply(event.transfer_id, event.chunk))

    def tell(self, event: source_io.SourceInput) -> None:
        self.net.tell_source(SOURCE, event)

    def ask(self, event: sink_io.SinkInput) -> None:
        self.net.tell_sink("sink", event)

    def supply(self, transfer_id: str, chunk: int) -> str | None:
        level = self.source.take(transfer_id, chunk)
        if level is not None:
            self.finish(transfer_id, chunk, level)
        return level

    def finish(self, transfer_id: str, chunk: int, level: str) -> None:
        blob = blob_of(chunk, level, self.size)
        self.tell(source_io.SupplyChunk(transfer_id=transfer_id, chunk=chunk, level=level, blob=blob))

    def open(self, transfer_id: str = "t1") -> str:
        self.ask(sink_io.OpenTransfer(transfer_id=transfer_id, endpoint=SOURCE, body={"tokens": [1, 2]}))
        return transfer_id

    def request(self, chunk: int, level: str = "q1", transfer_id: str = "t1", priority: int = 0) -> None:
        self.ask(sink_io.RequestChunk(transfer_id=transfer_id, chunk=chunk, level=level, priority=priority))

    def run(self, seconds: float = 30.0, until: type | None = None) -> None:
        def done() -> bool:
            self.sink.check_integrity()
            self.source.check_integrity()
            return until is not None and bool(self.got(until))

        self.net.run(until_s=self.net.now + seconds, done=done)

    def end(self) -> None:
        """Close what is open: both ends forget everything."""
        if SOURCE in self.net._sources:
            for transfer_id in list(self.sink._transfers):
                self.ask(sink_io.CloseTransfer(transfer_id=transfer_id))
        self.net.partitioned = False
        self.run(15)
        assert self.sink.num_transfers == 0
        assert self.source.num_transfers == 0 or SOURCE not in self.net._sources

    def got(self, kind: type) -> list[Any]:
        return [event for event in self.sink_events if isinstance(event, kind)]

    def told(self, kind: type) -> list[Any]:
        return [event for event in self.source_events if isinstance(event, kind)]
