"""The kernels between a layer's matrix products: in Triton's interpreter against transformers' own modules, and
compiled for Hopper. In processes of their own: TRITON_INTERPRET is read where a kernel is defined."""

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
import json, torch
import torch.nn.functional as F
from engine_models import random_model
from transformers import Gemma2Config, Gemma2ForCausalLM
from triton_interpreter import fix_floats
from kernels import fused_layer_triton as fused
from prefill.cuda_fusions import fuse

fix_floats()


def say(name, passed, detail=""):
    print(json.dumps({"name": name, "passed": bool(passed), "detail": str(detail)}), flush=True)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(torch.bfloat16)


# Bits, where the order of operations is fixed
k = randn(1, 2, 7, 16, seed=1)
q = randn(1, 7, 6, 16).transpose(1, 2)  # [1, Hq, N, D], strided as a projection gives it
cos, sin = randn(1, 7, 16, seed=2), randn(1, 7, 16, seed=3)


def rotate_half(x):
    return torch.cat((-x[..., 8:], x[..., :8]), -1)


got = fused.rotary(q, k, cos, sin)
want = [x * cos[:, None] + rotate_half(x) * sin[:, None] for x in (q, k)]
say("rotary", all(torch.equal(a, b) and a.shape == b.shape for a, b in zip(got, want)))
gate, up = 3 * randn(3, 700), randn(3, 700, seed=1)
say("silu * up", torch.equal(fused.silu_mul(gate, up), F.silu(gate) * up))
for outputs, depth in ((7, 48), (2100, 96), (64, 1100)):
    x, weight = randn(1, 1, depth), randn(outputs, depth, seed=1)
    want = weight.double() @ x[0, 0].double()
    off = (fused.row_product(x, weight)[0, 0].double() - want).abs().max() / want.abs().max()
    say(f"row product {outputs} x {depth}", off < 4e-3, off)

for family in ("llama", "qwen3"):
    model = random_model(family, torch.bfloat16, num_hidden_layers=2, hidden_size=96, intermediate_size=80, head_dim=32)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data += 0.3 * randn(*parameter.shape)
    ids = torch.arange(3, 12)[None]
    before, row = model(ids).logits, model(ids[:, :1]).logits
    found = fuse(model)
    after, row_after = model(ids).logits, model(ids[:, :1]).logits
    off = float((after - before).float().norm() / before.float().norm())
    row_off = float((row_after - row).float().norm() / row.float().norm())
    norms = 5 if family == "llama" else 9
    say(f"{family}: replaced", (found.norms, found.mlps, found.linears, found.rotary) == (norms, 2, 15, True), found)
    say(f"{family}: same logits", off < 2e-2 and row_off < 2e-2, (off, row_off))

# Its MLP has another activation, which must be noticed.
config = Gemma2Config(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
                      num_key_value_heads=1, head_dim=16)
model = Gemma2ForCausalLM(config).to(torch.bfloat16).eval()
for name, parameter in model.named_parameters():
    if "norm" in name:
        parameter.data += 0.3 * randn(*parameter.shape)
found = fuse(model, row_products=False)
say("gemma 2", (found.norms, found.mlps, found.linears) == (5, 0, 0), found)
"""

COMPILED = """
import json
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from kernels import fused_layer_triton as fused

BF16 = dict.fromkeys(("x", "weight", "out", "q", "k", "cos", "sin", "q_out", "k_out", "gate", "up"), "*bf16")
INTS = dict.fromkeys(("x_row_stride", "q_row_stride", "q_head_stride", "k_row_stride", "k_head_stride", "table_stride",
                      "count", "num_outputs"), "i32")


def show(kernel, constants, **options):
    names = kernel.arg_names
    signature = {n: "constexpr" if n in constants else {**BF16, **INTS, "eps": "fp32"}[n] for n in names}
    aligned = [n for n in names if signature[n].startswith("*") or n.endswith("_stride")]
    source = ASTSource(
        fn=kernel, signature=signature, constexprs={(names.index(n),): value for n, value in constants.items()},
        attrs={(names.index(n),): [["tt.divisibility", 16]] for n in aligned})
    built = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    ptx = built.asm["ptx"]
    print(json.dumps({"name": kernel.__name__, "passed": ".target sm_90" in ptx and len(built.asm["cubin"]) > 0,
                      "fma": ptx.count("fma.rn.f32"), "wide_copies": ptx.count("cp.async.cg"),
                      "shared": built.metadata.shared}), flush=True)


show(fused.rms_norm_kernel, dict(C=4096, BLOCK=4096, ADD_ONE=False), num_warps=8, **fused.FUSION_OFF)
show(fused.rotary_kernel, dict(HQ=32, H=8, HALF=64, BLOCK_H=64, BLOCK_D=64), **fused.FUSION_OFF)
show(fused.silu_mul_kernel, dict(BLOCK=1024), **fused.FUSION_OFF)
show(fused.row_product_kernel, dict(K=14336, BLOCK_N=8, BLOCK_K=512, STAGES=4))
"""


@functools.cache
def run(program: str) -> list[dict[str, object]]:
    env = {k: v for k, v in os.environ.items() if k not in ("NUMBA_ENABLE_CUDASIM", "TRITON_INTERPRET")}
    env |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "PYTHONPATH": str(ROOT / "tests" / "support")}
    env |= {"TRITON_INTERPRET": "1"} if program is INTERPRETED else {}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program], cwd=ROOT, env=env, capture_output=True, text=True, timeout=280,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.slow
def test_interpreted_as_transformers_computes() -> None:
    rows = run(INTERPRETED)
    assert len(rows) == 10
    assert all(row["passed"] for row in rows), [row for row in rows if not row["passed"]]


@pytest.mark.slow
def test_compiles_for_hopper() -> None:
    rows = run(COMPILED)
    assert len(rows) == 4
    for row in rows:
        assert row["passed"], row
        if row["name"] == "row_product_kernel":
            assert row["wide_copies"], "weights are not read ahead"
        else:
            assert row["fma"] == 0, row
