"""What one decision of the SLO controller costs: `python scripts/bench_decision.py [--json FILE]`.

Drives fill machines (decode/fill.py) through whole prompts with synthetic events: one source whose link delivers 64 KiB
parts in virtual time, one core that decodes and one that computes. Every `handle` that makes a plan is timed: what is
known is gathered, level and meeting point are chosen, and what to ask for follows. A fill counts only after its end was
checked: Ready, every chunk in place, all counts adding up.

The bar is 50 microseconds for the mean decision of each scenario at 105 chunks (--bar).
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from decode import fill_events as ev  # noqa: E402
from decode.estimator import CodecEstimator, ComputeEstimator  # noqa: E402
from decode.fill import FillMachine  # noqa: E402
from decode.fill_chunks import ChunkState  # noqa: E402
from decode.fill_loading import FillSpec  # noqa: E402
from decode.link_scheduler import LinkScheduler  # noqa: E402
from prefill.chunks import split_level  # noqa: E402

SIZES = {"raw": 1_572_864, "lossless": 1_100_000, "q1": 138_000, "q2": 60_000, "q3": 22_000}
NESTED = frozenset({"q1", "q2", "q3"})
PART_BYTES = 64 * 1024
TAIL_S = 0.03  # from the last chunk to the first token
CHUNK_TOKENS, TOKEN_S, DECODE_S, TICK_S = 256, 2.5e-4, 0.004, 0.02
NUM_CHUNKS = (13, 105, 400)
BAR_CHUNKS = 105


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """rate: bytes a second at a time, where 1.0 s is about when the target is. ttft_s: for one chunk."""

    rate: Callable[[float, int], float]
    ttft_s: float
    num_sources: int = 1
    refine_levels: tuple[str, ...] = ()


# Rates and targets are for one chunk: a prompt of n chunks takes n times as long, and does the same things.
SCENARIOS = {
    "slack": Scenario(rate=lambda now, n: 2.5e6, ttft_s=0.04, refine_levels=("q1", "q2", "q3")),
    "two ends": Scenario(rate=lambda now, n: 3.5e5, ttft_s=0.0),
    "a drop": Scenario(rate=lambda now, n: 2.5e6 if now < 0.01 * n else 2.5e5, ttft_s=0.04),
    "two links": Scenario(rate=lambda now, n: 1.2e6, ttft_s=0.03, num_sources=2),
}


@dataclass(slots=True)
class Link:
    """The source's end: what was asked for, in order, and the part on its way."""

    asked: dict[int, tuple[int, str]] = field(default_factory=dict)  # chunk: (kind, level)
    sending: tuple[int, str, int] | None = None
    part_at: float = 0.0

    def begin(self, now: float, rate: float) -> None:
        if self.sending is None and self.asked:
            chunk = min(self.asked, key=lambda chunk: self.asked[chunk][0])  # first of the most urgent kind
            self.sending = (chunk, self.asked.pop(chunk)[1], 0)
            self.part_at = now + self.part_bytes / rate

    @property
    def total_bytes(self) -> int:
        assert self.sending is not None
        have, level = split_level(self.sending[1])
        return SIZES[level] - (SIZES[have] if have else 0)

    @property
    def part_bytes(self) -> int:
        assert self.sending is not None
        return min(PART_BYTES, self.total_bytes - self.sending[2])


class Fill:
    """One fill in virtual time; `times_ns` of the decisions it made."""

    def __init__(self, scenario: Scenario, num_chunks: int) -> None:
        self.scenario, self.num_chunks = scenario, num_chunks
        self.now = 0.0
        self.times_ns: list[int] = []
        self.num_ready = 0
        self.later: list[tuple[float, ev.Event]] = []  # decoded, refined, computed
        self.links = [Link() for _ in range(scenario.num_sources)]
        self.decoder_free_at = 0.0
        spec = FillSpec(
            num_chunks=num_chunks,
            chunk_tokens=CHUNK_TOKENS,
            levels=tuple(SIZES),
            chunk_bytes={level: float(size) for level, size in SIZES.items()},
            nested=NESTED,
            exact=frozenset(SIZES) - NESTED,
            refine_levels=scenario.refine_levels,
            deadline=scenario.ttft_s * num_chunks,
            tail_s=TAIL_S if scenario.ttft_s else 0.0,
        )
        scheduler = LinkScheduler()
        self.machine = FillMachine(
            spec,
            now=0.0,
            sources=[
                scheduler.join(f"source-{i}", deadline=spec.deadline, prior_bytes_per_s=scenario.rate(0.0, num_chunks))
                for i in range(scenario.num_sources)
            ],
            compute=ComputeEstimator(TOKEN_S, 0.0),
            codec=CodecEstimator(DECODE_S),
        )

    def run(self) -> None:
        self._carry_out(self.machine.start(0.0))
        for source in range(len(self.links)):
            self._tell(ev.Opened(source=source, stored_bytes=({},) * self.num_chunks))
        while not self.machine.done:
            assert self.now < 1000, "the fill hangs"
            self._next()
        self.check()

    def check(self) -> None:
        assert self.num_ready == 1, "the fill did not end Ready, once"
        assert all(log.state is ChunkState.FILLED and log.level for log in self.machine.chunks)
        self.machine.check_integrity()

    def _next(self) -> None:
        """Whatever comes first: a part, something decoded or computed, or a tick."""
        parts = [(link.part_at, index) for index, link in enumerate(self.links) if link.sending is not None]
        part = min(parts, default=(float("inf"), 0))
        later = min(self.later, key=lambda item: item[0], default=None)
        at = min(part[0], later[0] if later else float("inf"), self.now + TICK_S, self.machine.wake_at or float("inf"))
        self.now = max(at, self.now + 1e-9)
        if later is not None and later[0] <= self.now:
            self.later.remove(later)
            self._tell(later[1])
        elif part[0] <= self.now:
            self._part(part[1])
        else:
            self._tell(ev.Tick())

    def _part(self, source: int) -> None:
        link, rate = self.links[source], self.scenario.rate(self.now, self.num_chunks)
        assert link.sending is not None
        chunk, level, sent = link.sending
        size, total = link.part_bytes, link.total_bytes
        sent += size
        arrived = ev.PartArrived(
            source=source,
            chunk=chunk,
            level=level,
            received_bytes=sent,
            total_bytes=total,
            part_bytes=size,
            wire_s=size / rate,
        )
        link.sending = (chunk, level, sent) if sent < total else None
        if link.sending is not None:
            link.part_at = self.now + link.part_bytes / rate
        link.begin(self.now, rate)
        self._tell(arrived)
        if sent == total:
            self._tell(ev.BlobArrived(source=source, chunk=chunk, level=level, blob=bytes(total)))

    def _tell(self, event: ev.Event) -> None:
        before = self.machine.num_decisions
        begin = time.perf_counter_ns()
        commands = self.machine.handle(event, self.now)
        spent_ns = time.perf_counter_ns() - begin
        if self.machine.num_decisions > before:
            self.times_ns.append(spent_ns)
        self._carry_out(commands)

    def _carry_out(self, commands: Sequence[ev.Command]) -> None:
        rate = self.scenario.rate(self.now, self.num_chunks)
        for command in commands:
            match command:
                case ev.Ask():
                    link = self.links[command.source]
                    if link.sending is None or link.sending[0] != command.chunk:  # else too late to amend
                        link.asked[command.chunk] = (command.kind, command.level)
                        link.begin(self.now, rate)
                case ev.Withdraw():
                    link = self.links[command.source]
                    link.asked.pop(command.chunk, None)
                    if link.sending is not None and link.sending[0] == command.chunk:
                        link.sending = None
                        link.begin(self.now, rate)
                case ev.Decode():
                    self._decoded_in_turn(ev.BlobDecoded(chunk=command.chunk, seconds=DECODE_S))
                case ev.Refine():
                    blob = bytes(SIZES[command.level]) if command.level in NESTED else None
                    after_tokens = 1 if self.num_ready else 0
                    self._decoded_in_turn(
                        ev.Refined(chunk=command.chunk, seconds=DECODE_S, after_tokens=after_tokens, blob=blob)
                    )
                case ev.Compute():
                    self.later.append((self.now + CHUNK_TOKENS * TOKEN_S, ev.ChunkComputed(chunk=command.chunk)))
                case ev.Ready():
                    self.num_ready += 1
                    self.later.append((self.now + TAIL_S, ev.FirstToken()))
                case ev.Fail():
                    raise AssertionError(f"the fill failed: {command.message}")
                case ev.Open():
                    pass

    def _decoded_in_turn(self, event: ev.Event) -> None:
        self.decoder_free_at = max(self.decoder_free_at, self.now) + DECODE_S
        self.later.append((self.decoder_free_at, event))


def measure(scenario: Scenario, num_chunks: int, repeats: int) -> dict[str, Any]:
    times_ns: list[int] = []
    levels: dict[str, int] = {}
    for _ in range(repeats + 1):
        fill = Fill(scenario, num_chunks)
        fill.run()
        times_ns = times_ns + fill.times_ns if levels else []  # the first run warms up
        for log in fill.machine.chunks:
            levels[log.first_level] = levels.get(log.first_level, 0) + 1
    times_ns.sort()
    return {
        "num_chunks": num_chunks,
        "decisions_per_fill": len(times_ns) // repeats,
        "mean_us": sum(times_ns) / len(times_ns) / 1e3,
        "p50_us": times_ns[len(times_ns) // 2] / 1e3,
        "p99_us": times_ns[len(times_ns) * 99 // 100] / 1e3,
        "max_us": times_ns[-1] / 1e3,
        "levels": {level: count // (repeats + 1) for level, count in sorted(levels.items())},
    }


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", type=Path, help="also write the results here")
    parser.add_argument("--repeats", type=int, default=5, help="fills of each kind (default: 5)")
    parser.add_argument("--chunks", type=int, nargs="+", default=NUM_CHUNKS)
    parser.add_argument("--bar", type=float, default=50.0, help="microseconds of the mean decision (default: 50)")
    options = parser.parse_args(argv)
    machine = f"{platform.processor() or platform.machine()}, Python {platform.python_version()}"
    print(f"{machine}; microseconds a decision\n")
    print(f"{'scenario':10} {'chunks':>6} {'decisions':>9} {'mean':>7} {'p50':>7} {'p99':>7} {'max':>8}  levels")
    rows = []
    gc.disable()  # a collection in the middle of a decision is not the decision's
    for name, scenario in SCENARIOS.items():
        for num_chunks in options.chunks:
            gc.collect()
            row = {"scenario": name, **measure(scenario, num_chunks, options.repeats)}
            rows.append(row)
            times = f"{row['mean_us']:7.1f} {row['p50_us']:7.1f} {row['p99_us']:7.1f} {row['max_us']:8.1f}"
            levels = " ".join(f"{level}:{count}" for level, count in row["levels"].items())
            print(f"{name:10} {num_chunks:6} {row['decisions_per_fill']:9} {times}  {levels}")
    if options.json:
        options.json.write_text(json.dumps({"machine": machine, "bar_us": options.bar, "rows": rows}, indent=1) + "\n")
    over = [row["scenario"] for row in rows if row["num_chunks"] == BAR_CHUNKS and row["mean_us"] > options.bar]
    if over:
        print(f"\nMore than {options.bar:g} us at {BAR_CHUNKS} chunks: {', '.join(over)}")
    return 1 if over else 0


if __name__ == "__main__":
    sys.exit(main())
