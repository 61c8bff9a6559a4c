"""A prefill worker around the small random model, and a receiver that asks it over a real socket."""

from __future__ import annotations

import queue
import random
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from pair import make_runtime

from prefill.store import MASTER_LEVEL
from prefill.transfers import Transfer
from prefill.worker import PrefillWorker
from transport.events import BlobArrived, Opened, PartArrived, TransferEvent
from transport.kv_client import KVClient

CHUNK = 32
LATEST_S = 60.0  # no wait in here is longer; a busy machine is ten times slower


def prompt(length: int, seed: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(3, 512) for _ in range(length)]


class Receiver:
    """A KVClient whose events wait in a queue a transfer."""

    def __init__(self, worker: PrefillWorker) -> None:
        self._queues: dict[str, queue.Queue[TransferEvent]] = {}
        self._lock = threading.Lock()
        self.worker = worker
        greeting = worker._runtime.greeting()
        self.client = KVClient(greeting=greeting, on_event=self._on_event, incarnation="test")

    def _queue(self, transfer_id: str) -> queue.Queue[TransferEvent]:
        with self._lock:
            return self._queues.setdefault(transfer_id, queue.Queue())

    def _on_event(self, event: TransferEvent) -> None:
        if not isinstance(event, PartArrived):
            self._queue(event.transfer_id).put(event)

    def next(self, transfer_id: str) -> TransferEvent:
        return self._queue(transfer_id).get(timeout=LATEST_S)

    def open(self, tokens: list[int], **body: Any) -> str:
        body = {"token_ids": tokens, "chunk_tokens": CHUNK, "cache_salt": "", **body}
        return self.client.open(self.worker.endpoint, body)

    def opened(self, tokens: list[int]) -> tuple[str, list[dict[str, int] | None]]:
        transfer_id = self.open(tokens)
        event = self.next(transfer_id)
        assert isinstance(event, Opened), event
        return transfer_id, event.body["stored"]

    def blobs(self, transfer_id: str, *chunks: int, level: str = MASTER_LEVEL) -> dict[int, bytes]:
        for chunk in chunks:
            self.client.request(transfer_id, chunk, level)
        found = {}
        while len(found) < len(chunks):
            event = self.next(transfer_id)
            assert isinstance(event, BlobArrived), event
            found[event.chunk] = bytes(event.blob)
        return found


@contextmanager
def serving(*, num_blocks: int = 256, **options: Any) -> Iterator[Receiver]:
    worker = PrefillWorker(make_runtime(num_blocks=num_blocks), **options)
    receiver = Receiver(worker)
    try:
        yield receiver
        assert worker.wait_until_idle(LATEST_S)
        worker.check_integrity()
    finally:
        receiver.client.shutdown()
        worker.shutdown()


def transfer_of(worker: PrefillWorker, transfer_id: str) -> Transfer:
    transfer = worker._transfers.get(transfer_id)
    assert transfer is not None
    return transfer


def wait_until(worker: PrefillWorker, what: Callable[[], object]) -> None:
    with worker._lock:
        assert worker._lock.wait_for(what, LATEST_S)
