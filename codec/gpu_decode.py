"""Blobs -> K and V on a GPU, many chunks in one launch. See gpu.py for the front door.

The host reads headers and directories and checks checksums; one copy takes all words and small arrays over; one launch
a head dim decodes all segments. bf16 at a level without matrices goes from the stream to its pages in that launch;
the rest (matrices, rotations across lanes, other dtypes) through integers in scratch memory and a second kernel.
Legend: C chunks, L layers, T tokens, H KV heads, D head dim, S = L * H, J jobs (segments of all chunks), K stages.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from codec import bitstream, shipped
from codec.bitstream import BlobInfo, Directory
from codec.decode import LARGEST, check_profile
from codec.entropy import CodeBook
from codec.errors import CodecError, MalformedBlob, RopeRequired
from codec.gpu_device import Array, Device, Rows, Upload, cached_rows, make_rows, plain_flat
from codec.levels import LevelKind, Lossy
from codec.lossless import even, plane_bytes
from codec.profile import Profile
from codec.rope import RopeTable
from codec.tensor_rows import TORCH_DTYPES, FlatPlan, check_rope, turned_segments
from kernels import quantize_triton, rans_cuda
from kernels.rans_decode_cuda import (
    HALF,
    JOB_FIELDS,
    MODE,
    MODE_LOSSLESS,
    MODE_PAGES,
    MODE_ROWS,
    MULTIPLIER,
    ROW,
    STAGES,
    TENSOR,
    TOKEN,
    TOKENS,
    WHOLE,
)
from kernels.rans_reference import lanes_of

BLOCK_T = 64  # tokens a program of the second kernel
BLOCK_K = 32  # rows of a matrix at a time
Blob = bytes | bytearray | memoryview


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Chunk:
    """One blob, checked but for its streams. slots [T]: where its tokens go in the pool."""

    info: BlobInfo
    body: memoryview
    directory: Directory | None
    rope: RopeTable | None
    slots: Array


@dataclass(kw_only=True, eq=False)
class DecodePlan:
    """Everything on the device, ready to run. run() enqueues and may be repeated; check() waits and raises."""

    steps: list[Callable[[], None]] = field(default_factory=list)
    statuses: list[tuple[torch.Tensor, list[str]]] = field(default_factory=list)
    keep: list[Any] = field(default_factory=list)  # memory that raw pointers point to

    def run(self) -> None:
        for step in self.steps:
            step()

    def check(self) -> None:
        """Raises MalformedBlob for the first segment that was not what an encoder writes; what was decoded must then
        not be used."""
        for status, names in self.statuses:
            codes = status.cpu().numpy()
            if codes.any():
                first = int(np.flatnonzero(codes)[0])
                raise MalformedBlob(f"{names[first]}: the stream is not what an encoder writes (code {codes[first]})")


def open_chunks(
    blobs: Sequence[Blob], profile: Profile, ropes: Sequence[RopeTable | None], slots: Sequence[Array] | None
) -> list[_Chunk]:
    """Headers, directories and checksums. Raises BlobError subclasses, RopeRequired, CodecError."""
    chunks, start = [], 0
    for number, (blob, rope) in enumerate(zip(blobs, ropes, strict=True)):
        view = memoryview(blob).cast("B")
        info = bitstream.parse_header(view)
        check_profile(info, profile)
        if info.is_refinement:
            raise MalformedBlob(f"the blob refines stage {info.first_stage}; put it behind the coarser blob")
        bitstream.check_whole(view, info)
        if info.is_unrotated:
            if rope is None:
                raise RopeRequired("this blob's keys were coded before RoPE; pass the chunk's RopeTable")
            if rope.num_tokens != info.num_tokens:
                raise MalformedBlob(f"the blob holds {info.num_tokens} tokens, {rope.num_tokens} were expected")
            check_rope(rope, info.num_tokens, profile)
        directory = None if info.kind is LevelKind.RAW else bitstream.parse_directory(view, info)
        place = np.arange(start, start + info.num_tokens) if slots is None else np.asarray(slots[number], np.int64)
        if place.shape != (info.num_tokens,):
            raise MalformedBlob(f"the blob holds {info.num_tokens} tokens, {place.size} slots were given")
        start += info.num_tokens
        body = view[bitstream.HEADER_BYTES : -bitstream.CRC_BYTES]
        chunks.append(_Chunk(info=info, body=body, directory=directory, rope=rope, slots=place))
    first = chunks[0].info
    for chunk in chunks:
        info = chunk.info
        if (info.dtype, info.layout, info.layers, info.heads) != (first.dtype, first.layout, first.layers, first.heads):
            raise CodecError("chunks decoded together must hold the same layers and heads, in one dtype")
    return chunks


def prepare(
    chunks: Sequence[_Chunk], profile: Profile, out: tuple[torch.Tensor, torch.Tensor], device: Device
) -> DecodePlan:
    """out: k, v [L, X, H, D] of the blobs' dtype on the device; token t of a chunk goes to row slots[t] of X."""
    info = chunks[0].info
    for which, tensor, dim in (("K", out[0], info.layout[2]), ("V", out[1], info.layout[3])):
        layers, heads = info.layout[:2]
        if tensor.ndim != 4 or (tensor.shape[0], *tensor.shape[2:]) != (layers, heads, dim):
            raise CodecError(f"out for {which} is {list(tensor.shape)}, want [{layers}, X, {heads}, {dim}]")
        if tensor.dtype is not TORCH_DTYPES[info.dtype] or tensor.device != device.device:
            raise CodecError(f"out for {which} is {tensor.dtype} on {tensor.device}, the blobs hold {info.dtype}")
        if any(c.slots.min() < 0 or c.slots.max() >= tensor.shape[1] for c in chunks):
            raise CodecError(f"a slot is outside out for {which}, which has {tensor.shape[1]} rows")
        if tensor.stride(3) != 1 or any(s < 0 for s in tensor.stride()):
            raise CodecError(f"out for {which} must have contiguous rows")
    plan = DecodePlan()
    for kind in LevelKind:
        some = [c for c in chunks if c.info.kind is kind]
        if not some:
            continue
        if kind is LevelKind.RAW:
            for c in some:
                _plan_raw(plan, c, out, device)
        elif kind is LevelKind.LOSSLESS and info.dtype != "bfloat16":
            _plan_planes(plan, some, profile, out, device)
        else:
            _plan_bf16(plan, some, profile, out, device)
    return plan


def _put(target: torch.Tensor, slots: torch.Tensor, values: torch.Tensor) -> None:
    """values [L, T, H, D] -> rows `slots` of target [L, X, H, D]."""
    largest = LARGEST.get(str(target.dtype).removeprefix("torch."))
    if values.dtype is not target.dtype:
        values = values.float() if largest is None else values.float().clamp(-largest, largest)
    target[:, slots] = values.to(target.dtype)


def _plan_raw(plan: DecodePlan, chunk: _Chunk, out: tuple[torch.Tensor, torch.Tensor], device: Device) -> None:
    info = chunk.info
    layers, heads, *dims = info.layout
    upload = Upload()
    upload.add("body", np.frombuffer(chunk.body, np.uint8))
    upload.add("slots", chunk.slots)
    upload.send(device)
    body, slots = upload.tensor("body"), upload.tensor("slots")

    def run() -> None:
        at = 0
        for target, dim in zip(out, dims, strict=True):
            size = layers * info.num_tokens * heads * dim * target.element_size()
            values = body[at : at + size].clone().view(target.dtype)  # cloned: aligned for any dtype
            target[:, slots] = values.view(layers, info.num_tokens, heads, dim)
            at += size

    plan.steps.append(run)


def _plan_bf16(
    plan: DecodePlan, chunks: list[_Chunk], profile: Profile, out: tuple[torch.Tensor, torch.Tensor], device: Device
) -> None:
    """Quantized blobs of any dtype, lossless ones of bf16."""
    info = chunks[0].info
    layers, heads, *dims = info.layout
    target = out
    if info.dtype != "bfloat16":
        rows = sum(c.info.num_tokens for c in chunks)
        k, v = (device.empty(layers, rows, heads, dim, dtype=torch.bfloat16) for dim in dims)
        target = (k, v)
        slots = torch.from_numpy(np.concatenate([c.slots for c in chunks])).to(device.device)
        ends = np.cumsum([c.info.num_tokens for c in chunks])
        chunks = [
            replace(c, slots=np.arange(end - c.info.num_tokens, end)) for c, end in zip(chunks, ends, strict=True)
        ]
    upload = _upload_words(chunks)
    for tensors in ((0, 1),) if dims[0] == dims[1] else ((0,), (1,)):
        _plan_launch(plan, chunks, profile, target, tensors, upload, device)
    upload.send(device)
    plan.keep.append(upload)
    if target is not out:

        def put() -> None:
            for a, b in zip(out, target, strict=True):
                _put(a, slots, b)

        plan.steps.append(put)


def _upload_words(chunks: Sequence[_Chunk]) -> Upload:
    """All chunks' pieces, one behind the other."""
    upload = Upload()
    upload.add("words", np.concatenate([c.directory.words for c in chunks if c.directory is not None]))
    return upload


def _word_starts(chunks: Sequence[_Chunk]) -> list[int]:
    sizes = [c.directory.words.size for c in chunks if c.directory is not None]
    return [int(end - size) for end, size in zip(np.cumsum(sizes), sizes, strict=True)]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Jobs:
    """The jobs of one launch and what they point to; pos, size, exceptions [K, J]."""

    jobs: Array
    pos: Array
    size: Array
    exceptions: Array
    planes: Array
    out_pos: Array
    scratch_pos: Array
    scratch_words: int
    names: list[str]


def _rows_for(chunks: list[_Chunk], profile: Profile, tensors: tuple[int, ...], device: Device) -> tuple[Rows, Array]:
    """-> the rows on the device and which row each job is: [C, len(tensors), S]. Reads shipped side information."""
    info = chunks[0].info
    layers, heads = info.layout[:2]
    count = layers * heads
    is_lossless = info.kind is LevelKind.LOSSLESS
    lossless = profile.lossless.get(info.dtype)
    lossy = profile.lossy
    dims = info.layout[2:]
    if is_lossless:
        assert lossless is not None
        lossy = Lossy(num_stages=1, codebook=lossless.codebook, cuts=np.zeros((0, 1, 3, 2), np.uint16))
    if info.is_shipped:
        flats = []
        for c in chunks:
            assert c.directory is not None
            for which in tensors:
                flats.append(_shipped_flat(c, which, lossy.codebook, lossy.num_stages, is_lossless))
        rows = make_rows(flats, lossy, device, for_encoding=False)
        return rows, np.arange(len(chunks) * len(tensors) * count).reshape(len(chunks), len(tensors), count)
    part = (info.layers, info.heads)

    def make() -> Rows:
        if lossless is not None and is_lossless:
            index = [(lossless.k, lossless.v)[which] for which in tensors]
            flats = [plain_flat(x[slice(*part[0]), slice(*part[1])].reshape(count, -1)) for x in index if x is not None]
        else:
            plans = [(profile.lossy.k, profile.lossy.v)[which] for which in tensors]
            flats = [FlatPlan.of(plan, part, lossy.num_stages) for plan in plans if plan is not None]
        return make_rows(flats, lossy, device, for_encoding=False)

    key = ("decode", profile.id, info.kind, info.dtype if is_lossless else "", part, tensors, str(device.device))
    assert len({dims[which] for which in tensors}) == 1
    one = np.arange(len(tensors) * count).reshape(1, len(tensors), count)
    return cached_rows(key, make), np.repeat(one, len(chunks), axis=0)


def _shipped_flat(c: _Chunk, which: int, book: CodeBook, stages: int, is_lossless: bool) -> FlatPlan:
    assert c.directory is not None
    dim = c.info.layout[2 + which]
    width = shipped.side_words(dim, is_lossless=is_lossless)
    first = c.directory.start[0, which].ravel()
    if (c.directory.entries["words"][0, which] < width).any():
        raise MalformedBlob("a piece is shorter than its side information")
    side = shipped.read_side(c.directory.words, first, width)
    if is_lossless:
        return plain_flat(shipped.unpack_index(side, dim, book)[0])
    mean, step, index = shipped.unpack_side(side, dim, book)
    return FlatPlan.of_shipped(mean, step, index, stages, is_turned=which == 0 and c.info.is_unrotated)


def _make_jobs(
    chunks: list[_Chunk], profile: Profile, target: tuple[torch.Tensor, torch.Tensor], tensors: tuple[int, ...],
    rows: Rows, row_of: Array, halves: list[int], *, as_rows: bool,
) -> _Jobs:  # fmt: skip
    info = chunks[0].info
    layers, heads = info.layout[:2]
    count, dim = layers * heads, rows.num_dims
    is_lossless = info.kind is LevelKind.LOSSLESS
    side = shipped.side_words(dim, is_lossless=is_lossless) if info.is_shipped else 0
    most = max(1 if is_lossless else c.info.stages for c in chunks)
    num_jobs = len(chunks) * len(tensors) * count
    jobs = np.zeros((len(chunks), len(tensors), count, JOB_FIELDS), np.int32)
    pos, size, exceptions = (np.zeros((most, *jobs.shape[:3]), np.int64) for _ in range(3))
    planes, out_pos = np.zeros(jobs.shape[:3], np.int64), np.zeros(jobs.shape[:3], np.int64)
    scratch = np.zeros(jobs.shape[:3], np.int64)
    total = sum(c.info.num_tokens for c in chunks)
    token, names = 0, []
    lanes = lanes_of(dim)
    can_turn = rans_cuda.quads_of(dim) == 1
    for n, (c, start) in enumerate(zip(chunks, _word_starts(chunks), strict=True)):
        assert c.directory is not None
        stages = 1 if is_lossless else c.info.stages
        for m, which in enumerate(tensors):
            here = jobs[n, m]
            here[:, ROW] = row_of[n, m]
            here[:, TOKEN] = token + m * total  # each tensor has its own offsets in row_pos
            here[:, TOKENS], here[:, STAGES], here[:, TENSOR] = c.info.num_tokens, stages, which
            here[:, WHOLE] = is_lossless or stages == profile.lossy.num_stages
            here[:, MULTIPLIER] = 1 if is_lossless else 3 ** (profile.lossy.num_stages - stages)
            turned = rows.is_turned[row_of[n, m]] & (which == 0 and c.info.is_unrotated and halves[n] > 0)
            turned = turned & turned_segments(c.rope, (c.info.layers, c.info.heads)).astype(bool)
            fits = ~turned | (can_turn & (halves[n] == 2 * lanes))
            in_pages = (rows.matrix[row_of[n, m]] < 0) & fits
            here[:, MODE] = MODE_LOSSLESS if is_lossless else np.where(in_pages, MODE_PAGES, MODE_ROWS)
            if as_rows:
                here[:, MODE] = MODE_ROWS
            here[:, HALF] = np.where(turned, halves[n], 0)
            entries = c.directory.entries[:, which].reshape(c.info.stages, count)
            starts = c.directory.start[:, which].reshape(c.info.stages, count) + start
            pos[:stages, n, m], size[:stages, n, m] = starts[:stages], entries["words"][:stages]
            exceptions[:stages, n, m] = entries["exceptions"][:stages]
            pos[0, n, m] += side
            size[0, n, m] -= side
            if is_lossless:
                bytes_each = plane_bytes(info.dtype, c.info.num_tokens * dim)
                if (2 * entries["words"][1].astype(np.int64) != bytes_each).any() or entries["exceptions"][1].any():
                    raise MalformedBlob("the plain planes are not of the layout's size")
                planes[n, m] = 2 * starts[1]
            stride_l, _, stride_h, _ = target[which].stride()
            out_pos[n, m] = (np.arange(layers)[:, None] * stride_l + np.arange(heads) * stride_h).ravel()
            scratch[n, m] = rans_cuda.scratch_words(c.info.num_tokens, dim)
            names += [f"{'KV'[which]} of layer {info.first_layer + s // heads} of chunk {n}" for s in range(count)]
        token += c.info.num_tokens
    flat = jobs.reshape(num_jobs, JOB_FIELDS)
    # Nothing lies in scratch for a single stage that goes straight to its pages.
    sizes = np.where((flat[:, STAGES] > 1) | (flat[:, MODE] == MODE_ROWS), scratch.ravel(), 0)
    return _Jobs(
        jobs=flat, pos=pos.reshape(most, -1), size=size.reshape(most, -1), exceptions=exceptions.reshape(most, -1),
        planes=planes.ravel(), out_pos=out_pos.ravel(), scratch_pos=np.cumsum(sizes) - sizes,
        scratch_words=int(sizes.sum()), names=names,
    )  # fmt: skip


def _plan_launch(
    plan: DecodePlan, chunks: list[_Chunk], profile: Profile, target: tuple[torch.Tensor, torch.Tensor],
    tensors: tuple[int, ...], upload: Upload, device: Device, *, as_rows: bool = False,
) -> tuple[_Jobs, torch.Tensor]:  # fmt: skip
    """One launch over the segments of K, V or both, and the second kernel's for those that need it."""
    halves = [c.rope.half_dim if c.rope is not None and c.info.is_unrotated else 0 for c in chunks]
    rows, row_of = _rows_for(chunks, profile, tensors, device)
    j = _make_jobs(chunks, profile, target, tensors, rows, row_of, halves, as_rows=as_rows)
    prefix = str(tensors)
    num_jobs, angles = len(j.jobs), max(halves)
    cos, sin = (_angles(chunks, angles, part) for part in (0, 1))
    slots = np.concatenate([c.slots for c in chunks])
    for name, array in (
        ("jobs", j.jobs), ("pos", j.pos), ("size", j.size.astype(np.int32)), ("planes", j.planes),
        ("exceptions", j.exceptions.astype(np.int32)), ("out_pos", j.out_pos), ("scratch_pos", j.scratch_pos),
        ("cos", cos), ("sin", sin),
        ("row_pos", np.concatenate([slots * target[which].stride(1) for which in tensors])),
    ):  # fmt: skip
        upload.add(prefix + name, array)
    scratch = device.empty(max(j.scratch_words, 1), dtype=torch.int64)
    status = device.zeros(num_jobs, dtype=torch.int32)
    dim = rows.num_dims
    launch = rans_cuda.decode_launch(num_jobs, dim, rows.image_words)
    plan.keep += [rows, scratch, target]
    pages = (scratch, scratch) if as_rows else target  # nothing is written to pages then
    plan.statuses.append((status, j.names))
    args: list[Any] = []

    def run() -> None:
        if not args:  # once the upload is sent
            own = rows.upload
            args.extend([
                upload.view("words", device), upload.view("words", device, np.uint8),
                *(upload.view(prefix + name, device) for name in ("pos", "size", "exceptions", "jobs", "out_pos")),
                upload.view(prefix + "scratch_pos", device), num_jobs, upload.view(prefix + "planes", device),
                own.view("image", device), rows.num_tables, rows.num_sets, rows.num_refined,
                *(own.view(name, device) for name in ("base_index", "group", "refine_index", "active")), rows.num_rows,
                own.view("step_by_quads", device), own.view("mean_by_quads", device),
                upload.view(prefix + "cos", device), upload.view(prefix + "sin", device), angles,
                upload.view(prefix + "row_pos", device), device.span(pages[0]), device.span(pages[1]),
                device.view(scratch, np.uint64), device.view(status, np.int32),
            ])  # fmt: skip
        device.run(rans_cuda.make_decode_kernel(dim), launch, *args)

    plan.steps.append(run)
    if not as_rows:
        _plan_synthesis(plan, j, rows, target, upload, prefix, scratch, angles, device)
    return j, scratch


def _angles(chunks: Sequence[_Chunk], width: int, part: int) -> Array:
    """cos (part 0) or sin (1) of all chunks' tokens [sum of T, width]."""
    out = np.zeros((sum(c.info.num_tokens for c in chunks), width), np.float32)
    at = 0
    for c in chunks:
        if c.rope is not None and c.info.is_unrotated:
            table = c.rope.forward()[part]
            out[at : at + c.info.num_tokens, : table.shape[1]] = table
        at += c.info.num_tokens
    return out


def _plan_synthesis(
    plan: DecodePlan, j: _Jobs, rows: Rows, target: tuple[torch.Tensor, torch.Tensor], upload: Upload, prefix: str,
    scratch: torch.Tensor, angles: int, device: Device,
) -> None:  # fmt: skip
    """The second kernel, for each kind of job that is left in scratch: by tensor, rotation, matrix or none."""
    left = np.flatnonzero(j.jobs[:, MODE] == MODE_ROWS)
    has_matrix = rows.matrix[j.jobs[:, ROW]] >= 0
    kinds = sorted({(int(j.jobs[i, TENSOR]), int(j.jobs[i, HALF]), bool(has_matrix[i])) for i in left})
    dim = rows.num_dims
    for tensor, half, matrix in kinds:
        some = [i for i in left if (j.jobs[i, TENSOR], j.jobs[i, HALF], has_matrix[i]) == (tensor, half, matrix)]
        name = f"{prefix}{tensor}{half}{matrix}"
        upload.add(f"{name}jobs", j.jobs[some][:, [ROW, TOKEN, TOKENS, MULTIPLIER]])
        upload.add(f"{name}out", j.out_pos[some])
        upload.add(f"{name}scratch", j.scratch_pos[some])
        grid = (len(some), -(-int(j.jobs[some, TOKENS].max()) // BLOCK_T))
        out = target[tensor].view(torch.int16)

        def run(
            name: str = name, grid: tuple[int, int] = grid, out: torch.Tensor = out, half: int = half,
            matrix: bool = matrix,
        ) -> None:  # fmt: skip
            own = rows.upload
            quantize_triton.synthesize_kernel[grid](
                scratch.view(torch.int32), upload.tensor(f"{name}jobs"), upload.tensor(f"{name}out"),
                upload.tensor(f"{name}scratch"), own.tensor("matrix"), own.tensor("step"), own.tensor("mean"),
                own.tensor("matrices"), upload.tensor(prefix + "cos"), upload.tensor(prefix + "sin"),
                upload.tensor(prefix + "row_pos"), out, angles, num_dims=dim, lanes=lanes_of(dim), half=half,
                BLOCK_T=BLOCK_T, BLOCK_K=BLOCK_K, BLOCK_HALF=quantize_triton.block_of(max(half, 1)),
                BLOCK_REST=quantize_triton.block_of(max(dim - 2 * half, 1)), HAS_MATRIX=matrix, IS_ORDERED=False,
                num_warps=4 if dim <= 128 else 8, **quantize_triton.FUSION_OFF,
            )  # fmt: skip

        plan.steps.append(run)


def _plan_planes(
    plan: DecodePlan, chunks: list[_Chunk], profile: Profile, out: tuple[torch.Tensor, torch.Tensor], device: Device
) -> None:
    """Lossless blobs of other dtypes than bf16: the coded bytes come as integers, torch joins them to their planes."""
    info = chunks[0].info
    layers, heads, *dims = info.layout
    upload = _upload_words(chunks)
    launches = [_plan_launch(plan, chunks, profile, out, (which,), upload, device, as_rows=True) for which in (0, 1)]
    for n, c in enumerate(chunks):
        upload.add(f"slots{n}", c.slots)
    upload.send(device)
    plan.keep.append(upload)
    count = layers * heads
    for which, (jobs, scratch) in enumerate(launches):
        dim = dims[which]
        for n, c in enumerate(chunks):
            tokens = c.info.num_tokens
            first = int(jobs.scratch_pos[n * count])
            words = rans_cuda.scratch_words(tokens, dim) * count
            planes_at = torch.from_numpy(jobs.planes[n * count : (n + 1) * count]).to(device.device)
            bad = device.zeros(1, dtype=torch.int32)
            plan.statuses.append((bad, [f"{'KV'[which]} of chunk {n}"]))

            def run(
                which: int = which, n: int = n, tokens: int = tokens, dim: int = dim, first: int = first,
                words: int = words, planes_at: torch.Tensor = planes_at, bad: torch.Tensor = bad,
                scratch: torch.Tensor = scratch,
            ) -> None:  # fmt: skip
                coded = rows_of_scratch(scratch[first : first + words], tokens, dim).view(count, -1) + 128
                bad[:] = ((coded < 0) | (coded > 255)).any().to(torch.int32)
                size = plane_bytes(info.dtype, tokens * dim)
                plain = upload.tensor("words").view(torch.uint8)
                planes = plain[planes_at[:, None] + torch.arange(size, device=device.device)]
                bits = join_planes(coded & 255, planes, info.dtype)
                values = bits.view(layers, heads, tokens, dim).transpose(1, 2).contiguous()
                target = out[which]
                target[:, upload.tensor(f"slots{n}")] = values.view(target.dtype)

            plan.steps.append(run)


def rows_of_scratch(scratch: torch.Tensor, num_tokens: int, num_dims: int) -> torch.Tensor:
    """int64 [S * scratch_words] -> int32 [S, T, D]: kernels.rans_cuda.rows_of_scratch on the device."""
    lanes, quads = lanes_of(num_dims), rans_cuda.quads_of(num_dims)
    pairs = scratch.view(torch.int32).view(-1, num_tokens, quads, 2, lanes, 2)
    return pairs.permute(0, 1, 2, 3, 5, 4).reshape(-1, num_tokens, quads * 4 * lanes)[..., :num_dims].contiguous()


def join_planes(coded: torch.Tensor, planes: torch.Tensor, dtype: str) -> torch.Tensor:
    """codec.lossless.join on the device: coded int32 [S, n] of 0..255, planes uint8 [S, *] -> bits in the dtype's width
    (int32, int16 or uint8)."""
    count = coded.shape[1]

    def two_bits(packed: torch.Tensor) -> torch.Tensor:
        shifts = torch.tensor([0, 2, 4, 6], device=packed.device)
        return ((packed[:, :, None].int() >> shifts) & 3).view(packed.shape[0], -1)[:, :count]

    if dtype == "float16":
        two = two_bits(planes[:, even(count) :])
        bits = ((two & 2) << 14) | ((coded & 0x3F) << 9) | ((two & 1) << 8) | planes[:, :count].int()
        return bits.to(torch.int16)
    if dtype == "float32":
        plane = planes[:, :count].int()
        high = ((plane & 0x80) << 8) | (coded << 7) | (plane & 0x7F)
        low = planes[:, even(count) :].contiguous().view(torch.int16).int() & 0xFFFF
        return (high << 16) | low
    two = two_bits(planes)
    return (((two & 2) << 6) | ((coded & 0x3F) << 1) | (two & 1)).to(torch.uint8)
