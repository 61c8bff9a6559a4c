"""When each chunk of a receipt was waited for, on the wire, decoded, computed and refined, as bars of text. Pure.

A bar is one cell a slice of time; what came later is drawn over what came before. The time up to the first token has a
scale of its own, left of `|`, because refinements after it may go on a hundred times as long.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

WAIT, WIRE, QUEUED, DECODE, COMPUTE, REFINE = ".=,dc+"
LEGEND = {
    WAIT: "asked for",
    WIRE: "on the wire",
    QUEUED: "waits to be decoded",
    DECODE: "decoded",
    COMPUTE: "computed",
    REFINE: "refined (from asking to the pages)",
    "|": "first token",
}
STYLES = {WAIT: "dim", WIRE: "cyan", QUEUED: "dim", DECODE: "blue", COMPUTE: "magenta", REFINE: "green"}
# In a row of several chunks a cell shows what says most about where the time went.
_RANK = {symbol: rank for rank, symbol in enumerate((" ", WAIT, QUEUED, DECODE, REFINE, COMPUTE, WIRE))}
MAX_ROWS = 24
AFTER_SHARE = 0.3  # of a bar, for what came after the first token


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """Milliseconds since the request came."""

    symbol: str
    begin_ms: float
    end_ms: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """Consecutive chunks in one line; times are means over those that have one, bytes are in all."""

    name: str
    levels: str
    sources: str
    num_bytes: int | None
    wait_ms: float | None
    wire_ms: float | None
    decode_ms: float | None
    compute_ms: float | None
    bar: str


def chunk_rows(chunks: Sequence[Mapping[str, Any]], axis: Axis) -> list[Row]:
    """A row for each chunk, or for as many as it takes to keep to MAX_ROWS."""
    per_row = chunks_per_row(len(chunks))
    return [_row(chunks[at : at + per_row], at, axis) for at in range(0, len(chunks), per_row)]


def chunks_per_row(num_chunks: int) -> int:
    """How many chunks share a row."""
    return max(1, -(-num_chunks // MAX_ROWS))


def tail_row(receipt: Mapping[str, Any], axis: Axis) -> Row | None:
    """The end of the prompt, which is computed in any case; None if it never was."""
    tail_ms = (receipt.get("ttft_parts_ms") or {}).get("tail")
    if tail_ms is None or axis.first_ms is None:
        return None
    span = Span(symbol=COMPUTE, begin_ms=axis.first_ms - tail_ms, end_ms=axis.first_ms)
    return Row(
        name="tail", levels="", sources="", num_bytes=None, wait_ms=None, wire_ms=None, decode_ms=None,
        compute_ms=tail_ms, bar=axis.bar([span]),
    )  # fmt: skip


def _row(chunks: Sequence[Mapping[str, Any]], first: int, axis: Axis) -> Row:
    levels = Counter(_level(chunk) for chunk in chunks)
    return Row(
        name=str(first) if len(chunks) == 1 else f"{first}-{first + len(chunks) - 1}",
        levels=" ".join(level if len(chunks) == 1 else f"{level}:{count}" for level, count in levels.items()),
        sources=" ".join(dict.fromkeys(str(chunk["source"]) for chunk in chunks if chunk.get("source") is not None)),
        num_bytes=sum(chunk.get("bytes") or 0 for chunk in chunks),
        wait_ms=_mean(_lasted(chunk, WAIT) for chunk in chunks),
        wire_ms=_mean(_lasted(chunk, WIRE) for chunk in chunks),
        decode_ms=_mean(chunk.get("decode_ms") if _is_loaded(chunk) else None for chunk in chunks),
        compute_ms=_mean(_lasted(chunk, COMPUTE) for chunk in chunks),
        bar=merged([axis.bar(spans_of(chunk, axis.end_ms)) for chunk in chunks]),
    )


def _level(chunk: Mapping[str, Any]) -> str:
    """At the first token, and behind a stroke what it was refined to later; `-`: it never was in place."""
    level = chunk.get("level") or "-"
    later = [step["level"] for step in chunk.get("refinements") or () if step.get("after_tokens")]
    return f"{level}|{later[-1]}" if later else level


def _is_loaded(chunk: Mapping[str, Any]) -> bool:
    return chunk.get("compute_ms") is None


def _lasted(chunk: Mapping[str, Any], symbol: str) -> float | None:
    """How long one phase took; None if it did not happen or did not end."""
    names = {WAIT: ("asked_ms", "first_part_ms"), WIRE: ("first_part_ms", "arrived_ms")}
    begin, end = names.get(symbol, ("compute_ms", "filled_ms"))
    if chunk.get(begin) is None or chunk.get(end) is None or chunk[end] < chunk[begin]:
        return None
    return float(chunk[end] - chunk[begin])


def _mean(values: Iterable[float | None]) -> float | None:
    there = [value for value in values if value is not None]
    return sum(there) / len(there) if there else None


def spans_of(chunk: Mapping[str, Any], end_ms: float) -> list[Span]:
    """In the order in which they are drawn. What did not end goes on to `end_ms`, or until the chunk was computed.

    A damaged blob leaves the time of its arrival behind when the chunk is asked for again: an arrival before the
    request for it is none.
    """
    asked, first = chunk.get("asked_ms"), chunk.get("first_part_ms")
    computed, filled = chunk.get("compute_ms"), chunk.get("filled_ms")
    arrived = chunk.get("arrived_ms")
    if arrived is not None and asked is not None and arrived < asked:
        arrived = None
    is_loaded = computed is None
    stop = end_ms if computed is None else computed
    begun_decode = None
    if is_loaded and filled is not None and arrived is not None:
        begun_decode = max(arrived, filled - (chunk.get("decode_ms") or 0.0))
    marks = [
        (WAIT, asked, _first_of(first, arrived, filled if is_loaded else None, stop)),
        (WIRE, first, _first_of(arrived, filled if is_loaded else None, stop)),
        (QUEUED, arrived if is_loaded else None, _first_of(begun_decode, stop)),
        (DECODE, begun_decode, filled),
        (COMPUTE, computed, _first_of(filled, end_ms)),
    ]
    for step in chunk.get("refinements") or ():
        marks.append((REFINE, step.get("asked_ms"), step.get("applied_ms")))
    return [
        Span(symbol=symbol, begin_ms=begin, end_ms=end)
        for symbol, begin, end in marks
        if begin is not None and end is not None and end >= begin
    ]


def _first_of(*times: float | None) -> float | None:
    return next((time for time in times if time is not None), None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Axis:
    """first_ms: the first token; None if there was none. end_ms: when the last thing happened."""

    first_ms: float | None
    end_ms: float
    width: int

    @classmethod
    def of(cls, receipt: Mapping[str, Any], width: int) -> Axis:
        """Of a receipt's times, `width` cells."""
        first_ms = receipt.get("ttft_ms")
        times = [first_ms, receipt.get("opened_ms"), *(reason.get("at_ms") for reason in receipt.get("reasons") or ())]
        for chunk in receipt.get("chunks") or ():
            times += [chunk.get(f"{name}_ms") for name in ("asked", "first_part", "arrived", "compute", "filled")]
            times += [step.get("applied_ms") for step in chunk.get("refinements") or ()]
        return cls(first_ms=first_ms, end_ms=max([t for t in times if t is not None], default=0.0), width=width)

    @property
    def _num_after(self) -> int:
        """Cells right of the first token."""
        if self.first_ms is None or self.end_ms <= self.first_ms:
            return 0
        return max(4, int(AFTER_SHARE * self.width))

    def _cell(self, at_ms: float) -> float:
        """Where a moment lies, in cells."""
        if self.first_ms is None or self._num_after == 0:
            return at_ms / self.end_ms * self.width if self.end_ms > 0 else 0.0
        num_before = self.width - self._num_after - 1
        if at_ms <= self.first_ms:
            return at_ms / self.first_ms * num_before if self.first_ms > 0 else 0.0
        return num_before + 1 + (at_ms - self.first_ms) / (self.end_ms - self.first_ms) * self._num_after

    def bar(self, spans: Sequence[Span]) -> str:
        """Every span has a cell at least, unless a later one takes it."""
        cells = [" "] * self.width
        for span in spans:
            begin = min(int(self._cell(span.begin_ms)), self.width - 1)
            end = min(max(begin + 1, round(self._cell(span.end_ms))), self.width)
            cells[begin:end] = span.symbol * (end - begin)
        if self._num_after:
            cells[self.width - self._num_after - 1] = "|"
        return "".join(cells)

    def ruler(self) -> str:
        """The times at the ends and at the first token."""
        if not self._num_after:
            return "0" + f"{self.end_ms:,.0f} ms".rjust(self.width - 1)
        assert self.first_ms is not None
        num_before = self.width - self._num_after
        return "0" + f"{self.first_ms:,.0f} ms|".rjust(num_before - 1) + f"{self.end_ms:,.0f} ms".rjust(self._num_after)


def merged(bars: Sequence[str]) -> str:
    """Several bars as one."""
    return "".join(max(cells, key=lambda cell: _RANK.get(cell, len(_RANK))) for cells in zip(*bars, strict=True))
