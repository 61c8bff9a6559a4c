"""One stored blob serves every level below its own, any layers, any heads: selections of its pieces, without coding.

    small = cut_chunk(blob, profile=profile, level="q3")            # the coarser blob
    rest = refinement_of(blob, profile=profile, have="q3")          # what small lacks
    assert refine_chunk(small, rest) == blob

Layers that are no neighbours travel as several blobs, one behind another, in ascending order:

    some = cut_layers(blob, profile=profile, layers=[(1, 2), (3, 6)], level="q3")
    first, second = split_blobs(some)

Everything that is used is checked first, so a damaged blob cannot be cut into one with good checksums.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from codec import bitstream
from codec.bitstream import Array, BlobInfo, Range
from codec.decode import check_profile
from codec.errors import CodecError, MalformedBlob, TruncatedBlob, WrongRefinement
from codec.levels import LevelKind
from codec.profile import Profile
from codec.tensor_rows import ranges_of

Blob = bytes | bytearray | memoryview


def cut_chunk(
    blob: Blob, *, profile: Profile, level: str | None = None, layers: Range | None = None, heads: Range | None = None
) -> bytes:
    """A coarser level, fewer layers or fewer heads ((start, stop), in the model's numbers) of a blob.

    Raises BlobError subclasses, UnknownLevel, and CodecError if the blob has less than what is asked for.
    """
    return _cut(*_open(blob, profile), profile, level, layers, heads)


def _cut(
    view: memoryview, info: BlobInfo, profile: Profile, level: str | None, layers: Range | None, heads: Range | None
) -> bytes:
    part = ranges_of(layers, heads, (info.layers, info.heads))
    name = level or info.level
    spec = profile.level(name)
    if spec.kind is not info.kind or spec.stages > info.first_stage + info.stages:
        raise CodecError(f"level {name} cannot be cut from level {info.level}: it is no coarser stage of it")
    if info.is_refinement:
        raise CodecError("a refinement holds no level of its own to cut")
    if (name, *part) == (info.level, info.layers, info.heads):
        if info.kind is not LevelKind.RAW:
            bitstream.parse_directory(view, info)
        return bytes(view)
    stages = spec.stages if info.kind is LevelKind.QUANTIZED else info.stages
    return _select(view, replace(info, level=name), part, (0, stages))


def level_sizes(blob: Blob, *, profile: Profile) -> dict[str, int]:
    """Bytes of every level that can be cut from a quantized blob, its own among them, from its directory alone."""
    view = memoryview(blob).cast("B")
    info = bitstream.parse_header(view)
    check_profile(info, profile)
    if info.kind is not LevelKind.QUANTIZED or info.is_refinement:
        return {info.level: info.total_bytes}
    entries = bitstream.parse_directory(view, info).entries
    pieces = 2 * entries["words"].reshape(info.stages, -1).sum(axis=1, dtype=np.int64).cumsum()
    fixed = bitstream.HEADER_BYTES + bitstream.CRC_BYTES
    return {
        level.name: fixed + info.directory_bytes * level.stages // info.stages + int(pieces[level.stages - 1])
        for level in profile.levels
        if level.kind is LevelKind.QUANTIZED and level.stages <= info.stages
    }


def refinement_of(blob: Blob, *, profile: Profile, have: str, level: str | None = None) -> bytes:
    """What a receiver that holds this chunk at the coarser level `have`, cut from this blob, lacks of `level` (of the
    blob's own, if None). Raises BlobError subclasses, UnknownLevel, and CodecError if the blob has no such part."""
    view, info = _open(blob, profile)
    name = level or info.level
    coarse, fine, last = profile.level(have), profile.level(name), info.first_stage + info.stages
    if {info.kind, coarse.kind, fine.kind} != {LevelKind.QUANTIZED}:
        raise CodecError(f"level {name} does not refine level {have}: only quantized levels nest")
    if not info.first_stage <= coarse.stages < fine.stages:
        raise CodecError(f"level {name} does not refine level {have}: it is not finer")
    if fine.stages > last:
        raise CodecError(f"a blob of level {info.level} lacks the stages of level {name}")
    stages = (coarse.stages - info.first_stage, fine.stages - info.first_stage)
    return _select(view, replace(info, level=name), (info.layers, info.heads), stages)


def refine_chunk(coarse: Blob, refinement: Blob) -> bytes:
    """coarse + what refinement_of gave -> the finer blob. Raises BlobError subclasses, and WrongRefinement if they are
    not of one chunk, one part and one encoding: a level that was encoded by itself is another encoding than its cut."""
    views = [memoryview(x).cast("B") for x in (coarse, refinement)]
    infos = [bitstream.parse_header(view) for view in views]
    for view, info in zip(views, infos, strict=True):
        bitstream.check_whole(view, info)
    first, second = infos
    joined = replace(
        second, first_stage=first.first_stage, stages=first.stages + second.stages, body_bytes=0,
        directory_crc=first.directory_crc,
    )  # fmt: skip
    expected = replace(joined, level=first.level, stages=first.stages)
    if second.first_stage != first.first_stage + first.stages or expected != replace(first, body_bytes=0):
        raise WrongRefinement(
            f"a refinement from stage {second.first_stage} of profile {second.profile_id} does not follow "
            f"a blob of {first.stages} stages of profile {first.profile_id} with the same layers, heads and tokens"
        )
    if joined.kind is not LevelKind.QUANTIZED:
        raise MalformedBlob("only quantized levels nest")
    if bitstream.stages_crc(views[0], first, first.stages) != second.directory_crc:
        raise WrongRefinement("the refinement was made from another encoding of this chunk, or from another chunk")
    directories = [bitstream.parse_directory(view, info) for view, info in zip(views, infos, strict=True)]
    entries = np.concatenate([directory.entries for directory in directories])
    return bitstream.assemble(joined, entries, [bitstream.bytes_of(directory.words) for directory in directories])


def cut_layers(
    blob: Blob, *, profile: Profile, layers: Sequence[Range], level: str | None = None, have: str | None = None
) -> bytes:
    """Several ranges of layers of a whole blob, at `level` or as what a holder of the same layers at `have` lacks of
    it: a blob for each, one behind another. Raises as cut_chunk and refinement_of."""
    view, info = _open(blob, profile)
    if not layers or any(a[1] >= b[0] for a, b in itertools.pairwise(layers)):
        raise CodecError(f"layers {list(layers)} are no ascending ranges with gaps between them")
    parts = []
    for run in layers:
        # The refinement names the encoding that it goes behind, which is that of these layers alone.
        part = _cut(view, info, profile, None if have is not None else level, run, None)
        parts.append(part if have is None else refinement_of(part, profile=profile, have=have, level=level))
    return b"".join(parts)


def split_blobs(blobs: Blob) -> list[memoryview]:
    """The blobs that stand one behind another. Headers are checked, contents are not. Raises BlobError subclasses."""
    view, found = memoryview(blobs).cast("B"), []
    while view.nbytes:
        size = bitstream.parse_header(view).total_bytes
        if size > view.nbytes:
            raise TruncatedBlob(f"{view.nbytes} bytes are left, the header says {size}; ask for the chunk again")
        found.append(view[:size])
        view = view[size:]
    return found


def refine_blobs(coarse: Blob, refinement: Blob) -> bytes:
    """refine_chunk for blobs one behind another, of which each has its refinement. Raises as refine_chunk."""
    pairs = split_blobs(coarse), split_blobs(refinement)
    if len(pairs[0]) != len(pairs[1]):
        raise WrongRefinement(f"{len(pairs[1])} refinements do not fit {len(pairs[0])} blobs")
    return b"".join([refine_chunk(one, rest) for one, rest in zip(*pairs, strict=True)])


def _open(blob: Blob, profile: Profile) -> tuple[memoryview, BlobInfo]:
    view = memoryview(blob).cast("B")
    info = bitstream.parse_header(view)
    check_profile(info, profile)
    bitstream.check_whole(view, info)
    return view, info


def _select(view: memoryview, info: BlobInfo, part: tuple[Range, Range], stages: Range) -> bytes:
    rows = slice(part[0][0] - info.first_layer, part[0][1] - info.first_layer)
    cols = slice(part[1][0] - info.first_head, part[1][1] - info.first_head)
    chosen = replace(
        info, layout=(rows.stop - rows.start, cols.stop - cols.start, *info.layout[2:]),
        first_layer=part[0][0], first_head=part[1][0], first_stage=info.first_stage + stages[0],
        stages=stages[1] - stages[0], directory_crc=bitstream.stages_crc(view, info, stages[0]),
    )  # fmt: skip
    if info.kind is LevelKind.RAW:
        return bitstream.assemble(chosen, None, _select_raw(view, info, rows, cols))
    directory = bitstream.parse_directory(view, info)
    kept = slice(*stages)
    entries = np.ascontiguousarray(directory.entries[kept, :, rows, cols])
    if (rows, cols) == (slice(0, info.layout[0]), slice(0, info.layout[1])):  # whole stages stand together
        sizes = directory.entries["words"].reshape(info.stages, -1).sum(axis=1, dtype=np.int64)
        edges = np.concatenate([[0], np.cumsum(sizes)])
        parts = [bitstream.bytes_of(directory.words[edges[stages[0]] : edges[stages[1]]])]
    else:
        parts = [
            directory.piece((stage, which, layer, head))
            for stage in range(*stages)
            for which in (0, 1)
            for layer in range(rows.start, rows.stop)
            for head in range(cols.start, cols.stop)
        ]
    return bitstream.assemble(chosen, entries, parts)


def _select_raw(view: memoryview, info: BlobInfo, rows: slice, cols: slice) -> list[memoryview | bytes]:
    layers, heads, *dims = info.layout
    item = bitstream.ITEM_BYTES[info.dtype]
    at, parts = bitstream.HEADER_BYTES, []
    for dim in dims:
        size = layers * info.num_tokens * heads * dim * item
        plain: Array = np.frombuffer(view[at : at + size], np.uint8).reshape(layers, info.num_tokens, heads, dim * item)
        parts.append(bitstream.bytes_of(plain[rows, :, cols]))
        at += size
    return list(parts)
