"""The CUDA kernels and codec/gpu.py on numba's CUDA simulator and Triton's interpreter: bit for bit the reference's
stream and the CPU codec's blobs. The cases are in tests/support/cuda_simulated.py, run in processes of their own,
because the simulator must be chosen before numba is imported."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SUPPORT = Path(__file__).resolve().parents[1] / "support"
GROUPS = {
    "coder": (
        "half_warps_odd_number_of_segments", "whole_warps", "all_stages_there_can_be",
        "anchors_and_channels_that_start_late", "dims_that_fill_no_run", "exceptions_everywhere_and_nowhere",
        "coarser_levels_of_one_set_of_integers", "the_encoder_refuses_what_is_too_large_or_too_much",
        "malformed_pieces_are_refused", "malformed_exceptions_are_refused", "values_go_to_their_pages",
        "lossless_joins_exponents_with_their_planes",
    ),
    "chunks": (
        "calibrated_levels", "matrices", "other_dims_for_v_and_rotations_across_lanes",
        "rotations_of_some_layers_and_of_no_channels", "uncalibrated_levels_of_every_dtype", "pages_anywhere",
        "damaged_blobs_are_refused_as_on_the_cpu", "the_runtime_finds_that_the_gpus_codec_agrees",
    ),
    "report": ("the_report_runs",),
}  # fmt: skip


@functools.cache
def outcomes(group: str) -> dict[str, str | None]:
    """Case -> None, or what went wrong."""
    env = os.environ | {
        "NUMBA_ENABLE_CUDASIM": "1", "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE",
        "CUDA_VISIBLE_DEVICES": "",
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(SUPPORT / "cuda_simulated.py"), group],
        env=env, capture_output=True, text=True, timeout=280, check=False,
    )  # fmt: skip
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"name"')]
    assert done.returncode == 0 and lines, done.stderr[-4000:]
    return {line["name"]: line["error"] for line in lines}


@pytest.mark.slow
@pytest.mark.parametrize(("group", "name"), [(group, name) for group, names in GROUPS.items() for name in names])
def test_case(group: str, name: str) -> None:
    error = outcomes(group)[name]
    assert error is None, error


@pytest.mark.slow
@pytest.mark.parametrize("group", GROUPS)
def test_no_case_is_forgotten(group: str) -> None:
    assert set(outcomes(group)) == set(GROUPS[group])


def test_without_a_gpu_it_imports_and_says_so() -> None:
    """No GPU, simulator, Ray or zmq: importing works, using raises GpuUnavailable, the report exits with 2."""
    program = (
        "import sys; sys.modules['ray'] = sys.modules['zmq'] = None\n"
        "from codec import gpu\nfrom codec.errors import CodecError\nfrom scripts import gpu_report\n"
        "import torch\nassert not gpu.is_available()\n"
        "try:\n    gpu.Device()\n"
        "except gpu.GpuUnavailable as error:\n    assert isinstance(error, CodecError); print(error)\n"
        "assert gpu_report.main([]) == 2\n"
    )
    env = {k: v for k, v in os.environ.items() if k not in ("NUMBA_ENABLE_CUDASIM", "TRITON_INTERPRET")}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=SUPPORT.parents[1], env=env | {"CUDA_VISIBLE_DEVICES": ""},
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    assert "decode_chunk" in done.stdout
