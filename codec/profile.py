"""A profile: all that calibration found for one model, shared by both ends, named by its hash. Reads and writes a file.

File, little-endian: magic "KVSP", version u16, then one msgpack map {"meta": {...}, "arrays": {name: [dtype, shape,
zlib bytes]}}. Never pickle. The id is the first 32 hex digits of the SHA-256 of everything after the version.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import msgpack
import numpy as np

from codec.entropy import CodeBook, exponent_table, laplace_table, normalize
from codec.errors import InvalidProfile, UnknownLevel
from codec.levels import EXACT, Level, LevelKind, Promise, TensorPlan
from codec.quantize import round_to_bf16

MAGIC = b"KVSP"
VERSION = 1
MAX_FILE_BYTES = 64 << 20
MAX_ARRAY_BYTES = 64 << 20
MIN_STEP, MAX_STEP = 2.0**-60, 2.0**60
MAX_MEAN = 2.0**90
_DTYPES = {"u1": np.uint8, "u2": np.uint16, "i8": np.int64, "f4": np.float32}


class Layout(Protocol):
    """The part of a model's KV layout that the codec needs."""

    @property
    def num_layers(self) -> int: ...
    @property
    def num_kv_heads(self) -> int: ...
    @property
    def head_dim_k(self) -> int: ...
    @property
    def head_dim_v(self) -> int: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class CodecLayout:
    """num_layers L, num_kv_heads H, head dims of K and V."""

    num_layers: int
    num_kv_heads: int
    head_dim_k: int
    head_dim_v: int


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Profile:
    """levels: best to worst. mean_k [L, H, Dk], mean_v [L, H, Dv]: float32, bf16-representable; removed before coding.

    needs_rope: quantized keys must be coded with a RopeTable (the statistics were learned before RoPE).
    curve: what calibration measured, for people and reports. provenance: where it came from.
    """

    fingerprint: str
    layout: CodecLayout
    levels: tuple[Level, ...]
    mean_k: np.ndarray
    mean_v: np.ndarray
    needs_rope: bool
    bits_per_value: Mapping[str, float]
    promise: Mapping[str, Promise]
    provenance: Mapping[str, Any] = field(default_factory=dict)
    curve: tuple[Mapping[str, Any], ...] = ()
    id: str = field(init=False)
    _by_name: dict[str, Level] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        _check(self)
        object.__setattr__(self, "_by_name", {level.name: level for level in self.levels})
        object.__setattr__(self, "id", hashlib.sha256(_body(self)).hexdigest()[:32])

    @property
    def level_names(self) -> tuple[str, ...]:
        """Best to worst."""
        return tuple(level.name for level in self.levels)

    def level(self, name: str) -> Level:
        try:
            return self._by_name[name]
        except KeyError:
            raise UnknownLevel(f"no level {name!r}; this profile has {', '.join(self.level_names)}") from None

    def save(self, path: str | Path) -> None:
        """Writes the file whole or not at all."""
        path = Path(path)
        part = path.with_name(path.name + ".part")
        part.write_bytes(MAGIC + VERSION.to_bytes(2, "little") + _body(self))
        part.replace(path)


def _check(profile: Profile) -> None:
    lay = profile.layout
    names = profile.level_names
    if len(set(names)) != len(names) or any(not 0 < len(n) <= 8 or not n.isascii() for n in names):
        raise InvalidProfile(f"level names must be distinct ASCII of at most 8 letters: {names}")
    for which, mean, dim in (("K", profile.mean_k, lay.head_dim_k), ("V", profile.mean_v, lay.head_dim_v)):
        if mean.shape != (lay.num_layers, lay.num_kv_heads, dim) or not (np.abs(mean) <= MAX_MEAN).all():
            raise InvalidProfile(f"the {which} means do not fit the layout or are not finite")
    for level in profile.levels:
        if level.kind is LevelKind.RAW:
            continue
        if level.codebook is None or (level.k is None) != (level.v is None):
            raise InvalidProfile(f"level {level.name} lacks its tables")
        for plan, dim in ((level.k, lay.head_dim_k), (level.v, lay.head_dim_v)):
            if plan is None:
                continue
            fits = plan.index.shape == (lay.num_layers, lay.num_kv_heads, 2, dim) and plan.index.dtype == np.uint8
            fits = (
                fits and plan.step.shape == (lay.num_layers, lay.num_kv_heads) and plan.group.shape == (lay.num_layers,)
            )
            if not fits or int(plan.index.max(initial=0)) >= level.codebook.num_tables:
                raise InvalidProfile(f"level {level.name} does not fit the layout or names a table it lacks")
            if (
                not ((plan.step >= MIN_STEP) & (plan.step <= MAX_STEP)).all()
                or not ((plan.group >= 0) & (plan.group <= 4096)).all()
            ):
                raise InvalidProfile(f"level {level.name} has a step or an anchor group out of range")


def _body(profile: Profile) -> bytes:
    arrays: dict[str, np.ndarray] = {"mean_k": profile.mean_k, "mean_v": profile.mean_v}
    levels = []
    for level in profile.levels:
        entry: dict[str, Any] = {
            "name": level.name,
            "kind": int(level.kind),
            "step_factor": level.step_factor,
        }
        entry["bits_per_value"] = profile.bits_per_value.get(level.name)
        promise = profile.promise.get(level.name, Promise())
        entry["promise"] = [promise.kl, promise.delta_nll, promise.greedy_agreement, promise.recall_drop]
        if level.codebook is not None:
            arrays[f"{level.name}.freqs"] = level.codebook.freqs
        for which, plan in (("k", level.k), ("v", level.v)):
            if plan is not None:
                for part in ("index", "step", "group"):
                    arrays[f"{level.name}.{which}.{part}"] = getattr(plan, part)
        levels.append(entry)
    lay = profile.layout
    meta = {
        "fingerprint": profile.fingerprint,
        "layout": [lay.num_layers, lay.num_kv_heads, lay.head_dim_k, lay.head_dim_v],
        "needs_rope": profile.needs_rope,
        "levels": levels,
        "provenance": dict(profile.provenance),
        "curve": [dict(row) for row in profile.curve],
    }
    packed = {
        name: [
            a.dtype.str[1:],
            list(a.shape),
            zlib.compress(np.ascontiguousarray(a).astype(a.dtype.newbyteorder("<")).tobytes(), 9),
        ]
        for name, a in arrays.items()
    }
    body: bytes = msgpack.packb({"meta": meta, "arrays": packed})
    return body


def load_profile(path: str | Path) -> Profile:
    """Reads a profile file. Raises InvalidProfile (or OSError when there is no file)."""
    path = Path(path)
    if path.stat().st_size > MAX_FILE_BYTES:
        raise InvalidProfile(f"{path} is larger than any profile ({MAX_FILE_BYTES} bytes)")
    data = path.read_bytes()
    if data[:4] != MAGIC:
        raise InvalidProfile(f"{path} is not a kvstream profile; make one with `kvstream calibrate`")
    if int.from_bytes(data[4:6], "little") != VERSION:
        raise InvalidProfile(
            f"{path} has profile version {int.from_bytes(data[4:6], 'little')}, this build reads {VERSION}"
        )
    try:
        return _parse(msgpack.unpackb(data[6:]))
    except InvalidProfile:
        raise
    except Exception as error:  # any malformation of an untrusted file, whatever library notices it first
        raise InvalidProfile(f"{path} is damaged ({type(error).__name__}); run `kvstream calibrate` again") from error


def _unpack_array(entry: list[Any]) -> np.ndarray:
    dtype = np.dtype(_DTYPES[entry[0]]).newbyteorder("<")
    shape = tuple(int(n) for n in entry[1])
    if any(n < 0 for n in shape):
        raise InvalidProfile("an array has a negative size")
    size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    if size > MAX_ARRAY_BYTES:
        raise InvalidProfile("an array in the profile is over the limit")
    data = zlib.decompressobj().decompress(entry[2], size + 1)
    return np.frombuffer(data, dtype).astype(dtype.newbyteorder("=")).reshape(shape)


def _parse(body: dict[str, Any]) -> Profile:
    meta = body["meta"]
    arrays = {name: _unpack_array(entry) for name, entry in body["arrays"].items()}
    levels = []
    for entry in meta["levels"]:
        name = entry["name"]
        plans = {
            which: TensorPlan(**{part: arrays[f"{name}.{which}.{part}"] for part in ("index", "step", "group")})
            for which in ("k", "v")
            if f"{name}.{which}.index" in arrays
        }
        book = CodeBook(freqs=arrays[f"{name}.freqs"]) if f"{name}.freqs" in arrays else None
        levels.append(
            Level(
                name=name,
                kind=LevelKind(entry["kind"]),
                codebook=book,
                step_factor=entry["step_factor"],
                **plans,
            )
        )
    num_layers, num_heads, dim_k, dim_v = meta["layout"]
    layout = CodecLayout(num_layers=num_layers, num_kv_heads=num_heads, head_dim_k=dim_k, head_dim_v=dim_v)
    return Profile(
        fingerprint=meta["fingerprint"],
        layout=layout,
        levels=tuple(levels),
        mean_k=arrays["mean_k"],
        mean_v=arrays["mean_v"],
        needs_rope=meta["needs_rope"],
        bits_per_value={e["name"]: e["bits_per_value"] for e in meta["levels"] if e["bits_per_value"] is not None},
        promise={
            e["name"]: Promise(kl=p[0], delta_nll=p[1], greedy_agreement=p[2], recall_drop=p[3])
            for e in meta["levels"]
            for p in [e["promise"]]
        },
        provenance=meta["provenance"],
        curve=tuple(meta["curve"]),
    )


def default_lossless_level() -> Level:
    """Lossless without calibration: half-octave exponent tables, the index of each channel in the blob."""
    peaks = [float(p) for p in [*range(97, 113, 2), *np.arange(113, 134, 0.5), *range(134, 144, 2)]]
    flat = normalize(np.full(256, 1.0))
    zeros = normalize(np.eye(1, 256)[0] + 1e-4)
    tables = [exponent_table(p) for p in peaks] + [flat, zeros]
    return Level(name="lossless", kind=LevelKind.LOSSLESS, codebook=CodeBook(freqs=np.stack(tables)))


# Steps as multiples of a segment's typical channel spread, and the bits a value a Gaussian would then cost.
_DEFAULT_STEPS = {"q1": (0.125, 5.3), "q2": (0.25, 4.3), "q3": (0.5, 3.3), "q4": (0.75, 2.7)}


def default_profile(layout: Layout, *, fingerprint: str = "") -> Profile:
    """A safe profile for a model without calibration: raw, lossless, and conservative lossy levels.

    Nothing is assumed about the model: means, steps and table choices are measured on each chunk and travel in it
    (about 0.1 bit a value). It promises nothing about loss; bits_per_value are estimates.
    """
    book = CodeBook(freqs=np.stack([laplace_table(s) for s in np.geomspace(0.05, 90, 32)]))
    own = CodecLayout(
        num_layers=layout.num_layers,
        num_kv_heads=layout.num_kv_heads,
        head_dim_k=layout.head_dim_k,
        head_dim_v=layout.head_dim_v,
    )
    lossy = tuple(
        Level(name=name, kind=LevelKind.QUANTIZED, codebook=book, step_factor=factor)
        for name, (factor, _) in _DEFAULT_STEPS.items()
    )
    return Profile(
        fingerprint=fingerprint,
        layout=own,
        levels=(Level(name="raw", kind=LevelKind.RAW), default_lossless_level(), *lossy),
        mean_k=round_to_bf16(np.zeros((own.num_layers, own.num_kv_heads, own.head_dim_k))),
        mean_v=round_to_bf16(np.zeros((own.num_layers, own.num_kv_heads, own.head_dim_v))),
        needs_rope=False,
        bits_per_value={"raw": 16.0, "lossless": 11.3} | {name: bits for name, (_, bits) in _DEFAULT_STEPS.items()},
        promise={"raw": EXACT, "lossless": EXACT} | {name: Promise() for name in _DEFAULT_STEPS},
        provenance={"kind": "default, uncalibrated"},
    )
