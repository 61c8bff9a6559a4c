"""Decode steps as CUDA graphs: one token for each of some sequences, replayed instead of launched kernel by kernel.
Knows torch and the model; decides nothing about who runs.

A step of 32 layers is some hundreds of short kernels, and launching them from Python takes longer than they run. A
graph is recorded once for each padded number of rows (1, 2, 4, 8, ...) and replayed with new contents in the same
buffers:

    ids, positions, slots [R] int64; lengths, rings, due [R] int32; tables [R, max_blocks] int32

Rows that pad a batch have length 0 and slot -1: they attend to nothing and store nothing, so no page has to be spared
for them. The kernels find their work from `lengths` on the GPU, hence one graph serves any context up to
`max_context`. Block tables are uploaded only where they changed.

Whatever a graph cannot do (prefill chunks, more rows, longer contexts) is `None` here, and the engine's eager pass.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from kernels import paged_attention as paged
from prefill.attention import AttentionRule, Span
from prefill.cuda_attention import DecodePages, NewRows, RowPlan
from prefill.model import LoadedModel

log = logging.getLogger("kvstream.engine")

# What makes a run replayable: given a run that writes its result to the same place each time, another that repeats it.
Capture = Callable[[Callable[[], None]], Callable[[], None]]


# What `graphs_for` takes: rows of the largest graph, and memory for partial results.
MAX_ROWS = 64
MAX_ROOM_BYTES = 512 << 20


class DecodeSlice(Protocol):
    """What is needed of `prefill.engine.SequenceSlice`."""

    @property
    def token_ids(self) -> Sequence[int]: ...
    @property
    def start(self) -> int: ...
    @property
    def block_table(self) -> Sequence[int]: ...
    @property
    def ring(self) -> int | None: ...


def padded_rows(num_rows: int, multiple: int, max_rows: int) -> int | None:
    """The least bucket that holds `num_rows` rows: powers of two up to 32, then multiples of 16 (a graph too large by
    half wastes half a step), all of them multiples of `multiple`. None beyond `max_rows`."""
    assert num_rows > 0 and multiple > 0, (num_rows, multiple)
    rows = 1 << (num_rows - 1).bit_length() if num_rows <= 32 else -(-num_rows // 16) * 16
    rows = -(-rows // multiple) * multiple
    return rows if rows <= max_rows else None


class StaticRows:
    """The buffers that graphs read, and their twins on the host (pinned, so that copies do not wait)."""

    def __init__(self, max_rows: int, max_blocks: int, device: torch.device) -> None:
        self._is_cuda = device.type == "cuda"
        self._wide_host = self._host((3, max_rows), torch.int64)
        self._narrow_host = self._host((3, max_rows), torch.int32)
        self._tables_host = self._host((max_rows, max_blocks), torch.int32)
        self._wide, self._narrow, self._tables = (
            x.to(device, copy=True) for x in (self._wide_host, self._narrow_host, self._tables_host)
        )
        self._q_rows = torch.arange(max_rows, dtype=torch.int32, device=device)
        self._known: list[list[int]] = [[] for _ in range(max_rows)]  # each row's table, as uploaded
        self._uploaded = torch.cuda.Event() if self._is_cuda else None
        self.num_table_uploads = 0

    def fill(self, ids: Sequence[int], positions: Sequence[int], plan: RowPlan, rows: int) -> None:
        """The first `rows` rows: those of `plan`, then padding."""
        if self._uploaded is not None:
            self._uploaded.synchronize()  # the last step's copies still read the host's buffers
        pad = rows - len(ids)
        wide, narrow = (ids, positions, plan.slots), (plan.lengths, plan.rings or [], plan.due or [])
        for buffer, values, padding in (
            *zip(self._wide_host, wide, (0, 0, -1), strict=True),
            *zip(self._narrow_host, narrow, (0, 0, -1), strict=True),
        ):
            missing = [padding] * (rows - len(values))
            buffer[:rows] = torch.tensor([*values, *missing], dtype=buffer.dtype)
        self._wide[:, :rows].copy_(self._wide_host[:, :rows], non_blocking=True)
        self._narrow[:, :rows].copy_(self._narrow_host[:, :rows], non_blocking=True)
        assert pad >= 0, (rows, len(ids))
        for row, table in enumerate(plan.tables):
            if self._known[row] != table:  # a comparison is far cheaper than a conversion
                self._known[row] = list(table)
                self._tables_host[row, : len(table)] = torch.tensor(table, dtype=torch.int32)
                self._tables[row, : len(table)].copy_(self._tables_host[row, : len(table)], non_blocking=True)
                self.num_table_uploads += 1
        if self._uploaded is not None:
            self._uploaded.record()

    def inputs(self, rows: int) -> tuple[Tensor, Tensor]:
        """ids and positions, [1, rows]."""
        return self._wide[0, :rows][None], self._wide[1, :rows][None]

    def new_rows(self, rows: int, max_length: int) -> NewRows:
        return NewRows(
            slots=self._wide[2, :rows],
            rows=paged.DecodeRows(
                q_rows=self._q_rows[:rows], tables=self._tables[:rows], lengths=self._narrow[0, :rows],
                max_length=max_length, rings=self._narrow[1, :rows],
            ),
            due=self._narrow[2, :rows],
        )  # fmt: skip

    def _host(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.zeros(shape, dtype=dtype, pin_memory=self._is_cuda)


class GraphBatch:
    """What the layers of a captured pass get as `kv` (prefill/attention.py: Batch)."""

    def __init__(self, pages: DecodePages, new: NewRows, partials: Callable[[int, int], paged.Partials]) -> None:
        self._pages, self._new, self._partials = pages, new, partials

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, rule: AttentionRule) -> Tensor:
        self._pages.store(layer, k[0].transpose(0, 1), v[0].transpose(0, 1), self._new)
        out = torch.empty(q.shape[2], q.shape[1], v.shape[3], dtype=q.dtype, device=q.device)
        partials = self._partials(q.shape[1], v.shape[3])
        self._pages.attend(layer, q[0].transpose(0, 1), self._new, rule, out, partials)
        return out[None]


@dataclass(frozen=True, slots=True)
class _Recorded:
    replay: Callable[[], None]
    logits: Tensor


class DecodeGraphs:
    """Not thread-safe, like the engine it works for. A bucket's graph is recorded when it is first needed, or by
    `record`, before the first request: some seconds, the first time for compiling."""

    def __init__(
        self,
        model: LoadedModel,
        pages: DecodePages,
        block_tokens: int,
        *,
        max_rows: int = 64,
        max_context: int | None = None,
        row_multiple: int = 1,
        capture: Capture | None = None,
    ) -> None:
        """`max_context` bounds the memory for partial results: `max_rows` * its splits * Hq * (Dv + 2) floats."""
        self._model, self._pages = model, pages
        self._row_multiple, self._max_rows = row_multiple, max_rows
        self.max_context = min(max_context or model.max_context, model.max_context)
        self._static = StaticRows(max_rows, -(-self.max_context // block_tokens), pages.device)
        self._capture = capture or cuda_capture()
        self._recorded: dict[int, _Recorded] = {}
        self._room: paged.Partials | None = None

    def record(self) -> None:
        """All buckets, the largest first: smaller graphs then fit into its memory."""
        sizes = {padded_rows(rows, self._row_multiple, self._max_rows) for rows in range(1, self._max_rows + 1)}
        for rows in sorted((size for size in sizes if size is not None), reverse=True):
            self._graph(rows)

    def forward(self, slices: Sequence[DecodeSlice]) -> Tensor | None:
        """The logits after each slice's one token, float32 [slices, vocab]; None where this is not for a graph.
        The slices are valid (`Engine` has looked at them)."""
        if not slices or any(
            len(item.token_ids) != 1 or item.start + 1 > self.max_context for item in slices
        ):  # fmt: skip
            return None
        rows = padded_rows(len(slices), self._row_multiple, self._max_rows)
        if rows is None:
            return None
        recorded = self._graph(rows)  # before tokens are booked: recording runs on empty rows
        spans = [
            Span(row=row, num_tokens=1, start=item.start, block_table=item.block_table, ring=item.ring)
            for row, item in enumerate(slices)
        ]
        ids, positions = [item.token_ids[0] for item in slices], [item.start for item in slices]
        self._static.fill(ids, positions, self._pages.plan(spans), rows)
        recorded.replay()
        return recorded.logits[: len(slices)].to(torch.float32, copy=True)

    def replay(self, num_rows: int) -> Callable[[], None]:
        """The last step of so many rows again, with what is in the buffers: for measuring."""
        rows = padded_rows(num_rows, self._row_multiple, self._max_rows)
        assert rows is not None, num_rows
        return self._graph(rows).replay

    def _graph(self, rows: int) -> _Recorded:
        if rows not in self._recorded:
            self._static.fill([], [], RowPlan(lengths=[], slots=[], tables=[]), rows)
            logits = torch.empty(rows, self._model.vocab_size, dtype=self._model.model.dtype, device=self._pages.device)
            batch = GraphBatch(self._pages, self._static.new_rows(rows, self.max_context), self._partials(rows))
            ids, positions = self._static.inputs(rows)

            def run() -> None:
                with torch.inference_mode():
                    out = self._model.model(ids, position_ids=positions, use_cache=False, kv=batch)
                    logits.copy_(out.logits[0])

            self._recorded[rows] = _Recorded(self._capture(run), logits)
        return self._recorded[rows]

    def _partials(self, rows: int) -> Callable[[int, int], paged.Partials]:
        """One room for all layers and all graphs: they run one after the other."""

        def room(num_q_heads: int, head_dim_v: int) -> paged.Partials:
            if self._room is None:
                slots = paged.num_slots(
                    self.max_context, self._pages.config, is_quantized=self._pages.is_quantized
                )  # fmt: skip
                self._room = paged.Partials.empty(
                    self._max_rows, slots, num_q_heads, head_dim_v, self._pages.device
                )  # fmt: skip
            return paged.Partials(self._room.m[:rows], self._room.total[:rows], self._room.out[:rows])

        return room


class PoolSize(Protocol):
    """What is needed of a pool."""

    num_blocks: int
    block_tokens: int


def graphs_for(
    model: LoadedModel,
    pages: DecodePages,
    pool: PoolSize,
    *,
    row_multiple: int = 1,
    max_rows: int = MAX_ROWS,
    capture: Capture | None = None,
) -> DecodeGraphs | None:
    """Recorded, for as many rows and as long contexts as the pool and `MAX_ROOM_BYTES` hold; steps beyond run eagerly.
    None, with a warning, for a model that cannot be recorded: one that looks at a value on the GPU to go on."""
    layout = model.layout
    max_rows = max(padded_rows(1, row_multiple, 1 << 30) or 1, min(max_rows, pool.num_blocks))
    # Query heads: what the model's attention will hand over; an upper bound is enough for the room.
    heads = int(model.model.config.num_attention_heads)
    slot_bytes = max_rows * heads * (layout.head_dim_v + 2) * 4
    slots = max(1, MAX_ROOM_BYTES // slot_bytes - 1)
    max_context = min(model.max_context, pool.num_blocks * pool.block_tokens, slots * pages.config.split_tokens)
    graphs = DecodeGraphs(
        model, pages, pool.block_tokens, max_rows=max_rows, max_context=max_context, row_multiple=row_multiple,
        capture=capture,
    )  # fmt: skip
    try:
        graphs.record()
    except RuntimeError as error:  # CUDA's word for everything that a capture does not permit
        log.warning("decode steps are not recorded and take longer: %s", str(error).splitlines()[0])
        return None
    return graphs


def cuda_capture() -> Capture:
    """Records into CUDA graphs that share one pool of memory. The first runs, outside of the graph, compile kernels
    and let libraries take their workspaces."""
    shared: list[tuple[int, int]] = []

    def capture(run: Callable[[], None]) -> Callable[[], None]:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                run()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # thread_local: what other threads do on the GPU meanwhile (decoding blobs) is none of the graph's business.
        with torch.cuda.graph(graph, pool=shared[0] if shared else None, capture_error_mode="thread_local"):
            run()
        shared.append(graph.pool())
        replay: Callable[[], None] = graph.replay
        return replay

    return capture
