"""A partial hit: the front of a chunk, found at the front of an entry of this worker's own store.

Whole chunks come from sources, this worker among them. Where a prompt leaves what is stored in the middle of a chunk,
the tokens up to there are in an entry all the same: in a whole chunk that goes on otherwise, or in a tail, the end of
a sequence (decode/kept_chunks.py keeps them). The entry is decoded, and its common front written into the pages.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from codec.chunk import inspect_blob
from codec.errors import CodecError, MalformedBlob
from prefill.runtime import ModelRuntime
from prefill.store import MASTER_LEVEL, ChunkStore


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredFront:
    """Tokens [start, stop) of a sequence are the first of the entry under `key`, which goes on to `entry_stop`. start:
    where a chunk begins; stop: a multiple of a block. kl: what the entry promises, nats a token."""

    store: ChunkStore
    key: bytes
    start: int
    stop: int
    entry_stop: int
    kl: float

    def into_pages(self, runtime: ModelRuntime, block_table: Sequence[int], *, keep: int) -> bool:
        """Write the tokens from `keep` on. False: it is not there any more, or was damaged on disk.

        Raises codec.errors.CodecError if it is of no use; then the store has it no longer.
        """
        blob = self.store.get(self.key, MASTER_LEVEL)
        if blob is None:
            return False
        try:
            info = inspect_blob(blob)
            if (info.level, info.num_tokens) != (MASTER_LEVEL, self.entry_stop - self.start):
                raise MalformedBlob(f"{info.num_tokens} tokens at level {info.level!r} under another's name")
            k, v = runtime.decode(blob, start=self.start, stop=self.entry_stop)
        except CodecError:
            self.store.drop(self.key)
            raise
        kept = max(0, keep - self.start)
        count = self.stop - self.start
        runtime.pool.write(block_table, self.start + kept, k[:, kept:count], v[:, kept:count])
        return True
