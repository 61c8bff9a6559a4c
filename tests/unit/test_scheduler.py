"""Which rows a step computes: all running ones, then prompts by deadline within a budget, in order and once each."""

from __future__ import annotations

import random

import pytest

from decode.requests import GenerationRequest
from decode.scheduler import Phase, Row, Scheduler, Sequence


def sequence(key: str, *, num_prompt: int = 10, deadline: float = 0.0, arrival: int = 0) -> Sequence:
    request = GenerationRequest(request_id=key, token_ids=tuple(range(100, 100 + num_prompt)))
    return Sequence(key=key, request=request, block_table=[], deadline=deadline, arrival=arrival)


def scheduler(*sequences: Sequence) -> Scheduler:
    made = Scheduler()
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


def test_running_sequences_are_never_cut() -> None:
    assert len(scheduler(*(running(str(i), 7) for i in range(50))).next_rows(0)) == 50


def test_the_earliest_deadline_goes_first_then_the_first_come() -> None:
    made = scheduler(
        working("late", 0, 8, deadline=2.0, arrival=1),
        working("second", 0, 8, deadline=1.0, arrival=3),
        working("first", 0, 8, deadline=1.0, arrival=2),
    )
    assert spans(made.next_rows(20)) == [
        ("first", 0, 8, False),
        ("second", 0, 8, False),
        ("late", 0, 4, False),
    ]


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
