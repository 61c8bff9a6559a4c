"""Profiles, tensors and checks that the codec's tests share. Seeded throughout."""

from __future__ import annotations

import numpy as np
import torch

from codec import bitstream, shipped
from codec.bitstream import DTYPE_CODES
from codec.chunk import decode_chunk, encode_chunk, inspect_blob
from codec.decorrelate import as_stored
from codec.entropy import CodeBook, bell_cuts, bell_table
from codec.levels import EXACT, Level, LevelKind, Lossless, Lossy, Promise, TensorPlan
from codec.profile import CodecLayout, Profile, default_lossless
from codec.quantize import round_to_bf16
from codec.rope import RopeTable, unrotate

MB = 1 << 20


def make_layout(layers: int = 2, heads: int = 2, dim_k: int = 64, dim_v: int = 64) -> CodecLayout:
    return CodecLayout(num_layers=layers, num_kv_heads=heads, head_dim_k=dim_k, head_dim_v=dim_v)


def make_profile(
    layout: CodecLayout, *, seed: int = 0, group: int = 8, step: float = 0.25, needs_rope: bool = False,
    stages: int = 3, matrices: bool = False, unturned: int | None = None,
) -> Profile:  # fmt: skip
    """A profile as calibration would write one, every step on: means, uneven steps, deltas on odd layers.

    q1 is the finest level, of `stages` stages, and `step` about the coarsest's step. matrices: layer 0 is decorrelated,
    with fewer active channels at coarse stages. unturned: a layer whose keys stay as they are.
    """
    rng = np.random.default_rng(seed)
    shape = (layout.num_layers, layout.num_kv_heads)
    spreads = np.geomspace(0.1, 9, 8)
    book = CodeBook(freqs=np.stack([bell_table(s) for s in spreads]))
    cuts = np.zeros((stages - 1, 8, 3, 2), np.uint16)
    for stage in range(1, stages):
        cuts[stage - 1] = np.stack([bell_cuts(s, stage) for s in spreads])

    def plan(dim: int) -> TensorPlan:
        steps = 4 * step * np.exp2(rng.uniform(-1, 1, (*shape, dim))) / 3.0 ** (stages - 1)
        matrix = np.full(shape, -1, np.int64)
        analysis = synthesis = np.zeros((0, dim, dim), np.float32)
        active = np.full((stages, *shape), dim, np.int64)
        if matrices:
            matrix[0] = np.arange(shape[1])
            pairs = [as_stored(np.linalg.qr(rng.normal(size=(dim, dim)))[0]) for _ in range(shape[1])]
            analysis, synthesis = (np.stack(part) for part in zip(*pairs, strict=True))
            active[:, 0] = np.maximum(np.arange(1, stages + 1) * dim // stages, 1)[:, None]
        return TensorPlan(
            mean=round_to_bf16(rng.normal(0, 0.3, (*shape, dim))), step=round_to_bf16(steps),
            is_turned=np.array([layer != unturned for layer in range(shape[0])]),
            group=np.where(np.arange(shape[0]) % 2 == 1, group, 0).astype(np.int64),
            matrix=matrix, analysis=analysis, synthesis=synthesis, active=active,
            index=rng.integers(4, 8, (*shape, 2, dim)).astype(np.uint8),
            refine=rng.integers(4, 8, (stages - 1, *shape, dim)).astype(np.uint8),
        )  # fmt: skip

    exponents = default_lossless("bfloat16").codebook
    near_one = 20 + rng.integers(0, 3, (2, *shape, max(layout.head_dim_k, layout.head_dim_v))).astype(np.uint8)
    calibrated = Lossless(
        codebook=exponents, k=near_one[0, ..., : layout.head_dim_k], v=near_one[1, ..., : layout.head_dim_v]
    )
    names = [f"q{i}" for i in range(1, stages + 1)]
    lossy = Lossy(num_stages=stages, codebook=book, cuts=cuts, k=plan(layout.head_dim_k), v=plan(layout.head_dim_v))
    levels = (
        Level(name="raw", kind=LevelKind.RAW),
        Level(name="lossless", kind=LevelKind.LOSSLESS),
        *(Level(name=name, kind=LevelKind.QUANTIZED, stages=stages - i) for i, name in enumerate(names)),
    )
    return Profile(
        fingerprint=f"test-{seed}",
        layout=layout,
        levels=levels,
        lossy=lossy,
        lossless={dtype: default_lossless(dtype) for dtype in DTYPE_CODES}
        | dict.fromkeys(("bfloat16", "float32"), calibrated),
        needs_rope=needs_rope,
        bits_per_value=dict.fromkeys((level.name for level in levels), 8.0),
        promise={"raw": EXACT, "lossless": EXACT} | {name: Promise(kl=0.01 * i) for i, name in enumerate(names, 1)},
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
    for which, (old, new) in enumerate(((k, out[0]), (v, out[1]))):
        check_error_bound(old, new, blob, profile, "KV"[which], rope if which == 0 else None)
    return blob


def error_bounds(blob: bytes, which: str, profile: Profile) -> tuple[np.ndarray, np.ndarray]:
    """What each value of [L, H, D] may be off by, in the frame in which it was quantized, and is_turned [L]."""
    info = inspect_blob(blob)
    part = "KV".index(which)
    lossy, shape = profile.lossy, (*info.layout[:2], info.layout[2 + part])
    scale = 3.0 ** (lossy.num_stages - info.stages) / 2
    plan = (lossy.k, lossy.v)[part]
    if plan is None:
        directory = bitstream.parse_directory(memoryview(blob), info)
        width = shipped.side_words(shape[2], is_lossless=False)
        side = shipped.read_side(directory.words, directory.start[0, part].ravel(), width)
        return shipped.unpack_side(side, shape[2], lossy.codebook)[1].reshape(shape) * scale, np.ones(shape[0], bool)
    bound = plan.step.astype(np.float64) * scale
    for layer, head in np.argwhere(plan.matrix >= 0):
        bound[layer, head] = np.abs(plan.synthesis[plan.matrix[layer, head]]).T @ bound[layer, head]
    return bound, plan.is_turned


def check_error_bound(
    old: torch.Tensor, new: torch.Tensor, blob: bytes, profile: Profile, which: str, rope: RopeTable | None
) -> None:
    """|x - decoded| <= the bound where it was quantized, plus bf16's and float32's rounding."""
    bound, is_turned = error_bounds(blob, which, profile)
    a, b = old.to(torch.bfloat16).double().numpy(), new.double().numpy()
    ulp = np.abs(b) * 2.0**-8 + np.abs(a).max(axis=-1, keepdims=True) * 2.0**-12
    if rope is not None:
        cos, sin = rope.inverse()
        half = cos.shape[1]
        size = np.sqrt(b[..., :half] ** 2 + b[..., half : 2 * half] ** 2)
        ulp[..., :half] += size * 2.0**-7.5
        ulp[..., half : 2 * half] += size * 2.0**-7.5
        for layer in np.flatnonzero(is_turned):
            for head in range(a.shape[2]):
                a[layer, :, head] = unrotate(a[layer, :, head], cos, sin)
                b[layer, :, head] = unrotate(b[layer, :, head], cos, sin)
    worst = float((np.abs(a - b) / (bound[:, None] * 1.0002 + ulp)).max())
    assert worst <= 1, f"error is {worst:.3f} of its bound"
