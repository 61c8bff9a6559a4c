"""Engines over one model: passes take turns, and each engine's answers are its own."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

from pair import LATEST_S, make_runtime, until

from prefill.engine import generate_greedy
from prefill.turns import Turns


def test_who_asks_first_is_first_and_nobody_goes_twice_while_another_waits() -> None:
    turns, order = Turns(), []

    def take(name: str, times: int) -> None:
        for _ in range(times):
            with turns.turn():
                order.append(name)

    with turns.turn() as waited_s:
        assert waited_s == 0.0
        threads = [threading.Thread(target=take, args=(name, 5), daemon=True) for name in "ab"]
        for number, thread in enumerate(threads):
            thread.start()
            until(lambda number=number: turns._next_ticket == number + 2)
    for thread in threads:
        thread.join(LATEST_S)
    assert sorted(order) == list("aaaaabbbbb")
    assert order[:2] == ["a", "b"]


def test_a_turn_that_fails_is_given_back() -> None:
    turns = Turns()
    for _ in range(2):
        try:
            with turns.turn():
                raise ValueError
        except ValueError:
            continue
    with turns.turn() as waited_s:
        assert waited_s == 0.0


def test_two_engines_over_one_model_give_the_tokens_of_each_alone() -> None:
    first = make_runtime(num_blocks=64)
    second = first.with_pool(32)
    assert second.model is first.model and second.pool.num_blocks == second.allocator.num_blocks == 32
    prompts = [[3 + (7 * i + j) % 400 for j in range(200)] for i in range(4)]
    expected = [generate_greedy(first.engine, first.allocator, tokens, 20, chunk_tokens=32) for tokens in prompts]

    def run(runtime, tokens):  # type: ignore[no-untyped-def]
        return [generate_greedy(runtime.engine, runtime.allocator, each, 20, chunk_tokens=32) for each in tokens]

    with ThreadPoolExecutor(2) as threads:
        futures = [threads.submit(run, first, prompts), threads.submit(run, second, prompts[::-1])]
        assert futures[0].result(LATEST_S) == expected
        assert futures[1].result(LATEST_S) == expected[::-1]
    assert first.allocator.num_held == second.allocator.num_held == 0
