"""Transfers within one process: the same calls and events as over a socket, and no more blobs ahead than stated."""

from __future__ import annotations

import queue
from collections.abc import Iterator
from typing import Any

import pytest

from transport import events as ev
from transport.errors import TransportClosed
from transport.local_transfers import MAX_IN_HAND, LocalTransfers

LATEST_S = 20.0


class World:
    """Both ends; what came to each, in order."""

    def __init__(self) -> None:
        self.to_source: queue.Queue[Any] = queue.Queue()
        self.to_sink: queue.Queue[Any] = queue.Queue()
        self.link = LocalTransfers(self.to_source.put)

    def open(self) -> str:
        transfer = self.link.open({"prompt": 7}, self.to_sink.put)
        assert self.source(ev.TransferOpened).body == {"prompt": 7}
        self.link.accept(transfer, {"stored": 3})
        assert self.sink(ev.Opened).body == {"stored": 3}
        return transfer

    def source(self, kind: type) -> Any:
        event = self.to_source.get(timeout=LATEST_S)
        assert isinstance(event, kind), event
        return event

    def sink(self, kind: type) -> Any:
        event = self.to_sink.get(timeout=LATEST_S)
        assert isinstance(event, kind), event
        return event

    def nothing_more(self) -> None:
        """All that was to be delivered is, and was looked at."""
        other = self.link.open({}, self.to_sink.put)
        assert self.source(ev.TransferOpened).transfer_id == other
        self.link.refuse(other, "only asked")
        assert self.sink(ev.Refused).transfer_id == other
        assert self.to_source.empty() and self.to_sink.empty()


@pytest.fixture
def world() -> Iterator[World]:
    made = World()
    yield made
    made.link.shutdown()


def test_a_chunk_is_asked_for_taken_and_supplied(world: World) -> None:
    transfer = world.open()
    assert transfer in world.link and "decode-0-12.1" not in world.link
    world.link.request(transfer, 3, "q1", priority=5)
    asked = world.source(ev.ChunkRequested)
    assert (asked.chunk, asked.level, asked.priority) == (3, "q1", 5)
    world.link.request(transfer, 3, "q2", priority=4)
    assert world.source(ev.ChunkRequested).level == "q2"
    assert world.link.take(transfer, 3) == "q2" and world.link.take(transfer, 3) is None
    blob = bytes(1000)
    world.link.supply(transfer, 3, "q2", blob)
    part, arrived = world.sink(ev.PartArrived), world.sink(ev.BlobArrived)
    assert (part.bytes_received, part.total_bytes, part.part_bytes, part.link_bytes) == (1000,) * 4
    assert (arrived.chunk, arrived.level) == (3, "q2") and arrived.blob.obj is blob, "not copied"
    assert part.wire_s > 0
    world.link.close(transfer)
    assert world.source(ev.TransferClosed).transfer_id == transfer
    world.link.close(transfer)
    world.nothing_more()


def test_what_is_withdrawn_is_not_taken_and_what_fails_is_told(world: World) -> None:
    transfer = world.open()
    for chunk in (0, 1):
        world.link.request(transfer, chunk, "lossless")
        world.source(ev.ChunkRequested)
    world.link.withdraw(transfer, 0)
    assert world.link.take(transfer, 0) is None
    world.link.fail(transfer, 1, "no longer stored")
    assert world.sink(ev.ChunkFailed).reason == "no longer stored" and world.link.take(transfer, 1) is None


def test_requests_before_the_source_accepts_wait(world: World) -> None:
    transfer = world.link.open({}, world.to_sink.put)
    world.link.request(transfer, 0, "lossless", priority=2)
    world.source(ev.TransferOpened)
    world.link.accept(transfer)
    assert world.source(ev.ChunkRequested).priority == 2
    world.sink(ev.Opened)


def test_the_source_is_held_back_until_blobs_are_used(world: World) -> None:
    num_in_hand = 0

    def keep(event: Any) -> None:
        nonlocal num_in_hand
        if isinstance(event, ev.BlobArrived):
            num_in_hand += 1
            world.link.set_in_hand(transfer, num_in_hand)
        world.to_sink.put(event)

    transfer = world.link.open({}, keep)
    world.source(ev.TransferOpened)
    for chunk in range(MAX_IN_HAND):
        assert world.link.backlog_bytes(transfer) == 0
        world.link.supply(transfer, chunk, "lossless", b"blob")
        world.sink(ev.PartArrived), world.sink(ev.BlobArrived)
    assert world.link.backlog_bytes(transfer) > 0
    world.nothing_more()
    world.link.set_in_hand(transfer, MAX_IN_HAND - 1)
    assert world.source(ev.BacklogLow).transfer_id == transfer and world.link.backlog_bytes(transfer) == 0
    world.link.set_in_hand(transfer, MAX_IN_HAND - 2)
    world.nothing_more()


def test_nothing_comes_of_a_transfer_that_was_closed(world: World) -> None:
    transfer = world.open()
    world.link.close(transfer)
    world.source(ev.TransferClosed)
    world.link.request(transfer, 0, "lossless")
    world.link.withdraw(transfer, 0)
    world.link.set_in_hand(transfer, 3)
    world.link.accept(transfer)
    world.link.supply(transfer, 0, "lossless", b"blob")
    world.link.fail(transfer, 0, "too late")
    assert world.link.take(transfer, 0) is None and world.link.backlog_bytes(transfer) == 0
    world.nothing_more()


def test_an_end_that_raises_does_not_stop_the_others(world: World) -> None:
    def broken(event: object) -> None:
        raise RuntimeError("a bug")

    transfer = world.link.open({}, broken)
    world.source(ev.TransferOpened)
    world.link.accept(transfer)
    world.open()


def test_a_shut_down_source_ends_what_is_open(world: World) -> None:
    transfer = world.open()
    world.link.shutdown("the end")
    lost = world.sink(ev.TransferLost)
    assert (lost.transfer_id, lost.reason) == (transfer, "the end")
    with pytest.raises(TransportClosed):
        world.link.open({}, world.to_sink.put)
