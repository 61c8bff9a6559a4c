"""Which admitted sequences give up their pages when another request needs some. Pure: looks, and changes nothing."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass

from decode.fair_share import FairShare
from decode.scheduling_policy import SchedulingPolicy
from decode.sequence import Sequence


@dataclass(frozen=True, slots=True, kw_only=True)
class Lack:
    """What keeps a request waiting that has no room. blocks(n): that it lacks while n others stay admitted. shared:
    blocks of others that it will go on with itself: who gives these up frees nothing for it."""

    blocks: Callable[[int], int]
    shared: frozenset[int] = frozenset()


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

    # -- for a request that waits ---------------------------------------------------------------------------------

    def may_give_way_to(self, priority: int, sequence: Sequence, top: int) -> bool:
        """To one that waits with that priority. What the waiting one has gained by waiting does not count: among equals
        who came later would take turns with who came first, and each turn costs."""
        has_given_way_enough = sequence.num_preempted >= self._policy.max_preemptions
        return bool(sequence.block_table) and self.level(sequence, top) > priority and not has_given_way_enough

    def for_waiting(self, priority: int, lack: Lack, *, top: int) -> list[Sequence] | None:
        """Who gives way, all of them, in the order of `likelihood`. None: even all who may would not be enough. Pinned
        ones are only among them where it does not go without."""
        may_go = [s for s in self._sequences.values() if self.may_give_way_to(priority, s, top)]
        most = sum(len(sequence.block_table) for sequence in may_go)  # shared ones counted more than once
        if most < lack.blocks(len(self._sequences) - len(may_go)):
            return None  # before blocks are counted one by one: it is asked before every step
        may_go.sort(key=self.likelihood(top), reverse=True)
        loose = [sequence for sequence in may_go if sequence.pins == 0]
        found = self._enough(loose, lack)
        return self._enough(may_go, lack) if found is None else found

    def _enough(self, may_go: list[Sequence], lack: Lack) -> list[Sequence] | None:
        holders = Counter(block for sequence in self._sequences.values() for block in sequence.block_table)
        num_freed = 0
        for number, sequence in enumerate(may_go, 1):
            for block in sequence.block_table:
                holders[block] -= 1
                num_freed += not holders[block] and block not in lack.shared
            if num_freed >= lack.blocks(len(self._sequences) - number):
                return may_go[:number]
        return None

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
