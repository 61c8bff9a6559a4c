"""What a decode worker finds out once, before it serves: its own speed, and what its codec profile promises."""

from __future__ import annotations

from codec.profile import Profile
from decode.estimator import ComputeEstimator
from prefill.runtime import BLOCK_TOKENS, ModelRuntime


def predicted_chunk_bytes(runtime: ModelRuntime, chunk_tokens: int) -> dict[str, float]:
    """Bytes of one encoded chunk by level, best level first, from what the profile says of bits a value."""
    layout = runtime.model.layout
    values = chunk_tokens * layout.bytes_per_token / layout.torch_dtype.itemsize
    return {level: values * runtime.profile.bits_per_value[level] / 8 for level in runtime.profile.level_names}


def promised_kl(profile: Profile) -> dict[str, float | None]:
    """The KL divergence that each level promises, nats a token; None where nothing was measured."""
    return {level: profile.promise[level].kl for level in profile.level_names}


def measure_compute(runtime: ModelRuntime, chunk_tokens: int) -> ComputeEstimator:
    """Two timed slices at start-up: one at the beginning, one far into the context, as far as the pages reach."""
    room = min(runtime.model.max_context, runtime.pool.num_blocks * BLOCK_TOKENS)
    tokens = min(chunk_tokens, room // 2)
    far = max(tokens, room // 2 - tokens)
    runtime.time_slice(min(16, room), 0)  # the first forward pass of a process is slow
    near_s, far_s = runtime.time_slice(tokens, 0), runtime.time_slice(tokens, far)
    return ComputeEstimator.from_two_slices((tokens, 0, near_s), (tokens, far, far_s))
