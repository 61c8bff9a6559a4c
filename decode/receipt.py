"""The KV receipt: what a request's KV cost, chunk by chunk, and where the time to its first token went. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from decode.fill import TEXT, FillMachine


@dataclass(slots=True, kw_only=True)
class Timeline:
    """Seconds on the worker's clock; None for what did not happen."""

    received_at: float
    admitted_at: float | None = None
    opened_at: float | None = None
    filled_at: float | None = None
    first_token_at: float | None = None


def build_receipt(
    *,
    request_id: str,
    kv_mode: str,
    prompt_tokens: int,
    chunk_tokens: int,
    source: str | None,
    timeline: Timeline,
    fill: FillMachine,
    promised_kl: Mapping[str, float | None],
    ended_at: float,
) -> dict[str, Any]:
    """A dictionary of plain values. Times are milliseconds since the worker received the request; the parts of
    `ttft_ms` add up to it. `levels` and `bytes` count what reached the pages, `received_bytes` all that
    came. `promised_kl` of the whole is that of its worst level: None if any level promises nothing.
    """

    def since(at: float | None) -> float | None:
        return None if at is None else round((at - timeline.received_at) * 1e3, 3)

    def between(begin: float | None, end: float | None) -> float | None:
        return None if begin is None or end is None else round((end - begin) * 1e3, 3)

    chunks = [
        {
            "index": index,
            "level": log.level or None,
            "asked_levels": log.asked_levels,
            "bytes": log.bytes if log.filled_at is not None and log.level != TEXT else 0,
            "bad_blobs": log.bad_blobs,
            "asked_ms": since(log.asked_at),
            "first_part_ms": since(log.first_part_at),
            "arrived_ms": since(log.arrived_at),
            "compute_ms": since(log.compute_at),
            "filled_ms": since(log.filled_at),
        }
        for index, log in enumerate(fill.chunks)
    ]
    levels = Counter(log.level for log in fill.chunks if log.filled_at is not None)
    lossy = [promised_kl.get(level) for level in levels if level != TEXT]
    return {
        "request_id": request_id,
        "kv_mode": kv_mode,
        "source": source,
        "prompt_tokens": prompt_tokens,
        "chunk_tokens": chunk_tokens,
        "tail_tokens": prompt_tokens - chunk_tokens * len(fill.chunks),
        "levels": dict(levels),
        "bytes": sum(chunk["bytes"] for chunk in chunks),
        "received_bytes": fill.received_bytes,
        "recomputed_chunks": levels[TEXT],
        "live_prefill": fill.live,
        "promised_kl": None if None in lossy else max(lossy, default=0.0),  # type: ignore[type-var]
        "link_mbps": round(fill.link.bytes_per_s(ended_at) * 8e-6, 3) if fill.received_bytes else None,
        "ttft_ms": between(timeline.received_at, timeline.first_token_at),
        "ttft_parts_ms": {
            "queue": between(timeline.received_at, timeline.admitted_at),
            "fill": between(timeline.admitted_at, timeline.filled_at),
            "tail": between(timeline.filled_at, timeline.first_token_at),
        },
        "opened_ms": since(timeline.opened_at),
        "target_ms": round((fill.spec.deadline - (timeline.admitted_at or timeline.received_at)) * 1e3, 3),
        "reasons": [{"at_ms": since(at), "what": what} for at, what in fill.reasons],
        "chunks": chunks,
    }
