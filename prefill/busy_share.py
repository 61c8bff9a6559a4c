"""How busy somebody was lately. Pure."""

from __future__ import annotations

import math

MEMORY_S = 3.0


class BusyShare:
    """The share of the time spent working, older times counting less: half after two seconds."""

    def __init__(self) -> None:
        self._share = 0.0
        self._at = -math.inf

    def worked(self, seconds: float, now: float) -> None:
        """So long, until now."""
        self._share = self.share(now) + (1.0 - math.exp(-seconds / MEMORY_S))
        self._at = now

    def share(self, now: float) -> float:
        """0 to 1."""
        return min(1.0, self._share * math.exp((self._at - now) / MEMORY_S))
