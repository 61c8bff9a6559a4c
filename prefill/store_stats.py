"""What the chunk store says of itself. Plain data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True, kw_only=True)
class TenantBytes:
    """Payload in each tier, of a tenant. As a cap: None means no more than the tier's capacity."""

    ram_bytes: int | None = None
    disk_bytes: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreStats:
    """num_chunks to taken_bytes, num_evictions: of the tier in RAM; taken_bytes: what it has from the system. Tails,
    the ends of sequences, are not among num_chunks and disk_chunks. num_hits: in either tier. disk_skipped: puts that
    the disk did not take at once; damaged: blobs found so."""

    num_chunks: int
    num_blobs: int
    used_bytes: int
    capacity_bytes: int
    num_hits: int
    num_misses: int
    num_evictions: int
    num_tails: int = 0
    taken_bytes: int = 0
    num_disk_hits: int = 0
    disk_chunks: int = 0
    disk_tails: int = 0
    disk_used_bytes: int = 0
    disk_file_bytes: int = 0
    disk_capacity_bytes: int = 0
    num_disk_evictions: int = 0
    num_disk_skipped: int = 0
    num_disk_failed_writes: int = 0
    num_disk_damaged: int = 0
    disk_written_bytes: int = 0
    is_disk_off: bool = False
    tenants: Mapping[str, TenantBytes] = field(default_factory=dict)
