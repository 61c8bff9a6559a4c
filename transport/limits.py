"""The stated limits and times of the transfer protocol, in one place. Plain numbers; imports nothing of ours."""

from __future__ import annotations

from dataclasses import dataclass

KB = 1024
MB = 1024 * KB


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Checked before memory is taken, at the sender and again at the receiver."""

    header_bytes: int = 4 * KB
    body_bytes: int = 1 * MB  # of an open or accept: token ids of a long prompt are ~3 bytes each
    part_bytes: int = 256 * KB
    blob_bytes: int = 256 * MB  # one encoded chunk
    chunks_per_transfer: int = 4096
    transfers_per_peer: int = 256
    peers: int = 1024
    assembling_bytes: int = 1024 * MB  # at the sink: blobs of which a part has arrived
    queued_bytes: int = 4096 * MB  # at the source: blobs supplied and not yet sent
    id_chars: int = 128
    level_chars: int = 64
    reason_chars: int = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """Seconds."""

    heartbeat_s: float = 0.25
    suspect_s: float = 3.0  # silent for so long: work is routed around the peer
    lease_s: float = 10.0  # silent for so long: expired, what it held is reaped
    idle_link_s: float = 60.0  # a link without transfers is given up after this long


@dataclass(frozen=True, slots=True, kw_only=True)
class Pacing:
    """How much is committed to a link. The sink computes the window and the part size and grants both."""

    gain: float = 1.5
    startup_gain: float = 2.0  # at first, while the measured rate grows by a quarter from sample to sample
    scheduling_slack_s: float = 0.005  # a busy Python thread keeps the interpreter lock for up to 5 ms
    part_s: float = 0.01  # a part should take about this long on the link ...
    min_part_bytes: int = 8 * KB
    first_part_bytes: int = 32 * KB  # ... and this is its size before the rate is known
    max_part_bytes: int = 256 * KB
    min_window_parts: int = 2
    max_window_bytes: int = 8 * MB
