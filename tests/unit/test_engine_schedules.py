"""bf16: the same bits in pages and logits whatever the chunks and whoever shares the batch; hence the same tokens."""

from __future__ import annotations

import pytest
import torch
from engine_models import random_engine, random_prompt

from kernels.row_invariance import cancelling_example, differing_row_counts, least_row_multiple
from prefill.block_pool import BlockPool, blocks_for
from prefill.engine import Engine, SequenceSlice, SliceInvalid, generate_greedy, prefill

PROMPT = random_prompt(700)


@pytest.fixture(scope="module")
def bf16() -> tuple[Engine, BlockPool]:
    return random_engine(dtype=torch.bfloat16)


@pytest.fixture(scope="module")
def expected(bf16: tuple[Engine, BlockPool]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits and KV of the prompt computed in one go."""
    engine, allocator = bf16
    table = allocator.allocate(blocks_for(len(PROMPT), 16))
    logits = prefill(engine, PROMPT, table, chunk_tokens=len(PROMPT))
    k, v = engine.pool.read(table, 0, len(PROMPT))
    allocator.release(table)
    return logits, k, v


def shuffled_table(allocator: BlockPool, num_tokens: int, seed: int) -> list[int]:
    table = allocator.allocate(blocks_for(num_tokens, 16))
    order = torch.randperm(len(table), generator=torch.Generator().manual_seed(seed)).tolist()
    return [table[i] for i in order]


@pytest.mark.parametrize("chunk_tokens", [1, 7, 16, 64, 255, 256, 257, 300])
def test_chunks_do_not_matter(bf16, expected, chunk_tokens: int) -> None:
    engine, allocator = bf16
    table = shuffled_table(allocator, len(PROMPT), chunk_tokens)
    logits = prefill(engine, PROMPT, table, chunk_tokens=chunk_tokens)
    k, v = engine.pool.read(table, 0, len(PROMPT))
    allocator.release(table)
    assert torch.equal(k, expected[1]) and torch.equal(v, expected[2])
    assert torch.equal(logits, expected[0])


@pytest.mark.parametrize("seed", range(4))
def test_company_does_not_matter(bf16, expected, seed: int) -> None:
    """The prompt in random chunks among random chunks and rows of five other sequences, in random order."""
    engine, allocator = bf16
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high, (1,), generator=generator))

    others = [random_prompt(draw(1, 600), seed=100 * seed + i) for i in range(5)]
    prompts = [PROMPT, *others]
    tables = [shuffled_table(allocator, len(prompt), seed) for prompt in prompts]
    done = [0] * len(prompts)
    logits = None
    while done[0] < len(PROMPT):
        slices, owners = [], []
        for i in torch.randperm(len(prompts), generator=generator).tolist():
            left = len(prompts[i]) - done[i]
            if left == 0 or draw(0, 4) == 0:
                continue
            count = min(left, [1, 1, 2, 5, 33, 128, 256][draw(0, 7)])
            tokens = prompts[i][done[i] : done[i] + count]
            slices.append(
                SequenceSlice(token_ids=tokens, start=done[i], block_table=tables[i], need_logits=count == left)
            )
            owners.append(i)
            done[i] += count
        wanted = [i for item, i in zip(slices, owners, strict=True) if item.need_logits]
        rows = engine.forward(slices)
        if 0 in wanted:
            logits = rows[wanted.index(0)]
    k, v = engine.pool.read(tables[0], 0, len(PROMPT))
    for table in tables:
        allocator.release(table)
    assert torch.equal(k, expected[1]) and torch.equal(v, expected[2])
    assert logits is not None and torch.equal(logits, expected[0])


def test_tokens_of_a_batch_are_those_of_requests_alone(bf16) -> None:
    engine, allocator = bf16
    prompts = [random_prompt(length, seed=length) for length in (5, 255, 256, 300, 520)]
    steps = 12
    alone = [generate_greedy(engine, allocator, p, steps, chunk_tokens=64) for p in prompts]
    tables = [allocator.allocate(blocks_for(len(p) + steps, 16)) for p in prompts]
    slices = [
        SequenceSlice(token_ids=p, start=0, block_table=t, need_logits=True)
        for p, t in zip(prompts, tables, strict=True)
    ]
    together = [[int(row.argmax())] for row in engine.forward(slices)]
    for step in range(steps - 1):
        slices = [
            SequenceSlice(token_ids=tokens[-1:], start=len(p) + step, block_table=t, need_logits=True)
            for p, t, tokens in zip(prompts, tables, together, strict=True)
        ]
        for tokens, row in zip(together, engine.forward(slices), strict=True):
            tokens.append(int(row.argmax()))
    for table in tables:
        allocator.release(table)
    assert together == alone
    assert allocator.num_available == allocator.num_blocks


def test_padding_to_a_row_multiple_changes_nothing(bf16, expected) -> None:
    """What the engine falls back to where single rows are computed in another order."""
    engine, allocator = bf16
    padded = Engine(engine.model, engine.pool, row_multiple=64)
    table = allocator.allocate(blocks_for(len(PROMPT), 16))
    logits = prefill(padded, PROMPT, table, chunk_tokens=100)
    k, _ = engine.pool.read(table, 0, len(PROMPT))
    allocator.release(table)
    assert torch.equal(k, expected[1]) and torch.equal(logits, expected[0])


def test_the_row_check_finds_a_product_that_cares() -> None:
    left, right = torch.ones(1, 128, 4), torch.eye(4)

    def fickle(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return x @ y * (2.0 if x.shape[-2] % 16 else 1.0)

    assert differing_row_counts(fickle, left, right, [1, 16, 17, 64]) == [1, 17]
    assert least_row_multiple([(fickle, left, right)]) == 16
    assert least_row_multiple([(lambda x, y: x @ y * x.shape[-2], left, right)]) is None
    assert least_row_multiple([(lambda x, y: x + 1, left, right)]) == 1


@pytest.mark.parametrize(("depth", "batch"), [(64, None), (255, 3)])
def test_the_row_checks_examples_cancel_and_show_the_order(depth: int, batch: int | None) -> None:
    left, right = cancelling_example(40, depth, 24, dtype=torch.float32, batch=batch)
    assert left.shape[-2:] == (40, depth) and right.shape[-2:] == (depth, 24)
    assert (left.double() @ right.double()).abs().max() < 1e-12
    order = torch.randperm(depth, generator=torch.Generator().manual_seed(0))
    same = (left @ right == left[..., order] @ right[..., order, :]).float().mean()
    assert same < 0.5, "another order of the sums must be visible"


@pytest.mark.parametrize(
    ("tokens", "start", "blocks", "words"),
    [(0, 0, 1, "0 tokens"), (17, 0, 1, "do not fit 1 blocks"), (10, 4090, 256, "exceed the model's context of 4096")],
)
def test_slices_that_cannot_be_are_refused(bf16, tokens: int, start: int, blocks: int, words: str) -> None:
    engine, _ = bf16
    item = SequenceSlice(token_ids=[5] * tokens, start=start, block_table=list(range(blocks)))
    with pytest.raises(SliceInvalid, match=words):
        engine.forward([item])


def test_token_ids_out_of_the_vocabulary_are_refused(bf16) -> None:
    engine, _ = bf16
    for token in (-1, engine.model.vocab_size):
        with pytest.raises(SliceInvalid, match="not in the vocabulary of 512"):
            engine.forward([SequenceSlice(token_ids=[5, token], start=0, block_table=[0])])


def test_logits_may_be_written_to(bf16) -> None:
    engine, _ = bf16
    logits = engine.forward([SequenceSlice(token_ids=[5], start=0, block_table=[0], need_logits=True)])
    logits[0, 3] = float("-inf")
    assert logits.dtype == torch.float32 and logits.shape == (1, engine.model.vocab_size)
