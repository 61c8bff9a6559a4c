"""The gateway's backend over fake streams: retries, what it remembers of workers, and that none of it grows."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import replace
from typing import Any

import pytest

import cluster.backend_zmq
from cluster.backend_zmq import AVOID_S, ClusterBackend
from cluster.membership import EXPIRED_S, WorkerInfo
from cluster.prefix_index import Coverage
from cluster.prefix_lookup import PrefixLookup
from decode.requests import FailedEvent, FinishedEvent, GenerationRequest, RequestRefused, TokensEvent
from transport.errors import StreamLost, StreamOverflow, StreamRefused

FINISHED = {"finish_reason": "stop", "prompt_tokens": 3, "completion_tokens": 1, "receipt": {}}


class FakeStream:
    def __init__(self, answers: list[Any]) -> None:
        self.answers = list(answers)

    async def __aenter__(self) -> FakeStream:
        return self

    async def __aexit__(self, *_: object) -> None:
        pass

    async def __aiter__(self) -> AsyncIterator[dict[str, Any]]:
        for answer in self.answers:
            await asyncio.sleep(0)  # others run meanwhile
            if isinstance(answer, Exception):
                raise answer
            yield answer


class FakeClient:
    """What each endpoint answers is in `script`: a list of answers a submit, the last one for ever."""

    script: dict[str, list[list[Any]]] = {}
    made: list[FakeClient] = []

    def __init__(self, endpoint: str, **_: Any) -> None:
        self.endpoint, self.num_streams, self.is_closed, self.submitted = endpoint, 0, False, 0
        self.bodies: list[dict[str, Any]] = []
        FakeClient.made.append(self)

    def submit(self, body: dict[str, Any]) -> FakeStream:
        self.submitted += 1
        self.bodies.append(body)
        answers = FakeClient.script[self.endpoint]
        return FakeStream(answers.pop(0) if len(answers) > 1 else answers[0])

    async def call(self, body: dict[str, Any]) -> dict[str, Any]:
        self.submitted += 1
        return {"receipt": {"request_id": body["request_id"]}}

    async def close(self) -> None:
        self.is_closed = True


OK = [{"tokens": [5]}, {"tokens": [6], "finished": FINISHED}]
LOST = [StreamLost("the connection was cut")]


@pytest.fixture(autouse=True)
def fake(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeClient, "script", {})
    monkeypatch.setattr(FakeClient, "made", [])
    monkeypatch.setattr(cluster.backend_zmq, "StreamClient", FakeClient)


def worker(name: str, life: int = 1) -> WorkerInfo:
    return WorkerInfo(id=name, role="decode", incarnation=f"{name}-{life}", endpoint=f"tcp://{name}:{life}")


def run(scene: Callable[[ClusterBackend], Coroutine[Any, Any, Any]], *names: str, **script: list[list[Any]]) -> Any:
    async def everything() -> Any:
        backend = ClusterBackend(chunk_tokens=4)
        backend.table = [worker(name) for name in names]
        FakeClient.script.update({f"tcp://{name}:1": answers for name, answers in script.items()})
        return await scene(backend)

    return asyncio.run(everything())


async def events(backend: ClusterBackend, request_id: str = "r") -> list[Any]:
    return [event async for event in backend.generate(GenerationRequest(request_id=request_id, token_ids=(1, 2)))]


GOOD = [TokensEvent(token_ids=(5,)), TokensEvent(token_ids=(6,)), FinishedEvent(**FINISHED)]


def test_tokens_then_one_end() -> None:
    assert run(events, "d0", d0=[OK]) == GOOD


def test_who_is_lost_before_a_token_is_replaced() -> None:
    assert run(events, "d0", "d1", d0=[LOST], d1=[OK]) == GOOD


def test_who_is_lost_after_a_token_is_told() -> None:
    found = run(events, "d0", "d1", d0=[[{"tokens": [5]}, *LOST]], d1=[OK])
    assert isinstance(found[-1], FailedEvent) and found[-1].status == 502


REFUSED = [{"refused": {"message": "too long for these pages", "status": 400, "code": "kv_pool_too_small"}}]


@pytest.mark.parametrize("has_another", [True, False])
def test_what_a_companion_refuses_goes_to_a_decode_worker_if_there_is_one(has_another: bool) -> None:
    async def scene(backend: ClusterBackend) -> list[Any]:
        companion = replace(worker("p0"), companion_of="host")
        busy = replace(worker("d0"), stats={"waiting_prompt_tokens": 9000.0})
        backend.table = [companion, busy] if has_another else [companion]
        try:
            return await events(backend)
        finally:
            assert not backend._sent.in_flight() and FakeClient.made[0].endpoint == companion.endpoint

    if has_another:
        assert run(scene, p0=[REFUSED], d0=[OK]) == GOOD
        with pytest.raises(RequestRefused, match="too long"):
            run(scene, p0=[REFUSED], d0=[REFUSED])
    else:
        with pytest.raises(RequestRefused, match="too long"):
            run(scene, p0=[REFUSED])


def test_nobody_left_is_a_503_that_names_the_last_error() -> None:
    with pytest.raises(RequestRefused, match="cut") as refused:
        run(events, "d0", d0=[LOST])
    assert refused.value.status == 503


def test_a_worker_lost_once_is_tried_again_after_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(cluster.backend_zmq.time, "monotonic", lambda: now[0])

    async def scene(backend: ClusterBackend) -> list[Any]:
        with pytest.raises(RequestRefused):
            await events(backend)
        assert (await backend.health())["status"] != "ok"
        now[0] += AVOID_S
        assert (await backend.health())["status"] == "ok"
        return await events(backend)

    assert run(scene, "d0", d0=[LOST, OK]) == GOOD


@pytest.mark.parametrize("error", [StreamRefused("KeyError: 'request'"), StreamOverflow("4096 events wait")])
def test_one_odd_request_does_not_bring_a_worker_into_disrepute(error: Exception) -> None:
    async def scene(backend: ClusterBackend) -> list[Any]:
        await asyncio.gather(events(backend), return_exceptions=True)
        return await events(backend, "another")

    assert run(scene, "d0", d0=[[{"tokens": [5]}, error], OK]) == GOOD


def test_a_refusal_is_handed_on() -> None:
    refusal = {"message": "no", "status": 429, "code": "overloaded", "param": None}
    with pytest.raises(RequestRefused) as refused:
        run(events, "d0", d0=[[{"refused": refusal}]])
    assert (refused.value.status, refused.value.code) == (429, "overloaded")


def test_clients_of_endpoints_that_are_gone_are_closed() -> None:
    async def scene(backend: ClusterBackend) -> None:
        for life in range(1, 30):
            backend.table = [worker("d0", life)]
            FakeClient.script[f"tcp://d0:{life}"] = [OK]
            assert await events(backend) == GOOD
            await asyncio.sleep(0.001)
            assert len(backend._clients) == 1 and not backend._closing
        assert [client.is_closed for client in FakeClient.made] == [True] * 28 + [False]

    run(scene)


def test_a_client_with_streams_stays() -> None:
    async def scene(backend: ClusterBackend) -> None:
        await events(backend)
        FakeClient.made[0].num_streams = 1
        backend.table = [worker("d1")]
        await events(backend)
        assert not FakeClient.made[0].is_closed

    run(scene, "d0", d0=[OK], d1=[OK])


def test_a_receipt_is_asked_of_who_served_and_still_lives() -> None:
    async def scene(backend: ClusterBackend) -> None:
        await events(backend, "mine")
        assert await backend.receipt("mine") == {"request_id": "mine"}
        assert await backend.receipt("not mine") is None
        backend.table = [worker("d0", 2)]
        assert await backend.receipt("mine") is None
        assert len(FakeClient.made) == 1, "nobody is asked at an address that is gone"

    run(scene, "d0", d0=[OK])


def test_metrics_have_all_their_digits() -> None:
    backend = ClusterBackend(chunk_tokens=4)
    stats = {"bytes_total": 123_456_789_012, "seconds": 0.1, "small": 1.5e-7, "rows": 3.0}
    backend.table = [replace(worker("d0"), stats=stats)]
    values = {line.split("{")[0]: line.split(" ")[1] for line in asyncio.run(backend.metrics_text()).splitlines()}
    assert values == {
        "kvstream_bytes_total": "123456789012",
        "kvstream_rows": "3",
        "kvstream_seconds": "0.1",
        "kvstream_small": "1.5e-07",
    }


def test_what_is_remembered_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster.backend_zmq, "MAX_KNOWN_REQUESTS", 10)

    async def scene(backend: ClusterBackend) -> None:
        for number in range(30):
            await events(backend, str(number))
        assert len(backend._served_by) == 10
        assert not backend._sent.in_flight()

    run(scene, "d0", "d1", d0=[OK], d1=[OK])


def test_a_lost_worker_is_left_alone_until_the_controller_would_have_forgotten_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    backend = ClusterBackend(chunk_tokens=256)
    clock = [1000.0]
    monkeypatch.setattr(cluster.backend_zmq.time, "monotonic", lambda: clock[0])
    backend._lost_at["decode-0-life"] = clock[0]
    assert backend._lost_lately() == {"decode-0-life"}
    clock[0] += EXPIRED_S
    assert backend._lost_lately() == frozenset() and not backend._lost_at


# -- where requests go ----------------------------------------------------------------------------------------------

LONG = tuple(range(16 * 4 + 1))  # four chunks


def with_index(backend: ClusterBackend, **holders: Coverage) -> list[bytes]:
    """An index that answers so; the questions that it was asked."""
    asked: list[bytes] = []

    async def ask(keys: bytes) -> dict[str, Any]:
        asked.append(keys)
        return {name: held.to_wire() for name, held in holders.items()}

    backend._chunk_tokens = 16
    backend.lookup = PrefixLookup(ask, fingerprint="model", chunk_tokens=16)
    return asked


async def sent_to(backend: ClusterBackend, request_id: str, **options: Any) -> str:
    options.setdefault("token_ids", LONG)
    request = GenerationRequest(request_id=request_id, **options)
    assert [event async for event in backend.generate(request)] == GOOD
    return backend._served_by[request_id].id


def test_a_prompt_goes_where_its_prefix_is() -> None:
    async def scene(backend: ClusterBackend) -> None:
        for name in ("d0", "d1", "d2"):
            asked = with_index(backend, **{name: Coverage(incarnation=f"{name}-1", pages=0b1111)})
            assert await sent_to(backend, name) == name and len(asked) == 1
        asked = with_index(backend)
        await sent_to(backend, "short", token_ids=LONG[:16])
        await sent_to(backend, "text", kv_mode="text")
        assert asked == []

    run(scene, "d0", "d1", "d2", d0=[OK], d1=[OK], d2=[OK])


def test_whom_the_index_names_is_a_source() -> None:
    async def scene(backend: ClusterBackend) -> None:
        with_index(backend, p0=Coverage(incarnation="p0-1", ram=0b1111))
        p0 = WorkerInfo(id="p0", role="prefill", incarnation="p0-1", endpoint="tcp://p0")
        backend.table = [*backend.table, p0]
        await sent_to(backend, "r")
        (source,) = FakeClient.made[0].bodies[0]["sources"]
        assert source == {
            "id": "p0",
            "endpoint": "tcp://p0",
            "public_key": None,
            "is_holder": True,
            "stored_only": True,
        }

    run(scene, "d0", d0=[OK])


def test_without_the_index_requests_are_served_as_before() -> None:
    async def scene(backend: ClusterBackend) -> None:
        with_index(backend)

        async def ask(keys: bytes) -> dict[str, Any]:
            raise RuntimeError("the controller is away")

        backend.lookup = PrefixLookup(ask, fingerprint="model", chunk_tokens=16)
        p0 = WorkerInfo(id="p0", role="prefill", incarnation="p0-1", endpoint="tcp://p0")
        backend.table = [*backend.table, p0]
        await sent_to(backend, "r")
        assert [source["id"] for source in FakeClient.made[0].bodies[0]["sources"]] == ["p0"]

    run(scene, "d0", d0=[OK])


def test_a_group_is_served_by_one_worker() -> None:
    async def scene(backend: ClusterBackend) -> None:
        with_index(backend)
        places = await asyncio.gather(*(sent_to(backend, f"r{n}", group="g") for n in range(6)))
        assert len(set(places)) == 1
        others = await asyncio.gather(*(sent_to(backend, f"s{n}") for n in range(6)))
        assert len(set(others)) == 3, "others spread by load"

    run(scene, "d0", "d1", "d2", d0=[OK], d1=[OK], d2=[OK])


def test_a_group_follows_when_its_worker_is_lost() -> None:
    async def scene(backend: ClusterBackend) -> None:
        first = await sent_to(backend, "r0", group="g")
        FakeClient.script[f"tcp://{first}:1"] = [LOST]
        second = await sent_to(backend, "r1", group="g")
        assert second != first and await sent_to(backend, "r2", group="g") == second

    run(scene, "d0", "d1", d0=[OK], d1=[OK])


def test_groups_that_are_remembered_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster.backend_zmq, "MAX_KNOWN_GROUPS", 10)

    async def scene(backend: ClusterBackend) -> None:
        for number in range(30):
            await sent_to(backend, str(number), group=str(number))
        assert len(backend._group_at) == 10

    run(scene, "d0", d0=[OK])
