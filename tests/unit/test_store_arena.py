"""Memory for blobs: what is got is what was put, pages have one owner, and little is taken beyond what is kept."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefill.blob_arena import MIN_WARM_PAGES, PAGE_BYTES, SEGMENT_PAGES, BlobArena, BlobPlace


def resident_bytes(arena: BlobArena) -> int:
    """What the kernel says is real of the arena's segments (all of them, and nothing else, have their size)."""
    total, is_ours = 0, False
    with open("/proc/self/smaps") as smaps:
        for line in smaps:
            first, *rest = line.split()
            if "-" in first and not first.endswith(":"):
                begin, end = (int(bound, 16) for bound in first.split("-"))
                is_ours = (end - begin) % (SEGMENT_PAGES * PAGE_BYTES) == 0 and len(rest) == 4
            elif is_ours and first == "Anonymous:":
                total += int(rest[0]) * 1024
    return total


@given(st.lists(st.one_of(st.integers(0, 3 * PAGE_BYTES), st.just(-1)), max_size=60), st.randoms(use_true_random=False))
def test_blobs_come_back_as_they_were(steps: list[int], draw: random.Random) -> None:
    arena = BlobArena()
    kept: list[tuple[BlobPlace, bytes]] = []
    for size in steps:
        if size >= 0:
            blob = draw.randbytes(size)
            kept.append((arena.put(blob), blob))
        elif kept:
            arena.free(kept.pop(draw.randrange(len(kept)))[0])
        assert all(arena.get(place) == blob for place, blob in kept)
        arena.check_integrity([place for place, _ in kept])


@pytest.mark.parametrize("size", [0, 1, PAGE_BYTES - 1, PAGE_BYTES, PAGE_BYTES + 1, SEGMENT_PAGES * PAGE_BYTES + 1])
def test_any_length_even_beyond_a_segment(size: int) -> None:
    arena, blob = BlobArena(), random.Random(size).randbytes(size)
    places = [arena.put(blob) for _ in range(2)]
    assert [arena.get(place) for place in places] == [blob, blob]
    arena.check_integrity(places)


def test_a_blob_that_was_got_stays_what_it_is() -> None:
    """A socket may hold it while its pages are given to another."""
    arena = BlobArena()
    place = arena.put(b"a" * 10_000)
    held = arena.get(place)
    arena.free(place)
    arena.put(b"b" * 10_000)
    assert held == b"a" * 10_000


def test_nine_tenths_of_what_is_taken_is_kept_whatever_the_sizes_do() -> None:
    """Sizes change from phase to phase; with malloc the holes of one do not fit the next."""
    draw, arena = random.Random(7), BlobArena()
    source, capacity = draw.randbytes(700_000), 64 << 20
    places: list[BlobPlace] = []
    used = 0
    for low, high in ((20_000, 700_000), (500_000, 700_000), (20_000, 60_000), (20_000, 700_000)):
        for _ in range(3 * capacity // ((low + high) // 2)):
            size = draw.randrange(low, high)
            while used + size > capacity:
                place = places.pop(draw.randrange(len(places)))
                used -= place.num_bytes
                arena.free(place)
            places.append(arena.put(source[:size]))
            used += size
        assert used >= 0.9 * arena.taken_bytes, (low, high, used / arena.taken_bytes)
        # Old memory of other tests of this process may count too, never less than what is written.
        assert resident_bytes(arena) >= used
    while len(places) > 8:
        place = places.pop()
        used -= place.num_bytes
        arena.free(place)
    assert arena.taken_bytes <= used + (MIN_WARM_PAGES + len(places)) * PAGE_BYTES, "the rest went back to the system"
    arena.check_integrity(places)
