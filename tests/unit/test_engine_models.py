"""prefill/model.py: float32 tokens are those of transformers; fingerprints, and what is refused."""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from engine_models import FAMILIES, loaded, random_engine, random_model, random_prompt, tiny_tokenizer
from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    GemmaConfig,
    GemmaForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GptOssConfig,
    GptOssForCausalLM,
)

from prefill.attention import ATTENTION_NAME, register
from prefill.engine import generate_greedy
from prefill.model import ModelRefused, load_model

ROOT = Path(__file__).parents[2]
TINY = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "vocab_size": 64,
}


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


def test_missing_weights_are_not_made_up(folder: Path, tmp_path: Path) -> None:
    more_layers = change_config(folder, tmp_path / "more", num_hidden_layers=3)
    with pytest.raises(ModelRefused, match=r"lacks \d+ of the weights of LlamaForCausalLM, such as model\.layers\.2\."):
        load_model(more_layers)


def test_rope_of_an_unknown_type_is_refused(folder: Path) -> None:
    model = random_model("llama", num_hidden_layers=1)
    model.config.rope_parameters = {"rope_type": "spiral", "rope_theta": 10000.0}
    with pytest.raises(ModelRefused, match="RoPE type 'spiral' is not known here.*longrope"):
        loaded(model)


def test_other_families_are_refused_by_name() -> None:
    gpt2 = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=64))
    with pytest.raises(ModelRefused, match="gpt2: only models with rotary"):
        loaded(gpt2)
    gemma = GemmaForCausalLM(GemmaConfig(**TINY, num_hidden_layers=1))
    gemma._supports_attention_backend = False
    with pytest.raises(ModelRefused, match="GemmaForCausalLM does not use transformers' attention interface"):
        loaded(gemma)
    sinks = GptOssForCausalLM(GptOssConfig(**TINY, num_hidden_layers=2, num_local_experts=2))
    with pytest.raises(ModelRefused, match="GptOssForCausalLM: attention sinks"):
        loaded(sinks)
    parts = Gemma3ForConditionalGeneration(
        Gemma3Config(text_config=TINY | {"num_hidden_layers": 1}, vision_config=TINY)
    )
    with pytest.raises(ModelRefused, match="gemma3: a model of several parts.*its text model alone"):
        loaded(parts)


def test_layers_of_different_kv_shapes_are_refused() -> None:
    model = GemmaForCausalLM(GemmaConfig(**TINY, num_hidden_layers=2))
    other = GemmaForCausalLM(GemmaConfig(**TINY | {"num_key_value_heads": 2}, num_hidden_layers=2))
    register()
    other.set_attn_implementation(ATTENTION_NAME)
    model.model.layers[1] = other.model.layers[1]
    with pytest.raises(ModelRefused, match=r"different KV shapes .*\(1, 32, 32\), \(2, 32, 32\)"):
        loaded(model)


def test_layers_without_attention_are_refused() -> None:
    model = GemmaForCausalLM(GemmaConfig(**TINY, num_hidden_layers=2))
    model.config.num_hidden_layers = 3
    with pytest.raises(ModelRefused, match="2 of 3 layers use the attention interface"):
        loaded(model)


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
