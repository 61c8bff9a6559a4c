"""The sending end of the transfer protocol as a pure machine: handle(event, now) -> [command].

Never sleeps, reads a clock or opens a socket. One Source serves all sinks of a process. Per sink there is a session
with one credit for all its transfers. The most urgent blob goes first, part by part, so that one that becomes urgent
overtakes another that is under way; the parts of one blob stay in order, and transfers that are equally urgent take
turns. A chunk request stands, and may be amended, until the owner takes it to encode it; its priority even later.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transport import events as ev
from transport import messages as msg
from transport import source_io as io
from transport.limits import Limits, Timing
from transport.messages import Greeting, Message, Packet, find_mismatch, turned_away
from transport.source_session import Outgoing, Session, Standing, Transfer

LOW_WATER_PARTS = 8  # a part takes some 10 ms, so this leaves 80 ms to encode the next chunk


class Source:
    def __init__(
        self,
        *,
        greeting: Greeting,
        incarnation: str,
        limits: Limits | None = None,
        timing: Timing | None = None,
    ) -> None:
        self._greeting = greeting
        self._incarnation = incarnation
        self._limits = limits or Limits()
        self._timing = timing or Timing()
        self._sessions: dict[str, Session] = {}  # by peer: the identity of its socket
        self._transfers: dict[str, Transfer] = {}
        self._queued_bytes = 0
        self._out: list[io.Command] = []
        self._now = 0.0
        self.num_dropped = 0  # packets of another session, duplicates, blobs nobody waits for

    def handle(self, event: io.SourceInput, now: float) -> list[io.Command]:
        self._now = now
        self._INPUTS[type(event)](self, event)
        out = self._out[:]
        self._out.clear()  # the sessions hold this list
        return out

    # -- what the owner does; a transfer that has ended meanwhile is no error --

    def _accept(self, event: io.AcceptTransfer) -> None:
        transfer = self._transfers.get(event.transfer_id)
        if transfer is None or transfer.accepted:
            return
        transfer.accepted = True
        self._send(transfer.session, msg.Accept(transfer=transfer.id, body=event.body))
        for chunk, standing in transfer.standing.items():
            self._announce(transfer, chunk, standing)

    def take(self, transfer_id: str, chunk: int) -> str | None:
        """The level to encode this chunk at, now; from here on it cannot be amended. None if there is nothing to do:
        withdrawn, closed, or taken before."""
        transfer = self._transfers.get(transfer_id)
        standing = transfer.standing.get(chunk) if transfer is not None and transfer.accepted else None
        if standing is None or standing.taken:
            return None
        standing.taken = True
        return standing.level

    def _supply(self, event: io.SupplyChunk) -> None:
        transfer = self._transfers.get(event.transfer_id)
        standing = transfer.standing.get(event.chunk) if transfer is not None else None
        if transfer is None or standing is None or not (standing.taken or standing.level == event.level):
            self.num_dropped += 1  # withdrawn or closed while it was encoded
            return
        blob = memoryview(event.blob).cast("B")
        size = len(blob)
        if size > self._limits.blob_bytes or self._queued_bytes + size > self._limits.queued_bytes:
            reason = f"a blob of {size} bytes passes the source's limits"
            return self._fail(io.FailChunk(transfer_id=transfer.id, chunk=event.chunk, reason=reason))
        del transfer.standing[event.chunk]
        transfer.finished[event.chunk] = standing.ask
        outgoing = Outgoing(
            chunk=event.chunk, ask=standing.ask, level=event.level, priority=standing.priority, blob=blob
        )
        transfer.enqueue(outgoing)
        self._queued_bytes += size
        self._pump(transfer.session)

    def _fail(self, event: io.FailChunk) -> None:
        transfer = self._transfers.get(event.transfer_id)
        standing = transfer.standing.pop(event.chunk, None) if transfer is not None else None
        if transfer is None or standing is None:
            return
        transfer.finished[event.chunk] = standing.ask
        reason = event.reason[: self._limits.reason_chars]
        self._send(
            transfer.session,
            msg.Fail(transfer=transfer.id, chunk=event.chunk, ask=standing.ask, reason=reason),
        )

    def _end_by_owner(self, event: io.EndTransfer) -> None:
        transfer = self._transfers.get(event.transfer_id)
        if transfer is not None:
            reason = event.reason[: self._limits.reason_chars]
            self._send(transfer.session, msg.Close(transfer=transfer.id, reason=reason))
            self._end(transfer)

    def _shutdown(self, event: io.Shutdown) -> None:
        for session in list(self._sessions.values()):
            self._send(session, msg.Goodbye(reason=event.reason))
            self._drop(session, event.reason)

    # -- what comes from the network --

    def _received(self, event: io.Received) -> None:
        packet, message = event.packet, event.packet.message
        if type(message) is msg.Hello:
            return self._on_hello(event.peer, packet, message)
        session = self._sessions.get(event.peer)
        if session is None:
            self.num_dropped += 1
            if type(message) not in (msg.Reset, msg.TurnedAway, msg.Goodbye, msg.Close):
                self._send_outside(event.peer, packet.epoch, msg.Reset(reason="no such session here; greet again"))
            return
        admitted = session.admit(packet, self._now)
        if admitted is False:
            self.num_dropped += 1
            return
        if isinstance(admitted, str):
            return self._reset(session, admitted)
        handler = self._MESSAGES.get(type(message))
        if handler is None:
            return self._reset(session, f"a receiver does not send {type(message).__name__}")
        handler(self, session, message)

    def _on_hello(self, peer: str, packet: Packet, hello: msg.Hello) -> None:
        if peer in self._sessions or packet.seq != 1:
            self.num_dropped += 1  # a duplicate
            return
        for other in list(self._sessions.values()):
            if (other.incarnation, other.via) == (packet.incarnation, hello.via):
                if other.epoch >= packet.epoch:
                    self.num_dropped += 1  # late: this sink has greeted again since
                    return
                self._drop(other, "the receiver greeted again")
        differs = find_mismatch(source=self._greeting.fields(), sink=hello.fields)
        if differs is not None:
            return self._send_outside(peer, packet.epoch, turned_away(differs))
        if len(self._sessions) >= self._limits.peers:
            reason = f"{self._limits.peers} receivers are connected already, the limit of this source"
            return self._send_outside(peer, packet.epoch, msg.Reset(reason=reason))
        session = self._sessions[peer] = Session(
            peer=peer, own_incarnation=self._incarnation, hello=packet, via=hello.via, now=self._now, out=self._out
        )
        self._send(session, msg.Welcome(sent_us=int(self._now * 1e6), fields=self._greeting.fields()))

    def _on_open(self, session: Session, message: msg.Open) -> None:
        if message.transfer in self._transfers:
            return self._send(session, msg.Close(transfer=message.transfer, reason="this transfer id is in use"))
        if len(session.transfers) >= self._limits.transfers_per_peer:
            reason = f"{self._limits.transfers_per_peer} transfers are open, the limit per receiver"
            return self._send(session, msg.Close(transfer=message.transfer, reason=reason))
        transfer = Transfer(id=message.transfer, session=session)
        self._transfers[transfer.id] = session.transfers[transfer.id] = transfer
        self._notify(
            ev.TransferOpened(transfer_id=transfer.id, at=self._now, peer=session.incarnation, body=message.body)
        )

    def _on_request(self, session: Session, message: msg.Request) -> None:
        transfer = session.transfers.get(message.transfer)
        if transfer is None:
            self.num_dropped += 1  # it has ended
            return
        if message.ask <= transfer.finished.get(message.chunk, 0):
            # Encoded: too late for another level, but what waits here can still be moved ahead or back.
            if not transfer.reprioritize(message.chunk, message.ask, message.priority):
                self.num_dropped += 1
            return
        standing = transfer.want(message)
        if len(transfer.standing) + len(transfer.finished) > 2 * self._limits.chunks_per_transfer:
            reason = f"more than {self._limits.chunks_per_transfer} chunks asked for in one transfer"
            return self._end_by_owner(io.EndTransfer(transfer_id=transfer.id, reason=reason))
        if transfer.accepted and not standing.taken:
            self._announce(transfer, message.chunk, standing)

    def _on_withdraw(self, session: Session, message: msg.Withdraw) -> None:
        transfer = session.transfers.get(message.transfer)
        if transfer is None:
            return
        transfer.finished[message.chunk] = max(message.ask, transfer.finished.get(message.chunk, 0))
        standing = transfer.standing.get(message.chunk)
        if standing is not None and standing.ask <= message.ask:
            del transfer.standing[message.chunk]
        dropped = transfer.discard(message.chunk, message.ask)
        if dropped:
            self._queued_bytes -= dropped
            self._tell_if_low(transfer, transfer.unsent_bytes + dropped)
            self._pump(session)

    def _on_credit(self, session: Session, message: msg.Credit) -> None:
        session.limit_bytes = max(session.limit_bytes, message.limit_bytes)
        session.part_bytes = max(1024, min(message.part_bytes, self._limits.part_bytes))
        self._pump(session)

    def _on_close(self, session: Session, message: msg.Close) -> None:
        transfer = session.transfers.get(message.transfer)
        if transfer is not None:
            self._end(transfer)
            self._notify(ev.TransferClosed(transfer_id=transfer.id, at=self._now, reason=message.reason))

    def _on_ping(self, session: Session, message: msg.Ping) -> None:
        self._send(session, msg.Pong(token=message.token, sent_us=int(self._now * 1e6)))

    def _on_pong(self, session: Session, message: msg.Pong) -> None:
        pass  # hearing it was the point

    def _on_goodbye(self, session: Session, message: msg.Goodbye) -> None:
        self._drop(session, message.reason)

    def _peer_gone(self, event: io.PeerGone) -> None:
        session = self._sessions.get(event.peer)
        if session is not None:
            self._drop(session, event.reason)

    # -- time --

    def _tick(self, event: io.Tick) -> None:
        for session in list(self._sessions.values()):
            silent_s = self._now - session.last_heard
            if silent_s >= self._timing.lease_s:
                self._drop(session, f"the receiver was silent for {self._timing.lease_s:g} s")
                continue
            session.suspect = silent_s >= self._timing.suspect_s
            if self._now - session.last_sent >= self._timing.heartbeat_s:
                self._send(session, msg.Ping(token=0))

    # -- sending --

    def _pump(self, session: Session) -> None:
        """io.Send parts while the credit lasts."""
        while (following := session.next_part(self._now)) is not None:
            transfer, part = following
            size = len(part.data)
            self._queued_bytes -= size
            self._send(session, part)
            self._tell_if_low(transfer, transfer.unsent_bytes + size)

    def _tell_if_low(self, transfer: Transfer, before: int) -> None:
        """When what is unsent falls to the low water, and when it falls to nothing, by sending or by a withdrawal."""
        low = LOW_WATER_PARTS * transfer.session.part_bytes
        if transfer.unsent_bytes == 0 or before > low >= transfer.unsent_bytes:
            self._notify(ev.BacklogLow(transfer_id=transfer.id, at=self._now))

    def _send(self, session: Session, message: Message) -> None:
        session.send(message, self._now)

    def _send_outside(self, peer: str, epoch: int, message: Message) -> None:
        packet = Packet(incarnation=self._incarnation, epoch=epoch, seq=0, message=message)
        self._out.append(io.Send(peer=peer, packet=packet))
        self._out.append(io.Forget(peer=peer))

    def _announce(self, transfer: Transfer, chunk: int, standing: Standing) -> None:
        self._notify(
            ev.ChunkRequested(
                transfer_id=transfer.id, at=self._now, chunk=chunk, level=standing.level, priority=standing.priority
            )
        )

    def _notify(self, event: ev.SourceEvent) -> None:
        self._out.append(io.Notify(event=event))

    # -- endings --

    def _reset(self, session: Session, reason: str) -> None:
        self._send_outside(session.peer, session.epoch, msg.Reset(reason=reason))
        self._drop(session, reason)

    def _drop(self, session: Session, reason: str) -> None:
        del self._sessions[session.peer]
        self._out.append(io.Forget(peer=session.peer))
        for transfer in list(session.transfers.values()):
            self._end(transfer)
            self._notify(ev.TransferClosed(transfer_id=transfer.id, at=self._now, reason=reason))

    def _end(self, transfer: Transfer) -> None:
        self._queued_bytes -= transfer.unsent_bytes
        transfer.queue.clear()
        transfer.session.ready.pop(transfer.id, None)
        del self._transfers[transfer.id], transfer.session.transfers[transfer.id]

    # -- what the owner may look at --

    def backlog_bytes(self, transfer_id: str) -> int:
        """Supplied and not yet sent. Encode the next chunk when this is low: until then its level can be amended."""
        transfer = self._transfers.get(transfer_id)
        return transfer.unsent_bytes if transfer is not None else 0

    @property
    def num_transfers(self) -> int:
        return len(self._transfers)

    @property
    def num_sessions(self) -> int:
        return len(self._sessions)

    @property
    def suspects(self) -> list[str]:
        return [session.incarnation for session in self._sessions.values() if session.suspect]

    def check_integrity(self) -> None:
        """Every count adds up and nothing points at what has ended. Run at every test's end."""
        assert sum(len(session.transfers) for session in self._sessions.values()) == len(self._transfers)
        assert sum(transfer.unsent_bytes for transfer in self._transfers.values()) == self._queued_bytes
        for transfer in self._transfers.values():
            assert self._sessions[transfer.session.peer].transfers[transfer.id] is transfer
            transfer.check_integrity()
        for session in self._sessions.values():
            assert session.sent_bytes <= session.limit_bytes

    _INPUTS: dict[type, Callable[[Source, Any], None]] = {
        io.AcceptTransfer: _accept,
        io.SupplyChunk: _supply,
        io.FailChunk: _fail,
        io.EndTransfer: _end_by_owner,
        io.Received: _received,
        io.PeerGone: _peer_gone,
        io.Tick: _tick,
        io.Shutdown: _shutdown,
    }
    _MESSAGES: dict[type, Callable[[Source, Session, Any], None]] = {
        msg.Open: _on_open,
        msg.Request: _on_request,
        msg.Withdraw: _on_withdraw,
        msg.Credit: _on_credit,
        msg.Close: _on_close,
        msg.Ping: _on_ping,
        msg.Pong: _on_pong,
        msg.Goodbye: _on_goodbye,
    }
