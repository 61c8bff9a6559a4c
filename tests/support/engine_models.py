"""Small random models for tests of the engine, and an engine around each. Seeded."""

from __future__ import annotations

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from prefill.block_pool import BlockPool
from prefill.engine import Engine
from prefill.kv_pool import KVPool
from prefill.model import LoadedModel, wrap_model

VOCAB = 512
# The bundled model's shape with fewer layers and tokens.
SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 4096,
    "initializer_range": 0.08,  # attention that looks somewhere, unlike the usual 0.02
    "eos_token_id": 2,
}
FAMILIES = {
    "llama": (LlamaForCausalLM, LlamaConfig, {}),
    "llama-yarn": (
        LlamaForCausalLM,
        LlamaConfig,
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10_000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 1024,
            }
        },
    ),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config, {}),
    "qwen2-window": (
        Qwen2ForCausalLM,
        Qwen2Config,
        {"use_sliding_window": True, "sliding_window": 70, "max_window_layers": 1},
    ),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, {}),
    "mistral-window": (MistralForCausalLM, MistralConfig, {"sliding_window": 90}),
    "mistral": (MistralForCausalLM, MistralConfig, {"sliding_window": None}),
}


def random_model(family: str = "llama", dtype: torch.dtype = torch.float32, **changes: object) -> PreTrainedModel:
    model_class, config_class, extra = FAMILIES[family]
    torch.manual_seed(7)
    return model_class(config_class(**{**SHAPE, **extra, **changes})).to(dtype).eval()


def random_engine(
    family: str = "llama",
    dtype: torch.dtype = torch.float32,
    num_blocks: int = 256,
    row_multiple: int | None = None,
    **changes: object,
) -> tuple[Engine, BlockPool]:
    model = loaded(random_model(family, dtype, **changes))
    engine = Engine(model, KVPool(model.layout, num_blocks), row_multiple=row_multiple)
    return engine, BlockPool(num_blocks)


def loaded(model: PreTrainedModel) -> LoadedModel:
    return wrap_model(model, None, name="random", fingerprint="random")


def random_prompt(num_tokens: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCAB, (num_tokens,), generator=generator).tolist()


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    words = {"<pad>": 0, "<bos>": 1, "<eos>": 2} | {f"w{i}": i for i in range(3, VOCAB)}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(words, unk_token="<pad>")))
