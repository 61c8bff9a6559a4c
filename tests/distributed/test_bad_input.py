"""What users, clients and disks do wrong: each has its own answer, and pages, transfers and files are given back."""

from __future__ import annotations

import logging
import os
import random
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from pair import LATEST_S, Gate, Pair, make_runtime, on_thread, running_pair, until
from store_cases import run_python

from codec.profile import default_profile
from decode.requests import SamplingParams
from decode.slo import SLOPolicy
from prefill.engine import Engine
from prefill.runtime import ModelRuntime
from prefill.store import ChunkStore

CHUNK = 32
NUM_BLOCKS = 64  # 1,024 tokens; the model's context is 4,096
EXACT_ONLY = SLOPolicy(ttft_s=30.0, levels=("lossless",), floor="lossless", ceiling="lossless")


def prompt(length: int, seed: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(3, 512) for _ in range(length)]


def open_store(path: Path, runtime: ModelRuntime | None = None, **options: Any) -> ChunkStore:
    runtime = runtime or make_runtime(num_blocks=1)
    return runtime.open_store(
        **{"ram_bytes": 1 << 20, "chunk_tokens": CHUNK, "path": path, "disk_bytes": 8 << 20, **options}
    )


def num_files() -> int:
    """That this process has open."""
    return len(os.listdir("/proc/self/fd"))


@contextmanager
def serving(path: Path, **options: Any) -> Iterator[Pair]:
    """A pair whose decode worker keeps its chunks at `path`; at the end its files are closed."""
    before = num_files()
    store = open_store(path, **options)
    try:
        with running_pair(
            policy=EXACT_ONLY, chunk_tokens=CHUNK, num_blocks=NUM_BLOCKS, prefix_caching=True, store=store
        ) as running:
            yield running
            running.check()
            store.check_integrity()
    finally:
        assert store.close()
    until(lambda: num_files() <= before)  # sockets are closed in threads of their own


@pytest.fixture(scope="module")
def lasting(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    path = tmp_path_factory.mktemp("store")
    with serving(path) as running:
        yield running
    assert open_store(path).close(), "the directory was given back"


@pytest.fixture
def pair(lasting: Pair) -> Iterator[Pair]:
    """A pair that serves as before, whatever was done to it, and holds nothing."""
    yield lasting
    tokens = prompt(100, seed=99)
    assert lasting.ask(tokens)[0] == lasting.reference(tokens, 8)
    assert lasting.decode.source is not None and lasting.decode.source.wait_until_idle(LATEST_S)
    lasting.check()
    lasting.decode.source.check_integrity()
    assert lasting.decode.is_alive and lasting.prefill.is_alive


# -- requests ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("length", "options", "code", "param", "says"),
    [
        (1000, {"max_tokens": 100}, "kv_pool_too_small", None, "needs 69 KV blocks and the worker has 64: shorten it"),
        (200, {"max_tokens": 4000}, "context_length_exceeded", "max_tokens", "exceed the context of 4096"),
        (5000, {"max_tokens": 1}, "context_length_exceeded", "max_tokens", "5000 prompt tokens"),
        (0, {}, "invalid_request", "prompt", "The prompt is empty"),
        (200, {"max_tokens": 0}, "invalid_request", "max_tokens", "at least 1"),
        (200, {"priority": 101}, "priority_out_of_range", "priority", "-100 .. 100"),
        (200, {"kv_mode": "q99"}, "invalid_request", "kv.mode", "Unknown level"),
    ],
)
def test_what_can_never_be_served_is_refused_with_what_to_do(
    pair: Pair, length: int, options: dict[str, Any], code: str, param: str | None, says: str
) -> None:
    before = pair.decode.stats()
    _, event = pair.ask(prompt(length, seed=1), **options)
    refused = event["refused"]
    assert (refused["status"], refused["code"], refused.get("param")) == (400, code, param)
    assert says in refused["message"]
    after = pair.decode.stats()
    assert after["decode_generated_tokens_total"] == before["decode_generated_tokens_total"]
    assert not pair.decode._scheduler.waiting() and not len(pair.decode._scheduler)


def test_an_end_that_never_comes_ends_at_max_tokens_and_gives_every_page_back(pair: Pair) -> None:
    """Nobody else's token, and no end of sequence: the answer takes all the pages that there are."""
    tokens = prompt(200, seed=2)
    num_new = NUM_BLOCKS * 16 - len(tokens)
    sampling = SamplingParams(max_tokens=num_new, temperature=0.0, ignore_eos=True, stop_token_ids=(0,))
    asking = pair.begin(tokens, sampling=sampling)
    end = asking.wait()["finished"]
    expected = pair.reference(tokens, num_new)
    if 0 in expected:
        expected = expected[: expected.index(0) + 1]
    assert asking.tokens == expected
    assert (end["finish_reason"], end["completion_tokens"]) == ("stop" if 0 in expected else "length", len(expected))


@pytest.mark.parametrize("thread", ["prefill-compute", "decode-engine"])
@pytest.mark.parametrize("moment", ["prefill", "decode"])
def test_a_client_that_leaves_takes_nothing_with_it(
    pair: Pair, moment: str, thread: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = prompt(500, seed=sum(map(ord, moment + thread)))
    at_source = thread == "prefill-compute"
    kv: dict[str, Any] = {"kv_mode": "lossless"} if at_source else {"with_source": False}
    if moment == "prefill":
        gate = Gate(monkeypatch, Engine, "forward", on_thread(thread))
        asking = pair.begin(tokens, **kv)
        gate.wait()
        asking.leave()
        gate.open()
        assert asking.tokens == []
    else:
        asking = pair.begin(tokens, max_tokens=500, **kv)
        until(lambda: len(asking.tokens) > 3)
        asking.leave()
    assert asking.end is None
    until(lambda: not pair.decode._requests and not len(pair.decode._scheduler))
    assert pair.ask(tokens)[0] == pair.reference(tokens, 8), "what it left in pages and store is right"


# -- disks ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("other", ["dtype", "chunk size", "profile"])
def test_a_store_of_another_model_or_profile_starts_empty_in_one_line(
    tmp_path: Path, other: str, caplog: pytest.LogCaptureFixture
) -> None:
    key, ours, options = bytes(16), make_runtime(num_blocks=1), {}
    store = open_store(tmp_path, ours)
    assert store.put(key, "lossless", b"of the first") and store.close()
    theirs = make_runtime(num_blocks=1, dtype=torch.float32 if other == "dtype" else torch.bfloat16)
    if other == "profile":
        theirs.profile = default_profile(theirs.model.layout, fingerprint="of another calibration")
    if other == "chunk size":
        options = {"chunk_tokens": 2 * CHUNK}
    caplog.set_level(logging.WARNING, "kvstream.store")
    store = open_store(tmp_path, theirs, **options)
    assert store.get(key, "lossless") is None and store.stats().disk_chunks == 0
    assert len(caplog.records) == 1 and "namespace" in caplog.text
    assert store.put(key, "lossless", b"of the second") and store.close()
    store = open_store(tmp_path, theirs, **options)
    assert store.get(key, "lossless") == b"of the second"
    assert store.close()


@pytest.mark.parametrize("how", ["flips", "cut", "garbage"])
def test_a_damaged_store_costs_time_and_no_answer(tmp_path: Path, how: str) -> None:
    prompts = [prompt(200 + i, seed=50 + i) for i in range(4)]
    with serving(tmp_path, ram_bytes=1) as pair:
        answers = [pair.ask(tokens, with_source=False)[0] for tokens in prompts]
        assert pair.decode.source is not None and pair.decode.source.wait_until_idle(LATEST_S)
        assert pair.decode.source.store.flush(LATEST_S)
    file, draw = tmp_path / "data.mdb", random.Random(how)
    data = bytearray(file.read_bytes())
    match how:
        case "flips":
            for record in re.finditer(b"KVSR", data):  # in every blob: flips in LMDB's own pages empty the store
                data[record.end() + draw.randrange(100, 1000)] ^= 1
        case "cut":
            del data[len(data) // 2 :]
        case "garbage":
            data = bytearray(draw.randbytes(len(data)))
    file.write_bytes(data)
    with serving(tmp_path, ram_bytes=1) as pair:
        assert [pair.ask(tokens, with_source=False)[0] for tokens in prompts] == answers
        assert pair.decode.source is not None and pair.decode.source.wait_until_idle(LATEST_S)
        stats = pair.decode.stats()
        assert stats["store_disk_damaged_total"] > 0 if how == "flips" else stats["store_hits_total"] == 0


def test_a_full_disk_costs_no_answer_and_is_tried_again(tmp_path: Path) -> None:
    """A limit on file sizes stands for it, as in tests/unit/test_store_failures.py: the same refused write, without
    root."""
    code = """
        import random, resource, sys
        from pathlib import Path
        from pair import make_runtime, running_pair
        from decode.slo import SLOPolicy

        path, policy = Path(sys.argv[1]), SLOPolicy(ttft_s=30.0, levels=("lossless",), floor="lossless")
        draw = random.Random(1)
        prompts = [[draw.randrange(3, 512) for _ in range(300)] for _ in range(6)]
        store = make_runtime(num_blocks=1).open_store(1 << 20, chunk_tokens=32, path=path, disk_bytes=64 << 20)

        def ask_all():
            found = [pair.ask(tokens, with_source=False)[0] for tokens in prompts]
            assert pair.decode.source.wait_until_idle(20)
            pair.check()
            return found

        with running_pair(policy=policy, chunk_tokens=32, num_blocks=128, store=store) as pair:
            expected = [pair.reference(tokens, 8) for tokens in prompts]
            assert pair.decode.stats()["store_disk_off"] == 0
            resource.setrlimit(resource.RLIMIT_FSIZE, (store.stats().disk_file_bytes + 50_000, resource.RLIM_INFINITY))
            assert ask_all() == expected and not store.flush(20)
            assert pair.decode.stats()["store_disk_off"] == 1
            assert ask_all() == expected
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
            store._disk.writer._off_until = float("-inf")  # half a minute later
            prompts = [tokens[::-1] for tokens in prompts]
            assert ask_all() == [pair.reference(tokens, 8) for tokens in prompts] and store.flush(20)
            store.check_integrity()
            assert pair.decode.stats()["store_disk_off"] == 0 and store.stats().disk_chunks >= 6 * 9
        assert store.close()
        print("fine")
    """
    done = run_python(code, tmp_path)
    assert done.stdout == "fine\n", done.stderr
    store = open_store(tmp_path, disk_bytes=64 << 20)
    assert store.stats().disk_chunks >= 6 * 9 and store.close()
