"""What things take on this machine with a model: the numbers that simulations run on, measured one by one.

    python -m scripts.measure_costs --out docs/benchmarks/costs-epyc-2core-202611.json

One compute thread, as a served worker with `threads: 1` has. Every figure is the least of several repeats, because on a
shared machine the others only ever make it slower. What is timed is checked first: decoded equals encoded.
"""

from __future__ import annotations

import argparse
import os
import platform
import random
import sys
import time
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import AutoTokenizer

from cluster.config import BUNDLED_MODEL
from cluster.cost_model import CostModel
from codec.levels import LevelKind
from decode.requests import SamplingParams
from decode.sampling import sample_batch
from decode.sampling_state import SamplingState
from decode.startup import exact_levels, nested_levels, promised_kl
from prefill.block_pool import blocks_for
from prefill.chunk_levels import ChunkLevels
from prefill.engine import SequenceSlice
from prefill.runtime import BLOCK_TOKENS, ModelRuntime, limit_threads, load_runtime
from prefill.store import ChunkStore
from scripts.model_data import encode, recall_document
from scripts.quiet import Meter

CHUNK_TOKENS = 256
DOCUMENT_TOKENS = 3_600  # 14 chunks
NUM_TIMED_CHUNKS = 10
ROWS = (1, 2, 4, 8, 12, 16)
SLICE_TOKENS = (16, 64, 128)
GREEDY = SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True)
SLICE_STARTS = (0, 512, 1024, 2048, 3072)

METER = Meter([os.getpid()], patience_s=300.0)
ELSEWHERE = np.ones(8 << 20)  # 64 MB, more than the caches hold

Chunk = tuple[int, Tensor, Tensor]  # where it starts; its k and v, [L, T, H, D]


def best_s(action: Callable[[], object], repeats: int) -> float:
    """With the caches full of other things each time, as they are when a worker that has waited for data goes on."""
    times = []
    METER.wait()
    for _ in range(repeats):
        ELSEWHERE.sum()
        begin = time.perf_counter()
        action()
        times.append(time.perf_counter() - begin)
    return min(times)


def documents(model: Path, count: int, *, seed: int = 20261121) -> list[list[int]]:
    """Book text with facts in it, as prompts: what the demo asks about."""
    rng, tokenizer = random.Random(seed), AutoTokenizer.from_pretrained(model)
    filler = encode(tokenizer, (model / "heldout.txt").read_text())
    found = (recall_document(rng, tokenizer, filler, DOCUMENT_TOKENS) for _ in range(count))
    return [[*document.context_ids, *document.questions[0].question_ids] for document in found]


def chunks_of(runtime: ModelRuntime, prompt: Sequence[int]) -> list[Chunk]:
    """The KV of a prompt's whole chunks."""
    num = (len(prompt) - 1) // CHUNK_TOKENS
    table = runtime.allocator.allocate(blocks_for(num * CHUNK_TOKENS, BLOCK_TOKENS))
    found = []
    for start in range(0, num * CHUNK_TOKENS, CHUNK_TOKENS):
        ids = list(prompt[start : start + CHUNK_TOKENS])
        runtime.engine.forward([SequenceSlice(token_ids=ids, start=start, block_table=table)])
        k, v = runtime.pool.read(table, start, start + CHUNK_TOKENS)
        found.append((start, k.clone(), v.clone()))
    runtime.allocator.release(table)
    return found


# -- bytes and the codec --------------------------------------------------------------------------------------------


class Codec:
    """The codec's costs over some chunks of real text, spread over all positions."""

    def __init__(self, runtime: ModelRuntime, chunks: Sequence[Chunk]) -> None:
        self.runtime, self.chunks = runtime, chunks
        self.levels = runtime.profile.level_names
        lossy = [level for level in runtime.profile.levels if level.kind is LevelKind.QUANTIZED]
        self.finest = max(lossy, key=lambda level: level.stages).name

    def measure(self, repeats: int) -> dict[str, dict[str, float]]:
        """chunk_bytes, encode_s, cut_s, decode_s and refine_s (both by level)."""
        found: dict[str, dict[str, float]] = {
            name: dict.fromkeys(self.levels, 0.0) for name in ("chunk_bytes", "encode_s", "cut_s", "decode_s")
        }
        found["refine_s"] = {"": 0.0}
        timed = self.chunks[:: max(1, len(self.chunks) // NUM_TIMED_CHUNKS)][:NUM_TIMED_CHUNKS]
        for number, (start, k, v) in enumerate(self.chunks):
            levels, key = self._stored(start, k, v), number.to_bytes(4, "little")
            for level in self.levels:
                blob = levels.blob(b"", level, start=start, stop=start + CHUNK_TOKENS, fresh=None)
                assert blob is not None, key
                found["chunk_bytes"][level] += len(blob) / len(self.chunks)
        for start, k, v in timed:
            self._time(found, start, k, v, repeats, share=1 / len(timed))
        return found

    def _stored(self, start: int, k: Tensor, v: Tensor) -> ChunkLevels:
        """A source's store with this one chunk in it."""
        levels = ChunkLevels(self.runtime, ChunkStore(1 << 28))
        levels.store_master(b"", k, v, start=start)
        return levels

    def _time(
        self, found: dict[str, dict[str, float]], start: int, k: Tensor, v: Tensor, repeats: int, *, share: float
    ) -> None:
        runtime, stop = self.runtime, start + CHUNK_TOKENS
        table = runtime.allocator.allocate(blocks_for(stop, BLOCK_TOKENS))
        stored = self._stored(start, k, v)
        for level in self.levels:
            blob = stored.blob(b"", level, start=start, stop=stop, fresh=None)
            assert blob is not None
            self._check(level, blob, start, k, v)
            # As the source makes it: the quantized levels are all cut from the finest.
            made = level if level in exact_levels(runtime.profile) else self.finest
            cut_s = best_s(lambda at=level: stored.blob(b"", at, start=start, stop=stop, fresh=None), repeats)  # type: ignore[misc]
            encode_s = best_s(lambda at=made: runtime.encode(k, v, start=start, level=at), repeats)  # type: ignore[misc]
            found["cut_s"][level] += share * cut_s
            found["encode_s"][level] += share * (encode_s + (cut_s if made != level else 0.0))
            found["decode_s"][level] += share * best_s(
                lambda b=blob: runtime.decode_into_pages(b, table, start=start, stop=stop),  # type: ignore[misc]
                repeats,
            )
        found["refine_s"][""] += share * best_s(lambda: runtime.pool.write(table, start, k, v), repeats)
        runtime.allocator.release(table)

    def _check(self, level: str, blob: bytes, start: int, k: Tensor, v: Tensor) -> None:
        """The exact levels give back every bit; the others the same as an encoding of their own."""
        got_k, got_v = self.runtime.decode(blob, start=start, stop=start + CHUNK_TOKENS)
        if level not in exact_levels(self.runtime.profile):
            alone = self.runtime.encode(k, v, start=start, level=level)
            k, v = self.runtime.decode(alone, start=start, stop=start + CHUNK_TOKENS)
        assert torch.equal(got_k, k) and torch.equal(got_v, v), f"{level}: decoded is not what was encoded"


# -- the engine -----------------------------------------------------------------------------------------------------


def measure_compute(runtime: ModelRuntime, repeats: int) -> dict[str, float]:
    """A slice of n tokens at position s takes  n * (a + b * (s + n/2)) + (1 - n/C) * (f + g * s)  seconds; C: a chunk.

    a and b from whole chunks alone, so that they hold for prompts computed chunk by chunk; then f and g, what a slice
    costs however short it is, from shorter ones. Least squares of relative errors.
    """
    table = runtime.allocator.allocate(blocks_for(max(SLICE_STARTS) + CHUNK_TOKENS, BLOCK_TOKENS))

    def time_slice(tokens: int, start: int, *, sampled: bool = False) -> float:
        def action() -> None:
            ids = [start + token for token in range(tokens)]
            rows = [SequenceSlice(token_ids=ids, start=start, block_table=table, need_logits=sampled)]
            logits = runtime.engine.forward(rows)
            sample_batch(logits, [SamplingState(GREEDY) for _ in logits])

        return best_s(action, repeats)

    time_slice(16, 0)
    rows, times = [], []
    for start in SLICE_STARTS:
        rows.append([CHUNK_TOKENS, CHUNK_TOKENS * (start + CHUNK_TOKENS / 2)])
        times.append(time_slice(CHUNK_TOKENS, start))
    token_s, position_s = _least_squares(rows, times)
    rows, rest, shorter = [], [], []
    for tokens in SLICE_TOKENS:
        for start in SLICE_STARTS:
            seconds = time_slice(tokens, start)
            by_token = tokens * (token_s + position_s * (start + tokens / 2))
            share = 1 - tokens / CHUNK_TOKENS
            rows.append([share, share * start])
            rest.append(seconds - by_token)
            shorter.append(seconds)
    slice_s, slice_position_s = _least_squares(rows, rest, of=shorter)
    found = [r[0] * slice_s + r[1] * slice_position_s - at for r, at in zip(rows, rest)]
    sample_s = min(time_slice(64, start, sampled=True) - time_slice(64, start) for start in (0, 256, 512))
    runtime.allocator.release(table)
    return {
        "sample_s": max(sample_s, 0.0),
        "token_s": token_s,
        "token_position_s": position_s,
        "slice_s": slice_s,
        "slice_position_s": slice_position_s,
        "slice_worst_error": max(abs(error) / seconds for error, seconds in zip(found, shorter)),
    }


def _least_squares(rows: list[list[float]], values: list[float], of: list[float] | None = None) -> list[float]:
    weights = 1 / np.array(of if of is not None else values)
    found, *_ = np.linalg.lstsq(np.array(rows) * weights[:, None], np.array(values) * weights, rcond=None)
    return [max(float(value), 0.0) for value in found]


def measure_steps(runtime: ModelRuntime, repeats: int) -> dict[str, float]:
    """A decode step of n rows, each with some 1,000 tokens behind it."""
    tables = [runtime.allocator.allocate(blocks_for(1024, BLOCK_TOKENS)) for _ in range(max(ROWS))]
    times = []
    for num in ROWS:
        slices = [
            SequenceSlice(token_ids=[5], start=1000, block_table=table, need_logits=True) for table in tables[:num]
        ]

        def step(rows: list[SequenceSlice] = slices) -> None:
            logits = runtime.engine.forward(rows)
            sample_batch(logits, [SamplingState(GREEDY) for _ in logits])

        times.append(best_s(step, repeats))
    for table in tables:
        runtime.allocator.release(table)
    step_s, row_s = _least_squares([[1.0, num] for num in ROWS], times)
    return {"step_s": step_s, "row_s": row_s}


def hardware() -> str:
    """The processor in words, without a name that tells whose machine it is."""
    cpu = next(
        (
            line.split(":", 1)[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if "model name" in line
        ),
        platform.machine(),
    )
    return f"{cpu}, {os.cpu_count()} cores"


def measure(model: Path, repeats: int, num_documents: int) -> CostModel:
    runtime = load_runtime(model, num_blocks=2048)
    compute = measure_compute(runtime, repeats)
    steps = measure_steps(runtime, repeats)
    chunks = [chunk for prompt in documents(model, num_documents) for chunk in chunks_of(runtime, prompt)]
    codec = Codec(runtime, chunks).measure(repeats)
    promised = promised_kl(runtime.profile)
    missing = [level for level, kl in promised.items() if kl is None]
    assert not missing, f"the profile promises nothing for {missing}; calibrate the model first"
    return CostModel(
        chunk_tokens=CHUNK_TOKENS,
        chunk_bytes=codec["chunk_bytes"],
        nested=tuple(level for level in runtime.profile.level_names if level in nested_levels(runtime.profile)),
        promised_kl={level: kl for level, kl in promised.items() if kl is not None},
        token_s=compute["token_s"],
        token_position_s=compute["token_position_s"],
        slice_s=compute["slice_s"],
        slice_position_s=compute["slice_position_s"],
        sample_s=compute["sample_s"],
        decode_s=codec["decode_s"],
        cut_s=codec["cut_s"],
        encode_s=codec["encode_s"],
        step_s=steps["step_s"],
        row_s=steps["row_s"],
        refine_s=codec["refine_s"][""],
        where=f"{hardware()}, one compute thread a worker, bundled model in bfloat16, {date.today():%Y-%m}",
        measured={
            "documents": num_documents,
            "chunks": len(chunks),
            "repeats": repeats,
            "slice_worst_error": compute["slice_worst_error"],
            "load_average": os.getloadavg()[0],
        },
    )  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=BUNDLED_MODEL)
    parser.add_argument("--out", type=Path, required=True, help="JSON file of the costs")
    parser.add_argument("--documents", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=15)
    options = parser.parse_args()
    limits = limit_threads(1)
    if any(os.environ.get(name) != value for name, value in limits.items()):  # they count from the process's start
        os.execve(sys.executable, [sys.executable, "-m", "scripts.measure_costs", *sys.argv[1:]], os.environ | limits)
    with torch.inference_mode():
        costs = measure(options.model, options.repeats, options.documents)
    costs.save(options.out)
    print(options.out.read_text())
    return 0


if __name__ == "__main__":
    sys.exit(main())
