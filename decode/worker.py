"""The decode worker: takes requests, has their KV pulled or computed, batches, samples, and streams tokens back.

A shell: decisions are in scheduler.py, fill.py and admission.py. Three kinds of threads meet under one lock: the
stream server's (requests, cancellations; here), the puller's (arrivals, decoding; puller.py) and the engine's (steps;
engine_loop.py).
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict, deque
from typing import Any

from decode.active_request import ActiveRequest
from decode.admission import check_request, fill_orders
from decode.answers import failed_event, finished_event, refused_event, tokens_event
from decode.blob_decoder import NewPages
from decode.engine_loop import EngineLoop
from decode.estimator import CodecEstimator
from decode.fill_events import Fail
from decode.fill_loading import EngineLoad, FillSpec
from decode.puller import Fill, KVPuller, Source
from decode.receipt import Timeline
from decode.requests import GenerationRequest, RequestRefused
from decode.scheduler import Phase, Scheduler, Sequence
from decode.slo import SLOPolicy
from decode.startup import measure_compute, measure_decode, promised_kl, worker_limits
from decode.tagged_pages import TaggedPages
from prefill.chunks import num_loadable_chunks
from prefill.runtime import ModelRuntime
from transport.curve import CurveKeys
from transport.stream_server import StreamServer

MAX_WAITING = 256
MAX_SEQUENCES = 256  # admitted at once; as many transfers as transport allows to one source
MAX_RECEIPTS = 1024


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
        self._limits = worker_limits(runtime, chunk_tokens)
        self._promised_kl = promised_kl(runtime.profile)
        self._compute = measure_compute(runtime, chunk_tokens)
        self._pages = TaggedPages(runtime, chunk_tokens=chunk_tokens)
        self._lock = threading.Condition(threading.RLock())
        self._scheduler = Scheduler()
        self._requests: dict[str, ActiveRequest] = {}
        self._waiting: deque[str] = deque()
        self._ended: dict[str, Sequence] = {}  # ended, but somebody still uses their pages
        self._receipts: OrderedDict[str, dict[str, Any]] = OrderedDict()
        self._arrivals = 0
        self._is_admitting = self._stopping = False
        self._counters = {"generated_tokens_total": 0, "requests_total": 0}
        self._puller = KVPuller(
            runtime,
            worker_id=worker_id,
            compute=self._compute,
            codec=CodecEstimator(measured=measure_decode(runtime, chunk_tokens)),
            owner=self,
            lock=self._lock,
            curve=curve,
        )
        self._engine = EngineLoop(
            runtime,
            owner=self,
            lock=self._lock,
            scheduler=self._scheduler,
            requests=self._requests,
            pages=self._pages,
            compute=self._compute,
            chunk_tokens=chunk_tokens,
            name=worker_id,
        )
        self._serving = threading.Event()  # the server's thread may call before `self.server` is set
        try:
            self.server = StreamServer(
                bind, on_submit=self._on_submit, on_cancel=self._on_cancel, curve=curve, insecure=insecure
            )
        except BaseException:
            self._puller.shutdown()
            raise
        self._serving.set()
        self._engine.start()

    @property
    def endpoint(self) -> str:
        return self.server.endpoint

    @property
    def is_alive(self) -> bool:
        """Whether all its threads run. A worker that has lost one serves nothing and has to be started anew."""
        return not self._stopping and self._engine.is_alive and self._puller.is_alive

    def stats(self) -> dict[str, float]:
        """Counters and gauges, by their metric name without prefix."""
        with self._lock:
            return {
                **{f"decode_{name}": value for name, value in self._counters.items()},
                **{f"decode_{name}": value for name, value in self._puller.counters.items()},
                "decode_computed_prompt_tokens_total": self._engine.num_prompt_tokens,
                "decode_sequences": len(self._scheduler),
                "num_requests_waiting": len(self._waiting),
                "kv_cache_usage_perc": self._pages.usage(),
            }

    def set_policy(self, policy: SLOPolicy) -> None:
        """For requests from now on."""
        with self._lock:
            self._policy = policy

    def check_integrity(self) -> None:
        """Pages, sequences and transfers add up; when nothing runs, no page is used."""
        with self._lock:
            self._puller.check_integrity()
            held = [*self._scheduler.all(), *self._ended.values()]
            self._pages.check_integrity(sequence.block_table for sequence in held)
            assert set(self._requests) == {s.key for s in self._scheduler.all()} | set(self._waiting)

    def shutdown(self) -> None:
        with self._lock:
            self._stopping = True
            self._engine.stop()
        self.server.shutdown()
        self._engine.join()
        self._puller.shutdown()

    # -- requests, in the stream server's thread ------------------------------------------------------------------

    def _on_submit(self, stream_id: str, body: dict[str, Any]) -> None:
        self._serving.wait()
        match body.get("kind"):
            case "generate":
                try:
                    self._accept(stream_id, body)
                except RequestRefused as refused:
                    self.server.send(stream_id, refused_event(refused), last=True)
            case "receipt":
                with self._lock:
                    receipt = self._receipts.get(str(body.get("request_id")))
                self.server.send(stream_id, {"receipt": receipt}, last=True)
            case other:
                self.server.refuse(stream_id, f"unknown kind of request {other!r}")

    def _accept(self, stream_id: str, body: dict[str, Any]) -> None:
        now = time.monotonic()
        request = GenerationRequest.from_wire(body["request"])
        sources = [Source(**source) for source in body.get("sources", ())]
        check_request(request, self._limits)
        size = self._limits.chunk_tokens
        with self._lock:
            if stream_id in self._requests or stream_id in self._ended:
                raise RequestRefused("This stream number is in use; take another.", status=409, code="stream_in_use")
            if len(self._waiting) >= MAX_WAITING:
                raise RequestRefused(
                    f"{MAX_WAITING} requests are waiting on this worker; try again later.",
                    status=429,
                    code="overloaded",
                )
            state = ActiveRequest(
                request=request,
                policy=self._policy.for_tenant(request.tenant),
                sources=sources,
                timeline=Timeline(received_at=now),
                loaded_tokens=num_loadable_chunks(len(request.token_ids), size) * size,
            )
            self._orders(state, now)  # refuses what no source can serve, before it waits
            self._counters["requests_total"] += 1
            self._requests[stream_id] = state
            self._waiting.append(stream_id)
            self._admit(now)

    def _on_cancel(self, stream_id: str) -> None:
        with self._lock:
            if stream_id in self._requests:
                self._end(stream_id, "cancelled by the client")

    def _orders(self, state: ActiveRequest, now: float) -> FillSpec:
        tail_s = self._compute.tail_seconds(state.loaded_tokens, state.prompt_tokens)
        return fill_orders(
            state.request, state.policy, self._limits, has_source=bool(state.sources), now=now, tail_s=tail_s
        )

    def _admit(self, now: float) -> None:
        """First come, first served: the oldest waiting request gets its pages before any younger one."""
        if self._is_admitting:
            return  # called from within by a request that ended at once; the loop below goes on
        self._is_admitting = True
        try:
            while self._waiting and self._has_room(self._requests[self._waiting[0]]):
                self._begin(self._waiting.popleft(), now)
        finally:
            self._is_admitting = False

    def _has_room(self, state: ActiveRequest) -> bool:
        return len(self._scheduler) < MAX_SEQUENCES and self._pages.can_allocate(state.max_total_tokens)

    def _begin(self, key: str, now: float) -> None:
        state = self._requests[key]
        request = state.request
        table = self._pages.allocate(state.max_total_tokens)
        spec = self._orders(state, now)  # anew: time in the queue does not count against the target
        self._arrivals += 1
        sequence = Sequence(
            key=key,
            request=request,
            block_table=table,
            deadline=spec.deadline,
            arrival=self._arrivals,
            itl_s=state.policy.itl_s if request.itl_s is None else request.itl_s,
        )
        self._scheduler.add(sequence)
        state.timeline.admitted_at = now
        self._puller.start(
            key,
            spec,
            sources=state.sources,
            token_ids=request.token_ids,
            cache_salt=request.cache_salt,
            block_table=table,
            link_prior_bps=state.policy.link_prior_bps,
            now=now,
        )

    # -- the puller's owner; the lock is held ---------------------------------------------------------------------

    def fill_begins(self, fill: Fill) -> None:
        self._requests[fill.key].fill = fill

    def engine_load(self, key: str) -> EngineLoad:
        return self._engine.load_before(key)

    def compute_chunk(self, key: str, chunk: int, start: int, stop: int) -> None:
        sequence = self._scheduler.get(key)
        assert sequence is not None and sequence.work is None
        sequence.work, sequence.work_chunk = (start, stop), chunk
        self._lock.notify_all()

    def chunk_loaded(self, key: str, start: int, stop: int, level: str) -> None:
        sequence = self._scheduler.get(key)
        assert sequence is not None
        self._pages.loaded(sequence.block_table, start, stop, level)

    def fill_ready(self, key: str, now: float) -> None:
        sequence, state = self._scheduler.get(key), self._requests[key]
        assert sequence is not None and sequence.work is None
        state.timeline.filled_at = now
        state.first_kl = self._pages.worst_kl(sequence.block_table, 0, state.loaded_tokens)
        sequence.phase, sequence.work_chunk = Phase.TAIL, None
        sequence.work = (state.loaded_tokens, state.prompt_tokens)
        self._lock.notify_all()

    def fill_failed(self, key: str, failure: Fail) -> None:
        event = failed_event(status=failure.status, code=failure.code, message=failure.message)
        self.server.send(key, event, last=True)
        self._end(key, failure.message)

    def put_pages(self, key: str, pages: NewPages) -> None:
        self._requests[key].new_pages.append(pages)
        self._lock.notify_all()

    def pin(self, key: str) -> None:
        sequence = self._scheduler.get(key)
        assert sequence is not None
        sequence.pins += 1

    def unpin(self, key: str) -> None:
        sequence = self._scheduler.get(key) or self._ended[key]
        sequence.pins -= 1
        self.unpinned(sequence)

    # -- the end of a request -------------------------------------------------------------------------------------

    def _end(self, key: str, reason: str) -> dict[str, Any] | None:
        """Forget the request, keep its receipt, give back its pages as soon as nobody uses them."""
        state = self._requests.pop(key)
        sequence = self._scheduler.get(key)
        if sequence is None:
            self._waiting.remove(key)
            self._admit(time.monotonic())  # it may have kept younger ones waiting that need less room
            return None
        size, now = self._limits.chunk_tokens, time.monotonic()
        receipt = state.receipt(sequence, self._pages, chunk_tokens=size, promised_kl=self._promised_kl, now=now)
        receipt["ended"] = reason
        self._receipts[state.request.request_id] = receipt
        while len(self._receipts) > MAX_RECEIPTS:
            self._receipts.popitem(last=False)
        self._puller.stop(key, reason)
        self._scheduler.remove(key)
        sequence.work = None
        self._ended[key] = sequence
        self.unpinned(sequence)
        return receipt

    # -- the engine's owner; the lock is held ---------------------------------------------------------------------

    def chunk_computed(self, key: str, chunk: int, now: float) -> None:
        self._puller.computed(key, chunk, now)

    def pages_refined(self, key: str, pages: NewPages, num_output: int, now: float) -> None:
        self._puller.pages_put(key, pages, num_output, now)

    def _first_token(self, sequence: Sequence, now: float) -> None:
        timeline = self._requests[sequence.key].timeline
        timeline.first_token_at = now
        if timeline.filled_at is not None:
            num_prompt, size = len(sequence.request.token_ids), self._limits.chunk_tokens
            self._compute.observe_tail((num_prompt - 1) // size * size, num_prompt, now - timeline.filled_at)
        self._puller.first_token(sequence.key, now)

    def token_drawn(self, sequence: Sequence, token: int, now: float) -> None:
        if not sequence.output:
            self._first_token(sequence, now)
        sequence.output.append(token)
        self._counters["generated_tokens_total"] += 1
        sampling = sequence.request.sampling
        is_stop = token in sampling.stop_token_ids or (
            not sampling.ignore_eos and token in self._runtime.model.eos_token_ids
        )
        if not is_stop and len(sequence.output) < sampling.max_tokens:
            self.server.send(sequence.key, tokens_event(token))
            return
        receipt = self._end(sequence.key, "finished")
        assert receipt is not None
        finished = finished_event(
            token,
            reason="stop" if is_stop else "length",
            prompt_tokens=len(sequence.request.token_ids),
            completion_tokens=len(sequence.output),
            receipt=receipt,
        )
        self.server.send(sequence.key, finished, last=True)

    def step_failed(self, key: str) -> None:
        message = "The decode worker failed while computing this request; see its log."
        self.server.send(key, failed_event(status=500, code="internal_error", message=message), last=True)
        if key in self._requests:
            self._end(key, message)

    def unpinned(self, sequence: Sequence) -> None:
        if sequence.pins == 0 and self._ended.get(sequence.key) is sequence:
            del self._ended[sequence.key]
            self._pages.free(sequence.block_table)
            self._admit(time.monotonic())
