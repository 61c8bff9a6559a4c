"""What things take on some machine with some model: the numbers that a simulation runs on. Plain data and its file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path


@dataclass(frozen=True, slots=True, kw_only=True)
class CostModel:
    """Seconds and bytes, as scripts/measure_costs.py measures them.

    chunk_bytes: one encoded chunk by level, best level first; nested: the levels that refine one another; promised_kl:
    nats a token by level. token_s, token_position_s: a prompt token at position p takes token_s + token_position_s * p
    to compute in whole chunks, on prefill and decode workers alike; slice_s, slice_position_s: what a shorter slice
    takes beside its share (see `slice_seconds`). decode_s: decoding one chunk into pages, by level; cut_s: making
    one of a stored chunk ready at its source; encode_s: encoding a computed one. step_s, row_s: a decode step of n rows
    takes step_s + n * row_s; sample_s: drawing a prompt's first token. refine_s: copying one chunk into pages. event_s:
    what a message, or work handed to another thread, waits until it is acted on. where: the machine, in words.
    """

    chunk_tokens: int
    chunk_bytes: Mapping[str, float]
    nested: tuple[str, ...]
    promised_kl: Mapping[str, float]
    token_s: float
    token_position_s: float
    decode_s: Mapping[str, float]
    cut_s: Mapping[str, float]
    encode_s: Mapping[str, float]
    step_s: float
    row_s: float
    slice_s: float = 0.0
    slice_position_s: float = 0.0
    sample_s: float = 0.0
    refine_s: float = 0.0005
    event_s: float = 0.0003
    where: str = ""
    measured: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def load(cls, path: str | Path) -> CostModel:
        body = json.loads(Path(path).read_text())
        return cls(**{**body, "nested": tuple(body["nested"])})

    def save(self, path: str | Path) -> None:
        Path(path).write_text(json.dumps(asdict(self), indent=1) + "\n")

    @property
    def raw_bytes_per_token(self) -> float:
        return self.chunk_bytes["raw"] / self.chunk_tokens

    def link_bytes_per_s(self, beta: float) -> float:
        """The rate of a link stated by beta = link rate / (raw KV bytes a token * prefill tokens a second): what is
        fast or slow for KV does not depend on the machine then."""
        return beta * self.raw_bytes_per_token / self.token_s

    def compute_s(self, start: int, stop: int) -> float:
        """To compute the prompt tokens [start, stop)."""
        return (stop - start) * (self.token_s + self.token_position_s * (start + stop) / 2)

    def slice_seconds(self, start: int, stop: int) -> float:
        """The same in one forward pass. A pass costs something however short it is, and the KV before it is read once;
        a whole chunk's `compute_s` contains that, so a shorter slice has the rest of it on top."""
        rest = max(0.0, 1.0 - (stop - start) / self.chunk_tokens)
        return self.compute_s(start, stop) + rest * (self.slice_s + self.slice_position_s * start)

    def without_positions(self) -> CostModel:
        """The same with a prompt token that costs the same everywhere."""
        return replace(self, token_position_s=0.0, slice_position_s=0.0)
