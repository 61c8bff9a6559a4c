"""The codec on your own tensors, without a server: any number of tokens in, a list of blobs out, and back.

    codec = KVCodec.for_tensors(k, v)              # k, v [layers, tokens, heads, head_dim]; nothing calibrated
    blobs = codec.encode(k, v, level="q1")         # one blob for every 256 tokens
    k2, v2 = codec.decode(blobs)

With a profile from `kvstream calibrate`, blobs are several times smaller and levels are promises:

    codec = KVCodec(load_profile("model/profile.kvp"), rope=model.rope_tables(0, num_tokens))
    blobs = codec.encode_cache(cache, level="q2")  # a transformers DynamicCache
    codec.decode_cache(blobs, into=DynamicCache())

examples/codec_on_a_cache.py runs. A cache is whatever has `layers` with `keys` and `values` [batch, heads, tokens,
head_dim], and `update(keys, values, layer)`: transformers is not imported here.
Legend: L layers, T tokens, H KV heads, D head dim (K's and V's may differ), R rotary dims, N positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from codec.chunk import decode_chunk, encode_chunk, inspect_blob
from codec.errors import CodecError, RopeRequired
from codec.profile import CodecLayout, Profile, default_profile
from codec.rope import RopeTable

CHUNK_TOKENS = 256


class KVCodec:
    """One profile, applied to any number of tokens in chunks.

    rope: what RopeTable takes, (cos, sin) [N, R] of positions 0 to N - 1 (any array or CPU tensor) and, where only some
    layers are turned so, which; required by calibrated profiles of models with RoPE, of no use without RoPE. Every
    method raises subclasses of codec.errors.CodecError.
    """

    def __init__(
        self, profile: Profile, *, rope: tuple[Any, ...] | None = None, chunk_tokens: int = CHUNK_TOKENS
    ) -> None:
        self.profile = profile
        self.chunk_tokens = chunk_tokens
        self._rope = RopeTable(*rope) if rope is not None else None

    @classmethod
    def for_tensors(cls, k: torch.Tensor, v: torch.Tensor, *, chunk_tokens: int = CHUNK_TOKENS) -> KVCodec:
        """For tensors [L, T, H, D] of a model without a profile: safe steps, statistics in every blob."""
        if k.ndim != 4 or v.ndim != 4 or k.shape[:3] != v.shape[:3]:
            raise CodecError(f"k and v are {list(k.shape)} and {list(v.shape)}; want [layers, tokens, heads, head_dim]")
        layout = CodecLayout(
            num_layers=k.shape[0], num_kv_heads=k.shape[2], head_dim_k=k.shape[3], head_dim_v=v.shape[3]
        )
        return cls(default_profile(layout), chunk_tokens=chunk_tokens)

    @property
    def levels(self) -> tuple[str, ...]:
        """Best to worst; see profile.promise for what each loses."""
        return self.profile.level_names

    def encode(self, k: torch.Tensor, v: torch.Tensor, *, level: str, start: int = 0) -> list[bytes]:
        """k, v [L, T, H, D] of the tokens from position `start` on -> a blob for each chunk."""
        steps = range(0, k.shape[1], self.chunk_tokens)
        return [
            encode_chunk(
                k[:, at : at + self.chunk_tokens], v[:, at : at + self.chunk_tokens], level=level, profile=self.profile,
                rope=self._rope_of(start + at, start + min(at + self.chunk_tokens, k.shape[1])),
            )
            for at in steps
        ]  # fmt: skip

    def decode(self, blobs: Sequence[bytes], *, start: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        """Inverse of encode: k, v [L, T, H, D], in the dtype that was encoded."""
        parts, at = [], start
        for blob in blobs:
            stop = at + inspect_blob(blob).num_tokens
            parts.append(decode_chunk(blob, profile=self.profile, rope=self._rope_of(at, stop)))
            at = stop
        if not parts:
            raise CodecError("there is no blob to decode")
        return torch.cat([k for k, _ in parts], dim=1), torch.cat([v for _, v in parts], dim=1)

    def encode_cache(self, cache: Any, *, level: str, row: int = 0) -> list[bytes]:
        """One row of a batch of a transformers cache, from position 0 on."""
        return self.encode(*cache_tensors(cache, row=row), level=level)

    def decode_cache(self, blobs: Sequence[bytes], *, into: Any) -> Any:
        """Appends the decoded KV to an empty cache, as a batch of one; returns it."""
        k, v = self.decode(blobs)
        for layer in range(k.shape[0]):
            into.update(k[layer].transpose(0, 1)[None].contiguous(), v[layer].transpose(0, 1)[None].contiguous(), layer)
        return into

    def _rope_of(self, start: int, stop: int) -> RopeTable | None:
        if self._rope is None:
            return None
        if stop > self._rope.num_tokens:
            raise RopeRequired(f"positions to {stop} are asked for, cos and sin have {self._rope.num_tokens}")
        return self._rope.part(start, stop)


def cache_tensors(cache: Any, *, row: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """A transformers cache -> k, v [L, T, H, D] on the CPU. Raises CodecError if its layers are not alike."""
    both = []
    for name in ("keys", "values"):
        rows = [getattr(layer, name)[row].transpose(0, 1) for layer in cache.layers]
        shapes = {tuple(x.shape) for x in rows}
        if len(shapes) != 1:
            raise CodecError(f"the cache's {name} have several shapes ({sorted(shapes)}); all layers must be alike")
        both.append(torch.stack(rows).cpu())
    return both[0], both[1]
