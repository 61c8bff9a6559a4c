"""`kvstream plan`: what of a model fits into a memory, before anything is loaded or started."""

from __future__ import annotations

import dataclasses
import json
import re
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from scripts.cli_errors import clean_errors, err, fail

if TYPE_CHECKING:
    from prefill.memory_plan import MemoryPlan, ModelSize

UNITS = {"kb": 1e3, "mb": 1e6, "gb": 1e9, "tb": 1e12, "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}


class Dtype(StrEnum):
    BF16 = "bfloat16"
    FP16 = "float16"
    FP32 = "float32"


class KVKind(StrEnum):
    BF16 = "bf16"
    INT8 = "int8"
    INT4 = "int4"
    FP8 = "fp8"


def plan(
    model: Annotated[Path, typer.Option(help="Model folder, or a config.json alone.")],
    gpu_memory: Annotated[str, typer.Option(help="What a worker may use: 80GB, 24GiB; GiB without a unit.")],
    context: Annotated[int | None, typer.Option(help="Tokens of a sequence. Default: the model's most.", min=1)] = None,
    dtype: Annotated[Dtype, typer.Option(help="Of weights and activations.")] = Dtype.BF16,
    kv_dtype: Annotated[
        KVKind | None,
        typer.Option(help="Pages: bf16 (as computed, in --dtype), int8, int4 or fp8. Default: the first three."),
    ] = None,
    block_tokens: Annotated[int, typer.Option(help="Of bf16 pages; quantized ones have 32.", min=1, max=256)] = 16,
    batch_rows: Annotated[int, typer.Option(help="Tokens of one forward pass, for the activations.", min=1)] = 2048,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the numbers here; - prints them.")] = None,
) -> None:
    """What fits: weights, KV a token, blocks and sequences, with raw and with quantized pages. Loads no weights."""
    memory_bytes = parse_memory(gpu_memory)
    from prefill.errors import ModelRefused
    from prefill.memory_plan import KV_DTYPES, check_fits, plan_memory
    from prefill.model_size import read_model_size
    from prefill.quantized_layout import QuantizedPagesUnsupported
    from prefill.quantized_mix import read_page_mix

    with clean_errors(ModelRefused, QuantizedPagesUnsupported):
        size = read_model_size(model, dtype=dtype.value)
        tokens = context or size.max_context
        kinds = KV_DTYPES if kv_dtype is None else (kv_dtype.value,)
        folder = model if model.is_dir() else model.parent
        mixes = {kind: read_page_mix(folder, kind, size.layout) for kind in kinds}
        result = plan_memory(
            size,
            memory_bytes=memory_bytes,
            context=tokens,
            kv_dtypes=kinds,
            block_tokens=block_tokens,
            batch_rows=batch_rows,
            mixes=mixes,
        )
        if not any(pages.num_sequences for pages in result.pages):
            # The smallest pages first: theirs are the numbers to tell.
            for kind in [pages.kv_dtype for pages in reversed(result.pages)] or kinds:
                check_fits(
                    size,
                    memory_bytes=memory_bytes,
                    context=tokens,
                    kv_dtype=kind,
                    block_tokens=block_tokens,
                    batch_rows=batch_rows,
                    mix=mixes[kind],
                )
    if tokens > size.max_context:
        err.print(f"note: the model's context ends at {size.max_context} tokens", markup=False)
    numbers = as_json(size, result)
    if json_file is None:
        typer.echo(as_text(size, result))
    elif str(json_file) == "-":
        typer.echo(json.dumps(numbers, indent=2))
    else:
        json_file.write_text(json.dumps(numbers, indent=2) + "\n")


def parse_memory(text: str) -> int:
    """Bytes. A number with a unit of 1,000 (GB) or 1,024 (GiB); without one GiB."""
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([kmgt]i?b)?\s*", text.lower())
    if match is None:
        fail(f"--gpu-memory {text}: want a number such as 80GB, 24GiB or 16")
    return int(float(match[1]) * UNITS[match[2] or "gib"])


def as_json(size: ModelSize, result: MemoryPlan) -> dict[str, Any]:
    model = dataclasses.asdict(size)
    model["layout"]["bytes_per_token"] = size.layout.bytes_per_token
    return {"model": model, "plan": dataclasses.asdict(result)}


def as_text(size: ModelSize, result: MemoryPlan) -> str:
    from prefill.memory_plan import gib

    layout = size.layout
    windows = sorted({w for w in layout.windows if w is not None})
    shape = f"{layout.num_layers} layers, {layout.num_kv_heads} KV heads of {layout.head_dim_k}"
    if layout.head_dim_v != layout.head_dim_k:
        shape += f" (keys) and {layout.head_dim_v} (values)"
    lines = [
        f"{size.name}: {size.num_parameters / 1e9:.3g} billion parameters, {shape}, {layout.dtype}",
        "",
        f"memory            {gib(result.memory_bytes):>12}",
        f"weights           {gib(result.weight_bytes):>12}",
        f"activations       {gib(result.activation_bytes):>12}   of one forward pass, by rule of thumb",
        f"runtime           {gib(result.runtime_bytes):>12}   kept for torch and what its allocator cannot use",
        f"left for KV       {gib(result.free_bytes):>12}",
        "",
        f"{'pages':<8}{'KV a token':>12}{'at ' + format(result.context, ',') + ' tokens':>20}"
        f"{'blocks':>12}{'tokens':>14}{'sequences':>12}",
    ]
    for pages in result.pages:
        label = layout.dtype.replace("bfloat", "bf") if pages.kv_dtype == "bf16" else pages.kv_dtype
        lines.append(
            f"{label:<8}{format(round(pages.bytes_per_token), ',') + ' B':>12}{gib(pages.sequence_bytes):>20}"
            f"{pages.num_blocks:>12,}{pages.num_tokens:>14,}{pages.num_sequences:>12,}"
        )
    lines += [
        "",
        "sequences: at once, each that long and none sharing a prefix. Quantized pages: 32 tokens a block, and",
    ]
    lines += ["64 recent tokens of each sequence as computed."]
    if windows:
        held = ", ".join(
            f"{gib(p.windowed_sequence_bytes or 0)} and {p.windowed_num_sequences} sequences ({p.kv_dtype})"
            for p in result.pages
        )
        lines += [
            f"{sum(w is not None for w in layout.windows)} layers see only the last "
            f"{', '.join(map(str, windows))} tokens. Pages hold all tokens of them today; if they held the window:",
            f"  {held}",
        ]
    if size.latent_values is not None:
        latent = size.latent_values * layout.num_layers * layout.torch_dtype.itemsize
        lines += [f"Latent attention: KV is kept as attention reads it; the latent would take {latent:,} B a token."]
    return "\n".join(lines)
