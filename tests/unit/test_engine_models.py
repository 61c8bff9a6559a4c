"""prefill/model.py: float32 tokens are those of transformers; tables, fingerprints, and what is refused."""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from engine_models import FAMILIES, loaded, random_engine, random_model, random_prompt, tiny_tokenizer
from transformers import GemmaConfig, GemmaForCausalLM, GPT2Config, GPT2LMHeadModel

from prefill.engine import generate_greedy, prefill
from prefill.model import ModelRefused, load_model

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("models") / "tiny"
    random_model("llama", torch.bfloat16, num_hidden_layers=2).save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path


@pytest.mark.parametrize("family", FAMILIES)
def test_float32_tokens_are_those_of_transformers(family: str) -> None:
    engine, allocator = random_engine(family)
    reference = random_model(family)
    for num_tokens, chunk_tokens in ((3, 256), (130, 50), (290, 256)):
        prompt = random_prompt(num_tokens, seed=num_tokens)
        expected = reference.generate(
            torch.tensor([prompt]), max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0
        )[0, num_tokens:]
        tokens = generate_greedy(engine, allocator, prompt, 12, chunk_tokens=chunk_tokens)
        assert tokens == expected.tolist()


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """`x` [T, H, D]"""
    half = x.shape[-1] // 2
    turned = torch.cat((-x[..., half:], x[..., :half]), dim=-1)
    return x * cos[:, None] + turned * sin[:, None]


@pytest.mark.parametrize("family", ["llama", "llama-yarn", "qwen3"])
def test_rope_tables_undo_and_redo_the_models_rotation(family: str) -> None:
    engine, _ = random_engine(family)
    prompt = random_prompt(90)
    table = list(range(6))
    prefill(engine, prompt, table)
    keys = engine.pool.read(table, 0, 90)[0][0]
    cos, sin = engine.model.rope_tables(0, 90)
    assert cos.shape == sin.shape == (90, 64) and cos.dtype == torch.float32
    torch.testing.assert_close(cos**2 + sin**2, torch.ones(90, 64), atol=1e-6, rtol=0)

    layer = engine.model.model.model.layers[0]
    hidden = layer.input_layernorm(engine.model.model.model.embed_tokens(torch.tensor(prompt)))
    raw = layer.self_attn.k_proj(hidden).view(90, 2, 64)
    if hasattr(layer.self_attn, "k_norm"):
        raw = layer.self_attn.k_norm(raw)
    scaling = getattr(engine.model.model.model.rotary_emb, "attention_scaling", 1.0)
    undone = rotate(keys, cos, -sin)
    torch.testing.assert_close(undone, raw * scaling, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(rotate(undone, cos, sin), keys, atol=1e-5, rtol=1e-5)
    part = engine.model.rope_tables(40, 60)
    assert torch.equal(part[0], cos[40:60]) and torch.equal(part[1], sin[40:60])


def test_load_reads_what_others_must_know(folder: Path) -> None:
    model = load_model(folder)
    assert model.name == "tiny"
    assert model.layout.bytes_per_token == 2 * 2 * 128 * 2 and model.layout.dtype == "bfloat16"
    assert (model.max_context, model.eos_token_ids, model.vocab_size) == (4096, (2,), 512)
    assert len(model.fingerprint) == 64 and load_model(folder).fingerprint == model.fingerprint
    assert load_model(folder, dtype="float32").fingerprint != model.fingerprint


def test_a_changed_weight_or_config_changes_the_fingerprint(folder: Path, tmp_path: Path) -> None:
    before = load_model(folder).fingerprint
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        copy = tmp_path / name / "tiny"
        copy.mkdir(parents=True)
        for file in folder.iterdir():
            (copy / file.name).write_bytes(file.read_bytes())
        content = bytearray((copy / name).read_bytes())
        content = content[:-1] + b"\x01" if name.endswith("tensors") else content + b"\n"
        (copy / name).write_bytes(content)
        assert load_model(copy).fingerprint != before


def test_eos_is_a_list_where_the_generation_config_has_several() -> None:
    model = random_model()
    model.generation_config.eos_token_id = [2, 7]
    assert loaded(model).eos_token_ids == (2, 7)


def change_config(folder: Path, target: Path, **changes: object) -> Path:
    target.mkdir()
    for file in folder.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text()) | changes
    (target / "config.json").write_text(json.dumps(config))
    return target


def test_what_cannot_be_loaded_is_refused_in_words(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelRefused, match=r"there is no model folder at .*nowhere"):
        load_model(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelRefused, match=r"no config\.json"):
        load_model(tmp_path / "empty")
    with pytest.raises(ModelRefused, match="use one of bfloat16"):
        load_model(folder, dtype="int3")
    no_weights = tmp_path / "no-weights"
    no_weights.mkdir()
    (no_weights / "config.json").write_bytes((folder / "config.json").read_bytes())
    with pytest.raises(ModelRefused, match=r"transformers cannot load .*no-weights"):
        load_model(no_weights)
    unknown = change_config(folder, tmp_path / "unknown", model_type="no-such-model")
    with pytest.raises(ModelRefused, match="no-such-model"):
        load_model(unknown)


@pytest.mark.parametrize("rope_type", ["dynamic", "longrope"])
def test_rope_that_depends_on_the_batch_is_refused(folder: Path, tmp_path: Path, rope_type: str) -> None:
    rope = {"rope_type": rope_type, "rope_theta": 10000.0, "factor": 2.0}
    rope |= {"short_factor": [1.0] * 32, "long_factor": [2.0] * 32, "original_max_position_embeddings": 2048}
    with pytest.raises(ModelRefused, match=rope_type):
        load_model(change_config(folder, tmp_path / rope_type, rope_parameters=rope))


def test_other_families_are_refused_by_name() -> None:
    gpt2 = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=64))
    with pytest.raises(ModelRefused, match="gpt2: only models with rotary"):
        loaded(gpt2)
    gemma = GemmaForCausalLM(
        GemmaConfig(
            hidden_size=64,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=32,
            vocab_size=64,
        )
    )
    gemma._supports_attention_backend = False
    with pytest.raises(ModelRefused, match="GemmaForCausalLM does not use transformers' attention interface"):
        loaded(gemma)


def test_the_pypi_package_named_kernels_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda name: {"kernels": "0.9.1"}[name])
    with pytest.raises(ModelRefused, match=r"`kernels` 0\.9\.1 .*pip uninstall kernels"):
        load_model(folder)


def test_transformers_imports_beside_our_kernels_folder() -> None:
    code = "import kernels, prefill.model; from transformers import LlamaForCausalLM; print(kernels.__file__)"
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert out.returncode == 0, out.stderr
    assert Path(out.stdout.strip()) == ROOT / "kernels" / "__init__.py"
    assert (ROOT / "kernels" / "__init__.py").read_text() == ""
