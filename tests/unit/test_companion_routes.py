"""Prefill workers that decode too: when the router takes them for it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.membership import WorkerInfo, companion_id
from cluster.prefix_index import Coverage
from cluster.route_costs import (
    ANSWER_TOKENS,
    BASE_S,
    BUSY,
    MAY_AGGREGATE,
    PULL_S,
    REQUESTS,
    ROW_S,
    ROWS,
    STEP_S,
    TOKENS_PER_S,
    WAITING_TOKENS,
    Pending,
    RouteWeights,
    expected_answer,
)
from cluster.routing import Route, choose_route

CHUNK = 100
SPEED = 1000.0  # prompt tokens a second
ANSWER = 100.0
BASE, ROW = 0.01, 0.002
PROMPT = range(450)
IDLE = {
    TOKENS_PER_S: SPEED,
    WAITING_TOKENS: 0.0,
    ROWS: 0.0,
    REQUESTS: 0.0,
    STEP_S: 0.0,
    BASE_S: BASE,
    ROW_S: ROW,
    ANSWER_TOKENS: ANSWER,
    PULL_S: 1e-5,
}


def rows(num: int) -> dict[str, float]:
    return {ROWS: num, REQUESTS: num, STEP_S: BASE + num * ROW}


def decode(name: str, **stats: float) -> WorkerInfo:
    endpoint = f"tcp://{name}"
    return WorkerInfo(
        id=name,
        role="decode",
        incarnation=name,
        endpoint=endpoint,
        kv_endpoint=f"{endpoint}:kv",
        stats={**IDLE, **stats},
    )


def prefill(name: str, companion: dict[str, float] | None = None, **stats: float) -> tuple[WorkerInfo, WorkerInfo]:
    """And its companion."""
    beside = decode(companion_id(name), **(companion or {}))
    return (
        WorkerInfo(
            id=name, role="prefill", incarnation=name, endpoint=f"tcp://{name}", stats={**IDLE, BUSY: 0.0, **stats}
        ),
        replace(beside, kv_endpoint=None, companion_of=name),
    )


def routed(*table: WorkerInfo, tokens: Any = PROMPT, **options: Any) -> Route:
    found = choose_route(table, list(tokens), chunk_tokens=CHUNK, cache_salt="", in_flight={}, **options)
    assert found is not None
    return found


def test_an_idle_cluster_keeps_prefill_workers_free() -> None:
    for first in range(0, 5000, 100):
        assert routed(*prefill("p0"), decode("d0"), tokens=range(first, first + 450)).decode.id == "d0"


def test_where_answers_are_the_work_prefill_workers_decode_too() -> None:
    found = routed(*prefill("p0"), decode("d0", **rows(10)))
    assert found.decode.id == "p0/decode" and found.is_aggregated
    assert found.sources == (), "what its prefill worker has is in its own store"
    shared = routed(*prefill("p0", rows(10)), decode("d0", **rows(10)))
    assert shared.decode.id == "d0", "of equally busy ones the decode worker"


def test_where_prompts_are_the_work_prefill_workers_stay_with_them() -> None:
    assert routed(*prefill("p0", **{BUSY: 1.0}), decode("d0", **rows(10))).decode.id == "d0"
    free = RouteWeights(companion=0.0)
    assert routed(*prefill("p0", **{BUSY: 1.0}), decode("d0", **rows(10)), weights=free).decode.id == "p0/decode"


def test_prompts_that_wait_at_the_prefill_worker_delay_its_companion() -> None:
    """Turn by turn: as much of them as the companion computes itself, and the rest beside the answer's steps."""
    full = decode("d0", **{WAITING_TOKENS: 90_000.0})
    alone = routed(*prefill("p0"), full).estimate_s
    for waiting, delay_s in ((100.0, 0.1), (450.0, 0.45), (9000.0, 0.45)):
        found = routed(*prefill("p0", **{WAITING_TOKENS: waiting}), full)
        assert found.decode.id == "p0/decode" and found.estimate_s == pytest.approx(alone + delay_s)
    busy = decode("d0", **rows(10))
    assert routed(*prefill("p0"), busy).decode.id == "p0/decode"
    assert routed(*prefill("p0", **{WAITING_TOKENS: 9000.0}), busy).decode.id == "d0"


def test_rows_at_a_companion_delay_prompts_at_its_prefill_worker() -> None:
    """Whoever has the first claim: the prompt goes to the prefill worker on whose cores nothing generates."""
    for busy, free in (("p0", "p1"), ("p1", "p0")):
        table = (*prefill(busy, rows(8)), *prefill(free), decode("d0", **rows(8)), decode("d1", **rows(8)))
        assert routed(*table, way="load").sources[0].id == free


def test_an_answer_that_is_bounded_counts_for_no_more_than_its_bound() -> None:
    stats = [IDLE, {**IDLE, ANSWER_TOKENS: 300.0}, {**IDLE, ANSWER_TOKENS: 0.0}, {}]
    assert expected_answer(stats, None) == 200.0, "who has ended none does not count"
    assert (expected_answer(stats, 7), expected_answer(stats, 4096), expected_answer([], 50)) == (7.0, 200.0, 0.0)
    # A long answer gains more by fewer rows than its first token loses.
    table = (*prefill("p0", **{WAITING_TOKENS: 300.0}), decode("d0", **rows(4)))
    assert routed(*table).decode.id == "p0/decode"
    assert routed(*table, max_tokens=1).decode.id == "d0"


def test_requests_that_ended_since_the_report_are_not_counted() -> None:
    table = (decode("d0", **rows(1)), decode("d1", **rows(2)))
    assert routed(*table, weights=RouteWeights(answer=9.0)).decode.id == "d0"
    gone = {"d1": Pending(age_s=0.5, ended=2)}
    assert routed(*table, pending=gone, weights=RouteWeights(answer=9.0)).decode.id == "d1"


def test_a_policy_or_a_level_that_wants_a_source_gets_one() -> None:
    busy = decode("d0", **rows(30))
    assert routed(*prefill("p0"), busy, way="load").sources[0].id == "p0"
    bounded = routed(*prefill("p0", {MAY_AGGREGATE: 0.0}), busy)
    assert bounded.decode.id == "p0/decode" and not bounded.is_aggregated
    assert [(source.id, source.stored_only) for source in bounded.sources] == [("p0", False)]


def test_a_companion_asks_others_for_what_its_store_lacks() -> None:
    """Its prefill worker reports the same store a moment sooner or later; it is not asked in any case."""
    table = (*prefill("p0"), decode("d0", **rows(10)))
    holders = {
        "p0": Coverage(incarnation="p0", ram=0b1111),
        "p0/decode": Coverage(incarnation="p0/decode", ram=0b0011),
        "d0": Coverage(incarnation="d0", ram=0b0100),
    }
    found = routed(*table, holders=holders)
    assert found.decode.id == "p0/decode"
    assert [(source.id, source.stored_only) for source in found.sources] == [("d0", True)]


loads = st.fixed_dictionaries(
    {
        ROWS: st.integers(0, 40),
        REQUESTS: st.integers(0, 40),
        STEP_S: st.floats(0, 0.2),
        WAITING_TOKENS: st.floats(0, 9000),
        BUSY: st.floats(0, 1),
        ANSWER_TOKENS: st.floats(0, 500),
    }
)


@given(at_prefill=loads, at_companion=loads, at_decode=loads, tokens=st.integers(1, 900), data=st.data())
def test_a_companion_is_never_its_own_source_and_never_a_source_of_others(
    at_prefill: Any, at_companion: Any, at_decode: Any, tokens: int, data: Any
) -> None:
    table = (*prefill("p0", at_companion, **at_prefill), *prefill("p1"), decode("d0", **at_decode))
    bitmaps = st.integers(0, (1 << 8) - 1)
    holders = {
        info.id: Coverage(incarnation=info.id, ram=data.draw(bitmaps), pages=data.draw(bitmaps)) for info in table
    }
    found = routed(*table, tokens=range(tokens), holders=holders, max_tokens=data.draw(st.sampled_from([None, 1, 50])))
    sources = [source.id for source in found.sources]
    assert not any(name.endswith("/decode") for name in sources)
    assert found.decode.companion_of not in sources, "it has that itself"
    assert routed(*table, tokens=range(tokens), holders={}, way="load").decode.role == "decode"
