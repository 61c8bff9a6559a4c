"""The documents that calibration asks about: planted facts and the continuation of plain text. Pure, seeded.

A Llama-like model without our markers gets plain text only.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scripts import model_data

CONTINUATION_TOKENS = 96
MIN_CONTEXT = 128
SUFFIXES = (".txt", ".md")


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


def read_text(path: Path) -> str:
    """A text file, or all .txt and .md files of a folder in order of their names. Raises FileNotFoundError."""
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.suffix in SUFFIXES and p.is_file())
    if not files:
        raise FileNotFoundError(f"no calibration text at {path}; give a file or a folder of .txt files with --text")
    return "\n\n".join(file.read_text(encoding="utf-8", errors="replace") for file in files)


def split_tokens(tokens: Sequence[int], longest: int, parts: int = 2) -> list[list[int]]:
    """Tokens -> `parts` disjoint sets of alternating blocks, so that each holds every part of the text. Blocks are long
    beside documents where the text is long enough."""
    block = max(min(2 * longest, len(tokens) // parts), 1)
    out: list[list[int]] = [[] for _ in range(parts)]
    for number, start in enumerate(range(0, len(tokens), block)):
        out[number % parts] += tokens[start : start + block]
    return out


def make_documents(
    tokenizer: Any,
    filler: Sequence[int],
    *,
    recall_lengths: Sequence[int],
    text_lengths: Sequence[int],
    num_facts: int,
    seed: int,
) -> list[Document]:
    """One recall document for each of its lengths, every other one with names the bundled model never saw, and one text
    document for each of its; text only if the tokenizer lacks our markers."""
    rng = random.Random(seed)
    bos = model_data.special_id(tokenizer, model_data.BOS)
    has_markers = bos is not None and bos != getattr(tokenizer, "unk_token_id", None)
    documents = []
    if has_markers:
        for number, length in enumerate(recall_lengths):
            documents.append(_recall(rng, tokenizer, filler, min(length, len(filler)), num_facts, number))
        head = [bos]
    else:
        text_lengths = [*text_lengths, *recall_lengths]
        own = getattr(tokenizer, "bos_token_id", None)
        head = [] if own is None else [own]
    for length in text_lengths:
        size = max(min(length, len(filler) - CONTINUATION_TOKENS - 1), MIN_CONTEXT)
        run = model_data.take_filler(rng, filler, size + CONTINUATION_TOKENS + 1).tolist()
        context, rest = run[:size], run[size:]
        documents.append(
            Document(context=head + context, probes=[Probe(tokens=rest[:-1], targets=rest[1:])], kind="text")
        )
    return documents


def _recall(
    rng: random.Random, tokenizer: Any, filler: Sequence[int], length: int, num_facts: int, number: int
) -> Document:
    names = model_data.UNSEEN_NAMES if number % 2 else model_data.NAMES
    made = model_data.recall_document(rng, tokenizer, filler, length, num_facts, chat=number % 4 >= 2, names=names)
    probes = [Probe(tokens=q.question_ids + q.answer_ids[:-1], targets=q.answer_ids) for q in made.questions]
    return Document(context=made.context_ids, probes=probes, kind="recall")
