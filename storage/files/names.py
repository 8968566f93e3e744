"""Names and attributes of the share: what each system call does to them, by inode number."""

import errno
from collections.abc import Callable
from itertools import islice
from typing import Final

import msgspec

from storage.files.namespace import Namespace, Proposal
from storage.files.opened import OpenFile
from storage.state import file_rows
from storage.state.file_model import (
    ROOT,
    BeginWriting,
    Change,
    Drop,
    Flush,
    Held,
    Inode,
    Lacks,
    Link,
    Make,
    Remove,
    RemoveXattr,
    Rename,
    SetAttributes,
    SetXattr,
)
from storage.state.file_rows import Named
from storage.state.files import Applied
from storage.state.kv import KeyValues

LISTED_AT_ONCE: Final = 32  # about what one answer to the kernel holds
DOS_ATTRIBUTES: Final = b"user.DOSATTRIB"
BEHIND_MAX: Final = 10_000  # changes on their way before the next one waits
FREEING: Final = (Remove, Drop, Flush, Lacks, Held, BeginWriting)  # taken as long as anything is


class Names:
    """All methods raise OSError as the system call would."""

    def __init__(self, namespace: Namespace, now: Callable[[], int], is_full: Callable[[], bool]) -> None:
        """`now()`: nanoseconds since the epoch; `is_full()`: the disk of catalogue and log takes nothing new."""
        self._namespace, self._now, self._is_full = namespace, now, is_full
        self._open: dict[int, OpenFile] = {}
        self._ghosts: dict[int, Inode] = {}  # no more, and not forgotten by who looked at them
        self._last: Proposal | None = None

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
        self._open[number] = OpenFile(number, 0, at, at, dirty=True, known=True, fresh=True, handles=1)
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

    def own_top(self, uid: int, gid: int) -> None:
        """The topmost folder belongs to who serves the share, so that he may do there what he is asked to."""
        if uid and not self.attributes(ROOT).uid:
            self.set_attributes(ROOT, uid=uid, gid=gid)

    def real_name(self, parent: int, name: bytes) -> bytes:
        """How a name is written in a folder, whatever the case it is asked for in. Raises FileRefused (ENODATA)."""
        found = self._namespace.look(lambda rows: file_rows.real_name(rows, parent, name))
        return file_rows.refuse(errno.ENODATA) if found is None else found

    def xattr_names(self, number: int) -> list[bytes]:
        return self._namespace.look(lambda rows: file_rows.xattr_names(rows, number))

    def set_xattr(self, number: int, name: bytes, value: bytes) -> None:
        if name == DOS_ATTRIBUTES and self._namespace.look(lambda rows: file_rows.has_xattr(rows, number, name, value)):
            return  # smbd says it again after each rename; nobody asks it for the time of that
        self._change(SetXattr(number, name, value, self._now()))

    def remove_xattr(self, number: int, name: bytes) -> None:
        self._change(RemoveXattr(number, name, self._now()))

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
