"""The SLO policy as the level choice sees it. Plain data: the YAML that users write is mapped onto it in cluster/."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class SLOPolicy:
    """Targets and bounds for the KV of a request.

    ttft_s: target for the first token, seconds from admission; 0 means as fast as possible.
    itl_s: target for the gap between tokens; bounds how much prompt is computed between two decode steps.
    levels: codec levels the controller may use, best first ("raw" may be among them).
    floor: the coarsest level allowed, one of `levels`.
    allow_recompute: whether chunks may be computed from text on the decode worker while others load.
    """

    ttft_s: float = 0.5
    itl_s: float = 0.1
    levels: tuple[str, ...] = ("raw", "lossless", "q1", "q2", "q3")
    floor: str = "q2"
    allow_recompute: bool = True

    def allowed_levels(self) -> tuple[str, ...]:
        """Levels from the best down to the floor."""
        return self.levels[: self.levels.index(self.floor) + 1]
