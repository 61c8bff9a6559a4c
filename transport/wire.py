"""The bytes of the transfer protocol: encode_packet, and a strict decode_packet. Knows msgpack; no sockets.

A message is one or two frames:

    frame 0   CRC-32 (4 bytes, little-endian), msgpack array [kind, incarnation, epoch, seq, fields...]
    frame 1   PART: raw bytes of the blob; OPEN and ACCEPT: a msgpack map; else absent

The CRC covers the array and the map. A blob's bytes carry the codec's own checksum: what is delivered wrongly is told
apart from what is delivered to the wrong place.

Sizes are checked before anything is unpacked or memory is taken. Nothing is ever unpickled.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from operator import attrgetter
from typing import Any

import msgpack

from transport.errors import LimitExceeded, MalformedMessage
from transport.limits import Limits
from transport.messages import (
    Accept,
    Buffer,
    Close,
    Credit,
    Fail,
    Goodbye,
    Hello,
    Open,
    Packet,
    Part,
    Ping,
    Pong,
    Request,
    Reset,
    TurnedAway,
    Welcome,
    Withdraw,
)

# -- fields: each kind of value has one check --

Check = Callable[[Any, Limits], bool]


def _is_count(value: Any, limits: Limits) -> bool:
    return type(value) is int and 0 <= value < 2**53


def _is_id(value: Any, limits: Limits) -> bool:
    return type(value) is str and 0 < len(value) <= limits.id_chars


def _is_level(value: Any, limits: Limits) -> bool:
    return type(value) is str and 0 < len(value) <= limits.level_chars


def _is_text(value: Any, limits: Limits) -> bool:
    return type(value) is str and len(value) <= limits.reason_chars


def _is_fields(value: Any, limits: Limits) -> bool:
    return (
        type(value) is dict
        and len(value) <= 32
        and all(type(k) is str and len(k) <= 64 for k in value)
        and all(type(v) in (str, int) for v in value.values())
    )


_CHUNK: list[tuple[str, Check]] = [("transfer", _is_id), ("chunk", _is_count), ("ask", _is_count)]

# message type -> (kind, header fields in wire order, name of the field that travels as the second frame)
SCHEMA: dict[type, tuple[int, list[tuple[str, Check]], str | None]] = {
    Hello: (1, [("via", _is_text), ("fields", _is_fields)], None),
    Welcome: (2, [("sent_us", _is_count), ("fields", _is_fields)], None),
    TurnedAway: (
        3,
        [("reason", _is_text), ("field", _is_text), ("source_value", _is_text), ("sink_value", _is_text)],
        None,
    ),
    Open: (4, [("transfer", _is_id)], "body"),
    Accept: (5, [("transfer", _is_id)], "body"),
    Request: (6, [*_CHUNK, ("level", _is_level), ("priority", _is_count)], None),
    Withdraw: (7, _CHUNK, None),
    Fail: (8, [*_CHUNK, ("reason", _is_text)], None),
    Part: (
        9,
        [*_CHUNK, ("level", _is_level), ("offset", _is_count), ("total", _is_count), ("sent_us", _is_count)],
        "data",
    ),
    Credit: (10, [("limit_bytes", _is_count), ("part_bytes", _is_count)], None),
    Close: (11, [("transfer", _is_id), ("reason", _is_text)], None),
    Ping: (12, [("token", _is_count)], None),
    Pong: (13, [("token", _is_count), ("sent_us", _is_count)], None),
    Reset: (14, [("reason", _is_text)], None),
    Goodbye: (15, [("reason", _is_text)], None),
}
_BY_KIND = {kind: (cls, fields, second) for cls, (kind, fields, second) in SCHEMA.items()}


def _getter(fields: list[tuple[str, Check]]) -> Callable[[Any], tuple[Any, ...]]:
    get = attrgetter(*(name for name, _ in fields))
    return get if len(fields) > 1 else lambda message: (get(message),)


_ENCODE = {cls: (kind, _getter(fields), second) for cls, (kind, fields, second) in SCHEMA.items()}


def encode_packet(packet: Packet) -> list[Buffer]:
    """The frames of a packet. A part's data is passed on as it is, uncopied."""
    message = packet.message
    kind, values, second = _ENCODE[type(message)]
    header = msgpack.packb((kind, packet.incarnation, packet.epoch, packet.seq, *values(message)))
    if second is None:
        return [_seal(header)]
    if type(message) is Part:
        return [_seal(header), message.data]
    body = pack_body(message.body)  # type: ignore[union-attr]
    return [_seal(header, body), body]


def _seal(header: bytes, body: Buffer = b"") -> bytes:
    return zlib.crc32(body, zlib.crc32(header)).to_bytes(4, "little") + header


def decode_packet(frames: Sequence[Buffer], limits: Limits) -> Packet:
    """The packet in these frames. Raises MalformedMessage or LimitExceeded, and nothing else, whatever comes."""
    if not 1 <= len(frames) <= 2:
        raise MalformedMessage(f"a message has 1 or 2 frames, this has {len(frames)}")
    if len(frames[0]) > limits.header_bytes:
        raise LimitExceeded(f"header of {len(frames[0])} bytes, the limit is {limits.header_bytes}")
    stated, header = frames[0][:4], memoryview(frames[0])[4:]
    head = _unpack(header)
    if type(head) is not list or len(head) < 4 or type(head[0]) is not int or head[0] not in _BY_KIND:
        raise MalformedMessage("the header is no array that starts with a known kind, incarnation, epoch, seq")
    cls, fields, second = _BY_KIND[head[0]]
    sealed = frames[1] if second == "body" and len(frames) == 2 else b""
    if zlib.crc32(sealed, zlib.crc32(header)) != int.from_bytes(stated, "little"):
        raise MalformedMessage(f"{cls.__name__}: the header's checksum does not match")
    _, incarnation, epoch, seq, *values = head
    if not (_is_id(incarnation, limits) and _is_count(epoch, limits) and _is_count(seq, limits)):
        raise MalformedMessage(f"{cls.__name__}: bad incarnation, epoch or seq")
    if len(values) != len(fields):
        raise MalformedMessage(f"{cls.__name__} has {len(fields)} fields, this has {len(values)}")
    arguments: dict[str, Any] = {}
    for (name, check), value in zip(fields, values, strict=True):
        if not check(value, limits):
            raise MalformedMessage(f"{cls.__name__}.{name}: bad value {_shorten(value)}")
        arguments[name] = value
    if (second is not None) != (len(frames) == 2):
        raise MalformedMessage(f"{cls.__name__} with {len(frames)} frames")
    if second == "body":
        arguments["body"] = unpack_body(frames[1], limits)
    elif second == "data":
        arguments["data"] = _check_part(frames[1], arguments, limits)
    return Packet(incarnation=incarnation, epoch=epoch, seq=seq, message=cls(**arguments))


def _check_part(data: Buffer, part: dict[str, Any], limits: Limits) -> Buffer:
    if len(data) > limits.part_bytes:
        raise LimitExceeded(f"part of {len(data)} bytes, the limit is {limits.part_bytes}")
    if part["total"] > limits.blob_bytes:
        raise LimitExceeded(f"blob of {part['total']} bytes announced, the limit is {limits.blob_bytes}")
    if part["offset"] + len(data) > part["total"] or (not len(data) and part["total"]):
        raise MalformedMessage(f"part of {len(data)} bytes at {part['offset']} of {part['total']}")
    return data


def pack_body(body: Mapping[str, Any]) -> bytes:
    packed: bytes = msgpack.packb(body)
    return packed


def unpack_body(frame: Buffer, limits: Limits) -> dict[str, Any]:
    if len(frame) > limits.body_bytes:
        raise LimitExceeded(f"body of {len(frame)} bytes, the limit is {limits.body_bytes}")
    body = _unpack(frame)
    if type(body) is not dict or not all(type(key) is str for key in body):
        raise MalformedMessage("a body is a map with string keys")
    return body


def _unpack(frame: Buffer) -> Any:
    try:
        return msgpack.unpackb(frame, ext_hook=_refuse_extension)
    except (ValueError, TypeError, msgpack.UnpackException, RecursionError) as error:
        raise MalformedMessage(f"not msgpack: {_shorten(error)}") from None


def _refuse_extension(code: int, data: bytes) -> Any:
    raise ValueError(f"extension type {code}")


def _shorten(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
