"""The bytes of a token stream: one msgpack frame a message, strictly decoded. Knows msgpack; no sockets.

[version, kind, stream, seq, last, body]

SUBMIT  client -> server   body = the request              stream = the client's number for it
CANCEL  client -> server   body = {}
EVENT   server -> client   body = one event, `last` ends the stream, seq counts a stream's events from 0
FAILED  server -> client   body = {"reason": ...}          ends the stream
PING, PONG                 body = {"incarnation": ...}     liveness; a new incarnation has lost all streams
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import msgpack

from transport.errors import LimitExceeded, MalformedMessage

STREAM_VERSION = 1
MAX_MESSAGE_BYTES = 4 * 1024 * 1024  # a submitted prompt of 1M tokens still fits

Kind = Literal["SUBMIT", "CANCEL", "EVENT", "FAILED", "PING", "PONG"]
_KINDS: tuple[Kind, ...] = ("SUBMIT", "CANCEL", "EVENT", "FAILED", "PING", "PONG")
_CODES: dict[Kind, int] = {kind: code for code, kind in enumerate(_KINDS, start=1)}


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamMessage:
    kind: Kind
    stream: int = 0
    seq: int = 0
    last: bool = False
    body: dict[str, Any]


def encode_stream_message(message: StreamMessage) -> bytes:
    """Raises LimitExceeded for a body that is too large; TypeError for one that msgpack cannot carry."""
    frame = msgpack.packb(
        (STREAM_VERSION, _CODES[message.kind], message.stream, message.seq, message.last, message.body)
    )
    if len(frame) > MAX_MESSAGE_BYTES:
        raise LimitExceeded(f"a message of {len(frame)} bytes, the limit is {MAX_MESSAGE_BYTES}")
    return frame


def decode_stream_message(frame: bytes) -> StreamMessage:
    """Raises MalformedMessage, and nothing else, whatever comes."""
    if len(frame) > MAX_MESSAGE_BYTES:
        raise LimitExceeded(f"a message of {len(frame)} bytes, the limit is {MAX_MESSAGE_BYTES}")
    try:
        parts = msgpack.unpackb(frame)
    except (ValueError, TypeError, msgpack.UnpackException, RecursionError):
        raise MalformedMessage("not msgpack") from None
    if type(parts) is not list or len(parts) != 6:
        raise MalformedMessage("no array of six")
    version, code, stream, seq, last, body = parts
    if version != STREAM_VERSION:
        raise MalformedMessage(f"stream protocol version {version!r}, here is {STREAM_VERSION}")
    counts_ok = all(type(count) is int and 0 <= count < 2**53 for count in (code, stream, seq))
    if not counts_ok or not 1 <= code <= len(_KINDS) or type(last) is not bool:
        raise MalformedMessage("bad kind, stream, seq or last")
    if type(body) is not dict or not all(type(key) is str for key in body):
        raise MalformedMessage("a body is a map with string keys")
    return StreamMessage(kind=_KINDS[code - 1], stream=stream, seq=seq, last=last, body=body)
