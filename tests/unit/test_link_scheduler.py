"""What transfers tell each other of a link: who goes first, what that makes of a plan, and what is forgotten."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from decode.link_scheduler import MAX_KNOWN_LINKS, Kind, LinkScheduler, LinkShare, priority


def join(links: LinkScheduler, deadline: float, endpoint: str = "a") -> LinkShare:
    return links.join(endpoint, deadline=deadline, prior_bytes_per_s=1e6)


def test_transfers_of_one_link_share_what_is_known_of_it() -> None:
    links = LinkScheduler()
    first, second, other = join(links, 1.0), join(links, 2.0), join(links, 1.0, "b")
    assert first.estimator is second.estimator is not other.estimator
    first.estimator.on_part(1 << 20, 1.0)
    assert join(links, 3.0).estimator.bytes_per_s(0.0) == first.estimator.bytes_per_s(0.0)


def test_the_prior_is_for_links_never_seen() -> None:
    links = LinkScheduler()
    links.join("a", deadline=0.0, prior_bytes_per_s=5e6).leave()
    again = links.join("a", deadline=0.0, prior_bytes_per_s=9e9)
    assert again.estimator.bytes_per_s(0.0) == pytest.approx(5e6)


def test_an_earlier_deadline_goes_first_and_a_later_one_waits_for_it() -> None:
    links = LinkScheduler()
    early, late = join(links, 1.0), join(links, 2.0)
    early.base_bytes, late.base_bytes = 100.0, 10.0
    assert (early.ahead_bytes(), late.ahead_bytes()) == (0.0, 100.0)
    assert early.is_contended() and late.is_contended()


def test_of_equal_deadlines_the_first_come_goes_first() -> None:
    links = LinkScheduler()
    first, second = join(links, 1.0), join(links, 1.0)
    first.base_bytes = second.base_bytes = 7.0
    assert (first.ahead_bytes(), second.ahead_bytes()) == (0.0, 7.0)


def test_refinements_wait_for_all_that_first_tokens_wait_for() -> None:
    links = LinkScheduler()
    early, late = join(links, 1.0), join(links, 2.0)
    early.refine_bytes, late.base_bytes = 5.0, 100.0
    assert early.ahead_bytes(Kind.BETTER) == early.ahead_bytes(Kind.LATER) == 100.0
    assert late.ahead_bytes(Kind.BASE) == 0.0
    assert late.ahead_bytes(Kind.BETTER) == 5.0


def test_other_links_do_not_count() -> None:
    links = LinkScheduler()
    here, there = join(links, 2.0, "a"), join(links, 1.0, "b")
    there.base_bytes = there.refine_bytes = 100.0
    assert here.ahead_bytes() == here.ahead_bytes(Kind.LATER) == 0.0 and not here.is_contended()


def test_own_needs_are_not_ahead_of_oneself() -> None:
    alone = join(LinkScheduler(), 1.0)
    alone.base_bytes = alone.refine_bytes = 100.0
    assert all(alone.ahead_bytes(kind) == 0.0 for kind in Kind) and not alone.is_contended()


def test_who_left_counts_no_more() -> None:
    links = LinkScheduler()
    early, late = join(links, 1.0), join(links, 2.0)
    early.base_bytes = 100.0
    assert links.num_shares == 2
    early.leave()
    assert (late.ahead_bytes(), late.is_contended(), links.num_shares) == (0.0, False, 1)


@given(
    shares=st.lists(
        st.tuples(st.sampled_from("abc"), st.integers(0, 3), st.integers(0, 100), st.integers(0, 100), st.booleans()),
        max_size=12,
    )
)
def test_against_a_queue(shares: list[tuple[str, int, int, int, bool]]) -> None:
    """A link that serves one byte after another, in the order of kind, deadline and arrival."""
    links = LinkScheduler()
    joined = []
    for endpoint, deadline, base, refine, leaves in shares:
        share = join(links, float(deadline), endpoint)
        share.base_bytes, share.refine_bytes = float(base), float(refine)
        joined.append((endpoint, share, leaves))
    for _, share, leaves in joined:
        if leaves:
            share.leave()
    stay = [(endpoint, share) for endpoint, share, leaves in joined if not leaves]
    assert links.num_shares == len(stay)
    for endpoint, share in stay:
        line = [
            (kind is not Kind.BASE, other.deadline, index, other is share, size)
            for index, (at, other) in enumerate(stay)
            if at == endpoint
            for kind, size in ((Kind.BASE, other.base_bytes), (Kind.LATER, other.refine_bytes))
        ]
        line.sort(key=lambda item: item[:3])
        for kind in Kind:
            at = next(i for i, item in enumerate(line) if item[3] and item[0] == (kind is not Kind.BASE))
            assert share.ahead_bytes(kind) == sum(item[4] for item in line[:at] if not item[3])
        assert share.is_contended() == any(not item[3] and not item[0] and item[4] > 0 for item in line)


# -- links come and go --------------------------------------------------------------------------------------------


def test_the_oldest_idle_link_is_forgotten() -> None:
    links = LinkScheduler()
    busy = join(links, 0.0, "busy")
    idle = join(links, 0.0, "idle")
    idle.leave()
    for number in range(MAX_KNOWN_LINKS - 2):
        join(links, 0.0, f"link-{number}")
    assert join(links, 0.0, "idle").estimator is idle.estimator  # known as long as there is room
    links.join("idle", deadline=0.0, prior_bytes_per_s=1.0).leave()
    links._links["idle"].shares.clear()
    join(links, 0.0, "one more")
    assert join(links, 0.0, "busy").estimator is busy.estimator
    assert join(links, 0.0, "idle").estimator is not idle.estimator


def test_no_link_in_use_is_ever_forgotten() -> None:
    links = LinkScheduler()
    shares = [join(links, 0.0, f"link-{number}") for number in range(MAX_KNOWN_LINKS + 20)]
    assert links.num_shares == len(shares)
    assert all(join(links, 0.0, f"link-{i}").estimator is share.estimator for i, share in enumerate(shares))


def test_workers_that_restart_do_not_fill_the_memory() -> None:
    links = LinkScheduler()
    for number in range(3 * MAX_KNOWN_LINKS):
        join(links, 0.0, f"link-{number}").leave()
    assert len(links._links) <= MAX_KNOWN_LINKS


# -- priorities on the wire ---------------------------------------------------------------------------------------


@given(st.tuples(st.sampled_from(Kind), st.floats(0, 1e9)), st.tuples(st.sampled_from(Kind), st.floats(0, 1e9)))
def test_kinds_come_before_deadlines(one: tuple[Kind, float], other: tuple[Kind, float]) -> None:
    first, second = sorted([one, other])
    assert 0 <= priority(*first) <= priority(*second) < 1 << 53
    if first[0] < second[0] or second[1] - first[1] > 1e-3:
        assert priority(*first) < priority(*second)


def test_the_ends_of_time_stay_within_their_kind() -> None:
    found = [priority(kind, deadline) for kind in Kind for deadline in (-5.0, 0.0, 1e12, 1e30)]
    assert found == sorted(found)
    assert all(0 <= value < 1 << 53 for value in found)
    assert all(before < after for before, after in itertools.pairwise(found[::2]))
