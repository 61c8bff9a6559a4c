"""A decode worker in virtual time: the production controller, link scheduler, batch scheduler and transfer machine.

What a DecodeWorker and its KVPuller do in threads happens here on two servers, one that decodes blobs and one that runs
the engine's steps. It keeps nothing of what it computed, neither pages nor chunks: a preempted request loads its prompt
again and computes its answer so far.
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
from cluster.sim_blocks import SimBlocks
from cluster.sim_prefill import GREETING
from decode import fill_events as ev
from decode.admission import WorkerLimits, check_request, fill_orders
from decode.estimator import CodecEstimator, ComputeEstimator
from decode.fill import FillMachine
from decode.fill_loading import IDLE_ENGINE, EngineLoad, FillSpec
from decode.link_scheduler import Kind, LinkScheduler, LinkShare, priority
from decode.receipt import Timeline
from decode.requests import GenerationRequest, RequestRefused
from decode.scheduler import Lack, Phase, Row, Scheduler, SchedulingPolicy, Waiting
from decode.scheduler import Sequence as BatchSequence
from decode.scheduling_policy import MAX_SEQUENCES, MAX_WAITING
from decode.slo import SLOPolicy
from prefill.block_pool import blocks_for
from prefill.chunks import num_loadable_chunks
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
    it came. fill: what led to its first token. ended: "", "finished" or why it failed."""

    request: GenerationRequest
    keys: Sequence[bytes]
    sources: tuple[str, ...]
    timeline: Timeline
    fill: FillMachine | None = None
    policy: SLOPolicy = field(default_factory=SLOPolicy)
    ended: str = ""
    num_stored: int = 0
    num_preempted: int = 0
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
    """Admitted. fill_tokens: so many have to be in its pages before a token is drawn; its answer too if it was
    preempted."""

    state: SimRequest
    sequence: BatchSequence
    fill: FillMachine
    fill_tokens: int
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
        self._blocks = SimBlocks(max_tokens // BLOCK_TOKENS)
        self._scheduler = Scheduler(
            SchedulingPolicy(max_waiting=MAX_WAITING),
            num_blocks=self._blocks.num_blocks,
            block_tokens=BLOCK_TOKENS,
        )
        self._scheduler.set_shares(policy.shares(), default=policy.share)
        self._states: dict[str, SimRequest] = {}  # waiting or running
        self._running: dict[str, _Running] = {}
        self._by_transfer: dict[str, tuple[_Running, int]] = {}
        self._jobs: list[tuple[int, int, _Running, ev.Decode | ev.Refine]] = []
        self._order = itertools.count()
        self._is_decoding = self._is_stepping = self._is_admitting = False
        self._row_step_s = 0.0
        self._inbox: deque[wire.TransferEvent] = deque()

    # -- requests -------------------------------------------------------------------------------------------------

    @property
    def num_requests(self) -> int:
        return len(self._states)

    def submit(self, state: SimRequest) -> None:
        key, request, now = state.request.request_id, state.request, self._network.now
        state.policy = self.policy.for_tenant(request.tenant)
        try:
            check_request(request, self._limits)
            self._scheduler.add_waiting(
                key,
                arrival=next(self._order),
                now=now,
                num_prompt=len(request.token_ids),
                max_tokens=request.sampling.max_tokens,
                tenant=request.tenant,
                priority=request.priority,
                deadline=self._orders(state, len(request.token_ids)).deadline,
            )
        except RequestRefused as refused:
            state.ended = refused.code
            return
        self._states[key] = state
        self._admit()

    def cancel(self, state: SimRequest) -> None:
        """The client left."""
        if state.request.request_id in self._states:
            self._end(state.request.request_id, "cancelled")

    def check_integrity(self) -> None:
        """Run when idle: nothing is left of any request."""
        self._sink.check_integrity()
        self._scheduler.check_integrity()
        for running in self._running.values():
            running.fill.check_integrity()
        held = sum(len(sequence.block_table) for sequence in self._scheduler.all())
        assert held + self._blocks.num_free == self._blocks.num_blocks, "a block is lost"
        if not self._running:
            assert self.links.num_shares == 0 and not self._by_transfer and not self._jobs
            assert self._sink.num_transfers == 0

    # -- who holds pages, as decode/page_holders.py does it -----------------------------------------------------------

    def _admit(self) -> None:
        if self._is_admitting:
            return  # called from within by a request that ended at once; the loop below goes on
        self._is_admitting = True
        try:
            while True:
                waiting = self._scheduler.next_to_admit(
                    self._network.now, self._has_room, lacks=self._lacks, spill=self._spill
                )
                if waiting is None:
                    return
                self._begin(waiting)
        finally:
            self._is_admitting = False

    def _has_room(self, waiting: Waiting) -> bool:
        return len(self._scheduler) < MAX_SEQUENCES and self._missing(waiting, len(self._scheduler)) <= 0

    def _lacks(self, waiting: Waiting) -> Lack | None:
        if len(self._scheduler) >= MAX_SEQUENCES:
            return None
        return Lack(blocks=lambda num_left: self._missing(waiting, num_left))

    def _missing(self, waiting: Waiting, num_admitted: int) -> int:
        wanted = blocks_for(waiting.num_tokens, BLOCK_TOKENS) + SchedulingPolicy.spare_blocks(
            num_admitted, BLOCK_TOKENS
        )
        return wanted - self._blocks.num_free

    def _grow(self, sequence: BatchSequence, num_blocks: int) -> bool:
        if num_blocks > self._blocks.num_free:
            return False
        sequence.block_table += self._blocks.take(num_blocks)
        return True

    def _spill(self, sequence: BatchSequence) -> None:
        running = self._running.pop(sequence.key)
        running.state.num_preempted += 1
        self._stop(running)
        self._blocks.give_back(sequence.block_table)

    def _orders(self, state: SimRequest, fill_tokens: int) -> FillSpec:
        """Raises RequestRefused."""
        return fill_orders(
            state.request,
            state.policy,
            self._limits,
            has_source=bool(state.sources),
            now=self._network.now,
            tail_s=self.compute.tail_seconds(self._tail_start(state), fill_tokens),
        )

    def _tail_start(self, state: SimRequest) -> int:
        size = self._costs.chunk_tokens
        return num_loadable_chunks(len(state.request.token_ids), size) * size

    def _begin(self, waiting: Waiting) -> None:
        now, state, sequence = self._network.now, self._states[waiting.key], waiting.sequence
        fill_tokens = len(state.request.token_ids) if sequence is None else sequence.num_tokens
        try:
            spec = self._orders(state, fill_tokens)
        except RequestRefused as refused:  # a policy that changed since
            del self._states[waiting.key]
            state.ended = refused.code
            return
        if sequence is None:
            state.timeline.admitted_at = now
            sequence = BatchSequence(
                key=waiting.key,
                request=state.request,
                block_table=[],
                deadline=spec.deadline,
                arrival=waiting.arrival,
                itl_s=state.policy.itl_s,
            )
        sequence.block_table = self._blocks.take(blocks_for(waiting.num_tokens, BLOCK_TOKENS))
        self._scheduler.add(sequence, waiting)
        prior = state.policy.link_prior_bps / 8
        sources = state.sources if spec.may_load else ()
        shares = [self.links.join(name, deadline=spec.deadline, prior_bytes_per_s=prior) for name in sources]
        fill = FillMachine(
            spec,
            now=now,
            sources=shares,
            compute=self.compute,
            codec=self.codec,
            load=lambda: self._engine_load(sequence),
        )
        if not sequence.output:
            state.fill = fill
        running = _Running(state=state, sequence=sequence, fill=fill, fill_tokens=fill_tokens, shares=shares)
        self._running[sequence.key] = running
        self._carry_out(running, fill.start(now))
        self._network.later(now + 0.02, lambda: self._tick(running))

    def _end(self, key: str, why: str) -> None:
        state, running = self._states.pop(key), self._running.pop(key, None)
        state.ended = why
        if running is not None:
            self._stop(running)
        sequence = self._scheduler.remove(key)
        if sequence is not None:
            self._blocks.give_back(sequence.block_table)
        self._admit()

    def _stop(self, running: _Running) -> None:
        running.fill.done = True
        running.pages.clear()
        self._forget(running)

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
        if not running.fill.done:
            self._feed(running, ev.Tick())
            self._network.later(self._network.now + 0.02, lambda: self._tick(running))

    def _feed(self, running: _Running, event: ev.Event) -> None:
        fill = running.fill
        self._carry_out(running, fill.handle(event, self._network.now))
        for source in fill.sources:
            if not (source.is_open or source.is_opening):
                self._close(running, source.index)
        if fill.done and running.shares:
            self._forget(running)
        if fill.wake_at is not None:
            self._network.later(max(fill.wake_at, self._network.now), lambda: self._wake(running))

    def _wake(self, running: _Running) -> None:
        fill = running.fill
        if fill.wake_at is not None and fill.wake_at <= self._network.now and not fill.done:
            self._feed(running, ev.Tick())

    def _carry_out(self, running: _Running, commands: list[ev.Command]) -> None:
        deadline = running.sequence.deadline
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
                    start = self._tail_start(running.state)
                    running.sequence.phase, running.sequence.work = Phase.TAIL, (start, running.fill_tokens)
                    running.sequence.work_chunk = None
                    if not running.sequence.output:
                        running.state.timeline.filled_at = self._network.now
                    self._step_soon()
                case ev.Fail():
                    self._end(running.sequence.key, command.code)

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
            elif self._running.get(running.sequence.key) is running:
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
        if self._scheduler.may_preempt_for_waiting():
            self._admit()
        rows = self._scheduler.next_rows(self._slice_tokens())
        rows = self._scheduler.rows_with_pages(rows, self._network.now, grow=self._grow, spill=self._spill)
        if not rows:
            self._is_stepping = False
            return
        for row in rows:
            row.sequence.pins += 1
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
            sequence, fill = running.sequence, running.fill
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
            if row.sequence.phase is not Phase.ENDED:
                self._after_row(row)
            row.sequence.pins -= 1
        self._step()

    def _after_row(self, row: Row) -> None:
        sequence = row.sequence
        running = self._running[sequence.key]
        if sequence.phase is not Phase.RUNNING:
            if not self._scheduler.computed(row):
                return
            if sequence.phase is Phase.FILLING:
                chunk, sequence.work_chunk = sequence.work_chunk, None
                assert chunk is not None
                self._feed(running, ev.ChunkComputed(chunk=chunk))
                return
            sequence.phase = Phase.RUNNING
            timeline = running.state.timeline
            if not sequence.output:
                timeline.first_token_at = self._network.now
                assert timeline.filled_at is not None
                tail_s = self._network.now - timeline.filled_at
                self.compute.observe_tail(self._tail_start(running.state), running.fill_tokens, tail_s)
            self._feed(running, ev.FirstToken())
            self._admit()  # those that waited for its pages
        sequence.output.append(0)
        running.state.token_times.append(self._network.now)
        if len(sequence.output) >= running.state.request.sampling.max_tokens:
            self._end(sequence.key, "finished")
