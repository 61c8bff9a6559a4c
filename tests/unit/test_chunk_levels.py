"""Any level and refinement of a chunk: what is encoded, what is cut, what is kept, what is refused."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from codec_cases import make_kv, make_layout, make_profile, same_bits

from codec.chunk import cut_layers, decode_chunk, encode_chunk, inspect_blob, refine_blobs, refine_chunk, split_blobs
from codec.errors import CodecError, WrongRefinement
from codec.profile import Profile
from prefill.chunk_levels import ChunkLevels
from prefill.chunks import part_name
from prefill.prompt import FreshChunk
from prefill.store import ChunkStore

KEY = b"a chunk"
TOKENS = 16


@dataclass
class Codec:
    """What ChunkLevels needs of a runtime."""

    profile: Profile

    @property
    def model(self) -> Any:
        return SimpleNamespace(layout=SimpleNamespace(num_layers=make_layout().num_layers))

    def encode(self, k: torch.Tensor, v: torch.Tensor, *, start: int, level: str) -> bytes:
        return encode_chunk(k, v, level=level, profile=self.profile, rope=None)

    def decode(self, blob: bytes, *, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
        return decode_chunk(blob, profile=self.profile, rope=None)


@pytest.fixture
def kv() -> tuple[torch.Tensor, torch.Tensor]:
    return make_kv(make_layout(), TOKENS)


@pytest.fixture
def codec() -> Codec:
    return Codec(make_profile(make_layout()))


@pytest.fixture
def levels(codec: Codec, kv: tuple[torch.Tensor, torch.Tensor]) -> ChunkLevels:
    made = ChunkLevels(codec, ChunkStore(1 << 20))  # type: ignore[arg-type]
    made.store_master(KEY, as_fresh(kv))
    return made


def as_fresh(kv: tuple) -> FreshChunk:
    return FreshChunk(k=kv[0], v=kv[1], start=0)


def blob(levels: ChunkLevels, level: str, fresh: tuple[torch.Tensor, torch.Tensor] | None = None) -> bytes:
    found = levels.blob(KEY, level, start=0, stop=TOKENS, fresh=None if fresh is None else as_fresh(fresh))
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


def test_a_fresh_chunk_is_quantized_once_and_kept_when_its_master_comes(codec: Codec, kv: tuple) -> None:
    """The first level goes out before the chunk is in the store, and what follows must fit it."""
    levels = ChunkLevels(codec, ChunkStore(1 << 20))  # type: ignore[arg-type]
    coarse, finer = blob(levels, "q3", fresh=kv), blob(levels, "q2", fresh=kv)
    assert levels.num_encoded == 1 and levels.sizes(KEY) is None
    levels.store_master(KEY, as_fresh(kv))
    levels.check_integrity()
    assert levels.num_encoded == 2 and set(levels.sizes(KEY) or {}) == {"lossless", "q1", "q2", "q3"}
    assert (blob(levels, "q3"), blob(levels, "q2")) == (coarse, finer)
    assert refine_chunk(coarse, blob(levels, "q3>q1")) == blob(levels, "q1")
    assert levels.num_encoded == 2


def test_levels_sent_fresh_are_those_of_the_store(levels: ChunkLevels, codec: Codec, kv: tuple) -> None:
    """From the fresh tensors, from the master, from the nested blob: the same bytes, or refinements would not fit."""
    for level in ("q3", "q2", "q1", "lossless", "q3>q1", "q3>q2", "q2>q1"):
        for_once = ChunkLevels(codec, ChunkStore(1 << 20))  # type: ignore[arg-type]
        assert blob(for_once, level, fresh=kv) == blob(levels, level)


def test_a_level_encoded_by_itself_takes_no_refinement_made_from_the_store(levels: ChunkLevels, kv: tuple) -> None:
    """Why a fresh chunk is encoded at the finest level and cut."""
    alone = levels._runtime.encode(*kv, start=0, level="q3")
    assert alone != blob(levels, "q3")
    with pytest.raises(WrongRefinement):
        refine_chunk(alone, blob(levels, "q3>q1"))


def test_refinements_in_any_steps_end_at_the_same_blob(levels: ChunkLevels) -> None:
    in_steps = refine_chunk(refine_chunk(blob(levels, "q3"), blob(levels, "q3>q2")), blob(levels, "q2>q1"))
    assert in_steps == refine_chunk(blob(levels, "q3"), blob(levels, "q3>q1")) == blob(levels, "q1")
    assert levels.num_encoded == 2  # the master, the finest


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("q9", "no level 'q9'"),
        ("q9>q1", "no level 'q9'"),
        ("q3>q9", "no level 'q9'"),
        ("q1>q3", "q3 is not finer than q1"),
        ("q1>lossless", "only the quantized levels q1, q2, q3"),
        ("raw>q1", "only the quantized levels"),
        ("q1>q1", "names neither"),
        ("q3>q2>q1", "names neither"),
        ("", "names neither"),
    ],
)
def test_what_cannot_be_asked_for_is_said_clearly(levels: ChunkLevels, name: str, reason: str) -> None:
    assert reason in (levels.check(name) or "")
    with pytest.raises(CodecError, match=reason):
        levels.blob(KEY, name, start=0, stop=TOKENS, fresh=None)


def test_exact_after_lossy_is_exact(levels: ChunkLevels, kv: tuple) -> None:
    """A request with a strict floor never gets what an earlier one was content with."""
    for level in ("q3", "q3>q1", "q1"):
        blob(levels, level)
    encoded = levels.num_encoded
    for level in ("lossless", "raw"):
        made = blob(levels, level)
        assert inspect_blob(made).level == level
        out = decode_chunk(made, profile=levels._runtime.profile, rope=None)
        assert same_bits(out[0], kv[0]) and same_bits(out[1], kv[1])
    assert levels.num_encoded == encoded + 1  # raw; the master was there


def test_all_lossy_levels_together_take_the_room_of_the_finest(levels: ChunkLevels, kv: tuple) -> None:
    alone = len(levels._runtime.encode(*kv, start=0, level="q1"))
    before = levels._store.stats().used_bytes
    for level in ("q3", "q2", "q1", "q3>q2", "q2>q1", "q3>q1"):
        blob(levels, level)
    assert levels._store.stats().used_bytes - before <= 1.1 * alone


def test_a_store_without_room_still_serves_every_level_of_a_fresh_chunk(codec: Codec, kv: tuple) -> None:
    levels = ChunkLevels(codec, ChunkStore(10))  # type: ignore[arg-type]
    coarse, rest = blob(levels, "q3", fresh=kv), blob(levels, "q3>q1", fresh=kv)
    assert refine_chunk(coarse, rest) == blob(levels, "q1", fresh=kv)
    levels.store_master(KEY, as_fresh(kv))
    levels.check_integrity()
    assert levels.blob(KEY, "q3", start=0, stop=TOKENS, fresh=None) is None


def test_raw_comes_from_the_master_and_is_exact(levels: ChunkLevels, kv: tuple) -> None:
    out = decode_chunk(blob(levels, "raw"), profile=levels._runtime.profile, rope=None)
    assert same_bits(out[0], kv[0]) and same_bits(out[1], kv[1])


def test_what_is_not_stored_is_none(levels: ChunkLevels) -> None:
    for level in ("q1", "q3>q1", "raw", "lossless"):
        assert levels.blob(b"another", level, start=0, stop=TOKENS, fresh=None) is None


@pytest.mark.parametrize("level", ["raw", "lossless", "q1", "q3"])
def test_some_layers_are_cut_from_what_is_kept_whole(levels: ChunkLevels, kv: tuple, level: str) -> None:
    for fresh in (kv, None):
        whole, some = blob(levels, level, fresh), blob(levels, part_name(level, [1]), fresh)
        assert some == cut_layers(whole, profile=levels._runtime.profile, layers=[(1, 2)])
        assert [inspect_blob(part).layers for part in split_blobs(some)] == [(1, 2)]
        assert len(some) < 0.7 * len(whole)
    num_encoded = levels.num_encoded
    blob(levels, part_name(level, [0]))
    assert levels.num_encoded == num_encoded
    assert all(inspect_blob(levels._store.get(KEY, name)).layers == (0, 2) for name in levels._store.sizes(KEY))


def test_refinements_of_some_layers_continue_them(levels: ChunkLevels) -> None:
    coarse, rest = blob(levels, part_name("q3", [1])), blob(levels, part_name("q3>q1", [1]))
    assert refine_blobs(coarse, rest) == blob(levels, part_name("q1", [1]))


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("q1/4", "no layer 2"),
        ("q1/ffff", "no layer 15"),
        ("q1/0", "hexadecimal"),
        ("q9/1", "no level"),
        ("q1/", "hexa"),
    ],
)
def test_layers_that_cannot_be_asked_for_are_said_clearly(levels: ChunkLevels, name: str, reason: str) -> None:
    found = levels.check(name)
    assert found is not None and reason in found
    with pytest.raises(CodecError):
        levels.blob(KEY, name, start=0, stop=TOKENS, fresh=None)
