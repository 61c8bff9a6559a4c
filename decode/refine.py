"""Which chunk to refine next, and to which level, with the bytes that are left to spend. Pure.

Quality is bought where it is cheapest: all chunks rise to a level before any rises above it, because each further
level costs more bytes for less (codec/calibrate.py). What cannot be afforded for all is bought for some.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

REFINEMENT_OVERHEAD = 1.02  # a refinement has a header and a directory of its own


@dataclass(frozen=True, slots=True, kw_only=True)
class Ladder:
    """Levels, best first, with the bytes of one chunk at each. nested: those of which a finer one continues a coarser
    one, so that only the difference travels; any other step sends the whole chunk."""

    levels: Sequence[str]
    chunk_bytes: Mapping[str, float]
    nested: frozenset[str]

    @classmethod
    def of(
        cls, levels: Sequence[str], chunk_bytes: Mapping[str, float], *, nested: frozenset[str], exact: frozenset[str]
    ) -> Ladder:
        """Of these levels, best first. Of those that lose nothing only the smallest is kept."""
        lossless = [level for level in levels if level in exact]
        smallest = min(lossless, key=chunk_bytes.__getitem__, default=None)
        kept = tuple(level for level in levels if level not in exact or level == smallest)
        return cls(levels=kept, chunk_bytes=chunk_bytes, nested=nested)

    def step_bytes(self, have: str, level: str) -> float:
        """What raising one chunk from `have` to `level` takes."""
        whole = self.chunk_bytes[level]
        if have in self.nested and level in self.nested:
            return max(0.0, whole - self.chunk_bytes[have]) * REFINEMENT_OVERHEAD
        return whole

    def is_nested(self, have: str, level: str) -> bool:
        return have in self.nested and level in self.nested


@dataclass(frozen=True, slots=True, kw_only=True)
class RefineBudget:
    """sure_bytes: what the link brings in time nine times of ten; hoped_bytes: what it should; num_steps: how many
    chunks this worker decodes in that time."""

    sure_bytes: float
    hoped_bytes: float
    num_steps: int


UNLIMITED = RefineBudget(sure_bytes=float("inf"), hoped_bytes=float("inf"), num_steps=1 << 30)


def next_step(
    ladder: Ladder,
    counts: Mapping[str, float],
    budget_bytes: float,
    *,
    hoped_bytes: float = 0.0,
    coming: Mapping[str, float] | None = None,
) -> tuple[str, str] | None:
    """(have, level): raise a chunk that is at `have` to `level`; None when nothing affordable is left to gain.

    counts: how many chunks stand at each level of the ladder and can be raised (one of which only some layers are
    loaded counts in part); coming: how many can be soon, which the budget is shared with. hoped_bytes: what may be
    affordable with luck: one small step at a time is risked on it.
    """
    rank = {level: index for index, level in enumerate(ladder.levels)}
    able = [(rank[have], have, count) for have, count in counts.items() if count and rank.get(have, 0) > 0]
    if not able:
        return None
    held = able + [(rank[have], have, n) for have, n in (coming or {}).items() if n and rank.get(have, 0) > 0]
    worst_rank, worst, _ = max(able)
    for target_rank, target in enumerate(ladder.levels[:worst_rank]):
        need = sum(count * ladder.step_bytes(have, target) for at, have, count in held if at > target_rank)
        if need > budget_bytes:
            continue
        # All can rise to `target`; what is left over may lift this one a step further.
        if target_rank > 0:
            better = ladder.levels[target_rank - 1]
            extra = ladder.step_bytes(worst, better) - ladder.step_bytes(worst, target)
            if need + extra <= budget_bytes:
                return worst, better
        return worst, target
    cheapest = ladder.levels[worst_rank - 1]
    return (worst, cheapest) if ladder.step_bytes(worst, cheapest) <= max(budget_bytes, hoped_bytes) else None
