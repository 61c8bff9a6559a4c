"""Refinements: bound to the encoding that they were made from, and worth as much as the level encoded directly."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from codec_cases import make_kv, make_layout, make_profile, make_rope, same_bits
from codec_forge import bound_to
from hypothesis import given, settings
from hypothesis import strategies as st

from codec.chunk import cut_chunk, decode_chunk, encode_chunk, refine_chunk, refinement_of
from codec.entropy import CodeBook, bell_cuts, bell_table
from codec.errors import BlobError, WrongRefinement
from codec.levels import LevelKind, Lossy
from codec.profile import Profile, default_profile

TOKENS = 9
LAYOUT = make_layout(2, 2, 64, 40)
ROPE = make_rope(TOKENS, 32, start=77)
STATIC = make_profile(LAYOUT, matrices=True, unturned=1, stages=4, group=4)
SHIPPED = default_profile(LAYOUT)
PROFILES = pytest.mark.parametrize("profile", [STATIC, SHIPPED], ids=["static", "shipped"])


def decode(blob: bytes, profile: Profile) -> tuple[torch.Tensor, torch.Tensor]:
    return decode_chunk(blob, profile=profile, rope=ROPE)


def lossy_levels(profile: Profile) -> list[str]:
    return [level.name for level in profile.levels if level.kind is LevelKind.QUANTIZED]


def nearly(k: torch.Tensor, v: torch.Tensor, rng: np.random.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """The same chunk but for one bf16 value: by a few of its last bits, or by so much that a coarse integer moves."""
    both = [k.clone(), v.clone()]
    flat = both[int(rng.integers(2))].view(-1)
    at = int(rng.integers(flat.numel()))
    if rng.random() < 0.5:
        flat[at] *= 1.5
    else:
        flat.view(torch.int16)[at] ^= int(rng.integers(1, 8))
    return both[0], both[1]


@PROFILES
@pytest.mark.parametrize("is_near", [False, True], ids=["another chunk", "one value differs"])
def test_a_refinement_never_makes_wrong_kv_of_another_encoding(profile: Profile, is_near: bool) -> None:
    """Without the binding nearly all of the near ones that stop short of the last stage decode to wrong numbers."""
    names = lossy_levels(profile)
    have, refused, mixed = names[-1], 0, 0
    for seed in range(60):
        k, v = make_kv(LAYOUT, TOKENS, seed=seed)
        rng = np.random.default_rng(seed)
        other = nearly(k, v, rng) if is_near else make_kv(LAYOUT, TOKENS, seed=seed + 1000)
        a, b = (encode_chunk(*kv, level=names[0], profile=profile, rope=ROPE) for kv in ((k, v), other))
        coarse = cut_chunk(a, profile=profile, level=have)
        for level in names[:-1]:
            fine_a, fine_b = (cut_chunk(blob, profile=profile, level=level) for blob in (a, b))
            rest = refinement_of(b, profile=profile, have=have, level=level)
            if coarse == cut_chunk(b, profile=profile, level=have):  # nothing tells them apart, nothing needs to
                assert refine_chunk(coarse, rest) == fine_b
                continue
            mixed += 1
            with pytest.raises(WrongRefinement):
                refine_chunk(coarse, rest)
            try:
                out = decode(refine_chunk(coarse, bound_to(rest, coarse)), profile)
            except BlobError:
                continue
            refused += not all(same_bits(x, y) for x, y in zip(out, decode(fine_a, profile), strict=True))
    assert mixed > 20
    assert (refused > 10) == is_near  # the test would not see a binding that binds nothing


@given(
    stages=st.integers(2, 6), dims=st.sampled_from([(64, 40), (5, 3), (128, 16)]), shipped=st.booleans(),
    matrices=st.booleans(), seed=st.integers(0, 2**32 - 1), backend=st.sampled_from(["numba", "reference"]),
    data=st.data(),
)  # fmt: skip
@settings(max_examples=40)
def test_refining_in_any_steps_gives_the_direct_level_bit_for_bit(  # type: ignore[no-untyped-def]
    stages, dims, shipped, matrices, seed, backend, data
) -> None:
    """Bytes equal to the cut of the finest, numbers equal to those of a chunk that was encoded at the level alone."""
    layout = make_layout(2, 2, *dims)
    profile = default_profile(layout) if shipped else make_profile(layout, stages=stages, matrices=matrices, group=4)
    rope = make_rope(7, dims[0] // 2 * 2)
    k, v = make_kv(layout, 7, seed=seed)
    names = lossy_levels(profile)
    finest = encode_chunk(k, v, level=names[0], profile=profile, rope=rope, backend=backend)
    path = sorted(data.draw(st.sets(st.sampled_from(names), min_size=2)), reverse=True)  # coarsest first
    blob = cut_chunk(finest, profile=profile, level=path[0])
    for have, level in pairwise(path):
        blob = refine_chunk(blob, refinement_of(finest, profile=profile, have=have, level=level))
        assert blob == cut_chunk(finest, profile=profile, level=level)
        direct = encode_chunk(k, v, level=level, profile=profile, rope=rope, backend=backend)
        out, expected = (decode_chunk(b, profile=profile, rope=rope, backend=backend) for b in (blob, direct))
        assert all(same_bits(x, y) for x, y in zip(out, expected, strict=True))
    once = refine_chunk(
        cut_chunk(finest, profile=profile, level=path[0]),
        refinement_of(finest, profile=profile, have=path[0], level=path[-1]),
    )
    assert once == blob


@pytest.mark.parametrize("spread", [2.0, 4.0, 6.0], ids=lambda spread: f"{spread:g} steps")
def test_nesting_costs_at_most_a_tenth(spread: float) -> None:
    """The same integers coded in one stage, each with the table that fits them best, against all levels in one blob."""
    layout, tokens, stages = make_layout(2, 2, 64, 64), 256, 3
    base = make_profile(layout, stages=stages)

    def ladder(num_stages: int) -> Profile:
        coarse = spread / 3.0 ** (num_stages - 1)
        cuts = [bell_cuts(coarse, stage)[None] for stage in range(1, num_stages)]
        shape, step = (2, 2, 64), np.full((2, 2, 64), 0.125, np.float32)
        assert base.lossy.k is not None
        plan = replace(
            base.lossy.k, mean=np.zeros(shape, np.float32), step=step, group=np.zeros(2, np.int64),
            is_turned=np.zeros(2, bool), active=np.full((num_stages, 2, 2), 64, np.int64),
            index=np.zeros((2, 2, 2, 64), np.uint8), refine=np.zeros((num_stages - 1, *shape), np.uint8),
        )  # fmt: skip
        lossy = Lossy(
            num_stages=num_stages, codebook=CodeBook(freqs=bell_table(coarse)[None]),
            cuts=np.stack(cuts) if cuts else np.zeros((0, 1, 3, 2), np.uint16), k=plan, v=plan,
        )  # fmt: skip
        levels = tuple(
            replace(level, stages=level.stages - stages + num_stages)
            for level in base.levels
            if level.kind is LevelKind.QUANTIZED and level.stages > stages - num_stages
        )
        names = [level.name for level in levels]
        return replace(
            base, levels=levels, lossy=lossy, bits_per_value=dict.fromkeys(names, 8.0),
            promise={name: base.promise[name] for name in names},
        )  # fmt: skip

    rng = np.random.default_rng(1)
    k, v = (torch.from_numpy(rng.normal(0, spread / 8, (2, tokens, 2, 64))).to(torch.bfloat16) for _ in range(2))
    nested, alone = (encode_chunk(k, v, level="q1", profile=p, rope=None) for p in (ladder(stages), ladder(1)))
    out = [decode_chunk(b, profile=p, rope=None) for b, p in ((nested, ladder(stages)), (alone, ladder(1)))]
    assert all(same_bits(a, b) for a, b in zip(*out, strict=True))
    assert len(nested) <= 1.1 * len(alone)
