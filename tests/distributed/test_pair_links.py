"""Links that are cut in the middle of a transfer, and several sources: the right tokens or a clear error, in time."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from dataclasses import replace

import pytest
from pair import Pair, make_runtime, running_pair, until

from decode.slo import SLOPolicy
from prefill.worker import PrefillWorker
from transport.limits import Timing
from transport.shaper import Shaper

CHUNK = 32
NUM_CHUNKS = 24
RATE_MBPS = 8.0  # a raw chunk of the small model has 49 KB: all of them take 1.2 s
GIVE_UP_S = 1.5  # instead of ten
LATE_S = 5.0  # a busy machine
POLICY = SLOPolicy(ttft_s=20.0, levels=("raw",), floor="raw", link_prior_bps=RATE_MBPS * 1e6)


def prompt(seed: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(3, 512) for _ in range(NUM_CHUNKS * CHUNK + 7)]


@pytest.fixture(scope="module")
def lasting() -> Iterator[Pair]:
    with running_pair(policy=POLICY, chunk_tokens=CHUNK, num_blocks=128) as running:
        yield running


@pytest.fixture
def pair(lasting: Pair) -> Iterator[Pair]:
    yield lasting
    lasting.check()
    assert lasting.decode.is_alive and lasting.prefill.is_alive


@pytest.fixture
def slow_link(pair: Pair) -> Iterator[Shaper]:
    with Shaper(pair.prefill.endpoint, rate_mbps=RATE_MBPS) as shaper:
        yield shaper


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("fill", "fill_sources"):
        monkeypatch.setattr(f"decode.{module}.OPEN_TIMEOUT_S", GIVE_UP_S)


def num_filled(pair: Pair) -> int:
    return sum(
        log.filled_at is not None for state in pair.decode._requests.values() for log in state.fill.machine.chunks
    )


def store(pair: Pair, tokens: list[int], *, at: PrefillWorker | None = None) -> None:
    """The source has it from now on."""
    _, receipt = pair.ask(tokens, kv_mode="raw", max_tokens=1, endpoints=[(at or pair.prefill).endpoint])
    assert receipt["levels"] == {"raw": NUM_CHUNKS}
    assert (at or pair.prefill).wait_until_idle(10)


@pytest.mark.usefixtures("impatient")
def test_a_cut_link_leaves_the_text(pair: Pair, slow_link: Shaper) -> None:
    tokens = prompt(1)
    store(pair, tokens)
    asking = pair.begin(tokens, endpoints=[slow_link.endpoint])
    until(lambda: num_filled(pair) >= 3)
    slow_link.cut(60)
    levels = asking.receipt()["levels"]
    assert levels["raw"] >= 3 and levels["text"] >= 1 and sum(levels.values()) == NUM_CHUNKS
    assert asking.tokens == pair.reference(tokens, 8)


@pytest.mark.usefixtures("impatient")
def test_a_cut_link_without_recomputing_is_an_error_in_time(pair: Pair, slow_link: Shaper) -> None:
    tokens = prompt(2)
    store(pair, tokens)
    asking = pair.begin(tokens, kv_mode="raw", endpoints=[slow_link.endpoint])
    until(lambda: num_filled(pair) >= 3)
    cut_at = time.monotonic()
    slow_link.cut(60)
    failed = asking.wait()["failed"]
    assert failed["status"] == 502 and failed["code"] == "kv_transfer_failed"
    assert GIVE_UP_S <= time.monotonic() - cut_at < GIVE_UP_S + LATE_S
    assert asking.tokens == []


@pytest.mark.usefixtures("impatient")
def test_a_silent_link_is_an_error_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing says that it is cut: the lease tells, and then as long again is allowed for coming back."""
    for module in ("kv_client", "kv_server"):
        monkeypatch.setattr(f"transport.{module}.Timing", lambda: Timing(suspect_s=0.6, lease_s=GIVE_UP_S))
    with running_pair(policy=POLICY, chunk_tokens=CHUNK, num_blocks=128) as pair:
        tokens = prompt(5)
        store(pair, tokens)
        with Shaper(pair.prefill.endpoint, rate_mbps=RATE_MBPS) as link:
            asking = pair.begin(tokens, kv_mode="raw", endpoints=[link.endpoint])
            until(lambda: num_filled(pair) >= 3)
            silent_at = time.monotonic()
            link.stall(60)
            failed = asking.wait()["failed"]
            assert failed["status"] == 502 and failed["code"] == "kv_transfer_failed"
            assert time.monotonic() - silent_at < 2 * GIVE_UP_S + LATE_S
            pair.check()


def test_a_link_that_heals_goes_on_with_what_is_missing(pair: Pair, slow_link: Shaper) -> None:
    tokens = prompt(3)
    store(pair, tokens)
    sent_before = pair.prefill.stats()["prefill_sent_chunks_total"]
    asking = pair.begin(tokens, kv_mode="raw", endpoints=[slow_link.endpoint])
    until(lambda: num_filled(pair) >= 5)
    slow_link.cut(0.4)
    receipt = asking.receipt()
    assert asking.tokens == pair.reference(tokens, 8)
    assert any("lost" in reason["what"] for reason in receipt["reasons"])
    again = pair.prefill.stats()["prefill_sent_chunks_total"] - sent_before - NUM_CHUNKS
    asked_twice = sum(len(chunk["asked_levels"]) - 1 for chunk in receipt["chunks"])
    assert 1 <= again <= asked_twice <= NUM_CHUNKS - 5, "what had come was sent again"


def test_a_link_that_is_cut_while_chunks_are_refined_does_not_disturb_the_answer(
    pair: Pair, slow_link: Shaper, monkeypatch: pytest.MonkeyPatch
) -> None:
    coarse_first = replace(POLICY, levels=("q1", "q2", "q3"), floor="q3", ceiling="q3", refine_to="q1")
    monkeypatch.setattr(pair.decode, "_policy", coarse_first)
    tokens = prompt(6)
    pair.ask(tokens, kv_mode="q1", max_tokens=1)
    slow_link.set_rate(1.0)
    asking = pair.begin(tokens, max_tokens=250, endpoints=[slow_link.endpoint])
    until(lambda: pair.decode.stats()["decode_sequences"])
    (state,) = pair.decode._requests.values()
    until(lambda: any(log.refinements for log in state.fill.machine.chunks))
    slow_link.cut(60)
    receipt = asking.receipt()
    assert len(asking.tokens) == 250
    assert receipt["levels"] == {"q3": NUM_CHUNKS} and set(receipt["levels_at_end"]) == {"q3", "q1"}


def test_one_of_two_sources_ends_and_the_other_goes_on(pair: Pair) -> None:
    tokens = prompt(4)
    second = PrefillWorker(make_runtime(num_blocks=128), worker_id="prefill-1")
    store(pair, tokens)
    store(pair, tokens, at=second)
    with (
        Shaper(pair.prefill.endpoint, rate_mbps=RATE_MBPS) as near,
        Shaper(second.endpoint, rate_mbps=RATE_MBPS) as far,
    ):
        asking = pair.begin(tokens, kv_mode="raw", endpoints=[near.endpoint, far.endpoint])

        def sources() -> set[int | None]:
            logs = [log for state in pair.decode._requests.values() for log in state.fill.machine.chunks]
            return {log.source for log in logs if log.filled_at is not None}

        until(lambda: sources() == {0, 1})
        assert num_filled(pair) < NUM_CHUNKS
        second.shutdown()
        receipt = asking.receipt()
    assert asking.tokens == pair.reference(tokens, 8)
    assert {chunk["source"] for chunk in receipt["chunks"]} == {"prefill-0", "prefill-1"}
    assert any("source 1 lost" in reason["what"] for reason in receipt["reasons"])
    second.check_integrity()
