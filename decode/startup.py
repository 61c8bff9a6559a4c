"""What a decode worker finds out once, before it serves: its own speed, and what its codec profile promises."""

from __future__ import annotations

import time

from codec.levels import LevelKind
from codec.profile import Profile
from decode.admission import WorkerLimits
from decode.estimator import ComputeEstimator
from decode.step_times import StepTimes
from prefill.block_pool import blocks_for
from prefill.chunks import MAX_NAMED_LAYERS
from prefill.engine import SequenceSlice
from prefill.kv_layout import KVLayout
from prefill.quantized_pool import QuantizedKVPool
from prefill.runtime import ModelRuntime

MEASURED_ROWS = 15  # that a decode step has besides one


def worker_limits(runtime: ModelRuntime, chunk_tokens: int) -> WorkerLimits:
    """What this worker can hold and knows."""
    pool = runtime.pool
    is_quantized = isinstance(pool, QuantizedKVPool)
    return WorkerLimits(
        max_context=runtime.model.max_context,
        vocab_size=runtime.model.vocab_size,
        max_blocks=pool.num_blocks,
        block_tokens=pool.block_tokens,
        quantized_pages=pool.kind if is_quantized else None,
        chunk_tokens=chunk_tokens,
        chunk_bytes=predicted_chunk_bytes(runtime, chunk_tokens),
        nested=nested_levels(runtime.profile),
        exact=exact_levels(runtime.profile),
        windows=() if is_quantized else loaded_windows(runtime.model.layout),
    )


def loaded_windows(layout: KVLayout) -> tuple[int | None, ...]:
    """The windows that loading goes by: none where there is none, or where layers could not be named."""
    return layout.windows if layout.has_windows and layout.num_layers <= MAX_NAMED_LAYERS else ()


def predicted_chunk_bytes(runtime: ModelRuntime, chunk_tokens: int) -> dict[str, float]:
    """Bytes of one encoded chunk by level, best level first, from what the profile says of bits a value."""
    layout = runtime.model.layout
    values = chunk_tokens * layout.bytes_per_token / layout.torch_dtype.itemsize
    return {level: values * runtime.profile.bits_per_value[level] / 8 for level in runtime.profile.level_names}


def nested_levels(profile: Profile) -> frozenset[str]:
    """The levels of which a finer one continues a coarser one."""
    return frozenset(level.name for level in profile.levels if level.kind is LevelKind.QUANTIZED)


def exact_levels(profile: Profile) -> frozenset[str]:
    """The levels that lose nothing."""
    return frozenset(level.name for level in profile.levels if level.kind is not LevelKind.QUANTIZED)


def promised_kl(profile: Profile) -> dict[str, float | None]:
    """The KL divergence that each level promises, nats a token; None where nothing was measured."""
    return {level: profile.promise[level].kl for level in profile.level_names}


def measure_compute(runtime: ModelRuntime, chunk_tokens: int) -> ComputeEstimator:
    """Timed slices at start-up: a chunk and a few tokens, at the beginning and far into the context, as far as the
    pages reach."""
    room = min(runtime.model.max_context, runtime.pool.num_blocks * runtime.pool.block_tokens)
    tokens = min(chunk_tokens, room // 2)
    far = max(tokens, room // 2 - tokens)
    few = max(1, tokens // 16)
    runtime.time_slice(min(16, room), 0)  # the first forward pass of a process is slow

    def timed(num_tokens: int, start: int) -> tuple[int, int, float]:
        return num_tokens, start, runtime.time_slice(num_tokens, start)

    return ComputeEstimator.from_slices(
        timed(tokens, 0), timed(tokens, far), short_near=timed(few, 0), short_far=timed(few, far)
    )


def measure_steps(runtime: ModelRuntime, context: int) -> StepTimes:
    """Decode steps of one row and of several, after `context` tokens or as many as the pages hold."""
    pool = runtime.pool
    context = min(context, runtime.model.max_context, pool.num_blocks * pool.block_tokens)
    more = min(MEASURED_ROWS, pool.rings.num_rings - 1) if isinstance(pool, QuantizedKVPool) else MEASURED_ROWS
    table = runtime.allocator.allocate(blocks_for(context, pool.block_tokens))
    rings = [pool.begin_sequence() for _ in range(1 + more)]

    def step_s(num_rows: int) -> float:
        times = []
        for _ in range(5):
            for ring in rings[:num_rows]:
                if isinstance(pool, QuantizedKVPool) and ring is not None:
                    pool.rings.reset(ring)
                    pool.resume(table, ring, context - 1)
            rows = [
                SequenceSlice(token_ids=[0], start=context - 1, block_table=table, need_logits=True, ring=ring)
                for ring in rings[:num_rows]
            ]
            begin = time.perf_counter()
            runtime.engine.forward(rows)
            times.append(time.perf_counter() - begin)
        return min(times)

    try:
        one_s, more_s = step_s(1), step_s(1 + more)
    finally:
        runtime.allocator.release(table)
        for ring in rings:
            pool.end_sequence(ring)
    row_s = min(max(0.0, (more_s - one_s) / more), one_s) if more else 0.0
    return StepTimes(one_s - row_s, row_s)


def measure_decode(runtime: ModelRuntime, chunk_tokens: int) -> dict[str, float]:
    """Seconds to decode one chunk into pages, by level, on the KV of some tokens."""
    block_tokens = runtime.pool.block_tokens
    tokens = min(chunk_tokens, runtime.model.max_context // block_tokens * block_tokens)
    tokens = min(tokens, runtime.pool.num_blocks * block_tokens)
    table = runtime.allocator.allocate(blocks_for(tokens, block_tokens))
    ring = runtime.pool.begin_sequence()
    seconds: dict[str, float] = {}
    try:
        token_ids = [token % runtime.model.vocab_size for token in range(tokens)]
        runtime.engine.forward([SequenceSlice(token_ids=token_ids, start=0, block_table=table, ring=ring)])
        k, v = runtime.read_pages(table, ring, 0, tokens)
        for level in runtime.profile.level_names:
            blob = runtime.encode(k, v, start=0, level=level)
            times = []
            for _ in range(2):
                begin = time.perf_counter()
                runtime.decode_into_pages(blob, table, start=0, stop=tokens)
                times.append(time.perf_counter() - begin)
            seconds[level] = min(times) * chunk_tokens / tokens
    finally:
        runtime.allocator.release(table)
        runtime.pool.end_sequence(ring)
    return seconds
