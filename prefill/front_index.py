"""Which stored entry begins with most of what a sequence holds at some place. Pure: keys and hash links, no blobs.

The links of an entry (KeyChain.links, one every 16 tokens) stand for all tokens up to them. So two entries that have a
link in common are equal up to there, and how far they are equal is how many links they share.

Entries are found by their links at 32, 64, 128, 256, ... tokens: a sequence looks for its own link at the last of these
marks, then at the one before. Under a mark stand the newest of the entries that are equal up to it, and all of these
are compared. So where very many begin alike, some of the tokens from one mark to the next may be missed.
"""

from __future__ import annotations

from dataclasses import dataclass

from prefill.chunks import KEY_BYTES, LINK_TOKENS
from prefill.tier_index import ChunkMeta

MIN_FRONT_TOKENS = 32  # in common, to be found
MAX_COMPARED = 64  # kept under one mark


@dataclass(frozen=True, slots=True, kw_only=True)
class Front:
    """The beginning of an entry: of its `entry_tokens` the first `num_tokens`. kl: what its master promises."""

    key: bytes
    num_tokens: int
    entry_tokens: int
    kl: float


class FrontIndex:
    """Entries by key. Those without links are not found."""

    def __init__(self) -> None:
        self._metas: dict[bytes, ChunkMeta] = {}
        self._at_mark: dict[bytes, tuple[bytes, ...]] = {}  # keys by link: the newest ones, oldest first
        self._tails: dict[bytes, bytes] = {}  # keys by their last link

    def __len__(self) -> int:
        return len(self._metas)

    def put(self, key: bytes, meta: ChunkMeta) -> None:
        """The same again changes nothing."""
        assert len(meta.links) % KEY_BYTES == 0
        if self._metas.get(key) is meta:
            return
        self.remove(key)
        self._metas[key] = meta
        for mark in _marks(meta.links):
            link = _link(meta.links, mark)
            self._at_mark[link] = (*self._at_mark.get(link, ())[1 - MAX_COMPARED :], key)
        if meta.is_tail:
            self._tails[meta.links[-KEY_BYTES:]] = key

    def remove(self, key: bytes) -> ChunkMeta | None:
        """What was known of it, if it was here."""
        meta = self._metas.pop(key, None)
        if meta is None:
            return None
        for mark in _marks(meta.links):
            link = _link(meta.links, mark)
            left = tuple(other for other in self._at_mark.pop(link, ()) if other != key)
            if left:
                self._at_mark[link] = left
        if self._tails.get(meta.links[-KEY_BYTES:]) == key:
            del self._tails[meta.links[-KEY_BYTES:]]
        return meta

    def longest(self, links: bytes, max_kl: float) -> Front | None:
        """The entry that begins with the most of these links, of those that promise `max_kl` or better; None if none
        begins with 32 tokens of them."""
        for mark in _marks(links):
            best: Front | None = None
            for key in reversed(self._at_mark.get(_link(links, mark), ())):
                meta = self._metas[key]
                num_tokens = _num_common(meta.links, links, mark) * LINK_TOKENS
                if meta.kl <= max_kl and (best is None or num_tokens > best.num_tokens):
                    entry_tokens = len(meta.links) // KEY_BYTES * LINK_TOKENS
                    best = Front(key=key, num_tokens=num_tokens, entry_tokens=entry_tokens, kl=meta.kl)
            if best is not None:
                return best
        return None

    def outgrown(self, meta: ChunkMeta) -> list[bytes]:
        """The tails that are the beginning of such an entry, and no better than it."""
        ends = (meta.links[at : at + KEY_BYTES] for at in range(0, len(meta.links) - KEY_BYTES, KEY_BYTES))
        tails = [self._tails[end] for end in ends if end in self._tails]
        return [key for key in tails if self._metas[key].kl >= meta.kl]

    def check_integrity(self) -> None:
        metas = self._metas.items()
        found = {(link, key) for link, keys in self._at_mark.items() for key in keys}
        known = {(_link(meta.links, mark), key) for key, meta in metas for mark in _marks(meta.links)}
        assert found <= known and all(0 < len(keys) <= MAX_COMPARED for keys in self._at_mark.values())
        assert self._tails == {meta.links[-KEY_BYTES:]: key for key, meta in metas if meta.is_tail}


def _link(links: bytes, number: int) -> bytes:
    """The `number`th, counted from 1."""
    return links[(number - 1) * KEY_BYTES : number * KEY_BYTES]


def _marks(links: bytes) -> list[int]:
    """The numbers of the links by which entries are found, the last one first."""
    marks, mark = [], MIN_FRONT_TOKENS // LINK_TOKENS
    while mark * KEY_BYTES <= len(links):
        marks.append(mark)
        mark *= 2
    return marks[::-1]


def _num_common(one: bytes, other: bytes, at_least: int) -> int:
    """How many links two have in common; they agree in the first `at_least`."""
    num = at_least
    while (num + 1) * KEY_BYTES <= min(len(one), len(other)) and _link(one, num + 1) == _link(other, num + 1):
        num += 1
    return num
