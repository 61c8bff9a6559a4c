"""The attention kernels with other launch parameters than kernels/paged_attention.py names, for the GPU report."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from typing import Any

import torch

from kernels import paged_attention as paged
from prefill.attention import AttentionRule
from prefill.model import LoadedModel
from scripts.gpu_engine_measures import (
    Row,
    capture_for,
    filled_pool,
    kv_bytes_per_token,
    median_s,
    nothing_new,
    release,
)


def alternatives(kind: str, base: paged.DecodeConfig) -> list[paged.DecodeConfig]:
    """One launch parameter changed at a time, and a few together."""
    changes: list[dict[str, Any]] = [
        {}, {"num_stages": 3}, {"num_stages": 7}, {"num_warps": 8}, {"split_tokens": 2 * base.split_tokens},
        {"split_tokens": base.split_tokens // 2}, {"programs_per_sm": 2}, {"programs_per_sm": 3},
        {"programs_per_sm": 8}, {"programs_per_sm": 16},
    ]  # fmt: skip
    if kind == "bf16":
        changes += [{"block_n": 128}, {"block_n": 128, "num_stages": 3}, {"block_n": 32, "num_stages": 7}]
        changes += [{"max_registers": 128}, {"num_warps": 2, "block_n": 32, "num_stages": 7}]
    else:
        changes += [{"max_registers": None}, {"max_registers": 128}, {"max_registers": None, "programs_per_sm": 2}]
        changes += [{"split_tokens": 1024, "num_stages": 3}, {"num_warps": 8, "max_registers": 128}]
    return [replace(base, **change) for change in changes]


def sweep(
    loaded: LoadedModel, kind: str, batch: int, context: int, device: torch.device, left_s: Callable[[], float]
) -> Iterator[Row]:
    """One layer's attention with other launch parameters, going round the layers so that nothing stays in a cache."""
    release()
    layout = loaded.layout
    pool, pages, tables, _ = filled_pool(loaded, kind, batch, context, 0, device)
    base = pages.config
    heads = int(loaded.model.config.num_attention_heads)
    q = torch.randn(batch, heads, layout.head_dim_k, dtype=layout.torch_dtype, device=device)
    out = torch.empty(batch, heads, layout.head_dim_v, dtype=layout.torch_dtype, device=device)
    index = torch.arange(batch, dtype=torch.int32, device=device)
    rows = paged.DecodeRows(
        q_rows=index, tables=torch.tensor(tables, dtype=torch.int32, device=device),
        lengths=torch.full((batch,), context, dtype=torch.int32, device=device), max_length=context, rings=index,
    )  # fmt: skip
    rule, new = AttentionRule(scale=layout.head_dim_k**-0.5, window=None, softcap=None), nothing_new(rows)
    total = batch * context * kv_bytes_per_token(pool)
    tried = alternatives(kind, base)[: 2 if device.type != "cuda" else None]
    for config in tried:
        if left_s() < 15:
            break
        pages.config = config
        slots = paged.num_slots(context, config, is_quantized=pages.is_quantized)
        partials = paged.Partials.empty(batch, slots, heads, layout.head_dim_v, device)

        def run(partials: paged.Partials = partials) -> None:
            for layer in range(layout.num_layers):
                pages.attend(layer, q, new, rule, out, partials)

        try:
            with torch.inference_mode():
                seconds = median_s(capture_for(device)(run), 5, device)
        except Exception as error:  # such as more shared memory than there is: the others shall still be tried
            print(f"{config}: {type(error).__name__}: {str(error).splitlines()[0][:120]}", flush=True)
            continue
        changed = {k: v for k, v in asdict(config).items() if v != getattr(base, k)}
        yield {"pages": kind, "batch": batch, "context": context, "changed": json.dumps(changed),
               "tb_s": round(total / seconds / 1e12, 3)}  # fmt: skip
