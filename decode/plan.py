"""The SLO controller's choice: which level the chunks still missing should have, and how many of them to compute.

A pure function of (policy, what is known, now). Stored chunks load from the back of the missing range while the decode
worker computes from its front (a chunk's KV needs all KV before it), so a plan is a level and a meeting point: compute
the first `m` missing chunks, load the others. All-load and all-text are m = 0 and m = everything.

Everything here is closed form, a few microseconds a level: a plan is made at every arrival.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

# A plan that computes has to promise this much over one that only loads: computing takes longer than predicted where
# loading keeps the same cores busy. Less once it computes, or it would go to and fro.
COMPUTE_MUST_GAIN, COMPUTING_MUST_GAIN = 0.08, 0.0
# A second of computing is taken to cost each other request of the worker this much of a second.
COMPUTE_PRICE = 0.1
# Two predictions closer than this are the same; the better quality wins.
SAME_TIME = 0.02
# A better level than the current one has to fit this share of the budget, or the plan would follow every twitch of the
# link's estimate.
UPGRADE_ROOM = 0.93
# A level that the link brings in less than this share of the time is asked for at once: it may become that much slower.
DIRECT_SHARE = 0.3
# Where a deadline is planned, decoding is taken to be this much slower than expected.
CAREFUL_DECODE = 1.08
# Single chunks get a better level than the plan's within this share of the budget: should the link drop, the last ones
# pay with the floor for what the first ones gained, and that is more.
BETTER_ROOM = 0.8
# A level that takes so many times longer to load than the coarsest is not looked at for the fastest plan.
FAR_SLOWER = 4.0
# A chunk on its way is given up when what is left of it is so many times what asking for it anew would bring.
REASK = 1.25


@dataclass(frozen=True, slots=True, kw_only=True)
class Outlook:
    """All that the choice depends on besides the policy. Times in seconds, rates in bytes a second.

    num_missing: chunks neither filled, being decoded, computed nor on their way; they form a range after the frontier.
    left: left[i] is how many whole chunks the missing ones from the i-th on amount to, for windows of which only some
        layers are loaded; empty: as many as they are. left[num_missing] is 0.
    in_flight_bytes: what is still to come of each chunk that is on its way, in the order of the prompt.
    committed_bytes: what the link brings of a chunk in any case, even if it is given up.
    ahead_bytes: what transfers with earlier deadlines still want of the same links.
    chunk_bytes: predicted size of one chunk, by level.
    bytes_per_s, latency_s: the links as observed; 0 bytes a second when there is no source.
    low_share: the share of bytes_per_s that plans for a deadline count on.
    encode_s, decode_s: seconds that the source and this worker take for one chunk, by level.
    compute_s, compute_growth_s: the first m chunks of the missing range take m * (compute_s + compute_growth_s * m).
    max_compute: how many chunks may be computed: none if the policy or the request forbids it.
    again_s: what computing any of them takes besides: chunks in place lack layers that these would need.
    queue_s: what is here already and waits to be decoded takes so long; in_flight_decode_s: what is on its way will.
    busy_s: time until the chunk being computed now is done, and until this request's turn comes.
    num_others: other requests that computing would disturb.
    source_s: time until the source itself has computed the last missing chunk (live prefill), else 0.
    spent_s: time gone since admission; gains are judged against the whole, so that the last chunk is not made coarse
        to save a few milliseconds of a second.
    exact: levels that lose nothing; of these the faster is as good. nested: levels that refine one another.
    is_contended: other requests wait for chunks of the same links.
    in_place: how many chunks are in place or on their way, by level: those below a level have to be raised to it before
        that level is worth having for the others.
    live: the source is still computing, so its chunks come from the front and only all-load or all-text make sense.
    """

    num_missing: int
    in_flight_bytes: Sequence[float]
    chunk_bytes: Mapping[str, float]
    bytes_per_s: float
    latency_s: float
    decode_s: Mapping[str, float]
    encode_s: Mapping[str, float]
    compute_s: float
    max_compute: int
    left: Sequence[float] = ()
    again_s: float = 0.0
    compute_growth_s: float = 0.0
    low_share: float = 1.0
    queue_s: float = 0.0
    in_flight_decode_s: float = 0.0
    busy_s: float = 0.0
    num_others: int = 0
    source_s: float = 0.0
    spent_s: float = 0.0
    committed_bytes: float = 0.0
    ahead_bytes: float = 0.0
    exact: frozenset[str] = frozenset()
    nested: frozenset[str] = frozenset()
    is_contended: bool = False
    in_place: Mapping[str, float] = field(default_factory=dict)
    live: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """level: for the chunks to load; first_level: what the next `num_first` ones are asked for at (None: all), see
    choose; compute_chunks: how many of the first missing ones to compute (0: only load); predicted_s: until the last
    chunk stands in its pages; meets_target: whether that is in time; gives_up: whether what is on its way at a better
    level may be given up for that."""

    level: str
    first_level: str
    compute_chunks: int
    predicted_s: float
    meets_target: bool
    gives_up: bool = True
    num_first: int | None = None


def choose(levels: Sequence[str], outlook: Outlook, budget_s: float, *, current: Plan | None = None) -> Plan:
    """The plan for what is missing. `levels`: those allowed, best first; `budget_s`: time left for loading.

    1. The best level whose loading alone fits the budget, at the rate that the link exceeds nine times of ten; one
       better than the current plan's with some room. Where time is short or others wait, the coarsest level comes first
       for all chunks and is refined then: levels nest, so that costs next to no bytes, and a link that drops finds
       nothing missing. Where decoding twice would be too much, the next chunk is one level better if there is room.
    2. Otherwise the coarsest level with as few chunks computed as make it fit: what time is left over goes into
       refinements, and computing disturbs other requests.
    3. Otherwise (and always for a budget of 0) the fastest plan; of equally fast ones the one of best quality.
    """
    assert levels, "a policy without levels is refused when it is read"
    can_load = outlook.bytes_per_s > 0
    if budget_s > 0:
        floor = _Costs(outlook, levels[-1], careful=True)
        if can_load:
            room = UPGRADE_ROOM if current is not None and current.meets_target else 1.0
            for level in levels:
                if current is not None and level == current.level:
                    room = 1.0  # from here on no upgrade
                costs = floor if level == levels[-1] else _Costs(outlook, level, careful=True)
                time_s = costs.finish_s(0)
                if time_s + _raise_s(outlook, levels, level) <= budget_s * room:
                    if level in outlook.exact:
                        exact = [_Costs(outlook, at, careful=True) for at in levels if at in outlook.exact]
                        costs = min(exact, key=lambda costs: costs.finish_s(0))
                        time_s, level = costs.finish_s(0), costs.level
                    first_level, num_first = _first_level(levels, costs, floor, outlook, time_s, budget_s, current)
                    return Plan(
                        level=level,
                        first_level=first_level,
                        num_first=num_first,
                        compute_chunks=0,
                        predicted_s=time_s,
                        meets_target=True,
                        gives_up=costs.clips
                        and _Costs(outlook, level, careful=True, keeps_all=True).finish_s(0) > budget_s,
                    )
        if outlook.max_compute and outlook.busy_s + outlook.again_s + outlook.compute_s <= budget_s:
            count = floor.fewest_in(budget_s)
            time_s = floor.finish_s(count)
            if time_s <= budget_s:
                at = levels[-1]
                return Plan(level=at, first_level=at, compute_chunks=count, predicted_s=time_s, meets_target=True)
    return _fastest(levels, outlook, budget_s, is_computing=current is not None and current.compute_chunks > 0)


def _raise_s(outlook: Outlook, levels: Sequence[str], level: str) -> float:
    """What raising all that stands below `level` to it takes: by the link or by decoding, whichever is slower."""
    if not outlook.in_place or outlook.live:
        return 0.0
    num_bytes, count = 0.0, 0.0
    for below in levels[levels.index(level) + 1 :]:
        n = outlook.in_place.get(below, 0)
        if n:
            saved = outlook.chunk_bytes[below] if below in outlook.nested and level in outlook.nested else 0.0
            num_bytes += n * (outlook.chunk_bytes[level] - saved)
            count += n
    rate = outlook.bytes_per_s * outlook.low_share
    return max(num_bytes / rate, count * outlook.decode_s.get(level, 0.0))


def _first_level(
    levels: Sequence[str],
    at_level: _Costs,
    at_floor: _Costs,
    outlook: Outlook,
    time_s: float,
    budget_s: float,
    current: Plan | None,
) -> tuple[str, int | None]:
    """The level that the next chunks are asked for at, and how many of them (None: all)."""
    level, floor = at_level.level, levels[-1]
    if outlook.live:
        return level, None
    if floor in outlook.nested:
        # Twice as easy once the floor was begun with, or requests would be amended to and fro.
        share = DIRECT_SHARE / 2 if current is not None and current.first_level == floor else DIRECT_SHARE
        is_easy = at_level.wire_s() <= share * budget_s and not outlook.is_contended
        twice_s = time_s + at_floor.decode_all_s()
        if not is_easy and (level == floor or twice_s <= budget_s):
            return floor, None
    better = levels[max(levels.index(level) - 1, 0)]
    if better == level or (better in outlook.exact and level in outlook.exact):
        return level, None
    extra_s = _Costs(outlook, better, careful=True).one_s() - at_level.one_s()
    count = int((BETTER_ROOM * budget_s - time_s) / extra_s) if extra_s > 0 else outlook.num_missing
    return (better, count) if count > 0 else (level, None)


def _fastest(levels: Sequence[str], outlook: Outlook, budget_s: float, *, is_computing: bool) -> Plan:
    best: tuple[float, int, str] | None = None
    best_cost_s = 0.0
    can_load = outlook.bytes_per_s > 0
    must_gain = COMPUTING_MUST_GAIN if is_computing else COMPUTE_MUST_GAIN
    price = COMPUTE_PRICE * outlook.num_others
    floor = _Costs(outlook, levels[-1])
    floor_s = floor.finish_s(0)
    for level in levels:  # best quality first, so a later level has to be clearly faster
        costs = floor if level == levels[-1] else _Costs(outlook, level)
        load_s = costs.finish_s(0)
        if load_s > FAR_SLOWER * (floor_s + outlook.spent_s):
            continue
        ways = [(0, load_s)] if can_load else []
        if outlook.max_compute and outlook.busy_s + outlook.again_s + outlook.compute_s < load_s:
            # else all is here before anything could be computed
            ways.append(costs.meeting_point())
        for count, time_s in ways:
            cost_s = time_s + price * costs.compute_s(count)
            if best is None:
                best, best_cost_s = (time_s, count, level), cost_s
                continue
            gain = must_gain if count > best[1] else SAME_TIME
            is_saved = time_s <= budget_s < best[0]  # in time, as far as can be expected
            if is_saved or best_cost_s - cost_s > gain * (outlook.spent_s + best[0]):
                best, best_cost_s = (time_s, count, level), cost_s
    assert best is not None, "neither a source nor the right to compute: the caller fails the request instead"
    time_s, count, level = best
    return Plan(
        level=level, first_level=level, compute_chunks=count, predicted_s=time_s, meets_target=time_s <= budget_s
    )


class _Costs:
    """What loading at one level and computing would take. Loading n chunks is a stage of encoding, one of the wire and
    one of decoding beside each other: the slowest sets the pace, and the last chunk passes them all."""

    __slots__ = (
        "_begin_s",
        "_bytes",
        "_decode_s",
        "_encode_s",
        "_in_flight",
        "_most",
        "_outlook",
        "_rate",
        "_size",
        "_total",
        "clips",
        "level",
    )

    def __init__(self, outlook: Outlook, level: str, *, careful: bool = False, keeps_all: bool = False) -> None:
        self._outlook, self.level = outlook, level
        self._rate = outlook.bytes_per_s * (outlook.low_share if careful else 1.0)
        self._size = outlook.chunk_bytes[level]
        self._decode_s = outlook.decode_s.get(level, 0.0) * (CAREFUL_DECODE if careful else 1.0)
        self._encode_s = outlook.encode_s.get(level, 0.0)
        self._in_flight = in_flight = outlook.in_flight_bytes
        # A chunk on its way that is far larger than it would be at this level is asked for anew (see REASK).
        self._most = math.inf if keeps_all else REASK * (outlook.committed_bytes + self._size)
        self._bytes, most = outlook.ahead_bytes, self._most
        self.clips = False
        for left in in_flight:
            if left < most:
                self._bytes += left
            else:
                self._bytes += most
                self.clips = True
        self._total = outlook.num_missing + len(in_flight)
        # Decoding goes on with the first arrival, and when what is here is decoded.
        first_bytes = min(in_flight[-1], self._most) if in_flight else self._size
        first_s = outlook.latency_s + first_bytes / self._rate if self._rate > 0 else 0.0
        self._begin_s = max(first_s, outlook.queue_s)

    def one_s(self) -> float:
        """What one chunk more takes."""
        return max(self._size / self._rate, self._encode_s, self._decode_s)

    def num_left(self, count: int) -> float:
        """How many whole chunks those from the `count`-th missing one on amount to."""
        left = self._outlook.left
        return left[count] if left and count >= 0 else self._outlook.num_missing - count

    def wire_s(self) -> float:
        """Until the last byte is here if all is loaded."""
        return self._outlook.latency_s + (self._bytes + self.num_left(0) * self._size) / self._rate

    def _decode_from_s(self) -> float:
        """When what is here and on its way is decoded."""
        return self._begin_s + self._outlook.in_flight_decode_s

    def decode_all_s(self) -> float:
        """What decoding every missing chunk once takes."""
        return self.num_left(0) * self._decode_s

    def compute_s(self, count: float) -> float:
        again_s = self._outlook.again_s if count else 0.0
        return again_s + count * (self._outlook.compute_s + self._outlook.compute_growth_s * count)

    def finish_s(self, count: int) -> float:
        """When the last chunk is in place if the first `count` are computed and the others come at this level."""
        outlook = self._outlook
        compute_s = outlook.busy_s + count * (outlook.compute_s + outlook.compute_growth_s * count)
        if count and outlook.again_s:
            compute_s += outlook.again_s
        if count >= self._total:
            return compute_s
        if self._rate <= 0:
            return math.inf
        num_asked: float = outlook.num_missing - count
        if outlook.left and num_asked > 0:
            num_asked = outlook.left[count]
        wire_bytes = self._bytes
        if num_asked >= 0:
            wire_bytes += num_asked * self._size
        else:  # computing goes on into what is on its way
            wire_bytes -= sum(min(left, self._most) for left in self._in_flight[: count - outlook.num_missing])
        # The slowest stage. This runs a dozen times a plan: comparing is cheaper than max().
        load_s = outlook.latency_s + wire_bytes / self._rate
        encode_s = num_asked * self._encode_s
        if encode_s > load_s:
            load_s = encode_s
        decode_s = self._begin_s + outlook.in_flight_decode_s + (num_asked - 1) * self._decode_s
        if decode_s > load_s:
            load_s = decode_s
        if outlook.source_s > load_s:
            load_s = outlook.source_s
        load_s += self._decode_s
        return compute_s if compute_s > load_s else load_s

    def meeting_point(self) -> tuple[int, float]:
        """The count that finishes first, and when: where computing and loading take the same time."""
        outlook = self._outlook
        most = min(self._total, outlook.max_compute)
        if outlook.live or self._rate <= 0:
            return most, self.finish_s(most)
        if outlook.left or outlook.again_s:
            return self._meeting_point_by_search(most)
        # busy + m (p + q m)  =  load(0) - m * step, for the wire's pace and for the codec's; the later crossing counts.
        wire_s = outlook.latency_s + (self._bytes + outlook.num_missing * self._size) / self._rate
        last_s = self._decode_s - outlook.busy_s
        crossing = self._crossing(wire_s + last_s, self._size / self._rate)
        encode_s, decode_s = (
            outlook.num_missing * self._encode_s,
            self._decode_from_s() + (outlook.num_missing - 1) * self._decode_s,
        )
        for load_s, step_s in ((encode_s, self._encode_s), (decode_s, self._decode_s)):
            if load_s + last_s - crossing * step_s > self.compute_s(crossing):
                crossing = self._crossing(load_s + last_s, step_s)
        first = min(math.floor(crossing), most)
        best, best_s = first, self.finish_s(first)
        if first < outlook.num_missing:
            # One more is past the crossing, where computing takes longer than loading.
            time_s = outlook.busy_s + self.compute_s(first + 1)
            return (first + 1, time_s) if first < most and time_s < best_s else (best, best_s)
        for count in range(outlook.num_missing, most + 1):  # what is on its way has other sizes
            time_s = self.finish_s(count)
            if time_s < best_s:
                best, best_s = count, time_s
        return best, best_s

    def _meeting_point_by_search(self, most: int) -> tuple[int, float]:
        """The same where chunks are of different sizes: computing takes longer with each, loading shorter."""
        first = self._first_count(most, lambda count: self._outlook.busy_s + self.compute_s(count))
        return min(((at, self.finish_s(at)) for at in (max(first - 1, 0), first)), key=lambda found: found[1])

    def _first_count(self, most: int, limit_s: Callable[[int], float]) -> int:
        """The first count that is finished by a limit that rises with it, at least as fast as computing takes."""
        low, high = 0, most
        while low < high:
            count = (low + high) // 2
            if self.finish_s(count) <= limit_s(count):
                high = count
            else:
                low = count + 1
        return low

    def _crossing(self, gap_s: float, step_s: float) -> float:
        """m >= 0 with  m (p + q m) + m step = gap."""
        if gap_s <= 0:
            return 0.0
        slope, growth = self._outlook.compute_s + step_s, self._outlook.compute_growth_s
        if slope <= 0:
            return float(self._total)
        return 2 * gap_s / (slope + math.sqrt(slope * slope + 4 * growth * gap_s))

    def fewest_in(self, budget_s: float) -> int:
        """The smallest count whose loading fits the budget; one that does not fit if none does."""
        outlook = self._outlook
        most = min(self._total, outlook.max_compute)
        if outlook.live or self._rate <= 0:
            return most
        if outlook.left or outlook.again_s:
            # The first that is loaded in time, or before computing is done: later ones compute longer still.
            return self._first_count(most, lambda at: max(budget_s, outlook.busy_s + self.compute_s(at)))
        wire_s = outlook.latency_s + (self._bytes + outlook.num_missing * self._size) / self._rate
        left_s = budget_s - self._decode_s
        by_wire = (wire_s - left_s) * self._rate / self._size
        by_encode = outlook.num_missing - left_s / self._encode_s if self._encode_s > 0 else 0.0
        by_decode = 0.0
        if self._decode_s > 1e-9:
            by_decode = outlook.num_missing - 1 - (left_s - self._decode_from_s()) / self._decode_s
        count = max(0, min(math.ceil(max(by_wire, by_encode, by_decode)), outlook.num_missing, most))
        while count < most and self.finish_s(count) > budget_s >= self.compute_s(count + 1):
            count += 1  # rounding, and what is on its way, which has other sizes
        return count
