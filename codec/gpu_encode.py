"""K and V on a GPU -> blobs, many chunks at once. See gpu.py for the front door.

One Triton launch a tensor makes integers of rows, one launch a head dim codes all segments of all chunks into slots,
one closes the gaps; then the pieces come to the host, which adds checksums and headers.
Legend: C chunks, L layers, T tokens, H KV heads, D head dim, S = L * H, J jobs (segments of all chunks), K stages.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from codec import bitstream, shipped
from codec.bitstream import BlobInfo
from codec.entropy import CodeBook
from codec.errors import CodecError, UnencodableTensor
from codec.gpu_device import Array, Device, Rows, Upload, cached_rows, make_rows, plain_flat, whole
from codec.levels import Level, LevelKind, Lossy
from codec.lossless import even, plane_bytes
from codec.profile import MAX_MEAN, MAX_STEP, MIN_STEP, Profile
from codec.rope import RopeTable
from codec.tensor_rows import DTYPES, FlatPlan, check_rope, layout_of, turned_segments
from kernels import quantize_triton, rans_cuda
from kernels.rans_decode_cuda import NO_ROOM
from kernels.rans_encode_cuda import ENCODE_FIELDS
from kernels.rans_reference import MAX_MAGNITUDE, lanes_of

BLOCK_T = 32  # tokens a program of the quantizer
EXCEPTION_SHARE = 16  # room for one exception in so many values; a fuller chunk is coded again with room for all
OUT_SHARE = 2  # room for one 16-bit word in so many values and stages, likewise
Chunk = tuple[torch.Tensor, torch.Tensor]


@dataclass(kw_only=True, eq=False)
class EncodePlan:
    """Everything on the device, ready to run. run() enqueues and may be repeated; blobs() waits and assembles."""

    infos: list[BlobInfo]
    steps: list[Callable[[], None]] = field(default_factory=list)
    flags: list[tuple[torch.Tensor, list[str]]] = field(default_factory=list)  # not 0: not finite, or too large
    parts: list[Any] = field(default_factory=list)
    profile: Profile
    spec: Level
    keep: list[Any] = field(default_factory=list)

    def run(self) -> None:
        for step in self.steps:
            step()


class NoRoom(Exception):
    """More words or exceptions than there was room for."""


def check_chunks(chunks: Sequence[Chunk], profile: Profile, spec: Level, device: Device) -> str:
    """-> the dtype's name. Raises UnencodableTensor."""
    layers, heads, *dims = layout_of(profile)
    for k, v in chunks:
        for which, tensor, dim in (("K", k, dims[0]), ("V", v, dims[1])):
            if tensor.ndim != 4 or tensor.shape[0] != layers or tensor.shape[2:] != (heads, dim):
                raise UnencodableTensor(f"{which} is {list(tensor.shape)}, want [{layers}, T, {heads}, {dim}]")
            if tensor.dtype not in DTYPES or tensor.dtype is not chunks[0][0].dtype or tensor.device != device.device:
                raise UnencodableTensor(f"{which} is {tensor.dtype} on {tensor.device}; want one on {device.device}")
            if not 1 <= tensor.shape[1] <= bitstream.MAX_TOKENS or tensor.shape[1] != k.shape[1]:
                raise UnencodableTensor(f"{which} has {tensor.shape[1]} tokens, K {k.shape[1]}; want 1 to 4,096")
    dtype = DTYPES[chunks[0][0].dtype]
    if spec.kind is LevelKind.LOSSLESS and dtype not in profile.lossless:
        raise UnencodableTensor(f"the profile has no lossless tables for {dtype}; use raw")
    return dtype


def make_info(k: torch.Tensor, spec: Level, dtype: str, profile: Profile, *, is_unrotated: bool) -> BlobInfo:
    is_lossless = spec.kind is LevelKind.LOSSLESS
    return BlobInfo(
        level=spec.name, kind=spec.kind, dtype=dtype, is_unrotated=is_unrotated,
        is_shipped=(is_lossless and profile.lossless[dtype].is_shipped)
        or (spec.kind is LevelKind.QUANTIZED and profile.lossy.is_shipped),
        profile_id=profile.id, layout=layout_of(profile), first_layer=0, first_head=0, num_tokens=k.shape[1],
        first_stage=0, stages=bitstream.LOSSLESS_PIECES if is_lossless else spec.stages, body_bytes=0,
    )  # fmt: skip


def encode_raw(chunks: Sequence[Chunk], spec: Level, profile: Profile, dtype: str) -> list[bytes]:
    blobs = []
    for k, v in chunks:
        info = make_info(k, spec, dtype, profile, is_unrotated=False)
        parts = [memoryview(x.contiguous().view(torch.uint8).cpu().numpy()).cast("B") for x in (k, v)]
        blobs.append(bitstream.assemble(info, None, parts))
    return blobs


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Part:
    """What one launch leaves, of K, V or both: jobs are [C, len(tensors), S]. side u16 [J, w] on the host."""

    tensors: tuple[int, ...]
    num_jobs: int
    words: torch.Tensor
    exceptions: torch.Tensor
    sizes: torch.Tensor  # i64 [K, J], states, stream and exceptions
    payload: torch.Tensor
    status: torch.Tensor
    planes: list[torch.Tensor]
    sides: list[torch.Tensor]


def prepare(
    chunks: Sequence[Chunk], ropes: Sequence[RopeTable | None], spec: Level, profile: Profile, device: Device,
    *, room_for_all: bool = False,
) -> EncodePlan:  # fmt: skip
    """Raises UnencodableTensor, RopeRequired."""
    dtype = check_chunks(chunks, profile, spec, device)
    is_lossless = spec.kind is LevelKind.LOSSLESS
    unrotated = [
        not is_lossless and check_rope(rope, k.shape[1], profile) for (k, _), rope in zip(chunks, ropes, strict=True)
    ]
    infos = [
        make_info(k, spec, dtype, profile, is_unrotated=flag) for (k, _), flag in zip(chunks, unrotated, strict=True)
    ]
    plan = EncodePlan(infos=infos, profile=profile, spec=spec)
    dims = infos[0].layout[2:]
    for tensors in ((0, 1),) if dims[0] == dims[1] else ((0,), (1,)):
        _plan_part(plan, chunks, ropes, unrotated, tensors, dtype, device, room_for_all=room_for_all)
    return plan


def _lossless_ladder(book: CodeBook) -> Lossy:
    """A coded byte plane as a ladder of one stage."""
    return Lossy(num_stages=1, codebook=book, cuts=np.zeros((0, 1, 3, 2), np.uint16))


def _rows(plan: EncodePlan, tensors: tuple[int, ...], dtype: str, device: Device) -> Rows:
    profile, is_lossless = plan.profile, plan.spec.kind is LevelKind.LOSSLESS
    lossless = profile.lossless.get(dtype)

    def make() -> Rows:
        if is_lossless:
            assert lossless is not None
            index = [(lossless.k, lossless.v)[which] for which in tensors]
            flats = [plain_flat(x.reshape(-1, x.shape[2])) for x in index if x is not None]
            return make_rows(flats, _lossless_ladder(lossless.codebook), device, for_encoding=True)
        plans = [(profile.lossy.k, profile.lossy.v)[which] for which in tensors]
        flats = [FlatPlan.of(p, whole(profile), profile.lossy.num_stages) for p in plans if p is not None]
        return make_rows(flats, profile.lossy, device, for_encoding=True)

    key = ("encode", profile.id, plan.spec.kind, dtype if is_lossless else "", tensors, str(device.device))
    return cached_rows(key, make)


def _plan_part(
    plan: EncodePlan, chunks: Sequence[Chunk], ropes: Sequence[RopeTable | None], unrotated: list[bool],
    tensors: tuple[int, ...], dtype: str, device: Device, *, room_for_all: bool,
) -> None:  # fmt: skip
    profile, spec = plan.profile, plan.spec
    is_lossless, is_shipped = spec.kind is LevelKind.LOSSLESS, plan.infos[0].is_shipped
    layers, heads, *dims = layout_of(profile)
    count, dim = layers * heads, dims[tensors[0]]
    stages = 1 if is_lossless else spec.stages
    values = [tensor.shape[1] * dim for pair in chunks for tensor in pair][::2]
    q_sizes = np.repeat(np.array(values, np.int64) * count, len(tensors))
    q_starts = np.cumsum(q_sizes) - q_sizes
    q = device.empty(int(q_sizes.sum()), dtype=torch.int32)
    num_jobs = len(chunks) * len(tensors) * count
    planes: list[torch.Tensor] = []
    sides: list[torch.Tensor] = []
    flats: list[FlatPlan] = []
    rows = None if is_shipped else _rows(plan, tensors, dtype, device)
    for n, (pair, rope) in enumerate(zip(chunks, ropes, strict=True)):
        for m, which in enumerate(tensors):
            start = int(q_starts[n * len(tensors) + m])
            target = q[start : start + count * values[n]]
            used_rope = rope if which == 0 and unrotated[n] else None
            if is_lossless:
                book = profile.lossless[dtype].codebook
                planes.append(_plan_split(plan, pair[which], dtype, target, device))
                if is_shipped:
                    index = _choose(target, pair[which].shape[1], dim, 0, book, device)
                    sides.append(index)
                    flats.append(plain_flat(index.cpu().numpy().astype(np.uint8)))
                continue
            if is_shipped:
                flat, side = _measure(pair[which], "KV"[which], profile, used_rope, spec, device)
                sides.append(side)
                flats.append(flat)
                own = make_rows([flat], profile.lossy, device, for_encoding=True)
                _plan_quantize(plan, pair[which], which, own, 0, used_rope, target, device)
            else:
                assert rows is not None
                _plan_quantize(plan, pair[which], which, rows, m * count, used_rope, target, device)
    if is_shipped:
        ladder = _lossless_ladder(profile.lossless[dtype].codebook) if is_lossless else profile.lossy
        rows = make_rows(flats, ladder, device, for_encoding=True)
    assert rows is not None
    per_chunk = len(tensors) * count
    row_of = np.arange(num_jobs) if is_shipped else np.tile(np.arange(per_chunk), len(chunks))
    jobs = np.zeros((num_jobs, ENCODE_FIELDS), np.int32)
    jobs[:, 0] = row_of
    jobs[:, 1] = np.repeat([k.shape[1] for k, _ in chunks], per_chunk)
    jobs[:, 2], jobs[:, 3] = stages, 0 if is_lossless else profile.lossy.num_stages - stages
    q_pos = (q_starts[:, None] + np.arange(count) * (q_sizes[:, None] // count)).ravel()
    _plan_coding(
        plan, tensors, jobs, q_pos, rows, row_of, q, stages, max(values) // dim, planes, sides, device,
        room_for_all=room_for_all,
    )  # fmt: skip


def _plan_coding(
    plan: EncodePlan, tensors: tuple[int, ...], jobs: Array, q_pos: Array, rows: Rows, row_of: Array, q: torch.Tensor,
    stages: int, most_tokens: int, planes: list[torch.Tensor], sides: list[torch.Tensor], device: Device,
    *, room_for_all: bool,
) -> None:  # fmt: skip
    """The coder's launch and the one that closes the gaps."""
    num_jobs, dim = len(jobs), rows.num_dims
    lanes = lanes_of(dim)
    capacity = rans_cuda.word_capacity(most_tokens, dim)
    room = most_tokens * dim if room_for_all else -(-most_tokens * dim // EXCEPTION_SHARE)
    total_values = int((jobs[:, 1].astype(np.int64) * dim).sum()) * stages
    lanes_used = np.minimum(rows.active[:stages][:, row_of], lanes)
    new = np.diff(lanes_used, axis=0, prepend=0)
    upload = Upload()
    for name, array in (("jobs", jobs), ("q_pos", q_pos.astype(np.int64)), ("new", new.astype(np.int64))):
        upload.add(name, array)
    upload.send(device)
    slots = device.empty(stages * num_jobs * capacity, dtype=torch.int16)
    pairs = device.empty(stages * num_jobs * room * 2, dtype=torch.int32)
    states = device.empty(stages * num_jobs * lanes, dtype=torch.int32)
    words, exceptions = (device.zeros(stages * num_jobs, dtype=torch.int32) for _ in range(2))
    status = device.zeros(num_jobs, dtype=torch.int32)
    share = total_values * 5 if room_for_all else total_values // OUT_SHARE
    payload = device.empty(share + 4 * num_jobs * stages * lanes, dtype=torch.int16)
    sizes, pos = (device.empty(stages, num_jobs, dtype=torch.int64) for _ in range(2))
    # Pieces stand chunk by chunk, stage by stage, then as the jobs do.
    chunk_jobs = num_jobs // len(plan.infos)
    launch = rans_cuda.encode_launch(num_jobs, dim, rows.image_words)
    pack = rans_cuda.Launch(blocks=stages * num_jobs, threads=64, shared_bytes=0)
    args: list[Any] = []
    pack_args: list[Any] = []

    def run() -> None:
        if not args:
            own = rows.upload
            args.extend([
                device.view(q, np.int32), upload.view("q_pos", device), upload.view("jobs", device), num_jobs,
                own.view("image", device), rows.num_tables, rows.num_sets, rows.num_refined,
                *(own.view(name, device) for name in ("base_index", "group", "refine_index", "active")), rows.num_rows,
                device.view(slots, np.uint16), capacity, device.view(pairs, np.int32), room,
                device.view(states, np.uint32), device.view(words, np.int32), device.view(exceptions, np.int32),
                device.view(status, np.int32),
            ])  # fmt: skip
            pack_args.extend([
                upload.view("jobs", device), num_jobs, own.view("active", device), rows.num_rows,
                device.view(slots, np.uint16), capacity, device.view(pairs, np.int32), room,
                device.view(states, np.uint32), device.view(words, np.int32), device.view(exceptions, np.int32), lanes,
                device.view(pos, np.int64), device.view(payload, np.uint16),
            ])  # fmt: skip
        status.zero_()
        device.run(rans_cuda.make_encode_kernel(dim), launch, *args)
        shape = (stages, len(plan.infos), chunk_jobs)
        sizes.copy_((words + 4 * exceptions).view(stages, num_jobs) + 2 * upload.tensor("new").view(stages, num_jobs))
        ordered = sizes.view(shape).transpose(0, 1).reshape(-1)
        begins = (ordered.cumsum(0) - ordered).view(shape[1], shape[0], shape[2]).transpose(0, 1)
        pos.copy_(begins.reshape(stages, num_jobs))
        device.run(rans_cuda.pack_kernel, pack, *pack_args)

    plan.steps.append(run)
    plan.keep += [upload, rows, q, slots, pairs, states]
    plan.parts.append(_Part(
        tensors=tensors, num_jobs=num_jobs, words=words, exceptions=exceptions, sizes=sizes, payload=payload,
        status=status, planes=planes, sides=sides,
    ))  # fmt: skip


def _plan_quantize(
    plan: EncodePlan, tensor: torch.Tensor, which: int, rows: Rows, first_row: int, rope: RopeTable | None,
    target: torch.Tensor, device: Device,
) -> None:  # fmt: skip
    """The Triton launch for one tensor: rows -> integers of the finest stage at `target` [S, T, D]."""
    layers, num_tokens, heads, dim = tensor.shape
    count = layers * heads
    blocks = -(-num_tokens // BLOCK_T)
    flags = device.zeros(count, blocks, dtype=torch.int32)
    half = rope.half_dim if rope is not None else 0
    icos, isin = rope.inverse() if rope is not None and half else (np.zeros((1, 1), np.float32),) * 2
    own = turned_segments(rope, ((0, layers), (0, heads))).astype(bool)
    is_turned = rows.is_turned[first_row : first_row + count] & own
    upload = Upload()
    upload.add("cos", icos)
    upload.add("sin", isin)
    upload.add("half", np.where(is_turned & (half > 0), half, 0).astype(np.int32))
    stride_l, stride_t, stride_h, last = tensor.stride()
    source = tensor
    if tensor.dtype is not torch.bfloat16 or (last != 1 and dim > 1):
        source = device.empty(*tensor.shape, dtype=torch.bfloat16)
        stride_l, stride_t, stride_h, _ = source.stride()
    upload.add("src_pos", (np.arange(layers)[:, None] * stride_l + np.arange(heads) * stride_h).astype(np.int64))
    upload.send(device)
    names = [f"{'KV'[which]} of layer {s // heads}" for s in range(count)]
    plan.flags.append((flags, names))
    plan.keep += [upload, source]

    def part(name: str, width: int) -> torch.Tensor:
        return rows.upload.tensor(name)[first_row * width : (first_row + count) * width]

    def run() -> None:
        if source is not tensor:
            source.copy_(tensor)  # rounds as torch does: to nearest even
        quantize_triton.quantize_kernel[(count, blocks)](
            source.view(torch.int16), upload.tensor("src_pos"), stride_t, upload.tensor("cos"), upload.tensor("sin"),
            upload.tensor("half"), part("mean", dim), part("inv_step", dim), part("matrix", 1),
            rows.upload.tensor("matrices"), target, flags, num_tokens, half, num_dims=dim, BLOCK_T=BLOCK_T,
            BLOCK_D=quantize_triton.block_of(dim), **quantize_triton.FUSION_OFF,
        )  # fmt: skip

    plan.steps.append(run)


def _plan_split(
    plan: EncodePlan, tensor: torch.Tensor, dtype: str, target: torch.Tensor, device: Device
) -> torch.Tensor:
    """The lossless split of one tensor -> planes u8 [S, *]; the coded bytes less 128 go to `target` [S, T, D]."""
    layers, num_tokens, heads, dim = tensor.shape
    count, width = layers * heads, num_tokens * dim
    planes = device.zeros(count, plane_bytes(dtype, width), dtype=torch.uint8)

    def run() -> None:
        kind = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[tensor.element_size()]
        bits = tensor.contiguous().view(kind).permute(0, 2, 1, 3).reshape(count, width).int()
        if tensor.element_size() == 2:
            bits &= 0xFFFF
        coded = split_planes(bits, dtype, planes)
        target.copy_(coded.reshape(-1) - 128)

    run()  # shipped statistics need it now
    plan.steps.append(run)
    return planes


def split_planes(bits: torch.Tensor, dtype: str, planes: torch.Tensor) -> torch.Tensor:
    """codec.lossless.split on the device: bits int32 [S, n] -> coded int32 [S, n]; fills planes [S, *]."""
    count = bits.shape[1]

    def two_bits(values: torch.Tensor) -> torch.Tensor:
        size = even((count + 3) // 4)
        padded = torch.nn.functional.pad(values, (0, 4 * size - count)).view(values.shape[0], size, 4)
        shifts = torch.tensor([0, 2, 4, 6], device=values.device, dtype=torch.int32)
        return (padded << shifts).sum(dim=2).to(torch.uint8)

    if dtype == "bfloat16":
        planes[:, :count] = (((bits >> 8) & 0x80) | (bits & 0x7F)).to(torch.uint8)
        return (bits >> 7) & 0xFF
    if dtype == "float16":
        planes[:, :count] = (bits & 0xFF).to(torch.uint8)
        planes[:, even(count) :] = two_bits(((bits >> 14) & 2) | ((bits >> 8) & 1))
        return (bits >> 9) & 0x3F
    if dtype == "float32":
        planes[:, :count] = (((bits >> 24) & 0x80) | ((bits >> 16) & 0x7F)).to(torch.uint8)
        low = bits & 0xFFFF
        both = torch.stack([low & 0xFF, low >> 8], dim=-1).to(torch.uint8)
        planes[:, even(count) :] = both.view(bits.shape[0], 2 * count)
        return (bits >> 23) & 0xFF
    planes[:] = two_bits(((bits >> 6) & 2) | (bits & 1))
    return (bits & 0x7F) >> 1


def _choose(q: torch.Tensor, num_tokens: int, dim: int, coarser: int, book: CodeBook, device: Device) -> torch.Tensor:
    """The table that codes each channel in the fewest bits: q int32 [S * T * D] of the finest stage -> int64 [S, D]."""
    count = q.numel() // (num_tokens * dim)
    counts = device.zeros(count, 2, dim, 257, dtype=torch.int32)
    group = device.zeros(count, dtype=torch.int32)
    quantize_triton.histogram_kernel[(count, -(-num_tokens // BLOCK_T))](
        q, group, counts, num_tokens, coarser, num_dims=dim, BLOCK_T=BLOCK_T, BLOCK_D=quantize_triton.block_of(dim)
    )
    cost = torch.from_numpy(book.cost_of_value.astype(np.float64)).to(device.device)
    # Costs are whole numbers; of equal ones the first table wins, as on the CPU.
    total = (counts[:, 0].double() @ cost) * book.num_tables + torch.arange(book.num_tables, device=device.device)
    return total.argmin(dim=-1)


def _measure(
    tensor: torch.Tensor, which: str, profile: Profile, rope: RopeTable | None, spec: Level, device: Device
) -> tuple[FlatPlan, torch.Tensor]:
    """shipped.measure on the device -> the plan, side information u16 [S, w] as int16 on the host."""
    lossy = profile.lossy
    layers, num_tokens, heads, dim = tensor.shape
    count = layers * heads
    x = tensor.to(torch.bfloat16).float().permute(0, 2, 1, 3).reshape(count, num_tokens, dim)
    if not bool(torch.isfinite(x).all()):
        raise UnencodableTensor(f"{which} holds NaN or Inf, which level {spec.name} cannot code; use lossless or raw")
    if rope is not None:
        c, s = (torch.from_numpy(part).to(device.device) for part in rope.inverse())
        half = rope.half_dim
        own = torch.from_numpy(np.flatnonzero(turned_segments(rope, ((0, layers), (0, heads))))).to(device.device)
        a, b = x[own, :, :half], x[own, :, half : 2 * half]
        x[own, :, :half], x[own, :, half : 2 * half] = a * c + b * s, b * c - a * s
    if not bool(torch.isfinite(x).all()):
        raise UnencodableTensor(f"{which} has values over {MAX_MAGNITUDE} steps of level {spec.name}")
    mean = x.double().mean(dim=1).float().bfloat16().float().clamp(-MAX_MEAN, MAX_MEAN).bfloat16().float()
    spread = (x - mean[:, None]).double().square().mean(dim=1).sqrt()
    moving = torch.where(spread > 0, spread, torch.nan)
    typical = torch.nan_to_num(_median(moving), nan=1.0)
    widest = shipped.LARGEST_SPREAD * 3.0 ** (lossy.num_stages - 1)
    least = spread.amax(dim=1) / (widest * 4.0**shipped.LARGEST_E)
    step = torch.maximum(lossy.step_factor * typical, least).clamp(MIN_STEP, MAX_STEP).float().bfloat16().float()
    excess = (spread / (widest * step.double()[:, None])).clamp(min=1e-9)
    e = (excess.log2() / 2).ceil().clamp(0, shipped.LARGEST_E)
    steps = step[:, None] * torch.exp2(2 * e).float()
    z = torch.round((x - mean[:, None]) * (1 / steps)[:, None])
    if not bool((z.abs() <= MAX_MAGNITUDE).all()):
        raise UnencodableTensor(f"{which} has values over {MAX_MAGNITUDE} steps of level {spec.name}")
    index = _choose(z.int().contiguous(), num_tokens, dim, lossy.num_stages - 1, lossy.codebook, device)
    table = (index | (e.long() << 5)).to(torch.uint8).cpu().numpy()
    side = shipped.pack_side(mean.cpu().numpy(), step.cpu().numpy(), table)
    own = shipped.unpack_side(side, dim, lossy.codebook)
    flat = FlatPlan.of_shipped(*own, lossy.num_stages, is_turned=rope is not None)
    return flat, torch.from_numpy(side.view(np.int16).copy())


def _median(x: torch.Tensor) -> torch.Tensor:
    """numpy's median of the numbers in each row [S, D] that are not NaN."""
    ordered = x.sort(dim=-1).values  # NaN last
    size = (~x.isnan()).sum(dim=-1)
    low, high = ((size - 1).clamp(min=0) // 2)[:, None], (size // 2).clamp(max=x.shape[-1] - 1)[:, None]
    return ((ordered.gather(-1, low) + ordered.gather(-1, high)) / 2)[:, 0]


def collect(plan: EncodePlan) -> list[bytes]:
    """Waits, and assembles the blobs. Raises UnencodableTensor, NoRoom."""
    for flags, names in plan.flags:
        bad = flags.amax(dim=1).cpu().numpy()
        if bad.any():
            raise UnencodableTensor(
                f"{names[int(np.flatnonzero(bad)[0])]} holds NaN, Inf or values over {MAX_MAGNITUDE} steps of level "
                f"{plan.spec.name}; use lossless or raw"
            )
    is_lossless = plan.spec.kind is LevelKind.LOSSLESS
    stages = 1 if is_lossless else plan.spec.stages
    num_chunks = len(plan.infos)
    layers, heads, *_ = plan.infos[0].layout
    count = layers * heads
    shape = (stages, num_chunks, 2, layers, heads)
    words, exceptions = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    pieces: dict[tuple[int, int, int], Array] = {}  # (chunk, stage, K or V) -> uint16
    for part in plan.parts:
        code = part.status.cpu().numpy()
        if (code == NO_ROOM).any():
            raise NoRoom
        if code.any():
            raise CodecError(f"the GPU's encoder failed with code {int(code.max())}; this is a bug")
        sizes = part.sizes.cpu().numpy()
        total = int(sizes.sum())
        if total > part.payload.numel():
            raise NoRoom
        payload = part.payload[:total].cpu().numpy().view(np.uint16)
        split = (stages, num_chunks, len(part.tensors), layers, heads)
        words[:, :, list(part.tensors)] = sizes.reshape(split)
        exceptions[:, :, list(part.tensors)] = part.exceptions.cpu().numpy().reshape(split)
        at = 0
        by_piece = sizes.reshape(stages, num_chunks, len(part.tensors), count)
        for n in range(num_chunks):
            for k in range(stages):
                for m, which in enumerate(part.tensors):
                    end = at + int(by_piece[k, n, m].sum())
                    pieces[n, k, which] = payload[at:end]
                    at = end
        for number, side in enumerate(part.sides):
            n, m = divmod(number, len(part.tensors))
            which = part.tensors[m]
            host = side.cpu().numpy()
            lead = shipped.pack_index(host.astype(np.uint8)) if is_lossless else host.view(np.uint16)
            cut = np.split(pieces[n, 0, which], np.cumsum(by_piece[0, n, m])[:-1])
            pieces[n, 0, which] = np.concatenate([x for pair in zip(lead, cut, strict=True) for x in pair])
            words[0, n, which] += lead.shape[1]
    planes = {}
    for part in plan.parts:
        for number, tensor in enumerate(part.planes):
            n, m = divmod(number, len(part.tensors))
            planes[n, part.tensors[m]] = tensor.cpu().numpy()
    return [_blob(plan, n, words[:, n], exceptions[:, n], pieces, planes) for n in range(num_chunks)]


def _blob(
    plan: EncodePlan, n: int, words: Array, exceptions: Array, pieces: dict[tuple[int, int, int], Array],
    planes: dict[tuple[int, int], Array],
) -> bytes:  # fmt: skip
    stages = words.shape[0]
    parts: list[Array] = [pieces[n, k, which] for k in range(stages) for which in (0, 1)]
    if planes:
        parts += [planes[n, 0], planes[n, 1]]
        each = np.array([planes[n, which].shape[1] // 2 for which in (0, 1)])
        words = np.concatenate([words, np.broadcast_to(each[None, :, None, None], (1, *words.shape[1:]))])
        exceptions = np.concatenate([exceptions, np.zeros_like(exceptions[:1])])
    entries = bitstream.make_entries(words, exceptions, parts)
    return bitstream.assemble(plan.infos[n], entries, [bitstream.bytes_of(part) for part in parts])
