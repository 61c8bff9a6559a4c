"""What a fill machine is told and what it wants done: the events and commands of decode/fill.py. Plain data.

`source` is an index into the sources that the fill was given.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from decode.link_scheduler import Kind
from decode.window_chunks import Layers


@dataclass(frozen=True, slots=True, kw_only=True)
class Opened:
    """The source accepted. `stored_bytes[i]`: sizes by level known of chunk i, or None if it must compute it.
    computes: whether it would. encode_s: seconds that it takes to make a chunk ready, by level, as far as known.
    kl: the promise of the KV that it has of each chunk, before a level makes it worse; empty: all exact."""

    source: int = 0
    stored_bytes: tuple[dict[str, int] | None, ...]
    encode_s: Mapping[str, float] = field(default_factory=dict)
    computes: bool = True
    kl: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class PartArrived:
    """wire_s: how long the link was busy with this part."""

    source: int = 0
    chunk: int
    level: str
    received_bytes: int
    total_bytes: int
    part_bytes: int
    wire_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class BlobArrived:
    """A whole blob. level: as it was asked for, so possibly the name of a refinement."""

    source: int = 0
    chunk: int
    level: str
    blob: Any  # bytes-like


@dataclass(frozen=True, slots=True, kw_only=True)
class BlobDecoded:
    """The chunk stands in its pages."""

    chunk: int
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class BlobRejected:
    """A blob failed its checks; it is asked for again."""

    chunk: int
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Refined:
    """The pages hold the better level. after_tokens: how many tokens had been sampled then. blob: the finer blob, to
    refine further (None if it does not nest)."""

    chunk: int
    seconds: float
    after_tokens: int
    blob: Any = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RefinementRejected:
    """A refinement failed its checks. The pages are as they were; the chunk is left as it is."""

    chunk: int
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkComputed:
    chunk: int


@dataclass(frozen=True, slots=True, kw_only=True)
class FrontLoaded:
    """The front that is kept here stands in the pages. seconds: what reading and decoding its entry took."""

    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class FrontRejected:
    """It is not there any more, or of no use: its tokens are computed."""

    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkRefused:
    """The source cannot give this chunk; the others it can."""

    source: int = 0
    chunk: int
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceLost:
    """The transfer ended before it was complete, or could not be opened. is_final: trying again is of no use."""

    source: int = 0
    reason: str
    is_final: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class FirstToken:
    """It was drawn: what is refined from now on takes no core from the tail. position: its own, the next query's."""

    position: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Tick:
    """Time passed. Silence of a link shows only through ticks."""


Event = (
    Opened | PartArrived | BlobArrived | BlobDecoded | BlobRejected | Refined | RefinementRejected | ChunkComputed
    | FrontLoaded | FrontRejected | ChunkRefused | SourceLost | FirstToken | Tick
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Open:
    """Open a transfer to this source (again)."""

    source: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """level: a codec level or the name of a refinement. The same chunk again amends what was asked."""

    source: int = 0
    chunk: int
    level: str
    kind: Kind = Kind.BASE


@dataclass(frozen=True, slots=True, kw_only=True)
class Withdraw:
    source: int = 0
    chunk: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Decode:
    """Check the blob and decode it into the chunk's pages: BlobDecoded or BlobRejected follows. layers: those that it
    has (None: all), each run of neighbours a blob of its own; the others' pages become zeros. There may be none."""

    chunk: int
    level: str
    blob: Any
    layers: Layers = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Refine:
    """Put a better level into the pages, between two steps of the engine: Refined or RefinementRejected follows.

    coarse: the blob that `blob` refines; None if `blob` is whole. after_tokens: not before so many tokens were sampled,
    and not after (a plan that is followed); None: at once. layers: as for Decode.
    """

    chunk: int
    level: str
    blob: Any
    coarse: Any = None
    layers: Layers = None
    after_tokens: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Compute:
    chunk: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Discard:
    """What was loaded of this chunk is not used: layers are missing that are needed after all. It is had anew."""

    chunk: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadFront:
    """Put the front that is kept here into the pages: FrontLoaded or FrontRejected follows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ready:
    """All chunks are in place: run the tail."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fail:
    code: str
    message: str
    status: int = 502


Command = Open | Ask | Withdraw | Decode | Refine | Compute | Discard | LoadFront | Ready | Fail
