"""A volume: a directory on one disk, with a marker that says it is ours.

    tandem-volume.json    marker: the volume's UUID; without it the volume is offline, so that an unmounted disk never
                          fills the system disk
    spool/                objects between their first byte and their publication
    archive/              the readable tree, published objects only
    quarantine/           what was refused, replaced or found damaged, each beside a .json that says why

All methods block and are called from worker threads. Durability comes in two steps: `Spooled.finish` makes the bytes
durable, `sync_spool` the names in the spool folder. Publication is a rename that may be lost in a power cut; the log
says what to do again.
"""

import json
import os
import time
import uuid
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Final, Protocol

MARKER: Final = "tandem-volume.json"
WRITEBACK_BYTES: Final = 32 << 20  # a long object is flushed every so often, so that its last fsync isn't long


class NoRoom(Exception):
    """No volume is online with room for another object."""


class VolumeOffline(Exception):
    """The marker is missing or isn't ours."""


class Spooled(Protocol):
    """A new object in a volume's spool folder."""

    name: str

    def write(self, buffers: Sequence[bytes | bytearray | memoryview]) -> None: ...
    def finish(self) -> None:
        """Make the bytes durable and close."""
        ...

    def discard(self) -> None: ...


class Volume(Protocol):
    """One place for objects. Raises OSError; after EIO the caller takes the volume out of service."""

    id: str
    path: Path

    def free_bytes(self) -> int: ...
    def total_bytes(self) -> int: ...
    def create(self) -> Spooled: ...
    def sync_spool(self) -> None: ...
    def publish(self, spool: str, relative: str) -> set[Path]:
        """Move a spooled object to its place in the tree; repeatable. Returns the directories to sync some time."""
        ...

    def sync_directories(self, directories: Iterable[Path]) -> None: ...
    def locate(self, spool: str, relative: str) -> Path | None:
        """Where an object is that may or may not have been published."""
        ...

    def quarantine(self, source: Path, reason: str, detail: dict[str, str]) -> Path: ...
    def spooled(self) -> list[str]: ...


def create_marker(path: Path) -> str:
    """Make `path` a volume; returns its UUID. Refuses a directory that is one already."""
    path.mkdir(parents=True, exist_ok=True)
    marker = path / MARKER
    if marker.exists():
        raise FileExistsError(f"{path} is a volume already")
    volume_id = str(uuid.uuid4())
    temporary = path / f".{MARKER}.tmp"
    with temporary.open("w", encoding="utf-8") as file:
        json.dump({"tandem_volume": 1, "id": volume_id}, file)
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(marker)
    fsync_directory(path)
    return volume_id


def fsync_directory(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


class LocalSpooled:
    def __init__(self, path: Path) -> None:
        self.name = path.name
        self._path = path
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o640)
        self._dirty = 0

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
            os.fdatasync(self._fd)
            self._dirty = 0

    def finish(self) -> None:
        fd, self._fd = self._fd, -1
        try:
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
        self.path = path
        self.id = read_marker(path)
        for folder in ("spool", "archive", "quarantine"):
            (path / folder).mkdir(exist_ok=True)
        fsync_directory(path)
        self._start = f"{time.time_ns():x}"
        self._count = 0

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

    def publish(self, spool: str, relative: str) -> set[Path]:
        target = self.path / "archive" / relative
        source = self.path / "spool" / spool
        touched = {source.parent, target.parent}
        try:
            source.rename(target)
        except FileNotFoundError:
            if source.exists():
                touched |= self._make_parents(target)
                source.rename(target)
            elif not target.exists():
                raise
        return touched

    def _make_parents(self, target: Path) -> set[Path]:
        archive = self.path / "archive"
        made = set()
        for parent in reversed(target.parents):
            if archive in parent.parents and not parent.is_dir():
                parent.mkdir(exist_ok=True)
                made.add(parent.parent)
        return made

    def sync_directories(self, directories: Iterable[Path]) -> None:
        for directory in directories:
            fsync_directory(directory)

    def locate(self, spool: str, relative: str) -> Path | None:
        for path in (self.path / "archive" / relative if relative else None, self.path / "spool" / spool):
            if path is not None and path.is_file():
                return path
        return None

    def quarantine(self, source: Path, reason: str, detail: dict[str, str]) -> Path:
        stem = f"{time.strftime('%Y%m%dT%H%M%S')}-{os.urandom(4).hex()}"
        folder = self.path / "quarantine"
        note = {"reason": reason, "quarantined": time.strftime("%Y-%m-%dT%H:%M:%S%z"), **detail}
        (folder / f"{stem}.json").write_text(json.dumps(note, indent=1), encoding="utf-8")
        target = folder / f"{stem}.dcm"
        source.rename(target)
        fsync_directory(folder)
        return target

    def spooled(self) -> list[str]:
        return [entry.name for entry in os.scandir(self.path / "spool")]


def read_marker(path: Path) -> str:
    """The volume's UUID; raises VolumeOffline."""
    try:
        marker = json.loads((path / MARKER).read_text(encoding="utf-8"))
        return str(marker["id"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise VolumeOffline(
            f"{path}: no {MARKER}; is the disk mounted? (`tandem volume add` makes a volume)"
        ) from error
