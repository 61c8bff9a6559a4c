"""scripts/choose_page_mix.py: the cheapest choice within the bytes, and what it calls quantized is what pages give."""

from __future__ import annotations

import itertools
import random
from pathlib import Path

import pytest
import torch
from quantized_dense import through_blocks

from prefill.kv_layout import KVLayout
from prefill.quantized_layout import CODE_BITS, Kind, sequence_bytes
from prefill.quantized_mix import read_page_mix
from scripts.choose_page_mix import MEAN_BITS, choose, mix_of, through


@pytest.mark.parametrize("kind", MEAN_BITS)
@pytest.mark.parametrize("seed", range(8))
def test_no_choice_within_the_bits_is_cheaper(seed: int, kind: Kind) -> None:
    rng = random.Random(seed)
    sides = [(layer, is_keys) for layer in range(3) for is_keys in (True, False)]
    costs = {}
    for side in sides:
        int4 = rng.choice([1e-5, 1e-3, 1e-2]) * rng.random()
        costs[side] = {"int8": int4 / 289, "int4": int4, "int2": int4 * rng.uniform(1, 60)}
    chosen = choose(costs, kind)
    assert chosen.keys() == costs.keys()
    mix = mix_of(chosen, 3)
    assert mix.mean_bits <= MEAN_BITS[kind]

    def total(kinds: tuple[str, ...]) -> float:
        return sum(costs[side][kind] for side, kind in zip(sides, kinds, strict=True))

    allowed = (
        kinds
        for kinds in itertools.product(CODE_BITS.keys() - {"fp8"}, repeat=len(sides))
        if sum(CODE_BITS[kind] for kind in kinds) <= MEAN_BITS[kind] * len(sides)
    )
    assert total(tuple(chosen[side] for side in sides)) == pytest.approx(min(map(total, allowed)))


def test_layers_that_cost_nothing_stay_as_they_are() -> None:
    costs = {(layer, is_keys): dict.fromkeys(("int8", "int4", "int2"), 0.0) for layer in range(4) for is_keys in (0, 1)}
    assert set(choose(costs, "int4").values()) == {"int4"}


@pytest.mark.parametrize("is_keys", [True, False])
def test_it_measures_what_pages_give_back(is_keys: bool) -> None:
    x = torch.randn(150, 2, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    got = through(x, "int4", is_keys=is_keys)
    assert torch.equal(got[:96], through_blocks(x[:96], "int4", is_keys=is_keys)) and torch.equal(got[96:], x[96:])


@pytest.mark.parametrize(("kind", "times"), [("int8", 1.8), ("int4", 3.2)])
def test_the_bundled_models_mixes_hold_what_is_promised(kind: Kind, times: float) -> None:
    layout = KVLayout(num_layers=12, num_kv_heads=2, head_dim_k=64, head_dim_v=64, dtype="bfloat16")
    mix = read_page_mix(Path(__file__).parents[2] / "model", kind, layout)
    assert mix is not None and mix.mean_bits <= MEAN_BITS[kind]
    assert 3500 * layout.bytes_per_token >= times * sequence_bytes(layout, kind, 3500, mix)
