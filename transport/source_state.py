"""What a Source takes in, gives out and remembers. Plain data with the little arithmetic that keeps it consistent."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Any

from transport.events import SourceEvent
from transport.limits import KB
from transport.messages import Buffer, Packet

# -- events in --


@dataclass(frozen=True, slots=True, kw_only=True)
class AcceptTransfer:
    transfer_id: str
    body: dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class SupplyChunk:
    transfer_id: str
    chunk: int
    level: str
    blob: Buffer  # not to be changed afterwards: it is sent from where it lies


@dataclass(frozen=True, slots=True, kw_only=True)
class FailChunk:
    transfer_id: str
    chunk: int
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class EndTransfer:
    """Before an accept: a refusal."""

    transfer_id: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Received:
    """A decoded packet. `now` of this handle call is the time of the socket read."""

    peer: str
    packet: Packet


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerGone:
    peer: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Tick:
    """At least once a heartbeat."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shutdown:
    reason: str


SourceInput = AcceptTransfer | SupplyChunk | FailChunk | EndTransfer | Received | PeerGone | Tick | Shutdown

# -- commands out, to be carried out in order --


@dataclass(frozen=True, slots=True, kw_only=True)
class Send:
    peer: str
    packet: Packet


@dataclass(frozen=True, slots=True, kw_only=True)
class Notify:
    event: SourceEvent


Command = Send | Notify

# -- state --


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


@dataclass(slots=True, kw_only=True, eq=False)
class Session:
    peer: str
    incarnation: str
    epoch: int
    via: str
    last_heard: float
    in_seq: int = 0
    out_seq: int = 0
    last_sent: float = 0.0
    sent_bytes: int = 0
    limit_bytes: int = 0
    part_bytes: int = 64 * KB
    suspect: bool = False
    transfers: dict[str, Transfer] = field(default_factory=dict)  # in the order of their next turn

    def next_ready(self) -> Transfer | None:
        best: Transfer | None = None
        for transfer in self.transfers.values():
            if transfer.queue and (best is None or transfer.queue[0].priority < best.queue[0].priority):
                best = transfer
        return best

    def rotate(self, transfer: Transfer) -> None:
        self.transfers[transfer.id] = self.transfers.pop(transfer.id)
