"""What a worker holds, chunk by chunk, for the cluster's index: its pages and its store together. Thread-safe."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

from prefill.store import MAX_CHANGES, ChunkStore
from prefill.store_changes import ChangeLog


class HeldChunks:
    """in_pages: the keys of all chunks that are whole in the pages now."""

    def __init__(self, store: ChunkStore | None, in_pages: Callable[[], set[bytes]] = set) -> None:
        self._store, self._in_pages = store, in_pages
        self._lock = threading.Lock()
        # An epoch of an earlier process must not pass for one of this.
        self._log = ChangeLog(time.time_ns() // 1000, MAX_CHANGES)
        self._pages: set[bytes] = set()
        self._tiers: dict[bytes, str] = {}  # of the store
        self._store_epoch = -1

    def changes(self, since: int | None) -> dict[str, Any]:
        """{"epoch": int, "added": [(key, tier)], "removed": [key], "full": bool}: all keys of which anything changed
        since that epoch, with all their tiers, "pages", "ram" or "disk"; everything, with "full", if it is None or too
        long ago."""
        with self._lock:
            self._look()
            named = None if since is None else self._log.since(since)
            keys = self._pages | self._tiers.keys() if named is None else named
            added = [(key, "pages") for key in keys if key in self._pages]
            added += [(key, self._tiers[key]) for key in keys if key in self._tiers]
            removed = [key for key in keys if key not in self._pages and key not in self._tiers]
            return {"epoch": self._log.epoch, "added": added, "removed": removed, "full": named is None}

    def _look(self) -> None:
        pages = self._in_pages()
        changed = pages ^ self._pages
        self._pages = pages
        if self._store is not None:
            told = self._store.changes(self._store_epoch)
            self._store_epoch = told.epoch
            gone = self._tiers.keys() - {key for key, _ in told.added} if told.full else set(told.removed)
            for key in gone:
                if self._tiers.pop(key, None) is not None:
                    changed.add(key)
            for key, tier in told.added:
                if self._tiers.get(key) != tier:
                    self._tiers[key] = tier
                    changed.add(key)
        for key in sorted(changed):
            self._log.note(key)
