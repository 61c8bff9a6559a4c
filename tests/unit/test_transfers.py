"""What a source computes and encodes next, for whom, and what it refuses; what an open may say; measured times."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefill.chunks import chunk_keys
from prefill.encode_times import NEWEST_SHARE, EncodeTimes
from prefill.open_request import BadOpen, OpenRequest, read_open
from prefill.transfers import MAX_WAITING_PREFILLS, Ask, Transfer, Transfers

LIMITS: dict[str, Any] = {"max_context": 100, "vocab_size": 50, "block_tokens": 16, "fingerprint": "f"}


def request(num_chunks: int = 4, *, stored_only: bool = False, seed: int = 0) -> OpenRequest:
    tokens = [(seed + i) % 50 for i in range(16 * num_chunks + 1)]
    return read_open({"token_ids": tokens, "chunk_tokens": 16, "stored_only": stored_only}, **LIMITS)


def ask(priority: int = 0, level: str = "q1") -> Ask:
    return Ask(level=level, priority=priority)


@pytest.fixture
def transfers() -> Transfers:
    return Transfers()


def next_chunk(transfers: Transfers) -> tuple[str, int] | None:
    """Takes it, as the encode thread does."""
    found = transfers.most_urgent()
    if found is None:
        return None
    transfer, chunk = found
    del transfer.ready[chunk]
    return transfer.id, chunk


def test_an_open_is_read_as_it_stands() -> None:
    tokens = list(range(40))
    read = read_open({"token_ids": tokens, "chunk_tokens": 16, "cache_salt": "s", "stored_only": True}, **LIMITS)
    assert read.keys == chunk_keys(tokens, 16, fingerprint="f", cache_salt="s")
    assert read.stored_only and read.span(1) == (16, 32)
    assert not read_open({"token_ids": tokens, "chunk_tokens": 16}, **LIMITS).stored_only


@pytest.mark.parametrize("stored_only", [0, 1, "true", None, []])
def test_stored_only_is_true_or_false(stored_only: Any) -> None:
    with pytest.raises(BadOpen, match="stored_only"):
        read_open({"token_ids": [1, 2], "chunk_tokens": 16, "stored_only": stored_only}, **LIMITS)


def test_the_most_urgent_of_all_transfers_is_next_and_amendments_move_it(transfers: Transfers) -> None:
    a, b = transfers.open("a", request()), transfers.open("b", request())
    a.make_ready(0, ask(5))
    a.make_ready(1, ask(3))
    b.make_ready(0, ask(4))
    b.make_ready(3, ask(3))
    a.make_ready(0, ask(1))
    assert [next_chunk(transfers) for _ in range(5)] == [("a", 0), ("a", 1), ("b", 3), ("b", 0), None]


def test_a_transfer_with_unsent_bytes_waits_but_for_what_is_more_urgent(transfers: Transfers) -> None:
    """A refinement queued on a slow link must not keep a chunk from being encoded that its request waits for."""
    a, b = transfers.open("a", request()), transfers.open("b", request())
    a.supplied(ask(50))
    a.supplied(ask(70))
    for chunk, priority in enumerate((50, 60, 49)):
        a.make_ready(chunk, ask(priority))
    b.make_ready(0, ask(90))
    assert [next_chunk(transfers) for _ in range(3)] == [("a", 2), ("b", 0), None]
    a.unsent_priority = None
    assert [next_chunk(transfers) for _ in range(3)] == [("a", 0), ("a", 1), None]


def test_a_chunk_that_came_makes_all_ready_that_wait_for_it(transfers: Transfers) -> None:
    a, b, c = (transfers.open(name, request()) for name in "abc")
    other = transfers.open("other", request(seed=7))
    for transfer in (a, b, other):
        assert transfers.want_computed(transfer, 1, ask(2)) is None
    assert transfers.want_computed(b, 2, ask(1)) is None
    transfers.arrived(a.request.keys[1])
    assert (a.ready, b.ready, c.ready, other.ready) == ({1: ask(2)}, {1: ask(2)}, {}, {})
    assert b.waiting == {2: ask(1)} and other.waiting == {1: ask(2)}
    transfers.check_integrity()


def test_prompts_are_computed_once_each_in_the_order_of_asking(transfers: Transfers) -> None:
    a, b, c = (transfers.open(name, request()) for name in "abc")
    for transfer in (b, a, b, c):
        transfers.want_computed(transfer, 0, ask())
    assert transfers.num_prefills == 3
    assert transfers.next_prefill() is b
    transfers.arrived(b.request.keys[0])  # all three have it now
    transfers.prefill_ended(b)
    assert transfers.next_prefill() is None and not any(t.is_computing for t in (a, b, c))
    transfers.check_integrity()


def test_what_was_asked_for_too_late_is_computed_again(transfers: Transfers) -> None:
    a = transfers.open("a", request())
    transfers.want_computed(a, 0, ask())
    assert transfers.next_prefill() is a
    transfers.arrived(a.request.keys[0])
    transfers.want_computed(a, 0, ask())  # evicted meanwhile
    transfers.prefill_ended(a)
    assert transfers.next_prefill() is a
    transfers.close("a")
    transfers.prefill_ended(a)
    assert transfers.next_prefill() is None


@pytest.mark.parametrize(
    ("transfer", "asked", "reason"),
    [
        ({"stored_only": True}, ask(), "stored chunks only"),
        ({"stored_only": True}, ask(level="q3>q1"), "stored chunks only"),
        ({}, ask(level="q3>q1"), "not computed for a refinement"),
    ],
)
def test_what_is_never_computed(transfers: Transfers, transfer: dict[str, Any], asked: Ask, reason: str) -> None:
    a = transfers.open("a", request(**transfer))
    a.make_ready(0, asked)
    assert reason in (transfers.want_computed(a, 0, asked) or "")
    assert not a.waiting and not a.ready and transfers.num_prefills == 0


def test_a_failure_to_compute_fails_what_waits_and_what_comes_later(transfers: Transfers) -> None:
    a = transfers.open("a", request())
    for chunk in (2, 0):
        transfers.want_computed(a, chunk, ask())
    assert transfers.next_prefill() is a
    assert transfers.cannot_compute(a, "too large") == [2, 0]
    transfers.prefill_ended(a)
    assert transfers.want_computed(a, 1, ask()) == "too large"
    assert transfers.num_prefills == 0
    transfers.check_integrity()


def test_a_full_queue_is_said_and_a_transfer_that_leaves_makes_room(transfers: Transfers) -> None:
    for number in range(MAX_WAITING_PREFILLS):
        assert transfers.want_computed(transfers.open(str(number), request()), 0, ask()) is None
    late = transfers.open("late", request())
    assert "busy: 64" in (transfers.want_computed(late, 0, ask()) or "")
    queued = transfers.get("5")
    assert queued is not None and transfers.want_computed(queued, 1, ask()) is None  # it has its place already
    transfers.close("7")
    assert transfers.want_computed(late, 0, ask()) is None
    transfers.check_integrity()


operations = st.lists(
    st.tuples(
        st.sampled_from(["open", "want", "arrive", "ready", "encode", "supply", "low", "compute", "close"]),
        st.integers(0, 3), st.integers(0, 3), st.integers(0, 9), st.sampled_from(["q1", "lossless", "q3>q1"]),
    ),
    max_size=60,
)  # fmt: skip


@given(steps=operations)
def test_any_use_keeps_the_books_right(steps: list[tuple[str, int, int, int, str]]) -> None:
    transfers, running = Transfers(), list[Transfer]()
    for what, number, chunk, priority, level in steps:
        name, asked = str(number), ask(priority, level)
        transfer = transfers.get(name)
        if what == "open" and transfer is None:
            transfers.open(name, request(stored_only=number == 3, seed=number % 2))
        elif what == "close":
            transfers.close(name)
        elif what == "compute":
            if running:
                transfers.prefill_ended(running.pop())
            elif (found := transfers.next_prefill()) is not None:
                running.append(found)
        elif what == "encode":
            due = transfers.most_urgent()
            if due is not None:
                mine = due[0].ready.pop(due[1])
                assert due[0].unsent_priority is None or mine.priority < due[0].unsent_priority
        elif transfer is None:
            continue
        elif what == "want":
            refused = transfers.want_computed(transfer, chunk, asked)
            assert (refused is None) == (chunk in transfer.waiting)
            assert refused is not None or (number != 3 and ">" not in level)
        elif what == "arrive":
            transfers.arrived(transfer.request.keys[chunk])
            assert chunk not in transfer.waiting
        elif what == "ready":
            transfer.make_ready(chunk, asked)
        elif what == "supply":
            transfer.supplied(asked)
        else:
            transfer.unsent_priority = None
        transfers.check_integrity()


def test_times_are_means_a_token_of_what_was_measured() -> None:
    times = EncodeTimes()
    assert times.of_chunk(256) == {}
    times.note("q1", 0.004, num_tokens=256)
    assert times.of_chunk(256) == {"q1": pytest.approx(0.004)}
    times.note("q1", 0.016, num_tokens=512)
    times.note("q3", 0.001, num_tokens=256)
    assert times.of_chunk(512) == {"q1": pytest.approx(0.008 + NEWEST_SHARE * 0.008), "q3": pytest.approx(0.002)}
    for _ in range(60):
        times.note("q1", 0.5, num_tokens=1)
    assert times.of_chunk(1)["q1"] == pytest.approx(0.5, rel=1e-4)
