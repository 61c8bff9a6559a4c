"""Profiles, tensors and checks that the codec's tests share. Seeded throughout."""

from __future__ import annotations

import numpy as np
import torch

from codec.chunk import decode_chunk, encode_chunk
from codec.entropy import CodeBook, exponent_table, laplace_table
from codec.levels import EXACT, Level, LevelKind, Promise, TensorPlan
from codec.profile import CodecLayout, Profile
from codec.quantize import round_to_bf16
from codec.rope import RopeTable, unrotate

MB = 1 << 20


def make_layout(layers: int = 2, heads: int = 2, dim_k: int = 64, dim_v: int = 64) -> CodecLayout:
    return CodecLayout(num_layers=layers, num_kv_heads=heads, head_dim_k=dim_k, head_dim_v=dim_v)


def make_profile(
    layout: CodecLayout, *, seed: int = 0, group: int = 8, step: float = 0.25, needs_rope: bool = False
) -> Profile:
    """A profile as calibration would write one, every step on: means, uneven steps, deltas on odd layers."""
    rng = np.random.default_rng(seed)
    shape = (layout.num_layers, layout.num_kv_heads)
    book = CodeBook(freqs=np.stack([laplace_table(s) for s in np.geomspace(0.1, 30, 8)]))
    exponents = CodeBook(freqs=np.stack([exponent_table(p) for p in (118.0, 123.0, 126.0, 129.0)]))

    def plan(dim: int, tables: int, factor: float) -> TensorPlan:
        steps = round_to_bf16(factor * step * np.exp2(rng.uniform(-1, 1, shape)))
        groups = np.where(np.arange(layout.num_layers) % 2 == 1, group, 0).astype(np.int64)
        index = rng.integers(tables // 2, tables, (*shape, 2, dim)).astype(np.uint8)
        return TensorPlan(index=index, step=steps, group=groups)

    lossy = tuple(
        Level(
            name=f"q{i}", kind=LevelKind.QUANTIZED, codebook=book,
            k=plan(layout.head_dim_k, 8, factor), v=plan(layout.head_dim_v, 8, factor),
        )
        for i, factor in ((1, 0.25), (2, 1.0), (3, 4.0))
    )  # fmt: skip
    lossless = Level(
        name="lossless", kind=LevelKind.LOSSLESS, codebook=exponents,
        k=plan(layout.head_dim_k, 4, 1.0), v=plan(layout.head_dim_v, 4, 1.0),
    )  # fmt: skip
    names = ("raw", "lossless", "q1", "q2", "q3")
    return Profile(
        fingerprint=f"test-{seed}",
        layout=layout,
        levels=(Level(name="raw", kind=LevelKind.RAW), lossless, *lossy),
        mean_k=round_to_bf16(rng.normal(0, 0.5, (*shape, layout.head_dim_k))),
        mean_v=round_to_bf16(rng.normal(0, 0.1, (*shape, layout.head_dim_v))),
        needs_rope=needs_rope,
        bits_per_value=dict.fromkeys(names, 8.0),
        promise={"raw": EXACT, "lossless": EXACT} | {f"q{i}": Promise(kl=0.01 * i) for i in (1, 2, 3)},
    )


def make_kv(
    layout: CodecLayout, tokens: int, *, seed: int = 0, dtype: torch.dtype = torch.bfloat16
) -> tuple[torch.Tensor, torch.Tensor]:
    """K with channel biases and one outlier channel, V plain."""
    rng = np.random.default_rng(seed)
    k = rng.normal(0, 1, (layout.num_layers, tokens, layout.num_kv_heads, layout.head_dim_k))
    k += rng.normal(0, 2, layout.head_dim_k)
    k[..., -1] *= 20
    v = rng.normal(0, 0.5, (layout.num_layers, tokens, layout.num_kv_heads, layout.head_dim_v))
    return torch.from_numpy(k).to(dtype), torch.from_numpy(v).to(dtype)


def make_rope(tokens: int, dims: int, *, start: int = 0) -> RopeTable:
    angle = (start + np.arange(tokens))[:, None] * 10000.0 ** (-np.arange(0, dims, 2) / dims)
    both = np.concatenate([angle, angle], axis=1)
    return RopeTable(np.cos(both), np.sin(both))


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal as bit patterns: NaNs and signed zeros too."""
    return a.dtype is b.dtype and torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def check_round_trip(
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    level: str,
    profile: Profile,
    rope: RopeTable | None,
    backend: str = "numba",
) -> bytes:
    """Encodes, decodes, checks exactness or the level's error bound; returns the blob."""
    blob = encode_chunk(k, v, level=level, profile=profile, rope=rope, backend=backend)
    out = decode_chunk(blob, profile=profile, rope=rope, backend=backend)
    spec = profile.level(level)
    if spec.kind is not LevelKind.QUANTIZED:
        assert same_bits(out[0], k) and same_bits(out[1], v)
        return blob
    for which, old, new, plan in (("K", k, out[0], spec.k), ("V", v, out[1], spec.v)):
        steps = plan.step if plan is not None else shipped_steps(blob, which, profile)
        check_error_bound(old, new, steps, rope if which == "K" else None)
    return blob


def shipped_steps(blob: bytes, which: str, profile: Profile) -> np.ndarray:
    """The steps [L, H] that a blob carries in its segments."""
    from codec import bitstream, shipped

    view = memoryview(blob)
    info = bitstream.parse_header(view)
    payload, *tables = bitstream.parse_directory(bitstream.check_body(view, info), info)
    part = 0 if which == "K" else 1
    dim = info.layout[2 + part]
    width = bitstream.side_words(info.kind, True, dim)
    book = profile.level(info.level).codebook
    assert book is not None
    return shipped.unpack_side(shipped.read_side(payload, tables[part].pos, width), dim, book)[1].reshape(
        info.layout[:2]
    )


def check_error_bound(old: torch.Tensor, new: torch.Tensor, steps: np.ndarray, rope: RopeTable | None) -> None:
    """|x - decoded| <= step / 2 where it was quantized (before RoPE for keys), plus bf16's and float32's rounding."""
    a, b = old.to(torch.bfloat16).double().numpy(), new.double().numpy()
    ulp = np.abs(b) * 2.0**-8 + np.abs(a) * 2.0**-19
    if rope is not None:
        cos, sin = rope.inverse()
        half = cos.shape[1]
        size = np.sqrt(b[..., :half] ** 2 + b[..., half : 2 * half] ** 2)
        ulp[..., :half] = ulp[..., half : 2 * half] = size * 2.0**-7.5
        for layer in range(a.shape[0]):
            for head in range(a.shape[2]):
                a[layer, :, head] = unrotate(a[layer, :, head], cos, sin)
                b[layer, :, head] = unrotate(b[layer, :, head], cos, sin)
    bound = steps[:, None, :, None] * 0.5001 + ulp
    worst = float((np.abs(a - b) / bound).max())
    assert worst <= 1, f"error is {worst:.3f} of its bound"
