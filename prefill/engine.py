"""One forward pass over slices of many sequences, KV in pages. Knows torch and the model; schedules nothing.

The engine keeps no state of its own but the pool's tensors: which blocks belong to whom, and what runs next, is the
caller's business. Not thread-safe: one engine, one thread.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from prefill.attention import PagedBatch, Span
from prefill.block_allocator import BlockAllocator, blocks_for
from prefill.kv_pool import KVPool
from prefill.model import LoadedModel


@dataclass(frozen=True, slots=True, kw_only=True)
class SequenceSlice:
    """Tokens `start .. start + len(token_ids)` of a sequence whose pages are `block_table`; the KV of the tokens before
    `start` is in the pages already."""

    token_ids: Sequence[int]
    start: int
    block_table: Sequence[int]
    need_logits: bool = False


class SliceInvalid(ValueError):
    """A slice that the pages or the model cannot hold; the text names it. Nothing was computed."""


class Engine:
    def __init__(self, model: LoadedModel, pool: KVPool) -> None:
        assert pool.layout == model.layout, (pool.layout, model.layout)
        self.model = model
        self.pool = pool

    def forward(self, slices: Sequence[SequenceSlice]) -> Tensor:
        """Compute all slices in one pass, write their KV into the pages, and return the logits after the last token of
        each slice that asked for them: float32 [slices with need_logits, vocab], in the order of the slices.
        Raises `SliceInvalid`."""
        spans: list[Span] = []
        row = 0
        for item in slices:
            self._check(item)
            spans.append(
                Span(row=row, num_tokens=len(item.token_ids), start=item.start, block_table=item.block_table)
            )
            row += len(item.token_ids)
        last_rows = [
            s.row + s.num_tokens - 1 for s, item in zip(spans, slices, strict=True) if item.need_logits
        ]
        if not spans:
            return torch.empty(0, self.model.vocab_size)
        device = self.model.device
        ids = torch.tensor([token for item in slices for token in item.token_ids], device=device)
        positions = torch.cat([torch.arange(s.start, s.stop) for s in spans]).to(device)
        with torch.inference_mode():
            batch = PagedBatch(self.pool, spans)
            if not last_rows:  # spare the vocabulary projection
                self.model.model.base_model(
                    ids[None], position_ids=positions[None], use_cache=False, kv=batch
                )
                return torch.empty(0, self.model.vocab_size)
            out = self.model.model(
                ids[None],
                position_ids=positions[None],
                use_cache=False,
                logits_to_keep=torch.tensor(last_rows, device=device),
                kv=batch,
            )
            return out.logits[0].float()

    def _check(self, item: SequenceSlice) -> None:
        stop = item.start + len(item.token_ids)
        if not item.token_ids or item.start < 0:
            raise SliceInvalid(f"a slice of {len(item.token_ids)} tokens at {item.start}")
        if stop > self.model.max_context:
            raise SliceInvalid(f"tokens up to {stop} exceed the model's context of {self.model.max_context}")
        if stop > len(item.block_table) * self.pool.block_tokens:
            raise SliceInvalid(f"tokens up to {stop} do not fit {len(item.block_table)} blocks")


def prefill(
    engine: Engine,
    token_ids: Sequence[int],
    block_table: Sequence[int],
    *,
    start: int = 0,
    chunk_tokens: int = 256,
) -> Tensor:
    """Compute a prompt from `start` on in chunks; the logits [vocab] after its last token."""
    logits = torch.empty(0)
    for first in range(start, len(token_ids), chunk_tokens):
        chunk = token_ids[first : first + chunk_tokens]
        is_last = first + len(chunk) == len(token_ids)
        logits = engine.forward(
            [SequenceSlice(token_ids=chunk, start=first, block_table=block_table, need_logits=is_last)]
        )
    return logits[0]


def generate_greedy(
    engine: Engine,
    allocator: BlockAllocator,
    token_ids: Sequence[int],
    max_tokens: int,
    *,
    chunk_tokens: int = 256,
    stop_token_ids: Sequence[int] = (),
) -> list[int]:
    """One request alone on the engine: the answer that every disaggregated run must repeat token for token.
    A stop token ends the output and is part of it."""
    block_tokens = engine.pool.block_tokens
    table = allocator.allocate(blocks_for(len(token_ids) + max_tokens, block_tokens))
    try:
        tokens = [int(prefill(engine, token_ids, table, chunk_tokens=chunk_tokens).argmax())]
        while len(tokens) < max_tokens and tokens[-1] not in stop_token_ids:
            position = len(token_ids) + len(tokens) - 1
            row = SequenceSlice(token_ids=tokens[-1:], start=position, block_table=table, need_logits=True)
            tokens.append(int(engine.forward([row])[0].argmax()))
        return tokens
    finally:
        allocator.free(table)
