"""prefill/memory_plan.py and prefill/model_size.py: golden cases, what pools really take, and `kvstream plan`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from model_families import FAMILIES, SHAPE, tiny_model
from transformers import DeepseekV3Config, Gemma3TextConfig, LlamaConfig, MixtralConfig
from typer.testing import CliRunner

from prefill.errors import ModelRefused
from prefill.kv_layout import KVLayout
from prefill.kv_pool import KVPool
from prefill.machine_memory import available_in
from prefill.memory_plan import GIB, ModelSize, check_fits, plan_memory, plan_pages
from prefill.model import wrap_model
from prefill.model_size import read_model_size, size_of
from prefill.quantized_layout import PageMix, block_bytes, blocks_for, ring_bytes
from prefill.quantized_pages import QuantizedStore
from scripts.cli import app
from scripts.plan_command import parse_memory

ROOT = Path(__file__).parents[2]


def llama_70b() -> LlamaConfig:
    return LlamaConfig(
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
        vocab_size=128256,
        max_position_embeddings=131_072,
    )


def test_golden_llama_2_7b() -> None:
    size = size_of(LlamaConfig(), name="llama-2-7b", dtype="float16")
    assert size.num_parameters == 6_738_415_616 and size.weight_bytes == 2 * size.num_parameters
    assert size.layout.bytes_per_token == 524_288
    (pages,) = plan_memory(size, memory_bytes=80 * 10**9, context=10_000, kv_dtypes=("bf16",)).pages
    assert pages.sequence_bytes == 10_000 * 524_288  # 5.2 GB
    assert abs(pages.sequence_bytes / 1e9 - 5) < 0.25


def test_golden_70b_with_grouped_queries() -> None:
    size = size_of(llama_70b(), name="llama-3-70b", dtype="bfloat16")
    assert size.num_parameters == 70_553_706_496
    pages = {p.kv_dtype: p for p in plan_memory(size, memory_bytes=320 * 10**9, context=131_072).pages}
    assert pages["bf16"].sequence_bytes == 40 * 2**30
    # A block of 32 tokens: codes, and float16 scale and zero for each channel of K and each token of V.
    assert pages["int4"].block_bytes == 80 * 8 * (32 * 256 // 2 + 4 * 128 + 4 * 32)
    assert pages["int8"].block_bytes == 80 * 8 * (32 * 256 + 4 * 128 + 4 * 32)
    assert 3.2 < pages["bf16"].bytes_per_token / pages["int4"].bytes_per_token < 4
    assert 1.8 < pages["bf16"].bytes_per_token / pages["int8"].bytes_per_token < 2


def test_golden_others() -> None:
    mixtral = size_of(MixtralConfig(), name="mixtral", dtype="bfloat16")
    assert mixtral.num_parameters == 46_702_792_704 and mixtral.intermediate_size == 2 * 14336
    deepseek = size_of(DeepseekV3Config(num_hidden_layers=4), name="deepseek", dtype="bfloat16")
    assert deepseek.layout == KVLayout(num_layers=4, num_kv_heads=128, head_dim_k=192, head_dim_v=128, dtype="bfloat16")
    assert deepseek.latent_values == 576
    gemma = size_of(
        Gemma3TextConfig(num_hidden_layers=12, num_key_value_heads=1, head_dim=256, sliding_window=512),
        name="gemma",
        dtype="bfloat16",
    )
    assert gemma.layout.windows == ((512,) * 5 + (None,)) * 2
    (pages,) = plan_memory(gemma, memory_bytes=80 * 10**9, context=32_768, kv_dtypes=("bf16",)).pages
    layer_block = 16 * 2 * 256 * 2
    assert pages.sequence_bytes == 2048 * 12 * layer_block
    assert pages.windowed_sequence_bytes == (10 * 33 + 2 * 2048) * layer_block


@pytest.mark.parametrize("family", FAMILIES)
def test_the_layout_from_a_config_is_that_of_the_model(family: str) -> None:
    spec = FAMILIES[family]
    config = getattr(transformers, f"{spec.name}Config")(**{**SHAPE, **spec.changes})
    size = size_of(config, name=family, dtype="bfloat16")
    model = tiny_model(family).bfloat16()
    assert size.layout == wrap_model(model, None, name=family, fingerprint="").layout
    assert size.num_parameters == sum(p.numel() for p in model.parameters())
    assert size.max_context == spec.max_context


@pytest.mark.parametrize("block_tokens", [16, 32])
@pytest.mark.parametrize("windows", [(), (40, None, 40)])
def test_blocks_within_two_percent_of_what_a_pool_takes(block_tokens: int, windows: tuple) -> None:
    layout = KVLayout(num_layers=3, num_kv_heads=2, head_dim_k=64, head_dim_v=48, dtype="bfloat16", windows=windows)
    memory = 24 << 20
    pages = plan_pages(layout, "bf16", free_bytes=memory, context=1000, block_tokens=block_tokens)
    pool = KVPool(layout, pages.num_blocks, block_tokens)
    taken = sum(
        value.untyped_storage().nbytes()
        for value in {v.data_ptr(): v for v in vars(pool).values() if isinstance(v, torch.Tensor)}.values()
    )
    assert 0.98 * memory <= taken <= memory
    assert pages.num_tokens == pages.num_blocks * block_tokens
    assert pages.num_sequences == pages.num_blocks // -(-1000 // block_tokens)


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_quantized_blocks_and_rings_within_two_percent_of_what_they_take(kind: str) -> None:
    layout = KVLayout(num_layers=3, num_kv_heads=2, head_dim_k=64, head_dim_v=48, dtype="bfloat16")
    memory = 24 << 20
    pages = plan_pages(layout, kind, free_bytes=memory, context=1000)
    store = QuantizedStore(layout, pages.num_blocks, kind, pages.num_sequences, "cpu", None)
    taken = sum(x.nbytes for part in (*store.k, *store.v) for x in part.tensors())
    taken += store.recent_k.data.nbytes + store.recent_v.data.nbytes
    assert 0.98 * memory <= taken <= memory
    assert pages.num_sequences * blocks_for(1000) <= pages.num_blocks


def size(**changes: object) -> ModelSize:
    fields: dict = {
        "name": "seven",
        "layout": KVLayout(num_layers=32, num_kv_heads=8, head_dim_k=128, head_dim_v=128, dtype="bfloat16"),
        "num_parameters": 7 * 10**9,
        "weight_bytes": 14 * 10**9,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "vocab_size": 32000,
        "max_context": 32768,
    }
    return ModelSize(**fields | changes)


def test_what_does_not_fit_is_refused_with_the_numbers() -> None:
    with pytest.raises(ModelRefused, match=r"seven: weights 13\.04 GiB, activations .* do not fit into 12\.00 GiB"):
        check_fits(size(), memory_bytes=12 * 2**30)
    with pytest.raises(
        ModelRefused, match=r"one sequence of 32768 tokens takes 4\.00 GiB in bf16 pages.*up to \d+ tok"
    ):
        check_fits(size(), memory_bytes=17 * 2**30)
    with pytest.raises(ModelRefused, match=r"blocks of 16 tokens in bf16 pages, and 8192 \(16\.00 GiB\) were asked"):
        check_fits(size(), memory_bytes=20 * 2**30, num_blocks=8192)
    assert check_fits(size(), memory_bytes=17 * 2**30, kv_dtype="int4").num_sequences >= 1
    fits = check_fits(size(), memory_bytes=24 * 2**30)
    assert fits.num_sequences >= 1 and check_fits(size(), memory_bytes=24 * 2**30, num_blocks=fits.num_blocks) == fits


@pytest.mark.parametrize("kv_dtype", ["bf16", "int8", "int4"])
def test_what_is_planned_fits_and_one_more_does_not(kv_dtype: str) -> None:
    layout = size().layout
    for free in (0, 10**8, 5 * 10**9, 77 * 10**9 + 12_345):
        pages = plan_pages(layout, kv_dtype, free_bytes=free, context=8000)
        spare = pages.block_bytes if kv_dtype == "bf16" else ring_bytes(layout)
        assert pages.num_sequences * pages.sequence_bytes + spare <= max(free, spare)
        assert (pages.num_sequences + 1) * pages.sequence_bytes + spare > free


def test_a_mix_and_the_rings_that_there_are_count() -> None:
    layout = size().layout
    half = layout.num_layers // 2
    kinds = ("int8",) * half + ("int4",) * (layout.num_layers - half)
    mix = PageMix(keys=kinds, values=kinds)
    plain, mixed = (
        check_fits(size(), memory_bytes=24 * 2**30, kv_dtype="int4", context=4096, mix=one) for one in (None, mix)
    )
    assert mixed.block_bytes == block_bytes(layout, "int4", mix) > plain.block_bytes
    assert mixed.num_blocks < plain.num_blocks
    fewer = check_fits(size(), memory_bytes=24 * 2**30, kv_dtype="int4", context=4096, num_rings=100)
    spare = plain.num_sequences * ring_bytes(layout) - 100 * ring_bytes(layout)
    assert abs((fewer.num_blocks - plain.num_blocks) * plain.block_bytes - spare) <= plain.block_bytes
    with pytest.raises(ModelRefused, match="were asked for"):
        check_fits(size(), memory_bytes=24 * 2**30, kv_dtype="int4", num_blocks=fewer.num_blocks + 1, num_rings=100)


def test_stored_weights_are_counted_from_headers(tmp_path: Path) -> None:
    bundled = read_model_size(ROOT / "model")
    header = (ROOT / "model" / "model.safetensors").stat().st_size
    assert bundled.name == "model" and 0.99 < bundled.weight_bytes / header <= 1
    assert bundled.layout.bytes_per_token == 12 * 2 * 128 * 2 and bundled.max_context == 4096
    assert read_model_size(ROOT / "model", dtype="float32").weight_bytes == 2 * bundled.weight_bytes
    alone = read_model_size(ROOT / "model" / "config.json")
    assert (alone.num_parameters, alone.weight_bytes) == (bundled.num_parameters, bundled.weight_bytes)
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_bytes((ROOT / "model" / "config.json").read_bytes())
    for content in (b"", b"\xff" * 16, (20).to_bytes(8, "little") + b"no json at all, no no"):
        (broken / "model.safetensors").write_bytes(content)
        with pytest.raises(ModelRefused, match="is no safetensors file"):
            read_model_size(broken)
    with pytest.raises(ModelRefused, match=r"there is no .*config\.json"):
        read_model_size(tmp_path)


def test_available_memory_is_the_least_of_machine_and_container(tmp_path: Path) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal:  8000 kB\nMemAvailable:   5000 kB\n")
    assert available_in(meminfo, tmp_path) == 5000 * 1024
    (tmp_path / "memory.max").write_text("max\n")
    assert available_in(meminfo, tmp_path) == 5000 * 1024
    (tmp_path / "memory.max").write_text("3000000\n")
    (tmp_path / "memory.current").write_text("2500000\n")
    (tmp_path / "memory.stat").write_text("anon 1\ninactive_file 400000\n")
    assert available_in(meminfo, tmp_path) == 900_000


def test_the_plan_command(tmp_path: Path) -> None:
    run = CliRunner()
    llama_70b().save_pretrained(tmp_path)
    common = ["plan", "--model", str(tmp_path), "--context", "131072"]
    said = run.invoke(app, [*common, "--gpu-memory", "320GB"])
    assert said.exit_code == 0, said.output
    assert "40.00 GiB" in said.output and "int4" in said.output and "327,680 B" in said.output
    file = tmp_path / "plan.json"
    done = run.invoke(app, [*common, "--gpu-memory", "320GB", "--kv-dtype", "int4", "--json", str(file)])
    assert done.exit_code == 0, done.output
    numbers = json.loads(file.read_text())
    assert numbers["model"]["layout"]["bytes_per_token"] == 327_680
    assert [p["kv_dtype"] for p in numbers["plan"]["pages"]] == ["int4"]
    small = run.invoke(app, [*common, "--gpu-memory", "80GB"])
    assert small.exit_code == 2 and "weights 131.42 GiB" in small.output and "do not fit into 74.51 GiB" in small.output
    short = run.invoke(app, [*common, "--gpu-memory", "136GiB"])
    assert short.exit_code == 2 and "takes 11.58 GiB in int4 pages" in short.output
    assert run.invoke(app, ["plan", "--model", str(tmp_path / "none"), "--gpu-memory", "80"]).exit_code == 2
    assert run.invoke(app, [*common, "--gpu-memory", "much"]).exit_code == 2


def test_memory_has_units() -> None:
    assert parse_memory("80GB") == 80 * 10**9 and parse_memory("24 GiB") == 24 * 2**30
    assert parse_memory("1.5") == int(1.5 * GIB) and parse_memory("512mib") == 2**29
