"""Who is in the cluster and which workers serve a request. Pure: reports and `now` in, tables and routes out.

Membership is soft state: every worker reports itself once a second, so a restarted controller knows everybody again
after a second. The same functions run in the controller and, on its last table, in the gateways.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

SUSPECT_S = 3.0  # silent for so long: nothing new is routed to the worker
MAX_SOURCES = 2  # that a decode worker pulls one prompt from
EXPIRED_S = 10.0  # silent for so long: forgotten; it may come back with a new report

Role = Literal["prefill", "decode"]


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerInfo:
    """A worker's report. `endpoint`: where KV (prefill) or tokens (decode) are served; an incarnation is one life of
    the worker's process; `stats`: its counters and gauges, by metric name without prefix."""

    id: str
    role: Role
    incarnation: str
    endpoint: str
    public_key: str | None = None
    is_suspect: bool = False
    stats: Mapping[str, float] = field(default_factory=dict)

    def to_wire(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_wire(cls, body: Mapping[str, Any]) -> WorkerInfo:
        return cls(**body)


class Membership:
    """Everybody who reported lately."""

    def __init__(self) -> None:
        self._workers: dict[str, WorkerInfo] = {}
        self._heard_at: dict[str, float] = {}

    def report(self, info: WorkerInfo, now: float) -> None:
        """A new incarnation under a known id takes its place at once."""
        self._workers[info.id] = replace(info, is_suspect=False)
        self._heard_at[info.id] = now

    def table(self, now: float) -> list[WorkerInfo]:
        """Who is here, in the order of first reports; the expired are forgotten."""
        for worker_id in [i for i, at in self._heard_at.items() if now - at >= EXPIRED_S]:
            del self._workers[worker_id], self._heard_at[worker_id]
        return [
            replace(info, is_suspect=now - self._heard_at[worker_id] >= SUSPECT_S)
            for worker_id, info in self._workers.items()
        ]


def follow(last: Sequence[WorkerInfo], told: Sequence[WorkerInfo], *, controller_age_s: float) -> list[WorkerInfo]:
    """The table to route by, after the controller told its own. One that has just been restarted has not heard from
    everybody yet: whom it does not know then stays as last known."""
    if controller_age_s >= SUSPECT_S:
        return list(told)
    known = {info.id for info in told}
    return [*told, *(info for info in last if info.id not in known)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    """Where a request goes. sources: who may have its KV, the one that computes what is stored nowhere first; none
    when the decode worker shall compute the prompt alone."""

    decode: WorkerInfo
    sources: tuple[WorkerInfo, ...]


def choose_route(
    table: Sequence[WorkerInfo],
    token_ids: Sequence[int],
    *,
    chunk_tokens: int,
    cache_salt: str,
    in_flight: Mapping[str, int],
    avoid: frozenset[str] = frozenset(),
) -> Route | None:
    """The decode worker with the fewest requests of this gateway in flight; the source that owns the prompt's first
    chunk, and the one that would own it without that one: it takes over when the first is lost, and may have what the
    first has not. None if no decode worker can be reached. `avoid`: incarnations that just failed."""
    usable = [info for info in table if not info.is_suspect and info.incarnation not in avoid]
    decoders = [info for info in usable if info.role == "decode"]
    if not decoders:
        return None
    decode = min(decoders, key=lambda info: in_flight.get(info.id, 0))
    sources = [info for info in usable if info.role == "prefill"]
    if not sources or len(token_ids) <= chunk_tokens:
        return Route(decode=decode, sources=())
    return Route(decode=decode, sources=owners(sources, token_ids[:chunk_tokens], cache_salt)[:MAX_SOURCES])


def owners(sources: Sequence[WorkerInfo], first_chunk: Sequence[int], cache_salt: str) -> tuple[WorkerInfo, ...]:
    """All of them, in the order of their claim. Rendezvous hashing (Thaler and Ravishankar, 1998): the same document
    goes to the same source, without an index, and only the documents of a source that leaves move."""
    key = array("I", first_chunk).tobytes() + b"\0" + cache_salt.encode()

    def claim(info: WorkerInfo) -> bytes:
        return hashlib.blake2b(info.id.encode() + b"\0" + key, digest_size=8).digest()

    return tuple(sorted(sources, key=claim, reverse=True))
