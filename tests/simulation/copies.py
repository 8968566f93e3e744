"""Copies of the share's files on a machine in memory."""

import errno
from collections.abc import Callable, Sequence
from pathlib import Path

from storage.files.copies import Capacity
from storage.files.local import name_of
from tests.simulation.machine import File, Machine, MemoryDisk


class MemoryCopy:
    def __init__(self, disk: MemoryDisk, name: str, file: File, named: bool, clock: Callable[[], float]) -> None:
        self._disk, self._name, self._file, self._named, self._clock = disk, name, file, named, clock

    @property
    def leaving(self) -> bool:
        return self._disk.leaving

    def write(self, data: bytes, at: int, grows: int) -> None:
        self._disk.touch(writes=grows > 0)
        if len(self._file.data) < at:
            self._file.data += bytes(at - len(self._file.data))
        self._file.data[at : at + len(data)] = data
        self._file.changed_at = self._clock()

    def read(self, size: int, at: int) -> bytes:
        self._disk.touch()
        return bytes(self._file.data[at : at + size])

    def found(self) -> tuple[int, int]:
        self._disk.touch()
        return len(self._file.data), 0

    def ends_unwritten(self) -> bool:
        return False

    def truncate(self, size: int) -> None:
        self._disk.touch()
        del self._file.data[size:]
        self._file.data += bytes(size - len(self._file.data))
        self._file.changed_at = self._clock()

    def cut(self, size: int) -> None:
        self._disk.touch()
        del self._file.data[size:]

    def touch(self) -> None:
        self._disk.touch()
        self._file.changed_at = self._clock()

    def sync(self) -> None:
        self._disk.touch(writes=True)
        if self._disk.names.get(self._name) is not self._file:
            raise OSError(errno.EIO, "it was removed meanwhile")
        self._file.synced = bytes(self._file.data)
        if not self._named:
            self._disk.sync_directory(self._name.rpartition("/")[0])
            self._named = True

    def close(self) -> None:
        pass


class MemoryCopies:
    def __init__(self, machine: Machine, paths: Sequence[Path], *, complete: bool = True) -> None:
        disks = [machine.disks[path] for path in paths]
        self._disks = [disk for disk in disks if not (disk.broken or disk.hung)]
        self.complete = complete and len(self._disks) == len(disks)
        self._rng, self._clock = machine.rng, machine.clock
        self.space = ""

    def open(self, number: int, generation: str, *, named: bool) -> MemoryCopy | None:
        name = name_of(self.space, number, generation)
        problem: OSError | None = None
        for disk in self._disks:
            try:
                disk.touch()
            except OSError as error:
                problem = error
                continue
            if name in disk.names:
                return MemoryCopy(disk, name, disk.names[name], named, self._clock)
        if problem is not None:
            raise problem
        return None

    def create(self, number: int, generation: str) -> MemoryCopy:
        name = name_of(self.space, number, generation)
        if any(name in disk.names for disk in self._disks if not disk.broken):
            raise FileExistsError(errno.EEXIST, "File exists", name)
        for disk in self._rng.sample(self._disks, len(self._disks)):
            try:
                disk.touch(writes=True)
            except OSError:
                continue
            if disk.leaving:
                continue
            disk.names[name] = File(changed_at=self._clock())
            disk.note(name)
            return MemoryCopy(disk, name, disk.names[name], named=False, clock=self._clock)
        raise OSError(errno.ENOSPC, "No space left on device")

    def has(self, number: int, generation: str) -> bool:
        name = name_of(self.space, number, generation)
        for disk in self._disks:
            disk.touch()
        return any(name in disk.names for disk in self._disks)

    def listing(self, part: int) -> list[tuple[int, str, float]]:
        folder, found = name_of(self.space, part).rpartition("/")[0], []
        for disk in self._disks:
            for name, file in disk.names.items():
                if name.startswith(f"{folder}/"):
                    number, _, generation = name.rpartition("/")[2].partition(".")
                    found.append((int(number, 16), generation, self._clock() - file.changed_at))
        return found

    def remove(self, number: int, generation: str) -> None:
        name = name_of(self.space, number, generation)
        for disk in self._disks:
            disk.touch()
            if disk.names.pop(name, None):
                disk.note(name)

    def capacity(self) -> Capacity:
        return Capacity(1 << 40, 1 << 40, 1 << 20, 1 << 20)

    def close(self) -> None:
        pass
