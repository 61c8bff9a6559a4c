"""Which workers serve a request. Pure: the table, the index's answer and the load in, a route out.

Gateways do this by themselves on the controller's last table (membership.py). What a route costs is estimated in
route_costs.py; who holds what of a prompt is in prefix_index.py.
"""

from __future__ import annotations

import hashlib
import heapq
from array import array
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from cluster.membership import WorkerInfo
from cluster.prefix_index import Coverage
from cluster.route_costs import (
    MAY_AGGREGATE,
    NOTHING_PENDING,
    LocalEstimate,
    Pending,
    PrefillEstimate,
    Prompt,
    RouteWeights,
    WorkerCosts,
    companion_price_s,
    disturbance_price_s,
    expected_answer,
    is_better_alone,
    on_decode_worker,
    on_prefill_worker,
    through_prefill_s,
)
from decode.admission import AUTO, TEXT_ONLY
from decode.requests import GenerationRequest
from prefill.chunks import num_loadable_chunks

MAX_SOURCES = 3  # that a decode worker pulls one prompt from
MAX_OWNERS = 2  # of them: prefill workers that may be asked to compute
MAX_SCANNED = 64  # decode workers that are looked at one by one

KVWay = Literal["auto", "load", "compute"]  # what a request demands of its KV: nothing, a source, no source


@dataclass(frozen=True, slots=True, kw_only=True)
class RouteSource:
    """A worker that may have the KV. is_holder: the index says that it has some of it; stored_only: it is asked for
    what it has, and computes nothing."""

    worker: WorkerInfo
    is_holder: bool = False
    stored_only: bool = False

    @property
    def id(self) -> str:
        return self.worker.id

    def to_wire(self) -> dict[str, Any]:
        """As decode/puller.Source reads it."""
        endpoint = self.worker.source_endpoint
        assert endpoint is not None, self.worker.id
        told = {"id": self.worker.id, "endpoint": endpoint, "public_key": self.worker.public_key}
        return {**told, "is_holder": self.is_holder, "stored_only": self.stored_only}


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    """Where a request goes. sources: who may have its KV, the one that computes what is stored nowhere first; none may
    compute when the decode worker shall do all that itself (`is_aggregated`). The decode worker's own store is not
    among them: it knows that itself. estimate_s: to the first token.
    decode_tokens, prefill_tokens: of the prompt, that the decode worker and the first source are expected to compute.
    """

    decode: WorkerInfo
    sources: tuple[RouteSource, ...]
    is_aggregated: bool
    estimate_s: float = 0.0
    decode_tokens: int = 0
    prefill_tokens: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class _Computing:
    """The prefill worker that would compute what is stored nowhere."""

    worker: WorkerInfo
    estimate: PrefillEstimate
    is_measured: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class _Choice:
    """One decode worker, and the better way to serve the prompt there. cost_s: with the answer and the price for
    others; rows: that run there."""

    worker: WorkerInfo
    local: LocalEstimate
    is_aggregated: bool
    estimate_s: float
    cost_s: float
    rows: float


def way_of(request: GenerationRequest) -> KVWay:
    """What a request demands of its KV. A level, or a plan that names some, has to come from somewhere."""
    if request.kv_mode not in (AUTO, TEXT_ONLY) or request.plan is not None:
        return "load"
    return "compute" if request.kv_mode == TEXT_ONLY or request.sampling.needs_whole_prompt else "auto"


def choose_route(
    table: Sequence[WorkerInfo],
    token_ids: Sequence[int],
    *,
    chunk_tokens: int,
    cache_salt: str,
    in_flight: Mapping[str, int],
    avoid: frozenset[str] = frozenset(),
    holders: Mapping[str, Coverage] | None = None,
    pending: Mapping[str, Pending] | None = None,
    way: KVWay = "auto",
    prefer: str | None = None,
    weights: RouteWeights | None = None,
    max_tokens: int | None = None,
) -> Route | None:
    """The decode worker with the least estimated time to first token and for the answer, and who may have the prompt's
    KV. None if no decode worker can be reached.

    in_flight: this gateway's requests by worker; pending: those of them since the worker's last report. avoid:
    incarnations that just failed. holders: the index's answer for this prompt's chunks. prefer: the incarnation that
    has the rest of the request's group; it is taken if it can be. max_tokens: of the answer.
    """
    usable = [info for info in table if not info.is_suspect and info.incarnation not in avoid]
    decoders = [info for info in usable if info.role == "decode"]
    if not decoders:
        return None
    num_chunks = num_loadable_chunks(max(1, len(token_ids)), chunk_tokens)
    prompt = Prompt(num_tokens=max(1, len(token_ids)), num_chunks=num_chunks, chunk_tokens=chunk_tokens)
    world = _World(usable, prompt, in_flight, holders or {}, pending or {}, weights or RouteWeights(), max_tokens)
    key = token_ids[:chunk_tokens]
    prefill = owners([info for info in usable if info.role == "prefill"], key, cache_salt)
    computing = world.computing_source(prefill) if num_chunks and way != "compute" else None
    preferred = [info for info in decoders if info.incarnation == prefer]
    choices = [world.choice(info, computing, way) for info in preferred or world.to_scan(decoders)]
    best = _best(choices, key, cache_salt, world.weights)
    return world.route(best, computing, prefill, way)


def _best(choices: Sequence[_Choice], key: Sequence[int], cache_salt: str, weights: RouteWeights) -> _Choice:
    """The cheapest. Among the nearly cheapest the one with the fewest running requests, a decode worker before one that
    shares its cores with a prefill worker, and then the document's own: so an idle cluster's conversations return to
    their worker even when nobody knows what it holds."""
    best = min(choices, key=lambda choice: choice.cost_s)
    enough_s = best.cost_s + best.estimate_s * weights.tie_share
    near = [choice for choice in choices if choice.cost_s <= enough_s]

    def rank(choice: _Choice) -> tuple[float, bool]:
        return choice.rows, choice.worker.companion_of is not None

    first = min(map(rank, near))
    least = {choice.worker.id: choice for choice in near if rank(choice) == first}
    return least[owners([choice.worker for choice in least.values()], key, cache_salt)[0].id]


class _World:
    """The usable workers, what they cost and hold, for one decision."""

    def __init__(
        self,
        usable: Sequence[WorkerInfo],
        prompt: Prompt,
        in_flight: Mapping[str, int],
        holders: Mapping[str, Coverage],
        pending: Mapping[str, Pending],
        weights: RouteWeights,
        max_tokens: int | None,
    ) -> None:
        self.prompt, self.weights = prompt, weights
        self._in_flight, self._pending = in_flight, pending
        self._answer_tokens = expected_answer([info.stats for info in usable], max_tokens)
        self._beside = {info.companion_of: info.id for info in usable if info.companion_of is not None}
        self._beside |= {companion: prefill for prefill, companion in self._beside.items()}
        # An earlier life of a worker held what it held.
        self._held = {
            info.id: held
            for info in usable
            if (held := holders.get(info.id)) is not None and held.incarnation == info.incarnation
        }
        self._by_id = {info.id: info for info in usable}
        self._known_costs: dict[str, WorkerCosts] = {}
        self._stored = 0  # anywhere
        for worker_id in self._held:
            self._stored |= self._stored_at(worker_id) & prompt.all_chunks

    def to_scan(self, decoders: Sequence[WorkerInfo]) -> Sequence[WorkerInfo]:
        """All of them, or those that hold most and those with the fewest requests."""
        if len(decoders) <= MAX_SCANNED:
            return decoders
        pages = {info.id: self._held[info.id].leading for info in decoders if info.id in self._held}
        most = heapq.nlargest(
            MAX_SCANNED // 2, (info for info in decoders if info.id in pages), key=lambda i: pages[i.id]
        )
        idle = heapq.nsmallest(MAX_SCANNED, decoders, key=self._load)
        return list({info.id: info for info in (*most, *idle)}.values())[:MAX_SCANNED]

    def computing_source(self, prefill: Sequence[WorkerInfo]) -> _Computing | None:
        """Of the two with the first claims and those that hold some of the prompt, who is done first; of equals, the
        first by claim. `prefill`: in the order of claims."""
        nowhere = self.prompt.all_chunks & ~self._stored
        best: _Computing | None = None
        for rank, info in enumerate(prefill):
            held = self._held.get(info.id)
            if rank >= MAX_OWNERS and held is None:
                continue
            costs = self._costs(info)
            missing = nowhere or self.prompt.all_chunks
            estimate = on_prefill_worker(
                costs, self.prompt, own=held, stored=self._stored, missing=missing, weights=self.weights
            )
            share = self.weights.tie_share
            if best is None or estimate.cost_s * (1.0 + share) < best.estimate.cost_s:
                best = _Computing(worker=info, estimate=estimate, is_measured=costs.is_measured)
        return best

    def choice(self, info: WorkerInfo, computing: _Computing | None, way: KVWay) -> _Choice:
        costs, prompt = self._costs(info), self.prompt
        own = self._held.get(info.id)
        may_load = way != "compute"
        local = on_decode_worker(costs, prompt, own=own, stored=self._stored, may_load=may_load)
        new_tokens = local.compute_tokens - prompt.tail_tokens
        price_s = disturbance_price_s(costs, new_tokens, local.alone_s, self.weights)
        if computing is None:
            is_aggregated = True
        elif way == "load" or info.stats.get(MAY_AGGREGATE, 1.0) == 0.0:
            is_aggregated = False
        elif not local.missing or info.companion_of == computing.worker.id:
            is_aggregated = True
        else:
            through_s = through_prefill_s(costs, prompt, local, computing.estimate)
            # Without measured speeds nothing is known of who is faster, and the decode worker may still compute all.
            is_judged = computing.is_measured and costs.is_measured
            through_s += computing.estimate.price_s
            is_aggregated = is_judged and is_better_alone(local.alone_s, price_s, through_s)
        if is_aggregated or computing is None:
            estimate_s, cost_s = local.alone_s, local.alone_s + price_s
        else:
            estimate_s = through_prefill_s(costs, prompt, local, computing.estimate)
            cost_s = estimate_s + computing.estimate.price_s
        computed = local.compute_tokens if is_aggregated else prompt.tail_tokens
        cost_s += self.weights.answer * costs.answer_s(self._answer_tokens, computed)
        if info.companion_of is not None:
            cost_s += companion_price_s(costs, self._answer_tokens, self.weights)
        return _Choice(
            worker=info, local=local, is_aggregated=is_aggregated, estimate_s=estimate_s, cost_s=cost_s, rows=costs.rows
        )

    def route(
        self,
        choice: _Choice,
        computing: _Computing | None,
        prefill: Sequence[WorkerInfo],
        way: KVWay,
    ) -> Route:
        first = None if choice.is_aggregated or computing is None else computing
        sources = () if way == "compute" else self._sources(choice, first.worker if first else None, prefill)
        return Route(
            decode=choice.worker,
            sources=sources,
            is_aggregated=choice.is_aggregated,
            estimate_s=choice.estimate_s,
            decode_tokens=choice.local.compute_tokens if choice.is_aggregated else self.prompt.tail_tokens,
            prefill_tokens=first.estimate.compute_tokens if first and choice.local.missing else 0,
        )

    def _sources(
        self, choice: _Choice, computing: WorkerInfo | None, prefill: Sequence[WorkerInfo]
    ) -> tuple[RouteSource, ...]:
        """Who computes; then who holds the most of what nobody before holds; then, if somebody computes, who would own
        the prompt without him: he takes over when the first is lost, and may have what the first has not."""
        # A companion has what its prefill worker has, in the store that they share.
        taken = {choice.worker.id, choice.worker.companion_of}
        owning = [info.id for info in prefill[:MAX_OWNERS] if info.id not in taken] if computing is not None else []
        needed, own = self.prompt.all_chunks, self._held.get(choice.worker.id)
        if own is not None:
            needed &= ~(own.stored | ((1 << own.leading[0]) - 1))
        found: list[str] = []
        if computing is not None:
            found.append(computing.id)
            needed &= ~self._stored_at(computing.id)
        while len(found) < MAX_SOURCES and needed:
            best = self._best_holder(needed, {*taken, *found})
            if best is None:
                break
            found.append(best)
            needed &= ~self._stored_at(best)
        found += [name for name in owning if name not in found][: max(0, min(MAX_SOURCES - len(found), MAX_OWNERS - 1))]
        return tuple(
            RouteSource(
                worker=self._by_id[name],
                is_holder=self._stored_at(name) != 0,
                stored_only=computing is None or name not in (computing.id, *owning),
            )
            for name in found
        )

    def _best_holder(self, needed: int, taken: Collection[str | None]) -> str | None:
        """Who has the most of these chunks. Equals: RAM before disk, the idle before the busy."""

        def worth(name: str) -> tuple[int, int, float]:
            held = self._held[name]
            of_these, in_ram = (held.stored & needed).bit_count(), (held.ram & needed).bit_count()
            return of_these, in_ram, -self._costs(self._by_id[name]).wait_s

        useful = (name for name in self._held if name not in taken and self._stored_at(name) & needed)
        return max(useful, key=worth, default=None)

    def _stored_at(self, name: str) -> int:
        """Bitmap of the chunks that others can have of this worker."""
        held = self._held.get(name)
        return held.stored if held is not None and self._by_id[name].source_endpoint is not None else 0

    def _load(self, info: WorkerInfo) -> tuple[float, float]:
        costs = self._costs(info)
        return costs.wait_s, costs.rows

    def _costs(self, info: WorkerInfo) -> WorkerCosts:
        if info.id not in self._known_costs:
            beside = self._by_id.get(self._beside.get(info.id, ""))
            self._known_costs[info.id] = self._costs_of(info, None if beside is None else self._costs_of(beside, None))
        return self._known_costs[info.id]

    def _costs_of(self, info: WorkerInfo, beside: WorkerCosts | None) -> WorkerCosts:
        return WorkerCosts.of(
            info.stats,
            in_flight=self._in_flight.get(info.id, 0),
            pending=self._pending.get(info.id, NOTHING_PENDING),
            chunk_tokens=self.prompt.chunk_tokens,
            beside=beside,
        )


def owners(sources: Sequence[WorkerInfo], first_chunk: Sequence[int], cache_salt: str) -> tuple[WorkerInfo, ...]:
    """All of them, in the order of their claim. Rendezvous hashing (Thaler and Ravishankar, 1998): the same document
    goes to the same source, without an index, and only the documents of a source that leaves move."""
    key = array("I", first_chunk).tobytes() + b"\0" + cache_salt.encode()

    def claim(info: WorkerInfo) -> bytes:
        return hashlib.blake2b(info.id.encode() + b"\0" + key, digest_size=8).digest()

    return tuple(sorted(sources, key=claim, reverse=True))
