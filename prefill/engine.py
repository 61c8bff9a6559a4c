"""One forward pass over slices of many sequences, KV in pages. Knows torch and the model; schedules nothing.

The engine keeps no state of its own but the pool's tensors: which blocks belong to whom, and what runs next, is the
caller's business. Not thread-safe: one engine, one thread. Engines over one model (`beside`) take turns, pass by pass.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn

from kernels.attention import TILE_TOKENS
from kernels.row_invariance import MULTIPLES, ROW_COUNTS, Product, cancelling_example, least_row_multiple
from prefill.attention import Batch, Span
from prefill.block_pool import BlockPool
from prefill.compute_device import completed
from prefill.experts import expert_shapes, has_other_experts, pad_experts, product_among_others, router_shapes
from prefill.fusions import fuse_for_cpu
from prefill.kv_layout import KVLayout
from prefill.model import LoadedModel
from prefill.packed_linear import PackedLinear, pack_linears, pack_weight, packed_product
from prefill.quantized_layout import RING_TOKENS
from prefill.turns import Turns

if TYPE_CHECKING:  # these bring Triton along, which takes a while and is for GPUs
    from prefill.cuda_attention import DecodePages
    from prefill.decode_graphs import Capture, DecodeGraphs


log = logging.getLogger("kvstream.engine")


@dataclass(frozen=True, slots=True, kw_only=True)
class SequenceSlice:
    """Tokens `start .. start + len(token_ids)` of a sequence whose pages are `block_table`; the KV of the tokens before
    `start` is in the pages already. need_logits: of the last token; all_logits: of all of them. ring: where a pool of
    quantized pages keeps the sequence's recent tokens."""

    token_ids: Sequence[int]
    start: int
    block_table: Sequence[int]
    need_logits: bool = False
    all_logits: bool = False
    ring: int | None = None


class SliceInvalid(ValueError):
    """A slice that the pages or the model cannot hold; the text names it. Nothing was computed."""


class PagePool(Protocol):
    """What the engine needs of a pool: kv_pool.py's, or one of quantized pages. `uses_torch_products`: whether
    attention's sums are torch's, whose order may depend on the number of rows. `decode_pages`: the pages as kernels for
    GPUs see them; None where attention is another's. `begin_sequence`: the ring of a sequence that
    begins, None where pages are all it has."""

    layout: KVLayout
    num_blocks: int
    block_tokens: int
    decode_pages: DecodePages | None

    @property
    def uses_torch_products(self) -> bool: ...
    def blocks_for(self, num_tokens: int) -> int: ...
    def begin_sequence(self) -> int | None: ...
    def end_sequence(self, ring: int | None) -> None: ...
    def make_batch(self, spans: Sequence[Span], row_multiple: int = 1) -> Batch: ...


class Engine:
    """`row_multiple`: every matrix product sees a multiple of so many rows, because from there on a row's bits do
    not depend on the others. Found by measuring when it is not given; 1 on a GPU, where nothing of the kind is promised
    (docs/gpu-engine.md). `capture`: how decode steps are recorded; None: as CUDA graphs on a GPU, and nowhere else.
    `is_fused`: puts kernels of ours in place of some of the model's modules, where they give the same; False is for
    comparing."""

    def __init__(
        self,
        model: LoadedModel,
        pool: PagePool,
        *,
        row_multiple: int | None = None,
        capture: Capture | None = None,
        is_fused: bool = True,
        turns: Turns | None = None,
    ) -> None:
        assert pool.layout == model.layout, (pool.layout, model.layout)
        self.model = model
        self.pool = pool
        is_on_gpu = model.device.type == "cuda"
        if is_fused:
            fuse_for(model)
        if row_multiple is None:
            row_multiple = 1 if is_on_gpu else measured_row_multiple(model, attention=pool.uses_torch_products)
        self.row_multiple = row_multiple
        self._turns = turns or Turns()
        self.waited_s = 0.0  # the last pass, for its turn
        if is_fused and not is_on_gpu:
            pad_experts(model.model, row_multiple)
        self.num_replayed = 0  # steps that were a graph's
        self._graphs: DecodeGraphs | None = None
        # What was not compiled or recorded yet is now: never in a request.
        pool.make_batch([], row_multiple)
        if pool.decode_pages is not None and (is_on_gpu or capture is not None):
            from prefill.decode_graphs import graphs_for

            self._graphs = graphs_for(model, pool.decode_pages, pool, row_multiple=row_multiple, capture=capture)

    def beside(self, pool: PagePool) -> Engine:
        """Another one over the same model, with a pool of its own."""
        return Engine(self.model, pool, row_multiple=self.row_multiple, turns=self._turns)

    def forward(self, slices: Sequence[SequenceSlice]) -> Tensor:
        """Compute all slices in one pass, write their KV into the pages, and return the logits after the last
        token of each slice that asked for them, or after each of its tokens: float32 [rows, vocab], in the order of
        the slices, on the model's device, which has then done it all. Raises `SliceInvalid`."""
        with completed(self.model.device):
            return self._forward(slices)

    def _forward(self, slices: Sequence[SequenceSlice]) -> Tensor:
        spans = self._spans(slices)
        wanted = [row for span, item in zip(spans, slices, strict=True) for row in _wanted_rows(span, item)]
        if not spans:
            return torch.empty(0, self.model.vocab_size, device=self.model.device)
        if self._graphs is not None and len(wanted) == len(slices):
            with self._turns.turn() as self.waited_s:
                logits = self._graphs.forward(slices)
            if logits is not None:
                self.num_replayed += 1
                return logits
        batch = self.pool.make_batch(spans, self.row_multiple)
        ids = self._padded([token for s in slices for token in s.token_ids])
        positions = self._padded([position for span in spans for position in range(span.start, span.stop)])
        network = self.model.model
        with self._turns.turn() as self.waited_s, torch.inference_mode():
            if not wanted:  # spare the projection to the vocabulary
                network.base_model(ids[None], position_ids=positions[None], use_cache=False, kv=batch)
                return torch.empty(0, self.model.vocab_size, device=self.model.device)
            out = network(
                ids[None],
                position_ids=positions[None],
                use_cache=False,
                logits_to_keep=self._padded(wanted),
                kv=batch,
            )
        # A copy made out here is an ordinary tensor, which a sampler may write to.
        return out.logits[0, : len(wanted)].to(torch.float32, copy=True)

    def _spans(self, slices: Sequence[SequenceSlice]) -> list[Span]:
        spans: list[Span] = []
        row = 0
        for item in slices:
            self._check(item)
            num_tokens = len(item.token_ids)
            spans.append(
                Span(row=row, num_tokens=num_tokens, start=item.start, block_table=item.block_table, ring=item.ring)
            )
            row += num_tokens
        return spans

    def _padded(self, values: list[int]) -> Tensor:
        missing = -len(values) % self.row_multiple
        return torch.tensor(values + [0] * missing, device=self.model.device)

    def _check(self, item: SequenceSlice) -> None:
        stop = item.start + len(item.token_ids)
        if not item.token_ids or item.start < 0:
            raise SliceInvalid(f"a slice of {len(item.token_ids)} tokens at {item.start}")
        if min(item.token_ids) < 0 or max(item.token_ids) >= self.model.vocab_size:
            raise SliceInvalid(f"a token id is not in the vocabulary of {self.model.vocab_size}")
        if stop > self.model.max_context:
            raise SliceInvalid(f"tokens up to {stop} exceed the model's context of {self.model.max_context}")
        if self.pool.blocks_for(stop) > len(item.block_table):
            raise SliceInvalid(f"tokens up to {stop} do not fit {len(item.block_table)} blocks")


def fuse_for(model: LoadedModel) -> None:
    """In place, what is found to give the same on the model's device. Once more changes nothing."""
    if model.device.type == "cuda":
        from prefill.cuda_fusions import fuse

        log.info("%s: %s", model.device, fuse(model.model))
    else:
        fuse_for_cpu(model.model)
        pack_linears(model.model)
        pad_experts(model.model, 1)  # the multiple is measured with them in place


def _wanted_rows(span: Span, item: SequenceSlice) -> range:
    """The rows of the pass whose logits a slice asked for."""
    stop = span.row + span.num_tokens
    return range(span.row if item.all_logits else stop - 1 if item.need_logits else stop, stop)


class ScheduleVariantWarning(UserWarning):
    """On this machine the same prompt may give other tokens in another batch."""


def measured_row_multiple(model: LoadedModel, *, attention: bool = True) -> int:
    """The least number of rows to pad to so that this machine's matrix products treat rows alike, measured in the
    shapes of the model's weights (linear layers, experts, routers) and, with `attention`, of its two products. Some
    0.1 s for a small model. Warns if there is none, and of experts whose products are not ours (experts.py)."""
    layout, dtype, device = model.layout, model.layout.torch_dtype, model.device
    examples = []

    def add(product: Product, depth: int, columns: int, batch: int | None = None, dtype: torch.dtype = dtype) -> None:
        left, right = cancelling_example(ROW_COUNTS[-1], depth, columns, dtype=dtype, batch=batch)
        left, right = left.to(device), right.to(device)
        if batch is None:
            left, right = left[None], right.t().contiguous()
            right = pack_weight(right) if product is packed_product else right
        examples.append((product, left, right))

    for kind, product in ((nn.Linear, nn.functional.linear), (PackedLinear, packed_product)):
        linears = [module for module in model.model.modules() if isinstance(module, kind)]
        # Wide weights are cut: columns are independent, and what matters is the depth of the sums.
        for depth, columns in sorted({(m.in_features, min(m.out_features, 4096)) for m in linears}):
            add(product, depth, columns)
    for depth, columns in expert_shapes(model.model):
        add(product_among_others, depth, min(columns, 4096))
    for depth, columns in router_shapes(model.model):
        for wide in {dtype, torch.float32}:
            add(nn.functional.linear, depth, columns, dtype=wide)
    if attention:
        for tile in (TILE_TOKENS, RING_TOKENS):  # that of quantized pages' recent tokens is a small one
            add(torch.bmm, layout.head_dim_k, tile, layout.num_kv_heads)
            add(torch.bmm, tile, layout.head_dim_v, layout.num_kv_heads)
    with torch.inference_mode():
        multiple = least_row_multiple(examples)
    reasons = []
    if multiple is None:
        reasons.append(
            f"{device} sums the rows of a {layout.dtype} matrix product in an order that depends on how many there are"
        )
    if has_other_experts(model.model):
        reasons.append(f"{type(model.model).__name__} keeps its experts in a way that is not known here")
    for reason in reasons:
        warnings.warn(
            f"{reason}: the same prompt may give other tokens in another batch", ScheduleVariantWarning, stacklevel=3
        )
    return multiple or MULTIPLES[0]


def prefill(
    engine: Engine,
    token_ids: Sequence[int],
    block_table: Sequence[int],
    *,
    start: int = 0,
    chunk_tokens: int = 256,
    ring: int | None = None,
) -> Tensor:
    """Compute a prompt from `start` on in chunks; the logits [vocab] after its last token."""
    logits = torch.empty(0)
    for first in range(start, len(token_ids), chunk_tokens):
        chunk = token_ids[first : first + chunk_tokens]
        is_last = first + len(chunk) == len(token_ids)
        logits = engine.forward(
            [SequenceSlice(token_ids=chunk, start=first, block_table=block_table, need_logits=is_last, ring=ring)]
        )
    return logits[0]


def generate_greedy(
    engine: Engine,
    allocator: BlockPool,
    token_ids: Sequence[int],
    max_tokens: int,
    *,
    chunk_tokens: int = 256,
    stop_token_ids: Sequence[int] = (),
) -> list[int]:
    """One request alone on the engine: the answer that every disaggregated run must repeat token for token.
    A stop token ends the output and is part of it."""
    table = allocator.allocate(engine.pool.blocks_for(len(token_ids) + max_tokens))
    ring = engine.pool.begin_sequence()
    try:
        tokens = [int(prefill(engine, token_ids, table, chunk_tokens=chunk_tokens, ring=ring).argmax())]
        while len(tokens) < max_tokens and tokens[-1] not in stop_token_ids:
            position = len(token_ids) + len(tokens) - 1
            row = SequenceSlice(token_ids=tokens[-1:], start=position, block_table=table, need_logits=True, ring=ring)
            tokens.append(int(engine.forward([row])[0].argmax()))
        return tokens
    finally:
        allocator.release(table)
        engine.pool.end_sequence(ring)
