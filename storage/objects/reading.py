"""Reading an instance: this node's copy, checked against its digest, or else the other node's.

A copy that isn't good is never given out: it is set aside, made again from the peer, and read then.
"""

from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Final

import xxhash

from storage.objects.copies import Copies
from storage.objects.volume import Volume
from storage.state.model import Instance, Put
from storage.workers import Threads, within

SLOWEST_BYTES_S: Final = 1 << 20  # a disk that reads slower than this is taken for one that hangs
WHOLE_BYTES: Final = 4 << 20  # read in one go; what is longer is checked first and then read in blocks of this size


class Unavailable(Exception):
    """It is stored, and no good copy of it can be reached now."""


@dataclass(frozen=True)
class Source:
    """A checked copy. `data` is the data set if it isn't long."""

    put: Put
    data: bytes | None
    volume: Volume
    name: str
    disk: Threads
    hang_s: float

    async def blocks(self) -> AsyncIterator[memoryview]:
        """The data set in pieces. Raises OSError."""
        if self.data is not None:
            yield memoryview(self.data)
            return
        file = await within(self.disk.run(self.volume.open, self.name), self.hang_s)
        try:
            await within(self.disk.run(file.read, self.put.offset), self.hang_s)
            while block := await within(self.disk.run(file.read, WHOLE_BYTES), self.hang_s):
                yield memoryview(block)
        finally:
            file.close()

    @property
    def file(self) -> str:
        """Where it lies now, for another process on this node; it may be moved at any time."""
        return str(self.volume.path / self.name)

    async def whole(self) -> bytes:
        return self.data if self.data is not None else b"".join([bytes(block) async for block in self.blocks()])


class Reading:
    def __init__(self, copies: Copies, remake: Callable[[int], Awaitable[None]], disk: Threads, hang_s: float) -> None:
        """`remake(seq)`: make the copy of an entry again at once, if that can be done."""
        self._copies, self._remake, self._disk, self._hang_s = copies, remake, disk, hang_s

    async def open(self, instance: Instance) -> Source:
        """Raises Unavailable."""
        source = await self._look(instance)
        if source is None:
            await self._remake(instance.seq)
            source = await self._look(instance)
        if source is None:
            raise Unavailable(f"{instance.put.sop_instance} is temporarily unavailable")
        return source

    async def _look(self, instance: Instance) -> Source | None:
        size_s = instance.put.length / SLOWEST_BYTES_S
        try:
            return await within(self._disk.run(self._checked, instance), self._hang_s + size_s)
        except OSError:
            return None

    def _checked(self, instance: Instance) -> Source | None:
        """A good copy of this node. Blocks."""
        found = self._copies.find(instance.seq)
        if found is None:
            return None
        volume, name, put = found
        try:
            if put.length - put.offset > WHOLE_BYTES:
                good = self._copies.good(instance.seq)
                return Source(put, None, volume, name, self._disk, self._hang_s) if good else None
            file = volume.open(name)
            try:
                file.read(put.offset)
                data = b"".join(iter(lambda: file.read(WHOLE_BYTES), b""))
            finally:
                file.close()
        except OSError:
            return None
        good = len(data) == put.length - put.offset and xxhash.xxh3_128_digest(data) == put.digest
        return Source(put, data, volume, name, self._disk, self._hang_s) if good else None
