"""A volume: a directory on one disk, with a marker that says it is ours.

    tandem-volume.json    marker: the volume's UUID; without it the volume is offline, so that an unmounted disk never
                          fills the system disk
    spool/                objects between their first byte and their publication
    archive/              the readable tree, published objects only
    quarantine/           what was refused, replaced, deleted or found damaged, each beside a .json that says why
    deletions.jsonl       what was deleted, on whichever disk it lay: for the day when nothing else knows it any more

All methods block and are called from worker threads. Files are named relative to the volume ("spool/x",
"archive/patient/..."). Durability comes in two steps: `Spooled.finish` makes the bytes durable, `sync_spool` the names
in the spool folder. Publication is a rename that may be lost in a power cut; the log says what to do again.
"""

import contextlib
import ctypes
import errno
import json
import os
import threading
import time
import uuid
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final, Protocol

import xxhash

from storage.objects.locks import Lock
from storage.state.model import Location, Put

MARKER: Final = "tandem-volume.json"
DELETIONS: Final = "deletions.jsonl"
FOLDERS: Final = ("spool", "archive", "quarantine")
WRITEBACK_BYTES: Final = 2 << 20
SYNC_FILE_RANGE_WAIT_BEFORE, SYNC_FILE_RANGE_WRITE, SYNC_FILE_RANGE_WAIT_AFTER = 1, 2, 4
READ_BYTES: Final = 1 << 20
RENAMES_MAX: Final = 8
DIGEST_ATTRIBUTE: Final = "user.tandem.xxh3-128"  # of the data set as it was received
PROBE: Final = ".probe"
RENAME_NOREPLACE: Final = 1
RENAME_EXCHANGE: Final = 2
AT_FDCWD: Final = -100


class NoRoom(Exception):
    """No volume is online with room for another object."""


class VolumeOffline(Exception):
    """The marker is missing or isn't ours."""


class Spooled(Protocol):
    """A new object in a volume's spool folder."""

    name: str

    def write(self, buffers: Sequence[bytes | bytearray | memoryview]) -> None: ...
    def finish(self, digest: bytes = b"", *, sync: bool = True) -> None:
        """Make the bytes durable, if `sync`, and close. `digest`, of the data set, is kept with the file where it can
        be."""
        ...

    def discard(self) -> None: ...


class Reader(Protocol):
    """An open file of a volume."""

    def read(self, size: int, /) -> bytes: ...
    def close(self) -> None: ...


class Volume(Protocol):
    """One place for objects. Raises OSError; after EIO the caller takes the volume out of service."""

    id: str
    path: Path
    draining: bool  # nothing new is put here

    def check(self) -> None:
        """Raises VolumeOffline or OSError unless the disk is there, ours and takes writes."""
        ...

    def free_bytes(self) -> int: ...
    def total_bytes(self) -> int: ...
    def create(self) -> Spooled: ...
    def sync_spool(self) -> None: ...
    def publish(self, spool: str, relative: str) -> set[str]:
        """Move a spooled object to its place in the tree; repeatable. Returns the directories to sync some time."""
        ...

    def sync_directories(self, directories: Iterable[str]) -> None: ...
    def sync_all(self) -> None:
        """Make everything durable that was done on this volume."""
        ...

    def locate(self, location: Location) -> str | None:
        """The file of an object that may or may not have been published."""
        ...

    def open(self, name: str) -> Reader: ...
    def size(self, name: str) -> int: ...
    def amend(self, name: str, at: int, block: bytes, *, sync: bool = False) -> None:
        """Write over bytes of a file, durably if `sync`; nothing is done where they are what they should be."""
        ...

    def note_deletion(self, line: bytes) -> None:
        """Add a line to those that tell of deletions, durably."""
        ...

    def deletions(self) -> list[bytes]:
        """These lines."""
        ...

    def quarantine(self, name: str, reason: str, detail: dict[str, str]) -> None:
        """Move a file out of the way, with its reason; durable after `sync_quarantine`."""
        ...

    def sync_quarantine(self) -> None: ...
    def remove(self, name: str) -> None: ...
    def spooled(self) -> list[str]: ...
    def archived(self) -> Iterator[str]:
        """Every file of the readable tree, below `archive/`."""
        ...

    def set_draining(self, draining: bool) -> None: ...
    def close(self) -> None:
        """Leave it to others: nothing of it is used any more."""
        ...


def digest_of(volume: Volume, name: str, offset: int) -> tuple[bytes, int]:
    """(xxh3-128 of what follows `offset`, length of the file). Raises OSError."""
    digest = xxhash.xxh3_128()
    length = 0
    file = volume.open(name)
    try:
        length += len(file.read(offset))
        while block := file.read(READ_BYTES):
            digest.update(block)
            length += len(block)
    finally:
        file.close()
    return digest.digest(), length


def holds(volume: Volume, name: str, put: Put) -> bool:
    """The file is the one that the record describes, by digest and length. Raises OSError."""
    return digest_of(volume, name, put.offset) == (put.digest, put.length)


def set_aside(volume: Volume, name: str, reason: str, detail: dict[str, str]) -> None:
    """Move one file to quarantine, durably. Raises OSError."""
    volume.quarantine(name, reason, detail)
    volume.sync_quarantine()


def create_marker(path: Path) -> str:
    """Make `path` a volume; returns its UUID. Refuses a directory that is one already."""
    path.mkdir(parents=True, exist_ok=True)
    if (path / MARKER).exists():
        raise FileExistsError(f"{path} is a volume already")
    volume_id = str(uuid.uuid4())
    _write_marker(path, {"tandem_volume": 1, "id": volume_id})
    return volume_id


def _write_marker(path: Path, marker: dict[str, Any]) -> None:
    temporary = path / f".{MARKER}.tmp"
    with temporary.open("w", encoding="utf-8") as file:
        json.dump(marker, file)
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(path / MARKER)
    fsync_directory(path)


def read_marker(path: Path) -> dict[str, Any]:
    """The marker with the volume's UUID as `id`; raises VolumeOffline."""
    try:
        marker: dict[str, Any] = json.loads((path / MARKER).read_text(encoding="utf-8"))
        str(marker["id"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise VolumeOffline(
            f"{path}: no {MARKER}; is the disk mounted? (`tandem volume add` makes a volume)"
        ) from error
    return marker


_libc: Final = ctypes.CDLL(None, use_errno=True)


def _sync_range(fd: int, start: int, length: int, flags: int) -> None:
    """sync_file_range(2); a file system without it (FUSE) does without. Raises OSError."""
    done = _libc.sync_file_range(ctypes.c_int(fd), ctypes.c_int64(start), ctypes.c_int64(length), ctypes.c_uint(flags))
    if done != 0 and (number := ctypes.get_errno()) not in (errno.EINVAL, errno.ENOSYS, errno.ESPIPE):
        raise OSError(number, os.strerror(number))


def rename_new(source: Path, target: Path) -> None:
    """rename(2) that replaces nothing. Raises FileExistsError, OSError."""
    if not _rename_with(RENAME_NOREPLACE, source, target):  # NFS, some FUSE
        os.link(source, target)
        os.unlink(source)


def _rename_with(flag: int, source: Path, target: Path) -> bool:
    """renameat2(2). False where the file system hasn't got it. Raises OSError."""
    done = _libc.renameat2(AT_FDCWD, os.fsencode(source), AT_FDCWD, os.fsencode(target), flag)
    number = ctypes.get_errno()
    if done != 0 and number not in (errno.EINVAL, errno.ENOSYS):
        raise OSError(number, os.strerror(number), str(source))
    return bool(done == 0)


def exchange(one: Path, other: Path) -> None:
    """Each gets the other's name, in one step where the file system can. Raises OSError."""
    if _rename_with(RENAME_EXCHANGE, one, other):
        return
    between = other.with_name(f"{other.name}.{os.urandom(4).hex()}")
    other.rename(between)
    one.rename(other)
    between.rename(one)


def fsync_directory(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


class NotAsked(OSError):
    """A volume wasn't asked to sync: this process lacks what that takes, or has closed it. The disk may be well."""


class LocalSpooled:
    def __init__(self, path: Path) -> None:
        self.name = path.name
        self._path = path
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o640)
        self._dirty = 0
        self._begun_at = self._begun = 0  # bytes that the disk was told to begin with last

    def write(self, buffers: Sequence[bytes | bytearray | memoryview]) -> None:
        views = [memoryview(buffer) for buffer in buffers if len(buffer)]
        while views:
            written = os.writev(self._fd, views[:64])
            self._dirty += written
            while views and written >= len(views[0]):
                written -= len(views.pop(0))
            if views and written:
                views[0] = views[0][written:]
        if self._dirty >= WRITEBACK_BYTES:
            self._write_back()

    def _write_back(self) -> None:
        """Have the disk begin with what was written, and wait for what it began with before: however slow it is, little
        is left for the last sync. Raises OSError."""
        flags = SYNC_FILE_RANGE_WAIT_BEFORE | SYNC_FILE_RANGE_WRITE | SYNC_FILE_RANGE_WAIT_AFTER
        if self._begun:
            _sync_range(self._fd, self._begun_at, self._begun, flags)
        self._begun_at, self._begun = self._begun_at + self._begun, self._dirty
        _sync_range(self._fd, self._begun_at, self._begun, SYNC_FILE_RANGE_WRITE)
        self._dirty = 0

    def finish(self, digest: bytes = b"", *, sync: bool = True) -> None:
        fd, self._fd = self._fd, -1
        try:
            if digest:
                with contextlib.suppress(OSError):  # not every file system has them
                    os.setxattr(fd, DIGEST_ATTRIBUTE, digest.hex().encode())
            if sync:
                os.fsync(fd)  # an error here is final: the kernel may have dropped the pages, asking again would lie
        finally:
            os.close(fd)

    def discard(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)
        self._path.unlink(missing_ok=True)


class LocalVolume:
    def __init__(self, path: Path) -> None:
        """Takes the volume for this process. Raises InUse, VolumeOffline, OSError."""
        self.path = path
        read_marker(path)
        self._lock = Lock(path / MARKER, create=False)
        marker = read_marker(path)
        self.id = str(marker["id"])
        self.draining = bool(marker.get("draining", False))
        for folder in FOLDERS:
            (path / folder).mkdir(exist_ok=True)
        fsync_directory(path)
        self._spool = os.open(path / "spool", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        self._gate = threading.Lock()
        self._start = f"{time.time_ns():x}"
        self._count = 0

    def check(self) -> None:
        if read_marker(self.path)["id"] != self.id:
            raise VolumeOffline(f"{self.path}: another volume is there now")
        probe = self.path / "spool" / PROBE  # where objects are put first
        with probe.open("wb") as file:
            file.write(b"probe")
            file.flush()
            os.fsync(file.fileno())
        probe.unlink()

    def free_bytes(self) -> int:
        status = os.statvfs(self.path)
        return status.f_bavail * status.f_frsize

    def total_bytes(self) -> int:
        status = os.statvfs(self.path)
        return status.f_blocks * status.f_frsize

    def create(self) -> Spooled:
        self._count += 1
        return LocalSpooled(self.path / "spool" / f"{self._start}-{self._count:x}-{os.urandom(3).hex()}")

    def sync_spool(self) -> None:
        fsync_directory(self.path / "spool")

    def publish(self, spool: str, relative: str) -> set[str]:
        target = self.path / "archive" / relative
        source = self.path / "spool" / spool
        touched = {"spool", f"archive/{os.path.dirname(relative)}"}
        try:
            self._rename(source, target)
        except FileNotFoundError:
            if source.exists():
                touched |= self._make_parents(relative)
                self._rename(source, target)
            elif not target.exists():
                raise
        return touched

    def _rename(self, source: Path, target: Path) -> None:
        """Never over anything: what lies there, put back by hand perhaps, goes to quarantine."""
        for _ in range(RENAMES_MAX):
            try:
                rename_new(source, target)
                return
            except FileExistsError:
                with contextlib.suppress(FileNotFoundError):
                    self.quarantine(str(target.relative_to(self.path)), "it lay where a copy belongs", {})
                    self.sync_quarantine()
        raise FileExistsError(errno.EEXIST, "something is put there again and again")

    def _make_parents(self, relative: str) -> set[str]:
        above, made = "archive", set()
        for part in relative.split("/")[:-1]:
            folder = self.path / above / part
            if not folder.is_dir():
                folder.mkdir(exist_ok=True)
                made.add(above)
            above = f"{above}/{part}"
        return made

    def sync_directories(self, directories: Iterable[str]) -> None:
        for directory in directories:
            fsync_directory(self.path / directory)

    def sync_all(self) -> None:
        """By the file system, which tells of what it couldn't write since the volume was opened. One that was shut down
        says so only of a file."""
        try:
            with self._gate:
                fd = os.dup(self._spool)  # EBADF once it is closed; the number may be another file's then
        except OSError as error:
            raise NotAsked(error.errno, error.strerror) from error
        try:
            if _libc.syncfs(fd) != 0:
                raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(self.path))
            os.fsync(fd)
        finally:
            os.close(fd)

    def locate(self, location: Location) -> str | None:
        published, spooled = f"archive/{location.path}", f"spool/{location.spool}"
        for name in (published if location.path else "", spooled):
            if name and (self.path / name).is_file():
                return name
        return None

    def open(self, name: str) -> Reader:
        return open(self.path / name, "rb", buffering=0)

    def size(self, name: str) -> int:
        return (self.path / name).stat().st_size

    def amend(self, name: str, at: int, block: bytes, *, sync: bool = False) -> None:
        fd = os.open(self.path / name, os.O_RDWR | os.O_CLOEXEC)
        try:
            if os.pread(fd, len(block), at) != block:
                os.pwrite(fd, block, at)
                if sync:
                    os.fsync(fd)
        finally:
            os.close(fd)

    def note_deletion(self, line: bytes) -> None:
        path = self.path / DELETIONS
        is_new = not path.exists()
        with path.open("ab", buffering=0) as file:
            file.write(line + b"\n")
            os.fsync(file.fileno())
        if is_new:
            fsync_directory(self.path)

    def deletions(self) -> list[bytes]:
        path = self.path / DELETIONS
        return path.read_bytes().splitlines() if path.exists() else []

    def quarantine(self, name: str, reason: str, detail: dict[str, str]) -> None:
        stem = f"{time.strftime('%Y%m%dT%H%M%S')}-{os.urandom(4).hex()}"
        folder = self.path / "quarantine"
        note = {"reason": reason, "quarantined": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "was": name, **detail}
        (folder / f"{stem}.json").write_text(json.dumps(note, indent=1), encoding="utf-8")
        try:
            (self.path / name).rename(folder / f"{stem}.dcm")
        except OSError:
            (folder / f"{stem}.json").unlink(missing_ok=True)  # a note about nothing
            raise

    def sync_quarantine(self) -> None:
        fsync_directory(self.path / "quarantine")

    def remove(self, name: str) -> None:
        (self.path / name).unlink(missing_ok=True)

    def spooled(self) -> list[str]:
        return [entry.name for entry in os.scandir(self.path / "spool") if entry.name != PROBE]

    def archived(self) -> Iterator[str]:
        root = self.path / "archive"
        for folder, _, files in os.walk(root):
            inside = os.path.relpath(folder, root)
            yield from (file if inside == "." else f"{inside}/{file}" for file in files)

    def set_draining(self, draining: bool) -> None:
        _write_marker(self.path, {**read_marker(self.path), "draining": draining})
        before, self._lock = self._lock, Lock(self.path / MARKER, create=False)
        before.close()
        self.draining = draining

    def close(self) -> None:
        """The second time, nothing."""
        with self._gate:
            fd, self._spool = self._spool, -1
        if fd >= 0:
            os.close(fd)
        self._lock.close()
