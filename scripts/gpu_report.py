"""The GPU codec on this machine's GPU: is it right, and how fast? `python scripts/gpu_report.py --name h200-202612`.

In this order: every kernel's results against the CPU codec's (bytes equal; values equal, or within the format's one ulp
where a matrix is); then speeds by level with 1 and 16 chunks in flight on an 8B-shaped layout (32 layers, 8 KV heads of
128, 256 tokens a chunk); then the bundled model's whole way on one GPU: prefill, encode, decode into other pages,
answer.
Writes docs/benchmarks/gpu-<name>.md and .json. Then the engine (scripts/gpu_engine_report.py), into files of its own.
Exit codes: 0 all checks passed, 1 one failed, 2 no GPU here.

Speeds are of bf16 bytes, the median of CUDA events around replays of a captured graph, rotating over several inputs, on
words and tensors that are on the device already: kernels alone. "whole" is a call with everything the host does:
checksums, headers, uploads, launches. Needs neither Ray nor pyzmq. --tiny runs it all, small, in the simulators.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib import metadata
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from codec import bitstream, gpu, gpu_encode  # noqa: E402
from codec.chunk import decode_chunk, encode_chunk, inspect_blob  # noqa: E402
from codec.decorrelate import as_stored  # noqa: E402
from codec.entropy import CodeBook, bell_cuts, bell_table  # noqa: E402
from codec.errors import BlobError, InvalidProfile  # noqa: E402
from codec.levels import EXACT, Level, LevelKind, Lossy, Promise, TensorPlan  # noqa: E402
from codec.profile import CodecLayout, Profile, default_lossless, default_profile, load_profile  # noqa: E402
from codec.quantize import round_to_bf16  # noqa: E402
from codec.rope import RopeTable  # noqa: E402

BARS = {"decode_gbps_16": 300.0, "encode_gbps_16": 100.0, "decode_lone_us": 150.0}
EIGHT_B = CodecLayout(num_layers=32, num_kv_heads=8, head_dim_k=128, head_dim_v=128)
CHUNK_TOKENS = 256
COARSEST_STEP = 1.5  # in units of the strongest channels' spread, at the coarsest stage
Pair = tuple[torch.Tensor, torch.Tensor]


@dataclass
class Report:
    """What was found, as it goes into the JSON."""

    machine: dict[str, Any]
    checks: list[dict[str, Any]] = field(default_factory=list)
    speeds: list[dict[str, Any]] = field(default_factory=list)
    model: dict[str, Any] = field(default_factory=dict)

    def check(self, name: str, run: Callable[[], str]) -> None:
        """Runs one check; an exception is a failure with its last line."""
        begin = time.perf_counter()
        try:
            detail, passed = run(), True
        except Exception as error:  # any: the other checks shall still run
            traceback.print_exc()
            detail, passed = f"{type(error).__name__}: {error}".splitlines()[0][:300], False
        seconds = time.perf_counter() - begin
        self.checks.append({"name": name, "passed": passed, "detail": detail, "seconds": round(seconds, 2)})
        print(f"{'ok  ' if passed else 'FAIL'} {name}: {detail} ({seconds:.1f} s)", flush=True)


def machine_of(device: torch.device) -> dict[str, Any]:
    def version(name: str) -> str:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            return "-"

    is_cuda = device.type == "cuda"
    return {
        "gpu": torch.cuda.get_device_name(device) if is_cuda else "simulator",
        "multiprocessors": torch.cuda.get_device_properties(device).multi_processor_count if is_cuda else 0,
        "python": platform.python_version(),
        "torch": torch.__version__,
        **{name: version(name) for name in ("triton", "numba", "numba-cuda", "nvidia-cuda-nvrtc", "numpy")},
    }


# Profiles and chunks


def make_plan(layout: CodecLayout, dim: int, stages: int, rng: np.random.Generator, *, matrices: bool) -> TensorPlan:
    """As calibration would find it: spreads fall from channel to channel, one step a head, tables to match."""
    shape = (layout.num_layers, layout.num_kv_heads)
    spread = np.geomspace(1.0, 0.05 if matrices else 0.5, dim) * np.exp2(rng.uniform(-0.2, 0.2, (*shape, 1)))
    step = np.full((*shape, dim), COARSEST_STEP / 3.0 ** (stages - 1))
    matrix, active = np.full(shape, -1, np.int64), np.full((stages, *shape), dim, np.int64)
    analysis = synthesis = np.zeros((0, dim, dim), np.float32)
    if matrices:
        matrix = np.arange(shape[0] * shape[1]).reshape(shape)
        pairs = [as_stored(np.linalg.qr(rng.normal(size=(dim, dim)))[0]) for _ in range(matrix.size)]
        analysis, synthesis = (np.stack(part) for part in zip(*pairs, strict=True))
        for stage in range(stages):  # channels whose spread is under an eighth of a stage's step are left out
            active[stage] = np.maximum((spread > COARSEST_STEP / 3.0**stage / 8).sum(axis=-1), 1)
        active = np.maximum.accumulate(active, axis=0)
    table = np.clip(np.rint(np.log(spread / COARSEST_STEP / 0.02) / np.log(450) * 31), 0, 31).astype(np.uint8)
    return TensorPlan(
        mean=round_to_bf16(rng.normal(0, 0.3, (*shape, dim))), step=round_to_bf16(step),
        is_turned=np.ones(shape[0], bool), group=np.zeros(shape[0], np.int64), matrix=matrix, analysis=analysis,
        synthesis=synthesis, active=active, index=np.repeat(table[:, :, None, :], 2, axis=2),
        refine=np.repeat(table[None], stages - 1, axis=0),
    )  # fmt: skip


def make_profile(layout: CodecLayout, *, stages: int = 3, matrices: bool, group: int = 0, seed: int = 1) -> Profile:
    rng = np.random.default_rng(seed)
    spreads = np.geomspace(0.02, 9, 32)
    plans = [make_plan(layout, d, stages, rng, matrices=matrices) for d in (layout.head_dim_k, layout.head_dim_v)]
    for plan in plans:
        plan.group[::2] = group
    names = [f"q{i + 1}" for i in range(stages)]
    levels = (
        Level(name="lossless", kind=LevelKind.LOSSLESS),
        *(Level(name=name, kind=LevelKind.QUANTIZED, stages=stages - i) for i, name in enumerate(names)),
    )
    return Profile(
        fingerprint="gpu-report", layout=layout, levels=levels,
        lossy=Lossy(
            num_stages=stages, codebook=CodeBook(freqs=np.stack([bell_table(s) for s in spreads])),
            cuts=np.stack([np.stack([bell_cuts(s, n) for s in spreads]) for n in range(1, stages)])
            if stages > 1 else np.zeros((0, 32, 3, 2), np.uint16),
            k=plans[0], v=plans[1],
        ),
        lossless={dtype: default_lossless(dtype) for dtype in bitstream.DTYPE_CODES}, needs_rope=True,
        bits_per_value={}, promise={"lossless": EXACT} | {name: Promise() for name in names},
    )  # fmt: skip


def make_rope(tokens: int, dims: int, start: int = 0) -> RopeTable:
    angle = (start + np.arange(tokens))[:, None] * 10000.0 ** (-np.arange(0, dims, 2) / dims)
    both = np.concatenate([angle, angle], axis=1)
    return RopeTable(np.cos(both), np.sin(both))


def make_chunk(profile: Profile, tokens: int, rope: RopeTable | None, seed: int, device: torch.device) -> Pair:
    """K, V [L, T, H, D] bf16 that the profile's tables fit, a few outliers that they do not."""
    lay, generator = profile.layout, torch.Generator().manual_seed(seed)
    pair = []
    for plan, dim in ((profile.lossy.k, lay.head_dim_k), (profile.lossy.v, lay.head_dim_v)):
        y = torch.randn(lay.num_layers, lay.num_kv_heads, tokens, dim, generator=generator)
        if plan is not None:
            has_matrix = bool((plan.matrix >= 0).any())
            y *= torch.from_numpy(np.geomspace(1.0, 0.05 if has_matrix else 0.5, dim).astype(np.float32))
            if has_matrix:
                y = y @ torch.from_numpy(plan.synthesis).view(lay.num_layers, lay.num_kv_heads, dim, dim)
            y += torch.from_numpy(plan.mean)[:, :, None, :]
        y.view(-1)[5003::99991] *= 60
        if not pair and rope is not None:
            c, s = (torch.from_numpy(part) for part in rope.forward())
            half = rope.half_dim
            a, b = y[..., :half].clone(), y[..., half : 2 * half].clone()
            y[..., :half], y[..., half : 2 * half] = a * c - b * s, b * c + a * s
        pair.append(y.transpose(1, 2).contiguous().to(torch.bfloat16).to(device))
    return pair[0], pair[1]


# Checks


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous().view(torch.uint8)


def compare(got: Pair, want: Pair, profile: Profile, level: str) -> str:
    """Bits equal, or with a matrix within an ulp of each row's largest value. -> what was found."""
    worst, same = 0.0, True
    for a, b, plan in zip(got, want, (profile.lossy.k, profile.lossy.v), strict=True):
        a = a.cpu()
        if torch.equal(bits(a), bits(b)):
            continue
        same = False
        has_matrix = profile.level(level).kind is LevelKind.QUANTIZED and plan is not None and (plan.matrix >= 0).any()
        if not has_matrix:
            raise AssertionError(f"{int((bits(a) != bits(b)).sum())} bytes differ at {level}")
        largest = b.float().abs().amax(dim=-1, keepdim=True).clamp(min=1e-30)
        worst = max(worst, float(((a.float() - b.float()).abs() / torch.exp2(largest.log2().floor() - 7)).max()))
    if worst > 1.0:
        raise AssertionError(f"values differ by {worst:.2f} ulp of their row's largest at {level}")
    return "equal" if same else f"within {worst:.3f} ulp"


def check_case(
    profile: Profile, tokens: Sequence[int], rotary: int, levels: Sequence[str], device: torch.device,
    dtype: torch.dtype = torch.bfloat16,
) -> str:  # fmt: skip
    """Encodes and decodes several chunks of unlike lengths, here and on the CPU; decodes into scattered pages too."""
    ropes = [make_rope(t, rotary, 31 * i) if rotary else None for i, t in enumerate(tokens)]
    chunks = [make_chunk(profile, t, rope, i, device) for i, (t, rope) in enumerate(zip(tokens, ropes, strict=True))]
    chunks = [(k.to(dtype), v.to(dtype)) for k, v in chunks]
    found = []
    for level in levels:
        want = [
            encode_chunk(k.cpu(), v.cpu(), level=level, profile=profile, rope=rope)
            for (k, v), rope in zip(chunks, ropes, strict=True)
        ]
        got = gpu.encode_chunks(chunks, level=level, profile=profile, ropes=ropes)
        is_same = got == want
        if not is_same and not inspect_blob(want[0]).is_shipped:
            raise AssertionError(f"bytes differ at {level}")
        want = got  # shipped statistics may differ in a last bit: sums in another order
        cpu = [decode_chunk(blob, profile=profile, rope=rope) for blob, rope in zip(want, ropes, strict=True)]
        gpu_out = gpu.decode_chunks(want, profile=profile, ropes=ropes, device=device)
        notes = {compare(a, b, profile, level) for a, b in zip(gpu_out, cpu, strict=True)}
        rows = sum(tokens) + 9
        order = np.random.default_rng(5).permutation(rows)[: sum(tokens)]
        slots = np.split(order, np.cumsum(tokens)[:-1])
        out = tuple(
            torch.full((x.shape[0], rows, *x.shape[2:]), 7.0, dtype=torch.float32, device=device).to(dtype)
            for x in chunks[0]
        )
        paged = gpu.decode_chunks(want, profile=profile, ropes=ropes, out=(out[0], out[1]), slots=slots)
        notes |= {compare(a, b, profile, level) for a, b in zip(paged, cpu, strict=True)}
        rest = np.setdiff1d(np.arange(rows), order)
        assert all(bool((x[:, torch.from_numpy(rest).to(device)].float() == 7).all()) for x in out), "stray writes"
        found.append(f"{level} {'bytes equal, ' if is_same else ''}{'/'.join(sorted(notes))}")
    return "; ".join(found)


def check_damage(profile: Profile, device: torch.device, rounds: int) -> str:
    """Blobs with right checksums over damaged pieces: the GPU must do as the CPU does, refuse or decode alike."""
    rope = make_rope(24, profile.layout.head_dim_k)
    k, v = make_chunk(profile, 24, rope, 3, torch.device("cpu"))
    rng, refused = np.random.default_rng(2), 0
    for level in (profile.level_names[1], profile.level_names[-1], "lossless"):
        blob = encode_chunk(k, v, level=level, profile=profile, rope=rope)
        for _ in range(rounds):
            bad = resealed(blob, rng)
            answers: list[Pair | None] = []
            for decode in (
                lambda b: decode_chunk(b, profile=profile, rope=rope),
                lambda b: gpu.decode_chunks([b], profile=profile, ropes=[rope], device=device)[0],
            ):
                try:
                    answers.append(decode(bad))
                except BlobError:
                    answers.append(None)
            if (answers[0] is None) != (answers[1] is None):
                raise AssertionError(f"one of CPU and GPU refuses a damaged blob of {level}, the other does not")
            refused += answers[0] is None
            if answers[0] is not None and answers[1] is not None:
                compare(answers[1], answers[0], profile, level)
    return f"{refused} of {3 * rounds} damaged blobs refused, by both alike"


def resealed(blob: bytes, rng: np.random.Generator) -> bytes:
    """A blob with one flipped bit in a piece, and checksums that fit."""
    import zlib

    info = bitstream.parse_header(memoryview(blob))
    data = bytearray(blob)
    begin = bitstream.HEADER_BYTES + info.directory_bytes
    data[int(rng.integers(begin, len(data) - bitstream.CRC_BYTES))] ^= 1 << int(rng.integers(0, 8))
    data[-4:] = zlib.crc32(data[:-4]).to_bytes(4, "little")
    return bytes(data)


# Speeds


def median_us(runs: Sequence[Callable[[], None]], repeats: int, device: torch.device) -> float:
    """Median microseconds of one run, rotating over `runs`, host time hidden behind a sleeping GPU."""
    for run in runs:
        run()
    if device.type != "cuda":
        begin = time.perf_counter()
        for run in runs:
            run()
        return (time.perf_counter() - begin) / len(runs) * 1e6
    torch.cuda.synchronize()
    replays = [captured(run) for run in runs]
    times = []
    for i in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(400_000)  # some 0.2 ms: the host is ahead when the clock starts
        begin.record()
        replays[i % len(replays)]()
        end.record()
        end.synchronize()
        times.append(1000 * begin.elapsed_time(end))
    return statistics.median(times)


def captured(run: Callable[[], None]) -> Callable[[], None]:
    """A graph of `run` that replays it; `run` itself where it cannot be captured."""
    try:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        replay: Callable[[], None] = graph.replay
        replay()
        torch.cuda.synchronize()
        return replay
    except Exception as error:  # a graph only takes launch time off; what cannot be captured is timed as it is
        print(f"not captured, timed as it is: {error}", flush=True)
        torch.cuda.synchronize()
        return run


def measure(
    report: Report, profile: Profile, name: str, level: str, counts: Sequence[int], tokens: int, device: torch.device,
    repeats: int,
) -> None:  # fmt: skip
    """Kernel and whole-call speeds of one level; the outputs of the timed runs are checked afterwards."""
    lay, rotary = profile.layout, profile.layout.head_dim_k
    most = max(counts)
    ropes: list[RopeTable | None] = [make_rope(tokens, rotary, tokens * i) for i in range(most)]
    chunks = [make_chunk(profile, tokens, rope, i, device) for i, rope in enumerate(ropes)]
    blobs = gpu.encode_chunks(chunks, level=level, profile=profile, ropes=ropes)
    chunk_bytes = 2 * sum(x.numel() for x in chunks[0])
    for count in counts:
        sets = max(1, min(most // count, 4))  # other inputs each time, so that a lone chunk does not live in L2
        parts = [slice(i * count, (i + 1) * count) for i in range(sets)]
        decodes = [gpu.prepare_decode(blobs[p], profile=profile, ropes=ropes[p], device=device) for p in parts]
        for _, out in decodes:
            for x in out:
                x.fill_(float("nan"))
        decode_us = median_us([plan.run for plan, _ in decodes], repeats, device)
        for (plan, out), p in zip(decodes, parts, strict=True):
            plan.check()
            want = decode_chunk(blobs[p.start], profile=profile, rope=ropes[p.start])
            compare((out[0][:, :tokens], out[1][:, :tokens]), want, profile, level)
        encodes = [gpu.prepare_encode(chunks[p], level=level, profile=profile, ropes=ropes[p]) for p in parts]
        encode_us = median_us([plan.run for plan in encodes], repeats, device)
        assert gpu_encode.collect(encodes[0]) == blobs[parts[0]], "the timed encoder's bytes differ"
        begin = time.perf_counter()
        gpu.decode_chunks(blobs[:count], profile=profile, ropes=ropes[:count], device=device)
        decode_whole = time.perf_counter() - begin
        begin = time.perf_counter()
        gpu.encode_chunks(chunks[:count], level=level, profile=profile, ropes=ropes[:count])
        encode_whole = time.perf_counter() - begin
        total = count * chunk_bytes
        row = {
            "profile": name, "level": level, "chunks": count, "layout": [lay.num_layers, lay.num_kv_heads, rotary],
            "tokens": tokens, "bits_per_value": round(8 * sum(map(len, blobs[:count])) / (total / 2), 3),
            "decode_us": round(decode_us, 1), "decode_gbps": round(total / decode_us / 1e3, 1),
            "encode_us": round(encode_us, 1), "encode_gbps": round(total / encode_us / 1e3, 1),
            "decode_whole_gbps": round(total / decode_whole / 1e9, 2),
            "encode_whole_gbps": round(total / encode_whole / 1e9, 2),
        }  # fmt: skip
        report.speeds.append(row)
        print(json.dumps(row), flush=True)


# The bundled model, from a prompt to an answer


def whole_way(report: Report, folder: Path, device: torch.device, prompt_tokens: int, answer_tokens: int) -> str:
    """Prefill on one pool, encode, decode into other pages of a second pool, answer from there."""
    from prefill.engine import Engine, SequenceSlice, prefill
    from prefill.kv_pool import KVPool
    from prefill.model import load_model

    loaded = load_model(folder, device=str(device))
    try:
        profile = load_profile(folder / "profile.kvp")
        calibrated = profile.fingerprint == loaded.fingerprint
    except (OSError, InvalidProfile):  # none, or an older one: the report says which profile it used
        calibrated = False
    if not calibrated:
        profile = default_profile(loaded.layout, fingerprint=loaded.fingerprint)
    ids = loaded.tokenizer((folder / "heldout.txt").read_text()[: 20 * prompt_tokens])["input_ids"][:prompt_tokens]
    blocks = -(-(len(ids) + answer_tokens) // 16)
    source, target = (KVPool(loaded.layout, blocks, 16, device) for _ in range(2))
    near = list(range(blocks))
    far = np.random.default_rng(0).permutation(blocks).tolist()  # pages all over the pool
    engine_a = Engine(loaded, source)
    engine_b = Engine(loaded, target, row_multiple=engine_a.row_multiple)

    def answer(engine: Engine, table: list[int], logits: torch.Tensor) -> list[int]:
        tokens = [int(logits.argmax())]
        while len(tokens) < answer_tokens:
            row = SequenceSlice(
                token_ids=tokens[-1:], start=len(ids) + len(tokens) - 1, block_table=table, need_logits=True
            )
            tokens.append(int(engine.forward([row])[0].argmax()))
        return tokens

    def synchronize() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    begin = synchronize()
    logits = prefill(engine_a, ids, near)
    prefill_s = synchronize() - begin
    own = answer(engine_a, near, logits)
    edges = list(range(0, len(ids), CHUNK_TOKENS)) + [len(ids)]
    spans = list(pairwise(edges))
    ropes: list[RopeTable | None] = [RopeTable(*loaded.rope_tables(a, b)) for a, b in spans]
    pages = target.k.flatten(1, 2), target.v.flatten(1, 2)
    slots = [target.slots(far, a, b).numpy() for a, b in spans]
    raw_bytes = loaded.layout.bytes_per_token * len(ids)
    rows = []
    for level in profile.level_names:
        if profile.level(level).kind is LevelKind.RAW:
            continue
        chunks = [source.read(near, a, b) for a, b in spans]
        for _ in range(2):  # the second time, everything is compiled
            begin = synchronize()
            blobs = gpu.encode_chunks(chunks, level=level, profile=profile, ropes=ropes)
            middle = synchronize()
            gpu.decode_chunks(blobs, profile=profile, ropes=ropes, out=pages, slots=slots)
            end = synchronize()
        theirs = answer(engine_b, far, logits)
        agree = sum(a == b for a, b in zip(own, theirs, strict=True))
        rows.append({
            "level": level, "ratio": round(raw_bytes / sum(map(len, blobs)), 2),
            "encode_ms": round(1e3 * (middle - begin), 2), "decode_ms": round(1e3 * (end - middle), 2),
            "same_tokens": agree, "tokens": len(own),
        })  # fmt: skip
        if profile.level(level).kind is LevelKind.LOSSLESS:
            assert theirs == own, "lossless KV gave another answer"
    report.model = {
        "prompt_tokens": len(ids), "prefill_ms": round(1e3 * prefill_s, 2), "calibrated": calibrated, "levels": rows
    }  # fmt: skip
    return f"{len(ids)} tokens, {len(rows)} levels; lossless answers alike" + ("" if calibrated else "; NOT CALIBRATED")


# The report


def write(report: Report, folder: Path, name: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    data = {**asdict(report), "bars": BARS}
    (folder / f"gpu-{name}.json").write_text(json.dumps(data, indent=1) + "\n")
    lines = [f"# The codec on {report.machine['gpu']}", "", "Made by `scripts/gpu_report.py`: " + ", ".join(
        f"{key} {value}" for key, value in report.machine.items() if key != "gpu") + ".", "", "## Checks", "",
        "| check | result | |", "|---|---|---|"]  # fmt: skip
    lines += [f"| {c['name']} | {'passed' if c['passed'] else '**FAILED**'} | {c['detail']} |" for c in report.checks]
    keys = ["profile", "level", "chunks", "bits_per_value", "decode_us", "decode_gbps", "encode_us", "encode_gbps",
            "decode_whole_gbps", "encode_whole_gbps"]  # fmt: skip
    shape = report.speeds[0]["layout"] if report.speeds else []
    lines += [
        "", "## Speeds", "",
        f"Layout {shape} (layers, KV heads, head dim), {CHUNK_TOKENS} tokens a chunk; GB/s of bf16. Without `whole`: "
        "kernels alone, data on the device, median of graph replays. `whole`: one call, host's work and copies too.",
        "", "| " + " | ".join(keys) + " |", "|" + "---|" * len(keys),
    ]  # fmt: skip
    lines += ["| " + " | ".join(str(row[key]) for key in keys) + " |" for row in report.speeds]
    best = bars(report.speeds)
    lines += ["", "| bar | wanted | slowest level | fastest level |", "|---|---|---|---|"]
    lines += [f"| {key} | {BARS[key]} | {best[key][0]} | {best[key][1]} |" for key in BARS if key in best]
    if report.model:
        keys = ["level", "ratio", "encode_ms", "decode_ms", "same_tokens", "tokens"]
        lines += ["", "## The bundled model, one GPU", "", f"{report.model['prompt_tokens']} tokens prefilled in "
                  f"{report.model['prefill_ms']} ms; profile {'' if report.model['calibrated'] else 'not '}calibrated.",
                  "", "| " + " | ".join(keys) + " |", "|" + "---|" * len(keys)]  # fmt: skip
        lines += ["| " + " | ".join(str(row[key]) for key in keys) + " |" for row in report.model["levels"]]
    (folder / f"gpu-{name}.md").write_text("\n".join(lines) + "\n")


def bars(speeds: list[dict[str, Any]]) -> dict[str, tuple[float, float]]:
    """For each bar the figures of the slowest and the fastest quantized level."""
    out = {}
    for key, column, count, sign in (
        ("decode_gbps_16", "decode_gbps", 16, 1), ("encode_gbps_16", "encode_gbps", 16, 1),
        ("decode_lone_us", "decode_us", 1, -1),
    ):  # fmt: skip
        values = sorted(sign * row[column] for row in speeds if row["chunks"] == count and row["level"] != "lossless")
        if values:
            out[key] = (abs(values[0]), abs(values[-1]))
    return out


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", default="report", help="of the files, as h200-202612")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "benchmarks")
    parser.add_argument("--model", type=Path, default=ROOT / "model", help="the bundled model's folder")
    parser.add_argument("--repeats", type=int, default=50)
    parser.add_argument("--tiny", action="store_true", help="small cases, for the simulators")
    parser.add_argument("--skip-speeds", action="store_true")
    parser.add_argument("--skip-engine", action="store_true", help="the codec only")
    parser.add_argument("--engine-seconds", type=float, default=450.0, help="the most that the engine's part may take")
    args = parser.parse_args(argv)
    if not gpu.is_available():
        print("no CUDA device here that numba-cuda can use: nothing was checked or measured", file=sys.stderr)
        return 2
    device = gpu.Device().device
    report = Report(machine=machine_of(device))
    print(json.dumps(report.machine), flush=True)
    tiny = args.tiny
    checks(report, device, tiny)
    if not args.skip_speeds:
        layout = CodecLayout(num_layers=1, num_kv_heads=1, head_dim_k=64, head_dim_v=64) if tiny else EIGHT_B
        for matrices in (False, True):
            profile = make_profile(layout, stages=3, matrices=matrices)
            for level in profile.level_names:
                if matrices and level == "lossless":
                    continue
                name = f"{'matrices' if matrices else 'plain'}, {level}"
                counts, tokens = ((1, 2), 2) if tiny else ((1, 16), CHUNK_TOKENS)
                report.check(f"speed: {name}", partial(
                    _measured, report, profile, level, counts, tokens, device, args.repeats))  # fmt: skip
    if (args.model / "config.json").is_file() and not tiny:
        report.check("the bundled model's whole way", lambda: whole_way(report, args.model, device, 1024, 32))
    write(report, args.out, args.name)
    failed = [c["name"] for c in report.checks if not c["passed"]]
    print(f"{len(report.checks)} checks, {len(failed)} failed{': ' if failed else ''}{', '.join(failed)}")
    print({key: f"{low} to {high}, wanted {BARS[key]}" for key, (low, high) in bars(report.speeds).items()})
    if device.type == "cuda" and not tiny and not args.skip_engine:
        from scripts.gpu_engine_report import measure_all

        failed += measure_all(args.out, args.name, args.engine_seconds).failed
    return 1 if failed else 0


def _measured(
    report: Report, profile: Profile, level: str, counts: Sequence[int], tokens: int, device: torch.device, repeats: int
) -> str:
    plan = profile.lossy.k
    name = "matrices" if plan is not None and (plan.matrix >= 0).any() else "plain"
    measure(report, profile, name, level, counts, tokens, device, repeats)
    return "outputs right after timing"


def checks(report: Report, device: torch.device, tiny: bool) -> None:
    """Everything against the CPU codec."""

    def layout(layers: int, heads: int, dim_k: int, dim_v: int) -> CodecLayout:
        return CodecLayout(num_layers=layers, num_kv_heads=heads, head_dim_k=dim_k, head_dim_v=dim_v)

    def case(
        name: str, profile: Profile, tokens: Sequence[int], rotary: int, dtype: torch.dtype = torch.bfloat16,
        levels: Sequence[str] | None = None,
    ) -> None:  # fmt: skip
        names = profile.level_names if levels is None else levels
        report.check(name, lambda: check_case(profile, tokens, rotary, names, device, dtype))

    if tiny:
        small = layout(1, 1, 64, 64)
        case("64 dims", make_profile(small, matrices=False, group=2), (3, 2), 64, levels=("q1", "lossless"))
        case("a matrix", make_profile(small, matrices=True), (3,), 64, levels=("q2",))
        return
    for dim, rotary in ((64, 64), (128, 128), (32, 32), (80, 32), (96, 96), (256, 256), (128, 64)):
        lay = layout(3, 2, dim, dim)
        case(f"{dim} dims, {rotary} rotated", make_profile(lay, stages=3, matrices=False), (256, 17, 100), rotary)
        case(f"{dim} dims, matrices", make_profile(lay, stages=3, matrices=True), (256, 17), rotary)
    case("6 stages, anchors", make_profile(layout(2, 3, 128, 128), stages=6, matrices=False, group=8), (256, 33), 128)
    case("1 stage", make_profile(layout(2, 1, 64, 64), stages=1, matrices=False), (64,), 64)
    case("K of 192, V of 128", make_profile(layout(2, 1, 192, 128), stages=2, matrices=True), (64, 9), 64)
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn, torch.float8_e5m2):
        case(f"uncalibrated, {dtype}", default_profile(layout(2, 2, 64, 64)), (64, 5), 64, dtype)
    report.check("damaged blobs", lambda: check_damage(make_profile(layout(1, 2, 64, 64), matrices=False), device, 40))
    eight = make_profile(EIGHT_B, stages=3, matrices=False)
    case("8B-shaped", eight, (CHUNK_TOKENS,), 128)
    eight = make_profile(EIGHT_B, stages=3, matrices=True)
    case("8B-shaped, matrices", eight, (CHUNK_TOKENS,), 128, levels=("q1", "q3"))


if __name__ == "__main__":
    sys.exit(main())
