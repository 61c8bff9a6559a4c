"""The chunk store with a directory: two tiers, restarts, files of others, two writers."""

from __future__ import annotations

import logging
import os
import random
import threading
from pathlib import Path

import pytest
from store_cases import NAMESPACE, Clock, content, fill, key_of, reopened, run_python, two_tiers, wrong_or_missing

from prefill import disk_records
from prefill.disk_store import StoreError, StoreInUse
from prefill.disk_tier import PAYLOAD_SHARE
from prefill.store import MASTER_LEVEL, StoreShares

# -- two tiers --------------------------------------------------------------------------------------------------------


def test_what_leaves_ram_is_read_from_disk_and_kept_in_ram_again(tmp_path: Path) -> None:
    store = two_tiers(tmp_path, ram_bytes=150_000)
    fill(store, range(20))
    assert store.flush(10)
    in_ram = store.stats().num_chunks
    assert in_ram < 10 and store.stats().disk_chunks == 20
    assert wrong_or_missing(store, range(20)) == ([], [])
    assert store.stats().num_disk_hits > 0
    key = key_of(0)
    store.get(key, MASTER_LEVEL)
    before = store.stats().num_disk_hits
    assert store.get(key, MASTER_LEVEL) == content(0)
    assert store.stats().num_disk_hits == before
    store.check_integrity()
    store.close()


def test_blobs_can_be_read_before_they_are_written(tmp_path: Path) -> None:
    store = two_tiers(tmp_path, ram_bytes=1)  # nothing fits into RAM
    fill(store, range(5))
    assert wrong_or_missing(store, range(5)) == ([], [])
    store.close()


def test_sizes_and_tiers_include_the_disk(tmp_path: Path) -> None:
    store = two_tiers(tmp_path, ram_bytes=1)
    fill(store, range(2))
    assert store.sizes(key_of(1)) == {MASTER_LEVEL: len(content(1)), "q1": len(content(1, "q1"))}
    assert set(store.changes(-1).added) == {(key_of(0), "disk"), (key_of(1), "disk")}
    store.close()


def test_only_the_levels_named_go_to_disk(tmp_path: Path) -> None:
    store = two_tiers(tmp_path)
    store.put(key_of(1), MASTER_LEVEL, b"master")
    assert store.put(key_of(1), "raw", b"raw") and store.put(key_of(1), "q1", b"q1")
    store = reopened(store, tmp_path)
    assert store.sizes(key_of(1)) == {MASTER_LEVEL: 6, "q1": 2}
    store.close()


def test_a_better_master_replaces_in_both_tiers(tmp_path: Path) -> None:
    store = two_tiers(tmp_path)
    key = key_of(1)
    store.put(key, MASTER_LEVEL, b"lossy", kl=0.5)
    store.put(key, "q1", b"of the lossy one", kl=0.5)
    assert store.flush(10)
    store.put(key, MASTER_LEVEL, b"exact")
    store = reopened(store, tmp_path)
    assert (store.kl(key), store.sizes(key), store.get(key, MASTER_LEVEL)) == (0.0, {MASTER_LEVEL: 5}, b"exact")
    store.close()


def test_a_chunk_that_is_dropped_is_gone_for_good(tmp_path: Path) -> None:
    store = two_tiers(tmp_path)
    fill(store, range(3))
    assert store.flush(10)
    store.drop(key_of(1))
    assert store.sizes(key_of(1)) is None and store.get(key_of(1), "q1") is None
    store.check_integrity()
    store = reopened(store, tmp_path)
    assert wrong_or_missing(store, range(3)) == ([], [1])
    store.close()


def test_a_chunk_dropped_by_the_disk_lives_on_in_ram_and_the_other_way_round(tmp_path: Path) -> None:
    clock = Clock()
    store = two_tiers(tmp_path, ram_bytes=100_000, disk_bytes=1 << 20, clock=clock)
    for number in range(60):
        assert store.put(key_of(number), MASTER_LEVEL, content(number))
        store.get(key_of(0), MASTER_LEVEL)
        store.check_integrity()
    tiers = dict(store.changes(-1).added)
    assert set(tiers.values()) == {"ram", "disk"} and len(tiers) < 60
    assert store.stats().num_disk_evictions > 0
    assert key_of(0) in tiers, "used all the time"
    store.close()


def test_caps_of_a_tenant_on_disk(tmp_path: Path) -> None:
    store = two_tiers(
        tmp_path, ram_bytes=1 << 20, disk_bytes=1 << 20, tenant_shares=StoreShares(tenants={"small": 0.1})
    )
    for number in range(20):
        store.put(key_of(number), MASTER_LEVEL, content(number, max_bytes=40_000), tenant="small")
    small = store.stats().tenants["small"]
    most_ram, most_disk = (1 << 20) / 10, (1 << 20) * PAYLOAD_SHARE / 10
    assert 40_000 < small.ram_bytes <= most_ram and 40_000 < small.disk_bytes <= most_disk
    store.set_shares(StoreShares(tenants={"small": 0.06}))
    small = store.stats().tenants["small"]
    assert 0 < small.ram_bytes <= 0.6 * most_ram and 0 < small.disk_bytes <= 0.6 * most_disk
    kept = {key for key, _ in store.changes(-1).added}
    assert store.flush(10)
    store = reopened(store, tmp_path, disk_bytes=1 << 20, tenant_shares=StoreShares(tenants={"small": 0.06}))
    assert {key for key, _ in store.changes(-1).added} <= kept, "what went is gone from the file too"
    store = reopened(store, tmp_path, disk_bytes=1 << 20, tenant_shares=StoreShares(default=0.04))
    left = store.stats().tenants["small"].disk_bytes
    assert 0 < left <= 0.4 * most_disk, "a cap that shrank between two starts counts at once"
    store.check_integrity()
    store.close()


def test_a_chunk_replaced_while_it_is_read_is_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = two_tiers(tmp_path, ram_bytes=1)
    key = key_of(1)
    store.put(key, MASTER_LEVEL, b"lossy", kl=0.5)
    assert store.flush(10) and store._disk is not None
    read = store._disk.read

    def read_late(*name: str) -> bytes | None:
        found = read(*name)  # type: ignore[arg-type]
        monkeypatch.setattr(store._disk, "read", read)
        store.put(key, MASTER_LEVEL, b"exact")
        return found

    monkeypatch.setattr(store._disk, "read", read_late)
    assert store.get(key, MASTER_LEVEL) == b"exact"
    store.close()


@pytest.mark.parametrize("seed", range(3))
def test_many_threads_read_what_is_right_while_chunks_are_replaced_and_evicted(tmp_path: Path, seed: int) -> None:
    store = two_tiers(tmp_path, ram_bytes=200_000, disk_bytes=2 << 20)
    kls, wrong, errors = (0.5, 0.0), list[int](), list[BaseException]()

    def use(thread: int) -> None:
        draw = random.Random(f"{seed} {thread}")
        try:
            for _ in range(150):
                number, level, kl = draw.randrange(40), draw.choice([MASTER_LEVEL, "q1"]), draw.choice(kls)
                if draw.random() < 0.5:
                    parent = key_of(number - 1) if number % 4 else None
                    store.put(key_of(number), level, content(number, level, kl=kl), kl=kl, parent=parent)
                elif (blob := store.get(key_of(number), level)) is not None:
                    wrong.extend([number] * (blob not in {content(number, level, kl=kl) for kl in kls}))
                store.sizes(key_of(number))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=use, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (wrong, errors) == ([], [])
    store.check_integrity()
    assert store.stats().num_disk_damaged == 0
    assert store.flush(20)
    on_disk = {n: store.kl(key_of(n)) for n in range(40) if (key_of(n), MASTER_LEVEL) in store._disk.index}  # type: ignore
    store = reopened(store, tmp_path, ram_bytes=1, disk_bytes=2 << 20)
    for number, kl in on_disk.items():
        assert kl is not None and store.get(key_of(number), MASTER_LEVEL) == content(number, kl=kl)
        assert store.get(key_of(number), "q1") in (None, *(content(number, "q1", kl=kl) for kl in kls))
    store.close()


# -- restarts ---------------------------------------------------------------------------------------------------------


def test_a_restart_keeps_chunks_and_all_that_is_known_of_them(tmp_path: Path) -> None:
    clock = Clock()
    store = two_tiers(tmp_path, clock=clock)
    fill(store, range(10))
    store.put(key_of(10), MASTER_LEVEL, content(10, kl=0.25), kl=0.25, tenant="t", parent=key_of(3))
    store = reopened(store, tmp_path, clock=clock)
    assert store.stats().num_chunks == 0 and store.stats().disk_chunks == 11
    assert wrong_or_missing(store, range(10)) == ([], [])
    assert store.kl(key_of(10)) == 0.25 and store.get(key_of(10), MASTER_LEVEL) == content(10, kl=0.25)
    assert store.stats().tenants["t"].disk_bytes == len(content(10, kl=0.25))
    assert not store.put(key_of(10), MASTER_LEVEL, b"worse", kl=0.5)
    store.close()


def test_the_order_of_use_and_the_time_to_live_survive_a_restart(tmp_path: Path) -> None:
    clock = Clock()
    store = two_tiers(tmp_path, clock=clock, ttl_s=1_000.0)
    for number in range(4):
        store.put(key_of(number), MASTER_LEVEL, bytes([number]) * 200_000, parent=key_of(2) if number == 3 else None)
        clock.now += 10
    store.get(key_of(0), MASTER_LEVEL)  # 1 is now unused longest, and 2 goes after 3
    assert store.flush(10)
    store = reopened(store, tmp_path, clock=clock, ttl_s=1_000.0, ram_bytes=1, disk_bytes=1 << 20)
    store.put(key_of(4), MASTER_LEVEL, bytes(200_000))
    assert [store.sizes(key_of(n)) is not None for n in range(5)] == [True, False, True, True, True]
    clock.now += 960.0
    assert [store.sizes(key_of(n)) is not None for n in range(5)] == [True, False, True, True, True]
    store = reopened(store, tmp_path, clock=clock, ttl_s=1_000.0, disk_bytes=1 << 20)
    clock.now += 30.0
    assert [store.sizes(key_of(n)) is not None for n in range(5)] == [True, False, False, False, True]
    store.close()


def test_a_use_before_the_chunk_is_written_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    store = two_tiers(tmp_path, clock=clock, ttl_s=100.0)
    assert store._disk is not None
    disk, commit, first, go_on = store._disk._store, store._disk._store.commit, threading.Event(), threading.Event()

    def slow(*batch: object) -> None:
        first.set()
        assert go_on.wait(20)
        commit(*batch)  # type: ignore[arg-type]

    monkeypatch.setattr(disk, "commit", slow)
    monkeypatch.setattr(store._disk.writer, "_batch_bytes", 1)  # a commit for each
    fill(store, range(1))
    assert first.wait(20)
    fill(store, range(1, 4))
    clock.now += 90
    for number in range(4):
        store.get(key_of(number), MASTER_LEVEL)
    go_on.set()
    assert store.flush(20)
    store = reopened(store, tmp_path, clock=clock, ttl_s=100.0)
    clock.now += 90
    assert wrong_or_missing(store, range(4)) == ([], [])
    store.close()


@pytest.mark.parametrize("change", ["namespace", "format", "smaller cap"])
def test_a_file_that_is_of_no_use_is_dropped_with_one_line(
    tmp_path: Path, change: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = two_tiers(tmp_path)
    fill(store, range(60))
    assert store.close()
    options: dict[str, object] = {}
    if change == "namespace":
        options, words = {"namespace": "model n"}, f"namespace '{NAMESPACE}', this is 'model n'"
    elif change == "format":
        words = f"format '{disk_records.FORMAT}', this is '99'"
        monkeypatch.setattr(disk_records, "FORMAT", 99)
    else:
        options, words = {"disk_bytes": 1 << 20}, "over the cap"
    caplog.set_level(logging.WARNING)
    store = two_tiers(tmp_path, **options)  # type: ignore[arg-type]
    assert store.stats().disk_chunks == 0 and store.sizes(key_of(1)) is None
    assert len(caplog.records) == 1 and words in caplog.text
    fill(store, range(3))
    assert store.flush(10) and wrong_or_missing(store, range(3)) == ([], [])
    assert store.close()
    assert (tmp_path / "data.mdb").stat().st_mode & 0o077 == 0, "KV is what users wrote"


# -- who may open it --------------------------------------------------------------------------------------------------


def test_two_writers_are_refused_with_what_to_do(tmp_path: Path) -> None:
    store = two_tiers(tmp_path)
    with pytest.raises(StoreInUse, match=f"in use by process {os.getpid()}: every worker needs a directory of its own"):
        two_tiers(tmp_path)
    code = """
        import sys
        from pathlib import Path
        from prefill.disk_store import StoreInUse
        from store_cases import two_tiers
        try:
            two_tiers(Path(sys.argv[1]))
        except StoreInUse as error:
            print(error)
    """
    assert "is in use by process" in run_python(code, tmp_path).stdout
    fill(store, range(3))  # undisturbed
    store = reopened(store, tmp_path)
    assert wrong_or_missing(store, range(3)) == ([], [])
    store.close()


def test_a_directory_that_cannot_be_used_is_refused_with_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="cannot be used.*set another path"):
        two_tiers(tmp_path / "file" / "store")
    with pytest.raises(StoreError, match="too small"):
        two_tiers(tmp_path / "store", disk_bytes=1000)
