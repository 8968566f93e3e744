"""The share's file system: what each system call does, by inode number. A shell (FUSE) translates.

Names and attributes are the namespace's; bytes go to the file's place on a volume at once. Before the first write a
file is marked dirty in the log, and that is committed, so after a crash it is known which files may have bytes that
nobody flushed. `flush` and `fsync` return when bytes, size and times are durable and everything asked before is
committed; mkdir, rename, link, symlink and unlink when they are committed. The rest (create, chmod, times, attributes)
is in the log in its place, and is covered by the next of those.
"""

import asyncio
import contextlib
import errno
import secrets
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from itertools import islice
from typing import Final

import msgspec

from storage.files.local import Capacity, LocalFile, LocalFiles
from storage.files.namespace import Namespace, Proposal
from storage.state import file_rows
from storage.state.file_model import (
    BeginWriting,
    Change,
    Drop,
    Flush,
    Inode,
    Link,
    Make,
    MarkDirty,
    Remove,
    RemoveXattr,
    Rename,
    SetAttributes,
    SetXattr,
)
from storage.state.file_rows import Named
from storage.state.files import Applied
from storage.state.kv import KeyValues
from storage.workers import Threads

LISTED_AT_ONCE: Final = 32  # about what one answer to the kernel holds
SPACE_BYTES: Final = 4
NOT_HERE: Final = "its bytes are on no volume that is here"
BEHIND_MAX: Final = 10_000  # changes on their way before the next one waits
FREEING: Final = (Remove, Drop, Flush, BeginWriting)  # taken as long as anything is


@dataclass
class OpenFile:
    """One that is open, or being written to. `size`, `mtime` and `ctime` are those of its bytes as they are now.

    `dirty`: it is marked so; `known`: by this writer, so that its flush may clear the mark. `changes`: how many are
    under way. `unflushed`: there are bytes that aren't flushed. `failed`: a sync of it failed; what it held then may be
    lost, and whoever flushes it hears of it.
    """

    number: int
    size: int
    mtime: int
    ctime: int
    dirty: bool
    known: bool
    handles: int = 0
    local: LocalFile | None = None
    changes: int = 0
    unflushed: bool = False
    failed: bool = False
    turn: asyncio.Lock = field(default_factory=asyncio.Lock)  # for what changes the fields above


class Share:
    """All methods raise OSError as the system call would."""

    def __init__(
        self,
        namespace: Namespace,
        local: LocalFiles,
        disk: Threads,
        now: Callable[[], int],
        is_full: Callable[[], bool] = lambda: False,
    ) -> None:
        """`now()`: nanoseconds since the epoch; `is_full()`: the disk of catalogue and log takes nothing new."""
        self._namespace, self._local, self._disk, self._now = namespace, local, disk, now
        self._is_full = is_full
        self._first = 0  # inode number of those that are made from here on
        self._open: dict[int, OpenFile] = {}
        self._ghosts: dict[int, Inode] = {}  # no more, and not forgotten by who looked at them
        self._last: Proposal | None = None

    async def begin(self) -> None:
        """Once, before anything else: what an earlier writer has left open is closed, and what it didn't flush is as it
        is on the disk."""
        self._change(BeginWriting(secrets.token_hex(SPACE_BYTES)))
        self._local.space, self._first = self._namespace.look(
            lambda rows: (file_rows.space(rows), file_rows.next_number(rows))
        )
        for number in self._namespace.look(file_rows.orphans):
            self._change(Drop(number))
        for number in self._namespace.look(file_rows.dirty):
            await self._settle(number)
        await self.all_committed()

    async def end(self) -> None:
        """Once, after everything else: what is open is flushed, and everything that was answered is committed."""
        for file in list(self._open.values()):
            if file.unflushed and not file.failed:
                await self._flush(file, clean=False)
        await self.all_committed()

    async def _settle(self, number: int) -> None:
        """One whose bytes can't be seen now stays dirty."""
        row = self._row(number)
        try:
            local = await self._disk.run(self._local.open, number)
        except OSError:
            return
        if local is None and (row.size or not self._local.complete):
            return
        size, mtime = 0, row.mtime
        if local is not None:
            try:
                await self._disk.run(local.sync)
                size, mtime = await self._disk.run(local.found)
            except OSError:
                return
            finally:
                local.close()
        self._change(Flush(number, size, max(mtime, row.mtime), self._now(), clean=True))

    # -- names ---------------------------------------------------------------------------------------------------

    def lookup(self, parent: int, name: bytes) -> int:
        return self._namespace.look(lambda rows: file_rows.lookup(rows, parent, name)).inode

    def parent_of(self, number: int) -> int:
        """Of a folder."""
        return self._row(number).parent

    def listed(self, parent: int, after: int) -> list[tuple[Named, Inode]]:
        """Some names behind a position, with their attributes; none: there are no more."""

        def look(rows: KeyValues) -> list[tuple[Named, Inode]]:
            found = islice(file_rows.listed(rows, parent, after), LISTED_AT_ONCE)
            return [(one, self._as_open(one.inode, file_rows.inode(rows, one.inode))) for one in found]

        return self._namespace.look(look)

    async def make(
        self, parent: int, name: bytes, mode: int, uid: int, gid: int, rdev: int = 0, target: bytes = b""
    ) -> int:
        made = self._change(Make(parent, name, mode, uid, gid, self._now(), rdev, target))
        await self.all_committed()
        return made.inode

    def create(self, parent: int, name: bytes, mode: int, uid: int, gid: int) -> int:
        """Make a file and open it."""
        at = self._now()
        number = self._change(Make(parent, name, mode, uid, gid, at, dirty=True)).inode
        self._open[number] = OpenFile(number, 0, at, at, dirty=True, known=True, handles=1)
        return number

    async def link(self, number: int, parent: int, name: bytes) -> None:
        self._change(Link(number, parent, name, self._now()))
        await self.all_committed()

    async def remove(self, parent: int, name: bytes, *, folder: bool) -> None:
        number = self.lookup(parent, name)
        self._unname(number, Remove(parent, name, folder, self._now(), number in self._open))
        await self.all_committed()

    async def rename(
        self, parent: int, name: bytes, to_parent: int, to_name: bytes, *, no_replace: bool, exchange: bool
    ) -> None:
        replaced = self._namespace.look(lambda rows: file_rows.find(rows, to_parent, to_name))
        number = replaced.inode if replaced is not None else 0
        held = number in self._open
        self._unname(number, Rename(parent, name, to_parent, to_name, self._now(), no_replace, exchange, held))
        await self.all_committed()

    def _unname(self, number: int, change: Remove | Rename) -> None:
        """A change after which an inode (0: none) may be no more. Somebody may still look at it: at a folder that is
        listed, a FIFO, a file that was opened without a right to read it."""
        row = self._row(number) if number else None
        self._change(change)
        if row is not None and self._namespace.look(lambda rows: file_rows.is_gone(rows, number)):
            self._ghosts[number] = msgspec.structs.replace(row, nlink=0, ctime=change.at)

    def forget(self, number: int) -> None:
        """Nobody looks at it any more."""
        self._ghosts.pop(number, None)

    # -- attributes ----------------------------------------------------------------------------------------------

    def attributes(self, number: int) -> Inode:
        if ghost := self._ghosts.get(number):
            return ghost
        return self._as_open(number, self._row(number))

    def _as_open(self, number: int, row: Inode) -> Inode:
        """With what the log doesn't know yet of one that is open."""
        file = self._open.get(number)
        if file is None:
            return row
        return msgspec.structs.replace(row, size=file.size, mtime=file.mtime, ctime=max(row.ctime, file.ctime))

    def set_attributes(
        self,
        number: int,
        *,
        mode: int | None = None,
        uid: int | None = None,
        gid: int | None = None,
        atime: int | None = None,
        mtime: int | None = None,
    ) -> None:
        at = self._now()
        self._change(SetAttributes(number, at, mode, uid, gid, atime, mtime))
        if mtime is not None and (file := self._open.get(number)):
            file.mtime, file.ctime = mtime, at

    def xattr(self, number: int, name: bytes) -> bytes:
        return self._namespace.look(lambda rows: file_rows.xattr(rows, number, name))

    def xattr_names(self, number: int) -> list[bytes]:
        return self._namespace.look(lambda rows: file_rows.xattr_names(rows, number))

    def set_xattr(self, number: int, name: bytes, value: bytes) -> None:
        self._change(SetXattr(number, name, value, self._now()))

    def remove_xattr(self, number: int, name: bytes) -> None:
        self._change(RemoveXattr(number, name, self._now()))

    async def capacity(self) -> Capacity:
        return await self._disk.run(self._local.capacity)

    # -- bytes ---------------------------------------------------------------------------------------------------

    def open(self, number: int) -> None:
        self._opened(number).handles += 1

    def _opened(self, number: int) -> OpenFile:
        file = self._open.get(number)
        if file is None:
            row, dirty = self._namespace.look(
                lambda rows: (file_rows.inode(rows, number), file_rows.is_dirty(rows, number))
            )
            file = self._open[number] = OpenFile(number, row.size, row.mtime, row.ctime, dirty, known=not dirty)
        return file

    async def read(self, number: int, at: int, size: int) -> bytes:
        file = self._open[number]
        size = min(size, file.size - at)
        if size <= 0:
            return b""
        local = file.local or await self._located(file)
        found = await self._disk.run(local.read, size, at)
        if len(found) < size and file.size >= at + size:  # it wasn't cut meanwhile
            raise OSError(errno.EIO, "bytes of it are missing")
        return found

    async def write(self, number: int, at: int, data: bytes) -> None:
        file = self._open[number]
        async with self._changing(file) as local:
            try:
                await self._disk.run(local.write, data, at, max(0, at + len(data) - file.size))
            except OSError:
                if file.changes == 1:
                    await self._disk.run(local.cut, file.size)  # a part of it may be there
                raise
            file.size = max(file.size, at + len(data))

    async def truncate(self, number: int, size: int) -> None:
        file = self._opened(number)
        file.handles += 1
        try:
            async with self._changing(file) as local:
                await self._disk.run(local.truncate, size)
                file.size = size
        finally:
            file.handles -= 1
            if not file.handles:
                await self._close(file)

    @contextlib.asynccontextmanager
    async def _changing(self, file: OpenFile) -> AsyncIterator[LocalFile]:
        """Its place, for the time of a change. A flush that comes in the middle covers the change or doesn't, so there
        is something to be flushed afterwards in any case, and no flush makes the file clean meanwhile."""
        local = await self._writable(file)
        file.changes += 1
        try:
            yield local
        finally:
            file.changes -= 1
            file.mtime = file.ctime = self._now()
            file.unflushed = True

    async def _writable(self, file: OpenFile) -> LocalFile:
        """Its place on a volume, once it is marked dirty for certain. One that was just made isn't waited for: bytes of
        an inode that never came to be are nobody's, see `BeginWriting`."""
        if file.dirty and file.local is not None:
            return file.local
        async with file.turn:
            if not file.dirty:
                self._change(MarkDirty(file.number))
                await self.all_committed()
                file.dirty = file.known = True
            local = await self._look_for(file)
            if local is None:
                elsewhere = not self._local.complete and file.number < self._first
                if file.size or elsewhere:
                    raise OSError(errno.EIO, NOT_HERE)
                local = file.local = await self._disk.run(self._local.create, file.number)
            return local

    async def _located(self, file: OpenFile) -> LocalFile:
        async with file.turn:
            local = await self._look_for(file)
            if local is None:
                raise OSError(errno.EIO, NOT_HERE)
            return local

    async def _look_for(self, file: OpenFile) -> LocalFile | None:
        """On all volumes, once; to be called in the file's turn."""
        if file.local is None:
            file.local = await self._disk.run(self._local.open, file.number)
        return file.local

    async def fsync(self, number: int) -> None:
        await self._flush(self._open[number], clean=False)

    async def flush(self, number: int) -> None:
        """One handle is being closed."""
        file = self._open[number]
        await self._flush(file, clean=file.handles == 1)

    async def _flush(self, file: OpenFile, *, clean: bool) -> None:
        async with file.turn:
            if file.failed:
                raise OSError(errno.EIO, "an earlier sync of it failed")
            if file.unflushed or file.changes:
                file.unflushed = False
                size = file.size
                try:
                    if file.local is not None:
                        await self._disk.run(file.local.sync)
                except OSError:
                    file.failed = True  # the kernel tells of it once
                    raise
                clean = clean and file.known and not (file.unflushed or file.changes)
                self._note_flushed(file, Flush(file.number, size, file.mtime, file.ctime, clean))
            elif clean and file.dirty and file.known:
                self._note_flushed(file, Flush(file.number, file.size, file.mtime, file.ctime, clean))
        await self.all_committed()

    def _note_flushed(self, file: OpenFile, flush: Flush) -> None:
        self._change(flush)
        file.dirty = not flush.clean

    async def release(self, number: int) -> None:
        """A handle is closed."""
        file = self._open[number]
        file.handles -= 1
        if not file.handles:
            await self._close(file)

    async def _close(self, file: OpenFile) -> None:
        """Nobody has it open any more."""
        try:
            if self._row(file.number).nlink and not file.failed:
                await self._flush(file, clean=True)
        finally:
            if not file.handles and self._open.get(file.number) is file:  # else somebody has opened it meanwhile
                self._over(file)

    def _over(self, file: OpenFile) -> None:
        """Nobody has it open, and that stays so as long as nothing is waited for."""
        nameless = not self._row(file.number).nlink
        if (file.unflushed or file.changes) and not (nameless or file.failed):
            return  # what was written meanwhile is being flushed by who closes it
        del self._open[file.number]
        if file.local is not None:
            file.local.close()
        if nameless:
            self._change(Drop(file.number))

    # -- the log -------------------------------------------------------------------------------------------------

    def _row(self, number: int) -> Inode:
        return self._namespace.look(lambda rows: file_rows.inode(rows, number))

    async def room(self) -> None:
        """Wait while very many changes are on their way."""
        if self._namespace.behind > BEHIND_MAX:
            await self.all_committed()

    def _change(self, change: Change) -> Applied:
        if not isinstance(change, FREEING) and self._is_full():
            raise OSError(errno.ENOSPC, "the disk of the catalogue is full")
        applied, self._last = self._namespace.change(change)
        return applied

    async def all_committed(self) -> None:
        """Wait for everything that was asked up to now. Entries are committed in their order."""
        last = self._last
        if last is not None:
            await last.committed()
            if self._last is last:
                self._last = None
