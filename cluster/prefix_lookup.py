"""The gateway's question to the controller: who holds this prompt's chunks? Takes TIMEOUT_S at most, never fails."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

from cluster.prefix_index import Coverage, join_keys
from prefill.chunks import chunk_keys

log = logging.getLogger("kvstream.gateway")

TIMEOUT_S = 0.05  # a call through Ray takes 1 ms at the median
RETRY_S = 1.0  # nobody waits for a controller that has just not answered


class PrefixLookup:
    """ask: takes the keys, one after the other, and gives what `Controller.holders` gives."""

    def __init__(
        self, ask: Callable[[bytes], Awaitable[Mapping[str, Any]]], *, fingerprint: str, chunk_tokens: int
    ) -> None:
        self._ask, self._fingerprint, self._chunk_tokens = ask, fingerprint, chunk_tokens
        self._silent_until = 0.0
        self.num_asked = self.num_failed = 0

    async def holders(self, token_ids: Sequence[int], cache_salt: str) -> dict[str, Coverage]:
        """By worker. Nothing when nobody has any of it, when the prompt has no chunk, or when the controller is away:
        then routes are chosen without the index."""
        if len(token_ids) <= self._chunk_tokens or time.monotonic() < self._silent_until:
            return {}
        keys = chunk_keys(token_ids, self._chunk_tokens, fingerprint=self._fingerprint, cache_salt=cache_salt)
        self.num_asked += 1
        try:
            found = await asyncio.wait_for(self._ask(join_keys(keys)), TIMEOUT_S)
        except Exception as error:  # of Ray's many; a request is served without the index rather than not at all
            self.num_failed += 1
            self._silent_until = time.monotonic() + RETRY_S
            log.warning("the prefix index does not answer: %s: %s", type(error).__name__, error)
            return {}
        return {worker_id: Coverage.from_wire(body) for worker_id, body in found.items()}
