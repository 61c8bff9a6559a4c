"""The simulated cluster against the real one: the same requests through real workers, over sockets and a shaped link.

    sudo .venv/bin/python -m scripts.bench_sockets --json docs/benchmarks/sockets-epyc-2core-202611.json

Two prefill workers that both have all documents, one decode worker, each a process; the sources' link to it is shaped
by the kernel (scripts/socket_hosts.py). Requests go one after another through every policy in turn, so that whatever
else the machine does hits all of them alike; then several at once, at random times. Each is repeated in virtual time
(cluster/simulation.py) on the costs that scripts/measure_costs.py found on this machine: same documents, same order.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import random
import signal
import statistics
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from cluster.config import BUNDLED_MODEL
from cluster.cost_model import CostModel
from cluster.membership import WorkerInfo
from cluster.routing import owners
from decode.requests import GenerationRequest, SamplingParams
from scripts.model_data import encode, recall_document
from scripts.quiet import Meter
from scripts.socket_figures import (
    GAP_S,
    LENGTHS,
    LEVELS,
    POLICY,
    Found,
    Question,
    by_policy,
    misordered,
    show,
    simulate,
)
from scripts.socket_hosts import Link, Workers, running_workers, shaped_link
from transport.stream_client import StreamClient

COSTS = Path(__file__).resolve().parent.parent / "docs" / "benchmarks" / "costs-epyc-2core-202611.json"
TARGET = "controller, target"
NUM_WARMUPS = 4
MAX_ATTEMPTS = 3  # to find the machine quiet during a round
ANSWER_LIMIT_S = 60.0  # a worker that has lost a thread would never answer
OUTPUT_TOKENS = 8  # of requests that come at random times, so that they meet each other's decode steps


# -- what is asked --------------------------------------------------------------------------------------------------


def options_of(policy: str, target_s: float) -> dict[str, Any]:
    if policy == "controller":
        return {"ttft_s": 0.0}
    return {"ttft_s": target_s} if policy == TARGET else {"kv_mode": policy}


def one_after_another(counts: Mapping[str, int], target_s: float, rng: random.Random) -> list[list[Question]]:
    """Rounds: a document through every policy. What is slow on this link is in every n-th round alone."""
    rounds = max(counts.values())
    asked = [[Question(policy="", document=n % len(LENGTHS), options={}) for n in range(NUM_WARMUPS)]]
    for number in range(rounds):
        document = rng.randrange(len(LENGTHS))
        due = [policy for policy, count in counts.items() if number * count // rounds != (number + 1) * count // rounds]
        rng.shuffle(due)
        asked.append(
            [Question(policy=policy, document=document, options=options_of(policy, target_s)) for policy in due]
        )
    return asked


def at_random_times(policy: str, count: int, rate: float, target_s: float, rng: random.Random) -> list[Question]:
    times = itertools.accumulate(rng.expovariate(rate) for _ in range(count))
    return [
        Question(
            policy=policy,
            document=rng.randrange(len(LENGTHS)),
            options=options_of(policy, target_s),
            at=at,
            output_tokens=OUTPUT_TOKENS,
        )
        for at in times
    ]


# -- for real -------------------------------------------------------------------------------------------------------


class Asker:
    """Asks the decode worker. `documents`: prompts."""

    def __init__(self, workers: Workers, documents: Sequence[Sequence[int]]) -> None:
        self._workers, self._documents = workers, documents
        self._client = StreamClient(workers.decode, curve=workers.client_keys)
        self._numbers = itertools.count()
        self._infos = [
            WorkerInfo(id=source["id"], role="prefill", incarnation=source["id"], endpoint=source["endpoint"])
            for source in workers.sources
        ]

    def sources_of(self, document: int) -> list[dict[str, Any]]:
        """In the order of their claim, as the simulated router has it."""
        order = owners(self._infos, (1000 * (document + 1),) * 256, "")
        by_id = {source["id"]: source for source in self._workers.sources}
        return [by_id[info.id] for info in order]

    async def ask(
        self, document: int, options: Mapping[str, Any], *, output_tokens: int = 1, sources: Sequence[Any] | None = None
    ) -> dict[str, Any]:
        """The receipt."""
        request = GenerationRequest(
            request_id=f"r{next(self._numbers)}",
            token_ids=tuple(self._documents[document]),
            sampling=SamplingParams(max_tokens=output_tokens, temperature=0.0, ignore_eos=True),
            **options,
        )
        asked = sources if sources is not None else self.sources_of(document)
        body = {"kind": "generate", "request": request.to_wire(), "sources": asked}
        async with asyncio.timeout(ANSWER_LIMIT_S), self._client.submit(body) as stream:
            async for event in stream:
                assert "refused" not in event and "failed" not in event, event
                if "finished" in event:
                    return dict(event["finished"]["receipt"])
        raise AssertionError("the stream ended without an end")

    async def store(self) -> None:
        """Every document at both sources, at every level."""
        for document in range(len(self._documents)):
            for source in self._workers.sources:
                for level in ("lossless", *LEVELS):
                    receipt = await self.ask(document, {"kv_mode": level}, sources=[source])
                assert not receipt["live_prefill"], "the document is not stored"

    async def run(self, asked: Sequence[Question]) -> list[Found]:
        begin = time.monotonic()
        if all(question.at is None for question in asked):
            found = []
            for question in asked:
                await asyncio.sleep(GAP_S)
                found.append(await self._measured(question))
            return found
        return await asyncio.gather(*(self._at(begin, question) for question in asked))

    async def run_quietly(self, rounds: Sequence[Sequence[Question]], meter: Meter) -> tuple[list[Found], Counter[str]]:
        """Round by round, each anew until the rest of the machine has left us alone during all of it. Whether a round
        counts is decided by what others did, whatever came of it. And how many: anew, disturbed all the same."""
        found: list[Found] = []
        rounds_by: Counter[str] = Counter()
        for asked in rounds:
            for attempt in range(MAX_ATTEMPTS):
                await asyncio.to_thread(meter.wait)
                answers = await self.run(asked)
                if meter.is_quiet or attempt == MAX_ATTEMPTS - 1:
                    rounds_by["disturbed"] += not meter.is_quiet
                    break
                rounds_by["anew"] += 1
            found += answers
        return found, rounds_by

    async def _at(self, begin: float, question: Question) -> Found:
        assert question.at is not None
        await asyncio.sleep(max(0.0, begin + question.at - time.monotonic()))
        return await self._measured(question)

    async def _measured(self, question: Question) -> Found:
        receipt = await self.ask(question.document, question.options, output_tokens=question.output_tokens)
        return Found(
            ttft_s=receipt["ttft_ms"] / 1e3,
            levels=[chunk["level"] for chunk in receipt["chunks"]],
            num_bytes=receipt["received_bytes"],
            parts_ms=_joined(receipt["ttft_parts_ms"]),
        )

    async def close(self) -> None:
        await self._client.close()


def _joined(parts: Mapping[str, float | None]) -> dict[str, float | None]:
    """As the simulator has them: what is loaded better before the first token belongs to filling."""
    return {
        "open": (parts["queue"] or 0.0) + (parts["open"] or 0.0),
        "fill": (parts["fill"] or 0.0) + (parts["refine"] or 0.0),
        "tail": parts["tail"],
    }


# -- the whole ------------------------------------------------------------------------------------------------------


def counts_for(num_requests: int, seconds_each: Mapping[str, float], limit_s: float) -> dict[str, int]:
    """How often to ask: `num_requests`, or what `limit_s` have room for, where a policy is slow on this link."""
    return {name: max(12, min(num_requests, int(limit_s / each))) for name, each in seconds_each.items()}


async def run_beta(
    beta: float, asker: Asker, link: Link, costs: CostModel, pids: Sequence[int], options: argparse.Namespace
) -> dict[str, Any]:
    rate = costs.link_bytes_per_s(beta)
    rng = random.Random(f"{options.seed}/{beta}")
    # The simulator says before the run what is slow, and what target is neither easy nor hopeless.
    each = ["controller", *LEVELS, "text"]
    probe = [Question(policy=p, document=d, options=options_of(p, 0.0)) for p in each for d in range(len(LENGTHS))]
    expected = simulate(costs, rate, probe)
    seconds = {
        p: statistics.fmean(f.ttft_s for q, f in zip(probe, expected, strict=True) if q.policy == p) for p in each
    }
    slowest = max(
        found.ttft_s for question, found in zip(probe, expected, strict=True) if question.policy == "controller"
    )
    target_s = round(1.3 * slowest, 3)
    counts = counts_for(options.requests, {TARGET: seconds["controller"], **seconds}, options.limit_s)
    link.shape(rate)
    result: dict[str, Any] = {"beta": beta, "link_mbps": rate * 8e-6, "target_ms": 1e3 * target_s}
    runs: dict[str, list[list[Question]]] = {"one after another": one_after_another(counts, target_s, rng)}
    if options.concurrent:
        rest_s = (OUTPUT_TOKENS - 1) * (costs.step_s + costs.row_s)
        for policy in (TARGET, min(LEVELS[1:], key=seconds.__getitem__), "text"):
            arrivals = options.load / (seconds["controller" if policy == TARGET else policy] + rest_s)
            count = min(options.requests, int(options.limit_s * arrivals))
            runs[f"at random times, {policy}"] = [at_random_times(policy, count, arrivals, target_s, rng)]
    for name, rounds in runs.items():
        meter = Meter(pids, options.patience_s)
        begin = time.monotonic()
        real, rounds_by = await asker.run_quietly(rounds, meter)
        seconds_all = time.monotonic() - begin
        asked = [question for one in rounds for question in one]
        rows = by_policy(asked, real, simulate(costs, rate, asked), target_s, costs)
        result[name] = {
            "policies": rows,
            "misordered": misordered(rows),
            "seconds": seconds_all,
            "rounds": len(rounds),
            "rounds_asked_anew": rounds_by["anew"],
            "rounds_disturbed": rounds_by["disturbed"],
        }
        title = f"beta {beta:g} ({rate * 8e-6:.0f} Mbit/s), {name}"
        show(f"{title}; {rounds_by['anew']} rounds anew, {rounds_by['disturbed']} disturbed", result[name])
    return result


def prompts(model: Path) -> list[list[int]]:
    rng, tokenizer = random.Random(20261121), AutoTokenizer.from_pretrained(model)
    filler = encode(tokenizer, (model / "heldout.txt").read_text())
    found = (recall_document(rng, tokenizer, filler, length, num_facts=5) for length in LENGTHS)
    whole = [[*document.context_ids, *document.questions[0].question_ids] for document in found]
    # Questions are not all as long: end with as many tokens as the simulator is told of.
    return [(ids + ids[-1:] * LENGTHS[-1])[: LENGTHS[n]] for n, ids in enumerate(whole)]


async def run_all(workers: Workers, link: Link, costs: CostModel, options: argparse.Namespace) -> None:
    asker = Asker(workers, prompts(options.model))
    result: dict[str, Any] = {"hardware": costs.where, "documents_tokens": LENGTHS, "links": []}
    try:
        await asker.store()
        for beta in options.betas:
            pids = [*workers.pids, os.getpid()]
            result["links"].append(await run_beta(beta, asker, link, costs, pids, options))
            if options.json is not None:  # after each: a long run that is ended early leaves what it has
                options.json.write_text(json.dumps(result, indent=1) + "\n")
    finally:
        await asker.close()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write everything here")
    parser.add_argument("--costs", type=Path, default=COSTS, help="from scripts/measure_costs.py, on this machine")
    parser.add_argument("--model", type=Path, default=BUNDLED_MODEL)
    parser.add_argument("--betas", type=float, nargs="+", default=(0.05, 0.3, 2.0))
    parser.add_argument("--requests", type=int, default=200, help="per policy")
    parser.add_argument("--limit-s", type=float, default=120.0, help="per policy and link, where that is less")
    parser.add_argument("--patience-s", type=float, default=120.0, help="a run waits so long for a quiet machine")
    parser.add_argument(
        "--load", type=float, default=0.4, help="arrivals at random: share of the time that one at a time would take"
    )
    parser.add_argument("--concurrent", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that namespace and workers go on this way out, too
    costs = CostModel.load(options.costs)
    policy = {name: value for name, value in asdict(POLICY).items() if name != "tenants"}
    with (
        shaped_link() as link,
        running_workers(link, model=options.model, policy=policy, num_prefill=2, store_bytes=2 << 30) as workers,
    ):
        asyncio.run(run_all(workers, link, costs, options))
    return 0


if __name__ == "__main__":
    sys.exit(main())
