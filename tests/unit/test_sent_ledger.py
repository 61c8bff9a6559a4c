"""What a gateway has sent and workers have not reported yet."""

from __future__ import annotations

import pytest

from cluster.membership import WorkerInfo
from cluster.route_costs import NOTHING_PENDING, Pending
from cluster.sent_ledger import ON_THE_WAY_S, SentLedger


def info(name: str, age_s: float) -> WorkerInfo:
    return WorkerInfo(id=name, role="decode", incarnation=name, endpoint=name, age_s=age_s)


def test_what_a_report_contains_is_not_counted_again() -> None:
    ledger = SentLedger()
    ledger.follow([info("d0", 0.0)], 10.0)
    ledger.send("d0", {"d0": 100}, 10.5)
    ledger.send("d0", {"d0": 200}, 11.5)
    assert ledger.pending(12.0)["d0"] == Pending(age_s=2.0, sent=((1.5, 100), (0.5, 200)), requests=2)
    ledger.follow([info("d0", 0.25)], 11.25)  # made at 11.0
    assert ledger.pending(12.0)["d0"] == Pending(age_s=1.0, sent=((0.5, 200),), requests=1)
    ledger.follow([info("d0", 0.0)], 11.5 + 2 * ON_THE_WAY_S)
    assert ledger.pending(12.0)["d0"].requests == 0
    assert ledger.in_flight() == {"d0": 2}


def test_a_first_token_ends_the_prompt_and_not_the_row() -> None:
    ledger = SentLedger()
    ledger.follow([info("d0", 0.0), info("p0", 0.0)], 10.0)
    number = ledger.send("d0", {"d0": 10, "p0": 500}, 10.5)
    assert ledger.pending(11.0)["p0"] == Pending(age_s=1.0, sent=((0.5, 500),))
    ledger.first_token(number)
    pending = ledger.pending(11.0)
    assert pending["p0"] == Pending(age_s=1.0) and pending["d0"] == Pending(age_s=1.0, requests=1)
    ledger.ended(number, 11.0)
    assert ledger.pending(11.0)["d0"] == Pending(age_s=1.0) and not ledger.in_flight()


def test_what_has_ended_since_a_report_is_told_until_the_next() -> None:
    ledger = SentLedger()
    ledger.follow([info("d0", 0.0)], 10.0)
    old, both = ledger.send("d0", {}, 8.0), ledger.send("d0", {}, 10.4)
    ledger.ended(old, 10.5)
    ledger.ended(both, 10.6)
    assert ledger.pending(11.0)["d0"] == Pending(age_s=1.0, ended=1), "the report has not heard of the other one"
    ledger.follow([info("d0", 0.0)], 11.0)
    assert ledger.pending(11.0)["d0"] == Pending()


def test_workers_that_left_are_forgotten() -> None:
    ledger = SentLedger()
    ledger.follow([info("d0", 0.0)], 10.0)
    number = ledger.send("d0", {"d0": 10}, 10.5)
    ledger.follow([info("d1", 0.0)], 11.0)
    assert set(ledger.pending(11.0)) == {"d1"}
    ledger.ended(number, 11.0)


@pytest.mark.parametrize(
    ("pending", "left"),
    [
        (NOTHING_PENDING, 500),
        (Pending(age_s=0.3), 200),
        (Pending(age_s=3.0), 0),
        (Pending(age_s=3.0, sent=((0.1, 400),)), 300),  # it was idle when that came
        (Pending(age_s=0.3, sent=((0.1, 400),)), 600),
        (Pending(age_s=3.0, sent=((2.0, 400), (0.1, 50), (0.05, 50))), 0),
        (Pending(age_s=0.0, sent=((0.01, 400),)), 900),  # on its way when the report was made
    ],
)
def test_a_backlog_shrinks_while_the_worker_computes(pending: Pending, left: float) -> None:
    assert pending.backlog_tokens(500, tokens_per_s=1000) == pytest.approx(left)
