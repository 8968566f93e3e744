"""Looks at what lies of the share's files on this node's volumes: copies that should be there and aren't are reported,
so that they are made again from the other node's; copies that nobody knows (any more) are removed.

No inode number is given twice, and numbers are given in the order of the log: what lies below the next one and has no
row never will have one. A copy that is being made again is in the rows only when it is complete: it is left alone as
long as it changes. What goes was looked at twice, and all that was in the log the first time is in the rows the second.
"""

import asyncio
import stat
from collections.abc import Callable
from itertools import islice
from typing import Final

import structlog

from conf.telling import reason_of
from storage.files.copies import CopyStore, OpenStore
from storage.files.local import PARTS
from storage.objects.volumes import Volumes
from storage.state import file_rows
from storage.state.catalogue import Catalogue
from storage.state.file_model import decode_inode
from storage.workers import Threads

log = structlog.get_logger()

LOOK_S: Final = 10.0  # between two looks whether the volumes are others
PASS_S: Final = 86_400.0  # between two passes over all files
LOST_AGAIN_S: Final = 600.0  # where something is lost: who was told may not have heard it
REPORTED_S: Final = 5.0  # then what was reported is in the rows
HANG_S: Final = 10.0  # a thread that is at one job for so long is replaced
AT_ONCE: Final = 500  # rows looked at
RESTS_S: Final = 600.0  # since its last change: nobody works on it

Copy = tuple[int, str]  # inode number, generation


class ShareCopies:
    def __init__(
        self,
        catalogue: Catalogue,
        volumes: Volumes,
        open_store: OpenStore,
        disk: Threads,
        *,
        node: str,
        clock: Callable[[], float],
        on_lost: Callable[[list[int]], object],
        log_end: Callable[[], int | None],
    ) -> None:
        """`on_lost(inode numbers)`: this node doesn't hold what it should of these. It is called again until the rows
        say so. `log_end()`: up to which entry the log goes now, None where that can't be said."""
        self._catalogue, self._volumes, self._open_store, self._disk = catalogue, volumes, open_store, disk
        self._node, self._clock, self._on_lost, self._log_end = node, clock, on_lost, log_end
        self._passed: tuple[tuple[str, ...], float] = ((), float("-inf"))  # with which volumes, and when
        self._strange: dict[Copy, int] = {}  # where the log ended when it was seen first
        self._wanted = 0
        self._known_lost: set[int] = set()
        self._pass_s = PASS_S

    async def run(self) -> None:
        while True:
            await self.look()
            await asyncio.sleep(LOOK_S)

    async def look(self) -> None:
        """A pass, if it is time for one. Without a volume that may come back nothing can be said."""
        self._disk.reinforce(HANG_S)
        slots = self._volumes.slots
        if not all(slot.usable or slot.failed for slot in slots):
            return
        volumes = self._usable()
        before, at = self._passed
        if volumes == before and self._clock() - at < self._pass_s and not (self._strange or self._wanted):
            return
        self._wanted = max(0, self._wanted - 1)
        try:
            store = await self._disk.run(self._opened)
            try:
                await self._find_lost(store)
                await self._remove_strange(store)
            finally:
                await self._disk.run(store.close)
        except OSError as error:
            log.warning("share.not_looked_at", error=reason_of(error))
            return
        self._passed = volumes, self._clock()

    def _usable(self) -> tuple[str, ...]:
        return tuple(sorted(slot.volume.id for slot in self._volumes.slots if slot.usable and slot.volume))

    @property
    def up_to_date(self) -> bool:
        """What lies on the volumes as they are now is known, and was reported a while ago."""
        return self._passed[0] == self._usable() and self._clock() - self._passed[1] > REPORTED_S and not self._wanted

    def again(self) -> None:
        """The next look makes a pass, and so does the one after it, when all that is on its way is in the rows: another
        writer has begun, or this node has taken the other one's state."""
        self._wanted = 2

    def _opened(self) -> CopyStore:
        store = self._open_store()
        store.space = self._catalogue.files_space()
        return store

    async def _find_lost(self, store: CopyStore) -> None:
        after: int | None = 0
        self._pass_s = PASS_S
        while after is not None:
            lost, after = await self._disk.run(self._lost_behind, store, after)
            if lost:
                self._on_lost(lost)
                self._pass_s = LOST_AGAIN_S
            if news := set(lost) - self._known_lost:
                log.warning("share.copies_lost", count=len(news), first=min(news))
                self._known_lost |= news
                self._wanted = max(1, self._wanted)

    def _lost_behind(self, store: CopyStore, after: int) -> tuple[list[int], int | None]:
        """Of some rows, and the last one; None: there are no more."""
        wanted: list[Copy] = []
        with self._catalogue.kv.read() as txn:
            rows = list(islice(txn.scan("file_inodes", file_rows.number_key(after + 1)), AT_ONCE))
            for key, raw in rows:
                number, row = file_rows.number_of(key), decode_inode(raw)
                if stat.S_ISREG(row.mode) and row.size and self._node not in file_rows.lacking(txn, number):
                    wanted.append((number, file_rows.generation(txn, number, self._node)))
        last = file_rows.number_of(rows[-1][0]) if len(rows) == AT_ONCE else None
        return [number for number, generation in wanted if not store.has(number, generation)], last

    async def _remove_strange(self, store: CopyStore) -> None:
        found: set[Copy] = set()
        end, applied = self._log_end(), int(self._catalogue.meta("applied", 0))
        for part in range(PARTS):
            found |= await self._disk.run(self._strange_in, store, part)
        if end is None:
            return
        known = {copy: self._strange.get(copy, end) for copy in found}
        gone = [copy for copy, at in known.items() if copy in self._strange and applied >= at]
        for number, generation in gone:
            await self._disk.run(store.remove, number, generation)
        self._strange = {copy: at for copy, at in known.items() if copy not in gone}

    def _strange_in(self, store: CopyStore, part: int) -> set[Copy]:
        copies = store.listing(part)
        with self._catalogue.kv.read() as txn:
            end = file_rows.next_number(txn)
            strange = set()
            for number, generation, age_s in copies:
                is_gone = file_rows.is_gone(txn, number)
                is_other = generation != file_rows.generation(txn, number, self._node)
                in_the_making = generation and not is_gone and age_s < RESTS_S
                if number < end and (is_gone or is_other) and not in_the_making:
                    strange.add((number, generation))
            return strange
