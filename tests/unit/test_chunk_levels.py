"""Any level of a stored chunk: what is encoded, what is cut, what is kept."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from codec_cases import make_kv, make_layout, make_profile, same_bits

from codec.chunk import decode_chunk, encode_chunk, inspect_blob
from codec.profile import Profile
from prefill.chunk_levels import ChunkLevels
from prefill.store import ChunkStore

KEY = b"a chunk"
TOKENS = 16


@dataclass
class Codec:
    """What ChunkLevels needs of a runtime."""

    profile: Profile

    def encode(self, k: torch.Tensor, v: torch.Tensor, *, start: int, level: str) -> bytes:
        return encode_chunk(k, v, level=level, profile=self.profile, rope=None)

    def decode(self, blob: bytes, *, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
        return decode_chunk(blob, profile=self.profile, rope=None)


@pytest.fixture
def kv() -> tuple[torch.Tensor, torch.Tensor]:
    return make_kv(make_layout(), TOKENS)


@pytest.fixture
def levels(kv: tuple[torch.Tensor, torch.Tensor]) -> ChunkLevels:
    made = ChunkLevels(Codec(make_profile(make_layout())), ChunkStore(1 << 20))  # type: ignore[arg-type]
    made.store_master(KEY, *kv, start=0)
    return made


def blob(levels: ChunkLevels, level: str, fresh: tuple[torch.Tensor, torch.Tensor] | None = None) -> bytes:
    found = levels.blob(KEY, level, start=0, stop=TOKENS, fresh=fresh)
    assert found is not None
    return found


def test_a_stored_chunk_is_quantized_once_for_all_levels(levels: ChunkLevels, kv: tuple) -> None:
    profile = levels._runtime.profile
    assert levels.num_encoded == 1  # the master
    coarse = blob(levels, "q3")
    assert levels.num_encoded == 2
    for level in ("q1", "q2", "q3"):
        made = blob(levels, level)
        assert inspect_blob(made).level == level
        direct = decode_chunk(encode_chunk(*kv, level=level, profile=profile, rope=None), profile=profile, rope=None)
        assert all(same_bits(a, b) for a, b in zip(decode_chunk(made, profile=profile, rope=None), direct, strict=True))
    assert blob(levels, "q3") == coarse and levels.num_encoded == 2


def test_sizes_tell_what_can_be_sent_without_encoding(levels: ChunkLevels) -> None:
    assert set(levels.sizes(KEY) or {}) == {"lossless"}
    blob(levels, "q2")
    sizes = levels.sizes(KEY)
    assert sizes is not None and set(sizes) == {"lossless", "q1", "q2", "q3"}
    assert all(sizes[level] == len(blob(levels, level)) for level in sizes)
    assert levels.sizes(b"another") is None


def test_a_fresh_chunk_is_coded_at_its_level_alone(levels: ChunkLevels, kv: tuple) -> None:
    profile = levels._runtime.profile
    assert blob(levels, "q3", fresh=kv) == encode_chunk(*kv, level="q3", profile=profile, rope=None)
    assert levels.num_encoded == 2 and set(levels.sizes(KEY) or {}) == {"lossless"}


def test_raw_comes_from_the_master_and_is_exact(levels: ChunkLevels, kv: tuple) -> None:
    out = decode_chunk(blob(levels, "raw"), profile=levels._runtime.profile, rope=None)
    assert same_bits(out[0], kv[0]) and same_bits(out[1], kv[1])


def test_what_is_not_stored_is_none(levels: ChunkLevels) -> None:
    assert levels.blob(b"another", "q1", start=0, stop=TOKENS, fresh=None) is None
