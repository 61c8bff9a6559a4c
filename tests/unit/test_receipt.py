"""The receipt of fills that ended in every way: it adds up, and counts only what was used."""

from __future__ import annotations

import json
from typing import Any

import pytest

from decode.estimator import CodecEstimator, ComputeEstimator, LinkEstimator
from decode.fill import TEXT, FillMachine, FillSpec
from decode.fill_events import BlobArrived, BlobDecoded, BlobRejected, ChunkComputed, Opened, PartArrived, SourceLost
from decode.receipt import Timeline, build_receipt

KL = {"lossless": 0.0, "q1": 0.01, "q3": None}
LEVELS = ("lossless", "q1", "q3")


def fill(num_chunks: int = 2) -> FillMachine:
    spec = FillSpec(
        num_chunks=num_chunks,
        chunk_tokens=64,
        levels=LEVELS,
        chunk_bytes=dict.fromkeys(LEVELS, 1000.0),
        deadline=11.5,
        tail_s=0.01,
        may_load=True,
        may_compute=True,
    )
    machine = FillMachine(
        spec, now=11.0, link=LinkEstimator(), compute=ComputeEstimator(10.0, 0.0), codec=CodecEstimator()
    )
    machine.start(11.0)
    machine.handle(Opened(stored_bytes=({},) * num_chunks), 11.01)
    return machine


def arrive(machine: FillMachine, chunk: int, level: str, size: int, now: float) -> None:
    machine.handle(
        PartArrived(chunk=chunk, level=level, received_bytes=size, total_bytes=size, part_bytes=size, wire_s=0.001),
        now,
    )
    machine.handle(BlobArrived(chunk=chunk, level=level, blob=bytes(size)), now)


def receipt(machine: FillMachine, **times: float | None) -> dict[str, Any]:
    timeline = Timeline(
        **{
            "received_at": 10.0,
            "admitted_at": 11.0,
            "opened_at": 11.01,
            "filled_at": 11.2,
            "first_token_at": 11.25,
            **times,
        }
    )
    return build_receipt(
        request_id="r",
        kv_mode="auto",
        prompt_tokens=64 * len(machine.chunks) + 5,
        chunk_tokens=64,
        source="prefill-0",
        timeline=timeline,
        fill=machine,
        promised_kl=KL,
        ended_at=12.0,
    )


def loaded(*levels: str) -> FillMachine:
    machine = fill(len(levels))
    for chunk, level in enumerate(levels):
        arrive(machine, chunk, level, 700 + chunk, 11.1)
        machine.handle(BlobDecoded(chunk=chunk, seconds=0.001), 11.2)
    return machine


def test_a_loaded_prompt() -> None:
    found = receipt(loaded("lossless", "q1"))
    assert found["levels"] == {"lossless": 1, "q1": 1}
    assert found["bytes"] == found["received_bytes"] == 1401
    assert (found["tail_tokens"], found["recomputed_chunks"], found["promised_kl"]) == (5, 0, 0.01)
    assert found["chunks"][1]["arrived_ms"] == 1100.0
    assert found == json.loads(json.dumps(found))


def test_the_parts_add_up_and_the_target_counts_from_admission() -> None:
    found = receipt(loaded("lossless"))
    assert found["ttft_ms"] == 1250.0
    assert found["ttft_parts_ms"] == {"queue": 1000.0, "fill": 200.0, "tail": 50.0}
    assert found["target_ms"] == 500.0


def test_one_level_that_promises_nothing_leaves_no_promise() -> None:
    assert receipt(loaded("q1", "q3"))["promised_kl"] is None


def test_a_computed_prompt_is_exact_and_free() -> None:
    machine = fill()
    machine.handle(SourceLost(reason="gone"), 11.05)
    for chunk in range(2):
        machine.handle(ChunkComputed(chunk=chunk), 11.1)
    found = receipt(machine)
    assert found["levels"] == {TEXT: 2}
    assert (found["bytes"], found["recomputed_chunks"], found["promised_kl"]) == (0, 2, 0.0)
    assert found["link_mbps"] is None
    assert any("gone" in reason["what"] for reason in found["reasons"])


def test_no_chunks_at_all() -> None:
    found = receipt(loaded())
    assert (found["levels"], found["bytes"], found["promised_kl"], found["tail_tokens"]) == ({}, 0, 0.0, 5)


@pytest.mark.parametrize("rejected", [False, True])
def test_what_did_not_reach_the_pages_is_received_and_not_used(rejected: bool) -> None:
    """Cancelled, or failed, with one chunk half here and another one damaged."""
    machine = fill()
    half = PartArrived(chunk=1, level="lossless", received_bytes=300, total_bytes=900, part_bytes=300, wire_s=0.001)
    machine.handle(half, 11.1)
    if rejected:
        arrive(machine, 0, "lossless", 800, 11.15)
        machine.handle(BlobRejected(chunk=0, reason="checksum"), 11.2)
    found = receipt(machine, filled_at=None, first_token_at=None)
    assert found["levels"] == {}
    assert found["bytes"] == 0
    assert found["received_bytes"] == (1100 if rejected else 300)
    assert found["ttft_ms"] is None and found["ttft_parts_ms"]["queue"] == 1000.0
