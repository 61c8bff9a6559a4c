"""A policy file that changes under a running server: when it is read, what is taken, and who is told. Virtual time."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import cluster.launch
from cluster.config import ServeConfig, load_config
from cluster.launch import RunningCluster, policy_keeper
from cluster.membership import Role, WorkerInfo
from cluster.policy import load_policy
from cluster.policy_reload import (
    POLICY_NUMBER,
    SETTLE_S,
    FileStamp,
    PolicyFileWatch,
    PolicyKeeper,
    stamp_of,
    workers_behind,
)
from decode.slo import SLOPolicy

A, B, C = (FileStamp(mtime_ns=i, size_bytes=10) for i in range(3))
LATER = SETTLE_S + 0.1


def test_a_file_is_read_once_settled_and_then_when_it_changes() -> None:
    watch = PolicyFileWatch()
    looks = [(0, A), (1, A), (2, A), (3, B), (4, B), (5, B), (6, A), (7, A)]
    said = [watch.look(stamp, float(at)) for at, stamp in looks]
    assert said == ["nothing", "read", "nothing", "nothing", "read", "nothing", "nothing", "read"]


def test_a_file_that_is_being_written_is_left_alone() -> None:
    watch = PolicyFileWatch()
    step_s = SETTLE_S / 2
    growing = [FileStamp(mtime_ns=i, size_bytes=i) for i in range(10)]
    said = [watch.look(stamp, i * step_s) for i, stamp in enumerate([*growing, growing[-1], growing[-1]])]
    assert said == ["nothing"] * 11 + ["read"]


def test_size_alone_and_time_alone_are_changes() -> None:
    for other in (FileStamp(mtime_ns=0, size_bytes=11), FileStamp(mtime_ns=1, size_bytes=10)):
        watch = PolicyFileWatch()
        assert [watch.look(s, t) for s, t in ((A, 0), (A, LATER), (other, 5), (other, 5 + LATER))][-1] == "read"


def test_a_file_that_goes_is_said_once_and_comes_back() -> None:
    watch = PolicyFileWatch()
    looks = [(0, A), (1, A), (2, None), (3, None), (4, None), (5, A), (6, A)]
    said = [watch.look(stamp, float(at)) for at, stamp in looks]
    assert said == ["nothing", "read", "nothing", "gone", "nothing", "nothing", "read"]
    renamed_into_place = PolicyFileWatch()
    looks = [(0, A), (1, A), (2, None), (2.1, A), (3, A)]
    assert [renamed_into_place.look(stamp, at) for at, stamp in looks][-1] == "nothing", "as it was judged"


def worker(name: str, role: Role = "decode", **stats: float) -> WorkerInfo:
    return WorkerInfo(id=name, role=role, incarnation=f"{name}-1", endpoint="tcp://127.0.0.1:1", stats=stats)


def test_who_is_behind() -> None:
    table = [
        worker("told", **{POLICY_NUMBER: 2}),
        worker("restarted", **{POLICY_NUMBER: 0}),
        worker("slow", **{POLICY_NUMBER: 1}),
        worker("source", role="prefill", **{POLICY_NUMBER: 1}),
    ]
    assert workers_behind(table, 2) == ["restarted", "slow", "source"]
    assert workers_behind([], 2) == []


class World:
    """A policy file, two decode workers that take what they are told, and an operator who reads."""

    def __init__(self, path: Path, text: str) -> None:
        self.path, self.now = path, 0.0
        self.stamp: FileStamp | None = None
        self.lines: list[str] = []
        self.numbers = {"decode-0": 0, "decode-1": 0}
        self.policies: dict[str, SLOPolicy] = {}
        self.reachable = True
        self.write(text)
        self.keeper = PolicyKeeper(
            path,
            load_policy(path),
            why_not=lambda policy: ["no such level here"] if policy.floor == "raw" else [],
            say=self.lines.append,
            table=lambda: [worker(name, **{POLICY_NUMBER: n}) for name, n in self.numbers.items()],
            tell=self.tell,
            stamp=lambda _: self.stamp,
        )

    def tell(self, worker_id: str, number: int, policy: SLOPolicy) -> None:
        if self.reachable:
            self.numbers[worker_id], self.policies[worker_id] = number, policy

    def write(self, text: str) -> None:
        self.path.write_text(text)
        self.stamp = FileStamp(mtime_ns=int(self.now * 1e9), size_bytes=len(text))

    def pass_seconds(self, seconds: int) -> None:
        for _ in range(seconds):
            self.now += 1.0
            self.keeper.tick(self.now)


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path / "p.yaml", "ttft_ms: 100\n")


def test_a_new_policy_reaches_every_decode_worker(world: World) -> None:
    world.pass_seconds(5)
    assert (world.lines, world.policies) == ([], {}), "nothing changed, nothing is said"
    world.write("ttft_ms: 200\n")
    world.pass_seconds(3)
    assert world.numbers == {"decode-0": 1, "decode-1": 1}
    assert {policy.ttft_s for policy in world.policies.values()} == {0.2}
    assert world.lines == [f"policy 1 is active, from {world.path}"]


def test_what_changed_while_the_server_started_is_seen(world: World) -> None:
    world.path.write_text("ttft_ms: 300\n")  # after it was loaded, before the first look
    world.pass_seconds(3)
    assert world.policies["decode-1"].ttft_s == 0.3


def test_a_worker_that_restarts_is_told_again(world: World) -> None:
    world.write("ttft_ms: 200\n")
    world.pass_seconds(3)
    world.numbers["decode-1"] = 0
    world.policies.clear()
    world.pass_seconds(1)
    assert world.numbers["decode-1"] == 1
    assert list(world.policies) == ["decode-1"], "the other one has it"


def test_a_worker_that_cannot_be_reached_is_told_later(world: World) -> None:
    world.reachable = False
    world.write("ttft_ms: 200\n")
    world.pass_seconds(3)
    assert world.policies == {}
    world.reachable = True
    world.pass_seconds(1)
    assert set(world.policies) == {"decode-0", "decode-1"}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("ttft_ms: 200\nflor: q1\n", "p.yaml:2: unknown key `flor`; did you mean `floor`?"),
        ("ttft_ms: [\n", "not valid YAML"),
        ("levels: [raw]\n", "no such level here"),
    ],
)
def test_a_bad_policy_is_named_once_and_the_old_one_stays(world: World, text: str, says: str) -> None:
    world.write("ttft_ms: 200\n")
    world.pass_seconds(3)
    world.write(text)
    world.pass_seconds(5)
    assert len(world.lines) == 2
    assert says in world.lines[1]
    assert "policy 1 stays" in world.lines[1]
    assert world.keeper.policy.ttft_s == 0.2
    world.numbers["decode-0"] = 0
    world.pass_seconds(1)
    assert world.policies["decode-0"].ttft_s == 0.2, "and still reaches who restarts"
    world.write("ttft_ms: 250\n")
    world.pass_seconds(3)
    assert (world.keeper.number, world.keeper.policy.ttft_s) == (2, 0.25)


def test_a_comment_makes_no_new_policy(world: World) -> None:
    world.write("ttft_ms: 100  # as before\n")
    world.pass_seconds(5)
    assert (world.lines, world.keeper.number) == ([], 0)


def test_a_file_that_is_gone_changes_nothing(world: World) -> None:
    world.stamp = None
    world.pass_seconds(5)
    assert world.lines == [f"{world.path} is gone; policy 0 stays"]


def test_stamps_of_real_files(tmp_path: Path) -> None:
    path = tmp_path / "p.yaml"
    assert stamp_of(path) is None
    path.write_text("a")
    before = stamp_of(path)
    path.write_text("ab")
    assert before is not None
    assert before.size_bytes == 1
    assert stamp_of(path) != before


# -- as `kvstream serve` runs it, around actors that are not there -----------------------------------------------


class FakeCall:
    """An actor's method: what it returns is what `ray.get` gets."""

    def __init__(self, answer: Callable[..., Any]) -> None:
        self.remote = answer


def test_the_launcher_asks_the_controller_and_tells_the_workers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[tuple[str, int, float]] = []
    controller_is_there = True

    def get(answer: Any, timeout: float) -> Any:
        if isinstance(answer, Exception):
            raise answer
        return answer

    def table() -> Any:
        if not controller_is_there:
            return cluster.launch.ray.exceptions.ActorUnavailableError("restarting", None)
        return 1.0, [worker(name, **{POLICY_NUMBER: 0}).to_wire() for name in ("decode-0", "decode-1")]

    def actor(name: str, error: Exception | None = None) -> Any:
        def set_policy(number: int, policy: SLOPolicy) -> Exception | None:
            told.append((name, number, policy.ttft_s))
            return error

        return SimpleNamespace(set_policy=FakeCall(set_policy))

    monkeypatch.setattr(cluster.launch.ray, "get", get)
    running = RunningCluster(
        base_url="",
        model_name="",
        controller=SimpleNamespace(table=FakeCall(table)),
        gateway=None,
        workers={
            "decode-0": actor("decode-0", cluster.launch.ray.exceptions.GetTimeoutError("slow")),
            "decode-1": actor("decode-1"),
        },
        levels=("raw", "q1", "q2"),
    )
    path = tmp_path / "p.yaml"
    path.write_text("ttft_ms: 100\n")
    lines: list[str] = []
    assert policy_keeper(ServeConfig(), running, say=lines.append) is None
    config = load_config(None, policy=path)
    path.write_text("ttft_ms: 200\n")
    keeper = policy_keeper(config, running, say=lines.append)
    assert keeper is not None
    keeper.tick(0.0)
    controller_is_there = False
    keeper.tick(1.0)
    assert (told, lines) == ([], [f"policy 1 is active, from {path}"])
    controller_is_there = True
    keeper.tick(2.0)
    assert told == [("decode-0", 1, 0.2), ("decode-1", 1, 0.2)]
    assert lines[1:] == ["decode-0 has not taken policy 1 yet: slow"]
    path.write_text("levels: [lossless]\n")  # not in this profile
    keeper.tick(3.0)
    keeper.tick(4.0)
    assert "codec profile has raw, q1, q2" in lines[-2] or "codec profile has raw, q1, q2" in lines[-1]
    assert keeper.number == 1
