"""The Triton kernels: in the interpreter against the CPU codec's arithmetic, and compiled for Hopper without a GPU.

Both in processes of their own: TRITON_INTERPRET is read where a kernel is defined."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

INTERPRETED = """
import json, sys
import numpy as np, torch
from codec.decorrelate import apply_ordered
from codec.entropy import histogram
from codec.quantize import bf16_to_float, coarsen, dequantize, float_to_bf16, quantize, round_to_bf16
from codec.rope import RopeTable, rotate, unrotate
from kernels import quantize_triton as qt
from kernels.rans_cuda import quads_of, rows_of_scratch
from kernels.rans_reference import lanes_of

rng = np.random.default_rng(0)
tensor = torch.from_numpy
SHAPES = ((64, 32, 20), (96, 16, 9), (128, 64, 33))


def say(name, passed):
    print(json.dumps({"name": name, "passed": bool(passed)}), flush=True)


def rotary(tokens, half):
    angle = np.concatenate([rng.normal(0, 3, (tokens, half))] * 2, axis=1)
    return RopeTable(np.cos(angle), np.sin(angle))


def matrix_of(dims):
    return np.linalg.qr(rng.normal(size=(dims, dims)))[0].astype(np.float32)[None]


def pairs_of(q):
    count, tokens, dims = q.shape
    lanes, quads = lanes_of(dims), quads_of(dims)
    wide = np.zeros((count, tokens, quads * 4 * lanes), np.int32)
    wide[..., :dims] = q
    pairs = wide.reshape(count, tokens, quads, 2, 2, lanes).transpose(0, 1, 2, 3, 5, 4)
    return np.ascontiguousarray(pairs).reshape(count, -1)


for dims, half, tokens in SHAPES:
    x = round_to_bf16(rng.normal(0, 2, (3, tokens, dims)))
    x[1, 1, 2] = np.inf
    rope = rotary(tokens, half)
    icos, isin = rope.inverse()
    halves, matrix = np.array([half, 0, half], np.int32), np.array([-1, -1, 0], np.int32)
    analysis = matrix_of(dims)
    mean = round_to_bf16(rng.normal(0, 0.3, (3, dims)))
    step = round_to_bf16(np.exp(rng.normal(-2, 0.5, (3, dims))))
    q = torch.full((3, tokens, dims), -7, dtype=torch.int32)
    blocks = -(-tokens // 16)
    flags = torch.full((3, blocks), 9, dtype=torch.int32)
    qt.quantize_kernel[(3, blocks)](
        tensor(float_to_bf16(x).view(np.int16).reshape(-1).copy()), torch.arange(3) * tokens * dims, dims, tensor(icos),
        tensor(isin), tensor(halves), tensor(mean), tensor(np.float32(1) / step), tensor(matrix), tensor(analysis), q,
        flags, tokens, half, num_dims=dims, BLOCK_T=16, BLOCK_D=qt.block_of(dims), **qt.FUSION_OFF)
    for s in (0, 2):
        y = unrotate(x[s], icos, isin) - mean[s]
        y = y if s == 0 else apply_ordered(y, analysis[0])
        want = quantize(y, np.float32(1) / step[s])
        say(f"quantize {dims} {'matrix' if s else 'plain'}", np.array_equal(q[s].numpy(), want))
    say(f"quantize {dims} refuses", flags[1, 0] == 1 and not flags[0].any() and not flags[2].any())

    q = np.rint(rng.laplace(0, 60, (2, tokens, dims))).astype(np.int32)
    q[0, 0, 0], q[1, 1, 1] = 1 << 20, -(1 << 20)
    counts = torch.zeros((2, 2, dims, 257), dtype=torch.int32)
    qt.histogram_kernel[(2, blocks)](tensor(q), torch.tensor([0, 4], dtype=torch.int32), counts, tokens, 2,
                                     num_dims=dims, BLOCK_T=16, BLOCK_D=qt.block_of(dims))
    coarse, at = coarsen(q.astype(np.int64), 2), np.arange(tokens)
    deltas = (coarse[1] - coarse[1][at // 4 * 4])[at % 4 != 0]
    say(f"histogram {dims}", np.array_equal(histogram(coarse[0]), counts[0, 0].numpy()) and counts[0, 1].sum() == 0
        and np.array_equal(histogram(coarse[1][at % 4 == 0]), counts[1, 0].numpy())
        and np.array_equal(histogram(deltas), counts[1, 1].numpy()))

    pairs, synthesis, rope = pairs_of(q), matrix_of(dims), rotary(tokens, half)
    assert np.array_equal(rows_of_scratch(pairs.view(np.uint64), tokens, dims), q)
    cos, sin = rope.forward()
    jobs = torch.tensor([[s, 0, tokens, 3] for s in range(2)], dtype=torch.int32)
    for turned, has_matrix, ordered in ((0, 0, 0), (half, 0, 0), (0, 1, 0), (half, 1, 0), (half, 1, 1)):
        out = torch.zeros(2 * tokens * dims, dtype=torch.int16)
        qt.synthesize_kernel[(2, blocks)](
            tensor(pairs.reshape(-1)), jobs, torch.arange(2) * tokens * dims, torch.arange(2) * (pairs.shape[1] // 2),
            torch.zeros(2, dtype=torch.int32), tensor(step), tensor(mean), tensor(synthesis), tensor(cos), tensor(sin),
            torch.arange(tokens) * dims, out, half, num_dims=dims, lanes=lanes_of(dims), half=turned, BLOCK_T=16,
            BLOCK_K=32, BLOCK_HALF=qt.block_of(max(turned, 1)), BLOCK_REST=qt.block_of(max(dims - 2 * turned, 1)),
            HAS_MATRIX=bool(has_matrix), IS_ORDERED=bool(ordered), **qt.FUSION_OFF)
        y = np.stack([dequantize(q[s], 3, step[s]) for s in range(2)])
        y = np.stack([apply_ordered(rows, synthesis[0]) for rows in y]) if has_matrix else y
        y = y + mean[:2, None]
        y = np.stack([rotate(rows, cos, sin) for rows in y]) if turned else y
        got = out.numpy().view(np.uint16).reshape(y.shape)
        off = np.abs(bf16_to_float(got) - bf16_to_float(float_to_bf16(y)))
        ulp = np.exp2(np.floor(np.log2(np.abs(y).max(axis=-1, keepdims=True))) - 7)
        is_same = np.array_equal(got, float_to_bf16(y))
        is_near = has_matrix and not ordered and (off <= ulp).all()
        say(f"synthesize {dims} {turned} {has_matrix} {ordered}", is_same or is_near)
"""

COMPILED = """
import json
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from kernels import quantize_triton as qt
from kernels.rans_reference import lanes_of

TYPES = {
    "quantize_kernel": dict(src="*i16", src_pos="*i64", stride_t="i32", cos="*fp32", sin="*fp32", half_dims="*i32",
        mean="*fp32", inv_step="*fp32", matrix="*i32", analysis="*fp32", q="*i32", flags="*i32", num_tokens="i32",
        num_angles="i32"),
    "histogram_kernel": dict(q="*i32", group="*i32", counts="*i32", num_tokens="i32", coarser="i32"),
    "synthesize_kernel": dict(ints="*i32", jobs="*i32", out_pos="*i64", scratch_pos="*i64", matrix="*i32", step="*fp32",
        mean="*fp32", synthesis="*fp32", cos="*fp32", sin="*fp32", row_pos="*i64", out="*i16", num_angles="i32"),
}


def show(case, kernel, constants, **options):
    names = kernel.arg_names
    source = ASTSource(
        fn=kernel, signature={**TYPES[kernel.__name__], **dict.fromkeys(constants, "constexpr")},
        constexprs={(names.index(name),): value for name, value in constants.items()})
    built = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={**qt.FUSION_OFF, **options})
    ptx = built.asm["ptx"]
    row = {"name": case, "sm_90": ".target sm_90" in ptx, "fma": ptx.count("fma.rn"), "mma": ptx.count("mma"),
           "cubin": len(built.asm["cubin"]), "shared": built.metadata.shared}
    print(json.dumps(row), flush=True)


for dims in (64, 128, 256):
    block = qt.block_of(dims)
    show(f"quantize {dims}", qt.quantize_kernel, dict(num_dims=dims, BLOCK_T=32, BLOCK_D=block))
    show(f"histogram {dims}", qt.histogram_kernel, dict(num_dims=dims, BLOCK_T=32, BLOCK_D=block))
    for half in (0, dims // 2):
        for has_matrix in (False, True):
            show(f"synthesize {dims} {half} {int(has_matrix)}", qt.synthesize_kernel, dict(
                num_dims=dims, lanes=lanes_of(dims), half=half, BLOCK_T=64, BLOCK_K=32,
                BLOCK_HALF=qt.block_of(max(half, 1)), BLOCK_REST=qt.block_of(max(dims - 2 * half, 1)),
                HAS_MATRIX=has_matrix, IS_ORDERED=False), num_warps=4 if dims <= 128 else 8)
"""


@functools.cache
def run(program: str, *, interpret: bool) -> dict[str, dict[str, int]]:
    env = {k: v for k, v in os.environ.items() if k not in ("NUMBA_ENABLE_CUDASIM", "TRITON_INTERPRET")}
    env |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"} | ({"TRITON_INTERPRET": "1"} if interpret else {})
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program], cwd=ROOT, env=env, capture_output=True, text=True, timeout=240,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return {row["name"]: row for row in map(json.loads, done.stdout.splitlines())}


@pytest.mark.slow
@pytest.mark.parametrize("dims", [64, 96, 128])
@pytest.mark.parametrize("what", ["quantize", "histogram", "synthesize"])
def test_interpreted_as_the_cpu_codec_does(what: str, dims: int) -> None:
    rows = [row for name, row in run(INTERPRETED, interpret=True).items() if name.startswith(f"{what} {dims}")]
    assert len(rows) == {"quantize": 3, "histogram": 1, "synthesize": 5}[what]
    assert all(row["passed"] for row in rows), rows


@pytest.mark.slow
@pytest.mark.parametrize("dims", [64, 128, 256])
def test_compiles_for_hopper(dims: int) -> None:
    rows = [row for name, row in run(COMPILED, interpret=False).items() if f" {dims}" in name]
    assert len(rows) >= 6
    for row in rows:
        assert row["sm_90"] and row["fma"] == 0 and row["cubin"] > 0, row
        assert row["shared"] <= 227 << 10, row
        if str(row["name"]).startswith("synthesize"):
            assert bool(row["mma"]) == str(row["name"]).endswith(" 1"), row
