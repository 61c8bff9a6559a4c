"""What the disk tier writes: a blob's record and a chunk's record, as bytes and back. Pure; docs/store.md is the text.

Both begin with a CRC-32 that covers the rest and the name, so that a record cut short, changed, or found under another
name reads as damaged and never as another blob.
"""

from __future__ import annotations

import math
import struct
import zlib
from dataclasses import dataclass
from typing import Any

import msgpack

from prefill.tier_index import ChunkMeta

FORMAT = 2  # of everything that stands in a store's directory
BLOB_HEADER = struct.Struct("<4sIQ")  # magic, CRC-32, the blob's bytes
MAGIC = b"KVSR"
CRC = struct.Struct("<I")
USED_AT = struct.Struct("<d")  # seconds since the epoch


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkRecord:
    """levels: bytes of each blob."""

    meta: ChunkMeta
    levels: dict[str, int]


def blob_name(key: bytes, level: str) -> bytes:
    return key + b"\0" + level.encode()


def blob_header(name: bytes, blob: bytes) -> bytes:
    return BLOB_HEADER.pack(MAGIC, _blob_crc(name, len(blob), blob), len(blob))


def read_blob(name: bytes, record: memoryview) -> bytes | None:
    """The blob, copied; None if the record is damaged."""
    if record.nbytes < BLOB_HEADER.size:
        return None
    magic, crc, size = BLOB_HEADER.unpack(record[: BLOB_HEADER.size])
    body = record[BLOB_HEADER.size :]
    if magic != MAGIC or size != body.nbytes or crc != _blob_crc(name, size, body):
        return None
    return bytes(body)


def _blob_crc(name: bytes, size: int, body: bytes | memoryview) -> int:
    return zlib.crc32(body, zlib.crc32(name + size.to_bytes(8, "little")))


def pack_chunk(key: bytes, record: ChunkRecord) -> bytes:
    meta = record.meta
    body: bytes = msgpack.packb([meta.kl, meta.tenant, meta.parent, record.levels, meta.links, meta.is_tail])
    return CRC.pack(zlib.crc32(body, zlib.crc32(key))) + body


def read_chunk(key: bytes, record: bytes) -> ChunkRecord | None:
    """None if it is damaged."""
    if len(record) < CRC.size or CRC.unpack(record[: CRC.size])[0] != zlib.crc32(record[CRC.size :], zlib.crc32(key)):
        return None
    fields: Any = msgpack.unpackb(record[CRC.size :])
    kl, tenant, parent, levels, links, is_tail = fields
    meta = ChunkMeta(kl=kl, tenant=tenant, parent=parent, links=links, is_tail=is_tail)
    return ChunkRecord(meta=meta, levels=levels)


def pack_used_at(used_at: float) -> bytes:
    return USED_AT.pack(used_at)


def read_used_at(packed: bytes | None) -> float:
    """0.0, the first to go, if it is damaged or missing: no reason to lose the chunk."""
    if packed is None or len(packed) != USED_AT.size:
        return 0.0
    used_at: float = USED_AT.unpack(packed)[0]
    return used_at if math.isfinite(used_at) else 0.0
