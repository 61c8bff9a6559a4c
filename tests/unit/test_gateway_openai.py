"""OpenAI's own Python client against the gateway over a fake backend."""

from __future__ import annotations

from collections.abc import Iterator

import openai
import pytest
from fake_backend import FakeBackend, make_app, serving

REPLY = "héllo wörld €5"


@pytest.fixture(scope="module")
def backend() -> FakeBackend:
    return FakeBackend(REPLY)


@pytest.fixture(scope="module")
def client(backend: FakeBackend) -> Iterator[openai.OpenAI]:
    with serving(make_app(backend, api_keys={"key": ""})) as url:
        yield openai.OpenAI(base_url=f"{url}/v1", api_key="key", max_retries=0, timeout=10)


def test_completion(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="tiny", prompt="hi", max_tokens=50, extra_body={"kv": {"mode": "q1"}})
    assert answer.choices[0].text == REPLY
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == 2
    assert answer.model_extra is not None
    assert answer.model_extra["kv_receipt"]["chunks"]


def test_completion_streamed(client: openai.OpenAI) -> None:
    stream = client.completions.create(
        model="tiny", prompt="hi", max_tokens=50, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert "".join(c.choices[0].text for c in chunks if c.choices) == REPLY
    assert chunks[-1].usage is not None
    assert chunks[-1].model_extra is not None
    assert chunks[-1].model_extra["kv_receipt"]["chunks"]


def test_chat(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "hi"}])
    assert answer.choices[0].message.content == REPLY
    assert answer.choices[0].finish_reason == "stop"


def test_chat_streamed(client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "hi"}], max_completion_tokens=4, stream=True
    )
    chunks = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == "hél"
    assert chunks[-1].choices[0].finish_reason == "length"


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").id == "tiny"


def test_errors_become_the_clients_own(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as bad:
        client.completions.create(model="tiny", prompt="hi", n=200)
    assert bad.value.param == "n"
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="other", prompt="hi")
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="wrong").models.list()
    with pytest.raises(openai.RateLimitError):
        client.completions.create(model="tiny", prompt="refuse")
    with pytest.raises(openai.APIError, match="went away"):
        list(client.completions.create(model="tiny", prompt="fail", stream=True))


def test_leaving_a_stream_cancels(client: openai.OpenAI, backend: FakeBackend) -> None:
    backend.cancelled.clear()
    with client.completions.create(model="tiny", prompt="hang", max_tokens=9, stream=True) as stream:
        next(iter(stream))
    assert backend.cancelled.wait(10)
