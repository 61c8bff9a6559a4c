"""Pulling prompts' KV into pages: the shell around FillMachine, a KVClient and a thread that decodes blobs.

Everything that belongs to a fill happens under the worker's lock, which is handed in; only decoding runs outside it,
with the sequence's pages pinned.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from codec.chunk import inspect_blob
from codec.errors import BlobError, MalformedBlob
from decode.estimator import CodecEstimator, ComputeEstimator, LinkEstimator
from decode.fill import FillMachine, FillSpec
from decode.fill_events import (
    Ask,
    BlobArrived,
    BlobDecoded,
    BlobRejected,
    ChunkComputed,
    Command,
    Compute,
    Decode,
    Event,
    Fail,
    Opened,
    PartArrived,
    Ready,
    SourceLost,
    Tick,
    Withdraw,
)
from prefill.runtime import ModelRuntime
from transport import events as wire
from transport.curve import CurveKeys
from transport.errors import TransportError
from transport.kv_client import KVClient

log = logging.getLogger("kvstream.decode")

MAX_KNOWN_LINKS = 256
TICK_S = 0.02  # how often silence is looked at while something is being filled


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """A prefill worker as the routing table names it."""

    id: str
    endpoint: str
    public_key: str | None = None


class PullOwner(Protocol):
    """The decode worker as the puller sees it. Called with the lock held."""

    def fill_begins(self, fill: Fill) -> None: ...
    def compute_chunk(self, key: str, chunk: int, start: int, stop: int) -> None: ...
    def fill_ready(self, key: str, now: float) -> None: ...
    def fill_failed(self, key: str, code: str, message: str) -> None: ...
    def pin(self, key: str) -> None: ...
    def unpin(self, key: str) -> None: ...


@dataclass(slots=True, kw_only=True, eq=False)
class Fill:
    """A prompt being filled. `opened_at` is when the source answered."""

    key: str
    machine: FillMachine
    block_table: list[int]
    endpoint: str | None = None
    transfer_id: str | None = None
    opened_at: float | None = None


class KVPuller:
    """One per decode worker."""

    def __init__(
        self,
        runtime: ModelRuntime,
        *,
        worker_id: str,
        compute: ComputeEstimator,
        owner: PullOwner,
        lock: threading.Condition,
        curve: CurveKeys | None = None,
    ) -> None:
        self._runtime, self._owner, self._lock = runtime, owner, lock
        self._compute, self._codec = compute, CodecEstimator()
        self._links: dict[str, LinkEstimator] = {}
        self._fills: dict[str, Fill] = {}
        self._by_transfer: dict[str, Fill] = {}
        self._jobs: queue.SimpleQueue[tuple[Fill, Decode] | None] = queue.SimpleQueue()
        self.counters = {"kv_received_bytes_total": 0, "kv_bad_blobs_total": 0, "kv_lost_transfers_total": 0}
        self._client = KVClient(
            greeting=runtime.greeting(), on_event=self._on_event, incarnation=worker_id, curve=curve
        )
        self._thread = threading.Thread(target=self._decode_loop, name="kv-decode", daemon=True)
        self._thread.start()

    # -- for the worker, with the lock held -----------------------------------------------------------------------

    def start(
        self,
        key: str,
        spec: FillSpec,
        *,
        source: Source | None,
        token_ids: Sequence[int],
        cache_salt: str,
        block_table: list[int],
        now: float,
    ) -> Fill:
        """Begin to fill; the owner is told when the pages are ready or cannot be."""
        assert (source is not None) == spec.may_load
        link = self._link(source.endpoint) if source is not None else LinkEstimator()
        machine = FillMachine(spec, now=now, link=link, compute=self._compute, codec=self._codec)
        fill = Fill(key=key, machine=machine, block_table=block_table)
        self._fills[key] = fill
        self._owner.fill_begins(fill)
        lost: SourceLost | None = None
        if source is not None and spec.num_chunks > 0:
            body = {"token_ids": list(token_ids), "chunk_tokens": spec.chunk_tokens, "cache_salt": cache_salt}
            fill.endpoint = source.endpoint
            try:
                fill.transfer_id = self._client.open(source.endpoint, body, server_public_key=source.public_key)
            except TransportError as error:
                lost = SourceLost(reason=str(error))
            else:
                self._by_transfer[fill.transfer_id] = fill
                link.sharing += 1
        self._feed(fill, None, now)
        if lost is not None:
            self._feed(fill, lost, now)
        return fill

    def computed(self, key: str, chunk: int, now: float) -> None:
        """The engine has computed a chunk that the fill had asked for."""
        fill = self._fills.get(key)
        if fill is not None:
            self._feed(fill, ChunkComputed(chunk=chunk), now)

    def stop(self, key: str, reason: str) -> None:
        """The request is over; a blob that is being decoded still keeps its pages pinned until it is done."""
        fill = self._fills.pop(key, None)
        if fill is not None:
            fill.machine.done = True
            self._close(fill, reason)

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive()

    @property
    def num_fills(self) -> int:
        return len(self._fills)

    # -- the rest -------------------------------------------------------------------------------------------------

    def check_integrity(self) -> None:
        """No transfer without a fill; estimators share with nobody when idle."""
        self._client.check_integrity()
        assert set(self._by_transfer) == {f.transfer_id for f in self._fills.values() if f.transfer_id is not None}
        assert sum(link.sharing for link in self._links.values()) == len(self._by_transfer)

    def shutdown(self) -> None:
        self._jobs.put(None)
        self._client.shutdown()
        self._thread.join(timeout=10)

    def _link(self, endpoint: str) -> LinkEstimator:
        """What is known of the link. Workers that restart leave endpoints behind: the oldest idle one is forgotten."""
        if endpoint not in self._links and len(self._links) >= MAX_KNOWN_LINKS:
            idle = next((other for other, link in self._links.items() if link.sharing == 0), None)
            self._links.pop(idle or "", None)
        return self._links.setdefault(endpoint, LinkEstimator())

    def _close(self, fill: Fill, reason: str) -> None:
        if fill.transfer_id is not None:
            self._client.close(fill.transfer_id, reason)
            del self._by_transfer[fill.transfer_id]
            fill.transfer_id = None
            fill.machine.link.sharing -= 1

    def _feed(self, fill: Fill, event: Event | None, now: float) -> None:
        """Tell the machine what happened (None: that it starts) and carry out what it wants."""
        try:
            commands = fill.machine.start(now) if event is None else fill.machine.handle(event, now)
            self._carry_out(fill, commands, now)
        except Exception:
            # A bug of ours. Left alone, this fill would wait for ever; the others and the thread go on.
            log.exception("%s: %s could not be handled", fill.key, type(event).__name__)
            fill.machine.done = True
            if self._fills.get(fill.key) is fill:
                message = "The decode worker failed while loading the prompt's KV; see its log."
                self._carry_out(fill, [Fail(code="internal_error", message=message)], now)
        if fill.machine.lost_source:
            self._close(fill, "the source was given up")

    def _carry_out(self, fill: Fill, commands: list[Command], now: float) -> None:
        size = fill.machine.spec.chunk_tokens
        for command in commands:
            match command:
                case Ask() | Withdraw():
                    self._tell_source(fill, command)
                case Decode():
                    self._owner.pin(fill.key)
                    self._jobs.put((fill, command))
                case Compute():
                    start = command.chunk * size
                    self._owner.compute_chunk(fill.key, command.chunk, start, start + size)
                case Ready():
                    del self._fills[fill.key]
                    self._close(fill, "complete")
                    self._owner.fill_ready(fill.key, now)
                case Fail():
                    del self._fills[fill.key]
                    self._close(fill, command.message)
                    self._owner.fill_failed(fill.key, command.code, command.message)

    def _tell_source(self, fill: Fill, command: Ask | Withdraw) -> None:
        if fill.transfer_id is None:
            return  # it could not even be opened; the machine is told next
        try:
            if isinstance(command, Ask):
                self._client.request(fill.transfer_id, command.chunk, command.level)
            else:
                self._client.withdraw(fill.transfer_id, command.chunk)
        except TransportError as error:
            log.debug("%s: %s; TransferLost is on its way", fill.key, error)

    def _on_event(self, event: wire.TransferEvent) -> None:
        """In the client's thread."""
        with self._lock:
            fill = self._by_transfer.get(event.transfer_id)
            if fill is None:
                return  # closed while the event was on its way
            translated = self._translate(fill, event)
            if translated is not None:
                self._feed(fill, translated, time.monotonic())

    def _translate(self, fill: Fill, event: wire.TransferEvent) -> Event | None:
        match event:
            case wire.Opened():
                fill.opened_at = event.at
                sizes = _stored_sizes(event.body, fill.machine.spec.num_chunks)
                return (
                    SourceLost(reason="its answer does not fit the prompt")
                    if sizes is None
                    else Opened(stored_bytes=sizes)
                )
            case wire.PartArrived():
                self.counters["kv_received_bytes_total"] += event.part_bytes
                return PartArrived(
                    chunk=event.chunk,
                    level=event.level,
                    received_bytes=event.bytes_received,
                    total_bytes=event.total_bytes,
                    part_bytes=event.part_bytes,
                    wire_s=event.wire_s,
                )
            case wire.BlobArrived():
                return BlobArrived(chunk=event.chunk, level=event.level, blob=event.blob)
            case wire.ChunkFailed() | wire.Refused() | wire.TransferLost():
                self.counters["kv_lost_transfers_total"] += 1
                return SourceLost(reason=event.reason)
            case wire.TransferSuspect() | wire.TransferRecovered():
                return Tick()  # silence is seen by the link estimator

    def _decode_loop(self) -> None:
        last_tick = time.monotonic()
        while True:
            job: tuple[Fill, Decode] | str | None
            try:
                job = self._jobs.get(timeout=TICK_S)
            except queue.Empty:
                job = "none"
            if job is None:
                return
            if isinstance(job, tuple):
                self._decode(*job)
            now = time.monotonic()
            if now - last_tick >= TICK_S:
                last_tick = now
                with self._lock:
                    for fill in list(self._fills.values()):
                        self._feed(fill, Tick(), now)

    def _decode(self, fill: Fill, command: Decode) -> None:
        size = fill.machine.spec.chunk_tokens
        start = command.chunk * size
        begin = time.monotonic()
        event: Event
        try:
            if not fill.machine.done:
                info = inspect_blob(command.blob)
                if (info.level, info.num_tokens) != (command.level, size):
                    found = f"{info.num_tokens} tokens at level {info.level!r}"
                    raise MalformedBlob(f"expected {size} tokens at level {command.level!r}, found {found}")
                self._runtime.decode_into_pages(command.blob, fill.block_table, start=start, stop=start + size)
            now = time.monotonic()
            event = BlobDecoded(chunk=command.chunk, seconds=now - begin)
        except BlobError as error:
            now = time.monotonic()
            self.counters["kv_bad_blobs_total"] += 1
            event = BlobRejected(chunk=command.chunk, reason=f"{type(error).__name__}: {error}")
        except Exception as error:
            log.exception("%s: chunk %d could not be decoded", fill.key, command.chunk)
            now = time.monotonic()
            event = BlobRejected(chunk=command.chunk, reason=f"{type(error).__name__}: {error}")
        with self._lock:
            self._feed(fill, event, now)
            self._owner.unpin(fill.key)


def _stored_sizes(body: dict[str, Any], num_chunks: int) -> tuple[dict[str, int] | None, ...] | None:
    """The source's list of what it has of each chunk, or None if it makes no sense."""
    stored = body.get("stored")
    if not isinstance(stored, list) or len(stored) != num_chunks:
        return None
    for sizes in stored:
        if sizes is not None and not (
            isinstance(sizes, dict)
            and all(isinstance(level, str) and type(size) is int and size > 0 for level, size in sizes.items())
        ):
            return None
    return tuple(stored)
