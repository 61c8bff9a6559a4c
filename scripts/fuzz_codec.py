"""Feeds damaged blobs and profile files to the codec: `python -m scripts.fuzz_codec --count 200000 --seed 1`.

Half of the blobs are mutated and left with checksums that do not fit, half are sealed again so that every check behind
the checksums is reached. Each is decoded whole, and decoded in part, cut or refined. It must end in an exception of the
codec's own or in bounded numbers, inside a limit of memory. The work is done by a child process, so that a crash is
reported with the number of its case; `--start NUMBER --count 1` runs that one again.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import mmap
import os
import random
import resource
import signal
import struct
import subprocess
import sys
import tempfile
import time
import traceback
import zlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import torch

from codec.bitstream import CRC_BYTES, HEADER_BYTES
from codec.chunk import cut_chunk, decode_chunk, encode_chunk, inspect_blob, refine_chunk, refinement_of
from codec.errors import BlobError, CodecError, InvalidProfile
from codec.levels import LevelKind
from codec.profile import Profile, default_profile, load_profile
from codec.rope import RopeTable

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "tests" / "support"))
from codec_cases import make_kv, make_layout, make_profile, make_rope  # noqa: E402
from codec_forge import CHECKSUMS, FIELDS, bound_to, outer_checksums_hold, put_together, seal, take_apart  # noqa: E402

MEMORY_MB = 64
MAX_REPORTED = 5
Tensors = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Seed:
    """A sound blob and what belongs to it. limit: what no decoded number may exceed; decoded: None of a refinement."""

    name: str
    group: int
    blob: bytes
    profile: Profile
    rope: RopeTable
    limit: float
    decoded: Tensors | None
    coarse: bytes = b""  # of a refinement: what it goes behind
    rest: bytes = b""  # of a coarser level: what goes behind it


class Failure(Exception):
    """The codec did what it must not."""


# ---------------------------------------------------------------- what is mutated


def largest_number(profile: Profile) -> float:
    """|integers| stay below 2^31, so decoded numbers below this, in the profile's own steps and matrices."""
    most = 0.0
    for plan in (profile.lossy.k, profile.lossy.v):
        if plan is None:
            return 2.0 * (2.0**31 * 2.0**60 * 4.0**7 + 2.0**90)
        gain = float(np.abs(plan.synthesis).sum(axis=1).max(initial=1.0))
        most = max(most, 2.0**31 * float(plan.step.max()) * max(gain, 1.0) + float(np.abs(plan.mean).max()))
    return 2.0 * most


def make_seeds() -> list[Seed]:
    """Small chunks of every kind, dtype, lane count and plan; cuts and refinements among them."""
    seeds: list[Seed] = []
    for group, (sizes, tokens, options) in enumerate(
        [
            ((2, 2, 16, 8), 5, {"matrices": True, "unturned": 1, "group": 2, "stages": 3}),
            ((2, 2, 16, 8), 6, None),
            ((1, 2, 24, 17), 3, {"matrices": True, "stages": 5, "group": 0}),
            ((1, 1, 128, 130), 2, {"group": 1, "stages": 2, "needs_rope": True}),
            ((1, 2, 128, 5), 1, None),
            ((3, 1, 7, 1), 9, {"stages": 1, "group": 4}),
        ]
    ):
        layout = make_layout(*sizes)
        profile = default_profile(layout) if options is None else make_profile(layout, seed=group, **options)
        rope = make_rope(tokens, sizes[2] // 4 * 2 or 2, start=50)
        common: dict[str, Any] = {"group": group, "profile": profile, "rope": rope}

        def add(name: str, blob: bytes, common: dict[str, Any] = common, **extra: Any) -> None:
            info, used = inspect_blob(blob), common["profile"]
            decoded = None
            if not info.is_refinement:
                decoded = decode_chunk(blob, profile=used, rope=common["rope"])
            limit = largest_number(used)
            seeds.append(Seed(name=name, blob=blob, limit=limit, decoded=decoded, **common, **extra))

        for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn, torch.float8_e5m2):
            k, v = make_kv(layout, tokens, seed=group, dtype=dtype)
            k[..., 0, 0] = 0
            for level in profile.levels:
                if level.kind is LevelKind.QUANTIZED and dtype not in (torch.bfloat16, torch.float8_e4m3fn):
                    continue
                if level.kind is LevelKind.RAW and dtype is torch.float32:
                    continue
                used_rope = rope if profile.needs_rope or level.name != "q2" else None
                blob = encode_chunk(k, v, level=level.name, profile=profile, rope=used_rope)
                add(f"{group}-{level.name}-{dtype}", blob)
        k, v = make_kv(layout, tokens, seed=group + 10)
        v[0, 0, 0, 0] = 900.0
        lossy = [level.name for level in profile.levels if level.kind is LevelKind.QUANTIZED]
        finest = encode_chunk(k, v, level="q1", profile=profile, rope=rope)
        heads = {"heads": (0, 1)} if sizes[1] > 1 else {}
        for name in lossy[1:]:
            coarse = cut_chunk(finest, profile=profile, level=name)
            rest = refinement_of(finest, profile=profile, have=name)
            add(f"{group}-cut-{name}", coarse, rest=rest)
            add(f"{group}-behind-{name}", rest, coarse=coarse)
            add(f"{group}-part-{name}", cut_chunk(coarse, profile=profile, **heads))
    return seeds


# ---------------------------------------------------------------- mutations


def some_value(rng: random.Random, old: int, bits: int) -> int:
    choice = rng.randrange(7)
    if choice < 3:
        return (old + rng.choice((-1, 1, -2, 2, 16))) % (1 << bits)
    if choice == 3:
        return 0
    if choice == 4:
        return (1 << bits) - 1
    if choice == 5:
        return rng.randrange(1 << rng.randrange(1, bits + 1))
    return rng.choice((1, 2, 3, 4, 5, 6, 7, 128, 255, 4096)) % (1 << bits)


def change_bytes(rng: random.Random, data: bytearray) -> None:
    """A few small changes anywhere, more often near the front, where the header and the directory are."""
    for _ in range(rng.choice((1, 1, 1, 2, 8))):
        if not data:
            return
        top = rng.choice((min(HEADER_BYTES, len(data)), min(HEADER_BYTES + 300, len(data)), len(data), len(data)))
        at, kind = rng.randrange(top), rng.randrange(4)
        if kind == 0:
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            data[at] = rng.choice((0, 0xFF, 0x7F, 0x80, rng.randrange(256)))
        elif kind == 2:
            size = rng.randrange(1, 40)
            data[at : at + size] = rng.randbytes(len(data[at : at + size]))
        else:
            size = rng.randrange(1, 40)
            data[at : at + size] = bytes(len(data[at : at + size]))


def change_length(rng: random.Random, data: bytearray) -> None:
    kind = rng.randrange(4)
    at = rng.randrange(len(data) + 1)
    size = rng.choice((1, 2, 2, 4, 8, 64, 500))
    if kind == 0:
        del data[at:]
    elif kind == 1:
        data += rng.randbytes(size)
    elif kind == 2:
        del data[at : at + size]
    else:
        data[at:at] = rng.randbytes(size)


def splice(rng: random.Random, data: bytearray, other: bytes) -> None:
    kind = rng.randrange(3)
    at = rng.choice((HEADER_BYTES, rng.randrange(len(data))))
    if kind == 0:
        data[at:] = other[at:]
    elif kind == 1:
        data[at:] = other[rng.randrange(len(other)) :]
    else:
        size = rng.randrange(1, 200)
        data[at : at + size] = other[at : at + size]


FIELD_BITS = {
    "version": 8, "kind": 8, "dtype": 8, "flags": 8, "layers": 16, "heads": 16, "dim_k": 16, "dim_v": 16,
    "first_layer": 16, "first_head": 16, "tokens": 16, "first_stage": 8, "stages": 8, "body": 64,
}  # fmt: skip


def change_parts(rng: random.Random, seed: Seed, others: list[Seed]) -> bytes:
    """An edit that knows the format: of a header field, the directory, a piece. Sealed, or all but one checksum is."""
    parts = take_apart(seed.blob)
    fields, entries, pieces = parts.fields, parts.entries, parts.pieces
    kind, fit = rng.randrange(8), True
    if kind == 0 or not pieces:
        for _ in range(rng.choice((1, 1, 2))):
            name = rng.choice((*FIELD_BITS, "level", "profile"))
            if name == "level":
                fields[FIELDS[name]] = rng.choice((b"q1", b"q2", b"q3", b"raw", b"lossless", b"")).ljust(8, b"\0")
            elif name == "profile":
                fields[FIELDS[name]] = rng.choice(others).profile.id.encode()[:16]
            else:
                fields[FIELDS[name]] = some_value(rng, int(fields[FIELDS[name]]), FIELD_BITS[name])  # type: ignore[call-overload]
        fit = rng.random() < 0.5
    elif kind == 1:
        for _ in range(rng.choice((1, 1, 3))):
            i, name = rng.randrange(len(entries)), rng.choice(("words", "exceptions", "exceptions"))
            entries[i][name] = some_value(rng, int(entries[i][name]), 32)
        fit = rng.random() < 0.5
    elif kind == 2:  # words move from one piece to its neighbour
        i = rng.randrange(len(pieces))
        both = pieces[i] + pieces[(i + 1) % len(pieces)]
        cut = 2 * rng.randrange(len(both) // 2 + 1)
        pieces[i], pieces[(i + 1) % len(pieces)] = both[:cut], both[cut:]
    elif kind == 3:
        i, source = rng.randrange(len(pieces)), take_apart(rng.choice(others).blob)
        if source.pieces:
            j = rng.randrange(len(source.pieces))
            pieces[i] = source.pieces[j]
            entries[i]["exceptions"] = source.entries[j]["exceptions"]
    elif kind == 4:  # exceptions: more, fewer, others
        i = rng.randrange(len(pieces))
        count = min(int(entries[i]["exceptions"]), len(pieces[i]) // 8)
        body, old = pieces[i][: len(pieces[i]) - 8 * count], pieces[i][len(pieces[i]) - 8 * count :]
        top = int(fields[FIELDS["tokens"]]) * int(fields[FIELDS["dim_k"]]) + rng.choice((0, 0, 0, 9))  # type: ignore[call-overload]
        listed = [struct.unpack_from("<Ii", old, 8 * n) for n in range(count)]
        for _ in range(rng.choice((1, 2, 6))):
            new = (
                rng.randrange(top),
                rng.choice((0, 1, -1, 2**21, -(2**21), 2**21 + 1, -(2**31), rng.randrange(-9999, 9999))),
            )
            listed.insert(rng.randrange(len(listed) + 1), new)
        if rng.random() < 0.7:
            listed = sorted(dict(listed).items())
        pieces[i] = body + b"".join(struct.pack("<Ii", *pair) for pair in listed)
        entries[i]["exceptions"] = len(listed)
    else:
        for _ in range(rng.choice((1, 1, 4))):
            i = rng.randrange(len(pieces))
            data = bytearray(pieces[i])
            if kind == 5 and data:  # side information and states stand in front
                at = 2 * rng.randrange(min(len(data) // 2, rng.choice((2, 20, 60))))
                struct.pack_into(
                    "<H", data, at, rng.choice((0, 1, 0x7F80, 0x7FC0, 0xFFFF, 0x5D80, 0x2180, rng.randrange(1 << 16)))
                )
            elif kind == 6:
                change_length(rng, data)
                data += bytes(len(data) % 2)
            else:
                change_bytes(rng, data)
            pieces[i] = bytes(data)
    missing = (
        rng.choice(("header", "directory", "pieces", "blob", "", "", "", "", "", "")) if rng.random() < 0.5 else ""
    )
    out = put_together(parts, fit=fit, seal=CHECKSUMS - {missing})
    return out if missing != "blob" else out[:-CRC_BYTES] + seed.blob[-CRC_BYTES:]


def mutate(rng: random.Random, seeds: list[Seed], by_group: dict[int, list[Seed]]) -> tuple[Seed, bytes, bool]:
    """-> the seed, the changed blob, whether anything but bytes changed (that is: whether anything was sealed)."""
    seed = rng.choice(seeds)
    others = by_group[seed.group] if rng.random() < 0.8 else seeds
    kind = rng.randrange(10)
    if kind < 3:
        return seed, change_parts(rng, seed, others), True
    data = bytearray(seed.blob)
    if kind < 6:
        change_bytes(rng, data)
    elif kind == 6:
        change_length(rng, data)
    elif kind < 9:
        splice(rng, data, rng.choice(others).blob)
    else:
        change_bytes(rng, data)
        change_length(rng, data)
    if rng.random() < 0.5:
        return seed, seal(bytes(data), fit_body=rng.random() < 0.6), True
    return seed, bytes(data), False


# ---------------------------------------------------------------- what must hold


def check_numbers(what: str, out: Tensors, is_lossy: bool, limit: float) -> None:
    for tensor in out if is_lossy else ():
        if not float(tensor.float().abs().max()) <= limit:  # NaN too
            raise Failure(f"{what} gave {tensor.float().abs().max()}, over {limit}")


class Fuzzer:
    """Runs cases by number; each depends on (seed, number) alone."""

    def __init__(self, seed: int):
        self.seed = seed
        self.seeds = make_seeds()
        self.by_group: dict[int, list[Seed]] = {}
        for each in self.seeds:
            self.by_group.setdefault(each.group, []).append(each)
        self.known = {each.blob for each in self.seeds}
        self.by_front = {
            each.blob[: HEADER_BYTES + inspect_blob(each.blob).directory_bytes]: each for each in self.seeds
        }
        self.counts: Counter[str] = Counter()

    def run(self, number: int) -> None:
        rng = random.Random(self.seed << 32 | number)
        blob = next(iter(self.known))
        while blob in self.known:  # a change may change nothing
            seed, blob, is_edited = mutate(rng, self.seeds, self.by_group)
        is_sealed = outer_checksums_hold(blob)
        self.counts["sealed" if is_sealed else "unsealed"] += 1
        self._whole(seed, blob, is_sealed)
        self._part(rng, seed, blob, is_edited)
        self._select("cut", seed, blob, is_sealed, self._cutter(rng, seed, blob))
        have = rng.choice(seed.profile.level_names[-3:])
        self._select("reduced", seed, blob, is_sealed, lambda: refinement_of(blob, profile=seed.profile, have=have))
        if seed.coarse:
            self._select("refined", seed, blob, is_sealed, lambda: refine_chunk(seed.coarse, blob))
        elif seed.rest:
            rest = bound_to(seed.rest, blob) if rng.random() < 0.7 else seed.rest
            self._select("refined", seed, blob, is_sealed, lambda: refine_chunk(blob, rest))

    def _whole(self, seed: Seed, blob: bytes, is_sealed: bool) -> None:
        try:
            out = decode_chunk(blob, profile=seed.profile, rope=seed.rope)
        except BlobError as error:
            self.counts[f"refused {type(error).__name__}"] += 1
            return
        if not is_sealed:
            raise Failure("a blob whose checksums do not fit was decoded")
        self.counts["decoded"] += 1
        check_numbers("decoding", out, inspect_blob(blob).kind is LevelKind.QUANTIZED, seed.limit)

    def _part(self, rng: random.Random, seed: Seed, blob: bytes, is_edited: bool) -> None:
        layout = seed.profile.layout
        ranges = []
        for most in (layout.num_layers, layout.num_kv_heads):
            start = rng.randrange(most)
            ranges.append((start, rng.randrange(start, most) + 1))
        try:
            out = decode_chunk(blob, profile=seed.profile, rope=seed.rope, layers=ranges[0], heads=ranges[1])
        except CodecError as error:
            self.counts[f"part refused {type(error).__name__}"] += 1
            return
        self.counts["part decoded"] += 1
        info = inspect_blob(blob)
        check_numbers("decoding a part", out, info.kind is LevelKind.QUANTIZED, seed.limit)
        if is_edited:
            return
        original = self.by_front.get(blob[: HEADER_BYTES + info.directory_bytes])
        if original is None or original.decoded is None:
            raise Failure("part of a blob was decoded whose header and directory nobody wrote")
        rows, cols = slice(*(n - info.first_layer for n in ranges[0])), slice(*(n - info.first_head for n in ranges[1]))
        for got, whole in zip(out, original.decoded):
            part = whole[rows, :, cols].contiguous()
            if not torch.equal(got.contiguous().view(torch.uint8), part.view(torch.uint8)):
                raise Failure("part of a damaged blob decoded to other numbers")
        self.counts["part decoded beside damage"] += 1

    def _cutter(self, rng: random.Random, seed: Seed, blob: bytes) -> Callable[[], bytes]:
        heads = (0, 1) if rng.random() < 0.5 else None
        level = rng.choice((None, *seed.profile.level_names[-2:]))
        return lambda: cut_chunk(blob, profile=seed.profile, level=level, heads=heads)

    def _select(self, what: str, seed: Seed, blob: bytes, is_sealed: bool, use: Callable[[], bytes]) -> None:
        try:
            out = use()
        except CodecError as error:
            self.counts[f"not {what} {type(error).__name__}"] += 1
            return
        if not is_sealed:
            raise Failure(f"a blob whose checksums do not fit was {what}")
        self.counts[what] += 1
        info = inspect_blob(out)
        if len(out) != info.total_bytes or len(out) > len(blob) + len(seed.coarse) + len(seed.rest):
            raise Failure(f"a blob was {what} into one of another size than it says")
        if info.is_refinement:
            return
        try:
            tensors = decode_chunk(out, profile=seed.profile, rope=seed.rope)
        except BlobError:
            self.counts[f"{what}, then refused"] += 1
            return
        self.counts[f"{what}, then decoded"] += 1
        check_numbers(f"decoding what was {what}", tensors, info.kind is LevelKind.QUANTIZED, seed.limit)


# ---------------------------------------------------------------- profile files

ODD_VALUES: tuple[Any, ...] = (
    None, -1, 0, 1, 2, 3, 7, 255, 65536, 2**40, -(2**40), 2**63, 1e308, -1.5, float("nan"), float("inf"), "x", "q1",
    "a\0b", "", b"", b"\xff", [], {}, [1], True, {"a": 1}, "x" * 10_000,
)  # fmt: skip


class ProfileFuzzer:
    """A damaged profile file is refused, or is a profile that codes within its own rules and saves as what it is."""

    def __init__(self, seed: int, folder: Path):
        self.seed, self.path, self.counts = seed, folder / "p.kvp", Counter[str]()
        self.files = []
        for options in ({"matrices": True, "unturned": 1, "stages": 3, "group": 2}, {"stages": 2, "group": 0}, None):
            layout = make_layout(2, 2, 16, 6)
            profile = default_profile(layout) if options is None else make_profile(layout, **options)  # type: ignore[arg-type]
            profile.save(self.path)
            self.files.append(self.path.read_bytes())
        self.layout = layout
        self.kv = make_kv(layout, 3)
        self.rope = make_rope(3, 8)

    def run(self, number: int) -> None:
        rng = random.Random(self.seed << 32 | number | 1 << 80)
        self.path.write_bytes(self._mutant(rng))
        try:
            profile = load_profile(self.path)
        except InvalidProfile:
            self.counts["refused"] += 1
            return
        self.counts["loaded"] += 1
        again = self.path.with_suffix(".again")
        profile.save(again)
        if load_profile(again).id != profile.id:
            raise Failure("a profile was saved as another")
        if replace(profile.layout) != self.layout:
            return
        for level in profile.level_names:
            try:
                blob = encode_chunk(*self.kv, level=level, profile=profile, rope=self.rope)
            except CodecError as error:
                self.counts[f"not encoded {type(error).__name__}"] += 1
                continue
            out = decode_chunk(blob, profile=profile, rope=self.rope)  # what we encode we must read
            check_numbers("decoding", out, True, 3.3895e38)
            self.counts["encoded and decoded"] += 1

    def _mutant(self, rng: random.Random) -> bytes:
        data = rng.choice(self.files)
        kind = rng.randrange(8)
        if kind == 0:
            out = bytearray(data)
            (change_bytes if rng.random() < 0.7 else change_length)(rng, out)
            return bytes(out)
        body = msgpack.unpackb(data[6:])
        arrays: dict[str, list[Any]] = body["arrays"]
        for _ in range(rng.choice((1, 1, 1, 3))):
            name = rng.choice(list(arrays))
            dtype, shape, packed = arrays[name]
            if kind < 4:  # contents
                plain = bytearray(zlib.decompress(packed))
                if plain:
                    size = {"u1": 1, "i1": 1, "b1": 1, "u2": 2, "i2": 2, "i8": 8, "f4": 4}[dtype]
                    for _ in range(rng.choice((1, 1, 5))):
                        at = rng.randrange(len(plain) // size) * size
                        new = rng.choice(
                            (bytes(size), b"\xff" * size, rng.randbytes(size), b"\x7f" * size, b"\1" + bytes(size - 1))
                        )
                        plain[at : at + size] = new
                    if dtype == "f4" and rng.random() < 0.5:  # whatever it is, a bfloat16 number
                        for at in range(0, len(plain), 4):
                            plain[at : at + 2] = b"\0\0"
                arrays[name] = [dtype, shape, zlib.compress(bytes(plain), 1)]
            elif kind == 4:
                arrays[name] = [rng.choice(("u1", "b1", "u2", "i1", "i2", "i8", "f4", "f8", "O", 3)), shape, packed]
            elif kind == 5:
                other = list(shape) if isinstance(shape, list) else [3]
                if other:
                    other[rng.randrange(len(other))] = rng.choice(
                        (0, 1, -1, 2, 2**31, 2**62, 2**70 % 2**64, "2", None, 1.0)
                    )
                arrays[name] = [dtype, rng.choice((other, other[::-1], [*other, 1], [], 5)), packed]
            elif kind == 6:
                other_name = rng.choice(list(arrays))
                arrays[name] = arrays[other_name] if rng.random() < 0.5 else rng.choice(ODD_VALUES)
                if rng.random() < 0.3:
                    del arrays[name]
                break
            else:
                self._change_meta(rng, body["meta"])
        try:
            return data[:6] + bytes(msgpack.packb(body))
        except OverflowError:
            return data[:6]

    def _change_meta(self, rng: random.Random, meta: dict[str, Any]) -> None:
        place: Any = meta
        while True:
            keys = list(place) if isinstance(place, dict) else list(range(len(place)))
            if not keys:
                return
            key = rng.choice(keys)
            if isinstance(place[key], (dict, list)) and rng.random() < 0.8:
                place = place[key]
                continue
            if rng.random() < 0.1:
                del place[key]
            else:
                place[key] = rng.choice(ODD_VALUES)
            return


# ---------------------------------------------------------------- the child and its parent


def _status(name: str) -> int:
    """Of this process, in bytes: VmSize, VmRSS, VmHWM."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(name)


def inside(args: argparse.Namespace) -> dict[str, Any]:
    """The child's work. Writes the number of the case in hand to args.inside, for whoever finds the child dead."""
    torch.set_num_threads(1)
    fuzzer = Fuzzer(args.seed)
    failures: list[dict[str, Any]] = []
    slowest = 0.0
    with tempfile.TemporaryDirectory() as folder, open(args.inside, "r+b") as file:
        note = mmap.mmap(file.fileno(), 16)
        profiles = ProfileFuzzer(args.seed, Path(folder))
        for number in range(200):  # code paths are compiled or loaded before memory is counted
            with contextlib.suppress(Exception):  # what fails here fails again below
                fuzzer.run(-1 - number & 0xFFFFFFFF)
        fuzzer.counts.clear()
        before = _status("VmSize")
        resource.setrlimit(resource.RLIMIT_AS, (before + (args.memory_mb << 20),) * 2)
        jobs: list[tuple[int, str, Callable[[int], None], int, int]] = [
            (0, "blob", fuzzer.run, args.start, args.count),
            (1, "profile", profiles.run, args.start if args.profiles and not args.count else 0, args.profiles),
        ]
        took = {}
        for kind, what, run, start, count in jobs:
            begin = time.monotonic()
            for number in range(start, start + count):
                struct.pack_into("<qq", note, 0, kind, number)
                tick = time.monotonic()
                try:
                    run(number)
                except Exception as error:  # any at all is a finding: kept, and the run fails
                    where = traceback.format_exc(limit=-3)
                    failures.append(
                        {"what": what, "number": number, "error": repr(error)[:300], "where": where[-1500:]}
                    )
                    if len(failures) >= MAX_REPORTED:
                        break
                slowest = max(slowest, time.monotonic() - tick)
            took[what] = round(time.monotonic() - begin, 1)
        peak = _status("VmPeak") - before
    return {
        "seed": args.seed, "blobs": args.count, "profiles": args.profiles, "failures": failures,
        "outcomes": dict(sorted(fuzzer.counts.items())), "profile_outcomes": dict(sorted(profiles.counts.items())),
        "seconds": took, "slowest_case_ms": round(slowest * 1e3, 1), "seed_blobs": len(fuzzer.seeds),
        "memory_limit_mb": args.memory_mb, "memory_peak_mb": round(peak / 2**20, 1),
    }  # fmt: skip


def run_isolated(
    *, count: int, seed: int, start: int = 0, profiles: int = 0, memory_mb: int = MEMORY_MB, timeout_s: float = 1800
) -> dict[str, Any]:
    """Runs the cases in a child process and returns its summary, in which a crash or a hang is a failure too."""
    with tempfile.NamedTemporaryFile() as note:
        note.write(bytes(16))
        note.flush()
        command = [
            sys.executable, "-X", "faulthandler", "-m", "scripts.fuzz_codec", "--inside", note.name,
            "--count", str(count), "--seed", str(seed), "--start", str(start), "--profiles", str(profiles),
            "--memory-mb", str(memory_mb),
        ]  # fmt: skip
        threads = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "MALLOC_ARENA_MAX": "1"}
        error = ""
        try:
            done = subprocess.run(
                command, cwd=ROOT, env=os.environ | threads, capture_output=True, text=True, timeout=timeout_s
            )
            if done.returncode == 0:
                summary: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
                return summary
            code = done.returncode
            error = (signal.Signals(-code).name if code < 0 else f"exit {code}") + ": " + done.stderr[-3000:]
        except subprocess.TimeoutExpired:
            error = f"over {timeout_s} s"
        kind, number = struct.unpack("<qq", Path(note.name).read_bytes()[:16])
    what = ("blob", "profile")[kind]
    return {"seed": seed, "failures": [{"what": what, "number": number, "error": f"the child died: {error}"}]}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--count", type=int, default=200_000, help="damaged blobs")
    parser.add_argument("--profiles", type=int, default=0, help="damaged profile files")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--start", type=int, default=0, help="number of the first case")
    parser.add_argument("--memory-mb", type=int, default=MEMORY_MB, help="what the cases may allocate at once")
    parser.add_argument("--inside", default="", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.inside:
        print(json.dumps(inside(args)))
        return 0
    summary = run_isolated(
        count=args.count, seed=args.seed, start=args.start, profiles=args.profiles, memory_mb=args.memory_mb
    )
    print(json.dumps(summary, indent=1))
    return 1 if summary["failures"] else 0


if __name__ == "__main__":
    sys.exit(main())
