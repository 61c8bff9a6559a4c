"""What LMCache's CacheGen makes of a KV cache on a CPU: its bytes, its decoded tensors, its speed, its wrong values.

    python scripts/bench_lmcache.py --kv IN.safetensors --out OUT.safetensors --json FILE [--bins 16,16,16,16,16]

A peer to measure beside: this file imports nothing of kvstream, and LMCache lives in a virtual environment of its own.
Install torch first, and a CPU build, or what follows pulls gigabytes of CUDA:

    python3 -m venv DIR
    DIR/bin/pip install "torch>=2.11,<2.14"
    DIR/bin/pip install --no-deps lmcache==0.5.6
    DIR/bin/pip install numba "numpy<=2.2.6" nvtx msgspec requests aiohttp cryptography cachetools transformers
    DIR/bin/python scripts/bench_lmcache.py ...

IN holds tensors k.<i> and v.<i>, each [layers, tokens, heads, head_dim] in bf16, keys as attention sees them (after
RoPE). They are coded chunk by chunk by `CacheGenSerializer.to_bytes`, every byte of which counts, and decoded by
`CacheGenDeserializer.from_bytes` into OUT, under the same names.

Bins. LMCache 0.5.6 has no setting for them: a model's name picks them, and a model it does not know gets 32 for K of
layers 0-9 and V of layers 0-1, else 16 (below 10 layers 32 throughout). That is the default here. `--bins
K_FIRST,K_SECOND,K_THIRD,V_FIRST,V_SECOND` replaces them, over the layers that `--layers` divides (10,20,2: K before
10, K before 20, other K; V before 2, other V). The largest of K's bins and the largest of V's must be equal, or
CacheGen cannot join its tables.

Speeds are bf16 megabytes a second of thread CPU time, best of several rounds on the first chunk after a warm-up.
CacheGen hands each channel to a thread pool under Python's global lock; `encode_mb_s` and `decode_mb_s` leave the pool
out, which is faster, and `*_mb_s_pool` keep it (CPU time of the process).
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# Before torch and LMCache are imported: one thread, no GPU, nothing reported home.
os.environ.update(OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="", LMCACHE_TRACK_USAGE="false")
os.environ.setdefault("LMCACHE_LOG_LEVEL", "WARNING")

import torch
from safetensors.torch import load_file, save_file

ROUNDS = 7
BINS_RANGE = range(4, 129)  # fewer leave no level beside 0, more overflow the symbols' int8
PARTS = ("streams", "stream_lengths", "tables", "scales", "pickle")


class Serial:
    """Stands in for CacheGen's thread pool: the same calls in the same order, in the caller's thread."""

    def __enter__(self) -> Serial:
        return self

    def __exit__(self, *exc: object) -> None:
        pass

    def map(self, work: Callable[[Any], Any], tasks: Iterable[Any]) -> Iterator[Any]:
        return map(work, tasks)


@contextmanager
def serial_kernels() -> Iterator[None]:
    """CacheGen's CPU kernels without their thread pool."""
    from lmcache.v1.platform.torch_ops import cachegen_kernels

    pool = cachegen_kernels.ThreadPoolExecutor
    cachegen_kernels.ThreadPoolExecutor = Serial
    try:
        yield
    finally:
        cachegen_kernels.ThreadPoolExecutor = pool


@dataclass
class CacheGen:
    """LMCache's serializer and deserializer for one shape of model."""

    serializer: Any
    deserializer: Any

    @classmethod
    def make(cls, shape: torch.Size, chunk_tokens: int, bins: list[int] | None, ends: list[int]) -> CacheGen:
        """For KV of [layers, 2, tokens, heads, head_dim]; without bins, LMCache's for a model it does not know."""
        from lmcache.storage_backend.serde.cachegen_basics import CacheGenConfig, QuantizationSpec
        from lmcache.storage_backend.serde.cachegen_decoder import CacheGenDeserializer
        from lmcache.storage_backend.serde.cachegen_encoder import CacheGenSerializer
        from lmcache.v1.config import LMCacheEngineConfig
        from lmcache.v1.metadata import LMCacheMetadata

        layers, _, _, heads, head_dim = shape
        config = LMCacheEngineConfig.from_defaults(chunk_size=chunk_tokens)
        with tempfile.TemporaryDirectory() as model:
            Path(model, "config.json").write_text(json.dumps({"model_type": "llama", "num_hidden_layers": layers}))
            metadata = LMCacheMetadata(
                model_name=model,
                world_size=1,
                local_world_size=1,
                worker_id=0,
                local_worker_id=0,
                kv_dtype=torch.bfloat16,
                kv_shape=(layers, 2, chunk_tokens, heads, head_dim),
                chunk_size=chunk_tokens,
            )
            both = CacheGenSerializer(config, metadata), CacheGenDeserializer(config, metadata, torch.bfloat16)
        if bins is not None:
            k_first, k_second, v_first = (min(end, layers) for end in ends)
            kspecs = zip((0, k_first, k_second), (k_first, k_second, layers), bins[:3])
            vspecs = zip((0, v_first), (v_first, layers), bins[3:])
            chosen = CacheGenConfig(
                nlayers=layers,
                kspecs=[QuantizationSpec(*spec) for spec in kspecs],
                vspecs=[QuantizationSpec(*spec) for spec in vspecs],
            )
            for serde in both:
                serde.cachegen_config = chosen
                serde.key_bins, serde.value_bins = serde.make_key_bins(chosen), serde.make_value_bins(chosen)
        made = cls(*both)
        if made.key_bins.max() != made.value_bins.max():
            raise SystemExit("the largest bins of K and of V must be equal: CacheGen cannot join their tables")
        return made

    @property
    def key_bins(self) -> torch.Tensor:
        return self.serializer.key_bins

    @property
    def value_bins(self) -> torch.Tensor:
        return self.serializer.value_bins

    def encode(self, kv: torch.Tensor) -> bytes:
        data: bytes = self.serializer.to_bytes(kv)
        return data

    def decode(self, data: bytes) -> torch.Tensor:
        return self.deserializer.from_bytes(data)

    def wrong_values(self, kv: torch.Tensor, decoded: torch.Tensor) -> int:
        """Values whose decoded symbol is not the quantizer's, or that lie outside their bin (and bf16's rounding)."""
        levels = torch.stack([self.key_bins, self.value_bins], dim=1)[:, :, None, None] // 2 - 1
        exact, got = kv.flatten(3).float(), decoded.flatten(3).float()
        scale = exact.abs().amax(dim=-1, keepdim=True)
        step = (scale / levels).clamp(min=torch.finfo(torch.float32).tiny)
        wanted = torch.round(exact * (levels / scale).nan_to_num(posinf=0.0) + levels) - levels
        allowed = step * 0.5001 + got.abs() / 256
        right = (torch.round(got / step) == wanted) & ((got - exact).abs() <= allowed)
        return int((~right).sum())

    def parts(self, data: bytes) -> dict[str, int]:
        """Where the bytes of one chunk go."""
        from lmcache.storage_backend.serde.cachegen_basics import CacheGenGPUEncoderOutput

        output = CacheGenGPUEncoderOutput.from_bytes(data)
        sizes = {
            "streams": sum(part.bytestream.nbytes for part in output.data_chunks),
            "stream_lengths": sum(part.bytestream_lengths.nbytes for part in output.data_chunks),
            "tables": output.cdf.nbytes,
            "scales": output.max_tensors_key.nbytes + output.max_tensors_value.nbytes,
        }
        return sizes | {"pickle": len(data) - sum(sizes.values())}


@dataclass
class Totals:
    """What all chunks came to."""

    total_bytes: int = 0
    values: int = 0
    chunks: int = 0
    wrong_values: int = 0
    parts: dict[str, int] = field(default_factory=lambda: dict.fromkeys(PARTS, 0))

    def add(self, cachegen: CacheGen, kv: torch.Tensor, data: bytes, decoded: torch.Tensor) -> None:
        self.total_bytes += len(data)
        self.values += kv.numel()
        self.chunks += 1
        self.wrong_values += cachegen.wrong_values(kv, decoded)
        for part, size in cachegen.parts(data).items():
            self.parts[part] += size


def document(tensors: dict[str, torch.Tensor], index: str) -> torch.Tensor:
    """K and V of one document as CacheGen wants them: [layers, 2, tokens, heads, head_dim]."""
    k, v = tensors[f"k.{index}"], tensors[f"v.{index}"]
    if k.shape != v.shape or k.dim() != 4 or {k.dtype, v.dtype} != {torch.bfloat16}:
        raise SystemExit(f"k.{index} and v.{index} must be bf16 of one shape [layers, tokens, heads, head_dim]")
    return torch.stack([k, v], dim=1)


def best_mb_s(work: Callable[[], Any], nbytes: int, clock: Callable[[], float]) -> float:
    """Megabytes a second by that clock, best of several rounds; the first call only warms up."""
    work()
    times = []
    for _ in range(ROUNDS):
        started = clock()
        work()
        times.append(clock() - started)
    return round(nbytes / min(times) / 1e6, 2)


def speeds(cachegen: CacheGen, kv: torch.Tensor) -> dict[str, float]:
    data = cachegen.encode(kv)
    jobs = {"encode_mb_s": lambda: cachegen.encode(kv), "decode_mb_s": lambda: cachegen.decode(data)}
    with serial_kernels():
        result = {name: best_mb_s(work, kv.nbytes, time.thread_time) for name, work in jobs.items()}
    for name, work in jobs.items():
        result[f"{name}_pool"] = best_mb_s(work, kv.nbytes, time.process_time)
    return result


def measure(kv_file: Path, out: Path, bins: list[int] | None, ends: list[int], chunk_tokens: int) -> dict[str, Any]:
    """Codes every document of the file, writes what comes back, and returns the figures."""
    tensors = load_file(kv_file)
    indices = sorted((name[2:] for name in tensors if name.startswith("k.")), key=int)
    if not indices:
        raise SystemExit(f"{kv_file} holds no tensor k.<i>")
    cachegen = None
    totals = Totals()
    coded: dict[str, torch.Tensor] = {}
    timed: dict[str, float] = {}
    for index in indices:
        kv = document(tensors, index)
        cachegen = cachegen or CacheGen.make(kv.shape, chunk_tokens, bins, ends)
        timed = timed or speeds(cachegen, kv[:, :, :chunk_tokens].contiguous())
        pieces = []
        with serial_kernels():
            for chunk in kv.split(chunk_tokens, dim=2):
                data = cachegen.encode(chunk)
                decoded = cachegen.decode(data)
                if decoded.shape != chunk.shape or decoded.dtype != chunk.dtype:
                    raise SystemExit(f"{list(chunk.shape)} came back as {list(decoded.shape)} {decoded.dtype}")
                totals.add(cachegen, chunk, data, decoded)
                pieces.append(decoded)
        whole = torch.cat(pieces, dim=2)
        coded[f"k.{index}"], coded[f"v.{index}"] = (part.contiguous() for part in whole.unbind(dim=1))
    save_file(coded, out)
    assert cachegen is not None
    return {
        "lmcache": importlib.metadata.version("lmcache"),
        "torch": torch.__version__,
        "bins": "default" if bins is None else ",".join(map(str, bins)),
        "key_bins": [int(each) for each in cachegen.key_bins],
        "value_bins": [int(each) for each in cachegen.value_bins],
        "chunk_tokens": chunk_tokens,
        "documents": len(indices),
        "chunks": totals.chunks,
        "values": totals.values,
        "total_bytes": totals.total_bytes,
        "bits_per_value": round(8 * totals.total_bytes / totals.values, 4),
        "bits_by_part": {part: round(8 * size / totals.values, 4) for part, size in totals.parts.items()},
        **timed,
        "symbols_checked": totals.values,
        "wrong_values": totals.wrong_values,
    }


def numbers(count: int, what: str) -> Callable[[str], list[int]]:
    """A parser of that many whole numbers with commas between."""

    def parse(text: str) -> list[int]:
        found = [int(each) for each in text.split(",")]
        if len(found) != count:
            raise ValueError(text)
        return found

    parse.__name__ = f"{count} comma-separated {what}"  # argparse names it in its message
    return parse


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kv", type=Path, required=True, help="safetensors with k.<i> and v.<i>")
    parser.add_argument("--out", type=Path, required=True, help="safetensors to write, as decoded")
    parser.add_argument("--json", type=Path, required=True, help="file for the figures")
    parser.add_argument("--bins", type=numbers(5, "bins"), help="K_FIRST,K_SECOND,K_THIRD,V_FIRST,V_SECOND")
    parser.add_argument(
        "--layers", type=numbers(3, "layers"), default=[10, 20, 2], help="where the ranges of --bins end"
    )
    parser.add_argument("--chunk-tokens", type=int, default=256)
    args = parser.parse_args()
    if args.bins and not all(each in BINS_RANGE for each in args.bins):
        parser.error(f"bins must be {BINS_RANGE[0]} to {BINS_RANGE[-1]}")
    if args.chunk_tokens < 1 or not 0 <= args.layers[0] <= args.layers[1] or args.layers[2] < 0:
        parser.error("--chunk-tokens must be positive and --layers in order")
    torch.set_num_threads(1)
    with torch.inference_mode():
        figures = measure(args.kv, args.out, args.bins, args.layers, args.chunk_tokens)
    text = json.dumps(figures, indent=2)
    args.json.write_text(text + "\n", encoding="utf-8")
    print(text)
    if figures["wrong_values"]:
        print(f"warning: {figures['wrong_values']} values came back wrong, without an error", file=sys.stderr)


if __name__ == "__main__":
    main()
