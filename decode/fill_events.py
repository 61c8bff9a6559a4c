"""What a fill machine is told and what it wants done: the events and commands of decode/fill.py. Plain data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Opened:
    """The source accepted. `stored_bytes[i]`: sizes by level known of chunk i, or None if it must compute it."""

    stored_bytes: tuple[dict[str, int] | None, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class PartArrived:
    chunk: int
    level: str
    received_bytes: int
    total_bytes: int
    part_bytes: int
    wire_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class BlobArrived:
    chunk: int
    level: str
    blob: Any  # bytes-like


@dataclass(frozen=True, slots=True, kw_only=True)
class BlobDecoded:
    chunk: int
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class BlobRejected:
    """A blob failed its checks; it is asked for again."""

    chunk: int
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkComputed:
    chunk: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceLost:
    """The transfer ended before it was complete, or could not be opened."""

    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Tick:
    """Time passed. Silence of a link shows only through ticks."""


Event = Opened | PartArrived | BlobArrived | BlobDecoded | BlobRejected | ChunkComputed | SourceLost | Tick


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    chunk: int
    level: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Withdraw:
    chunk: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Decode:
    chunk: int
    level: str
    blob: Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Compute:
    chunk: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Ready:
    """All chunks are in place: run the tail."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fail:
    code: str
    message: str


Command = Ask | Withdraw | Decode | Compute | Ready | Fail
