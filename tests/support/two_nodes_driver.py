"""Run on one of two Ray nodes: starts kvstream on the cluster, asks, and prints what came as one line of JSON."""

from __future__ import annotations

import asyncio
import json
import random
import sys

import httpx

from cluster.config import ServeConfig
from cluster.launch import running_cluster
from decode.slo import SLOPolicy
from scripts.demo_client import ask


async def questions(base_url: str) -> list[dict]:
    rng = random.Random(3)
    document = [rng.randrange(300, 4000) for _ in range(1500)]
    results = []
    async with httpx.AsyncClient(base_url=base_url, timeout=120) as client:
        for mode in ("lossless", "raw", "q3", "auto", "text"):
            answer = await ask(client, document, max_tokens=5, kv={"mode": mode, "ttft_ms": 0}, ignore_eos=True)
            results.append({"mode": mode, "tokens": answer.token_ids, "receipt": answer.receipt})
    return results


def main() -> None:
    # Pure roles: what is asked has to cross the link.
    config = ServeConfig(
        address=sys.argv[1],
        host=sys.argv[2],
        port=0,
        threads=1,
        prefill_decodes=False,
        policy=SLOPolicy(ttft_s=0.0),
    )
    with running_cluster(config) as cluster:
        results = asyncio.run(questions(cluster.base_url))
    print("RESULT " + json.dumps(results), flush=True)


if __name__ == "__main__":
    main()
