"""`Engine.forward` over a pool whose batches are the GPU's, in Triton's interpreter: ragged batches, chunks between
decode rows, replayed steps, in every kind of family, against the same engine on the CPU."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# family: rows the engine pads to, and the error allowed. In float32 both sides round at the seventh digit.
CASES = {
    "qwen2-window": (4, 2e-5), "gemma2": (1, 2e-5), "deepseek-v3": (2, 2e-5),
}  # fmt: skip

PROGRAM = """
import json, sys, torch
from triton_interpreter import fix_floats
fix_floats()
from model_families import tiny_model
from prefill.engine import Engine
from prefill.kv_pool import KVPool
from prefill.model import wrap_model
from scripts.gpu_engine_production import Sizes, run_schedule

sizes = Sizes(prompts=(1, 18, 60), steps=2, rows=4, rounds=1, blocks=64)
for number, (family, (multiple, _)) in enumerate(json.loads(sys.argv[1]).items()):
    model = wrap_model(tiny_model(family), None, name=family, fingerprint=family)
    reference = Engine(model, KVPool(model.layout, sizes.blocks), row_multiple=4)
    pool = KVPool(model.layout, sizes.blocks, gpu_kernels=True)
    engine = Engine(model, pool, row_multiple=multiple, capture=lambda run: run)
    errors = run_schedule(reference, engine, sizes, seed=number)
    zeros = [not side[pool.null_slot :].any() for layer in range(4) for side in pool.layer_slots(layer)]
    print(json.dumps({"family": family, "rows": len(errors), "worst": max(errors), "replayed": engine.num_replayed,
                      "zeros": all(map(bool, zeros))}), flush=True)
"""


@functools.cache
def found() -> dict[str, dict[str, float]]:
    env = {k: v for k, v in os.environ.items() if k != "NUMBA_ENABLE_CUDASIM"}
    env |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    env |= {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests' / 'support'}"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PROGRAM, json.dumps(CASES)], cwd=ROOT, env=env, capture_output=True,
        text=True, timeout=290, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    return {row["family"]: row for row in rows}


@pytest.mark.slow
@pytest.mark.parametrize("family", CASES)
def test_batches_of_all_kinds_give_the_cpus_logits(family: str) -> None:
    row = found()[family]
    assert row["rows"] >= 10 and row["replayed"] >= 2 and row["zeros"], row
    assert row["worst"] <= CASES[family][1], row
