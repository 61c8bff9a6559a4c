"""How a prompt is cut into chunks, how a chunk is named, and how what is asked of one. Pure: no torch, no I/O.

A prompt of P tokens has (P - 1) // C *loadable* chunks of C tokens. What is left, the *tail*, always holds at least
the last prompt token: the decode worker runs it itself, because it needs that token's logits anyway.

A chunk's key names everything that its KV depends on: the model, the tenant's salt and every token up to the chunk's
end. Equal keys therefore mean equal KV, and the keys of a prompt form a hash chain.

What is asked of a chunk is a level, "q1", or a refinement, "q3>q1": what a holder of q3 lacks of q1.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence

KEY_BYTES = 16
REFINES = ">"


def num_loadable_chunks(num_prompt_tokens: int, chunk_tokens: int) -> int:
    """Full chunks that end before the last prompt token."""
    assert num_prompt_tokens >= 1 and chunk_tokens >= 1
    return (num_prompt_tokens - 1) // chunk_tokens


def chunk_keys(token_ids: Sequence[int], chunk_tokens: int, *, fingerprint: str, cache_salt: str = "") -> list[bytes]:
    """The key of each loadable chunk of `token_ids`, 16 bytes each (BLAKE2b over the chain so far)."""
    seed = f"kvstream/chunk/1\0{fingerprint}\0{chunk_tokens}\0{cache_salt}".encode()
    previous = hashlib.blake2b(seed, digest_size=KEY_BYTES).digest()
    keys = []
    for chunk in range(num_loadable_chunks(len(token_ids), chunk_tokens)):
        tokens = array("I", token_ids[chunk * chunk_tokens : (chunk + 1) * chunk_tokens])
        previous = hashlib.blake2b(previous + tokens.tobytes(), digest_size=KEY_BYTES).digest()
        keys.append(previous)
    return keys


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
