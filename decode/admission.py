"""What a decode worker accepts, and how a request and the policy become the orders for its fill. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from decode.fill import FillSpec
from decode.requests import GenerationRequest, RequestRefused
from decode.slo import SLOPolicy
from prefill.chunks import num_loadable_chunks

AUTO, TEXT_ONLY = "auto", "text"


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerLimits:
    """What one worker can hold. `chunk_bytes`: predicted bytes of one encoded chunk by level, for all known levels."""

    max_context: int
    vocab_size: int
    max_blocks: int
    block_tokens: int
    chunk_tokens: int
    chunk_bytes: Mapping[str, float]


def check_request(request: GenerationRequest, limits: WorkerLimits) -> None:
    """Raises RequestRefused (400) for what this worker can never serve."""
    num_prompt, num_new = len(request.token_ids), request.sampling.max_tokens
    if num_prompt < 1:
        raise RequestRefused("The prompt is empty.", param="prompt")
    if not all(0 <= token < limits.vocab_size for token in request.token_ids):
        raise RequestRefused(f"Token ids must lie in 0 .. {limits.vocab_size - 1}.", param="prompt")
    if num_new < 1:
        raise RequestRefused("max_tokens must be at least 1.", param="max_tokens")
    if num_prompt + num_new > limits.max_context:
        raise RequestRefused(
            f"{num_prompt} prompt tokens and max_tokens={num_new} exceed the context of {limits.max_context}.",
            code="context_length_exceeded",
            param="max_tokens",
        )
    needed = -(-(num_prompt + num_new) // limits.block_tokens)
    if needed > limits.max_blocks:
        raise RequestRefused(
            f"The request needs {needed} KV blocks and the worker has {limits.max_blocks}: shorten it, or serve with a "
            "larger kv_memory.",
            code="kv_pool_too_small",
        )
    levels = tuple(limits.chunk_bytes)
    for name, value, known in (
        ("kv.mode", request.kv_mode, (*levels, AUTO, TEXT_ONLY)),
        ("kv.floor", request.floor, levels),
    ):
        if value is not None and value not in known:
            raise RequestRefused(f"Unknown level {value!r}; known are {', '.join(known)}.", param=name)
    if request.kv_mode in levels and request.kv_mode not in _at_least(request.floor, levels):
        raise RequestRefused(
            f"Level {request.kv_mode!r} was asked for, and the floor {request.floor!r} forbids it: leave out one.",
            param="kv.floor",
        )


def _at_least(floor: str | None, levels: tuple[str, ...]) -> tuple[str, ...]:
    """The levels, best first, down to the floor."""
    return levels if floor is None else levels[: levels.index(floor) + 1]


def fill_orders(
    request: GenerationRequest, policy: SLOPolicy, limits: WorkerLimits, *, has_source: bool, now: float, tail_s: float
) -> FillSpec:
    """How the prompt of a checked request is to be had. Raises RequestRefused: 503 if a level was asked for and there
    is no source, 400 if the policy forbids both every level that the request's floor allows and computing from text."""
    num_chunks = num_loadable_chunks(len(request.token_ids), limits.chunk_tokens)
    ttft_s = policy.ttft_s if request.ttft_s is None else request.ttft_s
    may_load, may_compute = has_source and num_chunks > 0, True
    known = tuple(limits.chunk_bytes)
    good_enough = _at_least(request.floor, known)  # the floor need not be one of the policy's levels
    levels = tuple(level for level in policy.allowed_levels() if level in good_enough)
    if request.kv_mode == TEXT_ONLY:
        may_load = False
    elif request.kv_mode != AUTO:
        if not has_source and num_chunks > 0:
            raise RequestRefused(
                f"Level {request.kv_mode!r} was asked for, but no prefill worker can be reached.",
                status=503,
                code="no_source",
                param="kv.mode",
            )
        levels, may_compute = (request.kv_mode,), not may_load
    elif may_load and not levels:
        if not policy.allow_recompute:
            raise RequestRefused(
                f"The policy allows {', '.join(policy.allowed_levels())} and no computing from text; none of these is "
                f"as good as the floor {request.floor!r}.",
                param="kv.floor",
            )
        may_load = False
    else:
        may_compute = policy.allow_recompute or not may_load
    return FillSpec(
        num_chunks=num_chunks,
        chunk_tokens=limits.chunk_tokens,
        levels=levels or known,  # without loading they are only names
        chunk_bytes=dict(limits.chunk_bytes),
        deadline=now + ttft_s,
        tail_s=tail_s,
        may_load=may_load,
        may_compute=may_compute,
    )
