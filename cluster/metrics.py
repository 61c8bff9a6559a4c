"""The gateway's own metrics, in Prometheus text. From events and receipts; workers add theirs."""

from __future__ import annotations

from typing import Any

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
    generate_latest,
)

disable_created_metrics()  # type: ignore[no-untyped-call]  # a series per counter that says only when it was made

_SECONDS = (
    0.005,
    0.01,
    0.02,
    0.04,
    0.06,
    0.08,
    0.1,
    0.15,
    0.25,
    0.5,
    0.75,
    1.0,
    1.5,
    2.5,
    5.0,
    7.5,
    10.0,
    20.0,
    40.0,
    80.0,
)
_GAP_SECONDS = (
    0.002,
    0.005,
    0.01,
    0.015,
    0.02,
    0.025,
    0.03,
    0.04,
    0.05,
    0.075,
    0.1,
    0.15,
    0.2,
    0.3,
    0.4,
    0.5,
    0.75,
    1.0,
    2.5,
)

_AFTER_QUEUE = ("open", "fill", "refine", "tail")  # the parts of a receipt's time to first token after the first one


class GatewayMetrics:
    """Counters and histograms of one gateway, in a registry of their own; named as vLLM names them."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        r = self.registry
        self.ttft = Histogram(
            "kvstream_time_to_first_token_seconds", "Arrival to first token.", registry=r, buckets=_SECONDS
        )
        self.itl = Histogram(
            "kvstream_inter_token_latency_seconds",
            "Gap between two tokens of a request.",
            registry=r,
            buckets=_GAP_SECONDS,
        )
        self.e2e = Histogram(
            "kvstream_e2e_request_latency_seconds", "Arrival to last token.", registry=r, buckets=_SECONDS
        )
        self.queue_time, self.prefill_time, self.decode_time = (
            Histogram(f"kvstream_request_{name}_time_seconds", text, registry=r, buckets=_SECONDS)
            for name, text in (
                ("queue", "Arrival at the decode worker to admission."),
                ("prefill", "Admission to first token: KV loaded or computed, and the end of the prompt."),
                ("decode", "First token to last."),
            )
        )
        self.running = Gauge("kvstream_num_requests_running", "Requests being served.", registry=r)
        self.prompt_tokens = Counter("kvstream_prompt_tokens_total", "Prompt tokens.", registry=r)
        self.generation_tokens = Counter("kvstream_generation_tokens_total", "Generated tokens.", registry=r)
        self.success = Counter(
            "kvstream_request_success_total", "Requests that ended well.", ["finished_reason"], registry=r
        )
        self.failure = Counter(
            "kvstream_request_failure_total",
            "Requests refused or failed, by HTTP status.",
            ["status"],
            registry=r,
        )
        self.kv_bytes = Counter(
            "kvstream_kv_received_bytes_total",
            "KV bytes that decode workers received.",
            ["level"],
            registry=r,
        )
        self.kv_chunks = Counter(
            "kvstream_kv_chunks_total", "Chunks of KV, by level; text: recomputed.", ["level"], registry=r
        )

    def token_gap(self, gap_s: float, tokens: int) -> None:
        """`tokens` new tokens came together, `gap_s` after the ones before."""
        for _ in range(tokens):
            self.itl.observe(gap_s / tokens)

    def finished(
        self,
        *,
        reason: str,
        e2e_s: float,
        decode_s: float,
        completion_tokens: int,
        receipt: dict[str, Any] | None,
    ) -> None:
        """A request ended well."""
        self.success.labels(finished_reason=reason).inc()
        self.e2e.observe(e2e_s)
        self.decode_time.observe(decode_s)
        self.generation_tokens.inc(completion_tokens)
        parts_ms = (receipt or {}).get("ttft_parts_ms") or {}
        if parts_ms.get("queue") is not None:
            self.queue_time.observe(parts_ms["queue"] / 1000)
        after_queue = [parts_ms[part] for part in _AFTER_QUEUE if parts_ms.get(part) is not None]
        if len(after_queue) == len(_AFTER_QUEUE):
            self.prefill_time.observe(sum(after_queue) / 1000)
        for level, chunks, size_bytes in receipt_levels(receipt or {}):
            self.kv_chunks.labels(level=level).inc(chunks)
            self.kv_bytes.labels(level=level).inc(size_bytes)

    def text(self) -> str:
        """Prometheus text format."""
        return generate_latest(self.registry).decode()


def receipt_levels(receipt: dict[str, Any]) -> list[tuple[str, int, int]]:
    """(level, chunks, bytes) for every level in a receipt's `chunks`: [{"level": ..., "bytes": ...}, ...]."""
    totals: dict[str, tuple[int, int]] = {}
    for chunk in receipt.get("chunks") or ():
        level = chunk.get("level")
        if level is None:  # the request ended before this chunk was there
            continue
        count, size_bytes = totals.get(level, (0, 0))
        totals[level] = (count + 1, size_bytes + int(chunk.get("bytes") or 0))
    return [(level, *total) for level, total in totals.items()]
