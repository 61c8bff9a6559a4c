"""The pages of one sequence, as decode workers keep books of them: what tagged_pages.py and page_rings.py fill in."""

from __future__ import annotations

from dataclasses import dataclass, field

from prefill.chunks import KeyChain
from prefill.page_quality import EXACT
from prefill.quantized_pool import Recents


@dataclass(slots=True, kw_only=True, eq=False)
class PageTable:
    """The pages of one sequence. blocks: in the sequence's order. cached_tokens: of its front, those whose KV was there
    already. chain: the keys of its tokens so far. max_kl: how good KV must be that it takes from others, nats a token;
    None: it takes none, and gives none. num_known: how many of its blocks others may find.

    Of quantized pages: ring: of its recent tokens. recents: by position, the last tokens of the loaded chunk before it
    as they came. recent_kl: the worst KV that tokens were computed on, while they stand in the ring alone."""

    blocks: list[int]
    chain: KeyChain
    max_kl: float | None
    cached_tokens: int = 0
    num_known: int = 0
    ring: int | None = None
    recents: dict[int, Recents] = field(default_factory=dict)
    recent_kl: float = EXACT
