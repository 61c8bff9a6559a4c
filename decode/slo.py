"""The SLO policy as the level choice sees it. Plain data: the YAML that users write is mapped onto it in cluster/."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from decode.fair_share import TenantShare
from prefill.tier_index import StoreShares

Infeasible = Literal["best_effort", "reject", "text"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SLOPolicy:
    """Targets and bounds for the KV of a request.

    ttft_s: target for the first token, seconds from admission; 0 means as fast as possible.
    itl_s: target for the gap between tokens; bounds how much prompt is computed between two decode steps.
    levels: codec levels the controller may use, best first ("raw" may be among them).
    floor: the coarsest level allowed, one of `levels`. ceiling: the best one sent before the first token; None: the
        first.
    refine_to: what chunks are refined to after the first token, while the link has room; None: not at all.
    allow_recompute: whether chunks may be computed from text on the decode worker while others load.
    max_recompute_share: of a prompt's chunks, 0 to 1, as long as a source can be had.
    infeasible: what to do when not even the floor can be in time: serve as fast as possible, refuse, or compute all.
    share: of a worker, that one tenant may have, or everybody together who is no tenant.
    link_prior_bps: bits per second that a link never seen is taken for.
    tenants: overrides by tenant: names of these fields and their values.
    """

    ttft_s: float = 0.5
    itl_s: float = 0.1
    levels: tuple[str, ...] = ("raw", "lossless", "q1", "q2", "q3")
    floor: str = "q2"
    ceiling: str | None = None
    refine_to: str | None = "q1"
    allow_recompute: bool = True
    max_recompute_share: float = 1.0
    infeasible: Infeasible = "best_effort"
    share: TenantShare = field(default_factory=TenantShare)
    link_prior_bps: float = 400e6
    tenants: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def allowed_levels(self) -> tuple[str, ...]:
        """Levels from the ceiling down to the floor."""
        first = 0 if self.ceiling is None else self.levels.index(self.ceiling)
        return self.levels[first : self.levels.index(self.floor) + 1]

    def shares(self) -> dict[str, TenantShare]:
        """By tenant, for those that have a part of the policy."""
        return {name: self.for_tenant(name).share for name in self.tenants}

    def store_shares(self) -> StoreShares:
        """Of each worker's chunk store."""
        named = {name: share.max_store_share or 1.0 for name, share in self.shares().items()}
        return StoreShares(tenants=named, default=self.share.max_store_share or 1.0)

    def for_tenant(self, name: str) -> SLOPolicy:
        """The policy with this tenant's overrides; itself for one that has none."""
        return replace(self, **self.tenants.get(name, {}))
