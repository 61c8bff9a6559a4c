"""Mixes of prefill and decode workers beside aggregated serving on the same cores: `python scripts/bench_mix.py`.

Without addresses, in virtual time: the table of docs/routing.md (--requests a row). With the addresses of running
servers, NAME=URL each: the same requests to each of them in turns, --rounds times; what is worth reading are the ratios
to the first one.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import httpx

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "support")]

from route_world import Figures, Speeds, World, again, poisson  # noqa: E402

LOADS = (0.2, 0.5, 0.8)
SHAPES = (((500, 4000), (5, 60)), ((2000, 12000), (20, 60)), ((200, 600), (50, 200)))
ROWS_A_STEP = 8  # that load is reckoned with
MIXES: dict[str, dict[str, Any]] = {
    "four aggregated": {"num_prefill": 0, "num_decode": 4},
    "two and two, pure": {"num_prefill": 2, "num_decode": 2},
    "two and two": {"num_prefill": 2, "num_decode": 2, "companions": True},
}


def simulated(num: int, seed: int) -> list[dict[str, Any]]:
    """A row for each shape, load and mix. Load is the share of the time that four workers are busy."""
    speeds, found = Speeds(), []
    for prompts, answers in SHAPES:
        each_s = sum(prompts) / 2 * speeds.token_s + sum(answers) / 2 * (speeds.row_s + speeds.step_s / ROWS_A_STEP)
        for load in LOADS:
            requests = poisson(num, rate=4 * load / each_s, prompt_tokens=prompts, output_tokens=answers, seed=seed)
            for name, options in MIXES.items():
                asked = again(requests)
                World(**options).run(asked)
                figures, routes = Figures.of(asked), [one.route for one in asked if one.route is not None]
                row = {
                    "prompts": prompts,
                    "answers": answers,
                    "load": load,
                    "mix": name,
                    "ttft_s": (figures.mean(figures.ttft), figures.quantile(figures.ttft, 0.95)),
                    "e2e_s": (figures.mean(figures.e2e), figures.quantile(figures.e2e, 0.95)),
                    "aggregated": sum(route.is_aggregated for route in routes) / num,
                    "at_companions": sum(route.decode.companion_of is not None for route in routes) / num,
                }
                found.append(row)
                told = "  ".join(f"{key} {row[key][0]:.2f} / {row[key][1]:.2f}" for key in ("ttft_s", "e2e_s"))
                told += f"  aggregated {row['aggregated']:.0%}  at companions {row['at_companions']:.0%}"
                print(f"{prompts} / {answers} load {load}  {name:18s} {told}", flush=True)
    return found


async def burst(url: str, options: argparse.Namespace, seed: int) -> dict[str, float]:
    """`requests` of them, `concurrency` at a time: mean seconds to the first token and to the last, tokens a second."""
    rng, gate = random.Random(seed), asyncio.Semaphore(options.concurrency)
    prompts = [[rng.randrange(300, 4000) for _ in range(options.prompt_tokens)] for _ in range(options.requests)]
    ttfts, e2es = [], []

    async def ask(client: httpx.AsyncClient, prompt: list[int]) -> None:
        body = {"prompt": prompt, "max_tokens": options.answer_tokens, "ignore_eos": True, "stream": True}
        async with gate:
            begin, first = time.perf_counter(), None
            async with client.stream("POST", "/v1/completions", json=body) as response:
                response.raise_for_status()
                async for line in response.aiter_lines():
                    if line.startswith("data: ") and '"error"' in line:
                        raise RuntimeError(line)
                    if line.startswith("data: ") and first is None:
                        first = time.perf_counter()
            assert first is not None
            ttfts.append(first - begin)
            e2es.append(time.perf_counter() - begin)

    began = time.perf_counter()
    async with httpx.AsyncClient(base_url=url, timeout=600) as client:
        await asyncio.gather(*(ask(client, prompt) for prompt in prompts))
    seconds = time.perf_counter() - began
    tokens = options.requests * options.answer_tokens
    return {"ttft_s": statistics.mean(ttfts), "e2e_s": statistics.mean(e2es), "tokens_per_s": tokens / seconds}


def in_turns(servers: dict[str, str], options: argparse.Namespace) -> dict[str, list[dict[str, float]]]:
    found: dict[str, list[dict[str, float]]] = {name: [] for name in servers}
    for number in range(options.rounds + 1):  # the first is for warming up
        for name, url in servers.items():
            measured = asyncio.run(burst(url, options, seed=number))
            if number:
                found[name].append(measured)
            print(f"round {number} {name:24s} " + "  ".join(f"{k} {v:.3f}" for k, v in measured.items()), flush=True)
    first = next(iter(servers))
    for name, rounds in found.items():
        ratios = {
            key: [mine[key] / theirs[key] for mine, theirs in zip(rounds, found[first], strict=True)]
            for key in rounds[0]
        }
        print(
            f"{name:24s} beside {first}: "
            + "  ".join(f"{k} x{statistics.median(v):.2f} ({min(v):.2f} to {max(v):.2f})" for k, v in ratios.items())
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("servers", nargs="*", help="NAME=URL; none: in virtual time")
    parser.add_argument("--requests", type=int, default=None, help="a row (default 600), or a burst (default 32)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--concurrency", type=int, default=16)
    parser.add_argument("--prompt-tokens", type=int, default=300)
    parser.add_argument("--answer-tokens", type=int, default=100)
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args()
    options.requests = options.requests or (32 if options.servers else 600)
    if options.servers:
        found: Any = in_turns(dict(server.split("=", 1) for server in options.servers), options)
    else:
        found = simulated(options.requests, options.seed)
    if options.json is not None:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
