"""What a Source takes in (events) and gives out (commands). Plain data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transport.events import SourceEvent
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
class Forget:
    """No session with this peer any more: what its socket has not taken by now is dropped."""

    peer: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Notify:
    event: SourceEvent


Command = Send | Forget | Notify
