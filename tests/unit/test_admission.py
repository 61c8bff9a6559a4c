"""What a decode worker refuses, and how mode, floor, target, plan and policy become the orders of a fill."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from decode.admission import WorkerLimits, check_request, fill_orders
from decode.fill_chunks import TEXT
from decode.fill_loading import FillSpec
from decode.replay import ReplayStep
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
    nested=frozenset(LEVELS[2:]),
    exact=frozenset(LEVELS[:2]),
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


@pytest.mark.parametrize("level", ["raw", "lossless"])
def test_quantized_pages_promise_nothing_exact(level: str) -> None:
    limits = replace(LIMITS, quantized_pages="int4")
    for param, options in (("kv.mode", {"kv_mode": level}), ("kv.floor", {"floor": level})):
        with pytest.raises(RequestRefused, match="int4 pages") as refused:
            check_request(request(**options), limits)
        assert (refused.value.status, refused.value.code) == (400, "kv_pages_quantized")
        assert refused.value.param == param
        check_request(request(**options), LIMITS)
    for options in ({}, {"kv_mode": "text"}, {"floor": "q1"}, {"kv_mode": "q2", "floor": "q3"}):
        check_request(request(**options), limits)


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


def test_what_levels_are_is_handed_on() -> None:
    spec = orders()
    assert (spec.nested, spec.exact, spec.chunk_bytes) == (LIMITS.nested, LIMITS.exact, dict(LIMITS.chunk_bytes))
    assert spec.tail_s == 0.1 and spec.replay is None


@pytest.mark.parametrize(
    ("ceiling", "floor", "expected"),
    [
        (None, "q2", LEVELS[:4]),
        ("q1", "q2", ("q1", "q2")),
        ("q1", "q1", ("q1",)),
        ("lossless", "q3", LEVELS[1:5]),
    ],
)
def test_a_ceiling_bounds_what_is_sent_before_the_first_token(
    ceiling: str | None, floor: str, expected: tuple[str, ...]
) -> None:
    assert orders(SLOPolicy(levels=LEVELS, ceiling=ceiling, floor=floor)).levels == expected


def test_a_ceiling_and_a_stricter_floor_may_leave_nothing_to_load() -> None:
    spec = orders(SLOPolicy(levels=LEVELS, ceiling="q2", floor="q3"), floor="q1")
    assert not spec.may_load and spec.may_compute


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        (SLOPolicy(), ("q1", "q2")),
        (SLOPolicy(refine_to=None), ()),
        (SLOPolicy(refine_to="lossless", floor="q3"), ("lossless", "q1", "q2", "q3")),
        (SLOPolicy(refine_to="q2", floor="q3"), ("q2", "q3")),
        (SLOPolicy(levels=("lossless", "q3"), floor="q3", refine_to="lossless"), ("lossless", "q3")),
        (SLOPolicy(levels=("q1", "q3"), floor="q3", refine_to="q1"), ("q1", "q3")),
        (SLOPolicy(levels=("lossless", "q1"), floor="lossless", refine_to="q1"), ()),  # nothing is coarser
        (SLOPolicy(ceiling="q2", floor="q3", refine_to="q1"), ("q1", "q2", "q3")),  # above the ceiling, afterwards
        (SLOPolicy(refine_to="unheard of"), ()),
    ],
)
def test_refinements_end_at_the_coarsest_level_that_may_come(policy: SLOPolicy, expected: tuple[str, ...]) -> None:
    assert orders(policy).refine_levels == expected


def test_a_request_with_a_stricter_floor_is_refined_from_there() -> None:
    assert orders(SLOPolicy(floor="q3", levels=LEVELS), floor="q2").refine_levels == ("q1", "q2")


@pytest.mark.parametrize("options", [{"kv_mode": "text"}, {"kv_mode": "q2"}, {"has_source": False}])
def test_nothing_is_refined_where_the_policy_does_not_choose(options: dict[str, Any]) -> None:
    assert orders(**options).refine_levels == ()


@pytest.mark.parametrize(
    ("share", "num_prompt", "expected"),
    [(1.0, 449, None), (0.5, 449, 3), (0.42, 449, 2), (0.0, 449, 0), (0.99, 65, 0), (0.5, 129, 1)],
)
def test_a_share_bounds_how_many_chunks_are_computed(share: float, num_prompt: int, expected: int | None) -> None:
    spec = orders(SLOPolicy(max_recompute_share=share), num_prompt=num_prompt, max_tokens=1)
    assert spec.max_compute == expected
    assert spec.may_compute  # if the source is lost, the rest is


def test_a_share_that_comes_out_even_is_not_rounded_down() -> None:
    asked = request(6401)
    spec = fill_orders(asked, SLOPolicy(max_recompute_share=0.29), LIMITS, has_source=True, now=0.0, tail_s=0.1)
    assert (spec.num_chunks, spec.max_compute) == (100, 29)


def test_what_to_do_with_an_infeasible_target_is_the_policys() -> None:
    for infeasible in ("best_effort", "reject", "text"):
        assert orders(SLOPolicy(infeasible=infeasible)).infeasible == infeasible
        assert orders(SLOPolicy(infeasible=infeasible), kv_mode="q2").infeasible == "best_effort"  # asked for by name


def test_a_tenant_has_its_own_part_of_the_policy() -> None:
    policy = SLOPolicy(
        ttft_s=0.5, floor="q3", tenants={"gold": {"ttft_s": 0.25, "floor": "q1", "allow_recompute": False}}
    )
    gold, other = policy.for_tenant("gold"), policy.for_tenant("nobody")
    assert other == policy
    assert (gold.ttft_s, gold.floor, gold.allow_recompute) == (0.25, "q1", False)
    assert (gold.levels, gold.link_prior_bps, gold.refine_to) == (policy.levels, policy.link_prior_bps, "q1")
    assert orders(gold).levels == ("raw", "lossless", "q1") and orders(gold).deadline == pytest.approx(7.25)
    assert not orders(gold).may_compute and orders(gold, ttft_s=1.0).deadline == pytest.approx(8.0)


# -- plans to be followed -----------------------------------------------------------------------------------------


def plan(*levels: str, refinements: tuple[dict[str, Any], ...] = ()) -> dict[str, Any]:
    return {"chunk_tokens": 64, "levels": list(levels), "refinements": list(refinements)}


def test_a_plan_becomes_the_orders() -> None:
    given_plan = plan("q2", TEXT, "q1", refinements=({"chunk": 0, "level": "q1", "after_tokens": 3},))
    spec = orders(SLOPolicy(infeasible="reject"), plan=given_plan)
    assert spec.replay is not None and spec.replay.levels == ("q2", TEXT, "q1")
    assert spec.replay.steps == (ReplayStep(chunk=0, level="q1", after_tokens=3),)
    assert spec.may_load and spec.may_compute and spec.infeasible == "best_effort" and spec.refine_levels == ()


def test_a_plan_without_loaded_chunks_needs_no_source() -> None:
    spec = orders(plan=plan(TEXT, TEXT, TEXT), has_source=False)
    assert spec.replay is not None and not spec.may_load and spec.may_compute
    assert orders(plan=plan(), num_prompt=64, has_source=False).replay is not None


def test_a_plan_that_loads_needs_a_source() -> None:
    with pytest.raises(RequestRefused) as refused:
        orders(plan=plan("q1", TEXT, TEXT), has_source=False)
    assert (refused.value.status, refused.value.code, refused.value.param) == (503, "no_source", "kv.plan")


@pytest.mark.parametrize(
    ("given_plan", "says"),
    [
        (plan("q1"), "belongs to another prompt"),
        (plan("q1", "q1", "q9"), "'q9'"),
        ({"levels": ["q1"] * 3}, "chunk_tokens"),
        (plan("q1", "q1", "q1", refinements=({"chunk": 5, "level": "raw", "after_tokens": 1},)), "chunk 5"),
        (plan("q1", "q1", "q1", refinements=({"chunk": 0, "level": "raw", "after_tokens": None},)), "after None"),
    ],
)
def test_a_bad_plan_is_refused(given_plan: dict[str, Any], says: str) -> None:
    with pytest.raises(RequestRefused) as refused:
        orders(plan=given_plan)
    assert (refused.value.status, refused.value.param) == (400, "kv.plan") and says in refused.value.message


@pytest.mark.parametrize(
    ("floor", "level", "is_allowed"),
    [("q2", "q2", True), ("q2", "q3", False), ("q1", "q2", False), ("q3", TEXT, True), ("raw", "lossless", False)],
)
def test_a_plan_does_not_pass_the_floor(floor: str, level: str, is_allowed: bool) -> None:
    policy = SLOPolicy(levels=LEVELS, floor=floor)
    if is_allowed:
        assert orders(policy, plan=plan("raw", "raw", level)).replay is not None
        return
    with pytest.raises(RequestRefused) as refused:
        orders(policy, plan=plan("raw", "raw", level))
    assert refused.value.param == "kv.plan" and floor in refused.value.message and level in refused.value.message


def test_a_plan_from_before_the_policy_was_changed_is_judged_by_the_new_one() -> None:
    """Levels that the policy does not name are still known to the profile."""
    policy = SLOPolicy(levels=("lossless", "q3"), floor="q3")
    assert orders(policy, plan=plan("q2", "raw", "q3")).replay is not None


def test_a_policy_whose_floor_the_profile_does_not_have_still_judges_plans() -> None:
    policy = SLOPolicy(levels=("lossless", "q1", "q9"), floor="q9")
    assert orders(policy).levels == ("lossless", "q1")
    assert orders(policy, plan=plan("raw", "lossless", "q1")).replay is not None
    with pytest.raises(RequestRefused):
        orders(policy, plan=plan("raw", "lossless", "q2"))


# -- anything -----------------------------------------------------------------------------------------------------


@given(
    levels=st.lists(st.sampled_from(LEVELS), min_size=1, unique=True).map(
        lambda some: tuple(sorted(some, key=LEVELS.index))
    ),
    data=st.data(),
    asked=st.sampled_from((None, *LEVELS)),
    mode=st.sampled_from(("auto", "text", *LEVELS)),
    recompute=st.booleans(),
    share=st.floats(0, 1),
    refine_to=st.sampled_from((None, *LEVELS)),
    has_source=st.booleans(),
    num_prompt=st.integers(1, 400),
)
def test_orders_never_pass_a_floor_and_always_leave_a_way(
    levels: tuple[str, ...],
    data: st.DataObject,
    asked: str | None,
    mode: str,
    recompute: bool,
    share: float,
    refine_to: str | None,
    has_source: bool,
    num_prompt: int,
) -> None:
    floor = data.draw(st.integers(0, len(levels) - 1))
    policy = SLOPolicy(
        levels=levels,
        floor=levels[floor],
        ceiling=data.draw(st.sampled_from((None, *levels[: floor + 1]))),
        refine_to=refine_to,
        allow_recompute=recompute,
        max_recompute_share=share,
    )
    try:
        spec = orders(policy, has_source=has_source, floor=asked, kv_mode=mode, num_prompt=num_prompt)
    except RequestRefused:
        return
    assert spec.may_load or spec.may_compute
    assert not spec.may_load or (has_source and spec.levels and spec.num_chunks)
    assert spec.max_compute is None or 0 <= spec.max_compute <= spec.num_chunks
    ranks = [LEVELS.index(level) for level in spec.refine_levels]
    assert ranks == sorted(ranks) and (not ranks or (refine_to == spec.refine_levels[0] and mode == "auto"))
    if ranks:  # all that may come can rise, and nothing rises above what the policy says
        assert set(spec.refine_levels) >= {level for level in spec.levels if LEVELS.index(level) >= ranks[0]}
    for level in spec.levels if spec.may_load else ():
        assert asked is None or LEVELS.index(level) <= LEVELS.index(asked)
        if mode == "auto":
            assert level in levels and LEVELS.index(level) <= LEVELS.index(policy.floor)
            assert policy.ceiling is None or LEVELS.index(level) >= LEVELS.index(policy.ceiling)
        else:
            assert level == mode


def test_what_no_source_computes_may_be_computed_here() -> None:
    """A worker's own store, or another decode worker's, has some of a prompt: the rest has to come from somewhere."""
    never = SLOPolicy(allow_recompute=False)
    orders = partial(fill_orders, request(), never, LIMITS, has_source=True, now=0.0, tail_s=0.0)
    assert not orders().may_compute
    assert orders(source_computes=False).may_compute
    few = SLOPolicy(max_recompute_share=0.1)
    assert (
        fill_orders(request(), few, LIMITS, has_source=True, now=0.0, tail_s=0.0, source_computes=False).max_compute
        is None
    )
