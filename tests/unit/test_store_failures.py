"""The chunk store with a directory where things fail: damaged files, full disks, a queue that is full."""

from __future__ import annotations

import os
import random
import shutil
from pathlib import Path

import lmdb
import pytest
from store_cases import content, fill, key_of, reopened, run_python, two_tiers, wrong_or_missing

from prefill import disk_records, disk_store
from prefill.disk_store import DeleteBlob, DiskStore, PutBlob, WriteFailed
from prefill.store import MASTER_LEVEL
from prefill.tier_index import ChunkMeta

# -- damage -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("base")
    store = two_tiers(path)
    fill(store, range(40))
    for number in range(0, 40, 3):  # holes, and pages used twice
        store.put(key_of(number), MASTER_LEVEL, content(number, kl=0.0) + b"x")
        store.put(key_of(number), MASTER_LEVEL, content(number))
    assert store.close()
    return path


def damage(path: Path, draw: random.Random, how: str) -> None:
    data = bytearray(path.read_bytes())
    if how == "cut":
        del data[draw.randrange(len(data)) :]
    elif how == "garbage":
        data = bytearray(draw.randbytes(len(data)))
    elif how == "zeros":
        begin = draw.randrange(len(data))
        data[begin : begin + 50_000] = bytes(len(data[begin : begin + 50_000]))
    else:
        first_pages = 16 * 4096  # mostly LMDB's own: the roots of its trees
        for _ in range(draw.choice([1, 4, 64])):
            at = draw.randrange(first_pages if how == "flips in the tree" else len(data))
            data[at] ^= 1 << draw.randrange(8)
    path.write_bytes(data)


@pytest.mark.parametrize("how", ["flips", "flips in the tree", "cut", "zeros", "garbage"])
@pytest.mark.parametrize("seed", range(6))
def test_a_damaged_file_loses_chunks_and_nothing_else(tmp_path: Path, base: Path, how: str, seed: int) -> None:
    shutil.copytree(base, tmp_path, dirs_exist_ok=True)
    damage(tmp_path / "data.mdb", random.Random(f"{how} {seed}"), how)
    store = two_tiers(tmp_path, ram_bytes=200_000)
    wrong, missing = wrong_or_missing(store, range(40))
    assert wrong == []
    store.check_integrity()
    fill(store, range(40))  # computed again
    assert store.flush(20)
    store = reopened(store, tmp_path)
    assert wrong_or_missing(store, range(40)) == ([], [])
    store.close()


def test_a_flip_in_one_blob_costs_that_chunk_alone(tmp_path: Path, base: Path) -> None:
    shutil.copytree(base, tmp_path, dirs_exist_ok=True)
    data = bytearray((tmp_path / "data.mdb").read_bytes())
    at = data.index(content(7)[1000:1040])
    data[at] ^= 1
    (tmp_path / "data.mdb").write_bytes(data)
    store = two_tiers(tmp_path)
    assert wrong_or_missing(store, range(40)) == ([], [7])
    assert store.stats().num_disk_damaged == 1
    assert store.sizes(key_of(7)) is None, "without its master a chunk goes as a whole"
    store = reopened(store, tmp_path)
    assert store.stats().disk_chunks == 39
    store.close()


@pytest.mark.parametrize("what", ["a blob more", "a blob less", "no time of use", "a time too many", "a record"])
def test_databases_that_disagree_are_damaged_and_not_written_on(
    tmp_path: Path, base: Path, what: str, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(base, tmp_path, dirs_exist_ok=True)
    with lmdb.open(str(tmp_path), map_size=8 << 20, max_dbs=4) as env:
        chunks, used, blobs = (env.open_db(name) for name in (b"chunks", b"used", b"blobs"))
        with env.begin(write=True) as txn:
            if what == "a blob more":
                txn.put(b"nobody's", b"blob", db=blobs)
            elif what == "a blob less":
                txn.delete(disk_records.blob_name(key_of(3), "q1"), db=blobs)
            elif what == "no time of use":
                txn.delete(key_of(3), db=used)
            elif what == "a time too many":
                txn.put(b"nobody's", bytes(8), db=used)
            else:
                record = bytearray(txn.get(key_of(3), db=chunks))
                record[-1] ^= 1
                txn.put(key_of(3), bytes(record), db=chunks)
    store = two_tiers(tmp_path)
    assert store.stats().disk_chunks == 0
    assert len(caplog.messages) == 1 and "starts empty: its file is damaged" in caplog.text
    fill(store, range(3))
    assert store.flush(10) and wrong_or_missing(store, range(3)) == ([], [])
    store.close()


def test_what_the_verifier_finds_is_not_opened(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(base, tmp_path, dirs_exist_ok=True)
    monkeypatch.setattr(disk_store, "verify", lambda *_, **__: ["page 7 is wrong", "page 8 too"])
    store = two_tiers(tmp_path)
    assert store.stats().disk_chunks == 0
    assert caplog.messages == [f"the chunk store {tmp_path} starts empty: its file is damaged (page 7 is wrong)"]
    store.close()


def test_a_file_cut_short_while_it_is_open_ends_nothing(tmp_path: Path, base: Path) -> None:
    """A memory map of it would end the process at the first look."""
    shutil.copytree(base, tmp_path, dirs_exist_ok=True)
    store = two_tiers(tmp_path, ram_bytes=1)
    assert store.get(key_of(0), MASTER_LEVEL) == content(0)
    os.truncate(tmp_path / "data.mdb", 5 * 4096)
    assert store.get(key_of(1), MASTER_LEVEL) is None
    fill(store, range(50, 55))  # to a file begun anew
    store.flush(20)
    fill(store, range(60, 65))
    assert store.flush(20)
    assert wrong_or_missing(store, range(60, 65)) == ([], [])
    store.check_integrity()
    store = reopened(store, tmp_path)
    assert wrong_or_missing(store, range(60, 65)) == ([], [])
    store.close()


# -- a full disk ------------------------------------------------------------------------------------------------------


def test_a_file_at_its_cap_makes_room_and_goes_on(tmp_path: Path) -> None:
    """Small blobs fill pages badly: the file is full long before the books are."""
    store = two_tiers(tmp_path, ram_bytes=1, disk_bytes=1 << 20, off_s=0.0)
    for number in range(600):
        store.put(key_of(number), MASTER_LEVEL, content(number, max_bytes=6_000).ljust(4_200))
        if number % 50 == 49:
            assert store.flush(20)
            store.check_integrity()
    stats = store.stats()
    assert stats.disk_file_bytes <= 1 << 20
    assert stats.disk_chunks > 60 and stats.num_disk_failed_writes == 0
    for number in range(600):
        blob = store.get(key_of(number), MASTER_LEVEL)
        assert blob in (None, content(number, max_bytes=6_000).ljust(4_200))
    assert store.stats().num_disk_damaged == 0
    store = reopened(store, tmp_path, disk_bytes=1 << 20)
    assert store.stats().disk_chunks == stats.disk_chunks
    store.close()


def test_pages_freed_at_the_cap_can_be_written_at_once(tmp_path: Path) -> None:
    """LMDB itself keeps them back for one commit."""
    store = DiskStore(tmp_path, capacity_bytes=1 << 20, namespace="n")
    meta, big = ChunkMeta(), bytes(450_000)
    for key in (b"1", b"2"):
        store.commit([PutBlob(key=key, level=MASTER_LEVEL, blob=big, meta=meta, used_at=0.0)], {})
    third = [PutBlob(key=b"3", level=MASTER_LEVEL, blob=big, meta=meta, used_at=0.0)]
    with pytest.raises(WriteFailed) as full:
        store.commit([DeleteBlob(key=b"1", level=MASTER_LEVEL), *third], {})
    assert full.value.is_cap and store.read(b"1", MASTER_LEVEL) == big, "nothing of a failed commit is done"
    store.commit([DeleteBlob(key=b"1", level=MASTER_LEVEL)], {})
    with pytest.raises(WriteFailed):
        store.commit(third, {})
    store.release_freed()
    store.commit(third, {})
    assert [store.read(key, MASTER_LEVEL) for key in (b"1", b"2", b"3")] == [None, big, big]
    store.close()


def test_a_write_that_fails_turns_writing_off_for_a_while_and_reading_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = two_tiers(tmp_path, ram_bytes=1)
    fill(store, range(5))
    assert store.flush(10)
    assert store._disk is not None
    disk, commit = store._disk._store, store._disk._store.commit

    def full(*_: object) -> None:
        raise WriteFailed("no space left on device", is_cap=False)

    monkeypatch.setattr(disk, "commit", full)
    store.put(key_of(5), MASTER_LEVEL, content(5))
    assert not store.flush(10)
    stats = store.stats()
    assert stats.is_disk_off and stats.num_disk_failed_writes == 1
    assert "cannot write: no space left on device; kept in RAM only for 30 s" in caplog.text
    assert store.sizes(key_of(5)) is None, "it was nowhere else"
    assert not store.put(key_of(6), MASTER_LEVEL, content(6)) and store.stats().num_disk_skipped == 1
    assert wrong_or_missing(store, range(5)) == ([], [])
    store.check_integrity()
    monkeypatch.setattr(store._disk.writer, "_off_until", float("-inf"))  # half a minute later, and full still
    store.put(key_of(4), MASTER_LEVEL, b"twice", kl=0.0)
    assert not store.flush(10) and store.stats().num_disk_failed_writes == 2
    monkeypatch.setattr(disk, "commit", commit)
    monkeypatch.setattr(store._disk.writer, "_off_until", float("-inf"))
    assert store.put(key_of(6), MASTER_LEVEL, content(6)) and store.flush(10)
    assert wrong_or_missing(store, range(7)) == ([], [4, 5])
    store = reopened(store, tmp_path)
    assert wrong_or_missing(store, range(7)) == ([], [4, 5]), "what was given up does not come back"
    store.close()


def test_a_disk_that_is_really_full(tmp_path: Path) -> None:
    """A limit on file sizes stands for it: the same refused write, without root."""
    code = """
        import resource, sys
        from pathlib import Path
        from store_cases import content, fill, key_of, two_tiers, wrong_or_missing
        store = two_tiers(Path(sys.argv[1]), ram_bytes=1, off_s=3600.0)
        fill(store, range(10))
        assert store.flush(20)
        limit = store.stats().disk_file_bytes + 50_000
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        fill_again = [store.put(key_of(n), "lossless", content(n)) for n in range(10, 20)]
        assert not store.flush(20) and store.stats().is_disk_off
        assert wrong_or_missing(store, range(10)) == ([], []), "reads go on"
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        store._disk.writer._off_until = float("-inf")
        fill(store, range(20, 25))
        assert store.flush(20)
        store.check_integrity()
        print("fine", store.stats().num_disk_failed_writes, store.close())
    """
    done = run_python(code, tmp_path)
    assert done.stdout == "fine 1 True\n", done.stderr
    store = two_tiers(tmp_path)
    assert wrong_or_missing(store, range(25))[0] == []
    assert set(wrong_or_missing(store, range(25))[1]) <= set(range(10, 20))
    store.close()


def test_a_queue_that_is_full_keeps_chunks_in_ram_only(tmp_path: Path) -> None:
    store = two_tiers(tmp_path, queue_bytes=1)
    store.put(key_of(1), MASTER_LEVEL, b"longer than the queue")
    assert store.get(key_of(1), MASTER_LEVEL) == b"longer than the queue"
    assert store.stats().disk_chunks == 0 and store.stats().num_disk_skipped == 1
    store.close()
