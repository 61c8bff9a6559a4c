"""A plan to be followed: which chunk is loaded at which level, which is computed, and when which is refined. Pure.

It comes from the receipt of an earlier request (`kv.plan`), so that a lossy answer can be had again: the same chunks at
the same levels, computed on the same ones, refined after the same number of tokens, give the same KV at every step.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from decode.fill_chunks import CACHED, TEXT, ChunkLog


class BadPlan(ValueError):
    """The plan does not fit the request or this server; the text says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplayStep:
    """Raise `chunk` to `level` when `after_tokens` tokens have been sampled."""

    chunk: int
    level: str
    after_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Replay:
    """levels: of each chunk at the first token, "text" for a computed one. steps: in the order of their tokens."""

    levels: tuple[str, ...]
    steps: tuple[ReplayStep, ...]


def read_replay(plan: dict[str, Any], *, num_chunks: int, chunk_tokens: int, known: Collection[str]) -> Replay:
    """A plan as requests carry it, checked. Raises BadPlan."""
    try:
        size, levels, refinements = plan["chunk_tokens"], list(plan["levels"]), list(plan.get("refinements", []))
        steps = [ReplayStep(chunk=r["chunk"], level=r["level"], after_tokens=r["after_tokens"]) for r in refinements]
    except (KeyError, TypeError) as error:
        raise BadPlan(f"a plan has chunk_tokens, levels and refinements, as a receipt's `plan` has ({error})") from None
    if size != chunk_tokens:
        raise BadPlan(f"it was made for chunks of {size} tokens, this server uses {chunk_tokens}")
    if len(levels) != num_chunks:
        raise BadPlan(f"it has {len(levels)} chunks, this prompt has {num_chunks}: it belongs to another prompt")
    for level in [*levels, *(step.level for step in steps)]:
        if level not in known and level != TEXT:
            raise BadPlan(f"it names level {level!r}; known are {', '.join(known)}")
    for step in steps:
        is_chunk = type(step.chunk) is int and 0 <= step.chunk < num_chunks
        if not is_chunk or type(step.after_tokens) is not int or step.after_tokens < 1:
            raise BadPlan(
                f"it refines chunk {step.chunk!r} after {step.after_tokens!r} tokens; there is no such moment"
            )
    steps.sort(key=lambda step: step.after_tokens)
    order = list(known)
    at = dict(enumerate(levels))
    for step in steps:
        if TEXT in (at[step.chunk], step.level) or order.index(step.level) >= order.index(at[step.chunk]):
            raise BadPlan(f"it refines chunk {step.chunk} from {at[step.chunk]} to {step.level}: not better")
        at[step.chunk] = step.level
    return Replay(levels=tuple(levels), steps=tuple(steps))


def plan_of(chunks: Sequence[ChunkLog], chunk_tokens: int) -> dict[str, Any]:
    """What a request did, as a plan that another request can follow."""
    steps = [
        {"chunk": index, "level": step.level, "after_tokens": step.after_tokens}
        for index, log in enumerate(chunks)
        for step in log.refinements
        if step.after_tokens > 0
    ]
    return {
        "chunk_tokens": chunk_tokens,
        "levels": [TEXT if log.first_level == CACHED else log.first_level for log in chunks],
        "refinements": sorted(steps, key=lambda step: (step["after_tokens"], step["chunk"])),
    }
