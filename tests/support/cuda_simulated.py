"""Runs the GPU's code in simulators, in a process of its own: `python cuda_simulated.py GROUP` -> a JSON line a case.

NUMBA_ENABLE_CUDASIM=1 and TRITON_INTERPRET=1 must be set before numba and triton are imported, so tests start this
file (tests/parity/test_cuda_simulator.py) and read {"name", "error"}: error is null, or what was wrong.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import traceback
import zlib
from collections.abc import Callable
from pathlib import Path

os.environ["NUMBA_ENABLE_CUDASIM"] = "1"
os.environ["TRITON_INTERPRET"] = "1"
ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "support")]

import cuda_cases  # noqa: E402
import cuda_simulator  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from codec_cases import make_kv, make_layout, make_profile, make_rope, same_bits  # noqa: E402

from codec import bitstream, gpu, lossless, quantize, rope  # noqa: E402
from codec.chunk import decode_chunk, encode_chunk  # noqa: E402
from codec.errors import BlobError  # noqa: E402
from codec.profile import CodecLayout, Profile, default_profile  # noqa: E402
from kernels import rans_decode_cuda, rans_encode_cuda  # noqa: E402
from kernels.rans_decode_cuda import (  # noqa: E402
    BAD_FINAL_STATE,
    BAD_STATE,
    EXCEPTIONS,
    MODE_LOSSLESS,
    MODE_PAGES,
    NO_ROOM,
    OUT_OF_WORDS,
    UNUSED_WORDS,
    VALUE_RANGE,
)
from prefill.chunk_codec import DeviceCodec, HostCodec, difference  # noqa: E402

CASES: dict[str, dict[str, Callable[[], None]]] = {"coder": {}, "chunks": {}, "report": {}}
Check = Callable[[], None]


def case(group: str) -> Callable[[Check], Check]:
    def add(check: Check) -> Check:
        CASES[group][check.__name__] = check
        return check

    return add


def check_stream(*, stages: int, cut: bool = True, room: int | None = None, **options: object) -> None:
    """Bytes as the reference writes them; integers as it reads them, from all stages and from fewer."""
    segments = cuda_cases.make_segments(seed=stages, stages=stages, **options)  # type: ignore[arg-type]
    pieces, status = cuda_cases.run_encode(segments, stages=stages, room=room)
    assert not status.any(), status
    assert pieces == segments.pieces, "bytes differ from the reference's"
    for some in range(1, stages + 1) if cut else (stages,):
        q, _, status = cuda_cases.run_decode(segments, stages=some)
        assert not status.any(), status
        assert np.array_equal(q, cuda_cases.expected_integers(segments, some)), f"{some} of {stages} stages differ"


@case("coder")
def half_warps_odd_number_of_segments() -> None:
    check_stream(segments=3, tokens=6, dims=64, stages=2)


@case("coder")
def whole_warps() -> None:
    check_stream(segments=2, tokens=4, dims=128, stages=3)


@case("coder")
def all_stages_there_can_be() -> None:
    check_stream(segments=2, tokens=3, dims=64, stages=6, cut=False)


@case("coder")
def anchors_and_channels_that_start_late() -> None:
    check_stream(segments=3, tokens=7, dims=64, stages=3, group=3, falling=True)
    check_stream(segments=2, tokens=5, dims=128, stages=2, group=2, falling=True)


@case("coder")
def dims_that_fill_no_run() -> None:
    check_stream(segments=2, tokens=3, dims=40, stages=2)
    check_stream(segments=2, tokens=3, dims=100, stages=2)  # two quads, the second one not full
    check_stream(segments=1, tokens=2, dims=192, stages=2, group=2)


@case("coder")
def exceptions_everywhere_and_nowhere() -> None:
    check_stream(segments=2, tokens=4, dims=64, stages=2, outliers=0.5)
    check_stream(segments=1, tokens=5, dims=64, stages=1, outliers=0.0)


@case("coder")
def coarser_levels_of_one_set_of_integers() -> None:
    segments = cuda_cases.make_segments(seed=4, segments=2, tokens=4, dims=64, stages=3)
    fewer = cuda_cases.coarser(segments, 2)
    pieces, status = cuda_cases.run_encode(segments, stages=2, coarser=1)
    assert not status.any() and pieces == fewer.pieces


@case("coder")
def the_encoder_refuses_what_is_too_large_or_too_much() -> None:
    segments = cuda_cases.make_segments(seed=4, segments=2, tokens=4, dims=64, stages=2, outliers=0.4)
    _, status = cuda_cases.run_encode(segments, stages=2, room=5)
    assert (status == NO_ROOM).all(), status
    segments.q[1, 2, 3] = (1 << 20) + 1
    _, status = cuda_cases.run_encode(segments, stages=2)
    assert status.tolist() == [0, VALUE_RANGE]


@case("coder")
def malformed_pieces_are_refused() -> None:
    def fresh() -> tuple[cuda_cases.Segments, np.ndarray]:
        segments = cuda_cases.make_segments(seed=9, segments=3, tokens=4, dims=64, stages=2)
        return segments, cuda_cases.expected_integers(segments, 2)

    def refused(segments: cuda_cases.Segments, want: np.ndarray, *codes: int) -> None:
        q, _, status = cuda_cases.run_decode(segments, stages=2)
        assert status[1] in codes and not status[[0, 2]].any(), (status, codes)
        assert np.array_equal(q[[0, 2]], want[[0, 2]]), "a neighbour was harmed"

    segments, want = fresh()
    tail = 4 * int(segments.exceptions[0, 1])
    piece = segments.pieces[1][0]
    middle = len(piece) - tail
    segments.pieces[1][0] = piece[: middle - 1] + piece[middle:]  # a word of the stream is gone
    refused(segments, want, OUT_OF_WORDS, BAD_FINAL_STATE)

    segments, want = fresh()
    segments.pieces[1][1] = [*segments.pieces[1][1][:1], 77, *segments.pieces[1][1][1:]]  # one too many
    refused(segments, want, UNUSED_WORDS, BAD_FINAL_STATE, OUT_OF_WORDS, EXCEPTIONS)

    segments, want = fresh()
    segments.pieces[1][0][1] = 0  # a state below 2^16
    refused(segments, want, BAD_STATE, UNUSED_WORDS, OUT_OF_WORDS, BAD_FINAL_STATE)  # whatever else it leads to

    segments, want = fresh()
    segments.pieces[1][0] = segments.pieces[1][0][:9]  # shorter than its states
    refused(segments, want, OUT_OF_WORDS)

    segments, want = fresh()
    segments.exceptions[0, 1] = 1 << 20  # more than the piece has room for
    refused(segments, want, OUT_OF_WORDS)


@case("coder")
def malformed_exceptions_are_refused() -> None:
    def damaged(change: Callable[[list[int]], None]) -> None:
        segments = cuda_cases.make_segments(seed=9, segments=2, tokens=4, dims=64, stages=2, outliers=0.1)
        count = int(segments.exceptions[0, 1])
        assert count > 2
        piece = segments.pieces[1][0]
        pairs = piece[-4 * count :]
        change(pairs)
        segments.pieces[1][0] = piece[: -4 * count] + pairs
        _, _, status = cuda_cases.run_decode(segments, stages=2)
        assert status.tolist() == [0, EXCEPTIONS], status

    def swap(pairs: list[int]) -> None:
        pairs[0:4], pairs[4:8] = pairs[4:8], pairs[0:4]

    def twice(pairs: list[int]) -> None:
        pairs[4:6] = pairs[0:2]

    def beyond(pairs: list[int]) -> None:
        pairs[-4:-2] = [0, 1]  # position 65536 of 256

    def too_large(pairs: list[int]) -> None:
        pairs[2:4] = [1, 32]  # 2^21 + 1

    for change in (swap, twice, beyond, too_large):
        damaged(change)


@case("coder")
def values_go_to_their_pages() -> None:
    """Steps, means, RoPE and bf16 in the decode kernel itself, rows scattered over a pool."""
    segments = cuda_cases.make_segments(seed=2, segments=2, tokens=5, dims=64, stages=2)
    rng = np.random.default_rng(0)
    step = quantize.round_to_bf16(np.exp(rng.normal(-2, 1, (2, 64))))
    mean = quantize.round_to_bf16(rng.normal(0, 1, (2, 64)))
    for half in (0, 32):
        angle = rng.normal(0, 3, (5, half)).astype(np.float32)
        cos, sin = np.cos(angle), np.sin(angle)
        rows = np.array([9, 3, 0, 5, 6], np.int64) * 130
        out = np.full(10 * 130, 0x7FC1, np.uint16)
        _, out, status = cuda_cases.run_decode(
            segments, stages=1, mode=MODE_PAGES, step=step, mean=mean, half=half, cos=cos, sin=sin, row_pos=rows,
            out=out, out_pos=np.array([0, 65]), multiplier=3,
        )  # fmt: skip
        assert not status.any()
        want = np.full(10 * 130, 0x7FC1, np.uint16)
        q = cuda_cases.expected_integers(segments, 1)
        for s in range(2):
            x = quantize.dequantize(q[s], 3, step[s]) + mean[s]
            x = rope.rotate(x, cos, sin) if half else x
            for t in range(5):
                want[rows[t] + 65 * s :][:64] = quantize.float_to_bf16(x[t])
        assert np.array_equal(out, want), half


@case("coder")
def lossless_joins_exponents_with_their_planes() -> None:
    segments = cuda_cases.make_segments(seed=3, segments=3, tokens=3, dims=64, stages=1, lossless=True)
    planes = np.random.default_rng(1).integers(0, 256, (3, 3 * 64)).astype(np.uint8)
    _, out, status = cuda_cases.run_decode(
        segments, stages=1, mode=MODE_LOSSLESS, planes=np.ascontiguousarray(planes).view("<u2")
    )
    assert not status.any()
    want = lossless.join((segments.q + 128).astype(np.uint8).reshape(3, -1), planes, "bfloat16")
    assert np.array_equal(out.reshape(3, -1), want)
    segments = cuda_cases.make_segments(seed=3, segments=3, tokens=3, dims=64, stages=1, outliers=0.1)
    _, _, status = cuda_cases.run_decode(
        segments, stages=1, mode=MODE_LOSSLESS, planes=np.ascontiguousarray(planes).view("<u2")
    )
    assert (status == VALUE_RANGE).all(), status


# Whole chunks through codec/gpu.py, against the CPU codec


def check_chunks(
    profile: Profile, layout: CodecLayout, tokens: tuple[int, ...], levels: tuple[str, ...], *, rotary: int = 0,
    turned: tuple[bool, ...] | None = None, dtype: torch.dtype = torch.bfloat16,
) -> None:  # fmt: skip
    chunks = [make_kv(layout, t, seed=i, dtype=dtype) for i, t in enumerate(tokens)]
    ropes = [make_rope(t, rotary, start=17 * i) if rotary else None for i, t in enumerate(tokens)]
    if turned is not None:
        ropes = [rope.RopeTable(r.cos, r.sin, turned) for r in ropes if r is not None]
    has_matrix = profile.lossy.k is not None and bool((profile.lossy.k.matrix >= 0).any())
    for level in levels:
        want = [
            encode_chunk(k, v, level=level, profile=profile, rope=r) for (k, v), r in zip(chunks, ropes, strict=True)
        ]
        assert gpu.encode_chunks(chunks, level=level, profile=profile, ropes=ropes) == want, level
        cpu = [decode_chunk(b, profile=profile, rope=r) for b, r in zip(want, ropes, strict=True)]
        out = gpu.decode_chunks(want, profile=profile, ropes=ropes)
        for mine, theirs in zip(out, cpu, strict=True):
            for a, b in zip(mine, theirs, strict=True):
                close = (a.float() - b.float()).abs() <= b.float().abs().amax(-1, keepdim=True) * 2**-7
                assert bool(close.all()), level
                assert has_matrix or same_bits(a, b), level


@case("chunks")
def calibrated_levels() -> None:
    layout = make_layout(1, 2, 64, 64)
    check_chunks(make_profile(layout, group=2), layout, (5, 3), ("q1", "q3", "lossless", "raw"), rotary=64)


@case("chunks")
def matrices() -> None:
    layout = make_layout(1, 2, 64, 64)
    check_chunks(make_profile(layout, matrices=True, needs_rope=True), layout, (3, 2), ("q1", "q3"), rotary=64)


@case("chunks")
def other_dims_for_v_and_rotations_across_lanes() -> None:
    layout = make_layout(2, 1, 128, 64)
    profile = make_profile(layout, matrices=True, needs_rope=True, unturned=1)
    check_chunks(profile, layout, (3,), ("q2",), rotary=96)


@case("chunks")
def rotations_of_some_layers_and_of_no_channels() -> None:
    layout = make_layout(2, 1, 64, 64)
    calibrated = make_profile(layout, needs_rope=True)
    for profile in (calibrated, default_profile(layout)):
        check_chunks(profile, layout, (3, 2), ("q2",), rotary=64, turned=(False, True))
    blind = rope.RopeTable(np.zeros((3, 0)), np.zeros((3, 0)))
    chunk = make_kv(layout, 3)
    want = encode_chunk(*chunk, level="q2", profile=calibrated, rope=blind)
    assert gpu.encode_chunks([chunk], level="q2", profile=calibrated, ropes=[blind]) == [want]
    mine, theirs = (
        gpu.decode_chunks([want], profile=calibrated, ropes=[blind])[0],
        decode_chunk(want, profile=calibrated, rope=blind),
    )
    assert all(same_bits(a, b) for a, b in zip(mine, theirs, strict=True))


@case("chunks")
def uncalibrated_levels_of_every_dtype() -> None:
    layout = make_layout(1, 1, 64, 64)
    profile = default_profile(layout)
    check_chunks(profile, layout, (4,), ("q1", "lossless"), rotary=64)
    for dtype in (torch.float16, torch.float32, torch.float8_e4m3fn, torch.float8_e5m2):
        check_chunks(profile, layout, (3,), ("q3", "lossless", "raw"), dtype=dtype)


@case("chunks")
def the_runtime_finds_that_the_gpus_codec_agrees() -> None:
    layout = make_layout(1, 2, 64, 64)
    profile, table = make_profile(layout, needs_rope=True), make_rope(3, 64)
    assert difference(HostCodec(), DeviceCodec("cpu"), profile, table, torch.bfloat16) == ""


@case("chunks")
def pages_anywhere() -> None:
    """Levels side by side in one call, into rows of a pool that are no neighbours; other rows stay as they were."""
    layout = make_layout(1, 2, 64, 64)
    profile = make_profile(layout)
    chunks = [make_kv(layout, t, seed=t) for t in (3, 2)]
    blobs = [
        encode_chunk(k, v, level=level, profile=profile, rope=None)
        for (k, v), level in zip(chunks, ("q1", "lossless"), strict=True)
    ]
    pool = tuple(torch.full((1, 9, 2, 64), 7, dtype=torch.bfloat16) for _ in range(2))
    slots = [[8, 0, 4], [1, 2]]
    out = gpu.decode_chunks(blobs, profile=profile, ropes=[None, None], out=pool, slots=slots)
    for blob, place, mine in zip(blobs, slots, out, strict=True):
        for a, b, whole in zip(decode_chunk(blob, profile=profile, rope=None), mine, pool, strict=True):
            assert same_bits(a, whole[:, place]) and same_bits(a, b)
    assert all(bool((x[:, [3, 5, 6, 7]] == 7).all()) for x in pool)


@case("chunks")
def damaged_blobs_are_refused_as_on_the_cpu() -> None:
    layout = make_layout(1, 1, 64, 64)
    profile = make_profile(layout, stages=2)
    rng, refused = np.random.default_rng(1), 0
    k, v = make_kv(layout, 4)
    for level in ("q1", "lossless") * 4:
        blob = bytearray(encode_chunk(k, v, level=level, profile=profile, rope=None))
        info = bitstream.parse_header(memoryview(blob))
        at = int(rng.integers(bitstream.HEADER_BYTES + info.directory_bytes, len(blob) - 4))
        blob[at] ^= 1 << int(rng.integers(0, 8))
        blob[-4:] = zlib.crc32(blob[:-4]).to_bytes(4, "little")
        found = []
        for decode in (
            lambda b: decode_chunk(b, profile=profile, rope=None),
            lambda b: gpu.decode_chunks([b], profile=profile, ropes=[None])[0],
        ):
            try:
                found.append(decode(bytes(blob)))
            except BlobError:
                found.append(None)
        assert (found[0] is None) == (found[1] is None), (level, at)
        refused += found[0] is None
        if found[0] is not None:
            assert all(same_bits(a, b) for a, b in zip(*found, strict=True)), (level, at)
    assert refused > 0


@case("report")
def the_report_runs() -> None:
    from scripts import gpu_report

    with tempfile.TemporaryDirectory() as folder:
        assert gpu_report.main(["--tiny", "--skip-speeds", "--name", "tiny", "--out", folder]) == 0
        report = json.loads((Path(folder) / "gpu-tiny.json").read_text())
        assert all(check["passed"] for check in report["checks"])
        assert (Path(folder) / "gpu-tiny.md").read_text().startswith("# The codec on simulator")


def main(group: str) -> None:
    cuda_simulator.install(rans_decode_cuda, rans_encode_cuda)
    for name, check in CASES[group].items():
        error = None
        try:
            check()
        except BaseException as failure:
            error = "".join(traceback.format_exception(failure))[-4000:]
        print("\n" + json.dumps({"name": name, "error": error}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
