"""Which chunk is refined next: within the budget, the worst first, and as far as all can go."""

from __future__ import annotations

import math
from collections import Counter

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from decode.refine import REFINEMENT_OVERHEAD, Ladder, next_step

SIZES = {"lossless": 1_100_000.0, "q1": 138_000.0, "q2": 60_000.0, "q3": 22_000.0}
LEVELS = tuple(SIZES)
NESTED = frozenset({"q1", "q2", "q3"})
LADDER = Ladder(levels=LEVELS, chunk_bytes=SIZES, nested=NESTED)


def climb(ladder: Ladder, chunks: list[str], budget: float) -> tuple[list[str], float, set[int]]:
    """Take every step that is offered. The levels then, what is left of the budget, and who was raised."""
    levels, raised = list(chunks), set()
    for _ in range(len(chunks) * len(ladder.levels) + 1):
        step = next_step(ladder, Counter(levels), budget)
        if step is None:
            return levels, budget, raised
        have, level = step
        assert ladder.levels.index(level) < ladder.levels.index(have), "not better"
        assert have == max(levels, key=lambda at: -1 if at not in ladder.levels else ladder.levels.index(at))
        index = levels.index(have)
        budget -= ladder.step_bytes(have, level)
        assert budget >= -1e-6, "more than there was"
        levels[index] = level
        raised.add(index)
    raise AssertionError("it never ends")


def test_a_nested_step_sends_the_difference_and_any_other_the_whole() -> None:
    assert LADDER.step_bytes("q3", "q1") == pytest.approx(116_000 * REFINEMENT_OVERHEAD)
    assert LADDER.step_bytes("q1", "lossless") == 1_100_000
    assert LADDER.is_nested("q3", "q1") and not LADDER.is_nested("q1", "lossless")


def test_sizes_that_contradict_the_order_cost_nothing_and_not_less() -> None:
    odd = Ladder(levels=("q1", "q3"), chunk_bytes={"q1": 10.0, "q3": 20.0}, nested=NESTED)
    assert odd.step_bytes("q3", "q1") == 0.0


@pytest.mark.parametrize(
    ("counts", "budget", "expected"),
    [
        ({}, 1e9, None),
        ({"q3": 0, "q2": 0}, 1e9, None),
        ({"lossless": 5}, 1e9, None),  # the top
        ({"raw": 5}, 1e9, None),  # better than the ladder, or not of it
        ({"q3": 4}, 38_000, None),  # 38,760 are needed
        ({"q3": 4}, 39_000, ("q3", "q2")),  # one of them
        ({"q3": 4}, 4 * 39_000, ("q3", "q2")),  # all of them
        ({"q3": 4}, 4 * 39_000 + 80_000, ("q3", "q1")),  # all to q2, and this one further
        ({"q3": 1, "q2": 3}, 100_000, ("q3", "q2")),
        ({"q3": 1, "q2": 3}, 120_000, ("q3", "q1")),  # q2 for all, q1 for this one
        ({"q2": 3}, 80_000, ("q2", "q1")),
        ({"q3": 1, "q2": 3}, 1e9, ("q3", "lossless")),  # all to the top, and not by way of q2
        ({"q3": 1, "raw": 9}, 1e9, ("q3", "lossless")),
        ({"q1": 2}, math.inf, ("q1", "lossless")),
        ({"q1": 2}, 0.0, None),
        ({"q1": 2}, -5.0, None),
    ],
)
def test_by_hand(counts: dict[str, int], budget: float, expected: tuple[str, str] | None) -> None:
    assert next_step(LADDER, counts, budget) == expected


def test_an_order_of_levels_of_its_own() -> None:
    """After the first token the ladder may end below the level that some chunks came at."""
    ladder = Ladder(levels=("q2", "q3"), chunk_bytes=SIZES, nested=NESTED)
    assert next_step(ladder, {"q1": 3, "q2": 1}, math.inf) is None
    assert next_step(ladder, {"q1": 3, "q3": 1}, math.inf) == ("q3", "q2")


@st.composite
def ladders(draw: st.DrawFn) -> Ladder:
    """Any sizes that grow with quality; the coarser levels nest."""
    steps = draw(st.lists(st.floats(1.0, 1e6), min_size=2, max_size=6))
    sizes = [sum(steps[: index + 1]) for index in range(len(steps))][::-1]
    names = [f"l{index}" for index in range(len(sizes))]
    num_exact = draw(st.integers(0, 1))
    return Ladder(levels=names, chunk_bytes=dict(zip(names, sizes)), nested=frozenset(names[num_exact:]))


@st.composite
def cases(draw: st.DrawFn) -> tuple[Ladder, list[str], float]:
    ladder = draw(ladders())
    chunks = draw(st.lists(st.sampled_from([*ladder.levels, "not of the ladder"]), max_size=12))
    most = sum(ladder.chunk_bytes.get(ladder.levels[0], 0.0) for _ in chunks)
    return ladder, chunks, draw(st.floats(0.0, 1.2)) * most


@given(case=cases())
@example(case=(LADDER, ["q3"] * 3 + ["q2"] * 2, 4e5))
def test_all_rise_as_far_as_all_can_and_only_then_some_a_step_further(case: tuple[Ladder, list[str], float]) -> None:
    ladder, chunks, budget = case
    order = list(ladder.levels)
    rank = lambda level: order.index(level) if level in order else 0  # noqa: E731
    levels, left, raised = climb(ladder, chunks, budget)
    assert left >= -1e-6
    assert all(before == after for i, (before, after) in enumerate(zip(chunks, levels)) if i not in raised)
    worst = max(map(rank, levels), default=0)
    # Brute force: the best level that everything below it can be brought to.
    reachable = [
        target
        for target, name in enumerate(order)
        if sum(ladder.step_bytes(level, name) for level in chunks if rank(level) > target) <= budget * (1 - 1e-9)
    ]
    assert worst <= min([*reachable, len(order) - 1]), (worst, reachable)
    # Nobody was raised by more than a step above those who had to stay.
    assert all(rank(levels[i]) >= worst - 1 for i in raised)
    # Nothing that the worst could still get is affordable.
    if worst > 0:
        assert ladder.step_bytes(order[worst], order[worst - 1]) > left - 1e-6


@given(count=st.integers(1, 40), share=st.floats(0.0, 1.1))
def test_from_one_level_the_budget_buys_as_many_steps_as_it_can(count: int, share: float) -> None:
    """Nested levels: first all of them to q2, then to q1, one after another, and no byte is lost on the way."""
    ladder = Ladder(levels=("q1", "q2", "q3"), chunk_bytes=SIZES, nested=NESTED)
    first, second = ladder.step_bytes("q3", "q2"), ladder.step_bytes("q2", "q1")
    budget = share * count * (first + second) + 1e-3
    levels, _, _ = climb(ladder, ["q3"] * count, budget)
    to_q2 = min(count, int(budget // first))
    to_q1 = min(count, int((budget - count * first) // second)) if to_q2 == count else 0
    assert Counter(levels) == +Counter({"q3": count - to_q2, "q2": to_q2 - to_q1, "q1": to_q1})
