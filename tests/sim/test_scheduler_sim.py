"""The batch scheduler in virtual time: nobody starves, tenants get their shares, steps keep their limits, and preempted
requests get the tokens they would have got alone."""

from __future__ import annotations

import math
import os
import random
import subprocess
import sys
from collections import deque
from pathlib import Path

import pytest
from scheduler_world import World

from decode.scheduler import Phase, SchedulingPolicy, Sequence, TenantShare

AGE_S = 2.0


def mixed(seed: int, *, num_blocks: int = 48, num_requests: int = 40, **policy: int) -> World:
    """Random requests of three tenants and four priorities that come faster than they can be served."""
    rng = random.Random(seed)
    world = World(
        SchedulingPolicy(age_s=AGE_S, progress_tokens=32, **policy),
        num_blocks=num_blocks,
        budget=rng.choice([32, 64, 256]),
        reserve=rng.choice([0, 1]),
    )
    for i in range(num_requests):
        world.submit(
            str(i),
            prompt=rng.choice([1, 15, 16, 17, rng.randint(1, 400)]),
            max_tokens=rng.choice([1, 2, 16, rng.randint(1, 200)]),
            tenant=rng.choice("abc"),
            priority=rng.choice([-1, 0, 0, 2]),
            ttft_s=rng.choice([0.2, 0.5, 5.0]),
        )
        for _ in range(rng.choice([0, 0, 1, 5])):
            world.step()
    return world


# -- nobody starves -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("priority", [0, 1, 4])
def test_the_least_urgent_waits_its_levels_times_age_s_and_is_next_then(priority: int) -> None:
    """One tenant, and more urgent requests than can be served, for ever."""
    world = World(SchedulingPolicy(age_s=AGE_S), max_requests=2)
    num = 0
    next_at = 0.0
    while "patient" not in world.order:
        while next_at <= world.now:
            world.submit(f"urgent {num}", ttft_s=0.1)
            num, next_at = num + 1, next_at + 0.02
        if num > 50 and "patient" not in world.lives:
            world.submit("patient", priority=priority, ttft_s=0.1)
        world.step()
        assert world.now < 60
    patient = world.lives["patient"]
    due = patient.submitted_at + max(0.1, priority * AGE_S)
    after = [key for key in world.order if world.lives[key].admitted_at[0] > due]
    came = list(world.lives)
    for key in after[: after.index("patient")]:
        assert came.index(key) < came.index("patient"), "whoever came later is admitted later"
    if priority:
        assert patient.waited_s >= priority * AGE_S, "the flood is more urgent until then"


def test_a_flood_of_one_tenant_keeps_another_waiting_for_one_admission_at_most() -> None:
    world = World(SchedulingPolicy(age_s=AGE_S), max_requests=4)
    for i in range(300):
        world.submit(f"flood {i}", tenant="a")
    while len(world.order) < 60:
        world.step()
    for i in range(5):
        key, before = f"b{i}", len(world.order)
        world.submit(key, tenant="b")
        while key not in world.order:
            world.step()
        assert world.order.index(key) - before <= 1, "at most one of the other tenant goes before it"
        while world.lives[key].ended_at is None:
            world.step()


@pytest.mark.parametrize("seed", range(10))
def test_once_at_the_best_level_only_tenants_served_less_go_first(seed: int) -> None:
    """The bound behind "nobody starves": counters grow with every admission, so that is a bounded amount of service."""
    rng = random.Random(seed)
    world = World(SchedulingPolicy(age_s=AGE_S), max_requests=3)
    num_checked = 0
    while len(world.lives) < 150 or world.scheduler.waiting():
        if len(world.lives) < 150:
            world.submit(
                str(len(world.lives)),
                prompt=rng.randint(1, 100),
                max_tokens=rng.randint(1, 40),
                tenant=rng.choice("aaabc"),
                priority=rng.choice([0, 1, 2]),
                ttft_s=rng.choice([0.1, 1.0]),
            )
        for _ in range(rng.randint(1, 4)):
            waiting = {item.key: item for item in world.scheduler.waiting()}
            counters = {tenant: world.scheduler.service(tenant) for tenant in "abc"}
            num_before = len(world.order)
            world.admit()
            for key in world.order[num_before:][:1]:
                admitted = waiting.pop(key)
                for other in waiting.values():
                    if world.now >= max(other.deadline, other.since + other.priority * AGE_S):
                        num_checked += 1
                        assert counters[admitted.tenant] <= counters[other.tenant]
                        assert admitted.tenant != other.tenant or admitted.deadline <= other.deadline
            world.step()
    world.run()
    world.check_end()
    assert num_checked > 1000


@pytest.mark.parametrize("max_overtaken", [0, 3, 8])
def test_a_request_that_needs_the_whole_pool_is_served_through_a_stream_of_small_ones(max_overtaken: int) -> None:
    world = World(SchedulingPolicy(age_s=AGE_S, max_overtaken=max_overtaken), num_blocks=40)
    num, large_at = 0, None
    while large_at is None or "large" not in world.order:
        while len(world.scheduler.waiting()) < 3:
            world.submit(f"small {num}", prompt=40, max_tokens=30)
            num += 1
        if num > 20 and large_at is None:
            world.submit("large", prompt=600, max_tokens=30)
            large_at = len(world.order)
        world.step()
    ahead = world.order[large_at : world.order.index("large")]
    came_before = [key for key in ahead if world.lives[key].submitted_at <= world.lives["large"].submitted_at]
    assert len(ahead) - len(came_before) <= max_overtaken
    world.run(until=world.now + 100)


# -- fair shares --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("weights", [(1.0, 1.0), (1.0, 3.0), (0.5, 4.0)])
def test_backlogged_tenants_are_served_by_their_weights(seed: int, weights: tuple[float, float]) -> None:
    """Over any time in which both wait, |service a / weight a - service b / weight b| <= 2 U (VTC, theorem 4.4), with
    U = the largest prompt, plus all output in the batch by its weight, over the smallest tenant's weight."""
    rng = random.Random(seed)
    policy = SchedulingPolicy(
        age_s=AGE_S, output_weight=2.0, shares={t: TenantShare(weight=w) for t, w in zip("ab", weights)}
    )
    max_requests, most_prompt, most_output = 6, 150, 60
    world = World(policy, max_requests=max_requests, num_blocks=200)
    bound = (most_prompt + policy.output_weight * max_requests * most_output) / min(weights)
    apart, num = [], 0
    for _ in range(1500):
        while len(world.scheduler.waiting()) < 10 or {item.tenant for item in world.scheduler.waiting()} != {"a", "b"}:
            # a sends more, and shorter ones: first come, first served would do neither justice.
            for tenant, prompt in (("a", most_prompt // 3), ("a", most_prompt // 3), ("b", most_prompt)):
                max_tokens = rng.randint(1, most_output)
                world.submit(str(num), tenant=tenant, prompt=rng.randint(1, prompt), max_tokens=max_tokens)
                num += 1
        world.step()
        apart.append(world.scheduler.service("a") - world.scheduler.service("b"))
    assert max(map(abs, apart)) <= bound
    assert max(apart) - min(apart) <= 2 * bound
    assert world.scheduler.service("a") * min(weights) > 5 * most_output * max_requests, "long enough to tell"


@pytest.mark.parametrize("seed", range(4))
def test_shares_hold_within_a_tenth_when_pages_are_short_and_requests_are_preempted(seed: int) -> None:
    """Overtaking and preemption are outside the theorem; this is what they cost."""
    rng = random.Random(seed)
    policy = SchedulingPolicy(age_s=AGE_S, progress_tokens=32, shares={"b": TenantShare(weight=2.0)})
    world, num = World(policy, num_blocks=64, reserve=0), 0
    for _ in range(4000):
        while [item.tenant for item in world.scheduler.waiting()].count("b") < 5:
            for tenant in "ab":
                prompt, max_tokens = rng.randint(1, 200), rng.randint(1, 120)
                world.submit(str(num), tenant=tenant, prompt=prompt, max_tokens=max_tokens)
                num += 1
        world.step()
    assert world.scheduler.num_preemptions > 20
    assert 0.9 <= world.scheduler.service("b") / world.scheduler.service("a") <= 1.1


# -- steps --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(12))
def test_random_loads_end_with_the_tokens_each_would_get_alone(seed: int) -> None:
    """World checks after every step: budget, decode rows first, blocks, no idle step while something could run."""
    world = mixed(seed)
    world.run()
    world.check_end()


def test_pages_are_short_in_these_loads() -> None:
    worlds = [mixed(seed) for seed in range(12)]
    for world in worlds:
        world.run()
    assert sum(world.scheduler.num_preemptions for world in worlds) > 30
    assert sum(world.num_idle for world in worlds) == 0


@pytest.mark.parametrize("max_rows", [1, 3, 7])
def test_every_running_row_gets_a_token_every_so_many_steps(max_rows: int) -> None:
    rng, most = random.Random(max_rows), 10
    world = World(SchedulingPolicy(max_rows=max_rows), max_requests=most)
    for i in range(60):
        world.submit(str(i), prompt=rng.randint(1, 100), max_tokens=rng.randint(1, 60))
    world.run()
    world.check_end()
    gaps = [b - a for life in world.lives.values() for a, b in zip(life.drawn_in_step, life.drawn_in_step[1:])]
    assert max(gaps) == math.ceil(most / max_rows)


def test_a_long_prompt_does_not_stop_the_others_answers() -> None:
    world = World(budget=64)
    for i in range(4):
        world.submit(f"running {i}", prompt=8, max_tokens=200)
    world.step()
    world.submit("long", prompt=3000, max_tokens=2)
    world.run()
    for i in range(4):
        steps = world.lives[f"running {i}"].drawn_in_step
        assert steps == list(range(steps[0], steps[0] + 200))


def test_first_tokens_come_in_the_order_of_deadlines() -> None:
    rng, world = random.Random(1), World(budget=64)
    ttft_s = {str(i): rng.random() * 10 for i in range(20)}
    for key, seconds in ttft_s.items():
        world.submit(key, prompt=100, max_tokens=1, ttft_s=seconds)
    world.run()
    assert sorted(ttft_s, key=lambda key: world.lives[key].drawn_at) == sorted(ttft_s, key=lambda key: ttft_s[key])


# -- preemption ---------------------------------------------------------------------------------------------------


def most_preemptions(policy: SchedulingPolicy, *, levels: int, max_tokens: int) -> int:
    """What docs/scheduler.md states."""
    return max(policy.max_preemptions, levels) + int(math.log2(1 + max_tokens / policy.progress_tokens))


@pytest.mark.parametrize("max_preemptions", [0, 1, 3])
@pytest.mark.parametrize("num_blocks", [26, 30, 40, 49])
def test_two_requests_that_do_not_both_fit_end_in_bounded_steps(num_blocks: int, max_preemptions: int) -> None:
    """25 blocks each."""
    policy = SchedulingPolicy(max_preemptions=max_preemptions, progress_tokens=32)
    world = World(policy, num_blocks=num_blocks, reserve=0)
    for key in "ab":
        world.submit(key, prompt=100, max_tokens=300)
    world.run(most_steps=2 * 300 + 100)
    world.check_end()
    assert world.scheduler.num_preemptions >= 1
    bound = most_preemptions(policy, levels=0, max_tokens=300)
    for life in world.lives.values():
        assert life.num_preempted <= bound
        # Each return computes at most what is no whole chunk of the store.
        assert life.num_computed <= 400 + 64 * life.num_preempted


@pytest.mark.parametrize("seed", range(12))
def test_nobody_is_preempted_more_often_than_stated(seed: int) -> None:
    world = mixed(seed, num_blocks=40, num_requests=60, max_preemptions=1)
    world.run()
    world.check_end()
    for life in world.lives.values():
        max_tokens = life.request.sampling.max_tokens
        bound = most_preemptions(world.policy, levels=life.priority + 1, max_tokens=max_tokens)
        assert life.num_preempted <= bound, life


def test_urgent_requests_that_keep_coming_do_not_keep_a_batch_job_from_ending() -> None:
    world = World(SchedulingPolicy(age_s=AGE_S, progress_tokens=32), num_blocks=30, reserve=0)
    world.submit("job", prompt=100, max_tokens=300, priority=3)
    num = 0
    while world.lives["job"].ended_at is None:
        while sum(waiting.sequence is None for waiting in world.scheduler.waiting()) < 2:
            world.submit(f"urgent {num}", prompt=60, max_tokens=60)
            num += 1
        world.step()
        assert world.now < 300
    job = world.lives["job"]
    assert 1 <= job.num_preempted <= most_preemptions(world.policy, levels=3, max_tokens=300)


# -- giving way to one that waits ---------------------------------------------------------------------------------


def full_of_batch_jobs(gives_way: bool) -> World:
    world = World(SchedulingPolicy(age_s=60.0), num_blocks=64, reserve=0, gives_way=gives_way)
    for i in range(8):
        world.submit(f"job {i}", prompt=100, max_tokens=400, priority=5)
    while len(world.free) > 8:
        world.step()
    return world


def test_an_urgent_request_has_its_first_token_after_the_steps_that_its_prompt_takes() -> None:
    took = {}
    for gives_way in (True, False):
        world = full_of_batch_jobs(gives_way)
        first = world.num_steps
        world.submit("urgent", prompt=200, max_tokens=4)
        while not world.lives["urgent"].drawn_at:
            world.step()
        took[gives_way] = world.lives["urgent"].drawn_in_step[0] - first
        world.run()
        world.check_end()
    assert took[True] == math.ceil(200 / 64), "chunks, as if it were alone"
    assert took[False] > 10 * took[True], "until one of the jobs ended"


def test_urgent_requests_that_fit_take_nothing() -> None:
    world = full_of_batch_jobs(True)
    before = world.scheduler.num_preemptions
    world.submit("urgent", prompt=16, max_tokens=1)
    world.step()
    assert world.order[-1] == "urgent" and world.scheduler.num_preemptions == before


@pytest.mark.parametrize("max_preemptions", [0, 1, 2, 5])
@pytest.mark.parametrize("seed", range(4))
def test_a_flood_of_urgent_requests_makes_nobody_give_way_more_often_than_stated(
    seed: int, max_preemptions: int
) -> None:
    """And all the jobs end while the flood goes on: they age, and from some time on nobody may take their pages."""
    rng = random.Random(seed)
    policy = SchedulingPolicy(age_s=AGE_S, progress_tokens=32, max_preemptions=max_preemptions)
    world = World(policy, num_blocks=48, reserve=rng.choice([0, 1]))
    jobs = [f"job {i}" for i in range(6)]
    for key in jobs:
        world.submit(key, prompt=rng.randint(1, 150), max_tokens=rng.randint(50, 250), priority=rng.randint(1, 6))
    num, next_at = 0, 0.0
    while any(world.lives[key].ended_at is None for key in jobs):
        while next_at <= world.now:
            prompt, max_tokens = rng.randint(1, 200), rng.randint(1, 40)
            world.submit(f"urgent {num}", prompt=prompt, max_tokens=max_tokens, priority=rng.randint(-1, 0))
            num, next_at = num + 1, next_at + rng.uniform(0.0, 0.2)
        world.step()
        assert world.now < 300, "a job starves"
    for life in world.lives.values():
        assert life.num_gave_way <= max_preemptions
        max_tokens = life.request.sampling.max_tokens
        assert life.num_preempted <= most_preemptions(policy, levels=life.priority + 1, max_tokens=max_tokens)
    gave_way = sum(life.num_gave_way for life in world.lives.values())
    assert (gave_way > 0) == (max_preemptions > 0)
    world.run()
    world.check_end()


@pytest.mark.parametrize("seed", range(6))
def test_without_priorities_nobody_gives_way_to_one_that_waits(seed: int) -> None:
    rng = random.Random(seed)
    logs = []
    for gives_way in (True, False):
        rng = random.Random(seed)
        world = World(SchedulingPolicy(age_s=0.2, progress_tokens=32), num_blocks=40, reserve=0, gives_way=gives_way)
        for i in range(40):
            world.submit(str(i), prompt=rng.randint(1, 200), max_tokens=rng.randint(1, 100), tenant=rng.choice("ab"))
            for _ in range(rng.randint(0, 3)):
                world.step()
        world.run()
        world.check_end()
        logs.append(world.log)
    assert logs[0] == logs[1], "not a step differs"


# -- the same again -----------------------------------------------------------------------------------------------


def test_the_same_events_at_the_same_times_give_the_same_rows() -> None:
    """In processes of other hash seeds too: no order comes from a set."""
    script = (
        "import sys, zlib; sys.path[:0] = sys.argv[1:]; import test_scheduler_sim as sim; "
        "worlds = [sim.mixed(seed) for seed in range(3)]; [world.run() for world in worlds]; "
        "print(zlib.crc32(repr([world.log for world in worlds]).encode()))"
    )
    root = Path(__file__).parents[2]
    folders = [str(root), str(root / "tests" / "support"), str(Path(__file__).parent)]
    printed = {
        subprocess.run(
            [sys.executable, "-c", script, *folders],
            env={**os.environ, "PYTHONHASHSEED": hash_seed},
            capture_output=True,
            text=True,
            check=True,
            timeout=120,
        ).stdout
        for hash_seed in ("1", "2", "3")
    }
    assert len(printed) == 1


# -- anything at any time -----------------------------------------------------------------------------------------


class Anything(World):
    """Pages of preempted and ended requests come free some operations later; blobs pin sequences; answers are held."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        super().__init__(
            SchedulingPolicy(
                age_s=0.5,
                max_overtaken=3,
                max_rows=6,
                progress_tokens=16,
                max_waiting=30,
                shares={
                    "a": TenantShare(weight=2.0, max_requests=5, max_waiting=8),
                    "b": TenantShare(max_blocks_share=0.4),
                },
            ),
            num_blocks=64,
            budget=self.rng.choice([32, 100]),
            max_requests=12,
            reserve=self.rng.choice([0, 1]),
        )
        self.late: list[Sequence] = []  # preempted or ended, and their pages are not given back yet
        self.num_refused = 0

    def operate(self) -> None:
        rng, scheduler = self.rng, self.scheduler
        admitted = scheduler.all()
        match rng.choices(range(7), weights=[25, 50, 4, 4, 6, 6, 5])[0]:
            case 0:
                self.num_refused += not self.submit(
                    f"{len(self.lives)}.{self.num_refused}",
                    prompt=rng.choice([1, 16, rng.randint(1, 300)]),
                    max_tokens=rng.choice([1, 5, rng.randint(1, 150)]),
                    tenant=rng.choice("abc"),
                    priority=rng.randint(-2, 2),
                    ttft_s=rng.random(),
                )
            case 1:
                self.step()
            case 2:
                alive = [key for key, life in self.lives.items() if life.ended_at is None]
                if alive:
                    self.cancel(rng.choice(alive))
            case 3:
                loose = [sequence for sequence in admitted if not sequence.pins]
                if loose:
                    self.spill(scheduler.preempt(rng.choice(loose).key, self.now))
            case 4:
                for sequence in admitted:
                    sequence.pins = int(rng.random() < 0.2)
            case 5:
                for sequence in admitted:
                    sequence.is_held = sequence.phase is Phase.RUNNING and rng.random() < 0.2
            case 6:
                self.now += rng.random()
        if self.late and rng.random() < 0.5:
            self.give_back(self.late.pop(0))
        self.check()

    def spill(self, sequence: Sequence) -> None:
        assert sequence.pins == 0
        self.late.append(sequence)

    def ended(self, sequence: Sequence) -> None:
        if sequence not in self.late:  # it was preempted just before
            self.late.append(sequence)

    def give_back(self, sequence: Sequence) -> None:
        sequence.pins = 0
        if sequence.phase is Phase.PREEMPTED:
            super().spill(sequence)
        else:
            super().ended(sequence)

    def check(self) -> None:
        late = {sequence.key: sequence for sequence in self.late}
        assert all(sequence.phase in (Phase.PREEMPTED, Phase.ENDED) for sequence in self.late)
        given_back, all_kv = self.free, self.kv
        self.free = deque([*given_back, *(block for sequence in self.late for block in sequence.block_table)])
        self.kv = {key: tokens for key, tokens in all_kv.items() if key not in late}
        super().check()
        self.free, self.kv = given_back, all_kv

    def _check_idle(self) -> None:
        if not self.late:
            super()._check_idle()

    def finish(self) -> None:
        for sequence in self.scheduler.all():
            sequence.pins, sequence.is_held = 0, False
        for _ in range(5000):
            while self.late:
                self.give_back(self.late.pop(0))
            if not self.scheduler.all() and not self.scheduler.waiting():
                break
            self.step()
        self.check_end()


@pytest.mark.parametrize("seed", range(8))
def test_random_operations_leave_nothing_behind(seed: int) -> None:
    """8 x 2,500 = 20,000, with all invariants checked after each."""
    world = Anything(seed)
    for _ in range(2500):
        world.operate()
    world.finish()
    ended = [life for life in world.lives.values() if life.tokens is not None]
    assert len(ended) > 100 and world.num_refused > 10 and world.scheduler.num_preemptions > 50
    assert sum(life.num_gave_way for life in world.lives.values()) > 0
