"""What the decode worker keeps of a request beside its sequence, and what the receipt says of its pages."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from decode.blob_decoder import NewPages
from decode.puller import Fill, Source
from decode.receipt import Timeline, build_receipt
from decode.requests import GenerationRequest
from decode.scheduler import Sequence
from decode.slo import SLOPolicy
from decode.tagged_pages import TaggedPages


@dataclass(slots=True, kw_only=True, eq=False)
class ActiveRequest:
    """new_pages: refined chunks that wait for the end of the engine's step. loaded_tokens: of the prompt, those before
    the tail. first_kl: the worst promise of their pages when the first token was computed. rng: for sampling without
    a seed."""

    request: GenerationRequest
    policy: SLOPolicy
    sources: list[Source]
    timeline: Timeline
    loaded_tokens: int
    fill: Fill | None = None
    new_pages: deque[NewPages] = field(default_factory=deque)
    first_kl: float | None = None
    rng: random.Random = field(default_factory=random.Random)

    @property
    def max_total_tokens(self) -> int:
        return len(self.request.token_ids) + self.request.sampling.max_tokens

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
        assert self.fill is not None
        self.timeline.opened_at = self.fill.opened_at
        receipt = build_receipt(
            request_id=self.request.request_id,
            kv_mode=self.request.kv_mode,
            prompt_tokens=self.prompt_tokens,
            chunk_tokens=chunk_tokens,
            sources=[source.id for source in self.sources],
            timeline=self.timeline,
            fill=self.fill.machine,
            promised_kl=promised_kl,
            ended_at=now,
        )
        return {**receipt, "quality": self._page_quality(sequence, pages)}

    def _page_quality(self, sequence: Sequence, pages: TaggedPages) -> dict[str, float | None] | None:
        """Worst promised loss, nats a token, None where nothing is promised: of the chunks' pages at the first token
        and at the end, and of the pages computed from then on (the tail and the answer), which inherit the loss of
        what they were computed on. None as a whole if there was no token."""
        if not sequence.output:
            return None
        table, num_loaded = sequence.block_table, self.loaded_tokens
        num_written = sequence.num_tokens - 1  # the last token's KV is never needed
        return {
            "at_first_token": self.first_kl,
            "at_end": pages.worst_kl(table, 0, num_loaded),
            "generated_on": pages.worst_kl(table, num_loaded, num_written),
        }
