"""Who gives up its pages, when nobody does, and how a preempted request comes back."""

from __future__ import annotations

from typing import Any

import pytest

from decode.requests import GenerationRequest, SamplingParams
from decode.scheduler import Lack, Phase, Row, Scheduler, SchedulingPolicy, Sequence, TenantShare, Waiting

EVER = lambda waiting: True  # noqa: E731


def sequence(
    key: str,
    *,
    blocks: int = 4,
    num_output: int = 1,
    arrival: int = 0,
    priority: int = 0,
    tenant: str = "",
    phase: Phase = Phase.RUNNING,
    max_tokens: int = 1000,
) -> Sequence:
    sampling = SamplingParams(max_tokens=max_tokens)
    request = GenerationRequest(request_id=key, token_ids=(5,) * 10, tenant=tenant, sampling=sampling)
    made = Sequence(key=key, request=request, block_table=[], deadline=0.0, arrival=arrival, priority=priority)
    made.block_table = [1000 * arrival + i for i in range(blocks)]
    made.phase, made.output = phase, [7] * num_output
    return made


def scheduler(*sequences: Sequence, num_blocks: int = 100, **policy: Any) -> Scheduler:
    made = Scheduler(SchedulingPolicy(**policy), num_blocks=num_blocks)
    for item in sequences:
        made.add(item)
    return made


def back(made: Scheduler, *, now: float = 0.0, blocks: int = 4) -> Sequence:
    """The preempted one's pages are given back, and it is admitted again."""
    for waiting in made.waiting():
        if waiting.sequence is not None:
            waiting.sequence.block_table = []
    admitted = made.next_to_admit(now, EVER)
    assert admitted is not None and admitted.sequence is not None
    admitted.sequence.block_table = list(range(blocks))
    made.add(admitted.sequence, admitted)
    made.check_integrity()
    return admitted.sequence


# -- which --------------------------------------------------------------------------------------------------------


def test_the_least_urgent_then_the_tenant_with_most_blocks_for_its_weight_then_the_latest() -> None:
    made = scheduler(
        sequence("needs", tenant="b", arrival=1),
        sequence("b later", tenant="b", arrival=6),
        sequence("a early", tenant="a", arrival=2, blocks=5),
        sequence("a late", tenant="a", arrival=4, blocks=5),
        sequence("c", tenant="c", arrival=5, blocks=12),  # of weight 2: 6 for each
        sequence("batch", tenant="c", arrival=3, priority=1, blocks=1),
        shares={"c": TenantShare(weight=2.0)},
    )
    needs = made.get("needs")
    assert needs is not None
    order = []
    while len(made) > 1:
        victim = made.choose_victim(needs)
        assert victim is not None
        order.append(victim.key)
        made.remove(victim.key)
    # a has 10, b 8 and c 6; then b; then c has 6, a 5 and b 4.
    assert order == ["batch", "a late", "b later", "c", "a early"]


def test_never_one_that_is_more_urgent() -> None:
    urgent, needs = sequence("urgent", arrival=9), sequence("needs", priority=1, arrival=1)
    made = scheduler(urgent, needs)
    assert made.choose_victim(needs) is needs
    assert made.choose_victim(urgent) is needs


def test_levels_gained_by_waiting_count() -> None:
    waited, needs = sequence("waited", priority=3, arrival=1), sequence("needs", arrival=2)
    waited.waited_s = 30.0
    made = scheduler(waited, needs, age_s=10.0)
    assert made.choose_victim(needs) is needs, "as urgent, and earlier"
    waited.waited_s = 29.0
    assert made.choose_victim(needs) is waited


@pytest.mark.parametrize("phase", [Phase.FILLING, Phase.TAIL, Phase.RUNNING])
def test_it_may_be_filling(phase: Phase) -> None:
    late = sequence("late", arrival=2, phase=phase, num_output=0)
    late.work, late.work_chunk = (0, 10), 0
    made = scheduler(sequence("needs", arrival=1), late)
    needs = made.get("needs")
    assert needs is not None and made.choose_victim(needs) is late
    made.preempt("late", 1.0)
    assert late.phase is Phase.PREEMPTED and late.work is None and late.work_chunk is None


def test_a_pinned_one_is_passed_over_and_waited_for_if_it_is_the_only_one() -> None:
    made = scheduler(*(sequence(key, arrival=i) for i, key in enumerate(["needs", "b", "c"])))
    needs, b, c = made.all()
    c.pins = 1
    assert made.choose_victim(needs) is b
    b.pins = 1
    assert made.choose_victim(needs) is None, "they will not be pinned for long: no reason to give way itself"
    with pytest.raises(AssertionError):
        made.preempt("b", 0.0)


def test_protect_names_whom_not_to_choose() -> None:
    made = scheduler(*(sequence(key, arrival=i) for i, key in enumerate(["needs", "b", "c"])))
    needs, b, _ = made.all()
    assert made.choose_victim(needs, protect={"c"}) is b
    assert made.choose_victim(needs, protect={"b", "c"}) is needs
    assert made.choose_victim(needs, protect={"b", "c", "needs"}) is None


def test_alone_it_does_not_give_way() -> None:
    """The other pages are with requests that ended and are still pinned."""
    needs = sequence("needs")
    made = scheduler(needs, sequence("no pages yet", blocks=0, phase=Phase.FILLING))
    assert made.choose_victim(needs) is None


def test_one_victim_at_a_time_until_its_pages_are_free() -> None:
    made = scheduler(*(sequence(key, arrival=i) for i, key in enumerate(["needs", "b", "c"])))
    needs = made.all()[0]
    victim = made.preempt("c", 0.0)
    assert made.choose_victim(needs) is None
    assert made.next_to_admit(0.0, EVER) is None, "nor is it admitted while it has pages to give back"
    victim.block_table = []
    assert made.choose_victim(needs) is made.get("b")


def test_a_tenant_at_its_share_makes_room_by_itself() -> None:
    made = scheduler(
        sequence("a0", tenant="a", arrival=1, blocks=4),
        sequence("a1", tenant="a", arrival=2, blocks=3),
        sequence("a2", tenant="a", arrival=3, blocks=3),
        sequence("b", tenant="b", arrival=4, blocks=50),
        shares={"a": TenantShare(max_blocks_share=0.1)},
    )
    a0, _, a2, b = made.all()
    assert not made.may_grow(a0, 1) and made.may_grow(b, 1)
    assert made.choose_victim(a0) is a2
    made.preempt("a2", 0.0).block_table = []
    assert made.may_grow(a0, 3) and not made.may_grow(a0, 4)
    made.preempt("a1", 0.0).block_table = []
    assert made.may_grow(a0, 50), "the share may have been lowered since it was admitted"


# -- the way back -------------------------------------------------------------------------------------------------


def test_it_returns_before_those_of_its_level_that_have_not_begun_and_fills_up_to_its_last_token() -> None:
    made = scheduler(sequence("a", arrival=5, num_output=3), sequence("b", arrival=1))
    made.add_waiting("older", arrival=2, now=0.0, num_prompt=4, max_tokens=4)
    assert made.preempt("a", 1.0) is made.get("a")
    assert [item.key for item in made.all()] == ["b"] and made.num_preemptions == 1
    again = back(made, now=1.0)
    assert (again.key, again.phase, again.num_tokens) == ("a", Phase.FILLING, 13)
    again.phase, again.work = Phase.TAIL, (0, 13)
    row = made.next_rows(100)[-1]
    assert row == Row(sequence=again, start=0, stop=13, sample=True) and row.token_ids() == [5] * 10 + [7] * 3


def test_a_more_urgent_one_goes_before_it_a_less_urgent_one_does_not_overtake_it() -> None:
    made = scheduler(sequence("a", arrival=1, priority=1), age_s=1000.0)
    made.preempt("a", 0.0).block_table = []
    made.add_waiting("same", arrival=0, now=0.0, num_prompt=4, max_tokens=4, priority=0)
    made.add_waiting("urgent", arrival=2, now=0.0, num_prompt=4, max_tokens=4, priority=-1)
    made.add_waiting("later", arrival=3, now=0.0, num_prompt=4, max_tokens=4, priority=1)
    urgent = made.next_to_admit(0.0, lambda waiting: waiting.sequence is None)
    assert urgent is not None and urgent.key == "urgent"
    # Being preempted counted as one age_s, so it is as urgent as "same" now, and reserved.
    assert made.next_to_admit(0.0, lambda waiting: waiting.sequence is None) is None
    assert back(made).key == "a"


def test_pages_for_one_more_token_at_first_and_for_ever_more_progress_later() -> None:
    item = sequence("a", max_tokens=500, num_output=2)
    made = scheduler(item, max_preemptions=2, progress_tokens=64)
    wanted = []
    for _ in range(6):
        made.preempt("a", 0.0)
        wanted.append(made.waiting()[0].num_tokens)
        back(made)
    assert wanted == [12 + 1, 12 + 64, 12 + 128, 12 + 256, 510, 510], "never more than it may need at all"


def test_protected_until_it_has_got_on() -> None:
    item, needs = sequence("a", arrival=2), sequence("needs", arrival=1)
    made = scheduler(needs, item, max_preemptions=1, progress_tokens=8)
    assert made.choose_victim(needs) is item
    made.preempt("a", 0.0)
    back(made)
    assert item.protected_until == len(item.output) + 8
    assert made.choose_victim(needs) is needs
    item.output += [7] * 7
    assert made.choose_victim(needs) is needs
    item.output.append(7)
    assert made.choose_victim(needs) is item


def test_a_protected_one_that_needs_a_page_all_the_same_takes_it_from_an_earlier_one_before_it_gives_way() -> None:
    item, other = sequence("a", arrival=2), sequence("other", arrival=1)
    made = scheduler(other, item, max_preemptions=1, progress_tokens=8)
    made.preempt("a", 0.0)
    back(made)
    assert made.choose_victim(item) is other
    other.protected_until = 100
    assert made.choose_victim(item) is item


def test_a_more_urgent_level_may_take_a_protected_one_but_each_time_lifts_it_by_one() -> None:
    item, needs = sequence("a", arrival=2, priority=3), sequence("needs", arrival=1)
    made = scheduler(needs, item, max_preemptions=1, progress_tokens=8)
    for _ in range(3):
        assert made.choose_victim(needs) is item
        made.preempt("a", 0.0)
        back(made)
    assert made.choose_victim(needs) is needs


def test_it_takes_no_place_from_new_ones_in_the_queue_and_is_held_no_more() -> None:
    item = sequence("a", tenant="a")
    item.is_held = True
    made = scheduler(item, max_waiting=1, shares={"a": TenantShare(max_waiting=1)})
    made.preempt("a", 0.0)
    made.add_waiting("new", arrival=1, now=0.0, num_prompt=4, max_tokens=4, tenant="a")
    assert not back(made).is_held


def test_cancelled_while_preempted() -> None:
    item = sequence("a", num_output=4)
    made = scheduler(item, output_weight=2.0)
    made.preempt("a", 0.0)
    assert made.remove("a") is item and item.phase is Phase.ENDED
    assert not made.waiting() and made.get("a") is None
    assert made.service("") == 10 + 2 * 4


def test_coming_back_is_not_charged_again() -> None:
    made = scheduler(sequence("a", num_output=4), output_weight=2.0)
    made.preempt("a", 0.0)
    back(made)
    assert made.service("") == 10 + 2 * 4


# -- for a request that waits -------------------------------------------------------------------------------------


class Pool:
    """A scheduler with so many free blocks around it. `ask` is what a worker does when a request comes and before each
    step."""

    def __init__(self, *sequences: Sequence, free: int = 0, spare: int = 0, **policy: Any) -> None:
        self.made, self.free, self.spare = scheduler(*sequences, **policy), free, spare
        self.gave_way: list[str] = []
        self.is_slow = False  # pages come free later
        self.shared: frozenset[int] = frozenset()
        self.found: Waiting | None = None

    def wait(self, key: str, *, blocks: int, priority: int = 0, arrival: int = 50, now: float = 0.0) -> None:
        self.made.add_waiting(
            key, arrival=arrival, now=now, num_prompt=16 * blocks - 1, max_tokens=1, priority=priority
        )

    def ask(self, now: float = 0.0) -> str | None:
        def lacks(waiting: Waiting) -> Lack:
            missing = self.blocks(waiting) - self.free
            return Lack(blocks=lambda num_left: missing + self.spare * num_left, shared=self.shared)

        self.found = self.made.next_to_admit(now, self.has_room, lacks=lacks, spill=self.spill)
        self.made.check_integrity()
        return None if self.found is None else self.found.key

    def blocks(self, waiting: Waiting) -> int:
        return -(-waiting.num_tokens // 16) - len(self.shared)

    def has_room(self, waiting: Waiting) -> bool:
        return self.blocks(waiting) + self.spare * len(self.made) <= self.free

    def spill(self, item: Sequence) -> None:
        self.gave_way.append(item.key)
        if not self.is_slow:
            self.give_back(item)

    def give_back(self, item: Sequence) -> None:
        held = {block for other in self.made.all() for block in other.block_table}
        self.free += len(set(item.block_table) - held - self.shared)
        item.block_table = []


def test_a_more_urgent_arrival_takes_the_pages_of_the_least_urgent_and_no_more_than_it_needs() -> None:
    pool = Pool(*(sequence(str(p), arrival=p, priority=p, blocks=4) for p in range(4)), free=1)
    pool.wait("urgent", blocks=6, priority=1)
    assert pool.ask() == "urgent"
    assert pool.gave_way == ["3", "2"] and pool.free == 9


def test_among_equals_nobody_gives_way_however_long_one_waits() -> None:
    pool = Pool(sequence("a", arrival=1, priority=2), free=0, age_s=1.0)
    pool.wait("same", blocks=2, priority=2)
    assert pool.ask(now=1000.0) is None
    pool.wait("less urgent", blocks=2, priority=3)
    assert pool.ask(now=2000.0) is None and pool.gave_way == []


def test_levels_gained_by_waiting_protect_who_is_admitted() -> None:
    waited = sequence("waited", arrival=1, priority=2)
    waited.waited_s = 2.0
    pool = Pool(waited, age_s=1.0)
    pool.wait("urgent", blocks=2)
    assert pool.ask() is None and pool.gave_way == []


def test_nobody_gives_way_for_what_fits_or_when_it_would_not_be_enough() -> None:
    pool = Pool(sequence("batch", priority=5), sequence("urgent too", arrival=1), free=2)
    pool.wait("small", blocks=2)
    assert pool.ask() == "small" and pool.gave_way == []
    pool.wait("large", blocks=7)
    assert pool.ask() is None and pool.gave_way == [], "the 4 of one and the 2 that are free"
    pool.free = 3
    assert pool.ask() == "large" and pool.gave_way == ["batch"]


def test_what_is_not_for_want_of_pages_costs_nobody_his() -> None:
    made = scheduler(sequence("batch", priority=5))
    made.add_waiting("urgent", arrival=9, now=0.0, num_prompt=4, max_tokens=4)
    assert made.next_to_admit(0.0, lambda waiting: False, lacks=lambda waiting: None) is None
    assert len(made) == 1


def test_only_the_first_in_order_is_made_room_for() -> None:
    """Or who needs little would take from others what the first one waits for."""
    pool = Pool(sequence("batch", priority=5), sequence("urgent too", arrival=1, blocks=6))
    pool.wait("first", blocks=8, priority=0)
    pool.wait("second", blocks=2, priority=1, arrival=51)
    assert pool.ask() is None and pool.gave_way == []


def test_the_spare_blocks_of_who_stays_are_counted() -> None:
    pool = Pool(*(sequence(str(p), arrival=p, priority=p, blocks=4) for p in range(4)), free=4, spare=2)
    pool.wait("urgent", blocks=6)
    assert pool.ask() == "urgent" and pool.gave_way == ["3", "2"], "6 and 2 for each of two that stay"


def test_shared_pages_come_free_with_their_last_holder_and_not_at_all_if_the_arrival_shares_them() -> None:
    one, two = sequence("one", arrival=2, priority=1), sequence("two", arrival=1, priority=1)
    one.block_table, two.block_table = [1, 2, 3, 4], [1, 2, 3, 9]
    pool = Pool(one, two)
    pool.wait("urgent", blocks=2)
    assert pool.ask() == "urgent" and pool.gave_way == ["one", "two"]
    one, two = sequence("one", arrival=2, priority=1), sequence("two", arrival=1, priority=1)
    one.block_table, two.block_table = [1, 2, 3, 4], [1, 2, 3, 9]
    pool = Pool(one, two)
    pool.shared = frozenset({1, 2, 3})
    pool.wait("urgent", blocks=6)
    assert pool.ask() is None and pool.gave_way == [], "it lacks 3, and gets 4 and 9 at most"


def test_pinned_pages_are_waited_for_and_nobody_takes_them_meanwhile() -> None:
    batch, other = sequence("batch", arrival=1, priority=5, blocks=4), sequence("other", arrival=2, blocks=1)
    pool = Pool(batch, other, free=1)
    batch.pins = 1
    pool.wait("urgent", blocks=3)
    pool.wait("small", blocks=1, arrival=51)
    assert pool.made.may_preempt_for_waiting()
    assert pool.ask() is None and pool.gave_way == []
    batch.pins = 0
    assert pool.ask() == "urgent" and pool.gave_way == ["batch"]
    assert pool.ask() == "small"


def test_who_is_not_pinned_gives_way_before_who_is() -> None:
    pinned, loose = sequence("pinned", arrival=1, priority=5), sequence("loose", arrival=2, priority=4)
    pool = Pool(pinned, loose)
    pinned.pins = 1
    pool.wait("urgent", blocks=4)
    assert pool.ask() == "urgent" and pool.gave_way == ["loose"]


def test_pages_on_their_way_are_waited_for() -> None:
    batch, more = sequence("batch", arrival=2, priority=5), sequence("more", arrival=1, priority=5)
    pool = Pool(batch, more)
    pool.is_slow = True
    pool.wait("urgent", blocks=4)
    assert pool.ask() is None and pool.gave_way == ["batch"]
    assert pool.ask() is None and pool.gave_way == ["batch"], "one is enough"
    pool.give_back(batch)
    assert pool.ask() == "urgent"


def test_who_gave_way_comes_back_after_the_arrival_one_level_higher() -> None:
    batch = sequence("batch", arrival=1, priority=1)
    pool = Pool(batch, age_s=10.0)
    pool.wait("urgent", blocks=4)
    assert pool.ask() == "urgent", "the other one would be reserved, and first, had it gained a level already"
    pool.free = 4
    assert pool.ask() == "batch"
    batch.block_table = [1, 2, 3, 4]
    pool.made.add(batch, pool.found)
    assert batch.waited_s == 10.0 and not pool.made.may_preempt_for_waiting()


@pytest.mark.parametrize("max_preemptions", [0, 1, 3])
def test_nobody_gives_way_to_arrivals_more_often_than_max_preemptions(max_preemptions: int) -> None:
    batch = sequence("batch", arrival=1, priority=100)
    pool = Pool(batch, max_preemptions=max_preemptions, age_s=1000.0)
    for number in range(6):
        pool.wait(f"urgent {number}", blocks=4, arrival=50 + number)
        admitted = pool.ask()
        if admitted is None:
            break
        pool.free = 4
        back(pool.made)
        pool.free = 0
    assert len(pool.gave_way) == max_preemptions
    assert not pool.made.may_preempt_for_waiting()


# -- a step's pages -----------------------------------------------------------------------------------------------


def test_blocks_that_rows_lack_the_least_likely_victim_first() -> None:
    made = scheduler(
        sequence("late", arrival=3, blocks=1, num_output=7),  # its 17th token is the next
        sequence("early", arrival=2, blocks=1, num_output=7),
        sequence("has", arrival=1, blocks=1, num_output=6),
    )
    late, early, _ = made.all()
    assert made.blocks_needed(made.next_rows(0)) == [(early, 1), (late, 1)]
    early.block_table, early.phase, early.work = [], Phase.FILLING, (0, 17)
    assert (early, 2) in made.blocks_needed(made.next_rows(100))


def test_rows_with_pages_preempts_as_many_as_it_takes_and_no_more() -> None:
    made = scheduler(*(sequence(str(i), arrival=i, blocks=1, num_output=7) for i in range(4)))
    free, spilled = [77], []

    def grow(item: Sequence, num_blocks: int) -> bool:
        if len(free) < num_blocks:
            return False
        item.block_table += [free.pop() for _ in range(num_blocks)]
        return True

    def spill(item: Sequence) -> None:
        spilled.append(item.key)
        free.extend(item.block_table)
        item.block_table = []

    rows = made.rows_with_pages(made.next_rows(0), 0.0, grow=grow, spill=spill)
    assert [row.sequence.key for row in rows] == ["0", "1"] and spilled == ["3", "2"]
    assert all(len(row.sequence.block_table) == 2 for row in rows)
    assert free == [2000]


def test_a_row_whose_page_is_still_on_its_way_waits_for_another_step() -> None:
    made = scheduler(*(sequence(str(i), arrival=i, blocks=1, num_output=7) for i in range(4)))
    spilled: list[Sequence] = []
    for _ in range(3):
        rows = made.rows_with_pages(made.next_rows(0), 0.0, grow=lambda *_: False, spill=spilled.append)
        assert rows == [] and [item.key for item in spilled] == ["3"], "one victim, however often it is asked"
