"""What a decode worker keeps in its own chunk store: what it computed itself, and what it gives up when pages run out.

The caller holds the worker's lock.
"""

from __future__ import annotations

from decode.active_request import ActiveRequest
from decode.puller import Source
from decode.tagged_pages import TaggedPages
from prefill.chunks import num_loadable_chunks, tenant_of
from prefill.kv_source import KVSource
from prefill.prompt import FreshChunk

LOOPBACK_BPS = 8e9  # what the way to the own store is taken for until it was measured


class KeptChunks:
    """`source`: the worker's own; None: nothing is kept. public_key: of its link, if that is encrypted."""

    def __init__(
        self,
        *,
        pages: TaggedPages,
        source: KVSource | None,
        chunk_tokens: int,
        worker_id: str,
        public_key: str | None,
    ) -> None:
        self._pages, self._source = pages, source
        self._chunk_tokens, self._worker_id, self._public_key = chunk_tokens, worker_id, public_key

    def own_source(self, state: ActiveRequest, num_tokens: int) -> list[Source]:
        """The worker itself as a source of a request's first tokens, if its store has any of their chunks."""
        if self._source is None or state.max_kl is None:
            return []
        keys = state.chain.chunks(self._chunk_tokens, num_loadable_chunks(num_tokens, self._chunk_tokens))
        if all(self._source.store.kl(key) is None for key in keys):
            return []
        return [
            Source(
                id=self._worker_id,
                endpoint=self._source.endpoint,
                public_key=self._public_key,
                link_prior_bps=LOOPBACK_BPS,
                is_holder=True,
            )
        ]

    def written(self, state: ActiveRequest, start: int, stop: int) -> None:
        """The KV of tokens [start, stop) was computed, after all that is before it: keep the chunks that are whole."""
        for chunk in range(start // self._chunk_tokens, stop // self._chunk_tokens):
            self.keep(state, chunk)

    def keep(self, state: ActiveRequest, chunk: int) -> None:
        """Offer a chunk to the store, unless nobody may have it, or nobody could say how good it is. Of quantized pages
        it is what they give back, and says so by its promise."""
        if self._source is None or state.pages is None or state.max_kl is None:
            return
        size = self._chunk_tokens
        start, stop = chunk * size, (chunk + 1) * size
        key, kl = state.chain.chunk(size, chunk), self._pages.worst_kl(state.pages, start, stop)
        if kl is None or not self._source.wants(key, kl):
            return
        k, v = self._pages.read(state.pages, start, stop)
        parent = state.chain.chunk(size, chunk - 1) if chunk else None
        tenant = tenant_of(state.request.cache_salt)
        self._source.offer(key, FreshChunk(k=k, v=v, start=start, kl=kl, tenant=tenant, parent=parent))
