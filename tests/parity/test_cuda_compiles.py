"""The CUDA kernels compile to PTX for Hopper without a GPU, fuse no multiply-add and keep arrays out of local memory.

Needs numba-cuda, nvidia-cuda-nvrtc and nvidia-nvvm (in the `dev` extra); in a process of its own, so that no other
test's choice of simulator reaches it."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = """
import json, types
from numba import cuda, types as t
from numba.cuda import dispatcher
# Device functions ask which GPU there is; there is none.
dispatcher.get_current_device = lambda: types.SimpleNamespace(compute_capability=(9, 0))
from kernels import rans_cuda
u8, u16, u32, u64, i32, i64, f32 = (
    t.Array(kind, 1, "C") for kind in (t.uint8, t.uint16, t.uint32, t.uint64, t.int32, t.int64, t.float32))
n = t.int64
decode = t.void(u16, u8, i64, i32, i32, i32, i64, i64, n, i64, u64, n, n, n, u32, i32, u32, i32, n, f32, f32,
                f32, f32, n, i64, u16, u16, u64, i32)
encode = t.void(i32, i64, i32, n, u64, n, n, n, u32, i32, u32, i32, n, u16, n, i32, n, u32, i32, i32, i32)
pack = t.void(i32, n, i32, n, u16, n, i32, n, u32, i32, i32, n, i64, u16)
kernels = {"pack": (rans_cuda.pack_kernel, pack)}
for dims in (64, 128, 192):
    kernels[f"decode-{dims}"] = rans_cuda.make_decode_kernel(dims), decode
    kernels[f"encode-{dims}"] = rans_cuda.make_encode_kernel(dims), encode
for name, (kernel, signature) in kernels.items():
    ptx, _ = cuda.compile_ptx(kernel.py_func, signature, cc=(9, 0))
    print(json.dumps({"name": name, "target": ".target sm_90" in ptx, "fma": ptx.count("fma."),
                      "depot": ptx.count("__local_depot"), "vote": ptx.count("vote.sync.ballot"),
                      "shared": ptx.count("ld.shared"), "double": ptx.count(".f64")}))
"""
NAMES = ["pack", *(f"{which}-{dims}" for dims in (64, 128, 192) for which in ("decode", "encode"))]


@functools.cache
def compiled() -> dict[str, dict[str, int]]:
    env = {k: v for k, v in os.environ.items() if k not in ("NUMBA_ENABLE_CUDASIM", "TRITON_INTERPRET")}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PROGRAM], cwd=ROOT, env=env, capture_output=True, text=True, timeout=240,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return {row["name"]: row for row in map(json.loads, done.stdout.splitlines())}


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_compiles_for_hopper(name: str) -> None:
    found = compiled()[name]
    assert found["target"] and found["fma"] == 0 and found["double"] == 0 and found["depot"] == 0, found
    if name != "pack":
        assert found["vote"] and found["shared"], found
