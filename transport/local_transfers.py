"""Transfers within one process: a receiver and a source that need no socket between them. Nothing is copied.

Both sides see what KVClient and KVServer would show them: the same calls, the same events, in the same order. Events
are delivered by one thread that holds no lock, so that either side may call from under a lock of its own.

What ZeroMQ's window does for memory is done by counting: while the receiver has MAX_IN_HAND blobs that it has not
used, the source is told nothing of a low backlog and so makes no more.
"""

from __future__ import annotations

import itertools
import logging
import queue
import secrets
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from transport import events as ev
from transport.errors import TransportClosed
from transport.sockets import guarded

log = logging.getLogger("kvstream.transport")

MAX_IN_HAND = 4
# There is no wire. Blobs count as brought at about the speed of memory: how long a thread takes to wake up would say
# nothing of the next one.
LOCAL_BPS = 80e9


@dataclass(slots=True, kw_only=True, eq=False)
class _Transfer:
    """standing: level and priority by chunk, of what was asked for and not taken. num_sent: blobs on their way to the
    receiver; num_in_hand: those that it has."""

    body: dict[str, Any]
    on_event: Callable[[object], None]
    is_accepted: bool = False
    standing: dict[int, tuple[str, int]] = field(default_factory=dict)
    num_sent: int = 0
    num_in_hand: int = 0
    num_bytes: int = 0  # brought so far

    @property
    def is_full(self) -> bool:
        return self.num_sent + self.num_in_hand >= MAX_IN_HAND


class LocalTransfers:
    """on_event: the source's, for SourceEvents."""

    def __init__(self, on_event: Callable[[ev.SourceEvent], None]) -> None:
        self._on_source = guarded(on_event, log.error)  # type: ignore[arg-type]
        self._lock = threading.Lock()
        self._transfers: dict[str, _Transfer] = {}
        self._ids, self._prefix = itertools.count(1), f"local-{secrets.token_hex(8)}"
        self._events: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._closed = False

    def __contains__(self, transfer_id: str) -> bool:
        """Whether such an id is one of a transfer here, open or ended."""
        return transfer_id.startswith(self._prefix)

    # -- the receiver's calls -------------------------------------------------------------------------------------

    def open(self, body: dict[str, Any], on_event: Callable[[ev.TransferEvent], None]) -> str:
        """As KVClient.open. Raises TransportClosed."""
        with self._lock:
            if self._closed:
                raise TransportClosed("the source was shut down")
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="kv-local", daemon=True)
                self._thread.start()
            transfer_id = f"{self._prefix}.{next(self._ids)}"
            guarded_event = guarded(on_event, log.error)  # type: ignore[arg-type]
            self._transfers[transfer_id] = _Transfer(body=body, on_event=guarded_event)
            self._tell_source(
                ev.TransferOpened(transfer_id=transfer_id, at=time.monotonic(), peer=self._prefix, body=body)
            )
            return transfer_id

    def request(self, transfer_id: str, chunk: int, level: str, *, priority: int = 0) -> None:
        with self._lock:
            transfer = self._transfers.get(transfer_id)
            if transfer is not None:
                transfer.standing[chunk] = level, priority
                if transfer.is_accepted:
                    self._tell_requested(transfer_id, chunk, level, priority)

    def withdraw(self, transfer_id: str, chunk: int) -> None:
        with self._lock:
            transfer = self._transfers.get(transfer_id)
            if transfer is not None:
                transfer.standing.pop(chunk, None)

    def set_in_hand(self, transfer_id: str, num_blobs: int) -> None:
        """How many blobs of it the receiver has and has not used. To be said within its BlobArrived too."""
        with self._lock:
            transfer = self._transfers.get(transfer_id)
            if transfer is not None and transfer.num_in_hand != num_blobs:
                was_full, transfer.num_in_hand = transfer.is_full, num_blobs
                if was_full and not transfer.is_full:
                    self._tell_source(ev.BacklogLow(transfer_id=transfer_id, at=time.monotonic()))

    def close(self, transfer_id: str, reason: str = "closed by the receiver") -> None:
        """No event of it follows, save one that is being delivered now. Twice is fine."""
        with self._lock:
            if self._transfers.pop(transfer_id, None) is not None:
                self._tell_source(ev.TransferClosed(transfer_id=transfer_id, at=time.monotonic(), reason=reason))

    # -- the source's calls; a transfer that has ended meanwhile is no error ----------------------------------------

    def accept(self, transfer_id: str, body: dict[str, Any] | None = None) -> None:
        with self._lock:
            transfer = self._transfers.get(transfer_id)
            if transfer is None:
                return
            transfer.is_accepted = True
            self._tell_sink(transfer_id, ev.Opened(transfer_id=transfer_id, at=time.monotonic(), body=body or {}))
            for chunk, (level, priority) in transfer.standing.items():
                self._tell_requested(transfer_id, chunk, level, priority)

    def refuse(self, transfer_id: str, reason: str) -> None:
        with self._lock:
            self._tell_sink(transfer_id, ev.Refused(transfer_id=transfer_id, at=time.monotonic(), reason=reason))

    def take(self, transfer_id: str, chunk: int) -> str | None:
        """The level to make this chunk at, now. None: withdrawn, closed or taken."""
        with self._lock:
            transfer = self._transfers.get(transfer_id)
            return None if transfer is None else transfer.standing.pop(chunk, (None, 0))[0]

    def supply(self, transfer_id: str, chunk: int, level: str, blob: bytes) -> None:
        """The blob itself goes to the receiver: do not change it afterwards."""
        with self._lock:
            transfer = self._transfers.get(transfer_id)
            if transfer is not None:
                transfer.num_sent += 1
                begin = time.monotonic()
                self._events.put(lambda: self._deliver_blob(transfer_id, chunk, level, blob, begin))

    def fail(self, transfer_id: str, chunk: int, reason: str) -> None:
        with self._lock:
            transfer = self._transfers.get(transfer_id)
            if transfer is not None:
                transfer.standing.pop(chunk, None)
                failed = ev.ChunkFailed(transfer_id=transfer_id, at=time.monotonic(), chunk=chunk, reason=reason)
                self._tell_sink(transfer_id, failed)

    def backlog_bytes(self, transfer_id: str) -> int:
        """0 while the receiver can take more; else as much as one blob of it has, about."""
        with self._lock:
            transfer = self._transfers.get(transfer_id)
            return 1 if transfer is not None and transfer.is_full else 0

    def shutdown(self, reason: str = "the source shut down") -> None:
        """TransferLost comes for what is open, and nothing after it. Returns when the thread has ended."""
        with self._lock:
            self._closed, thread = True, self._thread
            for transfer_id in self._transfers:
                self._tell_sink(
                    transfer_id, ev.TransferLost(transfer_id=transfer_id, at=time.monotonic(), reason=reason)
                )
            self._events.put(None)
        if thread is not None and threading.current_thread() is not thread:
            thread.join(timeout=5)

    # -- the thread -----------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while (deliver := self._events.get()) is not None:
            deliver()

    def _tell_source(self, event: ev.SourceEvent) -> None:
        self._events.put(lambda: self._on_source(event))

    def _tell_requested(self, transfer_id: str, chunk: int, level: str, priority: int) -> None:
        requested = ev.ChunkRequested(
            transfer_id=transfer_id, at=time.monotonic(), chunk=chunk, level=level, priority=priority
        )
        self._tell_source(requested)

    def _tell_sink(self, transfer_id: str, event: ev.TransferEvent) -> None:
        self._events.put(lambda: self._deliver(transfer_id, event))

    def _deliver(self, transfer_id: str, event: ev.TransferEvent) -> None:
        with self._lock:
            is_end = isinstance(event, ev.Refused | ev.TransferLost)
            transfer = self._transfers.pop(transfer_id, None) if is_end else self._transfers.get(transfer_id)
        if transfer is not None:
            transfer.on_event(event)

    def _deliver_blob(self, transfer_id: str, chunk: int, level: str, blob: bytes, begin: float) -> None:
        with self._lock:
            transfer = self._transfers.get(transfer_id)
            if transfer is None:
                return
            was_full = transfer.is_full
            transfer.num_sent -= 1  # from here on the receiver says whether it has it
            transfer.num_bytes += len(blob)
            num_bytes = transfer.num_bytes
        at, wire_s = time.monotonic(), len(blob) * 8 / LOCAL_BPS
        transfer.on_event(
            ev.PartArrived(
                transfer_id=transfer_id, at=at, chunk=chunk, level=level, bytes_received=len(blob),
                total_bytes=len(blob), part_bytes=len(blob), wire_s=wire_s, link_bytes=num_bytes,
            )
        )  # fmt: skip
        transfer.on_event(
            ev.BlobArrived(
                transfer_id=transfer_id, at=at, chunk=chunk, level=level, blob=memoryview(blob), started_at=begin,
                wire_s=wire_s, sharing=1,
            )
        )  # fmt: skip
        with self._lock:
            if was_full and not transfer.is_full and transfer_id in self._transfers:
                self._tell_source(ev.BacklogLow(transfer_id=transfer_id, at=time.monotonic()))
