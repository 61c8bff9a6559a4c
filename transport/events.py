"""What the two ends tell their owners. Plain data; `at` is monotonic seconds, taken at the socket read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

# -- at the sink (KVClient.on_event) --


@dataclass(frozen=True, slots=True, kw_only=True)
class Opened:
    transfer_id: str
    at: float
    body: dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Refused:
    """The source would not: at the greeting (then `field` and both values are set), or this transfer."""

    transfer_id: str
    at: float
    reason: str
    field: str | None = None
    source_value: str | None = None
    sink_value: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class PartArrived:
    """`part_bytes / wire_s` is the *link's* rate as this part met it: `wire_s` counts from when the part could begin
    (the part before it had arrived, and it was itself on its way) and so holds no idleness of the source."""

    transfer_id: str
    at: float
    chunk: int
    level: str
    bytes_received: int
    total_bytes: int
    part_bytes: int
    wire_s: float
    link_bytes: int  # payload bytes that this link has brought, of all transfers


@dataclass(frozen=True, slots=True, kw_only=True)
class BlobArrived:
    """A whole blob. It began to arrive at `started_at`. `len(blob) / wire_s` is the link's rate, idle moments and other
    transfers' parts left out; `len(blob) / (at - started_at)` is what this transfer got of it."""

    transfer_id: str
    at: float
    chunk: int
    level: str
    blob: memoryview
    started_at: float
    wire_s: float
    sharing: int  # transfers of this link that wait for bytes, this one included


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkFailed:
    transfer_id: str
    at: float
    chunk: int
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class TransferSuspect:
    """The source has been silent for Timing.suspect_s."""

    transfer_id: str
    at: float


@dataclass(frozen=True, slots=True, kw_only=True)
class TransferRecovered:
    """A suspect source spoke again."""

    transfer_id: str
    at: float


@dataclass(frozen=True, slots=True, kw_only=True)
class TransferLost:
    """The transfer has ended, and nothing more will come of it."""

    transfer_id: str
    at: float
    reason: str


TransferEvent = (
    Opened | Refused | PartArrived | BlobArrived | ChunkFailed | TransferSuspect | TransferRecovered | TransferLost
)

# -- at the source (KVServer.on_event) --


@dataclass(frozen=True, slots=True, kw_only=True)
class TransferOpened:
    """Answer with accept or refuse. Chunk requests are held back until then."""

    transfer_id: str
    at: float
    peer: str
    body: dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkRequested:
    """A standing request; the same chunk again, before it was taken, means that its level was amended."""

    transfer_id: str
    at: float
    chunk: int
    level: str
    priority: int


@dataclass(frozen=True, slots=True, kw_only=True)
class BacklogLow:
    """Little of what was supplied for this transfer is unsent (some 80 ms of link time, or nothing): a good time to
    take and encode the next chunk. Until then its level can still be amended."""

    transfer_id: str
    at: float


@dataclass(frozen=True, slots=True, kw_only=True)
class TransferClosed:
    transfer_id: str
    at: float
    reason: str


SourceEvent = TransferOpened | ChunkRequested | BacklogLow | TransferClosed
