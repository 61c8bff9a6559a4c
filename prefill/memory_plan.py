"""What of a model fits into a memory, before anything is loaded. Pure arithmetic: no model, no files, no tensors.

    memory = weights + activations + runtime + KV pages (+ rings of recent tokens, one a sequence, if quantized)

Pages are counted as the pools allocate them: every layer of every block, and one block (bf16) or ring (quantized) of
zeros more, which stands for what is not written.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from prefill import quantized_layout
from prefill.errors import ModelRefused
from prefill.kv_layout import KVLayout, live_blocks, window_groups
from prefill.quantized_layout import PageMix

KVDtype = Literal["bf16", "int8", "int4", "fp8"]  # bf16: as the model computes it, whatever its dtype
KV_DTYPES: tuple[KVDtype, ...] = ("bf16", "int8", "int4")  # those that are worth comparing
BLOCK_TOKENS = 16
BATCH_ROWS = 2048  # rows of one forward pass: prefill chunks and decode rows together
LOGIT_ROWS = 256  # of those, the rows whose logits are wanted
# Code, handles and workspaces of torch, and what its allocator cannot use for being in pieces.
RUNTIME_BYTES = 1 << 30
GIB = float(1 << 30)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSize:
    """What `prefill.model_size` reads of a model without its weights. `latent_values`: of one token in one layer where
    attention is latent (MLA) and KV could be kept as that; None otherwise."""

    name: str
    layout: KVLayout
    num_parameters: int
    weight_bytes: int
    hidden_size: int
    intermediate_size: int
    vocab_size: int
    max_context: int
    latent_values: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class PagesPlan:
    """What fits with pages of one kind. `sequence_bytes`: of one sequence at the plan's context. `num_blocks` fill the
    memory that `num_sequences` (at least one) sequences' rings leave. `windowed_*`: if layers with a sliding window
    gave back what they no longer see, which the pools do not do yet; None without windows."""

    kv_dtype: KVDtype
    block_tokens: int
    bytes_per_token: float
    block_bytes: int
    sequence_bytes: int
    num_blocks: int
    num_tokens: int
    num_sequences: int
    windowed_sequence_bytes: int | None
    windowed_num_sequences: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPlan:
    """`free_bytes`: left for KV; negative if not even the weights fit."""

    memory_bytes: int
    context: int
    weight_bytes: int
    activation_bytes: int
    runtime_bytes: int
    free_bytes: int
    pages: tuple[PagesPlan, ...]


def activation_bytes(size: ModelSize, *, batch_rows: int = BATCH_ROWS) -> int:
    """The most that one forward pass holds beside weights and pages, by rule of thumb: residual, normed and projected
    rows of one layer, the MLP's three, and float32 logits (twice: as computed and as sampled)."""
    layout = size.layout
    query_values = max(size.hidden_size, layout.values_per_layer)
    row_values = 4 * size.hidden_size + 2 * query_values + 3 * size.intermediate_size
    logits = 2 * 4 * min(batch_rows, LOGIT_ROWS) * size.vocab_size
    return batch_rows * row_values * int(layout.torch_dtype.itemsize) + logits


def plan_memory(
    size: ModelSize,
    *,
    memory_bytes: int,
    context: int,
    kv_dtypes: tuple[KVDtype, ...] = KV_DTYPES,
    block_tokens: int = BLOCK_TOKENS,
    batch_rows: int = BATCH_ROWS,
    runtime_bytes: int = RUNTIME_BYTES,
    mixes: Mapping[KVDtype, PageMix | None] | None = None,
    num_rings: int | None = None,
) -> MemoryPlan:
    """`block_tokens` is of bf16 pages; quantized ones have 32. Kinds that the head dims rule out are left out. `mixes`:
    of the kinds whose layers differ (quantized_mix.py). `num_rings`: see plan_pages."""
    assert context > 0 and memory_bytes >= 0, (context, memory_bytes)
    activations = activation_bytes(size, batch_rows=batch_rows)
    free = memory_bytes - size.weight_bytes - activations - runtime_bytes
    return MemoryPlan(
        memory_bytes=memory_bytes,
        context=context,
        weight_bytes=size.weight_bytes,
        activation_bytes=activations,
        runtime_bytes=runtime_bytes,
        free_bytes=free,
        pages=tuple(
            plan_pages(
                size.layout,
                kind,
                free_bytes=max(free, 0),
                context=context,
                block_tokens=block_tokens,
                mix=(mixes or {}).get(kind),
                num_rings=num_rings,
            )
            for kind in kv_dtypes
            if kind != "int4" or size.layout.head_dim_k % 2 == size.layout.head_dim_v % 2 == 0
        ),
    )


def plan_pages(
    layout: KVLayout,
    kv_dtype: KVDtype,
    *,
    free_bytes: int,
    context: int,
    block_tokens: int = BLOCK_TOKENS,
    mix: PageMix | None = None,
    num_rings: int | None = None,
) -> PagesPlan:
    """`num_rings`: beside quantized blocks there are so many; None: as many as sequences of `context` tokens fit."""
    if kv_dtype == "bf16":
        block_bytes, ring_bytes = block_tokens * layout.bytes_per_token, 0
        blocks_each, spare_bytes = -(-context // block_tokens), block_bytes
    else:
        block_tokens = quantized_layout.BLOCK_TOKENS
        block_bytes = quantized_layout.block_bytes(layout, kv_dtype, mix)
        ring_bytes = quantized_layout.ring_bytes(layout)
        blocks_each, spare_bytes = quantized_layout.blocks_for(context), ring_bytes
    sequence_bytes = blocks_each * block_bytes + ring_bytes
    usable = max(free_bytes - spare_bytes, 0)
    num_sequences = usable // sequence_bytes
    num_blocks = max(usable - (num_rings or max(num_sequences, 1)) * ring_bytes, 0) // block_bytes
    windowed = _windowed_sequence_bytes(layout, blocks_each, block_bytes, block_tokens) + ring_bytes
    return PagesPlan(
        kv_dtype=kv_dtype,
        block_tokens=block_tokens,
        bytes_per_token=block_bytes / block_tokens,
        block_bytes=block_bytes,
        sequence_bytes=sequence_bytes,
        num_blocks=num_blocks,
        num_tokens=num_blocks * block_tokens,
        num_sequences=num_sequences,
        windowed_sequence_bytes=windowed if layout.has_windows else None,
        windowed_num_sequences=usable // windowed if layout.has_windows else None,
    )


def _windowed_sequence_bytes(layout: KVLayout, blocks_each: int, block_bytes: int, block_tokens: int) -> int:
    """Of decoding rows; a prefill chunk holds its own length more."""
    layer_bytes = block_bytes // layout.num_layers
    return sum(
        len(layers) * layer_bytes * live_blocks(window, blocks_each * block_tokens, block_tokens)
        for window, layers in window_groups(layout).items()
    )


def check_fits(
    size: ModelSize,
    *,
    memory_bytes: int,
    num_blocks: int | None = None,
    context: int | None = None,
    kv_dtype: KVDtype = "bf16",
    block_tokens: int = BLOCK_TOKENS,
    batch_rows: int = BATCH_ROWS,
    runtime_bytes: int = RUNTIME_BYTES,
    mix: PageMix | None = None,
    num_rings: int | None = None,
) -> PagesPlan:
    """Raises `ModelRefused`, with the numbers, if the weights and `num_blocks` blocks do not fit; without a number of
    blocks, if not one sequence of `context` tokens (default: the model's longest) does. The plan otherwise."""
    context = context or size.max_context
    plan = plan_memory(
        size,
        memory_bytes=memory_bytes,
        context=context,
        kv_dtypes=(kv_dtype,),
        block_tokens=block_tokens,
        batch_rows=batch_rows,
        runtime_bytes=runtime_bytes,
        mixes={kv_dtype: mix},
        num_rings=num_rings,
    )
    if not plan.pages:
        quantized_layout.check_kind(size.layout, kv_dtype)
    pages = plan.pages[0]
    reserve = plan.activation_bytes + plan.runtime_bytes
    needed = f"{size.name}: weights {gib(plan.weight_bytes)}, activations and runtime {gib(reserve)}"
    if plan.free_bytes <= 0:
        raise ModelRefused(
            f"{needed} do not fit into {gib(memory_bytes)}: use a machine with more memory, a smaller model or dtype"
        )
    if num_blocks is not None and num_blocks > pages.num_blocks:
        raise ModelRefused(
            f"{needed} leave {gib(plan.free_bytes)} of {gib(memory_bytes)} for KV, which is {pages.num_blocks} blocks "
            f"of {pages.block_tokens} tokens in {kv_dtype} pages, and {num_blocks} "
            f"({gib(num_blocks * pages.block_bytes)}) were asked for: ask for fewer, or for a machine with more memory"
        )
    if num_blocks is None and not pages.num_sequences:
        raise ModelRefused(
            f"{needed} leave {gib(plan.free_bytes)} of {gib(memory_bytes)} for KV, and one sequence of {context} "
            f"tokens takes {gib(pages.sequence_bytes)} in {kv_dtype} pages: a shorter context "
            f"(up to {pages.num_tokens} tokens) or quantized pages may fit; see `kvstream plan`"
        )
    return pages


def gib(num_bytes: float) -> str:
    """As GiB, or MiB if that is too coarse."""
    return f"{num_bytes / GIB:.2f} GiB" if abs(num_bytes) >= GIB / 10 else f"{num_bytes / 2**20:.1f} MiB"
