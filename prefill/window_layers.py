"""Which layers' KV of some tokens is still read where layers have sliding windows. Pure: plain numbers, no torch.

`windows` [L]: a query at `p` sees keys `p - window + 1 .. p` of that layer; None is all of them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

Windows = Sequence[int | None]


def first_key(window: int | None, query: int) -> int:
    """The first key that a query at position `query`, and so any later one, sees."""
    return 0 if window is None else max(0, query - window + 1)


def layers_seen(windows: Windows, start: int, stop: int, *, first_query: int) -> tuple[int, ...]:
    """The layers whose KV of tokens `start .. stop` a query at `first_query` or later still sees.

    Whoever continues a sequence computes its queries from `first_query` on: the last prompt token for a prompt whose KV
    is all there (it runs in any case, for its logits), the first missing token otherwise.
    """
    assert 0 <= start < stop <= first_query + 1, (start, stop, first_query)
    return tuple(i for i, window in enumerate(windows) if stop > first_key(window, first_query))


def whole_from(windows: Windows, stop: int, layers: Collection[int]) -> int:
    """The first query that sees tokens before `stop` in none but these layers."""
    missing = [window for layer, window in enumerate(windows) if layer not in layers]
    assert None not in missing, "a layer that sees everything is missing"
    return max((stop + window - 1 for window in missing if window is not None), default=0)


def layer_runs(layers: Iterable[int]) -> list[tuple[int, int]]:
    """Ascending layers as ranges (start, stop) of neighbours, which is how blobs are cut and decoded in part."""
    runs: list[tuple[int, int]] = []
    for layer in layers:
        if runs and runs[-1][1] == layer:
            runs[-1] = (runs[-1][0], layer + 1)
        else:
            runs.append((layer, layer + 1))
    return runs
