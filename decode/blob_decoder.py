"""The thread that decodes blobs: base chunks straight into their pages, refinements into tensors of their own.
Of a chunk in the worker's own store that is needed in part, it also reads the blob.

What a first token waits for goes first. The thread also keeps the puller's time, because it sleeps when nothing comes.
"""

from __future__ import annotations

import itertools
import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from codec.chunk import inspect_blob, refine_blobs, refine_chunk, split_blobs
from codec.errors import CodecError, MalformedBlob
from decode import fill_events as ev
from decode.stored_front import StoredFront
from decode.window_chunks import Layers
from prefill.quantized_pool import Recents
from prefill.runtime import ModelRuntime

log = logging.getLogger("kvstream.decode")


@dataclass(frozen=True, slots=True, kw_only=True)
class NewPages:
    """A chunk at a better level, decoded, to be copied into its pages between two steps of the engine.

    k, v [L, T, H, D]: of the tokens from `start` on. after_tokens: see fill_events.Refine. blob: the finer encoding,
    if it can be refined further. seconds: what decoding took. base_kl: see Job.
    """

    chunk: int
    level: str
    start: int
    k: Tensor
    v: Tensor
    base_kl: float
    after_tokens: int | None
    blob: Any
    seconds: float

    @property
    def num_bytes(self) -> int:
        return int(self.k.nbytes + self.v.nbytes)


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One blob of `fill`. cached_tokens: pages of the prompt before that are others' too, and are left as they are.
    base_kl: the promise of what it was encoded from. is_wanted: asked when its turn has come. front: of a LoadFront."""

    fill: Any
    command: ev.Decode | ev.Refine | ev.LoadFront
    start: int
    stop: int
    cached_tokens: int
    base_kl: float
    block_table: Sequence[int]
    is_wanted: Callable[[], bool]
    front: StoredFront | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """pages: of a refinement that went well. recents: of a base chunk in quantized pages, see ModelRuntime. error: why
    it could not be decoded, "" if it could. is_bad: the blob was damaged. was_skipped: nobody wanted it any more."""

    seconds: float
    pages: NewPages | None = None
    recents: Recents | None = None
    error: str = ""
    is_bad: bool = False
    was_skipped: bool = False


class BlobDecoder:
    """on_done: a job is through. on_pause: called between two jobs, and at the latest after as many seconds as it said
    the last time. Both run in the decoder's thread."""

    def __init__(
        self, runtime: ModelRuntime, *, on_done: Callable[[Job, Outcome], None], on_pause: Callable[[], float]
    ) -> None:
        self._runtime, self._on_done, self._on_pause = runtime, on_done, on_pause
        self._jobs: queue.PriorityQueue[tuple[int, int, Job | None]] = queue.PriorityQueue()
        self._order = itertools.count()
        self._thread = threading.Thread(target=self._run, name="kv-decode", daemon=True)

    def start(self) -> None:
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive()

    def put(self, job: Job, *, urgency: int) -> None:
        """Lower is sooner; jobs of equal urgency go in the order in which they came."""
        self._jobs.put((urgency, next(self._order), job))

    def shutdown(self) -> None:
        self._jobs.put((-1, next(self._order), None))
        self._thread.join(timeout=10)

    def _run(self) -> None:
        timeout_s = self._on_pause()
        while True:
            try:
                _, _, job = self._jobs.get(timeout=timeout_s)
            except queue.Empty:
                pass
            else:
                if job is None:
                    return
                self._on_done(job, self._decode(job))
            timeout_s = self._on_pause()

    def _decode(self, job: Job) -> Outcome:
        begin = time.monotonic()
        if not job.is_wanted():
            return Outcome(seconds=0.0, was_skipped=True)
        try:
            if job.front is not None:
                is_there = job.front.into_pages(self._runtime, job.block_table, keep=job.cached_tokens)
                return Outcome(seconds=time.monotonic() - begin, error="" if is_there else "it is not there any more")
            placed = self._into_place(job, begin)
        except CodecError as error:
            return Outcome(seconds=0.0, error=f"{type(error).__name__}: {error}", is_bad=True)
        except Exception as error:
            log.exception("tokens %d to %d could not be decoded", job.start, job.stop)
            return Outcome(seconds=0.0, error=f"{type(error).__name__}: {error}")
        seconds = time.monotonic() - begin
        if isinstance(placed, NewPages):
            return Outcome(seconds=seconds, pages=placed)
        return Outcome(seconds=seconds, recents=placed)

    def _into_place(self, job: Job, begin: float) -> NewPages | Recents | None:
        command, size = job.command, job.stop - job.start
        assert not isinstance(command, ev.LoadFront)
        blob = command.blob
        if isinstance(command, ev.Refine) and command.coarse is not None:
            refine = refine_chunk if command.layers is None else refine_blobs
            blob = refine(command.coarse, command.blob)
        for part in [blob] if command.layers is None else split_blobs(blob):
            info = inspect_blob(part)
            if (info.level, info.num_tokens) != (command.level, size):
                found = f"{info.num_tokens} tokens at level {info.level!r}"
                raise MalformedBlob(f"expected {size} tokens at level {command.level!r}, found {found}")
        if isinstance(command, ev.Decode):
            return self._into_pages(blob, job, command.layers)
        if command.layers is None:
            k, v = self._runtime.decode(blob, start=job.start, stop=job.stop)
        else:
            k, v = self._runtime.decode_layers(blob, command.layers, start=job.start, stop=job.stop)
        kept = max(0, job.cached_tokens - job.start)
        return NewPages(
            chunk=command.chunk,
            level=command.level,
            start=job.start + kept,
            k=k[:, kept:],
            v=v[:, kept:],
            base_kl=job.base_kl,
            after_tokens=command.after_tokens,
            blob=blob,
            seconds=time.monotonic() - begin,
        )

    def _into_pages(self, blob: Any, job: Job, layers: Layers) -> Recents | None:
        table, start, stop, keep = job.block_table, job.start, job.stop, job.cached_tokens
        if layers is None:
            return self._runtime.decode_into_pages(blob, table, start=start, stop=stop, keep=keep)
        self._runtime.decode_layers_into_pages(blob, layers, table, start=start, stop=stop, keep=keep)
        return None
