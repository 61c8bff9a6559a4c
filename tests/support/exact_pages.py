"""A runtime for TaggedPages without a model: the bookkeeping of exact pages, whose copies go nowhere."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from prefill.block_pool import BlockPool, blocks_for

BLOCK_TOKENS = 16


def exact_runtime(
    num_blocks: int, profile: Any, *, ttl_s: float | None = None, windows: tuple[int | None, ...] = (None,)
) -> Any:
    pool = SimpleNamespace(
        block_tokens=BLOCK_TOKENS,
        blocks_for=lambda num_tokens: blocks_for(num_tokens, BLOCK_TOKENS),
        begin_sequence=lambda: None,
        end_sequence=lambda ring: None,
        write=lambda *_: None,
    )
    return SimpleNamespace(
        pool=pool,
        exact_pool=pool,
        kv_cache_dtype="bfloat16",
        page_kl=0.0,
        allocator=BlockPool(num_blocks, ttl_s=ttl_s),
        profile=profile,
        model=SimpleNamespace(fingerprint="f", layout=SimpleNamespace(windows=windows)),
    )
