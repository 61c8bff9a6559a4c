"""What a decode worker refuses, and how mode, floor, target and policy become the orders of a fill."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from decode.admission import WorkerLimits, check_request, fill_orders
from decode.fill import FillSpec
from decode.requests import GenerationRequest, RequestRefused, SamplingParams
from decode.slo import SLOPolicy

LEVELS = ("raw", "lossless", "q1", "q2", "q3", "q4", "q5")
LIMITS = WorkerLimits(
    max_context=1024,
    vocab_size=100,
    max_blocks=32,
    block_tokens=16,
    chunk_tokens=64,
    chunk_bytes={level: 1000.0 / (1 + index) for index, level in enumerate(LEVELS)},
)


def request(num_prompt: int = 200, *, max_tokens: int = 10, **options: Any) -> GenerationRequest:
    tokens = options.pop("token_ids", (5,) * num_prompt)
    return GenerationRequest(
        request_id="r", token_ids=tokens, sampling=SamplingParams(max_tokens=max_tokens), **options
    )


def orders(policy: SLOPolicy | None = None, *, has_source: bool = True, now: float = 7.0, **options: Any) -> FillSpec:
    asked = request(**options)
    check_request(asked, LIMITS)
    return fill_orders(asked, policy or SLOPolicy(), LIMITS, has_source=has_source, now=now, tail_s=0.1)


@pytest.mark.parametrize(
    ("options", "param", "code"),
    [
        ({"num_prompt": 0}, "prompt", "invalid_request"),
        ({"token_ids": (5, 100)}, "prompt", "invalid_request"),
        ({"token_ids": (5, -1)}, "prompt", "invalid_request"),
        ({"max_tokens": 0}, "max_tokens", "invalid_request"),
        ({"num_prompt": 1000, "max_tokens": 25}, "max_tokens", "context_length_exceeded"),
        ({"num_prompt": 500, "max_tokens": 13}, None, "kv_pool_too_small"),
        ({"kv_mode": "q9"}, "kv.mode", "invalid_request"),
        ({"floor": "q9"}, "kv.floor", "invalid_request"),
        ({"floor": "auto"}, "kv.floor", "invalid_request"),
        ({"floor": "text"}, "kv.floor", "invalid_request"),
        ({"kv_mode": "q3", "floor": "q2"}, "kv.floor", "invalid_request"),
    ],
)
def test_what_can_never_be_served_is_refused(options: dict[str, Any], param: str | None, code: str) -> None:
    with pytest.raises(RequestRefused) as refused:
        check_request(request(**options), LIMITS)
    assert (refused.value.status, refused.value.param, refused.value.code) == (400, param, code)


@pytest.mark.parametrize(
    "options",
    [{"num_prompt": 1}, {"num_prompt": 500, "max_tokens": 12}, {"kv_mode": "q3", "floor": "q3"}, {"kv_mode": "text"}],
)
def test_what_just_fits_is_accepted(options: dict[str, Any]) -> None:
    check_request(request(**options), LIMITS)


def test_the_deadline_starts_at_admission() -> None:
    assert orders(SLOPolicy(ttft_s=0.5)).deadline == pytest.approx(7.5)
    assert orders(SLOPolicy(ttft_s=0.5), ttft_s=2.0).deadline == pytest.approx(9.0)
    assert orders(SLOPolicy(ttft_s=0.5), ttft_s=0.0).deadline == pytest.approx(7.0)


def test_auto_may_do_both() -> None:
    spec = orders()
    assert (spec.may_load, spec.may_compute, spec.num_chunks) == (True, True, 3)
    assert spec.levels == LEVELS[:4]  # the policy's floor is q2


def test_a_policy_without_recompute_only_loads_unless_it_cannot() -> None:
    policy = SLOPolicy(allow_recompute=False)
    assert not orders(policy).may_compute
    assert orders(policy, has_source=False).may_compute
    assert orders(policy, num_prompt=64).may_compute  # nothing to load


def test_text_never_loads() -> None:
    spec = orders(SLOPolicy(allow_recompute=False), kv_mode="text")
    assert (spec.may_load, spec.may_compute) == (False, True)


def test_a_named_level_is_used_for_every_chunk_whatever_the_policy() -> None:
    spec = orders(SLOPolicy(levels=("lossless", "q1"), floor="q1"), kv_mode="q5")
    assert (spec.levels, spec.may_load, spec.may_compute) == (("q5",), True, False)


def test_a_named_level_needs_a_source_unless_there_is_nothing_to_load() -> None:
    with pytest.raises(RequestRefused) as refused:
        orders(kv_mode="raw", has_source=False)
    assert refused.value.status == 503
    assert orders(kv_mode="raw", has_source=False, num_prompt=64).may_compute


@pytest.mark.parametrize(
    ("levels", "floor", "asked", "expected"),
    [
        (LEVELS, "q4", None, LEVELS[:6]),
        (LEVELS, "q4", "q2", LEVELS[:4]),
        (LEVELS, "q2", "q5", LEVELS[:4]),  # a request may be stricter than the policy, not laxer
        (("lossless", "q1", "q3"), "q3", "q2", ("lossless", "q1")),  # a floor that the policy does not name
        (("lossless", "q1"), "q1", "raw", ()),
    ],
)
def test_the_stricter_floor_holds(
    levels: tuple[str, ...], floor: str, asked: str | None, expected: tuple[str, ...]
) -> None:
    spec = orders(SLOPolicy(levels=levels, floor=floor), floor=asked)
    if expected:
        assert spec.levels == expected and spec.may_load
    else:
        assert not spec.may_load and spec.may_compute  # text is as good as any floor


def test_a_floor_that_nothing_may_meet_is_refused() -> None:
    policy = SLOPolicy(levels=("lossless", "q1"), floor="q1", allow_recompute=False)
    with pytest.raises(RequestRefused) as refused:
        orders(policy, floor="raw")
    assert (refused.value.status, refused.value.param) == (400, "kv.floor")


@given(
    levels=st.lists(st.sampled_from(LEVELS), min_size=1, unique=True).map(
        lambda some: tuple(sorted(some, key=LEVELS.index))
    ),
    data=st.data(),
    asked=st.sampled_from((None, *LEVELS)),
    mode=st.sampled_from(("auto", "text", *LEVELS)),
    recompute=st.booleans(),
    has_source=st.booleans(),
    num_prompt=st.integers(1, 400),
)
def test_orders_never_pass_a_floor_and_always_leave_a_way(
    levels: tuple[str, ...],
    data: st.DataObject,
    asked: str | None,
    mode: str,
    recompute: bool,
    has_source: bool,
    num_prompt: int,
) -> None:
    policy = SLOPolicy(levels=levels, floor=data.draw(st.sampled_from(levels)), allow_recompute=recompute)
    try:
        spec = orders(policy, has_source=has_source, floor=asked, kv_mode=mode, num_prompt=num_prompt)
    except RequestRefused:
        return
    assert spec.may_load or spec.may_compute
    assert not spec.may_load or (has_source and spec.levels and spec.num_chunks)
    for level in spec.levels if spec.may_load else ():
        assert asked is None or LEVELS.index(level) <= LEVELS.index(asked)
        if mode == "auto":
            assert level in levels and LEVELS.index(level) <= LEVELS.index(policy.floor)
        else:
            assert level == mode
