"""The bytes of the share's files on this node's volumes: each file as it is, at a place that its inode number names,
below the name of the numbers (`BeginWriting.space`).

    files/3f9a01c2/c4/00000000000012c4

All methods block.
"""

import errno
import os
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from storage.objects.local_files import fsync_directory

FOLDER: Final = "files"
MODE: Final = 0o600


def name_of(space: str, number: int) -> str:
    """Where the bytes of an inode lie on a volume."""
    return f"{FOLDER}/{space}/{number & 0xFF:02x}/{number:016x}"


@dataclass(frozen=True)
class Capacity:
    """Of a file system, in bytes and inodes."""

    total: int
    free: int
    inodes: int
    inodes_free: int


@dataclass
class LocalFile:
    """An open one. `named`: its name is durable."""

    fd: int
    path: Path
    named: bool

    def write(self, data: bytes, at: int) -> None:
        """Raises OSError."""
        view = memoryview(data)
        while view:
            done = os.pwrite(self.fd, view, at)
            view, at = view[done:], at + done

    def read(self, size: int, at: int) -> bytes:
        """As much as there is. Raises OSError."""
        found = os.pread(self.fd, size, at)
        while len(found) < size:
            more = os.pread(self.fd, size - len(found), at + len(found))
            if not more:
                break
            found += more
        return found

    def found(self) -> tuple[int, int]:
        """Its length, and when it was written to last (ns)."""
        status = os.fstat(self.fd)
        return status.st_size, status.st_mtime_ns

    def truncate(self, size: int) -> None:
        os.ftruncate(self.fd, size)

    def sync(self) -> None:
        """Make bytes, length and name durable. Raises OSError; then nothing is known of them."""
        os.fsync(self.fd)
        if not self.named:
            fsync_directory(self.path.parent)
            self.named = True

    def close(self) -> None:
        os.close(self.fd)


class LocalFiles:
    def __init__(self, volumes: Sequence[Path], reserve_bytes: int) -> None:
        """`reserve_bytes` are left free on each volume."""
        self._volumes, self._reserve_bytes = tuple(volumes), reserve_bytes
        self.space = ""  # the name of the numbers, known when a writer has begun

    def open(self, number: int) -> LocalFile | None:
        """None if no volume has it. Raises OSError."""
        for volume in self._volumes:
            path = volume / name_of(self.space, number)
            try:
                return LocalFile(os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW), path, named=True)
            except FileNotFoundError:
                continue
        return None

    def create(self, number: int) -> LocalFile:
        """Raises OSError (ENOSPC)."""
        free = [self._free_bytes(volume) for volume in self._volumes]
        if not any(free):
            raise OSError(errno.ENOSPC, "no volume has room")
        volume = random.choices(self._volumes, weights=free)[0]  # noqa: S311 - so that a new disk is no hot spot
        path = volume / name_of(self.space, number)
        if not path.parent.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            for folder in (path.parent.parent, volume / FOLDER, volume):
                fsync_directory(folder)
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
        return LocalFile(os.open(path, flags, MODE), path, named=False)

    def _free_bytes(self, volume: Path) -> int:
        status = os.statvfs(volume)
        return max(0, status.f_bavail * status.f_frsize - self._reserve_bytes)

    def capacity(self) -> Capacity:
        """Of all volumes."""
        found = [os.statvfs(volume) for volume in self._volumes]
        return Capacity(
            sum(status.f_blocks * status.f_frsize for status in found),
            sum(self._free_bytes(volume) for volume in self._volumes),
            sum(status.f_files for status in found),
            sum(status.f_favail for status in found),
        )
