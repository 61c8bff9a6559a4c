"""What changed in the chunk store, for an index of who holds what. Pure; no locks."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Literal

StoreTier = Literal["ram", "disk"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Changes:
    """added: held now, and where it is read from. removed: not held any more. full: `added` is all there is, whatever
    was known before is void. epoch: what to ask from next time."""

    epoch: int
    added: list[tuple[bytes, StoreTier]]
    removed: list[bytes]
    full: bool


class ChangeLog:
    """The keys of the last `limit` changes. What became of them is looked up when someone asks, so a chunk that came
    and went between two questions costs one entry of the answer."""

    def __init__(self, first_epoch: int, limit: int) -> None:
        self.epoch = self._oldest = first_epoch
        self._keys: deque[bytes] = deque()
        self._limit = limit

    def note(self, key: bytes) -> None:
        self.epoch += 1
        self._keys.append(key)
        if len(self._keys) > self._limit:
            self._keys.popleft()
            self._oldest += 1

    def since(self, epoch: int) -> list[bytes] | None:
        """Keys that changed after `epoch`, each once; None if the log does not reach back, or never was there."""
        if not self._oldest <= epoch <= self.epoch:
            return None
        num_new = self.epoch - epoch
        return list(dict.fromkeys([self._keys[-1 - back] for back in range(num_new)]))
