"""How a prompt is cut into chunks, how a chunk is named, and how what is asked of one. Pure: no torch, no I/O.

A prompt of P tokens has (P - 1) // C *loadable* chunks of C tokens. What is left, the *tail*, always holds at least
the last prompt token: the decode worker runs it itself, because it needs that token's logits anyway.

A key names everything that KV depends on: the model, the tenant's salt and every token up to some point. Equal keys
therefore mean equal KV. The keys of a sequence form one hash chain, a link every 16 tokens (`KeyChain`), from which the
keys of its blocks and of its chunks are read.

What is asked of a chunk is a level, "q1", or a refinement, "q3>q1": what a holder of q3 lacks of q1. Either can be
asked for some layers only, "q1/2a": a hexadecimal number, bit i of which is layer i.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable, Sequence

KEY_BYTES = 16
LINK_TOKENS = 16
REFINES, LAYERS_OF = ">", "/"
MAX_NAMED_LAYERS = 160  # so that a name keeps to transport's limit (Limits.level_chars)


def num_loadable_chunks(num_prompt_tokens: int, chunk_tokens: int) -> int:
    """Full chunks that end before the last prompt token."""
    assert num_prompt_tokens >= 1 and chunk_tokens >= 1
    return (num_prompt_tokens - 1) // chunk_tokens


class KeyChain:
    """The keys of one sequence, which may grow."""

    def __init__(self, token_ids: Sequence[int] = (), *, fingerprint: str, cache_salt: str = "") -> None:
        """fingerprint: the model's, with its weights, dtype and adapter."""
        seed = f"kvstream/kv/2\0{fingerprint}\0{cache_salt}".encode()
        self._last = hashlib.blake2b(seed, digest_size=KEY_BYTES).digest()
        self._links: list[bytes] = []
        self._rest: list[int] = []
        self.extend(token_ids)

    def extend(self, token_ids: Iterable[int]) -> None:
        self._rest += token_ids
        num_full = len(self._rest) // LINK_TOKENS * LINK_TOKENS
        for start in range(0, num_full, LINK_TOKENS):
            tokens = array("I", self._rest[start : start + LINK_TOKENS])
            self._last = hashlib.blake2b(self._last + tokens.tobytes(), digest_size=KEY_BYTES).digest()
            self._links.append(self._last)
        del self._rest[:num_full]

    def __len__(self) -> int:
        """Tokens."""
        return len(self._links) * LINK_TOKENS + len(self._rest)

    def blocks(self, block_tokens: int, first: int = 0) -> list[bytes]:
        """The keys of the full blocks from `first` on, 16 bytes each."""
        step = _links_of(block_tokens)
        return self._links[first * step + step - 1 :: step]

    def chunks(self, chunk_tokens: int, num_chunks: int) -> list[bytes]:
        """The keys of the first `num_chunks` chunks, 16 bytes each."""
        step = _links_of(chunk_tokens)
        assert num_chunks * step <= len(self._links), (num_chunks, len(self))
        return [chunk_key(link, chunk_tokens) for link in self._links[step - 1 : num_chunks * step : step]]

    def links(self, start: int, stop: int) -> bytes:
        """The links that end within (start, stop], 16 bytes for each 16 tokens. start: a multiple of 16."""
        return b"".join(self._links[_links_of(start) if start else 0 : stop // LINK_TOKENS])

    def key_of(self, start: int, stop: int) -> bytes:
        """The key of tokens [start, stop), both multiples of 16: of a chunk, or of a tail."""
        return chunk_key(self._links[_links_of(stop) - 1], stop - start)


def chunk_key(link: bytes, chunk_tokens: int) -> bytes:
    """The key of the chunk of that size which ends with this link of a chain. The size is part of it: a tail that is
    kept has a key of its own, and nobody who looks for a whole chunk can meet it."""
    return link[: KEY_BYTES - 2] + chunk_tokens.to_bytes(2, "little")


def chunk_keys(token_ids: Sequence[int], chunk_tokens: int, *, fingerprint: str, cache_salt: str = "") -> list[bytes]:
    """The keys of the loadable chunks of a prompt."""
    chain = KeyChain(token_ids, fingerprint=fingerprint, cache_salt=cache_salt)
    return chain.chunks(chunk_tokens, num_loadable_chunks(len(token_ids), chunk_tokens))


def _links_of(num_tokens: int) -> int:
    assert num_tokens > 0 and num_tokens % LINK_TOKENS == 0, num_tokens
    return num_tokens // LINK_TOKENS


def tenant_of(cache_salt: str) -> str:
    """Whom KV under this salt belongs to; "": to nobody in particular. The gateway puts a tenant's name and a NUL
    before the salt that its client gave."""
    tenant, nul, _ = cache_salt.partition("\0")
    return tenant if nul else ""


def refinement_name(have: str, level: str) -> str:
    """How a refinement is asked for: what a holder of `have` lacks of `level`."""
    assert have and level and have != level and REFINES not in have + level, (have, level)
    return f"{have}{REFINES}{level}"


def split_level(name: str) -> tuple[str | None, str]:
    """q1 -> (None, q1), q3>q1 -> (q3, q1). Raises ValueError for anything else; knows no profile."""
    have, refines, level = name.rpartition(REFINES)
    if not level or REFINES in have or (refines and (not have or have == level)):
        raise ValueError(f"{name!r} names neither a level, as q1, nor a refinement, as q3{REFINES}q1")
    return (have if refines else None), level


def part_name(name: str, layers: Iterable[int] | None) -> str:
    """How these layers, one at least, of a level or of a refinement are asked for; None: all of them."""
    if layers is None:
        return name
    mask = sum(1 << layer for layer in layers)
    assert mask and LAYERS_OF not in name, (name, mask)
    return f"{name}{LAYERS_OF}{mask:x}"


def split_part(name: str) -> tuple[str, tuple[int, ...] | None]:
    """q3>q1/2a -> (q3>q1, (1, 3, 5)), q1 -> (q1, None). Raises ValueError for what part_name does not write; knows no
    model."""
    level, has_layers, digits = name.partition(LAYERS_OF)
    if not has_layers:
        return name, None
    if not level or not digits or set(digits) - set("0123456789abcdef") or digits[0] == "0":
        raise ValueError(f"{name!r}: layers are named as in q1{LAYERS_OF}2a, a hexadecimal number with a bit for each")
    mask = int(digits, 16)
    return level, tuple(layer for layer in range(mask.bit_length()) if mask >> layer & 1)
