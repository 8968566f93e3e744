"""The state of the log's leader goes to a follower that is far behind: it is had quicker than all entries one by one.

Nothing of what the follower has is touched before all of it is there, durably: then catalogue and log become another
one in one step. Whatever goes wrong before that, the follower goes on with what it has, entry by entry.
"""

import asyncio
from collections.abc import Callable
from typing import Final

import structlog

from conf.telling import reason_of
from storage.journal import Journal
from storage.replication.epochs import Epochs
from storage.replication.link import Kind
from storage.replication.peering import FetchFailed, Peering
from storage.state import transfer
from storage.state.catalogue import Catalogue
from storage.state.kv import Kv, Snapshot, SnapshotLost
from storage.state.transfer import Ask, Head, Row, StateUnusable
from storage.turns import LeftBehind
from storage.workers import Threads

log = structlog.get_logger()

PART_S: Final = 60.0
TRIES: Final = 3
ROOM: Final = 1.5  # free bytes wanted for each that the other node's catalogue takes
UNUSED_S: Final = 60.0  # then the snapshot is let go of


class StateGiver:
    def __init__(self, catalogue: Catalogue, workers: Threads, clock: Callable[[], float]) -> None:
        self._catalogue, self._workers, self._clock = catalogue, workers, clock
        self._snapshot: Snapshot | None = None
        self._applied = 0
        self._used_at = float("-inf")

    async def part(self, payload: bytes) -> bytes:
        """What was asked for; empty if it can't be given now. Raises msgspec.DecodeError."""
        asked = transfer.decode_ask(payload)
        try:
            return await self._workers.run(self._part, asked)
        except (SnapshotLost, StateUnusable) as error:
            log.warning("state.not_given", why=str(error) or "the catalogue has grown")
            return b""

    def _part(self, asked: Ask | None) -> bytes:
        self._used_at = self._clock()
        if asked is None:
            self.close()
            snapshot = self._snapshot = self._catalogue.kv.snapshot()
            on_disk = self._catalogue.kv.size_bytes
            head = snapshot.read(lambda txn: transfer.head(txn, on_disk))
            self._applied = head.applied
            return transfer.encode(head)
        kept = self._snapshot
        if kept is None:
            raise SnapshotLost
        return transfer.encode(kept.read(lambda txn: transfer.answer(txn, asked, self._applied)))

    def expire(self) -> None:
        """Nobody asks any more."""
        if self._clock() - self._used_at > UNUSED_S:
            self.close()

    def close(self) -> None:
        kept, self._snapshot = self._snapshot, None
        if kept:
            kept.close()


class StateTaker:
    def __init__(
        self,
        peering: Peering,
        catalogue: Catalogue,
        journal: Journal,
        workers: Threads,
        free_bytes: Callable[[], int],
    ) -> None:
        """`free_bytes()`: room on the disk of the catalogue; it blocks."""
        self._peering, self._catalogue, self._journal, self._workers = peering, catalogue, journal, workers
        self._free_bytes = free_bytes
        self.rows: tuple[int, int] | None = None  # had, of how many; while a state is being taken
        self.why_not = ""  # why the last one wasn't taken

    async def take(self, match: int) -> tuple[tuple[int, int], ...] | None:
        """The leader's state in place of this node's, whose log ends at `match` and is all applied. Returns the epochs
        of the log up to its end, or None if it wasn't to be had. Raises CatalogueDamaged if it isn't known which of the
        two is here now."""
        for _ in range(TRIES):
            link = self._peering.link
            state = await self._take(match)
            if state is not None or link is None or self._peering.link is not link:
                return state
        return None

    async def _take(self, match: int) -> tuple[tuple[int, int], ...] | None:
        new: Kv | None = None
        try:
            await self._journal.settle()
            head = transfer.decode_head(await self._ask(None))
            await self._workers.run(self._check, head, match)
            total = sum(head.tables.values())
            log.info("state.taking", upto=head.applied, rows=total)
            new = await self._workers.run(self._catalogue.kv.beside)
            self.rows = (0, total)
            for table in head.tables:
                await self._take_table(new, table)
            await self._journal.become(new, head)
        except (FetchFailed, StateUnusable, LeftBehind, OSError) as error:
            self.why_not = reason_of(error) if isinstance(error, OSError) else str(error)
            log.warning("state.not_taken", why=self.why_not)
            if new is not None:
                await self._workers.run(new.discard)
            return None
        finally:
            self.rows = None
        log.info("state.taken", upto=head.applied)
        self.why_not = ""
        return head.epochs

    def _check(self, head: Head, match: int) -> None:
        """Raises StateUnusable."""
        if head.format != transfer.FORMAT or not set(transfer.SHARED) <= set(head.rows):
            raise StateUnusable(f"it has format {head.format}, and this version {transfer.FORMAT}")
        if head.applied < match:
            raise StateUnusable(f"it ends at entry {head.applied}, and this node's log at {match}")
        own = self._catalogue.epochs
        lineage = str(self._catalogue.meta("lineage", ""))
        if own.common(Epochs(head.epochs)) < own.last[1] or (lineage and head.lineage and lineage != head.lineage):
            raise StateUnusable("it isn't of this node's log")
        if self._free_bytes() < ROOM * head.size:
            raise StateUnusable(f"there is no room for it: it takes {head.size >> 20} MB on the disk")

    async def _ask(self, asked: Ask | None) -> bytes:
        found = await self._peering.ask(Kind.STATE, transfer.encode(asked), PART_S)
        if not found:
            raise FetchFailed("the other node can't give its state now")
        return found

    async def _take_table(self, new: Kv, table: str) -> None:
        """Each part is written while the next one comes."""
        coming = asyncio.ensure_future(self._part(table, b""))
        try:
            while True:
                rows, ends = await coming
                if not ends:
                    if not rows:
                        raise StateUnusable(f"table {table} goes on with nothing")
                    coming = asyncio.ensure_future(self._part(table, rows[-1][0] + b"\0"))
                await self._workers.run(_write, new, table, rows)
                if self.rows:
                    self.rows = (self.rows[0] + len(rows), self.rows[1])
                if ends:
                    return
        finally:
            coming.cancel()

    async def _part(self, table: str, start: bytes) -> tuple[list[Row], bool]:
        """Rows from a key on, and whether they are the last."""
        asked, own = await self._workers.run(self._own, table, start)
        answer = await self._workers.run(transfer.decode_answer, await self._ask(asked))
        return (own, answer.ends) if answer.same else (answer.rows, answer.ends)

    def _own(self, table: str, start: bytes) -> tuple[Ask, list[Row]]:
        with self._catalogue.kv.read() as txn:
            return transfer.ask_for(txn, table, start)


def _write(new: Kv, table: str, rows: list[Row]) -> None:
    new.update(lambda txn: transfer.add(txn, table, rows))
