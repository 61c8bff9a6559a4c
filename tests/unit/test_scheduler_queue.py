"""Who is admitted next: priority and age, fairness between tenants, overtaking, quotas, refusals."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest

from decode.fair_share import FairShare
from decode.requests import GenerationRequest, RequestRefused, SamplingParams
from decode.scheduler import Phase, QueueRefused, Scheduler, SchedulingPolicy, Sequence, TenantShare, Waiting

EVER: Callable[[Waiting], bool] = lambda waiting: True  # noqa: E731
AGE_S = 10.0


class Queue:
    """A scheduler whose requests are only ever admitted and ended."""

    def __init__(self, *, num_blocks: int = 0, **policy: Any) -> None:
        self.scheduler = Scheduler(SchedulingPolicy(**{"age_s": AGE_S, **policy}), num_blocks=num_blocks)
        self.arrivals = 0

    def put(self, *keys: str, now: float = 0.0, num_prompt: int = 10, max_tokens: int = 10, **options: Any) -> None:
        for key in keys:
            self.arrivals += 1
            self.scheduler.add_waiting(
                key, arrival=self.arrivals, now=now, num_prompt=num_prompt, max_tokens=max_tokens, **options
            )

    def take(self, now: float = 0.0, has_room: Callable[[Waiting], bool] = EVER) -> str | None:
        waiting = self.scheduler.next_to_admit(now, has_room)
        if waiting is None:
            return None
        num_prompt = waiting.num_tokens - 1
        sampling = SamplingParams(max_tokens=waiting.max_total_tokens - num_prompt)
        request = GenerationRequest(
            request_id=waiting.key, token_ids=(1,) * num_prompt, tenant=waiting.tenant, sampling=sampling
        )
        made = Sequence(
            key=waiting.key, request=request, block_table=[], deadline=waiting.deadline, arrival=waiting.arrival
        )
        self.scheduler.add(made, waiting)
        self.scheduler.check_integrity()
        return waiting.key

    def take_all(self, now: float = 0.0, has_room: Callable[[Waiting], bool] = EVER) -> list[str]:
        return list(iter(lambda: self.take(now, has_room), None))  # type: ignore[arg-type]


def up_to(num_tokens: int) -> Callable[[Waiting], bool]:
    return lambda waiting: waiting.num_tokens <= num_tokens


# -- order --------------------------------------------------------------------------------------------------------


def test_first_come_first_served_when_nothing_else_tells_them_apart() -> None:
    queue = Queue()
    queue.put("a", "b", "c")
    assert queue.take_all() == ["a", "b", "c"]


def test_lower_priority_numbers_go_first_then_earlier_deadlines() -> None:
    queue = Queue()
    queue.put("later", priority=1, deadline=1.0)
    queue.put("lenient", priority=0, deadline=9.0)
    queue.put("strict", priority=0, deadline=2.0)
    queue.put("soonest", priority=-3, deadline=9.0)
    assert queue.take_all() == ["soonest", "strict", "lenient", "later"]


@pytest.mark.parametrize(("waited_s", "first"), [(2.9 * AGE_S, "new"), (3.0 * AGE_S, "old")])
def test_a_level_is_gained_for_each_age_s_waited(waited_s: float, first: str) -> None:
    queue = Queue()
    queue.put("old", priority=3, now=0.0)
    queue.put("new", priority=0, now=waited_s)
    assert queue.take(now=waited_s) == first


def test_age_lifts_no_one_above_the_best_priority_present() -> None:
    """Else a tenant that sent a thousand requests would be served before one that comes a little later."""
    queue = Queue()
    queue.put(*(f"a{i}" for i in range(100)), tenant="a")
    queue.put("b", tenant="b", now=5 * AGE_S)
    queue.take(now=5 * AGE_S)
    assert queue.take(now=5 * AGE_S) == "b"


def test_an_admitted_sequence_keeps_the_levels_that_it_gained() -> None:
    queue = Queue()
    queue.put("a", priority=3)
    assert queue.take(now=2.5 * AGE_S) == "a"
    sequence = queue.scheduler.get("a")
    assert sequence is not None and (sequence.priority, sequence.waited_s) == (3, 2.5 * AGE_S)


def test_removed_before_it_begins() -> None:
    queue = Queue()
    queue.put("a", "b")
    assert queue.scheduler.remove("a") is None
    assert queue.scheduler.get("b") is None
    assert queue.take_all() == ["b"]
    sequence = queue.scheduler.remove("b")
    assert sequence is not None and sequence.phase is Phase.ENDED
    with pytest.raises(KeyError):
        queue.scheduler.remove("b")


# -- fairness -----------------------------------------------------------------------------------------------------


def test_of_two_tenants_the_one_served_less_is_next() -> None:
    queue = Queue()
    queue.put("a0", "a1", "a2", tenant="a", num_prompt=30)
    queue.put("b0", "b1", "b2", "b3", tenant="b", num_prompt=10)
    # a: 30, 60, ...; b: 10, 20, 30, ...; equal ones by arrival.
    assert queue.take_all() == ["a0", "b0", "b1", "b2", "a1", "b3", "a2"]


def test_weights_divide_the_service() -> None:
    queue = Queue(shares={"b": TenantShare(weight=3.0)})
    queue.put(*(f"a{i}" for i in range(40)), tenant="a")
    queue.put(*(f"b{i}" for i in range(40)), tenant="b")
    taken = [queue.take() for _ in range(40)]
    assert sum(key is not None and key.startswith("b") for key in taken) == 30


def test_output_counts_as_it_is_drawn_and_once() -> None:
    queue = Queue(output_weight=2.0)
    queue.put("a0", "a1", tenant="a")
    queue.put("b0", "b1", tenant="b")
    assert [queue.take(), queue.take()] == ["a0", "b0"]
    sequence = queue.scheduler.get("a0")
    assert sequence is not None
    sequence.output += [1] * 5
    assert queue.scheduler.service("a") == queue.scheduler.service("a") == 10 + 2 * 5
    assert queue.take() == "b1"
    sequence.output += [1] * 3
    queue.scheduler.remove("a0")
    assert queue.scheduler.service("a") == 10 + 2 * 8


def test_time_without_requests_earns_nothing() -> None:
    queue = Queue()
    queue.put(*(f"a{i}" for i in range(50)), tenant="a")
    for _ in range(40):
        queue.take()
    queue.put(*(f"b{i}" for i in range(50)), tenant="b")
    taken = [str(queue.take())[0] for _ in range(10)]
    assert taken.count("a") == taken.count("b") == 5


def test_an_empty_queue_is_no_new_start() -> None:
    """The one who left last sets where a newcomer begins, so that neither gains by the other's absence."""
    queue = Queue()
    queue.put("a0", tenant="a", num_prompt=500)
    queue.take_all()
    queue.put("b0", "b1", tenant="b")
    queue.put("a1", tenant="a")
    assert queue.take_all() == ["b0", "a1", "b1"]


def test_service_of_many_tenants_is_forgotten_only_where_it_makes_no_difference(monkeypatch: Any) -> None:
    def served(most: int) -> tuple[list[str | None], int]:
        monkeypatch.setattr("decode.waiting_queue.MAX_TENANTS", most)
        rng, queue, taken = random.Random(3), Queue(), []
        for i in range(600):
            queue.put(str(i), tenant=str(rng.randrange(200)), num_prompt=rng.randint(1, 50))
            if i > 5:
                taken.append(queue.take())
                queue.scheduler.remove(str(taken[-1]))
        return taken, len(queue.scheduler._fair._counters)

    few, all_of_them = served(10), served(10_000)
    assert few[0] == all_of_them[0]
    assert few[1] < 100 < all_of_them[1]


# -- no room ------------------------------------------------------------------------------------------------------


def test_a_large_request_is_overtaken_so_many_times_and_then_by_none() -> None:
    queue = Queue(max_overtaken=3)
    queue.put("large", num_prompt=1000)
    queue.put(*(str(i) for i in range(10)))
    assert queue.take_all(has_room=up_to(100)) == ["0", "1", "2"]
    queue.put("another tenant's", tenant="b")
    assert queue.take(has_room=up_to(100)) is None
    assert queue.take() == "large"


def test_without_overtaking_the_first_keeps_all_others_waiting() -> None:
    queue = Queue(max_overtaken=0)
    queue.put("large", num_prompt=1000)
    queue.put("small")
    assert queue.take(has_room=up_to(100)) is None


def test_room_is_kept_from_the_same_level_and_below_but_not_from_more_urgent_ones() -> None:
    queue = Queue(max_overtaken=1)
    queue.put("large", num_prompt=1000, priority=1)
    queue.put("small 0", "small 1", priority=1)
    assert queue.take_all(has_room=up_to(100)) == ["small 0"]
    queue.put("urgent", priority=0)
    queue.put("small 2", priority=2)
    assert queue.take_all(has_room=up_to(100)) == ["urgent"]
    queue.put("urgent as well", priority=0, now=AGE_S)
    assert queue.take_all(now=AGE_S, has_room=up_to(100)) == [], "by then it is as urgent itself"
    assert queue.take(now=AGE_S) == "large"


def test_a_deferred_one_is_passed_freely_and_keeps_its_place() -> None:
    queue = Queue(max_overtaken=1, shares={"a": TenantShare(max_requests=50)})
    queue.put("deferred", tenant="a", deadline=-1.0)
    queue.put(*(str(i) for i in range(20)), tenant="a")
    scheduler, passed = queue.scheduler, []
    for _ in range(10):
        waiting = scheduler.next_to_admit(0.0, EVER, is_deferred=lambda item: item.key == "deferred")
        assert waiting is not None
        passed.append(waiting.key)
    assert passed == [str(i) for i in range(10)]
    assert scheduler.waiting()[0].overtaken == 0
    assert queue.take() == "deferred"


def test_a_search_asks_for_room_a_bounded_number_of_times() -> None:
    asked = []
    queue = Queue(max_overtaken=100)
    queue.put(*(str(i) for i in range(200)))
    assert queue.take(has_room=lambda waiting: bool(asked.append(waiting))) is None
    assert len(asked) <= 17


# -- quotas -------------------------------------------------------------------------------------------------------


def test_no_more_requests_of_a_tenant_than_it_may_have_at_once() -> None:
    queue = Queue(shares={"a": TenantShare(max_requests=2)})
    queue.put("a0", "a1", "a2", tenant="a")
    queue.put("b0", tenant="b")
    assert queue.take_all() == ["a0", "b0", "a1"]
    queue.scheduler.remove("a0")
    assert queue.take_all() == ["a2"]


def test_no_more_blocks_than_its_share_a_shared_prefix_counted_once() -> None:
    queue = Queue(num_blocks=100, shares={"a": TenantShare(max_blocks_share=0.1)})
    queue.put("a0", "a1", tenant="a", num_prompt=63, max_tokens=16)  # four blocks each, five at the end
    assert queue.take_all() == ["a0", "a1"]
    first, second = queue.scheduler.all()
    first.block_table, second.block_table = [1, 2, 3, 4], [1, 2, 3, 5]
    queue.put("a2", tenant="a", num_prompt=79, max_tokens=16)
    assert queue.take_all() == ["a2"], "5 held and 5 wanted of 10"
    queue.scheduler.all()[-1].block_table = [10, 11, 12, 13]  # 9 of 10: small would fit
    queue.put("large", tenant="a", num_prompt=63, max_tokens=16)
    queue.put("small", tenant="a", num_prompt=1)
    queue.put("b0", tenant="b", num_prompt=1000)
    assert queue.take_all() == ["b0"], "a tenant's own queue keeps its order"
    queue.scheduler.remove("a2")
    assert queue.take_all() == ["large", "small"]


def test_a_tenant_at_its_quota_is_not_owed_the_turns_it_could_not_take() -> None:
    queue = Queue(shares={"a": TenantShare(max_requests=1)})
    queue.put(*(f"a{i}" for i in range(10)), tenant="a")
    queue.put(*(f"b{i}" for i in range(40)), tenant="b")
    for _ in range(30):
        queue.take()
    queue.scheduler.set_shares({}, default=TenantShare())
    queue.scheduler.remove("a0")
    assert [str(queue.take())[0] for _ in range(8)].count("a") in (4, 5)


def test_a_lowered_share_does_not_keep_a_request_waiting_for_ever() -> None:
    queue = Queue(num_blocks=100)
    queue.put("a0", tenant="a", num_prompt=300)
    queue.scheduler.set_shares({"a": TenantShare(max_blocks_share=0.01)}, default=TenantShare())
    assert queue.take_all() == ["a0"]


@pytest.mark.parametrize(
    ("options", "code", "status"),
    [
        ({"tenant": "a"}, "tenant_overloaded", 429),
        ({"tenant": "b"}, "overloaded", 429),
        ({"tenant": "c", "num_prompt": 65, "max_tokens": 16}, "tenant_share_too_small", 400),
        ({"tenant": "c", "priority": 101}, "priority_out_of_range", 400),
        ({"tenant": "c", "priority": -101}, "priority_out_of_range", 400),
    ],
)
def test_refusals_are_typed_and_say_what_to_do(options: dict[str, Any], code: str, status: int) -> None:
    shares = {"a": TenantShare(max_waiting=2), "c": TenantShare(max_blocks_share=0.05)}
    queue = Queue(num_blocks=100, max_waiting=4, shares=shares)
    queue.put("a0", "a1", tenant="a")
    queue.put("b0", "b1", tenant="b")
    before = queue.scheduler.waiting()
    with pytest.raises(QueueRefused) as caught:
        queue.put("refused", **options)
    assert isinstance(caught.value, RequestRefused)
    assert (caught.value.code, caught.value.status) == (code, status)
    assert queue.scheduler.waiting() == before


def test_who_is_admitted_makes_room_in_the_queue() -> None:
    queue = Queue(shares={"a": TenantShare(max_waiting=1)})
    for i in range(5):
        queue.put(f"a{i}", tenant="a")
        assert queue.take() == f"a{i}"


@pytest.mark.parametrize(
    "mistake",
    [{"weight": 0}, {"weight": float("nan")}, {"max_requests": 0}, {"max_waiting": 0}, {"max_blocks_share": 1.5}],
)
def test_shares_that_make_no_sense(mistake: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(mistake))):
        TenantShare(**mistake)


@pytest.mark.parametrize("mistake", [{"age_s": 0}, {"max_overtaken": -1}, {"max_rows": 0}, {"min_slice_tokens": 0}])
def test_policies_that_make_no_sense(mistake: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(mistake))):
        SchedulingPolicy(**mistake)


def test_counters_never_fall() -> None:
    fair = FairShare({"a": TenantShare(weight=4.0)}, default=TenantShare())
    fair.charge("a", 100)
    fair.lift("a", 10.0)
    assert fair.counter("a") == 25.0
    fair.joined("b", ["a"])
    assert fair.counter("b") == 25.0
