"""KV that another worker has computed already, fetched losslessly for a prompt that is continued here.

A prefill worker that is asked for the new part of a conversation needs the KV of all that came before. The receiver
says who has it (decode workers keep what they computed). Chunks are asked for in order, a few ahead, and computed
instead as soon as one takes longer than computing it would.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from typing import Any

from prefill.open_request import Holder, OpenRequest
from prefill.runtime import ModelRuntime
from prefill.store import MASTER_LEVEL
from transport.curve import CurveKeys
from transport.errors import TransportError
from transport.events import BlobArrived, ChunkFailed, Opened, Refused, TransferEvent, TransferLost
from transport.kv_client import KVClient

log = logging.getLogger("kvstream.prefill")

ASKED_AHEAD = 4


class Fetch:
    """Chunks of one prompt from one peer. Closed by whoever began it."""

    def __init__(self, client: KVClient, lock: threading.Condition, transfer_id: str, wanted: Sequence[int]) -> None:
        self.transfer_id = transfer_id
        self.stored: Sequence[Any] | None = None  # what the peer has, once it has answered
        self.blobs: dict[int, bytes] = {}
        self.failed: set[int] = set()
        self.is_over = False
        self._client, self._lock = client, lock
        self._wanted = list(wanted)

    def take(self, chunk: int, timeout_s: float) -> bytes | None:
        """The lossless blob of a wanted chunk; None if it does not come in time, or at all: then nothing more is worth
        waiting for."""
        with self._lock:
            self._ask()
            self._lock.wait_for(lambda: self.is_over or chunk in self.blobs or chunk in self.failed, timeout_s)
            blob = self.blobs.pop(chunk, None)
            if chunk in self._wanted:
                self._wanted.remove(chunk)
            if blob is not None:
                self._ask()
            return blob

    def answered(self, stored: Sequence[Any]) -> None:
        """With the lock held, as all below."""
        self.stored = stored
        self.failed.update(chunk for chunk in self._wanted if chunk >= len(stored) or stored[chunk] is None)
        self._ask()

    def _ask(self) -> None:
        if self.stored is None or self.is_over:
            return
        for chunk in [chunk for chunk in self._wanted if chunk not in self.failed][:ASKED_AHEAD]:
            if chunk not in self.blobs:
                try:
                    # Asking again for what is on its way changes nothing.
                    self._client.request(self.transfer_id, chunk, MASTER_LEVEL, priority=chunk)
                except TransportError as error:
                    log.debug("%s; TransferLost is on its way", error)
                    self.is_over = True
                    return


class PeerChunks:
    """One per prefill worker."""

    def __init__(self, runtime: ModelRuntime, *, worker_id: str, curve: CurveKeys | None = None) -> None:
        self._lock = threading.Condition()
        self._fetches: dict[str, Fetch] = {}
        self._client = KVClient(
            greeting=runtime.greeting(), on_event=self._on_event, incarnation=worker_id, curve=curve
        )

    def begin(self, request: OpenRequest, holder: Holder, wanted: Sequence[int]) -> Fetch | None:
        """Ask a peer for exact KV of these chunks; None if it cannot be asked."""
        body = {
            "token_ids": request.token_ids,
            "chunk_tokens": request.chunk_tokens,
            "cache_salt": request.cache_salt,
            "stored_only": True,
        }
        with self._lock:
            try:
                transfer_id = self._client.open(holder.endpoint, body, server_public_key=holder.public_key)
            except TransportError as error:
                log.warning("%s cannot be asked for KV: %s", holder.endpoint, error)
                return None
            fetch = self._fetches[transfer_id] = Fetch(self._client, self._lock, transfer_id, wanted)
            return fetch

    def close(self, fetch: Fetch) -> None:
        with self._lock:
            fetch.is_over = True
            self._fetches.pop(fetch.transfer_id, None)
        self._client.close(fetch.transfer_id, "no more is needed")

    def shutdown(self) -> None:
        self._client.shutdown()

    def check_integrity(self) -> None:
        """When nothing is computed: no fetch is open."""
        self._client.check_integrity()
        with self._lock:
            assert not self._fetches, f"{len(self._fetches)} fetches left open"

    def _on_event(self, event: TransferEvent) -> None:
        with self._lock:
            fetch = self._fetches.get(event.transfer_id)
            if fetch is None:
                return
            match event:
                case Opened():
                    stored = event.body.get("stored")
                    fetch.answered(stored if isinstance(stored, list) else [])
                case BlobArrived():
                    fetch.blobs[event.chunk] = bytes(event.blob)
                case ChunkFailed():
                    fetch.failed.add(event.chunk)
                case Refused() | TransferLost():
                    log.warning("KV of a peer is lost: %s", event.reason)
                    fetch.is_over = True
            self._lock.notify_all()
