"""Fills of models with sliding windows, in virtual time: no query ever sees a missing key (the world checks every one),
whatever links, sources and holes do, and less is sent."""

from __future__ import annotations

import random
from typing import Any

import pytest
from fill_world import LEVELS, SIZES, World

from decode.fill_chunks import TEXT
from decode.fill_events import Ask, Compute, Decode, Discard, Fail
from decode.link_scheduler import Kind
from decode.replay import Replay
from prefill.chunks import split_part

MBIT = 1e6 / 8
GEMMA = (600, 600, None) * 2
MISTRAL = (600,) * 4


def ran(**options: Any) -> World:
    world = World(**options)
    world.run()
    return world


@pytest.mark.parametrize("seed", range(150))
def test_no_query_sees_a_missing_key(seed: int) -> None:
    rng = random.Random(seed)
    num_chunks, num_sources = rng.randint(1, 16), rng.randint(1, 3)
    kinds = [None, rng.randint(1, 900), rng.randint(1, 5000)]
    rates = [rng.choice([0.3, 3, 30, 300]) * MBIT for _ in range(2 * num_sources)]
    change_at = rng.uniform(0.0, 0.5)
    links = [lambda now, i=i: rates[2 * i + (now > change_at)] for i in range(num_sources)]
    is_holey = rng.random() < 0.5
    world = World(
        rate=links[0],
        more_rates=tuple(links[1:]),
        num_chunks=num_chunks,
        windows=tuple(rng.choice(kinds) for _ in range(rng.randint(1, 6))),
        ttft_s=rng.choice([0.0, 0.3, 1.0, 3.0]),
        levels=LEVELS[rng.randrange(3) :],
        refine_levels=rng.choice([(), ("q1", "q2", "q3")]),
        stored=is_holey or rng.random() < 0.6,
        live_chunk_s=rng.choice([0.0, 0.05]),
        token_s=rng.choice([2.5e-4, 2e-3]),
        not_here=tuple(
            frozenset(i for i in range(num_chunks) if rng.random() < 0.3) for _ in range(num_sources)
        ) * is_holey,
    )  # fmt: skip
    for source in range(num_sources):
        if rng.random() < 0.5:
            delay_s, is_final = rng.uniform(0.0, 1.0), rng.random() < 0.5
            world.cut(source, delay_s, rng.uniform(0.1, 15.0), is_final=is_final)
    machine = world.run()
    failed = [command for _, command in world.log if isinstance(command, Fail)]
    assert machine.ready and not failed, (seed, failed)
    assert not machine.loader._windows.has_windows or set(world.layers) == set(range(num_chunks))


@pytest.mark.parametrize(("windows", "share"), [(GEMMA, 1 / 3), (MISTRAL, 0.0)])
@pytest.mark.parametrize("stored", [True, False])
def test_what_is_sent_is_what_windows_leave(windows: tuple[int | None, ...], share: float, stored: bool) -> None:
    world = ran(
        rate=lambda now: 100 * MBIT, windows=windows, stored=stored, levels=("lossless",), may_compute=False,
        num_chunks=20,
    )  # fmt: skip
    # 599 tokens before the tail are seen: the last three chunks.
    assert world.sent_bytes == pytest.approx(SIZES["lossless"] * (3 + 17 * share), rel=1e-5)
    empty = [command for _, command in world.log if isinstance(command, Decode) and command.layers == ()]
    assert len(empty) == (17 if share == 0 else 0)


@pytest.mark.parametrize("mbps", [1, 3, 10, 30, 100, 300, 1000])
@pytest.mark.parametrize("windows", [GEMMA, MISTRAL])
def test_as_fast_as_the_best_fixed_way(mbps: float, windows: tuple[int | None, ...]) -> None:
    """The plan knows how little is to be sent: no level alone, and no text alone, is faster."""
    options: dict[str, Any] = {"rate": lambda now: mbps * MBIT, "windows": windows, "num_chunks": 16}
    auto = ran(**options).ready_at
    text = ran(**options, may_load=False).ready_at
    fixed = [ran(**options, levels=(level,), may_compute=False).ready_at for level in LEVELS]
    assert auto is not None and auto <= 1.05 * min(text, *fixed) + 0.01, (auto, text, fixed)


@pytest.mark.parametrize("mbps", [30, 60, 100])
def test_chunks_that_are_computed_lie_before_those_that_are_loaded(mbps: float) -> None:
    """On a steady link nothing is loaded in vain: the front is computed, the back loaded."""
    world = ran(rate=lambda now: mbps * MBIT, windows=GEMMA, num_chunks=16, token_s=5e-4, levels=("lossless",))
    computed = [command.chunk for _, command in world.log if isinstance(command, Compute)]
    assert computed == list(range(len(computed))) and 0 < len(computed) < 16
    assert not any(isinstance(command, Discard) for _, command in world.log)


def test_a_live_link_that_dies_has_in_part_loaded_chunks_computed_again() -> None:
    world = World(rate=lambda now: 30 * MBIT, windows=MISTRAL, stored=False, levels=("lossless",), num_chunks=16)
    world.prior_rate = 3000 * MBIT
    world.cut(0, 0.5, 100.0, is_final=True)
    world.run()
    computed = [command.chunk for _, command in world.log if isinstance(command, Compute)]
    # Chunk 13 had come whole, as the tail sees it.
    assert computed == [*range(13), 14, 15], "queries of the chunks on which it goes on see what was left out"
    assert any(isinstance(command, Discard) for _, command in world.log)


@pytest.mark.parametrize("stored", [True, False])
def test_what_is_computed_again_counts_towards_what_may_be_computed(stored: bool) -> None:
    drops = lambda now: (50 if now < 0.4 else 0.3) * MBIT  # noqa: E731
    for most in (0, 3, 8, 15):
        world = ran(
            rate=drops, windows=MISTRAL, num_chunks=16, levels=("q1",), stored=stored, max_compute=most, token_s=1e-4
        )
        computed = [command for _, command in world.log if isinstance(command, Compute)]
        assert len(computed) <= most, (most, computed)


def test_a_hole_in_the_middle_is_computed_on_what_it_sees() -> None:
    """The source has all but chunk 9: what that one sees is loaded whole at once, nothing twice."""
    for windows, whole in ((GEMMA, {6, 7, 8, 13, 14, 15}), (MISTRAL, {6, 7, 8, 13, 14, 15})):
        world = ran(
            rate=lambda now: 1000 * MBIT, windows=windows, num_chunks=16, levels=("lossless",), token_s=1e-2,
            not_here=(frozenset({9}),),
        )  # fmt: skip
        hole_is_seen = windows == GEMMA
        loaded = [command for _, command in world.log if isinstance(command, Decode)]
        assert len(loaded) == (15 if hole_is_seen else 16)
        assert [command.chunk for _, command in world.log if isinstance(command, Compute)] == [9] * hole_is_seen
        found = {command.chunk for command in loaded if command.layers is None}
        assert found == (whole if hole_is_seen else {13, 14, 15})
        assert not any(isinstance(command, Discard) for _, command in world.log)


def test_a_plan_that_is_followed_computes_what_it_says() -> None:
    levels = ("lossless",) * 6 + (TEXT,) * 2 + ("q1",) * 8
    world = ran(
        rate=lambda now: 100 * MBIT, windows=MISTRAL, num_chunks=16, replay=Replay(levels=levels, steps=()), levels=()
    )
    assert [command.chunk for _, command in world.log if isinstance(command, Compute)] == [6, 7]
    assert world.machine.chunks[5].layers is None and world.machine.chunks[0].layers == ()


def test_refinements_name_the_layers_of_what_they_refine() -> None:
    world = ran(
        rate=lambda now: 20 * MBIT, windows=GEMMA, num_chunks=16, levels=("q3",), refine_levels=("q1", "q2", "q3"),
        may_compute=False,
    )  # fmt: skip
    asks = [command for _, command in world.log if isinstance(command, Ask)]
    base = {command.chunk: split_part(command.level)[1] for command in asks if command.kind is Kind.BASE}
    finer = [command for command in asks if command.kind is Kind.LATER]
    assert {command.chunk for command in finer} == set(range(16))
    assert all(split_part(command.level)[1] == base[command.chunk] for command in finer)
    assert {log.level for log in world.machine.chunks} == {"q1"}


def test_chunks_that_windows_have_left_are_not_refined() -> None:
    """The answer moves the window: what is out of it by then is left as it is."""
    world = World(
        rate=lambda now: (10 if now < 0.1 else 0.01) * MBIT, windows=MISTRAL, num_chunks=16, levels=("q3",),
        refine_levels=("q1", "q2", "q3"), may_compute=False, token_every_s=0.01,
    )  # fmt: skip
    machine = world.run()
    refined = {index for index, log in enumerate(machine.chunks) if log.refinements}
    assert refined and not refined & set(range(13)) and refined < {13, 14, 15}
    # Each step takes seconds, in which hundreds of tokens are drawn.
    assert all(machine.chunks[index].level == "q3" for index in {13, 14, 15} - refined)


@pytest.mark.parametrize("windows", [GEMMA, MISTRAL])
@pytest.mark.parametrize("stored", [True, False])
def test_a_link_that_becomes_a_trickle_does_not_hold_the_request(windows: tuple[int | None, ...], stored: bool) -> None:
    """Also where that means to compute again what lies below in part."""
    drops = lambda now: (50 if now < 0.4 else 0.01) * MBIT  # noqa: E731
    world = ran(rate=drops, windows=windows, num_chunks=16, levels=("lossless",), stored=stored)
    assert world.ready_at is not None and world.ready_at < 0.4 + 16 * 256 * world.token_s + 1.5
