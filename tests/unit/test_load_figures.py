"""What workers find out about their own load: steps, waits for pages, the share of the time that they compute."""

from __future__ import annotations

import random

import pytest

from decode.admission_times import AdmissionTimes
from decode.step_times import StepTimes
from prefill.busy_share import BusyShare


def test_steps_correct_what_was_measured_at_the_start() -> None:
    """Twice as slow as measured; whichever numbers of rows are seen, both parts are corrected."""
    steps, rng = StepTimes(0.01, 0.002), random.Random(1)
    for n in range(200):
        rows = rng.randint(1, 20)
        steps.observe(rows, 2 * (0.01 + 0.002 * rows) * rng.uniform(0.9, 1.1), 0.05 * n)
    assert steps.base_s(10.0) == pytest.approx(0.02, rel=0.1) and steps.row_s(10.0) == pytest.approx(0.004, rel=0.1)


def test_a_worker_without_steps_is_taken_to_be_as_fast_as_it_ever_was() -> None:
    steps = StepTimes(0.01, 0.0)
    for now, seconds in [*((0.05 * n, 0.005) for n in range(200)), *((10 + 0.05 * n, 0.05) for n in range(200))]:
        steps.observe(1, seconds, now)
    assert steps.base_s(20.0) == pytest.approx(0.05, rel=0.05)
    assert 0.01 < steps.base_s(25.0) < 0.03
    assert steps.base_s(90.0) == pytest.approx(0.005, rel=0.01)


def test_steps_that_were_not_measured_stay_unknown() -> None:
    steps = StepTimes(0.0, 0.0)
    steps.observe(3, 0.1, 1.0)
    assert steps.base_s(1.0) == steps.row_s(1.0) == 0.0


def test_admissions_while_requests_wait() -> None:
    times = AdmissionTimes()
    assert times.seconds(0.0, 1.0) == 0.0
    times.admitted(0.0, 1.0)
    times.admitted(0.0, 1.1)
    assert times.seconds(0.0, 9.0) == 0.0, "nobody waits"
    assert times.seconds(0.5, 1.6) == pytest.approx(0.5), "since the last one"
    times.admitted(0.6, 1.7)
    assert times.seconds(0.0, 9.0) == pytest.approx(0.6)
    times.admitted(5.0, 2.7)
    assert times.seconds(0.0, 9.0) == pytest.approx(0.6 + 0.2 * 0.4), "one second after the one before"
    assert times.seconds(20.0, 9.0) == pytest.approx(6.3), "and the present wait is longer"


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_a_share_of_the_time(share: float) -> None:
    busy, now = BusyShare(), 100.0
    assert busy.share(now) == 0.0
    for _ in range(400):
        now += 0.1
        if share:
            busy.worked(share * 0.1, now)
    assert busy.share(now) == pytest.approx(share, abs=0.03)
    assert busy.share(now + 30.0) < 0.001
