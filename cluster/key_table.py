"""A hash table of key fingerprints with 64 holders' bits a row, in numpy arrays. Pure.

Buckets of eight 64-bit fingerprints (one cache line) with open addressing: what does not fit goes to the next bucket.
Rows of a bucket are taken in order and never given back one by one, so a bucket that is not full ends a search; a row
whose masks are zero is dropped when the table is rebuilt.

    B buckets   S = 8 slots a bucket   row = bucket * S + slot   masks[row, tier]: bit w is set if worker w holds it
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

SLOTS = 8
MAX_LOAD, LOAD_AFTER_REBUILD = 0.8, 0.6
MIN_BUCKETS = 16

Fingerprints = npt.NDArray[np.uint64]  # [N]
Rows = npt.NDArray[np.int64]  # [N], -1: not there
Masks = npt.NDArray[np.uint64]  # [N, num_tiers]


def fingerprints(keys: bytes) -> Fingerprints:
    """Of keys of 16 bytes, one after the other. Keys are hashes: 64 bits tell a million of them apart (one mistake in
    10^7 such sets), and a mistake costs a question in vain. 0 stands for an empty slot and is never given."""
    assert len(keys) % 16 == 0, len(keys)
    words = np.frombuffer(keys, dtype="<u8").reshape(-1, 2)
    mixed: Fingerprints = words[:, 0] ^ (words[:, 1] * np.uint64(0x9E3779B97F4A7C15))
    mixed[mixed == 0] = 1
    return mixed


class KeyTable:
    """fingerprint -> masks. Memory: SLOTS * (8 + 8 * num_tiers) + 1 bytes a bucket."""

    def __init__(self, num_tiers: int) -> None:
        self._num_tiers = num_tiers
        self._allocate(MIN_BUCKETS)

    def _allocate(self, num_buckets: int) -> None:
        self._keys = np.zeros((num_buckets, SLOTS), np.uint64)
        self._used = np.zeros(num_buckets, np.uint8)  # slots taken
        self.masks: Masks = np.zeros((num_buckets * SLOTS, self._num_tiers), np.uint64)
        self.num_keys = 0  # with those that nobody holds any more

    @property
    def num_bytes(self) -> int:
        return self._keys.nbytes + self._used.nbytes + self.masks.nbytes

    def find(self, wanted: Fingerprints) -> Rows:
        """The row of each, -1 for those that are not there."""
        num_buckets = len(self._used)
        rows = np.full(len(wanted), -1, np.int64)
        left = np.arange(len(wanted))
        buckets = (wanted % np.uint64(num_buckets)).astype(np.int64)
        while len(left):
            is_here = self._keys[buckets] == wanted[left, None]
            found = is_here.any(axis=1)
            rows[left[found]] = buckets[found] * SLOTS + is_here[found].argmax(axis=1)
            goes_on = ~found & (self._used[buckets] == SLOTS)
            left, buckets = left[goes_on], (buckets[goes_on] + 1) % num_buckets
        return rows

    def insert(self, wanted: Fingerprints) -> Rows:
        """The row of each of these distinct keys, new ones with empty masks. May move all rows."""
        rows = self.find(wanted)
        num_fresh = int(np.count_nonzero(rows < 0))
        if self.num_keys + num_fresh > MAX_LOAD * SLOTS * len(self._used):
            self.rebuild(len(wanted))  # those that nobody held any more are gone, too
            rows = self.find(wanted)
        rows[rows < 0] = self._place(wanted[rows < 0])
        return rows

    def rebuild(self, room: int = 0) -> None:
        """Drop what nobody holds; leave room for so many more."""
        held = self.masks.any(axis=1)
        keys, masks = self._keys.reshape(-1)[held], self.masks[held]
        num_buckets = int((len(keys) + room) / (LOAD_AFTER_REBUILD * SLOTS)) + 1
        self._allocate(max(MIN_BUCKETS, num_buckets))
        self.masks[self._place(keys)] = masks

    def clear_bit(self, bit: int) -> None:
        """Holder `bit` has nothing any more."""
        self.masks &= ~(np.uint64(1) << np.uint64(bit))
        if self.num_keys > 4 * SLOTS * MIN_BUCKETS and self.num_held() < 0.5 * self.num_keys:
            self.rebuild()

    def num_held(self) -> int:
        """Keys that somebody holds."""
        return int(np.count_nonzero(self.masks.any(axis=1)))

    def count_bit(self, bit: int) -> int:
        """Keys that holder `bit` has in some tier."""
        return int(np.count_nonzero((np.bitwise_or.reduce(self.masks, axis=1) >> np.uint64(bit)) & np.uint64(1)))

    def _place(self, fresh: Fingerprints) -> Rows:
        """Give distinct keys that are not there a row each; there is room."""
        num_buckets = len(self._used)
        assert self.num_keys + len(fresh) < SLOTS * num_buckets, (self.num_keys, len(fresh), num_buckets)
        rows = np.empty(len(fresh), np.int64)
        left = np.arange(len(fresh))
        buckets = (fresh % np.uint64(num_buckets)).astype(np.int64)
        while len(left):
            order = np.argsort(buckets, kind="stable")
            left, buckets = left[order], buckets[order]
            # The n-th that comes to a bucket takes its n-th free slot.
            is_first = np.concatenate(([True], buckets[1:] != buckets[:-1]))
            starts = np.flatnonzero(is_first)
            nth = np.arange(len(left)) - np.repeat(starts, np.diff([*starts, len(left)]))
            slots = self._used[buckets].astype(np.int64) + nth
            fits = slots < SLOTS
            taken = buckets[fits]
            self._keys[taken, slots[fits]] = fresh[left[fits]]
            rows[left[fits]] = taken * SLOTS + slots[fits]
            np.add.at(self._used, taken, np.uint8(1))
            left, buckets = left[~fits], (buckets[~fits] + 1) % num_buckets
        self.num_keys += len(fresh)
        return rows

    def check_integrity(self) -> None:
        """Slots are taken in order, every key is found where it stands."""
        taken = self._keys != 0
        assert np.array_equal(taken.sum(axis=1), self._used), "slots out of order"
        assert np.array_equal(taken, np.arange(SLOTS) < self._used[:, None]), "a hole in a bucket"
        assert int(self._used.sum()) == self.num_keys
        rows = np.flatnonzero(taken.reshape(-1))
        assert np.array_equal(self.find(self._keys.reshape(-1)[rows]), rows), "a key is not found"
        assert not self.masks[~taken.reshape(-1)].any(), "masks without a key"


def distinct(keys: Fingerprints) -> Fingerprints:
    """Each once, in order. (np.unique takes ten times as long for a million of them.)"""
    ordered = np.sort(keys)
    return ordered[np.concatenate(([True], ordered[1:] != ordered[:-1]))] if len(ordered) else ordered


def holder_bitmaps(masks: Masks) -> npt.NDArray[np.uint8]:
    """masks [N, num_tiers] of N keys -> bitmaps over the keys [64, num_tiers, ceil(N / 8)], the first key in the lowest
    bit."""
    bits = np.unpackbits(masks.astype("<u8").view(np.uint8).reshape(*masks.shape, 8), axis=-1, bitorder="little")
    return np.packbits(bits.transpose(2, 1, 0), axis=-1, bitorder="little")
