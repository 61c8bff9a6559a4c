"""What int8, int4 and fp8 pages hold, lose and cost beside bf16 pages: `python scripts/bench_quantized_pages.py`.

    .venv/bin/python scripts/bench_quantized_pages.py [--json FILE] [--questions 1024] [--texts 64]

int8 and int4 are with the page mixes beside the model (scripts/choose_page_mix.py), `int4 uniform` without.

- *Memory*: what a sequence takes, ring of recent tokens, scales, zeros and partial blocks included, checked against the
  tensors of real pools; bf16 in blocks of 16.
- *Quality*: held-out documents computed through the pages, beside the same through bf16 pages (quantized_quality.py).
- *Speed*: CPU time of one thread, interleaved, the least and the middle of so many rounds: a decode step of 8 sequences
  at 3,500 tokens, and the prefill of one in chunks of 256.

Bars: int4 holds 3.2 times the tokens of bf16 at delta_nll <= 0.01 and <= 2 points of recall lost, int8 1.8 times at
<= 0.002. Returns 1 where one is missed.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from prefill.attention import Span  # noqa: E402
from prefill.kv_layout import KVLayout  # noqa: E402
from prefill.kv_pool import KVPool  # noqa: E402
from prefill.model import LoadedModel, load_model  # noqa: E402
from prefill.quantized_layout import Kind, PageMix, blocks_for, sequence_bytes  # noqa: E402
from prefill.quantized_mix import read_page_mix  # noqa: E402
from prefill.quantized_pool import QuantizedKVPool  # noqa: E402
from scripts import model_data  # noqa: E402
from scripts.calibration_documents import Document, make_documents, read_text, split_tokens  # noqa: E402
from scripts.choose_page_mix import PARTS  # noqa: E402
from scripts.quantized_quality import forward, measure  # noqa: E402

SEED = 4321
NUM_FACTS = 16
RECALL_LENGTHS = (700, 1400, 2000, 3500)
TEXT_LENGTHS = (512, 1024, 2048, 3500)
TOKENS, BATCH = 3500, 8
BF16_BLOCK_TOKENS = 16
BARS = {"int4": {"tokens": 3.2, "delta_nll": 0.01, "points": 2.0}, "int8": {"tokens": 1.8, "delta_nll": 0.002}}
WIDE = KVLayout(num_layers=32, num_kv_heads=8, head_dim_k=128, head_dim_v=128, dtype="bfloat16")  # Llama-3-8B's


Ways = dict[str, tuple[Kind, PageMix | None]]


def held(layout: KVLayout, kind: Kind, num_tokens: int, mix: PageMix | None = None) -> float:
    """Sequences of so many tokens in a given memory, beside bf16 pages."""
    blocks = -(-num_tokens // BF16_BLOCK_TOKENS)
    return blocks * BF16_BLOCK_TOKENS * layout.bytes_per_token / sequence_bytes(layout, kind, num_tokens, mix)


def measure_memory(layout: KVLayout, kind: Kind, mix: PageMix | None) -> dict[str, Any]:
    """Asserts that real pools take what is said."""
    pool = QuantizedKVPool(layout, BATCH * blocks_for(TOKENS), kind, BATCH, mix=mix)
    assert pool.num_bytes == BATCH * sequence_bytes(layout, kind, TOKENS, mix), (pool.num_bytes, kind)
    bf16 = KVPool(layout, BATCH * -(-TOKENS // BF16_BLOCK_TOKENS), BF16_BLOCK_TOKENS)
    assert bf16.num_bytes / pool.num_bytes == held(layout, kind, TOKENS, mix)
    return {
        "bytes_per_token_in_pages": pool.bytes_per_token,
        "ring_bytes": pool.ring_bytes,
        "sequence_bytes": sequence_bytes(layout, kind, TOKENS, mix),
        "tokens_vs_bf16": held(layout, kind, TOKENS, mix),
        "tokens_vs_bf16_at": {n: round(held(layout, kind, n, mix), 3) for n in (500, 1000, 2000, 3500, 8000, 32000)},
        "tokens_vs_bf16_head_dim_128_at": {n: round(held(WIDE, kind, n), 3) for n in (1000, 3500, 8000, 32000)},
    }


def documents(model: LoadedModel, text: Path, num_questions: int, num_texts: int) -> list[Document]:
    room = model.max_context - 160
    return make_documents(
        model.tokenizer,
        split_tokens(model_data.encode(model.tokenizer, read_text(text)), max(RECALL_LENGTHS), PARTS)[1],
        recall_lengths=[min(RECALL_LENGTHS[i % 4], room) for i in range(-(-num_questions // NUM_FACTS))],
        text_lengths=[min(TEXT_LENGTHS[i % 4], room) for i in range(num_texts)],
        num_facts=NUM_FACTS,
        seed=SEED,
    )


class Bf16Speed:
    def __init__(self, model: LoadedModel, rounds: int) -> None:
        blocks = -(-(TOKENS + rounds) // BF16_BLOCK_TOKENS)
        self._model, self._pool = model, KVPool(model.layout, BATCH * blocks, BF16_BLOCK_TOKENS)
        self._tables = [list(range(i * blocks, (i + 1) * blocks)) for i in range(BATCH)]

    def fill(self, k: Tensor, v: Tensor) -> None:
        for table in self._tables:
            self._pool.write(table, 0, k, v)

    def step(self, position: int) -> Tensor:
        spans = [Span(row=i, num_tokens=1, start=position, block_table=t) for i, t in enumerate(self._tables)]
        return step_forward(self._model, position, self._pool.make_batch(spans))

    def prefill(self, tokens: Sequence[int]) -> None:
        for start in range(0, len(tokens), 256):
            part = tokens[start : start + 256]
            span = Span(row=0, num_tokens=len(part), start=start, block_table=self._tables[0])
            forward(self._model, part, start, self._pool.make_batch([span]))


class QuantizedSpeed:
    def __init__(self, model: LoadedModel, rounds: int, kind: Kind, mix: PageMix | None) -> None:
        blocks = blocks_for(TOKENS + rounds)
        self._model = model
        self._pool = QuantizedKVPool(model.layout, (BATCH + 1) * blocks, kind, BATCH + 1, mix=mix)
        self._tables = [list(range(i * blocks, (i + 1) * blocks)) for i in range(BATCH + 1)]
        self._rings = [self._pool.rings.allocate() for _ in range(BATCH)]

    def fill(self, k: Tensor, v: Tensor) -> None:
        for table, ring in zip(self._tables, self._rings):
            self._pool.write(table, ring, 0, k, v)

    def step(self, position: int) -> Tensor:
        spans = [
            Span(row=i, num_tokens=1, start=position, block_table=table, ring=ring)
            for i, (table, ring) in enumerate(zip(self._tables, self._rings))
        ]
        return step_forward(self._model, position, self._pool.make_batch(spans))

    def prefill(self, tokens: Sequence[int]) -> None:
        ring = self._pool.rings.allocate()
        for start in range(0, len(tokens), 256):
            part = tokens[start : start + 256]
            span = Span(row=0, num_tokens=len(part), start=start, block_table=self._tables[-1], ring=ring)
            forward(self._model, part, start, self._pool.make_batch([span]))
        self._pool.rings.release(ring)


def step_forward(model: LoadedModel, position: int, batch: object) -> Tensor:
    ids, positions = torch.arange(10, 10 + BATCH)[None], torch.full((1, BATCH), position)
    with torch.inference_mode():
        return model.model(ids, position_ids=positions, use_cache=False, kv=batch).logits[0].float()


def real_kv(model: LoadedModel, tokens: Sequence[int]) -> tuple[Tensor, Tensor]:
    pool, table = KVPool(model.layout, -(-len(tokens) // 16)), list(range(-(-len(tokens) // 16)))
    for start in range(0, len(tokens), 256):
        part = tokens[start : start + 256]
        span = Span(row=0, num_tokens=len(part), start=start, block_table=table)
        forward(model, part, start, pool.make_batch([span]))
    return pool.read(table, 0, len(tokens))


def measure_speed(model: LoadedModel, tokens: Sequence[int], quantized: Ways, rounds: int) -> dict[str, Any]:
    """`rounds` steps of a growing sequence, so that what is quantized every 32 tokens counts. Asserts that int8 pages
    give nearly the logits of bf16 pages before anything is timed."""
    ways: dict[str, Bf16Speed | QuantizedSpeed] = {"bf16": Bf16Speed(model, rounds)}
    ways |= {name: QuantizedSpeed(model, rounds, *way) for name, way in quantized.items()}
    start = TOKENS - rounds // 2
    kv = real_kv(model, tokens[:start])
    first = {}
    for name, way in ways.items():
        way.fill(*kv)
        first[name] = way.step(start)
    if "int8" in first:
        agreement = torch.nn.functional.cosine_similarity(first["int8"], first["bf16"], dim=-1).min()
        assert agreement > 0.99, f"int8 pages give other logits than bf16 pages: cosine {agreement:.4f}"
    steps: dict[str, list[float]] = {name: [] for name in ways}
    for position in range(start + 1, start + rounds):
        for name, way in ways.items():
            steps[name].append(seconds(lambda way=way, at=position: way.step(at)))
    prefills: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(3):
        for name, way in ways.items():
            prefills[name].append(seconds(lambda way=way: way.prefill(tokens[:TOKENS])))
    return {
        name: {
            "decode_step_ms": {
                "least": 1000 * min(steps[name]),
                "middle": 1000 * statistics.median(steps[name]),
                "mean": 1000 * statistics.mean(steps[name]),
            },
            "decode_step_vs_bf16": statistics.median(steps[name]) / statistics.median(steps["bf16"]),
            "prefill_s": min(prefills[name]),
            "prefill_vs_bf16": min(prefills[name]) / min(prefills["bf16"]),
        }
        for name in ways
    }


def seconds(work: Callable[[], Any]) -> float:
    """CPU time of this thread, so that a busy machine distorts less."""
    started = time.thread_time()
    work()
    return time.thread_time() - started


def missed_bars(result: dict[str, Any]) -> list[str]:
    missed = []
    for kind, bars in BARS.items():
        memory, quality = result["memory"].get(kind), result.get("quality", {}).get(kind)
        if memory and memory["tokens_vs_bf16"] < bars["tokens"]:
            missed.append(f"{kind} holds {memory['tokens_vs_bf16']:.3f} times the tokens, not {bars['tokens']}")
        if quality and quality["delta_nll"] > bars["delta_nll"]:
            missed.append(f"{kind}: delta_nll {quality['delta_nll']:.5f}, more than {bars['delta_nll']}")
        if quality and quality.get("recall_lost_points", 0.0) > bars.get("points", float("inf")):
            missed.append(f"{kind}: {quality['recall_lost_points']:.2f} points of recall lost")
    return missed


def show(result: dict[str, Any]) -> None:
    print(f"{'':13}{'tokens':>8}{'d nll':>10}{'answers':>20}{'text':>20}{'recall lost':>13}{'step':>8}{'prefill':>9}")
    for kind, memory in result["memory"].items():
        cells = [f"{kind:13}{memory['tokens_vs_bf16']:>8.3f}"]
        if quality := result.get("quality", {}).get(kind):
            cells.append(f"{quality['delta_nll']:>10.5f}")
            for part in ("recall", "text"):
                name = f"{part}_delta_nll"
                cells.append(f"{quality.get(name, 0.0):>11.5f}±{quality.get(f'{name}_error', 0.0):.5f} ")
            cells.append(f"{quality.get('recall_lost_points', 0.0):>12.2f}")
        if speed := result.get("speed", {}).get(kind):
            cells.append(f"{speed['decode_step_vs_bf16']:>8.2f}{speed['prefill_vs_bf16']:>9.2f}")
        print("".join(cells))
    for line in result["missed_bars"]:
        print(f"BAR MISSED {line}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ROOT / "model", help="default: the bundled model")
    parser.add_argument("--text", type=Path, help="a file or folder; default: heldout.txt beside the model")
    parser.add_argument("--questions", type=int, default=1024, help="recall questions, in tens of documents (0: none)")
    parser.add_argument("--texts", type=int, default=64, help="documents of plain text that go on for 96 tokens")
    parser.add_argument("--rounds", type=int, default=32, help="decode steps timed (0: none)")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    model = load_model(args.model)
    found = documents(model, args.text or args.model / "heldout.txt", args.questions, args.texts)
    kinds: tuple[Kind, ...] = ("int8", "int4")
    ways: Ways = {kind: (kind, read_page_mix(args.model, kind, model.layout)) for kind in kinds}
    ways |= {f"{kind} uniform": (kind, None) for kind in kinds}
    ways["fp8"] = ("fp8", None)
    result: dict[str, Any] = {
        "machine": platform.machine(), "python": platform.python_version(), "torch": torch.__version__,
        "threads": 1, "model": model.name, "fingerprint": model.fingerprint, "tokens": TOKENS, "batch": BATCH,
        "documents": {"recall": [len(d.context) for d in found if d.kind == "recall"],
                      "text": [len(d.context) for d in found if d.kind == "text"]},
        "memory": {name: measure_memory(model.layout, *way) for name, way in ways.items()},
    }  # fmt: skip
    if args.rounds:
        words = model_data.encode(model.tokenizer, read_text(args.text or args.model / "heldout.txt"))
        result["speed"] = measure_speed(model, [int(word) for word in words[: 2 * TOKENS]], ways, args.rounds)
    if found:

        def progress(number: int) -> None:
            print(f"\rdocument {number + 1} of {len(found)}", end="", file=sys.stderr, flush=True)

        result["quality"] = measure(found, model, ways, progress)
        print(file=sys.stderr)
    result["missed_bars"] = missed_bars(result)
    show(result)
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 1 if result["missed_bars"] else 0


if __name__ == "__main__":
    sys.exit(main())
