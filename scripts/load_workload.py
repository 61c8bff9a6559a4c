"""What a load test sends and when: arrivals, random prompts, trace replay. Pure: random generators come in."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

MOONCAKE_BLOCK_TOKENS = 512

# Tokenized by the server, this gives token ids that its model knows.
SAMPLE_TEXT = """The old harbour lay quiet under a grey morning sky while small boats moved slowly between the stones. A
clerk counted twelve barrels of salt, nine crates of paper and forty coils of rope, then wrote the numbers into a
ledger with green covers. Children ran along the wall, laughing at gulls that quarrelled over bread. Further inland,
beyond the mill and the narrow bridge, farmers argued about rain, prices, horses and the new road to the capital. Nobody
knew whether the letter from the minister would arrive before winter, yet everyone had an opinion: some hoped for
peace, others feared a tax, and the teacher only smiled and asked for better windows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedRequest:
    """A request and its scheduled start, in seconds from the start of the test."""

    start_s: float
    prompt: tuple[int, ...]
    output_tokens: int


def arrival_times(num: int, *, rate: float, burstiness: float, rng: np.random.Generator) -> list[float]:
    """Starts of `num` requests: gaps from a gamma distribution of mean 1/rate and shape `burstiness`.

    Burstiness 1 is a Poisson process, less is more bursty, more is steadier. An infinite rate starts all at once.
    """
    if math.isinf(rate):
        return [0.0] * num
    gaps = rng.gamma(shape=burstiness, scale=1.0 / (rate * burstiness), size=num)
    return [float(t) for t in np.cumsum(gaps)]


def random_requests(
    starts: Sequence[float],
    *,
    pool: Sequence[int],
    input_tokens: int,
    output_tokens: int,
    range_ratio: float,
    prefix_tokens: int,
    rng: np.random.Generator,
) -> list[PlannedRequest]:
    """Prompts of random tokens after a shared prefix; lengths uniform within (1 ± range_ratio) of what is asked."""

    def length(mean: int) -> int:
        low, high = math.floor(mean * (1 - range_ratio)), math.ceil(mean * (1 + range_ratio))
        return max(1, int(rng.integers(low, high + 1)))

    prefix = _tokens(pool, prefix_tokens, rng)
    return [
        PlannedRequest(
            start_s=start,
            prompt=prefix + _tokens(pool, length(input_tokens), rng),
            output_tokens=length(output_tokens),
        )
        for start in starts
    ]


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceRow:
    """A line of a Mooncake trace. Equal hash ids mean equal blocks of 512 prompt tokens."""

    timestamp_ms: float
    input_length: int
    output_length: int
    hash_ids: tuple[int, ...]


def read_mooncake(lines: Iterable[str]) -> list[TraceRow]:
    """Rows of a JSONL trace. Raises ValueError with the line number of a bad one."""
    rows: list[TraceRow] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            rows.append(
                TraceRow(
                    timestamp_ms=float(row["timestamp"]),
                    input_length=int(row["input_length"]),
                    output_length=int(row["output_length"]),
                    hash_ids=tuple(int(h) for h in row["hash_ids"]),
                )
            )
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"line {number} is no row of a Mooncake trace: {error!r}") from None
    return rows


def replay(
    rows: Sequence[TraceRow],
    *,
    pool: Sequence[int],
    speed: float,
    window_s: tuple[float, float],
    length_scale: float,
    seed: int,
) -> list[PlannedRequest]:
    """Trace rows within a window of trace time, `speed` times as fast, lengths times `length_scale`.

    A block's tokens are drawn from (seed, hash id) alone, so the sharing of prefixes in the trace is kept.
    """
    block_tokens = max(1, round(MOONCAKE_BLOCK_TOKENS * length_scale))
    first_s, end_s = window_s
    blocks: dict[int, tuple[int, ...]] = {}
    planned: list[PlannedRequest] = []
    for row in sorted(rows, key=lambda r: r.timestamp_ms):
        at_s = row.timestamp_ms / 1000
        if not first_s <= at_s < end_s:
            continue
        for hash_id in row.hash_ids:
            if hash_id not in blocks:
                blocks[hash_id] = _tokens(pool, block_tokens, np.random.default_rng([seed, hash_id]))
        prompt = tuple(token for hash_id in row.hash_ids for token in blocks[hash_id])
        planned.append(
            PlannedRequest(
                start_s=(at_s - first_s) / speed,
                prompt=prompt[: max(1, round(row.input_length * length_scale))],
                output_tokens=max(1, round(row.output_length * length_scale)),
            )
        )
    return planned


def _tokens(pool: Sequence[int], count: int, rng: np.random.Generator) -> tuple[int, ...]:
    return tuple(int(pool[i]) for i in rng.integers(0, len(pool), size=count))
