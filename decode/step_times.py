"""What a decode step takes, by the number of its rows. Pure."""

from __future__ import annotations


class StepTimes:
    """base_s, row_s: a step takes base_s + rows * row_s, as measured once; what steps then take corrects both."""

    def __init__(self, base_s: float, row_s: float) -> None:
        assert base_s >= 0 and row_s >= 0, (base_s, row_s)
        self._base_s, self._row_s, self._factor = base_s, row_s, 1.0

    @property
    def base_s(self) -> float:
        return self._base_s * self._factor

    @property
    def row_s(self) -> float:
        return self._row_s * self._factor

    def observe(self, num_rows: int, seconds: float) -> None:
        """A step of these rows and nothing else."""
        expected_s = self._base_s + num_rows * self._row_s
        if expected_s > 0:
            self._factor += 0.1 * (seconds / expected_s - self._factor)
