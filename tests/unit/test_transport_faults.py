"""The protocol over links that drop, duplicate, reorder, corrupt and are cut: every blob asked for arrives intact or
an event says that it will not, within a bounded time, and nothing is left behind. A failing seed is in the test's
name."""

from __future__ import annotations

from random import Random
from typing import Any

import pytest

from transport import events as ev
from transport import sink_io, source_io
from transport.limits import KB, Timing
from transport.messages import Greeting
from transport.simulation import Faults, SimulatedNetwork
from transport.sink import Sink
from transport.source import Source

GREETING = Greeting(model_fingerprint="m1", kv_layout="12x2x64", codec_profile="p1")
ENDED = (ev.TransferLost, ev.Refused)
# A lost message is noticed at the next heartbeat; at worst, at the end of the lease. Then the transfers themselves.
BOUND_S = 2 * Timing().lease_s + 10


class Peers:
    """Several sinks and sources; owners act at random but seeded, and record what they were told."""

    def __init__(self, seed: int, faults: Faults, num_sinks: int = 2, num_sources: int = 2) -> None:
        self.random = Random(seed)
        self.net = SimulatedNetwork(
            seed=seed,
            rate_bytes_per_s=10 ** self.random.uniform(5.5, 8),
            delay_s=10 ** self.random.uniform(-4, -1.3),
            faults=faults,
        )
        self.sources = {f"tcp://source{i}": Source(greeting=GREETING, incarnation=f"s{i}") for i in range(num_sources)}
        self.sinks = {f"sink{i}": Sink(greeting=GREETING, incarnation=f"d{i}") for i in range(num_sinks)}
        self.asked: dict[tuple[str, int], str] = {}  # what is outstanding -> level last asked for
        self.ended: dict[str, Any] = {}
        self.blobs = 0
        self.failed = 0
        self.transfers: list[tuple[str, str]] = []
        for endpoint, source in self.sources.items():
            self.net.add_source(endpoint, source, self.owner_of(endpoint))
        for name, sink in self.sinks.items():
            self.net.add_sink(name, sink, self.on_sink_event)

    def owner_of(self, endpoint: str) -> Any:
        def on_event(event: Any) -> None:
            later_s = self.random.random() * 0.2
            if isinstance(event, ev.TransferOpened):
                accept = source_io.AcceptTransfer(transfer_id=event.transfer_id, body={})
                self.net.later(self.net.now + later_s, lambda: self.net.tell_source(endpoint, accept))
            elif isinstance(event, ev.ChunkRequested):
                self.net.later(self.net.now + later_s, lambda: self.encode(endpoint, event.transfer_id, event.chunk))

        return on_event

    def encode(self, endpoint: str, transfer_id: str, chunk: int) -> None:
        source = self.sources.get(endpoint)
        level = source.take(transfer_id, chunk) if source is not None else None
        if level is None:
            return
        answer: source_io.SourceInput
        if self.random.random() < 0.05:
            answer = source_io.FailChunk(transfer_id=transfer_id, chunk=chunk, reason="no pages")
        else:
            blob = content(transfer_id, chunk, level)
            answer = source_io.SupplyChunk(transfer_id=transfer_id, chunk=chunk, level=level, blob=blob)
        self.net.later(self.net.now + 0.01, lambda: self.net.tell_source(endpoint, answer))

    def on_sink_event(self, event: Any) -> None:
        assert event.transfer_id not in self.ended, f"an event after the end: {event}"
        if isinstance(event, ev.BlobArrived):
            self.blobs += 1
            assert bytes(event.blob) == content(event.transfer_id, event.chunk, event.level)
            del self.asked[event.transfer_id, event.chunk]
        elif isinstance(event, ev.ChunkFailed):
            self.failed += 1
            del self.asked[event.transfer_id, event.chunk]
        elif isinstance(event, ENDED):
            self.end(event.transfer_id, event)

    def end(self, transfer_id: str, why: Any) -> None:
        self.ended[transfer_id] = why
        for key in [key for key in self.asked if key[0] == transfer_id]:
            del self.asked[key]

    def act(self) -> None:
        """One random thing that an owner of a sink may do."""
        choice = self.random.random()
        alive = [(name, t) for name, t in self.transfers if t not in self.ended]
        if choice < 0.15 or not alive:
            name = self.random.choice(list(self.sinks))
            transfer_id = f"{name}.{len(self.transfers)}"
            endpoint = self.random.choice(list(self.sources))
            self.transfers.append((name, transfer_id))
            self.net.tell_sink(name, sink_io.OpenTransfer(transfer_id=transfer_id, endpoint=endpoint, body={"n": 1}))
            return
        name, transfer_id = self.random.choice(alive)
        chunk = self.random.randrange(12)
        if choice < 0.8:
            level = self.random.choice(["raw", "q1", "q4"])
            self.asked[transfer_id, chunk] = level
            priority = self.random.choice([0, 1, 7])
            request = sink_io.RequestChunk(transfer_id=transfer_id, chunk=chunk, level=level, priority=priority)
            self.net.tell_sink(name, request)
        elif choice < 0.92:
            self.asked.pop((transfer_id, chunk), None)
            self.net.tell_sink(name, sink_io.WithdrawChunk(transfer_id=transfer_id, chunk=chunk))
        else:
            self.end(transfer_id, "closed")
            self.net.tell_sink(name, sink_io.CloseTransfer(transfer_id=transfer_id))

    def check(self) -> None:
        for machine in (*self.sources.values(), *self.sinks.values()):
            machine.check_integrity()


def content(transfer_id: str, chunk: int, level: str) -> bytes:
    random = Random(f"{transfer_id} {chunk} {level}")
    return random.randbytes(random.choice([0, 1, 1000, 40 * KB, 200 * KB]))


FAULTS = {
    "none": Faults(),
    "drop": Faults(drop=0.01),
    "duplicate": Faults(duplicate=0.2),
    "reorder": Faults(reorder=0.02),
    "corrupt": Faults(corrupt=0.01),
    "all": Faults(drop=0.005, duplicate=0.05, reorder=0.005, corrupt=0.005),
    "hopeless": Faults(drop=0.4, duplicate=0.2, reorder=0.3, corrupt=0.2),
}


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("kind", FAULTS)
def test_all_arrives_or_an_event_says_that_it_will_not(kind: str, seed: int) -> None:
    peers = Peers(seed, FAULTS[kind])
    for step in range(120):
        peers.net.run(until_s=step * 0.05)
        peers.act()
        peers.check()
    peers.net.run(until_s=120 * 0.05 + BOUND_S, done=lambda: not peers.asked)
    assert not peers.asked, "hangs: " + str(peers.asked)
    peers.check()
    if kind in ("none", "duplicate"):
        assert not [why for why in peers.ended.values() if why != "closed"]
        assert peers.blobs > 20
    # Close all: both ends forget everything.
    for name, transfer_id in peers.transfers:
        peers.net.tell_sink(name, sink_io.CloseTransfer(transfer_id=transfer_id))
    peers.net.run(until_s=peers.net.now + BOUND_S)
    peers.check()
    assert sum(machine.num_transfers for machine in (*peers.sources.values(), *peers.sinks.values())) == 0


def test_the_faults_do_happen() -> None:
    peers = Peers(3, FAULTS["all"])
    for step in range(100):
        peers.net.run(until_s=step * 0.05)
        peers.act()
    assert peers.net.num_faults > 20 and peers.blobs > 0


@pytest.mark.parametrize("seed", range(6))
def test_a_source_dies_in_mid_transfer(seed: int) -> None:
    peers = Peers(seed, Faults(), num_sources=2)
    for step in range(60):
        peers.net.run(until_s=step * 0.05)
        peers.act()
    dead = "tcp://source0"
    peers.net.kill_source(dead, noticed=seed % 2 == 0)
    peers.net.run(until_s=peers.net.now + BOUND_S, done=lambda: not peers.asked)
    assert not peers.asked
    peers.sources.pop(dead)
    peers.check()


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("kind", ["none", "all"])
def test_cuts_at_random(kind: str, seed: int) -> None:
    peers = Peers(seed, FAULTS[kind])
    for step in range(100):
        peers.net.run(until_s=step * 0.05)
        peers.act()
        if step % 10 == 9:
            peers.net.cut(peers.random.choice(list(peers.sources)), for_s=peers.random.choice([0.0, 0.1, 1.0]))
        peers.check()
    peers.net.run(until_s=peers.net.now + BOUND_S, done=lambda: not peers.asked)
    assert not peers.asked, "hangs: " + str(peers.asked)
    reasons = [why.reason for why in peers.ended.values() if isinstance(why, ENDED)]
    assert [reason for reason in reasons if "cut" in reason]
    peers.check()


class Loader:
    """A sink's owner that wants `num_chunks` in order, three asked for ahead, and opens again whenever it has lost."""

    def __init__(self, net: SimulatedNetwork, num_chunks: int) -> None:
        self.net, self.num_chunks = net, num_chunks
        self.sink = Sink(greeting=GREETING, incarnation="d")
        self.arrived: dict[int, bytes] = {}
        self.reopened_at: list[int] = []  # the first chunk then asked for
        self.lost: list[ev.TransferLost] = []
        self.opens = 0
        net.add_sink("sink", self.sink, self.on_event)
        self.open()

    def open(self) -> None:
        self.opens += 1
        self.transfer_id = f"t{self.opens}"
        event = sink_io.OpenTransfer(transfer_id=self.transfer_id, endpoint="tcp://s", body={})
        self.net.tell_sink("sink", event)
        missing = [chunk for chunk in range(self.num_chunks) if chunk not in self.arrived]
        self.asked = missing[:3]
        for chunk in self.asked:
            self.ask(chunk)

    def ask(self, chunk: int) -> None:
        event = sink_io.RequestChunk(transfer_id=self.transfer_id, chunk=chunk, level="q1", priority=chunk)
        self.net.tell_sink("sink", event)

    def on_event(self, event: Any) -> None:
        assert event.transfer_id == self.transfer_id
        if isinstance(event, ev.BlobArrived):
            assert event.chunk not in self.arrived, "came twice"
            self.arrived[event.chunk] = bytes(event.blob)
            following = self.asked[-1] + 1
            if following < self.num_chunks:
                self.asked.append(following)
                self.net.later(self.net.now, lambda: self.ask_if_open(event.transfer_id, following))
        elif isinstance(event, ev.TransferLost):
            self.lost.append(event)
            self.transfer_id = ""
            self.net.later(self.net.now + 0.01, self.reopen)

    def ask_if_open(self, transfer_id: str, chunk: int) -> None:
        if transfer_id == self.transfer_id:
            self.ask(chunk)

    def reopen(self) -> None:
        self.reopened_at.append(min(set(range(self.num_chunks)) - set(self.arrived), default=-1))
        self.open()


@pytest.mark.parametrize("seed", range(10))
def test_after_a_cut_the_owner_opens_again_and_asks_for_what_is_missing(seed: int) -> None:
    random = Random(seed)
    serialize = seed % 2 == 0
    net = SimulatedNetwork(seed=seed, rate_bytes_per_s=2e6, delay_s=random.uniform(0, 0.03), serialize=serialize)
    source = Source(greeting=GREETING, incarnation="s")
    blobs = [random.randbytes(100 * KB) for _ in range(20)]
    closed: list[str] = []

    def on_source_event(event: Any) -> None:
        answer: source_io.SourceInput | None = None
        if isinstance(event, ev.TransferOpened):
            answer = source_io.AcceptTransfer(transfer_id=event.transfer_id, body={})
        elif isinstance(event, ev.ChunkRequested):
            blob = blobs[event.chunk]
            answer = source_io.SupplyChunk(transfer_id=event.transfer_id, chunk=event.chunk, level="q1", blob=blob)
        elif isinstance(event, ev.TransferClosed):
            closed.append(event.transfer_id)
        if answer is not None:
            net.later(net.now, lambda: net.tell_source("tcp://s", answer))

    def check() -> bool:
        source.check_integrity()
        loader.sink.check_integrity()
        return len(loader.arrived) == len(blobs)

    net.add_source("tcp://s", source, on_source_event)
    loader = Loader(net, len(blobs))
    cuts = sorted(random.uniform(0.15, 1.5) for _ in range(3))
    lasts_s = random.choice([0.0, 0.2, 2.0])
    had_at_cut: list[int] = []

    def cut() -> None:
        had_at_cut.append(len(loader.arrived))
        net.cut("tcp://s", for_s=lasts_s)

    for at in cuts:
        net.later(at, cut)
    # 1.05 s of the link, the outages, and the parts that each cut lost.
    assert net.run(until_s=1.05 + 3 * (lasts_s + 1.0) + 1.5, done=check), sorted(loader.arrived)
    assert loader.arrived == dict(enumerate(blobs))
    assert loader.reopened_at and all("cut" in lost.reason for lost in loader.lost)
    # It went on where it stood: nothing that had arrived was asked for again (the loader asserts it), and each time
    # the first chunk missing was the one after what it had at that cut.
    assert loader.reopened_at[0] >= had_at_cut[0]
    net.run(until_s=net.now + 1, done=check)
    net.tell_sink("sink", sink_io.CloseTransfer(transfer_id=loader.transfer_id))
    net.run(until_s=net.now + 1)
    assert source.num_transfers == 0 and loader.sink.num_transfers == 0
    assert set(closed) <= {f"t{number}" for number in range(1, loader.opens + 1)}
    source.check_integrity()
    loader.sink.check_integrity()


@pytest.mark.parametrize("seed", range(40))
def test_no_rate_delay_or_size_stalls_the_window(seed: int) -> None:
    """The window shrinks and grows while parts of odd sizes are on their way; the source must never wait for credit
    while the sink waits for bytes."""
    random = Random(seed)
    rate_bytes_per_s = 10 ** random.uniform(4.3, 9)
    delay_s = random.choice([0.0, 0.0005, 0.02, 0.15])
    blobs = [random.randbytes(int(10 ** random.uniform(0, 5.5))) for _ in range(10)]
    net = SimulatedNetwork(seed=seed, rate_bytes_per_s=rate_bytes_per_s, delay_s=delay_s)
    source, sink = Source(greeting=GREETING, incarnation="s"), Sink(greeting=GREETING, incarnation="d")
    arrived: dict[int, bytes] = {}

    def on_source_event(event: Any) -> None:
        answer: source_io.SourceInput | None = None
        if isinstance(event, ev.TransferOpened):
            answer = source_io.AcceptTransfer(transfer_id="t", body={})
        elif isinstance(event, ev.ChunkRequested):
            answer = source_io.SupplyChunk(transfer_id="t", chunk=event.chunk, level="raw", blob=blobs[event.chunk])
        if answer is not None:
            net.later(net.now + random.random() * 0.05, lambda: net.tell_source("tcp://s", answer))

    def on_sink_event(event: Any) -> None:
        if isinstance(event, ev.BlobArrived):
            arrived[event.chunk] = bytes(event.blob)

    net.add_source("tcp://s", source, on_source_event)
    net.add_sink("sink", sink, on_sink_event)
    net.tell_sink("sink", sink_io.OpenTransfer(transfer_id="t", endpoint="tcp://s", body={}))
    for chunk in range(10):
        net.tell_sink("sink", sink_io.RequestChunk(transfer_id="t", chunk=chunk, level="raw"))
    # In mid-transfer the link gets ten times slower, or faster.
    change = random.choice([0.1, 10.0])
    net.later(0.3, lambda: setattr(net, "rate_bytes_per_s", net.rate_bytes_per_s * change))
    slowest = rate_bytes_per_s * min(1.0, change)
    bound_s = 3 + 60 * delay_s + 1.5 * sum(map(len, blobs)) / slowest
    assert net.run(until_s=bound_s, done=lambda: len(arrived) == 10), f"{sorted(arrived)} of 10 after {bound_s} s"
    assert [arrived[chunk] for chunk in range(10)] == blobs
    sink.check_integrity()
    source.check_integrity()
