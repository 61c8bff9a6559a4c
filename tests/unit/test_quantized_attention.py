"""prefill/quantized_attention.py: equal to a dense computation with the same rule, and the same bits whatever the
chunks and whoever shares the batch."""

from __future__ import annotations

import random
from dataclasses import dataclass

import pytest
import torch
from engine_models import loaded, random_model, random_prompt
from quantized_dense import DenseQuantized, dense_attention

from kernels.attention import TILE_TOKENS
from prefill.attention import AttentionRule, Span
from prefill.engine import Engine, SequenceSlice
from prefill.kv_layout import KVLayout
from prefill.model import LoadedModel
from prefill.quantized_layout import KINDS
from prefill.quantized_pool import QuantizedKVPool

H, HQ, D, DV = 2, 6, 16, 8
LAYOUT = KVLayout(num_layers=1, num_kv_heads=H, head_dim_k=D, head_dim_v=DV, dtype="float32")
NUM_BLOCKS = 40
RULES = {
    "plain": AttentionRule(scale=0.25, window=None, softcap=None),
    "narrow window": AttentionRule(scale=0.25, window=20, softcap=None),
    "window": AttentionRule(scale=0.25, window=90, softcap=None),
    "window over tiles": AttentionRule(scale=0.25, window=TILE_TOKENS + 20, softcap=None),
    "softcap": AttentionRule(scale=1.0, window=None, softcap=2.0),
}


def randn(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def qkv(length: int) -> tuple[torch.Tensor, ...]:
    offset = 3 * randn(1, H, D, seed=9)  # channels of keys that are large for every token
    return randn(length, HQ, D, seed=0), randn(length, H, D, seed=1) + offset, randn(length, H, DV, seed=2)


def table(seed: int = 3) -> list[int]:
    return torch.randperm(NUM_BLOCKS, generator=torch.Generator().manual_seed(seed)).tolist()


def poison(pool: QuantizedKVPool) -> None:
    """What other sequences may have left behind."""
    for pages in (*pool.store.k, *pool.store.v):
        pages.codes.fill_(0x7E)
        pages.scale.fill_(400.0)
    for recent in (pool.store.recent_k, pool.store.recent_v):
        recent.data[:, : recent.null_row] = float("nan")


def attend(
    length: int, chunks: list[int], rule: AttentionRule, kind: str, *, row_multiple: int = 4, stale: bool = False
) -> torch.Tensor:
    """Attention of `length` tokens in `chunks`, the last ones alone where chunks do not cover them: [N, Hq, Dv]."""
    pool = QuantizedKVPool(LAYOUT, NUM_BLOCKS, kind, max_sequences=2)
    if stale:
        poison(pool)
    ring = pool.rings.allocate()
    inputs, out, start = qkv(length), [], 0
    for count in chunks + [1] * (length - sum(chunks)):
        span = Span(row=0, num_tokens=count, start=start, block_table=table(), ring=ring)
        part = [x[start : start + count].transpose(0, 1)[None] for x in inputs]
        out.append(pool.make_batch([span], row_multiple).attend(0, *part, rule)[0])
        start += count
        pool.rings.check_integrity()
    return torch.cat(out)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())
@pytest.mark.parametrize("length", [1, 63, 64, 65, 97, TILE_TOKENS + 60, 2 * TILE_TOKENS + 70])
def test_equals_a_dense_computation_with_the_same_rule(length: int, rule: AttentionRule, kind: str) -> None:
    expected = dense_attention(*qkv(length), rule, kind).float()
    got = attend(length, [max(1, length - 3)], rule, kind)
    torch.testing.assert_close(got, expected, atol=2e-5, rtol=1e-4)


def test_quantizing_shows() -> None:
    """The dense computation is not the plain one: the kinds differ where anything is quantized, and only there."""
    rule = RULES["plain"]
    by_kind = {kind: dense_attention(*qkv(200), rule, kind) for kind in KINDS}
    assert torch.equal(by_kind["int8"][:64], by_kind["int4"][:64])
    errors = [(by_kind[kind][64:] - by_kind["int8"][64:]).abs().mean() for kind in KINDS]
    assert errors[KINDS.index("int4")] > 1e-3


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())
def test_what_pages_and_rings_held_before_does_not_matter(rule: AttentionRule, kind: str) -> None:
    chunks = [200, 70]
    assert torch.equal(attend(300, chunks, rule, kind), attend(300, chunks, rule, kind, stale=True))


@dataclass
class Sequence:
    prompt: list[int]
    block_table: list[int]
    ring: int
    done: int = 0


def run(
    model: LoadedModel, pool: QuantizedKVPool, parts: list[tuple[Sequence, int]], row_multiple: int = 1
) -> list[torch.Tensor]:
    """One forward pass over the next so many tokens of each; the logits after each one's last."""
    ids, positions, spans = [], [], []
    for sequence, count in parts:
        start = sequence.done
        spans.append(
            Span(row=len(ids), num_tokens=count, start=start, block_table=sequence.block_table, ring=sequence.ring)
        )
        ids += sequence.prompt[start : start + count]
        positions += range(start, start + count)
        sequence.done += count
    batch = pool.make_batch(spans, row_multiple)
    missing = -len(ids) % row_multiple
    with torch.inference_mode():
        ids, positions = torch.tensor([ids + [0] * missing]), torch.tensor([positions + [0] * missing])
        logits = model.model(ids, position_ids=positions, use_cache=False, kv=batch).logits[0]
    return [logits[span.row + span.num_tokens - 1].float() for span in spans]


def new_sequence(pool: QuantizedKVPool, prompt: list[int], blocks: list[int]) -> Sequence:
    need = pool.blocks_for(len(prompt))
    return Sequence(prompt=prompt, block_table=[blocks.pop() for _ in range(need)], ring=pool.rings.allocate())


FAMILIES = {
    "llama": ("llama", {}),
    "window on some layers": ("qwen2-window", {}),
    "window": ("mistral-window", {}),
    "one head": ("qwen3", {"num_key_value_heads": 1}),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("family", "changes"), FAMILIES.values(), ids=FAMILIES.keys())
def test_a_model_gives_what_dense_attention_gives(family: str, changes: dict[str, int], kind: str) -> None:
    model = loaded(random_model(family, torch.float32, num_hidden_layers=2, **changes))
    prompt = random_prompt(330)
    pool = QuantizedKVPool(model.layout, 12, kind, max_sequences=1)
    sequence = new_sequence(pool, prompt, list(range(12)))
    for count in (100, 1, 1, 150, 76, 1, 1):
        (got,) = run(model, pool, [(sequence, count)], row_multiple=4)
    with torch.inference_mode():
        positions = torch.arange(len(prompt))[None]
        dense = model.model(torch.tensor([prompt]), position_ids=positions, use_cache=False, kv=DenseQuantized(kind))
    # A float32 model's codes may flip where a value lies on the edge between two, hence not closer.
    torch.testing.assert_close(got, dense.logits[0, -1], atol=2e-2, rtol=0)
    agreement = torch.nn.functional.cosine_similarity(got, dense.logits[0, -1], dim=0)
    assert agreement > 0.9999


@pytest.fixture(scope="module")
def bf16() -> LoadedModel:
    return loaded(random_model("llama", torch.bfloat16, num_hidden_layers=2))


PROMPT = random_prompt(520)


def whole_state(pool: QuantizedKVPool, sequence: Sequence) -> tuple[torch.Tensor, ...]:
    return pool.read(sequence.block_table, sequence.ring, 0, sequence.done)


@pytest.fixture(scope="module", params=KINDS)
def expected(request, bf16: LoadedModel) -> tuple[str, torch.Tensor, tuple[torch.Tensor, ...]]:
    """Logits and KV of the prompt computed in one go."""
    pool = QuantizedKVPool(bf16.layout, 20, request.param, max_sequences=1)
    sequence = new_sequence(pool, PROMPT, list(range(20)))
    (logits,) = run(bf16, pool, [(sequence, len(PROMPT))])
    return request.param, logits, whole_state(pool, sequence)


@pytest.mark.parametrize("chunk_tokens", [1, 7, 31, 32, 33, 255, 256, 257])
def test_chunks_do_not_matter(bf16: LoadedModel, expected, chunk_tokens: int) -> None:
    kind, logits, kv = expected
    pool = QuantizedKVPool(bf16.layout, 20, kind, max_sequences=1)
    sequence = new_sequence(pool, PROMPT, [block for block in table(chunk_tokens) if block < 20])
    while sequence.done < len(PROMPT):
        (got,) = run(bf16, pool, [(sequence, min(chunk_tokens, len(PROMPT) - sequence.done))])
    assert all(map(torch.equal, whole_state(pool, sequence), kv))
    assert torch.equal(got, logits)


@pytest.mark.parametrize("seed", range(3))
def test_company_does_not_matter(bf16: LoadedModel, expected, seed: int) -> None:
    """The prompt in random chunks among chunks and rows of four others, in random order."""
    kind, logits, kv = expected
    rng = random.Random(seed)
    pool = QuantizedKVPool(bf16.layout, 100, kind, max_sequences=5)
    blocks = rng.sample(range(100), 100)
    prompts = [PROMPT] + [random_prompt(rng.randint(1, 500), seed=100 * seed + i) for i in range(4)]
    sequences = [new_sequence(pool, prompt, blocks) for prompt in prompts]
    got = None
    while sequences[0].done < len(PROMPT):
        parts = []
        for sequence in rng.sample(sequences, len(sequences)):
            left = len(sequence.prompt) - sequence.done
            if left and rng.random() < 0.75:
                parts.append((sequence, min(left, rng.choice([1, 1, 2, 5, 33, 128, 256]))))
        if not parts:
            continue
        rows = run(bf16, pool, parts)
        for (sequence, _), row in zip(parts, rows, strict=True):
            got = row if sequence is sequences[0] else got
        pool.rings.check_integrity()
    assert all(map(torch.equal, whole_state(pool, sequences[0]), kv))
    assert got is not None and torch.equal(got, logits)


def test_padding_to_a_row_multiple_changes_nothing(bf16: LoadedModel, expected) -> None:
    kind, logits, kv = expected
    pool = QuantizedKVPool(bf16.layout, 20, kind, max_sequences=1)
    sequence = new_sequence(pool, PROMPT, list(range(20)))
    for count in (100, 419, 1):
        (got,) = run(bf16, pool, [(sequence, count)], row_multiple=64)
    assert all(map(torch.equal, whole_state(pool, sequence), kv))
    assert torch.equal(got, logits)


def test_the_engine_runs_on_quantized_pages(bf16: LoadedModel, expected) -> None:
    kind, logits, kv = expected
    pool = QuantizedKVPool(bf16.layout, 20, kind, max_sequences=1)
    engine = Engine(bf16, pool, row_multiple=4)
    sequence = Sequence(prompt=PROMPT, block_table=list(range(20)), ring=pool.rings.allocate())
    for count in (200, 319, 1):
        part = SequenceSlice(
            token_ids=PROMPT[sequence.done : sequence.done + count],
            start=sequence.done,
            block_table=sequence.block_table,
            need_logits=True,
            ring=sequence.ring,
        )
        got = engine.forward([part])
        sequence.done += count
    assert all(map(torch.equal, whole_state(pool, sequence), kv))
    assert torch.equal(got[0], logits)
