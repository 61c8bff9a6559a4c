"""The loss that calibration asks: packed questions give what separate runs give, and it sees what it should."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from codec.allocate import Sample, plain_rows
from scripts import model_data
from scripts.calibration_documents import Document, Probe, make_documents, read_text, split_tokens
from scripts.calibration_loss import ModelLoss, _standard_error, _turn_back

ROOT = Path(__file__).resolve().parents[2]


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
        Document(context=CONTEXT[40:], probes=PROBES[2:], kind="text"),
    ]
    return ModelLoss(model, model, rope_tables, documents)


def test_kv_as_it_was_costs_nothing_and_dropping_it_costs_much(model: LlamaForCausalLM) -> None:
    loss = make_loss(model)
    same = loss(lambda sample: (sample.k, sample.v))
    assert same["kl"] == same["delta_nll"] == same["text_kl"] == 0.0 and same["greedy_agreement"] == 1.0
    control = loss(lambda sample: (sample.k, sample.v), keep_last_tokens=16)
    noisy = loss(lambda sample: (sample.k, (sample.v.float() * 1.05).bfloat16()))
    assert control["kl"] > noisy["kl"] > 1e-6
    for measures in (control, noisy):
        assert measures["kl"] == max(measures["answers_far_kl"], measures["text_far_kl"])
        assert measures["delta_nll"] == max(measures["answers_delta_nll"], measures["text_delta_nll"])
        assert measures["text_delta_nll_error"] > 0 and 0 <= measures["recall"] <= 1


def test_tokens_that_depend_on_the_context_are_told_apart(model: LlamaForCausalLM) -> None:
    loss = make_loss(model)
    counts = loss.counts
    assert counts["answers"]["documents"] == 1 and counts["answers"]["probes"] == 3
    assert counts["answers"]["tokens"] == 6 and counts["text"]["tokens"] == 5
    for document in loss._documents:
        near = loss._continue(document, (document.sample.k, document.sample.v), keep_last_tokens=64)
        moved = (near - document.reference).gather(1, document.targets[:, None])[:, 0].abs()
        assert torch.equal(moved > 0.1, document.depends)


def test_packed_questions_are_independent(model: LlamaForCausalLM) -> None:
    """Each question's distributions are those of a run of its own over context and question."""
    document = make_loss(model)._documents[0]
    for probe, part in zip(PROBES, document.group):
        with torch.inference_mode():
            logits = model(torch.tensor([CONTEXT + probe.tokens])).logits[0, -len(probe.targets) :]
        expected = torch.log_softmax(logits, dim=-1)
        assert torch.allclose(document.reference[part].exp(), expected.exp(), atol=0.02)  # the cache is bf16 here


def test_the_fisher_information_foretells_the_kl(model: LlamaForCausalLM) -> None:
    loss = make_loss(model)
    fisher = loss.fisher(draws=400)
    assert fisher.k_turned.shape == fisher.k.shape == fisher.v.shape == (2, 2, 1, 16, 16)
    assert np.allclose(np.trace(fisher.k, axis1=-2, axis2=-1), np.trace(fisher.k_turned, axis1=-2, axis2=-1))
    for which, f in ((0, fisher.k), (1, fisher.v)):
        weight = f.mean(axis=0)[0, 0]
        values, vectors = np.linalg.eigh(weight)
        costs = {}
        for name, direction in (("dear", vectors[:, -1]), ("cheap", vectors[:, 0])):

            def moved(
                sample: Sample, which: int = which, direction: np.ndarray = direction
            ) -> tuple[torch.Tensor, ...]:
                generator = torch.Generator().manual_seed(1)
                out = [sample.k.float(), sample.v.float()]
                sign = torch.randint(0, 2, (out[0].shape[1], 1), generator=generator) * 2.0 - 1
                out[which][0, :, 0] += 0.03 * sign * torch.from_numpy(direction).float()
                return out[0], out[1]

            far = [
                (d.reference.exp() * (d.reference - loss._continue(d, moved(d.sample)))).sum(-1)[d.depends].mean()
                for d in loss._documents
                if d.depends.any()
            ]
            costs[name] = float(torch.stack(far).mean())
        expected = 0.5 * 0.03**2 * values[-1]
        assert costs["cheap"] < costs["dear"] and expected / 4 < costs["dear"] < 4 * expected


def test_gradients_turn_back_as_keys_do(model: LlamaForCausalLM) -> None:
    """Pushing a key before RoPE along g and after RoPE along the rotated g is the same: <g_plain, e> = <g, R e>."""
    sample = make_loss(model).samples[0]
    assert sample.rope is not None
    gradient = torch.randn(sample.k.shape, generator=torch.Generator().manual_seed(0))
    turned = _turn_back(gradient, sample.rope)
    plain = plain_rows(sample, 0, 1, 0, is_turned=True)
    cached = plain_rows(sample, 0, 1, 0, is_turned=False)
    assert float((turned[1, :, 0] * torch.from_numpy(plain)).sum()) == pytest.approx(
        float((gradient[1, :, 0] * torch.from_numpy(cached)).sum()), rel=1e-3
    )


def test_standard_errors_count_documents_not_tokens() -> None:
    generator = torch.Generator().manual_seed(0)
    shared = [torch.full((50,), float(x)) for x in torch.randn(40, generator=generator)]
    own = [torch.randn(50, generator=generator) for _ in range(40)]
    assert _standard_error(shared) == pytest.approx(40**-0.5, rel=0.3)
    assert _standard_error(own) == pytest.approx(2000**-0.5, rel=0.3)


def test_text_is_read_from_files_and_folders_and_split_without_overlap(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "two.md").write_text("two")
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "c.bin").write_bytes(b"\xff")
    assert read_text(tmp_path) == "one\n\ntwo" and read_text(tmp_path / "a.txt") == "one"
    with pytest.raises(FileNotFoundError):
        read_text(tmp_path / "none")
    parts = split_tokens(range(1000), 90)
    assert sorted(parts[0] + parts[1]) == list(range(1000)) and len(parts[0]) >= 400 <= len(parts[1])
    assert min(parts[1]) < 400 and max(parts[0]) > 600


def test_documents_are_seeded_half_hard_and_text_only_without_markers() -> None:
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "model")
    filler = model_data.encode(tokenizer, read_text(ROOT / "model" / "heldout.txt")[:40_000])

    def make(seed: int) -> list[Document]:
        return make_documents(
            tokenizer, filler, recall_lengths=(400, 400, 500, 500), text_lengths=(300, 200), num_facts=6, seed=seed
        )

    documents = make(1)
    assert documents == make(1) and documents != make(2)
    assert [d.kind for d in documents] == ["recall"] * 4 + ["text"] * 2
    unseen = [any(name in tokenizer.decode(d.context) for name in model_data.UNSEEN_NAMES) for d in documents[:4]]
    assert unseen == [False, True, False, True]
    for document in documents:
        assert all(len(p.tokens) >= len(p.targets) for p in document.probes)

    class Plain:
        """A tokenizer without our markers."""

        bos_token_id = None

        def convert_tokens_to_ids(self, token: str) -> None:
            return None

    plain = make_documents(Plain(), filler, recall_lengths=(400,), text_lengths=(300,), num_facts=6, seed=1)
    assert [d.kind for d in plain] == ["text", "text"] and {len(d.context) for d in plain} == {300, 400}
