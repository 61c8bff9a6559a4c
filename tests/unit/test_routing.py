"""Who is in the table when, which workers a request goes to, and where its KV comes from."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.membership import EXPIRED_S, SUSPECT_S, Membership, WorkerInfo, follow
from cluster.prefix_index import Coverage
from cluster.route_costs import (
    LOAD_RAM_S,
    MAY_AGGREGATE,
    PULL_S,
    ROWS,
    STEP_S,
    TOKENS_PER_S,
    WAITING_REQUESTS,
    WAITING_TOKENS,
    Pending,
    RouteWeights,
)
from cluster.routing import MAX_SCANNED, MAX_SOURCES, Route, choose_route, owners, way_of
from decode.requests import GenerationRequest, SamplingParams

CHUNK = 4


def info(worker_id: str, role: str = "decode", *, incarnation: str = "", is_suspect: bool = False) -> WorkerInfo:
    return WorkerInfo(
        id=worker_id,
        role=role,  # type: ignore[arg-type]
        incarnation=incarnation or f"{worker_id}-1",
        endpoint=f"tcp://{worker_id}",
        is_suspect=is_suspect,
    )


TABLE = [info("p0", "prefill"), info("p1", "prefill"), info("d0"), info("d1")]


def route(table=TABLE, tokens=range(10), *, in_flight=None, avoid=frozenset(), cache_salt=""):
    return choose_route(
        table, list(tokens), chunk_tokens=CHUNK, cache_salt=cache_salt, in_flight=in_flight or {}, avoid=avoid
    )


def test_a_report_survives_the_wire() -> None:
    worker = info("d0")
    assert WorkerInfo.from_wire(worker.to_wire()) == worker


def test_silence_makes_suspect_then_forgotten() -> None:
    membership = Membership()
    membership.report(info("d0"), 0.0)
    membership.report(info("d1"), 2.0)
    assert [worker.is_suspect for worker in membership.table(SUSPECT_S - 0.1)] == [False, False]
    assert [worker.is_suspect for worker in membership.table(SUSPECT_S)] == [True, False]
    assert [worker.id for worker in membership.table(EXPIRED_S)] == ["d1"]
    assert membership.table(EXPIRED_S + 2.0) == []
    membership.report(info("d0"), 20.0)
    assert [worker.id for worker in membership.table(20.0)] == ["d0"]


def test_a_new_life_of_a_worker_takes_its_place_at_once() -> None:
    membership = Membership()
    membership.report(info("d0"), 0.0)
    membership.report(info("d0", incarnation="d0-2"), 0.5)
    assert [worker.incarnation for worker in membership.table(0.5)] == ["d0-2"]


def test_a_suspect_that_reports_is_trusted_again() -> None:
    membership = Membership()
    membership.report(info("d0"), 0.0)
    assert membership.table(5.0)[0].is_suspect
    membership.report(info("d0", is_suspect=True), 5.0)
    assert not membership.table(5.0)[0].is_suspect


def test_a_fresh_controller_takes_nobody_away() -> None:
    assert follow(TABLE, [], controller_age_s=0.1) == TABLE
    renewed = info("d0", incarnation="d0-2")
    assert follow(TABLE, [renewed], controller_age_s=0.1) == [renewed, TABLE[0], TABLE[1], TABLE[3]]


def test_a_settled_controller_is_believed() -> None:
    assert follow(TABLE, TABLE[:1], controller_age_s=SUSPECT_S) == TABLE[:1]
    assert follow(TABLE, [], controller_age_s=SUSPECT_S) == []


def test_a_table_says_how_old_reports_are() -> None:
    membership = Membership()
    membership.report(info("d0"), 1.0)
    assert [worker.age_s for worker in membership.table(1.5)] == [0.5]


def test_the_least_busy_decoder_is_taken() -> None:
    assert route(in_flight={"d0": 2, "d1": 1}).decode.id == "d1"
    assert route(in_flight={"d1": 1}).decode.id == "d0"


def test_without_a_decoder_there_is_no_route() -> None:
    assert route(TABLE[:2]) is None
    assert route([info("d0", is_suspect=True)]) is None
    assert route([info("d0")], avoid=frozenset({"d0-1"})) is None


def test_a_short_prompt_needs_no_source() -> None:
    assert route(tokens=range(CHUNK)).sources == ()
    assert route(tokens=range(CHUNK + 1)).sources != ()


def test_without_a_source_the_decoder_serves_alone() -> None:
    assert route(TABLE[2:]).sources == ()
    assert route([info("p0", "prefill", is_suspect=True), info("d0")]).sources == ()


sources = st.lists(st.text("abcdef", min_size=1, max_size=4), min_size=1, max_size=8, unique=True).map(
    lambda names: [info(name, "prefill") for name in names]
)
chunks = st.lists(st.integers(0, 5000), min_size=CHUNK, max_size=CHUNK)


@given(workers=sources, chunk=chunks, salt=st.sampled_from(["", "a", "b"]), data=st.data())
def test_a_document_moves_only_when_its_own_source_leaves(workers, chunk, salt, data) -> None:
    first = owners(workers, chunk, salt)[0]
    assert owners(workers[::-1], chunk, salt)[0] == first
    left = data.draw(st.sampled_from(workers))
    rest = [worker for worker in workers if worker != left]
    if rest and left != first:
        assert owners(rest, chunk, salt)[0] == first


def test_documents_spread_over_the_sources() -> None:
    workers = [info(f"p{i}", "prefill") for i in range(4)]
    claimed = [owners(workers, [i, i + 1, 2, 3], "")[0].id for i in range(400)]
    assert all(60 < claimed.count(worker.id) < 140 for worker in workers)


def test_what_follows_the_first_chunk_does_not_move_a_document() -> None:
    assert route(tokens=[1, 2, 3, 4, 5]).sources == route(tokens=[1, 2, 3, 4, 9, 9, 9]).sources


# -- with what workers report ---------------------------------------------------------------------------------------

SPEED = 1000.0  # prompt tokens a second, everywhere
IDLE = {TOKENS_PER_S: SPEED, WAITING_TOKENS: 0.0, ROWS: 0.0, STEP_S: 0.0, PULL_S: 1e-5, LOAD_RAM_S: 1e-6}
BIG = 100  # tokens a chunk
NUM_CHUNKS = 20
PROMPT = range(NUM_CHUNKS * BIG + 50)


def prefill(name: str, **stats: float) -> WorkerInfo:
    return replace(info(name, "prefill"), stats={**IDLE, **stats})


def decode(name: str, **stats: float) -> WorkerInfo:
    return replace(info(name), stats={**IDLE, **stats}, kv_endpoint=f"tcp://{name}:kv")


def holds(worker: WorkerInfo, **tiers: range) -> Coverage:
    return Coverage(
        incarnation=worker.incarnation, **{tier: sum(1 << i for i in chunks) for tier, chunks in tiers.items()}
    )


def measured(*table: WorkerInfo, holders: dict[str, Coverage] | None = None, **options: Any) -> Route:
    tokens = options.pop("tokens", PROMPT)
    found = choose_route(table, list(tokens), chunk_tokens=BIG, cache_salt="", in_flight={}, holders=holders, **options)
    assert found is not None
    return found


def names(route: Route) -> list[tuple[str, bool]]:
    return [(source.id, source.stored_only) for source in route.sources]


def test_the_shorter_queue_is_taken_and_what_was_sent_since_the_report_counts() -> None:
    table = decode("d0", **{WAITING_TOKENS: 900.0}), decode("d1", **{WAITING_TOKENS: 300.0})
    assert measured(*table).decode.id == "d1"
    sent = {"d1": Pending(age_s=1.0, sent=((0.1, 1000),), requests=1)}
    assert measured(*table, pending=sent).decode.id == "d0"


def test_requests_that_wait_for_pages_count() -> None:
    assert measured(decode("d0", **{WAITING_REQUESTS: 9.0}), decode("d1", **{WAITING_TOKENS: 50.0})).decode.id == "d1"


def test_of_equals_the_one_with_fewer_rows_then_the_documents_own() -> None:
    for busy, idle in (("d0", "d1"), ("d1", "d0")):
        assert measured(decode(busy, **{ROWS: 3.0}), decode(idle, **{ROWS: 1.0})).decode.id == idle
    workers = [decode(f"d{i}") for i in range(5)]
    places = {measured(*workers, tokens=range(n, n + 300)).decode.id for n in range(50)}
    assert len(places) == 5
    for n in range(10):
        first, longer = range(n, n + 300), [*range(n, n + 300), 7, 8, 9]
        assert measured(*workers, tokens=first).decode == measured(*workers[::-1], tokens=longer).decode


@pytest.mark.parametrize(("queue_tokens", "chosen"), [(900, "d0"), (1100, "d1")])
def test_a_prefix_is_worth_what_it_saves_and_no_more(queue_tokens: float, chosen: str) -> None:
    """Ten chunks of 100 tokens in pages are worth a queue of 1000 tokens."""
    table = decode("d0", **{WAITING_TOKENS: queue_tokens}), decode("d1")
    assert measured(*table, holders={"d0": holds(table[0], pages=range(10))}).decode.id == chosen


def test_only_leading_pages_are_hits() -> None:
    table = decode("d0"), decode("d1", **{WAITING_TOKENS: 100.0})
    holders = {"d0": holds(table[0], pages=range(1, 10)), "d1": holds(table[1], pages=range(5))}
    assert measured(*table, holders=holders).decode.id == "d1"


def test_a_chunk_is_cheapest_in_pages_then_in_its_own_store_then_in_anothers() -> None:
    slow = {PULL_S: 5e-4, LOAD_RAM_S: 2e-4}
    d0, d1, d2 = (decode(f"d{i}", **slow) for i in range(3))
    estimates = [
        measured(d0, holders=held).estimate_s
        for held in (
            {"d0": holds(d0, pages=range(20))},
            {"d0": holds(d0, ram=range(20))},
            {"d1": holds(d1, ram=range(20))},
            {},
        )
    ]
    # One worker in the table: d1's chunks cannot be had, so they cost what computing does.
    assert estimates[0] < estimates[1] < estimates[2] == estimates[3]
    pulled = measured(d0, d1, d2, holders={"d1": holds(d1, ram=range(20))}, prefer=d0.incarnation).estimate_s
    assert estimates[1] < pulled < estimates[3]


def test_what_is_sooner_computed_than_loaded_is_computed() -> None:
    d0, d1 = decode("d0", **{PULL_S: 2 / SPEED}), decode("d1", **{WAITING_TOKENS: 9000.0})
    found = measured(d0, d1, holders={"d1": holds(d1, ram=range(20))})
    assert found.decode_tokens == len(PROMPT) and found.estimate_s == measured(d0, d1).estimate_s
    assert names(found) == [("d1", True)], "the plan may still find it useful"


def test_what_an_earlier_life_held_counts_for_nothing() -> None:
    d0, d1 = decode("d0", **{WAITING_TOKENS: 10.0}), decode("d1")
    stale = replace(holds(d0, pages=range(20)), incarnation="d0-0")
    assert measured(d0, d1, holders={"d0": stale}).decode.id == "d1"
    assert measured(d1, holders={"gone": holds(decode("gone"), ram=range(20))}).sources == ()


# -- aggregated or not ----------------------------------------------------------------------------------------------


def test_on_idle_equals_the_prompt_is_computed_where_it_is_decoded() -> None:
    found = measured(prefill("p0"), decode("d0"))
    assert found.is_aggregated and found.sources == () and found.decode_tokens == len(PROMPT)


def test_a_busy_decode_worker_has_the_prompt_computed_elsewhere() -> None:
    found = measured(prefill("p0"), decode("d0", **{WAITING_TOKENS: 3000.0}))
    assert not found.is_aggregated and names(found) == [("p0", False)]
    assert (found.prefill_tokens, found.decode_tokens) == (NUM_CHUNKS * BIG, 50)


def test_a_faster_prefill_worker_is_used() -> None:
    assert not measured(prefill("p0", **{TOKENS_PER_S: 4 * SPEED}), decode("d0")).is_aggregated
    slow_link = {PULL_S: 2 / SPEED}
    assert measured(prefill("p0", **{TOKENS_PER_S: 4 * SPEED}), decode("d0", **slow_link)).is_aggregated


def test_running_rows_are_spared_up_to_a_price() -> None:
    busy = decode("d0", **{ROWS: 8.0})
    assert not measured(prefill("p0"), busy).is_aggregated
    assert measured(prefill("p0"), busy, weights=RouteWeights(disturbance=0.0)).is_aggregated
    queue = {WAITING_TOKENS: 0.3 * len(PROMPT)}
    assert measured(prefill("p0", **queue), busy).is_aggregated, "30 % later is more than the request has to pay"
    assert not measured(prefill("p0", **queue), busy, weights=RouteWeights(max_price=0.5)).is_aggregated


def test_without_measured_speeds_no_prompt_is_kept_from_a_prefill_worker() -> None:
    unmeasured = replace(decode("d0"), stats={})
    assert names(measured(prefill("p0"), unmeasured)) == [("p0", False)]
    assert names(measured(replace(prefill("p0"), stats={}), decode("d0"))) == [("p0", False)]


def test_a_policy_that_bounds_computing_keeps_the_source() -> None:
    assert names(measured(prefill("p0"), decode("d0", **{MAY_AGGREGATE: 0.0}))) == [("p0", False)]


def test_what_a_request_demands_of_its_kv_is_kept() -> None:
    assert names(measured(prefill("p0"), decode("d0"), way="load")) == [("p0", False)]
    busy, held = decode("d0", **{WAITING_TOKENS: 9000.0}), prefill("p0")
    assert measured(held, busy, way="compute", holders={"p0": holds(held, ram=range(20))}).sources == ()


@pytest.mark.parametrize(
    ("options", "way"),
    [
        ({}, "auto"),
        ({"kv_mode": "text"}, "compute"),
        ({"kv_mode": "q1"}, "load"),
        ({"plan": {}}, "load"),
        ({"sampling": SamplingParams(prompt_logprobs=1)}, "compute"),
        ({"sampling": SamplingParams(prompt_logprobs=1), "kv_mode": "q1"}, "load"),
    ],
)
def test_ways(options: dict[str, Any], way: str) -> None:
    assert way_of(GenerationRequest(request_id="r", token_ids=(1,), **options)) == way


# -- sources --------------------------------------------------------------------------------------------------------


def test_what_is_stored_everywhere_needs_nobody_to_compute() -> None:
    p0, d0, d1 = prefill("p0"), decode("d0"), decode("d1", **{WAITING_TOKENS: 9000.0})
    holders = {"d1": holds(d1, ram=range(12), pages=range(20)), "p0": holds(p0, disk=range(10, 20))}
    found = measured(p0, d0, d1, holders=holders)
    assert found.is_aggregated and found.decode.id == "d0"
    assert names(found) == [("d1", True), ("p0", True)], "the most first, and nobody computes for others"
    assert [source.to_wire() for source in found.sources] == [
        {"id": "d1", "endpoint": "tcp://d1:kv", "public_key": None, "is_holder": True, "stored_only": True},
        {"id": "p0", "endpoint": "tcp://p0", "public_key": None, "is_holder": True, "stored_only": True},
    ]
    assert found.decode_tokens == 50


def test_what_a_decode_worker_has_itself_is_not_asked_of_others() -> None:
    p0, d0 = prefill("p0"), decode("d0")
    holders = {"d0": holds(d0, pages=range(4), disk=range(8, 20)), "p0": holds(p0, ram=range(20))}
    found = measured(p0, d0, holders=holders)
    assert names(found) == [("p0", True)], "for chunks 4 to 7"
    assert measured(p0, d0, holders={**holders, "d0": holds(d0, ram=range(20))}).sources == ()


def test_pages_of_others_cannot_be_pulled() -> None:
    d0, d1 = decode("d0"), decode("d1", **{WAITING_TOKENS: 9000.0})
    found = measured(d0, d1, holders={"d1": holds(d1, pages=range(20))})
    assert found.decode.id == "d0" and found.sources == () and found.decode_tokens == len(PROMPT)


def test_a_decode_worker_that_serves_nothing_is_no_source() -> None:
    d0, d1 = decode("d0"), replace(decode("d1", **{WAITING_TOKENS: 9000.0}), kv_endpoint=None)
    assert measured(d0, d1, holders={"d1": holds(d1, ram=range(20))}).sources == ()


def test_who_computes_comes_first_then_the_best_coverage_then_who_takes_over() -> None:
    busy = {WAITING_TOKENS: 5000.0}
    table = [*(prefill(f"p{i}") for i in range(3)), *(decode(f"d{i}", **busy) for i in range(4))]
    by_claim = owners(table[:3], PROMPT[:BIG], "")
    plain = measured(*table)
    assert names(plain) == [(by_claim[0].id, False), (by_claim[1].id, False)]
    d = {worker.id: worker for worker in table}
    one = measured(*table, holders={"d1": holds(d["d1"], ram=range(4))}, prefer="d0-1")
    assert names(one) == [(by_claim[0].id, False), ("d1", True), (by_claim[1].id, False)]
    holders = {
        "d1": holds(d["d1"], ram=range(4)),
        "d2": holds(d["d2"], ram=range(10)),
        "d3": holds(d["d3"], ram=range(10, 14)),
    }
    full = measured(*table, holders=holders, prefer="d0-1")
    assert names(full) == [(by_claim[0].id, False), ("d2", True), ("d3", True)] and len(full.sources) == MAX_SOURCES


def test_a_prefill_worker_with_the_front_of_the_prompt_computes_the_rest() -> None:
    table = [*(prefill(f"p{i}") for i in range(3)), decode("d0", **{WAITING_TOKENS: 5000.0})]
    last = owners(table[:3], PROMPT[:BIG], "")[-1]
    table[:3] = [
        replace(worker, stats={**IDLE, PULL_S: 0.5 / SPEED}) for worker in table[:3]
    ]  # fetching takes time, too
    found = measured(*table, holders={last.id: holds(last, ram=range(10))})
    assert found.sources[0].id == last.id and found.prefill_tokens == 10 * BIG


def test_a_prefill_worker_fetches_what_others_have_before_what_is_missing() -> None:
    """Ten chunks are at a decode worker: the prefill worker need not compute them, if fetching is faster."""
    p0, d0 = prefill("p0"), decode("d0", **{WAITING_TOKENS: 9000.0})
    d1 = decode("d1", **{WAITING_TOKENS: 90000.0})
    holders = {"d1": holds(d1, ram=range(10))}
    found = measured(p0, d0, d1, holders=holders)
    assert [source.to_wire().get("is_holder", False) for source in found.sources] == [False, True]
    assert found.prefill_tokens == 10 * BIG
    slow = replace(p0, stats={**IDLE, PULL_S: 2 / SPEED})
    assert measured(slow, d0, d1, holders=holders).prefill_tokens == 20 * BIG


def test_a_busy_owner_hands_over_to_the_next() -> None:
    table = [prefill("p0"), prefill("p1"), decode("d0", **{WAITING_TOKENS: 9000.0})]
    first, second = owners(table[:2], PROMPT[:BIG], "")
    busy = replace(first, stats={**IDLE, WAITING_TOKENS: 500.0})
    found = measured(busy, second, table[2])
    assert [source.id for source in found.sources] == [second.id, first.id]


# -- groups, many workers, properties -------------------------------------------------------------------------------


def test_a_group_stays_together_while_its_worker_lives() -> None:
    table = decode("d0", **{WAITING_TOKENS: 9000.0}), decode("d1")
    assert measured(*table, prefer="d0-1").decode.id == "d0"
    assert measured(*table, prefer="d0-0").decode.id == "d1", "another life has none of its pages"
    assert measured(*table, prefer="d0-1", avoid=frozenset({"d0-1"})).decode.id == "d1"


def test_of_many_workers_the_holder_and_the_idle_are_looked_at() -> None:
    crowd = [decode(f"d{i}", **{WAITING_TOKENS: 1000.0 + i}) for i in range(3 * MAX_SCANNED)]
    holder = crowd[-1]
    assert measured(*crowd, holders={holder.id: holds(holder, pages=range(15))}).decode == holder
    assert measured(*crowd, weights=RouteWeights(tie_share=0.0)).decode.id == "d0"


stats = st.fixed_dictionaries(
    {},
    optional={
        TOKENS_PER_S: st.floats(100, 10_000),
        WAITING_TOKENS: st.floats(0, 50_000),
        ROWS: st.integers(0, 64).map(float),
        STEP_S: st.floats(0, 0.1),
        PULL_S: st.floats(1e-6, 1e-2),
        LOAD_RAM_S: st.floats(1e-7, 1e-3),
        WAITING_REQUESTS: st.integers(0, 10).map(float),
        MAY_AGGREGATE: st.sampled_from([0.0, 1.0]),
    },
)
bitmaps = st.integers(0, (1 << NUM_CHUNKS) - 1)


@given(data=st.data(), num_prefill=st.integers(0, 3), num_decode=st.integers(1, 4), tokens=st.integers(1, len(PROMPT)))
def test_every_route_can_be_served(data: Any, num_prefill: int, num_decode: int, tokens: int) -> None:
    table = [replace(info(f"p{i}", "prefill"), stats=data.draw(stats)) for i in range(num_prefill)]
    table += [
        replace(info(f"d{i}"), stats=data.draw(stats), kv_endpoint=data.draw(st.sampled_from([None, f"tcp://kv{i}"])))
        for i in range(num_decode)
    ]
    num_chunks = (tokens - 1) // BIG
    cut = (1 << num_chunks) - 1
    holders = {
        worker.id: Coverage(
            incarnation=worker.incarnation,
            pages=data.draw(bitmaps) & cut,
            ram=data.draw(bitmaps) & cut,
            disk=data.draw(bitmaps) & cut,
        )
        for worker in table
        if data.draw(st.booleans())
    }
    way = data.draw(st.sampled_from(["auto", "load", "compute"]))
    found = measured(*table, holders=holders, tokens=range(tokens), way=way)
    assert measured(*table, holders=holders, tokens=range(tokens), way=way) == found, "the same each time"
    assert found.decode.role == "decode" and found.estimate_s > 0
    ids = [source.id for source in found.sources]
    assert len(ids) == len(set(ids)) <= MAX_SOURCES
    assert all(source.to_wire()["endpoint"] for source in found.sources)
    computing = [source for source in found.sources if not source.stored_only]
    assert all(source.worker.role == "prefill" for source in computing), "a decode worker computes for nobody"
    assert not found.is_aggregated or not computing
    if way == "compute" or num_chunks == 0:
        assert found.sources == ()
    elif num_prefill and way == "load":
        assert not found.sources[0].stored_only, "a level that was asked for comes from somewhere"
    if not found.is_aggregated:
        assert not found.sources[0].stored_only
    assert found.decode_tokens + found.prefill_tokens <= 2 * tokens
