"""Request bodies: what is accepted, what is refused and in which words."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.kv_options import MAX_PLAN_LEVELS, MAX_PLAN_REFINEMENTS, KVOptions, KVPlan
from cluster.metrics import GatewayMetrics, receipt_levels
from cluster.openai_errors import APIError
from cluster.openai_schema import (
    ChatBody,
    CompletionBody,
    check_kv_options,
    milliseconds_header,
    parse_body,
    resolve_max_tokens,
    tenants_salt,
)
from decode.requests import SamplingParams


def completion(**fields: Any) -> CompletionBody:
    return parse_body(json.dumps({"prompt": "hi", **fields}).encode(), CompletionBody)


REFINED = {"chunk": 0, "level": "q1", "after_tokens": 3}


def plan(**fields: Any) -> dict[str, Any]:
    return {"chunk_tokens": 256, "levels": ["q3", "text"], "refinements": [REFINED], **fields}


def refused(body: bytes | dict[str, Any], schema: type[Any] = CompletionBody) -> APIError:
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    with pytest.raises(APIError) as raised:
        parsed = parse_body(raw, schema)
        if isinstance(parsed, CompletionBody):
            parsed.prompts()
            parsed.num_choices()
            parsed.check_prompt_logprobs()
            parsed.sampling(parsed.token_limit() or 16, vocab_size=500, eos_token_ids=(2,))
        elif isinstance(parsed, ChatBody):
            parsed.num_logprobs()
    assert raised.value.status == 400
    return raised.value


@pytest.mark.parametrize(
    "raw", [b"", b"{", b"[]", b"3", b"\xff", b"nul", b'{"prompt": NaN}', b'{"prompt":"\\ud800"}', b"[" * 100_000]
)
def test_what_is_no_json_object(raw: bytes) -> None:
    assert refused(raw).code == "invalid_json"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": 5}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": ["a", ""]}, "prompt"),
        ({"prompt": [1, "a"]}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": "5"}, "max_tokens"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"temperature": -1}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_k": -2}, "top_k"),
        ({"seed": 2**63}, "seed"),
        ({"stop": ""}, "stop"),
        ({"stop": ["a"] * 17}, "stop"),
        ({"stop_token_ids": [-1]}, "stop_token_ids.0"),
        ({"stream": "yes"}, "stream"),
        ({"kv": {"mod": "q1"}}, "kv.mod"),
        ({"kv": {"ttft_ms": -1}}, "kv.ttft_ms"),
        ({"kv": {"ttft_ms": "fast"}}, "kv.ttft_ms"),
        ({"kv": {"itl_ms": 0}}, "kv.itl_ms"),
        ({"kv": {"itl_ms": 4e6}}, "kv.itl_ms"),
        ({"kv": {"plan": []}}, "kv.plan"),
        ({"kv": {"plan": {"levels": []}}}, "kv.plan.chunk_tokens"),
        ({"kv": {"plan": {"chunk_tokens": 0, "levels": []}}}, "kv.plan.chunk_tokens"),
        ({"kv": {"plan": {"chunk_tokens": 256, "levels": [1]}}}, "kv.plan.levels.0"),
        ({"kv": {"plan": plan(levels=["q1", None])}}, "kv.plan.levels.1"),
        ({"kv": {"plan": plan(chunks=5)}}, "kv.plan.chunks"),
        ({"kv": {"plan": plan(levels=["q1"] * (MAX_PLAN_LEVELS + 1))}}, "kv.plan.levels"),
        ({"kv": {"plan": plan(refinements=[REFINED] * (MAX_PLAN_REFINEMENTS + 1))}}, "kv.plan.refinements"),
        ({"kv": {"plan": plan(refinements=[{**REFINED, "chunk": -1}])}}, "kv.plan.refinements.0.chunk"),
        ({"kv": {"plan": plan(refinements=[{**REFINED, "chunk": 0.5}])}}, "kv.plan.refinements.0.chunk"),
        ({"kv": {"plan": plan(refinements=[{**REFINED, "after_tokens": 0}])}}, "kv.plan.refinements.0.after_tokens"),
        ({"kv": {"plan": plan(refinements=[{**REFINED, "why": 1}])}}, "kv.plan.refinements.0.why"),
        ({"cache_salt": "alice\0doc"}, "cache_salt"),
        ({"cache_salt": "x" * 257}, "cache_salt"),
        ({"n": 0}, "n"),
        ({"n": 129}, "n"),
        ({"n": 2, "best_of": 3}, "best_of"),
        ({"best_of": 2}, "best_of"),
        ({"suffix": "x"}, "suffix"),
        ({"logprobs": 21}, "logprobs"),
        ({"logprobs": True}, "logprobs"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"prompt_logprobs": -1}, "prompt_logprobs"),
        ({"prompt_logprobs": 1, "stream": True}, "stream"),
        ({"echo": True, "logprobs": 1, "stream": True}, "stream"),
        ({"prompt_logprobs": 1, "kv": {"mode": "q1"}}, "kv"),
        ({"prompt_logprobs": 1, "kv": {"plan": plan()}}, "kv"),
        ({"logit_bias": {"5": 101}}, "logit_bias.5"),
        ({"logit_bias": {"five": 1}}, "logit_bias"),
        ({"logit_bias": {"500": 1}}, "logit_bias"),
        ({"logit_bias": [5]}, "logit_bias"),
        ({"allowed_token_ids": []}, "allowed_token_ids"),
        ({"allowed_token_ids": [1, 500]}, "allowed_token_ids"),
        ({"allowed_token_ids": [2, 9], "stop_token_ids": [9], "min_tokens": 1}, "allowed_token_ids"),
        ({"bad_words": [""]}, "bad_words.0"),
        ({"presence_penalty": 2.5}, "presence_penalty"),
        ({"frequency_penalty": -3}, "frequency_penalty"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"repetition_penalty": 1e-45}, "repetition_penalty"),
        ({"min_p": 1.1}, "min_p"),
        ({"min_tokens": 17}, "min_tokens"),
        ({"priority": 0.5}, "priority"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"tools": [{"type": "function"}]}, "tools"),
    ],
)
def test_the_error_names_the_field(fields: dict[str, Any], param: str) -> None:
    error = refused({"prompt": "hi", **fields})
    assert error.param == param
    assert param.split(".")[-1] in error.message


def test_a_missing_prompt_is_named() -> None:
    assert refused({}).message == "prompt: is missing"


def test_what_asks_for_nothing_is_accepted_and_the_unknown_ignored() -> None:
    body = completion(
        n=1, best_of=1, echo=False, logprobs=None, logit_bias={}, presence_penalty=0, tools=[], user="me", x_new=3
    )
    assert body.prompts() == ["hi"]


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [
        ([1, 2], [[1, 2]]),
        ([[1, 2]], [[1, 2]]),
        ([[1, 2], [3]], [[1, 2], [3]]),
        (["hi"], ["hi"]),
        (["hi", "ho"], ["hi", "ho"]),
    ],
)
def test_one_prompt_or_several(prompt: list[Any], prompts: list[Any]) -> None:
    assert completion(prompt=prompt).prompts() == prompts


def sampled(**fields: Any) -> SamplingParams:
    return completion(**fields).sampling(7, vocab_size=500)


def test_sampling_defaults_are_those_of_openai() -> None:
    assert sampled() == SamplingParams(max_tokens=7)
    nothing = dict.fromkeys(
        ("temperature", "top_p", "min_p", "presence_penalty", "logit_bias", "min_tokens", "logprobs")
    )
    assert sampled(**nothing) == SamplingParams(max_tokens=7)
    assert sampled(top_k=-1, temperature=0, logprobs=False) == SamplingParams(max_tokens=7, temperature=0)


def test_every_sampling_field_reaches_the_worker() -> None:
    plain = {
        "temperature": 0.5, "top_p": 0.9, "top_k": 7, "min_p": 0.1, "presence_penalty": -1.5, "frequency_penalty": 2.0,
        "repetition_penalty": 1.2, "seed": -3, "ignore_eos": True, "min_tokens": 3, "logprobs": 4, "prompt_logprobs": 0,
    }  # fmt: skip
    lists = {"allowed_token_ids": [4, 5], "stop_token_ids": [9, 100_000]}
    found = completion(**plain, **lists, logit_bias={"5": 1, "05": 2.5, "6": -100}).sampling(
        7, vocab_size=500, bad_words=[[1, 2]]
    )
    assert found == SamplingParams(
        max_tokens=7, **plain, allowed_token_ids=(4, 5), stop_token_ids=(9,), bad_words=((1, 2),),
        logit_bias=((5, 2.5), (6, -100.0)),
    )  # fmt: skip


def test_an_echo_scores_the_prompt_as_the_answer() -> None:
    assert sampled(echo=True).prompt_logprobs is None
    assert sampled(echo=True, logprobs=2).prompt_logprobs == 2
    assert sampled(echo=True, logprobs=2, prompt_logprobs=5).prompt_logprobs == 5
    assert sampled(logprobs=2).prompt_logprobs is None


def test_the_chats_form_of_logprobs() -> None:
    def num(**fields: Any) -> int | None:
        body = {"messages": [{"role": "user", "content": "x"}], **fields}
        return parse_body(json.dumps(body).encode(), ChatBody).num_logprobs()

    assert num() is num(logprobs=False) is num(logprobs=False, top_logprobs=0) is None
    assert (num(logprobs=True), num(logprobs=True, top_logprobs=20)) == (0, 20)
    for fields, param in (
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": 2}, "logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"echo": True}, "echo"),
    ):
        assert refused({"messages": [{"role": "user", "content": "x"}], **fields}, ChatBody).param == param


def test_chat_messages() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    body = parse_body(
        json.dumps({"messages": [{"role": "user", "content": parts}], "max_completion_tokens": 3}).encode(), ChatBody
    )
    assert body.messages[0].text() == "ab"
    assert body.token_limit() == 3


@pytest.mark.parametrize(
    "messages",
    [None, [], [{"content": "x"}], [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}], ["x"]],
)
def test_bad_messages(messages: Any) -> None:
    assert (refused({"messages": messages}, ChatBody).param or "").startswith("messages")


def test_unknown_levels_are_answered_with_the_known_ones() -> None:
    levels = ("raw", "q1")
    for mode in ("auto", "text", "raw", "q1"):
        check_kv_options(KVOptions(mode=mode), levels)
    with pytest.raises(APIError, match="auto, text, raw, q1"):
        check_kv_options(KVOptions(mode="q7"), levels)
    with pytest.raises(APIError, match="one of raw, q1"):
        check_kv_options(KVOptions(floor="text"), levels)


def test_a_plan_is_followed_or_refused_by_field() -> None:
    levels = ("raw", "q1", "q3")

    def check(**options: Any) -> None:
        check_kv_options(KVOptions(**options), levels)

    check(plan=KVPlan(**plan()))
    check(plan=KVPlan(chunk_tokens=256, levels=[]))  # of a prompt without a whole chunk
    check(plan=KVPlan(**plan()), mode="auto", ttft_ms=5, itl_ms=5)
    for wrong, param in (
        (plan(levels=["q3", "q2"]), "kv.plan.levels.1"),
        (plan(levels=["q3", "q3>q1"]), "kv.plan.levels.1"),
        (plan(refinements=[REFINED, {**REFINED, "level": "text"}]), "kv.plan.refinements.1.level"),
        (plan(refinements=[{**REFINED, "chunk": 2}]), "kv.plan.refinements.0.chunk"),
    ):
        with pytest.raises(APIError) as raised:
            check(plan=KVPlan(**wrong))
        assert (raised.value.status, raised.value.param) == (400, param)
    for other in ({"mode": "q1"}, {"mode": "text"}, {"floor": "q1"}):
        with pytest.raises(APIError, match="leave one out") as raised:
            check(plan=KVPlan(**plan()), **other)
        assert raised.value.param == "kv.plan"


@pytest.mark.parametrize("value", ["", "soon", "-1", "nan", "inf", "3600001", "5 ms"])
def test_headers_that_are_no_milliseconds(value: str) -> None:
    with pytest.raises(APIError) as raised:
        milliseconds_header({"x-slo-tpot-ms": value}, "x-slo-tpot-ms")
    assert (raised.value.status, raised.value.param) == (400, "x-slo-tpot-ms")


def test_headers_in_milliseconds() -> None:
    assert milliseconds_header({}, "x-slo-ttft-ms") is None
    assert milliseconds_header({"x-slo-ttft-ms": "0"}, "x-slo-ttft-ms") == 0
    assert milliseconds_header({"x-slo-ttft-ms": "12.5"}, "x-slo-ttft-ms") == 12.5
    with pytest.raises(APIError):
        milliseconds_header({"x-slo-tpot-ms": "0"}, "x-slo-tpot-ms", may_be_zero=False)


names = st.text("ab.", max_size=3)


@given(names, names, names, names)
def test_no_two_tenants_share_a_salt(tenant: str, salt: str, other: str, others_salt: str) -> None:
    is_same = (tenant, salt) == (other, others_salt)
    assert (tenants_salt(tenant, salt) == tenants_salt(other, others_salt)) == is_same
    assert tenants_salt("", salt) == salt


def test_the_token_limit() -> None:
    assert resolve_max_tokens(None, prompt_tokens=10, max_context=100, default=16) == 16
    assert resolve_max_tokens(None, prompt_tokens=90, max_context=100, default=16) == 10
    assert resolve_max_tokens(None, prompt_tokens=10, max_context=100, default=None) == 90
    assert resolve_max_tokens(90, prompt_tokens=10, max_context=100, default=16) == 90
    with pytest.raises(APIError, match=r"100 tokens.*101.*10 in the prompt.*91 tokens to generate"):
        resolve_max_tokens(91, prompt_tokens=10, max_context=100, default=16)
    with pytest.raises(APIError) as raised:
        resolve_max_tokens(None, prompt_tokens=100, max_context=100, default=16)
    assert (raised.value.code, raised.value.param) == ("context_length_exceeded", "prompt")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
field_names = st.sampled_from([*CompletionBody.model_fields, "tools"])


@given(st.dictionaries(field_names, json_values, max_size=6))
def test_no_body_is_answered_with_anything_but_an_api_error(fields: dict[str, Any]) -> None:
    try:
        body = parse_body(json.dumps(fields).encode(), CompletionBody)
        body.prompts()
        body.num_choices()
        body.sampling(1, vocab_size=500)
    except APIError as error:
        assert error.status == 400
        json.dumps(error.body())


def test_receipts_are_counted_by_level() -> None:
    receipt = {"chunks": [{"level": "q1", "bytes": 5}, {"level": "text", "bytes": None}, {"level": "q1", "bytes": 7}]}
    receipt["chunks"].append({"level": None, "bytes": 0})
    receipt["ttft_parts_ms"] = {"queue": 100.0, "open": 4.0, "fill": 15.0, "refine": 1.0, "tail": 5.0}
    assert receipt_levels(receipt) == [("q1", 2, 12), ("text", 1, 0)]
    assert receipt_levels({}) == []
    metrics = GatewayMetrics()
    metrics.finished(reason="stop", e2e_s=1.0, decode_s=0.5, completion_tokens=3, receipt=receipt)
    metrics.token_gap(0.5, 2)
    text = metrics.text()
    assert 'kvstream_kv_received_bytes_total{level="q1"} 12.0' in text
    assert 'kvstream_request_success_total{finished_reason="stop"} 1.0' in text
    assert "kvstream_inter_token_latency_seconds_count 2.0" in text
    assert "kvstream_request_queue_time_seconds_sum 0.1" in text
    assert "kvstream_request_prefill_time_seconds_sum 0.025" in text
    assert "kvstream_request_decode_time_seconds_sum 0.5" in text
