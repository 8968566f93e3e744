"""This node's copies of the share's files while the other node writes: carries out what `peer.py` names.

What is told of one file is carried out in its order, of different files at the same time. A file of which something
failed is left as it is, and said to be so at its next sync, until it is begun anew: nothing is held up by a bad disk.
"""

import asyncio
import contextlib
import errno
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

import structlog

from conf.telling import reason_of
from storage.files.copies import CopyStore, OpenStore, StoredFile, digest_of
from storage.files.peer import (
    BLOCKS_AT_ONCE,
    Answer,
    Begin,
    Blocks,
    Compare,
    Create,
    Cut,
    End,
    Failed,
    Fetch,
    Fetched,
    Op,
    Renew,
    Renewed,
    Sync,
    Synced,
    Write,
)
from storage.objects.blocks import BLOCK_BYTES
from storage.objects.volume import NO_ROOM
from storage.workers import Threads, within

log = structlog.get_logger()

AT_ONCE_BYTES: Final = 4 << 20  # of one file, given to a thread in one go
NOT_BEGUN: Final = "it wasn't begun, or something that was told of it couldn't be done"
GONE: Final = "its copy isn't here"

Finish = Callable[[Answer], None]


@dataclass
class _Kept:
    """A file that was begun. `suspect`: a disk may still write to this copy what it was told long ago."""

    number: int
    copy: str = ""
    file: StoredFile | None = None
    begun: bool = False
    size: int = 0
    suspect: bool = False
    left: bool = False  # to a thread that doesn't come back
    unsure: CopyStore | None = None  # where this copy was made, if nothing has made it durable yet: nobody knows of it
    broken: bool = False  # something that was told of it couldn't be done
    queue: deque[tuple[Op, Finish]] = field(default_factory=deque)
    working: bool = False


class Keeper:
    def __init__(
        self, open_store: OpenStore, disk: Threads, hang_s: float, volumes: Callable[[], object] = lambda: None
    ) -> None:
        """A store is opened when the first file is begun, and another one after something has failed, or when
        `volumes()`, all that is known of them, is another value."""
        self._open_store, self._disk, self._hang_s, self._volumes = open_store, disk, hang_s, volumes
        self._store: CopyStore | None = None
        self._opened_with: object = None
        self._kept: dict[int, _Kept] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._rest = asyncio.Event()
        self._rest.set()

    def take(self, op: Op, finish: Finish) -> None:
        """`finish(answer)` when it is done; of what is told, too."""
        kept = self._kept.get(op.inode)
        if kept is None:
            kept = self._kept[op.inode] = _Kept(op.inode)
        kept.queue.append((op, finish))
        self._go_on(kept)

    def end_session(self) -> None:
        """Nothing more comes of what was begun; what came is still carried out."""
        for kept in list(self._kept.values()):
            self.take(End(kept.number), lambda answer: None)

    async def at_rest(self) -> None:
        """Wait until all that was told is carried out, or given up."""
        await self._rest.wait()

    async def stop(self) -> None:
        self.end_session()
        await self.at_rest()
        if self._store is not None:
            self._store.close()

    def _go_on(self, kept: _Kept) -> None:
        if kept.working or not kept.queue:
            return
        kept.working = True
        self._rest.clear()
        task = asyncio.get_running_loop().create_task(self._work(kept))
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: "asyncio.Task[None]") -> None:
        self._tasks.discard(task)
        if not self._tasks:
            self._rest.set()
        if not task.cancelled() and (error := task.exception()):
            raise error

    async def _work(self, kept: _Kept) -> None:
        while kept.queue:
            batch = [kept.queue.popleft()]
            size = _size(batch[0][0])
            while kept.queue and isinstance(kept.queue[0][0], Write) and size < AT_ONCE_BYTES:
                size += _size(kept.queue[0][0])
                batch.append(kept.queue.popleft())
            kept, answers = await self._carry_out(kept, [op for op, _ in batch])
            for (_, finish), answer in zip(batch, answers, strict=True):
                finish(answer)
        kept.working = False
        if kept.file is None and not (kept.suspect or kept.broken):
            self._kept.pop(kept.number, None)

    async def _carry_out(self, kept: _Kept, ops: list[Op]) -> tuple[_Kept, list[Answer]]:
        """Also what the file is from then on."""
        try:
            job = self._disk.run(self._all, kept, ops)
            return kept, await within(job, self._hang_s)
        except OSError as error:
            kept.begun, kept.broken, kept.left = False, True, error.errno == errno.ETIMEDOUT
            if error.errno not in NO_ROOM and any(isinstance(op, Sync) for op in ops):
                kept.suspect = True  # the kernel tells of it once, and shows what isn't on the disk
            if kept.left:  # a thread still has it, and comes back to it at any time
                kept = self._kept[kept.number] = _Kept(
                    kept.number, suspect=True, broken=True, queue=kept.queue, working=True
                )
            self._close_store()
            log.warning("share.copy_failed", inode=kept.number, error=reason_of(error))
            return kept, [Failed(reason_of(error))] * len(ops)

    def forget_volumes(self) -> None:
        """Hold none of them, until the next file is begun."""
        self._close_store()

    def _close_store(self) -> None:
        """Look at the volumes anew next time. Files that are open stay so."""
        store, self._store = self._store, None
        if store is not None:
            self._disk.run(store.close)

    # -- in a thread -----------------------------------------------------------------------------------------------

    def _all(self, kept: _Kept, ops: list[Op]) -> list[Answer]:
        return [Failed(NOT_BEGUN) if kept.left else self._one(kept, op) for op in ops]

    def _one(self, kept: _Kept, op: Op) -> Answer:
        match op:
            case Create() | Begin() | Renew():
                return self._begin(kept, op)
            case Compare():
                return self._compare(kept, op)
            case Fetch():
                return self._fetch(kept, op)
            case End():
                self._let_go(kept)
                kept.broken = False
                return Synced()
        if not kept.begun or kept.file is None:
            return Failed(NOT_BEGUN)
        match op:
            case Write():
                kept.file.write(op.data, op.at, max(0, op.at + len(op.data) - kept.size))
                kept.size = max(kept.size, op.at + len(op.data))
            case Cut():
                kept.file.truncate(op.size)
                kept.size = op.size
            case Sync():
                kept.file.sync()
                kept.unsure = None
        return Synced()

    def _begin(self, kept: _Kept, op: Create | Begin | Renew) -> Answer:
        self._let_go(kept)
        kept.broken = True  # until it is begun
        store = self._opened(op.space)
        if isinstance(op, Create):
            return self._made(kept, store, "", 0)
        found = None if kept.suspect else store.open(op.inode, op.copy, named=isinstance(op, Begin))
        if isinstance(op, Renew) and found is not None and found.leaving:
            with contextlib.suppress(OSError):  # without room elsewhere it stays
                answer = self._moved(kept, store, op)
                found.close()
                return answer
        if isinstance(op, Begin):
            size = found.found()[0] if found is not None else 0
            if size != op.size:
                if found is not None:
                    found.close()
                return Failed("it isn't the same")
            if found is None and (kept.suspect or not store.complete):
                return Failed(GONE)
            if found is None:
                return self._made(kept, store, op.copy, 0)
        elif found is None:
            spare = op.spare if kept.suspect or not store.complete else op.copy
            return self._made(kept, store, spare, op.size)
        kept.file, kept.copy, kept.size, kept.begun, kept.broken = found, op.copy, op.size, True, False
        if isinstance(op, Renew):
            found.truncate(op.size)
        return Renewed(kept.copy)

    def _moved(self, kept: _Kept, store: CopyStore, op: Renew) -> Answer:
        """Begun anew where there is room for all of it. Raises OSError; then nothing is left of it."""
        answer = self._made(kept, store, op.spare, op.size)
        try:
            if kept.file is not None:
                kept.file.write(b"", 0, op.size)
        except OSError:
            self._let_go(kept)
            raise
        return answer

    def _made(self, kept: _Kept, store: CopyStore, copy: str, size: int) -> Answer:
        try:
            made = store.create(kept.number, copy)
        except FileExistsError:  # from before a crash: nobody has heard of it
            found = store.open(kept.number, copy, named=False)
            if found is None:
                raise
            made = found
        made.truncate(size)
        kept.file, kept.copy, kept.begun, kept.broken, kept.suspect = made, copy, True, False, False
        kept.size = 0  # all that comes takes room
        kept.unsure = store if copy else None
        return Renewed(copy)

    def _compare(self, kept: _Kept, op: Compare) -> Answer:
        def look(file: StoredFile) -> Answer:
            size, digests = file.found()[0], []
            for number in range(op.first, op.first + BLOCKS_AT_ONCE):
                if number * BLOCK_BYTES >= size:
                    break
                digests.append(digest_of(file, number))
            return Blocks(size, tuple(digests))

        return self._on(kept, op, look)

    def _fetch(self, kept: _Kept, op: Fetch) -> Answer:
        return self._on(kept, op, lambda file: Fetched(file.read(op.size, op.at)))

    def _on(self, kept: _Kept, op: Compare | Fetch, look: Callable[[StoredFile], Answer]) -> Answer:
        """Look at a copy, be it begun or not."""
        if kept.begun and kept.file is not None and kept.copy == op.copy:
            return look(kept.file)
        if kept.broken:
            return Failed(NOT_BEGUN)
        file = self._opened(op.space).open(op.inode, op.copy, named=False)
        if file is None:
            return Failed(GONE)
        try:
            return look(file)
        finally:
            file.close()

    def _let_go(self, kept: _Kept) -> None:
        file, kept.file, kept.begun = kept.file, None, False
        unsure, kept.unsure = kept.unsure, None
        if file is not None:
            file.close()
        if unsure is not None:
            with contextlib.suppress(OSError):  # it is found to be strange some time
                unsure.remove(kept.number, kept.copy)

    def _opened(self, space: str) -> CopyStore:
        now, store = self._volumes(), self._store
        if store is None or now != self._opened_with:
            store = self._open_store()
            self._store, self._opened_with = store, now
        store.space = space
        return store


def _size(op: Op) -> int:
    return len(op.data) if isinstance(op, Write) else 0
