"""Who has which ring of recent tokens, and how far each sequence is quantized. Pure bookkeeping: no tensors, no I/O.

Of a sequence with a ring:

    first .. length    tokens it has seen through this ring; the last 64 of them are in it
    settled            the tokens before this are in quantized pages; a multiple of 32

`length - settled` is never more than 64, so nothing leaves a ring before it is quantized.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, replace

from prefill.quantized_layout import BLOCK_TOKENS, RING_TOKENS, boundary, settled_tokens


class RingsExhausted(Exception):
    """More sequences were admitted than there are rings. The caller waits, preempts or refuses."""

    def __init__(self, num_rings: int) -> None:
        super().__init__(
            f"all {num_rings} rings of recent tokens are in use: wait for a request to end, or raise max_sequences"
        )
        self.num_rings = num_rings


@dataclass(slots=True, kw_only=True)
class RingState:
    first: int = 0
    length: int = 0
    settled: int = 0

    @property
    def is_fresh(self) -> bool:
        return self.length == self.first == 0


class RecentRings:
    def __init__(self, num_rings: int) -> None:
        assert num_rings > 0, num_rings
        self.num_rings = num_rings
        self._free = deque(range(num_rings))
        self._states: dict[int, RingState] = {}

    @property
    def num_free(self) -> int:
        return len(self._free)

    def in_use(self) -> set[int]:
        return set(self._states)

    def allocate(self) -> int:
        """A ring that holds nothing. Raises `RingsExhausted`."""
        if not self._free:
            raise RingsExhausted(self.num_rings)
        ring = self._free.popleft()
        self._states[ring] = RingState()
        return ring

    def release(self, ring: int) -> None:
        self._state(ring)
        del self._states[ring]
        self._free.append(ring)

    def is_fresh(self, ring: int) -> bool:
        """Whether it has seen nothing yet."""
        return self._state(ring).is_fresh

    def length(self, ring: int) -> int:
        return self._state(ring).length

    def settled(self, ring: int) -> int:
        return self._state(ring).settled

    def extend(self, ring: int, start: int, stop: int) -> tuple[int, int]:
        """Tokens `start .. stop` are added, behind those before or as the first of a fresh ring (whose earlier tokens
        are in pages then; `start` is a multiple of 32). Returns which tokens are to be quantized now, first and past
        the last, multiples of 32; they are in the ring or among the new ones."""
        state = self._state(ring)
        assert 0 <= start < stop, (start, stop)
        if state.is_fresh and start:
            assert start % BLOCK_TOKENS == 0, f"a ring starts at {start}, in the middle of a block"
            state.first = state.length = state.settled = start
        assert start == state.length, f"tokens {start}..{stop} behind {state.length} tokens"
        state.length = stop
        assert state.first <= boundary(stop), f"a ring from {state.first} on lacks recent tokens at {stop}"
        settled = state.settled
        state.settled = max(settled, settled_tokens(stop))
        return settled, state.settled

    def settle(self, ring: int) -> tuple[int, int]:
        """All whole blocks are to be quantized now, so that others can share them. Returns which, as `extend`."""
        state = self._state(ring)
        settled = state.settled
        state.settled = max(settled, state.length // BLOCK_TOKENS * BLOCK_TOKENS)
        return settled, state.settled

    def reset(self, ring: int) -> None:
        """It has seen nothing; its sequence keeps it."""
        self._state(ring)
        self._states[ring] = RingState()

    def resume(self, ring: int, length: int) -> int:
        """A fresh ring continues a sequence of `length` tokens whose whole blocks are in pages. Returns the first token
        that the ring has to be filled with."""
        state = self._state(ring)
        assert state.is_fresh and length > 0, (state, length)
        state.first, state.length = boundary(length), length
        state.settled = length // BLOCK_TOKENS * BLOCK_TOKENS
        return state.first

    def state(self, ring: int) -> RingState:
        """A copy, for `restore`."""
        return replace(self._state(ring))

    def restore(self, ring: int, state: RingState) -> None:
        """A fresh ring becomes another's twin, or what it was itself when it gave up its place."""
        assert self._state(ring).is_fresh, self._state(ring)
        self._states[ring] = replace(state)

    def check_integrity(self) -> None:
        """Every ring is free or in use, once, and holds what is not quantized yet."""
        assert len(set(self._free)) == len(self._free), "a ring is free twice"
        assert not self._states.keys() & set(self._free), "a ring in use is free"
        assert len(self._states) + len(self._free) == self.num_rings, "a ring is lost"
        for ring, state in self._states.items():
            assert state.settled % BLOCK_TOKENS == 0, f"ring {ring} is settled in the middle of a block"
            assert settled_tokens(state.length) <= state.settled <= state.length, f"ring {ring}: {state}"
            assert state.length - state.settled <= RING_TOKENS, f"ring {ring} lost tokens: {state}"

    def _state(self, ring: int) -> RingState:
        assert ring in self._states, f"ring {ring} is not in use"
        return self._states[ring]
