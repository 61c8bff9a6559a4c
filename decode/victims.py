"""Which admitted sequence gives up its pages when another one needs some. Pure: looks, and changes nothing."""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Mapping

from decode.fair_share import FairShare
from decode.scheduling_policy import SchedulingPolicy
from decode.sequence import Sequence


class Victims:
    """Looks at the admitted sequences that the scheduler holds. `top`: the best priority of all that wait or run."""

    def __init__(
        self,
        sequences: Mapping[str, Sequence],
        policy: SchedulingPolicy,
        fair: FairShare,
        *,
        num_blocks: int,
        blocks_for: Callable[[int], int],
    ) -> None:
        """blocks_for: how many blocks so many tokens of a sequence need."""
        self._sequences, self._policy, self._fair = sequences, policy, fair
        self._num_blocks, self.blocks_for = num_blocks, blocks_for

    def level(self, sequence: Sequence, top: int) -> int:
        """The effective priority of an admitted one: what it had waited when it was admitted stays counted."""
        return max(top, sequence.priority - self._policy.levels_gained(sequence.waited_s))

    def likelihood(self, top: int) -> Callable[[Sequence], tuple[int, float, int]]:
        """A key: the larger, the sooner it gives way. Blocks that two sequences share count for both here."""
        held: dict[str, float] = {}
        for sequence in self._sequences.values():
            held[sequence.tenant] = held.get(sequence.tenant, 0.0) + len(sequence.block_table)
        over = {tenant: blocks / self._fair.share(tenant).weight for tenant, blocks in held.items()}
        return lambda sequence: (self.level(sequence, top), over[sequence.tenant], sequence.arrival)

    def choose(self, needs: Sequence, num_blocks: int, *, top: int, protect: Container[str]) -> Sequence | None:
        """See Scheduler.choose_victim."""
        likely, ours, is_ours_protected = self.likelihood(top), self.level(needs, top), _is_protected(needs)
        holders = [sequence for sequence in self._sequences.values() if sequence.block_table]
        if not self.may_grow(needs, num_blocks):
            holders = [sequence for sequence in holders if sequence.tenant == needs.tenant]
        others = [
            other
            for other in holders
            if (other is not needs and other.key not in protect)
            and (is_ours_protected or likely(other) > likely(needs))
            and (self.level(other, top) > ours or (self.level(other, top) == ours and not _is_protected(other)))
        ]
        victim = max((other for other in others if other.pins == 0), key=likely, default=None)
        if victim is not None or others:
            return victim  # who is only pinned for now is worth waiting for
        # If nobody else has pages, the rest is with requests that ended and are still pinned.
        may_go = needs in holders and len(holders) > 1 and needs.pins == 0 and needs.key not in protect
        return needs if may_go else None

    # -- blocks ---------------------------------------------------------------------------------------------------

    def share_blocks(self, tenant: str) -> int | None:
        """How many the tenant may hold; None is no limit."""
        share = self._fair.share(tenant).max_blocks_share
        return None if share is None else math.floor(share * self._num_blocks + 1e-9)

    def blocks_held(self, tenant: str) -> int:
        """Different ones: a prefix that two of its sequences share counts once."""
        return len({block for sequence in self.of_tenant(tenant) for block in sequence.block_table})

    def may_grow(self, sequence: Sequence, num_blocks: int) -> bool:
        share = self.share_blocks(sequence.tenant)
        if share is None:
            return True
        holders = [other for other in self.of_tenant(sequence.tenant) if other.block_table and other is not sequence]
        return not holders or self.blocks_held(sequence.tenant) + num_blocks <= share

    def of_tenant(self, tenant: str) -> list[Sequence]:
        return [sequence for sequence in self._sequences.values() if sequence.tenant == tenant]


def _is_protected(sequence: Sequence) -> bool:
    """It was preempted often and has not got on far enough since."""
    return len(sequence.output) < sequence.protected_until
