"""A virtual-time world around one FillMachine: links with a rate over time, sources, one core that computes.

Simpler than the cluster's simulator on purpose (no protocol, whole parts): what it shows is the machine alone.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from decode import fill_events as ev
from decode.estimator import CodecEstimator, ComputeEstimator
from decode.fill import FillMachine
from decode.fill_chunks import ChunkState
from decode.fill_loading import FillSpec
from decode.link_scheduler import LinkScheduler
from decode.replay import Replay
from prefill.chunks import part_name, split_level, split_part

PART_BYTES = 64 * 1024
SIZES = {"raw": 1_572_864, "lossless": 1_100_000, "q1": 138_000, "q2": 60_000, "q3": 22_000}
LEVELS = tuple(SIZES)
NESTED = frozenset({"q1", "q2", "q3"})


@dataclass
class Pipe:
    """One source and its link: sends what it was asked for, base chunks before refinements, one part after another."""

    rate: Callable[[float], float]
    stored: bool = True
    wishes: list[tuple[int, int, int, str]] = field(default_factory=list)  # (kind, order, chunk, level)
    sending: tuple[int, str, int] | None = None
    part_began: float = 0.0
    is_up: bool = True


@dataclass
class World:
    """Runs one fill to its end. `rate(now)` is the link in bytes a second; nothing tells the machine about it."""

    rate: Callable[[float], float]
    more_rates: tuple[Callable[[float], float], ...] = ()
    num_chunks: int = 13
    chunk_tokens: int = 256
    levels: tuple[str, ...] = LEVELS
    refine_levels: tuple[str, ...] = ()
    ttft_s: float = 0.0
    tail_s: float = 0.03
    token_s: float = 2.5e-4
    latency_s: float = 0.003
    decode_s: float = 0.004
    may_load: bool = True
    may_compute: bool = True
    max_compute: int | None = None
    stored: bool = True
    prior_rate: float | None = None
    infeasible: str = "best_effort"
    replay: Replay | None = None
    live_chunk_s: float = 0.0  # a live source has chunk i this long after chunk i - 1
    token_every_s: float = 0.02  # after the first token
    windows: tuple[int | None, ...] = ()
    not_here: tuple[frozenset[int], ...] = ()  # by source, chunks that it has not and does not compute
    now: float = 0.0
    events: list[tuple[float, int, Any]] = field(default_factory=list)
    log: list[tuple[float, ev.Command]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.counter = 0
        self.links = LinkScheduler()
        self.pipes = [Pipe(rate, stored=self.stored) for rate in (self.rate, *self.more_rates) if self.may_load]
        self.compute = ComputeEstimator(self.token_s, 0.0)
        self.codec = CodecEstimator(self.decode_s)
        self.sent_bytes = 0
        self.decoder_free_at = 0.0
        self.ready_at: float | None = None
        self.pages: dict[int, str] = {}
        self.layers: dict[int, set[int]] = {}  # that stand in the pages

    def at(self, delay_s: float, event: Any) -> None:
        self.counter += 1
        heapq.heappush(self.events, (self.now + delay_s, self.counter, event))

    def make(self) -> FillMachine:
        spec = FillSpec(
            num_chunks=self.num_chunks,
            chunk_tokens=self.chunk_tokens,
            levels=self.levels,
            chunk_bytes={level: float(size) for level, size in SIZES.items()},
            nested=NESTED,
            exact=frozenset(SIZES) - NESTED,
            refine_levels=self.refine_levels,
            deadline=self.ttft_s,
            tail_s=self.tail_s,
            may_compute=self.may_compute,
            max_compute=self.max_compute,
            infeasible=self.infeasible,
            replay=self.replay,
            windows=self.windows,
        )
        shares = []
        for index, pipe in enumerate(self.pipes):
            prior = self.prior_rate if self.prior_rate is not None else pipe.rate(0.0)
            shares.append(self.links.join(f"source-{index}", deadline=self.ttft_s, prior_bytes_per_s=prior))
        return FillMachine(spec, now=0.0, sources=shares, compute=self.compute, codec=self.codec)

    def run(self, limit_s: float = 600.0) -> FillMachine:
        machine = self.machine = self.make()
        self._carry_out(machine.start(0.0))
        self.at(0.02, ev.Tick())
        while self.events and not machine.done:
            self.now, _, event = heapq.heappop(self.events)
            assert self.now < limit_s, "the fill hangs"
            if callable(event):
                event()
                continue
            if type(event) is ev.Tick:
                self.at(0.02, ev.Tick())
            self.tell(event)
        assert machine.done, f"the fill stopped without an end: {machine.chunks}"
        machine.check_integrity()
        return machine

    @property
    def ttft_s_reached(self) -> float:
        """The time at which the tail could begin, and what it takes."""
        assert self.ready_at is not None
        return self.ready_at + self.tail_s

    def tell(self, event: ev.Event) -> None:
        self._carry_out(self.machine.handle(event, self.now))
        wake_at = self.machine.wake_at
        if wake_at is not None and wake_at > self.now:
            self.at(wake_at - self.now, lambda: self._carry_out(self.machine.handle(ev.Tick(), self.now)))

    def _carry_out(self, commands: list[ev.Command]) -> None:
        for command in commands:
            self.log.append((self.now, command))
            match command:
                case ev.Open():
                    pipe = self.pipes[command.source]
                    if pipe.is_up:
                        missing = self.not_here[command.source] if self.not_here else ()
                        stored = tuple(
                            {} if pipe.stored and index not in missing else None for index in range(self.num_chunks)
                        )
                        opened = ev.Opened(source=command.source, stored_bytes=stored, computes=not self.not_here)
                        self.at(self.latency_s, opened)
                case ev.Ask():
                    self._ask(command)
                case ev.Withdraw():
                    pipe = self.pipes[command.source]
                    pipe.wishes = [wish for wish in pipe.wishes if wish[2] != command.chunk]
                    if pipe.sending is not None and pipe.sending[0] == command.chunk:
                        pipe.sending = None
                        self._send_next(command.source)
                case ev.Decode():
                    share = 1.0 if command.layers is None else len(command.layers) / len(self.windows)
                    self.decoder_free_at = max(self.decoder_free_at, self.now) + share * self.decode_s  # one thread
                    self.at(self.decoder_free_at - self.now, self._decoded(command))
                case ev.Refine():
                    self.decoder_free_at = max(self.decoder_free_at, self.now) + self.decode_s
                    self.at(self.decoder_free_at - self.now, self._refined(command))
                case ev.Compute():
                    below = self.machine.chunks[: command.chunk]
                    assert all(log.state is ChunkState.FILLED for log in below), "computed above a hole"
                    self._assert_sees_all(command.chunk)
                    self.layers[command.chunk] = set(range(len(self.windows)))
                    self.at(self.token_s * self.chunk_tokens, ev.ChunkComputed(chunk=command.chunk))
                case ev.Discard():
                    del self.layers[command.chunk], self.pages[command.chunk]
                case ev.Ready():
                    self._assert_sees_all(self.num_chunks)
                    assert all(log.state is ChunkState.FILLED for log in self.machine.chunks)
                    assert self.ready_at is None
                    self.ready_at = self.now
                    self.at(self.tail_s, ev.FirstToken(position=self.num_chunks * self.chunk_tokens + 1))
                case ev.Fail():
                    pass

    def _assert_sees_all(self, chunk: int) -> None:
        """Every key that a query from this chunk on sees stands in the pages, in every layer, token by token."""
        query = chunk * self.chunk_tokens
        for layer, window in enumerate(self.windows):
            for key in range(0 if window is None else max(0, query - window + 1), query):
                assert layer in self.layers.get(key // self.chunk_tokens, ()), (chunk, layer, key)

    def _decoded(self, command: ev.Decode) -> Callable[[], None]:
        def done() -> None:
            self.pages[command.chunk] = command.level
            every = range(len(self.windows))
            self.layers[command.chunk] = set(every if command.layers is None else command.layers)
            if command.layers != ():
                assert len(command.blob) == self.size(part_name(command.level, command.layers))
            share = self.machine.chunks[command.chunk].share
            self.tell(ev.BlobDecoded(chunk=command.chunk, seconds=share * self.decode_s))

        return done

    def _refined(self, command: ev.Refine) -> Callable[[], None]:
        def done() -> None:
            if self.ready_at is None:
                tokens = 0
            else:
                tokens = 1 + max(0, int((self.now - self.ttft_s_reached) / self.token_every_s))
            if command.after_tokens is not None:
                tokens = command.after_tokens
            elif self.ready_at is not None and self.now < self.ttft_s_reached:
                return self.at(self.ttft_s_reached - self.now, done)  # not during the tail
            if command.coarse is not None:
                coarse = part_name(self.pages[command.chunk], command.layers)
                assert len(command.coarse) == self.size(coarse), "refined what is not in the pages"
            self.pages[command.chunk] = command.level
            blob = bytes(self.size(part_name(command.level, command.layers))) if command.level in NESTED else None
            every = set(range(len(self.windows)))
            assert self.layers[command.chunk] == (every if command.layers is None else set(command.layers))
            self.tell(ev.Refined(chunk=command.chunk, seconds=self.decode_s, after_tokens=tokens, blob=blob))
            return None

        return done

    def _ask(self, command: ev.Ask) -> None:
        pipe = self.pipes[command.source]
        if pipe.sending is not None and pipe.sending[0] == command.chunk:
            return  # too late to amend
        pipe.wishes = [wish for wish in pipe.wishes if wish[2] != command.chunk]
        self.counter += 1
        pipe.wishes.append((command.kind, self.counter, command.chunk, command.level))
        if pipe.sending is None:
            self._send_next(command.source, self.latency_s)

    def _send_next(self, source: int, latency_s: float = 0.0) -> None:
        pipe = self.pipes[source]
        if pipe.wishes and pipe.is_up:
            wish = min(pipe.wishes)
            pipe.wishes.remove(wish)
            pipe.sending = (wish[2], wish[3], 0)
            self._start_part(source, max(latency_s, (wish[2] + 1) * self.live_chunk_s - self.now))

    def size(self, level: str) -> int:
        level, layers = split_part(level)
        have, level = split_level(level)
        whole = SIZES[level] - (SIZES[have] if have is not None else 0)
        return whole if layers is None else whole * len(layers) // len(self.windows)

    def _start_part(self, source: int, extra_s: float = 0.0) -> None:
        pipe = self.pipes[source]
        assert pipe.sending is not None
        _, level, sent = pipe.sending
        part = min(PART_BYTES, self.size(level) - sent)
        end, left = self.now + extra_s, float(part)
        while left > 1e-3:  # a rate that changes while the part is on its way
            step = min(0.02, left / max(pipe.rate(end), 1.0))
            left -= step * max(pipe.rate(end), 1.0)
            end += step
            if end > self.now + 60:
                break
        pipe.part_began = self.now + extra_s
        sending = pipe.sending
        self.at(end - self.now, lambda: self._part_sent(source, sending))

    def _part_sent(self, source: int, sending: tuple[int, str, int]) -> None:
        pipe = self.pipes[source]
        if pipe.sending is not sending or not pipe.is_up:
            return
        chunk, level, sent = sending
        total = self.size(level)
        part = min(PART_BYTES, total - sent)
        sent += part
        self.sent_bytes += part
        arrived = ev.PartArrived(
            source=source,
            chunk=chunk,
            level=level,
            received_bytes=sent,
            total_bytes=total,
            part_bytes=part,
            wire_s=self.now - pipe.part_began,
        )
        if sent == total:
            pipe.sending = None
            self._send_next(source)
        else:
            pipe.sending = (chunk, level, sent)
            self._start_part(source)
        self.tell(arrived)
        if sent == total:
            self.tell(ev.BlobArrived(source=source, chunk=chunk, level=level, blob=bytes(total)))

    def cut(self, source: int, delay_s: float, for_s: float, *, is_final: bool = False) -> None:
        """The link breaks after `delay_s`, and heals `for_s` later."""

        def down() -> None:
            pipe = self.pipes[source]
            pipe.is_up, pipe.wishes, pipe.sending = False, [], None
            self.tell(ev.SourceLost(source=source, reason="cut", is_final=is_final))

        def up() -> None:
            self.pipes[source].is_up = True
            stored = tuple({} for _ in range(self.num_chunks))
            if self.machine.sources[source].is_opening:  # its greeting gets through now
                self.tell(ev.Opened(source=source, stored_bytes=stored))

        self.at(delay_s, down)
        self.at(delay_s + for_s, up)
