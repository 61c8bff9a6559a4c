"""What a decode worker keeps in its own chunk store: what it computed itself, the tails of what it served, and what it
gives up when pages run out.

The caller holds the worker's lock.
"""

from __future__ import annotations

from decode.active_request import ActiveRequest
from decode.puller import Source
from decode.stored_front import StoredFront
from decode.tagged_pages import TaggedPages
from prefill.chunks import LINK_TOKENS, num_loadable_chunks, tenant_of
from prefill.front_index import MIN_FRONT_TOKENS
from prefill.kv_source import KVSource
from prefill.prompt import FreshChunk
from transport.local_transfers import LOCAL_BPS


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
                link_prior_bps=LOCAL_BPS,
                is_holder=True,
                is_own=True,
            )
        ]

    def front_of(self, state: ActiveRequest) -> StoredFront | None:
        """The front of the chunk in which what has to be filled leaves what is stored here; None if there is none.
        Quantized pages take whole chunks only."""
        if self._source is None or state.max_kl is None or state.pages is None or self._pages.is_quantized:
            return None
        size, cached, store = self._chunk_tokens, state.pages.cached_tokens, self._source.store
        usable = (state.fill_tokens - 1) // LINK_TOKENS * LINK_TOKENS  # the last token is always computed
        # Links stand for all before them: once two sequences differ, no later chunk agrees.
        for chunk in range(state.loaded_tokens // size, cached // size - 1, -1):
            start = chunk * size
            front = store.longest_front(state.chain.links(start, min(start + size, usable)), state.max_kl)
            if front is None:
                continue
            stop = start + front.num_tokens
            if front.num_tokens == size or stop - max(start, cached) < MIN_FRONT_TOKENS:
                return None  # it is there as a whole, or little of it is missing
            return StoredFront(
                store=store, key=front.key, start=start, stop=stop, entry_stop=start + front.entry_tokens, kl=front.kl
            )
        return None

    def written(self, state: ActiveRequest, start: int, stop: int) -> None:
        """The KV of tokens [start, stop) was computed, after all that is before it: keep the chunks that are whole."""
        for chunk in range(start // self._chunk_tokens, stop // self._chunk_tokens):
            self.keep(state, chunk)

    def keep(self, state: ActiveRequest, chunk: int) -> None:
        """Offer a chunk to the store, unless nobody may have it, or nobody could say how good it is. Of quantized pages
        it is what they give back, and says so by its promise."""
        self._keep(state, chunk * self._chunk_tokens, (chunk + 1) * self._chunk_tokens)

    def keep_tail(self, state: ActiveRequest, num_tokens: int) -> None:
        """The same of the last chunk of the first `num_tokens` tokens, whose KV is in place, if that is not whole."""
        start = num_tokens // self._chunk_tokens * self._chunk_tokens
        stop = num_tokens // LINK_TOKENS * LINK_TOKENS
        if stop - start >= MIN_FRONT_TOKENS and not self._pages.is_quantized:
            self._keep(state, start, stop)

    def _keep(self, state: ActiveRequest, start: int, stop: int) -> None:
        if self._source is None or state.pages is None or state.max_kl is None:
            return
        size, pages, chain = self._chunk_tokens, state.pages, state.chain
        is_tail = stop - start < size
        key, kl = chain.key_of(start, stop), self._pages.worst_kl(pages, start, stop)
        if kl is None or not self._source.wants(key, kl) or not self._pages.is_whole(pages, start, stop):
            return
        links = chain.links(start, stop)
        if is_tail:
            known = self._source.store.longest_front(links, kl)
            if known is not None and known.num_tokens == stop - start:
                return  # it stands in a longer entry
        k, v = self._pages.read(pages, start, stop)
        parent = chain.key_of(start - size, start) if start else None
        tenant = tenant_of(state.request.cache_salt)
        fresh = FreshChunk(k=k, v=v, start=start, kl=kl, tenant=tenant, parent=parent, links=links, is_tail=is_tail)
        self._source.offer(key, fresh)
