"""Which layers of which chunks a fill needs where layers have sliding windows. Pure.

A query sees a chunk in the layers whose windows reach back to it. Loaded is only what those queries see that are still
to be computed: the tail's, and those of chunks that have to be computed because no source gives them. That is a guess
about what will be computed. What it must never break is checked where it counts: before a chunk is computed, all that
lies before it and lacks a layer that its first query sees (`lacking`) is given up and had anew.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Iterable, Mapping

from prefill.window_layers import Windows

Layers = tuple[int, ...] | None  # of a chunk; None: all


class WindowChunks:
    """Chunks of one prompt, whose tail starts where the last one ends. windows [L]; empty: every layer sees all."""

    def __init__(self, windows: Windows, *, chunk_tokens: int, num_chunks: int) -> None:
        self._num_layers = len(windows)
        self._chunk_tokens, self._num_chunks = chunk_tokens, num_chunks
        self._sizes = sorted({window for window in windows if window is not None})
        # Of the i-th window on, and of those that see all.
        self._beyond = [
            tuple(at for at, window in enumerate(windows) if window is None or window >= size) for size in self._sizes
        ]
        self._beyond.append(tuple(at for at, window in enumerate(windows) if window is None))
        # What a chunk's first query sees of the chunk before it, of the one before that, and so on. Beyond, layers that
        # see all are left, and these are never left out.
        reach = -(-self._sizes[-1] // chunk_tokens) if self._sizes else 0
        every = range(self._num_layers)
        self._seen_back = [
            frozenset(every if seen is None else seen)
            for seen in (self.seen(0, back * chunk_tokens) for back in range(1, reach + 1))
        ]

    @property
    def has_windows(self) -> bool:
        return bool(self._sizes)

    def seen(self, chunk: int, first_query: int) -> Layers:
        """The layers in which a query at `first_query` or later sees any token of the chunk."""
        # The last token of the chunk is seen if it is not before first_query - window + 1.
        distance = first_query - (chunk + 1) * self._chunk_tokens + 1
        layers = self._beyond[bisect.bisect_right(self._sizes, distance)]
        return None if len(layers) == self._num_layers else layers

    def share(self, layers: Layers) -> float:
        """Of the whole chunk, if all layers were of one size."""
        return 1.0 if layers is None else len(layers) / self._num_layers

    def to_load(self, is_computed: Callable[[int, bool], bool]) -> list[Layers]:
        """By chunk, what of it to load if nothing but the tail and the chunks of which `is_computed` says so are
        computed from now on. That is asked from the back, with whether anybody sees the chunk at all."""
        if not self.has_windows:
            return [None] * self._num_chunks
        found: list[Layers] = [None] * self._num_chunks
        first_query = self._num_chunks * self._chunk_tokens
        for chunk in reversed(range(self._num_chunks)):
            found[chunk] = self.seen(chunk, first_query)
            if is_computed(chunk, found[chunk] != ()):
                first_query = chunk * self._chunk_tokens
        return found

    def lacking(self, chunk: int, parts: Mapping[int, tuple[int, ...]]) -> list[int]:
        """The chunks before this one that may not be computed on: they lack a layer that its first query sees. parts:
        the layers that are there of chunks of which some are not."""
        found = []
        if parts:
            for before, seen in zip(range(chunk - 1, -1, -1), self._seen_back, strict=False):
                part = parts.get(before)
                if part is not None and (len(part) < len(seen) or not seen.issubset(part)):
                    found.append(before)
        return found[::-1]

    def again(self, chunks: Iterable[int], parts: Mapping[int, tuple[int, ...]]) -> set[int]:
        """All chunks in place that have to be computed again if these are computed."""
        again: set[int] = set()
        waiting = list(chunks)
        while waiting:
            new = set(self.lacking(waiting.pop(), parts)) - again
            again |= new
            waiting += new
        return again
