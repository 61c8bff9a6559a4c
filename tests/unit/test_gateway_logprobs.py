"""Logprobs as clients read them: chat and completions, streamed and not, of the prompt and of an echo."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from fake_backend import EOS, FakeBackend, logprobs_of, make_app, serving

REPLY = "h€y"
TOKENS = [*REPLY.encode(), EOS]


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with serving(make_app(FakeBackend(REPLY))) as url:
        yield url


@pytest.fixture(scope="module")
def client(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="key", max_retries=0, timeout=10)


def ask(url: str, **fields: Any) -> dict[str, Any]:
    answer = httpx.post(f"{url}/v1/completions", json={"prompt": "hi", "max_tokens": 50, **fields})
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def check_chat(content: list[Any], tokens: list[int], num_top: int) -> None:
    assert b"".join(bytes(item.bytes) for item in content) == bytes(TOKENS[:-1]) + b"<end>"
    assert [item.token for item in content] == ["h", "bytes:\\xe2", "bytes:\\x82", "bytes:\\xac", "y", "<end>"]
    assert [item.logprob for item in content] == [logprobs_of(token, num_top).logprob for token in tokens]
    for item in content:
        assert [bytes(top.bytes) for top in item.top_logprobs] == [bytes([200 + i]) for i in range(num_top)]
        assert [top.logprob for top in item.top_logprobs] == [-0.5 - i for i in range(num_top)]


@pytest.mark.parametrize("num_top", [0, 2])
def test_chat(client: openai.OpenAI, num_top: int) -> None:
    answer = client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "hi"}], logprobs=True, top_logprobs=num_top
    )
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None and logprobs.content is not None
    check_chat(logprobs.content, TOKENS, num_top)
    assert answer.usage is not None and answer.usage.completion_tokens == len(logprobs.content)


def test_chat_streamed(client: openai.OpenAI) -> None:
    """A token's logprobs come with it, also when its text waits for the rest of a character."""
    stream = client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "hi"}], logprobs=True, top_logprobs=1, stream=True
    )
    found = [chunk.choices[0].logprobs for chunk in stream]
    content = [item for logprobs in found if logprobs is not None for item in logprobs.content or ()]
    check_chat(content, TOKENS, 1)


def test_completions(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="tiny", prompt="hi", max_tokens=50, logprobs=2)
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.tokens == ["h", "bytes:\\xe2", "bytes:\\x82", "bytes:\\xac", "y", "<end>"]
    assert logprobs.token_logprobs == [logprobs_of(token, 2).logprob for token in TOKENS]
    assert logprobs.text_offset == [0, 1, 1, 1, 2, 3]
    assert logprobs.top_logprobs is not None
    assert logprobs.top_logprobs[0] == {"bytes:\\xc8": -0.5, "bytes:\\xc9": -1.5, "h": -10.4}


def test_a_token_among_the_likeliest_is_not_named_twice(url: str) -> None:
    (choice,) = ask(url, max_tokens=2, logprobs=20, allowed_token_ids=[200])["choices"]
    assert len(choice["logprobs"]["top_logprobs"][0]) == 21
    plain = ask(url, max_tokens=1, logprobs=0)["choices"][0]["logprobs"]
    assert plain["top_logprobs"] == [{"h": -10.4}]


@pytest.mark.parametrize("n", [1, 2])
def test_completions_streamed_add_up_to_those_that_are_not(client: openai.OpenAI, n: int) -> None:
    fields: dict[str, Any] = {"model": "tiny", "prompt": "hi", "max_tokens": 50, "logprobs": 1, "n": n}
    whole = client.completions.create(**fields)
    parts: list[dict[str, list[Any]]] = [
        {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []} for _ in range(n)
    ]
    for chunk in client.completions.create(**fields, stream=True):
        found = chunk.choices[0].logprobs
        for name, items in parts[chunk.choices[0].index].items() if found is not None else ():
            items += getattr(found, name)
    for choice, part in zip(whole.choices, parts):
        assert choice.logprobs is not None
        assert part == choice.logprobs.model_dump(include=set(part))


def test_tokens_after_a_stop_string_have_no_logprobs_either(url: str) -> None:
    (choice,) = ask(url, stop="€", logprobs=0)["choices"]
    assert choice["text"] == "h"
    assert choice["logprobs"]["text_offset"] == [0, 1, 1, 1]


def test_prompt_logprobs(url: str) -> None:
    body = ask(url, prompt="hey", prompt_logprobs=1)
    first, second, third = body["choices"][0]["prompt_logprobs"]
    assert first is None
    assert second == {
        str(ord("e")): {"logprob": -10.1, "rank": 30, "decoded_token": "e"},
        "200": {"logprob": -0.5, "rank": 1, "decoded_token": "bytes:\\xc8"},
    }
    assert third[str(ord("y"))]["logprob"] == pytest.approx(-12.1)
    assert body["choices"][0]["logprobs"] is None


def test_prompt_logprobs_of_several_choices_are_computed_once(url: str) -> None:
    choices = ask(url, prompt=["hey", "you"], prompt_logprobs=0, n=2)["choices"]
    found = [[next(iter(item)) for item in choice["prompt_logprobs"][1:]] for choice in choices]
    assert found == [["101", "121"], ["101", "121"], ["111", "117"], ["111", "117"]]


def test_chat_has_the_prompts_logprobs_beside_its_choices(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "hi"}], extra_body={"prompt_logprobs": 0}
    )
    assert len((answer.model_extra or {})["prompt_logprobs"]) == len("<user>hi<assistant>")


def test_echo(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="tiny", prompt="a€", max_tokens=1, echo=True, logprobs=0)
    (choice,) = answer.choices
    assert choice.text == "a€h"
    logprobs = choice.logprobs
    assert logprobs is not None and logprobs.token_logprobs is not None
    assert logprobs.text_offset == [0, 1, 1, 1, 2]
    assert logprobs.tokens is not None and len(logprobs.tokens) == 5
    assert logprobs.token_logprobs[0] is None and logprobs.token_logprobs[-1] == -10.4
    assert None not in logprobs.token_logprobs[1:]
    plain = client.completions.create(model="tiny", prompt="a€", max_tokens=1, echo=True)
    assert plain.choices[0].text == "a€h" and plain.choices[0].logprobs is None


def test_an_echo_is_streamed_first(client: openai.OpenAI) -> None:
    stream = client.completions.create(model="tiny", prompt=["a€", "b"], max_tokens=50, echo=True, stream=True, n=1)
    texts = ["", ""]
    for chunk in stream:
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == ["a€h€y", "bh€y"]


def test_token_ids_and_logprobs_together(url: str) -> None:
    (choice,) = ask(url, logprobs=0, return_token_ids=True)["choices"]
    assert choice["token_ids"] == TOKENS
