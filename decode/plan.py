"""The SLO controller's choice: which level the chunks still missing should have, and how many of them to compute.

A pure function of (policy, what is known, now). Stored chunks load from the back of the missing range while the decode
worker computes from its front (a chunk's KV needs all KV before it), so a plan is a level and a meeting point: compute
the first `m` missing chunks, load the others. All-load and all-text are m = 0 and m = everything.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

# A plan that computes has to promise this much over one that only loads: computing disturbs other requests, and takes
# longer than predicted where loading keeps the same cores busy.
COMPUTE_MUST_GAIN = 0.15
# Two predictions closer than this are the same; the better quality wins.
SAME_TIME = 0.02
# A better level than the current one has to fit this share of the budget, or the plan would follow every twitch of the
# link's estimate.
UPGRADE_ROOM = 0.93
# A chunk on its way is given up when what is left of it is so many times what asking for it anew would bring.
REASK = 1.25


@dataclass(frozen=True, slots=True, kw_only=True)
class Outlook:
    """All that the choice depends on besides the policy. Times in seconds, rates in bytes a second.

    num_missing: chunks neither filled, being decoded, computed nor on their way; they form a range after the frontier.
    in_flight_bytes: what is still to come of each chunk that is on its way.
    committed_bytes: what the link brings of a chunk in any case, even if it is given up.
    chunk_bytes: predicted size of one chunk, by level.
    bytes_per_s, latency_s: the link as observed; 0 bytes a second when there is no source.
    decode_s: seconds to decode one chunk, by level.
    compute_s: compute_s(m) is the predicted time to compute the first m chunks of the missing range; None when the
        policy or the request forbids it.
    busy_s: time until the chunk being computed now is done.
    source_s: time until the source itself has computed the last missing chunk (live prefill), else 0.
    spent_s: time gone since admission; gains are judged against the whole, so that the last chunk is not made coarse
        to save a few milliseconds of a second.
    live: the source is still computing, so its chunks come from the front and only all-load or all-text make sense.
    """

    num_missing: int
    in_flight_bytes: Sequence[float]
    chunk_bytes: Mapping[str, float]
    bytes_per_s: float
    latency_s: float
    decode_s: Callable[[str], float]
    compute_s: Callable[[int], float] | None
    busy_s: float = 0.0
    source_s: float = 0.0
    spent_s: float = 0.0
    committed_bytes: float = 0.0
    live: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """level: for the chunks to load; compute_chunks: how many of the first missing ones to compute (0: only load);
    predicted_s: until the last chunk stands in its pages; meets_target: whether that is in time."""

    level: str
    compute_chunks: int
    predicted_s: float
    meets_target: bool


def choose(levels: Sequence[str], outlook: Outlook, budget_s: float, *, current: Plan | None = None) -> Plan:
    """The plan for what is missing. `levels`: those allowed, best first; `budget_s`: time left for loading.

    1. The best level whose loading alone fits the budget; one better than the current plan's with some room.
    2. Otherwise the best level that fits with some chunks computed, as few as possible.
    3. Otherwise (and always for a budget of 0) the fastest plan; of equally fast ones the one of best quality.
    """
    assert levels, "a policy without levels is refused when it is read"
    can_load = outlook.bytes_per_s > 0
    if can_load and budget_s > 0:
        room = UPGRADE_ROOM if current is not None and current.meets_target else 1.0
        for level in levels:
            if current is not None and level == current.level:
                room = 1.0  # from here on no upgrade
            time_s = _finish_s(outlook, level, 0)
            if time_s <= budget_s * room:
                return Plan(level=level, compute_chunks=0, predicted_s=time_s, meets_target=True)
    if _first_computed_s(outlook) <= budget_s:
        for level in levels if can_load else levels[:1]:
            count = _meeting_point(outlook, level)
            if _finish_s(outlook, level, count) <= budget_s:
                count = _fewest_that_fit(outlook, level, count, budget_s)
                time_s = _finish_s(outlook, level, count)
                return Plan(level=level, compute_chunks=count, predicted_s=time_s, meets_target=True)
    return _fastest(levels, outlook, can_load)


def _fastest(levels: Sequence[str], outlook: Outlook, can_load: bool) -> Plan:
    best: Plan | None = None
    first_s = _first_computed_s(outlook)
    for level in levels:  # best quality first, so a later level has to be clearly faster
        load_s = _finish_s(outlook, level, 0)
        counts = [0] if can_load else []
        if first_s < load_s:  # else all is here before anything could be computed
            counts.append(_meeting_point(outlook, level))
        for count in counts:
            time_s = load_s if count == 0 else _finish_s(outlook, level, count)
            gain = COMPUTE_MUST_GAIN if best is not None and count > best.compute_chunks else SAME_TIME
            if best is None or best.predicted_s - time_s > gain * (outlook.spent_s + best.predicted_s):
                best = Plan(level=level, compute_chunks=count, predicted_s=time_s, meets_target=False)
    assert best is not None, "neither a source nor the right to compute: the caller fails the request instead"
    return best


def _first_computed_s(outlook: Outlook) -> float:
    """When the first missing chunk could be computed: most plans that compute are ruled out by this alone."""
    return float("inf") if outlook.compute_s is None else outlook.busy_s + outlook.compute_s(1)


def _finish_s(outlook: Outlook, level: str, count: int) -> float:
    """When the last chunk is in place if the first `count` are computed and the others come at `level`."""
    num_chunks = outlook.num_missing + len(outlook.in_flight_bytes)
    compute_s = outlook.busy_s
    if count > 0:
        assert outlook.compute_s is not None
        compute_s += outlook.compute_s(count)
    if count >= num_chunks:
        return compute_s
    if outlook.bytes_per_s <= 0:
        return float("inf")
    num_asked = max(outlook.num_missing - count, 0)
    size = outlook.chunk_bytes[level]
    # A chunk on its way that is far larger than it would be at this level is asked for anew (see REASK).
    most = REASK * (outlook.committed_bytes + size)
    left = [min(left_bytes, most) for left_bytes in outlook.in_flight_bytes[: num_chunks - count]]
    wire_bytes = num_asked * size + sum(left)
    wire_s = outlook.latency_s + wire_bytes / outlook.bytes_per_s
    # Decoding is a stage of its own beside the wire: the slower stage sets the pace, the last chunk passes both.
    decode_one_s = outlook.decode_s(level)
    load_s = max(wire_s, outlook.source_s, num_asked * decode_one_s) + decode_one_s
    return max(compute_s, load_s)


def _meeting_point(outlook: Outlook, level: str) -> int:
    """The count that finishes first. Computing more takes longer, loading fewer takes less: bisect the crossing."""
    num_chunks = outlook.num_missing + len(outlook.in_flight_bytes)
    if outlook.live or outlook.bytes_per_s <= 0:
        return num_chunks
    assert outlook.compute_s is not None
    low, high = 0, num_chunks  # the smallest count whose computing takes at least as long as loading the rest
    while low < high:
        middle = (low + high) // 2
        if outlook.busy_s + outlook.compute_s(middle) >= _finish_s(outlook, level, middle):
            high = middle
        else:
            low = middle + 1
    return min(max(low - 1, 0), low, key=lambda count: _finish_s(outlook, level, count))


def _fewest_that_fit(outlook: Outlook, level: str, enough: int, budget_s: float) -> int:
    """The smallest count up to `enough` that still fits: computing costs other requests, so no more than needed."""
    if outlook.live or outlook.bytes_per_s <= 0:
        return enough
    low, high = 0, enough
    while low < high:
        middle = (low + high) // 2
        if _finish_s(outlook, level, middle) <= budget_s:
            high = middle
        else:
            low = middle + 1
    return low
