"""The body of an open: which prompt's KV a receiver wants. Read strictly; pure.

{token_ids: [int], chunk_tokens: int, cache_salt: str, stored_only: bool, max_kl: float,
 holders: [{endpoint: str, public_key: str | null}]}
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from prefill.chunks import chunk_keys, tenant_of

MAX_HOLDERS = 4
MIN_CHUNK_TOKENS, MAX_CHUNK_TOKENS = 16, 4096


class BadOpen(ValueError):
    """The body of an open does not describe a prompt; the text goes back to the receiver."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Holder:
    """Another worker that serves KV."""

    endpoint: str
    public_key: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenRequest:
    """keys: of the loadable chunks. stored_only: what is not stored here is not computed either. max_kl: what is stored
    with a worse promise, nats a token, does not count; 0: exact KV only. tenant: who pays for what is kept. holders:
    who may have chunks that this worker has not."""

    token_ids: list[int]
    chunk_tokens: int
    keys: list[bytes]
    stored_only: bool = False
    max_kl: float = 0.0
    cache_salt: str = ""
    tenant: str = ""
    holders: tuple[Holder, ...] = ()

    def span(self, chunk: int) -> tuple[int, int]:
        """The chunk's tokens: first, one past the last."""
        return chunk * self.chunk_tokens, (chunk + 1) * self.chunk_tokens


def read_open(
    body: Mapping[str, Any], *, max_context: int, vocab_size: int, block_tokens: int, fingerprint: str
) -> OpenRequest:
    """What the body asks for, of a model with these limits. Raises BadOpen."""
    tokens, chunk_tokens = body.get("token_ids"), body.get("chunk_tokens")
    salt, stored_only = body.get("cache_salt", ""), body.get("stored_only", False)
    if not isinstance(tokens, list) or not 1 <= len(tokens) <= max_context:
        raise BadOpen(f"token_ids must be a list of 1 to {max_context} token ids")
    if not all(type(token) is int and 0 <= token < vocab_size for token in tokens):
        raise BadOpen(f"token_ids must lie in 0 .. {vocab_size - 1}")
    smallest, largest = MIN_CHUNK_TOKENS, MAX_CHUNK_TOKENS
    if type(chunk_tokens) is not int or not smallest <= chunk_tokens <= largest or chunk_tokens % block_tokens:
        raise BadOpen(
            f"chunk_tokens must be a multiple of {block_tokens} in {smallest} .. {largest}, not {chunk_tokens!r}"
        )
    if not isinstance(salt, str):
        raise BadOpen("cache_salt must be a string")
    if type(stored_only) is not bool:
        raise BadOpen(f"stored_only must be true or false, not {stored_only!r}")
    max_kl = body.get("max_kl", 0.0)
    if type(max_kl) not in (int, float) or not 0 <= max_kl < math.inf:
        raise BadOpen(f"max_kl must be a number from 0 on, not {max_kl!r}")
    keys = chunk_keys(tokens, chunk_tokens, fingerprint=fingerprint, cache_salt=salt)
    return OpenRequest(
        token_ids=tokens,
        chunk_tokens=chunk_tokens,
        keys=keys,
        stored_only=stored_only,
        max_kl=float(max_kl),
        cache_salt=salt,
        tenant=tenant_of(salt),
        holders=_read_holders(body.get("holders", [])),
    )


def _read_holders(found: Any) -> tuple[Holder, ...]:
    if not isinstance(found, list) or len(found) > MAX_HOLDERS:
        raise BadOpen(f"holders must be a list of at most {MAX_HOLDERS} workers")
    holders = []
    for item in found:
        endpoint = item.get("endpoint") if isinstance(item, dict) else None
        public_key = item.get("public_key") if isinstance(item, dict) else None
        if not isinstance(endpoint, str) or not endpoint.startswith("tcp://"):
            raise BadOpen("each of holders must have an endpoint, tcp://HOST:PORT")
        if public_key is not None and not isinstance(public_key, str):
            raise BadOpen("public_key of holders must be a string or null")
        holders.append(Holder(endpoint=endpoint, public_key=public_key))
    return tuple(holders)
