"""The transfer protocol's bytes: what is encoded decodes to itself, and anything else is MalformedMessage."""

from __future__ import annotations

import zlib
from random import Random

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from transport import messages as msg
from transport.errors import LimitExceeded, MalformedMessage
from transport.limits import Limits
from transport.stream_messages import MAX_MESSAGE_BYTES, StreamMessage, decode_stream_message, encode_stream_message
from transport.wire import SCHEMA, decode_packet, encode_packet

LIMITS = Limits()
GREETING = msg.Greeting(model_fingerprint="m1", kv_layout="12x2x64", codec_profile="p1")
EXAMPLES: list[msg.Message] = [
    msg.Hello(via="tcp://a:1", fields=GREETING.fields()),
    msg.Welcome(sent_us=5, fields=GREETING.fields()),
    msg.TurnedAway(reason="differs", field="kv_layout", source_value="a", sink_value="b"),
    msg.Open(transfer="t1", body={"tokens": [1, 2, 3], "nested": {"x": None}}),
    msg.Accept(transfer="t1", body={}),
    msg.Request(transfer="t1", chunk=3, level="q2", ask=1, priority=2**53 - 1),
    msg.Withdraw(transfer="t1", chunk=3, ask=1),
    msg.Fail(transfer="t1", chunk=3, ask=1, reason="gone"),
    msg.Part(transfer="t1", chunk=3, ask=1, level="q2", offset=2, total=9, sent_us=7, data=b"blob"),
    msg.Credit(limit_bytes=2**40, part_bytes=65536),
    msg.Close(transfer="t1", reason=""),
    msg.Ping(token=1),
    msg.Pong(token=1, sent_us=2),
    msg.Reset(reason="no such session"),
    msg.Goodbye(reason="bye"),
]


def packet(message: msg.Message) -> msg.Packet:
    return msg.Packet(incarnation="life-1", epoch=2, seq=3, message=message)


def test_every_kind_has_an_example() -> None:
    assert {type(example) for example in EXAMPLES} == set(SCHEMA)


@pytest.mark.parametrize("message", EXAMPLES, ids=lambda m: type(m).__name__)
def test_round_trip(message: msg.Message) -> None:
    frames = encode_packet(packet(message))
    assert decode_packet(frames, LIMITS) == packet(message)
    assert encode_packet(decode_packet(frames, LIMITS)) == frames


def test_part_data_is_not_copied() -> None:
    blob = memoryview(bytes(100_000))
    part = msg.Part(transfer="t", chunk=0, ask=1, level="raw", offset=0, total=100_000, sent_us=0, data=blob)
    frames = encode_packet(packet(part))
    assert frames[1] is blob
    decoded = decode_packet(frames, LIMITS).message
    assert isinstance(decoded, msg.Part) and decoded.data is blob


@pytest.mark.parametrize("message", EXAMPLES, ids=lambda m: type(m).__name__)
def test_every_flipped_bit_of_a_header_is_noticed(message: msg.Message) -> None:
    frames = encode_packet(packet(message))
    for bit in range(len(frames[0]) * 8):
        damaged = bytearray(frames[0])
        damaged[bit // 8] ^= 1 << bit % 8
        with pytest.raises(MalformedMessage):
            decode_packet([bytes(damaged), *frames[1:]], LIMITS)


@pytest.mark.parametrize("message", EXAMPLES, ids=lambda m: type(m).__name__)
def test_truncation_and_extra_frames(message: msg.Message) -> None:
    frames = encode_packet(packet(message))
    for stop in range(len(frames[0])):
        with pytest.raises(MalformedMessage):
            decode_packet([frames[0][:stop], *frames[1:]], LIMITS)
    for wrong in ([], frames[:1] if len(frames) == 2 else [*frames, b""], [*frames, b"", b""]):
        with pytest.raises(MalformedMessage):
            decode_packet(wrong, LIMITS)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.binary(max_size=64), max_size=4))
def test_garbage(frames: list[bytes]) -> None:
    with pytest.raises(MalformedMessage):
        decode_packet(frames, LIMITS)


scalars = st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats()
anything = st.recursive(
    scalars | st.text(max_size=5) | st.binary(max_size=5),
    lambda children: st.lists(children, max_size=5) | st.dictionaries(st.text(max_size=3), children, max_size=3),
    max_leaves=10,
)


@settings(max_examples=300, deadline=None)
@given(kind=st.integers(0, 16), head=st.lists(anything, max_size=11), tail=st.lists(st.binary(max_size=9), max_size=1))
def test_well_sealed_nonsense(kind: int, head: list[object], tail: list[bytes]) -> None:
    """Right checksum, wrong content: only MalformedMessage may come, or a packet that is in fact valid."""
    header = msgpack.packb([kind, *head])
    body = tail[0] if tail and kind in (4, 5) else b""
    frame = zlib.crc32(body, zlib.crc32(header)).to_bytes(4, "little") + header
    try:
        decoded = decode_packet([frame, *tail], LIMITS)
    except MalformedMessage:
        return
    assert decode_packet(encode_packet(decoded), LIMITS) == decoded


def test_limits_are_checked_before_memory_is_taken() -> None:
    small = Limits(header_bytes=256, body_bytes=64, part_bytes=8, blob_bytes=100)

    def part(**changes: object) -> list[msg.Buffer]:
        plain: dict[str, object] = {"transfer": "t", "chunk": 0, "ask": 1, "level": "raw", "sent_us": 0}
        values = {**plain, "offset": 0, "total": 9, "data": b"123456789", **changes}
        return encode_packet(packet(msg.Part(**values)))  # type: ignore[arg-type]

    for frames in (
        part(),  # the part is too large
        part(total=101, data=b"12"),  # the blob would be
        encode_packet(packet(msg.Open(transfer="t", body={"x": "y" * 100}))),
        encode_packet(packet(msg.Reset(reason="r" * 300))),
    ):
        with pytest.raises(LimitExceeded):
            decode_packet(frames, small)
    for frames in (part(offset=2, data=b"12345678"), part(offset=9, data=b""), part(level="")):
        with pytest.raises(MalformedMessage):
            decode_packet(frames, small)


def test_a_mismatch_names_the_field_and_both_values() -> None:
    other = msg.Greeting(model_fingerprint="m1", kv_layout="24x8x128", codec_profile="p1")
    differs = msg.find_mismatch(source=GREETING.fields(), sink=other.fields())
    assert differs is not None
    for word in ("kv_layout", "12x2x64", "24x8x128"):
        assert word in str(differs)
    assert msg.find_mismatch(source=GREETING.fields(), sink=GREETING.fields()) is None
    # A field that only a newer release knows is a difference too, not an accident.
    newer = msg.find_mismatch(source=GREETING.fields(), sink={**GREETING.fields(), "adapter": "x"})
    assert newer is not None and newer.source_value == "(absent)"


def test_stream_messages() -> None:
    message = StreamMessage(kind="EVENT", stream=4, seq=2, last=True, body={"token": 17})
    assert decode_stream_message(encode_stream_message(message)) == message
    with pytest.raises(LimitExceeded):
        encode_stream_message(StreamMessage(kind="SUBMIT", body={"x": bytes(MAX_MESSAGE_BYTES)}))
    random = Random(1)
    for _ in range(2000):
        with pytest.raises(MalformedMessage):
            decode_stream_message(random.randbytes(random.randrange(40)))
