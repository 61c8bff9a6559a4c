"""A prompt's KV, chunk by chunk from the first: taken from what is at hand, or computed. No threads, no locks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch import Tensor

from prefill.engine import SequenceSlice
from prefill.open_request import OpenRequest
from prefill.runtime import ModelRuntime
from prefill.store import MASTER_LEVEL, ChunkStore


@dataclass(frozen=True, slots=True, kw_only=True)
class FreshChunk:
    """A computed chunk as plain tensors, k and v [L, T, H, D]; start: its first token's position."""

    k: Tensor
    v: Tensor
    start: int


def compute_chunks(
    request: OpenRequest,
    block_table: list[int],
    *,
    runtime: ModelRuntime,
    store: ChunkStore,
    fresh_of: Callable[[bytes], FreshChunk | None],
) -> Iterator[tuple[bytes, FreshChunk | None]]:
    """Fills the pages; each chunk's key as it is done, with what was computed, or None if it had been before.

    One chunk's work is done each time the next is asked for, so the caller may pause or stop in between.
    """
    for chunk, key in enumerate(request.keys):
        start, stop = request.span(chunk)
        # The fresh ones are looked at first: a chunk leaves them only when its master is in the store.
        fresh, master = fresh_of(key), None
        if fresh is None:
            master = store.get(key, MASTER_LEVEL)
        if fresh is not None:
            runtime.pool.write(block_table, start, fresh.k, fresh.v)
        elif master is not None:
            runtime.decode_into_pages(master, block_table, start=start, stop=stop)
        else:
            tokens = request.token_ids[start:stop]
            runtime.engine.forward([SequenceSlice(token_ids=tokens, start=start, block_table=block_table)])
            k, v = runtime.pool.read(block_table, start, stop)
            yield key, FreshChunk(k=k, v=v, start=start)
            continue
        yield key, None
