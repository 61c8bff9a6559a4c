"""What the disk tier was chosen from, for scripts/bench_store.py: LMDB as we use it, files with an index, SQLite.

Each commits a batch of puts and deletes so that it is on the disk when the call returns, and reads one blob."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from prefill.disk_store import DeleteBlob, DiskStore, PutBlob
from prefill.tier_index import MASTER_LEVEL, ChunkMeta

META = ChunkMeta()
Put = tuple[bytes, bytes]


class Backend(Protocol):
    def commit(self, puts: Sequence[Put], deletes: Sequence[bytes]) -> None: ...
    def read(self, key: bytes) -> bytes | None: ...
    def close(self) -> None: ...


class Lmdb:
    """prefill/disk_store.py, records and checksums included."""

    def __init__(self, path: Path, capacity_bytes: int) -> None:
        self._store = DiskStore(path, capacity_bytes=capacity_bytes, namespace="bench")

    def commit(self, puts: Sequence[Put], deletes: Sequence[bytes]) -> None:
        gone = [DeleteBlob(key=key, level=MASTER_LEVEL) for key in deletes]
        new = [PutBlob(key=key, level=MASTER_LEVEL, blob=blob, meta=META, used_at=0.0) for key, blob in puts]
        self._store.commit([*gone, *new], {})

    def read(self, key: bytes) -> bytes | None:
        return self._store.read(key, MASTER_LEVEL)

    def close(self) -> None:
        self._store.close()


class FilesWithIndex:
    """A file for each blob, written under another name and renamed, and a row in SQLite. No checksums."""

    def __init__(self, path: Path, capacity_bytes: int) -> None:
        (path / "blobs").mkdir(parents=True, exist_ok=True)
        self._path, self._db = path, open_sqlite(path / "index.db", page_bytes=4096)
        self._db.execute("create table if not exists chunks(key blob primary key, size int) without rowid")

    def _file(self, key: bytes) -> Path:
        return self._path / "blobs" / key.hex()

    def commit(self, puts: Sequence[Put], deletes: Sequence[bytes]) -> None:
        for key, blob in puts:
            file = os.open(self._path / "new", os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o600)
            os.write(file, blob)
            os.fdatasync(file)
            os.close(file)
            os.rename(self._path / "new", self._file(key))
        self._db.execute("begin")
        self._db.executemany("delete from chunks where key = ?", [(key,) for key in deletes])
        self._db.executemany("insert into chunks values(?, ?)", [(key, len(blob)) for key, blob in puts])
        self._db.execute("commit")
        for key in deletes:
            self._file(key).unlink()

    def read(self, key: bytes) -> bytes | None:
        return self._file(key).read_bytes()

    def close(self) -> None:
        self._db.close()


class SqliteBlobs:
    """Blobs as rows. No checksums."""

    def __init__(self, path: Path, capacity_bytes: int) -> None:
        path.mkdir(parents=True, exist_ok=True)
        self._db = open_sqlite(path / "blobs.db", page_bytes=16384)
        self._db.execute("create table if not exists chunks(key blob primary key, blob blob)")

    def commit(self, puts: Sequence[Put], deletes: Sequence[bytes]) -> None:
        self._db.execute("begin")
        self._db.executemany("delete from chunks where key = ?", [(key,) for key in deletes])
        self._db.executemany("insert into chunks values(?, ?)", puts)
        self._db.execute("commit")

    def read(self, key: bytes) -> bytes | None:
        row = self._db.execute("select blob from chunks where key = ?", (key,)).fetchone()
        return None if row is None else row[0]

    def close(self) -> None:
        self._db.close()


def open_sqlite(path: Path, *, page_bytes: int) -> sqlite3.Connection:
    db = sqlite3.connect(path, isolation_level=None)
    for pragma in (f"page_size={page_bytes}", "journal_mode=wal", "synchronous=full"):
        db.execute(f"pragma {pragma}")
    return db


BACKENDS: dict[str, type[Lmdb] | type[FilesWithIndex] | type[SqliteBlobs]] = {
    "lmdb": Lmdb,
    "files + sqlite index": FilesWithIndex,
    "sqlite blobs": SqliteBlobs,
}
