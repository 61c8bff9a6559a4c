"""Regenerates the codec's golden vectors: `PYTHONPATH=.:tests/support python scripts/make_codec_vectors.py`.

Only when the bitstream is meant to change, together with its version. Inputs, profiles and blobs all stand in the
folder, so that no random generator's future can move them; the blobs are written by the readable reference.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from codec.chunk import cut_chunk, decode_chunk, encode_chunk, refinement_of
from codec.profile import Profile, default_profile, load_profile
from codec.rope import RopeTable, rotate
from codec.tensor_rows import Backend

FOLDER = Path(__file__).resolve().parent.parent / "tests" / "parity" / "golden"
TOKENS, ROTARY = 9, 32
# layers, heads, head dims of K and V
SMALL, WIDE = (2, 2, 64, 40), (1, 2, 128, 128)  # D = 128 has 32 lanes
LAYOUTS = {"static": SMALL, "default": SMALL, "wide": WIDE, "wide-default": WIDE}
WIDE_TOKENS = 6
DTYPES = ("bfloat16", "float16", "float32", "float8_e4m3fn", "float8_e5m2")


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One vector: the inputs encoded, then perhaps cut down to `cut` or reduced to what refines `have`."""

    profile: str
    level: str
    dtype: str = "bfloat16"
    rope: bool = False
    cut: str = ""  # a coarser level
    layers: tuple[int, int] | None = None
    heads: tuple[int, int] | None = None
    have: str = ""

    @property
    def name(self) -> str:
        parts = [self.profile, self.level, self.dtype, "rope" * self.rope, self.cut and f"cut-{self.cut}"]
        parts += [f"{what}{a}to{b}" for what, r in (("l", self.layers), ("h", self.heads)) if r for a, b in [r]]
        return "-".join(part for part in [*parts, self.have and f"behind-{self.have}"] if part)


PART = {"layers": (1, 2), "heads": (0, 1)}
CASES = [
    Case(profile="static", level="raw"),
    Case(profile="static", level="raw", dtype="float8_e5m2"),
    *(Case(profile=name, level="lossless", dtype=dtype) for name in ("static", "default") for dtype in DTYPES),
    *(Case(profile="static", level=level, rope=True) for level in ("q1", "q2", "q3")),
    Case(profile="static", level="q3"),
    *(Case(profile="static", level="q2", dtype=dtype, rope=True) for dtype in DTYPES[1:]),
    Case(profile="static", level="q1", rope=True, cut="q2"),
    Case(profile="static", level="q1", rope=True, cut="q3", **PART),
    Case(profile="static", level="q1", rope=True, have="q3"),
    Case(profile="static", level="q1", rope=True, heads=(1, 2), have="q2"),
    Case(profile="static", level="lossless", **PART),
    Case(profile="static", level="raw", dtype="float8_e4m3fn", **PART),
    *(Case(profile="default", level=level, rope=rope) for level in ("q1", "q3") for rope in (False, True)),
    Case(profile="default", level="q1", rope=True, cut="q2", **PART),
    Case(profile="default", level="q1", rope=True, have="q3"),
    Case(profile="wide", level="q1", rope=True),
    Case(profile="wide", level="q1", rope=True, cut="q3", heads=(1, 2)),
    Case(profile="wide", level="lossless"),
    Case(profile="wide-default", level="q2", rope=True),
]


def tokens_of(case: Case) -> int:
    return WIDE_TOKENS if LAYOUTS[case.profile] == WIDE else TOKENS


def inputs(case: Case) -> tuple[torch.Tensor, torch.Tensor]:
    """k, v from kv.f32: float32, k then v, as many as the layout needs, rounded to the dtype."""
    flat, at, both = torch.from_numpy(np.fromfile(FOLDER / "kv.f32", "<f4")), 0, []
    layers, heads, *dims = LAYOUTS[case.profile]
    for dim in dims:
        size = layers * tokens_of(case) * heads * dim
        both.append(flat[at : at + size].view(layers, -1, heads, dim).to(getattr(torch, case.dtype)))
        at += size
    return both[0], both[1]


def rope(case: Case) -> RopeTable | None:
    """cos and sin from rope.f32: the same bytes on every machine, whatever its libm."""
    if not case.rope:
        return None
    both = np.fromfile(FOLDER / "rope.f32", "<f4").reshape(2, TOKENS, ROTARY)[:, : tokens_of(case)]
    return RopeTable(both[0], both[1])


def profile_of(name: str) -> Profile:
    return load_profile(FOLDER / f"{name}.kvp")


def make_blob(case: Case, backend: Backend) -> bytes:
    profile = profile_of(case.profile)
    whole = encode_chunk(*inputs(case), level=case.level, profile=profile, rope=rope(case), backend=backend)
    blob = cut_chunk(whole, profile=profile, level=case.cut or None, layers=case.layers, heads=case.heads)
    return refinement_of(blob, profile=profile, have=case.have) if case.have else blob


def digest(k: torch.Tensor, v: torch.Tensor) -> str:
    """SHA-256 of the decoded bytes, k then v."""
    return hashlib.sha256(b"".join(x.contiguous().view(torch.uint8).numpy().tobytes() for x in (k, v))).hexdigest()


def decoded_digest(case: Case, blob: bytes, backend: Backend) -> str | None:
    """None for a refinement, which is no chunk of its own."""
    if case.have:
        return None
    return digest(*decode_chunk(blob, profile=profile_of(case.profile), rope=rope(case), backend=backend))


def make_inputs(profile: Profile, table: RopeTable) -> tuple[torch.Tensor, torch.Tensor]:
    """Few outliers; layer 0 as the static profile expects it: falling off along its transformed channels, turned."""
    from codec_cases import make_kv, make_layout  # tests/support

    k, v = make_kv(make_layout(*SMALL), TOKENS, seed=7, dtype=torch.float32)
    k[..., -1] /= 20
    coarsest = 3.0 ** (profile.lossy.num_stages - 1)
    for x, plan in ((k, profile.lossy.k), (v, profile.lossy.v)):
        assert plan is not None
        for head in range(x.shape[2]):
            dim = x.shape[3]
            y = np.random.default_rng(head).normal(0, 5 * (1 - np.arange(dim) / dim) ** 4 + 0.1, (TOKENS, dim))
            y = (y * plan.step[0, head] * coarsest).astype(np.float32)
            plain = plan.mean[0, head] + y @ plan.synthesis[plan.matrix[0, head]]
            x[0, :, head] = torch.from_numpy(rotate(plain, *table.forward()) if x is k else plain)
    v[0, 3, 1, 5], k[1, 4, 0, 3], v[1, 6, 1, 0] = 9.0, -250.0, 700.0  # exceptions
    k[1, 8, 1, 40:44] = torch.tensor([0.0, -0.0, 1e-39, 3e-41])
    return k, v


def main() -> None:
    from codec_cases import make_layout, make_profile, make_rope  # tests/support

    FOLDER.mkdir(parents=True, exist_ok=True)
    for old in FOLDER.glob("*"):
        old.unlink()
    for name, sizes in LAYOUTS.items():
        layout = make_layout(*sizes)
        if name.endswith("default"):
            default_profile(layout).save(FOLDER / f"{name}.kvp")
        else:
            make_profile(layout, seed=3, group=4, matrices=name == "static", unturned=1).save(FOLDER / f"{name}.kvp")
    table = make_rope(TOKENS, ROTARY, start=1000)
    np.stack([table.cos, table.sin]).astype("<f4").tofile(FOLDER / "rope.f32")
    k, v = make_inputs(profile_of("static"), table)
    np.concatenate([k.numpy().ravel(), v.numpy().ravel()]).astype("<f4").tofile(FOLDER / "kv.f32")
    index = {}
    for case in CASES:
        blob = make_blob(case, "reference")
        (FOLDER / f"{case.name}.kvsb").write_bytes(blob)
        index[case.name] = decoded_digest(case, blob, "reference")
    (FOLDER / "decoded.json").write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
    size = sum(path.stat().st_size for path in FOLDER.glob("*"))
    print(f"{len(index)} vectors, {size} bytes in {FOLDER}")


if __name__ == "__main__":
    main()
