"""What a decode step takes, by the number of its rows. Pure."""

from __future__ import annotations

import math

KEPT_S = 1.0  # without a step
FADE_S = 5.0  # after that


class StepTimes:
    """base_s, row_s: a step takes base_s + rows * row_s, as measured once; what steps then take corrects both. Without
    steps that fades, and the worker is taken to be as fast as it ever was: one that was slow for a while, and is
    therefore given nothing to do, would otherwise never be seen to be fast again."""

    def __init__(self, base_s: float, row_s: float) -> None:
        assert base_s >= 0 and row_s >= 0, (base_s, row_s)
        self._base_s, self._row_s = base_s, row_s
        self._factor = self._least = 1.0
        self._at = -math.inf

    def base_s(self, now: float) -> float:
        return self._base_s * self._factor_at(now)

    def row_s(self, now: float) -> float:
        return self._row_s * self._factor_at(now)

    def observe(self, num_rows: int, seconds: float, now: float) -> None:
        """A step of these rows and nothing else."""
        expected_s = self._base_s + num_rows * self._row_s
        if expected_s > 0:
            factor = self._factor_at(now)
            self._factor, self._at = factor + 0.1 * (seconds / expected_s - factor), now
            self._least = min(self._least, self._factor)

    def _factor_at(self, now: float) -> float:
        faded_s = max(0.0, now - self._at - KEPT_S)
        return self._least + (self._factor - self._least) * math.exp(-faded_s / FADE_S)
