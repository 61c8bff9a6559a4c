"""What goes first at a source, and when it tells its owner to encode the next chunk: over a faultless link."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from transport_world import World, blob_of

from transport import events as ev
from transport import sink_io
from transport.limits import KB, MB
from transport.messages import Packet, Part


@pytest.fixture
def world() -> Iterator[World]:
    world = World()
    yield world
    world.end()


def test_transfers_of_one_peer_take_turns() -> None:
    world = World(size=1 * MB, rate_bytes_per_s=2.5e6)
    for name in ("a", "b", "c"):
        world.open(name)
        world.request(0, transfer_id=name)
    world.run(0.6)
    shares = dict.fromkeys("abc", 0)
    for part in world.got(ev.PartArrived):
        shares[part.transfer_id] += part.part_bytes
    assert max(shares.values()) - min(shares.values()) <= 128 * KB
    world.run(5)
    assert len(world.got(ev.BlobArrived)) == 3
    assert [blob.sharing for blob in world.got(ev.BlobArrived)] == [3, 2, 1]


def test_urgent_chunks_go_first() -> None:
    world = World(size=200 * KB, rate_bytes_per_s=2.5e6)
    world.open("refine")
    world.open("urgent")
    for chunk in range(5):
        world.request(chunk, transfer_id="refine", priority=9)
    world.run(0.05)
    world.request(0, transfer_id="urgent", priority=0)
    world.run(5)
    order = [(blob.transfer_id, blob.chunk) for blob in world.got(ev.BlobArrived)]
    assert order.index(("urgent", 0)) <= 1
    assert len(order) == 6


def test_an_urgent_chunk_overtakes_a_blob_under_way_of_the_same_transfer(world: World) -> None:
    world.net.rate_bytes_per_s = 2.5e6
    world.size = 1 * MB
    world.open()
    world.request(7, "q3>q1", priority=5)
    world.run(until=ev.PartArrived)
    asked_at = world.net.now
    world.size = 50 * KB
    world.request(0, "q2", priority=1)
    world.run(5)
    first, second = world.got(ev.BlobArrived)
    assert (first.chunk, second.chunk) == (0, 7)
    # The megabyte would have taken 0.4 s; what stood before the urgent one was the window alone.
    assert first.at - asked_at < 0.1
    assert bytes(first.blob) == blob_of(0, "q2", 50 * KB) and bytes(second.blob) == blob_of(7, "q3>q1", 1 * MB)
    assert second.level == "q3>q1" and second.started_at < first.started_at


def test_equally_urgent_chunks_of_a_transfer_go_whole_one_after_the_other(world: World) -> None:
    world.net.rate_bytes_per_s = 2.5e6
    world.open()
    for chunk in (4, 2, 3):
        world.request(chunk)
    world.run(5)
    parts = [part.chunk for part in world.got(ev.PartArrived)]
    assert parts == sorted(parts, key=[4, 2, 3].index)


@pytest.mark.parametrize("begun", [False, True])
def test_an_amended_priority_moves_what_is_unsent(world: World, begun: bool) -> None:
    world.net.rate_bytes_per_s = 2.5e6
    world.open()
    for chunk in range(4):
        world.request(chunk, priority=10 + chunk)
    if begun:  # the first is under way when the others become more urgent, and at last it again
        world.run(until=ev.PartArrived)
    world.run(0.03)
    world.request(3, priority=1)
    world.request(2, "q4", priority=2)  # too late for another level: it is encoded
    world.run(0.02)
    world.request(0, priority=0)
    world.run(5)
    blobs = world.got(ev.BlobArrived)
    assert [blob.chunk for blob in blobs] == [0, 3, 2, 1]
    assert {blob.level for blob in blobs} == {"q1"}
    assert len(world.told(ev.ChunkRequested)) == 4 and world.source.num_dropped == 0


def test_a_priority_amended_while_the_chunk_is_encoded_counts(world: World) -> None:
    world.supplies = False
    world.net.rate_bytes_per_s = 2.5e6
    world.open()
    for chunk in (0, 1):
        world.request(chunk, priority=chunk)
    world.run(0.1)
    assert [world.source.take("t1", chunk) for chunk in (0, 1)] == ["q1", "q1"]
    world.request(0, priority=2)
    world.run(0.1)
    for chunk in (0, 1):
        world.finish("t1", chunk, "q1")
    world.run(5)
    assert [blob.chunk for blob in world.got(ev.BlobArrived)] == [1, 0]


def test_an_urgent_transfer_overtakes_a_blob_under_way_of_another(world: World) -> None:
    world.net.rate_bytes_per_s = 2.5e6
    world.size = 1 * MB
    world.open("refined")
    world.open("urgent")
    world.request(0, "q3>q1", transfer_id="refined", priority=2**53 - 1)
    world.run(until=ev.PartArrived)
    world.request(0, transfer_id="urgent", priority=3)
    world.run(5)
    assert [blob.transfer_id for blob in world.got(ev.BlobArrived)] == ["urgent", "refined"]


def test_backlog_low_tells_when_to_encode_the_next() -> None:
    world = World(size=800 * KB, rate_bytes_per_s=2.5e6)
    world.open()
    world.request(0)
    world.run(5)
    [blob] = world.got(ev.BlobArrived)
    low, empty = world.told(ev.BacklogLow)
    # Some 80 ms of the link before the last part leaves, and when it has left.
    assert 0.02 < empty.at - low.at < 0.15 and empty.at < blob.at


def test_backlog_low_after_a_withdrawal(world: World) -> None:
    world.net.rate_bytes_per_s = 2.5e6
    world.open()
    world.size = 2 * MB
    for chunk in range(2):
        world.request(chunk)
    world.run(0.3)
    assert not world.told(ev.BacklogLow)
    world.ask(sink_io.WithdrawChunk(transfer_id="t1", chunk=1))
    world.run(0.05)
    assert not world.told(ev.BacklogLow)  # most of the first is still unsent
    world.ask(sink_io.WithdrawChunk(transfer_id="t1", chunk=0))
    world.run(1)
    assert len(world.told(ev.BacklogLow)) == 1 and world.source.backlog_bytes("t1") == 0


@pytest.mark.parametrize("offset,total", [(2, 10), (0, 10), (5, 11)])
def test_parts_of_one_blob_must_come_in_order(world: World, offset: int, total: int) -> None:
    """Other blobs may come between them, a gap or a repetition may not: the source is then no source of ours."""
    world.supplies = False
    world.open()
    world.request(0)
    world.run(1)
    [link] = world.sink._links.values()
    for start, size in ((0, 10), (offset, total)):
        part = Part(transfer="t1", chunk=0, ask=1, level="q1", offset=start, total=size, sent_us=0, data=bytes(5))
        packet = Packet(incarnation="s1", epoch=link.epoch, seq=link._in_seq + 1, message=part)
        world.ask(sink_io.Received(link=link.name, packet=packet))
    [lost] = world.got(ev.TransferLost)
    assert "out of order" in lost.reason
