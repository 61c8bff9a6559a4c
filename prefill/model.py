"""A causal language model from transformers with kvstream's attention in it, and what the rest must know about it.
Knows torch and transformers, reads the model's folder; everything that cannot be served is refused here, by name.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from prefill.attention import ATTENTION_NAME, AttentionRule, AttentionUnsupported, register
from prefill.errors import ModelRefused
from prefill.kv_layout import DTYPES, KVLayout
from prefill.rotation import KeyRotation, find_rotation, probe_positions

# Their frequencies depend on the position alone.
ROPE_TYPES = ("default", "linear", "llama3", "yarn")
# These switch to other frequencies when the longest sequence of the *batch* exceeds the original context. Within it
# they are constant, so that is the context served.
CAPPED_ROPE_TYPES = ("dynamic", "longrope")


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
    rotation: KeyRotation

    @property
    def device(self) -> torch.device:
        return self.model.device

    def rope_tables(self, start: int, stop: int) -> tuple[Tensor, Tensor, tuple[bool, ...] | None]:
        """What `codec.rope.RopeTable` takes for positions `start..stop`: cos and sin [T, R] float32 of the first R
        channels, `rotated = x * cos + rotate_half(x) * sin`, a pure rotation; and the layers whose keys are turned so,
        None for all of them. R = 0 where the codec can undo nothing."""
        cos, sin = self.rotation.tables(torch.arange(start, stop, device=self.device))
        return cos.cpu(), sin.cpu(), None if all(self.rotation.layers) else self.rotation.layers


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
        check_config(config)
        model, found = AutoModelForCausalLM.from_pretrained(
            folder, config=config, dtype=DTYPES[dtype], output_loading_info=True
        )
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelRefused(f"transformers cannot load {folder}: {reason}") from error
    if missing := sorted(found["missing_keys"]):  # transformers makes them up and goes on
        raise ModelRefused(
            f"{folder} lacks {len(missing)} of the weights of {type(model).__name__}, such as {missing[0]}: "
            "its files are incomplete, or of another architecture"
        )
    fingerprint = fingerprint_folder(folder, dtype)
    return wrap_model(model.to(device), tokenizer, name=folder.resolve().name, fingerprint=fingerprint)


def wrap_model(model: PreTrainedModel, tokenizer: Any, *, name: str, fingerprint: str) -> LoadedModel:
    """Put our attention into a model that is in memory already. Raises `ModelRefused`."""
    config = model.config
    check_config(config)
    if not getattr(model, "_supports_attention_backend", False):
        raise ModelRefused(f"{type(model).__name__} does not use transformers' attention interface")
    register()
    model.eval().requires_grad_(False)
    model.set_attn_implementation(ATTENTION_NAME)
    max_context = max_context_of(config)
    layout, rotation = _probe(model, max_context)
    eos = getattr(model.generation_config, "eos_token_id", None)
    eos = config.eos_token_id if eos is None else eos
    return LoadedModel(
        name=name,
        model=model,
        tokenizer=tokenizer,
        layout=layout,
        fingerprint=fingerprint,
        max_context=max_context,
        eos_token_ids=() if eos is None else tuple(eos) if isinstance(eos, list | tuple) else (int(eos),),
        vocab_size=int(config.vocab_size),
        rotation=rotation,
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


def check_config(config: Any) -> None:
    if config.get_text_config() is not config:
        raise ModelRefused(
            f"{config.model_type}: a model of several parts (text beside images or sound): serve its text model alone"
        )
    if not getattr(config, "max_position_embeddings", None):
        raise ModelRefused("the config has no max_position_embeddings, so the context length is unknown")
    ropes = _ropes(config)
    if not ropes:
        raise ModelRefused(f"{config.model_type}: only models with rotary position embeddings are supported")
    for rope in ropes:
        rope_type = rope.get("rope_type", "default")
        if rope_type not in ROPE_TYPES + CAPPED_ROPE_TYPES:
            raise ModelRefused(
                f"RoPE type {rope_type!r} is not known here (its frequencies may depend on the other requests of a "
                f"batch): use a model with one of {', '.join(ROPE_TYPES + CAPPED_ROPE_TYPES)}"
            )


def _ropes(config: Any) -> list[dict[str, Any]]:
    """The config's RoPE parameters: one set, or one for each layer type (None where a type has no RoPE)."""
    rope = getattr(config, "rope_parameters", None) or {}
    nested = [value for value in rope.values() if isinstance(value, dict)]
    return nested or ([rope] if rope else [])


def max_context_of(config: Any) -> int:
    """The config's, or what it was before scaling where the frequencies switch there."""
    longest = int(config.max_position_embeddings)
    for rope in _ropes(config):
        if rope.get("rope_type") in CAPPED_ROPE_TYPES:
            longest = min(longest, int(rope.get("original_max_position_embeddings") or longest))
    return longest


class _Probe:
    """Stands in for a `PagedBatch`: notes what each layer hands to the attention, and silences it, so that the hidden
    states of a token depend on nothing but the token."""

    def __init__(self) -> None:
        self.keys: dict[int, Tensor] = {}
        self.shapes: dict[int, tuple[int, int, int]] = {}
        self.windows: dict[int, int | None] = {}

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, rule: AttentionRule) -> Tensor:
        assert layer not in self.shapes, f"layer {layer} attends twice"
        self.keys[layer] = k[0].transpose(0, 1)
        self.shapes[layer] = (k.shape[1], k.shape[3], v.shape[3])
        self.windows[layer] = rule.window
        return torch.zeros(1, q.shape[2], q.shape[1], v.shape[3], dtype=q.dtype, device=q.device)


def probe_layout(model: PreTrainedModel, positions: list[int] | None = None) -> tuple[KVLayout, list[Tensor]]:
    """The layout that a model with our attention hands out, and each layer's keys [2, P, H, D] of two tokens at the
    positions. Works on the meta device, too. Raises `ModelRefused`."""
    positions = positions or [0]
    probe = _Probe()
    tokens = [model.config.vocab_size // 2, model.config.vocab_size // 3]
    ids = torch.tensor([[token for token in tokens for _ in positions]], device=model.device)
    at = torch.tensor([positions * len(tokens)], device=model.device)
    try:
        with torch.inference_mode():
            model(ids, position_ids=at, use_cache=False, logits_to_keep=1, kv=probe)
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
    shapes = sorted(set(probe.shapes.values()))
    if len(shapes) != 1:
        raise ModelRefused(
            f"{type(model).__name__}: layers of different KV shapes are not supported yet; its (heads, key dims, value "
            f"dims) are {', '.join(map(str, shapes))}"
        )
    heads, head_dim_k, head_dim_v = shapes[0]
    layout = KVLayout(
        num_layers=num_layers,
        num_kv_heads=heads,
        head_dim_k=head_dim_k,
        head_dim_v=head_dim_v,
        dtype=str(model.dtype).removeprefix("torch."),
        windows=tuple(probe.windows[layer] for layer in range(num_layers)),
    )
    return layout, [probe.keys[layer].unflatten(0, (len(tokens), -1)) for layer in range(num_layers)]


def _probe(model: PreTrainedModel, max_context: int) -> tuple[KVLayout, KeyRotation]:
    positions = probe_positions(max_context)
    layout, keys = probe_layout(model, positions)
    return layout, find_rotation(model, keys, positions, layout.windows)
