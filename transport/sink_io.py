"""What a Sink takes in (events) and gives out (commands). Plain data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transport.events import TransferEvent
from transport.messages import Packet

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
