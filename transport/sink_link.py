"""What a Sink remembers: a Link is one session with one source, a Transfer and its Asks ride on it. Pure.

A Link numbers what it sends, admits what comes, grants credit and keeps time; it appends its commands to the Sink's
list.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from transport.limits import Pacing, Timing
from transport.messages import Credit, Goodbye, Hello, Message, Packet, Part, Ping, Pong, Welcome
from transport.pacing import LinkPacer
from transport.sink_io import Command, Send


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkStats:
    endpoint: str
    rate_bps: float | None  # bits per second; None before it was measured
    rtt_s: float | None
    window_bytes: int
    part_bytes: int
    granted_ahead_bytes: int  # the most that may be on its way now
    received_bytes: int
    num_transfers: int
    suspect: bool


@dataclass(slots=True, kw_only=True, eq=False)
class Ask:
    number: int
    level: str
    priority: int
    blob: bytearray | memoryview | None = None  # from the first part on
    filled: int = 0
    started_at: float = 0.0
    wire_s: float = 0.0

    def add(self, part: Part, wire_s: float, now: float) -> bool:
        """One memcpy into the one buffer. False if this is not the part that comes next."""
        if self.blob is None:
            # A blob that came in one part, or whose memory the source shares with us, is taken from where it lies.
            lies_here = memoryview(part.data) if len(part.data) == part.total else part.whole
            self.blob = bytearray(part.total) if lies_here is None else lies_here
            self.level = part.level
            self.started_at = now - wire_s
        if part.offset != self.filled or part.total != len(self.blob):
            return False
        size = len(part.data)
        if type(self.blob) is bytearray:
            self.blob[part.offset : part.offset + size] = part.data
        self.filled += size
        self.wire_s += wire_s
        return True


@dataclass(slots=True, kw_only=True, eq=False)
class Transfer:
    id: str
    link: Link = field(repr=False)
    opened: bool = False
    next_ask: int = 1
    asks: dict[int, Ask] = field(default_factory=dict)  # chunk -> what is outstanding


@dataclass(frozen=True, slots=True, kw_only=True)
class Broken:
    """Why a link cannot go on."""

    reason: str


class Link:
    def __init__(
        self,
        *,
        endpoint: str,
        incarnation: str,
        epoch: int,
        pacing: Pacing,
        now: float,
        out: list[Command],
    ) -> None:
        self.name = f"{incarnation}/{epoch}"
        self.endpoint = endpoint
        self.epoch = epoch
        self.suspect = False
        self.last_heard = now
        self.idle_since: float | None = None  # no transfers since
        self.transfers: dict[str, Transfer] = {}
        self._incarnation = incarnation
        self._peer_incarnation: str | None = None  # None until welcomed
        self._out = out
        self._in_seq = self._out_seq = 0
        self._hello_at = now
        self._ping_token, self._ping_at = 0, 0.0
        self._pacer = LinkPacer(pacing)
        self.received_bytes = 0
        self._granted_bytes = self._granted_part_bytes = 0

    def send(self, message: Message) -> None:
        self._out_seq += 1
        packet = Packet(incarnation=self._incarnation, epoch=self.epoch, seq=self._out_seq, message=message)
        self._out.append(Send(link=self.name, packet=packet))

    def greet(self, fields: dict[str, str | int]) -> None:
        # Opens and requests follow at once, without waiting for the welcome: a round trip saved on a WAN.
        self.send(Hello(via=self.endpoint, fields=fields))
        self._grant()

    def admit(self, packet: Packet, now: float) -> bool | Broken:
        """False: drop it, it is of another life or a duplicate."""
        if self._peer_incarnation not in (None, packet.incarnation) or packet.seq <= self._in_seq:
            return False
        if packet.seq != self._in_seq + 1:
            return Broken(reason=f"messages {self._in_seq + 1} to {packet.seq - 1} from {self.endpoint} were lost")
        if self._peer_incarnation is None:
            if type(packet.message) is not Welcome:
                return Broken(reason=f"the source at {self.endpoint} spoke before its welcome")
            self._peer_incarnation = packet.incarnation
        self._in_seq = packet.seq
        self.last_heard = now
        return True

    def on_welcome(self, message: Welcome, now: float) -> None:
        self._pacer.on_departure(message.sent_us, now)
        # Connecting included, but nothing of ours was queued yet: a later pong may come behind many parts.
        self._pacer.on_rtt(now - self._hello_at, now)
        self._ping(now)

    def on_pong(self, message: Pong, now: float) -> None:
        self._pacer.on_departure(message.sent_us, now)
        if message.token == self._ping_token:
            self._pacer.on_rtt(now - self._ping_at, now)

    def on_part(self, part: Part, now: float) -> float | Broken:
        """Count it, whoever it is for, and grant anew. Returns its wire_s."""
        self.received_bytes += len(part.data)
        if self.received_bytes > self._granted_bytes:
            return Broken(reason=f"{self.endpoint} sent more than it was granted")
        wire_s = self._pacer.on_part(len(part.data), sent_us=part.sent_us, at=now)
        self._grant()
        return wire_s

    def tick(self, timing: Timing, now: float) -> Broken | None:
        if now - self.last_heard >= timing.lease_s:
            return Broken(reason=f"no answer from {self.endpoint} for {timing.lease_s:g} s")
        if self.idle_since is not None and now - self.idle_since >= timing.idle_link_s:
            self.send(Goodbye(reason="idle"))
            return Broken(reason="idle")
        if now - self._ping_at >= timing.heartbeat_s and self._peer_incarnation is not None:
            self._ping(now)
        return None

    def _ping(self, now: float) -> None:
        self._ping_token += 1
        self._ping_at = now
        self.send(Ping(token=self._ping_token))

    def _grant(self) -> None:
        """Raise the credit when that is worth a message. What is not granted yet is under a quarter of the window,
        which holds two parts, and the source knows the part size: so it never waits with nothing on its way."""
        window_bytes, part_bytes = self._pacer.window_bytes, self._pacer.part_bytes
        limit_bytes = self.received_bytes + window_bytes
        worth_it = limit_bytes - self._granted_bytes >= min(part_bytes, window_bytes // 4)
        if worth_it or part_bytes != self._granted_part_bytes:
            self._granted_bytes = max(self._granted_bytes, limit_bytes)
            self._granted_part_bytes = part_bytes
            self.send(Credit(limit_bytes=self._granted_bytes, part_bytes=part_bytes))

    def stats(self) -> LinkStats:
        return LinkStats(
            endpoint=self.endpoint,
            rate_bps=None if self._pacer.rate is None else self._pacer.rate * 8,
            rtt_s=self._pacer.rtt_s,
            window_bytes=self._pacer.window_bytes,
            part_bytes=self._pacer.part_bytes,
            granted_ahead_bytes=self._granted_bytes - self.received_bytes,
            received_bytes=self.received_bytes,
            num_transfers=len(self.transfers),
            suspect=self.suspect,
        )

    def check_integrity(self) -> None:
        assert self.received_bytes <= self._granted_bytes
        assert (self.idle_since is None) == bool(self.transfers)
        for transfer_id, transfer in self.transfers.items():
            assert (transfer.id, transfer.link) == (transfer_id, self)
