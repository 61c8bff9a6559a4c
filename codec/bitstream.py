"""The blob's outer form: header, segment directory, checksum. Bytes in, plain data out; pure. SPEC.md is the text.

header 64 | directory 8 * S | payload | crc32 4          S = 2 * L * H segments, all K's then all V's (raw: S = 0)
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass

import numpy as np

from codec.errors import BlobTooLarge, ChecksumMismatch, MalformedBlob, TruncatedBlob, WrongVersion
from codec.levels import LevelKind
from kernels.rans_reference import LANES, PROB_BITS

MAGIC = b"KVSB"
VERSION = 1
HEADER = struct.Struct("<4sBBBB8s16sHHHHIBBHQII")
HEADER_BYTES = HEADER.size
CRC_BYTES = 4
ENTRY_BYTES = 8
assert HEADER_BYTES == 64

MAX_TOKENS = 4096
MAX_LAYERS = 1024
MAX_HEADS = 1024
MAX_HEAD_DIM = 1024
MAX_DECODED_BYTES = 1 << 30  # of one chunk

FLAG_UNROTATED = 1  # keys were coded before RoPE: decoding needs the RopeTable
FLAG_SHIPPED = 2  # steps, means and table choices travel in the segments
DTYPE_CODES = {"bfloat16": 1, "float16": 2, "float32": 3}
DTYPE_NAMES = {code: name for name, code in DTYPE_CODES.items()}
ITEM_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}


@dataclass(frozen=True, slots=True, kw_only=True)
class BlobInfo:
    """A header, checked. layout: (layers, KV heads, head dim of K, head dim of V)."""

    level: str
    kind: LevelKind
    dtype: str
    is_unrotated: bool
    is_shipped: bool
    profile_id: str
    layout: tuple[int, int, int, int]
    num_tokens: int
    lanes: int
    prob_bits: int
    body_bytes: int

    @property
    def total_bytes(self) -> int:
        return HEADER_BYTES + self.body_bytes + CRC_BYTES

    @property
    def num_values(self) -> int:
        layers, heads, dim_k, dim_v = self.layout
        return layers * heads * self.num_tokens * (dim_k + dim_v)

    @property
    def decoded_bytes(self) -> int:
        return self.num_values * ITEM_BYTES[self.dtype]

    @property
    def num_segments(self) -> int:
        return 0 if self.kind is LevelKind.RAW else 2 * self.layout[0] * self.layout[1]


def pack_header(info: BlobInfo) -> bytes:
    flags = FLAG_UNROTATED * info.is_unrotated | FLAG_SHIPPED * info.is_shipped
    fields = (
        MAGIC, VERSION, int(info.kind), DTYPE_CODES[info.dtype], flags, info.level.encode("ascii"),
        bytes.fromhex(info.profile_id), *info.layout, info.num_tokens, info.lanes, info.prob_bits, 0,
        info.body_bytes, 0,
    )  # fmt: skip
    head = HEADER.pack(*fields, 0)[:-4]
    return head + struct.pack("<I", zlib.crc32(head))


def parse_header(blob: memoryview) -> BlobInfo:
    """Checks the header alone, its own checksum included; reads nothing behind it. Raises BlobError subclasses."""
    if blob.nbytes < HEADER_BYTES:
        if blob.nbytes >= 5 and (bytes(blob[:4]) != MAGIC or blob[4] != VERSION):
            raise WrongVersion("not a kvstream blob of this version")
        raise TruncatedBlob(f"{blob.nbytes} bytes are fewer than a header's {HEADER_BYTES}")
    (
        magic,
        version,
        kind,
        dtype,
        flags,
        level,
        profile_id,
        layers,
        heads,
        dim_k,
        dim_v,
        tokens,
        lanes,
        prob_bits,
        zero,
        body,
        zero2,
        crc,
    ) = HEADER.unpack(blob[:HEADER_BYTES])
    if magic != MAGIC:
        raise WrongVersion(f"not a kvstream blob: starts with {magic!r}, not {MAGIC!r}")
    if version != VERSION:
        raise WrongVersion(f"blob version {version}, this build reads {VERSION}; run the same kvstream on both ends")
    if zlib.crc32(blob[: HEADER_BYTES - 4]) != crc:
        raise ChecksumMismatch("the header's checksum does not fit: the bytes changed on the way")
    name = level.rstrip(b"\0")
    if (
        kind > 2
        or dtype not in DTYPE_NAMES
        or flags > 3
        or zero
        or zero2
        or not name
        or not name.isascii()
        or b"\0" in name
    ):
        raise MalformedBlob("the header holds an unknown kind, dtype, flag or level name")
    for what, value, limit in (
        ("layers", layers, MAX_LAYERS), ("heads", heads, MAX_HEADS), ("head dim of K", dim_k, MAX_HEAD_DIM),
        ("head dim of V", dim_v, MAX_HEAD_DIM), ("tokens", tokens, MAX_TOKENS),
    ):  # fmt: skip
        if value > limit:
            raise BlobTooLarge(f"{value} {what} are over the limit of {limit}")
        if value == 0:
            raise MalformedBlob(f"the header says 0 {what}")
    info = BlobInfo(
        level=name.decode("ascii"), kind=LevelKind(kind), dtype=DTYPE_NAMES[dtype],
        is_unrotated=bool(flags & FLAG_UNROTATED), is_shipped=bool(flags & FLAG_SHIPPED),
        profile_id=profile_id.hex(), layout=(layers, heads, dim_k, dim_v), num_tokens=tokens,
        lanes=lanes, prob_bits=prob_bits, body_bytes=body,
    )  # fmt: skip
    if info.decoded_bytes > MAX_DECODED_BYTES:
        raise BlobTooLarge(
            f"the chunk would decode to {info.decoded_bytes} bytes, over the limit of {MAX_DECODED_BYTES}"
        )
    if info.kind is not LevelKind.RAW and (info.lanes, info.prob_bits) != (LANES, PROB_BITS):
        raise MalformedBlob(
            f"{info.lanes} lanes, {info.prob_bits} probability bits; version {VERSION} has {LANES}, {PROB_BITS}"
        )
    return info


def check_body(blob: memoryview, info: BlobInfo) -> memoryview:
    """The body, once length and checksum hold."""
    if blob.nbytes < info.total_bytes:
        raise TruncatedBlob(f"{blob.nbytes} bytes came, the header says {info.total_bytes}; ask for the chunk again")
    if blob.nbytes > info.total_bytes:
        raise MalformedBlob(f"{blob.nbytes} bytes came, the header says {info.total_bytes}: something follows the blob")
    stated = int.from_bytes(blob[-CRC_BYTES:], "little")
    if zlib.crc32(blob[:-CRC_BYTES]) != stated:
        raise ChecksumMismatch("the checksum does not fit: the bytes changed on the way; ask for the chunk again")
    return blob[HEADER_BYTES:-CRC_BYTES]


def assemble(info: BlobInfo, parts: list[memoryview | bytes]) -> bytes:
    """header + parts + checksum, copied once."""
    whole: list[memoryview | bytes] = [pack_header(info), *parts]
    crc = 0
    for part in whole:
        crc = zlib.crc32(part, crc)
    return b"".join([*whole, crc.to_bytes(CRC_BYTES, "little")])


@dataclass(frozen=True, slots=True, kw_only=True)
class SegmentTable:
    """Where one tensor's segments lie: pos [S] is each one's first word in the payload (its side info)."""

    pos: np.ndarray
    words: np.ndarray
    escapes: np.ndarray


def side_words(kind: LevelKind, is_shipped: bool, dim: int) -> int:
    """16-bit words of side information in front of a segment: [step, means] and the table index of each channel."""
    if not is_shipped:
        return 0
    index = (dim + 1) // 2
    return index if kind is LevelKind.LOSSLESS else 1 + dim + index


def rest_words(info: BlobInfo, dim: int) -> int:
    """Words behind a lossless segment's escapes: sign and mantissa bytes, then (float32) the low halves."""
    if info.kind is not LevelKind.LOSSLESS:
        return 0
    values = info.num_tokens * dim
    return (values + 1) // 2 + (values if info.dtype == "float32" else 0)


def pack_directory(words: np.ndarray, escapes: np.ndarray) -> bytes:
    return np.stack([words, escapes], axis=1).astype("<u4").tobytes()


def parse_directory(body: memoryview, info: BlobInfo) -> tuple[np.ndarray, SegmentTable, SegmentTable]:
    """Body -> (payload as uint16, K's segments, V's segments). The directory must account for every byte."""
    count = info.num_segments
    if body.nbytes < ENTRY_BYTES * count:
        raise MalformedBlob("the body is shorter than its directory")
    entries = np.frombuffer(body[: ENTRY_BYTES * count], "<u4").reshape(count, 2).astype(np.int64)
    layers, heads, dim_k, dim_v = info.layout
    dims = np.repeat([dim_k, dim_v], layers * heads).astype(np.int64)
    values = info.num_tokens * dims
    if (entries > values[:, None]).any():
        raise MalformedBlob("the directory claims more words or escapes than a segment has values")
    fixed = np.repeat(
        [side_words(info.kind, info.is_shipped, d) + 2 * min(LANES, d) + rest_words(info, d) for d in (dim_k, dim_v)],
        layers * heads,
    )
    sizes = fixed + entries[:, 0] + 2 * entries[:, 1]
    payload = body[ENTRY_BYTES * count :]
    if int(sizes.sum()) * 2 != payload.nbytes:
        raise MalformedBlob(
            f"the directory accounts for {int(sizes.sum()) * 2} payload bytes, there are {payload.nbytes}"
        )
    pos = np.cumsum(sizes) - sizes
    tables = [
        SegmentTable(
            pos=pos[part],
            words=np.ascontiguousarray(entries[part, 0]),
            escapes=np.ascontiguousarray(entries[part, 1]),
        )
        for part in (slice(0, count // 2), slice(count // 2, count))
    ]
    words = np.frombuffer(payload, "<u2")
    if not words.flags.aligned:  # an odd address in someone's buffer: copy once
        words = np.frombuffer(bytes(payload), "<u2")
    words.flags.writeable = False  # whatever the buffer was: numba compiles anew for each kind of array
    return words, tables[0], tables[1]
