"""decode/sampling.py: seeded draws repeat, and follow the distribution they were asked for."""

from __future__ import annotations

import random
from collections import Counter

import pytest
import torch

from decode.requests import SamplingParams
from decode.sampling import sample

LOGITS = torch.tensor([0.1, 2.0, -1.0, 1.5, 2.0, -3.0])
PINNED = [4, 1, 1, 4, 1, 1, 4, 4, 1, 4, 4, 3]


def draws(params: SamplingParams, num: int = 4000) -> Counter[int]:
    return Counter(sample(LOGITS, params, step) for step in range(num))


def test_greedy_takes_the_first_of_the_likeliest() -> None:
    assert sample(LOGITS, SamplingParams(temperature=0), 0) == 1
    tied = torch.zeros(1000)
    assert sample(tied, SamplingParams(temperature=0), 5) == 0


def test_a_seed_repeats_and_steps_differ() -> None:
    params = SamplingParams(seed=12)
    first = [sample(LOGITS, params, step) for step in range(50)]
    assert first == [sample(LOGITS, params, step) for step in range(50)]
    assert len(set(first)) > 2
    assert first != [sample(LOGITS, SamplingParams(seed=13), step) for step in range(50)]


def test_a_seed_pins_these_tokens() -> None:
    """Whoever changes the draw changes every seeded answer: then this list, and the changelog."""
    params = SamplingParams(seed=2**63, temperature=1.3, top_p=0.95, top_k=5)
    assert [sample(LOGITS, params, step) for step in range(12)] == PINNED


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_frequencies_are_the_softmax(temperature: float) -> None:
    counts = draws(SamplingParams(seed=3, temperature=temperature))
    expected = torch.softmax(LOGITS / temperature, -1)
    for token, share in enumerate(expected.tolist()):
        assert abs(counts[token] / 4000 - share) < 0.025


def test_top_k_and_top_p_cut_the_tail() -> None:
    assert set(draws(SamplingParams(seed=3, top_k=2))) == {1, 4}
    assert set(draws(SamplingParams(seed=3, top_k=3))) == {1, 3, 4}
    # shares: 1 and 4 0.35 each, 3 0.21, 0 0.05, 2 0.02
    assert set(draws(SamplingParams(seed=3, top_p=0.6))) == {1, 4}
    assert set(draws(SamplingParams(seed=3, top_p=0.8))) == {1, 3, 4}
    assert set(draws(SamplingParams(seed=3, top_p=0.0))) == {1}
    assert set(draws(SamplingParams(seed=3, top_k=100, top_p=1.0))) == {0, 1, 2, 3, 4, 5}


def test_without_a_seed_the_generator_decides() -> None:
    params = SamplingParams()
    one, two = random.Random(1), random.Random(1)
    assert [sample(LOGITS, params, s, one) for s in range(20)] == [sample(LOGITS, params, s, two) for s in range(20)]
    with pytest.raises(AssertionError, match="random generator"):
        sample(LOGITS, params, 0)
