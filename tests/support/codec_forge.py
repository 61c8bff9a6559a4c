"""Blobs taken apart, changed and put together again with checksums that hold: what no sender of ours would send."""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np

from codec.bitstream import CRC_BYTES, ENTRY, HEADER, HEADER_BYTES

FIELDS = {
    "magic": 0, "version": 1, "kind": 2, "dtype": 3, "flags": 4, "level": 5, "profile": 6, "layers": 7, "heads": 8,
    "dim_k": 9, "dim_v": 10, "first_layer": 11, "first_head": 12, "tokens": 13, "first_stage": 14, "stages": 15,
    "body": 16, "directory_crc": 17, "header_crc": 18,
}  # fmt: skip
CHECKSUMS = frozenset(("header", "directory", "pieces", "blob"))


@dataclass(frozen=True, slots=True)
class Parts:
    """A blob in parts: header fields by number (see FIELDS), directory entries [n], what each entry's piece holds."""

    fields: list[object]
    entries: np.ndarray
    pieces: list[bytes]
    plain: bytes = b""  # of a raw blob

    def copy(self) -> Parts:
        return replace(self, fields=list(self.fields), entries=self.entries.copy(), pieces=list(self.pieces))


def blob_crc(whole: bytes | bytearray) -> bytes:
    """The last four bytes: of everything but themselves and the header's checksum."""
    return struct.pack("<I", zlib.crc32(whole[HEADER_BYTES:], zlib.crc32(whole[: HEADER_BYTES - 4])))


def take_apart(blob: bytes) -> Parts:
    """A sound blob -> its parts."""
    fields = list(HEADER.unpack(blob[:HEADER_BYTES]))
    count = fields[FIELDS["stages"]] * 2 * fields[FIELDS["layers"]] * fields[FIELDS["heads"]]
    at = HEADER_BYTES + count * ENTRY.itemsize
    entries = np.frombuffer(blob[HEADER_BYTES:at], ENTRY).copy()
    if not count:
        return Parts(fields, entries, [], plain=blob[HEADER_BYTES:-CRC_BYTES])
    edges = at + np.concatenate([[0], np.cumsum(2 * entries["words"].astype(np.int64))])
    return Parts(fields, entries, [blob[a:b] for a, b in pairwise(edges)])


def put_together(parts: Parts, *, fit: bool = True, seal: frozenset[str] = CHECKSUMS) -> bytes:
    """fit: sizes in the directory and the header are those of the pieces. seal: which checksums are made to hold."""
    fields, entries = list(parts.fields), parts.entries.copy()
    for i, piece in enumerate(parts.pieces):
        if fit:
            entries[i]["words"] = len(piece) // 2
        if "pieces" in seal:
            entries[i]["crc"] = zlib.crc32(piece)
    directory = entries.tobytes()
    body = directory + b"".join(parts.pieces) + parts.plain
    if fit:
        fields[FIELDS["body"]] = len(body)
    if "directory" in seal and not fields[FIELDS["first_stage"]]:  # a refinement's is of another blob's directory
        fields[FIELDS["directory_crc"]] = zlib.crc32(directory) if directory else 0
    head = HEADER.pack(*fields)
    if "header" in seal:
        head = head[:-4] + struct.pack("<I", zlib.crc32(head[:-4]))
    return head + body + (blob_crc(head + body) if "blob" in seal else bytes(CRC_BYTES))


def seal(blob: bytes, *, fit_body: bool = False) -> bytes:
    """Whatever these bytes are: all checksums of a blob that can be found in them are made to hold."""
    if len(blob) < HEADER_BYTES + CRC_BYTES:
        return blob
    data, fields = bytearray(blob), list(HEADER.unpack(blob[:HEADER_BYTES]))
    if fit_body:
        fields[FIELDS["body"]] = len(blob) - HEADER_BYTES - CRC_BYTES
    count = fields[FIELDS["stages"]] * 2 * fields[FIELDS["layers"]] * fields[FIELDS["heads"]]
    at = HEADER_BYTES + count * ENTRY.itemsize
    if count and at + CRC_BYTES <= len(blob):
        entries = np.frombuffer(blob[HEADER_BYTES:at], ENTRY).copy()
        edges = np.concatenate([[0], np.cumsum(2 * entries["words"].astype(np.int64))]) + at
        for i in np.flatnonzero(edges[1:] <= len(blob) - CRC_BYTES):
            entries[i]["crc"] = zlib.crc32(blob[edges[i] : edges[i + 1]])
        data[HEADER_BYTES:at] = entries.tobytes()
        if not fields[FIELDS["first_stage"]]:
            fields[FIELDS["directory_crc"]] = zlib.crc32(data[HEADER_BYTES:at])
    head = HEADER.pack(*fields)[:-4]
    data[:HEADER_BYTES] = head + struct.pack("<I", zlib.crc32(head))
    data[-CRC_BYTES:] = blob_crc(data[:-CRC_BYTES])
    return bytes(data)


def forge(blob: bytes, **fields: object) -> bytes:
    """A sound blob with other header fields, sealed."""
    values = list(HEADER.unpack(blob[:HEADER_BYTES]))
    for name, value in fields.items():
        values[FIELDS[name]] = value
    head = HEADER.pack(*values)[:-4]
    whole = head + struct.pack("<I", zlib.crc32(head)) + blob[HEADER_BYTES:-CRC_BYTES]
    return whole + blob_crc(whole)


def bound_to(refinement: bytes, coarse: bytes) -> bytes:
    """The refinement as if it had been made from the encoding that `coarse` is cut from, whatever that is."""
    if len(coarse) < HEADER_BYTES:
        return refinement
    fields = HEADER.unpack(coarse[:HEADER_BYTES])
    count = fields[FIELDS["stages"]] * 2 * fields[FIELDS["layers"]] * fields[FIELDS["heads"]]
    return forge(refinement, directory_crc=zlib.crc32(coarse[HEADER_BYTES : HEADER_BYTES + count * ENTRY.itemsize]))


def outer_checksums_hold(blob: bytes) -> bool:
    """The header's, the directory's and the blob's: all that a reader of a whole blob relies on."""
    if len(blob) < HEADER_BYTES + CRC_BYTES:
        return False
    fields = HEADER.unpack(blob[:HEADER_BYTES])
    if fields[FIELDS["header_crc"]] != zlib.crc32(blob[: HEADER_BYTES - 4]):
        return False
    if blob[-CRC_BYTES:] != blob_crc(blob[:-CRC_BYTES]):
        return False
    count = fields[FIELDS["stages"]] * 2 * fields[FIELDS["layers"]] * fields[FIELDS["heads"]]
    directory = blob[HEADER_BYTES : HEADER_BYTES + count * ENTRY.itemsize]
    return not count or fields[FIELDS["first_stage"]] > 0 or zlib.crc32(directory) == fields[FIELDS["directory_crc"]]
