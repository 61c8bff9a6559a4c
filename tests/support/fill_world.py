"""A virtual-time world around one FillMachine: a link with a rate over time, a source, one core that computes."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from decode.estimator import CodecEstimator, ComputeEstimator, LinkEstimator
from decode.fill import ChunkState, FillMachine, FillSpec
from decode.fill_events import (
    Ask,
    BlobArrived,
    BlobDecoded,
    ChunkComputed,
    Command,
    Compute,
    Decode,
    Fail,
    Opened,
    PartArrived,
    Ready,
    Tick,
    Withdraw,
)

PART_BYTES = 64 * 1024
SIZES = {"raw": 1_572_864, "lossless": 1_100_000, "q1": 300_000, "q2": 200_000, "q3": 150_000, "q4": 110_000}
LEVELS = tuple(SIZES)


@dataclass
class World:
    """Runs one fill to its end. `rate(now)` is the link in bytes a second; nothing tells the machine about it."""

    rate: Callable[[float], float]
    num_chunks: int = 13
    chunk_tokens: int = 256
    levels: tuple[str, ...] = LEVELS
    ttft_s: float = 0.0
    tail_s: float = 0.03
    token_s: float = 2.5e-4
    latency_s: float = 0.003
    decode_s: float = 0.004
    may_load: bool = True
    may_compute: bool = True
    stored: bool = True
    prior_rate: float | None = None
    live_chunk_s: float = 0.0  # a live source has chunk i this long after chunk i - 1
    part_limit: Callable[[int, str], bytes | None] | None = None
    now: float = 0.0
    events: list[tuple[float, int, Any]] = field(default_factory=list)
    log: list[tuple[float, Command]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.counter = 0
        self.queue: list[tuple[int, str]] = []  # what the source has been asked for and not begun
        self.sending: tuple[int, str, int] | None = None
        self.link = LinkEstimator(self.prior_rate if self.prior_rate is not None else self.rate(0.0))
        self.compute = ComputeEstimator(self.token_s, 0.0)
        self.codec = CodecEstimator(self.decode_s)
        self.sent_bytes = 0
        self.decoder_free_at = 0.0

    def _at(self, delay_s: float, event: Any) -> None:
        self.counter += 1
        heapq.heappush(self.events, (self.now + delay_s, self.counter, event))

    def run(self, limit_s: float = 600.0) -> FillMachine:
        spec = FillSpec(
            num_chunks=self.num_chunks,
            chunk_tokens=self.chunk_tokens,
            levels=self.levels,
            chunk_bytes={level: float(SIZES[level]) for level in self.levels},
            deadline=self.ttft_s,
            tail_s=self.tail_s,
            may_load=self.may_load,
            may_compute=self.may_compute,
        )
        machine = FillMachine(spec, now=0.0, link=self.link, compute=self.compute, codec=self.codec)
        self.machine = machine
        self._carry_out(machine.start(0.0))
        if self.may_load:
            self._at(
                self.latency_s,
                Opened(stored_bytes=tuple({} if self.stored else None for _ in range(self.num_chunks))),
            )
        self._at(0.02, Tick())
        while self.events:
            self.now, _, event = heapq.heappop(self.events)
            assert self.now < limit_s, "the fill hangs"
            if event == "part":
                self._part_sent()
                continue
            if isinstance(event, Tick) and not machine.done:
                self._at(0.02, Tick())
            self._carry_out(machine.handle(event, self.now))
            if machine.done:
                return machine
        raise AssertionError(f"the fill stopped without an end: {machine.chunks}")

    def _carry_out(self, commands: list[Command]) -> None:
        for command in commands:
            self.log.append((self.now, command))
            match command:
                case Ask():
                    self.queue = [item for item in self.queue if item[0] != command.chunk]
                    self.queue.append((command.chunk, command.level))
                    if self.sending is None:
                        self._send_next(self.latency_s)
                case Withdraw():
                    self.queue = [item for item in self.queue if item[0] != command.chunk]
                    if self.sending is not None and self.sending[0] == command.chunk:
                        self.sending = None
                        self._send_next()
                case Decode():
                    self.decoder_free_at = max(self.decoder_free_at, self.now) + self.decode_s  # one decoder thread
                    self._at(self.decoder_free_at - self.now, BlobDecoded(chunk=command.chunk, seconds=self.decode_s))
                case Compute():
                    below = self.machine.chunks[: command.chunk]
                    assert all(log.state is ChunkState.FILLED for log in below), "computed above a hole"
                    self._at(self.token_s * self.chunk_tokens, ChunkComputed(chunk=command.chunk))
                case Ready() | Fail():
                    pass

    def _send_next(self, latency_s: float = 0.0) -> None:
        if self.queue:
            chunk, level = self.queue.pop(0)
            self.sending = (chunk, level, 0)
            self._start_part(max(latency_s, (chunk + 1) * self.live_chunk_s - self.now))

    def _start_part(self, extra_s: float = 0.0) -> None:
        assert self.sending is not None
        _, level, sent = self.sending
        part = min(PART_BYTES, SIZES[level] - sent)
        end, left = self.now + extra_s, float(part)
        while left > 1e-3:  # a rate that changes while the part is on its way
            step = min(0.02, left / max(self.rate(end), 1.0))
            left -= step * max(self.rate(end), 1.0)
            end += step
            if end > self.now + 60:
                break
        self.part_began = self.now + extra_s
        self._at(end - self.now, "part")

    def _part_sent(self) -> None:
        if self.sending is None:
            return
        chunk, level, sent = self.sending
        part = min(PART_BYTES, SIZES[level] - sent)
        sent += part
        self.sent_bytes += part
        total = SIZES[level]
        arrived = PartArrived(
            chunk=chunk,
            level=level,
            received_bytes=sent,
            total_bytes=total,
            part_bytes=part,
            wire_s=self.now - self.part_began,
        )
        if sent == total:
            self.sending = None
            self._send_next()
        else:
            self.sending = (chunk, level, sent)
            self._start_part()
        self._carry_out(self.machine.handle(arrived, self.now))
        if sent == total:
            self._carry_out(self.machine.handle(BlobArrived(chunk=chunk, level=level, blob=bytes(total)), self.now))
