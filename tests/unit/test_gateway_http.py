"""The gateway over HTTP with a fake backend: errors, keys, limits, streams, disconnects."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any

import httpx
import pytest
from fake_backend import MAX_CONTEXT, FakeBackend, make_app, serving

from cluster.http_shell import EventStream
from decode.requests import GenerationRequest

WAIT_S = 10.0


@pytest.fixture
def backend() -> FakeBackend:
    return FakeBackend()


@pytest.fixture
def client(backend: FakeBackend) -> Iterator[httpx.Client]:
    with serving(make_app(backend, max_body_bytes=20_000)) as url, httpx.Client(base_url=url, timeout=WAIT_S) as client:
        yield client


def events_of(text: str) -> list[Any]:
    blocks = text.removesuffix("\n\n").split("\n\n")
    assert all(block.startswith("data: ") for block in blocks)
    assert blocks[-1] == "data: [DONE]"
    return [json.loads(block.removeprefix("data: ")) for block in blocks[:-1]]


def completions(client: httpx.Client, **fields: Any) -> httpx.Response:
    return client.post("/v1/completions", json={"prompt": "hi", "max_tokens": 50, **fields})


def assert_error(response: httpx.Response, status: int, code: str) -> str:
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["code"] == code
    message = error["message"]
    assert isinstance(message, str)
    assert message
    return message


def test_a_completion_has_text_usage_and_receipt(client: httpx.Client) -> None:
    body = completions(client).json()
    assert body["object"] == "text_completion"
    assert body["choices"] == [{"index": 0, "text": "héllo wörld €5", "logprobs": None, "finish_reason": "stop"}]
    assert body["usage"] == {"prompt_tokens": 2, "completion_tokens": 19, "total_tokens": 21}
    assert [chunk["level"] for chunk in body["kv_receipt"]["chunks"]] == ["q1", "text"]


def test_a_stream_ends_with_usage_receipt_and_done(client: httpx.Client) -> None:
    response = completions(client, stream=True, stream_options={"include_usage": True})
    assert response.headers["content-type"].startswith("text/event-stream")
    chunks = events_of(response.text)
    assert "".join(c["choices"][0]["text"] for c in chunks[:-1]) == "héllo wörld €5"
    assert chunks[-2]["choices"][0]["finish_reason"] == "stop"
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["completion_tokens"] == 19
    assert all("kv_receipt" not in c and c["usage"] is None for c in chunks[:-1])
    assert chunks[-1]["kv_receipt"]["chunks"]


def test_without_usage_the_chunk_with_the_finish_reason_is_the_last(client: httpx.Client) -> None:
    chunks = events_of(completions(client, stream=True, max_tokens=3).text)
    assert chunks[-1]["choices"][0]["finish_reason"] == "length"
    assert chunks[-1]["kv_receipt"]["chunks"]
    assert all("usage" not in c for c in chunks)


def test_stop_strings_across_tokens(client: httpx.Client, backend: FakeBackend) -> None:
    body = completions(client, stop=["wör", "zzz"]).json()
    assert body["choices"][0]["text"] == "héllo "
    assert body["choices"][0]["finish_reason"] == "stop"
    assert body["usage"]["completion_tokens"] == len("héllo wör".encode())
    assert body["kv_receipt"]["chunks"]
    assert backend.cancelled.wait(WAIT_S), "the tokens after a stop string are cancelled"


@pytest.mark.parametrize("max_tokens", [50, 19, 18])
def test_a_stop_string_that_never_comes_holds_nothing_back(
    client: httpx.Client, backend: FakeBackend, max_tokens: int
) -> None:
    """Its beginning does, at the very end of the answer."""
    stop, reason = ["€5 and more", "nowhere"], "stop" if max_tokens > 18 else "length"
    choice = completions(client, stop=stop, max_tokens=max_tokens).json()["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == ("héllo wörld €5", reason)
    chunks = events_of(completions(client, stop=stop, max_tokens=max_tokens, stream=True).text)
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == "héllo wörld €5"
    assert chunks[-1]["choices"][0]["finish_reason"] == reason
    deadline = time.monotonic() + WAIT_S
    while backend.running:  # its generator is closed behind the last event
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_token_ids_on_request(client: httpx.Client) -> None:
    choice = completions(client, return_token_ids=True, max_tokens=2).json()["choices"][0]
    assert choice["token_ids"] == list("hé".encode()[:2])
    assert choice["prompt_token_ids"] == list(b"hi")
    chunks = events_of(completions(client, return_token_ids=True, max_tokens=2, stream=True).text)
    assert [c["choices"][0]["token_ids"] for c in chunks[:2]] == [[104], [195]]


def test_what_reaches_the_backend(client: httpx.Client, backend: FakeBackend) -> None:
    kv = {"mode": "q1", "floor": "q2", "ttft_ms": 250}
    fields = {"seed": 5, "top_k": 7, "stop_token_ids": [9], "ignore_eos": True, "cache_salt": "me", "kv": kv}
    response = completions(client, prompt=[1, 2, 3], request_id="mine-1", **fields)
    assert response.headers["x-request-id"] == "mine-1"
    request = backend.requests[-1]
    assert (request.request_id, request.token_ids, request.cache_salt) == ("mine-1", (1, 2, 3), "me")
    assert (request.kv_mode, request.floor, request.ttft_s) == ("q1", "q2", 0.25)
    sampling = request.sampling
    assert (sampling.seed, sampling.top_k, sampling.stop_token_ids, sampling.ignore_eos) == (5, 7, (9,), True)


def test_the_target_may_come_in_a_header(client: httpx.Client, backend: FakeBackend) -> None:
    headers = {"x-slo-ttft-ms": "80", "x-request-id": "from-header"}
    response = client.post("/v1/completions", json={"prompt": "hi"}, headers=headers)
    assert response.headers["x-request-id"] == "from-header"
    assert (backend.requests[-1].ttft_s, backend.requests[-1].request_id) == (0.08, "from-header")
    bad = client.post("/v1/completions", json={"prompt": "hi"}, headers={"x-slo-ttft-ms": "soon"})
    assert_error(bad, 400, "invalid_value")


def test_the_gap_between_tokens_too_and_the_body_wins(client: httpx.Client, backend: FakeBackend) -> None:
    headers = {"x-slo-ttft-ms": "80", "x-slo-tpot-ms": "12.5"}

    def ask(kv: dict[str, Any], **more: str) -> httpx.Response:
        return client.post("/v1/completions", json={"prompt": "hi", "kv": kv}, headers={**headers, **more})

    assert ask({}).status_code == 200
    assert (backend.requests[-1].ttft_s, backend.requests[-1].itl_s) == (0.08, 0.0125)
    assert ask({"ttft_ms": 0, "itl_ms": 20}).status_code == 200
    assert (backend.requests[-1].ttft_s, backend.requests[-1].itl_s) == (0.0, 0.02)
    for bad in ("0", "fast"):
        response = ask({"itl_ms": 20}, **{"x-slo-tpot-ms": bad})
        assert_error(response, 400, "invalid_value")
        assert response.json()["error"]["param"] == "x-slo-tpot-ms"
    assert completions(client).status_code == 200
    assert (backend.requests[-1].ttft_s, backend.requests[-1].itl_s) == (None, None)


def test_a_plan_reaches_the_backend_as_it_came(client: httpx.Client, backend: FakeBackend) -> None:
    refinements = [{"chunk": 0, "level": "q1", "after_tokens": 4}]
    plan = {"chunk_tokens": 256, "levels": ["q2", "text"], "refinements": refinements}
    assert completions(client, kv={"plan": plan}).status_code == 200
    request = backend.requests[-1]
    assert (request.plan, request.kv_mode, request.floor) == (plan, "auto", None)
    assert GenerationRequest.from_wire(request.to_wire()) == request
    assert_error(completions(client, kv={"plan": {**plan, "levels": ["q7", "q1"]}}), 400, "unknown_level")
    assert_error(completions(client, kv={"plan": plan, "mode": "text"}), 400, "invalid_value")


def test_receipts_can_be_asked_for_later(client: httpx.Client) -> None:
    answer = completions(client, request_id="r7").json()
    for name in ("r7", answer["id"]):
        assert client.get(f"/v1/receipts/{name}").json() == answer["kv_receipt"]
    assert_error(client.get("/v1/receipts/r8"), 404, "receipt_not_found")


def test_chat_through_the_template(client: httpx.Client, backend: FakeBackend) -> None:
    messages = [{"role": "user", "content": "hi"}]
    body = client.post("/v1/chat/completions", json={"messages": messages}).json()
    assert body["choices"][0]["message"] == {"role": "assistant", "content": "héllo wörld €5"}
    assert bytes(backend.requests[-1].token_ids) == b"<user>hi<assistant>"
    assert backend.requests[-1].sampling.max_tokens == MAX_CONTEXT - len(b"<user>hi<assistant>")
    refused = client.post("/v1/chat/completions", json={"messages": [{"role": "wizard", "content": ""}]})
    assert "no wizards" in assert_error(refused, 400, "chat_template_error")


def test_errors_have_their_status(client: httpx.Client) -> None:
    assert "tiny" in assert_error(completions(client, model="gpt-9"), 404, "model_not_found")
    assert "q1" in assert_error(completions(client, kv={"mode": "q9"}), 400, "unknown_level")
    assert_error(completions(client, tools=[{}]), 400, "unsupported")
    assert_error(client.post("/v1/completions", content=b"{"), 400, "invalid_json")
    assert_error(completions(client, prompt=[99999]), 400, "invalid_value")
    assert_error(completions(client, request_id="a b"), 400, "invalid_value")
    too_long = assert_error(completions(client, prompt="x" * 500), 400, "context_length_exceeded")
    assert all(number in too_long for number in ("500", "50", "512"))
    assert_error(client.get("/v2/nothing"), 404, "not_found")
    assert_error(client.get("/v1/completions"), 405, "method_not_allowed")
    assert_error(client.get("/v1/models/other"), 404, "model_not_found")


def test_a_body_too_large_is_refused_with_and_without_a_length(client: httpx.Client) -> None:
    assert_error(client.post("/v1/completions", content=b"x" * 30_000), 413, "body_too_large")
    pieces = (b"x" * 1000 for _ in range(30))
    assert_error(client.post("/v1/completions", content=pieces), 413, "body_too_large")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("prompt", "status", "code"), [("refuse", 429, "overloaded"), ("fail first", 503, "no_worker")]
)
def test_a_failure_before_the_first_token_has_its_status(
    client: httpx.Client, prompt: str, status: int, code: str, stream: bool
) -> None:
    assert_error(completions(client, prompt=prompt, stream=stream), status, code)


@pytest.mark.parametrize(
    ("prompt", "status", "code"),
    [("fail", 502, "worker_lost"), ("vanish", 502, "worker_lost"), ("crash", 500, "internal_error")],
)
def test_a_failure_in_mid_stream_is_said_in_the_stream(
    client: httpx.Client, backend: FakeBackend, prompt: str, status: int, code: str
) -> None:
    assert_error(completions(client, prompt=prompt), status, code)
    chunks = events_of(completions(client, prompt=prompt, stream=True).text)
    assert chunks[-1]["error"]["code"] == code
    assert backend.running == 0
    assert completions(client).status_code == 200, "other requests are not disturbed"


def test_a_request_id_in_use_is_refused(client: httpx.Client, backend: FakeBackend) -> None:
    hanging = {"prompt": "hang", "stream": True, "request_id": "same", "max_tokens": 9}
    with client.stream("POST", "/v1/completions", json=hanging):
        assert_error(completions(client, request_id="same"), 409, "request_id_in_use")
    assert backend.cancelled.wait(WAIT_S)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_cancels(client: httpx.Client, backend: FakeBackend, stream: bool) -> None:
    """Also while it waits for an answer that is not streamed, or for the next token."""
    body = json.dumps({"prompt": "hang", "max_tokens": 9, "stream": stream}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n\r\n".encode()
    with socket.create_connection((client.base_url.host, client.base_url.port or 80), timeout=WAIT_S) as connection:
        connection.sendall(head + body)
        assert backend.started.wait(WAIT_S)
    assert backend.cancelled.wait(WAIT_S)
    assert completions(client).status_code == 200


def test_a_client_that_takes_nothing_is_dropped() -> None:
    closed: list[bool] = []

    async def tokens() -> AsyncIterator[bytes]:
        while True:
            yield b"data: x\n\n"

    async def close() -> None:
        closed.append(True)

    async def never(*_: object) -> Any:
        await asyncio.Event().wait()

    async def send(message: Any) -> None:
        if message["type"] == "http.response.body":
            await never()

    stream = EventStream(tokens(), close=close, stall_s=0.01)
    asyncio.run(asyncio.wait_for(stream({"type": "http"}, never, send), WAIT_S))
    assert closed == [True]


def test_the_key_guards_every_path_but_health(backend: FakeBackend) -> None:
    with serving(make_app(backend, api_keys={"one": "", "two": "bob"})) as url, httpx.Client(base_url=url) as client:
        for path in ("/v1/models", "/metrics", "/version", "/openapi.json", "/nothing"):
            assert_error(client.get(path), 401, "invalid_api_key")
        for value in ("Bearer three", "one", "Basic one", "Bearer"):
            assert client.get("/v1/models", headers={"authorization": value}).status_code == 401
        assert client.get("/v1/models", headers={"authorization": "Bearer two"}).status_code == 200
        assert client.get("/health").status_code == 200


def test_the_key_says_whose_request_it_is(backend: FakeBackend) -> None:
    keys = {"one": "alice", "two": "bob", "three": "alice", "four": ""}
    with serving(make_app(backend, api_keys=keys)) as url, httpx.Client(base_url=url) as client:

        def ask(key: str, **fields: Any) -> tuple[str, str]:
            body = {"prompt": "hi", "max_tokens": 2, "tenant": "mallory", **fields}
            headers = {"authorization": f"Bearer {key}", "x-tenant": "mallory"}
            response = client.post("/v1/completions", json=body, headers=headers)
            assert response.status_code == 200, response.text
            return backend.requests[-1].tenant, backend.requests[-1].cache_salt

        assert ask("one") == ask("three") == ("alice", "alice\0")
        assert ask("one", cache_salt="doc") == ("alice", "alice\0doc")
        assert ask("two", cache_salt="doc") == ("bob", "bob\0doc")
        assert ask("four", cache_salt="doc") == ("", "doc")
        forged = {"prompt": "hi", "cache_salt": "alice\0doc"}
        response = client.post("/v1/completions", json=forged, headers={"authorization": "Bearer four"})
        assert "cache_salt" in assert_error(response, 400, "invalid_value")


def test_without_keys_there_are_no_tenants(client: httpx.Client, backend: FakeBackend) -> None:
    client.post("/v1/completions", json={"prompt": "hi"}, headers={"authorization": "Bearer alice"})
    assert (backend.requests[-1].tenant, backend.requests[-1].cache_salt) == ("", "")


def test_health_models_version_tokenize(client: httpx.Client, backend: FakeBackend) -> None:
    assert client.get("/health").json()["status"] == "ok"
    (model,) = client.get("/v1/models").json()["data"]
    assert (model["id"], model["max_model_len"]) == ("tiny", MAX_CONTEXT)
    assert client.get("/v1/models/tiny").json() == model
    assert client.get("/version").json()["version"]
    tokens = client.post("/tokenize", json={"prompt": "hi"}).json()
    assert tokens == {"count": 2, "max_model_len": MAX_CONTEXT, "tokens": [104, 105]}
    chat = client.post("/tokenize", json={"messages": [{"role": "user", "content": "hi"}]}).json()
    assert bytes(chat["tokens"]) == b"<user>hi<assistant>"
    assert_error(client.post("/tokenize", json={}), 400, "invalid_value")

    async def broken() -> dict[str, Any]:
        raise ConnectionError("no controller")

    backend.health = broken  # type: ignore[method-assign]
    sick = client.get("/health")
    assert sick.status_code == 503
    assert "no controller" in sick.json()["reason"]


def test_metrics_count_what_happened(client: httpx.Client) -> None:
    completions(client, max_tokens=5)
    completions(client, tools=[{}])
    text = client.get("/metrics").text
    for line in (
        "kvstream_generation_tokens_total 5.0",
        "kvstream_prompt_tokens_total 2.0",
        "kvstream_num_requests_running 0.0",
        "kvstream_time_to_first_token_seconds_count 1.0",
        "kvstream_inter_token_latency_seconds_count 4.0",
        'kvstream_request_success_total{finished_reason="length"} 1.0',
        'kvstream_request_failure_total{status="400"} 1.0',
        'kvstream_kv_chunks_total{level="text"} 1.0',
        "kvstream_num_requests_waiting 0",
    ):
        assert line in text
