"""What drawing a step's tokens costs: `python scripts/bench_sampling.py [--json FILE]`.

Batches of logits as a trained model gives them (50 likely tokens above a wide, low rest), one kind of request a line.
A line counts only after its tokens were checked: each row alone draws the same.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from decode.requests import SamplingParams  # noqa: E402
from decode.sampling import sample_batch  # noqa: E402
from decode.sampling_state import SamplingState  # noqa: E402

VOCABS, BATCHES, REPEATS = (4096, 128_256), (1, 32), 30
PROMPT = range(3, 600)
KINDS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "temperature": {},
    "top_p 0.95": {"top_p": 0.95},
    "top_k 50, top_p 0.95": {"top_k": 50, "top_p": 0.95},
    "min_p 0.05": {"min_p": 0.05},
    "greedy, penalties": {"temperature": 0.0, "repetition_penalty": 1.1, "frequency_penalty": 0.2},
    "greedy, 5 logprobs": {"temperature": 0.0, "logprobs": 5},
}


def logits_of(num_rows: int, vocab: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(vocab)
    logits = torch.randn(num_rows, vocab, generator=generator) * 2
    likely = torch.randint(vocab, (num_rows, 50), generator=generator)
    return logits.scatter_add(1, likely, 8 + 8 * torch.rand(num_rows, 50, generator=generator))


def states_of(params: SamplingParams, num_rows: int) -> list[SamplingState]:
    return [SamplingState(params, PROMPT) for _ in range(num_rows)]


def check(logits: torch.Tensor, params: SamplingParams) -> None:
    together = sample_batch(logits, states_of(params, len(logits)))
    alone = [sample_batch(row[None], states_of(params, 1))[0] for row in logits]
    assert together == alone, "a row's token depends on the batch"


def best_us(logits: torch.Tensor, params: SamplingParams) -> float:
    """The fastest of many steps: other processes only ever add."""
    states, best = states_of(params, len(logits)), float("inf")
    for _ in range(REPEATS):
        begin = time.perf_counter()
        sample_batch(logits, states)
        best = min(best, time.perf_counter() - begin)
    return best * 1e6


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the figures here too")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    ran_on = {
        "machine": platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "threads": options.threads,
    }
    print(", ".join(f"{name} {value}" for name, value in ran_on.items()))
    cells = [(vocab, rows) for vocab in VOCABS for rows in BATCHES]
    print(f"{'microseconds a step':24}" + "".join(f"{f'V {vocab}, R {rows}':>18}" for vocab, rows in cells))
    figures: dict[str, dict[str, float]] = {}
    for name, fields in KINDS.items():
        params = SamplingParams(seed=1, **fields)
        figures[name] = {}
        for vocab, rows in cells:
            logits = logits_of(rows, vocab)
            check(logits, params)
            figures[name][f"V{vocab} R{rows}"] = best_us(logits, params)
        print(f"{name:24}" + "".join(f"{value:18.0f}" for value in figures[name].values()), flush=True)
    if options.json:
        options.json.write_text(json.dumps({"ran_on": ran_on, "us_per_step": figures}, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
