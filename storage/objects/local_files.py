"""Files and folders of a local file system: durable, and never renamed over one another. Everything blocks."""

import contextlib
import ctypes
import errno
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Final

WRITEBACK_BYTES: Final = 2 << 20
SYNC_FILE_RANGE_WAIT_BEFORE, SYNC_FILE_RANGE_WRITE, SYNC_FILE_RANGE_WAIT_AFTER = 1, 2, 4
DIGEST_ATTRIBUTE: Final = "user.tandem.xxh3-128"  # of the data set as it was received
RENAME_NOREPLACE: Final = 1
RENAME_EXCHANGE: Final = 2
AT_FDCWD: Final = -100

libc: Final = ctypes.CDLL(None, use_errno=True)


def _sync_range(fd: int, start: int, length: int, flags: int) -> None:
    """sync_file_range(2); a file system without it (FUSE) does without. Raises OSError."""
    done = libc.sync_file_range(ctypes.c_int(fd), ctypes.c_int64(start), ctypes.c_int64(length), ctypes.c_uint(flags))
    if done != 0 and (number := ctypes.get_errno()) not in (errno.EINVAL, errno.ENOSYS, errno.ESPIPE):
        raise OSError(number, os.strerror(number))


def rename_new(source: Path, target: Path) -> None:
    """rename(2) that replaces nothing. Raises FileExistsError, OSError."""
    if not _rename_with(RENAME_NOREPLACE, source, target):  # NFS, some FUSE
        os.link(source, target)
        os.unlink(source)


def _rename_with(flag: int, source: Path, target: Path) -> bool:
    """renameat2(2). False where the file system hasn't got it. Raises OSError."""
    done = libc.renameat2(AT_FDCWD, os.fsencode(source), AT_FDCWD, os.fsencode(target), flag)
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
