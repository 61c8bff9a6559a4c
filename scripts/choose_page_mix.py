"""Finds which layers' int4 and int8 pages should be finer and which may be coarser, and writes it as page_mix.json.

    .venv/bin/python scripts/choose_page_mix.py [--model FOLDER] [--text FILE] [--json FILE]

Keys and values of one layer after the other are quantized to 4 and to 2 bits, all else left as it is, and what that
costs is measured (scripts/calibration_loss.py: KL on tokens that depend on the context, the worse of answers and text).
At 8 bits the steps are 17 times finer than at 4, so the loss, quadratic in them, is 289 times smaller: not measured.
Losses of layers nearly add up; the choice is the cheapest one of at most 4 bits in the mean for int4, and 7 for int8.
What the chosen mix loses as a whole is measured too and stands in the file as `kl`: requests whose floor promises less
share no pages of that kind. Some minutes for the bundled model. Documents come from one half of the text;
bench_quantized_pages.py judges by the other.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from kernels.kv_quant import dequantize_blocks, quantize_blocks  # noqa: E402
from prefill.model import LoadedModel, load_model  # noqa: E402
from prefill.quantized_layout import BLOCK_TOKENS, CODE_BITS, Kind, LayerKind, PageMix, settled_tokens  # noqa: E402
from prefill.quantized_mix import write_page_mix  # noqa: E402
from scripts import model_data  # noqa: E402
from scripts.calibration_documents import make_documents, read_text, split_tokens  # noqa: E402
from scripts.calibration_loss import ModelLoss  # noqa: E402

SEED = 977
NUM_FACTS = 12
RECALL_LENGTHS = (600, 900, 1300, 2048)
TEXT_LENGTHS = (600, 1000)
PARTS = 2  # of the text: to choose by, to judge by
MEAN_BITS: dict[Kind, int] = {"int8": 7, "int4": 4}
Side = tuple[int, bool]  # layer, whether keys


def through(x: Tensor, kind: LayerKind, *, is_keys: bool) -> Tensor:
    """`x` [T, H, D] as a sequence that ends here reads it: quantized up to the boundary."""
    settled = settled_tokens(len(x))
    if not settled:
        return x
    parts = quantize_blocks(x[:settled].unflatten(0, (-1, BLOCK_TOKENS)), kind, per_channel=is_keys)
    back = dequantize_blocks(*parts, kind, per_channel=is_keys).to(x.dtype).transpose(1, 2).flatten(0, 1)
    return torch.cat((back, x[settled:]))


def loss_of(loss: ModelLoss, kinds: Mapping[Side, LayerKind]) -> dict[str, float]:
    """With these layers' keys or values quantized, all else as it was."""

    def transform(sample: Any) -> tuple[Tensor, Tensor]:
        k, v = sample.k.clone(), sample.v.clone()
        for (layer, is_keys), kind in kinds.items():
            x = k if is_keys else v
            x[layer] = through(x[layer], kind, is_keys=is_keys)
        return k, v

    return loss(transform)


def choose(costs: Mapping[Side, Mapping[LayerKind, float]], kind: Kind) -> dict[Side, LayerKind]:
    """The least sum of costs within the kind's mean bits; of equal ones, that with the most layers of this kind."""
    budget = MEAN_BITS[kind] * len(costs)
    best: dict[int, tuple[float, int, dict[Side, LayerKind]]] = {0: (0.0, 0, {})}
    for side, by_kind in costs.items():
        after: dict[int, tuple[float, int, dict[Side, LayerKind]]] = {}
        for bits, (cost, odd, chosen) in best.items():
            for each, more in by_kind.items():
                total = bits + CODE_BITS[each]
                found = (cost + more, odd + (each != kind), chosen | {side: each})
                if total <= budget and (total not in after or found[:2] < after[total][:2]):
                    after[total] = found
        best = after
    return min(best.values(), key=lambda found: found[:2])[2]


def make_loss(model: LoadedModel, folder: Path, text: Path, num_recall: int, num_text: int) -> ModelLoss:
    import transformers

    own, exact = (
        transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
        for dtype in (torch.bfloat16, torch.float32)
    )
    longest = max(RECALL_LENGTHS + TEXT_LENGTHS)
    filler = split_tokens(model_data.encode(model.tokenizer, read_text(text)), longest, PARTS)[0]
    documents = make_documents(
        model.tokenizer,
        filler,
        recall_lengths=[RECALL_LENGTHS[i % len(RECALL_LENGTHS)] for i in range(num_recall)],
        text_lengths=[TEXT_LENGTHS[i % len(TEXT_LENGTHS)] for i in range(num_text)],
        num_facts=NUM_FACTS,
        seed=SEED,
    )
    return ModelLoss(own, exact, model.rope_tables, documents)


def measure_costs(loss: ModelLoss, num_layers: int) -> dict[Side, dict[LayerKind, float]]:
    costs: dict[Side, dict[LayerKind, float]] = {}
    for layer in range(num_layers):
        for is_keys in (True, False):
            int4 = max(loss_of(loss, {(layer, is_keys): "int4"})["kl"], 0.0)
            int2 = max(loss_of(loss, {(layer, is_keys): "int2"})["kl"], int4)
            costs[layer, is_keys] = {"int8": int4 / 289, "int4": int4, "int2": int2}
            print(f"layer {layer} {'keys' if is_keys else 'values':<6} int4 {int4:.6f} int2 {int2:.6f}", flush=True)
    return costs


def mix_of(chosen: Mapping[Side, LayerKind], num_layers: int) -> PageMix:
    keys, values = (tuple(chosen[layer, is_keys] for layer in range(num_layers)) for is_keys in (True, False))
    return PageMix(keys=keys, values=values)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ROOT / "model", help="default: the bundled model")
    parser.add_argument("--text", type=Path, help="a file or folder; default: heldout.txt beside the model")
    parser.add_argument("--recall-documents", type=int, default=16)
    parser.add_argument("--text-documents", type=int, default=8)
    parser.add_argument("--json", type=Path, help="what each layer costs")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    started = time.monotonic()
    model = load_model(args.model)
    text = args.text or args.model / "heldout.txt"
    loss = make_loss(model, args.model, text, args.recall_documents, args.text_documents)
    num_layers = model.layout.num_layers
    costs = measure_costs(loss, num_layers)
    judged = {}
    for kind in MEAN_BITS:
        chosen = choose(costs, kind)
        mix = mix_of(chosen, num_layers)
        for name, kinds in ((f"{kind} uniform", dict.fromkeys(costs, kind)), (kind, chosen)):
            judged[name] = loss_of(loss, kinds)
            shown = ", ".join(f"{part} {judged[name].get(part, 0.0):.6f}" for part in ("kl", "delta_nll", "recall"))
            print(f"{name}: {shown}")
        path = write_page_mix(args.model, kind, mix, kl=max(judged[kind]["kl"], 0.0))
        print(f"{path}: {kind} {mix}")
    if args.json:
        rows = [{"layer": i, "keys": is_keys, **by_kind} for (i, is_keys), by_kind in costs.items()]
        content = {"costs": rows, "judged": judged, "seconds": round(time.monotonic() - started)}
        args.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
