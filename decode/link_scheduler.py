"""One per decode worker: what its transfers want of each link, and whose turn it is. Pure bookkeeping, no clock.

Transfers over one link do not share it evenly: chunks that a first token waits for go by earliest deadline, then what
makes such chunks better, then refinements of requests that already run. The sources send in this order (the priority
of a request, transport/source.py); a plan counts what goes before it, so transfers do not misread each other's
throughput for a slow link.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum

from decode.estimator import LinkEstimator

MAX_KNOWN_LINKS = 256
_KIND_STEP = 1 << 50  # priorities must stay below 2^53; deadlines in milliseconds need 2^50 for 35,000 years


class Kind(IntEnum):
    """What bytes are for, most urgent first."""

    BASE = 0  # chunks that are not in place yet
    BETTER = 1  # refinements before the first token
    LATER = 2  # refinements after it


@dataclass(slots=True, kw_only=True, eq=False)
class LinkShare:
    """One transfer's part in a link. `base_bytes`: what it still wants before its first token, kept up to date by its
    fill; `refine_bytes` likewise of refinements asked for."""

    link: SharedLink = field(repr=False)
    deadline: float
    order: int
    base_bytes: float = 0.0
    refine_bytes: float = 0.0

    @property
    def estimator(self) -> LinkEstimator:
        return self.link.estimator

    def ahead_bytes(self, kind: Kind = Kind.BASE) -> float:
        """What the link carries for other transfers before it serves this one."""
        ours = (self.deadline, self.order)
        if kind is Kind.BASE:
            return sum(s.base_bytes for s in self.link.shares if (s.deadline, s.order) < ours)
        others = [s for s in self.link.shares if s is not self]
        earlier = sum(s.refine_bytes for s in others if (s.deadline, s.order) < ours)
        return earlier + sum(s.base_bytes for s in others)

    def is_contended(self) -> bool:
        """Whether another transfer still wants chunks of this link."""
        return any(s.base_bytes > 0 for s in self.link.shares if s is not self)

    def leave(self) -> None:
        self.link.shares.remove(self)


@dataclass(slots=True, kw_only=True, eq=False)
class SharedLink:
    """moved_at: when it last brought something, for whichever transfer."""

    estimator: LinkEstimator
    shares: list[LinkShare] = field(default_factory=list)
    moved_at: float = float("-inf")


class LinkScheduler:
    def __init__(self) -> None:
        self._links: dict[str, SharedLink] = {}
        self._order = 0

    def join(self, endpoint: str, *, deadline: float, prior_bytes_per_s: float) -> LinkShare:
        """A transfer to `endpoint` begins; it must `leave`."""
        if endpoint not in self._links and len(self._links) >= MAX_KNOWN_LINKS:
            # Workers that restart leave endpoints behind: the oldest idle one is forgotten.
            idle = next((other for other, link in self._links.items() if not link.shares), None)
            self._links.pop(idle or "", None)
        link = self._links.setdefault(endpoint, SharedLink(estimator=LinkEstimator(prior_bytes_per_s)))
        self._order += 1
        share = LinkShare(link=link, deadline=deadline, order=self._order)
        link.shares.append(share)
        return share

    @property
    def num_shares(self) -> int:
        return sum(len(link.shares) for link in self._links.values())


def priority(kind: Kind, deadline: float) -> int:
    """As the transfer protocol wants it: lower is sooner. deadline: seconds on this worker's clock, not negative."""
    return int(kind) * _KIND_STEP + min(max(0, int(deadline * 1e3)), _KIND_STEP - 1)
