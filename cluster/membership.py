"""Who is in the cluster. Pure: reports and `now` in, tables out.

Membership is soft state: every worker reports itself once a second, so a restarted controller knows everybody again
after a second. The same functions run in the controller and, on its last table, in the gateways.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

SUSPECT_S = 3.0  # silent for so long: nothing new is routed to the worker
EXPIRED_S = 10.0  # silent for so long: forgotten; it may come back with a new report

Role = Literal["prefill", "decode"]

COMPANION = "/decode"


def companion_id(prefill_id: str) -> str:
    """Of the decode worker in a prefill worker's process."""
    return prefill_id + COMPANION


def host_id(worker_id: str) -> str:
    """Of the worker whose process this one is in: itself, if it is no companion."""
    return worker_id.removesuffix(COMPANION)


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerInfo:
    """A worker's report. `endpoint`: where KV (prefill) or tokens (decode) are served; `kv_endpoint`: where a decode
    worker serves what it has stored, None if it does not; an incarnation is one life of the worker's process; `stats`:
    its counters and gauges, by metric name without prefix; `age_s`: how old the report is, in a table; `companion_of`:
    the prefill worker in whose process, on whose cores and with whose store this one decodes."""

    id: str
    role: Role
    incarnation: str
    endpoint: str
    public_key: str | None = None
    is_suspect: bool = False
    stats: Mapping[str, float] = field(default_factory=dict)
    kv_endpoint: str | None = None
    age_s: float = 0.0
    companion_of: str | None = None

    @property
    def source_endpoint(self) -> str | None:
        """Where others can have its chunks."""
        return self.endpoint if self.role == "prefill" else self.kv_endpoint

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
            replace(info, is_suspect=age_s >= SUSPECT_S, age_s=age_s)
            for worker_id, info in self._workers.items()
            for age_s in [now - self._heard_at[worker_id]]
        ]


def follow(last: Sequence[WorkerInfo], told: Sequence[WorkerInfo], *, controller_age_s: float) -> list[WorkerInfo]:
    """The table to route by, after the controller told its own. One that has just been restarted has not heard from
    everybody yet: whom it does not know then stays as last known."""
    if controller_age_s >= SUSPECT_S:
        return list(told)
    known = {info.id for info in told}
    return [*told, *(info for info in last if info.id not in known)]
