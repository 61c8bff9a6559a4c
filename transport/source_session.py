"""What a Source remembers: a Session with one sink, its Transfers, what stands and what goes out. Pure."""

from __future__ import annotations

from bisect import insort
from dataclasses import dataclass, field
from operator import attrgetter

from transport.limits import KB
from transport.messages import Message, Packet, Part, Request
from transport.source_io import Command, Send


@dataclass(slots=True, kw_only=True)
class Standing:
    """A chunk that was asked for and not yet supplied."""

    ask: int
    level: str
    priority: int
    taken: bool = False


@dataclass(slots=True, kw_only=True, eq=False)
class Outgoing:
    chunk: int
    ask: int
    level: str
    priority: int
    blob: memoryview
    sent: int = 0


@dataclass(slots=True, kw_only=True, eq=False)
class Transfer:
    id: str
    session: Session = field(repr=False)
    accepted: bool = False
    standing: dict[int, Standing] = field(default_factory=dict)
    # The most urgent first, equals in the order they came. Any of them may be partly sent: an urgent blob overtakes
    # one that is under way, and the receiver puts each together from its own parts.
    queue: list[Outgoing] = field(default_factory=list)
    unsent_bytes: int = 0
    finished: dict[int, int] = field(default_factory=dict)  # chunk -> its last ask that needs nothing more

    def want(self, message: Request) -> Standing:
        """A new ask, or an amendment of the one that stands: once it is taken, of its priority only."""
        standing = self.standing.get(message.chunk)
        if standing is None or standing.ask < message.ask:
            standing = Standing(ask=message.ask, level=message.level, priority=message.priority)
            self.standing[message.chunk] = standing
        elif standing.ask == message.ask:
            standing.priority = message.priority
            if not standing.taken:
                standing.level = message.level
        return standing

    def enqueue(self, outgoing: Outgoing) -> None:
        insort(self.queue, outgoing, key=_priority_of)
        self.unsent_bytes += len(outgoing.blob)
        self.session.ready.setdefault(self.id, self)

    def reprioritize(self, chunk: int, ask: int, priority: int) -> bool:
        """What is unsent of a blob takes another place. False if nothing of it is here."""
        for at, outgoing in enumerate(self.queue):
            if (outgoing.chunk, outgoing.ask) == (chunk, ask):
                if outgoing.priority != priority:
                    del self.queue[at]
                    outgoing.priority = priority
                    insort(self.queue, outgoing, key=_priority_of)
                return True
        return False

    def discard(self, chunk: int, ask: int) -> int:
        """Drop what is unsent of a withdrawn chunk; returns how many bytes that were."""
        dropped = 0
        for outgoing in [o for o in self.queue if o.chunk == chunk and o.ask <= ask]:
            self.queue.remove(outgoing)
            dropped += len(outgoing.blob) - outgoing.sent
        self.unsent_bytes -= dropped
        if not self.queue:
            self.session.ready.pop(self.id, None)
        return dropped

    def check_integrity(self) -> None:
        assert self.unsent_bytes == sum(len(o.blob) - o.sent for o in self.queue)
        assert all(o.sent < len(o.blob) or not o.sent for o in self.queue)
        assert [o.priority for o in self.queue] == sorted(o.priority for o in self.queue)
        assert (self.id in self.session.ready) == bool(self.queue)
        for chunk, standing in self.standing.items():
            assert standing.ask > self.finished.get(chunk, 0), chunk


_priority_of = attrgetter("priority")


class Session:
    def __init__(
        self, *, peer: str, own_incarnation: str, hello: Packet, via: str, now: float, out: list[Command]
    ) -> None:
        self.peer = peer
        self.incarnation = hello.incarnation  # the sink's
        self.epoch = hello.epoch
        self.via = via
        self.last_heard = now
        self.last_sent = now
        self.suspect = False
        self.sent_bytes = 0
        self.limit_bytes = 0
        self.part_bytes = 16 * KB  # until the first credit says
        self.transfers: dict[str, Transfer] = {}
        self.ready: dict[str, Transfer] = {}  # those with something to send, in the order of their next turn
        self._own_incarnation = own_incarnation
        self._in_seq = hello.seq
        self._out_seq = 0
        self._out = out

    def send(self, message: Message, now: float) -> None:
        self._out_seq += 1
        self.last_sent = now
        packet = Packet(incarnation=self._own_incarnation, epoch=self.epoch, seq=self._out_seq, message=message)
        self._out.append(Send(peer=self.peer, packet=packet))

    def admit(self, packet: Packet, now: float) -> bool | str:
        """False: drop it, it is of another life or a duplicate. Text: why the session cannot go on."""
        if (packet.incarnation, packet.epoch) != (self.incarnation, self.epoch) or packet.seq <= self._in_seq:
            return False
        if packet.seq != self._in_seq + 1:
            return f"messages {self._in_seq + 1} to {packet.seq - 1} of the receiver were lost"
        self._in_seq = packet.seq
        self.last_heard, self.suspect = now, False
        return True

    def next_part(self, now: float) -> tuple[Transfer, Part] | None:
        """What goes next if the credit allows it, counted as sent: a part of the most urgent blob, equally urgent
        transfers in turn."""
        if not self.ready:
            return None
        ready = iter(self.ready.values())
        transfer = next(ready)
        for other in ready:
            if other.queue[0].priority < transfer.queue[0].priority:
                transfer = other
        outgoing = transfer.queue[0]
        start, total = outgoing.sent, len(outgoing.blob)
        size = min(self.part_bytes, total - start)
        if self.sent_bytes + size > self.limit_bytes:
            return None
        self.sent_bytes += size
        transfer.unsent_bytes -= size
        outgoing.sent += size
        if outgoing.sent == total:
            del transfer.queue[0]
        del self.ready[transfer.id]
        if transfer.queue:
            self.ready[transfer.id] = transfer  # its turn comes again after the others'
        part = Part(
            transfer=transfer.id,
            chunk=outgoing.chunk,
            ask=outgoing.ask,
            level=outgoing.level,
            offset=start,
            total=total,
            sent_us=int(now * 1e6),
            data=outgoing.blob[start : start + size],
            whole=outgoing.blob,
        )
        return transfer, part
