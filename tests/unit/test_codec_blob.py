"""What a receiver does with blobs that are cut short, changed, too long, of another version or profile, or forged."""

from __future__ import annotations

import random
import struct
import tracemalloc

import pytest
import torch
from codec_cases import MB, make_kv, make_layout, make_profile, make_rope, same_bits
from codec_forge import CHECKSUMS, FIELDS, forge, put_together, seal, take_apart

from codec.bitstream import ENTRY, HEADER_BYTES, MAX_TOKENS
from codec.chunk import decode_chunk, encode_chunk, inspect_blob
from codec.errors import (
    BlobError,
    BlobTooLarge,
    ChecksumMismatch,
    MalformedBlob,
    TruncatedBlob,
    WrongProfile,
    WrongVersion,
)
from codec.profile import Profile, default_profile

LAYOUT = make_layout(2, 2, 64, 48)
TOKENS = 24
LEVELS = ["raw", "lossless", "q1", "q2", "q3"]
PROFILE = make_profile(LAYOUT, matrices=True, unturned=1)


def encode(level: str, profile: Profile, seed: int = 0) -> bytes:
    return encode_chunk(*make_kv(LAYOUT, TOKENS, seed=seed), level=level, profile=profile, rope=make_rope(TOKENS, 64))


def decode(blob: bytes, profile: Profile) -> tuple[torch.Tensor, torch.Tensor]:
    return decode_chunk(blob, profile=profile, rope=make_rope(TOKENS, 64))


@pytest.mark.parametrize("level", LEVELS)
def test_every_truncation_is_noticed(level: str) -> None:
    blob = encode(level, PROFILE)
    for size in [*range(HEADER_BYTES + 9), *range(HEADER_BYTES, len(blob), 97), len(blob) - 1]:
        with pytest.raises(TruncatedBlob):
            decode(blob[:size], PROFILE)
    assert inspect_blob(blob[:HEADER_BYTES]).total_bytes == len(blob)


@pytest.mark.parametrize("level", LEVELS)
def test_every_flipped_bit_is_noticed(level: str) -> None:
    blob = encode(level, PROFILE)
    rng = random.Random(1)
    places = [*range(8 * HEADER_BYTES), *(rng.randrange(8 * len(blob)) for _ in range(300))]
    for bit in places:
        bad = bytearray(blob)
        bad[bit // 8] ^= 1 << bit % 8
        with pytest.raises((ChecksumMismatch, WrongVersion)):
            decode(bytes(bad), PROFILE)


@pytest.mark.parametrize("level", LEVELS)
def test_each_checksum_is_needed(level: str) -> None:
    """The blob's, the header's, the directory's; a piece's is for those who read no more than that."""
    blob = encode(level, PROFILE)
    parts = take_apart(blob)
    assert put_together(parts) == blob
    wrong = parts.copy()
    wrong.fields[FIELDS["header_crc"]] ^= 1  # type: ignore[operator]
    wrong.fields[FIELDS["directory_crc"]] ^= 1  # type: ignore[operator]
    wrong.entries["crc"] ^= 1
    for name in CHECKSUMS:
        bad = put_together(wrong, seal=CHECKSUMS - {name})
        if name == "pieces":
            assert same_bits(decode(bad, PROFILE)[0], decode(blob, PROFILE)[0])
            if level == "raw":
                continue
            with pytest.raises(ChecksumMismatch, match="K of layer 0, head 0"):
                decode_chunk(bad, profile=PROFILE, rope=make_rope(TOKENS, 64), heads=(0, 1))
        else:
            with pytest.raises(MalformedBlob if (name, level) == ("directory", "raw") else ChecksumMismatch):
                decode(bad, PROFILE)


def test_wrong_length_version_profile_and_layout() -> None:
    blob = encode("q1", PROFILE)
    with pytest.raises(MalformedBlob, match="something follows"):
        decode(blob + b"\0", PROFILE)
    for bad in (
        forge(blob, magic=b"PNG\0"), forge(blob, version=1), forge(blob, version=3), b"GARBAGE" * 3,
        b"\x80\x04pickle" * 20,
    ):  # fmt: skip
        with pytest.raises(WrongVersion):
            decode(bad, PROFILE)
    other = make_profile(LAYOUT, seed=9)
    with pytest.raises(WrongProfile, match=PROFILE.id):
        decode(blob, other)
    for fields in ({"layers": 3}, {"first_layer": 1}, {"first_head": 1}, {"heads": 3}, {"dim_k": 48}, {"dim_v": 64}):
        with pytest.raises((WrongProfile, MalformedBlob)):
            decode(forge(blob, **fields), PROFILE)


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        ({"kind": 3}, MalformedBlob),
        ({"kind": 0}, MalformedBlob),
        ({"kind": 1}, MalformedBlob),
        ({"dtype": 0}, MalformedBlob),
        ({"dtype": 6}, MalformedBlob),
        ({"dtype": 3}, None),
        ({"flags": 4}, MalformedBlob),
        ({"flags": 2}, MalformedBlob),
        ({"level": b"\0" * 8}, MalformedBlob),
        ({"level": b"\xff" * 8}, MalformedBlob),
        ({"level": b"q\0002\0\0\0\0\0"}, MalformedBlob),
        ({"level": b"raw\0\0\0\0\0"}, MalformedBlob),
        ({"level": b"q1\0\0\0\0\0\0"}, MalformedBlob),
        ({"level": b"q8\0\0\0\0\0\0"}, MalformedBlob),
        ({"tokens": 0}, MalformedBlob),
        ({"tokens": TOKENS + 1}, MalformedBlob),
        ({"tokens": MAX_TOKENS + 1}, BlobTooLarge),
        ({"tokens": 2**16 - 1}, BlobTooLarge),
        ({"layers": 0}, MalformedBlob),
        ({"layers": 65535}, BlobTooLarge),
        ({"heads": 1025}, BlobTooLarge),
        ({"dim_k": 1025}, BlobTooLarge),
        ({"dim_v": 0}, MalformedBlob),
        ({"layers": 1024, "heads": 1024, "tokens": 4096}, BlobTooLarge),
        ({"first_layer": 65535}, WrongProfile),
        ({"first_head": 2}, WrongProfile),
        ({"first_stage": 1}, MalformedBlob),
        ({"first_stage": 5}, MalformedBlob),
        ({"first_stage": 255}, MalformedBlob),
        ({"stages": 0}, MalformedBlob),
        ({"stages": 1}, MalformedBlob),
        ({"stages": 3}, MalformedBlob),
        ({"stages": 7}, MalformedBlob),
        ({"stages": 255}, MalformedBlob),
        ({"body": 2**64 - 1}, TruncatedBlob),
        ({"body": 0}, MalformedBlob),
    ],
)
def test_forged_headers(fields: dict[str, object], error: type[BlobError] | None) -> None:
    blob = forge(encode("q2", PROFILE), **fields)
    if error is None:
        assert decode(blob, PROFILE)[0].dtype is torch.float32
        return
    with pytest.raises(error):
        decode(blob, PROFILE)


@pytest.mark.parametrize(
    ("level", "fields"),
    [
        ("raw", {"stages": 1}),
        ("raw", {"directory_crc": 1}),
        ("raw", {"flags": 2}),
        ("raw", {"first_stage": 1}),
        ("raw", {"tokens": TOKENS - 1}),
        ("raw", {"dtype": 3}),
        ("lossless", {"stages": 1}),
        ("lossless", {"stages": 3}),
        ("lossless", {"flags": 1}),
        ("lossless", {"flags": 2}),
        ("lossless", {"dtype": 2}),
        ("lossless", {"dtype": 3}),
        ("lossless", {"dtype": 4}),
        ("lossless", {"kind": 2}),
    ],
)
def test_forged_headers_of_other_kinds(level: str, fields: dict[str, object]) -> None:
    with pytest.raises(MalformedBlob):
        decode(forge(encode(level, PROFILE), **fields), PROFILE)


def test_a_refinement_is_no_chunk() -> None:
    from codec.chunk import refinement_of

    rest = refinement_of(encode("q1", PROFILE), profile=PROFILE, have="q3")
    with pytest.raises(MalformedBlob, match="refine_chunk"):
        decode(rest, PROFILE)


@pytest.mark.parametrize("level", ["lossless", "q1"])
def test_forged_directories_take_no_memory(level: str) -> None:
    blob = encode(level, PROFILE)
    tracemalloc.start()
    for value in (0, 1, 0xFFFF, 2**32 - 1):
        for entry in range(8):
            for field in (0, 4):
                bad = bytearray(blob)
                struct.pack_into("<I", bad, HEADER_BYTES + ENTRY.itemsize * entry + field, value)
                if bytes(bad) != blob:
                    with pytest.raises(MalformedBlob):
                        decode(seal(bytes(bad)), PROFILE)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 * MB


def test_sizes_are_checked_before_a_large_chunk_is_allocated() -> None:
    """A header of some hundred MB over a few bytes costs a few bytes."""
    layout = make_layout(32, 8, 128, 128)
    profile = default_profile(layout)
    k = torch.zeros(32, 1, 8, 128, dtype=torch.bfloat16)
    blob = encode_chunk(k, k.clone(), level="q3", profile=profile, rope=None)
    parts = take_apart(blob)
    parts.fields[FIELDS["tokens"]] = 4096
    parts.entries["words"] += 1
    tracemalloc.start()
    with pytest.raises(MalformedBlob, match="accounts for"):
        decode_chunk(put_together(parts, fit=False), profile=profile, rope=None)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 * MB


def test_side_information_out_of_range_is_refused() -> None:
    """A step of 0, NaN, Inf or 2^100, a mean of Inf, a table the codebook lacks."""
    profile = default_profile(LAYOUT)
    parts = take_apart(encode("q1", profile))

    def with_word(level: str, at: int, word: int) -> bytes:
        parts = take_apart(encode(level, profile))
        piece = bytearray(parts.pieces[0])
        struct.pack_into("<H", piece, 2 * at, word)
        parts.pieces[0] = bytes(piece)
        return put_together(parts)

    for at, words in ((0, (0, 0x7FC0, 0x7F80, 0x7180, 0xBF80)), (1, (0x7FC0, 0x7F80, 0xFF80, 0x6D80, 0xED00))):
        for word in words:
            with pytest.raises(MalformedBlob, match="step or mean"):
                decode(with_word("q1", at, word), profile)
    for word in (0x0000, 0x8000, 0x6C80, 0xEC80):
        assert bool(torch.isfinite(decode(with_word("q1", 1, word), profile)[0]).all())
    with pytest.raises(MalformedBlob, match="table"):
        decode(with_word("lossless", 1, 31), profile)  # there are 31
    short = parts.copy()
    short.pieces[0] = short.pieces[0][:20]
    with pytest.raises(MalformedBlob, match="side information"):
        decode(put_together(short), profile)


def test_odd_addresses_and_buffer_types() -> None:
    for level in LEVELS:
        blob = encode(level, PROFILE)
        expected = decode(blob, PROFILE)
        for offset in (1, 2, 3):
            room = bytearray(len(blob) + 8)
            room[offset : offset + len(blob)] = blob
            view = memoryview(room)[offset : offset + len(blob)]
            for form in (view, view.toreadonly(), bytearray(blob)):
                got = decode(form, PROFILE)
                assert all(torch.equal(a, b) for a, b in zip(got, expected))


def test_a_body_does_not_fit_behind_another_header() -> None:
    """Two sound raw blobs of one size, the same numbers but read as another dtype, or as other layers."""
    k, v = make_kv(LAYOUT, TOKENS, dtype=torch.float32)
    blobs = [
        encode_chunk(k.to(dtype), v.to(dtype), level="raw", profile=PROFILE, rope=None)
        for dtype in (torch.float8_e4m3fn, torch.float8_e5m2)
    ]
    for first in (0, 1):
        part = slice(first, first + 1)
        blobs.append(encode_chunk(k[part], v[part], level="raw", profile=PROFILE, rope=None, layers=(first, first + 1)))
    for a, b in ((blobs[0], blobs[1]), (blobs[2], blobs[3])):
        assert len(a) == len(b) and a[:HEADER_BYTES] != b[:HEADER_BYTES]
        with pytest.raises(ChecksumMismatch):
            decode(a[:HEADER_BYTES] + b[HEADER_BYTES:], PROFILE)
