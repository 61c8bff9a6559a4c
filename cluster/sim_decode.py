"""A decode worker in virtual time: the production controller, link scheduler, batch scheduler and transfer machine.

What a DecodeWorker and its KVPuller do in threads happens here on two servers, one that decodes blobs and one that runs
the engine's steps.
"""

from __future__ import annotations

import contextlib
import heapq
import itertools
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from cluster.cost_model import CostModel
from cluster.sim_prefill import GREETING
from decode import fill_events as ev
from decode.admission import WorkerLimits, fill_orders
from decode.estimator import CodecEstimator, ComputeEstimator
from decode.fill import FillMachine
from decode.fill_loading import IDLE_ENGINE, EngineLoad
from decode.link_scheduler import Kind, LinkScheduler, LinkShare, priority
from decode.receipt import Timeline
from decode.requests import GenerationRequest, RequestRefused
from decode.scheduler import Phase, Row, Scheduler
from decode.scheduler import Sequence as BatchSequence
from decode.slo import SLOPolicy
from transport import events as wire
from transport import sink_io
from transport.errors import UnknownTransfer
from transport.simulation import SimulatedNetwork
from transport.sink import Sink

MIN_SLICE_TOKENS = 32
BLOCK_TOKENS = 16


@dataclass(slots=True, kw_only=True, eq=False)
class SimRequest:
    """One request and what became of it. keys: of its loadable chunks; num_stored: how many of them a source had when
    it came. ended: "", "finished" or why it failed."""

    request: GenerationRequest
    keys: Sequence[bytes]
    sources: tuple[str, ...]
    timeline: Timeline
    fill: FillMachine | None = None
    policy: SLOPolicy = field(default_factory=SLOPolicy)
    ended: str = ""
    num_stored: int = 0
    token_times: list[float] = field(default_factory=list)

    @property
    def ttft_s(self) -> float | None:
        """From arrival to first token; None if there was none."""
        at = self.timeline.first_token_at
        return None if at is None else at - self.timeline.received_at

    @property
    def levels(self) -> list[str]:
        """Of its chunks, at the first token."""
        return [] if self.fill is None else [log.first_level for log in self.fill.chunks]


@dataclass(slots=True, kw_only=True, eq=False)
class _Running:
    state: SimRequest
    sequence: BatchSequence
    shares: list[LinkShare]
    transfers: dict[int, str] = field(default_factory=dict)
    pages: list[tuple[ev.Refine, Any]] = field(default_factory=list)


class SimDecodeWorker:
    """`max_tokens`: of KV, what its pages hold."""

    def __init__(
        self,
        name: str,
        *,
        network: SimulatedNetwork,
        costs: CostModel,
        policy: SLOPolicy,
        max_tokens: int = 1 << 22,
        downlink: Any = None,
    ) -> None:
        self.name, self._network, self._costs, self.policy = name, network, costs, policy
        self._sink = Sink(greeting=GREETING, incarnation=name)
        network.add_sink(name, self._sink, self._on_event, downlink=downlink)
        self.links = LinkScheduler()
        self.compute = ComputeEstimator(
            costs.token_s,
            costs.token_position_s,
            slice_s=costs.slice_s,
            slice_position_s=costs.slice_position_s,
            chunk_tokens=costs.chunk_tokens,
        )
        self.codec = CodecEstimator(measured=costs.decode_s)
        self._limits = WorkerLimits(
            max_context=1 << 30,
            vocab_size=1 << 31,
            max_blocks=max_tokens // BLOCK_TOKENS,
            block_tokens=BLOCK_TOKENS,
            chunk_tokens=costs.chunk_tokens,
            chunk_bytes=dict(costs.chunk_bytes),
            nested=frozenset(costs.nested),
            exact=frozenset(costs.chunk_bytes) - frozenset(costs.nested),
        )
        self._free_tokens = max_tokens
        self._scheduler = Scheduler()
        self._running: dict[str, _Running] = {}
        self._by_transfer: dict[str, tuple[_Running, int]] = {}
        self._waiting: deque[SimRequest] = deque()
        self._jobs: list[tuple[int, int, _Running, ev.Decode | ev.Refine]] = []
        self._order = itertools.count()
        self._is_decoding = self._is_stepping = False
        self._row_step_s = 0.0
        self._inbox: deque[wire.TransferEvent] = deque()

    # -- requests -------------------------------------------------------------------------------------------------

    @property
    def num_requests(self) -> int:
        return len(self._running) + len(self._waiting)

    def submit(self, state: SimRequest) -> None:
        state.policy = self.policy.for_tenant(state.request.tenant)
        self._waiting.append(state)
        self._admit()

    def cancel(self, state: SimRequest) -> None:
        """The client left."""
        running = self._running.get(state.request.request_id)
        if running is not None:
            self._end(running, "cancelled")

    def check_integrity(self) -> None:
        """Run when idle: nothing is left of any request."""
        self._sink.check_integrity()
        for running in self._running.values():
            assert running.state.fill is not None
            running.state.fill.check_integrity()
        if not self._running:
            assert self.links.num_shares == 0 and not self._by_transfer and not self._jobs
            assert self._sink.num_transfers == 0

    def _admit(self) -> None:
        while self._waiting:
            request = self._waiting[0].request
            needed = len(request.token_ids) + request.sampling.max_tokens
            if needed > self._free_tokens:
                return
            self._free_tokens -= needed
            self._begin(self._waiting.popleft())

    def _begin(self, state: SimRequest) -> None:
        now, request = self._network.now, state.request
        state.timeline.admitted_at = now
        num_prompt, size = len(request.token_ids), self._costs.chunk_tokens
        tail_s = self.compute.tail_seconds((num_prompt - 1) // size * size, num_prompt)
        try:
            spec = fill_orders(
                request, state.policy, self._limits, has_source=bool(state.sources), now=now, tail_s=tail_s
            )
        except RequestRefused as refused:
            state.ended = refused.code
            self._free_tokens += num_prompt + request.sampling.max_tokens
            return
        sequence = BatchSequence(
            key=request.request_id,
            request=request,
            block_table=[],
            deadline=spec.deadline,
            arrival=next(self._order),
            itl_s=state.policy.itl_s,
        )
        self._scheduler.add(sequence)
        prior = state.policy.link_prior_bps / 8
        sources = state.sources if spec.may_load else ()
        shares = [self.links.join(name, deadline=spec.deadline, prior_bytes_per_s=prior) for name in sources]
        running = _Running(state=state, sequence=sequence, shares=shares)
        state.fill = FillMachine(
            spec,
            now=now,
            sources=shares,
            compute=self.compute,
            codec=self.codec,
            load=lambda: self._engine_load(sequence),
        )
        self._running[sequence.key] = running
        self._carry_out(running, state.fill.start(now))
        self._network.later(now + 0.02, lambda: self._tick(running))

    def _end(self, running: _Running, why: str) -> None:
        state = running.state
        if self._running.pop(running.sequence.key, None) is None:
            return
        state.ended = why
        assert state.fill is not None
        state.fill.done = True
        self._forget(running)
        self._scheduler.remove(running.sequence.key)
        self._free_tokens += len(state.request.token_ids) + state.request.sampling.max_tokens
        self._admit()

    def _forget(self, running: _Running) -> None:
        for source in list(running.transfers):
            self._close(running, source)
        for share in running.shares:
            share.leave()
        running.shares = []

    def _close(self, running: _Running, source: int) -> None:
        transfer_id = running.transfers.pop(source, None)
        if transfer_id is not None:
            del self._by_transfer[transfer_id]
            self._network.tell_sink(self.name, sink_io.CloseTransfer(transfer_id=transfer_id))

    # -- the fill machine's shell ---------------------------------------------------------------------------------

    def _tick(self, running: _Running) -> None:
        assert running.state.fill is not None
        if not running.state.fill.done:
            self._feed(running, ev.Tick())
            self._network.later(self._network.now + 0.02, lambda: self._tick(running))

    def _feed(self, running: _Running, event: ev.Event) -> None:
        fill = running.state.fill
        assert fill is not None
        self._carry_out(running, fill.handle(event, self._network.now))
        for source in fill.sources:
            if not (source.is_open or source.is_opening):
                self._close(running, source.index)
        if fill.done and running.shares:
            self._forget(running)
        if fill.wake_at is not None:
            self._network.later(max(fill.wake_at, self._network.now), lambda: self._wake(running))

    def _wake(self, running: _Running) -> None:
        fill = running.state.fill
        assert fill is not None
        if fill.wake_at is not None and fill.wake_at <= self._network.now and not fill.done:
            self._feed(running, ev.Tick())

    def _carry_out(self, running: _Running, commands: list[ev.Command]) -> None:
        fill, deadline = running.state.fill, running.sequence.deadline
        assert fill is not None
        for command in commands:
            match command:
                case ev.Open():
                    self._open(running, command.source)
                case ev.Ask():
                    transfer_id = running.transfers.get(command.source)
                    if transfer_id is not None:
                        self._to_sink(
                            sink_io.RequestChunk(
                                transfer_id=transfer_id,
                                chunk=command.chunk,
                                level=command.level,
                                priority=priority(command.kind, deadline),
                            )
                        )
                case ev.Withdraw():
                    transfer_id = running.transfers.get(command.source)
                    if transfer_id is not None:
                        self._to_sink(sink_io.WithdrawChunk(transfer_id=transfer_id, chunk=command.chunk))
                case ev.Decode() | ev.Refine():
                    kind = Kind.BASE if isinstance(command, ev.Decode) else Kind.LATER
                    heapq.heappush(self._jobs, (priority(kind, deadline), next(self._order), running, command))
                    self._decode_next()
                case ev.Compute():
                    size = self._costs.chunk_tokens
                    running.sequence.work = (command.chunk * size, (command.chunk + 1) * size)
                    running.sequence.work_chunk = command.chunk
                    self._step_soon()
                case ev.Ready():
                    num_prompt = len(running.state.request.token_ids)
                    start = (num_prompt - 1) // self._costs.chunk_tokens * self._costs.chunk_tokens
                    running.sequence.phase, running.sequence.work = Phase.TAIL, (start, num_prompt)
                    running.sequence.work_chunk = None
                    running.state.timeline.filled_at = self._network.now
                    self._step_soon()
                case ev.Fail():
                    self._end(running, command.code)

    def _to_sink(self, event: sink_io.SinkInput) -> None:
        """Not from within the machine that is just telling us."""

        def tell() -> None:
            with contextlib.suppress(UnknownTransfer):  # lost meanwhile; TransferLost is on its way
                self._network.tell_sink(self.name, event)

        self._network.later(self._network.now, tell)

    def _open(self, running: _Running, source: int) -> None:
        state = running.state
        transfer_id = f"{state.request.request_id}.{source}.{next(self._order)}"
        running.transfers[source] = transfer_id
        self._by_transfer[transfer_id] = (running, source)
        # As large as the token ids are on the wire.
        body = {"keys": list(state.keys), "tokens": bytes(3 * len(state.request.token_ids))}
        event = sink_io.OpenTransfer(transfer_id=transfer_id, endpoint=state.sources[source], body=body)
        self._to_sink(event)

    def _on_event(self, event: wire.TransferEvent) -> None:
        self._inbox.append(event)
        self._network.later(self._network.now + self._costs.event_s, self._read_next)

    def _read_next(self) -> None:
        event = self._inbox.popleft()
        found = self._by_transfer.get(event.transfer_id)
        if found is None:
            return  # closed while the event was on its way
        running, source = found
        match event:
            case wire.Opened():
                if running.state.timeline.opened_at is None:
                    running.state.timeline.opened_at = event.at
                told: ev.Event = ev.Opened(
                    source=source, stored_bytes=tuple(event.body["stored"]), encode_s=event.body["encode_s"]
                )
            case wire.PartArrived():
                told = ev.PartArrived(
                    source=source,
                    chunk=event.chunk,
                    level=event.level,
                    received_bytes=event.bytes_received,
                    total_bytes=event.total_bytes,
                    part_bytes=event.part_bytes,
                    wire_s=event.wire_s,
                )
            case wire.BlobArrived():
                told = ev.BlobArrived(source=source, chunk=event.chunk, level=event.level, blob=event.blob)
            case wire.ChunkFailed():
                told = ev.ChunkRefused(source=source, chunk=event.chunk, reason=event.reason)
            case wire.Refused() | wire.TransferLost():
                self._close(running, source)
                told = ev.SourceLost(source=source, reason=event.reason, is_final=isinstance(event, wire.Refused))
            case _:
                told = ev.Tick()
        self._feed(running, told)

    # -- the decoding thread --------------------------------------------------------------------------------------

    def _decode_next(self) -> None:
        if self._is_decoding or not self._jobs:
            return
        self._is_decoding = True
        _, _, running, command = heapq.heappop(self._jobs)
        seconds = self._costs.decode_s.get(command.level, 0.0) + self._costs.event_s

        def done() -> None:
            self._is_decoding = False
            if isinstance(command, ev.Decode):
                self._feed(running, ev.BlobDecoded(chunk=command.chunk, seconds=seconds))
            elif running.sequence.phase is not Phase.ENDED:
                running.pages.append((command, seconds))
                self._step_soon()
            self._decode_next()

        self._network.later(self._network.now + seconds, done)

    # -- the engine -----------------------------------------------------------------------------------------------

    def _engine_load(self, sequence: BatchSequence) -> EngineLoad:
        if len(self._scheduler) <= 1:
            return IDLE_ENGINE
        slice_s = self.compute.seconds(0, self._slice_tokens())
        return EngineLoad(
            wait_s=sum(self.compute.seconds(*work) for work in self._scheduler.work_before(sequence)),
            factor=1.0 + self._row_step_s / slice_s if self._scheduler.is_any_running else 1.0,
            num_others=len(self._scheduler) - 1,
        )

    def _slice_tokens(self) -> int:
        size = self._costs.chunk_tokens
        running = self._scheduler.in_phase(Phase.RUNNING)
        if not running:
            return size
        per_token = self.compute.seconds(0, size) / size
        tokens = int(0.8 * min(s.itl_s for s in running) / per_token) // MIN_SLICE_TOKENS * MIN_SLICE_TOKENS
        return max(MIN_SLICE_TOKENS, min(tokens, size))

    def _step_soon(self) -> None:
        if not self._is_stepping:
            self._is_stepping = True
            self._network.later(self._network.now + self._costs.event_s, self._step)

    def _step(self) -> None:
        self._put_pages()
        rows = self._scheduler.next_rows(self._slice_tokens())
        if not rows:
            self._is_stepping = False
            return
        costs = self._costs
        slices = [row for row in rows if row.stop - row.start > 1]
        num_rows = len(rows) - len(slices)
        seconds = sum(costs.slice_seconds(row.start, row.stop) for row in slices) + num_rows * costs.row_s
        seconds += costs.sample_s * sum(row.sample for row in slices)
        if not slices:
            seconds += costs.step_s  # else a slice's time contains what a pass takes at least
        if num_rows == len(rows):
            self._row_step_s += 0.1 * (seconds - self._row_step_s)
        self._network.later(self._network.now + seconds, lambda: self._after_step(rows))

    def _put_pages(self) -> None:
        for running in list(self._running.values()):
            sequence, fill = running.sequence, running.state.fill
            assert fill is not None
            if sequence.phase is Phase.TAIL or not running.pages:
                sequence.is_held = not fill.may_step(len(sequence.output))
                continue
            waiting, running.pages = running.pages, []
            for command, seconds in waiting:
                if command.after_tokens is not None and len(sequence.output) < command.after_tokens:
                    running.pages.append((command, seconds))
                    continue
                is_nested = command.level in self._costs.nested
                blob = bytes(int(self._costs.chunk_bytes[command.level])) if is_nested else None
                self._feed(
                    running,
                    ev.Refined(chunk=command.chunk, seconds=seconds, after_tokens=len(sequence.output), blob=blob),
                )
            sequence.is_held = not fill.may_step(len(sequence.output))

    def _after_step(self, rows: list[Row]) -> None:
        for row in rows:
            sequence = row.sequence
            if sequence.phase is Phase.ENDED:
                continue
            running = self._running[sequence.key]
            if sequence.phase is not Phase.RUNNING:
                if not self._scheduler.computed(row):
                    continue
                if sequence.phase is Phase.FILLING:
                    chunk, sequence.work_chunk = sequence.work_chunk, None
                    assert chunk is not None
                    self._feed(running, ev.ChunkComputed(chunk=chunk))
                    continue
                sequence.phase = Phase.RUNNING
                timeline = running.state.timeline
                timeline.first_token_at = self._network.now
                assert timeline.filled_at is not None
                num_prompt, size = len(sequence.request.token_ids), self._costs.chunk_tokens
                start = (num_prompt - 1) // size * size
                self.compute.observe_tail(start, num_prompt, self._network.now - timeline.filled_at)
                self._feed(running, ev.FirstToken())
            sequence.output.append(0)
            running.state.token_times.append(self._network.now)
            if len(sequence.output) >= running.state.request.sampling.max_tokens:
                self._end(running, "finished")
        self._step()
