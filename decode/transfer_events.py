"""What transport says of a transfer, as the fill machine understands it. What the source claims is checked. Pure."""

from __future__ import annotations

import math
from typing import Any

from decode import fill_events as ev
from transport import events as wire

MAX_ENCODE_S = 60.0  # what a source claims beyond it is no measurement


def fill_event(event: wire.TransferEvent, *, source: int, num_chunks: int) -> ev.Event:
    match event:
        case wire.Opened():
            sizes = _stored_sizes(event.body, num_chunks)
            if sizes is None:
                return ev.SourceLost(source=source, reason="its answer does not fit the prompt", is_final=True)
            return ev.Opened(
                source=source,
                stored_bytes=sizes,
                computes=event.body.get("computes") is not False,
                encode_s=_seconds(event.body.get("encode_s")),
                kl=_promises(event.body.get("kl"), num_chunks),
            )
        case wire.PartArrived():
            return ev.PartArrived(
                source=source,
                chunk=event.chunk,
                level=event.level,
                received_bytes=event.bytes_received,
                total_bytes=event.total_bytes,
                part_bytes=event.part_bytes,
                wire_s=event.wire_s,
            )
        case wire.BlobArrived():
            return ev.BlobArrived(source=source, chunk=event.chunk, level=event.level, blob=event.blob)
        case wire.ChunkFailed():
            return ev.ChunkRefused(source=source, chunk=event.chunk, reason=event.reason)
        case wire.Refused() | wire.TransferLost():
            return ev.SourceLost(source=source, reason=event.reason, is_final=isinstance(event, wire.Refused))
        case wire.TransferSuspect() | wire.TransferRecovered():
            return ev.Tick()  # silence is seen by the link estimator


def _seconds(found: Any) -> dict[str, float]:
    """A source's encoding times by level, as far as they make sense."""
    if not isinstance(found, dict):
        return {}
    return {
        level: float(value)
        for level, value in found.items()
        if isinstance(level, str) and isinstance(value, float | int) and 0 <= value < MAX_ENCODE_S
    }


def _promises(found: Any, num_chunks: int) -> tuple[float, ...]:
    """What a source's KV of each chunk promises; what makes no sense is nothing that could be relied on."""
    if found is None:
        return ()
    if not isinstance(found, list) or len(found) != num_chunks:
        return (math.inf,) * num_chunks
    return tuple(float(kl) if isinstance(kl, float | int) and kl >= 0 else math.inf for kl in found)


def _stored_sizes(body: dict[str, Any], num_chunks: int) -> tuple[dict[str, int] | None, ...] | None:
    """The source's list of what it has of each chunk, or None if it makes no sense."""
    stored = body.get("stored")
    if not isinstance(stored, list) or len(stored) != num_chunks:
        return None
    for sizes in stored:
        if sizes is not None and not (
            isinstance(sizes, dict)
            and all(isinstance(level, str) and type(size) is int and size > 0 for level, size in sizes.items())
        ):
            return None
    return tuple(stored)
