"""Chunks that are refined while the answer runs, over real sockets: what stands in the pages, and what is left behind
when a request ends in the middle."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from pair import LATEST_S, Asking, Gate, Pair, on_thread, running_pair, until

from decode.blob_decoder import BlobDecoder, Job
from decode.fill_events import Refine
from decode.scheduler import Sequence
from decode.slo import SLOPolicy
from prefill.chunks import REFINES, chunk_keys
from prefill.engine import Engine, SequenceSlice, prefill
from prefill.runtime import ModelRuntime
from prefill.worker import PrefillWorker
from transport.shaper import Shaper

CHUNK = 32
NUM_CHUNKS = 6
# q3 before the first token, q1 after it.
COARSE_FIRST = SLOPolicy(ttft_s=30.0, ceiling="q3", floor="q3", refine_to="q1", allow_recompute=False)


def prompt(length: int, seed: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(3, 512) for _ in range(length)]


@pytest.fixture(scope="module")
def lasting() -> Iterator[Pair]:
    with running_pair(policy=COARSE_FIRST, chunk_tokens=CHUNK, num_blocks=256) as running:
        yield running


@pytest.fixture
def pair(lasting: Pair) -> Iterator[Pair]:
    yield lasting
    lasting.check()
    assert lasting.decode.is_alive and lasting.prefill.is_alive


def in_answer(_: Engine, slices: list[SequenceSlice]) -> bool:
    """A step of the decode worker with nothing but rows of running answers: first tokens are out."""
    return threading.current_thread().name == "decode-engine" and all(len(item.token_ids) == 1 for item in slices)


def only(pair: Pair) -> Sequence:
    """The one sequence that runs."""
    (sequence,) = pair.decode._scheduler.all()
    return sequence


def machine_of(pair: Pair) -> Any:
    (state,) = pair.decode._requests.values()
    return state.fill.machine


def pages_of(pair: Pair, sequence: Sequence, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
    with pair.decode._lock:
        return pair.decode._runtime.pool.read(sequence.block_table, start, stop)


def assert_same_bits(found: tuple[torch.Tensor, torch.Tensor], expected: tuple[torch.Tensor, torch.Tensor]) -> None:
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours.view(torch.int16), theirs.view(torch.int16))


def refined(pair: Pair, tokens: list[int], *, max_tokens: int = 2000) -> Asking:
    """A request that runs on with all its chunks refined."""
    asking = pair.begin(tokens, max_tokens=max_tokens)
    until(lambda: asking.end or (asking.tokens and machine_of(pair).done))
    assert asking.end is None
    return asking


def left(pair: Pair, asking: Asking) -> dict[str, Any]:
    """The receipt of a request that is cancelled now."""
    asking.leave()
    until(lambda: not pair.decode._requests)
    return next(reversed(pair.decode._receipts.values()))


# -- what stands in the pages -------------------------------------------------------------------------------------


def test_refined_pages_equal_the_finer_levels_bit_for_bit(pair: Pair) -> None:
    tokens = prompt(NUM_CHUNKS * CHUNK + 5, seed=1)
    asking = refined(pair, tokens)
    assert pair.prefill.wait_until_idle(LATEST_S)  # until all it has encoded is in its store
    fingerprint = pair.alone.model.fingerprint
    for chunk, key in enumerate(chunk_keys(tokens, CHUNK, fingerprint=fingerprint)):
        blob = pair.prefill.store.get(key, "q1")
        assert blob is not None
        start, stop = chunk * CHUNK, (chunk + 1) * CHUNK
        expected = pair.alone.decode(blob, start=start, stop=stop)
        assert_same_bits(pages_of(pair, only(pair), start, stop), expected)
    log = machine_of(pair).chunks
    assert {(c.first_level, c.level) for c in log} == {("q3", "q1")}
    assert all(step.after_tokens >= 1 for c in log for step in c.refinements)
    asking.leave()


def test_only_what_the_coarse_level_lacks_is_sent(pair: Pair) -> None:
    tokens = prompt(NUM_CHUNKS * CHUNK + 5, seed=2)
    whole = pair.ask(tokens, kv_mode="q1")[1]["bytes"]
    coarse = pair.ask(tokens, kv_mode="q3")[1]["bytes"]
    receipt = left(pair, refined(pair, tokens))
    assert receipt["levels"] == {"q3": NUM_CHUNKS} and receipt["levels_at_end"] == {"q1": NUM_CHUNKS}
    assert receipt["bytes"] == coarse
    assert receipt["bytes"] + receipt["refined_bytes"] == receipt["received_bytes"]
    assert receipt["received_bytes"] < 1.25 * whole, "at 32 tokens a chunk the second header weighs something"


def test_tokens_before_a_refinement_are_those_of_an_unrefined_run(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = prompt(NUM_CHUNKS * CHUNK + 5, seed=3)
    plain, _ = pair.ask(tokens, kv_mode="q3", max_tokens=200)
    gate = Gate(monkeypatch, ModelRuntime, "decode", on_thread("kv-decode"))
    asking = pair.begin(tokens, max_tokens=200)
    until(lambda: len(asking.tokens) >= 20)
    gate.open()
    receipt = asking.receipt()
    steps = receipt["plan"]["refinements"]
    first = steps[0]["after_tokens"]
    assert first >= 20 and {step["chunk"] for step in steps} == set(range(NUM_CHUNKS))
    assert asking.tokens[:first] == plain[:first]
    assert asking.tokens != plain, "no refinement changed anything"


def test_no_more_than_a_few_chunks_are_copied_between_two_steps(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("decode.engine_loop.MAX_COPY_BYTES", 1)  # one at a time
    tokens = prompt(NUM_CHUNKS * CHUNK + 5, seed=4)
    pair.ask(tokens, kv_mode="q1")
    gate = Gate(monkeypatch, Engine, "forward", in_answer)
    asking = pair.begin(tokens, max_tokens=100)
    gate.wait()  # before the second token, until refinements wait to be copied; one may have been before that
    until(lambda: sum(len(state.new_pages) for state in pair.decode._requests.values()) >= NUM_CHUNKS - 1)
    gate.open()
    steps = [step["after_tokens"] for step in asking.receipt()["plan"]["refinements"]]
    assert len(steps) == NUM_CHUNKS and steps == sorted(set(steps)), "two were copied between two steps"


def test_refinements_that_a_first_token_waits_for_are_decoded_before_those_of_running_answers(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A link never seen is taken for slow: the floor first, and then, as it is fast, better levels in time.
    policy = SLOPolicy(ttft_s=1.5, levels=("q1", "q2", "q3"), floor="q3", link_prior_bps=2e5, allow_recompute=False)
    put, kinds = BlobDecoder.put, []

    def note(decoder: BlobDecoder, job: Job, *, urgency: int) -> None:
        if isinstance(job.command, Refine):
            kinds.append((job.fill.machine.ready, urgency))
        put(decoder, job, urgency=urgency)

    monkeypatch.setattr(BlobDecoder, "put", note)
    tokens = prompt(NUM_CHUNKS * CHUNK + 5, seed=5)
    pair.ask(tokens, kv_mode="q1", max_tokens=1)
    refined(pair, tokens).leave()
    with Shaper(pair.prefill.endpoint) as unknown_link:
        monkeypatch.setattr(pair.decode, "_policy", policy)
        pair.begin(tokens, max_tokens=100, endpoints=[unknown_link.endpoint]).receipt()
    latest = max(urgency for is_ready, urgency in kinds if not is_ready)
    assert latest < min(urgency for is_ready, urgency in kinds if is_ready)


# -- quality ------------------------------------------------------------------------------------------------------


def test_a_strict_request_after_a_lossy_one_is_exact(pair: Pair) -> None:
    """Neither the store nor the pages hand on what was lost."""
    tokens = prompt(NUM_CHUNKS * CHUNK + 9, seed=6)
    expected = pair.reference(tokens, 24)
    lossy, receipt = pair.ask(tokens, max_tokens=24)
    assert lossy != expected and receipt["levels"] == {"q3": NUM_CHUNKS}
    for mode in ("lossless", "raw", "text"):
        exact, receipt = pair.ask(tokens, max_tokens=24, kv_mode=mode)
        assert exact == expected
        assert receipt["quality"] == {"at_first_token": 0.0, "at_end": 0.0, "generated_on": 0.0}


def test_pages_say_how_good_they_are(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    promises = {"raw": 0.0, "lossless": 0.0, "q1": 0.01, "q2": 0.03, "q3": 0.1}
    monkeypatch.setattr(pair.decode._pages, "_kl", promises)
    tokens = prompt(NUM_CHUNKS * CHUNK + 9, seed=7)
    receipt = left(pair, refined(pair, tokens))
    assert receipt["quality"] == {"at_first_token": 0.1, "at_end": 0.01, "generated_on": 0.1}
    until(lambda: len(pair.decode._pages._quality) == 0)


def test_a_level_that_promises_nothing_has_no_quality(pair: Pair) -> None:
    _, receipt = pair.ask(prompt(NUM_CHUNKS * CHUNK + 9, seed=8), kv_mode="q2")
    assert receipt["quality"] == {"at_first_token": None, "at_end": None, "generated_on": None}


# -- requests that end in the middle ------------------------------------------------------------------------------


def hold(where: str, monkeypatch: pytest.MonkeyPatch) -> Gate:
    if where == "at the source":
        return Gate(monkeypatch, PrefillWorker, "_blob", lambda *args: REFINES in args[3])
    if where == "decoding":
        return Gate(monkeypatch, ModelRuntime, "decode", on_thread("kv-decode"))
    # Until the step of the second token ends, what is decoded waits to be copied.
    return Gate(monkeypatch, Engine, "forward", in_answer)


@pytest.mark.parametrize("way", ["cancelled", "finished"])
@pytest.mark.parametrize("where", ["at the source", "decoding", "waiting for the engine"])
def test_a_request_that_ends_in_mid_refinement_leaves_nothing(
    pair: Pair, where: str, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair.ask(prompt(NUM_CHUNKS * CHUNK + 9, seed=9), kv_mode="q1")
    gate = hold(where, monkeypatch)
    max_tokens = 2000 if way == "cancelled" else 30
    asking = pair.begin(prompt(NUM_CHUNKS * CHUNK + 9, seed=9), max_tokens=max_tokens)
    gate.wait()
    if where == "waiting for the engine":
        until(lambda: next(iter(pair.decode._requests.values())).new_pages)
    if way == "cancelled":
        asking.leave()
        until(lambda: not pair.decode._requests)
    elif where != "waiting for the engine":
        assert "finished" in asking.wait(), "the answer does not wait for refinements"
    gate.open()
    if way == "finished":
        assert asking.receipt()["levels"] == {"q3": NUM_CHUNKS} and len(asking.tokens) == 30


@pytest.mark.parametrize("where", ["decoding", "waiting for the engine"])
def test_a_late_refinement_never_reaches_another_request(
    pair: Pair, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next request needs all pages, so it gets those of the one that was cancelled in mid-refinement."""
    num_all = 16 * pair.decode._runtime.pool.num_blocks
    tokens, next_tokens = prompt(NUM_CHUNKS * CHUNK + 9, seed=10), prompt(num_all - 15, seed=11)
    pair.ask(tokens, kv_mode="q1")
    gate = hold(where, monkeypatch)
    asking = pair.begin(tokens, max_tokens=500)
    gate.wait()
    if where == "waiting for the engine":
        until(lambda: next(iter(pair.decode._requests.values())).new_pages)
    table = list(only(pair).block_table)
    asking.leave()
    until(lambda: not pair.decode._requests)
    later = pair.begin(next_tokens, max_tokens=15, kv_mode="text")
    until(lambda: pair.decode._scheduler.waiting())
    answering = Gate(monkeypatch, Engine, "forward", in_answer)
    gate.open()
    answering.wait()
    assert set(table) <= set(only(pair).block_table)
    found = pages_of(pair, only(pair), 0, NUM_CHUNKS * CHUNK)
    alone = pair.alone.allocator.allocate(-(-len(next_tokens) // 16))
    prefill(pair.alone.engine, next_tokens, alone)
    expected = pair.alone.pool.read(alone, 0, NUM_CHUNKS * CHUNK)
    pair.alone.allocator.release(alone)
    assert_same_bits(found, expected)
    answering.open()
    later.leave()
