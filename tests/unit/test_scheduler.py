"""Which rows a step computes: running ones, all or in turn, then prompts by urgency within a budget, once each."""

from __future__ import annotations

import random

import pytest

from decode.requests import GenerationRequest
from decode.scheduler import Phase, Row, Scheduler, SchedulingPolicy, Sequence


def sequence(key: str, *, num_prompt: int = 10, deadline: float = 0.0, arrival: int = 0, priority: int = 0) -> Sequence:
    request = GenerationRequest(request_id=key, token_ids=tuple(range(100, 100 + num_prompt)))
    return Sequence(key=key, request=request, block_table=[], deadline=deadline, arrival=arrival, priority=priority)


def scheduler(*sequences: Sequence, **policy) -> Scheduler:
    made = Scheduler(SchedulingPolicy(**policy))
    for item in sequences:
        made.add(item)
    return made


def spans(rows: list[Row]) -> list[tuple[str, int, int, bool]]:
    return [(row.sequence.key, row.start, row.stop, row.sample) for row in rows]


def running(key: str, *output: int) -> Sequence:
    made = sequence(key)
    made.phase, made.output = Phase.RUNNING, list(output)
    return made


def working(key: str, start: int, stop: int, *, phase: Phase = Phase.FILLING, **options) -> Sequence:
    made = sequence(key, num_prompt=stop, **options)
    made.phase, made.work = phase, (start, stop)
    return made


def test_who_waits_for_chunks_has_no_row() -> None:
    assert scheduler(sequence("a")).next_rows(100) == []


def test_a_running_sequence_computes_its_last_token() -> None:
    rows = scheduler(running("a", 7, 8)).next_rows(100)
    assert spans(rows) == [("a", 11, 12, True)]
    assert rows[0].token_ids() == [8]


def test_a_held_sequence_has_no_row_until_it_is_let_go() -> None:
    """Of a plan that is followed: the next token waits for pages to be refined."""
    held, other = running("held", 7), running("other", 7)
    made = scheduler(held, other)
    held.is_held = True
    assert spans(made.next_rows(100)) == [("other", 10, 11, True)]
    assert made.is_any_running
    held.is_held = False
    assert spans(made.next_rows(100)) == [("held", 10, 11, True), ("other", 10, 11, True)]


def test_holding_stops_tokens_only_and_not_the_prompt() -> None:
    tail = working("tail", 4, 10, phase=Phase.TAIL)
    tail.is_held = True
    assert spans(scheduler(tail).next_rows(100)) == [("tail", 4, 10, True)]


def test_nothing_held_is_left_to_spin_on() -> None:
    held = running("held", 7)
    held.is_held = True
    assert scheduler(held).next_rows(100) == []


def test_work_before_is_what_has_an_earlier_deadline() -> None:
    mine = working("mine", 0, 8, deadline=2.0, arrival=5)
    made = scheduler(
        mine,
        working("sooner", 3, 9, deadline=1.0, arrival=9),
        working("as soon, came first", 0, 4, deadline=2.0, arrival=4),
        working("as soon, came later", 0, 5, deadline=2.0, arrival=6),
        working("later", 0, 6, deadline=3.0, arrival=1),
        sequence("nothing to do", deadline=0.0),
        running("running", 7),
    )
    assert sorted(made.work_before(mine)) == [(0, 4), (3, 9)]
    assert made.work_before(sequence("who waits", deadline=2.0, arrival=5)) == made.work_before(mine)


def test_work_before_shrinks_as_it_is_done() -> None:
    mine, other = working("mine", 0, 8, deadline=2.0), working("other", 0, 10, deadline=1.0)
    made = scheduler(mine, other)
    made.computed(made.next_rows(4)[0])
    assert made.work_before(mine) == [(4, 10)] and made.work_before(other) == []
    made.remove("other")
    assert made.work_before(mine) == []


@pytest.mark.parametrize("seed", range(10))
def test_work_before_is_what_next_rows_takes_first(seed: int) -> None:
    rng = random.Random(seed)
    items = [working(str(i), 0, rng.randint(1, 50), deadline=rng.choice([1.0, 2.0, 3.0]), arrival=i) for i in range(10)]
    made = scheduler(*items)
    rows = made.next_rows(10**6)
    for place, row in enumerate(rows):
        before = [(earlier.start, earlier.stop) for earlier in rows[:place]]
        assert sorted(made.work_before(row.sequence)) == sorted(before)


def test_running_sequences_are_never_cut() -> None:
    assert len(scheduler(*(running(str(i), 7) for i in range(50))).next_rows(0)) == 50


def test_the_earliest_deadline_goes_first_then_the_first_come() -> None:
    made = scheduler(
        working("late", 0, 8, deadline=2.0, arrival=1),
        working("second", 0, 8, deadline=1.0, arrival=3),
        working("first", 0, 8, deadline=1.0, arrival=2),
    )
    assert spans(made.next_rows(24)) == [
        ("first", 0, 8, False),
        ("second", 0, 8, False),
        ("late", 0, 8, False),
    ]


def test_the_more_urgent_level_goes_before_the_earlier_deadline() -> None:
    made = scheduler(
        working("soon", 0, 8, deadline=1.0, priority=1, arrival=1),
        working("urgent", 0, 8, deadline=2.0, priority=0, arrival=2),
        age_s=5.0,
    )
    assert [row.sequence.key for row in made.next_rows(100)] == ["urgent", "soon"]
    waited = made.get("soon")
    assert waited is not None
    waited.waited_s = 5.0  # a level gained in the queue
    assert [row.sequence.key for row in made.next_rows(100)] == ["soon", "urgent"]
    assert made.work_before(made.get("urgent")) == [(0, 8)]  # type: ignore[arg-type]


def test_a_piece_is_not_cut_below_the_minimum_unless_it_is_the_first_of_the_step() -> None:
    made = scheduler(
        working("long", 0, 100, arrival=1),
        working("longer", 0, 200, arrival=2),
        working("short", 0, 20, arrival=3),
        min_slice_tokens=32,
    )
    assert spans(made.next_rows(131)) == [("long", 0, 100, False), ("short", 0, 20, False)]
    assert spans(made.next_rows(132)) == [("long", 0, 100, False), ("longer", 0, 32, False)]
    assert spans(made.next_rows(10)) == [("long", 0, 10, False)], "a small budget is better used than not"
    assert spans(made.next_rows(0)) == []


def test_more_running_sequences_than_rows_take_turns() -> None:
    made = scheduler(*(running(str(i), 7) for i in range(7)), max_rows=3)
    seen = [tuple(row.sequence.key for row in made.next_rows(0)) for _ in range(7)]
    assert seen[:3] == [("0", "1", "2"), ("3", "4", "5"), ("0", "1", "6")]
    for i in range(7 - 2):
        assert len({key for keys in seen[i : i + 3] for key in keys}) == 7, "each within ceil(7 / 3) steps"


def test_who_joins_does_not_push_in_and_a_held_one_takes_no_turn() -> None:
    made = scheduler(*(running(str(i), 7) for i in range(4)), max_rows=2)
    made.next_rows(0)
    tail = working("new", 0, 10, phase=Phase.TAIL)
    made.add(tail)
    assert [row.sequence.key for row in made.next_rows(100)] == ["2", "3", "new"]
    made.computed(Row(sequence=tail, start=0, stop=10, sample=True))
    tail.phase, tail.output = Phase.RUNNING, [7]
    assert [row.sequence.key for row in made.next_rows(0)] == ["0", "1"]
    held = made.get("2")
    assert held is not None
    held.is_held = True
    assert [row.sequence.key for row in made.next_rows(0)] == ["3", "new"]


def test_a_row_of_a_preempted_sequence_runs_over_prompt_and_output() -> None:
    item = sequence("a", num_prompt=3)
    item.output = [7, 8, 9]
    assert Row(sequence=item, start=1, stop=5, sample=False).token_ids() == [101, 102, 7, 8]
    assert Row(sequence=item, start=3, stop=6, sample=True).token_ids() == [7, 8, 9]
    assert Row(sequence=item, start=0, stop=3, sample=False).token_ids() == [100, 101, 102]
    with pytest.raises(AssertionError):
        Row(sequence=item, start=5, stop=7, sample=True).token_ids()


@pytest.mark.parametrize(("budget", "stop", "samples"), [(4, 8, False), (6, 10, True), (100, 10, True)])
def test_only_the_end_of_the_tail_samples(budget: int, stop: int, samples: bool) -> None:
    (row,) = scheduler(working("a", 4, 10, phase=Phase.TAIL)).next_rows(budget)
    assert (row.stop, row.sample) == (stop, samples)
    assert row.token_ids() == list(range(104, 100 + stop))


def test_work_goes_on_where_it_stopped() -> None:
    item = working("a", 0, 10)
    made = scheduler(item)
    ends = []
    while item.work is not None:
        (row,) = made.next_rows(4)
        ends.append((row.start, row.stop, made.computed(row)))
    assert ends == [(0, 4, False), (4, 8, False), (8, 10, True)]


def test_what_is_removed_is_ended_and_gone() -> None:
    item = working("a", 0, 10)
    made = scheduler(item, running("b", 1))
    made.remove("a")
    assert item.phase is Phase.ENDED and made.get("a") is None and len(made) == 1
    assert spans(made.next_rows(100)) == [("b", 10, 11, True)]


@pytest.mark.parametrize("seed", range(20))
def test_every_prompt_is_computed_once_and_in_order(seed: int) -> None:
    rng = random.Random(seed)
    items = [
        working(str(i), 0, rng.randint(1, 200), phase=Phase.TAIL, deadline=rng.random(), arrival=i)
        for i in range(rng.randint(1, 12))
    ]
    made, done = scheduler(*items), {item.key: 0 for item in items}
    for _ in range(1000):
        budget = rng.randint(1, 64)
        rows = made.next_rows(budget)
        prompt_rows = [row for row in rows if row.sequence.phase is Phase.TAIL]
        assert sum(row.stop - row.start for row in prompt_rows) <= budget
        assert len({row.sequence.key for row in rows}) == len(rows)
        for row in prompt_rows:
            assert row.start == done[row.sequence.key]
            done[row.sequence.key] = row.stop
            assert row.sample == made.computed(row)
            if row.sample:
                row.sequence.phase = Phase.RUNNING
                row.sequence.output.append(1)
        if all(item.phase is Phase.RUNNING for item in items):
            break
    assert done == {item.key: len(item.request.token_ids) for item in items}
