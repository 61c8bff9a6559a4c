"""Any level of a chunk and any refinement, made from the least work: what is kept, a cut of the finest, an encoding.

All quantized levels are stages of one encoding (codec/cut.py). A chunk is quantized once, at the finest level; every
coarser level and every refinement is a selection of its pieces. That holds for a fresh chunk too: a level encoded by
itself would decode alike, but ends its streams otherwise, and no refinement made later would fit behind it.
"""

from __future__ import annotations

from torch import Tensor

from codec.chunk import cut_chunk, cut_layers, level_sizes, refinement_of
from codec.errors import CodecError
from codec.levels import LevelKind
from prefill.chunks import split_level, split_part
from prefill.prompt import FreshChunk
from prefill.runtime import ModelRuntime
from prefill.store import MASTER_LEVEL, ChunkStore
from prefill.window_layers import layer_runs

MAX_REMEMBERED = 65_536  # chunks whose sizes need not be read again


class ChunkLevels:
    """Blobs of chunks by level. One thread makes blobs; any may ask for sizes."""

    def __init__(self, runtime: ModelRuntime, store: ChunkStore) -> None:
        self._runtime, self._store = runtime, store
        self.num_encoded = 0
        levels = runtime.profile.levels
        self._stages = {level.name: level.stages for level in levels if level.kind is LevelKind.QUANTIZED}
        self._finest = max(self._stages, key=lambda name: self._stages[name], default=None)
        self._nested_sizes: dict[tuple[bytes, int], dict[str, int]] = {}  # by key and bytes of the finest blob
        self._early: dict[bytes, bytes] = {}  # finest blobs of fresh chunks whose master is not yet in the store

    def check(self, name: str) -> str | None:
        """What is wrong with a level asked for, in words for the receiver; None if it can be made."""
        try:
            whole, layers = split_part(name)
            have, level = split_level(whole)
        except ValueError as error:
            return str(error)
        num_layers = self._runtime.model.layout.num_layers
        if layers is not None and layers[-1] >= num_layers:
            return f"{name!r}: there is no layer {layers[-1]}, the model has {num_layers}"
        known = self._runtime.profile.level_names
        for part in (level, have):
            if part is not None and part not in known:
                return f"there is no level {part!r}: levels are {', '.join(known)}"
        if have is None:
            return None
        if not {have, level} <= self._stages.keys():
            return f"{name!r}: only the quantized levels {', '.join(self._stages)} refine each other"
        if self._stages[have] >= self._stages[level]:
            return f"{name!r}: {level} is not finer than {have}"
        return None

    def sizes(self, key: bytes) -> dict[str, int] | None:
        """Bytes by level of all that can be sent without encoding; None if the chunk is not stored."""
        sizes = self._store.sizes(key)
        if sizes is None or self._finest not in sizes:
            return sizes
        name = key, sizes[self._finest]
        nested = self._nested_sizes.get(name)
        if nested is None:
            blob = self._store.peek(key, self._finest)  # from disk, if it is only there
            if blob is None:
                return sizes
            if len(self._nested_sizes) >= MAX_REMEMBERED:
                self._nested_sizes.clear()
            nested = self._nested_sizes[name] = level_sizes(blob, profile=self._runtime.profile)
        return sizes | nested

    def blob(self, key: bytes, name: str, *, start: int, stop: int, fresh: FreshChunk | None) -> bytes | None:
        """The chunk of tokens [start, stop) at a level, or a refinement of it, or some layers of these (a blob for each
        run of neighbours); None if the chunk is not stored. What is kept is always whole.

        fresh: its KV, if it is not in the store yet, or in a worse quality. Raises codec.errors.CodecError.
        """
        wrong = self.check(name)
        if wrong is not None:
            raise CodecError(wrong)
        whole, layers = split_part(name)
        have, level = split_level(whole)
        kept = self._finest if level in self._stages else level
        assert kept is not None
        blob = self._kept(key, kept, start=start, stop=stop, fresh=fresh)
        if blob is None:
            return None
        if layers is not None:
            profile = self._runtime.profile
            return cut_layers(blob, profile=profile, layers=layer_runs(layers), level=level, have=have)
        if have is not None:
            return refinement_of(blob, profile=self._runtime.profile, have=have, level=level)
        return blob if kept == level else cut_chunk(blob, profile=self._runtime.profile, level=level)

    def _kept(self, key: bytes, level: str, *, start: int, stop: int, fresh: FreshChunk | None) -> bytes | None:
        """A level that is kept once it is made."""
        if fresh is not None:  # what the store has of it, if anything, is worse
            early = self._early.get(key) if level == self._finest else None
            blob = early or self._encode(fresh.k, fresh.v, start, level)
            if level == self._finest:
                self._early[key] = blob
            elif level == MASTER_LEVEL:
                self._put_master(key, fresh, blob)
            return blob
        kept = self._store.get(key, level)
        if kept is not None:
            return kept
        kl = self._store.kl(key)
        master = self._store.get(key, MASTER_LEVEL)
        if master is None or kl is None:
            return None
        blob = self._encode(*self._runtime.decode(master, start=start, stop=stop), start, level)
        # Refused if the master was replaced by a better one meanwhile.
        self._store.put(key, level, blob, kl=kl)
        return blob

    def store_master(self, key: bytes, fresh: FreshChunk) -> None:
        """Keep a fresh chunk, losslessly, and what was quantized of it before. The last that is done with one: `blob`
        has it as fresh no more. Raises codec.errors.CodecError."""
        early = self._early.pop(key, None)
        kl = self._store.kl(key)
        if kl is None or kl > fresh.kl:
            self._put_master(key, fresh, self._encode(fresh.k, fresh.v, fresh.start, MASTER_LEVEL))
        if early is not None:
            assert self._finest is not None
            self._store.put(key, self._finest, early, kl=fresh.kl)

    def _put_master(self, key: bytes, fresh: FreshChunk, blob: bytes) -> None:
        self._store.put(
            key, MASTER_LEVEL, blob, kl=fresh.kl, tenant=fresh.tenant, parent=fresh.parent, links=fresh.links,
            is_tail=fresh.is_tail,
        )  # fmt: skip

    def check_integrity(self) -> None:
        """When no chunk is fresh: nothing waits for a master."""
        assert not self._early, f"{len(self._early)} blobs wait for a master that does not come"

    def _encode(self, k: Tensor, v: Tensor, start: int, level: str) -> bytes:
        self.num_encoded += 1
        return self._runtime.encode(k, v, start=start, level=level)
