"""The engine's thread: which rows a step computes, the forward pass, one token a row, and new pages between two steps.

It alone runs the model and samples, so one thread owns every token stream. What a row's result means for its request
is the worker's to say (StepOwner).
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterable, Mapping
from typing import Protocol

from decode.active_request import ActiveRequest
from decode.blob_decoder import NewPages
from decode.estimator import ComputeEstimator
from decode.fill_loading import IDLE_ENGINE, EngineLoad
from decode.logprobs import NoTokenAllowed
from decode.page_table import PageTable
from decode.requests import TokenLogprobs
from decode.sampling import Drawn
from decode.scheduler import Phase, Row, Scheduler, Sequence
from decode.step_outcome import Outcome, outcomes, scores_prompt
from decode.step_times import StepTimes
from decode.tagged_pages import TaggedPages
from prefill.engine import SequenceSlice
from prefill.runtime import ModelRuntime

log = logging.getLogger("kvstream.decode")

MIN_SLICE_TOKENS = 32
# Of refined chunks, between two steps: about 2 ms on one core, so that no answer stops for longer. At least one chunk.
MAX_COPY_BYTES = 8 << 20


class StepOwner(Protocol):
    """The decode worker as the engine sees it. Called with the lock held."""

    def chunk_computed(self, key: str, chunk: int, now: float) -> None: ...
    def kv_written(self, key: str, start: int, stop: int) -> None: ...
    def began_answer(self, sequence: Sequence, now: float) -> None: ...
    def before_step(self, now: float) -> None: ...
    def grow(self, sequence: Sequence, num_blocks: int) -> bool: ...
    def spill(self, sequence: Sequence) -> None: ...
    def pages_refined(self, key: str, pages: NewPages, num_output: int, now: float) -> None: ...
    def prompt_scored(self, sequence: Sequence, start: int, logprobs: Iterable[TokenLogprobs]) -> None: ...
    def token_drawn(self, sequence: Sequence, drawn: Drawn, now: float) -> None: ...
    def step_failed(self, key: str, error: Exception) -> None: ...
    def unpinned(self, sequence: Sequence) -> None: ...


class EngineLoop:
    """Runs from `start` until `stop`. Shares the worker's lock, sequences and requests."""

    def __init__(
        self,
        runtime: ModelRuntime,
        *,
        owner: StepOwner,
        lock: threading.Condition,
        scheduler: Scheduler,
        requests: Mapping[str, ActiveRequest],
        pages: TaggedPages,
        compute: ComputeEstimator,
        chunk_tokens: int,
        steps: StepTimes,
        name: str,
    ) -> None:
        self._engine, self._owner, self._lock = runtime.engine, owner, lock
        self._scheduler, self._requests, self._pages = scheduler, requests, pages
        self._compute, self._chunk_tokens, self._name = compute, chunk_tokens, name
        self.row_step_s = 0.0  # what a step without any prompt takes
        self._steps = steps
        self._stopping = False
        self.num_prompt_tokens = 0  # computed so far
        self._thread = threading.Thread(target=self._run, name="decode-engine", daemon=True)

    def start(self) -> None:
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive()

    def stop(self) -> None:
        """No step begins any more; the lock is held."""
        self._stopping = True
        self._lock.notify_all()

    def join(self) -> None:
        self._thread.join(timeout=10)

    def load_before(self, key: str) -> EngineLoad:
        """What the engine has to do besides this request's prompt; the lock is held."""
        sequence = self._scheduler.get(key)
        if sequence is None or len(self._scheduler) == 1:
            return IDLE_ENGINE
        ahead = self._scheduler.work_before(sequence)
        slice_s = self._compute.seconds(0, self._slice_tokens())
        is_running = self._scheduler.is_any_running
        return EngineLoad(
            wait_s=sum(self._compute.seconds(*work) for work in ahead),
            factor=1.0 + self.row_step_s / slice_s if is_running else 1.0,
            num_others=len(self._scheduler) - 1,
        )

    # -- the thread -----------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while rows := self._wait_for_rows():
                self._step(rows)
        except BaseException:
            # Nothing would be computed any more: let the worker's supervisor see the end.
            log.exception("%s: the engine's thread ended", self._name)
            raise

    def _wait_for_rows(self) -> list[Row]:
        """The next step's rows, pinned; none when the worker stops."""
        with self._lock:
            while not self._stopping:
                is_more = self._put_new_pages()
                self._owner.before_step(time.monotonic())
                rows = self._scheduler.next_rows(self._slice_tokens())
                rows = self._scheduler.rows_with_pages(
                    rows, time.monotonic(), grow=self._owner.grow, spill=self._owner.spill
                )
                if rows:
                    for row in rows:
                        row.sequence.pins += 1
                        self._pages.continue_at(self._pages_of(row), row.start)
                    return rows
                if not is_more:
                    self._lock.wait(timeout=1.0)
            return []

    def _put_new_pages(self) -> bool:
        """Copy what was refined, between two steps so that no forward pass reads a page while it changes. What answers
        wait for goes first. Whether some had to be left for the next time.

        Not during the tail: what the first token saw would be neither the one level nor the other.
        """
        num_bytes, is_more = 0, False
        for key, sequence, state in self._may_take_pages():
            for _ in range(len(state.new_pages)):
                # Each may have ended the request, or made it ready, so that its tail comes before the next ones.
                if sequence.phase in (Phase.TAIL, Phase.ENDED):
                    break
                pages = state.new_pages.popleft()
                if pages.after_tokens is not None and len(sequence.output) < pages.after_tokens:
                    state.new_pages.append(pages)  # of a plan that is followed
                elif num_bytes and num_bytes + pages.num_bytes > MAX_COPY_BYTES:
                    state.new_pages.appendleft(pages)
                    is_more = True
                    break
                else:
                    num_bytes += pages.num_bytes
                    assert state.pages is not None
                    self._pages.refine(state.pages, pages.start, pages.k, pages.v, pages.level, pages.base_kl)
                    self._owner.pages_refined(key, pages, len(sequence.output), time.monotonic())
            if state.fill is not None:
                sequence.is_held = not state.fill.machine.may_step(len(sequence.output))
        return is_more

    def _may_take_pages(self) -> list[tuple[str, Sequence, ActiveRequest]]:
        found = []
        for key, state in self._requests.items():
            sequence = self._scheduler.get(key)
            if sequence is not None and sequence.phase in (Phase.FILLING, Phase.RUNNING):
                found.append((key, sequence, state))
        return sorted(found, key=lambda item: (item[1].phase is Phase.RUNNING, item[1].deadline))

    def _slice_tokens(self) -> int:
        """How much prompt a step may compute: a whole chunk, or less if running requests would wait too long."""
        size = self._chunk_tokens
        running = self._scheduler.in_phase(Phase.RUNNING)
        if not running:
            return size
        per_token = self._compute.seconds(0, size) / size
        itl_s = min(sequence.itl_s for sequence in running)
        tokens = int(0.8 * itl_s / per_token) // MIN_SLICE_TOKENS * MIN_SLICE_TOKENS
        return max(MIN_SLICE_TOKENS, min(tokens, size))

    def _step(self, rows: list[Row]) -> None:
        begin, waited_s = time.monotonic(), 0.0
        requests = [self._requests.get(row.sequence.key) for row in rows]  # None: cancelled since
        states = [None if request is None else request.sampling for request in requests]
        is_scored = [scores_prompt(row, state) for row, state in zip(rows, states)]
        try:
            logits = self._engine.forward(
                [
                    SequenceSlice(
                        token_ids=row.token_ids(),
                        start=row.start,
                        block_table=row.sequence.block_table,
                        ring=row.sequence.ring,
                        need_logits=row.sample,
                        all_logits=scored,
                    )
                    for row, scored in zip(rows, is_scored)
                ]
            )
            waited_s = self._engine.waited_s
            found = outcomes(rows, states, is_scored, logits)
            for item in found:
                if isinstance(item, Exception) and not isinstance(item, NoTokenAllowed):
                    log.error("%s: no token could be drawn", self._name, exc_info=item)
        except Exception as error:
            log.exception("%s: a step failed", self._name)
            found = [error] * len(rows)
        now = time.monotonic()
        with self._lock:
            self._after_step(rows, found, now - begin - waited_s, now)

    def _after_step(self, rows: list[Row], found: list[Outcome | Exception], seconds: float, now: float) -> None:
        if len(rows) == 1 and not rows[0].sample and found[0] == Outcome():
            self._compute.observe(rows[0].start, rows[0].stop, seconds)
        elif all(row.sequence.phase is Phase.RUNNING for row in rows):
            self.row_step_s += 0.1 * (seconds - self.row_step_s)
            self._steps.observe(len(rows), seconds, now)
        for row, outcome in zip(rows, found, strict=True):
            sequence = row.sequence
            try:
                if sequence.phase is Phase.ENDED:
                    pass
                elif isinstance(outcome, Exception):
                    self._owner.step_failed(sequence.key, outcome)
                else:
                    self._advance(row, outcome, now)
            except Exception as error:
                # A bug of ours: this request ends with an error, the worker goes on with the others.
                log.exception("%s: a row could not be advanced", self._name)
                self._owner.step_failed(sequence.key, error)
            sequence.pins -= 1
            self._owner.unpinned(sequence)

    def _pages_of(self, row: Row) -> PageTable:
        pages = self._requests[row.sequence.key].pages
        assert pages is not None
        return pages

    def _advance(self, row: Row, outcome: Outcome, now: float) -> None:
        sequence = row.sequence
        if outcome.prompt_logprobs:
            self._owner.prompt_scored(sequence, row.start + 1, outcome.prompt_logprobs)
        pages = self._pages_of(row)
        self._pages.computed(pages, row.start, row.stop)
        self._pages.share(pages, row.stop)
        if sequence.phase is not Phase.FILLING:  # those tell of their chunks
            self._owner.kv_written(sequence.key, row.start, row.stop)
        if sequence.phase is not Phase.RUNNING:
            self.num_prompt_tokens += row.stop - row.start
            if not self._scheduler.computed(row):
                return
            if sequence.phase is Phase.FILLING:
                chunk, sequence.work_chunk = sequence.work_chunk, None
                assert chunk is not None
                self._owner.chunk_computed(sequence.key, chunk, now)
                return
            sequence.phase = Phase.RUNNING
            self._owner.began_answer(sequence, now)
        assert outcome.drawn is not None
        self._owner.token_drawn(sequence, outcome.drawn, now)
