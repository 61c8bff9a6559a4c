"""The body of an open: which prompt's KV a receiver wants. Read strictly; pure.

{token_ids: [int], chunk_tokens: int, cache_salt: str, stored_only: bool}
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from prefill.chunks import chunk_keys

MIN_CHUNK_TOKENS, MAX_CHUNK_TOKENS = 16, 4096


class BadOpen(ValueError):
    """The body of an open does not describe a prompt; the text goes back to the receiver."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenRequest:
    """keys: of the loadable chunks. stored_only: what is not stored here is not computed either."""

    token_ids: list[int]
    chunk_tokens: int
    keys: list[bytes]
    stored_only: bool = False

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
    keys = chunk_keys(tokens, chunk_tokens, fingerprint=fingerprint, cache_salt=salt)
    return OpenRequest(token_ids=tokens, chunk_tokens=chunk_tokens, keys=keys, stored_only=stored_only)
