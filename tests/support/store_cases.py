"""Chunks for store tests: contents that tell whose they are, a clock by hand, a store with both tiers."""

from __future__ import annotations

import hashlib
import os
import random
import subprocess
import sys
import textwrap
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from prefill.store import MASTER_LEVEL, ChunkStore, DiskOptions

ROOT = Path(__file__).resolve().parents[2]
NAMESPACE = "model m, 256 tokens a chunk"


def key_of(number: int) -> bytes:
    return hashlib.blake2b(number.to_bytes(8, "little"), digest_size=16).digest()


def content(number: int, level: str = MASTER_LEVEL, *, kl: float = 0.0, max_bytes: int = 60_000) -> bytes:
    """The one right blob of a chunk at a level, made from a master of that quality; no two alike."""
    draw = random.Random(f"{number} {level} {kl}")
    return draw.randbytes(draw.randrange(max_bytes // 20, max_bytes))


class Clock:
    def __init__(self, now: float = 1_000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


def two_tiers(path: Path, *, ram_bytes: int = 1 << 20, disk_bytes: int = 8 << 20, **options: Any) -> ChunkStore:
    disk_names = {"namespace", "levels", "queue_bytes", "off_s"}
    disk = {name: options.pop(name) for name in disk_names & options.keys()}
    disk = {"namespace": NAMESPACE, "levels": frozenset({"q1"})} | disk
    return ChunkStore(ram_bytes, disk=DiskOptions(path=path, capacity_bytes=disk_bytes, **disk), **options)


def fill(store: ChunkStore, numbers: range) -> None:
    for number in numbers:
        assert store.put(key_of(number), MASTER_LEVEL, content(number))
        assert store.put(key_of(number), "q1", content(number, "q1"))


def wrong_or_missing(store: ChunkStore, numbers: Iterable[int]) -> tuple[list[int], list[int]]:
    """(chunks with a blob that is not the right one, chunks whose master cannot be got)."""
    wrong, missing = [], []
    for number in numbers:
        master, derived = (store.get(key_of(number), level) for level in (MASTER_LEVEL, "q1"))
        if master not in (None, content(number)) or derived not in (None, content(number, "q1")):
            wrong.append(number)
        if master is None:
            missing.append(number)
    return wrong, missing


def reopened(store: ChunkStore, path: Path, **options: object) -> ChunkStore:
    assert store.close()
    return two_tiers(path, **options)  # type: ignore[arg-type]


def run_python(code: str, path: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests' / 'support'}"}
    command = [sys.executable, "-c", textwrap.dedent(code), str(path)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
