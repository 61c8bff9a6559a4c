"""What shared prefixes and stored chunks save: `python -m scripts.bench_prefix [--trace FILE] [--json FILE]`.

On one decode worker with the bundled model, in this process: the time to the first token when 3,500 tokens of a prompt
are in the pages, in the store in RAM, on disk after a restart, and not there at all; ten turns of a conversation. Each
answer is checked against the engine alone first. With a trace (Mooncake's format): what would be computed of it, and
how much of the pages would be wasted, by the same bookkeeping without the model.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from decode.requests import GenerationRequest, SamplingParams
from decode.slo import SLOPolicy
from decode.worker import DecodeWorker
from prefill.block_pool import BlockPool, blocks_for
from prefill.chunks import KeyChain
from prefill.engine import generate_greedy
from prefill.runtime import BLOCK_TOKENS, ModelRuntime, load_runtime
from transport.stream_client import StreamClient

ROOT = Path(__file__).resolve().parent.parent
SHARED_TOKENS, CHUNK_TOKENS, ANSWER = 3500, 256, 24
REPEATS, TURNS = 15, 10
TRACE_BLOCK = 512  # tokens of one hash of the trace
# Exact KV only, so that every answer can be checked.
POLICY = SLOPolicy(ttft_s=0.0, levels=("lossless",), floor="lossless", ceiling="lossless", refine_to="lossless")


@contextmanager
def worker(runtime: ModelRuntime, path: Path) -> Iterator[DecodeWorker]:
    """With a store in `path`, and pages that hold nothing yet."""
    store = runtime.open_store(256 << 20, chunk_tokens=CHUNK_TOKENS, path=path, disk_bytes=1 << 30)
    running = DecodeWorker(runtime, policy=POLICY, chunk_tokens=CHUNK_TOKENS, store=store)
    try:
        yield running
    finally:
        running.shutdown()
        store.close()
        runtime.allocator.forget_cached()


class Answer:
    """Tokens, the receipt, and when each token came, seconds since it was asked."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.times: list[float] = []
        self.receipt: dict[str, Any] = {}


def ask(running: DecodeWorker, token_ids: list[int], *, max_tokens: int = ANSWER) -> Answer:
    request = GenerationRequest(
        request_id=f"bench-{time.monotonic_ns()}",
        token_ids=tuple(token_ids),
        sampling=SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True),
    )
    answer = Answer()

    async def run() -> None:
        client = StreamClient(running.endpoint)
        try:
            begin = time.perf_counter()
            async for event in client.submit({"kind": "generate", "request": request.to_wire(), "sources": []}):
                if event.get("tokens"):
                    answer.tokens += event["tokens"]
                    answer.times.append(time.perf_counter() - begin)
                if "finished" in event:
                    answer.receipt = event["finished"]["receipt"]
                assert "failed" not in event and "refused" not in event, event
        finally:
            await client.close()

    asyncio.run(run())
    return answer


def step_ms(answer: Answer) -> float:
    return 1e3 * statistics.median(b - a for a, b in zip(answer.times, answer.times[1:]))


def prompts(runtime: ModelRuntime) -> tuple[list[int], Iterator[list[int]]]:
    """A shared document, and questions on it that differ."""
    text = (ROOT / "model" / "heldout.txt").read_text()
    ids = runtime.model.tokenizer.encode(text)
    assert len(ids) > SHARED_TOKENS + 4000, "the held-out text is too short"

    def questions() -> Iterator[list[int]]:
        at = SHARED_TOKENS
        while True:
            yield ids[at : at + 20]
            at += 20

    return ids[:SHARED_TOKENS], questions()


def prefix_hits(runtime: ModelRuntime, folder: Path) -> dict[str, Any]:
    document, questions = prompts(runtime)
    found: dict[str, Any] = {}

    def measure(name: str, running: DecodeWorker, *, forget: bool, repeats: int) -> None:
        answers = []
        for _ in range(repeats):
            if forget:
                forget_pages(running)
            token_ids = document + next(questions)
            answer = ask(running, token_ids)
            expected = generate_greedy(runtime.engine, runtime.allocator, token_ids, ANSWER)
            assert answer.tokens == expected, f"{name}: not the tokens of the engine alone"
            answers.append(answer)
        last = answers[-1].receipt
        steps = statistics.median(map(step_ms, answers))
        receipts = [answer.receipt for answer in answers]
        decode_ms = [
            sum(chunk["decode_ms"] or 0 for chunk in receipt["chunks"]) + (receipt["partial_decode_ms"] or 0)
            for receipt in receipts
        ]
        ttft = statistics.median(1e3 * answer.times[0] for answer in answers)
        found[name] = {
            "ttft_ms": round(ttft, 2),
            "step_ms": round(steps, 2),
            "decode_ms": round(statistics.median(decode_ms), 2),
            "steps_beyond_decoding": round((ttft - statistics.median(decode_ms)) / steps, 2),
            "levels": last["levels"],
            "cached_tokens": last["cached_tokens"],
            "partial_tokens": last["partial_tokens"],
        }

    with worker(runtime, folder) as running:
        measure("computed", running, forget=True, repeats=1)
        settle(running)
        measure("pages", running, forget=False, repeats=REPEATS)
        measure("store in RAM", running, forget=True, repeats=REPEATS)
    on_disk = []
    for _ in range(5):
        with worker(runtime, folder) as running:
            measure("store on disk, after a restart", running, forget=True, repeats=1)
            settle(running)
            on_disk.append(found["store on disk, after a restart"])
    found["store on disk, after a restart"] = sorted(on_disk, key=lambda item: item["ttft_ms"])[len(on_disk) // 2]
    return found


def settle(running: DecodeWorker) -> None:
    """All that was computed is in the store, and on disk."""
    assert running.source is not None
    assert running.source.wait_until_idle(60) and running.source.store.flush(60)


def forget_pages(running: DecodeWorker) -> None:
    with running._lock:
        running._pages.forget_cached()


def conversation(runtime: ModelRuntime, folder: Path) -> dict[str, Any]:
    document, questions = prompts(runtime)
    token_ids = document[:400]
    with worker(runtime, folder) as running:
        before = running.stats()["decode_computed_prompt_tokens_total"]
        for _ in range(TURNS):
            answer = ask(running, token_ids)
            assert answer.tokens == generate_greedy(runtime.engine, runtime.allocator, token_ids, ANSWER)
            last = token_ids
            token_ids = token_ids + answer.tokens + next(questions)
        computed = running.stats()["decode_computed_prompt_tokens_total"] - before
    # An answer's tokens are computed as it is generated, all but the last of each.
    distinct = len(last) - (TURNS - 1) * (ANSWER - 1)
    return {
        "turns": TURNS,
        "prompt_tokens_of_all_turns": sum(400 + turn * (ANSWER + 20) for turn in range(TURNS)),
        "prompt_tokens_computed": int(computed),
        "new_tokens": distinct,
        "rounding_allowed": (TURNS - 1) * BLOCK_TOKENS,
    }


def trace(path: Path, num_requests: int) -> dict[str, Any]:
    """Requests one after another on a pool that never has to forget."""
    requests = [json.loads(line) for line in path.read_text().splitlines()[:num_requests]]
    total_blocks = sum(blocks_for(item["input_length"] + item["output_length"], BLOCK_TOKENS) for item in requests)
    pool = BlockPool(total_blocks)
    computed = prompt_tokens = held = used = 0
    seen: set[tuple[int, int]] = set()
    for number, item in enumerate(requests):
        length = item["input_length"]
        # The tokens of a hash are not in the trace: any that are as different do. The last hash may stand for a part.
        tokens = [part for name in item["hash_ids"] for part in [name] * TRACE_BLOCK][:length]
        assert len(tokens) == length, "the trace's hashes do not cover a prompt"
        keys = KeyChain(tokens, fingerprint="trace").blocks(BLOCK_TOKENS)
        blocks = pool.match(keys[: (length - 1) // BLOCK_TOKENS])
        pool.share(blocks)
        num_cached = len(blocks)
        blocks += pool.allocate(blocks_for(length, BLOCK_TOKENS) - num_cached)
        for index in range(num_cached, len(keys)):
            pool.register(blocks[index], keys[index], keys[index - 1] if index else None)
        computed += length - num_cached * BLOCK_TOKENS
        prompt_tokens += length
        seen.update((position, name) for position, name in enumerate(item["hash_ids"][: length // TRACE_BLOCK]))
        if length % TRACE_BLOCK:
            seen.add((-number - 1, length % TRACE_BLOCK))  # a part of a block is counted as new
        # Pages on demand: what a request holds at its end, of which the last block is not full.
        final = length + item["output_length"]
        held += blocks_for(final, BLOCK_TOKENS) * BLOCK_TOKENS
        used += final
        pool.release(blocks)
    pool.check_integrity()
    distinct = sum(TRACE_BLOCK if position >= 0 else size for position, size in seen)
    return {
        "requests": len(requests),
        "prompt_tokens": prompt_tokens,
        "computed_tokens": computed,
        "distinct_tokens": distinct,
        "rounding_allowed": len(requests) * BLOCK_TOKENS,
        "waste": round(1 - used / held, 5),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--trace", type=Path, help="requests in Mooncake's format: input_length, hash_ids")
    parser.add_argument("--requests", type=int, default=3000, help="how many of the trace")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    result: dict[str, Any] = {
        "hardware": {"cores": os.cpu_count(), "machine": platform.machine(), "threads": 1},
        "torch": torch.__version__,
    }
    runtime = load_runtime(ROOT / "model", num_blocks=1024)
    with tempfile.TemporaryDirectory() as folder:
        result["prefix_hits"] = prefix_hits(runtime, Path(folder) / "hits")
        result["conversation"] = conversation(runtime, Path(folder) / "turns")
    if options.trace is not None:
        result["trace"] = trace(options.trace, options.requests)
    print(json.dumps(result, indent=1))
    if options.json is not None:
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
