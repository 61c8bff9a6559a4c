"""The loss that calibration asks: packed questions give what separate runs give, and it sees what it should."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from scripts.calibration_loss import Document, ModelLoss, Probe


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, max_position_embeddings=512, initializer_range=0.3,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def rope_tables(start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
    angle = torch.arange(start, stop)[:, None] * 10000.0 ** (-torch.arange(0, 16, 2) / 16)
    both = torch.cat([angle, angle], dim=1)
    return both.cos(), both.sin()


CONTEXT = [(7 * i * i + 3) % 97 for i in range(150)]
PROBES = [
    Probe(tokens=[5, 6, 7, 8], targets=[9, 10]),
    Probe(tokens=[60, 61], targets=[62]),
    Probe(tokens=[1, 2, 3], targets=[4, 5, 6]),
]


def make_loss(model: LlamaForCausalLM) -> ModelLoss:
    documents = [
        Document(context=CONTEXT, probes=PROBES, kind="recall"),
        Document(context=CONTEXT[::-1], probes=PROBES[:1], kind="text"),
    ]
    return ModelLoss(model, model, rope_tables, documents)


def test_kv_as_it_was_costs_nothing_and_dropping_it_costs_much(model: LlamaForCausalLM) -> None:
    loss = make_loss(model)
    same = loss(lambda sample: (sample.k, sample.v))
    assert same["kl"] == same["delta_nll"] == same["text_kl"] == 0.0 and same["greedy_agreement"] == 1.0
    control = loss(lambda sample: (sample.k, sample.v), keep_last_tokens=16)
    noisy = loss(lambda sample: (sample.k, (sample.v.float() * 1.05).bfloat16()))
    assert control["kl"] > noisy["kl"] > 1e-6
    assert {"kl", "delta_nll", "greedy_agreement", "recall", "text_kl"} <= set(same)


def test_packed_questions_are_independent(model: LlamaForCausalLM) -> None:
    """Each question's distributions are those of a run of its own over context and question."""
    document = make_loss(model)._documents[0]
    for probe, part in zip(PROBES, document.group):
        with torch.inference_mode():
            logits = model(torch.tensor([CONTEXT + probe.tokens])).logits[0, -len(probe.targets) :]
        expected = torch.log_softmax(logits, dim=-1)
        assert torch.allclose(document.reference[part].exp(), expected.exp(), atol=0.02)  # the cache is bf16 here
