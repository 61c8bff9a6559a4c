"""The prefill worker alone, asked over a real socket: which level of what, in which order, and how it is refined."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from prefill_receiver import CHUNK, LATEST_S, prompt, serving, transfer_of, wait_until

from codec.chunk import refine_chunk
from codec.errors import WrongRefinement
from prefill.chunks import refinement_name
from prefill.store import MASTER_LEVEL
from prefill.worker import PrefillWorker
from transport.events import BacklogLow, BlobArrived, ChunkFailed, Opened


def test_a_chunk_is_encoded_only_when_the_one_before_is_on_its_way() -> None:
    """Until then its level can be amended."""
    with serving() as receiver:
        worker, tokens = receiver.worker, prompt(2 * CHUNK + 1, seed=21)
        receiver.blobs(receiver.opened(tokens)[0], 0, 1)
        transfer_id, _ = receiver.opened(tokens)
        transfer = transfer_of(worker, transfer_id)
        transfer.unsent_priority = 0  # as if a blob were queued
        receiver.client.request(transfer_id, 0, "q1", priority=5)
        wait_until(worker, lambda: transfer.ready)
        receiver.client.request(transfer_id, 0, MASTER_LEVEL, priority=5)
        wait_until(worker, lambda: transfer.ready[0].level == MASTER_LEVEL)
        worker._on_event(BacklogLow(transfer_id=transfer_id, at=0.0))
        event = receiver.next(transfer_id)
        assert isinstance(event, BlobArrived) and event.level == MASTER_LEVEL, event


def test_the_most_urgent_chunk_of_all_transfers_is_encoded_first(monkeypatch: pytest.MonkeyPatch) -> None:
    with serving() as receiver:
        worker, gate, stuck = receiver.worker, threading.Event(), threading.Event()
        tokens = prompt(4 * CHUNK + 1, seed=30)
        receiver.blobs(receiver.opened(tokens)[0], *range(4))
        assert worker.wait_until_idle(LATEST_S)
        blob, order = worker._levels.blob, []

        def slow_blob(key: bytes, name: str, **options: Any) -> bytes | None:
            order.append(worker_keys.index(key))
            stuck.set()
            assert gate.wait(LATEST_S)
            return blob(key, name, **options)

        monkeypatch.setattr(worker._levels, "blob", slow_blob)
        transfers = [receiver.opened(tokens)[0] for _ in range(4)]
        worker_keys = transfer_of(worker, transfers[0]).request.keys
        receiver.client.request(transfers[0], 0, "q3", priority=9)
        assert stuck.wait(LATEST_S)
        for transfer_id, chunk, priority in ((1, 1, 7), (2, 2, 3), (3, 3, 5)):
            receiver.client.request(transfers[transfer_id], chunk, "q3", priority=priority)
        receiver.client.request(transfers[1], 1, "q3", priority=1)  # amended
        receiver.client.request(transfers[2], 2, "q3", priority=6)
        asks = [transfer_of(worker, transfer_id).ready for transfer_id in transfers[1:]]
        wait_until(worker, lambda: [ask.priority for ready in asks for ask in ready.values()] == [1, 6, 5])
        gate.set()
        for transfer_id in transfers:
            assert isinstance(receiver.next(transfer_id), BlobArrived)
        assert order == [0, 1, 3, 2]


def decoded(worker: PrefillWorker, blob: bytes, chunk: int) -> list[bytes]:
    kv = worker._runtime.decode(blob, start=chunk * CHUNK, stop=(chunk + 1) * CHUNK)
    return [x.view(torch.uint8).numpy().tobytes() for x in kv]


def test_a_chunk_sent_fresh_is_refined_from_the_store() -> None:
    with serving() as receiver:
        worker, tokens = receiver.worker, prompt(3 * CHUNK + 1, seed=31)
        transfer_id = receiver.opened(tokens)[0]
        coarse = receiver.blobs(transfer_id, *range(3), level="q3")
        assert worker.wait_until_idle(LATEST_S)
        encoded = worker.stats()["prefill_encoded_chunks_total"]
        middle = receiver.blobs(transfer_id, *range(3), level=refinement_name("q3", "q2"))
        rest = receiver.blobs(transfer_id, *range(3), level=refinement_name("q2", "q1"))
        at_once = receiver.blobs(transfer_id, *range(3), level=refinement_name("q3", "q1"))
        assert worker.stats()["prefill_encoded_chunks_total"] == encoded
        direct = receiver.blobs(receiver.opened(tokens)[0], *range(3), level="q1")
        for chunk in range(3):
            in_steps = refine_chunk(refine_chunk(coarse[chunk], middle[chunk]), rest[chunk])
            assert in_steps == refine_chunk(coarse[chunk], at_once[chunk]) == direct[chunk]
            with pytest.raises(WrongRefinement):
                refine_chunk(coarse[chunk], rest[chunk])
            with pytest.raises(WrongRefinement):
                refine_chunk(coarse[chunk], at_once[(chunk + 1) % 3])


def test_a_refinement_of_what_is_not_stored_fails_and_computes_nothing() -> None:
    with serving() as receiver:
        transfer_id = receiver.opened(prompt(2 * CHUNK + 1, seed=32))[0]
        receiver.client.request(transfer_id, 0, "q3>q1")
        event = receiver.next(transfer_id)
        assert isinstance(event, ChunkFailed) and "refinement" in event.reason
        assert receiver.worker.stats()["prefill_computed_tokens_total"] == 0
        assert len(receiver.blobs(transfer_id, 0, level="q3")) == 1


def test_stored_only_computes_nothing_and_goes_on() -> None:
    with serving() as receiver:
        worker, tokens = receiver.worker, prompt(4 * CHUNK + 1, seed=33)
        receiver.blobs(receiver.opened(tokens[: 2 * CHUNK + 1])[0], 0, 1)
        assert worker.wait_until_idle(LATEST_S)
        transfer_id = receiver.open(tokens, stored_only=True)
        event = receiver.next(transfer_id)
        assert (
            isinstance(event, Opened) and [sizes is None for sizes in event.body["stored"]] == [False] * 2 + [True] * 2
        )
        for chunk in (2, 3):
            receiver.client.request(transfer_id, chunk, "q2")
            event = receiver.next(transfer_id)
            assert isinstance(event, ChunkFailed) and "stored chunks only" in event.reason
        assert len(receiver.blobs(transfer_id, 0, level="q2")) == 1
        worker.store.drop(transfer_of(worker, transfer_id).request.keys[1])
        receiver.client.request(transfer_id, 1, "q2")
        assert isinstance(receiver.next(transfer_id), ChunkFailed)
        assert len(receiver.blobs(transfer_id, 0, level=MASTER_LEVEL)) == 1
        assert worker.stats()["prefill_computed_tokens_total"] == 2 * CHUNK


def test_exact_after_lossy_is_exact() -> None:
    """A strict floor never gets what was stored for, or sent to, someone who was content with less."""
    with serving() as first, serving() as other:
        tokens = prompt(3 * CHUNK + 1, seed=34)
        first.blobs(first.opened(tokens)[0], *range(3), level="q3")  # fresh
        assert first.worker.wait_until_idle(LATEST_S)
        first.blobs(first.opened(tokens)[0], *range(3), level="q2")  # from the store
        expected = other.blobs(other.opened(tokens)[0], *range(3), level="raw")
        for level in (MASTER_LEVEL, "raw"):
            exact = first.blobs(first.opened(tokens)[0], *range(3), level=level)
            for chunk, blob in exact.items():
                assert decoded(first.worker, blob, chunk) == decoded(other.worker, expected[chunk], chunk)
        # And what is computed behind a chunk that was sent lossy stands on the exact one.
        longer = [*tokens, *prompt(2 * CHUNK, seed=35)]
        mine, theirs = (one.blobs(one.opened(longer)[0], 3, 4, level=MASTER_LEVEL) for one in (first, other))
        assert mine == theirs


def test_an_open_tells_how_long_levels_take_here_once_it_was_measured() -> None:
    with serving() as receiver:

        def encode_s(**body: Any) -> dict[str, float]:
            event = receiver.next(receiver.open(tokens, **body))
            assert isinstance(event, Opened)
            return event.body["encode_s"]

        tokens = prompt(2 * CHUNK + 1, seed=36)
        assert encode_s() == {}
        receiver.blobs(receiver.opened(tokens)[0], 0, 1, level="q3")
        receiver.blobs(receiver.opened(tokens)[0], 0, level="q3>q2")
        found = encode_s()
        assert set(found) == {"q3", "q2"} and all(0 < seconds < LATEST_S for seconds in found.values())
        assert encode_s(chunk_tokens=2 * CHUNK) == pytest.approx({level: 2 * s for level, s in found.items()})
