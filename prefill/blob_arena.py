"""Blobs in pages of anonymous memory: what is taken from the system is what is kept, whatever came and went. No locks.

Blobs of 20 to 700 KB that come and go leave holes in malloc's heap that later ones do not fit (docs/store.md has the
figures). Here a blob lies in pages that need not be neighbours, so every free page serves any blob, and what is lost is
half a page a blob. Memory is reserved in segments and becomes real when it is first written; free pages beyond a small
share are handed back to the system.
"""

from __future__ import annotations

import mmap
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

PAGE_BYTES = mmap.PAGESIZE
SEGMENT_PAGES = (16 << 20) // PAGE_BYTES
MIN_WARM_PAGES = 256  # free and real, kept for the next blob
WARM_SHARE = 64  # or one in so many of the pages in use
Run = tuple[int, int]  # first page, number of pages; within one segment


@dataclass(frozen=True, slots=True)
class BlobPlace:
    runs: tuple[Run, ...]
    num_bytes: int


class BlobArena:
    def __init__(self) -> None:
        self._segments: list[mmap.mmap] = []
        self._warm: deque[Run] = deque()  # free pages that are real memory; the last freed is taken first
        self._cold: deque[Run] = deque()  # free pages that are only reserved
        self._num_warm = self._num_cold = self._num_used = 0

    @property
    def taken_bytes(self) -> int:
        """Of the system's memory."""
        return (self._num_used + self._num_warm) * PAGE_BYTES

    def put(self, blob: bytes) -> BlobPlace:
        """Copies the blob in. Raises OSError, and changes nothing, when the system reserves no more."""
        num_pages = -(-len(blob) // PAGE_BYTES)
        while self._num_warm + self._num_cold < num_pages:
            self._reserve()
        runs = self._take(num_pages)
        at = 0
        with memoryview(blob) as view:
            for segment, start, stop in self._spans(runs):
                part = view[at : at + stop - start]
                segment[start : start + len(part)] = part
                at += len(part)
        return BlobPlace(runs, len(blob))

    def get(self, place: BlobPlace) -> bytes:
        """A copy: it stays what it is, however long a socket holds it and whatever becomes of the pages."""
        left, parts = place.num_bytes, []
        for segment, start, stop in self._spans(place.runs):
            parts.append(memoryview(segment)[start : min(stop, start + left)])
            left -= stop - start
        return b"".join(parts)

    def free(self, place: BlobPlace) -> None:
        num_pages = sum(number for _, number in place.runs)
        self._warm.extend(place.runs)
        self._num_used -= num_pages
        self._num_warm += num_pages
        limit = max(MIN_WARM_PAGES, self._num_used // WARM_SHARE)
        while self._num_warm > limit:
            self._cool(self._num_warm - limit)

    def _spans(self, runs: tuple[Run, ...]) -> Iterator[tuple[mmap.mmap, int, int]]:
        for first, number in runs:
            segment, page = divmod(first, SEGMENT_PAGES)
            yield self._segments[segment], page * PAGE_BYTES, (page + number) * PAGE_BYTES

    def _take(self, num_pages: int) -> tuple[Run, ...]:
        runs: list[Run] = []
        self._num_used += num_pages
        while num_pages:
            source = self._warm or self._cold
            first, number = source.pop()
            used = min(number, num_pages)
            if used < number:
                source.append((first + used, number - used))
            if source is self._warm:
                self._num_warm -= used
            else:
                self._num_cold -= used
            runs.append((first, used))
            num_pages -= used
        return tuple(runs)

    def _reserve(self) -> None:
        segment = mmap.mmap(-1, SEGMENT_PAGES * PAGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        segment.madvise(mmap.MADV_NOHUGEPAGE)  # a huge page would be real memory for free neighbours too
        self._cold.append((len(self._segments) * SEGMENT_PAGES, SEGMENT_PAGES))
        self._segments.append(segment)
        self._num_cold += SEGMENT_PAGES

    def _cool(self, num_pages: int) -> None:
        """Hand the pages of one run back, at most so many."""
        first, number = self._warm.popleft()
        given = min(number, num_pages)
        if given < number:
            self._warm.appendleft((first + given, number - given))
        segment, page = divmod(first, SEGMENT_PAGES)
        self._segments[segment].madvise(mmap.MADV_DONTNEED, page * PAGE_BYTES, given * PAGE_BYTES)
        self._cold.append((first, given))
        self._num_warm -= given
        self._num_cold += given

    def check_integrity(self, places: list[BlobPlace]) -> None:
        """Every page is in one blob of `places` or free, once."""
        pages: list[int] = []
        for runs in (self._warm, self._cold, *(place.runs for place in places)):
            for first, number in runs:
                assert number > 0 and first // SEGMENT_PAGES == (first + number - 1) // SEGMENT_PAGES
                pages.extend(range(first, first + number))
        assert sorted(pages) == list(range(len(self._segments) * SEGMENT_PAGES))
        assert sum(number for _, number in self._warm) == self._num_warm
        assert sum(number for _, number in self._cold) == self._num_cold
        assert len(pages) == self._num_warm + self._num_cold + self._num_used
