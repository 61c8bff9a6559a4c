"""How large a model is, from its config and the headers of its weight files; no weight is read. Knows transformers.

The layout is found as for a loaded model, by a probe (prefill/model.py), on torch's meta device.
"""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from prefill.attention import ATTENTION_NAME, register
from prefill.errors import ModelRefused
from prefill.kv_layout import DTYPES
from prefill.memory_plan import ModelSize
from prefill.model import check_config, max_context_of, probe_layout, refuse_kernels_distribution

# Weights of these are cast to the dtype asked for; others (quantized checkpoints) count as they are stored.
FLOATS = ("F64", "F32", "F16", "BF16")
MAX_HEADER_BYTES = 100 << 20  # safetensors' own limit


def read_model_size(path: str | Path, *, dtype: str = "bfloat16") -> ModelSize:
    """`path`: a model folder or a config.json. Raises `ModelRefused`."""
    path = Path(path)
    if dtype not in DTYPES:
        raise ModelRefused(f"dtype {dtype!r} is not known: use one of {', '.join(DTYPES)}")
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        raise ModelRefused(f"there is no {file}: give a model folder or a config.json")
    refuse_kernels_distribution()
    try:
        config = AutoConfig.from_pretrained(file)
    except (OSError, ValueError, KeyError) as error:
        raise ModelRefused(f"transformers cannot read {file}: {str(error).strip().splitlines()[0]}") from error
    check_config(config)
    stored = _stored_weights(path, dtype) if path.is_dir() else None
    return size_of(config, name=file.absolute().parent.name if file.name == "config.json" else file.stem,
                   dtype=dtype, stored=stored)  # fmt: skip


def size_of(config: Any, *, name: str, dtype: str, stored: tuple[int, int] | None = None) -> ModelSize:
    """Of a transformers config; `stored`: parameters and bytes, if the weights' files say so. Raises `ModelRefused`."""
    longest = max_context_of(config)
    model = _meta_model(config, dtype)
    layout, _ = probe_layout(model)
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    if stored is None:
        stored = num_parameters, num_parameters * layout.torch_dtype.itemsize
    latent = getattr(config, "kv_lora_rank", None)
    return ModelSize(
        name=name,
        layout=layout,
        num_parameters=stored[0],
        weight_bytes=stored[1],
        hidden_size=int(config.hidden_size),
        intermediate_size=_widest(config),
        vocab_size=int(config.vocab_size),
        max_context=longest,
        latent_values=latent + config.qk_rope_head_dim if latent else None,
    )


def _meta_model(config: Any, dtype: str) -> Any:
    """The model without memory for its weights."""
    config = copy.deepcopy(config)
    rope = config.rope_parameters
    if rope.get("rope_type") == "dynamic":
        rope["rope_type"] = "default"  # looks at positions, of which there are none here
    register()
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=DTYPES[dtype])
    except (ValueError, KeyError, TypeError, ImportError) as error:
        raise ModelRefused(f"transformers cannot build {config.model_type}: {error}") from error
    if not getattr(model, "_supports_attention_backend", False):
        raise ModelRefused(f"{type(model).__name__} does not use transformers' attention interface")
    model.set_attn_implementation(ATTENTION_NAME)
    return model.eval()


def _widest(config: Any) -> int:
    """Values of a row inside an MLP: a dense one's, or of the experts that a token visits."""
    dense = int(getattr(config, "intermediate_size", None) or 4 * config.hidden_size)
    expert = getattr(config, "moe_intermediate_size", None) or (
        dense if getattr(config, "num_local_experts", None) else None
    )
    visited = getattr(config, "num_experts_per_tok", None) or 1
    return max(dense, expert * visited if expert else 0)


def _stored_weights(folder: Path, dtype: str) -> tuple[int, int] | None:
    """Parameters and bytes in memory of the safetensors files; None without any."""
    num_parameters = num_bytes = 0
    files = sorted(folder.glob("*.safetensors"))
    for file in files:
        for name, tensor in _header(file).items():
            if name == "__metadata__":
                continue
            count = math.prod(tensor["shape"])
            start, stop = tensor["data_offsets"]
            num_parameters += count
            num_bytes += count * DTYPES[dtype].itemsize if tensor["dtype"] in FLOATS else stop - start
    return (num_parameters, num_bytes) if files else None


def _header(file: Path) -> dict[str, Any]:
    """Length u64 little-endian, then JSON."""
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if not 2 <= length <= MAX_HEADER_BYTES:
            raise ModelRefused(f"{file} is no safetensors file: its header would be {length} bytes long")
        try:
            header = json.loads(stream.read(length))
        except ValueError as error:
            raise ModelRefused(f"{file} is no safetensors file: {error}") from error
    if not isinstance(header, dict):
        raise ModelRefused(f"{file} is no safetensors file: its header is no object")
    return header
