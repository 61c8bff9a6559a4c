"""One worker's model, pages and codec, put together. What prefill and decode workers both start from."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from codec.chunk import decode_chunk, inspect_blob, split_blobs, warmup
from codec.errors import MalformedBlob
from codec.levels import LevelKind
from codec.profile import Profile, default_profile, load_profile
from codec.rope import RopeTable
from prefill import quantized_layout
from prefill.block_pool import BlockPool, blocks_for
from prefill.chunk_codec import TRIED_TOKENS, ChunkCodec, HostCodec, codec_for
from prefill.compute_device import completed, pick_device, side_stream
from prefill.engine import Engine, SequenceSlice
from prefill.errors import ModelRefused
from prefill.kv_pool import KVPool
from prefill.machine_memory import available_bytes
from prefill.memory_plan import ModelSize, check_fits, gib
from prefill.model import LoadedModel, load_model
from prefill.model_size import read_model_size
from prefill.page_quality import EXACT, UNKNOWN
from prefill.quantized_layout import RECENT_TOKENS, Kind, PageMix, QuantizedPagesUnsupported, check_kind, ring_bytes
from prefill.quantized_mix import read_page_kl, read_page_mix
from prefill.quantized_pool import QuantizedKVPool, Recents
from prefill.window_layers import layer_runs
from transport.messages import Greeting

if TYPE_CHECKING:
    from prefill.store import ChunkStore, StoreShares

log = logging.getLogger("kvstream.runtime")

BLOCK_TOKENS = 16  # of exact pages; `pool.block_tokens` says it of any
DEFAULT_CONTEXTS = 8
DEFAULT_RINGS = 64
# Of quantized pages' bytes: what copies of preempted sequences may take outside the pool.
SAVED_SHARE = 0.25
PROFILE_FILE = "profile.kvp"
MAX_ROPE_TABLES = 1024
RUNTIME_BYTES = 256 << 20  # what a worker takes besides weights, pages and activations, roughly
GPU_RUNTIME_BYTES = 2 << 30  # the same on a GPU, with recorded decode steps (prefill/decode_graphs.py)


@dataclass(slots=True, kw_only=True)
class ModelRuntime:
    """A loaded model with its codec profile, its paged pool and the engine over both. spare_blocks: for which there is
    memory besides the pool. page_kl: what KV loses in these pages, nats a token (prefill/page_quality.py)."""

    model: LoadedModel
    profile: Profile
    pool: KVPool | QuantizedKVPool
    allocator: BlockPool
    engine: Engine
    codec: ChunkCodec = field(default_factory=HostCodec)
    spare_blocks: int = 0
    page_kl: float = EXACT
    _rope_tables: dict[tuple[int, int], RopeTable] = field(default_factory=dict)

    @property
    def kv_cache_dtype(self) -> str:
        """What the pages hold: the model's dtype, or "int8", "int4", "fp8"."""
        return self.pool.kind if isinstance(self.pool, QuantizedKVPool) else self.model.layout.dtype

    @property
    def exact_pool(self) -> KVPool:
        """The pages of a worker that computes for others: what it sends is encoded from them."""
        assert isinstance(self.pool, KVPool), "prefill workers have exact pages"
        return self.pool

    def greeting(self) -> Greeting:
        """What a peer must agree with before KV moves."""
        layout = self.model.layout
        return Greeting(
            model_fingerprint=self.model.fingerprint,
            kv_layout=(
                f"L{layout.num_layers}.H{layout.num_kv_heads}.K{layout.head_dim_k}.V{layout.head_dim_v}.{layout.dtype}"
            ),
            codec_profile=self.profile.id,
        )

    def with_pool(self, num_blocks: int) -> ModelRuntime:
        """The same model with other pages, exact ones, and an engine whose passes take turns with this one's."""
        pool = KVPool(self.model.layout, num_blocks, BLOCK_TOKENS, self.model.device)
        return replace(
            self,
            pool=pool,
            allocator=BlockPool(num_blocks, ttl_s=self.allocator.ttl_s),
            engine=self.engine.beside(pool),
            spare_blocks=0,
            page_kl=EXACT,
        )

    def open_store(
        self,
        ram_bytes: int,
        *,
        chunk_tokens: int,
        path: str | Path | None = None,
        disk_bytes: int = 0,
        ttl_s: float | None = None,
        tenant_shares: StoreShares | None = None,
    ) -> ChunkStore:
        """A chunk store for KV of this model; on disk too if a directory is given, which is then its own. Raises
        prefill.disk_store.StoreError."""
        from prefill.store import ChunkStore, DiskOptions  # LMDB, which a machine that only checks the engine may lack

        disk = None
        if path is not None:
            quantized = [level for level in self.profile.levels if level.kind is LevelKind.QUANTIZED]
            finest = max(quantized, key=lambda level: level.stages, default=None)
            greeting = self.greeting()
            disk = DiskOptions(
                path=Path(path),
                capacity_bytes=disk_bytes,
                namespace=f"{greeting.model_fingerprint} {greeting.kv_layout} {greeting.codec_profile} {chunk_tokens}",
                levels=frozenset() if finest is None else frozenset({finest.name}),
            )
        return ChunkStore(ram_bytes, disk=disk, tenant_shares=tenant_shares, ttl_s=ttl_s)

    def encode(self, k: Tensor, v: Tensor, *, start: int, level: str) -> bytes:
        """Encode k, v [L, T, H, D] of the tokens from position `start` on. Raises codec.errors.CodecError."""
        device = self.model.device
        with side_stream(device), completed(device):
            rope = self.rope(start, start + k.shape[1])
            return self.codec.encode(k, v, level=level, profile=self.profile, rope=rope)

    def decode(self, blob: bytes | memoryview, *, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Decode the chunk at positions [start, stop), onto the model's device. Raises codec.errors.BlobError."""
        device = self.model.device
        with side_stream(device), completed(device):
            return self.codec.decode(blob, profile=self.profile, rope=self.rope(start, stop))

    def decode_into_pages(
        self, blob: bytes | memoryview, block_table: Sequence[int], *, start: int, stop: int, keep: int = 0
    ) -> Recents | None:
        """Decode straight into the pages where these are neighbours in memory, else through a copy. Pages of tokens
        before `keep` are left as they are. Of quantized pages, which take whole blocks: returns the last tokens as they
        were decoded, with which a ring continues them.

        Raises codec.errors.BlobError; the pages then hold garbage, which whoever fills the chunk next overwrites.
        """
        if isinstance(self.pool, QuantizedKVPool):
            with side_stream(self.model.device), completed(self.model.device):
                k, v = self.decode(blob, start=start, stop=stop)
                kept = max(0, keep - start)
                self.pool.write(block_table, None, start + kept, k[:, kept:], v[:, kept:])
                return recents_of(k, v)
        pages = self.pool.view(block_table, start, stop) if keep <= start else None
        device = self.model.device
        with side_stream(device), completed(device):
            if pages is not None:
                self.codec.decode_into(blob, pages, profile=self.profile, rope=self.rope(start, stop))
            else:
                k, v = self.decode(blob, start=start, stop=stop)
                kept = max(0, keep - start)
                self.pool.write(block_table, start + kept, k[:, kept:], v[:, kept:])
        return None

    def read_pages(self, block_table: Sequence[int], ring: int | None, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Copies of tokens start .. stop, [L, T, H, Dk] and [L, T, H, Dv] in the model's dtype. `ring`: the sequence's,
        where it has one."""
        if isinstance(self.pool, QuantizedKVPool):
            return self.pool.read(block_table, ring, start, stop)
        return self.pool.read(block_table, start, stop)

    def decode_layers(
        self, blobs: bytes | memoryview, layers: Sequence[int], *, start: int, stop: int
    ) -> tuple[Tensor, Tensor]:
        """Decode some layers of the chunk at [start, stop), a blob for each run of neighbours. k, v [L, T, H, D] of all
        layers: zeros stand where nothing came, as attention multiplies hidden keys and values too. Raises
        codec.errors.BlobError."""
        layout = self.model.layout
        shape = (layout.num_layers, stop - start, layout.num_kv_heads)
        k = torch.zeros(*shape, layout.head_dim_k, dtype=layout.torch_dtype)
        v = torch.zeros(*shape, layout.head_dim_v, dtype=layout.torch_dtype)
        self._decode_runs(blobs, layers, k, v, start)
        return k, v

    def decode_layers_into_pages(
        self,
        blobs: bytes | memoryview,
        layers: Sequence[int],
        block_table: Sequence[int],
        *,
        start: int,
        stop: int,
        keep: int = 0,
    ) -> None:
        """`decode_layers`, into the pages as `decode_into_pages` does. No layers: all of it becomes zeros."""
        device = self.model.device
        in_place = keep <= start and device.type == "cpu"  # parts are decoded on the host
        pages = self.pool.view(block_table, start, stop) if in_place else None
        if pages is not None:
            missing = sorted(set(range(self.model.layout.num_layers)).difference(layers))
            for first, last in layer_runs(missing):
                pages[0][first:last].zero_()
                pages[1][first:last].zero_()
            self._decode_runs(blobs, layers, *pages, start)
        else:
            k, v = self.decode_layers(blobs, layers, start=start, stop=stop)
            kept = max(0, keep - start)
            with side_stream(device), completed(device):
                self.pool.write(block_table, start + kept, k[:, kept:], v[:, kept:])

    def _decode_runs(self, blobs: bytes | memoryview, layers: Sequence[int], k: Tensor, v: Tensor, start: int) -> None:
        runs, rope = layer_runs(layers), self.rope(start, start + k.shape[1])
        parts = split_blobs(blobs)
        found = [inspect_blob(part).layers for part in parts]
        if found != runs:
            raise MalformedBlob(f"expected layers {runs}, found {found}")
        for part, (first, last) in zip(parts, runs, strict=True):
            decode_chunk(part, profile=self.profile, rope=rope, out=(k[first:last], v[first:last]))

    def rope(self, start: int, stop: int) -> RopeTable:
        """The rotation of positions [start, stop), kept once made: chunks start at few positions."""
        table = self._rope_tables.get((start, stop))
        if table is None:
            if len(self._rope_tables) >= MAX_ROPE_TABLES:
                self._rope_tables.clear()
            table = self._rope_tables[start, stop] = RopeTable(*self.model.rope_tables(start, stop))
        return table

    def time_slice(self, tokens: int, start: int, *, repeats: int = 2) -> float:
        """Seconds that the engine takes for `tokens` prompt tokens at `start` (best of `repeats`)."""
        table = self.allocator.allocate(blocks_for(start + tokens, self.pool.block_tokens))
        try:
            return min(self._time_once(tokens, start, table) for _ in range(repeats))
        finally:
            self.allocator.release(table)

    def _time_once(self, tokens: int, start: int, table: list[int]) -> float:
        ring = self.pool.begin_sequence()
        try:
            if isinstance(self.pool, QuantizedKVPool) and start:
                self.pool.resume(table, ring, start)
            begin = time.perf_counter()
            self.engine.forward([SequenceSlice(token_ids=[0] * tokens, start=start, block_table=table, ring=ring)])
            return time.perf_counter() - begin
        finally:
            self.pool.end_sequence(ring)


def load_runtime(
    path: str | Path,
    *,
    dtype: str = "bfloat16",
    num_blocks: int | None = None,
    kv_memory_bytes: int | None = None,
    page_ttl_s: float | None = None,
    threads: int = 1,
    device: str = "auto",
    spares_blocks: bool = False,
    kv_cache_dtype: str = "auto",
    max_sequences: int | None = None,
) -> ModelRuntime:
    """Load the model folder and everything around it. Raises prefill.model.ModelRefused, before anything is loaded if
    weights and pages do not fit the memory that is left now.

    `device`: auto (the GPU if there is one), cpu or cuda.

    The pool holds `num_blocks` blocks, or as many as `kv_memory_bytes` hold; by default eight full contexts.
    page_ttl_s: pages that nobody has used for so long are forgotten.
    spares_blocks: it holds what one full context needs of these, but not more than half; the rest is spared.
    kv_cache_dtype: "auto", the model's dtype, or a kind of quantized pages, with the page mix beside the model.
    max_sequences: how many can be in quantized pages at once, of which each takes a ring; by default 64.
    """
    torch.set_num_threads(threads)
    place = pick_device(device)
    size = read_model_size(path, dtype=dtype)
    if kv_cache_dtype == "auto":
        num_blocks = _num_raw_blocks(size, place, num_blocks, kv_memory_bytes)
        page_kl: float | None = EXACT
    else:
        try:
            kind, mix = check_kind(size.layout, kv_cache_dtype), read_page_mix(path, kv_cache_dtype, size.layout)
            page_kl = read_page_kl(path, kind)
        except QuantizedPagesUnsupported as error:
            raise ModelRefused(f"kv_cache_dtype: {kv_cache_dtype} cannot be had: {error}") from error
        if page_kl is None:
            log.warning(
                "nothing says what %s pages lose in this model, so requests share no prefixes in them: "
                "scripts/choose_page_mix.py measures it",
                kind,
            )
        rings = max_sequences or DEFAULT_RINGS
        num_blocks = _num_quantized_blocks(size, place, kind, mix, rings, num_blocks, kv_memory_bytes)
    spare_blocks = 0
    if spares_blocks and num_blocks > 1:
        spare_blocks = num_blocks - min(num_blocks // 2, blocks_for(size.max_context, BLOCK_TOKENS))
        num_blocks -= spare_blocks
    model = load_model(path, dtype=dtype, device=str(place))
    pool: KVPool | QuantizedKVPool
    if kv_cache_dtype == "auto":
        pool = KVPool(model.layout, num_blocks, BLOCK_TOKENS, place)
    else:
        pool = QuantizedKVPool(model.layout, num_blocks, kind, rings, place, mix=mix)
    profile = _profile_of(Path(path), model)
    rope = RopeTable(*model.rope_tables(0, min(TRIED_TOKENS, model.max_context)))
    runtime = ModelRuntime(
        model=model,
        profile=profile,
        pool=pool,
        allocator=BlockPool(num_blocks, ttl_s=page_ttl_s),
        engine=Engine(model, pool),
        codec=codec_for(place, profile, rope, model.layout.torch_dtype),
        spare_blocks=spare_blocks,
        page_kl=UNKNOWN if page_kl is None else page_kl,
    )
    warmup(runtime.profile)
    return runtime


def _num_raw_blocks(size: ModelSize, place: torch.device, num_blocks: int | None, memory_bytes: int | None) -> int:
    if num_blocks is None:
        by_memory = (memory_bytes or 0) // (BLOCK_TOKENS * size.layout.bytes_per_token)
        num_blocks = by_memory or DEFAULT_CONTEXTS * blocks_for(size.max_context, BLOCK_TOKENS)
    runtime_bytes = _runtime_bytes(place)
    check_fits(size, memory_bytes=available_bytes(place), num_blocks=num_blocks, runtime_bytes=runtime_bytes)
    return num_blocks


def _num_quantized_blocks(
    size: ModelSize,
    place: torch.device,
    kind: Kind,
    mix: PageMix | None,
    rings: int,
    num_blocks: int | None,
    memory_bytes: int | None,
) -> int:
    block_bytes, all_rings = quantized_layout.block_bytes(size.layout, kind, mix), rings * ring_bytes(size.layout)
    if num_blocks is None and memory_bytes is not None:
        num_blocks = (memory_bytes - all_rings) // block_bytes
        if num_blocks < 1:
            raise ModelRefused(
                f"kv_memory: {gib(memory_bytes)} hold no {kind} pages beside the recent tokens of {rings} sequences, "
                f"which take {gib(all_rings)}: raise it, or lower max_num_seqs"
            )
    num_blocks = num_blocks or DEFAULT_CONTEXTS * quantized_layout.blocks_for(size.max_context)
    saved = int(SAVED_SHARE * (num_blocks * block_bytes + all_rings))
    check_fits(
        size,
        memory_bytes=available_bytes(place),
        num_blocks=num_blocks,
        kv_dtype=kind,
        mix=mix,
        num_rings=rings,
        runtime_bytes=_runtime_bytes(place) + saved,
    )
    return num_blocks


def _runtime_bytes(place: torch.device) -> int:
    return RUNTIME_BYTES if place.type == "cpu" else GPU_RUNTIME_BYTES


def recents_of(k: Tensor, v: Tensor) -> Recents:
    """Copies of as many last tokens of a received chunk as the next token reads unquantized."""
    return k[:, -RECENT_TOKENS:].clone(), v[:, -RECENT_TOKENS:].clone()


def _profile_of(folder: Path, model: LoadedModel) -> Profile:
    """The calibrated profile in the model's folder if it was made for exactly this model, else the safe default."""
    file = folder / PROFILE_FILE
    if file.is_file():
        profile = load_profile(file)
        if profile.fingerprint == model.fingerprint:
            return profile
        log.warning(
            "%s was calibrated for another model or dtype; using the uncalibrated profile. Run `kvstream calibrate`.",
            file.name,
        )
    return default_profile(model.layout, fingerprint=model.fingerprint)


def limit_threads(threads: int) -> dict[str, str]:
    """Environment for a worker process with that many compute threads. To be set before torch is imported: two torch
    processes that each take all cores are tens of times slower than with one core each."""
    value = str(max(1, threads))
    return {
        "OMP_NUM_THREADS": value,
        "MKL_NUM_THREADS": value,
        "NUMBA_NUM_THREADS": value,
        "OPENBLAS_NUM_THREADS": value,
        "OMP_WAIT_POLICY": "PASSIVE",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
    }
