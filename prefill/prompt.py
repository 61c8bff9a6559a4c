"""A prompt's KV, chunk by chunk from the first: taken from what is at hand, or computed. No threads, no locks."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch import Tensor

from codec.chunk import inspect_blob
from codec.errors import CodecError, MalformedBlob
from prefill.engine import SequenceSlice
from prefill.open_request import OpenRequest
from prefill.runtime import ModelRuntime
from prefill.store import MASTER_LEVEL, ChunkStore

log = logging.getLogger("kvstream.prefill")


@dataclass(frozen=True, slots=True, kw_only=True)
class FreshChunk:
    """A computed chunk as plain tensors, k and v [L, T, H, D]. start: its first token's position. kl: the worst promise
    of the KV that it was computed on, nats a token. tenant: who pays for it. parent: the key of the chunk before it.
    is_fetched: it was computed elsewhere. links, is_tail: see tier_index.ChunkMeta."""

    k: Tensor
    v: Tensor
    start: int
    kl: float = 0.0
    tenant: str = ""
    parent: bytes | None = None
    is_fetched: bool = False
    links: bytes = b""
    is_tail: bool = False


def compute_chunks(
    request: OpenRequest,
    block_table: list[int],
    *,
    runtime: ModelRuntime,
    store: ChunkStore,
    fresh_of: Callable[[bytes], FreshChunk | None],
    peer: Callable[[int], bytes | None] = lambda chunk: None,
) -> Iterator[tuple[bytes, FreshChunk | None]]:
    """Fills the pages; each chunk's key as it is done, with what was computed, or None if it had been before. peer: a
    chunk's lossless blob from elsewhere, if it can be had.

    One chunk's work is done each time the next is asked for, so the caller may pause or stop in between.
    """
    for chunk, key in enumerate(request.keys):
        start, stop = request.span(chunk)
        # The fresh ones are looked at first: a chunk leaves them only when its master is in the store.
        fresh, master = fresh_of(key), None
        parent = request.keys[chunk - 1] if chunk else None
        if fresh is not None and fresh.kl:
            fresh = None  # computed on lossy KV: what is computed here is exact
        elif fresh is None and store.kl(key) == 0:
            master = store.get(key, MASTER_LEVEL)
        if fresh is not None:
            runtime.exact_pool.write(block_table, start, fresh.k, fresh.v)
        elif master is not None:
            runtime.decode_into_pages(master, block_table, start=start, stop=stop)
        elif _from_peer(peer(chunk), block_table, start, stop, runtime):
            k, v = runtime.exact_pool.read(block_table, start, stop)
            yield key, FreshChunk(k=k, v=v, start=start, tenant=request.tenant, parent=parent, is_fetched=True)
            continue
        else:
            tokens = request.token_ids[start:stop]
            runtime.engine.forward([SequenceSlice(token_ids=tokens, start=start, block_table=block_table)])
            k, v = runtime.exact_pool.read(block_table, start, stop)
            yield key, FreshChunk(k=k, v=v, start=start, tenant=request.tenant, parent=parent)
            continue
        yield key, None


def _from_peer(blob: bytes | None, block_table: list[int], start: int, stop: int, runtime: ModelRuntime) -> bool:
    """Decode what a peer sent. A bad blob is computed instead."""
    if blob is None:
        return False
    try:
        info = inspect_blob(blob)
        if (info.level, info.num_tokens) != (MASTER_LEVEL, stop - start):
            raise MalformedBlob(f"expected {stop - start} tokens, lossless; found {info.num_tokens} at {info.level!r}")
        runtime.decode_into_pages(blob, block_table, start=start, stop=stop)
    except CodecError as error:
        log.warning("KV of a peer is of no use: %s", error)
        return False
    return True
