"""Random operations on a prefill and a decode worker over real sockets; at the end nothing may be left anywhere.

Requests of all modes are submitted and cancelled at random moments, short and long prompts, shared and new ones, with a
store too small for what is asked; plans of earlier receipts are followed. Sources are shut down in the middle and new
ones come, slow links to them are cut. Every stream has to end, exact answers have to be exact, a followed plan has to
give the same tokens, and no page, transfer, lease or thread may remain. A failing seed is in the test's name.
"""

from __future__ import annotations

import asyncio
import random
import threading
import time
from dataclasses import dataclass, field
from typing import Any

import pytest
from pair import Pair, make_runtime, running_pair

from decode.slo import SLOPolicy
from prefill.runtime import ModelRuntime
from prefill.store import ChunkStore
from prefill.worker import PrefillWorker
from transport.errors import StreamError
from transport.shaper import Shaper
from transport.stream_client import StreamClient

CHUNK = 32
NUM_REQUESTS = 40
MODES = ("auto", "auto", "text", "raw", "lossless", "q1", "q3")
EXACT = {"text", "raw", "lossless"}
LATEST_S = 60.0


@dataclass
class Outcome:
    number: int
    token_ids: list[int]
    mode: str
    floor: str | None
    max_tokens: int
    tokens: list[int] = field(default_factory=list)
    end: dict[str, Any] | None = None  # None: cancelled
    follows: Outcome | None = None  # the plan of that one's receipt


class Chaos:
    def __init__(self, pair: Pair, seed: int) -> None:
        self.pair, self.rng = pair, random.Random(seed)
        self.documents = [self.prompt(self.rng.randrange(1, 12 * CHUNK)) for _ in range(4)]
        self.runtimes: list[ModelRuntime] = []
        self.old_sources: list[PrefillWorker] = []
        self.links: list[Shaper] = []  # slow ones, the last of them to the source of now
        self.done: list[Outcome] = []

    def prompt(self, length: int) -> list[int]:
        return [self.rng.randrange(3, 512) for _ in range(length)]

    def token_ids(self) -> list[int]:
        if self.rng.random() < 0.6:
            return [*self.rng.choice(self.documents), *self.prompt(self.rng.randrange(1, 40))]
        return self.prompt(self.rng.randrange(1, 14 * CHUNK))

    async def run(self) -> list[Outcome]:
        client = StreamClient(self.pair.decode.endpoint)
        try:
            async with asyncio.timeout(LATEST_S):
                tasks = []
                for number in range(NUM_REQUESTS):
                    tasks.append(asyncio.create_task(self.one(client, number)))
                    await asyncio.sleep(self.rng.choice([0.0, 0.0, 0.01, 0.05]))
                    if number % 9 == 5:
                        await asyncio.to_thread(self.links[-1].cut, self.rng.choice([0.0, 0.05, 0.3]))
                    if number in (NUM_REQUESTS // 3, 2 * NUM_REQUESTS // 3):
                        await asyncio.to_thread(self.replace_source)
                return await asyncio.gather(*tasks)
        finally:
            await client.close()

    async def one(self, client: StreamClient, number: int) -> Outcome:
        rng = self.rng
        outcome = Outcome(
            number=number,
            token_ids=self.token_ids(),
            mode=rng.choice(MODES),
            floor=None,
            max_tokens=rng.choice([1, 4, 24]),
        )
        if outcome.mode == "auto":
            outcome.floor = rng.choice([None, "lossless", "raw", "q2"])
        if self.done and rng.random() < 0.2:
            first = outcome.follows = rng.choice(self.done)
            outcome.token_ids, outcome.max_tokens = first.token_ids, first.max_tokens
            outcome.mode, outcome.floor = "auto", None
        endpoints = rng.sample([self.pair.prefill.endpoint, self.links[-1].endpoint], rng.choice([1, 1, 2]))
        if outcome.mode == "auto" and outcome.follows is None and rng.random() < 0.1:
            endpoints = []
        body = self.pair.body(
            outcome.token_ids,
            max_tokens=outcome.max_tokens,
            kv_mode=outcome.mode,
            floor=outcome.floor,
            ttft_s=rng.choice([None, 0.0, 0.05, 5.0]),
            endpoints=endpoints,
            plan=outcome.follows.end["finished"]["receipt"]["plan"] if outcome.follows else None,
            request_id=f"request-{number % 30}",  # some come twice
        )
        patience_s = rng.choice([0.0, 0.001, 0.02, 0.1, 0.3]) if rng.random() < 0.4 else LATEST_S
        try:
            async with asyncio.timeout(patience_s):
                async with client.submit(body) as stream:
                    async for event in stream:
                        outcome.tokens += event.get("tokens", [])
                        outcome.end = event if event.keys() & {"finished", "failed", "refused"} else outcome.end
        except TimeoutError:
            assert patience_s < LATEST_S, f"request {number} hangs: {outcome}"
            outcome.end = None
        except StreamError as error:
            raise AssertionError(f"request {number}: {error}") from error
        if outcome.end is not None and "finished" in outcome.end:
            self.done.append(outcome)
        return outcome

    def replace_source(self) -> None:
        """The source ends in the middle of what it does; another one, at another address, takes its place."""
        self.old_sources.append(self.pair.prefill)
        self.pair.prefill.shutdown()
        self.pair.prefill = PrefillWorker(make_runtime(num_blocks=64), store=ChunkStore(600_000))
        self.links.append(Shaper(self.pair.prefill.endpoint, rate_mbps=20))

    def close(self) -> None:
        for link in self.links:
            link.stop()


def judge(chaos: Chaos, outcomes: list[Outcome]) -> None:
    for outcome in outcomes:
        end = outcome.end
        if end is None:
            continue  # cancelled
        if "finished" in end:
            receipt = end["finished"]["receipt"]
            assert len(outcome.tokens) == outcome.max_tokens
            levels = set(receipt["levels"])
            if outcome.mode not in ("auto", "text"):
                assert levels <= {outcome.mode} or not receipt["source"], receipt
            if outcome.follows is not None:
                assert outcome.tokens == outcome.follows.tokens, (outcome, outcome.follows)
            if levels <= EXACT and set(receipt["levels_at_end"]) <= EXACT:
                expected = chaos.pair.reference(outcome.token_ids, outcome.max_tokens)
                assert outcome.tokens == expected, outcome
            if outcome.floor == "lossless":
                assert levels <= EXACT, receipt
        else:
            # Only who insists on a level or a plan may fail, and only because a source went away.
            assert outcome.mode not in ("auto", "text") or outcome.follows is not None, (outcome.number, end)
            code = "kv_transfer_failed" if outcome.follows is None else "plan_not_followed"
            assert end.get("failed", {}).get("code") == code, (outcome.number, end)


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_random_operations_leave_nothing_behind(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("fill", "fill_sources"):
        monkeypatch.setattr(f"decode.{module}.OPEN_TIMEOUT_S", 2.0)  # instead of ten, for a source that is gone
    threads = set(threading.enumerate())
    with running_pair(policy=SLOPolicy(ttft_s=0.2, floor="q3"), chunk_tokens=CHUNK, num_blocks=96) as pair:
        chaos = Chaos(pair, seed)
        chaos.replace_source()  # the first has the small store too
        try:
            outcomes = asyncio.run(chaos.run())
        finally:
            chaos.close()
        pair.check()
        pair.prefill.check_integrity()
        assert not pair.prefill._transfers and not pair.decode._requests and not pair.decode._holders._ended
        assert pair.decode.server.num_streams == 0
        assert pair.decode.is_alive and pair.prefill.is_alive
        judge(chaos, outcomes)
        assert sum(outcome.end is not None and "finished" in outcome.end for outcome in outcomes) >= 10
        pair.prefill.shutdown()
    deadline = time.monotonic() + 10
    while left := [t for t in threading.enumerate() if t not in threads and t.name.split("-")[0] in NAMES]:
        assert time.monotonic() < deadline, left
        time.sleep(0.01)


NAMES = {"prefill", "decode", "kv", "stream"}
