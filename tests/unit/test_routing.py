"""Who is in the table when, and which workers a request goes to."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from cluster.routing import EXPIRED_S, SUSPECT_S, Membership, WorkerInfo, choose_route, follow, owners

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
