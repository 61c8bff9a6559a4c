"""A profile: all that calibration found for one model, shared by both ends, named by its hash.

The id is the first 32 hex digits of the SHA-256 of its contents (profile_file.canonical), not of a file's bytes.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from codec import profile_file
from codec.entropy import CodeBook, bell_cuts, bell_table, check_cuts, normalize
from codec.errors import InvalidProfile, UnknownLevel
from codec.levels import EXACT, Level, LevelKind, Lossless, Lossy, Promise, TensorPlan
from codec.quantize import round_to_bf16
from kernels.rans_reference import MAX_STAGES, MAX_SYMBOLS, NUM_VALUES

MIN_STEP, MAX_STEP = 2.0**-60, 2.0**60
MAX_MEAN = 2.0**90
MAX_GAIN = 2.0**20  # of a matrix entry
MAX_SIZE = 1024  # layers, heads, head dims: what a blob's header may say


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
    """levels: best to worst. lossy: the ladder that quantized levels are stages of. lossless: by dtype name.

    needs_rope: quantized keys must be coded with a RopeTable (the statistics were learned before RoPE).
    curve: what calibration measured, for people and reports. provenance: where it came from.
    """

    fingerprint: str
    layout: CodecLayout
    levels: tuple[Level, ...]
    lossy: Lossy
    lossless: Mapping[str, Lossless]
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
        object.__setattr__(self, "id", hashlib.sha256(profile_file.canonical(*_body(self))).hexdigest()[:32])

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
        profile_file.write(Path(path), *_body(self))


def load_profile(path: str | Path) -> Profile:
    """Reads a profile file. Raises InvalidProfile (or OSError when there is no file)."""
    path = Path(path)
    try:
        return _parse(*profile_file.read(path))
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, OverflowError) as error:
        raise InvalidProfile(f"{path} is damaged ({type(error).__name__}); run `kvstream calibrate` again") from error


def _check(profile: Profile) -> None:
    names, lay, lossy = profile.level_names, profile.layout, profile.lossy
    if len(set(names)) != len(names) or any(not 0 < len(n) <= 8 or not n.isascii() or "\0" in n for n in names):
        raise InvalidProfile(f"level names must be distinct ASCII of at most 8 letters: {names}")
    sizes = (lay.num_layers, lay.num_kv_heads, lay.head_dim_k, lay.head_dim_v)
    if not all(isinstance(n, int) and 1 <= n <= MAX_SIZE for n in sizes):
        raise InvalidProfile(f"the layout {sizes} is out of range")
    numbers = [n for p in profile.promise.values() for n in (p.kl, p.delta_nll, p.greedy_agreement, p.recall_drop)]
    numbers += [*profile.bits_per_value.values(), lossy.step_factor]
    if not isinstance(profile.fingerprint, str) or not all(n is None or math.isfinite(n) for n in numbers):
        raise InvalidProfile("a profile's fingerprint is text, what it promises are finite numbers")
    if not 1 <= lossy.num_stages <= MAX_STAGES or lossy.cuts.shape[0] != lossy.num_stages - 1:
        raise InvalidProfile(f"{lossy.num_stages} stages with {lossy.cuts.shape[0]} sets of refinement tables")
    check_cuts(lossy.cuts)
    for level in profile.levels:
        if level.kind is LevelKind.QUANTIZED and not 1 <= level.stages <= lossy.num_stages:
            raise InvalidProfile(f"level {level.name} wants {level.stages} of {lossy.num_stages} stages")
    if (lossy.k is None) != (lossy.v is None):
        raise InvalidProfile("either K and V both have a plan or neither")
    for plan, dim in ((lossy.k, lay.head_dim_k), (lossy.v, lay.head_dim_v)):
        if plan is not None:
            _check_plan(plan, lossy, (lay.num_layers, lay.num_kv_heads, dim))
        elif lossy.cuts.shape[1] != lossy.codebook.num_tables:
            raise InvalidProfile("shipped statistics name base and refinement tables by one number")
        elif not 0 <= lossy.step_factor <= MAX_STEP:
            raise InvalidProfile(f"the step factor {lossy.step_factor} is out of range")
    shape = (lay.num_layers, lay.num_kv_heads)
    for dtype, lossless in profile.lossless.items():
        for index, dim in ((lossless.k, lay.head_dim_k), (lossless.v, lay.head_dim_v)):
            if index is not None and (
                index.dtype != np.uint8
                or index.shape != (*shape, dim)
                or int(index.max(initial=0)) >= lossless.codebook.num_tables
            ):
                raise InvalidProfile(f"the lossless tables of {dtype} do not fit the layout")


def _check_plan(plan: TensorPlan, lossy: Lossy, shape: tuple[int, int, int]) -> None:
    layers, heads, dim = shape
    stages = lossy.num_stages
    matrices = (len(plan.analysis), dim, dim)
    wanted = {
        "mean": (np.float32, shape), "step": (np.float32, shape), "is_turned": (np.bool_, (layers,)),
        "group": (np.int64, (layers,)), "matrix": (np.int64, (layers, heads)), "analysis": (np.float32, matrices),
        "synthesis": (np.float32, matrices), "active": (np.int64, (stages, layers, heads)),
        "index": (np.uint8, (layers, heads, 2, dim)), "refine": (np.uint8, (stages - 1, layers, heads, dim)),
    }  # fmt: skip
    for name, (dtype, expected) in wanted.items():
        array = getattr(plan, name)
        if array.shape != expected or array.dtype != dtype:
            raise InvalidProfile(
                f"the plan's {name} is {array.dtype} {array.shape}, the layout needs {np.dtype(dtype)} {expected}"
            )
    if not (np.abs(plan.mean) <= MAX_MEAN).all() or not ((plan.step >= MIN_STEP) & (plan.step <= MAX_STEP)).all():
        raise InvalidProfile("a mean or step is out of range or not finite")
    if not all(np.array_equal(round_to_bf16(x), x) for x in (plan.mean, plan.step)):
        raise InvalidProfile("a mean or step is not a bfloat16 number")
    if (
        int(plan.index.max(initial=0)) >= lossy.codebook.num_tables
        or int(plan.refine.max(initial=0)) >= lossy.cuts.shape[1]
    ):
        raise InvalidProfile("a channel names a table that the profile lacks")
    if not ((plan.group >= 0) & (plan.group <= 4096)).all():
        raise InvalidProfile("an anchor group is out of range")
    if not ((plan.matrix >= -1) & (plan.matrix < len(plan.analysis))).all():
        raise InvalidProfile("a head names a matrix that the profile lacks")
    if not all((np.abs(m) <= MAX_GAIN).all() for m in (plan.analysis, plan.synthesis)):
        raise InvalidProfile("a matrix is out of range or not finite")
    if not ((plan.active >= 0) & (plan.active <= dim)).all() or (np.diff(plan.active, axis=0) < 0).any():
        raise InvalidProfile("the active channels do not ascend from stage to stage")
    if (plan.active[:, plan.matrix < 0] != dim).any():
        raise InvalidProfile("without a matrix every channel is coded")


_PLAN_ARRAYS = ("mean", "step", "is_turned", "group", "matrix", "active", "index", "refine")


def _body(profile: Profile) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The profile as plain data: what the file holds and the id is taken from."""
    lossy, lay = profile.lossy, profile.layout
    arrays: dict[str, np.ndarray] = {"lossy.freqs": lossy.codebook.freqs, "lossy.cuts": lossy.cuts}
    for which, plan in (("k", lossy.k), ("v", lossy.v)):
        if plan is not None:
            arrays |= {f"lossy.{which}.{name}": getattr(plan, name) for name in _PLAN_ARRAYS}
            for name in ("analysis", "synthesis"):
                packed, exponent = profile_file.pack_matrix(getattr(plan, name))
                arrays[f"lossy.{which}.{name}"], arrays[f"lossy.{which}.{name}.exponent"] = packed, exponent
    for dtype, lossless in profile.lossless.items():
        arrays[f"lossless.{dtype}.freqs"] = lossless.codebook.freqs
        for which, index in (("k", lossless.k), ("v", lossless.v)):
            if index is not None:
                arrays[f"lossless.{dtype}.{which}"] = index
    promises = {name: profile.promise.get(name, Promise()) for name in profile.level_names}
    meta = {
        "fingerprint": profile.fingerprint,
        "layout": [lay.num_layers, lay.num_kv_heads, lay.head_dim_k, lay.head_dim_v],
        "needs_rope": profile.needs_rope,
        "num_stages": lossy.num_stages,
        "step_factor": lossy.step_factor,
        "lossless": list(profile.lossless),
        "levels": [
            {
                "name": level.name, "kind": int(level.kind), "stages": level.stages,
                "bits_per_value": profile.bits_per_value.get(level.name),
                "promise": [p.kl, p.delta_nll, p.greedy_agreement, p.recall_drop],
            }
            for level in profile.levels
            for p in [promises[level.name]]
        ],
        "provenance": dict(profile.provenance),
        "curve": [dict(row) for row in profile.curve],
    }  # fmt: skip
    return meta, arrays


def _parse(meta: dict[str, Any], arrays: dict[str, np.ndarray]) -> Profile:
    plans: dict[str, TensorPlan] = {}
    for which in ("k", "v"):
        if f"lossy.{which}.mean" in arrays:
            parts = {name: arrays[f"lossy.{which}.{name}"] for name in _PLAN_ARRAYS}
            for name in ("analysis", "synthesis"):
                exponent = arrays[f"lossy.{which}.{name}.exponent"]
                parts[name] = profile_file.unpack_matrix(arrays[f"lossy.{which}.{name}"], exponent)
            plans[which] = TensorPlan(**parts)
    lossy = Lossy(
        num_stages=meta["num_stages"], codebook=CodeBook(freqs=arrays["lossy.freqs"]), cuts=arrays["lossy.cuts"],
        step_factor=meta["step_factor"], **plans,
    )  # fmt: skip
    lossless = {
        dtype: Lossless(
            codebook=CodeBook(freqs=arrays[f"lossless.{dtype}.freqs"]),
            k=arrays.get(f"lossless.{dtype}.k"),
            v=arrays.get(f"lossless.{dtype}.v"),
        )
        for dtype in meta["lossless"]
    }
    num_layers, num_heads, dim_k, dim_v = meta["layout"]
    entries = meta["levels"]
    return Profile(
        fingerprint=meta["fingerprint"],
        layout=CodecLayout(num_layers=num_layers, num_kv_heads=num_heads, head_dim_k=dim_k, head_dim_v=dim_v),
        levels=tuple(Level(name=e["name"], kind=LevelKind(e["kind"]), stages=e["stages"]) for e in entries),
        lossy=lossy,
        lossless=lossless,
        needs_rope=meta["needs_rope"],
        bits_per_value={e["name"]: e["bits_per_value"] for e in entries if e["bits_per_value"] is not None},
        promise={
            e["name"]: Promise(kl=p[0], delta_nll=p[1], greedy_agreement=p[2], recall_drop=p[3])
            for e in entries
            for p in [e["promise"]]
        },
        provenance=meta["provenance"],
        curve=tuple(meta["curve"]),
    )


# dtype -> (exponent byte of 1.0, bits of mantissa that stand in the coded byte, largest coded byte)
_CODED = {
    "bfloat16": (127, 0, 255), "float16": (15, 1, 63), "float32": (127, 0, 255),
    "float8_e4m3fn": (7, 2, 63), "float8_e5m2": (15, 1, 63),
}  # fmt: skip


def default_lossless(dtype: str) -> Lossless:
    """Tables for Gaussian channels of any spread, for use without calibration: each chunk says which."""
    one, mantissa_bits, largest = _CODED[dtype]
    parts = 1 << mantissa_bits
    tables = []
    for spread in np.linspace(-14, 6, 29) if one == 127 else np.linspace(-one, one / 2, 29):
        magnitude = np.arange(largest + 1) / parts
        exponent, part = np.floor(magnitude), (magnitude % 1)
        low = np.exp2(exponent - one - spread) * (1 + part)
        width = np.exp2(exponent - one - spread) / parts
        density = np.exp(-0.5 * np.minimum(low + width / 2, 30) ** 2) * np.minimum(width, 30)
        density[0] += 1e-4  # zeros
        tables.append(normalize(np.pad(density + 1e-9, (0, NUM_VALUES - density.size))))
    around = np.arange(NUM_VALUES) - (96 if one == 127 else 0)
    flat = normalize((around >= 0) & (around < MAX_SYMBOLS))
    zeros = normalize(np.eye(1, NUM_VALUES)[0])
    return Lossless(codebook=CodeBook(freqs=np.stack([*tables, flat, zeros])))


# The finest step as a multiple of a segment's typical channel spread, and the bits a value a Gaussian then costs.
DEFAULT_STEP = 1 / 12
_DEFAULT_BITS = {"q1": 5.7, "q2": 4.15, "q3": 2.6}


def default_profile(layout: Layout, *, fingerprint: str = "") -> Profile:
    """A safe profile for a model without calibration: raw, lossless, and three conservative lossy levels.

    Nothing is assumed about the model: means, steps and table choices are measured on each chunk and travel in it
    (about 0.1 bit a value). It promises nothing about loss; bits_per_value are estimates.
    """
    spreads = np.geomspace(0.02, 9, 32)
    stages = len(_DEFAULT_BITS)
    lossy = Lossy(
        num_stages=stages,
        codebook=CodeBook(freqs=np.stack([bell_table(s) for s in spreads])),
        cuts=np.stack([np.stack([bell_cuts(s, stage) for s in spreads]) for stage in range(1, stages)]),
        step_factor=DEFAULT_STEP,
    )
    own = CodecLayout(
        num_layers=layout.num_layers, num_kv_heads=layout.num_kv_heads,
        head_dim_k=layout.head_dim_k, head_dim_v=layout.head_dim_v,
    )  # fmt: skip
    exact = (Level(name="raw", kind=LevelKind.RAW), Level(name="lossless", kind=LevelKind.LOSSLESS))
    return Profile(
        fingerprint=fingerprint,
        layout=own,
        levels=exact + tuple(
            Level(name=name, kind=LevelKind.QUANTIZED, stages=stages - i) for i, name in enumerate(_DEFAULT_BITS)
        ),
        lossy=lossy,
        lossless={dtype: default_lossless(dtype) for dtype in _CODED},
        needs_rope=False,
        bits_per_value={"raw": 16.0, "lossless": 11.3, **_DEFAULT_BITS},
        promise={"raw": EXACT, "lossless": EXACT} | {name: Promise() for name in _DEFAULT_BITS},
        provenance={"kind": "default, uncalibrated"},
    )  # fmt: skip
