"""The numbers that a decode worker's scheduler goes by, as plain data. docs/scheduler.md says what each one buys."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from decode.fair_share import TenantShare

# What a decode worker adds when it judges whether a request has room. Blocks are left free for each admitted request to
# grow into: without any, half of all requests are preempted where pages are short (docs/scheduler.md).
SPARE_TOKENS = 32
MAX_SEQUENCES = 256  # admitted at once; as many transfers as transport allows to one source
MAX_WAITING = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulingPolicy:
    """Raises ValueError for what makes no sense.

    age_s: a request gains one level of priority for each so many seconds that it waits.
    max_overtaken: a request without room is overtaken by so many others, then by none.
    output_weight: what an output token counts in a tenant's service, where a prompt token counts 1.
    max_preemptions: from so many on, nobody who waits makes a request give way, and it is protected when it is back ...
    progress_tokens: ... until it has drawn so many more tokens, and twice as many each further time.
    max_rows: answers that one step continues, None for all. More take turns.
    min_slice_tokens: no piece of a prompt is cut shorter than this, but for the first of a step.
    max_waiting: requests in the queue; more are refused.
    shares: by tenant; default_share is that of the tenants not named.
    """

    age_s: float = 5.0
    max_overtaken: int = 8
    output_weight: float = 2.0
    max_preemptions: int = 2
    progress_tokens: int = 128
    max_rows: int | None = None
    min_slice_tokens: int = 32
    max_waiting: int | None = None
    shares: Mapping[str, TenantShare] = field(default_factory=dict)
    default_share: TenantShare = field(default_factory=TenantShare)

    def __post_init__(self) -> None:
        for name, value, least in (
            ("age_s", self.age_s, 1e-3),
            ("max_overtaken", self.max_overtaken, 0),
            ("output_weight", self.output_weight, 0),
            ("max_preemptions", self.max_preemptions, 0),
            ("progress_tokens", self.progress_tokens, 1),
            ("min_slice_tokens", self.min_slice_tokens, 1),
            ("max_rows", self.max_rows, 1),
            ("max_waiting", self.max_waiting, 1),
        ):
            if value is not None and not value >= least:
                raise ValueError(f"{name} is {value}; it must be at least {least}.")

    @staticmethod
    def spare_blocks(num_admitted: int, block_tokens: int) -> int:
        """To be left free when one more is admitted beside so many; none for one that is alone."""
        return -(-SPARE_TOKENS // block_tokens) * (num_admitted + 1) if num_admitted else 0

    def levels_gained(self, waited_s: float) -> int:
        """By having waited so long."""
        return int(waited_s / self.age_s)

    def headroom_tokens(self, num_preempted: int) -> int:
        """For how many tokens to come a preempted request has pages, and is protected, when it is back."""
        if num_preempted < self.max_preemptions:
            return 1
        return self.progress_tokens << min(num_preempted - self.max_preemptions, 20)
