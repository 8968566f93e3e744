"""A volume that is a folder on a disk of this node."""

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
from typing import Any, Final

from storage.objects.blob_store import Reader, Spooled
from storage.objects.local_files import LocalSpooled, fsync_directory, libc, rename_new
from storage.objects.locks import Lock
from storage.objects.volume import DELETIONS, FOLDERS, MARKER, NotAsked, VolumeOffline
from storage.state.model import Location

RENAMES_MAX: Final = 8
PROBE: Final = ".probe"


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
            if libc.syncfs(fd) != 0:
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

    def open(self, name: str, at: int = 0) -> Reader:
        file = open(self.path / name, "rb", buffering=0)  # noqa: SIM115 - who has asked for it closes it
        if at:
            file.seek(at)
        return file

    def size(self, name: str) -> int:
        return (self.path / name).stat().st_size

    def amend(self, name: str, at: int, block: bytes, *, sync: bool = False) -> None:
        fd = os.open(self.path / name, os.O_RDWR | os.O_CLOEXEC)
        try:
            if os.pread(fd, len(block), at) != block:
                os.pwrite(fd, block, at)
            if sync:  # also what somebody else has written and not synced
                os.fsync(fd)
        finally:
            os.close(fd)

    def note_deletions(self, lines: Sequence[bytes]) -> None:
        path = self.path / DELETIONS
        is_new = not path.exists()
        whole = b"".join(b"\n" + line + b"\n" for line in lines)  # the end of the file may be torn
        with path.open("ab", buffering=0) as file:
            if file.write(whole) != len(whole):
                raise OSError(errno.ENOSPC, "a line was cut short")
            os.fsync(file.fileno())
        if is_new:
            fsync_directory(self.path)

    def deletions(self) -> list[bytes]:
        path = self.path / DELETIONS
        return [line for line in path.read_bytes().splitlines() if line] if path.exists() else []

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

    def names(self) -> Iterator[str]:
        yield from (f"archive/{path}" for path in self.archived())
        yield from (f"spool/{name}" for name in sorted(self.spooled()))

    def spooled(self) -> list[str]:
        found = (entry for entry in os.scandir(self.path / "spool") if entry.name != PROBE)
        return [entry.name for entry in found if entry.is_file() or entry.is_dir()]  # what is none of both may block

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
