"""The worker actor without Ray: nothing silences a living worker, a broken one ends its process; policies it takes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

import cluster.actors
from cluster.actors import WorkerActor
from cluster.policy_reload import POLICY_NUMBER
from cluster.routing import Role, WorkerInfo
from decode.slo import SLOPolicy
from decode.worker import DecodeWorker


class Ended(BaseException):
    pass


class FakeWorker:
    """Alive for so many looks; `stats` fails at first."""

    def __init__(self, looks: int, asked: int = 0) -> None:
        self.looks, self.asked = looks, asked

    @property
    def is_alive(self) -> bool:
        self.looks -= 1
        return self.looks >= 0

    def stats(self) -> dict[str, float]:
        self.asked += 1
        if self.asked == 1:
            raise RuntimeError("dictionary changed size during iteration")
        return {"asked": self.asked}


def worker_actor(role: Role, worker: Any) -> WorkerActor:
    """An actor around a worker, without the process."""
    actor = object.__new__(WorkerActor)
    actor._worker, actor._policy_number = worker, 0
    actor._info = WorkerInfo(id=role, role=role, incarnation=f"{role}-1", endpoint="tcp://127.0.0.1:1")
    return actor


def test_reports_go_on_until_a_thread_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    reports: list[dict[str, Any]] = []

    def end(code: int) -> None:
        raise Ended(code)

    controller = SimpleNamespace(report=SimpleNamespace(remote=reports.append))
    monkeypatch.setattr(cluster.actors.ray, "get_actor", lambda name: controller)
    monkeypatch.setattr(cluster.actors.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(cluster.actors.os, "_exit", end)
    actor = worker_actor("decode", FakeWorker(looks=4))
    with pytest.raises(Ended):
        actor._report()
    expected = [{"asked": asked, POLICY_NUMBER: 0} for asked in (2, 3, 4)]
    assert [report["stats"] for report in reports] == expected


class Taker(DecodeWorker):
    """Takes policies, without a model."""

    def __init__(self) -> None:
        self.taken: list[SLOPolicy] = []

    def set_policy(self, policy: SLOPolicy) -> None:
        if policy.ttft_s < 0:
            raise ValueError("not this one")
        self.taken.append(policy)

    def stats(self) -> dict[str, float]:
        return {"decode_sequences": 0}


def test_a_policy_reaches_the_worker_and_then_its_reports() -> None:
    actor, policy = worker_actor("decode", Taker()), SLOPolicy(ttft_s=1.0)
    actor.set_policy(3, policy)
    assert actor._worker.taken == [policy]  # type: ignore[union-attr]
    assert actor.stats() == {"decode_sequences": 0, POLICY_NUMBER: 3}
    with pytest.raises(ValueError):
        actor.set_policy(4, SLOPolicy(ttft_s=-1.0))
    assert actor.stats()[POLICY_NUMBER] == 3, "a policy that was not taken is not reported"


def test_prefill_workers_have_no_policy() -> None:
    assert worker_actor("prefill", FakeWorker(looks=1, asked=1)).stats() == {"asked": 2}
