"""One tiny random model of every family that docs/models.md calls tested. Float32, seeded."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

VOCAB = 256
SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 2048,
    "initializer_range": 0.15,  # attention that looks somewhere, unlike the usual 0.02
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
MLA = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 24,
    "q_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "head_dim": 8,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "first_k_dense_replace": 1,
    "n_shared_experts": 1,
}
LONG_FACTORS = {"short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5], "long_factor": [4.0] * 6}


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """`name`: of the classes, before Config and ForCausalLM. `rotated`: layers whose keys the codec turns back, and
    `rotary_dims`, by what its modeling file says."""

    name: str
    changes: dict[str, Any] = field(default_factory=dict)
    windows: tuple[int | None, ...] = (None,) * 4
    rotated: tuple[bool, ...] = (True,) * 4
    rotary_dims: int = 16
    max_context: int = 2048

    @property
    def has_experts(self) -> bool:
        return any("experts" in name for name in self.changes)


def _rope(**parameters: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_theta": 10_000.0, **parameters}}


LOCAL_GLOBAL = ["sliding_attention", "full_attention"] * 2
MIXED_ROPE = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
    "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1_000_000.0},
}
NONE = (False,) * 4
FAMILIES = {
    "llama": Family(name="Llama"),
    "llama-linear": Family(name="Llama", changes=_rope(rope_type="linear", factor=4.0)),
    "llama-llama3": Family(
        name="Llama",
        changes=_rope(
            rope_type="llama3",
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=256,
        ),
    ),
    "llama-yarn": Family(
        name="Llama", changes=_rope(rope_type="yarn", factor=4.0, original_max_position_embeddings=512)
    ),
    "llama-dynamic": Family(
        name="Llama",
        changes=_rope(rope_type="dynamic", factor=4.0, original_max_position_embeddings=512),
        max_context=512,
    ),
    "qwen2": Family(name="Qwen2"),
    "qwen2-window": Family(
        name="Qwen2",
        changes={"use_sliding_window": True, "sliding_window": 33, "max_window_layers": 2},
        windows=(None, None, 33, 33),
    ),
    "qwen3": Family(name="Qwen3"),
    "qwen3-moe": Family(
        name="Qwen3Moe", changes={"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    ),
    "mistral": Family(name="Mistral", changes={"sliding_window": 40}, windows=(40,) * 4),
    "mixtral": Family(name="Mixtral", changes={"num_local_experts": 4, "num_experts_per_tok": 2}),
    "phi3-partial": Family(
        name="Phi3",
        changes=_rope(rope_type="default", partial_rotary_factor=0.75) | {"sliding_window": None},
        rotary_dims=12,
    ),
    "phi3-longrope": Family(
        name="Phi3",
        changes=_rope(
            rope_type="longrope",
            partial_rotary_factor=0.75,
            original_max_position_embeddings=512,
            **LONG_FACTORS,
        )
        | {"sliding_window": None, "original_max_position_embeddings": 512},
        rotary_dims=12,
        max_context=512,
    ),
    "gemma2": Family(
        name="Gemma2",
        changes={
            "sliding_window": 40,
            "layer_types": LOCAL_GLOBAL,
            "query_pre_attn_scalar": 24,
            "attn_logit_softcapping": 5.0,
            "final_logit_softcapping": 10.0,
        },
        windows=(40, None, 40, None),
    ),
    "gemma3": Family(
        name="Gemma3Text",
        changes={
            "sliding_window": 40,
            "layer_types": LOCAL_GLOBAL,
            "query_pre_attn_scalar": 24,
            "rope_parameters": MIXED_ROPE,
        },
        windows=(40, None, 40, None),
        rotated=(False, True, False, True),
    ),
    "olmo2": Family(name="Olmo2"),
    "olmo3": Family(
        name="Olmo3",
        changes={"sliding_window": 40, "layer_types": LOCAL_GLOBAL},
        windows=(40, None, 40, None),
    ),
    "smollm3": Family(name="SmolLM3", changes={"no_rope_layers": [1, 1, 1, 0]}, rotated=(True, True, True, False)),
    "cohere": Family(name="Cohere", rotated=NONE, rotary_dims=0),
    "deepseek-v2": Family(name="DeepseekV2", changes=MLA, rotated=NONE, rotary_dims=0),
    "deepseek-v3": Family(
        name="DeepseekV3", changes=MLA | {"n_group": 2, "topk_group": 1}, rotated=NONE, rotary_dims=0
    ),
}


def tiny_model(family: str) -> PreTrainedModel:
    """On the CPU, float32, in transformers' own eager attention."""
    spec = FAMILIES[family]
    config = getattr(transformers, f"{spec.name}Config")(**{**SHAPE, **spec.changes})
    class_name = spec.name.removesuffix("Text") + "ForCausalLM"
    torch.manual_seed(11)
    model = getattr(transformers, class_name)._from_config(config, attn_implementation="eager")
    model = model.float().eval()
    with torch.no_grad():  # norms and biases start at exactly 1 or 0, which would hide where they stand
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def random_ids(num_tokens: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCAB, (num_tokens,), generator=generator).tolist()
