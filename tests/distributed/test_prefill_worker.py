"""The prefill worker alone, asked over a real socket: what goes wrong with one prompt leaves the others alone."""

from __future__ import annotations

import queue
import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from pair import make_runtime

from prefill.runtime import ModelRuntime
from prefill.store import MASTER_LEVEL
from prefill.worker import PrefillWorker
from transport.events import BlobArrived, ChunkFailed, Opened, PartArrived, Refused, TransferEvent, TransferLost
from transport.kv_client import KVClient

CHUNK = 32
LATEST_S = 20.0  # no wait in here is longer


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


def test_one_prompt_asked_for_by_many_at_once_is_computed_once() -> None:
    with serving() as receiver:
        tokens = prompt(12 * CHUNK + 1, seed=1)
        transfers = [receiver.opened(tokens)[0] for _ in range(4)]
        for transfer_id in transfers:
            for chunk in range(12):
                receiver.client.request(transfer_id, chunk, MASTER_LEVEL)
        answers = [receiver.blobs(transfer_id, *range(12)) for transfer_id in transfers]
        assert all(answer == answers[0] for answer in answers)
        assert receiver.worker.stats()["prefill_computed_tokens_total"] == 12 * CHUNK


def test_a_prompt_is_taken_up_while_its_chunks_still_wait_for_the_encoder(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two receivers ask for the same prompt; the second one's turn comes while nothing is in the store yet."""
    with serving() as receiver:
        worker, tokens = receiver.worker, prompt(6 * CHUNK + 1, seed=2)
        gate = threading.Event()
        encode = ModelRuntime.encode

        def slow_encode(*args: Any, **options: Any) -> bytes:
            assert gate.wait(LATEST_S)
            return encode(*args, **options)

        monkeypatch.setattr(ModelRuntime, "encode", slow_encode)
        first, second = receiver.opened(tokens)[0], receiver.opened(tokens)[0]
        receiver.client.request(first, 0, MASTER_LEVEL)
        receiver.client.request(second, 5, MASTER_LEVEL)
        with worker._lock:
            assert worker._lock.wait_for(lambda: len(worker._fresh) == 6 and not worker._prefills, LATEST_S)
        longer = receiver.opened([*tokens, *prompt(2 * CHUNK, seed=3)])[0]
        receiver.client.request(longer, 7, MASTER_LEVEL)
        with worker._lock:
            assert worker._lock.wait_for(lambda: len(worker._fresh) == 8, LATEST_S)
        gate.set()
        for transfer_id, chunk in ((first, 0), (second, 5), (longer, 7)):
            event = receiver.next(transfer_id)
            assert isinstance(event, BlobArrived) and event.chunk == chunk, event
        assert worker.wait_until_idle(LATEST_S)
        assert worker.stats()["prefill_computed_tokens_total"] == 8 * CHUNK
