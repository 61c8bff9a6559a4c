"""Does this machine give a matrix row the same bits whatever the number of rows? Prints a table per kind of product.

    .venv/bin/python scripts/check_row_invariance.py [--max-rows 100] [--model FOLDER]

The engine asks the same for the shapes of its model when it starts (`prefill.engine.measured_row_multiple`) and pads
its batches to the multiple it finds. ONEDNN_MAX_CPU_ISA=AVX512_CORE (or AVX2) shows how an older CPU would do.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import time
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from kernels.attention import TILE_TOKENS
from kernels.row_invariance import Product, cancelling_example, differing_row_counts
from prefill.engine import measured_row_multiple
from prefill.experts import product_among_others
from prefill.model import load_model

# Of an expert of Qwen3-30B-A3B, DeepSeek-V2-Lite and Mixtral 8x7B, and routers of these.
EXPERTS = ((2048, 1536), (768, 2048), (1408, 2048), (4096, 4096), (14336, 4096))
ROUTERS = ((2048, 128), (2048, 64), (4096, 8))
DEPTH_AND_OUT = ((256, 128), (256, 256), (256, 4096), (512, 256), (1024, 256), (4096, 256), (14336, 256))


def examples(dtype: torch.dtype, rows: int) -> list[tuple[str, Product, Tensor, Tensor]]:
    tried: list[tuple[str, Product, Tensor, Tensor]] = []
    for depth, out in DEPTH_AND_OUT:
        left, right = cancelling_example(rows, depth, out, dtype=dtype)
        tried.append((f"linear {depth} -> {out}", nn.functional.linear, left[None], right.t().contiguous()))
    for depth, out in ROUTERS:
        left, right = cancelling_example(rows, depth, out, dtype=dtype)
        tried.append((f"router {depth} -> {out}", nn.functional.linear, left[None], right.t().contiguous()))
    for depth, out in EXPERTS:
        left, right = cancelling_example(rows, depth, out, dtype=dtype)
        tried.append((f"expert {depth} -> {out}", product_among_others, left[None], right.t().contiguous()))
    for batch in (2, 16, 128):
        for depth, columns in ((64, TILE_TOKENS), (TILE_TOKENS, 64), (64, 64)):
            left, right = cancelling_example(rows, depth, columns, dtype=dtype, batch=batch)
            tried.append((f"bmm {batch} x [R, {depth}] [{depth}, {columns}]", torch.bmm, left, right))
    return tried


def differing_batches(dtype: torch.dtype) -> list[int]:
    """Batch sizes for which bmm gives one of its matrices other bits than alone."""
    left, right = cancelling_example(64, 64, TILE_TOKENS, dtype=dtype, batch=128)
    alone = torch.cat([torch.bmm(left[i : i + 1], right[i : i + 1]) for i in range(128)])
    return [n for n in (2, 3, 7, 16, 64, 128) if not torch.equal(torch.bmm(left[:n], right[:n]), alone[:n])]


def processor() -> str:
    info = Path("/proc/cpuinfo")
    text = info.read_text() if info.exists() else ""
    name = next((line.split(":")[1].strip() for line in text.splitlines() if "model name" in line), platform.machine())
    kinds = [kind for kind in ("avx512f", "avx512_bf16", "amx_bf16") if f" {kind}" in text]
    return f"{name} ({', '.join(kinds) or 'no AVX-512'})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--max-rows", type=int, default=100)
    parser.add_argument("--model", type=Path, help="a model folder: measure its shapes as the engine does")
    options = parser.parse_args()
    isa = os.environ.get("ONEDNN_MAX_CPU_ISA", "not limited")
    print(f"{processor()}; torch {torch.__version__}, {torch.get_num_threads()} threads; oneDNN ISA {isa}")
    for dtype in (torch.bfloat16, torch.float32):
        name = str(dtype).removeprefix("torch.")
        for what, product, left, right in examples(dtype, options.max_rows):
            started = time.perf_counter()
            counts = differing_row_counts(product, left, right, range(1, options.max_rows + 1))
            verdict = f"differs at R = {', '.join(map(str, counts[:8]))}" if counts else "same bits for every R"
            print(f"  {name:9} {what:34} {verdict:36} {time.perf_counter() - started:5.1f} s")
        batches = differing_batches(dtype)
        print(f"  {name:9} {'bmm, batch size':34} {f'differs at {batches}' if batches else 'same bits'}")
    if options.model:
        for dtype_name in ("bfloat16", "float32"):
            multiple = measured_row_multiple(load_model(options.model, dtype=dtype_name))
            print(f"  {options.model.name} in {dtype_name}: rows padded to a multiple of {multiple}")


if __name__ == "__main__":
    main()
