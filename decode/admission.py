"""What a decode worker accepts, and how a request and the policy become the orders for its fill. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from decode.fill_loading import FillSpec
from decode.replay import BadPlan, read_replay
from decode.requests import GenerationRequest, RequestRefused
from decode.slo import SLOPolicy
from prefill.chunks import num_loadable_chunks

AUTO, TEXT_ONLY = "auto", "text"


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerLimits:
    """What one worker can hold. chunk_bytes: predicted bytes of one encoded chunk by level, for all known levels, best
    first; nested: those of them that refine one another; exact: those that lose nothing. windows: of the layers, where
    only what they see is to be loaded; empty: all is. quantized_pages: their kind, None where pages are exact."""

    max_context: int
    vocab_size: int
    max_blocks: int
    block_tokens: int
    chunk_tokens: int
    chunk_bytes: Mapping[str, float]
    nested: frozenset[str] = frozenset()
    exact: frozenset[str] = frozenset()
    windows: tuple[int | None, ...] = ()
    quantized_pages: str | None = None


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
    for name, value in (("kv.mode", request.kv_mode), ("kv.floor", request.floor)):
        if limits.quantized_pages is not None and value in limits.exact:
            raise RequestRefused(
                f"{value!r} was asked for, and this server keeps KV in {limits.quantized_pages} pages, which lose a "
                "little: ask for a lossy level, or serve with kv_cache_dtype: auto.",
                code="kv_pages_quantized",
                param=name,
            )
    if request.kv_mode in levels and request.kv_mode not in _at_least(request.floor, levels):
        raise RequestRefused(
            f"Level {request.kv_mode!r} was asked for, and the floor {request.floor!r} forbids it: leave out one.",
            param="kv.floor",
        )


def _at_least(floor: str | None, levels: tuple[str, ...]) -> tuple[str, ...]:
    """The levels, best first, down to the floor."""
    return levels if floor is None else levels[: levels.index(floor) + 1]


def fill_orders(
    request: GenerationRequest,
    policy: SLOPolicy,
    limits: WorkerLimits,
    *,
    has_source: bool,
    now: float,
    tail_s: float,
    num_chunks: int | None = None,
    source_computes: bool = True,
    cached_tokens: int = 0,
    is_accepted: bool = False,
    front_stop: int = 0,
    front_kl: float = 0.0,
) -> FillSpec:
    """How the prompt of a checked request is to be had. `policy`: the tenant's. num_chunks: if they are not those of
    the prompt. source_computes: whether one computes what is stored nowhere. cached_tokens: whose KV is there.
    is_accepted: the request was taken when there was no source; one that has come since does not turn it away.
    front_stop, front_kl: see FillSpec.

    Raises RequestRefused: 503 if a level or a plan was asked for and there is no source, 400 if the plan does not fit,
    or if the policy forbids both every level that the request's floor allows and computing from text.
    """
    if num_chunks is None:
        num_chunks = num_loadable_chunks(len(request.token_ids), limits.chunk_tokens)
    known = tuple(limits.chunk_bytes)
    orders = FillSpec(
        num_chunks=num_chunks,
        chunk_tokens=limits.chunk_tokens,
        levels=known,
        chunk_bytes=dict(limits.chunk_bytes),
        nested=limits.nested,
        exact=limits.exact,
        deadline=now + (policy.ttft_s if request.ttft_s is None else request.ttft_s),
        tail_s=tail_s,
        cached_tokens=cached_tokens,
        front_stop=front_stop,
        front_kl=front_kl,
        may_load=has_source and num_chunks * limits.chunk_tokens > cached_tokens,
        infeasible=policy.infeasible,
        windows=limits.windows,
    )
    # What a plan brought stands in the pages already when its request is back from having given way.
    if request.plan is not None and not request.sampling.needs_whole_prompt and not cached_tokens:
        return _given_orders(orders, request, policy, known)
    if request.kv_mode == TEXT_ONLY or request.sampling.needs_whole_prompt:
        return replace(orders, may_load=False)
    if request.kv_mode != AUTO:
        if not has_source and num_chunks > 0:
            raise _no_source(f"Level {request.kv_mode!r} was asked for", "kv.mode")
        return replace(orders, levels=(request.kv_mode,), may_compute=not orders.may_load, infeasible="best_effort")
    if not orders.may_load:
        return orders
    good_enough = _at_least(request.floor, known)  # the floor need not be one of the policy's levels
    levels = tuple(level for level in policy.allowed_levels() if level in good_enough)
    if not levels:
        if not policy.allow_recompute and not is_accepted:
            raise RequestRefused(
                f"The policy allows {', '.join(policy.allowed_levels())} and no computing from text; none of these is "
                f"as good as the floor {request.floor!r}.",
                param="kv.floor",
            )
        return replace(orders, may_load=False)
    return replace(
        orders,
        levels=levels,
        may_compute=policy.allow_recompute or not source_computes,
        max_compute=_share_of(policy.max_recompute_share, num_chunks)
        if policy.max_recompute_share < 1 and source_computes
        else None,
        refine_levels=_refine_levels(policy, levels, known),
    )


def _share_of(share: float, num_chunks: int) -> int:
    """At most so many; 0.29 of 100 are 29, although the product is a bit less."""
    return math.floor(share * num_chunks + 1e-9)


def _refine_levels(policy: SLOPolicy, levels: tuple[str, ...], known: tuple[str, ...]) -> tuple[str, ...]:
    """What chunks rise to after the first token, best first, down to the coarsest that they may have come at."""
    if policy.refine_to not in known:
        return ()
    span = known[known.index(policy.refine_to) : known.index(levels[-1]) + 1]
    return tuple(level for level in span if level in policy.levels or level == policy.refine_to)


def _given_orders(orders: FillSpec, request: GenerationRequest, policy: SLOPolicy, known: tuple[str, ...]) -> FillSpec:
    """Those of a plan that is to be followed. It may not go below the floor."""
    assert request.plan is not None
    try:
        replay = read_replay(request.plan, num_chunks=orders.num_chunks, chunk_tokens=orders.chunk_tokens, known=known)
    except BadPlan as error:
        raise RequestRefused(f"The plan cannot be followed: {error}.", param="kv.plan") from None
    # The profile need not have the floor itself: then the coarsest of the policy's levels above it that it has.
    named = [level for level in policy.levels[: policy.levels.index(policy.floor) + 1] if level in known]
    allowed = (*(_at_least(named[-1], known) if named else ()), TEXT_ONLY)
    below = next((level for level in replay.levels if level not in allowed), None)
    if below is not None:
        raise RequestRefused(
            f"The plan cannot be followed: it has chunks at {below}, and the policy's floor is {policy.floor}.",
            param="kv.plan",
        )
    may_load = any(level != TEXT_ONLY for level in replay.levels)
    if may_load and not orders.may_load:
        raise _no_source("The plan loads chunks", "kv.plan")
    return replace(orders, replay=replay, may_load=may_load, infeasible="best_effort")


def _no_source(what: str, param: str) -> RequestRefused:
    return RequestRefused(f"{what}, but no prefill worker can be reached.", status=503, code="no_source", param=param)
