"""The paged attention kernels: in Triton's interpreter against the numpy reference, and compiled for Hopper without a
GPU. Both in processes of their own: TRITON_INTERPRET is read where a kernel is defined."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from kernels.attention_reference import attention_reference
from kernels.kv_quant_reference import dequantize_block, quantize_block
from kernels.paged_attention_reference import (
    QuantizedLayer,
    boundary,
    paged_decode_reference,
    quantized_decode_reference,
)

ROOT = Path(__file__).resolve().parents[2]

INTERPRETED = """
import json, sys, torch
from triton_interpreter import fix_floats
from scripts import gpu_engine_cases as cases
from scripts.gpu_engine_cases import Shape

fix_floats()
cpu = torch.device("cpu")
LENGTHS = (1, 0, 300, 64, 65, 97, 257, 40)


def check(name, run, *args):
    try:
        row = {"passed": True, "detail": run(*args)}
    except Exception as error:
        row = {"passed": False, "detail": f"{type(error).__name__}: {error}"[:500]}
    print(json.dumps({"name": name, **row}), flush=True)


SHAPES = {
    "group 4": Shape(kv_heads=2, group=4, head_dim=64, lengths=LENGTHS),
    "group 1, V narrower": Shape(kv_heads=2, group=1, head_dim=64, head_dim_v=32, lengths=(520, 3)),
    "group 7": Shape(kv_heads=1, group=7, head_dim=64, lengths=(130, 31)),
    "group 17": Shape(kv_heads=1, group=17, head_dim=64, lengths=(130, 31)),
    "window": Shape(kv_heads=1, group=2, head_dim=64, lengths=(*LENGTHS, 600), window=70),
    "window of 1": Shape(kv_heads=1, group=2, head_dim=64, lengths=(5, 300), window=1),
    "softcap": Shape(kv_heads=1, group=2, head_dim=64, lengths=(200, 33), softcap=5.0),
    "128 dims": Shape(kv_heads=1, group=4, head_dim=128, lengths=(700,)),
}
if sys.argv[1] == "plain":
    for name, shape in SHAPES.items():
        check(name, cases.check_paged, shape, cpu)
    check("80 dims, pages of 32", cases.check_paged,
          Shape(kv_heads=2, group=3, head_dim=80, head_dim_v=48, lengths=(257, 31), page_tokens=32), cpu)
    check("float32", cases.check_paged,
          Shape(kv_heads=2, group=2, head_dim=32, lengths=LENGTHS, dtype=torch.float32), cpu, 1e-6)
    check("many splits", cases.check_paged, Shape(kv_heads=1, group=1, head_dim=64, lengths=(5200, 100)), cpu)
    check("company", cases.check_company, SHAPES["group 4"], "bf16", cpu)
    check("company, window", cases.check_company, SHAPES["window"], "bf16", cpu)
    check("write", cases.check_write, cpu)
else:
    kind = sys.argv[1]
    for name, shape in SHAPES.items():
        check(name, cases.check_quantized, shape, kind, cpu)
    check("company", cases.check_company, SHAPES["group 4"], kind, cpu)
    check("company, window", cases.check_company, SHAPES["window"], kind, cpu)
    check("settle", cases.check_settle, kind, cpu)
    if kind == "int4":  # a layer's keys of one kind and its values of another
        check("int8 and int4", cases.check_quantized, SHAPES["group 4"], "int8+int4", cpu)
        check("int4 and fp8", cases.check_quantized, SHAPES["window"], "int4+fp8", cpu)
"""

COMPILED = """
import json
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from kernels import paged_attention as paged
from kernels import paged_attention_codes_triton as codes
from kernels import paged_attention_triton as plain

INTS = {name: "i32" for name in (
    "q_row_stride", "q_head_stride", "table_stride", "table_step", "num_rows", "window", "num_slots", "first_slot",
    "out_row_stride", "k_row_stride", "k_head_stride", "v_row_stride", "v_head_stride")}
SHARED = {"lengths": "*i32", "q_rows": "*i32", "out_rows": "*i32", "rings": "*i32", "tables": "*i32", "part_m": "*fp32",
          "part_total": "*fp32", "part_out": "*fp32", "factor": "fp32", "softcap": "fp32", **INTS}
BF16 = dict.fromkeys(("q", "k", "v", "k_pages", "v_pages", "k_slots", "v_slots", "out", "k_ring", "v_ring"), "*bf16")
HALVES = dict.fromkeys(("k_scale", "k_zero", "v_scale", "v_zero"), "*fp16")


def show(case, kernel, constants, types, **options):
    names = kernel.arg_names
    signature = {n: "constexpr" if n in constants else {**SHARED, **BF16, **types}[n] for n in names}
    aligned = [n for n in names if signature[n].startswith("*") or n.endswith("_stride")]
    source = ASTSource(
        fn=kernel, signature=signature, constexprs={(names.index(n),): value for n, value in constants.items()},
        attrs={(names.index(n),): [["tt.divisibility", 16]] for n in aligned})
    built = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    ptx = built.asm["ptx"]
    print(json.dumps({
        "name": case, "sm_90": ".target sm_90" in ptx, "cubin": len(built.asm["cubin"]),
        "shared": built.metadata.shared, "mma": ptx.count("mma.sync") + ptx.count("wgmma.mma_async"),
        "wide_copies": ptx.count("cp.async.cg.shared.global [") + ptx.count("cp.async.cg"),
        "ldmatrix": ptx.count("ldmatrix"), "fma": ptx.count("fma.rn")}), flush=True)


def options_of(config):
    return dict(num_warps=config.num_warps, num_stages=config.num_stages, maxnreg=config.max_registers)


for dim in (64, 128, 256):
    config = paged.config_for("bf16", dim)
    show(f"bf16 {dim}", plain.decode_kernel, dict(
        H=8, GROUP=4, D=dim, DV=dim, PAGE=16, PART=0, SPLIT=config.split_tokens, BLOCK_N=config.block_n, BLOCK_B=32,
        R=16, BLOCK_D=dim, BLOCK_DV=dim, HAS_SOFTCAP=False, PRECISION="tf32"), {}, **options_of(config))
    for kind, number, word in (("int4", 0, "*i64"), ("int8", 1, "*i32"), ("fp8", 2, "*i32")):
        config = paged.config_for(kind, dim)
        scales = dict.fromkeys(("k_scale", "k_zero"), word) | dict.fromkeys(("v_scale", "v_zero"), "*fp16")
        if kind == "fp8":
            scales = dict.fromkeys(HALVES, "*fp32")
        show(f"{kind} {dim}", codes.quantized_decode_kernel, dict(
            H=8, GROUP=4, D=dim, DV=dim, K_KIND=number, V_KIND=number, SPLIT=config.split_tokens,
            BLOCK_N=config.block_n, BLOCK_B=32, R=max(16, config.block_n // 8), QUERIES=4, HAS_SOFTCAP=False,
            HAS_WINDOW=False, USE_ASM=True),
            {"q": word, "k_codes": "*i16", "v_codes": "*i16", **scales}, **options_of(config))
    for kind, number, levels in (("int4", 0, 15), ("int8", 1, 255), ("fp8", 2, 448.0)):
        scales = dict.fromkeys(HALVES, "*fp32") if kind == "fp8" else HALVES
        show(f"settle {kind} {dim}", codes.settle_kernel, dict(
            H=8, D=dim, DV=dim, RING=64, K_KIND=number, V_KIND=number, K_LEVELS=levels, V_LEVELS=levels), {
            "k_codes": "*u8", "v_codes": "*u8", "due": "*i32", **scales}, enable_fp_fusion=False)
    show(f"merge {dim}", plain.merge_kernel, dict(
        HQ=32, DV=dim, IS_QUANTIZED=True, SPLIT=512, BLOCK_S=16, BLOCK_DV=dim), {}, num_warps=2)
    show(f"write {dim}", plain.write_kernel, dict(H=8, D=dim, DV=dim, BLOCK_H=8, BLOCK_D=dim), {"slots": "*i64"})
"""


@functools.cache
def run(program: str, *arguments: str) -> dict[str, dict[str, object]]:
    env = {k: v for k, v in os.environ.items() if k not in ("NUMBA_ENABLE_CUDASIM", "TRITON_INTERPRET")}
    env |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "PYTHONPATH": str(ROOT / "tests" / "support")}
    env |= {"TRITON_INTERPRET": "1"} if program is INTERPRETED else {}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program, *arguments], cwd=ROOT, env=env, capture_output=True, text=True,
        timeout=280, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return {row["name"]: row for row in map(json.loads, done.stdout.splitlines())}


@pytest.mark.slow
@pytest.mark.parametrize(("what", "count"), [("plain", 14), ("int4", 13), ("int8", 11), ("fp8", 11)])
def test_interpreted_as_the_reference_computes(what: str, count: int) -> None:
    rows = run(INTERPRETED, what)
    assert len(rows) == count
    assert all(row["passed"] for row in rows.values()), [row for row in rows.values() if not row["passed"]]


@pytest.mark.slow
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_compiles_for_hopper(dim: int) -> None:
    rows = {name: row for name, row in run(COMPILED).items() if name.endswith(f" {dim}")}
    assert len(rows) == 9
    for name, row in rows.items():
        assert row["sm_90"] and int(str(row["cubin"])) > 0, row
        assert int(str(row["shared"])) <= 227 << 10, row
        if name.split()[0] in ("bf16", "int4", "int8", "fp8"):
            # Tensor cores, fed from shared memory, which is filled by 16-byte copies in the background.
            assert row["mma"] and row["ldmatrix"] and row["wide_copies"], row
        if name.startswith("settle"):
            assert row["fma"] == 0, row


# The reference itself


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng([seed, *shape]).normal(size=shape)


@pytest.mark.parametrize(("window", "softcap"), [(None, None), (70, None), (None, 3.0), (1, 3.0)])
@pytest.mark.parametrize("split_tokens", [16, 64, 256])
def test_reference_is_attention(split_tokens: int, window: int | None, softcap: float | None) -> None:
    lengths, kv_heads, group, dim = (1, 150, 0, 64), 2, 3, 8
    k_pages, v_pages = normal(40, 16, kv_heads, dim), normal(40, 16, kv_heads, dim + 2)
    tables = [[7], list(range(10, 20)), [], [3, 1, 30, 2]]
    q = normal(4, kv_heads * group, dim)
    got = paged_decode_reference(
        q, k_pages, v_pages, tables, lengths, scale=0.4, window=window, softcap=softcap, split_tokens=split_tokens
    )
    for row, length in enumerate(lengths):
        if not length:
            assert not got[row].any()
            continue
        k, v = (pages[tables[row]].reshape(-1, *pages.shape[2:])[:length] for pages in (k_pages, v_pages))
        want = attention_reference(
            q[row][None], k, v, np.array([length - 1]), scale=0.4, window=window, softcap=softcap
        )
        np.testing.assert_allclose(got[row], want[0], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", ["int4", "int8", "fp8"])
@pytest.mark.parametrize("window", [None, 50])
def test_quantized_reference_reads_old_keys_as_codes(kind: str, window: int | None) -> None:
    length, ring_tokens, dim = 150, 64, 8
    k, v = normal(160, 2, dim).astype(np.float32), normal(160, 2, dim, seed=1).astype(np.float32)
    edge = boundary(length - 1)
    assert edge == 96
    k_blocks = [quantize_block(k[32 * i : 32 * i + 32], kind, per_channel=True) for i in range(4)]
    v_blocks = [quantize_block(v[32 * i : 32 * i + 32], kind, per_channel=False) for i in range(4)]
    mixed_k = np.concatenate([dequantize_block(b, kind, per_channel=True) for b in k_blocks[:3]] + [k[edge:length]])
    mixed_v = np.concatenate([dequantize_block(b, kind, per_channel=False) for b in v_blocks[:3]] + [v[edge:length]])
    rings = [np.full((2, ring_tokens, 2, dim), np.nan) for _ in range(2)]
    for token in range(length - ring_tokens, length):
        rings[0][1, token % ring_tokens], rings[1][1, token % ring_tokens] = k[token], v[token]
    table = [2, 0, 3, 1]
    layer = QuantizedLayer(
        kind, kind, *([blocks[table.index(i)] for i in range(4)] for blocks in (k_blocks, v_blocks)), *rings
    )
    q = normal(1, 4, dim)
    got = quantized_decode_reference(q, layer, [table], [1], [length], scale=0.4, window=window, split_tokens=64)
    want = attention_reference(q, mixed_k, mixed_v, np.array([length - 1]), scale=0.4, window=window)
    np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-12)


def test_the_boundary_leaves_33_to_64_keys_unquantized() -> None:
    for position in range(500):
        edge = boundary(position)
        assert edge % 32 == 0
        assert (33 <= position - edge + 1 <= 64) or (edge == 0 and position < 64)
