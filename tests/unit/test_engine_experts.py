"""Experts in bf16: pages and logits bit for bit the same whatever the chunks and whoever shares the batch, although an
expert sees as many rows as chose it."""

from __future__ import annotations

import random
import warnings

import pytest
import torch
from model_families import FAMILIES, random_ids, tiny_model
from torch import nn

import prefill.experts as experts
from prefill.engine import Engine, ScheduleVariantWarning, SequenceSlice, measured_row_multiple, prefill
from prefill.experts import expert_shapes, has_other_experts, pad_experts, router_shapes
from prefill.kv_pool import KVPool
from prefill.model import wrap_model

MOE = [name for name, spec in FAMILIES.items() if spec.has_experts]
NUM_BLOCKS = 128
LENGTH = 150


@pytest.fixture(scope="module", params=MOE)
def engine(request: pytest.FixtureRequest) -> Engine:
    model = wrap_model(tiny_model(request.param).bfloat16(), None, name=request.param, fingerprint=request.param)
    return Engine(model, KVPool(model.layout, NUM_BLOCKS))  # measures by how many rows to pad


def result(engine: Engine, logits: torch.Tensor, table: list[int]) -> tuple[torch.Tensor, ...]:
    return (logits, *engine.pool.read(table, 0, LENGTH))


@pytest.mark.parametrize("seed", range(5))
def test_chunks_and_company_do_not_matter(engine: Engine, seed: int) -> None:
    """A prompt in random chunks among chunks and rows of four others in random order, which also choose experts."""
    draw = random.Random(seed)
    order = draw.sample(range(NUM_BLOCKS), NUM_BLOCKS)
    prompts = [random_ids(LENGTH, seed=3), *(random_ids(draw.randrange(1, 200), seed=10 * seed + i) for i in range(4))]
    tables = [[order.pop() for _ in range(14)] for _ in prompts]
    expected = result(engine, prefill(engine, prompts[0], tables[0], chunk_tokens=LENGTH), tables[0])
    tables[0] = [order.pop() for _ in range(14)]
    done, logits = [0] * len(prompts), None
    while done[0] < LENGTH:
        slices, owners = [], []
        for i in draw.sample(range(len(prompts)), len(prompts)):
            left = len(prompts[i]) - done[i]
            if not left or draw.random() < 0.25:
                continue
            count = min(left, draw.choice([1, 1, 1, 2, 3, 5, 8, 33, 64]))
            tokens = prompts[i][done[i] : done[i] + count]
            slices.append(SequenceSlice(token_ids=tokens, start=done[i], block_table=tables[i], need_logits=True))
            owners.append(i)
            done[i] += count
        rows = engine.forward(slices)
        if done[0] == LENGTH and 0 in owners:
            logits = rows[owners.index(0)]
    assert logits is not None
    for got, want in zip(result(engine, logits, tables[0]), expected, strict=True):
        assert torch.equal(got, want), f"row multiple {engine.row_multiple}"


def test_rows_alone_and_in_company(engine: Engine) -> None:
    """Single rows of one token each: alone, an expert sees one row; together, up to all of them."""
    ids = random_ids(24, seed=1)

    def rows(which: range) -> torch.Tensor:
        return engine.forward(
            [SequenceSlice(token_ids=ids[i : i + 1], start=0, block_table=[i], need_logits=True) for i in which]
        )

    together = rows(range(24))
    for first, last in ((0, 1), (23, 24), (4, 6), (9, 16), (1, 24)):
        assert torch.equal(rows(range(first, last)), together[first:last])


@pytest.mark.parametrize("multiple", [1, 4, 16])
@pytest.mark.parametrize("family", MOE)
def test_padded_experts_give_what_transformers_gives(
    family: str, multiple: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, plain = tiny_model(family), tiny_model(family)
    num_layers = sum(1 for m in model.modules() if any(p.ndim == 3 for p in m.parameters(recurse=False)))
    assert pad_experts(model, multiple) == num_layers > 0 and not has_other_experts(model)
    assert has_other_experts(plain)
    seen: list[int] = []
    product = experts.grouped_product

    def watch(rows: torch.Tensor, weights: torch.Tensor, stops: torch.Tensor) -> torch.Tensor:
        assert len(rows) == stops[-1]
        seen.extend(torch.diff(stops, prepend=stops.new_zeros(1)).tolist())
        return product(rows, weights, stops)

    monkeypatch.setattr(experts, "grouped_product", watch)
    ids = torch.tensor([random_ids(33, seed=2)])
    with torch.inference_mode():
        got, want = model(ids).logits, plain(ids).logits
    torch.testing.assert_close(got, want, atol=2e-5, rtol=0)
    assert seen and all(count % multiple == 0 for count in seen)


def test_padding_is_raised_and_never_lowered() -> None:
    model = tiny_model("qwen3-moe")
    for multiple, expected in ((1, 1), (16, 16), (4, 16)):
        assert pad_experts(model, multiple) == 4
        assert {m.forward.row_multiple for m in model.modules() if hasattr(m, "gate_up_proj")} == {expected}


def test_the_row_check_looks_at_experts_and_routers(monkeypatch: pytest.MonkeyPatch) -> None:
    model = wrap_model(tiny_model("qwen3-moe").bfloat16(), None, name="moe", fingerprint="moe")
    assert expert_shapes(model.model) == [(32, 64), (64, 64)] and router_shapes(model.model) == [(64, 8)]
    engine = Engine(model, KVPool(model.layout, 8))
    monkeypatch.setattr("prefill.engine.router_shapes", lambda model: [])
    plain = measured_row_multiple(model, attention=False)
    product = experts.grouped_product

    def fickle(rows: torch.Tensor, weights: torch.Tensor, stops: torch.Tensor) -> torch.Tensor:
        return product(rows, weights, stops) + (stops[1] - stops[0]) % 64

    monkeypatch.setattr(experts, "grouped_product", fickle)
    assert measured_row_multiple(model, attention=False) == 64 > plain
    assert engine.row_multiple >= plain


class Strange(nn.Module):
    """Experts kept in another way, as gpt-oss does."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.zeros(2, 4, 4))
        self.gate_up_proj_bias = nn.Parameter(torch.zeros(2, 4))


def test_experts_that_are_not_known_are_left_alone_with_a_warning() -> None:
    network = tiny_model("llama").bfloat16()
    network.strange = Strange()
    model = wrap_model(network, None, name="strange", fingerprint="strange")
    with pytest.warns(ScheduleVariantWarning, match="keeps its experts in a way that is not known here"):
        Engine(model, KVPool(model.layout, 8))
    assert "forward" not in vars(network.strange)
    del network.strange
    with warnings.catch_warnings():
        warnings.simplefilter("error", ScheduleVariantWarning)
        Engine(model, KVPool(model.layout, 8))
