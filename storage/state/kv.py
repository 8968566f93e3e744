"""Tables of sorted keys with transactions: LMDB, behind an interface that a few dozen lines of memory can also offer.

The map grows by itself. On a full disk a reserve file is given up once, so that deletes and the log still work.
"""

import contextlib
import errno
import os
import shutil
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, Final, Protocol, TypeVar

import lmdb
import structlog

from storage.objects.local_files import fsync_directory

log = structlog.get_logger()

T = TypeVar("T")
RESERVE_BYTES: Final = 16 << 20
READERS_MAX: Final = 256
DAMAGE: Final = (
    lmdb.CorruptedError,
    lmdb.PageNotFoundError,
    lmdb.InvalidError,
    lmdb.PanicError,
)
DATA_FILE: Final = "data.mdb"
LOCK_FILE: Final = "lock.mdb"
TAKEN_FOLDER: Final = "catalogue.taken"  # beside the catalogue's: one that is being taken from the other node
GROWN_AT_START: Final = 0.5  # a map fuller than this is doubled before anybody reads from it


class CatalogueDamaged(Exception):
    """The store can't be read or contradicts itself."""


class SnapshotLost(Exception):
    """What is being written needed the room that the snapshot held."""


class CatalogueFull(OSError):
    """The disk of the catalogue is full."""

    def __init__(self) -> None:
        super().__init__(errno.ENOSPC, "the disk of the catalogue is full")


class KeyValues(Protocol):
    """Rows of tables by key."""

    def get(self, table: str, key: bytes) -> bytes | None: ...
    def put(self, table: str, key: bytes, value: bytes) -> None: ...
    def delete(self, table: str, key: bytes) -> bool: ...
    def scan(self, table: str, start: bytes = b"") -> Iterator[tuple[bytes, bytes]]:
        """Rows in the order of their keys, from `start` on. The table may not be changed meanwhile."""
        ...


class Transaction(KeyValues, Protocol):
    def append(self, table: str, key: bytes, value: bytes) -> None:
        """As `put`, for a key that comes after all others as a rule: so pages fill up."""
        ...

    def scan_back(self, table: str, before: bytes = b"") -> Iterator[tuple[bytes, bytes]]:
        """Rows in the opposite order, those that come before a key, or all. The table may not be changed meanwhile."""
        ...

    def last_key(self, table: str) -> bytes | None: ...
    def count(self, table: str) -> int: ...


class Snapshot(Protocol):
    """The tables as they were when it was made, for as long as it is kept; any thread may look."""

    def read(self, look: Callable[[Transaction], T]) -> T:
        """Raises SnapshotLost."""
        ...

    def close(self) -> None:
        """Let go of it; waits for nobody."""
        ...


class Readable(Protocol):
    def read(self) -> AbstractContextManager[Transaction]: ...


class Kv(Readable, Protocol):
    def update(self, change: Callable[[Transaction], T]) -> T:
        """Run `change` in a write transaction and make it durable. Whatever it raises, nothing of it was done."""
        ...

    def snapshot(self) -> Snapshot: ...
    def beside(self) -> "Kv":
        """An empty one, to be filled and then to take this one's place. What is written to it isn't durable before
        that. Blocks; raises OSError."""
        ...

    def become(self, other: "Kv") -> None:
        """Take over all tables of one that was made with `beside`, durably and at once. Blocks; raises OSError."""
        ...

    def sync(self) -> None:
        """Make durable what was written to one that was made with `beside`. Blocks; raises OSError."""
        ...

    @property
    def size_bytes(self) -> int:
        """What it takes on the disk."""
        ...

    def discard(self) -> None:
        """Close one that was made with `beside` and isn't wanted, and remove it. Blocks."""
        ...

    def keep_reserve(self) -> None:
        """What is given up when the disk is full is kept again. Blocks."""
        ...

    def forget_readers(self) -> None:
        """Processes that were killed while they read hold nothing any more."""
        ...

    def close(self) -> None: ...


Step = Callable[[Transaction, bytes], bytes | None]  # given where to begin; returns the last key it has seen to


def in_steps(kv: Kv, step: Step) -> None:
    """Change rows without end, some in each transaction."""
    at = b""

    def next_step(txn: Transaction) -> bytes | None:
        return step(txn, at)

    while (last := kv.update(next_step)) is not None:
        at = last + b"\0"


class _LmdbTransaction:
    def __init__(self, txn: Any, tables: dict[str, Any]) -> None:
        self._txn, self._tables = txn, tables

    def get(self, table: str, key: bytes) -> bytes | None:
        value: bytes | None = self._txn.get(key, db=self._tables[table])
        return value

    def put(self, table: str, key: bytes, value: bytes) -> None:
        self._txn.put(key, value, db=self._tables[table])

    def append(self, table: str, key: bytes, value: bytes) -> None:
        if not self._txn.put(key, value, db=self._tables[table], append=True):
            self._txn.put(key, value, db=self._tables[table])

    def delete(self, table: str, key: bytes) -> bool:
        return bool(self._txn.delete(key, db=self._tables[table]))

    def scan(self, table: str, start: bytes = b"") -> Iterator[tuple[bytes, bytes]]:
        with self._txn.cursor(self._tables[table]) as cursor:
            if cursor.set_range(start) if start else cursor.first():
                yield from cursor

    def scan_back(self, table: str, before: bytes = b"") -> Iterator[tuple[bytes, bytes]]:
        with self._txn.cursor(self._tables[table]) as cursor:
            there = cursor.prev() if before and cursor.set_range(before) else cursor.last()
            while there:
                yield cursor.item()
                there = cursor.prev()

    def last_key(self, table: str) -> bytes | None:
        with self._txn.cursor(self._tables[table]) as cursor:
            return cursor.key() if cursor.last() else None

    def count(self, table: str) -> int:
        return int(self._txn.stat(self._tables[table])["entries"])


class _LmdbSnapshot:
    def __init__(self, txn: Any, tables: dict[str, Any]) -> None:
        self._txn, self._tables = txn, tables
        self._lock = threading.Lock()
        self._unwanted = False

    def read(self, look: Callable[[Transaction], T]) -> T:
        try:
            with self._lock:
                if self._txn is None or self._unwanted:
                    raise SnapshotLost
                return look(_LmdbTransaction(self._txn, self._tables))
        finally:
            if self._unwanted:
                self.end()

    def close(self) -> None:
        self._unwanted = True
        if self._lock.acquire(blocking=False):  # else whoever reads does it
            try:
                self._abort()
            finally:
                self._lock.release()

    def end(self) -> None:
        """Close it, and wait for who reads just now."""
        with self._lock:
            self._abort()

    def _abort(self) -> None:
        if self._txn is not None:
            self._txn.abort()
            self._txn = None


class LmdbReader:
    """For another process than the one that writes. The writer's last commit is seen by what begins afterwards."""

    def __init__(self, path: Path, tables: Sequence[str]) -> None:
        """Raises OSError."""
        try:
            self._env = lmdb.open(str(path), readonly=True, max_dbs=len(tables), max_readers=READERS_MAX)
            self._tables = {name: self._env.open_db(name.encode(), create=False) for name in tables}
        except lmdb.Error as error:
            raise OSError(errno.EIO, f"{path}: {error}") from error

    @contextmanager
    def read(self) -> Iterator[Transaction]:
        try:
            txn = self._env.begin()
        except lmdb.MapResizedError:
            self._env.set_mapsize(0)  # as the writer has it
            txn = self._env.begin()
        try:
            yield _LmdbTransaction(txn, self._tables)
        finally:
            txn.abort()

    def close(self) -> None:
        self._env.close()


class LmdbKv:
    def __init__(self, path: Path, map_size_bytes: int, tables: Sequence[str], *, durable: bool = True) -> None:
        """`durable`: each transaction is, when it ends. Raises CatalogueDamaged, OSError."""
        path.mkdir(parents=True, exist_ok=True)
        self._path, self._map_size_bytes, self._durable = path, map_size_bytes, durable
        self._reserve = path / "reserve"
        self._gate = threading.Condition()
        self._readers = 0
        self._growing = False
        self._snapshots: weakref.WeakSet[_LmdbSnapshot] = weakref.WeakSet()
        self._names = tuple(tables)
        self._open()
        if durable:
            self.keep_reserve()

    def _open(self) -> None:
        path = self._path
        try:
            self._env = lmdb.open(
                str(path),
                map_size=self._map_size_bytes,
                max_dbs=len(self._names),
                max_readers=READERS_MAX,
                sync=self._durable,
            )
            self._tables = {name: self._env.open_db(name.encode()) for name in self._names}
            info = self._env.info()
            if info["last_pgno"] * self._env.stat()["psize"] > GROWN_AT_START * info["map_size"]:
                self._env.set_mapsize(2 * info["map_size"])
        except DAMAGE as error:
            raise CatalogueDamaged(f"{path}: {error}") from error
        except lmdb.VersionMismatchError as error:
            raise OSError(0, f"{path}: another version of LMDB has written it; install that one again") from error
        except lmdb.Error as error:
            raise OSError(errno.EIO, f"{path}: {error}") from error

    def close(self) -> None:
        self._drop_snapshots()
        self._env.close()

    @contextmanager
    def read(self) -> Iterator[Transaction]:
        with self._gate:
            while self._growing:
                self._gate.wait()
            self._readers += 1
        try:
            with self._env.begin() as txn:
                yield _LmdbTransaction(txn, self._tables)
        finally:
            with self._gate:
                self._readers -= 1
                if not self._readers:
                    self._gate.notify_all()

    def update(self, change: Callable[[Transaction], T]) -> T:
        while True:
            try:
                with self._env.begin(write=True) as txn:
                    return change(_LmdbTransaction(txn, self._tables))
            except lmdb.MapFullError:
                self._grow()
            except lmdb.Error as error:
                if "No space left" not in str(error) and "ENOSPC" not in str(error):
                    if self._durable:
                        raise
                    raise OSError(errno.EIO, f"{self._path.name}: {error}") from error
                if not self._drop_snapshots() and not self._give_up_reserve():
                    raise CatalogueFull from error

    def _grow(self) -> None:
        """LMDB's map can only change while nobody reads."""
        with self._alone():
            size = 2 * self._env.info()["map_size"]
            self._env.set_mapsize(size)
        log.info("catalogue.grown", map_size_bytes=size)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Nobody reads meanwhile, and no snapshot is left."""
        with self._gate:
            self._growing = True
            while self._readers:
                self._gate.wait()
            try:
                self._drop_snapshots()
                yield
            finally:
                self._growing = False
                self._gate.notify_all()

    def _drop_snapshots(self) -> bool:
        """What they hold can be used again. Returns whether there were any."""
        with self._gate:
            snapshots = list(self._snapshots)
            self._snapshots.clear()
            for snapshot in snapshots:
                snapshot.end()
        return bool(snapshots)

    def snapshot(self) -> Snapshot:
        with self._gate:
            while self._growing:
                self._gate.wait()
            found = _LmdbSnapshot(self._env.begin(), self._tables)
            self._snapshots.add(found)
        return found

    def beside(self) -> "LmdbKv":
        path = self._path.with_name(TAKEN_FOLDER)
        shutil.rmtree(path, ignore_errors=True)
        return LmdbKv(path, self._map_size_bytes, self._names, durable=False)

    def become(self, other: Kv) -> None:
        if not isinstance(other, LmdbKv):
            raise TypeError("not made with `beside`")
        other.sync()
        other.close()
        with self._alone():
            self._env.close()
            try:
                (other._path / DATA_FILE).rename(self._path / DATA_FILE)
                # Another process may still read the old file. The lock file would go on counting that one's
                # transactions, and the next of ours would begin on whichever of the two roots that number names.
                (self._path / LOCK_FILE).unlink(missing_ok=True)
                fsync_directory(self._path)
            finally:
                self._open()
        shutil.rmtree(other._path, ignore_errors=True)

    def sync(self) -> None:
        try:
            self._env.sync(force=True)
        except lmdb.Error as error:
            raise OSError(errno.EIO, f"{self._path.name}: {error}") from error

    @property
    def size_bytes(self) -> int:
        return int((self._env.info()["last_pgno"] + 1) * self._env.stat()["psize"])

    def discard(self) -> None:
        self.close()
        shutil.rmtree(self._path, ignore_errors=True)

    def forget_readers(self) -> None:
        with self._gate:
            if not self._growing:  # else it is being closed, perhaps
                self._env.reader_check()

    def keep_reserve(self) -> None:
        """Have the reserve file, where there is room for it. Blocks."""
        if self._reserve.exists():
            return
        status = os.statvfs(self._reserve.parent)
        if status.f_bavail * status.f_frsize < 4 * RESERVE_BYTES:
            return
        with contextlib.suppress(OSError), self._reserve.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, RESERVE_BYTES)

    def _give_up_reserve(self) -> bool:
        if not self._reserve.exists():
            return False
        log.error("catalogue.disk_full", reserve="given up")
        self._reserve.unlink()
        return True
