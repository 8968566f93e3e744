"""This node's copies of the bytes of the share's files: found, lost when they can't be used, made anew."""

import errno
from collections.abc import Callable
from functools import partial
from typing import Final, TypeVar

import structlog

from storage.files.copies import CopyStore, StoredFile, new_generation
from storage.files.mirroring import Mirroring, PeerCannot
from storage.files.names import Names
from storage.files.namespace import Namespace
from storage.files.opened import OpenFile
from storage.files.peer import Pair, Peer
from storage.objects.blocks import BLOCK_BYTES
from storage.state import file_rows
from storage.state.file_model import Held, Lacks
from storage.workers import Threads, within

log = structlog.get_logger()

T = TypeVar("T")
TOUCHED_EACH: Final = 256  # blocks: what is in the making doesn't look like a leftover
NOT_HERE: Final = "its bytes are on no volume that is here"


class SourceFailed(OSError):
    """A copy can't be read."""


class OwnCopies(Names):
    def __init__(
        self,
        namespace: Namespace,
        local: CopyStore,
        disk: Threads,
        now: Callable[[], int],
        is_full: Callable[[], bool] = lambda: False,
        *,
        hang_s: float,
        pair: Pair,
        peer: Peer | None = None,
    ) -> None:
        """`hang_s`: what a disk may take to answer; `peer`: the other node, if there is one."""
        super().__init__(namespace, now, is_full)
        self._local, self._disk, self._hang_s, self._node = local, disk, hang_s, pair.node
        self.mirroring: Mirroring | None = None
        if peer is not None:
            self.mirroring = Mirroring(pair, peer, self._on_disk, namespace.look, self._change, lambda: local.space)
        self._unsettled: set[int] = set()  # dirty, and this node's bytes couldn't be seen when it began
        self._doubtful: set[int] = set()  # a sync of them failed
        self._left: set[int] = set()  # a thread may still write to what was this node's copy of these
        self._torn: set[int] = set()  # a change of this node's copy failed: what came of it, or will, isn't known
        self._first = 0  # inode number of those that are made from here on
        self.writes = True  # else it is only looked at
        self.over = False  # nothing is changed here any more

    def _lacking(self, number: int) -> tuple[str, ...]:
        """The nodes that don't hold what was flushed last."""
        return self._namespace.look(lambda rows: file_rows.lacking(rows, number))

    async def _local_copy(self, number: int, *, named: bool) -> StoredFile | None:
        """This node's, opened, if there is one. Raises OSError."""
        if not self._local.space:  # whoever only looks may have come before the first writer
            self._local.space = self._namespace.look(file_rows.space)
        generation = self._namespace.look(lambda rows: file_rows.generation(rows, number, self._node))
        return await self._on_disk(partial(self._local.open, number, generation, named=named))

    async def _on_disk(self, function: Callable[..., T], *args: object) -> T:
        """Raises OSError, also when the disk doesn't answer."""
        return await within(self._disk.run(function, *args), self._hang_s)

    def _mirrored(self) -> Mirroring:
        if self.mirroring is None:
            raise OSError(errno.EIO, NOT_HERE)
        return self.mirroring

    def _lose(self, file: OpenFile, error: OSError) -> None:
        """This node's copy can't be used any more. Raises the error if the other node's can't, either."""
        if file.lost:
            return
        mirroring = self.mirroring
        clean_there = mirroring is not None and mirroring.pair.peer not in self._lacking(file.number)
        changed = file.dirty and not (mirroring is not None and mirroring.is_alike(file))
        if not clean_there or changed or not self.writes:
            raise error
        self._change(Lacks(file.number, self._node))
        file.lost = True
        self._left.add(file.number)
        if file.local is not None:
            file.left.append(file.local)  # somebody may be reading from it
            file.local = None

    async def _look_for(self, file: OpenFile) -> StoredFile | None:
        """On all volumes, once; to be called in the file's turn."""
        if file.local is None and not file.fresh:
            local = await self._local_copy(file.number, named=not file.dirty)
            if local is not None and not file.known:
                file.size, mtime = await self._on_disk(local.found)  # as it was left
                file.mtime = max(file.mtime, mtime)
                file.known, file.unflushed = file.number not in self._doubtful, True
                self._unsettled.discard(file.number)
            file.local = local
        return file.local

    # -- made anew -----------------------------------------------------------------------------------------------

    async def _renew_own(self, file: OpenFile, local: StoredFile) -> None:
        """This node's copy is made anew in another place, as long as the file is now. In the file's turn. Raises
        PeerLost, PeerCannot, OSError."""
        number, generation = file.number, new_generation()
        made = await self._on_disk(self._local.create, number, generation)
        try:
            await self._on_disk(made.truncate, file.size)
            await self._fill(file, made, local, settled=False)
            async with file.bringing, file.order:  # what is brought to the other node is read from one copy
                await self._on_disk(made.truncate, file.size)
                await self._fill(file, made, local, settled=True)  # what was written meanwhile
                await self._compare(file, made)
                await self._on_disk(made.sync)
                if file.lost or self._node in self._lacking(number):
                    raise PeerCannot("this node's copy isn't good")  # it will be made again elsewhere
                self._change(Held(number, self._node, generation))
                file.local = made
                file.left.append(local)
                self._torn.discard(number)
        except BaseException as error:
            self._remove(made, number, generation)
            if isinstance(error, SourceFailed):
                self._lose(file, error)
            raise

    def _remove(self, made: StoredFile, number: int, generation: str) -> None:
        """A copy that comes to nothing. What can't be removed is found to be strange some time."""
        self._disk.run(made.close)
        removing = self._disk.run(self._local.remove, number, generation)
        removing.add_done_callback(lambda done: done.cancelled() or done.exception())

    async def _fill(self, file: OpenFile, made: StoredFile, local: StoredFile, *, settled: bool) -> None:
        """Block by block what differs; `settled`: the file isn't changed meanwhile. What was never written stays so, as
        `made` has its length already."""
        for block in range(-(-file.size // BLOCK_BYTES)):
            least = min(BLOCK_BYTES, file.size - block * BLOCK_BYTES) if settled else 0
            await self._on_disk(_copy_block, local, made, block, least)
            if block % TOUCHED_EACH == TOUCHED_EACH - 1:
                await self._on_disk(made.touch)
        await self._on_disk(made.touch)

    async def _compare(self, file: OpenFile, made: StoredFile) -> None:
        """With the other node's copy, where both should be the same. Which of two is the better one can't be said here:
        this node's stays what it was."""
        mirroring = self.mirroring
        is_same = mirroring is not None and not file.dirty and mirroring.pair.peer not in self._lacking(file.number)
        if mirroring is not None and is_same and mirroring.peer.state.session:
            differing = await mirroring.differing(file, made, file.size)
            if differing:
                log.error("share.copies_differ", inode=file.number, blocks=len(differing), first=differing[0])


def _copy_block(source: StoredFile, target: StoredFile, block: int, least: int) -> None:
    """If it differs. `least`: so many bytes there must be. Blocks. Raises OSError."""
    at = block * BLOCK_BYTES
    try:
        data = source.read(BLOCK_BYTES, at)
    except OSError as error:
        raise SourceFailed(error.errno, error.strerror) from error
    if len(data) < least:
        raise SourceFailed(errno.EIO, "bytes of it are missing")
    if data != target.read(BLOCK_BYTES, at):
        target.write(data, at, len(data))
