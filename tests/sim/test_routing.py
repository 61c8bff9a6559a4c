"""Routes in virtual time: what they cost against serving aggregated, and what becomes of conversations."""

from __future__ import annotations

import itertools
import random
from collections import Counter

import pytest
from route_world import CHUNK, Asked, Figures, Speeds, World, again, poisson

from cluster.route_costs import RouteWeights

PROMPTS, ANSWERS = (500, 4000), (5, 60)


def requests_at(load: float, num: int, *, seed: int, workers: int = 4) -> list[Asked]:
    """So many that `workers` would be busy for `load` of the time with prompts alone."""
    rate = load * workers / (sum(PROMPTS) / 2 * Speeds().token_s)
    return poisson(num, rate=rate, prompt_tokens=PROMPTS, output_tokens=ANSWERS, seed=seed)


def busy_for(
    load: float, num: int, *, prompts: tuple[int, int], answers: tuple[int, int], seed: int, workers: int = 4
) -> list[Asked]:
    """So many that `workers` would be busy for `load` of the time with prompts and, eight rows a step, answers."""
    speeds = Speeds()
    each_s = sum(prompts) / 2 * speeds.token_s + sum(answers) / 2 * (speeds.row_s + speeds.step_s / 8)
    return poisson(num, rate=load * workers / each_s, prompt_tokens=prompts, output_tokens=answers, seed=seed)


def served(requests: list[Asked], **options: object) -> list[Asked]:
    fresh = again(requests)
    World(**options).run(fresh)  # type: ignore[arg-type]
    return fresh


# -- the rule: never slower than aggregated -------------------------------------------------------------------------


@pytest.mark.parametrize("load", [0.3, 0.8])
@pytest.mark.parametrize(("weights", "bound"), [(RouteWeights(disturbance=0.0), 1.10), (RouteWeights(), 1.35)])
def test_no_request_is_slower_than_it_would_have_been_alone(weights: RouteWeights, bound: float, load: float) -> None:
    """Each request once more in the same situation, this time computed on the best decode worker. Without a price for
    disturbance it is not slower through a prefill worker, with one at most by that price; up to errors of the
    estimates, which know chunks and not what is left of a pass."""
    requests = requests_at(load, 24, seed=7)
    shares, through = [], 0
    for last in range(len(requests)):
        now = served(requests[: last + 1], num_prefill=2, num_decode=2, report_s=0, weights=weights)[-1]
        assert now.route is not None
        if now.route.is_aggregated:
            continue
        through += 1
        at = requests[last].at
        alone = served(
            requests[: last + 1],
            num_prefill=2,
            num_decode=2,
            report_s=0,
            weights=weights,
            way=lambda asked, at=at: "compute" if asked.at == at else "auto",
        )[-1]
        assert alone.route is not None and alone.route.is_aggregated
        shares.append(now.ttft_s / alone.ttft_s)
    assert through >= 4, "there was something to judge"
    assert max(shares) < bound, shares
    assert sum(shares) / len(shares) < 1.02, shares


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("load", [0.3, 0.6, 0.9])
def test_two_and_two_against_four_aggregated_on_the_same_cores(load: float, seed: int) -> None:
    """Prompts as they come, reports a second old: prefill workers make first tokens and whole answers no later, and
    under load sooner, than if they were decode workers, too."""
    requests = requests_at(load, 150, seed=seed)
    mix = Figures.of(served(requests, num_prefill=2, num_decode=2))
    aggregated = Figures.of(served(requests, num_prefill=0, num_decode=4))
    assert mix.mean(mix.ttft) < 1.06 * aggregated.mean(aggregated.ttft)
    assert mix.quantile(mix.ttft, 0.95) < 1.10 * aggregated.quantile(aggregated.ttft, 0.95)
    assert mix.mean(mix.e2e) < 1.12 * aggregated.mean(aggregated.e2e)
    if load > 0.8:
        assert mix.mean(mix.ttft) < 0.95 * aggregated.mean(aggregated.ttft)


# -- prefill workers that decode too --------------------------------------------------------------------------------

COMPANIONS = {"num_prefill": 2, "num_decode": 2, "companions": True}


@pytest.mark.parametrize("load", [0.2, 0.5, 0.8])
@pytest.mark.parametrize(
    ("prompts", "answers"), [((500, 4000), (5, 60)), ((2000, 12000), (20, 60)), ((200, 600), (50, 200))]
)
def test_with_companions_no_mix_is_slower_than_aggregated_on_the_same_cores(
    prompts: tuple[int, int], answers: tuple[int, int], load: float
) -> None:
    """Whatever the load is made of; the rows of the table in docs/routing.md, of fewer requests."""
    requests = busy_for(load, 200, prompts=prompts, answers=answers, seed=11)
    mix = Figures.of(served(requests, **COMPANIONS))
    aggregated = Figures.of(served(requests, num_prefill=0, num_decode=4))
    assert mix.mean(mix.ttft) < 1.06 * aggregated.mean(aggregated.ttft)
    assert mix.quantile(mix.ttft, 0.95) < 1.12 * aggregated.quantile(aggregated.ttft, 0.95)
    assert mix.mean(mix.e2e) < 1.06 * aggregated.mean(aggregated.e2e)
    assert mix.quantile(mix.e2e, 0.95) < 1.12 * aggregated.quantile(aggregated.e2e, 0.95)


@pytest.mark.parametrize(("num_prefill", "num_decode"), [(1, 1), (3, 1), (1, 3)])
def test_whatever_the_mix_answers_use_all_cores(num_prefill: int, num_decode: int) -> None:
    num = num_prefill + num_decode
    requests = busy_for(0.6, 120, prompts=(200, 600), answers=(50, 200), seed=12, workers=num)
    mix = Figures.of(served(requests, num_prefill=num_prefill, num_decode=num_decode, companions=True))
    aggregated = Figures.of(served(requests, num_prefill=0, num_decode=num))
    assert mix.mean(mix.e2e) < 1.06 * aggregated.mean(aggregated.e2e)
    assert mix.mean(mix.ttft) < 1.08 * aggregated.mean(aggregated.ttft)


def test_companions_are_used_for_answers_and_left_free_for_prompts() -> None:
    def share(prompts: tuple[int, int], answers: tuple[int, int], load: float) -> float:
        asked = served(busy_for(load, 150, prompts=prompts, answers=answers, seed=13), **COMPANIONS)
        return sum(one.route is not None and one.route.decode.companion_of is not None for one in asked) / len(asked)

    assert share((200, 600), (50, 200), 0.8) > 0.4
    assert share((500, 4000), (5, 60), 0.8) < 0.2
    assert share((200, 600), (5, 20), 0.005) < 0.1, "idle"


def test_on_a_slow_link_the_cluster_serves_aggregated() -> None:
    """Sending takes four times as long as computing: then two prefill workers are of no use, and do no harm."""
    speeds = Speeds(pull_s=4 * Speeds().token_s)
    requests = requests_at(0.6, 60, seed=3, workers=2)
    mix = served(requests, num_prefill=2, num_decode=2, speeds=speeds, weights=RouteWeights(disturbance=0.0))
    alone = Figures.of(served(requests, num_prefill=0, num_decode=2, speeds=speeds))
    figures = Figures.of(mix)
    assert sum(asked.route is not None and asked.route.is_aggregated for asked in mix) > 0.8 * len(mix)
    assert figures.mean(figures.ttft) <= 1.01 * alone.mean(alone.ttft)


def test_disturbance_counts() -> None:
    """Long answers run; with a price for disturbing them, more prompts go to prefill workers, and the answers gain."""
    requests = poisson(120, rate=3.2, prompt_tokens=PROMPTS, output_tokens=(50, 150), seed=5)

    def mean_e2e_s(weight: float) -> float:
        figures = Figures.of(served(requests, num_prefill=2, num_decode=2, weights=RouteWeights(disturbance=weight)))
        return figures.mean(figures.e2e)

    assert mean_e2e_s(1.0) < 0.95 * mean_e2e_s(0.0)


# -- conversations and shared prefixes ------------------------------------------------------------------------------


def conversations(world: World, num: int, turns: int, *, seed: int, turn_tokens: int, pause_s: float) -> list[Asked]:
    """Runs them; each turn's prompt is the last one and more, sent some time after its answer."""
    rng, found = random.Random(seed), []
    left = {}

    def asked_at(at: float, token_ids: list[int], turns_left: int) -> Asked:
        asked = Asked(token_ids=token_ids, output_tokens=rng.randint(5, 30), at=at)
        left[id(asked)] = turns_left
        found.append(asked)
        return asked

    def more() -> list[int]:
        return [rng.randrange(1 << 30) for _ in range(turn_tokens)]

    def on_end(asked: Asked) -> None:
        if left[id(asked)] > 1:
            at = world.now + rng.expovariate(1 / pause_s)
            again = asked_at(at, [*asked.token_ids, *more()], left[id(asked)] - 1)
            world.later(at - world.now, lambda: world.ask(again))

    world.on_end = on_end
    world.run([asked_at(rng.uniform(0, 10 * pause_s), more(), turns) for _ in range(num)])
    return found


def test_across_turns_each_token_is_computed_once_and_nobody_is_overrun() -> None:
    world = World(num_prefill=1, num_decode=4)
    turn_tokens, num, turns = 700, 24, 6
    asked = conversations(world, num, turns, seed=1, turn_tokens=turn_tokens, pause_s=4.0)
    assert len(asked) == num * turns
    computed = sum(one.computed_tokens for one in asked)
    distinct = num * turns * turn_tokens
    rounding = num * turns * CHUNK  # the last, incomplete chunk of each turn
    assert computed <= distinct + rounding
    by_worker = Counter(one.route.decode.id for one in asked if one.route is not None)
    assert len(by_worker) == 4 and max(by_worker.values()) < 0.4 * len(asked), by_worker


def test_conversations_stay_where_their_prefix_is_while_that_is_worth_it() -> None:
    world = World(num_prefill=0, num_decode=4, speeds=Speeds(pull_s=1e-4))
    asked = conversations(world, 16, 6, seed=2, turn_tokens=1500, pause_s=20.0)
    places: dict[int, list[str]] = {}
    for one in sorted(asked, key=lambda one: one.at):
        assert one.route is not None
        places.setdefault(one.token_ids[0], []).append(one.route.decode.id)
    stays = [here == there for turns in places.values() for here, there in itertools.pairwise(turns)]
    assert sum(stays) > 0.9 * len(stays)


def test_without_the_index_conversations_cost_more() -> None:
    def computed(has_index: bool) -> int:
        world = World(num_prefill=1, num_decode=4, has_index=has_index, speeds=Speeds(pull_s=1e-4))
        return sum(one.computed_tokens for one in conversations(world, 16, 6, seed=3, turn_tokens=700, pause_s=4.0))

    assert computed(True) < 0.75 * computed(False)


def test_a_prefix_that_all_share_does_not_make_one_worker_hot() -> None:
    """Eight chunks in common; the first worker that has them must not get everything."""
    shared = list(range(8 * CHUNK))
    requests = poisson(160, rate=12.0, prompt_tokens=(100, 400), output_tokens=(20, 60), seed=4)
    for asked in requests:
        asked.token_ids = [*shared, *asked.token_ids]
    world = World(num_prefill=0, num_decode=4)
    world.run(requests)
    by_worker = Counter(asked.route.decode.id for asked in requests if asked.route is not None)
    assert len(by_worker) == 4 and max(by_worker.values()) < 0.36 * len(requests), by_worker
    assert sum(asked.computed_tokens for asked in requests) < 0.35 * sum(len(asked.token_ids) for asked in requests)
