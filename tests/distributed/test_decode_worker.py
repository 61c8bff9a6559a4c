"""The decode worker when something goes wrong: requests that end in every phase, bugs in one of them, odd sources."""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from pair import Pair, make_runtime, running_pair

import decode.fill_sources
import decode.sampling
from codec.errors import ChecksumMismatch
from decode.puller import KVPuller
from decode.requests import RequestRefused
from decode.slo import SLOPolicy
from decode.worker import DecodeWorker
from prefill.engine import Engine
from prefill.runtime import ModelRuntime
from prefill.worker import PrefillWorker
from transport.errors import BindFailed, TooMuch
from transport.kv_client import KVClient
from transport.stream_client import StreamClient

CHUNK = 32
LATEST_S = 20.0


def prompt(length: int, seed: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(3, 512) for _ in range(length)]


def until(condition: Callable[[], Any]) -> None:
    deadline = time.monotonic() + LATEST_S
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.002)


@pytest.fixture(scope="module")
def lasting() -> Iterator[Pair]:
    with running_pair(chunk_tokens=CHUNK, num_blocks=128) as running:
        yield running


@pytest.fixture
def pair(lasting: Pair) -> Iterator[Pair]:
    yield lasting
    lasting.check()
    assert lasting.decode.is_alive and lasting.prefill.is_alive


async def _submit(pair: Pair, body: dict[str, Any], leave_when: Callable[[], Any] | None) -> list[dict[str, Any]]:
    """All events, or those until `leave_when` holds; leaving cancels."""
    client, events = StreamClient(pair.decode.endpoint), []

    async def read() -> None:
        async for event in stream:
            events.append(event)

    try:
        async with client.submit(body) as stream:
            reader = asyncio.create_task(read())
            deadline = time.monotonic() + LATEST_S
            while not reader.done() and not (leave_when is not None and leave_when()):
                assert time.monotonic() < deadline
                await asyncio.sleep(0.002)
            reader.cancel()
            await asyncio.gather(reader, return_exceptions=True)
    finally:
        await client.close()
    return events


def submit(pair: Pair, body: dict[str, Any], leave_when: Callable[[], Any] | None = None) -> list[dict[str, Any]]:
    return asyncio.run(_submit(pair, body, leave_when))


@pytest.mark.parametrize("phase", ["waiting", "opening", "computing at the source", "decoding", "text", "running"])
def test_cancel_in_every_phase_leaves_nothing_behind(pair: Pair, phase: str, monkeypatch: pytest.MonkeyPatch) -> None:
    gate, reached = threading.Event(), threading.Event()

    def held(original: Callable[..., Any], threads: str) -> Callable[..., Any]:
        def stop_here(*args: Any, **options: Any) -> Any:
            if threading.current_thread().name == threads:
                reached.set()
                assert gate.wait(LATEST_S)
            return original(*args, **options)

        return stop_here

    options: dict[str, Any] = {"kv_mode": "raw", "max_tokens": 8}
    blocker = None
    match phase:
        case "waiting":
            # One request holds nearly all pages while the next one waits for them.
            blocker = threading.Thread(
                target=submit, args=(pair, pair.body(prompt(1900, 1), max_tokens=100), reached.is_set)
            )
            blocker.start()
            until(lambda: pair.decode.stats()["decode_generated_tokens_total"] and pair.decode._scheduler.all())
        case "opening":
            monkeypatch.setattr(PrefillWorker, "_read_open", held(PrefillWorker._read_open, "kv-server"))
        case "computing at the source":
            monkeypatch.setattr(Engine, "forward", held(Engine.forward, "prefill-compute"))
        case "decoding":
            monkeypatch.setattr(ModelRuntime, "decode_into_pages", held(ModelRuntime.decode_into_pages, "kv-decode"))
        case "text":
            options["kv_mode"] = "text"
            monkeypatch.setattr(Engine, "forward", held(Engine.forward, "decode-engine"))
        case "running":
            options["max_tokens"] = 1500
            before = pair.decode.stats()["decode_generated_tokens_total"]

    def at_phase() -> bool:
        if phase == "waiting":
            return bool(pair.decode._scheduler.waiting())
        if phase == "running":
            return pair.decode.stats()["decode_generated_tokens_total"] > before + 3
        return reached.is_set()

    body = pair.body(prompt(6 * CHUNK + 5, seed=sum(map(ord, phase))), **options)
    events = submit(pair, body, at_phase)
    assert not any("finished" in event or "failed" in event for event in events)
    until(lambda: not pair.decode._scheduler.waiting())
    reached.set()
    gate.set()
    if blocker is not None:
        blocker.join(LATEST_S)


def test_a_small_request_need_not_wait_behind_a_large_one_without_room(pair: Pair) -> None:

    async def scene() -> list[dict[str, Any]]:
        client = StreamClient(pair.decode.endpoint)
        try:
            running = client.submit(pair.body(prompt(700, 2), max_tokens=1000, kv_mode="text"))
            await anext(running)
            large = client.submit(pair.body(prompt(1500, 3), max_tokens=10, kv_mode="text"))
            while not pair.decode._scheduler.waiting():  # noqa: ASYNC110
                await asyncio.sleep(0.002)
            small = client.submit(pair.body(prompt(20, 4), max_tokens=2, kv_mode="text"))
            events = [event async for event in small]
            assert not running._ended and pair.decode._scheduler.waiting(), "both were to be still there"
            await large.aclose()
            await running.aclose()
            return events
        finally:
            await client.close()

    events = asyncio.run(asyncio.wait_for(scene(), LATEST_S))
    assert "finished" in events[-1]


def test_a_step_that_fails_ends_its_requests_alone(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    forward, bad = Engine.forward, prompt(20, 5)

    def failing(engine: Engine, slices: Any) -> Any:
        if any(list(item.token_ids) == bad for item in slices):
            raise RuntimeError("out of memory")
        return forward(engine, slices)

    monkeypatch.setattr(Engine, "forward", failing)
    _, event = pair.ask(bad)
    assert event["failed"]["status"] == 500
    good = prompt(20, 6)
    assert pair.ask(good)[0] == pair.reference(good, 8)


@pytest.mark.parametrize("where", ["sample", "token_drawn"])
def test_a_bug_in_one_row_ends_that_request_alone(pair: Pair, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows before and after it in the same batch go on, and no page is counted twice or lost."""
    prompts = [prompt(20 + i, 10 + i) for i in range(3)]
    if where == "sample":

        def failing_edit(row: Any, state: Any) -> None:
            if state.params.seed == 13:
                raise ValueError("unlucky")

        monkeypatch.setattr(decode.sampling, "edit_logits", failing_edit)
    else:
        token_drawn = DecodeWorker.token_drawn

        def failing(worker: DecodeWorker, sequence: Any, *args: Any) -> None:
            if sequence.request.sampling.seed == 13 and len(sequence.output) == 3:
                raise ValueError("unlucky")
            token_drawn(worker, sequence, *args)

        monkeypatch.setattr(DecodeWorker, "token_drawn", failing)
    bodies = [pair.body(p, max_tokens=12) for p in prompts]
    bodies[1]["request"]["sampling"] |= {"seed": 13, "presence_penalty": 0.5, "min_tokens": 1}
    first, bad, last = pair.ask_all(bodies)
    assert bad[1]["failed"]["status"] == 500
    assert first[0] == pair.reference(prompts[0], 12)
    assert last[0] == pair.reference(prompts[2], 12)


@pytest.mark.parametrize("mode", ["raw", "auto"])
@pytest.mark.parametrize("error", [ChecksumMismatch("flipped"), RuntimeError("a bug of ours")])
def test_blobs_that_cannot_be_decoded_never_hang_a_request(
    pair: Pair, mode: str, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(ModelRuntime, "decode_into_pages", failing)
    tokens = prompt(5 * CHUNK + 3, seed=len(mode) + len(str(error)))
    answer, receipt = pair.ask(tokens, kv_mode=mode)
    if mode == "raw":
        assert receipt["failed"]["code"] == "kv_transfer_failed"
    else:
        assert answer == pair.reference(tokens, 8)
        assert receipt["recomputed_chunks"] == 5


def test_a_source_that_sends_another_level_than_it_says_is_found_out(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    blob = PrefillWorker._blob
    monkeypatch.setattr(
        PrefillWorker, "_blob", lambda worker, transfer, chunk, level: blob(worker, transfer, chunk, "q3")
    )
    tokens = prompt(3 * CHUNK + 3, seed=40)
    _, event = pair.ask(tokens, kv_mode="lossless")
    assert "'q3'" in event["failed"]["message"]
    answer, receipt = pair.ask(tokens, floor="lossless")
    assert answer == pair.reference(tokens, 8) and receipt["levels"] == {"text": 3}


def test_a_bug_while_loading_ends_that_request(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_: Any) -> None:
        raise KeyError("a bug of ours")

    monkeypatch.setattr(KVPuller, "_tell_source", failing)
    _, event = pair.ask(prompt(3 * CHUNK + 3, seed=41), kv_mode="raw")
    assert event["failed"]["code"] == "internal_error"


def test_a_transfer_that_cannot_be_opened_leaves_the_text(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode.fill_sources, "OPEN_TIMEOUT_S", 0.5)  # how long it is tried again

    def full(*_: Any, **__: Any) -> str:
        raise TooMuch("256 transfers are open")

    monkeypatch.setattr(KVClient, "open", full)
    tokens = prompt(3 * CHUNK + 3, seed=42)
    answer, receipt = pair.ask(tokens)
    assert answer == pair.reference(tokens, 8) and receipt["levels"] == {"text": 3}
    _, event = pair.ask(tokens, kv_mode="raw")
    assert "256 transfers" in event["failed"]["message"]


def test_a_source_that_was_given_up_is_told_so(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may otherwise go on computing a prompt for nobody until the request's last token."""
    forward = Engine.forward
    gate = threading.Event()

    def slow(engine: Engine, slices: Any) -> Any:
        if threading.current_thread().name == "decode-engine" and slices[0].start >= 2 * CHUNK:
            assert gate.wait(2 * LATEST_S)
        return forward(engine, slices)

    monkeypatch.setattr(Engine, "forward", slow)
    monkeypatch.setattr(PrefillWorker, "_blob", lambda *_: None)
    body = pair.body(prompt(4 * CHUNK + 3, seed=43))
    events: list[dict[str, Any]] = []
    asking = threading.Thread(target=lambda: events.extend(submit(pair, body)))
    asking.start()
    until(lambda: pair.decode._scheduler.all() and pair.decode._scheduler.all()[0].work == (2 * CHUNK, 3 * CHUNK))
    until(lambda: not pair.prefill._transfers)
    assert not events, "it was told only when the request had ended"
    gate.set()
    asking.join(LATEST_S)
    assert "finished" in events[-1]


def test_a_stream_number_in_use_is_refused(pair: Pair) -> None:
    body = pair.body(prompt(20, 44), max_tokens=400)
    pair.decode._on_submit("somebody/1", body)
    with pytest.raises(RequestRefused):
        pair.decode._accept("somebody/1", body)
    pair.decode._on_cancel("somebody/1")


def test_a_pool_smaller_than_the_context_or_one_chunk_starts() -> None:
    for num_blocks, chunk_tokens in ((8, 256), (20, 256), (300, 4096)):
        with running_pair(num_blocks=num_blocks, chunk_tokens=chunk_tokens) as running:
            tokens = prompt(60, seed=num_blocks)
            assert running.ask(tokens)[0] == running.reference(tokens, 8)
            _, event = running.ask(prompt(16 * num_blocks, seed=1))
            assert event["refused"]["status"] == 400


def test_shutdown_ends_a_long_answer_at_once() -> None:
    with running_pair(chunk_tokens=CHUNK, num_blocks=256) as running:
        running.decode._on_submit("somebody/1", running.body(prompt(20, 50), max_tokens=3000))
        until(lambda: running.decode.stats()["decode_generated_tokens_total"] > 2)
        running.decode.shutdown()
        assert not running.decode._engine.is_alive
        assert not running.decode.is_alive


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_worker_without_its_engine_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    with running_pair(chunk_tokens=CHUNK, num_blocks=64) as running:
        assert running.decode.is_alive

        def broken() -> None:
            raise AssertionError("a bug of ours")

        monkeypatch.setattr(running.decode._engine, "_slice_tokens", broken)
        running.decode._on_submit("somebody/1", running.body(prompt(20, 51)))
        until(lambda: not running.decode.is_alive)


def test_a_worker_that_cannot_bind_leaves_no_thread_behind(pair: Pair) -> None:
    before = set(threading.enumerate())
    with pytest.raises(BindFailed):
        DecodeWorker(make_runtime(num_blocks=64), policy=SLOPolicy(), bind=pair.decode.endpoint)
    assert set(threading.enumerate()) <= before
