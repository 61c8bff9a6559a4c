"""What a Sink takes in, gives out and remembers. Plain data."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from transport.events import TransferEvent
from transport.messages import Packet
from transport.pacing import LinkPacer

# -- events in --


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenTransfer:
    transfer_id: str
    endpoint: str
    body: dict[str, Any]
    server_public_key: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestChunk:
    transfer_id: str
    chunk: int
    level: str
    priority: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class WithdrawChunk:
    transfer_id: str
    chunk: int


@dataclass(frozen=True, slots=True, kw_only=True)
class CloseTransfer:
    transfer_id: str
    reason: str = "closed by the receiver"


@dataclass(frozen=True, slots=True, kw_only=True)
class Received:
    """A decoded packet. `now` of this handle call is the time of the socket read."""

    link: str
    packet: Packet


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkDown:
    link: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Tick:
    """At least once a heartbeat."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shutdown:
    pass


SinkInput = OpenTransfer | RequestChunk | WithdrawChunk | CloseTransfer | Received | LinkDown | Tick | Shutdown

# -- commands out, to be carried out in order --


@dataclass(frozen=True, slots=True, kw_only=True)
class Connect:
    link: str  # also the socket's identity
    endpoint: str
    server_public_key: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Send:
    link: str
    packet: Packet


@dataclass(frozen=True, slots=True, kw_only=True)
class Disconnect:
    link: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Notify:
    event: TransferEvent


Command = Connect | Send | Disconnect | Notify

# -- state --


@dataclass(slots=True, kw_only=True, eq=False)
class Ask:
    number: int
    level: str
    priority: int
    buffer: bytearray | None = None  # from the first part on
    filled: int = 0
    started_at: float = 0.0
    wire_s: float = 0.0


@dataclass(slots=True, kw_only=True, eq=False)
class Transfer:
    link: Link = field(repr=False)
    opened: bool = False
    next_ask: int = 1
    asks: dict[int, Ask] = field(default_factory=dict)  # chunk -> what is outstanding


@dataclass(slots=True, kw_only=True, eq=False)
class Link:
    name: str
    endpoint: str
    epoch: int
    pacer: LinkPacer
    last_heard: float
    hello_at: float
    peer_incarnation: str | None = None  # None until welcomed
    in_seq: int = 0
    out_seq: int = 0
    ping_token: int = 0
    ping_at: float = 0.0
    received_bytes: int = 0
    granted_bytes: int = 0
    granted_part_bytes: int = 0
    idle_since: float | None = None
    suspect: bool = False
    transfers: set[str] = field(default_factory=set)


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkStats:
    endpoint: str
    rate_bps: float | None  # bits per second; None before it was measured
    rtt_s: float | None
    window_bytes: int
    part_bytes: int
    received_bytes: int
    num_transfers: int
    suspect: bool
