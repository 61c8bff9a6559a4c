"""Any level of a stored chunk, made from the least work: what is kept, a cut of the finest quantized blob, an encoding.

All quantized levels are stages of one encoding (codec/cut.py), so a chunk is quantized once, kept at the finest level,
and every coarser one is a selection of its pieces.
"""

from __future__ import annotations

from torch import Tensor

from codec.chunk import cut_chunk, level_sizes
from codec.levels import LevelKind
from prefill.runtime import ModelRuntime
from prefill.store import MASTER_LEVEL, ChunkStore


class ChunkLevels:
    """Blobs of chunks by level. Thread-safe as far as the store is."""

    def __init__(self, runtime: ModelRuntime, store: ChunkStore) -> None:
        self._runtime, self._store = runtime, store
        self.num_encoded = 0
        levels = runtime.profile.levels
        self._quantized = {level.name for level in levels if level.kind is LevelKind.QUANTIZED}
        self._finest = next((level.name for level in levels if level.name in self._quantized), None)

    def sizes(self, key: bytes) -> dict[str, int] | None:
        """Bytes by level of all that can be sent without encoding; None if the chunk is not stored."""
        sizes = self._store.sizes(key)
        if sizes is None or self._finest not in sizes:
            return sizes
        nested = self._store.peek(key, self._finest)
        return sizes if nested is None else sizes | level_sizes(nested, profile=self._runtime.profile)

    def blob(
        self, key: bytes, level: str, *, start: int, stop: int, fresh: tuple[Tensor, Tensor] | None
    ) -> bytes | None:
        """The chunk of tokens [start, stop) at a level; None if it is not stored. fresh: its k and v, if at hand.

        Raises codec.errors.CodecError.
        """
        blob = self._store.get(key, level)
        if blob is not None:
            return blob
        if fresh is not None:  # sent once, most likely: the level itself is less work than the finest
            blob = self._encode(*fresh, start, level)
            if level not in self._quantized or level == self._finest:
                self._store.put(key, level, blob)
            return blob
        wanted = self._finest if level in self._quantized else level
        assert wanted is not None
        nested = self._store.get(key, wanted) if wanted != level else None
        if nested is None:
            master = self._store.get(key, MASTER_LEVEL)
            if master is None:
                return None
            k, v = self._runtime.decode(master, start=start, stop=stop)
            nested = self._encode(k, v, start, wanted)
            self._store.put(key, wanted, nested)
        return nested if wanted == level else cut_chunk(nested, profile=self._runtime.profile, level=level)

    def store_master(self, key: bytes, k: Tensor, v: Tensor, *, start: int) -> None:
        """Keep a chunk, losslessly. Raises codec.errors.CodecError."""
        self._store.put(key, MASTER_LEVEL, self._encode(k, v, start, MASTER_LEVEL))

    def _encode(self, k: Tensor, v: Tensor, start: int, level: str) -> bytes:
        self.num_encoded += 1
        return self._runtime.encode(k, v, start=start, level=level)
