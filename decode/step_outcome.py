"""What a step's logits become: the next token of rows that are sampled, logprobs of prompt tokens where they were asked
for. Knows torch; no model, no lock."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from decode.logprobs import score_tokens
from decode.requests import TokenLogprobs
from decode.sampling import Drawn, sample_batch
from decode.sampling_state import SamplingState
from decode.scheduler import Row


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """Of one row. prompt_logprobs: of the prompt tokens from `row.start + 1` on."""

    drawn: Drawn | None = None
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()


def scores_prompt(row: Row, state: SamplingState | None) -> bool:
    """Whether the row needs the logits of all its tokens: logprobs were asked for of the prompt tokens after them."""
    return state is not None and state.scores_prompt and row.start < len(row.sequence.request.token_ids)


def outcomes(
    rows: Sequence[Row], states: Sequence[SamplingState | None], is_scored: Sequence[bool], logits: Tensor
) -> list[Outcome | Exception]:
    """logits: float32 [N, V], of all tokens of scored rows and of the last one of other sampled rows, in the order of
    the rows. A state is None for a request that has ended. An error stands in place of its row's outcome."""
    found: list[Outcome | Exception] = [Outcome()] * len(rows)
    sampled: list[tuple[int, int, SamplingState]] = []  # row, its line of the logits, state
    line = 0
    for i, (row, state, scored) in enumerate(zip(rows, states, is_scored, strict=True)):
        lines = row.stop - row.start if scored else int(row.sample)
        if scored and state is not None:
            found[i] = _scored(row, state, logits[line : line + lines])
        line += lines
        if row.sample and state is not None and not isinstance(found[i], Exception):
            sampled.append((i, line - 1, state))
    assert line == len(logits), (line, logits.shape)
    if not sampled:
        return found
    of_sampled = logits if len(sampled) == len(logits) else logits[[line for _, line, _ in sampled]]
    drawn = sample_batch(of_sampled, [state for *_, state in sampled])
    for (i, *_), item in zip(sampled, drawn):
        before = found[i]
        assert isinstance(before, Outcome)
        found[i] = item if isinstance(item, Exception) else Outcome(drawn=item, prompt_logprobs=before.prompt_logprobs)
    return found


def _scored(row: Row, state: SamplingState, logits: Tensor) -> Outcome | Exception:
    prompt = row.sequence.request.token_ids
    targets = prompt[row.start + 1 : row.stop + 1]
    assert state.params.prompt_logprobs is not None
    found: list[TokenLogprobs] = []
    for scored in score_tokens(logits[: len(targets)], targets, [state.params.prompt_logprobs] * len(targets)):
        if isinstance(scored, Exception):
            return scored
        found.append(scored)
    state.num_prompt_scored = row.start + 1 + len(found)
    return Outcome(prompt_logprobs=tuple(found))
