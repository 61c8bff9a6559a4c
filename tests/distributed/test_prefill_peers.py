"""A prefill worker that continues what another worker has computed: it fetches that KV, or computes what comes late."""

from __future__ import annotations

import pytest
from prefill_receiver import CHUNK, LATEST_S, Receiver, prompt, serving

from prefill.open_request import OpenRequest
from prefill.peer_chunks import Fetch
from prefill.prompt import FreshChunk
from prefill.store import MASTER_LEVEL
from transport.events import ChunkFailed
from transport.shaper import Shaper

OLD, NEW = 4, 2  # chunks


def computed_by(peer: Receiver, tokens: list[int]) -> dict[int, bytes]:
    """The peer has the first chunks of a prompt."""
    transfer_id, _ = peer.opened(tokens)
    found = peer.blobs(transfer_id, *range(OLD))
    peer.client.close(transfer_id)
    assert peer.worker.wait_until_idle(LATEST_S)
    return found


def new_chunk(worker: Receiver, tokens: list[int], holder: str) -> bytes:
    """The prompt's last chunk, which nobody has."""
    transfer_id = worker.open(tokens, holders=[{"endpoint": holder, "public_key": None}])
    worker.next(transfer_id)
    last = OLD + NEW - 1
    blob = worker.blobs(transfer_id, last)[last]
    worker.client.close(transfer_id)
    assert worker.worker.wait_until_idle(LATEST_S)
    return blob


def test_what_a_peer_has_is_fetched_and_only_the_rest_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("prefill.worker.FIRST_CHUNK_S", LATEST_S)
    tokens = prompt((OLD + NEW) * CHUNK + 1, seed=1)
    with serving() as peer, serving() as worker, serving() as alone:
        old = computed_by(peer, tokens[: OLD * CHUNK + 1])
        # Patience from the clock would make this a race: here it has all the time that it needs.
        take = Fetch.take
        monkeypatch.setattr(Fetch, "take", lambda self, chunk, timeout_s: take(self, chunk, LATEST_S))
        blob = new_chunk(worker, tokens, peer.worker.endpoint)
        stats = worker.worker.stats()
        assert stats["prefill_fetched_tokens_total"] == OLD * CHUNK
        assert stats["prefill_computed_tokens_total"] == NEW * CHUNK
        transfer_id, _ = alone.opened(tokens)
        assert blob == alone.blobs(transfer_id, OLD + NEW - 1)[OLD + NEW - 1], "computed on the same bits"
        transfer_id, stored = worker.opened(tokens)
        assert all(stored), "what was fetched is kept"
        assert worker.blobs(transfer_id, *range(OLD)) == old


def test_a_peer_that_is_too_slow_is_left_and_the_prompt_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("prefill.worker.ANSWER_S", 0.0)
    monkeypatch.setattr("prefill.worker.FIRST_CHUNK_S", 0.01)
    tokens = prompt((OLD + NEW) * CHUNK + 1, seed=2)
    with serving() as peer, serving() as worker, Shaper(peer.worker.endpoint) as link:
        computed_by(peer, tokens[: OLD * CHUNK + 1])
        link.stall(3600.0)
        new_chunk(worker, tokens, link.endpoint)
        assert worker.worker.stats()["prefill_computed_tokens_total"] == (OLD + NEW) * CHUNK


@pytest.mark.parametrize("holder", ["tcp://127.0.0.1:1", "tcp://nowhere.invalid:1"])
def test_a_peer_that_is_not_there_does_no_harm(holder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("prefill.worker.ANSWER_S", 0.05)
    tokens = prompt((OLD + NEW) * CHUNK + 1, seed=3)
    with serving() as worker:
        new_chunk(worker, tokens, holder)
        assert worker.worker.stats()["prefill_computed_tokens_total"] == (OLD + NEW) * CHUNK


def test_a_damaged_blob_of_a_peer_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    def damaged(self: Fetch, chunk: int, timeout_s: float) -> bytes:
        return b"nothing of use"

    monkeypatch.setattr(Fetch, "take", damaged)
    tokens = prompt((OLD + NEW) * CHUNK + 1, seed=4)
    with serving() as peer, serving() as worker:
        new_chunk(worker, tokens, peer.worker.endpoint)
        assert worker.worker.stats()["prefill_computed_tokens_total"] == (OLD + NEW) * CHUNK


# -- KV that was computed on lossy KV -----------------------------------------------------------------------------


def offer(worker: Receiver, tokens: list[int], kl: float) -> None:
    """As a decode worker does: here is the first chunk."""
    body = {"token_ids": tokens, "chunk_tokens": CHUNK, "cache_salt": ""}
    request: OpenRequest = worker.worker._read_open(body)
    with serving() as other:
        transfer_id, _ = other.opened(tokens)
        blob = other.blobs(transfer_id, 0)[0]
    k, v = worker.worker._runtime.decode(blob, start=0, stop=CHUNK)
    assert worker.worker.offer(request.keys[0], FreshChunk(k=k, v=v, start=0, kl=kl))
    assert worker.worker.wait_until_idle(LATEST_S)


def test_what_came_back_worse_is_not_what_the_receiver_was_told() -> None:
    tokens = prompt(2 * CHUNK, seed=6)
    with serving() as worker:
        offer(worker, tokens, kl=0.0)
        transfer_id = worker.open(tokens, stored_only=True, max_kl=0.05)
        assert "kl" not in worker.next(transfer_id).body, "exact"
        for key in worker.worker._read_open({"token_ids": tokens, "chunk_tokens": CHUNK}).keys:
            worker.worker.store.drop(key)
        offer(worker, tokens, kl=0.03)
        worker.client.request(transfer_id, 0, MASTER_LEVEL)
        assert isinstance(worker.next(transfer_id), ChunkFailed)
        again = worker.open(tokens, stored_only=True, max_kl=0.05)
        assert worker.next(again).body["kl"] == [0.03]
        assert worker.blobs(again, 0)[0]


def test_lossy_kv_is_only_for_those_who_take_it() -> None:
    tokens = prompt(2 * CHUNK, seed=5)
    with serving() as worker:
        offer(worker, tokens, kl=0.03)
        transfer_id = worker.open(tokens, stored_only=True, max_kl=0.02)
        assert worker.next(transfer_id).body["stored"] == [None]
        transfer_id = worker.open(tokens, max_kl=0.05)
        event = worker.next(transfer_id)
        assert event.body["stored"][0] and event.body["kl"] == [0.03]
        assert worker.blobs(transfer_id, 0)[0]
        assert worker.worker.stats()["prefill_computed_tokens_total"] == 0
        # Who wants exact KV has it computed, and that takes its place.
        transfer_id, stored = worker.opened(tokens)
        assert stored == [None]
        worker.blobs(transfer_id, 0)
        assert worker.worker.wait_until_idle(LATEST_S)
        assert worker.worker.stats()["prefill_computed_tokens_total"] == CHUNK
        transfer_id = worker.open(tokens, max_kl=0.05)
        event = worker.next(transfer_id)
        assert event.body["stored"][0][MASTER_LEVEL] and "kl" not in event.body
