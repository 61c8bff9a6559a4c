"""Whether the rest of the machine leaves a measurement alone: how much of the processors others take."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path

MAX_OTHERS = 0.2  # cores
SAMPLE_S = 0.3


class Meter:
    """`pids`: our own processes. Waits `patience_s` in all for the others to be done, and then no more."""

    def __init__(self, pids: Sequence[int], patience_s: float) -> None:
        self._pids, self._patience_s = pids, patience_s
        self.start()

    def start(self) -> None:
        self._at, self._busy, self._spent = time.monotonic(), _busy_s(), _spent_s(self._pids)

    @property
    def others(self) -> float:
        """Cores that others took since `start`."""
        wall_s = max(time.monotonic() - self._at, 1e-3)
        return max(0.0, (_busy_s() - self._busy - (_spent_s(self._pids) - self._spent)) / wall_s)

    @property
    def is_quiet(self) -> bool:
        return self.others <= MAX_OTHERS

    def wait(self) -> None:
        """Until it is quiet, or patience ends; then start."""
        if self.is_quiet and time.monotonic() - self._at > SAMPLE_S:
            self.start()
            return
        while self._patience_s > 0:
            self.start()
            time.sleep(SAMPLE_S)
            if self.is_quiet:
                break
            self._patience_s -= SAMPLE_S
        self.start()


def _busy_s() -> float:
    """Processor seconds that this machine has spent on anything."""
    fields = [int(word) for word in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    idle, iowait = fields[3], fields[4]
    return (sum(fields) - idle - iowait) / os.sysconf("SC_CLK_TCK")


def _spent_s(pids: Sequence[int]) -> float:
    """Processor seconds that these processes have spent."""
    ticks = 0
    for pid in pids:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")
