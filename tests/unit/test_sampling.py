"""decode/sampling.py: the batched form is the reference's, to the token; no row sees the others; draws follow the
distribution that was asked for."""

from __future__ import annotations

import itertools
import math
import random
from collections import Counter
from dataclasses import asdict, replace
from typing import Any

import msgpack
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import decode.sampling
from decode.logprobs import LogitsInvalid, ranked, score_tokens
from decode.requests import SamplingParams
from decode.sampling import Drawn, sample_batch
from decode.sampling_reference import sample_one
from decode.sampling_state import SamplingState, SeenTokens

LOGITS = torch.tensor([0.1, 2.0, -1.0, 1.5, 2.0, -3.0])
PINNED = [1, 4, 0, 4, 1, 3, 1, 3, 4, 1, 3, 1]
CUDA = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
DEVICES = ["cpu", pytest.param("cuda", marks=CUDA)]
VOCAB = 331  # odd, so that no row of a batch is aligned as another


def state(params: SamplingParams, prompt: tuple[int, ...] = (), output: tuple[int, ...] = (), eos: Any = ()) -> Any:
    made = SamplingState(params, prompt, eos_token_ids=eos, rng=random.Random(1))
    for token in output:
        made.record(token)
    return made


def token_of(item: Drawn | Exception) -> int:
    assert isinstance(item, Drawn), item
    return item.token_id


def draw(logits: Tensor, params: SamplingParams, num: int) -> list[int]:
    """The first `num` tokens, all under the same logits."""
    made = state(params)
    return [token_of(sample_batch(logits[None], [made])[0]) for _ in range(num)]


def frequencies(params: SamplingParams, num: int = 4000, logits: Tensor = LOGITS) -> Counter[int]:
    """Of `num` positions at once, in one batch."""
    states = []
    for position in range(num):
        made = state(params)
        made.num_output = position
        states.append(made)
    return Counter(token_of(item) for item in sample_batch(logits.repeat(num, 1), states))


token_ids = st.integers(0, VOCAB - 1)
penalties = st.sampled_from([0.0, 0.0, 0.5, -1.25, 2.0])


@st.composite
def rows(draw: st.DrawFn) -> tuple[Tensor, SamplingParams, tuple[int, ...], tuple[int, ...]]:
    """Logits, parameters, prompt and output; few distinct logits at times, so that many are equal."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    logits = torch.randn(VOCAB, generator=generator) * draw(st.sampled_from([0.1, 3.0, 30.0]))
    if draw(st.booleans()):
        logits = logits.round()
    params = SamplingParams(
        temperature=draw(st.sampled_from([0.0, 1e-6, 1e-3, 0.7, 1.0, 2.5, 100.0])),
        top_k=draw(st.sampled_from([0, 0, 1, 3, 40, 300, VOCAB, 1000])),
        top_p=draw(st.sampled_from([1.0, 1.0, 0.999999, 0.95, 0.5, 1e-9])),
        min_p=draw(st.sampled_from([0.0, 0.0, 0.02, 0.5, 1.0])),
        presence_penalty=draw(penalties),
        frequency_penalty=draw(penalties),
        repetition_penalty=draw(st.sampled_from([1.0, 1.0, 1.3, 0.7])),
        logit_bias=tuple(
            draw(st.dictionaries(token_ids, st.sampled_from([-100.0, -1.5, 3.3, 100.0]), max_size=3)).items()
        ),
        allowed_token_ids=draw(st.none() | st.lists(token_ids, min_size=4, max_size=20).map(tuple)),
        bad_words=tuple(draw(st.lists(st.lists(token_ids, min_size=1, max_size=3).map(tuple), max_size=3))),
        seed=draw(st.integers(-(2**63), 2**63 - 1)),
        stop_token_ids=tuple(draw(st.lists(token_ids, max_size=2))),
        min_tokens=draw(st.sampled_from([0, 2])),
    )
    prompt = tuple(draw(st.lists(token_ids, max_size=8)))
    output = list(draw(st.lists(token_ids, max_size=6)))
    if params.bad_words and draw(st.booleans()):
        output += params.bad_words[0][:-1]
    return logits, params, prompt, tuple(output)


@settings(deadline=None, max_examples=300)
@given(st.lists(rows(), min_size=1, max_size=4))
def test_a_batch_gives_what_the_reference_gives_row_by_row(batch: list[Any]) -> None:
    eos = (7, 8)
    states = [state(params, prompt, output, eos) for _, params, prompt, output in batch]
    logits = torch.stack([row for row, *_ in batch])
    before = logits.clone()
    drawn = sample_batch(logits, states)
    assert torch.equal(logits, before)
    for item, (row, params, prompt, output) in zip(drawn, batch):
        assert params.seed is not None
        try:
            expected = sample_one(row.tolist(), params, prompt, output, seed=params.seed, eos_token_ids=eos)
        except ValueError:
            assert isinstance(item, LogitsInvalid)
        else:
            assert token_of(item) == expected


@pytest.mark.parametrize("device", DEVICES)
@settings(deadline=None, max_examples=100)
@given(st.lists(rows(), min_size=2, max_size=6), st.randoms(use_true_random=False), st.integers(0, 5))
def test_the_rest_of_the_batch_changes_no_bit(
    device: str, batch: list[Any], shuffle: random.Random, num_logprobs: int
) -> None:
    """Tokens and logprobs, alone and in any company; also when a group holds a single row."""

    def run(order: list[int]) -> dict[int, Any]:
        made = [state(replace(batch[i][1], logprobs=num_logprobs if i % 2 else None), *batch[i][2:]) for i in order]
        logits = torch.stack([batch[i][0] for i in order]).to(device)
        return dict(zip(order, map(str, sample_batch(logits, made))))

    order = list(range(len(batch)))
    together = run(order)
    shuffle.shuffle(order)
    assert run(order) == together
    alone = {i: drawn for i in order for drawn in run([i]).values()}
    assert alone == together
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decode.sampling, "CPU_GROUP", 1)
        assert run(order) == together


def test_the_bits_are_the_same_with_one_thread_and_two() -> None:
    """In a vocabulary that torch divides among threads."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 70_001, generator=generator) * 3
    params = SamplingParams(seed=1, top_p=0.999, logprobs=3)
    threads = torch.get_num_threads()
    found = []
    try:
        for num in (1, 2):
            torch.set_num_threads(num)
            found.append([sample_batch(logits, [state(params)] * 3)[i] for i in range(3)])
    finally:
        torch.set_num_threads(threads)
    assert [token_of(item) for item in found[0]] == [token_of(item) for item in found[1]]


def test_greedy_takes_the_first_of_the_likeliest() -> None:
    greedy = SamplingParams(temperature=0)
    assert draw(LOGITS, greedy, 1) == [1]
    assert draw(torch.zeros(1000), greedy, 1) == [0]


def test_a_greedy_batch_is_one_argmax(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any) -> Any:
        raise AssertionError("nothing else is needed")

    monkeypatch.setattr(decode.sampling, "_sample_group", never)
    monkeypatch.setattr(decode.sampling, "score_tokens", never)
    greedy = [state(SamplingParams(temperature=0)) for _ in range(3)]
    assert [token_of(item) for item in sample_batch(LOGITS.repeat(3, 1), greedy)] == [1, 1, 1]


def test_a_seed_repeats_and_positions_differ() -> None:
    params = SamplingParams(seed=12)
    first = draw(LOGITS, params, 50)
    assert first == draw(LOGITS, params, 50)
    assert len(set(first)) > 2
    assert first != draw(LOGITS, SamplingParams(seed=13), 50)


def test_a_seed_pins_these_tokens() -> None:
    """Whoever changes the draw changes every seeded answer: then this list, and the changelog."""
    params = SamplingParams(seed=2**63 - 1, temperature=1.3, top_p=0.95, top_k=5)
    assert draw(LOGITS, params, 12) == PINNED


def test_without_a_seed_requests_differ() -> None:
    def tokens(rng: random.Random | None) -> list[int]:
        made = SamplingState(SamplingParams(), rng=rng)
        return [token_of(sample_batch(LOGITS[None], [made])[0]) for _ in range(40)]

    assert tokens(random.Random(1)) == tokens(random.Random(1)) != tokens(random.Random(2))
    assert tokens(None) != tokens(None)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_frequencies_are_the_softmax(temperature: float) -> None:
    """Chi-square with 5 degrees of freedom: beyond 25 once in 7,000 seeds, and this seed is fixed."""
    num = 20_000
    counts = frequencies(SamplingParams(seed=3, temperature=temperature), num)
    expected = (torch.softmax(LOGITS.double() / temperature, -1) * num).tolist()
    assert sum((counts[token] - mean) ** 2 / mean for token, mean in enumerate(expected)) < 25


def test_frequencies_over_a_large_vocabulary() -> None:
    """As many seeds as draws: shares of 16 classes of tokens, and neighbouring seeds are independent."""
    logits = torch.randn(4096, generator=torch.Generator().manual_seed(5)) * 2
    num = 8000
    states = [state(SamplingParams(seed=seed)) for seed in range(num)]
    drawn = [token_of(item) for item in sample_batch(logits.expand(num, -1), states)]
    shares = torch.softmax(logits.double(), -1).reshape(-1, 16).sum(0)
    counts = torch.bincount(torch.tensor(drawn) % 16, minlength=16)
    assert float(((counts - num * shares) ** 2 / (num * shares)).sum()) < 45  # 15 degrees of freedom: once in 13,000
    repeats = sum(a % 16 == b % 16 for a, b in itertools.pairwise(drawn)) / num
    assert abs(repeats - float((shares**2).sum())) < 0.02


def test_top_k_top_p_and_min_p_cut_the_tail() -> None:
    def drawn(**fields: Any) -> set[int]:
        return set(frequencies(SamplingParams(seed=3, **fields)))

    assert drawn(top_k=2) == {1, 4}
    assert drawn(top_k=3) == {1, 3, 4}
    assert drawn(top_k=1) == {1}
    # shares: 1 and 4 0.35 each, 3 0.21, 0 0.05, 2 0.02
    assert drawn(top_p=0.3) == {1}
    assert drawn(top_p=0.6) == {1, 4}
    assert drawn(top_p=0.8) == {1, 3, 4}
    assert drawn(top_p=0.0) == {1}
    assert drawn(top_k=3, top_p=0.7) == {1, 4}  # of three: 0.38, 0.38, 0.23
    assert drawn(top_k=100, top_p=1.0) == {0, 1, 2, 3, 4, 5}
    assert drawn(min_p=0.5) == {1, 3, 4}
    assert drawn(min_p=0.1) == {0, 1, 3, 4}


def test_penalties_hit_what_vllm_says_they_hit() -> None:
    """Presence and frequency the output only, repetition the prompt too."""
    logits = torch.tensor([5.0, 4.5, 4.0, -1.0])
    greedy = SamplingParams(temperature=0)

    def token(output: tuple[int, ...], **fields: Any) -> int:
        made = state(replace(greedy, **fields), (0,), output)
        return token_of(sample_batch(logits[None], [made])[0])

    assert token((1,), presence_penalty=2.0) == 0
    assert token((0,), presence_penalty=0.6) == 1
    assert token((0, 0), presence_penalty=0.4) == 0
    assert token((0, 0), frequency_penalty=0.4) == 1
    assert token((), repetition_penalty=1.2) == 1
    assert token((1,), repetition_penalty=1.2) == 0  # 4.17, 3.75, 4: both seen
    assert token((1,), repetition_penalty=1.3) == 2


def test_counts_grow_token_by_token() -> None:
    seen = SeenTokens((3, 3, 9))
    for token in [9, *range(100, 300), 9]:
        seen.add(token)
    assert dict(zip(seen.ids.tolist(), seen.counts.tolist())) == {3: 0, 9: 2} | dict.fromkeys(range(100, 300), 1)


def test_no_end_before_min_tokens() -> None:
    made = state(SamplingParams(temperature=0, min_tokens=2, stop_token_ids=(4,)), eos=(1,))
    assert [token_of(sample_batch(LOGITS[None], [made])[0]) for _ in range(3)] == [3, 3, 1]


def test_bias_allowed_and_bad_words() -> None:
    def tokens(num: int = 1, **fields: Any) -> list[int]:
        return draw(LOGITS, SamplingParams(temperature=0, **fields), num)

    assert tokens(logit_bias=((5, 100.0),)) == [5]
    assert tokens(logit_bias=((1, -100.0), (4, -100.0))) == [3]
    assert tokens(allowed_token_ids=(0, 2)) == [0]
    assert tokens(bad_words=((1,),)) == [4]
    assert tokens(4, bad_words=((1, 1), (4, 1, 4))) == [1, 4, 1, 3]


@pytest.mark.parametrize("greedy", [0, 1])
def test_an_error_stays_in_its_row(greedy: int) -> None:
    logits = LOGITS.repeat(6, 1)
    logits[1, 3] = math.nan
    logits[2, 0] = math.inf
    logits[3] = -math.inf
    params = SamplingParams(temperature=1 - greedy, seed=4, logprobs=1)
    states = [state(params) for _ in range(6)]
    states[4] = state(replace(params, logit_bias=((len(LOGITS), 1.0),)))
    drawn = sample_batch(logits, states)
    assert [isinstance(item, Exception) for item in drawn] == [False, True, True, True, True, False]
    assert drawn[0] == drawn[5] == sample_batch(LOGITS[None], [state(params)])[0]
    assert [made.num_output for made in states] == [1, 0, 0, 0, 0, 1]
    for item, words in zip(drawn[1:5], ("NaN", "infinite", "no token is allowed", "out of bounds")):
        assert words in str(item)


def test_an_empty_batch() -> None:
    assert sample_batch(torch.empty(0, 8), []) == []


@settings(deadline=None)
@given(st.lists(st.sampled_from([-math.inf, -1.0, 0.0, 0.5, 2.0]), min_size=1, max_size=30), st.integers(0, 30))
def test_ranks(values: list[float], num: int) -> None:
    num = min(num, len(values))
    expected = sorted(range(len(values)), key=lambda token: (-values[token], token))[:num]
    found = ranked(torch.tensor([values, values]), num)
    finite = [token for token in expected if values[token] > -math.inf]
    assert found[0].tolist() == found[1].tolist()
    assert found[0].tolist()[: len(finite)] == finite
    assert len(set(found[0].tolist())) == num


def test_logprobs_are_of_the_models_own_distribution() -> None:
    params = SamplingParams(seed=1, temperature=0.2, top_k=2, logit_bias=((3, 1.5),), presence_penalty=1, logprobs=3)
    made = state(params, (), (4,))
    (drawn,) = sample_batch(LOGITS[None], [made])
    assert isinstance(drawn, Drawn) and drawn.logprobs is not None
    expected = torch.log_softmax(LOGITS.double(), -1).tolist()
    assert drawn.logprobs.logprob == pytest.approx(expected[drawn.token_id])
    assert [token for token, _ in drawn.logprobs.top] == [1, 4, 3]
    assert [value for _, value in drawn.logprobs.top] == pytest.approx([expected[token] for token in (1, 4, 3)])


def test_scores_of_given_tokens() -> None:
    logits = torch.stack([LOGITS, torch.full_like(LOGITS, math.nan), LOGITS])
    first, bad, last = score_tokens(logits, [5, 0, 4], [0, 2, 100])
    assert isinstance(bad, LogitsInvalid)
    assert not isinstance(first, Exception) and not isinstance(last, Exception)
    assert (first.rank, first.top) == (6, ())
    assert (last.rank, [token for token, _ in last.top]) == (1, [1, 4, 3, 0, 2, 5])


def test_parameters_come_back_from_the_wire() -> None:
    full = SamplingParams(
        logit_bias=((5, 1.0),), allowed_token_ids=(5, 6), bad_words=((1, 2), (3,)), stop_token_ids=(9,)
    )
    for params in (SamplingParams(), full):
        assert SamplingParams.from_wire(msgpack.unpackb(msgpack.packb(asdict(params)))) == params
