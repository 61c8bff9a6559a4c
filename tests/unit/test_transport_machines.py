"""The two pure machines, step by step and over a faultless link: what the protocol promises, one promise a test."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
from transport_world import GREETING, SOURCE, World, blob_of

from transport import events as ev
from transport import sink_io, source_io
from transport.errors import TooMuch, UnknownTransfer
from transport.limits import KB, MB, Limits
from transport.messages import Packet, Request, Withdraw
from transport.sink import Sink
from transport.source import Source


@pytest.fixture
def world() -> Iterator[World]:
    world = World()
    yield world
    world.end()


def test_a_blob_arrives_whole_and_timed(world: World) -> None:
    world.open()
    world.request(0)
    world.run(until=ev.BlobArrived)
    [opened], [blob] = world.got(ev.Opened), world.got(ev.BlobArrived)
    assert opened.body == {"ok": 1}
    assert (blob.chunk, blob.level, bytes(blob.blob)) == (0, "q1", blob_of(0, "q1", world.size))
    parts = world.got(ev.PartArrived)
    assert sum(part.part_bytes for part in parts) == world.size == parts[-1].bytes_received == parts[-1].total_bytes
    assert all(part.part_bytes <= 256 * KB for part in parts)
    assert opened.at - 1e-5 <= blob.started_at <= parts[0].at <= blob.at  # the clock on the wire ticks in µs
    assert blob.wire_s == pytest.approx(sum(part.wire_s for part in parts))


def test_wire_time_tells_the_link_rate() -> None:
    world = World(size=200 * KB, rate_bytes_per_s=2.5e6, delay_s=0.01)
    world.open()
    world.net.run(until_s=1.0)
    for chunk in range(10):
        world.request(chunk)
        world.run(1.0)  # with idle time between the chunks: it must not count
    rates = [len(blob.blob) / blob.wire_s for blob in world.got(ev.BlobArrived)]
    assert len(rates) == 10
    assert all(rate == pytest.approx(2.5e6, rel=0.05) for rate in rates)


def test_empty_blob(world: World) -> None:
    world.size = 0
    world.open()
    world.request(0)
    world.run(until=ev.BlobArrived)
    assert bytes(world.got(ev.BlobArrived)[0].blob) == b""


def test_a_standing_request_is_amended_until_it_is_taken(world: World) -> None:
    world.supplies = False
    world.open()
    world.request(0, "q1")
    world.run(1)
    world.request(0, "q4")
    world.run(1)
    assert [event.level for event in world.told(ev.ChunkRequested)] == ["q1", "q4"]
    assert world.source.take("t1", 0) == "q4"
    assert world.source.take("t1", 0) is None
    world.request(0, "q2")  # too late
    world.run(1)
    world.finish("t1", 0, "q4")
    world.run(1)
    assert [blob.level for blob in world.got(ev.BlobArrived)] == ["q4"]
    assert world.source.take("t1", 0) is None


def test_an_amendment_that_comes_after_the_blob_left_starts_nothing(world: World) -> None:
    world.supplies = False
    world.open()
    world.request(0, "q1")
    world.run(1)
    world.supply("t1", 0)  # on its way ...
    world.request(0, "q4")  # ... when the sink changes its mind
    world.run(1)
    assert [blob.level for blob in world.got(ev.BlobArrived)] == ["q1"]
    assert len(world.told(ev.ChunkRequested)) == 1


def test_a_chunk_can_be_asked_for_again(world: World) -> None:
    """After a bad checksum, or for a better level."""
    world.open()
    world.request(0, "q4")
    world.run(1)
    world.request(0, "q4")
    world.run(1)
    world.request(0, "lossless")
    world.run(1)
    assert [blob.level for blob in world.got(ev.BlobArrived)] == ["q4", "q4", "lossless"]


def test_withdraw_before_encoding(world: World) -> None:
    world.supplies = False
    world.open()
    world.request(0)
    world.run(1)
    world.ask(sink_io.WithdrawChunk(transfer_id="t1", chunk=0))
    world.run(1)
    assert world.source.take("t1", 0) is None
    world.request(0, "q3")
    world.run(1)
    assert world.source.take("t1", 0) == "q3"


def test_withdraw_while_it_is_encoded_then_ask_again(world: World) -> None:
    world.supplies = False
    world.open()
    world.request(0, "q1")
    world.run(1)
    assert world.source.take("t1", 0) == "q1"
    world.ask(sink_io.WithdrawChunk(transfer_id="t1", chunk=0))
    world.request(0, "q5")
    world.run(1)
    world.finish("t1", 0, "q1")  # nobody waits for it
    world.run(1)
    assert not world.got(ev.BlobArrived)
    world.supply("t1", 0)
    world.run(1)
    assert [blob.level for blob in world.got(ev.BlobArrived)] == ["q5"]


def test_withdraw_in_mid_blob_stops_the_rest() -> None:
    world = World(size=8 * MB, rate_bytes_per_s=2.5e6)
    world.open()
    world.request(0)
    world.run(until=ev.PartArrived)
    world.run(0.5)
    world.ask(sink_io.WithdrawChunk(transfer_id="t1", chunk=0))
    at_withdrawal = world.got(ev.PartArrived)[-1].link_bytes
    world.run(1.0)
    assert world.source.backlog_bytes("t1") == 0
    world.size = 10 * KB
    world.request(1)
    world.run(1.0)
    [blob] = world.got(ev.BlobArrived)
    assert blob.chunk == 1
    still_came = world.sink.link_stats()[0].received_bytes - at_withdrawal - 10 * KB
    assert still_came <= 0.1 * 2.5e6  # at most a tenth of a second of the link was committed


def test_little_is_committed_to_a_slow_link() -> None:
    world = World(size=2 * MB, rate_bytes_per_s=2.5e6, delay_s=0.002)
    world.open()
    for chunk in range(4):
        world.request(chunk)
    ahead = []
    for _ in range(200):
        world.run(0.01)
        ahead.append(world.sink.link_stats()[0].granted_ahead_bytes if world.sink.link_stats() else 0)
    assert max(ahead) <= 0.1 * 2.5e6
    received = world.sink.link_stats()[0].received_bytes
    assert received >= 0.9 * 2.5e6 * 2.0  # and still the link was busy


def test_a_long_fat_link_is_filled() -> None:
    world = World(size=16 * MB, rate_bytes_per_s=125e6, delay_s=0.02)
    world.open()
    for chunk in range(16):
        world.request(chunk)
    world.run(0.5)
    before = world.sink.link_stats()[0].received_bytes
    world.run(1.0)
    assert world.sink.link_stats()[0].received_bytes - before >= 0.9 * 125e6


def test_requests_wait_for_the_accept(world: World) -> None:
    world.accepts = False
    world.open()
    world.request(0)
    world.run(1)
    assert not world.told(ev.ChunkRequested) and world.source.take("t1", 0) is None
    world.tell(source_io.AcceptTransfer(transfer_id="t1", body={}))
    world.run(1)
    assert len(world.got(ev.BlobArrived)) == 1


def test_refuse_and_end(world: World) -> None:
    world.accepts = False
    world.open()
    world.run(1)
    world.tell(source_io.EndTransfer(transfer_id="t1", reason="no such document"))
    world.run(1)
    assert [(event.reason, event.field) for event in world.got(ev.Refused)] == [("no such document", None)]
    with pytest.raises(UnknownTransfer):
        world.request(0)
    world.accepts = True
    world.open("t2")
    world.run(1)
    world.tell(source_io.EndTransfer(transfer_id="t2", reason="the worker drains"))
    world.run(1)
    assert [event.reason for event in world.got(ev.TransferLost)] == ["the worker drains"]


def test_a_failed_chunk_is_told_and_can_be_asked_for_again(world: World) -> None:
    world.supplies = False
    world.open()
    world.request(0)
    world.run(1)
    world.tell(source_io.FailChunk(transfer_id="t1", chunk=0, reason="out of pages"))
    world.run(1)
    assert [event.reason for event in world.got(ev.ChunkFailed)] == ["out of pages"]
    world.supplies = True
    world.request(0)
    world.run(1)
    assert len(world.got(ev.BlobArrived)) == 1


def test_a_wrong_greeting_is_refused_in_words() -> None:
    world = World()
    world.sink._greeting = replace(GREETING, codec_profile="p2")
    world.open()
    world.request(0)
    world.run(1)
    [refused] = world.got(ev.Refused)
    assert (refused.field, refused.source_value, refused.sink_value) == ("codec_profile", "p1", "p2")
    assert all(word in refused.reason for word in ("codec_profile", "'p1'", "'p2'"))
    assert not world.source_events and world.sink.num_transfers == 0


def test_a_killed_source_is_noticed(world: World) -> None:
    world.size = 50 * MB
    world.open()
    world.request(0)
    world.run(until=ev.PartArrived)
    world.net.kill_source(SOURCE)
    at = world.net.now
    world.run(until=ev.TransferLost)
    assert world.net.now - at < 1


def test_a_silent_source_is_suspect_then_lost(world: World) -> None:
    world.open()
    world.run(1)
    world.net.partitioned = True
    at = world.net.now
    world.run(20, until=ev.TransferLost)
    [suspect], [lost] = world.got(ev.TransferSuspect), world.got(ev.TransferLost)
    assert 2.5 < suspect.at - at < 3.5 and 9.5 < lost.at - at < 10.5
    world.run(12)
    assert [event.reason for event in world.told(ev.TransferClosed)] == ["the receiver was silent for 10 s"]


def test_a_suspect_source_can_recover(world: World) -> None:
    world.supplies = False
    world.open()
    world.request(0)
    world.run(1)
    world.net.partitioned = True
    world.net.later(world.net.now + 4, lambda: setattr(world.net, "partitioned", False))
    world.run(30, until=ev.TransferLost)
    # Heartbeats were lost meanwhile, and so the sequence has a gap: it recovers only if nothing was missed.
    assert world.got(ev.TransferSuspect) and world.got(ev.TransferLost)
    world.open("t2")
    world.run(1)
    assert len(world.got(ev.Opened)) == 2


def test_no_source_at_all() -> None:
    world = World()
    world.net.kill_source(SOURCE)
    world.open()
    world.run(11)
    [lost] = world.got(ev.TransferLost)
    assert SOURCE in lost.reason and world.net.now >= 10


def test_a_restarted_source_is_a_new_life(world: World) -> None:
    world.open()
    world.run(1)
    world.net.kill_source(SOURCE, noticed=False)
    world.source = Source(greeting=GREETING, incarnation="s2")
    world.net.add_source(SOURCE, world.source, world.on_source_event)
    world.run(until=ev.TransferLost)
    assert "greet again" in world.got(ev.TransferLost)[0].reason
    world.open("t2")
    world.request(0, transfer_id="t2")
    world.run(1)
    assert [blob.transfer_id for blob in world.got(ev.BlobArrived)] == ["t2"]


def test_shutdown_of_either_end(world: World) -> None:
    world.open()
    world.run(1)
    world.tell(source_io.Shutdown(reason="scaled down"))
    world.run(1)
    assert world.got(ev.TransferLost)[-1].reason == "scaled down"
    world.open("t2")
    world.run(1)
    world.ask(sink_io.Shutdown())
    world.run(1)
    assert world.told(ev.TransferClosed)[-1].reason == "the receiver shut down"


def test_stale_packets_are_dropped(world: World) -> None:
    world.supplies = False
    world.open()
    world.run(1)
    session = next(iter(world.source._sessions.values()))
    wanted = Request(transfer="t1", chunk=7, level="q1", ask=1, priority=0)
    now = (session.incarnation, session.epoch, session._in_seq)
    for incarnation, epoch, seq in (("older", now[1], now[2] + 1), (now[0], now[1] - 1, now[2] + 1), now):
        packet = Packet(incarnation=incarnation, epoch=epoch, seq=seq, message=wanted)
        world.tell(source_io.Received(peer=session.peer, packet=packet))
    assert world.source.num_dropped == 3 and not world.told(ev.ChunkRequested)
    # One sink cannot touch the transfers of another.
    world.net.add_sink("other", Sink(greeting=GREETING, incarnation="d2"), lambda event: None)
    world.net.tell_sink("other", sink_io.OpenTransfer(transfer_id="t9", endpoint=SOURCE, body={}))
    world.net.run(until_s=world.net.now + 1)
    other = world.source._sessions["d2/1"]
    stolen = Withdraw(transfer="t1", chunk=0, ask=99)
    packet = Packet(incarnation="d2", epoch=1, seq=other._in_seq + 1, message=stolen)
    world.request(0)
    world.run(1)
    world.tell(source_io.Received(peer=other.peer, packet=packet))
    assert world.source.take("t1", 0) == "q1"
    world.net.tell_sink("other", sink_io.Shutdown())


def test_limits() -> None:
    world = World(limits=Limits(chunks_per_transfer=3, transfers_per_peer=2, blob_bytes=1 * MB))
    world.supplies = False
    world.open("t1")
    world.open("t2")
    with pytest.raises(TooMuch):
        world.open("t3")
    for chunk in range(3):
        world.request(chunk)
    with pytest.raises(TooMuch):
        world.request(3)
    world.run(1)
    assert world.source.take("t1", 0) == "q1"
    world.size = 2 * MB
    world.finish("t1", 0, "q1")
    world.run(1)
    assert "limit" in world.got(ev.ChunkFailed)[0].reason


def test_an_idle_link_is_given_up(world: World) -> None:
    world.open()
    world.run(1)
    world.ask(sink_io.CloseTransfer(transfer_id="t1"))
    world.run(65)
    assert world.sink.link_stats() == [] and not world.source._sessions
