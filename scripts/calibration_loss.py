"""What a change to a model's KV costs: the loss that codec.calibrate asks for, on a transformers model.

Documents' KV is computed once by the model in its own dtype. Then, for any transformed KV, a float32 copy of the model
continues from it, and its next-token distributions are compared with those from the KV as it was. All of a document's
questions run in one forward pass: each sees the context and itself (a block mask), none sees another.

Legend: L layers, T context tokens, H KV heads, D head dim, Q probe tokens, N scored tokens, V vocabulary.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from codec.calibrate import KV, Sample
from codec.rope import RopeTable
from scripts import model_data

CONTINUATION_TOKENS = 96


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """Tokens that follow a context, and which of them are scored: `targets` are the last len(targets) next tokens."""

    tokens: list[int]
    targets: list[int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Document:
    """A context and what is asked after it. kind "recall": answers that stand far back; "text": the text goes on."""

    context: list[int]
    probes: list[Probe]
    kind: str


def make_documents(
    tokenizer: Any, text_path: Path, *, lengths: Sequence[int], num_text: int, num_facts: int, seed: int
) -> list[Document]:
    """One recall document a length and `num_text` plain ones; plain ones only if the tokenizer lacks our markers."""
    rng = random.Random(seed)
    filler = model_data.encode(tokenizer, text_path.read_text(encoding="utf-8"))
    documents = []
    bos = model_data.special_id(tokenizer, model_data.BOS)
    has_markers = bos is not None and bos != getattr(tokenizer, "unk_token_id", None)
    for i, length in enumerate(lengths if has_markers else ()):
        made = model_data.recall_document(rng, tokenizer, filler, length, num_facts, chat=i % 3 == 2)
        probes = [Probe(tokens=q.question_ids + q.answer_ids[:-1], targets=q.answer_ids) for q in made.questions]
        documents.append(Document(context=made.context_ids, probes=probes, kind="recall"))
    for _ in range(num_text if has_markers else num_text + len(lengths)):
        size = max(lengths)
        run = model_data.take_filler(rng, filler, min(size, len(filler) // 2) + CONTINUATION_TOKENS + 1).tolist()
        context, rest = run[:-CONTINUATION_TOKENS], run[-CONTINUATION_TOKENS:]
        head = [bos] if has_markers else []
        probe = Probe(tokens=rest[:-1], targets=rest[1:])
        documents.append(Document(context=head + context, probes=[probe], kind="text"))
    return documents


@dataclass(frozen=True, slots=True, kw_only=True)
class _Prepared:
    """A document, ready to be continued. reference [N, V]: log-probabilities from the KV as it was."""

    sample: Sample
    kind: str
    tokens: Tensor
    positions: Tensor
    mask: Tensor
    rows: Tensor
    targets: Tensor
    group: list[slice]
    reference: Tensor


class ModelLoss:
    """`loss(transform)` over a set of documents; `.samples` are their KV."""

    def __init__(
        self,
        model: Any,
        reference_model: Any,
        rope_tables: Callable[[int, int], KV],
        documents: Sequence[Document],
    ):
        self._model = reference_model
        self._documents = [self._prepare(model, rope_tables, document) for document in documents]
        self.samples = [document.sample for document in self._documents]

    @torch.inference_mode()
    def _prepare(self, model: Any, rope_tables: Callable[[int, int], KV], document: Document) -> _Prepared:
        length = len(document.context)
        cache = model(
            torch.tensor([document.context], device=model.device), use_cache=True, logits_to_keep=1
        ).past_key_values
        k = torch.stack([layer.keys[0].transpose(0, 1) for layer in cache.layers]).to("cpu", torch.bfloat16)
        v = torch.stack([layer.values[0].transpose(0, 1) for layer in cache.layers]).to("cpu", torch.bfloat16)
        cos, sin = rope_tables(0, length)
        sample = Sample(k=k.contiguous(), v=v.contiguous(), rope=RopeTable(cos, sin))

        tokens: list[int] = []
        positions: list[int] = []
        rows: list[int] = []
        targets: list[int] = []
        group: list[slice] = []
        owner: list[int] = []
        for number, probe in enumerate(document.probes):
            end = len(tokens) + len(probe.tokens)
            rows += range(end - len(probe.targets), end)
            group.append(slice(len(targets), len(targets) + len(probe.targets)))
            targets += probe.targets
            tokens += probe.tokens
            positions += range(length, length + len(probe.tokens))
            owner += [number] * len(probe.tokens)
        who = torch.tensor(owner)
        order = torch.arange(len(tokens))
        own = (who[:, None] == who[None]) & (order[:, None] >= order[None])
        mask = torch.cat([torch.ones(len(tokens), length, dtype=torch.bool), own], dim=1)
        prepared = _Prepared(
            sample=sample, kind=document.kind, tokens=torch.tensor([tokens]), positions=torch.tensor([positions]),
            mask=mask, rows=torch.tensor(rows), targets=torch.tensor(targets), group=group, reference=torch.empty(0),
        )  # fmt: skip
        object.__setattr__(prepared, "reference", self._continue(prepared, (k, v), None))
        return prepared

    @torch.inference_mode()
    def _continue(self, document: _Prepared, kv: KV, keep_last_tokens: int | None) -> Tensor:
        """Log-probabilities [N, V] at the scored tokens, from the given KV."""
        from transformers import DynamicCache

        device = self._model.device
        cache = DynamicCache()
        for layer, (k, v) in enumerate(zip(kv[0], kv[1], strict=True)):
            pair = [x.transpose(0, 1)[None].to(device, torch.float32) for x in (k, v)]
            cache.update(pair[0], pair[1], layer)
        mask = document.mask
        if keep_last_tokens is not None:
            mask = mask.clone()
            mask[:, : kv[0].shape[1] - keep_last_tokens] = False
        additive = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
        out = self._model(
            document.tokens.to(device), past_key_values=cache, position_ids=document.positions.to(device),
            attention_mask=additive[None, None].to(device), use_cache=True,
        )  # fmt: skip
        return torch.log_softmax(out.logits[0, document.rows.to(device)].float(), dim=-1)

    def __call__(self, transform: Callable[[Sample], KV], *, keep_last_tokens: int | None = None) -> dict[str, float]:
        """kl, delta_nll, greedy_agreement on answers' tokens (on text if there are none); recall; text_*: on text."""
        sums: dict[str, list[Tensor]] = {}
        recalled: list[bool] = []
        for document in self._documents:
            got = self._continue(document, transform(document.sample), keep_last_tokens)
            reference = document.reference
            prefix = "text_" if document.kind == "text" else ""
            targets = document.targets.to(got.device)[:, None]
            rows = {
                "kl": (reference.exp() * (reference - got)).sum(dim=-1),
                "delta_nll": (reference.gather(1, targets) - got.gather(1, targets))[:, 0],
                "greedy_agreement": (reference.argmax(-1) == got.argmax(-1)).float(),
            }
            for name, values in rows.items():
                sums.setdefault(prefix + name, []).append(values)
            if document.kind == "recall":
                right = got.argmax(-1) == targets[:, 0]
                recalled += [bool(right[part].all()) for part in document.group]
        measures = {name: float(torch.cat(values).mean()) for name, values in sums.items()}
        for name in ("kl", "delta_nll", "greedy_agreement"):
            measures.setdefault(name, measures.get("text_" + name, 0.0))
        if recalled:
            measures["recall"] = sum(recalled) / len(recalled)
        return measures
