"""The bytes of the share's files: what each system call does to them, by inode number; see `share.py`."""

import asyncio
import contextlib
import errno
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Final

from storage.files.copies import Capacity, StoredFile, new_generation
from storage.files.mirroring import PeerCannot
from storage.files.opened import OpenFile
from storage.files.own_copies import NOT_HERE, OwnCopies
from storage.files.peer import PeerLost
from storage.objects.volume import NO_ROOM
from storage.state import file_rows
from storage.state.file_model import (
    Drop,
    Flush,
    Held,
    MarkDirty,
)

REFUSED: Final = (*NO_ROOM, errno.EFBIG, errno.EINVAL)  # which says nothing of the disk


class Content(OwnCopies):
    """All methods raise OSError as the system call would."""

    @contextlib.asynccontextmanager
    async def _held_open(self, number: int) -> AsyncIterator[OpenFile]:
        """As somebody would have it who opens and closes it. Raises FileNotFoundError."""
        file = self._opened(number)
        file.handles += 1
        try:
            yield file
        except BaseException:
            with contextlib.suppress(OSError):  # what was raised before counts
                await self._let_go(file)
            raise
        await self._let_go(file)

    async def _let_go(self, file: OpenFile) -> None:
        file.handles -= 1
        if not file.handles:
            await self._close(file)

    async def capacity(self) -> Capacity:
        return await self._disk.run(self._local.capacity)

    # -- bytes ---------------------------------------------------------------------------------------------------

    def open(self, number: int) -> None:
        self._opened(number).handles += 1

    def handles(self, number: int) -> int:
        """How often a file is open."""
        file = self._open.get(number)
        return file.handles if file is not None else 0

    async def ends_unwritten(self, number: int) -> bool:
        """The last of this node's copy of a file was never written, though its length was set."""
        local = await self._local_copy(number, named=True)
        if local is None:
            return False
        try:
            return await self._on_disk(local.ends_unwritten)
        finally:
            await self._on_disk(local.close)

    def _opened(self, number: int) -> OpenFile:
        file = self._open.get(number)
        if file is None:
            row, dirty, lacking = self._namespace.look(
                lambda rows: (
                    file_rows.inode(rows, number),
                    file_rows.is_dirty(rows, number),
                    file_rows.lacking(rows, number),
                )
            )
            known = number not in self._unsettled and number not in self._doubtful
            file = self._open[number] = OpenFile(number, row.size, row.mtime, row.ctime, dirty, known)
            file.unflushed = dirty and known and self.writes  # it was left so, and may be otherwise on the other node
            file.lost = self.mirroring is not None and self._node in lacking
        return file

    async def read(self, number: int, at: int, size: int) -> bytes:
        file = self._open[number]
        size = min(size, file.size - at)
        if size <= 0:
            return b""
        found = await self._read(file, at, size)
        if len(found) < size and file.size >= at + size:  # it wasn't cut meanwhile
            raise OSError(errno.EIO, "bytes of it are missing")
        return found

    async def _read(self, file: OpenFile, at: int, size: int) -> bytes:
        if not file.lost:
            try:
                local = file.local or await self._located(file)
                return await self._on_disk(local.read, size, at)
            except OSError as error:
                self._lose(file, error)
        return await self._from_peer(file, at, size)

    async def _from_peer(self, file: OpenFile, at: int, size: int) -> bytes:
        mirroring = self._mirrored()
        try:
            return await mirroring.read(file, at, size)
        except PeerLost:
            raise OSError(errno.EIO, NOT_HERE) from None
        except PeerCannot as error:
            raise OSError(errno.EIO, f"{NOT_HERE}, and the other node says: {error}") from None

    async def write(self, number: int, at: int, data: bytes) -> None:
        file = self._open[number]

        def write(local: StoredFile) -> Awaitable[None]:
            return self._on_disk(local.write, data, at, max(0, at + len(data) - file.size))

        async with self._changing(file):
            await self._change_bytes(file, write)
            file.size = max(file.size, at + len(data))
            if self.mirroring is not None:
                self.mirroring.wrote(file, at, data)
        if self.mirroring is not None:
            await self.mirroring.peer.room()

    async def truncate(self, number: int, size: int) -> None:
        async with self._held_open(number) as file, self._changing(file):
            await self._change_bytes(file, lambda local: self._on_disk(local.truncate, size))
            file.size = size
            if self.mirroring is not None:
                self.mirroring.truncated(file, size)

    async def _change_bytes(self, file: OpenFile, change: Callable[[StoredFile], Awaitable[None]]) -> None:
        """Change this node's copy, unless that is lost."""
        local = file.local
        if local is None:
            return
        try:
            await change(local)
            return
        except OSError as error:
            if error.errno in REFUSED:
                try:
                    await self._on_disk(local.cut, file.size)  # a part of it may be there
                except OSError:
                    self._torn.add(file.number)
                raise
            self._torn.add(file.number)
            self._lose(file, error)
            self._torn.discard(file.number)  # another copy will take its place

    @contextlib.asynccontextmanager
    async def _changing(self, file: OpenFile) -> AsyncIterator[None]:
        """For the time of a change. A flush that comes in the middle covers the change or doesn't, so there is
        something to be flushed afterwards in any case, and no flush makes the file clean meanwhile."""
        if self.over:
            raise OSError(errno.EIO, "another node is written to by now")
        await self._writable(file)
        file.changes += 1
        try:
            async with file.order:
                yield
        except BaseException:
            if self.mirroring is not None:
                self.mirroring.differs(file)  # it may be done here, or a part of it, and wasn't told
            raise
        finally:
            file.changes -= 1
            file.mtime = file.ctime = self._now()
            file.unflushed = True

    def _takes_changes(self, file: OpenFile) -> bool:
        if not file.dirty or file.number in self._torn:
            return False
        if file.lost:
            return self.mirroring is not None and self.mirroring.is_alike(file)
        return file.local is not None

    async def _writable(self, file: OpenFile) -> None:
        """Once it is marked dirty for certain, and has a place. One that was just made isn't waited for: bytes of an
        inode that never came to be are nobody's, see `BeginWriting`."""
        if self._takes_changes(file):
            return
        async with file.turn:
            if not file.dirty:
                self._change(MarkDirty(file.number))
                await self.all_committed()
                file.dirty = file.known = True
                if self.mirroring is not None:
                    self.mirroring.begin(file)
            if file.lost:
                if not self._takes_changes(file):
                    raise OSError(errno.EIO, NOT_HERE)
            elif await self._look_for(file) is None:
                await self._make_copy(file)
            else:
                await self._replace_torn(file)

    async def _replace_torn(self, file: OpenFile) -> None:
        """If a change of this node's copy failed: a thread may still write to it, and behind its end there may be what
        never belonged to the file. In the file's turn."""
        if file.number not in self._torn or file.lost or file.local is None:
            return
        try:
            await self._renew_own(file, file.local)
        except (PeerLost, PeerCannot):
            raise OSError(errno.EIO, "a change of it failed, and its copy can't be made anew") from None

    async def _make_copy(self, file: OpenFile) -> None:
        """This node's first. In the file's turn."""
        elsewhere = not self._local.complete and file.number < self._first
        if file.size or (elsewhere and self.mirroring is None):
            raise OSError(errno.EIO, NOT_HERE)
        generation = new_generation() if elsewhere else ""  # an empty one may lie on what is away
        file.local = await self._on_disk(self._local.create, file.number, generation)
        if generation:
            self._change(Held(file.number, self._node, generation))
        if file.fresh and self.mirroring is not None:
            self.mirroring.made(file)
        file.fresh = False

    async def _located(self, file: OpenFile) -> StoredFile:
        async with file.turn:
            local = await self._look_for(file)
            if local is None:
                raise OSError(errno.EIO, NOT_HERE)
            return local

    async def fsync(self, number: int) -> None:
        await self._flush(self._open[number], clean=False)

    async def flush(self, number: int) -> None:
        """One handle is being closed."""
        file = self._open[number]
        await self._flush(file, clean=file.handles == 1)

    async def _flush(self, file: OpenFile, *, clean: bool) -> None:
        if not self.writes:
            return
        async with file.turn:
            if file.failed:
                raise OSError(errno.EIO, "an earlier sync of it failed")
            if file.unflushed or file.changes:
                file.unflushed = False
                size = file.size
                try:
                    lacking = await self._make_durable(file)
                    clean = clean and file.known and not (file.unflushed or file.changes)
                    self._note_flushed(file, Flush(file.number, size, file.mtime, file.ctime, clean, lacking))
                except BaseException:
                    file.unflushed = True
                    raise
            elif clean and file.dirty and file.known:
                self._note_flushed(file, Flush(file.number, file.size, file.mtime, file.ctime, clean))
        await self.all_committed()

    async def _make_durable(self, file: OpenFile) -> tuple[str, ...]:
        """On both nodes. Returns those that lack it, never all. Raises OSError; then it isn't known what is durable."""
        try:
            return await self._made_durable(file)
        except OSError:
            file.failed = True  # the kernel tells of it once
            self._doubtful.add(file.number)
            raise

    async def _made_durable(self, file: OpenFile) -> tuple[str, ...]:
        if self.mirroring is None:
            await self._replace_torn(file)
            await self._sync_own(file)
            return ()
        await self._locate_own(file)
        own, theirs = await asyncio.gather(self._sync_own(file), self.mirroring.sync(file), return_exceptions=True)
        if isinstance(theirs, BaseException):
            raise theirs
        if isinstance(own, OSError) and not theirs:
            self._lose(file, own)
        elif own is not None:
            raise own
        if file.lost and theirs:
            raise OSError(errno.EIO, "neither node can keep it")
        return (self._node,) if file.lost else theirs

    async def _locate_own(self, file: OpenFile) -> None:
        """What is to be brought to the other node has to be open."""
        if not file.lost and file.size and await self._look_for(file) is None:
            raise OSError(errno.EIO, NOT_HERE)
        await self._replace_torn(file)

    async def _sync_own(self, file: OpenFile) -> None:
        if file.local is not None:
            await self._on_disk(file.local.sync)

    def _note_flushed(self, file: OpenFile, flush: Flush) -> None:
        self._change(flush)
        file.dirty = not flush.clean

    async def release(self, number: int) -> None:
        """A handle is closed."""
        await self._let_go(self._open[number])

    async def _close(self, file: OpenFile) -> None:
        """Nobody has it open any more."""
        if not self.writes:  # its row may be gone by now
            self._shut(file)
            return
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
        self._shut(file)
        if nameless:
            self._change(Drop(file.number))

    def _shut(self, file: OpenFile) -> None:
        del self._open[file.number]
        for copy in (*file.left, *([file.local] if file.local else ())):
            self._disk.run(copy.close)
        if self.mirroring is not None:
            self.mirroring.end(file)
