"""The profile's file: plain data and arrays <-> bytes. Never pickle; every size is checked before it is taken.

Little-endian: magic "KVSP", version u16, then one msgpack map {"meta": {...}, "arrays": {name: [dtype, shape, zlib
bytes]}}.
"""

from __future__ import annotations

import math
import zlib
from pathlib import Path
from typing import Any

import msgpack
import numpy as np

from codec.decorrelate import pack_matrix, unpack_matrix
from codec.errors import InvalidProfile

__all__ = ["canonical", "pack_matrix", "read", "unpack_matrix", "write"]

MAGIC = b"KVSP"
VERSION = 2
MAX_FILE_BYTES = 256 << 20
MAX_ARRAY_BYTES = 256 << 20  # of all arrays together
_DTYPES = {
    "u1": np.uint8,
    "b1": np.bool_,
    "u2": np.uint16,
    "i1": np.int8,
    "i2": np.int16,
    "i8": np.int64,
    "f4": np.float32,
}

Meta = dict[str, Any]
Arrays = dict[str, np.ndarray]


def _plain(array: np.ndarray) -> tuple[str, list[int], bytes]:
    little = np.ascontiguousarray(array).astype(array.dtype.newbyteorder("<"))
    return array.dtype.str[1:], list(array.shape), little.tobytes()


def canonical(meta: Meta, arrays: Arrays) -> bytes:
    """What a profile's id is the hash of: its contents, whatever compressed them."""
    body: bytes = msgpack.packb({"meta": meta, "arrays": {name: _plain(array) for name, array in arrays.items()}})
    return body


def write(path: Path, meta: Meta, arrays: Arrays) -> None:
    """Whole or not at all."""
    packed = {}
    for name, array in arrays.items():
        dtype, shape, data = _plain(array)
        packed[name] = [dtype, shape, zlib.compress(data, 9)]
    part = path.with_name(path.name + ".part")
    part.write_bytes(MAGIC + VERSION.to_bytes(2, "little") + msgpack.packb({"meta": meta, "arrays": packed}))
    part.replace(path)


def read(path: Path) -> tuple[Meta, Arrays]:
    """Raises InvalidProfile, or OSError when there is no file."""
    if path.stat().st_size > MAX_FILE_BYTES:
        raise InvalidProfile(f"{path} is larger than any profile ({MAX_FILE_BYTES} bytes)")
    data = path.read_bytes()
    if data[:4] != MAGIC:
        raise InvalidProfile(f"{path} is not a kvstream profile; make one with `kvstream calibrate`")
    version = int.from_bytes(data[4:6], "little")
    if version != VERSION:
        raise InvalidProfile(f"{path} has profile version {version}, this build reads {VERSION}; calibrate again")
    try:
        body = msgpack.unpackb(data[6:])
        if sum(_size_of(entry) for entry in body["arrays"].values()) > MAX_ARRAY_BYTES:
            raise InvalidProfile(f"the arrays in {path} are over the limit of {MAX_ARRAY_BYTES} bytes")
        return body["meta"], {name: _unpack(entry) for name, entry in body["arrays"].items()}
    except InvalidProfile:
        raise
    except Exception as error:  # any malformation of an untrusted file, whatever library notices it first
        raise InvalidProfile(f"{path} is damaged ({type(error).__name__}); run `kvstream calibrate` again") from error


def _size_of(entry: list[Any]) -> int:
    if any(int(n) < 0 for n in entry[1]):
        raise InvalidProfile("an array has a negative size")
    return math.prod(int(n) for n in entry[1]) * np.dtype(_DTYPES[entry[0]]).itemsize


def _unpack(entry: list[Any]) -> np.ndarray:
    dtype = np.dtype(_DTYPES[entry[0]]).newbyteorder("<")
    data = zlib.decompressobj().decompress(entry[2], _size_of(entry) + 1)
    return np.frombuffer(data, dtype).astype(dtype.newbyteorder("=")).reshape(entry[1])
