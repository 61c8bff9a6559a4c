"""What quantized pages cost in quality: documents computed through them token by token, against bf16 pages.

Nothing is simulated: the context is prefilled in chunks through the pages in question, so errors compound as they do in
a server, then each question forks the context and is answered, teacher-forced, one forward pass a question.

Measures are those of scripts/calibration_loss.py: delta_nll is the mean rise of the true next token's negative
log-likelihood over all scored tokens, answers of recall questions and continued plain text apart; recall counts a
question if every token of its answer is the most likely one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from prefill.attention import Span
from prefill.kv_pool import KVPool
from prefill.model import LoadedModel
from prefill.quantized_layout import PageMix, blocks_for
from prefill.quantized_pool import QuantizedKVPool
from scripts.calibration_documents import Document

CHUNK_TOKENS = 256
MOST_PROBE_TOKENS = 256


class Bf16Pages:
    """One sequence in ordinary pages; probes overwrite each other behind the context."""

    def __init__(self, model: LoadedModel, num_tokens: int) -> None:
        num_blocks = -(-num_tokens // 16)
        self._model, self._pool, self._table = model, KVPool(model.layout, num_blocks), list(range(num_blocks))

    def context(self, tokens: Sequence[int]) -> None:
        for start in range(0, len(tokens), CHUNK_TOKENS):
            self._run(tokens[start : start + CHUNK_TOKENS], start)

    def probe(self, tokens: Sequence[int], start: int) -> Tensor:
        return self._run(tokens, start)

    def _run(self, tokens: Sequence[int], start: int) -> Tensor:
        span = Span(row=0, num_tokens=len(tokens), start=start, block_table=self._table)
        return forward(self._model, tokens, start, self._pool.make_batch([span]))


class QuantizedSequence:
    """The same in quantized pages; a probe forks the context's ring."""

    def __init__(self, model: LoadedModel, num_tokens: int, kind: str, mix: PageMix | None) -> None:
        num_blocks = blocks_for(num_tokens) + 1
        self._model, self._table = model, list(range(num_blocks))
        self._pool = QuantizedKVPool(model.layout, num_blocks, kind, max_sequences=2, mix=mix)
        self._ring = self._pool.rings.allocate()

    def context(self, tokens: Sequence[int]) -> None:
        for start in range(0, len(tokens), CHUNK_TOKENS):
            self._run(tokens[start : start + CHUNK_TOKENS], start, self._ring)

    def probe(self, tokens: Sequence[int], start: int) -> Tensor:
        ring = self._pool.rings.allocate()
        self._pool.fork(self._ring, ring)
        logits = self._run(tokens, start, ring)
        self._pool.rings.release(ring)
        return logits

    def _run(self, tokens: Sequence[int], start: int, ring: int) -> Tensor:
        span = Span(row=0, num_tokens=len(tokens), start=start, block_table=self._table, ring=ring)
        return forward(self._model, tokens, start, self._pool.make_batch([span]))


def forward(model: LoadedModel, tokens: Sequence[int], start: int, batch: object) -> Tensor:
    """Logits [T, V] in the model's dtype."""
    positions = torch.arange(start, start + len(tokens))[None]
    with torch.inference_mode():
        out = model.model(torch.tensor([list(tokens)]), position_ids=positions, use_cache=False, kv=batch)
    return out.logits[0]


def answers(
    documents: Sequence[Document], make: Callable[[int], Bf16Pages | QuantizedSequence]
) -> Iterator[list[Tensor]]:
    """Of each document, of each of its probes: log-probabilities [targets, V] float32 at the scored tokens."""
    for document in documents:
        length = len(document.context)
        pages = make(length + MOST_PROBE_TOKENS)
        pages.context(document.context)
        found = []
        for probe in document.probes:
            assert len(probe.tokens) <= MOST_PROBE_TOKENS, len(probe.tokens)
            logits = pages.probe(probe.tokens, length)[-len(probe.targets) :]
            found.append(torch.log_softmax(logits.float(), -1))
        yield found


def measure(
    documents: Sequence[Document],
    model: LoadedModel,
    ways: Mapping[str, tuple[str, PageMix | None]],
    progress: Callable[[int], None] = lambda done: None,
) -> dict[str, dict[str, float]]:
    """By name of a way (its kind and mix): delta_nll (the worse of answers and text), its parts with standard errors by
    documents, kl, greedy agreement, recall and the points of it lost. One document after the other, because its
    reference is large."""
    rows: dict[str, dict[str, list[Tensor]]] = {name: {} for name in ways}
    right: dict[str, list[bool]] = {name: [] for name in (*ways, "bf16")}
    for number, document in enumerate(documents):
        progress(number)
        (reference,) = answers([document], lambda n: Bf16Pages(model, n))
        targets = [torch.tensor(probe.targets) for probe in document.probes]
        if document.kind == "recall":
            right["bf16"] += _recalled(reference, targets)
        for name, way in ways.items():
            (got,) = answers([document], lambda n, way=way: QuantizedSequence(model, n, *way))  # type: ignore[misc]
            if document.kind == "recall":
                right[name] += _recalled(got, targets)
            for part, values in _compare(reference, got, targets).items():
                rows[name].setdefault(f"{document.kind}_{part}", []).append(values)
    return {name: _summary(rows[name], right[name], right["bf16"]) for name in ways}


def _recalled(found: Sequence[Tensor], targets: Sequence[Tensor]) -> list[bool]:
    return [bool((log_p.argmax(-1) == target).all()) for log_p, target in zip(found, targets, strict=True)]


def _compare(reference: Sequence[Tensor], got: Sequence[Tensor], targets: Sequence[Tensor]) -> dict[str, Tensor]:
    """[scored tokens of a document] each."""
    p, q, target = torch.cat(list(reference)), torch.cat(list(got)), torch.cat(list(targets))[:, None]
    return {
        "kl": (p.exp() * (p - q)).sum(-1),
        "delta_nll": (p.gather(1, target) - q.gather(1, target))[:, 0],
        "greedy_agreement": (p.argmax(-1) == q.argmax(-1)).float(),
    }


def _summary(rows: dict[str, list[Tensor]], right: Sequence[bool], before: Sequence[bool]) -> dict[str, float]:
    out = {name: float(torch.cat(values).mean()) for name, values in rows.items()}
    for name, values in rows.items():
        if name.endswith("delta_nll") and len(values) > 1:
            out[f"{name}_error"] = _standard_error(values)
    out["delta_nll"] = max(value for name, value in out.items() if name.endswith("_delta_nll"))
    if right:
        out["recall"] = sum(right) / len(right)
        out["recall_lost_points"] = 100 * (sum(before) - sum(right)) / len(right)
        out["questions"] = len(right)
    return out


def _standard_error(documents: Sequence[Tensor]) -> float:
    """Of the mean over all tokens, where a document's tokens may go together but documents do not."""
    mean = torch.cat(list(documents)).mean()
    excess = torch.stack([(values - mean).sum() for values in documents])
    count = sum(values.numel() for values in documents)
    return float((excess.square().sum() * len(documents) / (len(documents) - 1)).sqrt() / count)
