"""What the GPU report measures of the engine: a model of random weights, pools of random KV, decode steps and
prefill. Returns rows for tables; gpu_engine_report.py says what they mean.

Shapes as in kernels/paged_attention.py. A *share* is the time that reading or computing takes at least, over the time
that it took.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from kernels import paged_attention as paged
from prefill.attention import ATTENTION_NAME, AttentionRule
from prefill.cuda_attention import CudaPages, CudaQuantizedPages, NewRows
from prefill.decode_graphs import Capture, DecodeGraphs, cuda_capture
from prefill.engine import Engine, SequenceSlice
from prefill.kv_pool import KVPool
from prefill.model import LoadedModel, wrap_model
from prefill.quantized_pool import QuantizedKVPool

Row = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """What is measured. `batches` and contexts: decode at 8k for each batch, then int4 against bf16."""

    config: dict[str, Any]
    batches: tuple[int, ...] = (1, 32)
    context: int = 8192
    long_batch: int = 16
    long_context: int = 32_768
    prefill_tokens: int = 8192
    chunks: tuple[int, ...] = (8192, 2048)
    check_tokens: int = 300
    steps: int = 20
    copy_bytes: int = 4 << 30
    matrix: int = 8192


LLAMA_8B = Size(
    config={
        "hidden_size": 4096, "intermediate_size": 14_336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 128_256, "max_position_embeddings": 131_072,
        "tie_word_embeddings": False, "rope_parameters": {"rope_type": "default", "rope_theta": 500_000.0},
    }
)  # fmt: skip
TINY = Size(
    config={
        "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 64, "vocab_size": 128, "max_position_embeddings": 512,
        "tie_word_embeddings": False, "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
    },
    batches=(1, 2), context=70, long_batch=2, long_context=100, prefill_tokens=40, chunks=(40, 16), check_tokens=20,
    steps=2, copy_bytes=1 << 16, matrix=64,
)  # fmt: skip


# Time


def synchronize(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def median_s(run: Callable[[], object], repeats: int, device: torch.device) -> float:
    """Of the device's time for one run, after one more."""
    run()
    times = []
    for _ in range(repeats):
        if device.type == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            run()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end) / 1000)
        else:
            start = time.perf_counter()
            run()
            times.append(time.perf_counter() - start)
    return float(statistics.median(times))


def ceilings(size: Size, device: torch.device) -> tuple[float, float]:
    """Bytes read and written a second by a copy, and operations a second of a bf16 matrix product, on random data."""
    words = torch.randint(-(1 << 62), 1 << 62, (size.copy_bytes // 8,), device=device)
    target = torch.empty_like(words)
    copy_s = median_s(lambda: target.copy_(words), 10, device)
    a, b = (torch.randn(size.matrix, size.matrix, dtype=torch.bfloat16, device=device) for _ in range(2))
    matrix_s = median_s(lambda: a @ b, 10, device)
    return 2 * size.copy_bytes / copy_s, 2 * size.matrix**3 / matrix_s


def build(size: Size, device: torch.device) -> LoadedModel:
    torch.manual_seed(0)
    plain = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            model = LlamaForCausalLM(LlamaConfig(**size.config))
    finally:
        torch.set_default_dtype(plain)
    return wrap_model(model.to(device), None, name="8B-shaped", fingerprint="random weights")


def weight_bytes(loaded: LoadedModel) -> int:
    """What a decode step reads of the weights: all but the embedding table, of which it reads rows."""
    embedding = loaded.model.get_input_embeddings().weight
    return sum(p.nbytes for p in loaded.model.parameters() if p is not embedding)


def prompt(loaded: LoadedModel, tokens: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    found: list[int] = torch.randint(0, loaded.vocab_size, (tokens,), generator=generator).tolist()
    return found


def relative(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm())


def capture_for(device: torch.device) -> Capture:
    return cuda_capture() if device.type == "cuda" else lambda run: run


def release() -> None:
    """Memory of what was measured before: tens of gigabytes."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def logits_check(loaded: LoadedModel, size: Size, device: torch.device, tolerance: float, *, is_fused: bool) -> str:
    """A prompt in one chunk and in two, by transformers' own attention, and its continuation by graph and eagerly."""
    ids = prompt(loaded, size.check_tokens)
    blocks = -(-len(ids) // 16) + 1
    pool = KVPool(loaded.layout, 4 * blocks, 16, device, gpu_kernels=True)
    engine = Engine(loaded, pool, row_multiple=1, is_fused=is_fused)
    tables = [list(range(i * blocks, (i + 1) * blocks))[::-1] for i in range(4)]

    def slice_of(start: int, stop: int, table: list[int]) -> SequenceSlice:
        return SequenceSlice(token_ids=ids[start:stop], start=start, block_table=table, need_logits=True)

    whole = engine.forward([slice_of(0, len(ids), tables[0])])
    half = len(ids) // 2
    engine.forward([slice_of(0, half, tables[1])])
    chunked = engine.forward([slice_of(half, len(ids), tables[1])])
    loaded.model.set_attn_implementation("sdpa")
    with torch.inference_mode():
        theirs = loaded.model(torch.tensor([ids], device=device), use_cache=False, logits_to_keep=1).logits[0].float()
    loaded.model.set_attn_implementation(ATTENTION_NAME)
    graphs = DecodeGraphs(loaded, CudaPages(pool), 16, max_rows=2, max_context=16 * blocks, capture=capture_for(device))
    rows = [SequenceSlice(token_ids=[7], start=len(ids), block_table=table, need_logits=True) for table in tables[:2]]
    eager, graph = engine.forward(rows), graphs.forward(rows)
    assert graph is not None, "not for a graph"
    errors = {
        "chunked": relative(chunked, whole), "transformers": relative(whole, theirs), "graph": relative(graph, eager)
    }  # fmt: skip
    assert all(error <= tolerance for error in errors.values()), errors
    return ", ".join(f"{name} {error:.1e}" for name, error in errors.items())


def filled_pool(
    loaded: LoadedModel, kind: str, batch: int, context: int, steps: int, device: torch.device
) -> tuple[Any, Any, list[list[int]], list[int | None]]:
    """A pool with random KV for `batch` sequences of `context` tokens, with room for more: pool, pages, block tables
    all over the pool, rings."""
    block_tokens = 16 if kind == "bf16" else 32
    per_row = -(-(context + steps) // block_tokens) + 1
    order = torch.randperm(batch * per_row, generator=torch.Generator().manual_seed(1)).tolist()
    tables = [order[i * per_row : (i + 1) * per_row] for i in range(batch)]
    if kind == "bf16":
        pool = KVPool(loaded.layout, batch * per_row, block_tokens, device, gpu_kernels=True)
        for side in (pool.k, pool.v):
            for layer in side:
                layer.normal_()
        return pool, CudaPages(pool), tables, [None] * batch
    coded = QuantizedKVPool(loaded.layout, batch * per_row, kind, batch, device)
    for pages in (*coded.store.k, *coded.store.v):
        pages.codes.random_(0, 256)
        pages.scale.fill_(0.3)
        if pages.zero is not None:
            pages.zero.fill_(-2.25)
    for recent in (coded.store.recent_k, coded.store.recent_v):
        recent.data.normal_()
    rings: list[int | None] = []
    for _ in range(batch):
        ring = coded.rings.allocate()
        coded.rings.resume(ring, context)
        rings.append(ring)
    return coded, CudaQuantizedPages(coded.store), tables, rings


def kv_bytes_per_token(pool: Any) -> float:
    return float(getattr(pool, "bytes_per_token", None) or pool.layout.bytes_per_token)


def measure_decode(
    loaded: LoadedModel, size: Size, kind: str, batch: int, context: int, label: str, copy_rate: float,
    device: torch.device,
) -> Row:  # fmt: skip
    """Whole steps as a server takes them, from token ids to token ids; and of these the graph alone, and parts of it
    alone. `copy_rate` in bytes a second."""
    release()
    pool, pages, tables, rings = filled_pool(loaded, kind, batch, context, size.steps + 4, device)
    graphs = DecodeGraphs(
        loaded, pages, pool.block_tokens, max_rows=batch, max_context=context + size.steps + 8,
        capture=capture_for(device),
    )  # fmt: skip
    tokens, times, logits = prompt(loaded, batch), [], torch.empty(0)
    for step in range(size.steps + 3):
        begin = synchronize(device)
        found = graphs.forward([
            SequenceSlice(token_ids=[tokens[i]], start=context + step, block_table=tables[i], ring=rings[i],
                          need_logits=True)
            for i in range(batch)
        ])  # fmt: skip
        assert found is not None, "not for a graph"
        logits = found
        tokens = logits.argmax(-1).tolist()  # what a greedy sampler does, the wait for the device included
        times.append(synchronize(device) - begin)
    assert bool(logits.isfinite().all()), "logits are not finite"
    step_s = statistics.median(times[3:])
    replay_s = median_s(graphs.replay(batch), size.steps, device)
    bound_bytes = weight_bytes(loaded) + batch * context * kv_bytes_per_token(pool)
    bound_s = bound_bytes / (copy_rate)
    parts = decode_parts(loaded, pages, batch, context, tables, size, device)
    row = {
        "what": label, "pages": kind, "batch": batch, "context": context, "step_ms": round(1e3 * step_s, 3),
        "graph_ms": round(1e3 * replay_s, 3), "attention_ms": round(1e3 * parts[0], 3),
        "products_ms": round(1e3 * parts[1], 3), "bound_ms": round(1e3 * bound_s, 3),
        "share": round(bound_s / step_s, 3), "tokens_s": round(batch / step_s, 1),
    }  # fmt: skip
    return row


def decode_parts(
    loaded: LoadedModel, pages: Any, batch: int, context: int, tables: list[list[int]], size: Size,
    device: torch.device,
) -> tuple[float, float]:  # fmt: skip
    """Seconds a step spends in attention over the pages, and in matrix products, each captured alone."""
    config, layout = loaded.model.config, loaded.layout
    heads = int(config.num_attention_heads)
    q = torch.randn(batch, heads, layout.head_dim_k, dtype=layout.torch_dtype, device=device)
    out = torch.empty(batch, heads, layout.head_dim_v, dtype=layout.torch_dtype, device=device)
    padded = torch.tensor(tables, dtype=torch.int32, device=device)
    lengths = torch.full((batch,), context, dtype=torch.int32, device=device)
    index = torch.arange(batch, dtype=torch.int32, device=device)
    rows = paged.DecodeRows(q_rows=index, tables=padded, lengths=lengths, max_length=context, rings=index)
    slots = paged.num_slots(context, pages.config, is_quantized=pages.is_quantized)
    partials = paged.Partials.empty(batch, slots, heads, layout.head_dim_v, device)
    rule = AttentionRule(scale=layout.head_dim_k**-0.5, window=None, softcap=None)
    new = nothing_new(rows)

    def attention() -> None:
        for layer in range(layout.num_layers):
            pages.attend(layer, q, new, rule, out, partials)

    inputs: dict[int, Tensor] = {}
    linears = [m for m in loaded.model.modules() if isinstance(m, torch.nn.Linear)]
    for linear in linears:
        depth = linear.in_features
        inputs.setdefault(depth, torch.randn(1, batch, depth, dtype=layout.torch_dtype, device=device))

    def products() -> None:
        for linear in linears:
            linear(inputs[linear.in_features])

    with torch.inference_mode():
        captures = [capture_for(device)(run) for run in (attention, products)]
        found = [median_s(run, max(3, size.steps // 2), device) for run in captures]
    return found[0], found[1]


def nothing_new(rows: paged.DecodeRows) -> NewRows:
    return NewRows(slots=torch.full_like(rows.lengths, -1, dtype=torch.int64), rows=rows)


def measure_prefill(loaded: LoadedModel, size: Size, matrix_rate: float, device: torch.device) -> Iterator[Row]:
    """One prompt, in chunks of each size. `matrix_rate` in operations a second."""
    release()
    tokens, layout, config = size.prefill_tokens, loaded.layout, loaded.model.config
    pool = KVPool(layout, -(-tokens // 16), 16, device, gpu_kernels=True)
    engine, ids, table = Engine(loaded, pool, row_multiple=1), prompt(loaded, tokens), list(range(-(-tokens // 16)))
    linear = sum(m.weight.numel() for m in loaded.model.base_model.modules() if isinstance(m, torch.nn.Linear))
    heads = int(config.num_attention_heads) * (layout.head_dim_k + layout.head_dim_v)
    flops = 2 * linear * tokens + 2 * layout.num_layers * heads * tokens * (tokens + 1) / 2
    for chunk in size.chunks:

        def run(chunk: int = chunk) -> None:
            for start in range(0, tokens, chunk):
                part = ids[start : start + chunk]
                is_last = start + chunk >= tokens
                engine.forward(
                    [SequenceSlice(token_ids=part, start=start, block_table=table, need_logits=is_last)]
                )  # fmt: skip

        run()
        times = []
        for _ in range(3):
            begin = synchronize(device)
            run()
            times.append(synchronize(device) - begin)
        seconds = statistics.median(times)
        share = flops / seconds / matrix_rate
        yield {"tokens": tokens, "chunk": chunk, "ms": round(1e3 * seconds, 1), "tokens_s": round(tokens / seconds),
               "tflop_s": round(flops / seconds / 1e12, 1), "share": round(share, 3)}  # fmt: skip
