"""Pulling prompts' KV into pages: the shell around FillMachine, a KVClient and a BlobDecoder.

Everything that belongs to a fill happens under the worker's lock, which is handed in; only decoding runs outside it,
with the sequence's pages pinned.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from decode import fill_events as ev
from decode.blob_decoder import BlobDecoder, Job, NewPages, Outcome
from decode.estimator import CodecEstimator, ComputeEstimator
from decode.fill import FillMachine
from decode.fill_loading import EngineLoad, FillSpec
from decode.link_scheduler import Kind, LinkScheduler, LinkShare, priority
from decode.stored_front import StoredFront
from decode.transfer_events import fill_event
from decode.window_chunks import Layers
from prefill.quantized_pool import Recents
from prefill.runtime import ModelRuntime
from prefill.store import MASTER_LEVEL
from transport import events as wire
from transport.curve import CurveKeys
from transport.errors import TransportError
from transport.kv_client import KVClient
from transport.local_transfers import LocalTransfers

log = logging.getLogger("kvstream.decode")

TICK_S = 0.02  # how often silence is looked at while something is being filled


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """A worker that may have the KV, as the routing table names it. link_prior_bps: what its link is taken for until
    something was seen of it; None: the policy says. is_holder: the index says that it has some of the prompt.
    stored_only: it shall not compute what it has not. is_own: it is the worker itself, reached without a socket."""

    id: str
    endpoint: str
    public_key: str | None = None
    link_prior_bps: float | None = None
    is_holder: bool = False
    stored_only: bool = False
    is_own: bool = False


class PullOwner(Protocol):
    """The decode worker as the puller sees it. Called with the lock held."""

    def fill_begins(self, fill: Fill) -> None: ...
    def engine_load(self, key: str) -> EngineLoad: ...
    def compute_chunk(self, key: str, chunk: int, start: int, stop: int) -> None: ...
    def chunk_loaded(
        self,
        key: str,
        start: int,
        stop: int,
        level: str,
        base_kl: float,
        *,
        layers: Layers = None,
        recents: Recents | None = None,
    ) -> None: ...
    def chunk_discarded(self, key: str, start: int, stop: int) -> None: ...
    def fill_ready(self, key: str, now: float) -> None: ...
    def fill_failed(self, key: str, failure: ev.Fail) -> None: ...
    def put_pages(self, key: str, pages: NewPages) -> None: ...
    def pin(self, key: str) -> None: ...
    def unpin(self, key: str) -> None: ...


@dataclass(slots=True, kw_only=True, eq=False)
class Fill:
    """A prompt being filled, and then refined. `opened_at` is when the first source answered. `transfers`: by index of
    the source, those that are open. `front`: what FillSpec.front_stop is about."""

    key: str
    machine: FillMachine
    block_table: list[int]
    body: dict[str, Any]
    sources: Sequence[Source]
    shares: Sequence[LinkShare]
    front: StoredFront | None = None
    transfers: dict[int, str] = field(default_factory=dict)
    opened_at: float | None = None


class KVPuller:
    """One per decode worker."""

    def __init__(
        self,
        runtime: ModelRuntime,
        *,
        worker_id: str,
        compute: ComputeEstimator,
        codec: CodecEstimator,
        owner: PullOwner,
        lock: threading.Condition,
        curve: CurveKeys | None = None,
        own: Callable[[], LocalTransfers | None] = lambda: None,
    ) -> None:
        """own: the way to the worker's own store, if it has one."""
        self._owner, self._lock, self._own = owner, lock, own
        self._compute, self._codec = compute, codec
        self._links = LinkScheduler()
        self._fills: dict[str, Fill] = {}
        self._by_transfer: dict[str, tuple[Fill, int]] = {}
        self.counters = {
            "kv_received_bytes_total": 0,
            "kv_bad_blobs_total": 0,
            "kv_lost_transfers_total": 0,
            "kv_refined_chunks_total": 0,
        }
        self._client = KVClient(
            greeting=runtime.greeting(), on_event=self._on_event, incarnation=worker_id, curve=curve
        )
        self._ticked_at = time.monotonic()
        self._decoder = BlobDecoder(runtime, on_done=self._on_decoded, on_pause=self._tick)
        self._decoder.start()

    # -- for the worker, with the lock held -----------------------------------------------------------------------

    def start(
        self,
        key: str,
        spec: FillSpec,
        *,
        sources: Sequence[Source],
        token_ids: Sequence[int],
        cache_salt: str,
        block_table: list[int],
        max_kl: float,
        link_prior_bps: float,
        now: float,
        front: StoredFront | None = None,
    ) -> Fill:
        """Begin to fill; the owner is told when the pages are ready or cannot be. max_kl: stored KV whose promise is
        worse does not count."""
        sources = sources if spec.may_load else ()
        shares = [
            self._links.join(
                source.endpoint,
                deadline=spec.deadline,
                prior_bytes_per_s=(source.link_prior_bps or link_prior_bps) / 8,
            )
            for source in sources
        ]
        machine = FillMachine(
            spec,
            now=now,
            sources=shares,
            compute=self._compute,
            codec=self._codec,
            load=lambda: self._owner.engine_load(key),
        )
        for source, known in zip(sources, machine.sources):
            known.waits_for_use = source.is_own
        body = {"token_ids": list(token_ids), "chunk_tokens": spec.chunk_tokens, "cache_salt": cache_salt}
        body["max_kl"] = max_kl
        # A source that computes the rest may fetch from these what it has not.
        body["holders"] = [
            {"endpoint": source.endpoint, "public_key": source.public_key} for source in sources if source.is_holder
        ]
        fill = Fill(
            key=key, machine=machine, block_table=block_table, body=body, sources=sources, shares=shares, front=front
        )
        self._fills[key] = fill
        self._owner.fill_begins(fill)
        self._feed(fill, None, now)
        return fill

    def computed(self, key: str, chunk: int, now: float) -> None:
        """The engine has computed a chunk that the fill had asked for."""
        fill = self._fills.get(key)
        if fill is not None:
            self._feed(fill, ev.ChunkComputed(chunk=chunk), now)

    def first_token(self, key: str, position: int, now: float) -> None:
        """The request's first token was drawn; it stands at this position."""
        fill = self._fills.get(key)
        if fill is not None:
            self._feed(fill, ev.FirstToken(position=position), now)

    def pages_put(self, key: str, pages: NewPages, after_tokens: int, now: float) -> None:
        """The engine has copied a better level into the pages."""
        self.counters["kv_refined_chunks_total"] += 1
        fill = self._fills.get(key)
        if fill is not None:
            refined = ev.Refined(chunk=pages.chunk, seconds=pages.seconds, after_tokens=after_tokens, blob=pages.blob)
            self._feed(fill, refined, now)

    def stop(self, key: str, reason: str) -> None:
        """The request is over; a blob that is being decoded still keeps its pages pinned until it is done."""
        fill = self._fills.get(key)
        if fill is not None:
            fill.machine.done = True
            self._forget(fill, reason)

    @property
    def is_alive(self) -> bool:
        return self._decoder.is_alive

    # -- the rest -------------------------------------------------------------------------------------------------

    def check_integrity(self) -> None:
        """No transfer without a fill, no share in a link without a fill."""
        self._client.check_integrity()
        open_now = {transfer for fill in self._fills.values() for transfer in fill.transfers.values()}
        assert set(self._by_transfer) == open_now
        assert self._links.num_shares == sum(len(fill.shares) for fill in self._fills.values())
        for fill in self._fills.values():
            fill.machine.check_integrity()

    def shutdown(self) -> None:
        self._decoder.shutdown()
        self._client.shutdown()

    def _open(self, fill: Fill, index: int) -> str | None:
        """Why it could not be done, if so."""
        source = fill.sources[index]
        try:
            # A source looks at the first of the others: not at itself.
            holders = [holder for holder in fill.body["holders"] if holder["endpoint"] != source.endpoint]
            body = {**fill.body, "holders": holders, "stored_only": source.stored_only}
            own = self._own() if source.is_own else None
            if own is not None:
                transfer_id = own.open(body, self._on_event)
            else:
                transfer_id = self._client.open(source.endpoint, body, server_public_key=source.public_key)
        except TransportError as error:
            return str(error)
        fill.transfers[index] = transfer_id
        self._by_transfer[transfer_id] = (fill, index)
        return None

    def _close(self, fill: Fill, index: int, reason: str) -> None:
        transfer_id = fill.transfers.pop(index, None)
        if transfer_id is not None:
            self._link(transfer_id).close(transfer_id, reason)
            del self._by_transfer[transfer_id]

    def _link(self, transfer_id: str) -> KVClient | LocalTransfers:
        """What a transfer goes over."""
        own = self._own()
        return own if own is not None and transfer_id in own else self._client

    def _forget(self, fill: Fill, reason: str) -> None:
        del self._fills[fill.key]
        for index in list(fill.transfers):
            self._close(fill, index, reason)
        for share in fill.shares:
            share.leave()

    def _feed(self, fill: Fill, event: ev.Event | None, now: float) -> None:
        """Tell the machine what happened (None: that it starts) and carry out what it wants."""
        try:
            commands = fill.machine.start(now) if event is None else fill.machine.handle(event, now)
            self._carry_out(fill, commands, now)
        except Exception:
            # A bug of ours. Left alone, this fill would wait for ever; the others and the thread go on.
            log.exception("%s: %s could not be handled", fill.key, type(event).__name__)
            fill.machine.done = True
            if self._fills.get(fill.key) is fill:
                self._forget(fill, "internal error")
                message = "The decode worker failed while loading the prompt's KV; see its log."
                self._owner.fill_failed(fill.key, ev.Fail(code="internal_error", message=message, status=500))
            return
        for source in fill.machine.sources:
            if not (source.is_open or source.is_opening):
                self._close(fill, source.index, "the source was given up")
            elif source.refused.issuperset(range(fill.machine.spec.num_cached, fill.machine.spec.num_chunks)):
                # Withdrawn chunks do not stop a source that computes the prompt; the end of the transfer does.
                self._close(fill, source.index, "it can give no chunk")
            elif fill.sources[source.index].is_own and (own := self._own()) is not None:
                in_hand = len(fill.machine.table.decoding) + fill.machine.upgrades.num_here
                own.set_in_hand(fill.transfers.get(source.index, ""), in_hand)
        if fill.machine.done and self._fills.get(fill.key) is fill:
            self._forget(fill, "complete")

    def _carry_out(self, fill: Fill, commands: list[ev.Command], now: float) -> None:
        lost: list[ev.SourceLost] = []
        for command in commands:
            match command:
                case ev.Open():
                    reason = self._open(fill, command.source)
                    if reason is not None:
                        lost.append(ev.SourceLost(source=command.source, reason=reason, is_final=True))
                case ev.Ask() | ev.Withdraw():
                    self._tell_source(fill, command)
                case ev.Decode() | ev.Refine():
                    self._decode(fill, command)
                case ev.Compute():
                    start, stop = fill.machine.to_compute(command.chunk)
                    self._owner.compute_chunk(fill.key, command.chunk, start, stop)
                case ev.Discard():
                    self._owner.chunk_discarded(fill.key, *fill.machine.spec.to_compute(command.chunk))
                case ev.LoadFront():
                    self._load_front(fill, command)
                case ev.Ready():
                    self._owner.fill_ready(fill.key, now)
                case ev.Fail():
                    self._forget(fill, command.message)
                    self._owner.fill_failed(fill.key, command)
        for event in lost:
            self._feed(fill, event, now)

    def _decode(self, fill: Fill, command: ev.Decode | ev.Refine) -> None:
        machine = fill.machine
        kind = Kind.BASE
        if isinstance(command, ev.Refine):
            kind = Kind.LATER if machine.ready else Kind.BETTER
        start = command.chunk * machine.spec.chunk_tokens
        job = Job(
            fill=fill,
            command=command,
            start=start,
            stop=start + machine.spec.chunk_tokens,
            cached_tokens=machine.spec.cached_tokens,
            base_kl=machine.base_kl(command.chunk),
            block_table=fill.block_table,
            is_wanted=lambda: not machine.done,
        )
        self._owner.pin(fill.key)
        self._decoder.put(job, urgency=priority(kind, machine.spec.deadline))

    def _load_front(self, fill: Fill, command: ev.LoadFront) -> None:
        front, machine = fill.front, fill.machine
        assert front is not None
        job = Job(
            fill=fill,
            command=command,
            start=front.start,
            stop=front.stop,
            cached_tokens=machine.spec.cached_tokens,
            base_kl=front.kl,
            block_table=fill.block_table,
            is_wanted=lambda: not machine.done,
            front=front,
        )
        self._owner.pin(fill.key)
        self._decoder.put(job, urgency=priority(Kind.BASE, machine.spec.deadline))

    def _tell_source(self, fill: Fill, command: ev.Ask | ev.Withdraw) -> None:
        transfer_id = fill.transfers.get(command.source)
        if transfer_id is None:
            return  # it could not even be opened; the machine is told next
        try:
            if isinstance(command, ev.Ask):
                urgency = priority(command.kind, fill.machine.spec.deadline)
                self._link(transfer_id).request(transfer_id, command.chunk, command.level, priority=urgency)
            else:
                self._link(transfer_id).withdraw(transfer_id, command.chunk)
        except TransportError as error:
            log.debug("%s: %s; TransferLost is on its way", fill.key, error)

    def _on_event(self, event: wire.TransferEvent) -> None:
        """In the client's thread."""
        with self._lock:
            found = self._by_transfer.get(event.transfer_id)
            if found is None:
                return  # closed while the event was on its way
            fill, source = found
            match event:
                case wire.Opened():
                    fill.opened_at = event.at if fill.opened_at is None else fill.opened_at
                case wire.PartArrived():
                    self.counters["kv_received_bytes_total"] += event.part_bytes
                case wire.Refused() | wire.TransferLost():
                    self.counters["kv_lost_transfers_total"] += 1
                    # The transport has ended it already; closing it again is fine.
                    self._close(fill, source, event.reason)
            num_chunks = fill.machine.spec.num_chunks
            self._feed(fill, fill_event(event, source=source, num_chunks=num_chunks), time.monotonic())

    # -- in the decoder's thread ----------------------------------------------------------------------------------

    def _tick(self) -> float:
        """Tell the machines the time where they wait for it. Seconds until this is due again."""
        now = time.monotonic()
        with self._lock:
            is_tick = now - self._ticked_at >= TICK_S
            self._ticked_at = now if is_tick else self._ticked_at
            for fill in list(self._fills.values()):
                wake_at = fill.machine.wake_at
                if is_tick or (wake_at is not None and wake_at <= now):
                    self._feed(fill, ev.Tick(), now)
            wakes = [f.machine.wake_at for f in self._fills.values() if f.machine.wake_at is not None]
        return min(TICK_S, max(0.001, min(wakes, default=now + TICK_S) - now))

    def _on_decoded(self, job: Job, outcome: Outcome) -> None:
        fill: Fill = job.fill
        command = job.command
        is_base = isinstance(command, ev.Decode)
        with self._lock:
            now = time.monotonic()
            self.counters["kv_bad_blobs_total"] += outcome.is_bad
            if self._fills.get(fill.key) is not fill or outcome.was_skipped:
                pass  # the request ended meanwhile; its pages may be another's as soon as they are unpinned
            elif isinstance(command, ev.LoadFront):
                self._on_front(fill, job, outcome, now)
            elif outcome.error:
                rejected = ev.BlobRejected if is_base else ev.RefinementRejected
                self._feed(fill, rejected(chunk=command.chunk, reason=outcome.error), now)
            elif outcome.pages is not None:
                self._owner.put_pages(fill.key, outcome.pages)
            else:
                start = max(job.start, job.cached_tokens)
                self._owner.chunk_loaded(
                    fill.key,
                    start,
                    job.stop,
                    command.level,
                    job.base_kl,
                    layers=command.layers,
                    recents=outcome.recents,
                )
                self._feed(fill, ev.BlobDecoded(chunk=command.chunk, seconds=outcome.seconds), now)
            self._owner.unpin(fill.key)

    def _on_front(self, fill: Fill, job: Job, outcome: Outcome, now: float) -> None:
        if outcome.error:
            self._feed(fill, ev.FrontRejected(reason=outcome.error), now)
            return
        start = max(job.start, job.cached_tokens)
        self._owner.chunk_loaded(fill.key, start, job.stop, MASTER_LEVEL, job.base_kl)
        self._feed(fill, ev.FrontLoaded(seconds=outcome.seconds), now)
