"""Tables of sorted keys with transactions: LMDB, behind an interface that a few dozen lines of memory can also offer.

The map grows by itself. On a full disk a reserve file is given up once, so that deletes and the log still work.
"""

import contextlib
import errno
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, Final, Protocol, TypeVar

import lmdb
import structlog

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
GROWN_AT_START: Final = 0.5  # a map fuller than this is doubled before anybody reads from it


class CatalogueDamaged(Exception):
    """The store can't be read or contradicts itself."""


class CatalogueFull(OSError):
    """The disk of the catalogue is full."""

    def __init__(self) -> None:
        super().__init__(errno.ENOSPC, "the disk of the catalogue is full")


class Transaction(Protocol):
    def get(self, table: str, key: bytes) -> bytes | None: ...
    def put(self, table: str, key: bytes, value: bytes) -> None: ...
    def append(self, table: str, key: bytes, value: bytes) -> None:
        """As `put`, for a key that comes after all others as a rule: so pages fill up."""
        ...

    def delete(self, table: str, key: bytes) -> bool: ...
    def scan(self, table: str, start: bytes = b"") -> Iterator[tuple[bytes, bytes]]:
        """Rows in the order of their keys, from `start` on. The table may not be changed meanwhile."""
        ...

    def scan_back(self, table: str, before: bytes = b"") -> Iterator[tuple[bytes, bytes]]:
        """Rows in the opposite order, those that come before a key, or all. The table may not be changed meanwhile."""
        ...

    def last_key(self, table: str) -> bytes | None: ...
    def count(self, table: str) -> int: ...


class Kv(Protocol):
    def read(self) -> AbstractContextManager[Transaction]: ...
    def update(self, change: Callable[[Transaction], T]) -> T:
        """Run `change` in a write transaction and make it durable. Whatever it raises, nothing of it was done."""
        ...

    def keep_reserve(self) -> None:
        """What is given up when the disk is full is kept again. Blocks."""
        ...

    def close(self) -> None: ...


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


class LmdbKv:
    def __init__(self, path: Path, map_size_bytes: int, tables: Sequence[str]) -> None:
        """Raises CatalogueDamaged."""
        path.mkdir(parents=True, exist_ok=True)
        self._reserve = path / "reserve"
        self._gate = threading.Condition()
        self._readers = 0
        self._growing = False
        try:
            self._env = lmdb.open(str(path), map_size=map_size_bytes, max_dbs=len(tables), max_readers=READERS_MAX)
            self._tables = {name: self._env.open_db(name.encode()) for name in tables}
            info = self._env.info()
            if info["last_pgno"] * self._env.stat()["psize"] > GROWN_AT_START * info["map_size"]:
                self._env.set_mapsize(2 * info["map_size"])
        except DAMAGE as error:
            raise CatalogueDamaged(f"{path}: {error}") from error
        except lmdb.VersionMismatchError as error:
            raise OSError(0, f"{path}: another version of LMDB has written it; install that one again") from error
        except lmdb.Error as error:
            raise OSError(errno.EIO, f"{path}: {error}") from error
        self.keep_reserve()

    def close(self) -> None:
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
                    raise
                if not self._give_up_reserve():
                    raise CatalogueFull from error

    def _grow(self) -> None:
        """LMDB's map can only change while nobody reads."""
        with self._gate:
            self._growing = True
            while self._readers:
                self._gate.wait()
            size = 2 * self._env.info()["map_size"]
            self._env.set_mapsize(size)
            self._growing = False
            self._gate.notify_all()
        log.info("catalogue.grown", map_size_bytes=size)

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
