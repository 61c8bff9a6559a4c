"""What the decode worker keeps of a request beside its sequence, and what the receipt says of its pages."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from decode.blob_decoder import NewPages
from decode.fill_chunks import CACHED
from decode.page_rings import SavedPages
from decode.page_table import PageTable
from decode.puller import Fill, Source
from decode.receipt import Timeline, build_receipt
from decode.requests import GenerationRequest
from decode.sampling_state import SamplingState
from decode.scheduler import Phase, Sequence
from decode.slo import SLOPolicy
from decode.stored_front import StoredFront
from decode.tagged_pages import TaggedPages
from prefill.chunks import KeyChain
from prefill.page_quality import EXACT


@dataclass(slots=True, kw_only=True, eq=False)
class ActiveRequest:
    """given_sources: what the route says; sources: those and the worker's own store. fill_tokens: what has to be in the
    pages before the next token is drawn: the prompt, and the answer so far if that was preempted. loaded_tokens: of
    these, those before the tail. new_pages: refined chunks that wait for the end of the engine's step.
    chain: the keys of its tokens so far. max_kl: see decode.tagged_pages.PageTable. pages: while it is admitted.
    cached_kl: the worst promise of the KV that was there then; first_kl: that of all pages when the first token was
    computed. first_fill, first_sources: those of the first token. sampling: what it needs from token to token. front: a
    part of a stored chunk that is to be loaded, or was. is_answering: all that was to be filled is, and more is
    computed token by token. saved: its quantized pages, while it is preempted."""

    request: GenerationRequest
    policy: SLOPolicy
    given_sources: list[Source]
    timeline: Timeline
    fill_tokens: int
    sampling: SamplingState
    chain: KeyChain
    loaded_tokens: int = 0
    sources: list[Source] = field(default_factory=list)
    max_kl: float | None = None
    pages: PageTable | None = None
    cached_kl: float | None = EXACT
    fill: Fill | None = None
    new_pages: deque[NewPages] = field(default_factory=deque)
    first_kl: float | None = None
    first_fill: Fill | None = None
    first_sources: list[Source] = field(default_factory=list)
    num_preempted: int = 0
    front: StoredFront | None = None
    is_answering: bool = False
    saved: SavedPages | None = None

    @property
    def max_total_tokens(self) -> int:
        return len(self.request.token_ids) + self.request.sampling.max_tokens

    @property
    def tail_start(self) -> int:
        """The first token of the tail."""
        return max(
            self.loaded_tokens,
            0 if self.pages is None else self.pages.cached_tokens,
            0 if self.front is None else self.front.stop,
        )

    @property
    def prompt_tokens(self) -> int:
        return len(self.request.token_ids)

    def receipt(
        self,
        sequence: Sequence,
        pages: TaggedPages,
        *,
        chunk_tokens: int,
        promised_kl: Mapping[str, float | None],
        now: float,
    ) -> dict[str, Any]:
        """The KV receipt; the pages are still the sequence's."""
        # What is told of an answer that was preempted is how its first token came about.
        fill, sources = (self.first_fill, self.first_sources) if self.first_fill else (self.fill, self.sources)
        assert fill is not None
        self.timeline.opened_at = fill.opened_at
        receipt = build_receipt(
            request_id=self.request.request_id,
            kv_mode=self.request.kv_mode,
            prompt_tokens=self.prompt_tokens,
            chunk_tokens=chunk_tokens,
            sources=[source.id for source in sources],
            timeline=self.timeline,
            fill=fill.machine,
            promised_kl={**promised_kl, CACHED: self.cached_kl},
            ended_at=now,
        )
        return {
            **receipt,
            "kv_cache_dtype": pages.kv_cache_dtype,
            "quality": self._page_quality(sequence, pages),
            "preemptions": self.num_preempted,
        }

    def _page_quality(self, sequence: Sequence, pages: TaggedPages) -> dict[str, float | None] | None:
        """Worst promised loss, nats a token, None where nothing is promised: of the chunks' pages at the first token
        and at the end, and of the pages computed from then on (the tail and the answer), which inherit the loss of
        what they were computed on. None as a whole if there was no token."""
        if sequence.phase is not Phase.RUNNING:
            return None
        table, num_loaded = self.pages, self.loaded_tokens
        assert table is not None
        num_written = sequence.num_tokens - 1  # the last token's KV is never needed
        return {
            "at_first_token": self.first_kl,
            "at_end": pages.worst_kl(table, 0, num_loaded),
            "generated_on": pages.worst_kl(table, num_loaded, num_written),
        }
