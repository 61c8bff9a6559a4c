"""One request on a decode worker as the batch sees it, and a row of a step. Plain data: no tensors, no clock."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from decode.requests import GenerationRequest


class Phase(Enum):
    FILLING = "filling"
    TAIL = "tail"
    RUNNING = "running"
    PREEMPTED = "preempted"
    ENDED = "ended"


@dataclass(slots=True, kw_only=True, eq=False)
class Sequence:
    """One request on a decode worker. `work`: tokens [start, stop) to compute now, None when there are none.

    arrival: its place in the order of arrivals; no two are equal. priority: lower is sooner. waited_s: how long it
    waited to be admitted, all times together. protected_until: it is no victim before it has so many output tokens.
    num_charged: of its output tokens, those that its tenant's service counts already. last_step: the last step that it
    had a row in. ring: of its recent tokens, where pages are quantized.
    """

    key: str
    request: GenerationRequest
    block_table: list[int]
    deadline: float
    arrival: int
    phase: Phase = Phase.FILLING
    work: tuple[int, int] | None = None
    work_chunk: int | None = None
    output: list[int] = field(default_factory=list)
    itl_s: float = 0.1
    is_held: bool = False  # its next token waits for pages to be refined
    pins: int = 0  # users of the pages (a forward pass, a decoding blob): they are freed only when nobody is left
    priority: int = 0
    waited_s: float = 0.0
    num_preempted: int = 0
    protected_until: int = 0
    num_charged: int = 0
    last_step: int = 0
    ring: int | None = None

    @property
    def tenant(self) -> str:
        return self.request.tenant

    @property
    def num_tokens(self) -> int:
        """Prompt and output so far. While it fills, that is what has to be in its pages before a token is drawn: all
        of the output too if it was preempted."""
        return len(self.request.token_ids) + len(self.output)

    @property
    def max_total_tokens(self) -> int:
        return len(self.request.token_ids) + self.request.sampling.max_tokens

    def token_ids(self, start: int, stop: int) -> list[int]:
        """Tokens [start, stop) of prompt and output."""
        prompt = self.request.token_ids
        num_prompt = len(prompt)
        assert 0 <= start <= stop <= num_prompt + len(self.output)
        return [*prompt[start:stop], *self.output[max(0, start - num_prompt) : max(0, stop - num_prompt)]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """Compute tokens [start, stop) of `sequence`; `sample`: draw the next token from the logits of the last one."""

    sequence: Sequence
    start: int
    stop: int
    sample: bool

    def token_ids(self) -> list[int]:
        return self.sequence.token_ids(self.start, self.stop)
