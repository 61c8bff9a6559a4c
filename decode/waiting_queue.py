"""Who waits to be admitted, and who is next. Pure: `now` is an argument, rooms and quotas are the caller's to judge."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from decode.fair_share import FairShare
from decode.requests import RequestRefused
from decode.scheduling_policy import SchedulingPolicy
from decode.sequence import Phase, Sequence

MAX_PRIORITY = 100  # either way; how long the least urgent may wait depends on it
# Requests without room that a search passes over: has_room may have to look up prefixes.
LOOKAHEAD = 16
MAX_TENANTS = 4096  # whose service is remembered though they have no requests


Room = Literal["made", "coming", "none"]  # by preempting others: it is there, will be, will not


class QueueRefused(RequestRefused):
    """The queue does not take a request. `code`: "overloaded", "tenant_overloaded" (429: it may come again later),
    "tenant_share_too_small", "priority_out_of_range" (400)."""


@dataclass(slots=True, kw_only=True, eq=False)
class Waiting:
    """A request that waits. The caller gives it pages for `num_tokens` tokens when it is admitted.

    max_total_tokens: prompt and the longest answer. since: when it came or came back. credit_s: what it had waited
    before that. gain_s: what its admission counts as beyond that. overtaken: by how many that had room when it had
    none. is_reserved: nobody overtakes it any more. sequence: of a preempted one, with its output; None if it has not
    begun.
    """

    key: str
    tenant: str
    priority: int
    arrival: int
    deadline: float
    num_tokens: int
    max_total_tokens: int
    since: float
    credit_s: float = 0.0
    gain_s: float = 0.0
    overtaken: int = 0
    is_reserved: bool = False
    sequence: Sequence | None = None

    def waited_s(self, now: float) -> float:
        return self.credit_s + max(0.0, now - self.since)


class WaitingQueue:
    """Ordered by (effective priority, reserved first, least service of the tenant, deadline, arrival).

    Of the effective priorities, the levels gained by waiting count only up to the best priority that is present: beyond
    it all would be ordered by age, and who sends most at once would be served first.
    """

    def __init__(self, policy: SchedulingPolicy, fair: FairShare) -> None:
        self._policy, self._fair = policy, fair
        self._waiting: dict[str, Waiting] = {}

    def __len__(self) -> int:
        return len(self._waiting)

    def get(self, key: str) -> Waiting | None:
        return self._waiting.get(key)

    def all(self) -> list[Waiting]:
        return list(self._waiting.values())

    def tenants(self) -> set[str]:
        return {waiting.tenant for waiting in self._waiting.values()}

    def best_priority(self) -> int | None:
        return min((waiting.priority for waiting in self._waiting.values()), default=None)

    def check_new(self, *, tenant: str, priority: int, max_total_blocks: int, share_blocks: int | None) -> None:
        """Raises QueueRefused if a new request of this tenant is not taken. share_blocks: what it may have at once."""
        if abs(priority) > MAX_PRIORITY:
            raise QueueRefused(
                f"priority is {priority}; it must lie in {-MAX_PRIORITY} .. {MAX_PRIORITY}, lower is sooner.",
                code="priority_out_of_range",
                param="priority",
            )
        if share_blocks is not None and max_total_blocks > share_blocks:
            raise QueueRefused(
                f"The request needs up to {max_total_blocks} KV blocks and its tenant may have {share_blocks}: shorten "
                "it, ask for a smaller max_tokens, or raise the tenant's max_blocks_share.",
                code="tenant_share_too_small",
                param="max_tokens",
            )
        new = [waiting.tenant for waiting in self._waiting.values() if waiting.sequence is None]
        limit, most = self._fair.share(tenant).max_waiting, self._policy.max_waiting
        if limit is not None and new.count(tenant) >= limit:
            raise QueueRefused(
                f"{limit} requests of this tenant are waiting on this worker; try again later.",
                status=429,
                code="tenant_overloaded",
            )
        if most is not None and len(new) >= most:
            raise QueueRefused(
                f"{most} requests are waiting on this worker; try again later.", status=429, code="overloaded"
            )

    def put(self, waiting: Waiting, *, present: set[str]) -> None:
        """`present`: tenants with requests admitted."""
        assert waiting.key not in self._waiting
        tenants = self.tenants()
        if waiting.tenant not in tenants:
            self._fair.joined(waiting.tenant, sorted(tenants))
            self._fair.forget_idle({*tenants, *present, waiting.tenant}, most=MAX_TENANTS)
        self._waiting[waiting.key] = waiting

    def pop(self, key: str) -> Waiting | None:
        """No longer waiting, for whatever reason."""
        waiting = self._waiting.pop(key, None)
        if waiting is not None and waiting.tenant not in self.tenants():
            self._fair.left(waiting.tenant)
        return waiting

    def in_order(self, now: float, top: int) -> list[Waiting]:
        """Who would be admitted first, first. top: the best priority of all requests that wait or run."""

        def place(waiting: Waiting) -> tuple[int, bool, float, float, int]:
            gained = self._policy.levels_gained(waiting.waited_s(now))
            level = max(top, waiting.priority - gained)
            if waiting.is_reserved:
                return level, False, 0.0, 0.0, waiting.arrival
            return level, True, self._fair.counter(waiting.tenant), waiting.deadline, waiting.arrival

        return sorted(self._waiting.values(), key=place)

    def take_next(
        self,
        now: float,
        top: int,
        *,
        has_room: Callable[[Waiting], bool],
        is_deferred: Callable[[Waiting], bool],
        is_within_quota: Callable[[Waiting], bool],
        make_room: Callable[[Waiting], Room] = lambda _: "none",
    ) -> Waiting | None:
        """The first in order that may be admitted, which leaves the queue.

        Who is first but has no room may have some made; else it lets others pass, `max_overtaken` times. Who is kept
        back by its tenant's own quota keeps back the rest of that tenant, and no one else; who is deferred keeps back
        nobody.
        """
        without_room: list[Waiting] = []
        at_quota: set[str] = set()
        for waiting in self.in_order(now, top):
            if waiting.tenant in at_quota or is_deferred(waiting):
                continue
            if not is_within_quota(waiting):
                at_quota.add(waiting.tenant)
            elif _is_releasing(waiting):
                return None  # its pages are on their way to the store: what they leave free is its own
            elif has_room(waiting):
                self._overtake(without_room, at_quota, waiting, now)
                return waiting
            elif not without_room and (room := make_room(waiting)) != "none":
                if room == "coming":
                    return None  # nobody takes it before
                self._overtake([], at_quota, waiting, now)
                return waiting
            elif waiting.is_reserved or self._policy.max_overtaken == 0 or len(without_room) == LOOKAHEAD:
                return None
            else:
                without_room.append(waiting)
        return None

    def _overtake(self, without_room: list[Waiting], at_quota: set[str], admitted: Waiting, now: float) -> None:
        for waiting in without_room:
            waiting.overtaken += 1
            waiting.is_reserved = waiting.overtaken >= self._policy.max_overtaken
        # Who could not be served at this turn is not owed it: as if it came into the queue now.
        least = min(self._fair.counter(tenant) for tenant in self.tenants() - at_quota)
        for tenant in at_quota:
            self._fair.lift(tenant, least)
        admitted.credit_s, admitted.since = admitted.waited_s(now), now
        self.pop(admitted.key)

    def check_integrity(self) -> None:
        for key, waiting in self._waiting.items():
            assert waiting.key == key and waiting.credit_s >= 0.0
            assert waiting.overtaken <= self._policy.max_overtaken
            assert waiting.is_reserved or waiting.overtaken < max(1, self._policy.max_overtaken)
            if waiting.sequence is not None:
                assert waiting.sequence.phase is Phase.PREEMPTED and waiting.is_reserved
                assert waiting.sequence.work is None and waiting.sequence.pins >= 0


def _is_releasing(waiting: Waiting) -> bool:
    return waiting.sequence is not None and bool(waiting.sequence.block_table)
