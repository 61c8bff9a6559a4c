"""Several choices and several prompts in one request, over HTTP with a fake backend."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from fake_backend import FakeBackend, make_app, serving

REPLY = "héllo"
WAIT_S = 10.0


@pytest.fixture
def backend() -> FakeBackend:
    return FakeBackend(REPLY)


@pytest.fixture
def url(backend: FakeBackend) -> Iterator[str]:
    with serving(make_app(backend)) as url:
        yield url


@pytest.fixture
def client(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="key", max_retries=0, timeout=WAIT_S)


def ask(url: str, **fields: Any) -> httpx.Response:
    return httpx.post(f"{url}/v1/completions", json={"prompt": "hi", "max_tokens": 50, **fields}, timeout=WAIT_S)


def test_choices_of_one_prompt(client: openai.OpenAI, backend: FakeBackend) -> None:
    answer = client.completions.create(
        model="tiny", prompt="hi", max_tokens=50, n=3, best_of=3, seed=7, extra_body={"request_id": "r"}
    )
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert [choice.text for choice in answer.choices] == ["héllo0", "héllo1", "héllo2"]
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (2, 3 * 8)
    assert [request.request_id for request in backend.requests] == ["r-0", "r-1", "r-2"]
    assert [request.sampling.seed for request in backend.requests] == [7, 8, 9]
    assert {request.group for request in backend.requests} == {"r-0"}
    extra = answer.model_extra or {}
    assert extra["kv_receipt"] == extra["kv_receipts"][0]
    assert [receipt["request_id"] for receipt in extra["kv_receipts"]] == ["r-0", "r-1", "r-2"]


def test_one_choice_is_a_request_as_ever(url: str, backend: FakeBackend) -> None:
    answer = ask(url, n=1, request_id="r").json()
    assert "kv_receipts" not in answer
    assert (backend.requests[0].request_id, backend.requests[0].group) == ("r", "")


def test_choices_are_streamed_as_they_come(client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": "hi"}],
        n=2,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    assert [chunk.choices[0].index for chunk in chunks[:2]] == [0, 1], "each names its speaker"
    assert all(chunk.choices[0].delta.role == "assistant" for chunk in chunks[:2])
    texts, reasons = ["", ""], [None, None]
    order = []
    for chunk in chunks[2:-1]:
        (choice,) = chunk.choices
        texts[choice.index] += choice.delta.content or ""
        reasons[choice.index] = reasons[choice.index] or choice.finish_reason  # type: ignore[call-overload]
        order.append(choice.index)
    assert texts == ["héllo0", "héllo1"] and reasons == ["stop", "stop"]
    assert order != sorted(order), "neither waits for the other's end"
    usage = chunks[-1].usage
    assert usage is not None and usage.completion_tokens == 16 and not chunks[-1].choices
    assert len((chunks[-1].model_extra or {})["kv_receipts"]) == 2
    assert all("kv_receipt" not in (chunk.model_extra or {}) for chunk in chunks[:-1])


def test_without_usage_the_last_choice_to_end_brings_the_receipts(url: str) -> None:
    lines = [line for line in ask(url, n=2, stream=True).text.split("\n\n") if line]
    assert lines[-1] == "data: [DONE]"
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]
    assert sum(chunk["choices"][0]["finish_reason"] is not None for chunk in chunks) == 2
    assert [i for i, chunk in enumerate(chunks) if "kv_receipts" in chunk] == [len(chunks) - 1]


def test_several_prompts(url: str, backend: FakeBackend) -> None:
    answer = ask(url, prompt=["hi", "you"], n=2, seed=1, request_id="r", return_token_ids=True).json()
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
    assert [bytes(choice["prompt_token_ids"]) for choice in answer["choices"]] == [b"hi", b"hi", b"you", b"you"]
    assert answer["usage"]["prompt_tokens"] == 2 + 3
    found = [(request.request_id, request.group, request.sampling.seed) for request in backend.requests]
    assert found == [("r-0", "r-0", 1), ("r-1", "r-0", 2), ("r-2", "r-1", 1), ("r-3", "r-1", 2)]
    assert ask(url, prompt=["a"] * 65, n=2).status_code == 400
    text = httpx.get(f"{url}/metrics").text
    assert "kvstream_prompt_tokens_total 5.0" in text
    assert "kvstream_num_requests_running 0.0" in text


@pytest.mark.parametrize("stream", [False, True])
def test_a_choice_that_fails_before_its_first_token_fails_the_request(
    url: str, backend: FakeBackend, stream: bool
) -> None:
    answer = ask(url, prompt="unlucky hang", n=3, stream=stream)
    assert answer.status_code == 503
    assert answer.json()["error"]["code"] == "no_worker"
    assert backend.running == 0, "the others are cancelled"


def test_a_choice_that_fails_later_ends_the_stream(url: str, backend: FakeBackend) -> None:
    lines = ask(url, prompt="fail", n=2, stream=True).text.split("\n\n")
    assert json.loads(lines[-3].removeprefix("data: "))["error"]["code"] == "worker_lost"
    assert backend.running == 0
    assert ask(url).status_code == 200


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_cancels_all_choices(url: str, backend: FakeBackend, stream: bool) -> None:
    body = json.dumps({"prompt": "hang", "max_tokens": 9, "stream": stream, "n": 3, "request_id": "r"}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n\r\n".encode()
    address = httpx.URL(url)
    with socket.create_connection((address.host, address.port or 80), timeout=WAIT_S) as connection:
        connection.sendall(head + body)
        assert backend.has_answered.wait(WAIT_S)
        assert ask(url, request_id="r-1").status_code == 409, "a choice's id is in use too"
    assert backend.cancelled.wait(WAIT_S)
    for _ in range(100):  # each answer gives the server's loop a turn
        if ask(url, request_id="r-1").status_code == 200 and backend.running == 0:
            return
    raise AssertionError("something still runs")


def test_receipts_of_choices(url: str) -> None:
    answer = ask(url, n=2, request_id="r").json()
    for name, number in (("r", 0), (answer["id"], 0), ("r-1", 1)):
        assert httpx.get(f"{url}/v1/receipts/{name}").json() == answer["kv_receipts"][number]


def test_stop_strings_end_each_choice_on_its_own(url: str) -> None:
    answer = ask(url, n=2, stop=["lo1"]).json()
    assert [choice["text"] for choice in answer["choices"]] == ["héllo0", "hél"]


def test_what_else_reaches_the_backend(url: str, backend: FakeBackend) -> None:
    assert ask(url, priority=-3, bad_words=["no"], logit_bias={"65": -5}).status_code == 200
    request = backend.requests[-1]
    assert (request.priority, request.sampling.bad_words) == (-3, ((110, 111),))
    assert request.sampling.logit_bias == ((65, -5.0),)
    assert type(request).from_wire(json.loads(json.dumps(request.to_wire()))) == request
