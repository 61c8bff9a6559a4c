"""The receiving end of the transfer protocol as a pure machine: handle(event, now) -> [command].

Never sleeps, reads a clock or opens a socket. One Sink serves all links (source endpoints) and transfers of a
process. A link is one session with one source: it is greeted once, counts messages in both directions, and a gap,
a disconnect, a reset or ten silent seconds end it together with its transfers. The next open makes a new link with
a higher epoch, and with it a new identity, so nothing of the old session can be mistaken for the new one's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transport import events as ev
from transport import messages as msg
from transport import sink_io as io
from transport.errors import TooMuch, UnknownTransfer
from transport.limits import Limits, Pacing, Timing
from transport.messages import Greeting, find_mismatch, turned_away
from transport.sink_link import Ask, Broken, Link, LinkStats, Transfer


class Sink:
    def __init__(
        self,
        *,
        greeting: Greeting,
        incarnation: str,
        limits: Limits | None = None,
        timing: Timing | None = None,
        pacing: Pacing | None = None,
    ) -> None:
        self._greeting = greeting
        self._incarnation = incarnation
        self._limits = limits or Limits()
        self._timing = timing or Timing()
        self._pacing = pacing or Pacing()
        self._epoch = 0
        self._links: dict[str, Link] = {}  # by name
        self._by_endpoint: dict[str, Link] = {}
        self._transfers: dict[str, Transfer] = {}
        self._assembling_bytes = 0
        self._out: list[io.Command] = []
        self._now = 0.0
        self.num_dropped = 0  # packets of another session, duplicates, parts nobody waits for

    def handle(self, event: io.SinkInput, now: float) -> list[io.Command]:
        """Raises UnknownTransfer or TooMuch for calls of the owner, nothing for what a peer sent."""
        self._now = now
        self._INPUTS[type(event)](self, event)
        out = self._out[:]
        self._out.clear()  # the links hold this list
        return out

    # -- what the owner asks for --

    def _open(self, event: io.OpenTransfer) -> None:
        assert event.transfer_id not in self._transfers
        link = self._by_endpoint.get(event.endpoint) or self._connect(event)
        if len(link.transfers) >= self._limits.transfers_per_peer:
            raise TooMuch(f"{self._limits.transfers_per_peer} transfers are open to {event.endpoint}; close some")
        transfer = Transfer(id=event.transfer_id, link=link)
        self._transfers[transfer.id] = link.transfers[transfer.id] = transfer
        link.idle_since = None
        link.send(msg.Open(transfer=event.transfer_id, body=event.body))

    def _connect(self, event: io.OpenTransfer) -> Link:
        self._epoch += 1
        link = Link(
            endpoint=event.endpoint,
            incarnation=self._incarnation,
            epoch=self._epoch,
            pacing=self._pacing,
            now=self._now,
            out=self._out,
        )
        self._links[link.name] = self._by_endpoint[link.endpoint] = link
        self._out.append(io.Connect(link=link.name, endpoint=link.endpoint, server_public_key=event.server_public_key))
        link.greet(self._greeting.fields())
        return link

    def _request(self, event: io.RequestChunk) -> None:
        transfer = self._find(event.transfer_id)
        ask = transfer.asks.get(event.chunk)
        if ask is None:
            if len(transfer.asks) >= self._limits.chunks_per_transfer:
                raise TooMuch(f"{len(transfer.asks)} chunks are asked for in {event.transfer_id}; the limit")
            ask = Ask(number=transfer.next_ask, level=event.level, priority=event.priority)
            transfer.asks[event.chunk] = ask
            transfer.next_ask += 1
        elif (ask.level, ask.priority) == (event.level, event.priority):
            return
        elif ask.blob is not None and ask.priority == event.priority:
            return  # too late for another level: it is arriving
        elif ask.blob is None:
            ask.level = event.level
        ask.priority = event.priority
        transfer.link.send(
            msg.Request(
                transfer=transfer.id,
                chunk=event.chunk,
                level=ask.level,
                ask=ask.number,
                priority=ask.priority,
            )
        )

    def _withdraw(self, event: io.WithdrawChunk) -> None:
        transfer = self._find(event.transfer_id)
        ask = self._forget(transfer, event.chunk)
        if ask is not None:
            transfer.link.send(msg.Withdraw(transfer=event.transfer_id, chunk=event.chunk, ask=ask.number))

    def _close(self, event: io.CloseTransfer) -> None:
        transfer = self._transfers.get(event.transfer_id)
        if transfer is not None:  # closing twice, or what was lost meanwhile, is fine
            transfer.link.send(msg.Close(transfer=event.transfer_id, reason=event.reason))
            self._end(event.transfer_id)

    def _shutdown(self, event: io.Shutdown) -> None:
        for link in list(self._links.values()):
            link.send(msg.Goodbye(reason="the receiver shut down"))
            self._break(link, "the receiver shut down")

    def _find(self, transfer_id: str) -> Transfer:
        try:
            return self._transfers[transfer_id]
        except KeyError:
            raise UnknownTransfer(f"{transfer_id} is not open here; it was closed, refused or lost") from None

    # -- what comes from the network --

    def _received(self, event: io.Received) -> None:
        link, packet, message = self._links.get(event.link), event.packet, event.packet.message
        if link is None or packet.epoch != link.epoch:
            self.num_dropped += 1
            return
        if type(message) is msg.TurnedAway:
            return self._on_turned_away(link, message)
        if type(message) is msg.Reset:
            return self._break(link, f"the source at {link.endpoint} ended the session: {message.reason}")
        admitted = link.admit(packet, self._now)
        if admitted is False:
            self.num_dropped += 1
            return
        if isinstance(admitted, Broken):
            return self._break(link, admitted.reason)
        if link.suspect:
            link.suspect = False
            for transfer_id in link.transfers:
                self._notify(ev.TransferRecovered(transfer_id=transfer_id, at=self._now))
        handler = self._MESSAGES.get(type(message))
        if handler is None:
            return self._break(link, f"a source does not send {type(message).__name__}")
        handler(self, link, message)

    def _on_turned_away(self, link: Link, message: msg.TurnedAway) -> None:
        for transfer_id in list(link.transfers):
            self._notify(
                ev.Refused(
                    transfer_id=transfer_id,
                    at=self._now,
                    reason=message.reason,
                    field=message.field,
                    source_value=message.source_value,
                    sink_value=message.sink_value,
                )
            )
            self._end(transfer_id)
        self._break(link, message.reason)

    def _on_welcome(self, link: Link, message: msg.Welcome) -> None:
        differs = find_mismatch(source=message.fields, sink=self._greeting.fields())
        if differs is not None:
            return self._on_turned_away(link, turned_away(differs))
        link.on_welcome(message, self._now)

    def _on_accept(self, link: Link, message: msg.Accept) -> None:
        transfer = link.transfers.get(message.transfer)
        if transfer is not None and not transfer.opened:
            transfer.opened = True
            self._notify(ev.Opened(transfer_id=message.transfer, at=self._now, body=message.body))

    def _on_close(self, link: Link, message: msg.Close) -> None:
        transfer = link.transfers.get(message.transfer)
        if transfer is None:
            return
        self._end(transfer.id)
        ended = ev.TransferLost if transfer.opened else ev.Refused
        self._notify(ended(transfer_id=message.transfer, at=self._now, reason=message.reason))

    def _on_fail(self, link: Link, message: msg.Fail) -> None:
        transfer = link.transfers.get(message.transfer)
        ask = transfer.asks.get(message.chunk) if transfer is not None else None
        if transfer is not None and ask is not None and ask.number == message.ask:
            self._forget(transfer, message.chunk)
            self._notify(
                ev.ChunkFailed(transfer_id=message.transfer, at=self._now, chunk=message.chunk, reason=message.reason)
            )

    def _on_part(self, link: Link, part: msg.Part) -> None:
        wire_s = link.on_part(part, self._now)
        if isinstance(wire_s, Broken):
            return self._break(link, wire_s.reason)
        transfer = link.transfers.get(part.transfer)
        ask = transfer.asks.get(part.chunk) if transfer is not None else None
        if transfer is None or ask is None or ask.number != part.ask:
            self.num_dropped += 1  # closed or withdrawn while it was on its way
            return
        if ask.blob is None:
            if self._assembling_bytes + part.total > self._limits.assembling_bytes:
                limit_bytes = self._limits.assembling_bytes
                return self._break(link, f"more than {limit_bytes} bytes of unfinished blobs, the limit")
            self._assembling_bytes += part.total
        if not ask.add(part, wire_s, self._now):
            return self._break(link, f"chunk {part.chunk} came out of order")
        self._tell_arrival(transfer, part, ask, wire_s)

    def _tell_arrival(self, transfer: Transfer, part: msg.Part, ask: Ask, wire_s: float) -> None:
        assert ask.blob is not None
        self._notify(
            ev.PartArrived(
                transfer_id=part.transfer,
                at=self._now,
                chunk=part.chunk,
                level=part.level,
                bytes_received=ask.filled,
                total_bytes=part.total,
                part_bytes=len(part.data),
                wire_s=wire_s,
                link_bytes=transfer.link.received_bytes,
            )
        )
        if ask.filled < part.total:
            return
        sharing = sum(1 for other in transfer.link.transfers.values() if other.asks)
        self._forget(transfer, part.chunk)
        self._notify(
            ev.BlobArrived(
                transfer_id=part.transfer,
                at=self._now,
                chunk=part.chunk,
                level=part.level,
                blob=memoryview(ask.blob).toreadonly(),
                started_at=ask.started_at,
                wire_s=ask.wire_s,
                sharing=sharing,
            )
        )

    def _on_ping(self, link: Link, message: msg.Ping) -> None:
        link.send(msg.Pong(token=message.token, sent_us=int(self._now * 1e6)))

    def _on_pong(self, link: Link, message: msg.Pong) -> None:
        link.on_pong(message, self._now)

    def _on_goodbye(self, link: Link, message: msg.Goodbye) -> None:
        self._break(link, message.reason)

    def _link_down(self, event: io.LinkDown) -> None:
        link = self._links.get(event.link)
        if link is not None:
            self._break(link, event.reason)

    # -- time --

    def _tick(self, event: io.Tick) -> None:
        for link in list(self._links.values()):
            broken = link.tick(self._timing, self._now)
            if broken is not None:
                self._break(link, broken.reason)
            elif self._now - link.last_heard >= self._timing.suspect_s and not link.suspect:
                link.suspect = True
                for transfer_id in link.transfers:
                    self._notify(ev.TransferSuspect(transfer_id=transfer_id, at=self._now))

    # -- helpers --

    def _notify(self, event: ev.TransferEvent) -> None:
        self._out.append(io.Notify(event=event))

    def _forget(self, transfer: Transfer, chunk: int) -> Ask | None:
        ask = transfer.asks.pop(chunk, None)
        if ask is not None and ask.blob is not None:
            self._assembling_bytes -= len(ask.blob)
        return ask

    def _end(self, transfer_id: str) -> None:
        transfer = self._transfers.pop(transfer_id)
        for chunk in list(transfer.asks):
            self._forget(transfer, chunk)
        del transfer.link.transfers[transfer_id]
        if not transfer.link.transfers:
            transfer.link.idle_since = self._now

    def _break(self, link: Link, reason: str) -> None:
        for transfer_id in list(link.transfers):
            self._end(transfer_id)
            self._notify(ev.TransferLost(transfer_id=transfer_id, at=self._now, reason=reason))
        del self._links[link.name]
        if self._by_endpoint.get(link.endpoint) is link:
            del self._by_endpoint[link.endpoint]
        self._out.append(io.Disconnect(link=link.name))

    # -- what the owner may look at --

    def link_stats(self) -> list[LinkStats]:
        return [link.stats() for link in self._links.values()]

    @property
    def num_links(self) -> int:
        return len(self._links)

    @property
    def num_transfers(self) -> int:
        return len(self._transfers)

    def check_integrity(self) -> None:
        """Every count adds up and nothing points at what has ended. Run at every test's end."""
        assembling = 0
        for transfer_id, transfer in self._transfers.items():
            assert self._links[transfer.link.name].transfers[transfer_id] is transfer
            assembling += sum(len(ask.blob) for ask in transfer.asks.values() if ask.blob is not None)
        assert assembling == self._assembling_bytes, (assembling, self._assembling_bytes)
        assert sum(len(link.transfers) for link in self._links.values()) == len(self._transfers)
        assert {id(link) for link in self._by_endpoint.values()} == {id(link) for link in self._links.values()}
        for link in self._links.values():
            link.check_integrity()

    _INPUTS: dict[type, Callable[[Sink, Any], None]] = {
        io.OpenTransfer: _open,
        io.RequestChunk: _request,
        io.WithdrawChunk: _withdraw,
        io.CloseTransfer: _close,
        io.Received: _received,
        io.LinkDown: _link_down,
        io.Tick: _tick,
        io.Shutdown: _shutdown,
    }
    _MESSAGES: dict[type, Callable[[Sink, Link, Any], None]] = {
        msg.Welcome: _on_welcome,
        msg.Accept: _on_accept,
        msg.Close: _on_close,
        msg.Fail: _on_fail,
        msg.Part: _on_part,
        msg.Ping: _on_ping,
        msg.Pong: _on_pong,
        msg.Goodbye: _on_goodbye,
    }
