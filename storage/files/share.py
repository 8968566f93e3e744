"""The share's file system: what each system call does, by inode number. A shell (FUSE) translates.

Names and attributes are the namespace's; bytes go to the file's place on a volume at once. Before the first write a
file is marked dirty in the log, and that is committed, so after a crash it is known which files may have bytes that
nobody flushed. `flush` and `fsync` return when bytes, size and times are durable and everything asked before is
committed; mkdir, rename, link, symlink and unlink when they are committed. The rest (create, chmod, times, attributes)
is in the log in its place, and is covered by the next of those. In a pair all that goes for both nodes, see
`mirroring.py`: bytes go to both, and what is flushed is durable on both, or the log says which node lacks it.
"""

import contextlib
import errno
import secrets
from collections.abc import Callable
from typing import Final, TypeVar

from storage.files.content import REFUSED, Content
from storage.files.copies import StoredFile, new_generation
from storage.files.mirroring import PeerCannot
from storage.files.opened import OpenFile
from storage.files.own_copies import NOT_HERE
from storage.files.peer import PeerLost
from storage.state import file_rows
from storage.state.file_model import (
    BeginWriting,
    Drop,
    Flush,
    Held,
)
from storage.state.kv import KeyValues

T = TypeVar("T")
SPACE_BYTES: Final = 4


class Share(Content):
    """All methods raise OSError as the system call would."""

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

    def begin_reading(self) -> None:
        """Instead, where the share is only looked at: another node is written to."""
        self.writes = False

    async def end(self) -> None:
        """Once, after everything else: what is open is flushed, and everything that was answered is committed."""
        for file in list(self._open.values()):
            if file.unflushed and not file.failed:
                await self._flush(file, clean=False)
        await self.all_committed()

    async def _settle(self, number: int) -> None:
        """One whose bytes can't be seen now stays dirty; in a pair the others do, too, until both nodes have them."""
        row = self._row(number)
        self._unsettled.add(number)
        if self._node in self._lacking(number):
            return
        try:
            local = await self._local_copy(number, named=False)
        except OSError:
            return
        if local is None and (row.size or not self._local.complete):
            return
        size, mtime = 0, row.mtime
        if local is not None:
            try:
                await self._on_disk(local.sync)
                size, mtime = await self._on_disk(local.found)
            except OSError as error:
                if error.errno not in REFUSED:
                    self._doubtful.add(number)
                return
            finally:
                self._disk.run(local.close)
        if number in self._open:
            return  # whoever has it open has seen it as well
        self._unsettled.discard(number)
        clean = self.mirroring is None and number not in self._doubtful
        self._change(Flush(number, size, max(mtime, row.mtime), self._now(), clean))

    async def look_again(self, number: int) -> bool:
        """Before one is opened whose bytes couldn't be seen when this writer began. Returns whether they are others
        than was shown of it until now. Raises OSError if they still can't be seen."""
        unseen = number in self._unsettled or number in self._doubtful
        if not unseen or number in self._open:
            return False
        if self._node in self._lacking(number):
            try:
                await self.heal_own(number)
            except (PeerLost, PeerCannot):
                raise OSError(errno.EIO, NOT_HERE) from None
            return True
        await self._settle(number)
        if number in self._unsettled and number not in self._open:
            raise OSError(errno.EIO, NOT_HERE)
        return True

    # -- copies ----------------------------------------------------------------------------------------------------

    @property
    def node(self) -> str:
        """The name of this one."""
        return self._node

    def look(self, look: Callable[[KeyValues], T]) -> T:
        return self._namespace.look(look)

    async def settle(self, number: int) -> None:
        """A file that was left dirty, and that nobody has open now, is made the same on both nodes, and clean."""
        file = self._open.get(number)
        if (file is not None and file.handles) or number in self._doubtful:
            return
        if number in self._unsettled and file is None:
            await self._settle(number)
        if number in self._unsettled:
            return
        with contextlib.suppress(FileNotFoundError):  # it is no more
            async with self._held_open(number):
                pass

    async def heal_other(self, number: int) -> None:
        """Bring the other node what it lacks. Raises PeerLost, PeerCannot, OSError."""
        mirroring = self._mirrored()
        with contextlib.suppress(FileNotFoundError):
            async with self._held_open(number) as file:
                async with file.turn:
                    await self._locate_own(file)
                await mirroring.bring(file)
                async with file.turn:
                    if not (mirroring.is_alike(file) and await mirroring.synced(file)):
                        raise PeerCannot("the other node can't keep it")
                    if mirroring.pair.peer in self._lacking(number):
                        self._change(Held(number, mirroring.pair.peer, file.peer_copy))
        await self.all_committed()

    async def heal_own(self, number: int) -> None:
        """Have what this node lacks from the other one. Raises PeerLost, PeerCannot, OSError."""
        mirroring = self._mirrored()
        if mirroring.pair.peer in self._lacking(number):
            raise PeerCannot("neither node has it")
        with contextlib.suppress(FileNotFoundError):
            async with self._held_open(number) as file, file.turn, file.order:
                if not file.lost:
                    return
                if file.unflushed or file.changes:  # it went to the other node alone, and may not have arrived
                    file.failed |= not (mirroring.is_alike(file) and await mirroring.synced(file))
                generation, local, is_new = await self._renewed(file)
                try:
                    size = await mirroring.pull(file, local, None if file.dirty else file.size)
                except BaseException:
                    if is_new:
                        self._remove(local, number, generation)
                    else:
                        self._disk.run(local.close)
                    raise
                self._change(Held(number, self._node, generation))
                file.local, file.lost = local, False
                self._left.discard(number)
                if file.dirty:
                    file.size = size
                self._unsettled.discard(number)
                if not file.known and number not in self._doubtful:
                    file.known = file.unflushed = True
                if file.failed:  # what was written and not flushed is there or isn't: who opens it next has to look
                    self._unsettled.add(number)
        await self.all_committed()

    async def _renewed(self, file: OpenFile) -> tuple[str, StoredFile, bool]:
        """A copy to be filled, its generation, and whether it is a new one: what was this node's if it was away for a
        while; another one if that failed just now, or is to leave its volume."""
        generation = self._namespace.look(lambda rows: file_rows.generation(rows, file.number, self._node))
        goes = file.number in self._left
        if not goes:
            found = await self._local_copy(file.number, named=False)
            if found is not None and not found.leaving:
                return generation, found, False
            if found is not None:
                goes = True
                await self._on_disk(found.close)
        if goes or not self._local.complete:
            generation = new_generation()
        return generation, await self._on_disk(self._local.create, file.number, generation), True

    async def move(self, number: int, node: str) -> None:
        """A node's copy leaves a volume on which nothing is put any more, if it lies on one. Raises PeerLost,
        PeerCannot, OSError."""
        if node == self._node:
            await self._move_own(number)
        else:
            mirroring = self._mirrored()
            with contextlib.suppress(FileNotFoundError):
                async with self._held_open(number) as file, file.order:
                    if file.lost:
                        raise PeerCannot("the other node's copy is the only one now")
                    if not mirroring.peer.state.session:
                        raise PeerLost
                    mirroring.differs(file)  # so it is begun anew
            await self.heal_other(number)

    async def _move_own(self, number: int) -> None:
        with contextlib.suppress(FileNotFoundError):
            async with self._held_open(number) as file, file.turn:
                if file.failed or number in self._doubtful:
                    raise PeerCannot("a sync of it failed; it can be moved when the share is mounted anew")
                if file.lost:
                    raise PeerCannot("this node's copy is lost, and is made again elsewhere")
                local = await self._look_for(file)
                if local is not None and local.leaving:
                    await self._renew_own(file, local)
        await self.all_committed()
