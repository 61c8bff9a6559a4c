"""A whole cluster in virtual time: the production controller, protocol and schedulers, over link traces and costs.

    cluster = SimulatedCluster(costs, policy, num_prefill=1, num_decode=1, rate=5e6)
    requests = cluster.run([Arrival(at=0.0, prompt_tokens=7000, output_tokens=100, blocks=(1, 2, 3), ...), ...])

Nothing in it sleeps or reads a clock, so thousands of requests take seconds, and the same seed gives the same run.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from cluster.cost_model import CostModel
from cluster.membership import WorkerInfo
from cluster.routing import choose_route, way_of
from cluster.sim_decode import SimDecodeWorker, SimRequest
from cluster.sim_prefill import SimPrefillWorker
from decode.receipt import Timeline
from decode.requests import GenerationRequest, SamplingParams
from decode.slo import SLOPolicy
from prefill.chunks import num_loadable_chunks
from transport.rate_trace import RateTrace
from transport.simulation import SimulatedNetwork


@dataclass(frozen=True, slots=True, kw_only=True)
class Arrival:
    """A request of a trace. blocks: ids of its prompt's blocks of `block_tokens`; equal ids are equal prefixes, so what
    an earlier request left in a store is found. stored: whether the sources have all of it from the start."""

    at: float
    prompt_tokens: int
    output_tokens: int
    blocks: tuple[int, ...]
    block_tokens: int = 512
    stored: bool = False
    request_id: str = ""
    options: dict[str, Any] = field(default_factory=dict)  # further fields of GenerationRequest

    def keys(self, chunk_tokens: int) -> list[bytes]:
        """Names of the loadable chunks: a chunk is the same if all blocks up to its end are."""
        keys, hashed, at = [], hashlib.blake2b(digest_size=16), 0
        for chunk in range(num_loadable_chunks(self.prompt_tokens, chunk_tokens)):
            last = min(((chunk + 1) * chunk_tokens - 1) // self.block_tokens, len(self.blocks) - 1)
            while at <= last:
                hashed.update(self.blocks[at].to_bytes(8, "little"))
                at += 1
            keys.append(hashed.digest() + chunk.to_bytes(4, "little"))
        return keys


class SimulatedCluster:
    """rate: bytes a second of each link between a source and a decode worker, or what it follows; downlink: what all
    links of one decode worker share. kv_tokens: what a decode worker's pages hold."""

    def __init__(
        self,
        costs: CostModel,
        policy: SLOPolicy,
        *,
        rate: float | RateTrace,
        downlink: float | RateTrace | None = None,
        delay_s: float = 0.0005,
        num_prefill: int = 1,
        num_decode: int = 1,
        kv_tokens: int = 1 << 22,
        seed: int = 0,
    ) -> None:
        self.costs = costs
        self.network = SimulatedNetwork(seed=seed, rate_bytes_per_s=rate, delay_s=delay_s)
        self.prefill = {
            f"prefill-{i}": SimPrefillWorker(f"prefill-{i}", network=self.network, costs=costs)
            for i in range(num_prefill)
        }
        self.decode = {
            f"decode-{i}": SimDecodeWorker(
                f"decode-{i}",
                network=self.network,
                costs=costs,
                policy=policy,
                max_tokens=kv_tokens,
                downlink=downlink,
            )
            for i in range(num_decode)
        }
        self._numbers = itertools.count()
        self._table = [
            WorkerInfo(id=name, role=role, incarnation=name, endpoint=name)  # type: ignore[arg-type]
            for role, names in (("prefill", self.prefill), ("decode", self.decode))
            for name in names
        ]

    def run(self, arrivals: Iterable[Arrival], *, limit_s: float = 1e9) -> list[SimRequest]:
        """All requests to their ends, or to `limit_s`."""
        states = [self.later(arrival) for arrival in arrivals]
        self.network.run(until_s=limit_s, done=lambda: all(state.ended for state in reversed(states)))
        return states

    def later(self, arrival: Arrival) -> SimRequest:
        """Have a request arrive at its time."""
        keys = arrival.keys(self.costs.chunk_tokens)
        if arrival.stored:
            for worker in self.prefill.values():
                worker.stored.update(keys)
        token_ids = (arrival.blocks[0] if arrival.blocks else 0,) * arrival.prompt_tokens
        request = GenerationRequest(
            request_id=arrival.request_id or f"unnamed-{next(self._numbers)}",
            token_ids=token_ids,
            sampling=SamplingParams(max_tokens=max(1, arrival.output_tokens), temperature=0.0, ignore_eos=True),
            **arrival.options,
        )
        state = SimRequest(request=request, keys=keys, sources=(), timeline=Timeline(received_at=arrival.at))
        self.network.later(arrival.at, lambda: self._route(state))
        return state

    def _route(self, state: SimRequest) -> None:
        in_flight = {name: worker.num_requests for name, worker in self.decode.items()}
        route = choose_route(
            self._table,
            state.request.token_ids,
            chunk_tokens=self.costs.chunk_tokens,
            cache_salt=state.request.cache_salt,
            in_flight=in_flight,
            way=way_of(state.request),
        )
        assert route is not None
        state.sources = tuple(info.id for info in route.sources)
        state.num_stored = sum(any(key in self.prefill[name].stored for name in state.sources) for key in state.keys)
        self.decode[route.decode.id].submit(state)

    def check_integrity(self) -> None:
        for decode in self.decode.values():
            decode.check_integrity()
        for prefill in self.prefill.values():
            prefill.check_integrity()


def promised_loss(levels: Sequence[str], promised_kl: dict[str, float]) -> float:
    """The mean of what the chunks' levels promise, nats a token; computed chunks are exact."""
    return sum(promised_kl.get(level, 0.0) for level in levels) / max(len(levels), 1)
