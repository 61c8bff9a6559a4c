"""The world that scripts/bench_decision.py times decisions in: every fill ends, whatever the machine waits for."""

from __future__ import annotations

import pytest

from scripts.bench_decision import SCENARIOS, Fill


@pytest.mark.parametrize("name", SCENARIOS)
def test_a_fill_of_the_benchmark_ends(name: str) -> None:
    fill = Fill(SCENARIOS[name], 13)
    fill.run()  # checks itself
    assert fill.machine.done and fill.times_ns
