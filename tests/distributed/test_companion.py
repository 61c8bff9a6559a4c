"""Prefill workers that decode too: one prefill and one decode worker as Ray actors, the bundled model."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import time

import httpx
import pytest
import ray

from cluster.config import BUNDLED_MODEL, ServeConfig
from cluster.launch import running_cluster
from decode.slo import SLOPolicy
from prefill.engine import generate_greedy
from prefill.runtime import load_runtime
from scripts.demo_client import ask

COMPANION = "prefill-0/decode"
KV_BLOCKS = 48  # a decode worker's; half of a prefill worker's are its companion's
LATEST_S = 120.0
ANSWER = 80


@pytest.fixture(scope="module")
def cluster():
    """Without prefix caching no page is kept after a request."""
    config = ServeConfig(
        port=0, kv_blocks=KV_BLOCKS, threads=1, chunk_tokens=128, prefix_caching=False, policy=SLOPolicy(ttft_s=20.0)
    )
    with running_cluster(config) as running:
        yield running


@pytest.fixture(scope="module")
def alone():
    return load_runtime(BUNDLED_MODEL, num_blocks=512)


def prompt(length: int, seed: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(300, 4000) for _ in range(length)]


async def ask_all(base_url: str, prompts: list[list[int]], **options):
    async with httpx.AsyncClient(base_url=base_url, timeout=LATEST_S) as client:
        tasks = (ask(client, p, ignore_eos=True, **options) for p in prompts)
        return await asyncio.gather(*tasks, return_exceptions=True)


def stats(cluster, worker_id: str) -> dict[str, float]:
    worker = cluster.workers[worker_id.partition("/")[0]]
    return ray.get(worker.stats.remote(worker_id), timeout=60)


def check_nothing_is_left(cluster) -> None:
    deadline = time.monotonic() + 30
    while any(stats(cluster, name)["kv_cache_usage_perc"] for name in ("decode-0", COMPANION)):
        assert time.monotonic() < deadline, "pages are still held"
        time.sleep(0.05)
    while stats(cluster, "prefill-0")["prefill_transfers_open"]:
        assert time.monotonic() < deadline, "transfers are still open"
        time.sleep(0.05)
    for worker in cluster.workers.values():
        ray.get(worker.check_integrity.remote(), timeout=60)


def test_a_cluster_with_a_companion_knows_it(cluster) -> None:
    assert set(httpx.get(f"{cluster.base_url}/health").json()["workers"]) == {"prefill-0", "decode-0", COMPANION}
    text = httpx.get(f"{cluster.base_url}/metrics").text
    assert f'kvstream_kv_cache_usage_perc{{worker="{COMPANION}",role="decode"}}' in text


async def ask_until_the_companion_runs(cluster, *, seed: int, mode: str = "auto") -> dict[int, asyncio.Task]:
    """Requests by the number of their prompt: more than the decode worker has pages for, and then one by one until one
    is at the companion. That must come, however fast the machine is: the others wait longer and longer for pages."""
    tasks: dict[int, asyncio.Task] = {}
    options = {"max_tokens": ANSWER, "kv": {"mode": mode, "floor": "lossless"}}
    before = stats(cluster, COMPANION)["decode_requests_total"]
    deadline = time.monotonic() + LATEST_S
    while await asyncio.to_thread(lambda: stats(cluster, COMPANION)["decode_requests_total"]) == before:
        assert time.monotonic() < deadline, "nothing came to the companion"
        for _ in range(1 if tasks else 8):
            number = seed + len(tasks)
            tasks[number] = asyncio.create_task(ask_all(cluster.base_url, [numbered_prompt(number)], **options))
        await asyncio.sleep(0.3)
    return tasks


def numbered_prompt(number: int) -> list[int]:
    return prompt(140 + number % 60, seed=number)


async def answers_of(tasks: dict[int, asyncio.Task]) -> dict[int, object]:
    return {number: (await task)[0] for number, task in tasks.items()}


@pytest.mark.parametrize("mode", ["auto", "raw"])
def test_what_the_decode_worker_has_no_pages_for_its_companion_takes(cluster, alone, mode: str) -> None:
    async def run():
        return await answers_of(await ask_until_the_companion_runs(cluster, seed=0, mode=mode))

    for number, answer in asyncio.run(run()).items():
        assert not isinstance(answer, BaseException), answer
        assert answer.token_ids == generate_greedy(alone.engine, alone.allocator, numbered_prompt(number), ANSWER)
    check_nothing_is_left(cluster)


def test_what_is_too_long_for_the_companion_goes_to_the_decode_worker(cluster, alone) -> None:
    prompts = [prompt(KV_BLOCKS * 16 - 100 - i, seed=40 + i) for i in range(4)]
    answers = asyncio.run(ask_all(cluster.base_url, prompts, max_tokens=8, kv={"mode": "auto", "floor": "lossless"}))
    for tokens, answer in zip(prompts, answers, strict=True):
        assert not isinstance(answer, BaseException), answer
        assert answer.token_ids == generate_greedy(alone.engine, alone.allocator, tokens, 8)


def test_a_killed_prefill_worker_takes_its_companion_along_and_both_come_back(cluster, alone) -> None:
    """Every request ends with the right tokens or a clear error."""
    victim = ray.get(cluster.workers["prefill-0"].pid.remote())

    async def run():
        tasks = await ask_until_the_companion_runs(cluster, seed=100)
        os.kill(victim, signal.SIGKILL)
        return await answers_of(tasks)

    for number, answer in asyncio.run(run()).items():
        if isinstance(answer, BaseException):
            assert "lost" in str(answer) or "reached" in str(answer), answer
        else:
            assert answer.token_ids == generate_greedy(alone.engine, alone.allocator, numbered_prompt(number), ANSWER)
    deadline = time.monotonic() + LATEST_S
    while True:
        try:
            assert ray.get(cluster.workers["prefill-0"].pid.remote(), timeout=90) != victim
            break
        except ray.exceptions.RayError:
            assert time.monotonic() < deadline, "the worker was not restarted"
            time.sleep(0.5)
    while set(httpx.get(f"{cluster.base_url}/health").json()["workers"].values()) != {"ok"}:
        assert time.monotonic() < deadline, "both did not come back"
        time.sleep(0.2)
    check_nothing_is_left(cluster)
