"""A folder in memory on a disk that forgets, tears and reorders what wasn't synced, fails, and is full."""

import errno
import random
from collections.abc import Sequence
from dataclasses import dataclass, field

SECTOR = 512


@dataclass
class Content:
    """What a file holds, and what of it is on the disk: the rest is a list of sectors in the order of writing."""

    now: bytearray
    durable: bytearray
    waiting: list[tuple[int, bytes]] = field(default_factory=list)


class MemoryFile:
    def __init__(self, folder: "MemoryFolder", content: Content) -> None:
        self._folder, self._content = folder, content
        self.size = len(content.now)

    def read(self, at: int, length: int) -> bytes:
        return bytes(self._content.now[at : at + length])

    def write(self, at: int, parts: Sequence[bytes | bytearray | memoryview]) -> None:
        self._folder.step()
        content, data = self._content, b"".join(parts)
        content.now[at : at + len(data)] = data
        while data:
            size = SECTOR - at % SECTOR
            content.waiting.append((at, bytes(data[:size])))
            at, data = at + size, data[size:]

    def sync(self) -> None:
        self._folder.step()
        self._content.durable[:] = self._content.now
        self._content.waiting.clear()
        self._folder.syncs += 1

    def close(self) -> None:
        pass


class MemoryFolder:
    def __init__(self, rng: random.Random, room: int = 1 << 40) -> None:
        self.rng, self.room = rng, room
        self.syncs = 0
        self.steps_left: int | None = None  # operations until one fails
        self._now: dict[str, Content] = {}
        self._durable: dict[str, Content] = {}

    def step(self) -> None:
        """Raises OSError once the disk has failed."""
        if self.steps_left is not None:
            self.steps_left -= 1
            if self.steps_left < 0:
                raise OSError(errno.EIO, "Input/output error")

    def names(self) -> list[str]:
        return sorted(self._now)

    def create(self, name: str, size: int) -> MemoryFile:
        self.step()
        if sum(len(content.now) for content in self._now.values()) + size > self.room:
            raise OSError(errno.ENOSPC, "No space left on device")
        if name in self._now:
            raise FileExistsError(name)
        content = self._now[name] = Content(bytearray(size), bytearray(size))
        return MemoryFile(self, content)

    def open(self, name: str) -> MemoryFile:
        return MemoryFile(self, self._now[name])

    def rename(self, name: str, to: str) -> None:
        self.step()
        if to in self._now and to != name:
            raise AssertionError(f"{to} is overwritten")
        self._now[to] = self._now.pop(name)

    def remove(self, name: str) -> None:
        self.step()
        del self._now[name]

    def sync(self) -> None:
        self.step()
        self._durable = dict(self._now)
        self.syncs += 1

    def cut_power(self) -> None:
        """Of names and of sectors that weren't synced, any may be there or not; names come back together or not."""
        self.steps_left = None
        rng = self.rng
        if rng.random() < 0.5:
            self._now = dict(self._durable)
        for content in {id(one): one for one in (*self._now.values(), *self._durable.values())}.values():
            keep = rng.choice((0.0, 0.5, 1.0))
            for at, data in content.waiting:
                if rng.random() < keep:
                    content.durable[at : at + len(data)] = data
            content.waiting.clear()
            content.now[:] = content.durable
        self._durable = dict(self._now)
