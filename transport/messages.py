"""The transfer protocol's vocabulary: what greetings and messages hold. Plain data; transport/wire.py has the bytes.

`incarnation` names the sender's life (a restarted worker has a new one), `epoch` the link session (chosen by the
sink, rising), `seq` counts messages of one direction of one session from 1. A gap in `seq` means that something was
lost, and ends the session; 0 is for the two messages that are sent outside a session (TURNED_AWAY, RESET).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

PROTOCOL_VERSION = 3  # 2: priorities up to 2^53, refinements; 3: layers of chunks
Buffer = bytes | bytearray | memoryview


@dataclass(frozen=True, slots=True, kw_only=True)
class Greeting:
    """What both ends must agree on before a byte of KV moves; compared field by field."""

    model_fingerprint: str
    kv_layout: str
    codec_profile: str
    parallel_shape: str = "tp1.pp1"
    protocol_version: int = PROTOCOL_VERSION

    def fields(self) -> dict[str, str | int]:
        return {
            "protocol_version": self.protocol_version,
            "model_fingerprint": self.model_fingerprint,
            "kv_layout": self.kv_layout,
            "parallel_shape": self.parallel_shape,
            "codec_profile": self.codec_profile,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Mismatch:
    """The first field in which two greetings differ."""

    field: str
    source_value: str
    sink_value: str

    def __str__(self) -> str:
        return (
            f"greeting refused: {self.field} differs: the source has {self.source_value!r}, "
            f"the receiver has {self.sink_value!r}; start both from the same model, profile and release"
        )


def find_mismatch(*, source: Mapping[str, str | int], sink: Mapping[str, str | int]) -> Mismatch | None:
    for name in {**source, **sink}:
        ours, theirs = source.get(name, "(absent)"), sink.get(name, "(absent)")
        if type(ours) is not type(theirs) or ours != theirs:
            return Mismatch(field=name, source_value=str(ours)[:256], sink_value=str(theirs)[:256])
    return None


# -- messages; the table in docs/transport.md says who sends which and when --


@dataclass(frozen=True, slots=True, kw_only=True)
class Hello:
    via: str  # the endpoint the sink connected to: a newer session over it replaces an older one
    fields: dict[str, str | int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Welcome:
    sent_us: int
    fields: dict[str, str | int]


@dataclass(frozen=True, slots=True, kw_only=True)
class TurnedAway:
    reason: str
    field: str
    source_value: str
    sink_value: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Open:
    transfer: str
    body: dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Accept:
    transfer: str
    body: dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    transfer: str
    chunk: int
    level: str
    ask: int  # the same number amends a standing request, a higher one asks anew
    priority: int  # lower is sooner; 0 or more


@dataclass(frozen=True, slots=True, kw_only=True)
class Withdraw:
    transfer: str
    chunk: int
    ask: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Fail:
    transfer: str
    chunk: int
    ask: int
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    transfer: str
    chunk: int
    ask: int
    level: str
    offset: int
    total: int
    sent_us: int  # the source's clock when it was committed to the socket
    data: Buffer
    # The blob that this is a part of, where both ends share memory (the simulator); never comes out of a socket.
    whole: memoryview | None = field(default=None, repr=False, compare=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Credit:
    limit_bytes: int  # payload bytes the source may have sent in this session, in all
    part_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Close:
    """Ends a transfer, from either side; from the source before an Accept it is a refusal."""

    transfer: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Ping:
    token: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Pong:
    token: int
    sent_us: int  # the sender's clock: with it a receiver knows when a part began its way


@dataclass(frozen=True, slots=True, kw_only=True)
class Reset:
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Goodbye:
    reason: str


Message = (
    Hello | Welcome | TurnedAway | Open | Accept | Request | Withdraw | Fail | Part
    | Credit | Close | Ping | Pong | Reset | Goodbye
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Packet:
    incarnation: str
    epoch: int
    seq: int
    message: Message


def turned_away(differs: Mismatch) -> TurnedAway:
    return TurnedAway(
        reason=str(differs),
        field=differs.field,
        source_value=differs.source_value,
        sink_value=differs.sink_value,
    )
