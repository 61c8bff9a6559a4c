"""The prefill worker alone, asked over a real socket: what goes wrong with one prompt leaves the others alone."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from pair import make_runtime
from prefill_receiver import CHUNK, LATEST_S, Receiver, prompt, serving, transfer_of, wait_until

from codec.errors import UnencodableTensor
from prefill.engine import Engine
from prefill.runtime import ModelRuntime
from prefill.store import MASTER_LEVEL, ChunkStore
from prefill.worker import PrefillWorker
from transport.errors import BindFailed
from transport.events import BlobArrived, ChunkFailed, Opened, Refused, TransferLost
from transport.shaper import Shaper


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
            assert worker._lock.wait_for(
                lambda: len(worker._fresh) == 6 and not worker._transfers.num_prefills, LATEST_S
            )
        longer = receiver.opened([*tokens, *prompt(2 * CHUNK, seed=3)])[0]
        receiver.client.request(longer, 7, MASTER_LEVEL)
        wait_until(worker, lambda: len(worker._fresh) == 8)
        gate.set()
        for transfer_id, chunk in ((first, 0), (second, 5), (longer, 7)):
            event = receiver.next(transfer_id)
            assert isinstance(event, BlobArrived) and event.chunk == chunk, event
        assert worker.wait_until_idle(LATEST_S)
        assert worker.stats()["prefill_computed_tokens_total"] == 8 * CHUNK


def in_store(worker: PrefillWorker) -> int:
    return worker.store.stats().num_chunks


SMALL_STORE = 100_000  # two chunks of this model


def test_a_chunk_that_was_evicted_is_computed_again() -> None:
    with serving(store=ChunkStore(SMALL_STORE)) as receiver:
        tokens = prompt(8 * CHUNK + 1, seed=4)
        transfer_id, _ = receiver.opened(tokens)
        first = receiver.blobs(transfer_id, 7)
        assert receiver.worker.wait_until_idle(LATEST_S)
        assert in_store(receiver.worker) == 2
        again = receiver.blobs(receiver.opened(tokens)[0], *range(8))
        assert len(again) == 8 and again[7] == first[7]


def test_a_chunk_asked_for_after_the_computation_has_passed_and_lost_it(monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(store=ChunkStore(SMALL_STORE)) as receiver:
        worker, gate = receiver.worker, threading.Event()
        forward = Engine.forward

        def slow_forward(engine: Engine, slices: Any) -> Any:
            if slices[0].start == 6 * CHUNK:
                assert gate.wait(LATEST_S)
            return forward(engine, slices)

        monkeypatch.setattr(Engine, "forward", slow_forward)
        transfer_id, _ = receiver.opened(prompt(8 * CHUNK + 1, seed=5))
        receiver.client.request(transfer_id, 7, MASTER_LEVEL)
        wait_until(worker, lambda: not worker._fresh and worker._levels.num_encoded == 6)
        # A prompt too long for the store leaves its beginning there, so 4 is one that it has lost.
        receiver.client.request(transfer_id, 4, MASTER_LEVEL)
        deadline = time.monotonic() + LATEST_S
        while 4 not in transfer_of(worker, transfer_id).waiting and time.monotonic() < deadline:
            time.sleep(0.005)
        gate.set()
        events = [receiver.next(transfer_id) for _ in range(2)]
        assert {event.chunk for event in events if isinstance(event, BlobArrived)} == {4, 7}


def test_a_chunk_evicted_between_the_request_and_its_encoding_is_computed_again(monkeypatch) -> None:
    with serving(store=ChunkStore(SMALL_STORE)) as receiver:
        worker, gate, stuck = receiver.worker, threading.Event(), threading.Event()
        old = receiver.opened(prompt(2 * CHUNK + 1, seed=6))[0]
        receiver.blobs(old, 0, 1)
        assert worker.wait_until_idle(LATEST_S) and in_store(worker) == 2
        encode = ModelRuntime.encode

        def slow_encode(*args: Any, level: str, **options: Any) -> bytes:
            if level == MASTER_LEVEL:
                stuck.set()
                assert gate.wait(LATEST_S)
            return encode(*args, level=level, **options)

        monkeypatch.setattr(ModelRuntime, "encode", slow_encode)
        new = receiver.opened(prompt(2 * CHUNK + 1, seed=7))[0]
        receiver.client.request(new, 0, MASTER_LEVEL)
        assert stuck.wait(LATEST_S)
        receiver.client.request(old, 0, "q1")
        wait_until(worker, lambda: transfer_of(worker, old).ready)
        # The store now looks as it does when another prompt's chunks have taken the room.
        worker.store.drop(transfer_of(worker, old).request.keys[0])
        gate.set()
        event = receiver.next(old)
        assert isinstance(event, BlobArrived) and event.level == "q1", event


def test_a_prompt_that_cannot_be_encoded_harms_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    with serving() as receiver:
        encode = ModelRuntime.encode

        def failing_encode(runtime: ModelRuntime, k: Any, v: Any, *, start: int, level: str) -> bytes:
            if start == 0:
                raise UnencodableTensor("the keys hold NaN")
            return encode(runtime, k, v, start=start, level=level)

        monkeypatch.setattr(ModelRuntime, "encode", failing_encode)
        transfer_id, _ = receiver.opened(prompt(2 * CHUNK + 1, seed=8))
        receiver.client.request(transfer_id, 0, "q1")
        event = receiver.next(transfer_id)
        assert isinstance(event, ChunkFailed) and "NaN" in event.reason
        assert receiver.worker.wait_until_idle(LATEST_S)
        assert len(receiver.blobs(transfer_id, 1)) == 1
        assert receiver.worker.is_alive


def test_a_prompt_that_the_model_fails_on_harms_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    with serving() as receiver:
        forward, bad = Engine.forward, prompt(2 * CHUNK + 1, seed=9)

        def failing_forward(engine: Engine, slices: Any) -> Any:
            if list(slices[0].token_ids) == bad[CHUNK : 2 * CHUNK]:
                raise RuntimeError("out of memory")
            return forward(engine, slices)

        monkeypatch.setattr(Engine, "forward", failing_forward)
        transfer_id, _ = receiver.opened(bad)
        receiver.client.request(transfer_id, 1, MASTER_LEVEL)
        event = receiver.next(transfer_id)
        assert isinstance(event, ChunkFailed) and "could not be computed" in event.reason
        assert len(receiver.blobs(transfer_id, 0)) == 1  # it was done before, and the transfer goes on
        assert len(receiver.blobs(receiver.opened(prompt(2 * CHUNK + 1, seed=10))[0], 0, 1)) == 2
        assert receiver.worker.is_alive


def test_a_pool_smaller_than_the_prompt_fails_what_is_not_stored_with_the_reason() -> None:
    with serving(num_blocks=4) as receiver:
        tokens = prompt(4 * CHUNK + 1, seed=11)
        receiver.blobs(receiver.opened(tokens[: 2 * CHUNK + 1])[0], 0, 1)
        transfer_id, _ = receiver.opened(tokens)
        for chunk in (2, 3, 2):  # asking again changes nothing
            receiver.client.request(transfer_id, chunk, MASTER_LEVEL)
            event = receiver.next(transfer_id)
            assert isinstance(event, ChunkFailed) and "8 KV blocks" in event.reason and "4" in event.reason
        assert len(receiver.blobs(transfer_id, 0, 1)) == 2
        assert len(receiver.blobs(receiver.opened(prompt(2 * CHUNK + 1, seed=12))[0], 0, 1)) == 2


@pytest.mark.parametrize(
    "body",
    [
        {"token_ids": []},
        {"token_ids": "abc"},
        {"token_ids": [1, 2, 512]},
        {"token_ids": [1, 2, -1]},
        {"token_ids": [1, True]},
        {"token_ids": [5] * 5000},
        {"chunk_tokens": 8},
        {"chunk_tokens": 24},
        {"chunk_tokens": "32"},
        {"cache_salt": 7},
        {"stored_only": 1},
        {"stored_only": None},
        {"stored_only": "yes"},
    ],
)
def test_what_is_no_prompt_is_refused(lasting: Receiver, body: dict[str, Any]) -> None:
    transfer_id = lasting.open([5] * 100, **body)
    assert isinstance(lasting.next(transfer_id), Refused)


@pytest.fixture(scope="module")
def lasting() -> Iterator[Receiver]:
    with serving() as receiver:
        yield receiver


@pytest.mark.parametrize(
    ("chunk", "level"), [(3, MASTER_LEVEL), (0, "q99"), (0, "q1>q3"), (0, "q1>lossless"), (0, "q3>"), (0, "q9>q1")]
)
def test_a_chunk_or_level_that_is_not_there_fails_alone(lasting: Receiver, chunk: int, level: str) -> None:
    transfer_id, _ = lasting.opened(prompt(3 * CHUNK + 1, seed=13))
    lasting.client.request(transfer_id, chunk, level)
    assert isinstance(lasting.next(transfer_id), ChunkFailed)
    assert len(lasting.blobs(transfer_id, 1)) == 1


def test_a_salt_keeps_tenants_apart(lasting: Receiver) -> None:
    tokens = prompt(2 * CHUNK + 1, seed=14)
    lasting.blobs(lasting.opened(tokens)[0], 0, 1)
    other = lasting.open(tokens, cache_salt="somebody else")
    event = lasting.next(other)
    assert isinstance(event, Opened) and event.body["stored"] == [None, None]


def test_a_prompt_nobody_waits_for_any_more_is_not_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    with serving() as receiver:
        worker, gate = receiver.worker, threading.Event()
        forward = Engine.forward

        def slow_forward(engine: Engine, slices: Any) -> Any:
            assert gate.wait(LATEST_S)
            return forward(engine, slices)

        monkeypatch.setattr(Engine, "forward", slow_forward)
        first = receiver.opened(prompt(CHUNK + 1, seed=15))[0]
        receiver.client.request(first, 0, MASTER_LEVEL)
        others = [receiver.opened(prompt(2 * CHUNK + 1, seed=16 + i))[0] for i in range(3)]
        for transfer_id in others:
            receiver.client.request(transfer_id, 0, MASTER_LEVEL)
        wait_until(worker, lambda: worker._transfers.num_prefills == 3)
        for transfer_id in others:
            receiver.client.close(transfer_id)
        with worker._lock:
            assert worker._lock.wait_for(
                lambda: not worker._transfers.num_prefills, LATEST_S
            )  # they hold no place in the queue
        gate.set()
        assert isinstance(receiver.next(first), BlobArrived)
        assert worker.wait_until_idle(LATEST_S)
        assert worker.stats()["prefill_computed_tokens_total"] == CHUNK


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("loop", ["_compute", "_encode_for"])
def test_a_worker_without_one_of_its_threads_says_so(monkeypatch: pytest.MonkeyPatch, loop: str) -> None:
    class Bug(BaseException):
        pass

    def broken(*_: Any) -> None:
        raise Bug

    monkeypatch.setattr(PrefillWorker, loop, broken)
    worker = PrefillWorker(make_runtime(num_blocks=64))
    receiver = Receiver(worker)
    try:
        assert worker.is_alive
        transfer_id, _ = receiver.opened(prompt(CHUNK + 1, seed=20))
        receiver.client.request(transfer_id, 0, MASTER_LEVEL)
        assert isinstance(receiver.next(transfer_id), TransferLost)
        for thread in worker._threads:
            thread.join(LATEST_S)
            assert not thread.is_alive()
        assert not worker.is_alive
    finally:
        receiver.client.shutdown()
        worker.shutdown()


def test_a_worker_that_cannot_bind_leaves_no_thread_behind() -> None:
    with serving() as receiver:
        before = set(threading.enumerate())
        with pytest.raises(BindFailed):
            PrefillWorker(receiver.worker._runtime, bind=receiver.worker.endpoint)
        assert set(threading.enumerate()) <= before


def test_a_chunk_withdrawn_while_it_is_encoded_does_not_hold_up_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    with serving() as receiver:
        worker, gate, stuck = receiver.worker, threading.Event(), threading.Event()
        transfer_id = receiver.opened(prompt(4 * CHUNK + 1, seed=21))[0]
        receiver.blobs(transfer_id, 3)
        assert worker.wait_until_idle(LATEST_S)
        encode = ModelRuntime.encode

        def slow_encode(*args: Any, **options: Any) -> bytes:
            stuck.set()
            assert gate.wait(LATEST_S)
            return encode(*args, **options)

        monkeypatch.setattr(ModelRuntime, "encode", slow_encode)
        receiver.client.request(transfer_id, 0, "raw")
        assert stuck.wait(LATEST_S)
        receiver.client.request(transfer_id, 1, "raw")
        receiver.client.withdraw(transfer_id, 0)
        time.sleep(0.2)  # for the withdrawal to arrive: nothing shows it at the source
        gate.set()
        event = receiver.next(transfer_id)
        assert isinstance(event, BlobArrived) and event.chunk == 1, event


def test_a_chunk_withdrawn_on_its_way_does_not_hold_up_the_next() -> None:
    """The link takes nothing more of a large chunk; the receiver computes it and waits for the one behind it."""
    with serving() as receiver, Shaper(receiver.worker.endpoint, rate_mbps=1) as shaper:
        worker, tokens = receiver.worker, prompt(2 * 512 + 1, seed=22)
        body = {"token_ids": tokens, "chunk_tokens": 512, "cache_salt": ""}
        transfer_id = receiver.client.open(shaper.endpoint, body)
        assert isinstance(receiver.next(transfer_id), Opened)
        receiver.client.request(transfer_id, 0, "raw")  # takes some 10 s
        wait_until(worker, lambda: worker._counters["sent_chunks_total"] == 1 and not worker._encoding)
        receiver.client.request(transfer_id, 1, "q3")
        wait_until(worker, lambda: transfer_of(worker, transfer_id).ready)
        assert worker.server.backlog_bytes(transfer_id) > 0
        receiver.client.withdraw(transfer_id, 0)
        event = receiver.next(transfer_id)
        assert isinstance(event, BlobArrived) and event.chunk == 1, event
