"""kill -9 while chunks are written: what was acknowledged by a flush is there, and what is there is right."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from store_cases import content, key_of, two_tiers, wrong_or_missing

from prefill.store import MASTER_LEVEL

ROOT = Path(__file__).resolve().parents[2]
ROUNDS = 6

WRITER = """
    import itertools, random, sys
    from pathlib import Path
    from store_cases import content, key_of, two_tiers
    path, first, disk_bytes = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    draw = random.Random(first)
    store = two_tiers(path, disk_bytes=disk_bytes)
    for number in itertools.count(first):
        key, parent = key_of(number), key_of(number - 1) if number % 5 else None
        if number % 3 == 0:  # a worse one first, and what is derived of it
            store.put(key, "lossless", content(number, kl=0.5), kl=0.5, parent=parent)
            store.put(key, "q1", content(number, "q1", kl=0.5), kl=0.5)
        store.put(key, "lossless", content(number), parent=parent)
        store.put(key, "q1", content(number, "q1"))
        if draw.random() < 0.3:
            assert store.flush(60)
            print(number, flush=True)
"""


def killed_in_mid_write(path: Path, *, first: int, disk_bytes: int, num_lines: int) -> int:
    """Runs the writer, kills it when it has acknowledged so often. -> the last chunk known to be written."""
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests' / 'support'}"}
    command = [sys.executable, "-c", textwrap.dedent(WRITER), str(path), str(first), str(disk_bytes)]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout is not None
        lines = [writer.stdout.readline() for _ in range(num_lines)]
        os.kill(writer.pid, signal.SIGKILL)  # it is writing what came after the line
        lines += writer.stdout.readlines()
        assert writer.wait() == -signal.SIGKILL
    return int(lines[-1])


@pytest.mark.parametrize("seed", range(3))
def test_nothing_acknowledged_is_lost(tmp_path: Path, seed: int) -> None:
    draw, written, first = random.Random(seed), set[int](), 0
    for _ in range(ROUNDS):
        last = killed_in_mid_write(tmp_path, first=first, disk_bytes=256 << 20, num_lines=draw.randrange(1, 12))
        written |= set(range(first, last + 1))
        first = last + draw.randrange(1, 4)  # some may be there already, some may not
        store = two_tiers(tmp_path, disk_bytes=256 << 20)
        assert store.stats().disk_chunks >= len(written)
        for number in sorted(written):
            assert store.kl(key_of(number)) == 0.0
            assert store.get(key_of(number), MASTER_LEVEL) == content(number)
            assert store.get(key_of(number), "q1") == content(number, "q1")
        assert store.stats().num_disk_damaged == 0
        store.check_integrity()
        assert store.close()


@pytest.mark.parametrize("seed", range(2))
def test_a_full_store_killed_while_it_makes_room_has_nothing_wrong(tmp_path: Path, seed: int) -> None:
    draw, first = random.Random(seed), 0
    for _ in range(ROUNDS):
        last = killed_in_mid_write(tmp_path, first=first, disk_bytes=2 << 20, num_lines=draw.randrange(8, 20))
        store = two_tiers(tmp_path, disk_bytes=2 << 20)
        assert store.stats().disk_chunks > 5
        unsure = {n for n in range(last + 1, last + 200) if store.kl(key_of(n)) not in (None, 0.0)}
        assert wrong_or_missing(store, range(last + 1))[0] == []
        assert wrong_or_missing(store, sorted(set(range(last + 1, last + 200)) - unsure))[0] == []
        for number in unsure:  # killed between the worse master and the better one
            assert store.get(key_of(number), MASTER_LEVEL) == content(number, kl=0.5)
        assert store.stats().num_disk_damaged == 0
        store.check_integrity()
        assert store.close()
        first = last + 1
