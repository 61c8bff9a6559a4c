"""What a change to a model's KV costs, on a transformers model: the loss and the Fisher information of codec.calibrate.

Documents' KV is computed once by the model in its own dtype. Then, for any transformed KV, a float32 copy of the model
continues from it, and its next-token distributions are compared with those from the KV as it was. All of a document's
questions run in one forward pass: each sees the context and itself (a block mask), none sees another.

A scored token *depends on the context* if dropping all context but its last 64 tokens moves the log-probability of the
true next token by more than 0.1 nat. Where it does not, no codec could do harm, so promises are about those that do.

Legend: L layers, T context tokens, H KV heads, D head dim, N scored tokens of a document, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from codec.allocate import KV, Fisher, Sample, fold_of
from codec.rope import RopeTable
from scripts.calibration_documents import Document

NEAR_TOKENS = 64  # of the context: what is left when the far context is dropped
DEPENDS_NATS = 0.1
KINDS = {"recall": "answers", "text": "text"}
Tables = tuple[Any, ...]  # what RopeTable takes


@dataclass(frozen=True, slots=True, kw_only=True)
class _Prepared:
    """A document, ready to be continued. reference [N, V]: log-probabilities from the KV as it was; depends [N]."""

    sample: Sample
    kind: str
    tokens: Tensor
    positions: Tensor
    mask: Tensor
    rows: Tensor
    targets: Tensor
    group: list[slice]
    reference: Tensor
    depends: Tensor


def _pack(document: Document, sample: Sample) -> _Prepared:
    """All probes of a document as one sequence behind its context."""
    length = len(document.context)
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
    none = torch.empty(0)
    return _Prepared(
        sample=sample, kind=document.kind, tokens=torch.tensor([tokens]), positions=torch.tensor([positions]),
        mask=mask, rows=torch.tensor(rows), targets=torch.tensor(targets), group=group, reference=none, depends=none,
    )  # fmt: skip


class ModelLoss:
    """`loss(transform)` over a set of documents; `.samples` are their KV; `.fisher()` what its errors weigh."""

    def __init__(
        self,
        model: Any,
        reference_model: Any,
        rope_tables: Callable[[int, int], Tables],
        documents: Sequence[Document],
    ):
        self._model = reference_model.requires_grad_(False)
        self._documents = [self._prepare(model, rope_tables, document) for document in documents]
        self.samples = [document.sample for document in self._documents]

    @property
    def counts(self) -> dict[str, dict[str, int]]:
        """By kind: documents, probes, scored tokens, and those of them that depend on the far context."""
        out: dict[str, dict[str, int]] = {}
        for kind, name in KINDS.items():
            mine = [d for d in self._documents if d.kind == kind]
            if mine:
                out[name] = {
                    "documents": len(mine),
                    "probes": sum(len(d.group) for d in mine),
                    "tokens": sum(len(d.depends) for d in mine),
                    "depending": int(sum(d.depends.sum() for d in mine)),
                }
        return out

    def _prepare(self, model: Any, rope_tables: Callable[[int, int], Tables], document: Document) -> _Prepared:
        length = len(document.context)
        with torch.inference_mode():
            cache = model(
                torch.tensor([document.context], device=model.device), use_cache=True, logits_to_keep=1
            ).past_key_values
            k = torch.stack([layer.keys[0].transpose(0, 1) for layer in cache.layers]).to("cpu", torch.bfloat16)
            v = torch.stack([layer.values[0].transpose(0, 1) for layer in cache.layers]).to("cpu", torch.bfloat16)
        sample = Sample(k=k.contiguous(), v=v.contiguous(), rope=RopeTable(*rope_tables(0, length)))
        prepared = _pack(document, sample)
        with torch.inference_mode():
            reference = self._continue(prepared, (k, v))
            near = self._continue(prepared, (k, v), keep_last_tokens=NEAR_TOKENS)
        targets = prepared.targets.to(reference.device)[:, None]
        moved = (reference.gather(1, targets) - near.gather(1, targets))[:, 0].abs()
        return replace(prepared, reference=reference, depends=moved > DEPENDS_NATS)

    def _continue(self, document: _Prepared, kv: KV, *, keep_last_tokens: int | None = None) -> Tensor:
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
            mask[:, : max(kv[0].shape[1] - keep_last_tokens, 0)] = False
        additive = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
        out = self._model(
            document.tokens.to(device), past_key_values=cache, position_ids=document.positions.to(device),
            attention_mask=additive[None, None].to(device), use_cache=True,
        )  # fmt: skip
        return torch.log_softmax(out.logits[0, document.rows.to(device)].float(), dim=-1)

    def __call__(self, transform: Callable[[Sample], KV], *, keep_last_tokens: int | None = None) -> dict[str, float]:
        """Means over answers_* and text_* tokens, and over those of them that depend on the context (*_far_*): kl and
        delta_nll in nats a token, greedy_agreement; recall; standard errors by documents (*_error).
        Without prefix, the worse of answers and text: kl on depending tokens, delta_nll and agreement on all."""
        rows: dict[str, list[Tensor]] = {}
        recalled: list[bool] = []
        with torch.inference_mode():
            for document in self._documents:
                got = self._continue(document, transform(document.sample), keep_last_tokens=keep_last_tokens)
                name = KINDS[document.kind]
                for part, values in _compare(document, got).items():
                    rows.setdefault(f"{name}_{part}", []).append(values)
                    rows.setdefault(f"{name}_far_{part}", []).append(values[document.depends])
                if document.kind == "recall":
                    right = got.argmax(-1) == document.targets.to(got.device)
                    recalled += [bool(right[part].all()) for part in document.group]
        measures = {name: float(torch.cat(values).mean()) for name, values in rows.items() if torch.cat(values).numel()}
        for name in [f"{name}_{part}" for name in KINDS.values() for part in ("delta_nll", "far_kl")]:
            if len(parts := rows.get(name, [])) > 1 and torch.cat(parts).numel():
                measures[f"{name}_error"] = _standard_error(parts)
        if recalled:
            measures["recall"] = sum(recalled) / len(recalled)
        return _worse_of_kinds(measures) | measures

    def fisher(
        self, *, draws: int = 4, seed: int = 0, progress: Callable[[float], None] = lambda share: None
    ) -> Fisher:
        """How much an error of the KV costs on tokens that depend on the context, answers and text weighing alike.

        F is the second moment of the scores g_t = d log p(y) / d kv_t with y drawn from the model itself, which is the
        Hessian of the KL. Scores of independent draws are uncorrelated, so one backward pass of the sum over a
        document's tokens, over the root of their number, serves them all."""
        generator = torch.Generator(device="cpu").manual_seed(seed)
        sums: dict[tuple[int, str], list[tuple[Tensor, ...]]] = {}
        places = dict.fromkeys(KINDS, 0)
        for number, document in enumerate(self._documents):
            progress(number / len(self._documents))
            fold = fold_of(places[document.kind])
            places[document.kind] += 1
            sums.setdefault((fold, document.kind), []).extend(self._moments(document, draws, generator))
        folds = []
        for fold in (0, 1):
            kinds = [moments for (f, _), moments in sums.items() if f == fold]
            if kinds:
                means = [[torch.stack(part).mean(dim=0) for part in zip(*moments)] for moments in kinds]
                folds.append([torch.stack(part).mean(dim=0).numpy() for part in zip(*means)])
        k_turned, k, v = (np.stack([folds[0][i], folds[-1][i]]) for i in range(3))
        return Fisher(k_turned=k_turned, k=k, v=v)

    def _moments(self, document: _Prepared, draws: int, generator: torch.Generator) -> list[tuple[Tensor, ...]]:
        """[L, H, D, D] float64 of keys before RoPE, keys, values; for each draw."""
        k = document.sample.k.float().requires_grad_()
        v = document.sample.v.float().requires_grad_()
        depends = document.depends.clone()
        if not depends.any():
            depends[:] = True
        out = []
        with torch.enable_grad():
            log_p = self._continue(document, (k, v))[depends]
            p = log_p.detach().exp().cpu()
            for _ in range(draws):
                y = torch.multinomial(p, 1, generator=generator).to(log_p.device)
                score = log_p.gather(1, y).sum() / len(log_p) ** 0.5
                of_k, of_v = torch.autograd.grad(score, (k, v), retain_graph=True)
                parts = (_turn_back(of_k, document.sample.rope), of_k, of_v)
                out.append(tuple(torch.einsum("lthd,lthe->lhde", g, g).double() for g in parts))
        return out


def _compare(document: _Prepared, got: Tensor) -> dict[str, Tensor]:
    """[N] each."""
    reference = document.reference
    targets = document.targets.to(got.device)[:, None]
    return {
        "kl": (reference.exp() * (reference - got)).sum(dim=-1),
        "delta_nll": (reference.gather(1, targets) - got.gather(1, targets))[:, 0],
        "greedy_agreement": (reference.argmax(-1) == got.argmax(-1)).float(),
    }


def _standard_error(documents: list[Tensor]) -> float:
    """Of the mean over all tokens, where a document's tokens may go together but documents do not."""
    mean = torch.cat(documents).mean()
    excess = torch.stack([(values - mean).sum() for values in documents])
    count = sum(values.numel() for values in documents)
    return float((excess.square().sum() * len(documents) / (len(documents) - 1)).sqrt() / count)


def _worse_of_kinds(measures: dict[str, float]) -> dict[str, float]:
    def of(part: str) -> dict[str, float]:
        return {name: measures[f"{name}_{part}"] for name in KINDS.values() if f"{name}_{part}" in measures}

    part = "far_kl" if of("far_kl") else "kl"
    worst = max(of(part), key=lambda name: of(part)[name])
    return {
        "kl": of(part)[worst],
        "kl_error": measures.get(f"{worst}_far_kl_error", 0.0),
        "delta_nll": max(of("delta_nll").values()),
        "greedy_agreement": min(of("greedy_agreement").values()),
    }


def _turn_back(gradient: Tensor, rope: RopeTable | None) -> Tensor:
    """Gradients [L, T, H, D] of keys after RoPE -> of keys before it: the rotation's transpose."""
    if rope is None:
        return gradient
    cos, sin = (torch.from_numpy(np.ascontiguousarray(x))[:, None].to(gradient) for x in rope.forward())
    half = cos.shape[-1]
    a, b = gradient[..., :half], gradient[..., half : 2 * half]
    turned = torch.cat([a * cos + b * sin, b * cos - a * sin, gradient[..., 2 * half :]], dim=-1)
    layers = torch.from_numpy(rope.turned(0, len(gradient)))[:, None, None, None].to(gradient.device)
    return torch.where(layers, turned, gradient)
