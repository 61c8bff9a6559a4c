"""Requests that do not all fit the pages: they give way to each other, and every answer is what it would be alone."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from pair import LATEST_S, Pair, running_pair, until

from decode.slo import SLOPolicy
from decode.worker import DecodeWorker
from prefill.store import ChunkStore

CHUNK = 32
NUM_BLOCKS = 64  # 1,024 tokens
EXACT_ONLY = SLOPolicy(ttft_s=30.0, levels=("lossless",), floor="lossless", ceiling="lossless")


def prompt(length: int, seed: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(3, 512) for _ in range(length)]


def preempt(worker: DecodeWorker, *, times: int = 1) -> None:
    """The only request gives way and is admitted again, so many times at once. With the lock held, between steps."""
    (key,) = worker._requests
    sequence = worker._scheduler.get(key)
    assert sequence is not None
    while sequence.pins:
        worker._lock.wait(0.001)
    for _ in range(times):
        now = time.monotonic()
        worker._holders.spill(worker._scheduler.preempt(key, now), now)
        worker._holders.admit(now)


def between_steps(worker: DecodeWorker, *acts: tuple[Callable[[], bool], Callable[[], None]]) -> None:
    """(when, act), one after the other: in the engine's thread, with the lock held, so that no answer runs on."""
    waiting, before_step = list(acts), worker._holders.before_step

    def hook(now: float) -> None:
        if waiting and waiting[0][0]():
            waiting.pop(0)[1]()
        before_step(now)

    worker._holders.before_step = hook  # type: ignore[method-assign]


def has_generated(worker: DecodeWorker, num_tokens: int) -> Callable[[], bool]:
    """All requests together more than so many."""
    return lambda: sum(len(sequence.output) for sequence in worker._scheduler.all()) > num_tokens


def when_kept(worker: DecodeWorker, act: Callable[[], None]) -> Callable[[], None]:
    """Once all that is offered to the store is in it."""

    def kept() -> None:
        assert worker.source is not None and worker.source.wait_until_idle(LATEST_S)
        act()

    return kept


@pytest.fixture(params=["pages and store", "pages", "store", "neither"])
def pair(request: pytest.FixtureRequest) -> Iterator[Pair]:
    """Given up pages come back from the pages themselves as far as nobody has written to them, from the store, or are
    computed again."""
    with running_pair(
        policy=EXACT_ONLY,
        chunk_tokens=CHUNK,
        num_blocks=NUM_BLOCKS,
        prefix_caching="pages" in request.param,
        store=ChunkStore(64 << 20) if "store" in request.param else None,
    ) as running:
        yield running
        running.check()


def test_answers_that_do_not_fit_together_are_those_of_each_alone(pair: Pair) -> None:
    prompts = [prompt(190 + 4 * i, seed=i) for i in range(4)]
    expected = [pair.reference(tokens, 150) for tokens in prompts]
    bodies = [
        pair.body(tokens, request_id=f"r{i}", max_tokens=150, with_source=i % 2 == 0)
        for i, tokens in enumerate(prompts)
    ]
    answers = pair.ask_all(bodies)
    assert [found for found, _ in answers] == expected
    assert sum(receipt["preemptions"] for _, receipt in answers) > 0, "they were not to fit"
    stats = pair.decode.stats()
    assert stats["decode_preemptions_total"] == sum(receipt["preemptions"] for _, receipt in answers)
    assert stats["decode_generated_tokens_total"] == 4 * 150, "no token is drawn twice"
    for _, receipt in answers:
        assert sum(receipt["ttft_parts_ms"].values()) == pytest.approx(receipt["ttft_ms"], abs=0.01)


def test_a_level_that_was_asked_for_is_of_the_prompt_also_after_a_preemption(pair: Pair) -> None:
    """The answer has grown past more chunks by then; they are computed, and the source is not asked for them."""
    prompts = [prompt(190 + 4 * i, seed=30 + i) for i in range(4)]
    expected = [pair.reference(tokens, 150) for tokens in prompts]
    answers = pair.ask_all([pair.body(tokens, max_tokens=150, kv_mode="lossless") for tokens in prompts])
    assert [found for found, _ in answers] == expected, answers
    assert sum(receipt["preemptions"] for _, receipt in answers) > 0, "they were not to fit"


def test_a_preempted_request_that_is_cancelled_leaves_nothing(pair: Pair) -> None:
    askings = [pair.begin(prompt(200, seed=10 + i), max_tokens=400, with_source=False) for i in range(4)]
    until(lambda: any(waiting.sequence for waiting in pair.decode._scheduler.waiting()))
    for asking in askings:
        asking.leave()
    until(lambda: not pair.decode._requests)


def test_a_request_that_is_preempted_while_it_fills_again_keeps_only_what_is_there(pair: Pair) -> None:
    tokens = prompt(200, seed=15)
    worker = pair.decode
    twice = lambda: preempt(worker, times=2)  # noqa: E731 - the second time nothing has come yet
    between_steps(worker, (has_generated(worker, 20), twice), (lambda: bool(worker._scheduler.all()), twice))
    asking = pair.begin(tokens, max_tokens=200, with_source=False)
    assert asking.receipt()["preemptions"] == 4
    assert asking.tokens == pair.reference(tokens, 200)


def test_the_more_urgent_is_not_preempted(pair: Pair) -> None:
    bodies = [
        pair.body(prompt(150, seed=20 + i), request_id=f"p{i}", max_tokens=150, with_source=False, priority=i)
        for i in range(4)
    ]
    answers = pair.ask_all(bodies)
    assert [len(found) for found, _ in answers] == [150] * 4
    assert answers[0][1]["preemptions"] == 0


def test_a_floor_above_the_policys_levels_does_not_turn_away_who_was_accepted() -> None:
    """Its prompt has no chunk, so nothing was to be loaded; the answer that it gives up has some, in the store."""
    policy = SLOPolicy(ttft_s=30.0, levels=("q1",), floor="q1", allow_recompute=False)
    with running_pair(policy=policy, chunk_tokens=CHUNK, num_blocks=NUM_BLOCKS, store=ChunkStore(64 << 20)) as pair:
        tokens, worker = prompt(20, seed=16), pair.decode
        between_steps(worker, (has_generated(worker, 2 * CHUNK), when_kept(worker, lambda: preempt(worker))))
        asking = pair.begin(tokens, max_tokens=200, with_source=False, floor="lossless")
        assert asking.receipt()["preemptions"] == 1
        assert asking.tokens == pair.reference(tokens, 200)
        pair.check()


def test_a_more_urgent_arrival_does_not_wait_for_the_pages_of_batch_jobs(pair: Pair) -> None:
    """Three jobs that fill the pages for long, one short request that needs a third of them."""
    jobs = [prompt(190 + 4 * i, seed=30 + i) for i in range(3)]
    urgent = prompt(300, seed=40)
    expected = [pair.reference(tokens, 400) for tokens in jobs]
    worker, stopped = pair.decode, threading.Event()

    def hold() -> None:
        stopped.set()
        deadline = time.monotonic() + LATEST_S
        while len(worker._requests) < 4:
            assert time.monotonic() < deadline
            worker._lock.wait(0.01)

    between_steps(worker, (has_generated(worker, 250), hold))  # 850 of 1,024 tokens, and the jobs are not half done
    begun = [pair.begin(tokens, max_tokens=400, with_source=False, priority=5) for tokens in jobs]
    assert stopped.wait(LATEST_S)
    answer = pair.begin(urgent, max_tokens=4, with_source=False, priority=-5)
    assert answer.receipt()["preemptions"] == 0
    assert all(job.end is None for job in begun), "none of them had to end for it"
    assert answer.tokens == pair.reference(urgent, 4)
    receipts = [job.receipt() for job in begun]
    assert sum(receipt["preemptions"] for receipt in receipts) > 0
    assert [job.tokens for job in begun] == expected


def test_a_policy_that_rejects_what_comes_late_does_not_reject_the_rest_of_an_answer() -> None:
    policy = SLOPolicy(ttft_s=0.001, levels=("lossless",), floor="lossless", infeasible="reject")
    with running_pair(policy=policy, chunk_tokens=CHUNK, num_blocks=NUM_BLOCKS, store=ChunkStore(64 << 20)) as pair:
        tokens, worker = prompt(200, seed=17), pair.decode
        between_steps(worker, (has_generated(worker, CHUNK), when_kept(worker, lambda: preempt(worker))))
        asking = pair.begin(tokens, max_tokens=200, with_source=False)  # without a source nothing is rejected
        assert asking.receipt()["preemptions"] == 1
        assert asking.tokens == pair.reference(tokens, 200)
        pair.check()


@pytest.mark.parametrize("options", [{"kv_mode": "lossless"}, {"plan": {"levels": ["lossless", "text"] * 3}}])
def test_who_says_how_the_prompt_is_to_be_had_comes_back_too(options: dict[str, Any]) -> None:
    """Its prompt is loaded again that way; the answer so far is computed."""
    if "plan" in options:
        options = {"plan": {**options["plan"], "chunk_tokens": CHUNK, "refinements": []}}
    with running_pair(policy=EXACT_ONLY, chunk_tokens=CHUNK, num_blocks=NUM_BLOCKS) as pair:
        tokens, worker = prompt(200, seed=18), pair.decode
        between_steps(worker, (has_generated(worker, 2 * CHUNK), lambda: preempt(worker)))
        asking = pair.begin(tokens, max_tokens=150, **options)
        assert asking.receipt()["preemptions"] == 1
        assert asking.tokens == pair.reference(tokens, 150)
        pair.check()
