"""The actors without Ray: nothing silences a living worker, a broken one ends its process; policies; the index."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

import cluster.actors
from cluster.actors import Controller, WorkerActor, _kv_endpoint
from cluster.hosted_worker import HostedWorker, may_aggregate
from cluster.membership import EXPIRED_S, Role, WorkerInfo, companion_id, host_id
from cluster.policy import parse_policy
from cluster.policy_reload import POLICY_NUMBER
from cluster.prefix_index import Coverage, IndexFeed
from cluster.route_costs import MAY_AGGREGATE
from decode.slo import SLOPolicy
from decode.worker import DecodeWorker
from prefill.store import MASTER_LEVEL, ChunkStore


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


def hosted(role: Role, worker: Any, worker_id: str = "") -> HostedWorker:
    worker_id = worker_id or role
    info = WorkerInfo(id=worker_id, role=role, incarnation=f"{worker_id}-1", endpoint="tcp://127.0.0.1:1")
    return HostedWorker(worker, info, policy=None)


def worker_actor(role: Role, worker: Any, *others: HostedWorker, store: ChunkStore | None = None) -> WorkerActor:
    """An actor around a worker, and others, without the process."""
    actor = object.__new__(WorkerActor)
    actor._hosted, actor._store = [hosted(role, worker), *others], store
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
    expected = [{"asked": asked, POLICY_NUMBER: 0, MAY_AGGREGATE: 1.0} for asked in (2, 3, 4)]
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
    assert actor._hosted[0].worker.taken == [policy]  # type: ignore[union-attr]
    assert actor.stats() == {"decode_sequences": 0, POLICY_NUMBER: 3, MAY_AGGREGATE: 1.0}
    with pytest.raises(ValueError):
        actor.set_policy(4, SLOPolicy(ttft_s=-1.0))
    assert actor.stats()[POLICY_NUMBER] == 3, "a policy that was not taken is not reported"


@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_a_policy_reaches_the_store_of_either_role(role: Role) -> None:
    store = ChunkStore(100)
    for number in range(6):
        store.put(chunk(number), MASTER_LEVEL, bytes(10), tenant="free" if number % 2 else "gold")
    actor = worker_actor(role, Taker() if role == "decode" else FakeWorker(looks=1, asked=1), store=store)
    actor.set_policy(1, parse_policy("share: {max_store_share: 0.1}\ntenants: {gold: {share: {max_store_share: 0.2}}}"))
    assert {tenant: held.ram_bytes for tenant, held in store.stats().tenants.items()} == {"free": 10, "gold": 20}
    assert actor.stats()[POLICY_NUMBER] == 1


def test_a_companion_reports_beside_its_prefill_worker_and_takes_the_policies(monkeypatch: pytest.MonkeyPatch) -> None:
    reports: list[dict[str, Any]] = []

    def end(code: int) -> None:
        raise Ended(code)

    controller = SimpleNamespace(report=SimpleNamespace(remote=reports.append))
    monkeypatch.setattr(cluster.actors.ray, "get_actor", lambda name: controller)
    monkeypatch.setattr(cluster.actors.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(cluster.actors.os, "_exit", end)
    companion = hosted("decode", FakeWorker(looks=2, asked=1), companion_id("prefill"))
    actor = worker_actor("prefill", FakeWorker(looks=9, asked=1), companion)
    with pytest.raises(Ended):
        actor._report()
    assert [report["id"] for report in reports] == ["prefill", "prefill/decode"] * 2, "until either has lost a thread"
    assert host_id("prefill/decode") == host_id("prefill") == "prefill"
    companion.worker = Taker()
    actor.set_policy(3, SLOPolicy(ttft_s=1.0))
    assert actor.stats("prefill/decode") == {"decode_sequences": 0, POLICY_NUMBER: 3, MAY_AGGREGATE: 1.0}
    assert actor.stats()[POLICY_NUMBER] == 3 and MAY_AGGREGATE not in actor.stats()


# -- what a worker holds --------------------------------------------------------------------------------------------


def chunk(number: int) -> bytes:
    return number.to_bytes(16, "big")


class Holder:
    """Alive while it has looks left; every report finds one more chunk in RAM, and the log goes all the way back."""

    def __init__(self, looks: int) -> None:
        self.looks, self.epoch = looks, 0
        self.asked_since: list[int | None] = []

    @property
    def is_alive(self) -> bool:
        self.looks -= 1
        return self.looks >= 0

    def stats(self) -> dict[str, float]:
        return {}

    def index_changes(self, since: int | None) -> dict[str, Any]:
        self.asked_since.append(since)
        self.epoch += 1
        first = 0 if since is None else since
        added = [(chunk(number), "ram") for number in range(first, self.epoch)]
        return {"epoch": self.epoch, "added": added, "removed": [], "full": since is None}


class FakeRay:
    """Calls arrive at once; whether their answers have come, or are lost, is said by `outcome` for each call."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, controller: Controller, outcome: Callable[[int], str]) -> None:
        self.controller, self.outcome, self.calls = controller, outcome, 0
        self.with_changes: list[int] = []
        handle = SimpleNamespace(report=SimpleNamespace(remote=self.report))
        monkeypatch.setattr(cluster.actors.ray, "get_actor", lambda name: handle)
        monkeypatch.setattr(
            cluster.actors.ray, "wait", lambda refs, timeout: (refs if refs[0][1] != "slow" else [], [])
        )
        monkeypatch.setattr(cluster.actors.ray, "get", self.get)
        monkeypatch.setattr(cluster.actors.time, "sleep", lambda seconds: None)
        monkeypatch.setattr(cluster.actors.os, "_exit", self.end)

    def report(self, *arguments: Any) -> list[Any]:
        self.calls += 1
        outcome = self.outcome(self.calls)
        if outcome == "not sent":
            raise ConnectionError("no way")
        if len(arguments) > 1:
            self.with_changes.append(self.calls)
        return [self.controller.report(*arguments) if outcome != "restarted" else None, outcome]

    def get(self, answer: list[Any]) -> Any:
        if answer[1] in ("lost", "restarted"):
            raise cluster.actors.ray.exceptions.RayActorError
        return answer[0]

    def end(self, code: int) -> None:
        raise Ended(code)


def reports_of(monkeypatch: pytest.MonkeyPatch, looks: int, outcome: Callable[[int], str]) -> tuple[Holder, FakeRay]:
    worker, controller = Holder(looks), Controller()
    ray = FakeRay(monkeypatch, controller, outcome)
    with pytest.raises(Ended):
        worker_actor("prefill", worker)._report()
    return worker, ray


def num_indexed(controller: Controller) -> int:
    found = controller.holders(b"".join(map(chunk, range(20))))
    return Coverage.from_wire(found["prefill"]).leading[1] if found else 0


def test_each_report_continues_where_the_answer_says(monkeypatch: pytest.MonkeyPatch) -> None:
    worker, ray = reports_of(monkeypatch, 4, lambda call: "here")
    assert worker.asked_since == [None, 1, 2, 3]
    assert num_indexed(ray.controller) == 4 and ray.controller.index_stats()["index_entries"] == 4


def test_without_an_answer_the_worker_is_heard_but_sends_no_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    worker, ray = reports_of(monkeypatch, 5, lambda call: "slow" if call == 2 else "here")
    assert ray.calls == 5 and ray.with_changes == [1, 2] and worker.asked_since == [None, 1]


def test_a_lost_answer_is_made_good(monkeypatch: pytest.MonkeyPatch) -> None:
    worker, ray = reports_of(monkeypatch, 5, lambda call: "lost" if call == 2 else "here")
    assert worker.asked_since == [None, 1, 1, 2, 4], "the third was left, and its answer said what the controller has"
    assert num_indexed(ray.controller) == 5


def test_what_could_not_be_sent_is_sent_with_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    worker, ray = reports_of(monkeypatch, 4, lambda call: "not sent" if call == 2 else "here")
    assert worker.asked_since == [None, 1, 1, 3] and num_indexed(ray.controller) == 4


def test_a_new_controller_is_told_all(monkeypatch: pytest.MonkeyPatch) -> None:
    fresh = Controller()

    def outcome(call: int) -> str:
        if call == 3:
            ray_of["ray"].controller = fresh
            return "restarted"
        return "here"

    worker, controller = Holder(6), Controller()
    ray_of = {"ray": FakeRay(monkeypatch, controller, outcome)}
    with pytest.raises(Ended):
        worker_actor("prefill", worker)._report()
    assert worker.asked_since == [None, 1, 2, 2, None, 5] and num_indexed(fresh) == 6


def test_the_controller_forgets_what_the_expired_and_earlier_lives_held(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(cluster.actors.time, "monotonic", lambda: now[0])
    controller = Controller()
    first = WorkerInfo(id="prefill", role="prefill", incarnation="prefill-1", endpoint="tcp://here")
    changes = IndexFeed(Holder(1)).next_changes()
    assert controller.report(first.to_wire(), changes) == (1, False)
    assert num_indexed(controller) == 1
    controller.report(replace(first, incarnation="prefill-2").to_wire())
    controller.table()
    assert num_indexed(controller) == 0, "a new life that has told nothing yet"
    controller.report(first.to_wire(), changes)
    now[0] += EXPIRED_S
    assert controller.table()[1] == [] and num_indexed(controller) == 0


# -- what a worker may do, and where it is reached ------------------------------------------------------------------


def test_the_router_may_aggregate_where_nobodys_policy_bounds_computing() -> None:
    assert may_aggregate(SLOPolicy())
    assert not may_aggregate(SLOPolicy(allow_recompute=False))
    assert not may_aggregate(SLOPolicy(max_recompute_share=0.5))
    assert not may_aggregate(SLOPolicy(tenants={"a": {"allow_recompute": False}}))
    actor = worker_actor("decode", Taker())
    actor.set_policy(1, SLOPolicy(allow_recompute=False))
    assert actor.stats()[MAY_AGGREGATE] == 0.0


@pytest.mark.parametrize(
    ("worker", "advertise", "kv_advertise", "endpoint"),
    [
        (SimpleNamespace(), None, None, None),
        (SimpleNamespace(kv_endpoint="tcp://bound:1"), None, None, "tcp://bound:1"),
        (SimpleNamespace(kv_endpoint="tcp://bound:1"), "out:1", None, None),
        (SimpleNamespace(kv_endpoint="tcp://bound:1"), "out:1", "out:2", "tcp://out:2"),
    ],
    ids=["serves nothing", "as bound", "one address of two", "both addresses"],
)
def test_where_others_reach_a_decode_workers_store(
    worker: Any, advertise: Any, kv_advertise: Any, endpoint: Any
) -> None:
    assert _kv_endpoint(worker, advertise, kv_advertise) == endpoint
