"""What a worker on a GPU does otherwise, as far as it shows without one: which device, which batches, which steps are
replayed, and that calls which touch pages wait for the device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from engine_models import loaded, random_engine, random_model

import prefill.chunk_codec
import prefill.compute_device as compute_device
import prefill.decode_graphs
import prefill.engine
from cluster.config import StartRefused
from cluster.launch import gpus_each
from codec.gpu_device import GpuUnavailable
from codec.profile import default_profile
from codec.rope import RopeTable
from kernels import paged_attention as paged
from prefill.chunk_codec import HostCodec, codec_for, difference
from prefill.compute_device import completed, completes, pick_device, side_stream
from prefill.cpu_attention import CpuBatch
from prefill.cuda_attention import CudaBatch, CudaQuantizedBatch
from prefill.decode_graphs import MAX_ROOM_BYTES, graphs_for
from prefill.engine import Engine, SequenceSlice
from prefill.errors import ModelRefused
from prefill.kv_layout import KVLayout
from prefill.kv_pool import KVPool
from prefill.quantized_attention import QuantizedBatch
from prefill.quantized_pool import QuantizedKVPool
from prefill.runtime import load_runtime

LAYOUT = KVLayout(num_layers=2, num_kv_heads=2, head_dim_k=64, head_dim_v=64, dtype="bfloat16")
CUDA = torch.device("cuda", 0)


# Which device


def test_auto_is_the_gpu_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert pick_device("auto") == pick_device("cpu") == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    assert pick_device("auto") == pick_device("cuda") == torch.device("cuda", 1)
    assert pick_device("cpu") == torch.device("cpu")


def test_cuda_without_a_gpu_is_refused_before_anything_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ModelRefused, match=r"device cuda was asked for and .* use device cpu \(or auto\)"):
        load_runtime("no such folder", device="cuda")
    with pytest.raises(ModelRefused, match="device 'tpu' is not known: use one of auto, cpu, cuda"):
        pick_device("tpu")


def node(*, gpus: float = 0, alive: bool = True, **roles: float) -> dict[str, Any]:
    return {"Alive": alive, "Resources": {"CPU": 8, **roles, **({"GPU": gpus} if gpus else {})}}


@pytest.mark.parametrize(
    ("nodes", "share"),
    [
        ([node(prefill=1, decode=1)], 0.0),
        ([node(prefill=1, decode=1, gpus=1)], 0.5),
        ([node(prefill=1, decode=1, gpus=8)], 1.0),
        ([node(prefill=1, decode=2, gpus=1)], 0.3333),
        ([node(prefill=2, gpus=4), node(decode=2, gpus=1)], 0.5),
        ([node(prefill=2, gpus=4), node(decode=2)], 0.0),  # else no decode worker could be placed
        ([node(prefill=2, gpus=4), node(decode=2, alive=False), node()], 1.0),
        ([], 0.0),
    ],
)
def test_workers_get_the_same_share_of_a_gpu_on_every_node(nodes: list[dict[str, Any]], share: float) -> None:
    assert gpus_each("auto", nodes) == share
    assert gpus_each("cpu", nodes) == 0.0
    if share:
        assert gpus_each("cuda", nodes) == share
    else:
        with pytest.raises(StartRefused, match="Ray knows of no GPU on some node"):
            gpus_each("cuda", nodes)


# Which batches


def test_pools_choose_who_attends() -> None:
    assert isinstance(KVPool(LAYOUT, 4).make_batch([]), CpuBatch)
    assert KVPool(LAYOUT, 4).decode_pages is None
    pool = KVPool(LAYOUT, 4, gpu_kernels=True)
    assert isinstance(pool.make_batch([]), CudaBatch) and not pool.uses_torch_products
    assert isinstance(QuantizedKVPool(LAYOUT, 4, "int4", 1).make_batch([]), QuantizedBatch)
    assert isinstance(QuantizedKVPool(LAYOUT, 4, "int4", 1, gpu_kernels=True).make_batch([]), CudaQuantizedBatch)


@pytest.mark.parametrize(("dim_k", "dtype"), [(48, "bfloat16"), (32, "bfloat16"), (64, "float32")])
def test_quantized_pages_the_kernels_are_not_built_for_go_by_torch(dim_k: int, dtype: str) -> None:
    layout = KVLayout(num_layers=1, num_kv_heads=1, head_dim_k=dim_k, head_dim_v=64, dtype=dtype)
    pool = QuantizedKVPool(layout, 4, "int8", 1, gpu_kernels=True)
    assert pool.decode_pages is None and isinstance(pool.make_batch([]), QuantizedBatch)


class Graphs:
    """Takes the place of `DecodeGraphs`, which see a batch only if it may be theirs."""

    def __init__(self, answer: torch.Tensor | None) -> None:
        self.answer, self.offered = answer, 0

    def forward(self, slices: Sequence[SequenceSlice]) -> torch.Tensor | None:
        self.offered += 1
        return None if any(len(item.token_ids) > 1 for item in slices) else self.answer


def test_steps_that_want_the_logits_of_every_row_are_replayed() -> None:
    engine, _ = random_engine(dtype=torch.bfloat16, num_hidden_layers=1)
    row = SequenceSlice(token_ids=[5], start=0, block_table=[0], need_logits=True)
    silent = SequenceSlice(token_ids=[5], start=0, block_table=[1])
    chunk = SequenceSlice(token_ids=[5, 6], start=0, block_table=[2], need_logits=True)
    eager = engine.forward([row])
    answer = torch.full((1, engine.model.vocab_size), 7.0)
    graphs = Graphs(answer)
    engine._graphs = graphs
    assert torch.equal(engine.forward([row]), answer) and (graphs.offered, engine.num_replayed) == (1, 1)
    assert torch.equal(engine.forward([silent, row])[0], eager[0])  # no graph leaves a row's logits out
    assert len(engine.forward([silent])) == 0 and graphs.offered == 1
    assert torch.equal(engine.forward([row, chunk])[0], eager[0])
    assert torch.equal(engine.forward([chunk, row])[1], eager[0]) and (graphs.offered, engine.num_replayed) == (3, 1)
    graphs.answer = None  # too many rows, too long a context
    assert torch.equal(engine.forward([row]), eager) and (graphs.offered, engine.num_replayed) == (4, 1)


def test_graphs_are_as_large_as_the_pool_and_the_room_allow(monkeypatch: pytest.MonkeyPatch) -> None:
    model = loaded(random_model("llama", torch.bfloat16, num_hidden_layers=1))
    recorded = []

    def capture(run: Any) -> Any:
        recorded.append(run)
        return run

    def made(num_blocks: int, **options: Any) -> Any:
        pool = KVPool(model.layout, num_blocks, gpu_kernels=True)
        assert pool.decode_pages is not None
        return graphs_for(model, pool.decode_pages, pool, capture=capture, **options), pool

    graphs, _ = made(20)
    assert graphs.max_context == 320 and len(recorded) == 5  # 1, 2, 4, 8 and 16 rows of at most 20
    graphs, pool = made(1000, max_rows=64)
    slots = paged.num_slots(graphs.max_context, pool.decode_pages.config, is_quantized=False)
    assert graphs.max_context == model.max_context and slots * 64 * 4 * 66 * 4 <= MAX_ROOM_BYTES
    monkeypatch.setattr(prefill.decode_graphs, "MAX_ROOM_BYTES", 1 << 20)  # holds short contexts only
    assert made(1000)[0].max_context == 14 * 256
    assert made(4, row_multiple=16)[0].forward(
        [SequenceSlice(token_ids=[1], start=64, block_table=[0, 1, 2, 3, 0], need_logits=True)]
    ) is None  # fmt: skip


def test_a_model_that_cannot_be_recorded_runs_eagerly(caplog: pytest.LogCaptureFixture) -> None:
    model = loaded(random_model("llama", torch.bfloat16, num_hidden_layers=1))
    pool = KVPool(model.layout, 8, gpu_kernels=True)

    def capture(run: Any) -> Any:
        raise RuntimeError("operation not permitted when stream is capturing\nand more")

    engine = Engine(model, pool, row_multiple=1, capture=capture)
    assert engine._graphs is None
    assert "not recorded and take longer: operation not permitted when stream is capturing" in caplog.text


# That calls wait for the device


class Stream:
    device = CUDA

    def __init__(self) -> None:
        self.num_waits = 0

    def synchronize(self) -> None:
        self.num_waits += 1


@pytest.fixture
def stream(monkeypatch: pytest.MonkeyPatch) -> Stream:
    found = Stream()
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: found)
    return found


def test_completed_waits_on_a_gpu_after_errors_too(stream: Stream) -> None:
    with completed(torch.device("cpu")):
        pass
    assert stream.num_waits == 0
    with completed(CUDA):
        assert stream.num_waits == 0
    assert stream.num_waits == 1
    with pytest.raises(ZeroDivisionError), completed(CUDA):
        1 / 0  # noqa: B018
    assert stream.num_waits == 2


def test_methods_that_touch_pages_wait(stream: Stream) -> None:
    class Pages:
        device = CUDA

        @completes
        def write(self, at: int, *, value: int) -> int:
            assert stream.num_waits == 0
            return at + value

    assert Pages().write(3, value=4) == 7 and stream.num_waits == 1
    for pool, names in (
        (KVPool, ("write", "read")),
        (QuantizedKVPool, ("write", "read", "settle", "resume", "fork", "snapshot", "restore")),
    ):
        for name in names:
            assert hasattr(getattr(pool, name), "__wrapped__"), f"{pool.__name__}.{name} returns too early"


def test_a_forward_pass_is_completed_even_if_it_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, _ = random_engine(dtype=torch.bfloat16, num_hidden_layers=1)
    seen = []

    def record(device: torch.device) -> Any:
        seen.append(device)
        return completed(device)

    monkeypatch.setattr(prefill.engine, "completed", record)
    engine.forward([SequenceSlice(token_ids=[5], start=0, block_table=[0])])
    with pytest.raises(prefill.engine.SliceInvalid):
        engine.forward([SequenceSlice(token_ids=[], start=0, block_table=[0])])
    assert seen == [torch.device("cpu")] * 2


def test_a_thread_has_one_stream_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    made, entered = [], []

    def new(device: torch.device) -> Stream:
        made.append(Stream())
        return made[-1]

    monkeypatch.setattr(torch.cuda, "Stream", new)
    monkeypatch.setattr(torch.cuda, "stream", entered.append)
    monkeypatch.setattr(compute_device, "_of_thread", type("Local", (), {})())
    with side_stream(torch.device("cpu")):
        pass
    assert not made
    for _ in range(2):
        side_stream(CUDA)
    assert len(made) == 1 and entered == [made[0], made[0]]


# Which codec


class Lying(HostCodec):
    """Other bytes, or other values in pages."""

    def __init__(self, where: str) -> None:
        super().__init__()
        self.where = where

    def encode(self, *args: Any, **options: Any) -> bytes:
        blob = super().encode(*args, **options)
        return blob[:-1] + bytes([blob[-1] ^ 1]) if self.where == "bytes" else blob

    def decode_into(self, blob: Any, pages: Any, **options: Any) -> None:
        super().decode_into(blob, pages, **options)
        if self.where == "values":
            pages[1][0, -1] += 1
        elif self.where == "holes":
            pages[0][1, 3, 1, 5] = float("nan")


def test_a_codec_is_taken_only_if_it_agrees_with_the_cpus() -> None:
    profile = default_profile(LAYOUT)
    angle = torch.arange(20)[:, None] * 0.3 ** torch.arange(32)
    rope = RopeTable(*(torch.cat((x, x), dim=1) for x in (angle.cos(), angle.sin())))
    host = codec_for(torch.device("cpu"), profile, rope, torch.bfloat16)
    assert type(host) is HostCodec
    assert difference(host, HostCodec(), profile, rope, torch.bfloat16) == ""
    assert "other bytes" in difference(host, Lying("bytes"), profile, rope, torch.bfloat16)
    for where in ("values", "holes"):
        assert "other values" in difference(host, Lying(where), profile, rope, torch.bfloat16)


@pytest.mark.parametrize("error", [GpuUnavailable("numba cannot use cuda:0"), ImportError("no numba.cuda")])
def test_without_a_codec_that_works_there_kv_is_coded_on_the_cpu(
    error: Exception, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def missing(device: torch.device) -> HostCodec:
        raise error

    monkeypatch.setattr(prefill.chunk_codec, "DeviceCodec", missing)
    rope = RopeTable(torch.ones(8, 2), torch.zeros(8, 2))
    codec = codec_for(CUDA, default_profile(LAYOUT), rope, torch.bfloat16)
    assert type(codec) is HostCodec and codec.device == CUDA
    assert f"coded on the CPU, not on cuda:0: {type(error).__name__}: {error}" in caplog.text
