"""prefill/fusions.py with kernels/fused_layer_numba.py, and prefill/packed_linear.py: what replaces transformers'
modules on the CPU gives what they give."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
from engine_models import FAMILIES, loaded, random_model, random_prompt
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

import prefill.engine as engine_file
from kernels import attention_numba, fused_layer_numba
from kernels.fused_layer_numba import rms_norm, silu_mul
from prefill.block_pool import blocks_for
from prefill.engine import Engine, prefill
from prefill.fusions import fuse_for_cpu
from prefill.kv_pool import KVPool
from prefill.packed_linear import PackedLinear, can_pack, pack_linears

BF16 = torch.bfloat16


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 2).to(BF16)


@pytest.mark.parametrize(("norm_class", "add_one"), [(LlamaRMSNorm, False), (Gemma2RMSNorm, True)])
@pytest.mark.parametrize("shape", [(1, 1, 16), (1, 3, 256), (1, 40, 4, 64), (1, 130, 1024)])
def test_norms_are_transformers(norm_class: type, add_one: bool, shape: tuple[int, ...]) -> None:
    norm = norm_class(shape[-1], 1e-5).to(BF16)
    norm.weight.data = randn(shape[-1], seed=1)
    x = randn(*shape)
    with torch.inference_mode():
        ours, plain = rms_norm(x, norm.weight, 1e-5, add_one=add_one), norm(x)
    # Sums go in another order, which a rounding to bf16 hardly ever shows.
    assert (ours == plain).float().mean() > 0.999
    torch.testing.assert_close(ours, plain, atol=0, rtol=2**-7)


def test_gated_activation_is_transformers() -> None:
    gate, up = randn(1, 300, 64), randn(1, 300, 64, seed=1)
    gate[0, 0, :4] = torch.tensor([-200.0, 200.0, 0.0, -0.0])
    plain = torch.nn.functional.silu(gate) * up
    ours = silu_mul(gate, up)
    assert (ours == plain).float().mean() > 0.999
    torch.testing.assert_close(ours, plain, atol=1e-30, rtol=2**-7)


def test_a_rows_bits_do_not_depend_on_the_others() -> None:
    x, y, weight = randn(1, 2100, 64), randn(1, 2100, 64, seed=1), randn(64, seed=2)
    norms, products = rms_norm(x, weight, 1e-6), silu_mul(x, y)
    for first, count in ((0, 1), (7, 1), (100, 33), (2099, 1)):
        rows = slice(first, first + count)
        assert torch.equal(rms_norm(x[:, rows], weight, 1e-6), norms[:, rows])
        assert torch.equal(silu_mul(x[:, rows], y[:, rows]), products[:, rows])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_with_everything_replaced_gives_the_same(family: str) -> None:
    model = loaded(random_model(family, BF16))
    pool = KVPool(model.layout, 20)
    # Both attend by the same kernel; only the modules differ.
    prompt, table = random_prompt(70), list(range(blocks_for(70, 16)))

    def logits() -> torch.Tensor:
        return prefill(Engine(model, pool, row_multiple=1), prompt, table)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine_file, "fuse_for_cpu", lambda _: 0)
        patch.setattr(engine_file, "pack_linears", lambda _: None)
        plain = logits()
    layers = model.layout.num_layers
    num_norms = layers * (4 if family == "qwen3" else 2) + 1
    assert fuse_for_cpu(model.model) == num_norms + layers
    assert fuse_for_cpu(model.model) == 0, "once more changes nothing"
    assert (logits() - plain).abs().max() <= 0.02 * plain.abs().max()
    if can_pack():
        assert not any(type(module) is torch.nn.Linear for module in model.model.modules())


@pytest.mark.skipif(not can_pack(), reason="this CPU does not multiply bf16 by oneDNN")
@pytest.mark.parametrize("bias", [True, False])
def test_packed_products_have_the_same_bits(bias: bool) -> None:
    linear = torch.nn.Linear(96, 200, bias=bias).to(BF16).requires_grad_(False)
    holder = torch.nn.Sequential(linear)
    x = randn(1, 37, 96)
    expected = linear(x)
    pack_linears(holder)
    assert isinstance(holder[0], PackedLinear) and torch.equal(holder(x), expected)
    assert torch.equal(holder(x[:, 5:6]), linear(x[:, 5:6]))


def test_float32_and_odd_widths_stay_as_they_are() -> None:
    model = random_model("llama")
    before = [type(module) for module in model.modules()]
    fuse_for_cpu(model)
    pack_linears(model)
    assert [type(module) for module in model.modules()] == before
    assert not any("forward" in vars(module) for module in model.modules())
    odd = torch.nn.ModuleDict({"norm": LlamaRMSNorm(40, 1e-5).to(BF16)})
    assert fuse_for_cpu(odd) == 0


@pytest.mark.parametrize("file", [attention_numba, fused_layer_numba])
def test_numba_forgets_its_cache_when_a_step_changes(file) -> None:
    """Its cache watches the file of the outermost function only. So that file says what the steps' files hold: put the
    new value into STEPS when this fails."""
    folder = Path(file.__file__).parent
    digest = hashlib.sha256()
    for name in ("attention_simd.py", "rans_simd.py", "vector_math.py"):
        digest.update((folder / name).read_bytes())
    assert digest.hexdigest()[:16] == file.STEPS
