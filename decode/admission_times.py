"""How long requests wait for each other while there are not enough pages. Pure."""

from __future__ import annotations

import math


class AdmissionTimes:
    """Between two admissions while requests wait, seconds: a mean in which older ones fade."""

    def __init__(self) -> None:
        self._mean_s = 0.0
        self._last_at = -math.inf

    def admitted(self, waited_s: float, now: float) -> None:
        """One that had waited so long; 0: it was not kept waiting."""
        if waited_s > 0:
            seen_s = min(waited_s, now - self._last_at)
            self._mean_s += (0.2 if self._mean_s else 1.0) * (seen_s - self._mean_s)
        self._last_at = now

    def seconds(self, longest_wait_s: float, now: float) -> float:
        """The present one counts as soon as it is longer. longest_wait_s: of those that wait now. 0: none was seen."""
        return max(self._mean_s, min(longest_wait_s, now - self._last_at))
