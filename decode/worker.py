"""The decode worker: takes requests, has their KV pulled or computed, batches, samples, and streams tokens back.

A shell: decisions are in scheduler.py, fill.py and admission.py. Three kinds of threads meet under one lock: the
stream server's (requests, cancellations; here), the puller's (arrivals, decoding; puller.py) and the engine's (steps;
engine_loop.py).
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from decode.active_request import ActiveRequest
from decode.admission import AUTO, check_request, fill_orders
from decode.answers import failed_event, finished_event, prompt_logprobs_event, refused_event, tokens_event
from decode.blob_decoder import NewPages
from decode.engine_loop import EngineLoop
from decode.estimator import CodecEstimator
from decode.fill_events import Fail
from decode.fill_loading import EngineLoad, FillSpec
from decode.kept_chunks import KeptChunks
from decode.logprobs import NoTokenAllowed
from decode.page_holders import MAX_SEQUENCES, PageHolders
from decode.puller import Fill, KVPuller, Source
from decode.receipt import Timeline
from decode.requests import GenerationRequest, RequestRefused, TokenLogprobs
from decode.sampling import Drawn
from decode.sampling_state import SamplingState
from decode.scheduler import Phase, QueueRefused, Scheduler, SchedulingPolicy, Sequence
from decode.scheduling_policy import MAX_WAITING
from decode.slo import SLOPolicy
from decode.startup import measure_compute, measure_decode, measure_steps, promised_kl, worker_limits
from decode.tagged_pages import TaggedPages
from decode.window_chunks import Layers
from prefill.chunks import num_loadable_chunks
from prefill.held_chunks import HeldChunks
from prefill.kv_source import KVSource
from prefill.page_quality import EXACT
from prefill.quantized_pool import Recents
from prefill.runtime import ModelRuntime
from prefill.store import MASTER_LEVEL, ChunkStore
from transport.curve import CurveKeys
from transport.stream_server import StreamServer

MAX_RECEIPTS = 1024
READ_S_PER_BYTE = 1e-9  # from disk: 1 GB/s


class DecodeWorker:
    """Serves until `shutdown`. Raises transport errors when it cannot bind."""

    def __init__(
        self,
        runtime: ModelRuntime,
        *,
        policy: SLOPolicy,
        bind: str = "tcp://127.0.0.1:0",
        chunk_tokens: int = 256,
        prefix_caching: bool = True,
        max_sequences: int = MAX_SEQUENCES,
        store: ChunkStore | None = None,
        source: KVSource | None = None,
        kv_bind: str = "tcp://127.0.0.1:0",
        worker_id: str = "decode-0",
        curve: CurveKeys | None = None,
        insecure: bool = False,
    ) -> None:
        """source: of a prefill worker in this process, which keeps and serves what is computed here instead of a source
        over `store`."""
        assert store is None or source is None
        self.worker_id = worker_id
        self._runtime, self._policy = runtime, policy
        self._limits = worker_limits(runtime, chunk_tokens)
        self._promised_kl = promised_kl(runtime.profile)
        self._compute = measure_compute(runtime, chunk_tokens)
        self._steps = measure_steps(runtime, chunk_tokens)
        self._answer_tokens = 0.0  # on average
        self._pages = TaggedPages(runtime, chunk_tokens=chunk_tokens, shares_prefixes=prefix_caching)
        self._lock = threading.Condition(threading.RLock())
        self._scheduler = Scheduler(
            SchedulingPolicy(max_waiting=MAX_WAITING),
            num_blocks=runtime.pool.num_blocks,
            blocks_for=runtime.pool.blocks_for,
        )
        self._scheduler.set_shares(policy.shares(), default=policy.share)
        self._requests: dict[str, ActiveRequest] = {}
        self._holders = PageHolders(
            owner=self,
            scheduler=self._scheduler,
            pages=self._pages,
            requests=self._requests,
            max_sequences=max_sequences,
        )
        self._receipts: OrderedDict[str, dict[str, Any]] = OrderedDict()
        self._stopping = False
        self._counters = {"generated_tokens_total": 0, "requests_total": 0, "cached_prompt_tokens_total": 0}
        self._counters["partial_prompt_tokens_total"] = 0
        self._codec = CodecEstimator(measured=measure_decode(runtime, chunk_tokens))
        floor_bytes = min(self._limits.chunk_bytes.values())
        self._remote_s_per_token = floor_bytes * 8 / policy.link_prior_bps / chunk_tokens
        self._puller = KVPuller(
            runtime,
            worker_id=worker_id,
            compute=self._compute,
            codec=self._codec,
            owner=self,
            lock=self._lock,
            curve=curve,
            own=lambda: None if self.source is None else self.source.local,
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
            steps=self._steps,
            name=worker_id,
        )
        # What it computes itself it keeps and serves, to others and to itself.
        self.source, self._owns_source = source, source is None
        self._serving = threading.Event()  # the server's thread may call before `self.server` is set
        try:
            if store is not None:
                self.source = KVSource(
                    runtime, store=store, bind=kv_bind, worker_id=worker_id, curve=curve, insecure=insecure
                )
            self.server = StreamServer(
                bind, on_submit=self._on_submit, on_cancel=self._on_cancel, curve=curve, insecure=insecure
            )
        except BaseException:
            self._puller.shutdown()
            self._end_source()
            raise
        self._kept = KeptChunks(
            pages=self._pages,
            source=self.source,
            chunk_tokens=chunk_tokens,
            worker_id=worker_id,
            public_key=None if curve is None else curve.public,
        )
        self._held = HeldChunks(None if self.source is None else self.source.store, self._chunks_in_pages)
        self._serving.set()
        self._engine.start()

    @property
    def endpoint(self) -> str:
        return self.server.endpoint

    @property
    def kv_endpoint(self) -> str | None:
        """Where it serves what it keeps; None: it keeps nothing, or another worker serves it."""
        return self.source.endpoint if self.source is not None and self._owns_source else None

    def index_changes(self, since: int | None) -> dict[str, Any]:
        """What it holds, for the cluster's index. See HeldChunks."""
        return self._held.changes(since)

    @property
    def is_alive(self) -> bool:
        """Whether all its threads run. A worker that has lost one serves nothing and has to be started anew."""
        is_source_alive = self.source is None or self.source.is_alive
        return not self._stopping and self._engine.is_alive and self._puller.is_alive and is_source_alive

    def stats(self) -> dict[str, float]:
        """Counters and gauges, by their metric name without prefix. Asked for once a second, by which time pages that
        nobody has used for too long are forgotten, also while no request comes."""
        with self._lock:
            self._pages.expire(time.monotonic())
            return {
                **{f"decode_{name}": value for name, value in self._counters.items()},
                **{f"decode_{name}": value for name, value in self._puller.counters.items()},
                "decode_computed_prompt_tokens_total": self._engine.num_prompt_tokens,
                "decode_sequences": len(self._scheduler),
                **self._speeds(),
                "num_requests_waiting": len(self._scheduler.waiting()),
                "decode_preemptions_total": self._scheduler.num_preemptions,
                "kv_cache_usage_perc": self._pages.usage(),
                "kv_blocks_cached": self._pages.num_cached,
                f"kv_cache_info;dtype={self._runtime.kv_cache_dtype}": 1.0,
                "kv_bytes_per_token": self._runtime.pool.bytes_per_token,
                **(self.source.source_stats("decode_kv") if self.source is not None and self._owns_source else {}),
            }

    def _speeds(self) -> dict[str, float]:
        """What a router predicts with (docs/routing.md)."""
        size = self._limits.chunk_tokens
        waiting = sum(waiting.num_tokens for waiting in self._scheduler.waiting())
        filling = [s for s in self._scheduler.all() if s.phase is not Phase.RUNNING]
        decode_s = self._codec.seconds(MASTER_LEVEL) / size
        now = time.monotonic()
        admission_s = self._holders.admission_s(now)
        return {
            **({"admission_s": admission_s} if admission_s else {}),
            "prefill_tokens_per_s": size / self._compute.seconds(0, size),
            "waiting_prompt_tokens": waiting + sum(s.work[1] - s.work[0] for s in filling if s.work is not None),
            "decode_running_rows": len(self._scheduler) - len(filling),
            "decode_step_s": self._engine.row_step_s,
            "decode_base_s": self._steps.base_s(now),
            "decode_row_s": self._steps.row_s(now),
            "answer_tokens": self._answer_tokens,
            "load_s_per_token_ram": decode_s,
            "load_s_per_token_disk": decode_s + READ_S_PER_BYTE * self._limits.chunk_bytes[MASTER_LEVEL] / size,
            "load_s_per_token_remote": self._remote_s_per_token,
        }

    def _chunks_in_pages(self) -> set[bytes]:
        with self._lock:
            return self._pages.whole_chunks(self._limits.chunk_tokens)

    def set_policy(self, policy: SLOPolicy) -> None:
        """For requests from now on."""
        with self._lock:
            self._policy = policy
            self._scheduler.set_shares(policy.shares(), default=policy.share)

    def check_integrity(self) -> None:
        """Pages, sequences and transfers add up; when nothing runs, no page is used."""
        with self._lock:
            self._puller.check_integrity()
            self._holders.check_integrity()

    def shutdown(self) -> None:
        with self._lock:
            self._stopping = True
            self._engine.stop()
        self.server.shutdown()
        self._engine.join()
        self._puller.shutdown()
        self._end_source()

    def _end_source(self) -> None:
        if self.source is not None and self._owns_source:
            self.source.shutdown()

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
        with self._lock:
            if stream_id in self._requests or self._holders.is_in_use(stream_id):
                raise RequestRefused("This stream number is in use; take another.", status=409, code="stream_in_use")
            state = ActiveRequest(
                request=request,
                policy=self._policy.for_tenant(request.tenant),
                given_sources=sources,
                timeline=Timeline(received_at=now),
                fill_tokens=len(request.token_ids),
                sampling=SamplingState(
                    request.sampling, request.token_ids, eos_token_ids=self._runtime.model.eos_token_ids
                ),
                chain=self._pages.chain(request.token_ids, request.cache_salt),
            )
            state.max_kl = self._shared_quality(state)
            spec = self._orders(state, now)  # refuses what no source can serve, before it waits
            self._counters["requests_total"] += 1
            self._requests[stream_id] = state
            try:
                self._holders.submit(stream_id, deadline=spec.deadline, now=now)
            except QueueRefused:
                del self._requests[stream_id]
                raise
            self._holders.admit(now)

    def _on_cancel(self, stream_id: str) -> None:
        with self._lock:
            if stream_id in self._requests:
                self._end(stream_id, "cancelled by the client")

    def _orders(self, state: ActiveRequest, now: float) -> FillSpec:
        """How what has to be in the pages of a request before its next token is to be had."""
        size = self._limits.chunk_tokens
        # Who says how each chunk is to be had means those of the prompt; an answer that was given up is computed again.
        num_loadable = state.prompt_tokens if state.max_kl is None else state.fill_tokens
        state.loaded_tokens = num_loadable_chunks(num_loadable, size) * size
        state.sources = self._kept.own_source(state, num_loadable) + state.given_sources
        state.front = self._kept.front_of(state)
        return fill_orders(
            state.request,
            state.policy,
            self._limits,
            has_source=bool(state.sources),
            now=now,
            tail_s=self._compute.tail_seconds(state.tail_start, state.fill_tokens),
            num_chunks=state.loaded_tokens // size,
            source_computes=any(not source.stored_only for source in state.given_sources),
            cached_tokens=0 if state.pages is None else state.pages.cached_tokens,
            is_accepted=state.pages is not None,
            front_stop=0 if state.front is None else state.front.stop,
            front_kl=EXACT if state.front is None else state.front.kl,
        )

    def _shared_quality(self, state: ActiveRequest) -> float | None:
        """How good KV of other requests must be for this one, nats a token; None if it wants none: who says how each
        chunk is to be had, or wants the logits of the whole prompt, wants it done."""
        request = state.request
        if request.kv_mode != AUTO or request.plan is not None or request.sampling.needs_whole_prompt:
            return None
        return self._pages.max_kl(state.request.floor or state.policy.floor)

    # -- who holds pages; the lock is held ------------------------------------------------------------------------

    def admitted(self, key: str, sequence: Sequence | None, arrival: int, now: float) -> Sequence:
        """It has its pages. sequence: if it was preempted before."""
        state = self._requests[key]
        pages, request = state.pages, state.request
        assert pages is not None
        state.cached_kl = self._pages.worst_kl(pages, 0, pages.cached_tokens)
        self._counters["cached_prompt_tokens_total"] += pages.cached_tokens
        if sequence is not None:
            return sequence
        state.timeline.admitted_at = now
        return Sequence(
            key=key,
            request=request,
            block_table=pages.blocks,
            # Anew: time in the queue does not count against the target.
            deadline=now + (state.policy.ttft_s if request.ttft_s is None else request.ttft_s),
            arrival=arrival,
            itl_s=state.policy.itl_s if request.itl_s is None else request.itl_s,
        )

    def begin_fill(self, sequence: Sequence, now: float) -> None:
        state = self._requests[sequence.key]
        spec = self._orders(state, now)
        if sequence.output and spec.infeasible == "reject":
            spec = replace(spec, infeasible="best_effort")  # its first token came long ago
        self._puller.start(
            sequence.key,
            spec,
            sources=state.sources,
            # Chunks and the token behind them; of an answer that was given up they may be fewer than could be had.
            token_ids=sequence.token_ids(0, state.loaded_tokens + 1),
            cache_salt=state.request.cache_salt,
            block_table=sequence.block_table,
            max_kl=state.max_kl or EXACT,
            link_prior_bps=state.policy.link_prior_bps,
            now=now,
            front=state.front,
        )

    def gives_up(self, sequence: Sequence) -> None:
        """Its pages go to somebody else. What was loaded is offered to the store too; what was computed is there."""
        state = self._requests[sequence.key]
        self._puller.stop(sequence.key, "preempted")
        state.new_pages.clear()
        state.num_preempted += 1
        # While it still fills, some of that is not there yet.
        if sequence.output and state.fill is not None and state.fill.machine.ready:
            self._kept.written(state, 0, state.loaded_tokens)
        if state.is_answering:
            self._kept.keep_tail(state, sequence.num_tokens - 1)
        state.is_answering = False

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

    def chunk_loaded(
        self,
        key: str,
        start: int,
        stop: int,
        level: str,
        base_kl: float,
        *,
        layers: Layers = None,
        recents: Recents | None = None,
    ) -> None:
        pages = self._requests[key].pages
        assert pages is not None
        self._pages.loaded(pages, start, stop, level, base_kl, layers=layers, recents=recents)

    def chunk_discarded(self, key: str, start: int, stop: int) -> None:
        pages = self._requests[key].pages
        assert pages is not None
        self._pages.discarded(pages, start, stop)

    def fill_ready(self, key: str, now: float) -> None:
        sequence, state = self._scheduler.get(key), self._requests[key]
        assert sequence is not None and sequence.work is None and state.fill is not None
        if state.front is not None and not state.fill.machine.front_stop:
            state.front = None
        if not sequence.output:
            state.timeline.filled_at = now
            self._counters["partial_prompt_tokens_total"] += state.fill.machine.num_front_tokens
            self._note_load(state, now)
            assert state.pages is not None
            state.first_kl = self._pages.worst_kl(state.pages, 0, state.loaded_tokens)
        sequence.phase, sequence.work_chunk = Phase.TAIL, None
        sequence.work = (state.tail_start, state.fill_tokens)
        assert state.pages is not None
        self._pages.share(state.pages, state.loaded_tokens)
        self._lock.notify_all()

    def _note_load(self, state: ActiveRequest, now: float) -> None:
        """How long KV of other workers took, if there was any."""
        fill, admitted_at = state.fill, state.timeline.admitted_at
        assert fill is not None and admitted_at is not None
        num_loaded = sum(fill.machine.table.levels.values()) * self._limits.chunk_tokens
        if num_loaded and all(source.id != self.worker_id for source in fill.sources):
            self._remote_s_per_token += 0.3 * ((now - admitted_at) / num_loaded - self._remote_s_per_token)

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
        sequence = self._holders.pinned(key)
        sequence.pins -= 1
        self.unpinned(sequence)
        self._lock.notify_all()  # its pages can be had now

    # -- the end of a request -------------------------------------------------------------------------------------

    def _end(self, key: str, reason: str) -> dict[str, Any] | None:
        """Forget the request, keep its receipt, give back its pages as soon as nobody uses them."""
        state, sequence, now = self._requests[key], self._scheduler.get(key), time.monotonic()
        receipt = None
        if sequence is not None:
            size = self._limits.chunk_tokens
            if sequence.phase is Phase.RUNNING:
                self._kept.keep_tail(state, sequence.num_tokens - 1)
            receipt = state.receipt(sequence, self._pages, chunk_tokens=size, promised_kl=self._promised_kl, now=now)
            receipt["ended"] = reason
            self._receipts[state.request.request_id] = receipt
            while len(self._receipts) > MAX_RECEIPTS:
                self._receipts.popitem(last=False)
            self._puller.stop(key, reason)
        self._holders.ended(key, now)
        del self._requests[key]
        self._holders.admit(now)  # it may have kept others waiting that need less room
        return receipt

    # -- the engine's owner; the lock is held ---------------------------------------------------------------------

    def chunk_computed(self, key: str, chunk: int, now: float) -> None:
        self._kept.keep(self._requests[key], chunk)
        self._puller.computed(key, chunk, now)

    def kv_written(self, key: str, start: int, stop: int) -> None:
        self._kept.written(self._requests[key], start, stop)

    def before_step(self, now: float) -> None:
        self._holders.before_step(now)

    def grow(self, sequence: Sequence, num_blocks: int) -> bool:
        return self._holders.grow(sequence, num_blocks)

    def spill(self, sequence: Sequence) -> None:
        self._holders.spill(sequence, time.monotonic())

    def pages_refined(self, key: str, pages: NewPages, num_output: int, now: float) -> None:
        self._puller.pages_put(key, pages, num_output, now)

    def began_answer(self, sequence: Sequence, now: float) -> None:
        """All that was to be filled is, and the next token is drawn: the first, if it was not preempted before."""
        state = self._requests[sequence.key]
        state.is_answering = True
        timeline = state.timeline
        if not sequence.output:
            timeline.first_token_at = now
            if timeline.filled_at is not None:
                self._compute.observe_tail(state.tail_start, state.fill_tokens, now - timeline.filled_at)
            state.first_fill, state.first_sources = state.fill, state.sources
        self._puller.first_token(sequence.key, state.fill_tokens, now)
        self._holders.filled(sequence.key)
        self._holders.admit(now)  # those that waited for its pages

    def prompt_scored(self, sequence: Sequence, start: int, logprobs: Iterable[TokenLogprobs]) -> None:
        self.server.send(sequence.key, prompt_logprobs_event(start, logprobs))

    def token_drawn(self, sequence: Sequence, drawn: Drawn, now: float) -> None:
        token = drawn.token_id
        sequence.output.append(token)
        self._requests[sequence.key].chain.extend([token])
        self._counters["generated_tokens_total"] += 1
        sampling = sequence.request.sampling
        is_stop = token in sampling.stop_token_ids or (
            not sampling.ignore_eos and token in self._runtime.model.eos_token_ids
        )
        if not is_stop and len(sequence.output) < sampling.max_tokens:
            self.server.send(sequence.key, tokens_event(token, drawn.logprobs))
            return
        receipt = self._end(sequence.key, "finished")
        assert receipt is not None
        # Of the first there is nothing to average with.
        weight = 0.1 if self._answer_tokens else 1.0
        self._answer_tokens += weight * (len(sequence.output) - self._answer_tokens)
        finished = finished_event(
            token,
            drawn.logprobs,
            reason="stop" if is_stop else "length",
            prompt_tokens=len(sequence.request.token_ids),
            completion_tokens=len(sequence.output),
            receipt=receipt,
        )
        self.server.send(sequence.key, finished, last=True)

    def step_failed(self, key: str, error: Exception) -> None:
        if isinstance(error, NoTokenAllowed):
            status, code = 400, "no_token_allowed"
            message = (
                "No token may come next: allowed_token_ids, bad_words and min_tokens together forbid all of them. "
                "Leave out one of these, or allow more tokens."
            )
        else:
            status, code = 500, "internal_error"
            message = "The decode worker failed while computing this request; see its log."
        self.server.send(key, failed_event(status=status, code=code, message=message), last=True)
        if key in self._requests:
            self._end(key, message)

    def unpinned(self, sequence: Sequence) -> None:
        self._holders.unpinned(sequence, time.monotonic())
