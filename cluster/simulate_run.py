"""`kvstream simulate`: a workload through a simulated cluster and what came of it in figures. No files, no printing."""

from __future__ import annotations

import itertools
import json
import random
import statistics
import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from cluster.cost_model import CostModel
from cluster.sim_decode import SimRequest
from cluster.simulation import Arrival, SimulatedCluster, promised_loss
from decode.fill_chunks import TEXT

MOONCAKE_BLOCK_TOKENS = 512


class BadWorkload(ValueError):
    """A trace that cannot be read; says which line."""


def mooncake_arrivals(
    lines: Iterable[str], *, time_scale: float = 1.0, length_scale: float = 1.0, limit: int | None = None
) -> Iterator[Arrival]:
    """The rows of a Mooncake trace: {"timestamp": ms, "input_length", "output_length", "hash_ids": of blocks of 512
    tokens}. time_scale: 2 makes every wait twice as long; length_scale: the same for prompts, blocks and outputs, since
    its contexts of 100,000 tokens are no load for a small model. Raises BadWorkload."""
    before_s = 0.0
    block_tokens = max(1, round(MOONCAKE_BLOCK_TOKENS * length_scale))
    for number, line in enumerate(itertools.islice(lines, limit), start=1):
        try:
            row = json.loads(line)
            at = float(row["timestamp"]) / 1e3 * time_scale
            blocks = tuple(int(block) for block in row["hash_ids"])
            arrival = Arrival(
                at=at,
                prompt_tokens=round(int(row["input_length"]) * length_scale) or min(int(row["input_length"]), 1),
                output_tokens=max(1, round(int(row["output_length"]) * length_scale)),
                blocks=blocks,
                block_tokens=block_tokens,
                request_id=f"r{number}",
            )
        except (ValueError, KeyError, TypeError) as error:
            raise BadWorkload(f"line {number} is no row of a Mooncake trace: {error!r}") from None
        if arrival.prompt_tokens < 1 or not blocks or at < before_s:
            raise BadWorkload(
                f"line {number}: a prompt of 1 token or more with blocks, no earlier than the line before"
            )
        before_s = at
        yield arrival


def random_arrivals(
    num: int,
    *,
    prompt_tokens: int,
    output_tokens: int,
    rate: float,
    num_documents: int | None = None,
    stored: bool = False,
    seed: int = 0,
) -> Iterator[Arrival]:
    """`num` requests at random times, `rate` a second, of lengths within half of what is asked. num_documents: so many
    different ones, each as often as chance has it; None: no two alike. stored: whether all sources have them."""
    rng, at = random.Random(seed), 0.0
    lengths: dict[int, int] = {}
    for number in range(num):
        at += rng.expovariate(rate)
        document = number if num_documents is None else rng.randrange(num_documents)
        length = lengths.setdefault(document, rng.randint(max(1, prompt_tokens // 2), prompt_tokens * 3 // 2))
        yield Arrival(
            at=at,
            prompt_tokens=length,
            output_tokens=rng.randint(max(1, output_tokens // 2), max(1, output_tokens * 3 // 2)),
            blocks=tuple(1_000_000 * (document + 1) + block for block in range(-(-length // MOONCAKE_BLOCK_TOKENS))),
            stored=stored,
            request_id=f"r{number}",
        )


@dataclass(slots=True, kw_only=True)
class Tally:
    """What became of the requests that have ended. Keeps numbers, not requests: traces are long."""

    num_requests: int = 0
    failed: Counter[str] = field(default_factory=Counter)
    num_with_target: int = 0
    num_in_time: int = 0
    ttft_s: list[float] = field(default_factory=list)
    itl_s: list[float] = field(default_factory=list)
    levels: Counter[str] = field(default_factory=Counter)
    losses: list[float] = field(default_factory=list)
    num_bytes: int = 0
    num_chunks: int = 0
    num_stored_chunks: int = 0
    num_prefix_hits: int = 0
    output_tokens: int = 0

    def add(self, state: SimRequest, promised_kl: dict[str, float]) -> None:
        self.num_requests += 1
        self.num_chunks += len(state.keys)
        self.num_stored_chunks += state.num_stored
        self.num_prefix_hits += state.num_stored > 0
        target_s = state.policy.ttft_s if state.request.ttft_s is None else state.request.ttft_s
        self.num_with_target += target_s > 0
        if state.ended != "finished" or state.ttft_s is None or state.fill is None:
            self.failed[state.ended] += 1
            return
        self.ttft_s.append(state.ttft_s)
        self.num_in_time += target_s > 0 and state.ttft_s <= target_s
        self.itl_s += [after - before for before, after in itertools.pairwise(state.token_times)]
        self.output_tokens += len(state.token_times)
        self.levels.update(state.levels)
        self.losses.append(promised_loss(state.levels, promised_kl))
        self.num_bytes += state.fill.received_bytes

    def figures(self) -> dict[str, Any]:
        """As JSON; times in milliseconds."""
        total = max(sum(self.levels.values()), 1)
        return {
            "requests": self.num_requests,
            "failed": dict(self.failed),
            "slo_attainment": self.num_in_time / self.num_with_target if self.num_with_target else None,
            "ttft_ms": _quantiles_ms(self.ttft_s),
            "itl_ms": _quantiles_ms(self.itl_s),
            "quality_loss": statistics.fmean(self.losses) if self.losses else None,
            "levels": {level: count / total for level, count in self.levels.most_common()},
            "recomputed_share": self.levels[TEXT] / total,
            "bytes_per_request": self.num_bytes / max(len(self.ttft_s), 1),
            "prefix_hits": self.num_prefix_hits / max(self.num_requests, 1),
            "stored_chunks": self.num_stored_chunks / max(self.num_chunks, 1),
            "output_tokens": self.output_tokens,
        }


def _quantiles_ms(values: Sequence[float]) -> dict[str, float] | None:
    if not values:
        return None
    ordered = sorted(values)
    points = {f"p{q}": 1e3 * ordered[min(int(q / 100 * len(ordered)), len(ordered) - 1)] for q in (50, 95, 99)}
    return {"mean": 1e3 * statistics.fmean(ordered), **points}


def run_workload(cluster: SimulatedCluster, arrivals: Iterable[Arrival], costs: CostModel) -> dict[str, Any]:
    """All requests to their ends. The figures of `Tally`, and how long both worlds took."""
    begin = time.perf_counter()
    tally, open_now, promised_kl = Tally(), deque[SimRequest](), dict(costs.promised_kl)
    for arrival in arrivals:
        # One ahead of its time, so that a trace of any length fits into memory.
        cluster.network.run(until_s=arrival.at)
        open_now.append(cluster.later(arrival))
        while open_now and open_now[0].ended:
            tally.add(open_now.popleft(), promised_kl)
    cluster.network.run(until_s=float("inf"), done=lambda: all(state.ended for state in reversed(open_now)))
    simulated_s = cluster.network.now
    for state in open_now:
        tally.add(state, promised_kl)
    # Until closed transfers have been forgotten everywhere: then nothing may be left of any request.
    cluster.network.run(until_s=simulated_s + 20)
    cluster.check_integrity()
    wall_s = time.perf_counter() - begin
    return {
        **tally.figures(),
        "simulated_s": simulated_s,
        "wall_s": wall_s,
        "requests_per_wall_s": tally.num_requests / wall_s,
        "computed_tokens": {name: worker.computed_tokens for name, worker in cluster.prefill.items()},
    }
