"""What a fill machine remembers of its chunks: where each one stands, and the log that the receipt is made of. Pure."""

from __future__ import annotations

import bisect
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from decode.window_chunks import Layers

TEXT = "text"  # how a computed chunk is named among the levels
CACHED = "cached"  # and one whose KV was in the pages before
MAX_ASKED_LEVELS = 16  # of one chunk, kept for the receipt; an unsteady link may amend a request hundreds of times


class FrontState(Enum):
    """Of the front that is kept here, see FillSpec."""

    ABSENT = "absent"
    KEPT = "kept"
    LOADING = "loading"
    IN_PLACE = "in place"


class ChunkState(Enum):
    MISSING = "missing"
    ASKED = "asked"
    DECODING = "decoding"
    COMPUTING = "computing"
    FILLED = "filled"


@dataclass(slots=True, kw_only=True)
class Refinement:
    """One step up of a chunk that was in place. after_tokens: tokens sampled before it stood in the pages."""

    level: str
    bytes: int
    asked_at: float
    applied_at: float
    after_tokens: int


@dataclass(slots=True, kw_only=True)
class ChunkLog:
    """What happened to one chunk; times are seconds on the worker's clock.

    level: what its pages hold. first_level: what they held when the first token was computed. layers: those that are
    loaded, see decode/window_chunks.py (None: all), and `share`, what that is of the whole. blob: the encoded chunk,
    kept as long as it may be refined. upgrade: the level that is asked for or being decoded on top, "" if none.
    """

    state: ChunkState = ChunkState.MISSING
    level: str = ""
    first_level: str = ""
    source: int | None = None
    layers: Layers = None
    share: float = 1.0
    asked_levels: list[str] = field(default_factory=list)
    anew_level: str = ""  # of the last request that was no amendment
    bytes: int = 0
    bad_blobs: int = 0
    asked_at: float | None = None
    first_part_at: float | None = None
    arrived_at: float | None = None
    decode_s: float | None = None
    filled_at: float | None = None
    compute_at: float | None = None
    left_bytes: float = 0.0
    blob: Any = None
    upgrade: str = ""
    upgrade_name: str = ""  # as it was asked for on the wire
    upgrade_kind: int = 0
    upgrade_asked_at: float = 0.0
    upgrade_bytes: int = 0
    is_upgrade_here: bool = False  # arrived, being decoded
    refinements: list[Refinement] = field(default_factory=list)


class ChunkTable:
    """The chunks of one prompt. Only one is computed at a time, and only at the frontier."""

    def __init__(self, num_chunks: int, *, num_cached: int = 0, now: float = 0.0) -> None:
        """num_cached: so many at the front are in place already."""
        self.logs = [ChunkLog() for _ in range(num_chunks)]
        for log in self.logs[:num_cached]:
            log.state, log.level, log.filled_at = ChunkState.FILLED, CACHED, now
        self.missing = list(range(num_cached, num_chunks))  # sorted
        self.asked: dict[int, None] = {}  # in the order of asking anew
        self.computing: int | None = None
        self.levels: Counter[str] = Counter()  # of the loaded chunks that are in place
        self.decoding: dict[int, None] = {}  # here, and not yet in the pages
        self.parts: dict[int, tuple[int, ...]] = {}  # the layers that are here of chunks of which some are not
        self.frontier = num_cached  # the first chunk that is not filled
        self.num_computed = 0  # with the one being computed
        self.last_computed = -1
        self.first_loaded = num_chunks

    def __len__(self) -> int:
        return len(self.logs)

    def move(self, index: int, state: ChunkState) -> ChunkLog:
        """Change a chunk's state."""
        log = self.logs[index]
        match log.state:
            case ChunkState.MISSING:
                del self.missing[bisect.bisect_left(self.missing, index)]
            case ChunkState.ASKED:
                del self.asked[index]
                log.left_bytes = 0.0
            case ChunkState.DECODING:
                del self.decoding[index]
            case ChunkState.COMPUTING:
                self.computing = None
            case ChunkState.FILLED:
                raise AssertionError(f"chunk {index} is in place already")
        log.state = state
        match state:
            case ChunkState.MISSING:
                bisect.insort(self.missing, index)
                self.parts.pop(index, None)
            case ChunkState.ASKED:
                self.asked[index] = None
            case ChunkState.DECODING:
                self.decoding[index] = None
                if log.layers is not None:
                    self.parts[index] = log.layers
            case ChunkState.COMPUTING:
                assert self.computing is None and index == self.frontier
                self.computing = self.last_computed = index
                log.layers, log.share = None, 1.0
                self.num_computed += 1
            case ChunkState.FILLED:
                if log.level != TEXT:
                    self.levels[log.level] += 1
                    self.first_loaded = min(self.first_loaded, index)
                while self.frontier < len(self.logs) and self.logs[self.frontier].state is ChunkState.FILLED:
                    self.frontier += 1
        return log

    def reopen(self, index: int) -> None:
        """Give up a loaded chunk that is in place."""
        log = self.logs[index]
        assert log.state is ChunkState.FILLED and log.level not in (TEXT, CACHED) and not log.upgrade, log
        self.levels[log.level] -= 1
        self.parts.pop(index, None)
        log.state, log.level, log.blob, log.filled_at = ChunkState.MISSING, "", None, None
        log.first_part_at = log.arrived_at = log.decode_s = None
        log.refinements.clear()
        bisect.insort(self.missing, index)
        self.frontier = min(self.frontier, index)
        loaded = (
            at for at, log in enumerate(self.logs) if log.state is ChunkState.FILLED and log.level not in (TEXT, CACHED)
        )
        self.first_loaded = min(loaded, default=len(self.logs))

    @property
    def is_filled(self) -> bool:
        return self.frontier == len(self.logs)

    @property
    def is_here(self) -> bool:
        """Nothing is missing or on its way any more; some may still be decoded or computed."""
        return not self.missing and not self.asked

    def asked_of(self, source: int) -> Iterator[int]:
        return (index for index in self.asked if self.logs[index].source == source)

    def check_integrity(self) -> None:
        for state, found in (
            (ChunkState.MISSING, self.missing),
            (ChunkState.ASKED, sorted(self.asked)),
            (ChunkState.COMPUTING, [self.computing] if self.computing is not None else []),
        ):
            assert found == [i for i, log in enumerate(self.logs) if log.state is state], state
        here = (ChunkState.DECODING, ChunkState.FILLED)
        parts = {
            i: log.layers
            for i, log in enumerate(self.logs)
            if log.state in here and log.level not in (TEXT, CACHED) and log.layers is not None
        }
        assert parts == self.parts
        assert sorted(self.decoding) == [i for i, log in enumerate(self.logs) if log.state is ChunkState.DECODING]
        assert all(log.state is ChunkState.FILLED for log in self.logs[: self.frontier])
