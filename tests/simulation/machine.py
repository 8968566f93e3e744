"""A machine in memory for the real store: disks that lose what wasn't synced, fail, fill and flip bits; a database that
keeps what it committed; threads in virtual time; and a power that may go at any disk operation.
"""

import asyncio
import bisect
import errno
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from storage.objects.blob_store import Reader
from storage.objects.incoming import Incoming
from storage.objects.volume import VolumeOffline
from storage.state.kv import Kv, Snapshot, Transaction
from storage.state.model import Location
from storage.workers import resolve
from tests.simulation.virtual import Process, VirtualLoop
from tests.storage.log.folders import MemoryFolder

T = TypeVar("T")


BLOCK_BYTES = 512  # of a disk, which are written or not


class Hang(BaseException):
    """A disk operation that doesn't come back as long as its disk hangs, and with an error then."""

    def __init__(self, disk: "MemoryDisk") -> None:
        super().__init__()
        self.disk = disk


class PowerCut(BaseException):
    """The power went in the middle of a disk operation: nothing that comes after it is done."""


# -- database ----------------------------------------------------------------------------------------------------------


class MemoryTransaction:
    def __init__(self, tables: dict[str, dict[bytes, bytes]], keys: dict[str, list[bytes]]) -> None:
        self._tables, self._keys = tables, keys
        self.undo: list[tuple[str, bytes, bytes | None]] = []

    def get(self, table: str, key: bytes) -> bytes | None:
        return self._tables.get(table, {}).get(key)

    def append(self, table: str, key: bytes, value: bytes) -> None:
        self.put(table, key, value)

    def put(self, table: str, key: bytes, value: bytes) -> None:
        rows = self._tables.setdefault(table, {})
        self.undo.append((table, key, rows.get(key)))
        if key not in rows:
            bisect.insort(self._keys.setdefault(table, []), key)
        rows[key] = value

    def delete(self, table: str, key: bytes) -> bool:
        rows = self._tables.setdefault(table, {})
        if key not in rows:
            return False
        self.undo.append((table, key, rows.pop(key)))
        keys = self._keys[table]
        del keys[bisect.bisect_left(keys, key)]
        return True

    def scan(self, table: str, start: bytes = b"") -> Iterator[tuple[bytes, bytes]]:
        keys = self._keys.get(table, [])
        for key in keys[bisect.bisect_left(keys, start) :]:
            yield key, self._tables[table][key]

    def scan_back(self, table: str, before: bytes = b"") -> Iterator[tuple[bytes, bytes]]:
        keys = self._keys.get(table, [])
        for key in reversed(keys[: bisect.bisect_left(keys, before)] if before else keys[:]):
            yield key, self._tables[table][key]

    def last_key(self, table: str) -> bytes | None:
        keys = self._keys.get(table)
        return keys[-1] if keys else None

    def count(self, table: str) -> int:
        return len(self._tables.get(table, ()))


class MemorySnapshot:
    def __init__(self, tables: dict[str, dict[bytes, bytes]], keys: dict[str, list[bytes]]) -> None:
        self._tables = {name: dict(rows) for name, rows in tables.items()}
        self._keys = {name: list(rows) for name, rows in keys.items()}

    def read(self, look: Callable[[Transaction], T]) -> T:
        return look(MemoryTransaction(self._tables, self._keys))

    def close(self) -> None:
        pass


class MemoryKv:
    """Every update is atomic and durable, as LMDB's are."""

    def __init__(self, power: "Power | None" = None) -> None:
        self._tables: dict[str, dict[bytes, bytes]] = {}
        self._keys: dict[str, list[bytes]] = {}
        self._power = power

    @contextmanager
    def read(self) -> Iterator[Transaction]:
        yield MemoryTransaction(self._tables, self._keys)

    def update(self, change: Callable[[Transaction], Any]) -> Any:
        if self._power:
            self._power.draw()
        txn = MemoryTransaction(self._tables, self._keys)
        try:
            result = change(txn)
        except BaseException:
            back = MemoryTransaction(self._tables, self._keys)
            for table, key, value in reversed(txn.undo):
                if value is None:
                    back.delete(table, key)
                else:
                    back.put(table, key, value)
            raise
        if self._power:
            self._power.draw()
        return result

    def snapshot(self) -> Snapshot:
        return MemorySnapshot(self._tables, self._keys)

    def beside(self) -> "MemoryKv":
        return MemoryKv()

    def become(self, other: Kv) -> None:
        if self._power:
            self._power.draw()
        assert isinstance(other, MemoryKv)
        self._tables, self._keys = other._tables, other._keys
        if self._power:
            self._power.draw()

    def sync(self) -> None:
        pass

    @property
    def size_bytes(self) -> int:
        return 0

    def discard(self) -> None:
        pass

    def keep_reserve(self) -> None:
        pass

    def forget_readers(self) -> None:
        pass

    def close(self) -> None:
        pass


# -- disks -------------------------------------------------------------------------------------------------------------


@dataclass
class Power:
    """Goes after so many more disk operations, if that was asked for."""

    operations_left: int | None = None
    on_cut: Callable[[], None] = lambda: None

    def draw(self) -> None:
        if self.operations_left is not None:
            self.operations_left -= 1
            if self.operations_left <= 0:
                self.operations_left = None
                self.on_cut()
                raise PowerCut


@dataclass
class File:
    data: bytearray = field(default_factory=bytearray)
    synced: bytes | None = None  # what a power cut leaves for sure
    changed_at: float = 0.0  # of the share's files


@dataclass
class MemoryDisk:
    """What one disk holds: names as they are, names that survive a power cut, and changes in between."""

    volume_id: str
    rng: random.Random
    power: Power = field(default_factory=Power)
    names: dict[str, File] = field(default_factory=dict)
    durable: dict[str, File] = field(default_factory=dict)
    changed: dict[str, set[str]] = field(default_factory=dict)  # directory -> names not synced there
    renamed: dict[str, str] = field(default_factory=dict)  # new name -> old name, not synced yet
    broken: bool = False
    full: bool = False
    hung: bool = False
    leaving: bool = False  # copies of the share's files are to leave it
    held: list[Callable[[float], None]] = field(default_factory=list)  # what hangs, to be let go after some seconds
    count: int = 0
    deletions: list[bytes] = field(default_factory=list)
    quarantined: list[tuple[str, str]] = field(default_factory=list)  # (sop_instance, reason)

    def touch(self, *, writes: bool = False) -> None:
        self.power.draw()
        if self.hung:
            raise Hang(self)
        if self.broken:
            raise OSError(errno.EIO, "Input/output error")
        if writes and self.full:
            raise OSError(errno.ENOSPC, "No space left on device")

    def answers(self) -> None:
        """It hangs no longer."""
        self.hung = False
        held, self.held = self.held, []
        for number, let_go in enumerate(held):  # in their order, as a file's lock does it
            let_go(0.001 + number * 1e-7)

    def sync_directory(self, directory: str) -> None:
        self.touch()
        for name in self.changed.pop(directory, ()):
            self._settle(name)

    def _settle(self, name: str) -> None:
        """A rename is one change of the file system: it is durable as soon as either of its directories is."""
        old = self.renamed.pop(name, None)
        if old is not None:
            self.durable.pop(old, None)
        if name in self.names:
            self.durable[name] = self.names[name]
        else:
            self.durable.pop(name, None)
            for new, before in list(self.renamed.items()):
                if before == name:
                    self._settle(new)

    def note(self, name: str) -> None:
        self.changed.setdefault(name.rpartition("/")[0], set()).add(name)

    def rename(self, old: str, new: str) -> None:
        self.names[new] = self.names.pop(old)
        self.renamed[new] = self.renamed.pop(old, old)
        self.note(old)
        self.note(new)

    def remove_by_hand(self, name: str) -> None:
        """As somebody would do it who thinks of this as a share."""
        del self.names[name]
        self.note(name)
        self.sync_by_hand(name)

    def add_by_hand(self, name: str, data: bytes) -> None:
        self.names[name] = File(bytearray(data), data)
        self.note(name)
        self.sync_by_hand(name)

    def sync_by_hand(self, name: str) -> None:
        directory = name.rpartition("/")[0]
        self.changed.get(directory, set()).discard(name)
        self._settle(name)

    def cut_power(self) -> None:
        """Each change that wasn't synced is there afterwards or not; bytes that weren't are cut short."""
        for directory in sorted(self.changed):
            for name in sorted(self.changed[directory]):
                if self.rng.random() < 0.5:
                    self._settle(name)
        self.names = dict(self.durable)
        for name in sorted(self.names):
            file = self.names[name]
            if file.synced is None:
                file.data = file.data[: self.rng.randrange(len(file.data) + 1)]
                if file.data and self.rng.random() < 0.3:
                    at = self.rng.randrange(len(file.data))
                    file.data[at:] = bytes(len(file.data) - at)
                file.synced = bytes(file.data)
            elif name.startswith("files/") and file.synced != file.data:
                file.data = self._partly_written(file.synced, bytes(file.data))
                file.synced = bytes(file.data)
            else:
                file.data = bytearray(file.synced)
        self.changed.clear()
        self.renamed.clear()

    def _partly_written(self, synced: bytes, written: bytes) -> bytearray:
        """What was changed since the last sync is there or not, block by block."""
        size = self.rng.choice((len(synced), len(written)))
        kept = bytearray()
        for at in range(0, size, BLOCK_BYTES):
            block = self.rng.choice((synced, written))[at : min(at + BLOCK_BYTES, size)]
            kept += block + bytes(min(BLOCK_BYTES, size - at) - len(block))
        return kept


class MemorySpooled:
    def __init__(self, disk: MemoryDisk, name: str) -> None:
        self._disk, self.name = disk, name
        self._file = disk.names[f"spool/{name}"] = File()
        disk.note(f"spool/{name}")

    def write(self, buffers: Sequence[bytes | bytearray | memoryview]) -> None:
        self._disk.touch(writes=True)
        for buffer in buffers:
            self._file.data += buffer

    def finish(self, digest: bytes = b"", *, sync: bool = True) -> None:
        self._disk.touch(writes=True)
        if sync:
            self._file.synced = bytes(self._file.data)

    def discard(self) -> None:
        if self._disk.names.pop(f"spool/{self.name}", None):
            self._disk.note(f"spool/{self.name}")


class MemoryReader:
    def __init__(self, disk: MemoryDisk, file: File, at: int) -> None:
        self._disk, self._file, self._at = disk, file, at

    def read(self, size: int, /) -> bytes:
        self._disk.touch()
        block = bytes(self._file.data[self._at : self._at + size])
        self._at += len(block)
        return block

    def close(self) -> None:
        pass


class MemoryVolume:
    def __init__(self, disk: MemoryDisk, path: Path) -> None:
        self._disk, self.path = disk, path
        self.id = disk.volume_id
        self.draining = False
        disk.touch()

    def check(self) -> None:
        self._disk.touch()

    def free_bytes(self) -> int:
        self._disk.touch()
        return 0 if self._disk.full else 1 << 40

    def total_bytes(self) -> int:
        return 1 << 40

    def create(self) -> MemorySpooled:
        self._disk.touch(writes=True)
        self._disk.count += 1
        return MemorySpooled(self._disk, f"{self.id}-{self._disk.count}")

    def sync_spool(self) -> None:
        self._disk.sync_directory("spool")

    def publish(self, spool: str, relative: str) -> set[str]:
        self._disk.touch()
        source, target = f"spool/{spool}", f"archive/{relative}"
        if source in self._disk.names:
            self._disk.rename(source, target)
        elif target not in self._disk.names:
            raise FileNotFoundError(errno.ENOENT, "No such file", target)
        return {"spool", target.rpartition("/")[0]}

    def sync_directories(self, directories: Iterable[str]) -> None:
        for directory in sorted(directories):
            self._disk.sync_directory(directory)

    def sync_all(self) -> None:
        for directory in sorted(self._disk.changed):
            self._disk.sync_directory(directory)
        for name in sorted(self._disk.names):
            file = self._disk.names[name]
            if file.synced != file.data:
                self._disk.touch()
                file.synced = bytes(file.data)

    def locate(self, location: Location) -> str | None:
        self._disk.touch()
        names = (f"archive/{location.path}" if location.path else "", f"spool/{location.spool}")
        return next((name for name in names if name in self._disk.names), None)

    def _file(self, name: str) -> File:
        self._disk.touch()
        if name not in self._disk.names:
            raise FileNotFoundError(errno.ENOENT, "No such file", name)
        return self._disk.names[name]

    def open(self, name: str, at: int = 0) -> Reader:
        return MemoryReader(self._disk, self._file(name), at)

    def size(self, name: str) -> int:
        return len(self._file(name).data)

    def amend(self, name: str, at: int, block: bytes, *, sync: bool = False) -> None:
        file = self._file(name)
        if file.data[at : at + len(block)] != block:
            self._disk.touch(writes=True)
            file.data[at : at + len(block)] = block
        if sync:
            self._disk.touch(writes=True)
            file.synced = bytes(file.data)

    def note_deletions(self, lines: Sequence[bytes]) -> None:
        self._disk.touch(writes=True)
        self._disk.deletions += lines

    def deletions(self) -> list[bytes]:
        return list(self._disk.deletions)

    def quarantine(self, name: str, reason: str, detail: dict[str, str]) -> None:
        self._file(name)
        self._disk.count += 1
        self._disk.quarantined.append((detail.get("sop_instance", ""), reason))
        self._disk.rename(name, f"quarantine/{self._disk.count}")

    def sync_quarantine(self) -> None:
        self._disk.sync_directory("quarantine")

    def remove(self, name: str) -> None:
        self._disk.touch()
        if self._disk.names.pop(name, None):
            self._disk.note(name)

    def names(self) -> Iterator[str]:
        return (name for name in sorted(self._disk.names) if name.startswith(("spool/", "archive/")))

    def spooled(self) -> list[str]:
        self._disk.touch()
        return [name.removeprefix("spool/") for name in sorted(self._disk.names) if name.startswith("spool/")]

    def archived(self) -> Iterator[str]:
        for name in sorted(self._disk.names):
            if name.startswith("archive/"):
                yield name.removeprefix("archive/")

    def set_draining(self, draining: bool) -> None:
        self.draining = draining

    def close(self) -> None:
        pass


class LogFolder(MemoryFolder):
    """The folder of a log; the power may go at each of its operations."""

    def __init__(self, rng: random.Random, power: Power) -> None:
        super().__init__(rng)
        self._power = power

    def step(self) -> None:
        self._power.draw()
        super().step()


@dataclass
class Machine:
    """A node's disks, log and database: what stays when its processes end."""

    name: str
    rng: random.Random
    volumes: int = 2
    generation: int = 0
    clock: Callable[[], float] = lambda: 0.0

    def __post_init__(self) -> None:
        self.power = Power()
        self.kv = MemoryKv(self.power)
        self.log = LogFolder(self.rng, self.power)
        self.disks: dict[Path, MemoryDisk] = {}
        for number in range(self.volumes):
            self.new_disk(Path(f"/{self.name}{number}"))

    def new_disk(self, path: Path) -> None:
        self.generation += 1
        self.disks[path] = MemoryDisk(f"{self.name}-{path.name}-{self.generation}", self.rng, self.power)

    def open_volume(self, path: Path) -> MemoryVolume:
        disk = self.disks[path]
        if disk.broken or disk.hung:
            raise VolumeOffline("no answer")
        return MemoryVolume(disk, path)

    def cut_power(self) -> None:
        self.power.operations_left = None
        self.log.cut_power()
        for disk in self.disks.values():
            disk.answers()
            disk.cut_power()


# -- threads -----------------------------------------------------------------------------------------------------------


def _too_late(future: "asyncio.Future[Any]", error: OSError) -> None:
    resolve(future, None, error)
    future.cancelled() or future.exception()  # whoever waited may have given up long ago


class VirtualThreads:
    """Jobs take virtual time; each runs at one moment of it. With one thread they keep their order."""

    def __init__(self, loop: VirtualLoop, rng: random.Random, process: Process, count: int) -> None:
        self._loop, self._rng, self._process, self._count = loop, rng, process, count
        self._free_at = 0.0
        self._lost = False

    def run(self, function: Callable[..., Any], *args: Any) -> "asyncio.Future[Any]":
        future: asyncio.Future[Any] = self._loop.create_future()
        if self._lost:
            return future
        delay = 0.001 + self._rng.random() * 0.004 if self._rng.random() < 0.97 else self._rng.random() * 0.5
        if self._count == 1:
            self._free_at = max(self._free_at, self._loop.now) + delay
            delay = self._free_at - self._loop.now
        self._loop.post(self._process, delay, self._work, future, function, args)
        return future

    def _work(self, future: "asyncio.Future[Any]", function: Callable[..., Any], args: tuple[Any, ...]) -> None:
        if self._lost:
            return
        try:
            result, error = function(*args), None
        except PowerCut:
            return
        except Hang as hang:
            self._lost = self._count == 1  # with it the only thread
            if isinstance(getattr(function, "__self__", None), Incoming):  # half done: it can't be done from the start
                late = OSError(errno.EAGAIN, "it answered too late")
                hang.disk.held.append(lambda after: self._loop.post(self._process, after, _too_late, future, late))
            elif not self._lost:
                job = (self._work, future, function, args)
                hang.disk.held.append(lambda after: self._loop.post(self._process, after, *job))
            return
        except Exception as raised:
            result, error = None, raised
        if self._count == 1:
            self._free_at = max(self._free_at, self._loop.now) + 0.0005
        self._loop.post(self._process, 0.0004, resolve, future, result, error)

    def stop(self) -> None:
        pass

    @property
    def waiting(self) -> int:
        return 0

    def leave(self) -> None:
        pass

    def reinforce(self, stuck_s: float) -> int:
        return 0
