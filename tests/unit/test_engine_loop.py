"""Which refined chunks are copied into their pages between two steps of the engine, and which have to wait."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch

from decode.blob_decoder import NewPages
from decode.engine_loop import MAX_COPY_BYTES, EngineLoop
from decode.requests import GenerationRequest
from decode.scheduler import Phase, Scheduler, Sequence
from decode.step_times import StepTimes

TOKENS = 64
CHUNK_BYTES = MAX_COPY_BYTES // 4


class World:
    """An engine's loop whose owner and pages note what happens: (request, chunk, tokens sampled by then)."""

    def __init__(self) -> None:
        self.scheduler = Scheduler()
        self.requests: dict[str, Any] = {}
        self.put: list[tuple[str, int, int]] = []
        self.on_refined: Callable[[str], None] = lambda key: None
        self.loop = EngineLoop(
            SimpleNamespace(engine=None),
            owner=self,
            lock=threading.Condition(),
            scheduler=self.scheduler,
            requests=self.requests,
            pages=SimpleNamespace(refine=lambda *_: None),
            compute=None,
            steps=StepTimes(0.0, 0.0),
            chunk_tokens=TOKENS,
            name="test",
        )

    def add(self, key: str, phase: Phase, *, deadline: float = 0.0, num_output: int = 0) -> Sequence:
        request = GenerationRequest(request_id=key, token_ids=(1,) * 300)
        sequence = Sequence(key=key, request=request, block_table=[], deadline=deadline, arrival=1, phase=phase)
        sequence.output = [1] * num_output
        self.scheduler.add(sequence)
        machine = SimpleNamespace(may_step=lambda num_tokens: True)
        self.requests[key] = SimpleNamespace(new_pages=deque(), pages=object(), fill=SimpleNamespace(machine=machine))
        return sequence

    def before_step(self, now: float) -> None: ...

    def give(self, key: str, *chunks: int, after_tokens: int | None = None) -> None:
        half = torch.zeros(CHUNK_BYTES // 2, dtype=torch.uint8)
        for chunk in chunks:
            self.requests[key].new_pages.append(
                NewPages(
                    chunk=chunk,
                    level="q1",
                    start=chunk * TOKENS,
                    k=half.reshape(1, 1, 1, -1),
                    v=half.reshape(1, 1, 1, -1),
                    base_kl=0.0,
                    after_tokens=after_tokens,
                    blob=None,
                    seconds=0.0,
                )
            )

    def pages_refined(self, key: str, pages: NewPages, num_output: int, now: float) -> None:
        self.put.append((key, pages.chunk, num_output))
        self.on_refined(key)

    def between_steps(self) -> tuple[list[tuple[str, int, int]], bool]:
        """What is copied, and whether more is left for the next time."""
        self.put = []
        return self.put, self.loop._put_new_pages()


def test_pages_wait_when_one_of_them_makes_the_prompt_ready() -> None:
    world = World()
    sequence = world.add("a", Phase.FILLING)
    world.give("a", 0, 1, 2)

    def ready(key: str) -> None:
        sequence.phase = Phase.TAIL

    world.on_refined = ready
    assert world.between_steps() == ([("a", 0, 0)], False)
    assert world.between_steps() == ([], False), "the first token sees the one level or the other"
    sequence.phase, sequence.output = Phase.RUNNING, [7]
    world.on_refined = lambda key: None
    assert world.between_steps() == ([("a", 1, 1), ("a", 2, 1)], False)


def test_nothing_is_written_for_a_request_that_one_of_its_pages_ended() -> None:
    """Its pages may belong to another one by then."""
    world = World()
    world.add("a", Phase.RUNNING, num_output=1)
    world.add("b", Phase.RUNNING, num_output=1, deadline=1.0)
    world.give("a", 0, 1)
    world.give("b", 0)

    def end(key: str) -> None:
        if key == "a":
            world.scheduler.remove(key)
            del world.requests[key]

    world.on_refined = end
    assert world.between_steps() == ([("a", 0, 1), ("b", 0, 1)], False)


def test_a_few_chunks_are_copied_between_two_steps_those_before_a_first_token_first() -> None:
    world = World()
    world.add("running", Phase.RUNNING, num_output=3)
    world.add("late", Phase.FILLING, deadline=2.0)
    world.add("soon", Phase.FILLING, deadline=1.0)
    world.give("running", 0, 1, 2)
    world.give("late", 0, 1)
    world.give("soon", 0)
    assert world.between_steps() == ([("soon", 0, 0), ("late", 0, 0), ("late", 1, 0), ("running", 0, 3)], True)
    assert world.between_steps() == ([("running", 1, 3), ("running", 2, 3)], False)


def test_a_chunk_larger_than_the_bound_is_copied_alone(monkeypatch: Any) -> None:
    monkeypatch.setattr("decode.engine_loop.MAX_COPY_BYTES", 1)
    world = World()
    world.add("a", Phase.RUNNING, num_output=1)
    world.give("a", 0, 1)
    assert world.between_steps() == ([("a", 0, 1)], True)
    assert world.between_steps() == ([("a", 1, 1)], False)


def test_a_followed_plan_refines_at_its_moment_and_holds_the_next_token_until_then() -> None:
    world = World()
    sequence = world.add("a", Phase.RUNNING, num_output=4)
    world.requests["a"].fill.machine.may_step = lambda num_tokens: num_tokens < 5 or bool(world.put)
    world.give("a", 0, 1, after_tokens=5)
    assert world.between_steps() == ([], False)
    assert not sequence.is_held and [row.sequence for row in world.scheduler.next_rows(0)] == [sequence]
    sequence.output.append(1)
    late = world.requests["a"].new_pages
    world.requests["a"].new_pages = deque()
    assert world.between_steps() == ([], False)
    assert sequence.is_held and world.scheduler.next_rows(0) == []
    world.requests["a"].new_pages = late
    assert world.between_steps() == ([("a", 0, 5), ("a", 1, 5)], False)
    assert not sequence.is_held
