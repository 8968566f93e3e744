"""The bytes of the share's files on this node's volumes: each file as it is, at a place that its inode number names,
below the name of the numbers (`BeginWriting.space`). A copy that was made again has a generation behind its number.

    files/3f9a01c2/c4/00000000000012c4
    files/3f9a01c2/c5/00000000000012c5.5b1d0e77

All methods block, and may be called from several threads.
"""

import contextlib
import errno
import os
import random
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

from storage.files.copies import Capacity
from storage.objects.volume import MARKER

HOLE_BYTES: Final = 4096  # what is looked at of the end of a file
FOLDER: Final = "files"
FILE_MODE, FOLDER_MODE = 0o600, 0o700
PARTS: Final = 256  # folders in which the files of a volume lie
LOOK_S: Final = 0.5  # how old a look at a volume's room may be
ROOT_USER: Final = 0


def name_of(space: str, number: int, generation: str = "") -> str:
    """Where a copy of the bytes of an inode lies on a volume."""
    return f"{_folder_of(space, number & 0xFF)}/{number:016x}{'.' if generation else ''}{generation}"


def _folder_of(space: str, part: int) -> str:
    return f"{FOLDER}/{space}/{part:02x}"


def has_files(volume: Path) -> bool:
    """Bytes of some file of the share, whoever has named it, lie on a volume. Raises OSError."""
    return any(files for _, _, files in os.walk(volume / FOLDER))


def copies_in(volume: Path, space: str) -> Iterator[tuple[int, str]]:
    """(inode number, generation) of the copies that lie on a volume. Raises OSError."""
    for part in range(PARTS):
        with contextlib.suppress(FileNotFoundError), os.scandir(volume / _folder_of(space, part)) as entries:
            yield from filter(None, (_copy_of(entry.name) for entry in entries))


def _copy_of(name: str) -> tuple[int, str] | None:
    number, _, generation = name.partition(".")
    try:
        return int(number, 16), generation
    except ValueError:  # not ours
        return None


def ends_in_hole(fd: int) -> bool:
    """The last of a file was never written, though its length was set. Raises OSError."""
    last = os.fstat(fd).st_size - HOLE_BYTES
    try:
        return last > 0 and os.lseek(fd, last, os.SEEK_DATA) < 0
    except OSError as error:
        if error.errno == errno.ENXIO:  # no data from there on
            return True
        raise


class LocalFile:
    """See `StoredFile`. Its descriptors are closed when the last thread that works on it is done, and not before: they
    would be another file's by then."""

    def __init__(self, fd: int, folder: int, volume: "_Volume", named: bool) -> None:
        """`folder`: a descriptor of it; `named`: its name is durable."""
        self._fd, self._folder, self._volume, self._named = fd, folder, volume, named
        self._lock = threading.Lock()
        self._working, self._over = 0, False

    @contextlib.contextmanager
    def _used(self) -> Iterator[int]:
        with self._lock:
            if self._over:
                raise OSError(errno.EBADF, "it is closed")
            self._working += 1
        try:
            yield self._fd
        finally:
            self._done(1)

    def _done(self, count: int) -> None:
        with self._lock:
            self._working -= count
            closes = self._over and not self._working
        if closes:
            os.close(self._fd)
            os.close(self._folder)

    @property
    def leaving(self) -> bool:
        return self._volume.draining

    def write(self, data: bytes, at: int, grows: int) -> None:
        self._volume.take(grows)
        with self._used() as fd:
            view = memoryview(data)
            while view:
                done = os.pwrite(fd, view, at)
                view, at = view[done:], at + done

    def read(self, size: int, at: int) -> bytes:
        with self._used() as fd:
            found = os.pread(fd, size, at)
            while len(found) < size:
                more = os.pread(fd, size - len(found), at + len(found))
                if not more:
                    break
                found += more
            return found

    def found(self) -> tuple[int, int]:
        with self._used() as fd:
            status = os.fstat(fd)
            return status.st_size, status.st_mtime_ns

    def ends_unwritten(self) -> bool:
        with self._used() as fd:
            return ends_in_hole(fd)

    def truncate(self, size: int) -> None:
        with self._used() as fd:
            os.ftruncate(fd, size)

    def cut(self, size: int) -> None:
        with self._used() as fd:
            if os.fstat(fd).st_size > size:
                os.ftruncate(fd, size)

    def touch(self) -> None:
        with self._used() as fd:
            os.utime(fd)

    def sync(self) -> None:
        with self._used() as fd:
            os.fsync(fd)
            if not self._named:
                os.fsync(self._folder)
                self._named = True
            if not os.fstat(fd).st_nlink:
                raise OSError(errno.EIO, "it was removed meanwhile")

    def close(self) -> None:
        with self._lock:
            if self._over:
                return
            self._over = True
        self._done(0)


class _Volume:
    """Everything below is by its folder's descriptor: what is mounted in its place later is another one."""

    def __init__(self, path: Path, reserve_bytes: int) -> None:
        """Raises OSError for what is no volume."""
        self.path = path
        self.root = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        self.draining = False
        self._reserve_bytes = reserve_bytes
        self._lock = threading.Lock()
        self._durable: set[str] = {""}  # folders whose names are
        self._left, self._looked_at = 0, float("-inf")
        status = os.stat(MARKER, dir_fd=self.root)
        self._owner = status.st_uid, status.st_gid

    def __del__(self) -> None:
        """When the last thread that works on it has let go of it: its descriptor is never another file's meanwhile."""
        if "root" in self.__dict__:
            os.close(self.root)

    def is_at_its_path(self) -> bool:
        """And not, by now, another file system there, or none."""
        try:
            return os.path.samestat(os.stat(self.path), os.fstat(self.root))
        except OSError:
            return False

    def capacity(self) -> Capacity:
        status = os.fstatvfs(self.root)
        free = max(0, status.f_bavail * status.f_frsize - self._reserve_bytes)
        return Capacity(status.f_blocks * status.f_frsize, free, status.f_files, status.f_favail)

    def take(self, size: int) -> None:
        """Raises OSError if there isn't so much room beside the reserve."""
        if not size:
            return
        now = time.monotonic()
        if now - self._looked_at > LOOK_S or self._left < size:
            self._left, self._looked_at = self.capacity().free, now
        if self._left < size:
            raise OSError(errno.ENOSPC, "the volume is full")
        self._left -= size

    def open(self, name: str, *, named: bool) -> LocalFile:
        """Raises OSError."""
        with self._folder(name.rpartition("/")[0]) as folder:
            try:
                fd = self._opened(name, os.O_RDWR)
            except OSError as error:
                if error.errno != errno.EROFS:
                    raise
                fd = self._opened(name, os.O_RDONLY)
            return LocalFile(fd, os.dup(folder), self, named)

    def create(self, name: str) -> LocalFile:
        """Raises OSError."""
        folder = name.rpartition("/")[0]
        with self._lock:
            self._make(folder)
        with self._folder(folder) as parent:
            fd = self._opened(name, os.O_RDWR | os.O_CREAT | os.O_EXCL)
            self._give(fd)
            return LocalFile(fd, os.dup(parent), self, named=False)

    def names(self, folder: str) -> list[tuple[str, float]]:
        """Each with how long ago it was changed. Raises OSError."""
        now = time.time()
        try:
            with self._folder(folder) as fd, os.scandir(fd) as entries:
                return [(entry.name, now - entry.stat(follow_symlinks=False).st_mtime) for entry in entries]
        except FileNotFoundError:
            return []

    def has(self, name: str) -> bool:
        """Raises OSError."""
        try:
            os.stat(name, dir_fd=self.root, follow_symlinks=False)
        except FileNotFoundError:
            return False
        return True

    def seems_to_have(self, name: str) -> bool:
        """False, too, where that can't be said."""
        try:
            return self.has(name)
        except OSError:
            return False

    def remove(self, name: str) -> None:
        """Raises OSError."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name, dir_fd=self.root)

    def _make(self, folder: str) -> None:
        """With its parents, durably."""
        if folder in self._durable:
            return
        above = folder.rpartition("/")[0]
        self._make(above)
        with contextlib.suppress(FileExistsError):
            os.mkdir(folder, FOLDER_MODE, dir_fd=self.root)
        with self._folder(folder) as fd:
            self._give(fd)
        with self._folder(above) as fd:
            os.fsync(fd)
        self._durable.add(folder)

    def _give(self, fd: int) -> None:
        """To the gateway, whose volume it is: this process may be root's."""
        if os.geteuid() == ROOT_USER and self._owner != (ROOT_USER, ROOT_USER):
            os.fchown(fd, *self._owner)

    def _opened(self, name: str, flags: int) -> int:
        return os.open(name, flags | os.O_CLOEXEC | os.O_NOFOLLOW, FILE_MODE, dir_fd=self.root)

    @contextlib.contextmanager
    def _folder(self, name: str) -> Iterator[int]:
        fd = os.open(name or ".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=self.root)
        try:
            yield fd
        finally:
            os.close(fd)


class LocalFiles:
    """See `CopyStore`."""

    def __init__(
        self, volumes: Sequence[Path], reserve_bytes: int, draining: Sequence[Path] = (), *, complete: bool = True
    ) -> None:
        """`reserve_bytes` are left free on each volume; on those that are `draining` nothing new is put. `complete`:
        this node has no other volumes. Those that aren't there are left out, and it isn't complete then either."""
        self._reserve_bytes = reserve_bytes
        self._using, self._uses = threading.Lock(), 0
        self._volumes: list[_Volume] = []
        self.complete = complete
        self.space = ""  # the name of the numbers, known when a writer has begun
        self.use(volumes, draining, complete=complete)

    def use(
        self, volumes: Sequence[Path], draining: Sequence[Path], absent: Sequence[Path] = (), *, complete: bool
    ) -> None:
        """From now on these, as for a new one; those that are `absent` aren't touched. What is open stays so. Of
        several calls the last one counts, however long an earlier one was held up."""
        with self._using:
            self._uses += 1
            turn, known = self._uses, {volume.path: volume for volume in self._volumes}
        found = []
        for path in volumes:
            volume = known.get(path)
            try:
                if path not in absent and (volume is None or not volume.is_at_its_path()):
                    volume = _Volume(path, self._reserve_bytes)
            except OSError:
                volume = None
            if volume is None:
                complete = False
            else:
                found.append(volume)
        with self._using:
            if turn == self._uses:
                self._volumes, self.complete = found, complete
                for volume in found:
                    volume.draining = volume.path in draining

    def open(self, number: int, generation: str = "", *, named: bool) -> LocalFile | None:
        problem: OSError | None = None
        for volume in self._volumes:
            try:
                return volume.open(name_of(self.space, number, generation), named=named)
            except FileNotFoundError:
                continue
            except OSError as error:
                problem = error
        if problem is not None:
            raise problem
        return None

    def create(self, number: int, generation: str = "") -> LocalFile:
        name = name_of(self.space, number, generation)
        if any(volume.seems_to_have(name) for volume in self._volumes):
            raise FileExistsError(errno.EEXIST, "there is one", name)
        free = {volume: room for volume in self._volumes if (room := self._room(volume))}
        while free:
            chosen = random.choices(list(free), list(free.values()))[0]  # noqa: S311 - so that a new disk is no hot spot
            try:
                return chosen.create(name)
            except FileExistsError:
                raise
            except OSError:
                del free[chosen]
        raise OSError(errno.ENOSPC, "no volume has room")

    def has(self, number: int, generation: str) -> bool:
        return any(volume.has(name_of(self.space, number, generation)) for volume in self._volumes)

    def listing(self, part: int) -> list[tuple[int, str, float]]:
        found = []
        for volume in self._volumes:
            for name, age_s in volume.names(_folder_of(self.space, part)):
                if copy := _copy_of(name):
                    found.append((*copy, age_s))
        return found

    def remove(self, number: int, generation: str) -> None:
        for volume in self._volumes:
            volume.remove(name_of(self.space, number, generation))

    def _room(self, volume: _Volume) -> int:
        if volume.draining:
            return 0
        try:
            return volume.capacity().free
        except OSError:
            return 0

    def capacity(self) -> Capacity:
        found = []
        for volume in self._volumes:
            with contextlib.suppress(OSError):
                found.append(volume.capacity())
        return Capacity(
            sum(one.total for one in found),
            sum(one.free for one in found),
            sum(one.inodes for one in found),
            sum(one.inodes_free for one in found),
        )

    def close(self) -> None:
        self._volumes = []
