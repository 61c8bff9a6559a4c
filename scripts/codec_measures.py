"""What scripts/bench_codec.py measures on KV: sizes, the entropy bound, speeds. No model.

Legend: L layers, T tokens, H KV heads, D head dim, M stages.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from codec.allocate import KV, Sample
from codec.chunk import decode_chunk, encode_chunk, warmup
from codec.entropy import histogram
from codec.levels import LevelKind, TensorPlan
from codec.profile import Profile
from codec.quantize import bf16_to_float, coarsen, quantize, round_to_bf16
from codec.rope import RopeTable, rotate, unrotate
from codec.tensor_rows import bits_of
from kernels.rans_reference import VALUE_LOW

ROUNDS = 15


def entropy_bits(counts: np.ndarray) -> np.ndarray:
    """Empirical entropy of each row, bits a symbol."""
    share = counts / np.maximum(counts.sum(axis=-1, keepdims=True), 1)
    bits: np.ndarray = -(share * np.log2(np.maximum(share, 1e-12))).sum(axis=-1)
    return bits


def chunks_of(sample: Sample, chunk_tokens: int) -> Iterator[Sample]:
    for start in range(0, sample.k.shape[1], chunk_tokens):
        rows = slice(start, start + chunk_tokens)
        rope = sample.rope
        if rope is not None:
            rope = rope.part(rows.start, rows.stop)
        yield Sample(k=sample.k[:, rows], v=sample.v[:, rows], rope=rope)


@dataclass(slots=True)
class Through:
    """A transform that encodes and decodes for real, chunk by chunk, counting every byte and the entropy bound."""

    profile: Profile
    level: str
    chunk_tokens: int
    num_bytes: int = 0
    num_values: int = 0
    ideal_bits: float = 0.0
    over_bits: float = 0.0  # of whole chunks alone: a document's last is shorter
    over_values: int = 0

    def __call__(self, sample: Sample) -> KV:
        parts = []
        for chunk in chunks_of(sample, self.chunk_tokens):
            blob = encode_chunk(chunk.k, chunk.v, level=self.level, profile=self.profile, rope=chunk.rope)
            parts.append(decode_chunk(blob, profile=self.profile, rope=chunk.rope))
            values = chunk.k.numel() + chunk.v.numel()
            self.num_bytes += len(blob)
            self.num_values += values
            ideal = ideal_bits(chunk, self.profile, self.level) * values
            self.ideal_bits += ideal
            if chunk.k.shape[1] == self.chunk_tokens:
                self.over_bits += 8 * len(blob) - ideal
                self.over_values += values
        return torch.cat([k for k, _ in parts], dim=1), torch.cat([v for _, v in parts], dim=1)

    @property
    def bits_per_value(self) -> float:
        return 8 * self.num_bytes / self.num_values

    @property
    def ideal_bits_per_value(self) -> float:
        return self.ideal_bits / self.num_values

    @property
    def overhead_bits_per_value(self) -> float:
        """Side information, states and table mismatch in chunks of exactly chunk_tokens; nan if there are none."""
        return self.over_bits / self.over_values if self.over_values else float("nan")


def ideal_bits(chunk: Sample, profile: Profile, level: str) -> float:
    """Empirical entropy of the integers, per channel of this chunk, in bits a value; no side information at all.

    Lossless: of the coded bytes, plus the plain bits. nan where each blob measures its own statistics.
    """
    spec = profile.level(level)
    if spec.kind is LevelKind.RAW:
        return 8.0 * chunk.k.element_size()
    bits = []
    for which, tensor, plan in (("K", chunk.k, profile.lossy.k), ("V", chunk.v, profile.lossy.v)):
        raw = bits_of(tensor)
        for layer in range(raw.shape[0]):
            for head in range(raw.shape[2]):
                rows = np.ascontiguousarray(raw[layer, :, head])
                if spec.kind is LevelKind.LOSSLESS:
                    bits.append(8 + entropy_bits(histogram(((rows >> 7) & 0xFF).astype(np.int32) + VALUE_LOW)))
                elif plan is None:
                    return float("nan")
                else:
                    rope = chunk.rope if which == "K" else None
                    q = integers_of(rows, plan, layer, head, rope)
                    wide = coarsen(q, profile.lossy.num_stages - spec.stages)
                    bits.append(np.array([entropy_bits(np.unique(column, return_counts=True)[1]) for column in wide.T]))
    return float(np.mean(np.concatenate(bits)))


def coded_rows(rows: np.ndarray, plan: TensorPlan, layer: int, head: int, rope: RopeTable | None) -> np.ndarray:
    """bf16 patterns [T, D] of one head -> y [T, D] float32, what is quantized."""
    x = bf16_to_float(rows)
    if rope is not None and plan.is_turned[layer]:
        x = unrotate(x, *rope.inverse())
    y = x - plan.mean[layer, head]
    matrix = plan.matrix[layer, head]
    return y if matrix < 0 else np.asarray(y @ plan.analysis[matrix], np.float32)


def integers_of(rows: np.ndarray, plan: TensorPlan, layer: int, head: int, rope: RopeTable | None) -> np.ndarray:
    """The same -> q [T, D] of the last stage."""
    q = quantize(coded_rows(rows, plan, layer, head, rope), np.float32(1) / plan.step[layer, head])
    assert q is not None
    return q


def without_matrices(chunk: Sample, profile: Profile) -> tuple[Sample, Profile]:
    """KV and a profile that give (nearly) the same integers with decorrelation off: the decorrelated values themselves
    are the KV. For measuring speed alone."""
    plans, tensors = [], []
    for which, tensor, plan in (("K", chunk.k, profile.lossy.k), ("V", chunk.v, profile.lossy.v)):
        assert plan is not None
        out = np.empty(tensor.shape, np.float32)
        raw = bits_of(tensor)
        for layer in range(raw.shape[0]):
            for head in range(raw.shape[2]):
                rope = chunk.rope if which == "K" and plan.is_turned[layer] else None
                y = coded_rows(np.ascontiguousarray(raw[layer, :, head]), plan, layer, head, rope)
                out[layer, :, head] = y if rope is None else rotate(y, *rope.forward())
        tensors.append(torch.from_numpy(round_to_bf16(out)).to(torch.bfloat16))
        dim = plan.mean.shape[2]
        plans.append(
            replace(
                plan, matrix=np.full_like(plan.matrix, -1), mean=np.zeros_like(plan.mean),
                active=np.full_like(plan.active, dim),
                analysis=np.zeros((0, dim, dim), np.float32), synthesis=np.zeros((0, dim, dim), np.float32),
            )
        )  # fmt: skip
    lossy = replace(profile.lossy, k=plans[0], v=plans[1])
    return Sample(k=tensors[0], v=tensors[1], rope=chunk.rope), replace(profile, lossy=lossy)


PLAIN_GROUP = 64


def plain_integers(bits: int) -> Callable[[Sample], KV]:
    """Plain integer quantization as KIVI lays it out (Liu et al., arXiv:2402.02750): keys per channel in groups of 64
    tokens, values per token and head, smallest and largest value in bf16. Costs bits + 32 / 64 (V: / D) a value."""

    def coarse(x: torch.Tensor, dim: int) -> torch.Tensor:
        low, high = x.amin(dim=dim, keepdim=True).bfloat16().float(), x.amax(dim=dim, keepdim=True).bfloat16().float()
        step = ((high - low) / (2**bits - 1)).clamp(min=1e-12)
        return ((x - low) / step).round().clamp(0, 2**bits - 1) * step + low

    def transform(sample: Sample) -> KV:
        groups = [coarse(part, 1) for part in sample.k.float().split(PLAIN_GROUP, dim=1)]
        return torch.cat(groups, dim=1).to(sample.k.dtype), coarse(sample.v.float(), 3).to(sample.v.dtype)

    return transform


def best_seconds(work: Callable[[], Any], rounds: int = ROUNDS) -> float:
    """CPU time of this thread, so that a busy machine distorts less."""
    times = []
    for _ in range(rounds):
        started = time.thread_time()
        work()
        times.append(time.thread_time() - started)
    return min(times)


def speeds(chunk: Sample, profile: Profile, levels: Sequence[str]) -> dict[str, dict[str, float]]:
    """Encode and decode speed of each level on one core, bf16 megabytes a second. Asserts every round trip first."""
    warmup(profile)
    megabytes = (chunk.k.numel() + chunk.v.numel()) * 2 / 1e6
    out = (torch.empty_like(chunk.k), torch.empty_like(chunk.v))
    found = {}
    for name in levels:
        blob = encode_chunk(chunk.k, chunk.v, level=name, profile=profile, rope=chunk.rope)
        decode_chunk(blob, profile=profile, rope=chunk.rope, out=out)
        if profile.level(name).kind is not LevelKind.QUANTIZED:
            assert torch.equal(out[0], chunk.k) and torch.equal(out[1], chunk.v), f"{name} is not exact"
        again = encode_chunk(*out, level=name, profile=profile, rope=chunk.rope)
        third = decode_chunk(again, profile=profile, rope=chunk.rope)
        changed = max(float((a != b).float().mean()) for a, b in zip(third, out, strict=True))
        assert changed < 0.02, f"{name}: {changed:.2%} of the values change when coded twice"
        spread = float((out[1] - chunk.v).float().square().mean() / chunk.v.float().square().mean())
        assert spread < 1.0, f"{name} loses more than everything"
        encode_s = best_seconds(
            lambda n=name: encode_chunk(chunk.k, chunk.v, level=n, profile=profile, rope=chunk.rope)
        )
        decode_s = best_seconds(lambda b=blob: decode_chunk(b, profile=profile, rope=chunk.rope, out=out))
        found[name] = {
            "encode_mb_s": round(megabytes / encode_s, 1),
            "decode_mb_s": round(megabytes / decode_s, 1),
            "changed_when_coded_twice": round(changed, 6),
        }
    return found
