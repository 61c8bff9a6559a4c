"""One worker of an actor's process, and what the controller is told of it."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any, Protocol, runtime_checkable

import ray

from cluster.membership import WorkerInfo
from cluster.policy_reload import POLICY_NUMBER
from cluster.prefix_index import IndexFeed, IndexSource
from cluster.route_costs import MAY_AGGREGATE
from decode.slo import SLOPolicy
from decode.worker import DecodeWorker
from prefill.worker import PrefillWorker

log = logging.getLogger("kvstream.actors")


@runtime_checkable
class ServesChunks(Protocol):
    """A decode worker that may give what it has stored to others; where, None: it stores nothing."""

    @property
    def kv_endpoint(self) -> str | None: ...


class HostedWorker:
    """policy: that a decode worker is started with."""

    def __init__(self, worker: PrefillWorker | DecodeWorker, info: WorkerInfo, *, policy: SLOPolicy | None) -> None:
        self.worker, self.info = worker, info
        self._feed = IndexFeed(worker) if isinstance(worker, IndexSource) else None
        self._answer: Any = None  # of the controller, to the last changes
        self._is_cut = False  # whether the index leaves out some of what this worker holds
        self._policy_number = 0  # the one that it is started with
        self._may_aggregate = policy is None or may_aggregate(policy)

    def stats(self) -> dict[str, float]:
        stats = {**self.worker.stats(), POLICY_NUMBER: self._policy_number}
        return stats if self.info.role == "prefill" else {**stats, MAY_AGGREGATE: float(self._may_aggregate)}

    def set_policy(self, number: int, policy: SLOPolicy) -> None:
        if isinstance(self.worker, DecodeWorker):
            self.worker.set_policy(policy)
        self._policy_number, self._may_aggregate = number, may_aggregate(policy)

    def report(self, controller: Any) -> None:
        """To the controller's actor."""
        if self._answer is not None and self._hear(self._answer):
            self._answer = None
        told = replace(self.info, stats=self.stats()).to_wire()
        if self._feed is None or self._answer is not None:
            controller.report.remote(told)
        else:
            self._answer = controller.report.remote(told, self._feed.next_changes())

    def _hear(self, answer: Any) -> bool:
        """The controller's answer to the last changes, if it has come: the next ones start where it says."""
        assert self._feed is not None
        if not ray.wait([answer], timeout=0)[0]:
            return False
        try:
            epoch, is_cut = ray.get(answer)
        except ray.exceptions.RayError as error:
            log.warning("%s: the controller was lost: %s", self.info.id, type(error).__name__)
            return True
        if is_cut and not self._is_cut:
            log.warning("%s holds more chunks than the index keeps of a worker; others find a part", self.info.id)
        self._is_cut = is_cut
        self._feed.confirmed(epoch)
        return True


def may_aggregate(policy: SLOPolicy) -> bool:
    """Whether a decode worker may compute all of a prompt, for whomever: what the router may do without a source."""
    tenants = [policy.for_tenant(tenant) for tenant in policy.tenants]
    return all(one.allow_recompute and one.max_recompute_share >= 1 for one in (policy, *tenants))
