"""Makes the leader's entries durable on this node: waits for the streamed bytes or fetches them, checks them, and hands
them to the journal."""

import asyncio
from collections.abc import Callable
from typing import Final

import structlog

from storage.effects import Persist
from storage.incoming import Incoming
from storage.journal import Journal
from storage.model import Entry, Location, Put, decode_entry
from storage.peering import FetchFailed, Peering
from storage.recovery import file_digest
from storage.volume import NoRoom
from storage.volumes import Volumes
from storage.workers import Workers

log = structlog.get_logger()

FETCHES_MAX: Final = 8
RETRIES: Final = 3
RETRY_S: Final = 0.5


class Follower:
    """`on_stuck(why)` is called when an entry can't be made durable here."""

    def __init__(
        self,
        peering: Peering,
        journal: Journal,
        volumes: Volumes,
        workers: Workers,
        location_of: Callable[[str], Location | None],
        on_stuck: Callable[[str], None],
    ) -> None:
        self._peering, self._journal, self._volumes, self._workers = peering, journal, volumes, workers
        self._location_of, self._on_stuck = location_of, on_stuck
        self._fetching = asyncio.Semaphore(FETCHES_MAX)
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self.entries: dict[int, tuple[Entry, Location]] = {}  # accepted here and not yet published

    def restart(self, durable: int) -> None:
        """Forget what isn't in the journal yet; entries after `durable` come anew."""
        for task in self._tasks.values():
            task.cancel()
        self._tasks.clear()
        self._journal.restart(durable)
        self.entries = {seq: kept for seq, kept in self.entries.items() if seq <= durable}

    def persist(self, effect: Persist) -> None:
        entry = decode_entry(effect.entry)
        if (entry.epoch, entry.seq) != (effect.entry_epoch, effect.seq):
            self._on_stuck("an entry doesn't match its envelope")
            return
        incoming = self._peering.ended(effect.stream)
        if incoming and self._journal.idle and incoming.digest_at_once() and _fits(incoming, entry.operation):
            self._peering.forget(effect.stream)
            self._journal.append_landing(entry, lambda: self._land(entry, incoming))
            return
        if incoming:
            incoming.begin_finish()
        task = asyncio.get_running_loop().create_task(self._persist(entry, effect.stream))
        self._tasks[effect.seq] = task

    def _land(self, entry: Entry, incoming: Incoming) -> Location:
        """In the journal's thread."""
        incoming.land_here()
        location = Location(incoming.volume.id, incoming.spool, "")
        self.entries[entry.seq] = (entry, location)
        return location

    async def _persist(self, entry: Entry, stream: int) -> None:
        try:
            location = await self.obtain(entry.operation, stream)
        except (FetchFailed, NoRoom, OSError) as error:
            log.warning("follower.stuck", seq=entry.seq, error=str(error) or type(error).__name__)
            self._on_stuck(str(error))
            return
        finally:
            if self._tasks.get(entry.seq) is asyncio.current_task():
                del self._tasks[entry.seq]
        self.entries[entry.seq] = (entry, location)
        self._journal.append(entry, location)

    async def obtain(self, put: Put, stream: int = 0) -> Location:
        """Durable bytes of `put` on this node, checked against its digest. Raises FetchFailed, NoRoom or OSError."""
        if stream:
            try:
                return await self._checked(await self._peering.received(stream), put)
            except (FetchFailed, OSError) as error:
                log.warning("stream.unusable", sop_instance=put.sop_instance, error=str(error))
        else:
            known = await self._already_here(put)
            if known:
                return known
        for attempt in range(RETRIES):
            async with self._fetching:
                try:
                    return await self._checked(await self._peering.fetch(put.sop_instance), put)
                except OSError as error:
                    if attempt == RETRIES - 1:
                        raise
                    log.warning("fetch.again", sop_instance=put.sop_instance, error=str(error))
            await asyncio.sleep(RETRY_S)
        raise FetchFailed("tried too often")

    async def _checked(self, incoming: Incoming, put: Put) -> Location:
        try:
            await incoming.finish()
        except (OSError, NoRoom):
            await incoming.discard()
            raise
        if not _fits(incoming, put):
            await incoming.discard()
            raise FetchFailed("what came isn't what the entry names")
        return Location(incoming.volume.id, incoming.spool, "")

    async def _already_here(self, put: Put) -> Location | None:
        location = self._location_of(put.sop_instance)
        if location is None:
            return None
        try:
            path = self._volumes.get(location.volume).locate(location.spool, location.path)
            if path is None:
                return None
            found = await self._workers.run(file_digest, path, put.offset)
            return location if found == (put.digest, put.length) else None
        except (OSError, LookupError):
            return None


def _fits(incoming: Incoming, put: Put) -> bool:
    """What came is what the entry names."""
    return (incoming.digest, incoming.length, incoming.offset) == (put.digest, put.length, put.offset)
