"""The blob's outer form: header, directory, pieces, checksums. Bytes in, plain data out; pure. SPEC.md is the text.

header 64 | directory 12 * K * S | pieces | crc32 4     K stages, S = 2 * L * H segments, K's then V's
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from codec.errors import BlobTooLarge, ChecksumMismatch, MalformedBlob, TruncatedBlob, WrongVersion
from codec.levels import LevelKind
from kernels.rans_reference import MAX_STAGES

MAGIC = b"KVSB"
VERSION = 2
HEADER = struct.Struct("<4sBBBB8s16sHHHHHHHBBQII")
HEADER_BYTES = HEADER.size
CRC_BYTES = 4
ENTRY = np.dtype([("words", "<u4"), ("exceptions", "<u4"), ("crc", "<u4")])
assert HEADER_BYTES == 64

MAX_TOKENS = 4096
MAX_LAYERS = 1024
MAX_HEADS = 1024
MAX_HEAD_DIM = 1024
MAX_DECODED_BYTES = 1 << 30  # of one chunk

FLAG_UNROTATED = 1  # keys were coded before RoPE: decoding needs the RopeTable
FLAG_SHIPPED = 2  # steps, means and table choices travel in the pieces
DTYPE_CODES = {"bfloat16": 1, "float16": 2, "float32": 3, "float8_e4m3fn": 4, "float8_e5m2": 5}
DTYPE_NAMES = {code: name for name, code in DTYPE_CODES.items()}
ITEM_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4, "float8_e4m3fn": 1, "float8_e5m2": 1}
LOSSLESS_PIECES = 2  # the coded bytes, the plain planes

Array = np.ndarray[Any, Any]
Range = tuple[int, int]  # start, stop


def bytes_of(array: Array) -> memoryview:
    """An array's bytes, shared if it is contiguous. (A plain memoryview cannot cast an empty array.)"""
    view: memoryview = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
    return view


@dataclass(frozen=True, slots=True, kw_only=True)
class BlobInfo:
    """A header, checked. layout: (layers, KV heads, head dim of K, head dim of V) of this blob."""

    level: str
    kind: LevelKind
    dtype: str
    is_unrotated: bool
    is_shipped: bool
    profile_id: str
    layout: tuple[int, int, int, int]
    first_layer: int
    first_head: int
    num_tokens: int
    first_stage: int
    stages: int
    body_bytes: int
    directory_crc: int = 0  # a refinement's: of the directory of the blob that it goes behind

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
    def directory_bytes(self) -> int:
        return self.stages * 2 * self.layout[0] * self.layout[1] * ENTRY.itemsize

    @property
    def is_refinement(self) -> bool:
        """Only the later stages: of use behind the earlier ones alone."""
        return self.first_stage > 0

    @property
    def layers(self) -> Range:
        return self.first_layer, self.first_layer + self.layout[0]

    @property
    def heads(self) -> Range:
        return self.first_head, self.first_head + self.layout[1]


def pack_header(info: BlobInfo) -> bytes:
    flags = FLAG_UNROTATED * info.is_unrotated | FLAG_SHIPPED * info.is_shipped
    fields = (
        MAGIC, VERSION, int(info.kind), DTYPE_CODES[info.dtype], flags, info.level.encode("ascii"),
        bytes.fromhex(info.profile_id), *info.layout, info.first_layer, info.first_head, info.num_tokens,
        info.first_stage, info.stages, info.body_bytes, info.directory_crc,
    )  # fmt: skip
    head = HEADER.pack(*fields, 0)[:-4]
    return head + struct.pack("<I", zlib.crc32(head))


def parse_header(blob: memoryview) -> BlobInfo:
    """Checks the header alone, its own checksum included; reads nothing behind it. Raises BlobError subclasses."""
    if blob.nbytes < HEADER_BYTES:
        if blob.nbytes >= 5 and (bytes(blob[:4]) != MAGIC or blob[4] != VERSION):
            raise WrongVersion("not a kvstream blob of this version")
        raise TruncatedBlob(f"{blob.nbytes} bytes are fewer than a header's {HEADER_BYTES}")
    fields = HEADER.unpack(blob[:HEADER_BYTES])
    magic, version, kind, dtype, flags, level, profile_id, *numbers = fields
    layers, heads, dim_k, dim_v, first_layer, first_head, tokens, first_stage, stages, body, directory_crc, crc = (
        numbers
    )
    if magic != MAGIC:
        raise WrongVersion(f"not a kvstream blob: starts with {magic!r}, not {MAGIC!r}")
    if version != VERSION:
        raise WrongVersion(f"blob version {version}, this build reads {VERSION}; run the same kvstream on both ends")
    if zlib.crc32(blob[: HEADER_BYTES - 4]) != crc:
        raise ChecksumMismatch("the header's checksum does not fit: the bytes changed on the way")
    name = level.rstrip(b"\0")
    if kind > 2 or dtype not in DTYPE_NAMES or flags > 3 or not name or not name.isascii() or b"\0" in name:
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
        profile_id=profile_id.hex(), layout=(layers, heads, dim_k, dim_v), first_layer=first_layer,
        first_head=first_head, num_tokens=tokens, first_stage=first_stage, stages=stages, body_bytes=body,
        directory_crc=directory_crc,
    )  # fmt: skip
    if info.decoded_bytes > MAX_DECODED_BYTES:
        raise BlobTooLarge(
            f"the chunk would decode to {info.decoded_bytes} bytes, over the limit of {MAX_DECODED_BYTES}"
        )
    _check_stages(info)
    return info


def _check_stages(info: BlobInfo) -> None:
    stages = {LevelKind.RAW: 0, LevelKind.LOSSLESS: LOSSLESS_PIECES}.get(info.kind)
    if info.kind is LevelKind.QUANTIZED:
        if not 1 <= info.stages <= MAX_STAGES - info.first_stage:
            raise MalformedBlob(
                f"stages {info.first_stage} to {info.first_stage + info.stages}, there are {MAX_STAGES}"
            )
    elif info.stages != stages or info.first_stage or info.is_unrotated:
        raise MalformedBlob("the header's coding fields do not go with its kind")
    if info.kind is LevelKind.RAW and (info.is_shipped or info.directory_crc or info.body_bytes != info.decoded_bytes):
        raise MalformedBlob(f"{info.body_bytes} raw bytes, the layout needs {info.decoded_bytes}")
    if info.body_bytes < info.directory_bytes:
        raise MalformedBlob("the body is shorter than its directory")


def check_size(blob: memoryview, info: BlobInfo) -> None:
    if blob.nbytes < info.total_bytes:
        raise TruncatedBlob(f"{blob.nbytes} bytes came, the header says {info.total_bytes}; ask for the chunk again")
    if blob.nbytes > info.total_bytes:
        raise MalformedBlob(f"{blob.nbytes} bytes came, the header says {info.total_bytes}: something follows the blob")


def _seed_of(header: memoryview | bytes) -> int:
    """Where the blob's checksum starts: the header without its own, behind which every header would look the same."""
    return zlib.crc32(header[: HEADER_BYTES - CRC_BYTES])


def check_whole(blob: memoryview, info: BlobInfo) -> None:
    """Length and checksum of everything."""
    check_size(blob, info)
    crc = zlib.crc32(blob[HEADER_BYTES:-CRC_BYTES], _seed_of(blob))
    if crc != int.from_bytes(blob[-CRC_BYTES:], "little"):
        raise ChecksumMismatch("the checksum does not fit: the bytes changed on the way; ask for the chunk again")


def stages_crc(blob: memoryview, info: BlobInfo, stages: int) -> int:
    """CRC-32 of the directory of all stages of the chunk before the blob's own number `stages`, from its contents.

    It names an encoding up to there: each entry has its piece's checksum. A refinement carries it in its header.
    """
    end = HEADER_BYTES + info.directory_bytes // max(info.stages, 1) * stages
    return zlib.crc32(blob[HEADER_BYTES:end], info.directory_crc if info.is_refinement else 0)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Directory:
    """entries [K, 2, L, H] of ENTRY; start [K, 2, L, H]: each piece's first word in `words`, the payload as uint16."""

    entries: Array
    start: Array
    words: Array

    def piece(self, where: tuple[int, ...]) -> memoryview:
        at = int(self.start[where])
        return bytes_of(self.words[at : at + int(self.entries[where]["words"])])

    def check_pieces(self, layers: slice, heads: slice) -> None:
        """The checksums of some pieces, reading no other."""
        for where in np.ndindex(*self.entries[:, :, layers, heads].shape):
            stage, which, layer, head = where
            place = (stage, which, layer + (layers.start or 0), head + (heads.start or 0))
            if zlib.crc32(self.piece(place)) != int(self.entries[place]["crc"]):
                raise ChecksumMismatch(
                    f"the checksum of {'KV'[which]} of layer {place[2]}, head {place[3]} does not fit; ask for it again"
                )


def parse_directory(blob: memoryview, info: BlobInfo) -> Directory:
    """The directory, which must account for every byte of the body. Reads nothing behind it.

    A refinement's is checked by `check_whole` alone: its header has the checksum of the coarser blob's directory.
    """
    check_size(blob, info)
    end = HEADER_BYTES + info.directory_bytes
    if not info.is_refinement and stages_crc(blob, info, info.stages) != info.directory_crc:
        raise ChecksumMismatch("the directory's checksum does not fit: the bytes changed on the way")
    layers, heads, dim_k, dim_v = info.layout
    entries = np.frombuffer(blob[HEADER_BYTES:end], ENTRY).reshape(info.stages, 2, layers, heads)
    sizes = entries["words"].astype(np.int64)
    dims = np.array([dim_k, dim_v])[None, :, None, None]
    if (sizes > 4 * info.num_tokens * dims + 4 * dims + 128 + 4 * entries["exceptions"].astype(np.int64)).any():
        raise MalformedBlob("the directory claims a piece larger than any encoder writes")
    if (entries["exceptions"] > info.num_tokens * dims).any() or (
        4 * entries["exceptions"].astype(np.int64) > sizes
    ).any():
        raise MalformedBlob("the directory claims more exceptions than a piece has room for")
    payload = blob[end:-CRC_BYTES]
    if 2 * int(sizes.sum()) != payload.nbytes:
        raise MalformedBlob(f"the directory accounts for {2 * int(sizes.sum())} bytes, there are {payload.nbytes}")
    words = np.frombuffer(payload, "<u2")
    if not words.flags.aligned:  # an odd address in someone's buffer: copy once
        words = np.frombuffer(bytes(payload), "<u2")
    words.flags.writeable = False  # whatever the buffer was: numba compiles anew for each kind of array
    start = (np.cumsum(sizes.ravel()) - sizes.ravel()).reshape(sizes.shape)
    return Directory(entries=entries, start=start, words=words)


def make_entries(words: Array, exceptions: Array, parts: Sequence[Array]) -> Array:
    """words, exceptions [K, 2, L, H]; parts: the pieces' bytes, an array for each (stage, K or V) -> entries."""
    entries = np.zeros(words.shape, ENTRY)
    entries["words"], entries["exceptions"] = words, exceptions
    crcs = []
    for part, sizes in zip(parts, (2 * words).reshape(len(parts), -1).tolist(), strict=True):
        view, at = bytes_of(part), 0
        for size in sizes:
            crcs.append(zlib.crc32(view[at : at + size]))
            at += size
        assert at == view.nbytes
    entries["crc"] = np.array(crcs).reshape(words.shape)
    return entries


def assemble(info: BlobInfo, entries: Array | None, parts: Sequence[memoryview | bytes]) -> bytes:
    """header + directory + parts + checksum, copied once. Sizes and the directory's checksum are filled in here
    (a refinement's names what it goes behind: the caller's to know)."""
    directory = b"" if entries is None else entries.tobytes()
    body = len(directory) + sum(memoryview(part).nbytes for part in parts)
    crc = info.directory_crc if info.is_refinement else zlib.crc32(directory)
    header = pack_header(replace(info, body_bytes=body, directory_crc=crc))
    crc = _seed_of(header)
    for part in (directory, *parts):
        crc = zlib.crc32(part, crc)
    return b"".join([header, directory, *parts, crc.to_bytes(CRC_BYTES, "little")])
