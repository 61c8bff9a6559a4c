"""The KV receipt: what a request's KV cost, chunk by chunk, and where the time to its first token went. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from decode.fill import FillMachine
from decode.fill_chunks import CACHED, TEXT, ChunkLog
from decode.replay import plan_of


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
    sources: Sequence[str],
    timeline: Timeline,
    fill: FillMachine,
    promised_kl: Mapping[str, float | None],
    ended_at: float,
) -> dict[str, Any]:
    """A dictionary of plain values. Times are milliseconds since the worker received the request; the parts of
    `ttft_ms` add up to it. `levels` and `bytes` count what the first token saw, `refined_*` what came later,
    `received_bytes` all that came. `chunks_in_part`: chunks of which windows left layers out, all of them perhaps.
    """

    def since(at: float | None) -> float | None:
        return None if at is None else round((at - timeline.received_at) * 1e3, 3)

    def between(begin: float | None, end: float | None) -> float | None:
        return None if begin is None or end is None else round((end - begin) * 1e3, 3)

    at_first = [log.first_level or log.level for log in fill.chunks if log.filled_at is not None]
    at_end = [log.level for log in fill.chunks if log.filled_at is not None]
    seen = [log.first_level or log.level for log in fill.chunks if log.filled_at is not None and log.layers != ()]
    steps = [step for log in fill.chunks for step in log.refinements]
    filled = [log.filled_at for log in fill.chunks] + [fill.front_at]
    last_chunk_at = max((at for at in filled if at is not None), default=None)
    admitted_at, filled_at = timeline.admitted_at, timeline.filled_at
    last_chunk_at = _within(admitted_at, last_chunk_at, filled_at)
    opened_at = _within(admitted_at, timeline.opened_at, last_chunk_at)
    # What was cached exactly is what computing gives; what was not, no plan can say how to get again.
    is_repeatable = CACHED not in at_first or promised_kl.get(CACHED) == 0
    is_repeatable &= not fill.num_front_tokens or fill.spec.front_kl == 0
    return {
        "request_id": request_id,
        "kv_mode": kv_mode,
        "source": sources[0] if sources else None,
        "sources": list(sources),
        "prompt_tokens": prompt_tokens,
        "chunk_tokens": chunk_tokens,
        "cached_tokens": fill.spec.cached_tokens,
        "partial_tokens": fill.num_front_tokens,
        "partial_decode_ms": between(0.0, fill.front_s),
        "tail_tokens": prompt_tokens - max(chunk_tokens * len(fill.chunks), fill.spec.cached_tokens, fill.front_stop),
        "levels": dict(Counter(at_first)),
        "levels_at_end": dict(Counter(at_end)),
        "bytes": sum(map(_base_bytes, fill.chunks)) + sum(step.bytes for step in steps if not step.after_tokens),
        "refined_bytes": sum(step.bytes for step in steps if step.after_tokens),
        "received_bytes": fill.received_bytes,
        "recomputed_chunks": at_first.count(TEXT),
        "live_prefill": fill.live,
        "chunks_in_part": sum(_num_layers(log) is not None for log in fill.chunks),
        "promised_kl": worst_kl(seen, promised_kl),
        "mean_promised_kl": mean_kl(seen, promised_kl),
        "link_mbps": round(fill.loader.rate(ended_at) * 8e-6, 3) if fill.received_bytes else None,
        "ttft_ms": between(timeline.received_at, timeline.first_token_at),
        "ttft_parts_ms": {
            "queue": between(timeline.received_at, admitted_at),
            "open": between(admitted_at, opened_at),
            "fill": between(opened_at, last_chunk_at),
            "refine": between(last_chunk_at, filled_at),
            "tail": between(filled_at, timeline.first_token_at),
        },
        "opened_ms": since(timeline.opened_at),
        "target_ms": round((fill.spec.deadline - (admitted_at or timeline.received_at)) * 1e3, 3),
        "num_decisions": fill.num_decisions,
        "reasons": [{"at_ms": since(at), "what": what} for at, what in fill.reasons],
        "plan": plan_of(fill.chunks, chunk_tokens) if fill.ready and is_repeatable else None,
        "chunks": [
            {
                "index": index,
                "level": (log.first_level or log.level) or None,
                "source": None if log.source is None or log.level == TEXT else sources[log.source],
                "asked_levels": log.asked_levels,
                "bytes": _base_bytes(log),
                "layers": _num_layers(log),
                "bad_blobs": log.bad_blobs,
                "asked_ms": since(log.asked_at),
                "first_part_ms": since(log.first_part_at),
                "arrived_ms": since(log.arrived_at),
                "compute_ms": since(log.compute_at),
                "filled_ms": since(log.filled_at),
                "decode_ms": between(0.0, log.decode_s),
                "refinements": [
                    {
                        "level": step.level,
                        "bytes": step.bytes,
                        "asked_ms": since(step.asked_at),
                        "applied_ms": since(step.applied_at),
                        "after_tokens": step.after_tokens,
                    }
                    for step in log.refinements
                ],
            }
            for index, log in enumerate(fill.chunks)
        ],
    }


def _base_bytes(log: ChunkLog) -> int:
    return log.bytes if log.filled_at is not None and log.level not in (TEXT, CACHED) else 0


def _num_layers(log: ChunkLog) -> int | None:
    """How many layers of a loaded chunk came where windows left some out; None: all, or it was not loaded."""
    if log.filled_at is None or log.level in (TEXT, CACHED) or log.layers is None:
        return None
    return len(log.layers)


def _within(low: float | None, value: float | None, high: float | None) -> float | None:
    """`value` between two others, so that the parts of a time add up; a prompt without chunks has none of its own."""
    if low is None or high is None:
        return None
    return low if value is None else min(max(value, low), high)


def worst_kl(levels: Sequence[str], promised_kl: Mapping[str, float | None]) -> float | None:
    """The bound that holds for the whole: that of the worst chunk. None if a level promises nothing."""
    kls = [promised_kl.get(level) for level in levels if level != TEXT]
    return None if None in kls else max(kls, default=0.0)  # type: ignore[type-var]


def mean_kl(levels: Sequence[str], promised_kl: Mapping[str, float | None]) -> float | None:
    """What to expect of the whole: chunks' errors add up to first order, each in proportion to its tokens."""
    kls = [0.0 if level == TEXT else promised_kl.get(level) for level in levels]
    return None if None in kls else sum(kls) / max(len(kls), 1)  # type: ignore[arg-type]
