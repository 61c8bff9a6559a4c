"""Encoded chunks in an LMDB file: opened with mistrust, read by any thread, written by one. Knows no policy.

  STORE/LOCK       held (flock) while a process has the store; its process id inside
  STORE/data.mdb   LMDB, databases:  about: format, namespace   chunks: key -> ChunkRecord
                                     used: key -> time of last use   blobs: key NUL level -> header, blob

LMDB reads through a memory map and trusts what it finds, so a damaged file could crash the process. Hence every file
is walked by `lmdb.verify` before it is opened (which reads it as a plain file, without LMDB), its length is looked at
before each use, and every record has a checksum. A file that fails is dropped as a whole: it can be computed again.
"""

from __future__ import annotations

import fcntl
import logging
import mmap
import os
import threading
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import lmdb
from lmdb.verify import VerifyError, verify

from prefill import disk_records as records
from prefill.disk_records import ChunkRecord
from prefill.tier_index import ChunkMeta

log = logging.getLogger("kvstream.store")

MIN_CAPACITY_BYTES = 1 << 20
_TEMPORARY = (lmdb.MapFullError, lmdb.TxnFullError, lmdb.ReadersFullError, lmdb.MemoryError, lmdb.DiskError)


class StoreError(Exception):
    """The store on disk cannot be used; the message says what to do.

    StoreError
    ├── StoreInUse     another process has it, or this one already
    ├── WriteFailed    for now: the disk is full, or the file has reached its cap (`is_cap`)
    └── StoreDamaged   for good: the file has to be dropped
    """


class StoreInUse(StoreError):
    pass


class WriteFailed(StoreError):
    def __init__(self, message: str, *, is_cap: bool) -> None:
        super().__init__(message)
        self.is_cap = is_cap


class StoreDamaged(StoreError):
    pass


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PutBlob:
    key: bytes
    level: str
    blob: bytes
    meta: ChunkMeta
    used_at: float


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class DeleteBlob:
    key: bytes
    level: str


Write = PutBlob | DeleteBlob


class DiskStore:
    """`namespace`: what blobs must agree in to be of use (model, layout, chunk size, profile), in words.

    Raises StoreInUse, or StoreError when the path cannot be used.
    """

    def __init__(self, path: Path, *, capacity_bytes: int, namespace: str) -> None:
        if capacity_bytes < MIN_CAPACITY_BYTES:
            raise StoreError(f"a store of {capacity_bytes} bytes is too small: give it {MIN_CAPACITY_BYTES} or more")
        self._path, self._namespace = path, namespace
        self._map_bytes = capacity_bytes // mmap.PAGESIZE * mmap.PAGESIZE
        self._reading = threading.Lock()  # the file is not closed under a reader
        self._env: lmdb.Environment | None = None
        self._size_bytes = 0
        self._is_damaged = False
        self._lock_file = self._take_lock()
        try:
            self._open_checked()
        except BaseException:
            os.close(self._lock_file)
            raise

    @property
    def file_bytes(self) -> int:
        return self._size_bytes

    # -- opening and closing --------------------------------------------------------------------------------------

    def _take_lock(self) -> int:
        try:
            self._path.mkdir(mode=0o700, parents=True, exist_ok=True)
            file = os.open(self._path / "LOCK", os.O_RDWR | os.O_CREAT, 0o600)
        except OSError as error:
            raise StoreError(f"the store directory {self._path} cannot be used: {error}; set another path") from error
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            owner = os.read(file, 20).decode("ascii", "replace") or "unknown"
            os.close(file)
            raise StoreInUse(
                f"the store {self._path} is in use by process {owner}: every worker needs a directory of its own; "
                "set another path, or stop that process"
            ) from error
        try:
            os.ftruncate(file, 0)
            os.pwrite(file, str(os.getpid()).encode(), 0)
        except OSError as error:  # a full disk: the lock holds all the same
            log.warning("%s: the process id could not be written: %s", self._path, error)
        return file

    def _open_checked(self) -> None:
        wrong = self._what_is_wrong()
        if wrong is None:
            try:
                wrong = self._open()
            except StoreDamaged as error:
                wrong = str(error)
        if wrong is not None:
            log.warning("the chunk store %s starts empty: %s", self._path, wrong)
            self.reset()

    def _what_is_wrong(self) -> str | None:
        """With the file as it lies there; None if it may be opened, or is not there yet."""
        data = self._path / "data.mdb"
        try:
            if not data.exists() or data.stat().st_size == 0:
                data.unlink(missing_ok=True)
                return None
            if data.stat().st_size > self._map_bytes:
                return f"its file has {data.stat().st_size} bytes, over the cap of {self._map_bytes} now set"
            problems: list[str] = verify(str(self._path), subdir=True)  # type: ignore[no-untyped-call]
        except VerifyError as error:
            problems = [str(error)]
        except OSError as error:
            raise StoreError(f"the store {self._path} cannot be read: {error}; set another path") from error
        return f"its file is damaged ({problems[0]})" if problems else None

    def _open(self) -> str | None:
        """-> why what is in it is of no use, or None."""
        try:
            (self._path / "lock.mdb").unlink(missing_ok=True)  # of a process that is gone: LOCK is ours
            # With the kernel's read-ahead: a blob is one run of pages (1,000 against 50 MB/s from a cold disk).
            env = lmdb.open(str(self._path), map_size=self._map_bytes, max_dbs=4, mode=0o600, readahead=True)
        except lmdb.Error as error:
            raise StoreDamaged(str(error)) from error
        except OSError as error:
            raise StoreError(f"the store {self._path} cannot be opened: {error}; set another path") from error
        try:
            self._about = env.open_db(b"about")
            self._chunks, self._used, self._blobs = (env.open_db(name) for name in (b"chunks", b"used", b"blobs"))
            ours = {b"format": str(records.FORMAT).encode(), b"namespace": self._namespace.encode()}
            with env.begin(write=True) as txn:
                found = {name: txn.get(name, db=self._about) for name in ours}
                for name, value in ours.items():
                    if found[name] is None:
                        txn.put(name, value, db=self._about)
        except lmdb.Error as error:
            env.close()
            if isinstance(failed := _failed(error), WriteFailed):
                raise StoreError(f"the store {self._path} cannot be begun: {error}; free space there") from error
            raise failed from error
        # The verifier may pass a blob that reaches beyond the end, and a map of it would end the process there. What is
        # missing reads as zeros, which no checksum fits; the trees were all there.
        whole_bytes = (env.info()["last_pgno"] + 1) * env.stat()["psize"]
        if self._length() < whole_bytes:
            os.truncate(self._path / "data.mdb", whole_bytes)
        self._env, self._is_damaged, self._size_bytes = env, False, self._length()
        for name, value in ours.items():
            theirs = found[name]
            if theirs is not None and theirs != value:
                was = theirs.decode(errors="replace")
                return f"it was written for {name.decode()} {was!r}, this is {value.decode()!r}"
        return None

    def reset(self) -> None:
        """Drop the file and begin an empty one. By the writing thread. Raises StoreError if that cannot be done now."""
        with self._reading:
            if self._env is not None:
                self._env.close()
                self._env = None
            (self._path / "data.mdb").unlink(missing_ok=True)
            wrong = self._open()
            assert wrong is None, wrong

    def close(self) -> None:
        """Gives the directory back. Nothing may be written any more; reads find nothing."""
        with self._reading:
            if self._env is not None:
                self._env.close()
                self._env = None
            if self._lock_file >= 0:
                os.close(self._lock_file)
                self._lock_file = -1

    def _length(self) -> int:
        return (self._path / "data.mdb").stat().st_size

    def _check_length(self) -> None:
        """A map of a file that was cut short ends the process when it is read."""
        known_bytes = self._size_bytes  # before the look: a commit may make the file longer meanwhile
        try:
            length = self._length()
        except OSError as error:
            raise StoreDamaged(f"its file is gone: {error}") from error
        if length < known_bytes:
            raise StoreDamaged(f"its file was cut from {known_bytes} to {length} bytes")

    # -- reading --------------------------------------------------------------------------------------------------

    def load(self) -> list[tuple[bytes, ChunkRecord, float]]:
        """(key, what is there of the chunk, when it was last used) of all chunks, once after opening.

        The databases were written together, so where they disagree the trees are damaged in a way that the verifier
        does not see, and writing on would make it worse. Raises StoreDamaged.
        """
        assert self._env is not None
        found: list[tuple[bytes, ChunkRecord, float]] = []
        try:
            with self._env.begin() as txn:
                used_at = dict(txn.cursor(self._used))
                named: set[bytes] = set()
                for key, packed in txn.cursor(self._chunks):
                    record = records.read_chunk(key, packed)
                    if record is None or key not in used_at:
                        raise StoreDamaged("its file is damaged (a chunk's record)")
                    named.update(records.blob_name(key, level) for level in record.levels)
                    found.append((key, record, records.read_used_at(used_at[key])))
                if len(used_at) != len(found) or named != set(txn.cursor(self._blobs).iternext(values=False)):
                    raise StoreDamaged("its file is damaged (there are other blobs than its records name)")
        except lmdb.Error as error:
            raise _failed(error) from error
        return found

    def read(self, key: bytes, level: str) -> bytes | None:
        """The blob, its checksum verified; None if it is not there, or damaged."""
        name = records.blob_name(key, level)
        with self._reading:
            if self._env is None:
                return None
            try:
                self._check_length()
                with self._env.begin(buffers=True) as txn:
                    record = txn.get(name, db=self._blobs)
                    return None if record is None else records.read_blob(name, memoryview(record))
            except (lmdb.Error, StoreDamaged) as error:
                failed = _failed(error) if isinstance(error, lmdb.Error) else error
                self._is_damaged |= isinstance(failed, StoreDamaged)  # the writing thread drops the file
                log.warning("the chunk store %s cannot be read: %s", self._path, failed)
                return None

    # -- writing, by one thread -----------------------------------------------------------------------------------

    def commit(self, writes: Iterable[Write], used_at: dict[bytes, float]) -> None:
        """All in one transaction, on the disk when it returns. Raises WriteFailed (nothing written) or StoreDamaged."""
        if self._env is None or self._is_damaged:
            raise StoreDamaged("its file could not be read")
        self._check_length()
        try:
            with self._env.begin(write=True) as txn:
                for write in writes:
                    if isinstance(write, PutBlob):
                        self._put(txn, write)
                    else:
                        self._delete(txn, write)
                for key, at in used_at.items():
                    if txn.get(key, db=self._chunks) is not None:
                        txn.put(key, records.pack_used_at(at), db=self._used)
        except lmdb.Error as error:
            raise _failed(error) from error
        self._size_bytes = self._length()

    def release_freed(self) -> None:
        """Pages freed by one commit can be written by the next but one: this is the one between. Raises WriteFailed."""
        assert self._env is not None
        try:
            with self._env.begin(write=True) as txn:
                txn.put(b"turn", str(txn.id()).encode(), db=self._about)
        except lmdb.Error as error:
            raise _failed(error) from error

    def _record(self, txn: lmdb.Transaction, key: bytes) -> ChunkRecord | None:
        packed = txn.get(key, db=self._chunks)
        return None if packed is None else records.read_chunk(key, bytes(packed))

    def _put(self, txn: lmdb.Transaction, put: PutBlob) -> None:
        name = records.blob_name(put.key, put.level)
        txn.put(name, records.blob_header(name, put.blob) + put.blob, db=self._blobs)
        record = self._record(txn, put.key)
        levels = {} if record is None else record.levels
        record = ChunkRecord(meta=put.meta, levels=levels | {put.level: len(put.blob)})
        txn.put(put.key, records.pack_chunk(put.key, record), db=self._chunks)
        txn.put(put.key, records.pack_used_at(put.used_at), db=self._used)

    def _delete(self, txn: lmdb.Transaction, delete: DeleteBlob) -> None:
        txn.delete(records.blob_name(delete.key, delete.level), db=self._blobs)
        record = self._record(txn, delete.key)
        levels = {} if record is None else {k: v for k, v in record.levels.items() if k != delete.level}
        if record is not None and levels:
            txn.put(delete.key, records.pack_chunk(delete.key, replace(record, levels=levels)), db=self._chunks)
        else:
            txn.delete(delete.key, db=self._chunks)
            txn.delete(delete.key, db=self._used)


def _failed(error: lmdb.Error) -> StoreError:
    """A plain lmdb.Error is the system's: no space, a limit on file sizes, a disk that does not answer."""
    if type(error) is lmdb.Error or isinstance(error, _TEMPORARY):
        return WriteFailed(str(error), is_cap=isinstance(error, lmdb.MapFullError))
    return StoreDamaged(f"its file is damaged ({error})")
