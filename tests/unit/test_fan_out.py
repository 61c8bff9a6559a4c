"""Several runs merged: nothing before all have begun, one failure ends all, closing closes all."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

import pytest

from cluster.completion import Done
from cluster.detokenize import Piece
from cluster.fan_out import merge
from cluster.openai_errors import APIError


def piece(text: str) -> Piece:
    return Piece(text=text, token_ids=(1,))


DONE = Done(text="", finish_reason="stop", prompt_tokens=1, completion_tokens=1, receipt=None)


class Run:
    """Gives its items one by one, each when `steps` has a permit for it; notes its end."""

    def __init__(self, *items: Any) -> None:
        self.items, self.steps, self.is_closed = items, asyncio.Semaphore(0), False

    async def go(self) -> AsyncGenerator[Piece | Done, None]:
        try:
            for item in self.items:
                await self.steps.acquire()
                if isinstance(item, Exception):
                    raise item
                yield item
        finally:
            self.is_closed = True

    def step(self, num: int = 1) -> None:
        for _ in range(num):
            self.steps.release()


async def settle() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


def test_pieces_come_in_the_order_in_which_they_are_made() -> None:
    async def scene() -> None:
        one, two = Run(piece("a"), piece("b"), DONE), Run(piece("x"), DONE)
        merged = merge([one.go(), two.go()])
        first = asyncio.ensure_future(anext(merged))
        one.step(2)
        await settle()
        assert not first.done(), "the second has not begun"
        two.step()
        assert await first == (0, piece("a"))
        assert [await anext(merged) for _ in range(2)] == [(0, piece("b")), (1, piece("x"))]
        two.step()
        assert await anext(merged) == (1, DONE)
        one.step()
        assert [item async for item in merged] == [(0, DONE)]
        assert one.is_closed and two.is_closed

    asyncio.run(scene())


def test_a_run_that_ends_at_once_has_begun() -> None:
    async def scene() -> list[Any]:
        one, two = Run(piece("a"), DONE), Run(DONE)
        one.step(2)
        two.step()
        return [item async for item in merge([one.go(), two.go()])]

    assert sorted(asyncio.run(scene()), key=str) == sorted([(0, piece("a")), (0, DONE), (1, DONE)], key=str)


@pytest.mark.parametrize("error", [APIError(503, "nobody is left"), RuntimeError("a bug")])
@pytest.mark.parametrize("has_begun", [False, True])
def test_one_failure_ends_all(error: Exception, has_begun: bool) -> None:
    async def scene() -> None:
        one, two = Run(piece("a"), piece("b"), DONE), Run(*([piece("x")] if has_begun else []), error)
        merged = merge([one.go(), two.go()])
        one.step()
        two.step(1 + has_begun)
        with pytest.raises(type(error)):
            found = [item async for item in merged]
            assert not found
        assert one.is_closed and two.is_closed

    asyncio.run(scene())


@pytest.mark.parametrize("num", [1, 3])
def test_closing_closes_all(num: int) -> None:
    async def scene() -> None:
        runs = [Run(piece("a"), DONE) for _ in range(num)]
        merged = merge([run.go() for run in runs])
        for run in runs:
            run.step()
        await anext(merged)
        await merged.aclose()
        assert all(run.is_closed for run in runs)

    asyncio.run(scene())


def test_who_is_cancelled_while_waiting_closes_all() -> None:
    async def scene() -> None:
        runs = [Run(piece("a")) for _ in range(3)]
        waiting = asyncio.ensure_future(anext(merge([run.go() for run in runs])))
        await settle()
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        assert all(run.is_closed for run in runs)

    asyncio.run(scene())


def test_a_slow_reader_slows_the_runs() -> None:
    async def scene() -> None:
        runs = [Run(*[piece("a")] * 1000, DONE) for _ in range(2)]
        merged = merge([run.go() for run in runs])
        for run in runs:
            run.step(1001)
        found = [await anext(merged) for _ in range(100)]
        await settle()
        assert all(run.steps._value > 900 for run in runs)
        assert abs(sum(1 if index else -1 for index, _ in found)) < 10, "neither gets ahead"
        await merged.aclose()

    asyncio.run(scene())
