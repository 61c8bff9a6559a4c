"""The worker actor's reports, without Ray: nothing silences a living worker, and a broken one ends its process."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

import cluster.actors
from cluster.actors import WorkerActor
from cluster.routing import WorkerInfo


class Ended(BaseException):
    pass


class FakeWorker:
    """Alive for so many looks; `stats` fails at first."""

    def __init__(self, looks: int) -> None:
        self.looks, self.asked = looks, 0

    @property
    def is_alive(self) -> bool:
        self.looks -= 1
        return self.looks >= 0

    def stats(self) -> dict[str, float]:
        self.asked += 1
        if self.asked == 1:
            raise RuntimeError("dictionary changed size during iteration")
        return {"asked": self.asked}


def test_reports_go_on_until_a_thread_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    reports: list[dict[str, Any]] = []

    def end(code: int) -> None:
        raise Ended(code)

    controller = SimpleNamespace(report=SimpleNamespace(remote=reports.append))
    monkeypatch.setattr(cluster.actors.ray, "get_actor", lambda name: controller)
    monkeypatch.setattr(cluster.actors.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(cluster.actors.os, "_exit", end)
    actor = object.__new__(WorkerActor)
    actor._worker = FakeWorker(looks=4)  # type: ignore[assignment]
    actor._info = WorkerInfo(id="d", role="decode", incarnation="d-1", endpoint="tcp://127.0.0.1:1")
    with pytest.raises(Ended):
        actor._report()
    assert [report["stats"] for report in reports] == [{"asked": 2}, {"asked": 3}, {"asked": 4}]
