"""What tenants may have, and what they had: weights, quotas and service counters. Pure: no clock, no requests.

The counters are those of the virtual token counter (VTC) of Sheng et al., "Fairness in Serving Large Language Models",
OSDI 2024 (arXiv 2401.00588), in its weighted form: a tenant's counter grows by what it is served over its weight, and
the waiting tenant with the least one is served next.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class TenantShare:
    """A tenant's part of a worker; None is no limit. Raises ValueError for what makes no sense.

    weight: of two tenants that both have requests waiting, one of weight 2 gets twice the service of one of weight 1.
    max_requests: admitted at once. max_blocks_share: of the worker's KV blocks, above 0 up to 1. max_waiting: in the
    queue at once; more are refused. max_store_share: of each tier of the worker's chunk store (prefill/store.py), above
    0 up to 1; the scheduler has no use for it.
    """

    weight: float = 1.0
    max_requests: int | None = None
    max_blocks_share: float | None = None
    max_waiting: int | None = None
    max_store_share: float | None = None

    def __post_init__(self) -> None:
        if not (math.isfinite(self.weight) and self.weight > 0):
            raise ValueError(f"weight is {self.weight}; it must be above 0.")
        for name, limit in (("max_requests", self.max_requests), ("max_waiting", self.max_waiting)):
            if limit is not None and limit < 1:
                raise ValueError(f"{name} is {limit}; it must be at least 1, or left out for no limit.")
        for name, part in (("max_blocks_share", self.max_blocks_share), ("max_store_share", self.max_store_share)):
            if part is not None and not 0 < part <= 1:
                raise ValueError(f"{name} is {part}; it must be above 0 and at most 1.")


class FairShare:
    """Service counters by tenant, in tokens over weight."""

    def __init__(self, shares: Mapping[str, TenantShare], *, default: TenantShare) -> None:
        self._default = default
        self._shares = dict(shares)
        self._counters: dict[str, float] = {}
        self._last_to_leave: str | None = None  # the queue

    def set_shares(self, shares: Mapping[str, TenantShare], *, default: TenantShare) -> None:
        """From now on. What was served stays counted as it was."""
        self._shares, self._default = dict(shares), default

    def share(self, tenant: str) -> TenantShare:
        return self._shares.get(tenant, self._default)

    def counter(self, tenant: str) -> float:
        return self._counters.get(tenant, 0.0)

    def charge(self, tenant: str, cost_tokens: float) -> None:
        assert cost_tokens >= 0, cost_tokens
        self._counters[tenant] = self.counter(tenant) + cost_tokens / self.share(tenant).weight

    def joined(self, tenant: str, waiting_tenants: Iterable[str]) -> None:
        """A tenant that had nothing in the queue has a request there. Time without requests earns nothing: its counter
        is lifted to the least of those who wait or, if nobody does, to that of who left the queue last."""
        others = [self.counter(other) for other in waiting_tenants if other != tenant]
        if others:
            self.lift(tenant, min(others))
        elif self._last_to_leave is not None:
            self.lift(tenant, self.counter(self._last_to_leave))

    def left(self, tenant: str) -> None:
        """It has nothing in the queue any more."""
        self._last_to_leave = tenant

    def lift(self, tenant: str, counter: float) -> None:
        self._counters[tenant] = max(self.counter(tenant), counter)

    def forget_idle(self, present: Iterable[str], *, most: int) -> None:
        """Keep at most about `most` counters. Those forgotten are of tenants without requests whose counter would be
        lifted anyway when they return, so that nothing changes."""
        if len(self._counters) <= most:
            return
        keep = {*present, self._last_to_leave}
        least = min((self.counter(tenant) for tenant in keep if tenant is not None), default=0.0)
        self._counters = {
            tenant: counter for tenant, counter in self._counters.items() if tenant in keep or counter > least
        }
