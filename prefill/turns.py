"""Whose forward pass is next, where several engines share one worker's threads."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager


class Turns:
    """One at a time, in the order of asking: two engines that always have something to do alternate, pass by pass. A
    plain lock would let the one that gives it back take it again before the other has woken up."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._next_ticket = self._serving = 0

    @contextmanager
    def turn(self) -> Iterator[float]:
        """Seconds that it waited."""
        begin = time.perf_counter()
        with self._changed:
            ticket = self._next_ticket
            self._next_ticket += 1
            is_free = ticket == self._serving
            self._changed.wait_for(lambda: ticket == self._serving)
        try:
            yield 0.0 if is_free else time.perf_counter() - begin
        finally:
            with self._changed:
                self._serving += 1
                self._changed.notify_all()
