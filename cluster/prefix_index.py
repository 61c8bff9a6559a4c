"""Who holds the KV of which chunks: the controller's index, and how workers tell it. Pure.

A chunk is named by its key (16 bytes, prefill/chunks.py). A worker that holds it does so in pages, in the RAM store, on
disk, or in several of them. Workers report changes since the last state that the controller confirmed:

    worker     {"epoch": 7, "added": [(key, tier)], "removed": [key], "full": false} since epoch 5
    controller has epoch 5: applies it, answers 7.   Has another: leaves it, answers with what it has.
               Has nothing of this incarnation: answers None, and the next report is a full one.

A key in `added` is held in exactly the tiers that it has there: a chunk that moved from RAM to disk is added with
"disk". The index is a hint: it may lag by a report, and whoever is asked for a chunk that it has lost says so.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from cluster.key_table import Fingerprints, KeyTable, Rows, distinct, fingerprints, holder_bitmaps

TIERS = ("pages", "ram", "disk")
TABLE_WORKERS = 64  # as many bits as a mask has
MAX_KEYS_PER_WORKER = 1 << 20  # 256 million tokens in chunks of 256
RESYNC_BELOW = 0.75  # of that limit: a worker whose report was cut tells all again once it holds so much less

KEY_BYTES = 16


@runtime_checkable
class IndexSource(Protocol):
    """A worker that says what it holds."""

    def index_changes(self, since: int | None) -> Mapping[str, Any]:
        """What has changed since the epoch `since`, {"epoch": int, "added": [(key, tier)], "removed": [key],
        "full": bool}: every key of which anything changed, with all its tiers, or as removed. All that it holds, with
        "full", if `since` is None or too long ago."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Coverage:
    """Which chunks of one prompt a worker holds. Bit i of a bitmap is chunk i."""

    incarnation: str
    pages: int = 0
    ram: int = 0
    disk: int = 0

    @property
    def stored(self) -> int:
        """What it can serve to others: encoded chunks."""
        return self.ram | self.disk

    @property
    def any_tier(self) -> int:
        return self.pages | self.ram | self.disk

    @property
    def leading(self) -> tuple[int, int]:
        """Leading chunks in pages, and in any tier."""
        return num_leading(self.pages), num_leading(self.any_tier)

    def to_wire(self) -> tuple[str, int, int, int]:
        return self.incarnation, self.pages, self.ram, self.disk

    @classmethod
    def from_wire(cls, body: tuple[str, int, int, int]) -> Coverage:
        incarnation, pages, ram, disk = body
        return cls(incarnation=incarnation, pages=pages, ram=ram, disk=disk)


def num_leading(bitmap: int) -> int:
    """Ones before the first zero, from the lowest bit."""
    return (~bitmap & (bitmap + 1)).bit_length() - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Ack:
    """epoch: what the index has of the worker now, where its next report has to start; None: tell all. is_cut: the
    worker holds more than the index keeps of one worker; the rest is served, but not found by others."""

    epoch: int | None
    is_cut: bool = False


def pack_changes(changes: Mapping[str, Any], since: int | None) -> dict[str, Any]:
    """A worker's changes as they travel: keys of a tier one after the other, no more than the index would keep."""
    added: dict[str, list[bytes]] = {tier: [] for tier in TIERS}
    for key, tier in changes["added"]:
        assert len(key) == KEY_BYTES, key
        added[tier].append(key)
    left, packed = MAX_KEYS_PER_WORKER + 1, {}  # one more than the limit, so that the index sees that it was passed
    for tier in TIERS:
        packed[tier] = b"".join(added[tier][:left])
        left -= len(packed[tier]) // KEY_BYTES
    return {
        "since": None if changes["full"] else since,
        "epoch": changes["epoch"],
        "removed": b"" if changes["full"] else b"".join(changes["removed"]),
        **packed,
    }


class IndexFeed:
    """The worker's side: which changes go with the next report. The answer to one is heard before the next is made; if
    there is none, the next one is made as if the last had not been sent."""

    def __init__(self, source: IndexSource) -> None:
        self._source = source
        self._since: int | None = None

    def next_changes(self) -> dict[str, Any]:
        return pack_changes(self._source.index_changes(self._since), self._since)

    def confirmed(self, epoch: int | None) -> None:
        """The controller's answer."""
        self._since = epoch


@dataclass(slots=True, kw_only=True, eq=False)
class _Holder:
    incarnation: str
    table: int
    bit: int
    epoch: int | None = None
    num_keys: int = 0
    is_cut: bool = False


class PrefixIndex:
    """The controller's side. Some 40 to 55 bytes a distinct key, for 64 workers together."""

    def __init__(self, *, max_keys_per_worker: int = MAX_KEYS_PER_WORKER) -> None:
        self._max_keys = max_keys_per_worker
        self._holders: dict[str, _Holder] = {}
        self._tables: list[KeyTable] = []

    def apply(self, worker_id: str, incarnation: str, changes: Mapping[str, Any]) -> Ack:
        """Take in a worker's packed changes if they continue what is known of it."""
        holder = self._holders.get(worker_id)
        is_full = changes["since"] is None
        if holder is not None and holder.incarnation != incarnation:
            self.drop(worker_id)
            holder = None
        if holder is None:
            if not is_full:
                return Ack(epoch=None)
            holder = self._join(worker_id, incarnation)
        elif not is_full and changes["since"] != holder.epoch:
            return Ack(epoch=holder.epoch, is_cut=holder.is_cut)
        if is_full:
            self._forget(holder)
        self._remove(holder, fingerprints(changes["removed"]))
        self._replace(holder, [distinct(fingerprints(changes[name])) for name in TIERS])
        holder.epoch = changes["epoch"]
        if holder.is_cut and holder.num_keys < RESYNC_BELOW * self._max_keys:
            holder.epoch = None
        return Ack(epoch=holder.epoch, is_cut=holder.is_cut)

    def retain(self, incarnations: Collection[str]) -> None:
        """Forget all workers but these."""
        for worker_id in [name for name, holder in self._holders.items() if holder.incarnation not in incarnations]:
            self.drop(worker_id)

    def drop(self, worker_id: str) -> None:
        holder = self._holders.pop(worker_id)
        self._tables[holder.table].clear_bit(holder.bit)

    def holders(self, keys: bytes) -> dict[str, Coverage]:
        """Who has chunks of the prompt with these keys (one after the other), and which; the others are left out."""
        wanted = fingerprints(keys)
        if not len(wanted):
            return {}
        found: dict[str, Coverage] = {}
        maps = [self._bitmaps(table, wanted) for table in self._tables]
        for worker_id, holder in self._holders.items():
            of_table = maps[holder.table]
            if of_table is None or not of_table[1] >> holder.bit & 1:
                continue
            pages, ram, disk = (int.from_bytes(bitmap.tobytes(), "little") for bitmap in of_table[0][holder.bit])
            found[worker_id] = Coverage(incarnation=holder.incarnation, pages=pages, ram=ram, disk=disk)
        return found

    def stats(self) -> dict[str, float]:
        return {
            "index_keys": sum(table.num_keys for table in self._tables),
            "index_entries": sum(holder.num_keys for holder in self._holders.values()),
            "index_bytes": sum(table.num_bytes for table in self._tables),
        }

    def check_integrity(self) -> None:
        """Counts agree with the tables, nobody shares a bit, no bit is without its worker."""
        places = [(holder.table, holder.bit) for holder in self._holders.values()]
        assert len(set(places)) == len(places)
        for holder in self._holders.values():
            assert self._tables[holder.table].count_bit(holder.bit) == holder.num_keys <= self._max_keys
        for number, table in enumerate(self._tables):
            table.check_integrity()
            known = sum(1 << bit for of, bit in places if of == number)
            assert int(np.bitwise_or.reduce(table.masks, axis=None)) & ~known == 0

    # -- inside ---------------------------------------------------------------------------------------------------

    def _join(self, worker_id: str, incarnation: str) -> _Holder:
        taken = {(holder.table, holder.bit) for holder in self._holders.values()}
        free = ((table, bit) for table in range(len(self._tables) + 1) for bit in range(TABLE_WORKERS))
        table, bit = next(place for place in free if place not in taken)
        if table == len(self._tables):
            self._tables.append(KeyTable(len(TIERS)))
        holder = self._holders[worker_id] = _Holder(incarnation=incarnation, table=table, bit=bit)
        return holder

    def _forget(self, holder: _Holder) -> None:
        if holder.num_keys:
            self._tables[holder.table].clear_bit(holder.bit)
        holder.num_keys, holder.is_cut = 0, False

    def _remove(self, holder: _Holder, gone: Fingerprints) -> None:
        table, bit = self._tables[holder.table], np.uint64(1 << holder.bit)
        rows = table.find(distinct(gone))
        rows = rows[rows >= 0]
        holder.num_keys -= int(np.count_nonzero(_is_held(table, rows, bit)))
        table.masks[rows] &= ~bit

    def _replace(self, holder: _Holder, by_tier: Sequence[Fingerprints]) -> None:
        """The keys of all tiers are held in these tiers, and in no other. New keys beyond the worker's limit are left
        out."""
        told = distinct(np.concatenate(by_tier))
        if not len(told):
            return
        table, bit = self._tables[holder.table], np.uint64(1 << holder.bit)
        rows = table.find(told)
        is_held = np.zeros(len(told), bool)
        is_held[rows >= 0] = _is_held(table, rows[rows >= 0], bit)
        table.masks[rows[is_held]] &= ~bit
        new, room = told[~is_held], self._max_keys - holder.num_keys
        is_cut = len(new) > room
        taken = np.concatenate((told[is_held], new[:room]))
        table.insert(taken)
        for tier, keys in enumerate(by_tier):
            rows = table.find(keys[np.isin(keys, taken)] if is_cut else keys)
            table.masks[rows, tier] |= bit
        holder.num_keys += len(new[:room])
        holder.is_cut |= is_cut

    @staticmethod
    def _bitmaps(table: KeyTable, wanted: Fingerprints) -> Any:
        """Bitmaps [64, tier, bytes], and the mask of the workers that have some; None if nobody has any of the keys."""
        rows = table.find(wanted)
        is_here = rows >= 0
        if not is_here.any():
            return None
        masks = np.zeros((len(wanted), len(TIERS)), np.uint64)
        masks[is_here] = table.masks[rows[is_here]]
        return holder_bitmaps(masks), int(np.bitwise_or.reduce(masks, axis=None))


def _is_held(table: KeyTable, rows: Rows, bit: np.uint64) -> npt.NDArray[np.bool_]:
    held: npt.NDArray[np.bool_] = np.bitwise_or.reduce(table.masks[rows], axis=1) & bit != 0
    return held


def join_keys(keys: Iterable[bytes]) -> bytes:
    """As `PrefixIndex.holders` takes them."""
    return b"".join(keys)
