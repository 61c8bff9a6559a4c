"""What the prefix index and one routing decision cost: `python scripts/bench_routing.py [--json FILE]`.

The index is filled with 1 M keys of one worker and 20,000 of each of 63 others, a prefix of these. Before anything is
timed, what it answers is compared with dictionaries. The bars: 64 bytes an entry, a decision within 2 ms (--bar-ms).
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from cluster.membership import WorkerInfo  # noqa: E402
from cluster.prefix_index import KEY_BYTES, TIERS, Coverage, PrefixIndex  # noqa: E402
from cluster.route_costs import PULL_S, ROWS, STEP_S, TOKENS_PER_S, WAITING_TOKENS  # noqa: E402
from cluster.routing import choose_route  # noqa: E402

NUM_KEYS, NUM_WORKERS, KEYS_OF_OTHERS = 1_000_000, 64, 20_000
CHUNK_TOKENS = 256
PROMPT_CHUNKS = (8, 32, 128, 400)
BAR_BYTES = 64.0


def report(epoch: int, since: int | None, *, removed: bytes = b"", **tiers: bytes) -> dict[str, Any]:
    return {"since": since, "epoch": epoch, "removed": removed, **dict.fromkeys(TIERS, b""), **tiers}


def slice_of(keys: bytes, first: int, count: int) -> bytes:
    return keys[KEY_BYTES * first : KEY_BYTES * (first + count)]


def seconds(act: Callable[[], object], repeats: int) -> float:
    """The median."""
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        act()
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


def check(index: PrefixIndex, keys: bytes, rng: random.Random) -> None:
    """Answers as dictionaries would: full holder, holders of a part, nobody."""
    for _ in range(200):
        count = rng.choice(PROMPT_CHUNKS)
        first = rng.choice((rng.randrange(KEYS_OF_OTHERS), rng.randrange(NUM_KEYS - count)))
        found = index.holders(slice_of(keys, first, count))
        assert found["w0"] == Coverage(incarnation="w0", ram=(1 << count) - 1), found["w0"]
        rest = max(0, min(count, KEYS_OF_OTHERS - first))
        part = Coverage(incarnation="w1", disk=(1 << rest) - 1) if rest else None
        assert found.get("w1") == part, (first, count)
    assert index.holders(os.urandom(KEY_BYTES * 400)) == {}
    index.check_integrity()


def measure_index(rng: random.Random) -> dict[str, Any]:
    index, keys = PrefixIndex(), rng.randbytes(KEY_BYTES * NUM_KEYS)
    begin = time.perf_counter()
    index.apply("w0", "w0", report(1, None, ram=keys))
    full_s = time.perf_counter() - begin
    alone_bytes = index.stats()["index_bytes"]
    for worker in range(1, NUM_WORKERS):
        index.apply(f"w{worker}", f"w{worker}", report(1, None, disk=slice_of(keys, 0, KEYS_OF_OTHERS)))
    check(index, keys, rng)
    stats = index.stats()
    lookups = {}
    for count in PROMPT_CHUNKS:
        for name, last in (("one holder", NUM_KEYS), ("64 holders", KEYS_OF_OTHERS)):
            first = KEYS_OF_OTHERS if last == NUM_KEYS else 0

            def ask(first: int = first, last: int = last, count: int = count) -> None:
                index.holders(slice_of(keys, rng.randrange(first, last - count), count))

            took_s = seconds(ask, 300)
            lookups[f"{count} chunks, {name}"] = {"us": took_s * 1e6, "keys_per_s": count / took_s}
    epoch = 1

    def delta() -> None:
        nonlocal epoch
        epoch += 1
        fresh, old = rng.randbytes(KEY_BYTES * 100), slice_of(keys, 100 * epoch, 100)
        index.apply("w0", "w0", report(epoch, epoch - 1, ram=fresh, removed=old))

    return {
        "bytes_per_entry": alone_bytes / NUM_KEYS,
        "bytes_per_entry_with_63_more": stats["index_bytes"] / stats["index_entries"],
        "full_report_1M_s": full_s,
        "delta_100_added_100_removed_us": seconds(delta, 200) * 1e6,
        "drop_worker_1M_ms": seconds(lambda: index.drop("w0"), 1) * 1e3,
        "lookups": lookups,
    }


def measure_decisions(rng: random.Random) -> dict[str, Any]:
    """64 decode and 8 prefill workers with different loads; all of them hold some of the prompt."""
    table = [
        WorkerInfo(
            id=f"{role}{number}",
            role=role,  # type: ignore[arg-type]
            incarnation=f"{role}{number}",
            endpoint=f"tcp://{role}{number}",
            kv_endpoint=f"tcp://{role}{number}:kv",
            stats={
                TOKENS_PER_S: 8000.0,
                WAITING_TOKENS: float(rng.randrange(20_000)),
                ROWS: float(rng.randrange(32)),
                STEP_S: 0.02,
                PULL_S: 2e-5,
            },
        )
        for role, count in (("decode", NUM_WORKERS), ("prefill", 8))
        for number in range(count)
    ]
    found = {}
    for count in PROMPT_CHUNKS:
        tokens = [rng.randrange(50_000) for _ in range(count * CHUNK_TOKENS + 100)]
        for name, has_holders in (("nobody holds it", False), ("all hold some", True)):
            holders = {
                info.id: Coverage(
                    incarnation=info.id, pages=(1 << rng.randrange(count)) - 1, ram=rng.getrandbits(count)
                )
                for info in table
                if has_holders
            }

            def choose(tokens: list[int] = tokens, holders: dict[str, Coverage] = holders) -> Any:
                return choose_route(
                    table, tokens, chunk_tokens=CHUNK_TOKENS, cache_salt="", in_flight={}, holders=holders
                )

            route = choose()
            assert route is not None and route == choose(), "the same question, the same route"
            found[f"{count} chunks, {name}"] = {"ms": seconds(choose, 200) * 1e3}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--bar-ms", type=float, default=2.0)
    options = parser.parse_args()
    rng = random.Random(1)
    gc.disable()
    index = measure_index(rng)
    decisions = measure_decisions(rng)
    figures = {
        "where": f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}",
        "load_average": os.getloadavg()[0],
        "index": index,
        "decisions_64_workers": decisions,
    }
    print(json.dumps(figures, indent=1))
    if options.json is not None:
        options.json.write_text(json.dumps(figures, indent=1) + "\n")
    slowest = max(row["ms"] for row in decisions.values())
    failed = [
        f"{what}: {value:.2f} is over the bar of {bar:g}"
        for what, value, bar in (
            ("bytes an entry", index["bytes_per_entry"], BAR_BYTES),
            ("ms a decision", slowest, options.bar_ms),
        )
        if value > bar
    ]
    sys.exit("; ".join(failed) or 0)


if __name__ == "__main__":
    main()
