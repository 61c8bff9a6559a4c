"""The GPU report of the engine, gone through on the CPU with a tiny model in Triton's interpreter: its steps and its
files, not its times."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

PROGRAM = """
import sys
from pathlib import Path
for name in ("ray", "zmq", "lmdb"):
    sys.modules[name] = None  # a machine with a GPU may lack them
from triton_interpreter import fix_floats
fix_floats()
from scripts import gpu_engine_report
sys.exit(gpu_engine_report.main(["--tiny", "--name", "tiny", "--seconds", "900", "--out", sys.argv[1]]))
"""


def run(program: str, *arguments: str, interpret: bool) -> subprocess.CompletedProcess[str]:
    env = {k: v for k, v in os.environ.items() if k not in ("NUMBA_ENABLE_CUDASIM", "TRITON_INTERPRET")}
    env |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "PYTHONPATH": str(ROOT / "tests" / "support")}
    env |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""} if interpret else {"CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program, *arguments], cwd=ROOT, env=env, capture_output=True, text=True,
        timeout=290, check=False,
    )  # fmt: skip


@pytest.mark.slow
def test_a_tiny_report_passes_all_its_steps(tmp_path: Path) -> None:
    done = run(PROGRAM, str(tmp_path), interpret=True)
    assert done.returncode == 0, (done.stdout[-3000:], done.stderr[-3000:])
    found = json.loads((tmp_path / "gpu-engine-tiny.json").read_text())
    assert len(found["steps"]) == 36 and all(step["passed"] for step in found["steps"])
    assert {(row["pages"], row["batch"]) for row in found["decode"]} == {("bf16", 1), ("bf16", 2), ("int4", 2)}
    assert [row["chunk"] for row in found["prefill"]] == [40, 16]
    assert {row["pages"] for row in found["sweep"]} == {"bf16", "int4"}
    assert {"copy_tb_s", "matrix_tflop_s", "decode_share_1", "prefill_share", "int4_gain"} <= found["found"].keys()
    table = (tmp_path / "gpu-engine-tiny.md").read_text()
    assert "| decode_share_32 | 0.75 | not measured |" in table and "## Decode" in table


@pytest.mark.slow
def test_without_a_gpu_it_says_so() -> None:
    program = "from scripts import gpu_engine_report; raise SystemExit(gpu_engine_report.main([]))"
    done = run(program, interpret=False)
    assert done.returncode == 2 and "no CUDA device here" in done.stderr
