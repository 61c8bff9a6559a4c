"""What a receiver does with blobs that are cut, changed, too long, of another version or profile, or forged."""

from __future__ import annotations

import random
import struct
import time
import tracemalloc
import zlib

import pytest
import torch
from codec_cases import MB, make_kv, make_layout, make_profile, make_rope

from codec.bitstream import CRC_BYTES, ENTRY_BYTES, HEADER, HEADER_BYTES, MAX_TOKENS
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
FIELDS = {
    "magic": 0, "version": 1, "kind": 2, "dtype": 3, "flags": 4, "level": 5, "profile": 6, "layers": 7, "heads": 8,
    "dim_k": 9, "dim_v": 10, "tokens": 11, "lanes": 12, "prob_bits": 13, "zero": 14, "body": 15, "zero2": 16,
}  # fmt: skip


def profiles() -> list[Profile]:
    return [make_profile(LAYOUT), default_profile(LAYOUT)]


def encode(level: str, profile: Profile, seed: int = 0) -> bytes:
    return encode_chunk(*make_kv(LAYOUT, TOKENS, seed=seed), level=level, profile=profile, rope=make_rope(TOKENS, 64))


def decode(blob: bytes, profile: Profile) -> tuple[torch.Tensor, torch.Tensor]:
    return decode_chunk(blob, profile=profile, rope=make_rope(TOKENS, 64))


def seal(blob: bytes) -> bytes:
    """Both checksums made valid again."""
    head = blob[: HEADER_BYTES - 4]
    head += struct.pack("<I", zlib.crc32(head))
    whole = head + blob[HEADER_BYTES:-CRC_BYTES]
    return whole + struct.pack("<I", zlib.crc32(whole))


def forge(blob: bytes, **fields: object) -> bytes:
    values = list(HEADER.unpack(blob[:HEADER_BYTES]))
    for name, value in fields.items():
        values[FIELDS[name]] = value
    return seal(HEADER.pack(*values) + blob[HEADER_BYTES:])


@pytest.mark.parametrize("level", LEVELS)
def test_every_truncation_is_noticed(level: str) -> None:
    profile = make_profile(LAYOUT)
    blob = encode(level, profile)
    for size in [*range(HEADER_BYTES + 9), *range(HEADER_BYTES, len(blob), 97), len(blob) - 1]:
        with pytest.raises(TruncatedBlob):
            decode(blob[:size], profile)
    assert inspect_blob(blob[:HEADER_BYTES]).total_bytes == len(blob)


@pytest.mark.parametrize("level", LEVELS)
def test_every_flipped_bit_is_noticed(level: str) -> None:
    profile = make_profile(LAYOUT)
    blob = encode(level, profile)
    rng = random.Random(1)
    places = [*range(8 * HEADER_BYTES), *(rng.randrange(8 * len(blob)) for _ in range(300))]
    for bit in places:
        bad = bytearray(blob)
        bad[bit // 8] ^= 1 << bit % 8
        with pytest.raises((ChecksumMismatch, WrongVersion)):
            decode(bytes(bad), profile)


def test_wrong_length_version_profile_and_layout() -> None:
    profile = make_profile(LAYOUT)
    blob = encode("q1", profile)
    with pytest.raises(MalformedBlob, match="something follows"):
        decode(blob + b"\0", profile)
    for bad in (forge(blob, magic=b"PNG\0"), forge(blob, version=2), b"GARBAGE" * 3, b"\x80\x04pickle" * 20):
        with pytest.raises(WrongVersion):
            decode(bad, profile)
    other = make_profile(LAYOUT, seed=9)
    with pytest.raises(WrongProfile, match=profile.id):
        decode(blob, other)
    with pytest.raises(WrongProfile, match="layout"):
        decode(forge(blob, layers=3), profile)


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        ({"kind": 3}, MalformedBlob),
        ({"kind": 0}, MalformedBlob),
        ({"kind": 1}, MalformedBlob),
        ({"dtype": 0}, MalformedBlob),
        ({"dtype": 3}, None),
        ({"flags": 4}, MalformedBlob),
        ({"flags": 2}, MalformedBlob),
        ({"level": b"\0" * 8}, MalformedBlob),
        ({"level": b"\xff" * 8}, MalformedBlob),
        ({"level": b"raw\0\0\0\0\0"}, MalformedBlob),
        ({"tokens": 0}, MalformedBlob),
        ({"tokens": TOKENS + 1}, MalformedBlob),
        ({"tokens": MAX_TOKENS + 1}, BlobTooLarge),
        ({"tokens": 2**32 - 1}, BlobTooLarge),
        ({"layers": 65535}, BlobTooLarge),
        ({"lanes": 16}, MalformedBlob),
        ({"prob_bits": 11}, MalformedBlob),
        ({"zero": 1}, MalformedBlob),
        ({"zero2": 1}, MalformedBlob),
        ({"body": 2**64 - 1}, TruncatedBlob),
        ({"body": 0}, MalformedBlob),
    ],
)
def test_forged_headers(fields: dict[str, object], error: type[BlobError] | None) -> None:
    profile = make_profile(LAYOUT)
    blob = forge(encode("q2", profile), **fields)
    if error is None:
        assert decode(blob, profile)[0].dtype is torch.float32
        return
    with pytest.raises(error):
        decode(blob, profile)


def test_a_level_the_profile_lacks_is_a_bad_blob() -> None:
    profile = make_profile(LAYOUT)
    with pytest.raises(BlobError, match="q8"):
        decode(forge(encode("q2", profile), level=b"q8".ljust(8, b"\0")), profile)


@pytest.mark.parametrize("level", ["lossless", "q1"])
def test_forged_directories_take_no_memory(level: str) -> None:
    profile = make_profile(LAYOUT)
    blob = encode(level, profile)
    tracemalloc.start()
    for value in (0, 1, 0xFFFF, 2**32 - 1):
        for entry in range(8):
            for half in (0, 4):
                bad = bytearray(blob)
                at = HEADER_BYTES + ENTRY_BYTES * entry + half
                struct.pack_into("<I", bad, at, value)
                if bytes(bad) != blob:
                    with pytest.raises(MalformedBlob):
                        decode(seal(bytes(bad)), profile)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 * MB


def test_resealed_mutations_decode_to_finite_numbers_or_a_typed_error() -> None:
    """A few thousand blobs with valid checksums over damaged contents: never a crash, never NaN at a lossy level."""
    rng = random.Random(20261120)
    cases = [(level, profile, encode(level, profile)) for profile in profiles() for level in LEVELS]
    outcomes = {"decoded": 0, "refused": 0}
    started = time.monotonic()
    for number in range(3000):
        level, profile, blob = cases[number % len(cases)]
        bad = bytearray(blob)
        start = rng.choice([0, HEADER_BYTES, HEADER_BYTES, HEADER_BYTES + 8 * ENTRY_BYTES])
        for _ in range(rng.choice([1, 1, 3, 20])):
            kind = rng.randrange(4)
            at = rng.randrange(min(start, len(bad) - 8), len(bad) - 4)
            if kind == 0:
                bad[at] ^= 1 << rng.randrange(8)
            elif kind == 1:
                bad[at] = rng.choice([0, 0xFF, 0x7F, 0x80, rng.randrange(256)])
            elif kind == 2:
                size = rng.randrange(1, 40)
                bad[at : at + size] = rng.randbytes(len(bad[at : at + size]))
            else:
                del bad[at : at + 2]
        sealed = seal(bytes(bad))
        if rng.random() < 0.5:  # and a body length that fits, to get past the first check
            sealed = forge(sealed, body=len(sealed) - HEADER_BYTES - CRC_BYTES)
        try:
            k, v = decode(sealed, profile)
        except BlobError:
            outcomes["refused"] += 1
        else:
            outcomes["decoded"] += 1
            assert inspect_blob(sealed).kind != 2 or bool(torch.isfinite(k).all() and torch.isfinite(v).all()), (
                number,
                level,
            )
        if time.monotonic() - started > 20:  # a busy machine: what was tried has passed
            break
    assert outcomes["refused"] > 100
    assert outcomes["decoded"] > 10


def test_odd_addresses_and_buffer_types() -> None:
    profile = make_profile(LAYOUT)
    for level in LEVELS:
        blob = encode(level, profile)
        expected = decode(blob, profile)
        for offset in (1, 2, 3):
            room = bytearray(len(blob) + 8)
            room[offset : offset + len(blob)] = blob
            view = memoryview(room)[offset : offset + len(blob)]
            for form in (view, view.toreadonly(), bytearray(blob)):
                got = decode(form, profile)
                assert all(torch.equal(a, b) for a, b in zip(got, expected))
