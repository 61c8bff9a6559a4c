"""What a Source remembers: a Session with one sink, its Transfers, what stands and what goes out. Pure."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from transport.limits import KB
from transport.messages import Message, Packet
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
    queue: deque[Outgoing] = field(default_factory=deque)  # the head may be partly sent
    unsent_bytes: int = 0
    finished: dict[int, int] = field(default_factory=dict)  # chunk -> its last ask that needs nothing more

    def enqueue(self, outgoing: Outgoing) -> None:
        """Behind all that is as urgent or more, never before a blob that is partly sent."""
        at = len(self.queue)
        while at > 0 and self.queue[at - 1].sent == 0 and self.queue[at - 1].priority > outgoing.priority:
            at -= 1
        self.queue.insert(at, outgoing)
        self.unsent_bytes += len(outgoing.blob)

    def discard(self, chunk: int, ask: int) -> int:
        """Drop what is unsent of a withdrawn chunk; returns how many bytes that were."""
        dropped = 0
        for outgoing in [o for o in self.queue if o.chunk == chunk and o.ask <= ask]:
            self.queue.remove(outgoing)
            dropped += len(outgoing.blob) - outgoing.sent
        self.unsent_bytes -= dropped
        return dropped

    def check_integrity(self) -> None:
        assert self.unsent_bytes == sum(len(o.blob) - o.sent for o in self.queue)
        assert all(o.sent == 0 for o in list(self.queue)[1:])
        for chunk, standing in self.standing.items():
            assert standing.ask > self.finished.get(chunk, 0), chunk


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
        self.transfers: dict[str, Transfer] = {}  # in the order of their next turn
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

    def next_ready(self) -> Transfer | None:
        best: Transfer | None = None
        for transfer in self.transfers.values():
            if transfer.queue and (best is None or transfer.queue[0].priority < best.queue[0].priority):
                best = transfer
        return best

    def rotate(self, transfer: Transfer) -> None:
        self.transfers[transfer.id] = self.transfers.pop(transfer.id)
