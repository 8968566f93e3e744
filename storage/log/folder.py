"""The folder in which a log keeps its segments: what the log asks of a disk, and the disk itself.

All methods block and raise OSError. Writes are durable after `Segment.sync`, names after `Folder.sync`.
"""

import contextlib
import errno
import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Final, Protocol

ZEROS: Final = bytes(1 << 20)
LEFT_BYTES: Final = 32 << 20  # on the disk, to those who share it: they need it before the log does
BUFFERS_MAX: Final = 1000  # of one call; the kernel takes 1,024


class LogDamaged(Exception):
    """A segment isn't what was written, and not at the tail of the log, where a power cut may have torn it; or the disk
    can't read it."""


class LogUnknown(OSError):
    """A newer version has written it."""

    def __init__(self, found: str) -> None:
        super().__init__(0, f"the log has format {found}, which this version doesn't know: install a newer one")


class File(Protocol):
    """One file of fixed size."""

    size: int

    def read(self, at: int, length: int) -> bytes:
        """Fewer bytes only at the end of the file. Raises LogDamaged for what the disk can't read."""
        ...

    def write(self, at: int, parts: Sequence[bytes | bytearray | memoryview]) -> None:
        """One behind the other, from `at` on."""
        ...

    def sync(self) -> None:
        """Make what was written durable. After an error nothing may be taken for durable, after another try neither."""
        ...

    def close(self) -> None: ...


class Folder(Protocol):
    """A flat folder of files."""

    def names(self) -> list[str]: ...
    def create(self, name: str, size: int) -> File:
        """A new file of zeros that are on the disk, so that writing to it later allocates nothing; its bytes are
        durable, its name after `sync`."""
        ...

    def open(self, name: str) -> File: ...
    def rename(self, name: str, to: str) -> None: ...
    def remove(self, name: str) -> None: ...
    def sync(self) -> None: ...


class LocalFile:
    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._gate = threading.Lock()  # a number that was closed may be another file's by then
        self.size = os.fstat(fd).st_size

    def read(self, at: int, length: int) -> bytes:
        try:
            with self._gate:
                found = os.pread(self._fd, length, at)
                while len(found) < length and (more := os.pread(self._fd, length - len(found), at + len(found))):
                    found += more
                return found
        except OSError as error:
            if error.errno != errno.EIO:
                raise
            raise LogDamaged(f"the disk can't read {length} bytes at {at}") from error

    def write(self, at: int, parts: Sequence[bytes | bytearray | memoryview]) -> None:
        for first in range(0, len(parts), BUFFERS_MAX):
            at += self._write(at, parts[first : first + BUFFERS_MAX])

    def _write(self, at: int, parts: Sequence[bytes | bytearray | memoryview]) -> int:
        length = sum(map(len, parts))
        written = os.pwritev(self._fd, parts, at)
        if written < length:  # rare: a signal, or a limit of the kernel's
            view = memoryview(b"".join(parts))
            while written < length:
                written += os.pwrite(self._fd, view[written:], at + written)
        return length

    def sync(self) -> None:
        os.fdatasync(self._fd)

    def close(self) -> None:
        with self._gate:
            fd, self._fd = self._fd, -1
            if fd >= 0:
                os.close(fd)


class LocalFolder:
    def __init__(self, path: Path) -> None:
        """Raises OSError."""
        self.path = path
        path.mkdir(parents=True, exist_ok=True)
        parent = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(parent)
        finally:
            os.close(parent)
        self._fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)

    def names(self) -> list[str]:
        return sorted(os.listdir(self._fd))

    def create(self, name: str, size: int) -> LocalFile:
        status = os.fstatvfs(self._fd)
        if status.f_bavail * status.f_frsize < size + LEFT_BYTES:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fd = os.open(name, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o640, dir_fd=self._fd)
        try:
            for at in range(0, size, len(ZEROS)):
                part = memoryview(ZEROS)[: size - at]
                while part:
                    part = part[os.write(fd, part) :]
            os.fsync(fd)
            return LocalFile(fd)
        except BaseException:
            os.close(fd)
            with contextlib.suppress(OSError):
                self.remove(name)  # it would only take room that there isn't
            raise

    def open(self, name: str) -> LocalFile:
        return LocalFile(os.open(name, os.O_RDWR | os.O_CLOEXEC, dir_fd=self._fd))

    def rename(self, name: str, to: str) -> None:
        os.rename(name, to, src_dir_fd=self._fd, dst_dir_fd=self._fd)

    def remove(self, name: str) -> None:
        os.unlink(name, dir_fd=self._fd)

    def sync(self) -> None:
        os.fsync(self._fd)

    def close(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)
