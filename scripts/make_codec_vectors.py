"""Regenerates the codec's golden vectors: `PYTHONPATH=.:tests/support python scripts/make_codec_vectors.py`.

Only when the bitstream is meant to change, together with its version. Inputs, profiles and blobs all stand in the
folder, so that no random generator's future can move them; the blobs are written by the readable reference.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import torch

from codec.chunk import decode_chunk, encode_chunk
from codec.profile import Profile, default_profile, load_profile
from codec.rope import RopeTable

FOLDER = Path(__file__).resolve().parent.parent / "tests" / "parity" / "golden"
LAYERS, TOKENS, HEADS, DIM_K, DIM_V, ROTARY = 2, 11, 2, 64, 40, 32
CASES = [
    {
        "name": f"{profile}-{level}-{dtype}{'-rope' if rope else ''}",
        "profile": profile,
        "level": level,
        "dtype": dtype,
        "rope": rope,
    }
    for profile, levels in (
        ("static", ("raw", "lossless", "q1", "q2", "q3")),
        ("default", ("lossless", "q1", "q4")),
    )
    for level in levels
    for dtype in (("bfloat16", "float32", "float16") if level in ("raw", "lossless") else ("bfloat16",))
    for rope in ((False, True) if level.startswith("q") else (False,))
]


def inputs(dtype: str) -> tuple[torch.Tensor, torch.Tensor]:
    """k, v from kv.f32: float32 [k then v], rounded to the dtype."""
    flat = torch.from_numpy(np.fromfile(FOLDER / "kv.f32", "<f4"))
    cut = LAYERS * TOKENS * HEADS * DIM_K
    k, v = flat[:cut].view(LAYERS, TOKENS, HEADS, DIM_K), flat[cut:].view(LAYERS, TOKENS, HEADS, DIM_V)
    return k.to(getattr(torch, dtype)), v.to(getattr(torch, dtype))


def rope() -> RopeTable:
    """cos and sin from rope.f32: the same bytes on every machine, whatever its libm."""
    both = np.fromfile(FOLDER / "rope.f32", "<f4").reshape(2, TOKENS, ROTARY)
    return RopeTable(both[0], both[1])


def profile_of(case: dict[str, object]) -> Profile:
    return load_profile(FOLDER / f"{case['profile']}.kvp")


def digest(k: torch.Tensor, v: torch.Tensor) -> str:
    """SHA-256 of the decoded bytes, k then v."""
    return hashlib.sha256(b"".join(x.contiguous().view(torch.uint8).numpy().tobytes() for x in (k, v))).hexdigest()


def main() -> None:
    from codec_cases import make_kv, make_layout, make_profile, make_rope  # tests/support

    FOLDER.mkdir(parents=True, exist_ok=True)
    layout = make_layout(LAYERS, HEADS, DIM_K, DIM_V)
    k, v = make_kv(layout, TOKENS, seed=7, dtype=torch.float32)
    v[0, 3, 1, 5] = 700.0  # an escape
    np.concatenate([k.numpy().ravel(), v.numpy().ravel()]).astype("<f4").tofile(FOLDER / "kv.f32")
    table = make_rope(TOKENS, ROTARY, start=1000)
    np.stack([table.cos, table.sin]).astype("<f4").tofile(FOLDER / "rope.f32")
    make_profile(layout, seed=3, group=4).save(FOLDER / "static.kvp")
    default_profile(layout).save(FOLDER / "default.kvp")
    index = {}
    for case in CASES:
        profile, used = profile_of(case), rope() if case["rope"] else None
        kv = inputs(str(case["dtype"]))
        blob = encode_chunk(*kv, level=str(case["level"]), profile=profile, rope=used, backend="reference")
        (FOLDER / f"{case['name']}.kvsb").write_bytes(blob)
        out = decode_chunk(blob, profile=profile, rope=used, backend="reference")
        index[case["name"]] = digest(*out)
    (FOLDER / "decoded.json").write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
    print(f"{len(index)} vectors in {FOLDER}")


if __name__ == "__main__":
    main()
