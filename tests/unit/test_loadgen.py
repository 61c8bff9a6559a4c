"""The load generator: arrivals, trace replay and metrics as pure functions, then against the gateway."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_backend import FakeBackend, make_app, serving
from rich.console import Console

from scripts.load_metrics import METRICS, RequestResult, is_good, parse_goodput, summarize
from scripts.load_workload import arrival_times, random_requests, read_mooncake, replay
from scripts.loadgen import LoadConfig, LoadError, run_load, save_report, table_of

POOL = list(range(100, 200))


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


@pytest.mark.parametrize("burstiness", [0.5, 1.0, 4.0])
def test_gaps_have_the_mean_and_spread_asked_for(burstiness: float) -> None:
    gaps = np.diff(arrival_times(20_000, rate=5.0, burstiness=burstiness, rng=rng()))
    assert gaps.min() >= 0
    assert gaps.mean() == pytest.approx(0.2, rel=0.03)
    assert gaps.std() / gaps.mean() == pytest.approx(1 / math.sqrt(burstiness), rel=0.05)


def test_an_infinite_rate_starts_all_at_once() -> None:
    assert arrival_times(3, rate=math.inf, burstiness=1.0, rng=rng()) == [0.0, 0.0, 0.0]


def test_random_prompts_share_their_prefix_and_repeat_with_the_seed() -> None:
    def make() -> list[Any]:
        return random_requests(
            [0.0] * 50, pool=POOL, input_tokens=20, output_tokens=10, range_ratio=0.5, prefix_tokens=7, rng=rng(3)
        )

    requests = make()
    assert requests == make()
    assert len({r.prompt[:7] for r in requests}) == 1
    assert len({r.prompt for r in requests}) == 50
    assert all(10 <= len(r.prompt) - 7 <= 30 and 5 <= r.output_tokens <= 15 for r in requests)
    assert all(token in POOL for r in requests for token in r.prompt)


TRACE = [
    {"timestamp": 0, "input_length": 600, "output_length": 10, "hash_ids": [1, 2]},
    {"timestamp": 4000, "input_length": 1024, "output_length": 20, "hash_ids": [1, 3]},
    {"timestamp": 9000, "input_length": 100, "output_length": 30, "hash_ids": [4]},
]


def test_replay_keeps_shared_blocks_times_and_lengths() -> None:
    rows = read_mooncake([json.dumps(row) for row in TRACE] + ["\n"])
    first, second = replay(rows, pool=POOL, speed=2.0, window_s=(0.0, 9.0), length_scale=1.0, seed=0)
    assert (first.start_s, second.start_s) == (0.0, 2.0)
    assert (len(first.prompt), len(second.prompt)) == (600, 1024)
    assert first.prompt[:512] == second.prompt[:512]
    assert first.prompt[512:600] != second.prompt[512:600]


def test_replay_in_a_window_and_to_scale() -> None:
    rows = read_mooncake(json.dumps(row) for row in TRACE)
    (only,) = replay(rows, pool=POOL, speed=1.0, window_s=(3.0, 9.0), length_scale=0.125, seed=0)
    assert (only.start_s, len(only.prompt), only.output_tokens) == (1.0, 128, 2)


@pytest.mark.parametrize("line", ["{", "[]", '{"timestamp": 0}', '{"timestamp": "x"}'])
def test_a_bad_trace_line_is_named(line: str) -> None:
    with pytest.raises(ValueError, match="line 2"):
        read_mooncake([json.dumps(TRACE[0]), line])


def result(ttft_s: float, e2e_s: float, tokens: int, **more: Any) -> RequestResult:
    gaps = [(e2e_s - ttft_s) / (tokens - 1)] * (tokens - 1) if tokens > 1 else []
    return RequestResult(
        prompt_tokens=10, scheduled_s=0.0, ttft_s=ttft_s, e2e_s=e2e_s, itl_s=gaps, output_tokens=tokens, **more
    )


def test_the_summary_by_hand() -> None:
    receipt = {"chunks": [{"level": "q1", "bytes": 10}, {"level": "q1", "bytes": 20}]}
    results = [
        result(0.1, 1.1, 11, receipt=receipt),
        result(0.3, 0.3, 1),
        RequestResult(prompt_tokens=9, scheduled_s=0, error="x"),
    ]
    report = summarize(results, duration_s=2.0, percentiles=[50, 99.9], goals_ms={"ttft": 200})
    assert (report["completed"], report["failed"]) == (2, 1)
    assert (report["total_input_tokens"], report["total_output_tokens"]) == (20, 12)
    assert report["request_throughput"] == 1.0
    assert report["request_goodput"] == 0.5
    assert report["output_throughput"] == 6.0
    assert report["total_token_throughput"] == 16.0
    assert report["mean_ttft_ms"] == pytest.approx(200)
    assert report["mean_tpot_ms"] == pytest.approx(100)
    assert report["median_itl_ms"] == pytest.approx(100)
    assert report["p50_e2el_ms"] == pytest.approx(700)
    assert "p99.9_ttft_ms" in report
    assert report["kv_levels"] == {"q1": {"chunks": 2, "bytes": 30}}


def test_goodput_goals() -> None:
    goals = parse_goodput(["ttft:500", "tpot:100"])
    assert goals == {"ttft": 500, "tpot": 100}
    assert is_good(result(0.5, 1.5, 11), goals)
    assert not is_good(result(0.6, 1.0, 11), goals)
    assert not is_good(result(0.1, 2.0, 11), goals)
    for bad in ("ttft", "ttft:soon", "itl:5", "ttft:-1"):
        with pytest.raises(ValueError, match="goodput"):
            parse_goodput([bad])


@pytest.fixture
def backend() -> FakeBackend:
    return FakeBackend("abcdefgh", step_s=0.0)


@pytest.fixture
def config(backend: FakeBackend) -> Iterator[LoadConfig]:
    with serving(make_app(backend)) as url:
        yield LoadConfig(base_url=url, num_prompts=6, random_input_len=20, random_output_len=5, request_rate=200)


QUIET = Console(quiet=True)


def test_against_the_gateway(config: LoadConfig, backend: FakeBackend, tmp_path: Path) -> None:
    report, results = run_load(replace(config, num_warmups=1, goodput=("ttft:60000",)), console=QUIET)
    assert (report["completed"], report["failed"], report["model_id"]) == (6, 0, "tiny")
    assert report["total_output_tokens"] == 30
    assert report["total_input_tokens"] == 120
    assert report["request_goodput"] == pytest.approx(report["request_throughput"])
    assert len(backend.requests) == 7
    assert all(len(r.itl_s) == 4 and r.text == "abcde" for r in results)
    assert report["kv_levels"]["q1"]["chunks"] == 6
    for metric in METRICS:
        assert report[f"p99_{metric}_ms"] >= 0
    save_report(report, results, path=tmp_path / "new" / "r.json", detailed=True, config=config)
    saved = json.loads((tmp_path / "new" / "r.json").read_text())
    assert {"date", "backend", "num_prompts", "request_rate", "burstiness", "duration", "ttfts", "itls"} <= set(saved)
    assert saved["generated_texts"] == ["abcde"] * 6
    assert table_of(report, metrics=METRICS).row_count > 10


def test_chats_too(config: LoadConfig) -> None:
    report, results = run_load(replace(config, endpoint="/v1/chat/completions", num_prompts=2), console=QUIET)
    assert report["completed"] == 2, [r.error for r in results]
    assert [r.text for r in results] == ["abcde", "abcde"]


def test_latency_counts_from_the_scheduled_start(config: LoadConfig, backend: FakeBackend) -> None:
    """One at a time: the second request waits for the first, and its first token is as late as that."""
    backend.step_s = 0.02
    limited = replace(config, num_prompts=2, request_rate=math.inf, max_concurrency=1)
    _, results = run_load(limited, console=QUIET)
    early, late = sorted(results, key=lambda r: r.ttft_s)
    assert late.ttft_s > early.e2e_s
    assert early.e2e_s >= 5 * 0.02


def test_failures_are_results(config: LoadConfig, backend: FakeBackend) -> None:
    async def refuse(request: Any) -> Any:
        await asyncio.sleep(0)
        raise ConnectionError("gone")
        yield

    backend.generate = refuse  # type: ignore[method-assign]
    report, results = run_load(config, console=QUIET)
    assert (report["completed"], report["failed"]) == (0, 6)
    assert all(r.error.startswith("HTTP 500") for r in results)
    with pytest.raises(LoadError, match="warm-up"):
        run_load(replace(config, num_warmups=1), console=QUIET)


def test_a_trace_against_the_gateway(config: LoadConfig, backend: FakeBackend, tmp_path: Path) -> None:
    trace = tmp_path / "trace.jsonl"
    trace.write_text("\n".join(json.dumps(row) for row in [*TRACE, {**TRACE[0], "input_length": 10**6}]))
    replayed = replace(config, dataset_name="mooncake", dataset_path=trace, trace_speed=1000.0, trace_length_scale=0.25)
    report, _ = run_load(replayed, console=QUIET)
    assert report["completed"] == 4
    assert sorted(len(r.token_ids) for r in backend.requests) == [25, 150, 256, 256]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"model": "other"}, "tiny"),
        ({"random_input_len": 5000}, "context of 512"),
        ({"num_prompts": 0}, "--num-prompts"),
        ({"request_rate": 0.0}, "--request-rate"),
        ({"dataset_name": "sharegpt"}, "random or mooncake"),
        ({"dataset_name": "mooncake"}, "--dataset-path"),
        ({"dataset_name": "mooncake", "dataset_path": Path("none.jsonl")}, "none.jsonl"),
        ({"goodput": ("ttft",)}, "ttft:500"),
        ({"percentile_metrics": ("ttf",)}, "--percentile-metrics"),
        ({"base_url": "http://127.0.0.1:9"}, "no server answers"),
    ],
)
def test_what_cannot_run_says_why(config: LoadConfig, change: dict[str, Any], says: str) -> None:
    with pytest.raises(LoadError, match=says):
        run_load(replace(config, **change), console=QUIET)
