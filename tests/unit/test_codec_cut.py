"""Parts of a blob: what a partial reader looks at, coarser levels, refinements, a tensor-parallel model's ranks."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from codec_cases import make_kv, make_layout, make_profile, make_rope, same_bits
from codec_forge import FIELDS, bound_to, forge, put_together, seal, take_apart
from hypothesis import given, settings
from hypothesis import strategies as st

from codec import bitstream
from codec.bitstream import CRC_BYTES, HEADER_BYTES
from codec.chunk import (
    cut_chunk,
    cut_layers,
    decode_chunk,
    encode_chunk,
    inspect_blob,
    level_sizes,
    refine_blobs,
    refine_chunk,
    refinement_of,
    split_blobs,
)
from codec.errors import (
    BlobError,
    ChecksumMismatch,
    CodecError,
    MalformedBlob,
    TruncatedBlob,
    UnknownLevel,
    WrongProfile,
    WrongRefinement,
    WrongVersion,
)
from codec.levels import LevelKind
from codec.profile import Profile, default_profile

LAYERS, HEADS, TOKENS = 3, 4, 9
LAYOUT = make_layout(LAYERS, HEADS, 64, 40)
ROPE = make_rope(TOKENS, 32, start=77)
STATIC = make_profile(LAYOUT, matrices=True, unturned=1, stages=4, group=4)
SHIPPED = default_profile(LAYOUT)
PROFILES = pytest.mark.parametrize("profile", [STATIC, SHIPPED], ids=["static", "shipped"])
CODED = ["lossless", "q1", "q3"]


def encode(profile: Profile, level: str, *, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> bytes:
    return encode_chunk(*make_kv(LAYOUT, TOKENS, seed=seed, dtype=dtype), level=level, profile=profile, rope=ROPE)


def decode(blob: bytes, profile: Profile, **kwargs) -> tuple[torch.Tensor, torch.Tensor]:  # type: ignore[no-untyped-def]
    return decode_chunk(blob, profile=profile, rope=ROPE, **kwargs)


def lossy_levels(profile: Profile) -> list[str]:
    return [level.name for level in profile.levels if level.kind is LevelKind.QUANTIZED]


def garbage_outside(blob: bytes, layers: slice, heads: slice) -> bytes:
    """Every piece but those of some layers and heads overwritten, no checksum touched."""
    info = inspect_blob(blob)
    directory = bitstream.parse_directory(memoryview(blob), info)
    keep = np.zeros(directory.entries.shape, bool)
    keep[:, :, layers, heads] = True
    bad, first = bytearray(blob), HEADER_BYTES + info.directory_bytes
    for where in np.argwhere(~keep):
        at = first + 2 * int(directory.start[tuple(where)])
        size = 2 * int(directory.entries[tuple(where)]["words"])
        bad[at : at + size] = bytes(0xFF ^ byte for byte in bad[at : at + size])
    bad[-CRC_BYTES:] = b"\xde\xad\xbe\xef"
    return bytes(bad)


PARTS = [
    ((0, 3), (1, 2)),
    ((2, 3), (0, 3)),
    ((1, 3), (1, 3)),
    ((0, 1), (0, 1)),
    ((0, 2), (3, 4)),
]


@PROFILES
@pytest.mark.parametrize("level", CODED)
@pytest.mark.parametrize(("layers", "heads"), PARTS)
def test_a_partial_reader_reads_its_own_pieces_and_no_others(profile, level, layers, heads) -> None:  # type: ignore[no-untyped-def]
    blob = encode(profile, level)
    whole = decode(blob, profile)
    bad = garbage_outside(blob, slice(*layers), slice(*heads))
    with pytest.raises(ChecksumMismatch):
        decode(bad, profile)
    for backend in ("numba", "reference") if (layers, heads) == PARTS[2] else ("numba",):
        part = decode(bad, profile, layers=layers, heads=heads, backend=backend)
        assert all(same_bits(a, b[slice(*layers), :, slice(*heads)]) for a, b in zip(part, whole))
    one_more = (heads[0], heads[1] + 1) if heads[1] < HEADS else (heads[0] - 1, heads[1])
    with pytest.raises(ChecksumMismatch):
        decode(bad, profile, layers=layers, heads=one_more)


@PROFILES
@pytest.mark.parametrize("level", CODED)
def test_every_byte_of_an_own_piece_is_checked(profile: Profile, level: str) -> None:
    blob = encode(profile, level)
    info = inspect_blob(blob)
    directory = bitstream.parse_directory(memoryview(blob), info)
    rng = random.Random(3)
    for stage in range(info.stages):
        for which in (0, 1):
            at = HEADER_BYTES + info.directory_bytes + 2 * int(directory.start[stage, which, 1, 2])
            for _ in range(5):
                bad = bytearray(blob)
                bad[at + rng.randrange(2 * int(directory.entries[stage, which, 1, 2]["words"]))] ^= 1 << rng.randrange(
                    8
                )
                with pytest.raises(ChecksumMismatch, match=f"{'KV'[which]} of layer 1, head 2"):
                    decode(bytes(bad), profile, layers=(1, 2), heads=(2, 4))
                decode(bytes(bad), profile, layers=(1, 2), heads=(1, 2))


@PROFILES
@pytest.mark.parametrize("level", ["raw", *CODED])
def test_a_partial_reader_checks_header_directory_and_length(profile: Profile, level: str) -> None:
    blob = encode(profile, level)
    info = inspect_blob(blob)
    part = {"layers": (1, 2), "heads": (1, 3)}
    for at in [*range(5, HEADER_BYTES), *range(HEADER_BYTES, HEADER_BYTES + info.directory_bytes, 7)]:
        bad = bytearray(blob)
        bad[at] ^= 0x10
        with pytest.raises(ChecksumMismatch):
            decode(bytes(bad), profile, **part)
    for size in (0, 4, 63, 64, HEADER_BYTES + info.directory_bytes, len(blob) // 2, len(blob) - 1):
        with pytest.raises(TruncatedBlob):
            decode(blob[:size], profile, **part)
    with pytest.raises(MalformedBlob, match="something follows"):
        decode(blob + b"\0\0", profile, **part)
    if level == "raw":  # it has one checksum, so parts of it are checked by that
        bad = bytearray(blob)
        bad[HEADER_BYTES + 5] ^= 1
        with pytest.raises(ChecksumMismatch):
            decode(bytes(bad), profile, **part)


@PROFILES
@pytest.mark.parametrize("level", ["raw", "lossless", "q1", "q2", "q3"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float8_e5m2])
def test_a_rank_encodes_what_would_be_cut_from_the_whole(profile: Profile, level: str, dtype: torch.dtype) -> None:
    k, v = make_kv(LAYOUT, TOKENS, dtype=torch.float32)
    k[..., -1] /= 20
    k, v = k.to(dtype), v.to(dtype)
    whole = encode_chunk(k, v, level=level, profile=profile, rope=ROPE)
    for layers, heads in (((0, 3), (0, 2)), ((0, 3), (2, 4)), ((1, 2), (0, 4)), ((1, 3), (3, 4)), ((0, 3), (0, 4))):
        mine = (x[layers[0] : layers[1], :, heads[0] : heads[1]] for x in (k, v))
        blob = encode_chunk(*mine, level=level, profile=profile, rope=ROPE, layers=layers, heads=heads)
        assert blob == cut_chunk(whole, profile=profile, layers=layers, heads=heads)
        info = inspect_blob(blob)
        assert (info.layers, info.heads) == (layers, heads)
        expected = decode(whole, profile, layers=layers, heads=heads)
        assert all(same_bits(a, b) for a, b in zip(decode(blob, profile), expected))
        if layers[1] - layers[0] > 1:  # the model's numbers hold inside a part too
            last = (layers[1] - 1, layers[1])
            got = decode(blob, profile, layers=last)
            assert all(same_bits(a, b[-1:]) for a, b in zip(got, expected))
            assert cut_chunk(blob, profile=profile, layers=last) == cut_chunk(
                whole, profile=profile, layers=last, heads=heads
            )
        with pytest.raises(CodecError, match="layers 0 to 1 are not in"):
            decode(cut_chunk(whole, profile=profile, layers=(1, 2)), profile, layers=(0, 1))


@PROFILES
def test_a_cut_is_worth_what_encoding_at_the_level_is(profile: Profile) -> None:
    names = lossy_levels(profile)
    finest = encode(profile, names[0])
    size = len(finest)
    for name in names[1:]:
        cut, direct = cut_chunk(finest, profile=profile, level=name), encode(profile, name)
        assert all(same_bits(a, b) for a, b in zip(decode(cut, profile), decode(direct, profile)))
        a, b = inspect_blob(cut), inspect_blob(direct)
        assert replace(a, body_bytes=0, directory_crc=0) == replace(b, body_bytes=0, directory_crc=0)
        assert abs(len(cut) - len(direct)) <= 4 * 2 * LAYERS * HEADS * 16  # the lanes' last words
        assert len(cut) < size
        size = len(cut)
        assert cut_chunk(cut, profile=profile, level=name) == cut
        again = cut_chunk(cut_chunk(finest, profile=profile, heads=(1, 3)), profile=profile, level=name, layers=(0, 2))
        assert again == cut_chunk(cut, profile=profile, layers=(0, 2), heads=(1, 3))
        assert again == cut_chunk(finest, profile=profile, level=name, layers=(0, 2), heads=(1, 3))
    assert cut_chunk(finest, profile=profile) == cut_chunk(finest, profile=profile, level=names[0]) == finest


@PROFILES
def test_a_refinement_restores_the_finer_blob_byte_for_byte(profile: Profile) -> None:
    names = lossy_levels(profile)
    finest = encode(profile, names[0])
    levels = {name: cut_chunk(finest, profile=profile, level=name) for name in names}
    for i, fine in enumerate(names):
        for coarse in names[i + 1 :]:
            rest = refinement_of(levels[fine], profile=profile, have=coarse)
            assert rest == refinement_of(finest, profile=profile, have=coarse, level=fine)
            info = inspect_blob(rest)
            assert info.is_refinement and info.level == fine
            assert (info.first_stage, info.stages) == (
                profile.level(coarse).stages, profile.level(fine).stages - profile.level(coarse).stages,
            )  # fmt: skip
            assert refine_chunk(levels[coarse], rest) == levels[fine]
            assert len(rest) + len(levels[coarse]) - len(levels[fine]) == HEADER_BYTES + CRC_BYTES
    # In steps: each by itself, all refinements first, or what a finer refinement holds of a coarser one.
    steps = [refinement_of(levels[fine], profile=profile, have=coarse) for fine, coarse in pairwise(names)]
    blob = levels[names[-1]]
    for rest in reversed(steps):
        blob = refine_chunk(blob, rest)
    assert blob == finest
    all_rest = refinement_of(finest, profile=profile, have=names[-1])
    joined = steps[-1]
    for rest in reversed(steps[:-1]):
        joined = refine_chunk(joined, rest)
    assert joined == all_rest
    assert refinement_of(all_rest, profile=profile, have=names[1]) == steps[0]
    part = {"layers": (1, 3), "heads": (1, 2)}
    small = cut_chunk(finest, profile=profile, level=names[-1], **part)
    rest = refinement_of(cut_chunk(finest, profile=profile, **part), profile=profile, have=names[-1])
    assert refine_chunk(small, rest) == cut_chunk(finest, profile=profile, **part)


def test_what_cannot_be_cut_or_refined() -> None:
    profile = STATIC
    fine, exact, raw = encode(profile, "q1"), encode(profile, "lossless"), encode(profile, "raw")
    coarse = cut_chunk(fine, profile=profile, level="q3")
    rest = refinement_of(fine, profile=profile, have="q3")
    for blob, level in (
        (coarse, "q1"),
        (fine, "lossless"),
        (exact, "raw"),
        (exact, "q4"),
        (raw, "lossless"),
        (raw, "q1"),
    ):
        with pytest.raises(CodecError, match="cannot be cut"):
            cut_chunk(blob, profile=profile, level=level)
    with pytest.raises(UnknownLevel):
        cut_chunk(fine, profile=profile, level="q9")
    with pytest.raises(UnknownLevel):
        refinement_of(fine, profile=profile, have="q9")
    for blob, have in ((coarse, "q1"), (coarse, "q3"), (fine, "q1"), (fine, "lossless"), (exact, "q3"), (raw, "raw")):
        with pytest.raises(CodecError, match="does not refine"):
            refinement_of(blob, profile=profile, have=have)
    with pytest.raises(CodecError, match="does not refine"):
        refinement_of(rest, profile=profile, have="q4")
    for blob, have, level in ((fine, "q2", "q3"), (fine, "q3", "q3"), (fine, "q3", "lossless"), (fine, "raw", "q1")):
        with pytest.raises(CodecError, match="does not refine"):
            refinement_of(blob, profile=profile, have=have, level=level)
    with pytest.raises(CodecError, match="lacks the stages"):
        refinement_of(coarse, profile=profile, have="q4", level="q2")
    with pytest.raises(UnknownLevel):
        refinement_of(fine, profile=profile, have="q3", level="q9")
    for level, part in (("q1", {}), ("q3", {}), (None, {"heads": (0, 1)})):
        with pytest.raises(CodecError):
            cut_chunk(rest, profile=profile, level=level, **part)
    for ranges in ({"layers": (0, 4)}, {"heads": (2, 2)}, {"layers": (-1, 2)}, {"heads": (3, 5)}):
        with pytest.raises(CodecError, match="are not in 0 to"):
            cut_chunk(fine, profile=profile, **ranges)
    with pytest.raises(MalformedBlob, match="refine_chunk"):
        decode(rest, profile)


def test_what_does_not_belong_together_is_refused() -> None:
    fine = encode(STATIC, "q1")
    coarse = {name: cut_chunk(fine, profile=STATIC, level=name) for name in ("q2", "q3", "q4")}
    rest = refinement_of(fine, profile=STATIC, have="q3")
    other = make_profile(LAYOUT, matrices=True, unturned=1, stages=4, group=4, seed=5)
    short = encode_chunk(*make_kv(LAYOUT, 8), level="q3", profile=STATIC, rope=make_rope(8, 32))
    part = refinement_of(cut_chunk(fine, profile=STATIC, heads=(0, 2)), profile=STATIC, have="q3")
    moved = refinement_of(cut_chunk(fine, profile=STATIC, layers=(1, 2)), profile=STATIC, have="q3")
    first = cut_chunk(coarse["q3"], profile=STATIC, layers=(0, 1))
    no_rope = encode_chunk(*make_kv(LAYOUT, TOKENS), level="q3", profile=STATIC, rope=None)
    for a, b in (
        (coarse["q2"], rest), (coarse["q4"], rest), (rest, coarse["q3"]), (rest, rest), (fine, rest),
        (coarse["q3"], coarse["q3"]), (coarse["q3"], fine), (fine, coarse["q4"]), (short, rest), (coarse["q3"], part),
        (first, moved), (no_rope, rest), (encode(other, "q3"), rest), (encode(SHIPPED, "q3"), rest),
        (encode(STATIC, "q3", dtype=torch.float32), rest), (encode(STATIC, "lossless"), rest),
        (encode(STATIC, "raw"), encode(STATIC, "raw")), (encode(STATIC, "lossless"), encode(STATIC, "lossless")),
    ):  # fmt: skip
        with pytest.raises(CodecError):
            refine_chunk(a, b)
    with pytest.raises(WrongProfile):
        cut_chunk(fine, profile=other, level="q3")
    with pytest.raises(WrongProfile):
        refinement_of(fine, profile=other, have="q3")
    for other_encoding in (
        encode(STATIC, "q3", seed=1),
        cut_chunk(encode(STATIC, "q1", seed=1), profile=STATIC, level="q3"),
        encode(STATIC, "q3"),  # coded at q3, not cut: its lanes ended there
    ):
        with pytest.raises(WrongRefinement, match="another encoding"):
            refine_chunk(other_encoding, rest)
        with pytest.raises(MalformedBlob, match="stream"):  # what the binding saves from, if all stages are there
            decode(refine_chunk(other_encoding, bound_to(rest, other_encoding)), STATIC)


@PROFILES
def test_damaged_blobs_are_neither_cut_nor_refined(profile: Profile) -> None:
    fine = encode(profile, "q1")
    coarse = cut_chunk(fine, profile=profile, level="q3")
    rest = refinement_of(fine, profile=profile, have="q3")
    raw, exact = encode(profile, "raw"), encode(profile, "lossless")
    uses = [
        (fine, lambda b: cut_chunk(b, profile=profile, level="q2")),
        (fine, lambda b: cut_chunk(b, profile=profile, heads=(1, 2))),
        (fine, lambda b: cut_chunk(b, profile=profile)),
        (fine, lambda b: refinement_of(b, profile=profile, have="q3")),
        (coarse, lambda b: refine_chunk(b, rest)),
        (rest, lambda b: refine_chunk(coarse, b)),
        (raw, lambda b: cut_chunk(b, profile=profile, layers=(1, 2))),
        (exact, lambda b: cut_chunk(b, profile=profile, layers=(1, 2))),
    ]
    rng = random.Random(11)
    for blob, use in uses:
        for at in [0, 4, 5, 40, 46, 60, 63, 70, len(blob) - 1, *(rng.randrange(64, len(blob)) for _ in range(20))]:
            bad = bytearray(blob)
            bad[at] ^= 1 << rng.randrange(8)
            with pytest.raises((ChecksumMismatch, WrongVersion)):
                use(bytes(bad))
        for size in (0, 10, 63, 64, 100, len(blob) - 1):
            with pytest.raises(TruncatedBlob):
                use(blob[:size])
        with pytest.raises(MalformedBlob):
            use(blob + b"\0")


@PROFILES
def test_forged_blobs_are_cut_only_into_what_decodes_or_is_refused(profile: Profile) -> None:
    fine = encode(profile, "q1")
    stages = profile.lossy.num_stages
    for fields in (
        {"stages": stages - 1}, {"stages": stages + 1}, {"first_stage": 1}, {"layers": 2}, {"kind": 1},
        {"level": b"q2".ljust(8, b"\0")}, {"first_stage": 1, "stages": stages - 1},
    ):  # fmt: skip
        bad = forge(fine, **fields)
        for use in (
            lambda b=bad: cut_chunk(b, profile=profile, level="q3", heads=(0, 1)),
            lambda b=bad: refinement_of(b, profile=profile, have="q3"),
        ):
            with pytest.raises(CodecError):
                use()
    rest = refinement_of(fine, profile=profile, have="q3")
    parts = take_apart(rest)
    parts.fields[FIELDS["first_stage"]] = 0  # passes itself off as a chunk of its own
    with pytest.raises(BlobError):
        decode(put_together(parts), profile)
    parts.fields[FIELDS["level"]] = b"q3".ljust(8, b"\0")
    parts.fields[FIELDS["stages"]] = 2
    with pytest.raises(BlobError):
        decode(seal(put_together(parts, fit=False)), profile)


@given(
    stages=st.integers(2, 6), layers=st.integers(1, 3), heads=st.integers(1, 3), tokens=st.sampled_from([1, 2, 3, 13]),
    dims=st.sampled_from([(64, 40), (5, 3), (17, 33), (128, 16), (1, 1)]), shipped=st.booleans(),
    matrices=st.booleans(), dtype=st.sampled_from([torch.bfloat16, torch.float32]), seed=st.integers(0, 2**32 - 1),
    backend=st.sampled_from(["numba", "numba", "reference"]), data=st.data(),
)  # fmt: skip
@settings(max_examples=60)
def test_cutting_and_refining_any_chunk(  # type: ignore[no-untyped-def]
    stages, layers, heads, tokens, dims, shipped, matrices, dtype, seed, backend, data
) -> None:
    layout = make_layout(layers, heads, *dims)
    profile = (
        default_profile(layout)
        if shipped
        else make_profile(layout, stages=stages, matrices=matrices, group=seed % 5, unturned=seed % 3)
    )
    k, v = make_kv(layout, tokens, seed=seed, dtype=dtype)
    rope = make_rope(tokens, dims[0] // 2 * 2) if seed % 2 else None
    names = lossy_levels(profile)
    fine = data.draw(st.integers(0, len(names) - 2))
    coarse = data.draw(st.integers(fine + 1, len(names) - 1))
    start = data.draw(st.integers(0, layers - 1)), data.draw(st.integers(0, heads - 1))
    part = {
        "layers": (start[0], data.draw(st.integers(start[0] + 1, layers))),
        "heads": (start[1], data.draw(st.integers(start[1] + 1, heads))),
    }
    blob = encode_chunk(k, v, level=names[fine], profile=profile, rope=rope, backend=backend)
    small = cut_chunk(blob, profile=profile, level=names[coarse], **part)
    mine = [x[slice(*part["layers"]), :, slice(*part["heads"])] for x in (k, v)]
    direct = encode_chunk(*mine, level=names[coarse], profile=profile, rope=rope, backend=backend, **part)
    out = decode_chunk(small, profile=profile, rope=rope, backend=backend)
    assert all(same_bits(a, b) for a, b in zip(out, decode_chunk(direct, profile=profile, rope=rope, backend=backend)))
    mine_fine = cut_chunk(blob, profile=profile, **part)
    rest = refinement_of(mine_fine, profile=profile, have=names[coarse])
    assert refine_chunk(small, rest) == mine_fine
    out = decode_chunk(mine_fine, profile=profile, rope=rope, backend=backend)
    again = decode_chunk(blob, profile=profile, rope=rope, backend=backend, **part)
    assert all(same_bits(a, b) for a, b in zip(out, again))


def test_level_sizes_are_those_of_the_cuts_and_of_no_finer_level() -> None:
    layout = make_layout()
    profile = make_profile(layout, matrices=True)
    k, v = make_kv(layout, 20)
    for level, expected in (
        ("q1", {"q1", "q2", "q3"}),
        ("q2", {"q2", "q3"}),
        ("q3", {"q3"}),
        ("lossless", {"lossless"}),
    ):
        blob = encode_chunk(k, v, level=level, profile=profile, rope=None)
        sizes = level_sizes(blob, profile=profile)
        assert set(sizes) == expected
        assert sizes == {name: len(cut_chunk(blob, profile=profile, level=name)) for name in expected}


# -- several ranges of layers, one behind another ------------------------------------------------------------------

RUNS = [(0, 1), (2, 3)]


@PROFILES
@pytest.mark.parametrize("level", ["raw", *CODED])
def test_layers_cut_one_behind_another_decode_to_theirs(profile: Profile, level: str) -> None:
    whole = encode(profile, level)
    parts = split_blobs(cut_layers(whole, profile=profile, layers=RUNS))
    assert [inspect_blob(part).layers for part in parts] == RUNS
    for part, run in zip(parts, RUNS, strict=True):
        assert bytes(part) == cut_chunk(whole, profile=profile, layers=run)
        for ours, theirs in zip(decode(part, profile), decode(whole, profile, layers=run), strict=True):
            assert same_bits(ours, theirs)
    assert split_blobs(cut_layers(whole, profile=profile, layers=[(0, LAYERS)])) == [whole]


@PROFILES
def test_refinements_of_layers_restore_their_finer_blobs(profile: Profile) -> None:
    finest, *_, coarsest = lossy_levels(profile)
    whole = encode(profile, finest)
    coarse = cut_layers(whole, profile=profile, layers=RUNS, level=coarsest)
    rest = cut_layers(whole, profile=profile, layers=RUNS, level=finest, have=coarsest)
    assert refine_blobs(coarse, rest) == cut_layers(whole, profile=profile, layers=RUNS)
    for wrong in (
        cut_layers(whole, profile=profile, layers=RUNS[:1], level=finest, have=coarsest),
        cut_layers(whole, profile=profile, layers=[(0, LAYERS)], level=finest, have=coarsest),
        cut_layers(encode(profile, finest, seed=1), profile=profile, layers=RUNS, level=finest, have=coarsest),
    ):
        with pytest.raises(WrongRefinement):
            refine_blobs(coarse, wrong)


def test_blobs_one_behind_another_are_checked() -> None:
    whole = encode(SHIPPED, "q1")
    some = cut_layers(whole, profile=SHIPPED, layers=RUNS)
    assert split_blobs(b"") == []
    with pytest.raises(TruncatedBlob):
        split_blobs(some[:-1])
    with pytest.raises(BlobError):
        split_blobs(some + b"\0")
    for layers in ([], [(0, 1), (1, 2)], [(2, 3), (0, 1)], [(0, 2), (1, 3)]):
        with pytest.raises(CodecError, match="ascending ranges"):
            cut_layers(whole, profile=SHIPPED, layers=layers)
    with pytest.raises(CodecError):
        cut_layers(whole, profile=SHIPPED, layers=[(2, LAYERS + 1)])
    damaged = bytearray(whole)
    damaged[-20] ^= 1
    with pytest.raises(ChecksumMismatch):
        cut_layers(damaged, profile=SHIPPED, layers=RUNS)
