"""The decode worker: takes requests, has their KV pulled or computed, batches, samples, and streams tokens back.

A shell: decisions are in scheduler.py, fill.py and admission.py. Three kinds of threads meet under one lock: the
stream server's (requests, cancellations), the puller's (arrivals, decoding) and the engine's, which alone runs the
model and samples, so one thread owns every token stream.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections import OrderedDict, deque
from typing import Any

from decode.admission import WorkerLimits, check_request, fill_orders
from decode.fill import FillSpec
from decode.puller import Fill, KVPuller, Source
from decode.receipt import Timeline, build_receipt
from decode.requests import GenerationRequest, RequestRefused
from decode.sampling import sample
from decode.scheduler import Phase, Row, Scheduler, Sequence
from decode.slo import SLOPolicy
from decode.startup import measure_compute, predicted_chunk_bytes, promised_kl
from prefill.block_allocator import blocks_for
from prefill.engine import SequenceSlice
from prefill.runtime import BLOCK_TOKENS, ModelRuntime
from transport.curve import CurveKeys
from transport.stream_server import StreamServer

log = logging.getLogger("kvstream.decode")

MAX_WAITING = 256
MAX_SEQUENCES = 256  # admitted at once; as many transfers as transport allows to one source
MAX_RECEIPTS = 1024
MIN_SLICE_TOKENS = 32


class _Request:
    """What the worker keeps of a request beside its sequence."""

    def __init__(self, request: GenerationRequest, source: Source | None, now: float) -> None:
        self.request, self.source = request, source
        self.timeline = Timeline(received_at=now)
        self.fill: Fill | None = None
        self.rng = random.Random()  # for sampling without a seed


class DecodeWorker:
    """Serves until `shutdown`. Raises transport errors when it cannot bind."""

    def __init__(
        self,
        runtime: ModelRuntime,
        *,
        policy: SLOPolicy,
        bind: str = "tcp://127.0.0.1:0",
        chunk_tokens: int = 256,
        worker_id: str = "decode-0",
        curve: CurveKeys | None = None,
        insecure: bool = False,
    ) -> None:
        self.worker_id = worker_id
        self._runtime, self._policy = runtime, policy
        self._limits = WorkerLimits(
            max_context=runtime.model.max_context,
            vocab_size=runtime.model.vocab_size,
            max_blocks=runtime.pool.num_blocks,
            block_tokens=BLOCK_TOKENS,
            chunk_tokens=chunk_tokens,
            chunk_bytes=predicted_chunk_bytes(runtime, chunk_tokens),
        )
        self._compute = measure_compute(runtime, chunk_tokens)
        self._lock = threading.Condition(threading.RLock())
        self._scheduler = Scheduler()
        self._requests: dict[str, _Request] = {}
        self._waiting: deque[str] = deque()
        self._ended: dict[str, Sequence] = {}  # ended, but somebody still uses their pages
        self._receipts: OrderedDict[str, dict[str, Any]] = OrderedDict()
        self._arrivals = 0
        self._is_admitting = self._stopping = False
        self._counters = {"generated_tokens_total": 0, "computed_prompt_tokens_total": 0, "requests_total": 0}
        self._puller = KVPuller(
            runtime, worker_id=worker_id, compute=self._compute, owner=self, lock=self._lock, curve=curve
        )
        self._engine_thread = threading.Thread(target=self._engine_loop, name="decode-engine", daemon=True)
        self._serving = threading.Event()  # the server's thread may call before `self.server` is set
        try:
            self.server = StreamServer(
                bind, on_submit=self._on_submit, on_cancel=self._on_cancel, curve=curve, insecure=insecure
            )
        except BaseException:
            self._puller.shutdown()
            raise
        self._serving.set()
        self._engine_thread.start()

    @property
    def endpoint(self) -> str:
        return self.server.endpoint

    @property
    def is_alive(self) -> bool:
        """Whether all its threads run. A worker that has lost one serves nothing and has to be started anew."""
        return not self._stopping and self._engine_thread.is_alive() and self._puller.is_alive

    def stats(self) -> dict[str, float]:
        """Counters and gauges, by their metric name without prefix."""
        with self._lock:
            allocator = self._runtime.allocator
            return {
                **{f"decode_{name}": value for name, value in self._counters.items()},
                **{f"decode_{name}": value for name, value in self._puller.counters.items()},
                "decode_sequences": len(self._scheduler),
                "num_requests_waiting": len(self._waiting),
                "kv_cache_usage_perc": allocator.num_used / allocator.num_blocks,
            }

    def check_integrity(self) -> None:
        """Pages, sequences and transfers add up; when nothing runs, no page is used."""
        with self._lock:
            self._runtime.allocator.check_integrity()
            self._puller.check_integrity()
            held = [*self._scheduler.all(), *self._ended.values()]
            assert self._runtime.allocator.num_used == sum(len(sequence.block_table) for sequence in held)
            assert set(self._requests) == {s.key for s in self._scheduler.all()} | set(self._waiting)

    def shutdown(self) -> None:
        with self._lock:
            self._stopping = True
            self._lock.notify_all()
        self.server.shutdown()
        self._engine_thread.join(timeout=10)
        self._puller.shutdown()

    # -- requests, in the stream server's thread ------------------------------------------------------------------

    def _on_submit(self, stream_id: str, body: dict[str, Any]) -> None:
        self._serving.wait()
        match body.get("kind"):
            case "generate":
                try:
                    self._accept(stream_id, body)
                except RequestRefused as refused:
                    self.server.send(stream_id, {"refused": refusal_to_wire(refused)}, last=True)
            case "receipt":
                with self._lock:
                    receipt = self._receipts.get(str(body.get("request_id")))
                self.server.send(stream_id, {"receipt": receipt}, last=True)
            case other:
                self.server.refuse(stream_id, f"unknown kind of request {other!r}")

    def _accept(self, stream_id: str, body: dict[str, Any]) -> None:
        now = time.monotonic()
        request = GenerationRequest.from_wire(body["request"])
        source = Source(**body["source"]) if body.get("source") is not None else None
        check_request(request, self._limits)
        with self._lock:
            if stream_id in self._requests or stream_id in self._ended:
                raise RequestRefused("This stream number is in use; take another.", status=409, code="stream_in_use")
            if len(self._waiting) >= MAX_WAITING:
                raise RequestRefused(
                    f"{MAX_WAITING} requests are waiting on this worker; try again later.",
                    status=429,
                    code="overloaded",
                )
            self._orders(request, source, now)  # refuses what no source can serve, before it waits
            self._counters["requests_total"] += 1
            self._requests[stream_id] = _Request(request, source, now)
            self._waiting.append(stream_id)
            self._admit(now)

    def _on_cancel(self, stream_id: str) -> None:
        with self._lock:
            if stream_id in self._requests:
                self._end(stream_id, "cancelled by the client")

    def _orders(self, request: GenerationRequest, source: Source | None, now: float) -> FillSpec:
        size = self._limits.chunk_tokens
        num_prompt = len(request.token_ids)
        tail_s = self._compute.seconds((num_prompt - 1) // size * size, num_prompt)
        return fill_orders(request, self._policy, self._limits, has_source=source is not None, now=now, tail_s=tail_s)

    def _admit(self, now: float) -> None:
        """First come, first served: the oldest waiting request gets its pages before any younger one."""
        if self._is_admitting:
            return  # called from within by a request that ended at once; the loop below goes on
        self._is_admitting = True
        try:
            while self._waiting and self._has_room(self._requests[self._waiting[0]].request):
                self._begin(self._waiting.popleft(), now)
        finally:
            self._is_admitting = False

    def _has_room(self, request: GenerationRequest) -> bool:
        return len(self._scheduler) < MAX_SEQUENCES and self._runtime.allocator.can_allocate(_num_blocks(request))

    def _begin(self, key: str, now: float) -> None:
        state = self._requests[key]
        request = state.request
        table = self._runtime.allocator.allocate(_num_blocks(request))
        spec = self._orders(request, state.source, now)  # anew: time in the queue does not count against the target
        self._arrivals += 1
        sequence = Sequence(key=key, request=request, block_table=table, deadline=spec.deadline, arrival=self._arrivals)
        self._scheduler.add(sequence)
        state.timeline.admitted_at = now
        self._puller.start(
            key,
            spec,
            source=state.source if spec.may_load else None,
            token_ids=request.token_ids,
            cache_salt=request.cache_salt,
            block_table=table,
            now=now,
        )

    # -- the puller's owner; the lock is held ---------------------------------------------------------------------

    def fill_begins(self, fill: Fill) -> None:
        self._requests[fill.key].fill = fill

    def compute_chunk(self, key: str, chunk: int, start: int, stop: int) -> None:
        sequence = self._scheduler.get(key)
        assert sequence is not None and sequence.work is None
        sequence.work, sequence.work_chunk = (start, stop), chunk
        self._lock.notify_all()

    def fill_ready(self, key: str, now: float) -> None:
        sequence = self._scheduler.get(key)
        assert sequence is not None and sequence.work is None
        num_prompt = len(sequence.request.token_ids)
        filled = (num_prompt - 1) // self._limits.chunk_tokens * self._limits.chunk_tokens
        sequence.phase, sequence.work, sequence.work_chunk = Phase.TAIL, (filled, num_prompt), None
        self._requests[key].timeline.filled_at = now
        self._lock.notify_all()

    def fill_failed(self, key: str, code: str, message: str) -> None:
        self.server.send(key, {"failed": {"status": 502, "code": code, "message": message}}, last=True)
        self._end(key, message)

    def pin(self, key: str) -> None:
        sequence = self._scheduler.get(key)
        assert sequence is not None
        sequence.pins += 1

    def unpin(self, key: str) -> None:
        sequence = self._scheduler.get(key) or self._ended[key]
        sequence.pins -= 1
        self._free_if_unused(sequence)

    # -- the end of a request -------------------------------------------------------------------------------------

    def _end(self, key: str, reason: str) -> dict[str, Any] | None:
        """Forget the request, keep its receipt, give back its pages as soon as nobody uses them."""
        state = self._requests.pop(key)
        sequence = self._scheduler.get(key)
        if sequence is None:
            self._waiting.remove(key)
            self._admit(time.monotonic())  # it may have kept younger ones waiting that need less room
            return None
        receipt = self._receipt(state)
        self._receipts[state.request.request_id] = receipt
        while len(self._receipts) > MAX_RECEIPTS:
            self._receipts.popitem(last=False)
        self._puller.stop(key, reason)
        self._scheduler.remove(key)
        sequence.work = None
        self._ended[key] = sequence
        self._free_if_unused(sequence)
        return receipt

    def _free_if_unused(self, sequence: Sequence) -> None:
        if sequence.pins == 0 and self._ended.get(sequence.key) is sequence:
            del self._ended[sequence.key]
            self._runtime.allocator.free(sequence.block_table)
            self._admit(time.monotonic())

    def _receipt(self, state: _Request) -> dict[str, Any]:
        assert state.fill is not None
        state.timeline.opened_at = state.fill.opened_at
        return build_receipt(
            request_id=state.request.request_id,
            kv_mode=state.request.kv_mode,
            prompt_tokens=len(state.request.token_ids),
            chunk_tokens=self._limits.chunk_tokens,
            source=state.source.id if state.source is not None else None,
            timeline=state.timeline,
            fill=state.fill.machine,
            promised_kl=promised_kl(self._runtime.profile),
            ended_at=time.monotonic(),
        )

    # -- the engine's thread --------------------------------------------------------------------------------------

    def _engine_loop(self) -> None:
        try:
            while rows := self._wait_for_rows():
                self._step(rows)
        except BaseException:
            # Nothing would be computed any more: let the worker's supervisor see the end.
            log.exception("%s: the engine's thread ended", self.worker_id)
            raise

    def _wait_for_rows(self) -> list[Row]:
        """The next step's rows, pinned; none when the worker stops."""
        with self._lock:
            while not self._stopping:
                rows = self._scheduler.next_rows(self._slice_tokens())
                if rows:
                    for row in rows:
                        row.sequence.pins += 1
                    return rows
                self._lock.wait(timeout=1.0)
            return []

    def _slice_tokens(self) -> int:
        """How much prompt a step may compute: a whole chunk, or less if running requests would wait too long."""
        size = self._limits.chunk_tokens
        if not self._scheduler.in_phase(Phase.RUNNING):
            return size
        per_token = self._compute.seconds(0, size) / size
        tokens = int(0.8 * self._policy.itl_s / per_token) // MIN_SLICE_TOKENS * MIN_SLICE_TOKENS
        return max(MIN_SLICE_TOKENS, min(tokens, size))

    def _step(self, rows: list[Row]) -> None:
        begin = time.monotonic()
        try:
            logits = self._runtime.engine.forward(
                [
                    SequenceSlice(
                        token_ids=row.token_ids(),
                        start=row.start,
                        block_table=row.sequence.block_table,
                        need_logits=row.sample,
                    )
                    for row in rows
                ]
            )
        except Exception as error:
            log.exception("%s: a step failed", self.worker_id)
            drawn: list[int | Exception | None] = [error] * len(rows)
        else:
            of_sampled = iter(logits)
            drawn = [self._draw(row, next(of_sampled)) if row.sample else None for row in rows]
        now = time.monotonic()
        with self._lock:
            self._after_step(rows, drawn, now - begin, now)

    def _draw(self, row: Row, logits: Any) -> int | Exception | None:
        """The row's next token; None if it was cancelled during the step."""
        state = self._requests.get(row.sequence.key)
        if state is None:
            return None
        try:
            return sample(logits, state.request.sampling, len(row.sequence.output), state.rng)
        except Exception as error:
            log.exception("%s: no token could be drawn", self.worker_id)
            return error

    def _after_step(self, rows: list[Row], drawn: list[int | Exception | None], seconds: float, now: float) -> None:
        if len(rows) == 1 and not rows[0].sample and drawn[0] is None:
            self._compute.observe(rows[0].start, rows[0].stop, seconds)
        for row, token in zip(rows, drawn, strict=True):
            sequence = row.sequence
            try:
                if sequence.phase is Phase.ENDED:
                    pass
                elif isinstance(token, Exception):
                    self._fail(sequence.key)
                else:
                    self._advance(row, token, now)
            except Exception:
                # A bug of ours: this request ends with an error, the worker goes on with the others.
                log.exception("%s: a row could not be advanced", self.worker_id)
                self._fail(sequence.key)
            sequence.pins -= 1
            self._free_if_unused(sequence)

    def _advance(self, row: Row, token: int | None, now: float) -> None:
        sequence = row.sequence
        if sequence.phase is not Phase.RUNNING:
            self._counters["computed_prompt_tokens_total"] += row.stop - row.start
            if not self._scheduler.computed(row):
                return
            if sequence.phase is Phase.FILLING:
                chunk, sequence.work_chunk = sequence.work_chunk, None
                assert chunk is not None
                self._puller.computed(sequence.key, chunk, now)
                return
            sequence.phase = Phase.RUNNING
            self._requests[sequence.key].timeline.first_token_at = now
        assert token is not None
        self._emit(sequence, token)

    def _emit(self, sequence: Sequence, token: int) -> None:
        sequence.output.append(token)
        self._counters["generated_tokens_total"] += 1
        sampling = sequence.request.sampling
        is_stop = token in sampling.stop_token_ids or (
            not sampling.ignore_eos and token in self._runtime.model.eos_token_ids
        )
        if not is_stop and len(sequence.output) < sampling.max_tokens:
            self.server.send(sequence.key, {"tokens": [token]})
            return
        receipt = self._end(sequence.key, "finished")
        finished = {
            "finish_reason": "stop" if is_stop else "length",
            "prompt_tokens": len(sequence.request.token_ids),
            "completion_tokens": len(sequence.output),
            "receipt": receipt,
        }
        self.server.send(sequence.key, {"tokens": [token], "finished": finished}, last=True)

    def _fail(self, key: str) -> None:
        message = "The decode worker failed while computing this request; see its log."
        failed = {"status": 500, "code": "internal_error", "message": message}
        self.server.send(key, {"failed": failed}, last=True)
        if key in self._requests:
            self._end(key, message)


def _num_blocks(request: GenerationRequest) -> int:
    """KV blocks for the prompt and all that may be generated."""
    return blocks_for(len(request.token_ids) + request.sampling.max_tokens, BLOCK_TOKENS)


def refusal_to_wire(refused: RequestRefused) -> dict[str, Any]:
    """What `cluster/` turns back into a RequestRefused."""
    return {
        "message": refused.message,
        "status": refused.status,
        "code": refused.code,
        "param": refused.param,
    }
