"""From single results of a load test to its report, under the names that vLLM's `bench serve` uses. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

METRICS = ("ttft", "tpot", "itl", "e2el")
TITLES = {
    "ttft": "Time to First Token",
    "tpot": "Time per Output Token (excl. 1st token)",
    "itl": "Inter-token Latency",
    "e2el": "End-to-end Latency",
}


@dataclass(slots=True, kw_only=True)
class RequestResult:
    """One request as the client saw it. Times are seconds; latencies count from the *scheduled* start."""

    prompt_tokens: int
    scheduled_s: float  # from the start of the test
    ttft_s: float = 0.0
    e2e_s: float = 0.0
    itl_s: list[float] = field(default_factory=list)
    output_tokens: int = 0
    text: str = ""
    error: str = ""
    receipt: dict[str, Any] | None = None

    @property
    def ok(self) -> bool:
        """Whether it ended well."""
        return not self.error

    def tpot_s(self) -> float | None:
        """Time per output token after the first; None for a single token."""
        return (self.e2e_s - self.ttft_s) / (self.output_tokens - 1) if self.output_tokens > 1 else None


def parse_goodput(items: Sequence[str]) -> dict[str, float]:
    """["ttft:500", "tpot:100"] as milliseconds by metric. Raises ValueError."""
    goals: dict[str, float] = {}
    for item in items:
        name, _, value = item.partition(":")
        try:
            goals[name] = float(value)
        except ValueError:
            raise ValueError(f"goodput goal {item!r}: write METRIC:MILLISECONDS, such as ttft:500") from None
        if name not in ("ttft", "tpot", "e2el") or goals[name] < 0:
            raise ValueError(f"goodput goal {item!r}: the metric is ttft, tpot or e2el, the time not negative")
    return goals


def is_good(result: RequestResult, goals_ms: Mapping[str, float]) -> bool:
    """Whether a request met every goal."""
    seen = {"ttft": result.ttft_s, "tpot": result.tpot_s() or 0.0, "e2el": result.e2e_s}
    return result.ok and all(seen[name] * 1000 <= goal for name, goal in goals_ms.items())


def summarize(
    results: Sequence[RequestResult], *, duration_s: float, percentiles: Sequence[float], goals_ms: Mapping[str, float]
) -> dict[str, Any]:
    """The numbers of a report: counts, throughputs, {mean,median,std,pNN}_{metric}_ms."""
    good = [r for r in results if r.ok]
    total_in = sum(r.prompt_tokens for r in good)
    total_out = sum(r.output_tokens for r in good)
    report: dict[str, Any] = {
        "duration": duration_s,
        "completed": len(good),
        "failed": len(results) - len(good),
        "total_input_tokens": total_in,
        "total_output_tokens": total_out,
        "request_throughput": len(good) / duration_s,
        "request_goodput": sum(is_good(r, goals_ms) for r in results) / duration_s if goals_ms else None,
        "output_throughput": total_out / duration_s,
        "total_token_throughput": (total_in + total_out) / duration_s,
    }
    samples_s: dict[str, list[float]] = {
        "ttft": [r.ttft_s for r in good],
        "tpot": [t for r in good if (t := r.tpot_s()) is not None],
        "itl": [gap for r in good for gap in r.itl_s],
        "e2el": [r.e2e_s for r in good],
    }
    for name, samples in samples_s.items():
        report |= _spread(name, np.asarray(samples, dtype=np.float64) * 1000, percentiles)
    return {**report, "kv_levels": kv_levels(good)}


def _spread(name: str, samples_ms: np.ndarray[Any, Any], percentiles: Sequence[float]) -> dict[str, float]:
    if samples_ms.size == 0:
        samples_ms = np.zeros(1)
    spread = {
        f"mean_{name}_ms": float(samples_ms.mean()),
        f"median_{name}_ms": float(np.median(samples_ms)),
        f"std_{name}_ms": float(samples_ms.std()),
    }
    return spread | {f"p{p:g}_{name}_ms": float(np.percentile(samples_ms, p)) for p in percentiles}


def kv_levels(results: Sequence[RequestResult]) -> dict[str, dict[str, int]]:
    """Chunks and bytes of KV by level, from the receipts; empty for servers that send none."""
    levels: dict[str, dict[str, int]] = {}
    for result in results:
        for chunk in (result.receipt or {}).get("chunks") or ():
            if chunk.get("level") is None:  # the request ended before this chunk was there
                continue
            entry = levels.setdefault(chunk["level"], {"chunks": 0, "bytes": 0})
            entry["chunks"] += 1
            entry["bytes"] += int(chunk.get("bytes") or 0)
    return levels


def details(results: Sequence[RequestResult]) -> dict[str, list[Any]]:
    """What --save-detailed adds: a value (or list) per request."""
    return {
        "input_lens": [r.prompt_tokens for r in results],
        "output_lens": [r.output_tokens for r in results],
        "ttfts": [r.ttft_s for r in results],
        "itls": [r.itl_s for r in results],
        "start_times": [r.scheduled_s for r in results],
        "generated_texts": [r.text for r in results],
        "errors": [r.error for r in results],
        "kv_receipts": [r.receipt for r in results],
    }
