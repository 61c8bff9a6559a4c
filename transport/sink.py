"""The receiving end of the transfer protocol as a pure machine: handle(event, now) -> [command].

Never sleeps, reads a clock or opens a socket. One Sink serves all links (source endpoints) and transfers of a
process. A link is one session with one source: it is greeted once, counts messages in both directions, and a gap,
a disconnect, a reset or ten silent seconds end it together with its transfers. The next open makes a new link with
a higher epoch, and with it a new identity, so nothing of the old session can be mistaken for the new one's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transport.errors import TooMuch, UnknownTransfer
from transport.events import (
    BlobArrived,
    ChunkFailed,
    Opened,
    PartArrived,
    Refused,
    TransferEvent,
    TransferLost,
    TransferRecovered,
    TransferSuspect,
)
from transport.limits import Limits, Pacing, Timing
from transport.messages import (
    Accept,
    Close,
    Credit,
    Fail,
    Goodbye,
    Greeting,
    Hello,
    Message,
    Mismatch,
    Open,
    Packet,
    Part,
    Ping,
    Pong,
    Request,
    Reset,
    TurnedAway,
    Welcome,
    Withdraw,
    find_mismatch,
)
from transport.pacing import LinkPacer
from transport.sink_state import (
    Ask,
    CloseTransfer,
    Command,
    Connect,
    Disconnect,
    Link,
    LinkDown,
    LinkStats,
    Notify,
    OpenTransfer,
    Received,
    RequestChunk,
    Send,
    Shutdown,
    SinkInput,
    Tick,
    Transfer,
    WithdrawChunk,
)


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
        self._out: list[Command] = []
        self._now = 0.0
        self.num_dropped = 0  # packets of another session, duplicates, parts nobody waits for

    def handle(self, event: SinkInput, now: float) -> list[Command]:
        """Raises UnknownTransfer or TooMuch for calls of the owner, nothing for what a peer sent."""
        self._now = now
        self._INPUTS[type(event)](self, event)
        out, self._out = self._out, []
        return out

    # -- what the owner asks for --

    def _open(self, event: OpenTransfer) -> None:
        assert event.transfer_id not in self._transfers
        link = self._by_endpoint.get(event.endpoint) or self._connect(event)
        if len(link.transfers) >= self._limits.transfers_per_peer:
            raise TooMuch(f"{self._limits.transfers_per_peer} transfers are open to {event.endpoint}; close some")
        self._transfers[event.transfer_id] = Transfer(link=link)
        link.transfers.add(event.transfer_id)
        link.idle_since = None
        self._send(link, Open(transfer=event.transfer_id, body=event.body))

    def _connect(self, event: OpenTransfer) -> Link:
        self._epoch += 1
        link = Link(
            name=f"{self._incarnation}/{self._epoch}",
            endpoint=event.endpoint,
            epoch=self._epoch,
            pacer=LinkPacer(self._pacing),
            last_heard=self._now,
            hello_at=self._now,
        )
        self._links[link.name] = self._by_endpoint[link.endpoint] = link
        self._out.append(Connect(link=link.name, endpoint=link.endpoint, server_public_key=event.server_public_key))
        # Opens and requests follow at once, without waiting for the welcome: a round trip saved on a WAN.
        self._send(link, Hello(via=link.endpoint, fields=self._greeting.fields()))
        self._grant(link)
        return link

    def _request(self, event: RequestChunk) -> None:
        transfer = self._find(event.transfer_id)
        ask = transfer.asks.get(event.chunk)
        if ask is None:
            if len(transfer.asks) >= self._limits.chunks_per_transfer:
                raise TooMuch(f"{len(transfer.asks)} chunks are asked for in {event.transfer_id}; the limit")
            ask = Ask(number=transfer.next_ask, level=event.level, priority=event.priority)
            transfer.asks[event.chunk] = ask
            transfer.next_ask += 1
        elif (ask.level, ask.priority) == (event.level, event.priority) or ask.buffer is not None:
            return  # already so, or too late: it is arriving
        ask.level, ask.priority = event.level, event.priority
        self._send(
            transfer.link,
            Request(
                transfer=event.transfer_id,
                chunk=event.chunk,
                level=event.level,
                ask=ask.number,
                priority=event.priority,
            ),
        )

    def _withdraw(self, event: WithdrawChunk) -> None:
        transfer = self._find(event.transfer_id)
        ask = self._forget(transfer, event.chunk)
        if ask is not None:
            self._send(transfer.link, Withdraw(transfer=event.transfer_id, chunk=event.chunk, ask=ask.number))

    def _close(self, event: CloseTransfer) -> None:
        transfer = self._transfers.get(event.transfer_id)
        if transfer is not None:  # closing twice, or what was lost meanwhile, is fine
            self._send(transfer.link, Close(transfer=event.transfer_id, reason=event.reason))
            self._end(event.transfer_id)

    def _shutdown(self, event: Shutdown) -> None:
        for link in list(self._links.values()):
            self._send(link, Goodbye(reason="the receiver shut down"))
            self._break(link, "the receiver shut down")

    def _find(self, transfer_id: str) -> Transfer:
        try:
            return self._transfers[transfer_id]
        except KeyError:
            raise UnknownTransfer(f"{transfer_id} is not open here; it was closed, refused or lost") from None

    # -- what comes from the network --

    def _received(self, event: Received) -> None:
        link, packet = self._links.get(event.link), event.packet
        if link is None or packet.epoch != link.epoch:
            self.num_dropped += 1
            return
        message = packet.message
        if type(message) is TurnedAway:
            return self._on_turned_away(link, message)
        if type(message) is Reset:
            return self._break(link, f"the source at {link.endpoint} ended the session: {message.reason}")
        if link.peer_incarnation not in (None, packet.incarnation) or packet.seq <= link.in_seq:
            self.num_dropped += 1
            return
        if packet.seq != link.in_seq + 1:
            return self._break(link, f"messages {link.in_seq + 1} to {packet.seq - 1} from the source were lost")
        link.in_seq = packet.seq
        self._heard(link)
        if link.peer_incarnation is None and type(message) is not Welcome:
            return self._break(link, f"the source at {link.endpoint} spoke before its welcome")
        handler = self._MESSAGES.get(type(message))
        if handler is None:
            return self._break(link, f"a source does not send {type(message).__name__}")
        handler(self, link, packet)

    def _heard(self, link: Link) -> None:
        link.last_heard = self._now
        if link.suspect:
            link.suspect = False
            for transfer_id in sorted(link.transfers):
                self._notify(TransferRecovered(transfer_id=transfer_id, at=self._now))

    def _on_turned_away(self, link: Link, message: TurnedAway) -> None:
        for transfer_id in sorted(link.transfers):
            self._notify(
                Refused(
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

    def _on_welcome(self, link: Link, packet: Packet) -> None:
        message = packet.message
        assert type(message) is Welcome
        differs = find_mismatch(source=message.fields, sink=self._greeting.fields())
        if differs is not None:
            return self._on_turned_away(link, turned_away(differs))
        link.peer_incarnation = packet.incarnation
        link.pacer.on_departure(message.sent_us, self._now)
        # Connecting included, but nothing of ours was queued yet: a later pong may come behind many parts.
        link.pacer.on_rtt(self._now - link.hello_at, self._now)
        self._ping(link)

    def _on_accept(self, link: Link, packet: Packet) -> None:
        message = packet.message
        assert type(message) is Accept
        transfer = self._transfers.get(message.transfer)
        if transfer is not None and transfer.link is link and not transfer.opened:
            transfer.opened = True
            self._notify(Opened(transfer_id=message.transfer, at=self._now, body=message.body))

    def _on_close(self, link: Link, packet: Packet) -> None:
        message = packet.message
        assert type(message) is Close
        transfer = self._transfers.get(message.transfer)
        if transfer is None or transfer.link is not link:
            return
        self._end(message.transfer)
        ended = TransferLost if transfer.opened else Refused
        self._notify(ended(transfer_id=message.transfer, at=self._now, reason=message.reason))

    def _on_fail(self, link: Link, packet: Packet) -> None:
        message = packet.message
        assert type(message) is Fail
        transfer = self._transfers.get(message.transfer)
        if transfer is None or transfer.link is not link or message.chunk not in transfer.asks:
            return
        if transfer.asks[message.chunk].number == message.ask:
            self._forget(transfer, message.chunk)
            self._notify(
                ChunkFailed(transfer_id=message.transfer, at=self._now, chunk=message.chunk, reason=message.reason)
            )

    def _on_part(self, link: Link, packet: Packet) -> None:
        part = packet.message
        assert type(part) is Part
        size = len(part.data)
        link.received_bytes += size
        if link.received_bytes > link.granted_bytes:
            return self._break(link, "the source sent more than it was granted")
        wire_s = link.pacer.on_part(size, sent_us=part.sent_us, at=self._now)
        self._grant(link)
        transfer = self._transfers.get(part.transfer)
        ask = transfer.asks.get(part.chunk) if transfer is not None and transfer.link is link else None
        if transfer is None or ask is None or ask.number != part.ask:
            self.num_dropped += 1  # closed or withdrawn while it was on its way
            return
        if ask.buffer is None:
            if self._assembling_bytes + part.total > self._limits.assembling_bytes:
                return self._break(link, f"more than {self._limits.assembling_bytes} bytes of unfinished blobs")
            self._assembling_bytes += part.total
            ask.buffer = bytearray(part.total)
            ask.level = part.level
            ask.started_at = self._now - wire_s
        if part.offset != ask.filled or part.total != len(ask.buffer):
            return self._break(link, f"chunk {part.chunk} came out of order")
        ask.buffer[part.offset : part.offset + size] = part.data
        ask.filled += size
        ask.wire_s += wire_s
        self._tell_arrival(link, transfer, part, ask, wire_s)

    def _tell_arrival(self, link: Link, transfer: Transfer, part: Part, ask: Ask, wire_s: float) -> None:
        assert ask.buffer is not None
        self._notify(
            PartArrived(
                transfer_id=part.transfer,
                at=self._now,
                chunk=part.chunk,
                level=part.level,
                bytes_received=ask.filled,
                total_bytes=part.total,
                part_bytes=len(part.data),
                wire_s=wire_s,
                link_bytes=link.received_bytes,
            )
        )
        if ask.filled < part.total:
            return
        sharing = sum(1 for other in link.transfers if self._transfers[other].asks)
        self._forget(transfer, part.chunk)
        self._notify(
            BlobArrived(
                transfer_id=part.transfer,
                at=self._now,
                chunk=part.chunk,
                level=part.level,
                blob=memoryview(ask.buffer).toreadonly(),
                started_at=ask.started_at,
                wire_s=ask.wire_s,
                sharing=sharing,
            )
        )

    def _on_ping(self, link: Link, packet: Packet) -> None:
        assert type(packet.message) is Ping
        self._send(link, Pong(token=packet.message.token, sent_us=int(self._now * 1e6)))

    def _on_pong(self, link: Link, packet: Packet) -> None:
        assert type(packet.message) is Pong
        link.pacer.on_departure(packet.message.sent_us, self._now)
        if packet.message.token == link.ping_token:
            link.pacer.on_rtt(self._now - link.ping_at, self._now)

    def _on_goodbye(self, link: Link, packet: Packet) -> None:
        assert type(packet.message) is Goodbye
        self._break(link, packet.message.reason)

    def _link_down(self, event: LinkDown) -> None:
        link = self._links.get(event.link)
        if link is not None:
            self._break(link, event.reason)

    # -- time --

    def _tick(self, event: Tick) -> None:
        for link in list(self._links.values()):
            silent_s = self._now - link.last_heard
            if silent_s >= self._timing.lease_s:
                self._break(link, f"no answer from {link.endpoint} for {self._timing.lease_s:g} s")
                continue
            if silent_s >= self._timing.suspect_s and not link.suspect:
                link.suspect = True
                for transfer_id in sorted(link.transfers):
                    self._notify(TransferSuspect(transfer_id=transfer_id, at=self._now))
            if link.idle_since is not None and self._now - link.idle_since >= self._timing.idle_link_s:
                self._send(link, Goodbye(reason="idle"))
                self._break(link, "idle")
            elif self._now - link.ping_at >= self._timing.heartbeat_s and link.peer_incarnation is not None:
                self._ping(link)

    def _ping(self, link: Link) -> None:
        link.ping_token += 1
        link.ping_at = self._now
        self._send(link, Ping(token=link.ping_token))

    # -- helpers --

    def _grant(self, link: Link) -> None:
        """Raise the credit when that is worth a message. What is not granted yet is under a quarter of the window,
        which holds two parts, and the source knows the part size: so it never waits with nothing on its way."""
        window_bytes, part_bytes = link.pacer.window_bytes, link.pacer.part_bytes
        limit_bytes = link.received_bytes + window_bytes
        worth_it = limit_bytes - link.granted_bytes >= min(part_bytes, window_bytes // 4)
        if worth_it or part_bytes != link.granted_part_bytes:
            link.granted_bytes = max(link.granted_bytes, limit_bytes)
            link.granted_part_bytes = part_bytes
            self._send(link, Credit(limit_bytes=link.granted_bytes, part_bytes=part_bytes))

    def _send(self, link: Link, message: Message) -> None:
        link.out_seq += 1
        packet = Packet(incarnation=self._incarnation, epoch=link.epoch, seq=link.out_seq, message=message)
        self._out.append(Send(link=link.name, packet=packet))

    def _notify(self, event: TransferEvent) -> None:
        self._out.append(Notify(event=event))

    def _forget(self, transfer: Transfer, chunk: int) -> Ask | None:
        ask = transfer.asks.pop(chunk, None)
        if ask is not None and ask.buffer is not None:
            self._assembling_bytes -= len(ask.buffer)
        return ask

    def _end(self, transfer_id: str) -> None:
        transfer = self._transfers.pop(transfer_id)
        for chunk in list(transfer.asks):
            self._forget(transfer, chunk)
        transfer.link.transfers.discard(transfer_id)
        if not transfer.link.transfers:
            transfer.link.idle_since = self._now

    def _break(self, link: Link, reason: str) -> None:
        for transfer_id in sorted(link.transfers):
            self._end(transfer_id)
            self._notify(TransferLost(transfer_id=transfer_id, at=self._now, reason=reason))
        del self._links[link.name]
        if self._by_endpoint.get(link.endpoint) is link:
            del self._by_endpoint[link.endpoint]
        self._out.append(Disconnect(link=link.name))

    # -- what the owner may look at --

    def link_stats(self) -> list[LinkStats]:
        return [
            LinkStats(
                endpoint=link.endpoint,
                rate_bps=None if link.pacer.rate is None else link.pacer.rate * 8,
                rtt_s=link.pacer.rtt_s,
                window_bytes=link.pacer.window_bytes,
                part_bytes=link.pacer.part_bytes,
                received_bytes=link.received_bytes,
                num_transfers=len(link.transfers),
                suspect=link.suspect,
            )
            for link in self._links.values()
        ]

    @property
    def num_transfers(self) -> int:
        return len(self._transfers)

    def check_integrity(self) -> None:
        """Every count adds up and nothing points at what has ended. Run at every test's end."""
        assembling = 0
        for transfer_id, transfer in self._transfers.items():
            assert transfer_id in transfer.link.transfers, transfer_id
            assert self._links.get(transfer.link.name) is transfer.link, transfer_id
            assembling += sum(len(ask.buffer) for ask in transfer.asks.values() if ask.buffer is not None)
        assert assembling == self._assembling_bytes, (assembling, self._assembling_bytes)
        assert sum(len(link.transfers) for link in self._links.values()) == len(self._transfers)
        assert set(map(id, self._by_endpoint.values())) == set(map(id, self._links.values()))
        for link in self._links.values():
            assert link.received_bytes <= link.granted_bytes
            assert (link.idle_since is None) == bool(link.transfers)

    _INPUTS: dict[type, Callable[[Sink, Any], None]] = {
        OpenTransfer: _open,
        RequestChunk: _request,
        WithdrawChunk: _withdraw,
        CloseTransfer: _close,
        Received: _received,
        LinkDown: _link_down,
        Tick: _tick,
        Shutdown: _shutdown,
    }
    _MESSAGES: dict[type, Callable[[Sink, Link, Packet], None]] = {
        Welcome: _on_welcome,
        Accept: _on_accept,
        Close: _on_close,
        Fail: _on_fail,
        Part: _on_part,
        Ping: _on_ping,
        Pong: _on_pong,
        Goodbye: _on_goodbye,
    }


def turned_away(differs: Mismatch) -> TurnedAway:
    return TurnedAway(
        reason=str(differs),
        field=differs.field,
        source_value=differs.source_value,
        sink_value=differs.sink_value,
    )
