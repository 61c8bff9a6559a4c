"""Continuous batching: which rows the next forward pass computes. Pure bookkeeping: no tensors, no clock.

A sequence is FILLING (its prompt's chunks are loaded or computed, decode/fill.py decides), then TAIL (the last prompt
tokens run), then RUNNING (one row a step), then ENDED. Each step takes all running rows and, within a token budget,
prompt slices: of the sequence with the earliest deadline first.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from decode.requests import GenerationRequest


class Phase(Enum):
    FILLING = "filling"
    TAIL = "tail"
    RUNNING = "running"
    ENDED = "ended"


@dataclass(slots=True, kw_only=True, eq=False)
class Sequence:
    """One request on a decode worker. `work`: prompt tokens [start, stop) to compute now, None when there are none."""

    key: str
    request: GenerationRequest
    block_table: list[int]
    deadline: float
    arrival: int
    phase: Phase = Phase.FILLING
    work: tuple[int, int] | None = None
    work_chunk: int | None = None
    output: list[int] = field(default_factory=list)
    itl_s: float = 0.1
    is_held: bool = False  # its next token waits for pages to be refined
    pins: int = 0  # users of the pages (a forward pass, a decoding blob): they are freed only when nobody is left

    @property
    def num_tokens(self) -> int:
        return len(self.request.token_ids) + len(self.output)


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """Compute tokens [start, stop) of `sequence`; `sample`: draw the next token from the logits of the last one."""

    sequence: Sequence
    start: int
    stop: int
    sample: bool

    def token_ids(self) -> list[int]:
        prompt, output = self.sequence.request.token_ids, self.sequence.output
        if self.start >= len(prompt):
            return output[self.start - len(prompt) : self.stop - len(prompt)]
        assert self.stop <= len(prompt)
        return list(prompt[self.start : self.stop])


class Scheduler:
    """Holds the sequences of one worker. The caller tells it what happened and carries out what it plans."""

    def __init__(self) -> None:
        self._sequences: dict[str, Sequence] = {}

    def __len__(self) -> int:
        return len(self._sequences)

    def add(self, sequence: Sequence) -> None:
        assert sequence.key not in self._sequences
        self._sequences[sequence.key] = sequence

    def get(self, key: str) -> Sequence | None:
        return self._sequences.get(key)

    def all(self) -> list[Sequence]:
        return list(self._sequences.values())

    def in_phase(self, phase: Phase) -> list[Sequence]:
        return [sequence for sequence in self._sequences.values() if sequence.phase is phase]

    @property
    def is_any_running(self) -> bool:
        return any(sequence.phase is Phase.RUNNING for sequence in self._sequences.values())

    def work_before(self, sequence: Sequence) -> list[tuple[int, int]]:
        """Prompt tokens [start, stop) of others that are computed before this sequence's turn comes."""
        ours = (sequence.deadline, sequence.arrival)
        return [
            other.work
            for other in self._sequences.values()
            if other.work is not None and (other.deadline, other.arrival) < ours
        ]

    def remove(self, key: str) -> None:
        self._sequences.pop(key).phase = Phase.ENDED

    def next_rows(self, prompt_tokens: int) -> list[Row]:
        """The rows of the next step: every running sequence, then at most `prompt_tokens` tokens of prompts."""
        rows = []
        for sequence in self.in_phase(Phase.RUNNING):
            if sequence.is_held:
                continue
            last = sequence.num_tokens - 1
            rows.append(Row(sequence=sequence, start=last, stop=last + 1, sample=True))
        waiting = [sequence for sequence in self._sequences.values() if sequence.work is not None]
        for sequence in sorted(waiting, key=lambda item: (item.deadline, item.arrival)):
            if prompt_tokens <= 0:
                break
            assert sequence.work is not None
            start, stop = sequence.work
            end = min(stop, start + prompt_tokens)
            prompt_tokens -= end - start
            is_last = sequence.phase is Phase.TAIL and end == stop
            rows.append(Row(sequence=sequence, start=start, stop=end, sample=is_last))
        return rows

    def computed(self, row: Row) -> bool:
        """A prompt row is done; whether that finishes the sequence's piece of work."""
        sequence = row.sequence
        assert sequence.work is not None and sequence.work[0] == row.start
        sequence.work = None if row.stop == sequence.work[1] else (row.stop, sequence.work[1])
        return sequence.work is None
