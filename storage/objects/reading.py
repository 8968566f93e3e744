"""Reading an instance: this node's copy, checked against its digest, or else the other node's.

A copy that isn't good is never given out: it is set aside, made again from the peer, and read then.
"""

import asyncio
import errno
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from typing import Final

import xxhash

from storage.objects.blob_store import Reader
from storage.objects.blocks import are_good
from storage.objects.copies import Copies
from storage.objects.volume import Volume
from storage.state.file_images import is_of_file
from storage.state.model import Instance, Put
from storage.workers import Threads, within

SLOWEST_BYTES_S: Final = 1 << 20  # a disk that reads slower than this is taken for one that hangs
WHOLE_BYTES: Final = 4 << 20  # read and checked in one go; what is longer is read in pieces of this size


class Unavailable(Exception):
    """It is stored, and no good copy of it can be reached now."""


@dataclass(frozen=True)
class Source:
    """A copy. `data` is the data set if it isn't long, checked. A long one was checked as a whole or is checked block
    by block as it is read; `again()`: what to go on with if a block of it isn't good."""

    put: Put
    data: bytes | None
    volume: Volume
    name: str
    disk: Threads
    hang_s: float
    again: Callable[[], Awaitable["Source"]]
    checked: bool  # all of it, by its digest

    async def blocks(self) -> AsyncIterator[memoryview]:
        """The data set in pieces, each checked. Raises OSError, Unavailable."""
        if self.data is not None:
            yield memoryview(self.data)
            return
        at, size, mended = 0, self.put.length - self.put.offset, False
        part = Part(self)
        ahead = part.begin(at)
        try:
            while at < size:
                try:
                    block = await ahead
                except OSError:  # its disk doesn't answer
                    block = None
                if block is not None:
                    at += len(block)
                    if at < size:  # read while this one goes out
                        ahead = part.begin(at)
                    yield memoryview(block)
                elif mended:
                    raise OSError(errno.EIO, "no good copy of it is to be had")
                else:
                    mended = True
                    part.close()
                    part = Part(await self.again())
                    ahead = part.begin(at)
        finally:
            ahead.cancel()
            part.close()

    @property
    def file(self) -> str:
        """Where it lies now, for another process on this node; it may be moved at any time."""
        return str(self.volume.path / self.name)

    async def whole(self) -> bytes:
        return self.data if self.data is not None else b"".join([bytes(block) async for block in self.blocks()])


class Part:
    """A long copy that is being read, with no block read twice."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._file: Reader | None = None
        self._in_use = threading.Lock()
        self._closed = False

    def begin(self, at: int) -> "asyncio.Task[bytes | None]":
        """Some blocks from byte `at` of the data set on, which ends there or not; None if they aren't good. OSError if
        the disk doesn't answer. One at a time."""
        task = asyncio.get_running_loop().create_task(self._begun(at))
        task.add_done_callback(lambda done: done.cancelled() or done.exception())  # nobody may want it any more
        return task

    async def _begun(self, at: int) -> bytes | None:
        source = self._source
        if source.data is not None:
            return source.data[at:]
        return await within(source.disk.run(self._read, at), source.hang_s)

    def _read(self, at: int) -> bytes | None:
        with self._in_use:
            found = None if self._closed else self._read_now(at)
        if self._closed:
            self.close()
        return found

    def _read_now(self, at: int) -> bytes | None:
        put = self._source.put
        try:
            if self._file is None:
                self._file = self._source.volume.open(self._source.name, put.offset + at)
            data = self._file.read(WHOLE_BYTES)
        except OSError:
            return None
        left = put.length - put.offset - at
        whole = len(data) == min(left, WHOLE_BYTES)
        good = self._source.checked or not put.blocks or are_good(put.blocks, at, data)
        return data if whole and good else None

    def close(self) -> None:
        """It isn't read any more; a thread that still does closes it."""
        self._closed = True
        if self._in_use.acquire(blocking=False):
            try:
                file, self._file = self._file, None
                if file:
                    file.close()
            finally:
                self._in_use.release()


class Reading:
    def __init__(self, copies: Copies, remake: Callable[[int], Awaitable[None]], disk: Threads, hang_s: float) -> None:
        """`remake(seq)`: make the copy of an entry again at once, if that can be done."""
        self._copies, self._remake, self._disk, self._hang_s = copies, remake, disk, hang_s

    async def open(self, instance: Instance, *, whole: bool = False) -> Source:
        """`whole`: all of a long one is checked now, since it is read in another way. Raises Unavailable."""
        source = await self._look(instance, whole)
        return source or await self._again(instance)

    async def _again(self, instance: Instance) -> Source:
        await self._remake(instance.seq)
        source = await self._look(instance, whole=True)
        if source is None:
            raise Unavailable(f"{instance.put.sop_instance} is temporarily unavailable")
        return source

    async def _look(self, instance: Instance, whole: bool) -> Source | None:
        size_s = instance.put.length / SLOWEST_BYTES_S
        try:
            return await within(self._disk.run(self._checked, instance, whole), self._hang_s + size_s)
        except OSError:
            return None

    def _checked(self, instance: Instance, whole: bool) -> Source | None:
        """A copy of this node, good as far as it was read. Blocks."""
        found = self._copies.find(instance.seq)
        if found is None:
            return None
        volume, name, put = found
        again = partial(self._again, instance)
        try:
            if put.length - put.offset > WHOLE_BYTES:
                whole = whole or not put.blocks
                good = self._copies.good(instance.seq) if whole else volume.size(name) == put.length
                checked = whole and not is_of_file(instance.seq)  # that may be written to the next moment
                return Source(put, None, volume, name, self._disk, self._hang_s, again, checked) if good else None
            file = volume.open(name, put.offset)
            try:
                data = b"".join(iter(lambda: file.read(WHOLE_BYTES), b""))
            finally:
                file.close()
        except OSError:
            return None
        good = len(data) == put.length - put.offset and xxhash.xxh3_128_digest(data) == put.digest
        return Source(put, data, volume, name, self._disk, self._hang_s, again, True) if good else None
