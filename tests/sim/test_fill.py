"""The fill machine in virtual time: it ends, as fast as the best fixed way, and spends slack on quality."""

from __future__ import annotations

import random

import pytest
from fill_world import LEVELS, World

from decode.fill import TEXT
from decode.fill_events import Fail, SourceLost

MBIT = 1e6 / 8


def run_s(**options) -> float:
    world = World(**options)
    world.run()
    return world.now


@pytest.mark.parametrize("mbps", [1, 3, 10, 20, 50, 100, 200, 400, 1000, 3000, 10000])
def test_as_fast_as_the_best_fixed_way_on_a_constant_link(mbps: float) -> None:
    rate = lambda now: mbps * MBIT  # noqa: E731
    auto = run_s(rate=rate)
    text = run_s(rate=rate, may_load=False)
    raw = run_s(rate=rate, levels=("raw",), may_compute=False)
    fixed = run_s(rate=rate, levels=("q3",), may_compute=False)
    # One part of a chunk may be under way or computed when the plans change, hence the small allowance.
    assert auto <= 1.05 * min(text, raw, fixed) + 0.005, (auto, text, raw, fixed)


@pytest.mark.parametrize("mbps", [10, 50, 200, 1000])
def test_slack_buys_quality(mbps: float) -> None:
    rate = lambda now: mbps * MBIT  # noqa: E731
    fixed = {level: run_s(rate=rate, levels=(level,), may_compute=False) for level in LEVELS}
    for level in LEVELS:
        target = 1.3 * fixed[level] + 0.1  # the tail takes 0.03
        world = World(rate=rate, ttft_s=target)
        machine = world.run()
        worst = max(LEVELS.index(chunk.level) for chunk in machine.chunks if chunk.level != TEXT)
        assert worst <= LEVELS.index(level)
        assert world.now <= target


def test_a_link_that_drops_tenfold_changes_level_and_recomputes() -> None:
    world = World(rate=lambda now: (60 if now < 0.25 else 6) * MBIT, ttft_s=0.9)
    machine = world.run()
    used = {chunk.level for chunk in machine.chunks}
    assert TEXT in used and len(used - {TEXT}) >= 2, used
    assert world.now < 1.3


def test_a_large_chunk_on_a_link_that_became_slow_is_asked_for_anew() -> None:
    world = World(rate=lambda now: (400 if now < 0.1 else 8) * MBIT, ttft_s=0.7, may_compute=False)
    machine = world.run()
    assert any("asked for anew" in reason for _, reason in machine.reasons)
    # 8 Mbit/s bring a coarsest chunk in 0.11 s; sticking to the raw chunk on its way would take 1.5 s alone.
    assert world.now < 2.0


def test_a_link_that_dies_is_finished_by_computing() -> None:
    world = World(rate=lambda now: 50 * MBIT if now < 0.3 else 0.0, ttft_s=0.6)
    machine = world.run()
    assert machine.chunks[0].level == TEXT
    assert world.now < 0.3 + 13 * 256 * world.token_s + 0.5


def test_a_lost_source_without_the_right_to_compute_fails() -> None:
    world = World(rate=lambda now: 1 * MBIT, may_compute=False, levels=("raw",))
    world._at(1.0, SourceLost(reason="peer gone"))
    machine = world.run()
    assert machine.done
    assert isinstance(world.log[-1][1], Fail) and "peer gone" in world.log[-1][1].message


def test_all_text_without_a_source() -> None:
    machine = World(rate=lambda now: 1.0, may_load=False).run()
    assert {chunk.level for chunk in machine.chunks} == {TEXT}


@pytest.mark.parametrize("seed", range(60))
def test_random_links_always_end_and_never_compute_above_a_hole(seed: int) -> None:
    rng = random.Random(seed)
    steps = [(rng.uniform(0, 3), 10 ** rng.uniform(5, 9)) for _ in range(rng.randint(1, 8))]
    first = 10 ** rng.uniform(5, 9)

    def rate(now: float) -> float:
        current = first
        for at, value in sorted(steps):
            if now >= at:
                current = value
        return current

    World(
        rate=rate,
        num_chunks=rng.randint(0, 40),
        ttft_s=rng.choice([0.0, 0.2, 1.0, 5.0]),
        prior_rate=10 ** rng.uniform(5, 9),
        stored=rng.random() < 0.7,
        token_s=10 ** rng.uniform(-5, -3),
    ).run()


@pytest.mark.parametrize("ttft_s", [0.0, 0.3, 1.0, 3.0])
def test_a_live_prefill_is_loaded_or_computed_but_not_both(ttft_s: float) -> None:
    """On a fast link the source's work is used; nothing flips to and fro."""
    world = World(rate=lambda now: 1000 * MBIT, stored=False, ttft_s=ttft_s, live_chunk_s=0.066)
    machine = world.run()
    assert sum(chunk.level == TEXT for chunk in machine.chunks) in (0, len(machine.chunks))
    assert len(machine.reasons) <= 4, machine.reasons
    assert world.now < 1.15 * 13 * 0.066
