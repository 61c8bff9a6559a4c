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

from codec.chunk import warmup
from codec.levels import LevelKind
from codec.profile import Profile, default_profile, load_profile
from codec.rope import RopeTable
from prefill.block_pool import BlockPool, blocks_for
from prefill.chunk_codec import TRIED_TOKENS, ChunkCodec, HostCodec, codec_for
from prefill.compute_device import completed, pick_device, side_stream
from prefill.engine import Engine, SequenceSlice
from prefill.kv_pool import KVPool
from prefill.machine_memory import available_bytes
from prefill.memory_plan import check_fits
from prefill.model import LoadedModel, load_model
from prefill.model_size import read_model_size
from transport.messages import Greeting

if TYPE_CHECKING:
    from prefill.store import ChunkStore, StoreShares

log = logging.getLogger("kvstream.runtime")

BLOCK_TOKENS = 16
PROFILE_FILE = "profile.kvp"
MAX_ROPE_TABLES = 1024
RUNTIME_BYTES = 256 << 20  # what a worker takes besides weights, pages and activations, roughly
GPU_RUNTIME_BYTES = 2 << 30  # the same on a GPU, with recorded decode steps (prefill/decode_graphs.py)


@dataclass(slots=True, kw_only=True)
class ModelRuntime:
    """A loaded model with its codec profile, its paged pool and the engine over both. spare_blocks: for which there is
    memory besides the pool."""

    model: LoadedModel
    profile: Profile
    pool: KVPool
    allocator: BlockPool
    engine: Engine
    codec: ChunkCodec = field(default_factory=HostCodec)
    spare_blocks: int = 0
    _rope_tables: dict[tuple[int, int], RopeTable] = field(default_factory=dict)

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
        """The same model with other pages, and an engine whose passes take turns with this one's."""
        pool = KVPool(self.model.layout, num_blocks, BLOCK_TOKENS, self.model.device)
        blocks = BlockPool(num_blocks, ttl_s=self.allocator.ttl_s)
        return replace(self, pool=pool, allocator=blocks, engine=self.engine.beside(pool), spare_blocks=0)

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
    ) -> None:
        """Decode straight into the pages where these are neighbours in memory, else through a copy. Pages of tokens
        before `keep` are left as they are.

        Raises codec.errors.BlobError; the pages then hold garbage, which whoever fills the chunk next overwrites.
        """
        pages = self.pool.view(block_table, start, stop) if keep <= start else None
        device = self.model.device
        with side_stream(device), completed(device):
            if pages is not None:
                self.codec.decode_into(blob, pages, profile=self.profile, rope=self.rope(start, stop))
            else:
                k, v = self.decode(blob, start=start, stop=stop)
                kept = max(0, keep - start)
                self.pool.write(block_table, start + kept, k[:, kept:], v[:, kept:])

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
        table = self.allocator.allocate(blocks_for(start + tokens, BLOCK_TOKENS))
        try:
            times = []
            for _ in range(repeats):
                begin = time.perf_counter()
                self.engine.forward([SequenceSlice(token_ids=[0] * tokens, start=start, block_table=table)])
                times.append(time.perf_counter() - begin)
            return min(times)
        finally:
            self.allocator.release(table)


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
) -> ModelRuntime:
    """Load the model folder and everything around it. Raises prefill.model.ModelRefused, before anything is loaded if
    weights and pages do not fit the memory that is left now.

    `device`: auto (the GPU if there is one), cpu or cuda.

    The pool holds `num_blocks` blocks, or as many as `kv_memory_bytes` hold; by default eight full contexts.
    page_ttl_s: pages that nobody has used for so long are forgotten.
    spares_blocks: it holds what one full context needs of these, but not more than half; the rest is spared.
    """
    torch.set_num_threads(threads)
    place = pick_device(device)
    size = read_model_size(path, dtype=dtype)
    if num_blocks is None:
        by_memory = (kv_memory_bytes or 0) // (BLOCK_TOKENS * size.layout.bytes_per_token)
        num_blocks = by_memory or 8 * blocks_for(size.max_context, BLOCK_TOKENS)
    runtime_bytes = RUNTIME_BYTES if place.type == "cpu" else GPU_RUNTIME_BYTES
    check_fits(size, memory_bytes=available_bytes(place), num_blocks=num_blocks, runtime_bytes=runtime_bytes)
    spare_blocks = 0
    if spares_blocks and num_blocks > 1:
        spare_blocks = num_blocks - min(num_blocks // 2, blocks_for(size.max_context, BLOCK_TOKENS))
        num_blocks -= spare_blocks
    model = load_model(path, dtype=dtype, device=str(place))
    pool = KVPool(model.layout, num_blocks, BLOCK_TOKENS, place)
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
    )
    warmup(runtime.profile)
    return runtime


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
