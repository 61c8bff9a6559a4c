"""Workers of a cluster as queues in virtual time, under the production router, index and ledger.

A worker computes prompts in the order of their requests (as by deadline), a chunk a pass, and every pass carries all
running rows along. What a prefill worker computes travels chunk by chunk. So disturbance, queues and transfers are in
it; levels, sharing of links and plans are not (cluster/simulation.py has those).
"""

from __future__ import annotations

import heapq
import itertools
import random
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from cluster.membership import Role, WorkerInfo
from cluster.prefix_index import TIERS, PrefixIndex, join_keys
from cluster.route_costs import (
    ANSWER_TOKENS,
    BASE_S,
    BUSY,
    LOAD_RAM_S,
    PULL_S,
    REQUESTS,
    ROW_S,
    ROWS,
    STEP_S,
    TOKENS_PER_S,
    WAITING_TOKENS,
    RouteWeights,
)
from cluster.routing import KVWay, Route, choose_route
from cluster.sent_ledger import SentLedger
from prefill.chunks import chunk_keys

CHUNK = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class Speeds:
    """Of all workers alike, seconds: a prompt token, a decode step, a row of it, a token over the link, loading a
    stored token."""

    token_s: float = 2.5e-4
    step_s: float = 0.012
    row_s: float = 0.002
    pull_s: float = 2e-5
    load_s: float = 1e-5


@dataclass(slots=True, kw_only=True, eq=False)
class Asked:
    """A request and what became of it."""

    token_ids: Sequence[int]
    output_tokens: int
    at: float
    route: Route | None = None
    first_token_at: float = 0.0
    ended_at: float = 0.0
    ledger_number: int = -1
    computed_tokens: int = 0

    @property
    def ttft_s(self) -> float:
        return self.first_token_at - self.at

    @property
    def e2e_s(self) -> float:
        return self.ended_at - self.at


@dataclass(slots=True, kw_only=True, eq=False)
class _Job:
    """A piece of a prompt: `left` tokens; `on_pass` after each pass with what is left."""

    asked: Asked
    left: int
    on_pass: Callable[[int], None]


class Core:
    """What one worker, or a prefill worker and its companion, compute on: one pass at a time, by turns."""

    def __init__(self, world: World) -> None:
        self._world = world
        self.workers: list[Worker] = []
        self._is_busy = False

    def wake(self) -> None:
        if not self._is_busy:
            self._next()

    def _next(self) -> None:
        begun = next((found for worker in self.workers if (found := worker.begin_pass()) is not None), None)
        self._is_busy = begun is not None
        if begun is None:
            return
        worker, seconds, done = begun
        self.workers.remove(worker)  # it is the others' turn
        self.workers.append(worker)

        def ended() -> None:
            self._is_busy = True
            done()
            self._next()

        self._world.later(seconds, ended)


class Worker:
    """held: keys of chunks by tier. companion_of: the prefill worker with which it shares its core and its store."""

    def __init__(self, name: str, role: Role, world: World, companion_of: Worker | None = None) -> None:
        self.name, self.role, self._world, self._companion_of = name, role, world, companion_of
        self._core = Core(world) if companion_of is None else companion_of._core
        self._core.workers.append(self)
        self.jobs: list[_Job] = []
        self.rows: dict[int, tuple[Asked, int]] = {}  # request, tokens left
        self.held: dict[bytes, set[str]] = {}
        self._epoch = 0
        self._reported: dict[str, float] = {}
        self._reported_at = 0.0
        self.computed_tokens = 0
        self._answer_tokens = 0.0
        self._busy = self._busy_s = 0.0

    def hold(self, keys: Sequence[bytes], tier: str) -> None:
        for key in keys:
            self.held.setdefault(key, set()).add(tier)

    def add(self, job: _Job) -> None:
        self.jobs.append(job)
        self._core.wake()

    def add_row(self, asked: Asked) -> None:
        self.rows[id(asked)] = (asked, asked.output_tokens - 1)
        self._core.wake()

    def step_s(self) -> float:
        speeds = self._world.speeds
        return speeds.step_s + len(self.rows) * speeds.row_s if self.rows else 0.0

    def begin_pass(self) -> tuple[Worker, float, Callable[[], None]] | None:
        """How long its next pass takes and what follows from it; None: there is nothing to do."""
        job = min(self.jobs, key=lambda job: job.asked.at, default=None)
        if job is None and not self.rows:
            return None
        tokens = min(CHUNK, job.left) if job is not None else 0
        seconds = tokens * self._world.speeds.token_s + self.step_s()
        riders = list(self.rows)

        self._busy_s += seconds

        def done() -> None:
            for key in riders:
                asked, left = self.rows[key]
                if left <= 1:
                    del self.rows[key]
                    self._answer_tokens += 0.1 * (asked.output_tokens - self._answer_tokens)
                    self._world.end(asked)
                else:
                    self.rows[key] = (asked, left - 1)
            if job is not None:
                self.computed_tokens += tokens
                job.left -= tokens
                if job.left == 0:
                    self.jobs.remove(job)
                job.on_pass(job.left)

        return self, seconds, done

    def report(self) -> None:
        speeds = self._world.speeds
        if self._world.now > self._reported_at:
            share = self._busy_s / (self._world.now - self._reported_at)
            self._busy += 0.3 * (min(1.0, share) - self._busy)
        self._reported_at, self._busy_s = self._world.now, 0.0
        self._reported = {
            TOKENS_PER_S: 1.0 / speeds.token_s,
            WAITING_TOKENS: sum(job.left for job in self.jobs),
            ROWS: len(self.rows),
            STEP_S: self.step_s(),
            PULL_S: speeds.pull_s,
            LOAD_RAM_S: speeds.load_s,
            BASE_S: speeds.step_s,
            ROW_S: speeds.row_s,
            REQUESTS: len(self.rows) + len(self.jobs),
            BUSY: self._busy,
            ANSWER_TOKENS: self._answer_tokens,
        }
        self._epoch += 1
        packed: dict[str, Any] = {"since": None, "epoch": self._epoch, "removed": b""}
        for tier in TIERS:
            packed[tier] = join_keys(key for key, tiers in self.held.items() if tier in tiers)
        self._world.index.apply(self.name, self.name, packed)

    def info(self) -> WorkerInfo:
        return WorkerInfo(
            id=self.name,
            role=self.role,
            incarnation=self.name,
            endpoint=f"tcp://{self.name}",
            kv_endpoint=f"tcp://{self.name}:kv" if self.role == "decode" and self._companion_of is None else None,
            stats=self._reported,
            age_s=self._world.now - self._reported_at,
            companion_of=None if self._companion_of is None else self._companion_of.name,
        )


class World:
    """num_prefill and num_decode workers; companions: prefill workers decode, too. report_s: how often they
    report; 0: whenever somebody asks. way: what each request demands of its KV. max_tokens: of each, as the router is
    told."""

    def __init__(
        self,
        *,
        num_prefill: int,
        num_decode: int,
        companions: bool = False,
        speeds: Speeds | None = None,
        report_s: float = 1.0,
        weights: RouteWeights | None = None,
        has_index: bool = True,
        way: Callable[[Asked], KVWay] = lambda asked: "auto",
        max_tokens: int | None = None,
    ) -> None:
        self.speeds, self.now, self.index = speeds or Speeds(), 0.0, PrefixIndex()
        self._report_s, self._weights, self._has_index, self._way = report_s, weights, has_index, way
        self._max_tokens = max_tokens
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self.ledger = SentLedger()
        names: list[tuple[str, Role]] = [(f"p{i}", "prefill") for i in range(num_prefill)]
        names += [(f"d{i}", "decode") for i in range(num_decode)]
        self.workers = {name: Worker(name, role, self) for name, role in names}
        if companions:
            for i in range(num_prefill):
                self.workers[f"p{i}/d"] = Worker(f"p{i}/d", "decode", self, self.workers[f"p{i}"])
        self.on_end: Callable[[Asked], None] = lambda asked: None

    def later(self, seconds: float, act: Callable[[], None]) -> None:
        heapq.heappush(self._events, (self.now + seconds, next(self._order), act))

    def run(self, requests: Sequence[Asked]) -> None:
        """Until all have ended."""
        for asked in requests:
            heapq.heappush(self._events, (asked.at, next(self._order), lambda asked=asked: self.ask(asked)))
        self._report()
        while self._events:
            self.now, _, act = heapq.heappop(self._events)
            act()

    def _report(self) -> None:
        for worker in self.workers.values():
            worker.report()
        if self._report_s and (self._events or not self.now):
            self.later(self._report_s, self._report)

    # -- a request ------------------------------------------------------------------------------------------------

    def ask(self, asked: Asked) -> None:
        if not self._report_s:
            self._report()
        table = [worker.info() for worker in self.workers.values()]
        keys = chunk_keys(asked.token_ids, CHUNK, fingerprint="f")
        self.ledger.follow(table, self.now)
        route = choose_route(
            table,
            asked.token_ids,
            chunk_tokens=CHUNK,
            cache_salt="",
            in_flight=self.ledger.in_flight(),
            holders=self.index.holders(join_keys(keys)) if self._has_index else None,
            # What was asked for a moment ago is in a report made this moment.
            pending=self.ledger.pending(self.now) if self._report_s else None,
            way=self._way(asked),
            weights=self._weights,
            max_tokens=self._max_tokens,
        )
        assert route is not None
        asked.route = route
        tokens = {route.decode.id: route.decode_tokens}
        if route.prefill_tokens:
            tokens[route.sources[0].id] = route.prefill_tokens
        asked.ledger_number = self.ledger.send(route.decode.id, tokens, self.now)
        self._serve(asked, route, keys)

    def _serve(self, asked: Asked, route: Route, keys: Sequence[bytes]) -> None:
        decode = self.workers[route.decode.id]
        num_tokens = len(asked.token_ids)
        num_hits = 0
        while num_hits < len(keys) and "pages" in decode.held.get(keys[num_hits], ()):
            num_hits += 1
        sources = [*(self.workers[source.id] for source in route.sources), decode]
        stored = [any("ram" in source.held.get(key, ()) for source in sources) for key in keys]
        rest = range(num_hits, len(keys))
        if route.is_aggregated:
            loaded = sum(stored[i] for i in rest)
            to_compute = num_tokens - (num_hits + loaded) * CHUNK
            self.later(loaded * CHUNK * self.speeds.pull_s, lambda: self._compute(asked, decode, to_compute, keys))
            return
        source = sources[0]
        missing = [i for i in rest if not stored[i]]
        if not missing:
            seconds = len(rest) * CHUNK * self.speeds.pull_s
            self.later(seconds, lambda: self._compute(asked, decode, num_tokens - len(keys) * CHUNK, keys))
            return
        arrived_at = self.now
        last = missing[-1]
        left = deque(i for i in range(last + 1) if not stored[i])
        fetched = [i for i in range(last + 1) if stored[i] and "ram" not in source.held.get(keys[i], ())]
        asked.computed_tokens += CHUNK * len(left)

        def on_pass(_: int) -> None:
            nonlocal arrived_at
            chunk = left.popleft()
            source.hold(keys[chunk : chunk + 1], "ram")
            arrived_at = max(arrived_at, self.now) + CHUNK * self.speeds.pull_s
            if not left:
                tail = num_tokens - len(keys) * CHUNK
                self.later(arrived_at - self.now, lambda: self._compute(asked, decode, tail, keys))

        source.hold([keys[i] for i in fetched], "ram")
        job = _Job(asked=asked, left=CHUNK * len(left), on_pass=on_pass)
        self.later(len(fetched) * CHUNK * self.speeds.pull_s, lambda: source.add(job))

    def _compute(self, asked: Asked, decode: Worker, tokens: int, keys: Sequence[bytes]) -> None:
        asked.computed_tokens += tokens

        def on_pass(left: int) -> None:
            if left:
                return
            for tier in ("pages", "ram"):
                decode.hold(keys, tier)
            asked.first_token_at = self.now
            self.ledger.first_token(asked.ledger_number)
            if asked.output_tokens > 1:
                decode.add_row(asked)
            else:
                self.end(asked)

        decode.add(_Job(asked=asked, left=tokens, on_pass=on_pass))

    def end(self, asked: Asked) -> None:
        assert asked.ended_at == 0.0
        asked.ended_at = self.now
        self.ledger.ended(asked.ledger_number, self.now)
        self.on_end(asked)


def poisson(
    num: int, *, rate: float, prompt_tokens: tuple[int, int], output_tokens: tuple[int, int], seed: int
) -> list[Asked]:
    """Requests that have nothing in common, at random times, `rate` a second; lengths anywhere between the bounds."""
    rng, at, found = random.Random(seed), 0.0, []
    for _ in range(num):
        at += rng.expovariate(rate)
        length = rng.randint(*prompt_tokens)
        head: list[Any] = [rng.randrange(1 << 30) for _ in range(8)]
        token_ids = head + [0] * (length - len(head)) if length > len(head) else head[:length]
        found.append(Asked(token_ids=token_ids, output_tokens=rng.randint(*output_tokens), at=at))
    return found


def again(requests: Sequence[Asked]) -> list[Asked]:
    """The same requests, not yet served."""
    return [Asked(token_ids=r.token_ids, output_tokens=r.output_tokens, at=r.at) for r in requests]


@dataclass(slots=True, kw_only=True)
class Figures:
    """Of requests that have ended, seconds."""

    ttft: list[float] = field(default_factory=list)
    e2e: list[float] = field(default_factory=list)

    @classmethod
    def of(cls, requests: Sequence[Asked]) -> Figures:
        assert all(asked.ended_at for asked in requests)
        return cls(ttft=sorted(r.ttft_s for r in requests), e2e=sorted(r.e2e_s for r in requests))

    @staticmethod
    def mean(values: Sequence[float]) -> float:
        return sum(values) / len(values)

    @staticmethod
    def quantile(values: Sequence[float], share: float) -> float:
        return values[min(len(values) - 1, int(share * len(values)))]
