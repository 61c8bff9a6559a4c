"""A causal language model from transformers with kvstream's attention in it, and what the rest must know about it.
Knows torch and transformers, reads the model's folder; everything that cannot be served is refused here, by name.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from prefill.attention import ATTENTION_NAME, AttentionUnsupported, register
from prefill.kv_layout import DTYPES, KVLayout

# Their frequencies depend on the position alone; `dynamic` and `longrope` look at the longest sequence of the *batch*.
ROPE_TYPES = ("default", "linear", "llama3", "yarn")


class ModelRefused(Exception):
    """The model cannot be served; the text says why and what to do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedModel:
    """A model ready for `prefill.engine.Engine`. `fingerprint` covers config, weights, tokenizer and dtype: two workers
    with the same fingerprint produce interchangeable KV."""

    name: str
    model: PreTrainedModel
    tokenizer: Any
    layout: KVLayout
    fingerprint: str
    max_context: int
    eos_token_ids: tuple[int, ...]
    vocab_size: int

    @property
    def device(self) -> torch.device:
        return self.model.device

    def rope_tables(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """cos and sin [T, D] float32 for positions `start..stop`: `rotated = x * cos + rotate_half(x) * sin`.

        A pure rotation (cos² + sin² = 1), also where the model scales its tables (yarn), so that rotating by -sin and
        again by +sin gives the key back."""
        rotary = _rotary(self.model)
        positions = torch.arange(start, stop, device=self.device)[None]
        with torch.inference_mode():
            cos, sin = rotary(torch.zeros(1, dtype=torch.float32, device=self.device), positions)
        scaling = float(getattr(rotary, "attention_scaling", 1.0))
        return (cos[0] / scaling).cpu(), (sin[0] / scaling).cpu()


def load_model(path: str | Path, *, dtype: str = "bfloat16", device: str = "cpu") -> LoadedModel:
    """Load a model folder (config.json, safetensors, tokenizer). Raises `ModelRefused`."""
    folder = Path(path)
    if dtype not in DTYPES:
        raise ModelRefused(f"dtype {dtype!r} is not known: use one of {', '.join(DTYPES)}")
    if not folder.is_dir():
        raise ModelRefused(f"there is no model folder at {folder}: give the path of a folder with config.json")
    if not (folder / "config.json").is_file():
        raise ModelRefused(f"{folder} has no config.json: is this the folder of a transformers model?")
    refuse_kernels_distribution()
    disable_progress_bar()  # "Loading weights" from every worker, into every log
    try:
        config = AutoConfig.from_pretrained(folder)
        _check_config(config)
        model = AutoModelForCausalLM.from_pretrained(folder, config=config, dtype=DTYPES[dtype])
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelRefused(f"transformers cannot load {folder}: {reason}") from error
    fingerprint = fingerprint_folder(folder, dtype)
    return wrap_model(model.to(device), tokenizer, name=folder.resolve().name, fingerprint=fingerprint)


def wrap_model(model: PreTrainedModel, tokenizer: Any, *, name: str, fingerprint: str) -> LoadedModel:
    """Put our attention into a model that is in memory already. Raises `ModelRefused`."""
    config = model.config
    _check_config(config)
    if not getattr(model, "_supports_attention_backend", False):
        raise ModelRefused(f"{type(model).__name__} does not use transformers' attention interface")
    register()
    model.eval().requires_grad_(False)
    model.set_attn_implementation(ATTENTION_NAME)
    layout = _probe_layout(model)
    _check_rotation(model, layout)
    eos = getattr(model.generation_config, "eos_token_id", None)
    eos = config.eos_token_id if eos is None else eos
    return LoadedModel(
        name=name,
        model=model,
        tokenizer=tokenizer,
        layout=layout,
        fingerprint=fingerprint,
        max_context=int(config.max_position_embeddings),
        eos_token_ids=() if eos is None else tuple(eos) if isinstance(eos, list | tuple) else (int(eos),),
        vocab_size=int(config.vocab_size),
    )


def fingerprint_folder(folder: Path, dtype: str) -> str:
    """SHA-256 over the files that decide what KV a prompt gets, and the dtype. Reads every byte: ~1 s per GB."""
    digest = hashlib.sha256(f"kvstream model 1\n{dtype}\n".encode())
    names = {
        "config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "tokenizer.model",
        "vocab.json",
        "merges.txt",
    }
    weights = {".safetensors", ".bin"}
    for file in sorted(folder.iterdir()):
        if file.name in names or file.suffix in weights:
            with file.open("rb") as stream:
                content = hashlib.file_digest(stream, "sha256").hexdigest()
            digest.update(f"{file.name} {content}\n".encode())
    return digest.hexdigest()


def refuse_kernels_distribution() -> None:
    """transformers imports a PyPI package named `kernels` when it is installed, and would then find our folder."""
    try:
        version = importlib.metadata.version("kernels")
    except importlib.metadata.PackageNotFoundError:
        return
    raise ModelRefused(
        f"the PyPI package `kernels` {version} is installed and clashes with kvstream's folder of that name: "
        "run `pip uninstall kernels`, or give kvstream an environment of its own"
    )


def _check_config(config: Any) -> None:
    if getattr(config, "kv_lora_rank", None):
        raise ModelRefused("multi-head latent attention (kv_lora_rank) is not supported yet")
    if not getattr(config, "max_position_embeddings", None):
        raise ModelRefused("the config has no max_position_embeddings, so the context length is unknown")
    rope = getattr(config, "rope_parameters", None)
    if not rope:
        raise ModelRefused(f"{config.model_type}: only models with rotary position embeddings are supported")
    if any(isinstance(value, dict) for value in rope.values()):
        raise ModelRefused(f"{config.model_type}: different RoPE per layer type is not supported yet")
    rope_type = rope.get("rope_type", "default")
    if rope_type not in ROPE_TYPES:
        raise ModelRefused(
            f"RoPE type {rope_type!r} is not supported (its frequencies may depend on the other requests of a batch): "
            f"use a model with one of {', '.join(ROPE_TYPES)}"
        )


def _rotary(model: PreTrainedModel) -> nn.Module:
    for name, module in model.named_modules():
        if name.rpartition(".")[2] == "rotary_emb":
            return module
    raise ModelRefused(f"{type(model).__name__} has no rotary_emb module")


class _LayoutProbe:
    """Stands in for a `PagedBatch` and notes the shapes that each layer hands to the attention."""

    def __init__(self) -> None:
        self.shapes: dict[int, tuple[int, int, int]] = {}

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, mask: object) -> Tensor:
        assert layer not in self.shapes, f"layer {layer} attends twice"
        self.shapes[layer] = (k.shape[1], k.shape[3], v.shape[3])
        return torch.zeros(1, q.shape[2], q.shape[1], v.shape[3], dtype=q.dtype, device=q.device)


def _probe_layout(model: PreTrainedModel) -> KVLayout:
    probe = _LayoutProbe()
    ids = torch.zeros(1, 1, dtype=torch.int64, device=model.device)
    try:
        with torch.inference_mode():
            model(ids, position_ids=ids, use_cache=False, kv=probe)
    except AttentionUnsupported as error:
        raise ModelRefused(f"{type(model).__name__}: {error}") from error
    except (AssertionError, TypeError) as error:
        raise ModelRefused(
            f"{type(model).__name__} does not pass its keywords on to the attention interface: {error}"
        ) from error
    num_layers = int(model.config.num_hidden_layers)
    if sorted(probe.shapes) != list(range(num_layers)):
        raise ModelRefused(
            f"{type(model).__name__}: {len(probe.shapes)} of {num_layers} layers use the attention interface"
        )
    if len(set(probe.shapes.values())) != 1:
        raise ModelRefused(f"{type(model).__name__}: layers of different KV shapes are not supported yet")
    heads, head_dim_k, head_dim_v = probe.shapes[0]
    return KVLayout(
        num_layers=num_layers,
        num_kv_heads=heads,
        head_dim_k=head_dim_k,
        head_dim_v=head_dim_v,
        dtype=str(model.dtype).removeprefix("torch."),
    )


def _check_rotation(model: PreTrainedModel, layout: KVLayout) -> None:
    """The codec undoes RoPE by the rotate-half convention over the whole head; refuse families that differ."""
    rotate = getattr(sys.modules[type(model).__module__], "apply_rotary_pos_emb", None)
    if rotate is None:
        raise ModelRefused(f"{type(model).__name__}: its rotary embedding is of a kind not known here")
    positions = torch.arange(3, device=model.device)[None]
    x = torch.linspace(-1, 1, 3 * layout.head_dim_k, device=model.device).view(1, 1, 3, layout.head_dim_k)
    cos, sin = _rotary(model)(x, positions)
    if cos.shape[-1] != layout.head_dim_k:
        raise ModelRefused(f"{type(model).__name__}: partial rotary embeddings are not supported yet")
    half = layout.head_dim_k // 2
    expected = x * cos + torch.cat((-x[..., half:], x[..., :half]), dim=-1) * sin
    if not torch.allclose(rotate(x, x, cos, sin)[1], expected, atol=1e-5):
        raise ModelRefused(f"{type(model).__name__}: interleaved rotary embeddings are not supported yet")
