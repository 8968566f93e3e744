"""Makes the leader's entries durable on this node: waits for the streamed bytes or fetches them, checks them, and hands
them to the journal."""

import asyncio
import errno
from collections.abc import Callable
from functools import partial
from typing import Final

import structlog

from conf.telling import reason_of
from storage.journal import Journal
from storage.objects.blob_store import holds
from storage.objects.incoming import Incoming
from storage.objects.reading import SLOWEST_BYTES_S
from storage.objects.volume import NoRoom
from storage.objects.volumes import Volumes
from storage.replication.effects import Persist
from storage.replication.peering import FetchFailed, Peering, PeerLacksIt
from storage.state.catalogue import ADOPTED, Catalogue
from storage.state.model import Delete, Entry, Location, Put, decode_entry
from storage.workers import Threads, within

log = structlog.get_logger()

FETCHES_MAX: Final = 24
RETRIES: Final = 3
RETRY_S: Final = 0.5
LOOKS_MAX: Final = 4  # files that are read at once, to see whether they are copies
LOOK_S: Final = 30.0


class Follower:
    """`on_stuck(why)` is called when an entry can't be made durable here."""

    def __init__(
        self,
        peering: Peering,
        journal: Journal,
        catalogue: Catalogue,
        volumes: Volumes,
        workers: Threads,
        on_stuck: Callable[[str], None],
    ) -> None:
        self._peering, self._journal, self._catalogue = peering, journal, catalogue
        self._volumes, self._workers, self._on_stuck = volumes, workers, on_stuck
        self._fetching = asyncio.Semaphore(FETCHES_MAX)
        self._looking = asyncio.Semaphore(LOOKS_MAX)
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self.entries: dict[int, tuple[Entry, Location | None]] = {}  # accepted here and not yet published

    def restart(self, durable: int) -> None:
        """Forget what isn't in the journal yet; it comes anew."""
        for task in self._tasks.values():
            task.cancel()
        self._tasks.clear()
        self._journal.forget_early()
        handed = max(durable, self._journal.handed)
        self.entries = {seq: kept for seq, kept in list(self.entries.items()) if seq <= handed}

    def persist(self, effect: Persist) -> None:
        entry = decode_entry(effect.entry)
        if (entry.epoch, entry.seq) != (effect.entry_epoch, effect.seq):
            self._on_stuck("an entry doesn't match its envelope")
            return
        put = entry.operation
        if not isinstance(put, Put):
            self._keep(entry, None)
            return
        if effect.owed and not effect.stream:
            self._keep(entry, None)  # healing has its bytes from the other node, or from a disk that came back
            return
        incoming = self._peering.ended(effect.stream)
        is_inline = incoming is not None and self._journal.takes_inline and incoming.inline() is not None
        if incoming and is_inline and incoming.digest_at_once() and _fits(incoming, put):
            self._peering.forget(effect.stream)
            self._note(entry, None)
            self._journal.append_inline(entry, incoming, partial(self._note_landed, entry))
            return
        if incoming:
            incoming.begin_finish()
        task = asyncio.get_running_loop().create_task(self._persist(entry, put, effect.stream))
        self._tasks[effect.seq] = task
        task.add_done_callback(lambda done: self._done(entry.seq, done))

    def _done(self, seq: int, task: "asyncio.Task[None]") -> None:
        if self._tasks.get(seq) is task:
            del self._tasks[seq]

    def _note(self, entry: Entry, location: Location | None) -> None:
        self.entries[entry.seq] = (entry, location)

    def _note_landed(self, entry: Entry, location: Location) -> None:
        if entry.seq in self.entries:
            self.entries[entry.seq] = (entry, location)

    def _keep(self, entry: Entry, location: Location | None) -> None:
        self._note(entry, location)
        self._journal.append(entry, location)

    async def _persist(self, entry: Entry, put: Put, stream: int) -> None:
        try:
            location: Location | None = await self.obtain(entry, put, stream)
            if location and self._volumes.has_failed(location.volume):
                raise OSError(errno.EIO, "its disk failed just now")
        except PeerLacksIt:
            # It was committed, and it is on neither node now or was deleted later: the log goes on without the bytes.
            location = None
        except (FetchFailed, NoRoom, OSError) as error:
            log.warning("follower.stuck", seq=entry.seq, error=reason_of(error))
            self._on_stuck(reason_of(error))
            return
        self._keep(entry, location)

    async def obtain(self, entry: Entry, put: Put, stream: int = 0) -> Location:
        """Durable bytes of an entry on this node, checked against its digest: from a stream, from a file that lies here
        already, or from the peer. Raises FetchFailed, NoRoom or OSError."""
        if stream:
            try:
                return await self._checked(await self._peering.received(stream), put)
            except (FetchFailed, NoRoom, OSError) as error:
                log.warning("stream.unusable", sop_instance=put.sop_instance, error=reason_of(error))
        elif found := await self.lying_here(entry, put):
            return found
        return await self.fetched(entry, put)

    async def lying_here(self, entry: Entry, put: Put) -> Location | None:
        """A good copy that the catalogue doesn't name: a disk came back, or the catalogue was made anew."""
        async with self._looking:
            try:
                return await within(
                    self._workers.run(self.lies_here, entry, put), LOOK_S + put.length / SLOWEST_BYTES_S
                )
            except OSError as error:
                log.warning("copy.not_looked_for", seq=entry.seq, error=error.strerror)
                return None

    async def fetched(self, entry: Entry, put: Put) -> Location:
        """Durable bytes from the peer. Raises FetchFailed, NoRoom or OSError."""
        for attempt in range(RETRIES):
            async with self._fetching:
                try:
                    return await self._fetch(entry, put)
                except PeerLacksIt:
                    raise
                except (FetchFailed, OSError) as error:
                    if attempt == RETRIES - 1 or self._peering.link is None:
                        raise
                    log.warning("fetch.again", sop_instance=put.sop_instance, error=reason_of(error))
            await asyncio.sleep(RETRY_S)
        raise FetchFailed("tried too often")

    async def from_log(self, entry: Entry, put: Put) -> Location | None:
        """Durable bytes of an entry that the log still has. Raises FetchFailed, NoRoom or OSError."""
        data = await self._journal.logged_bytes(entry.seq)
        if data is None:
            return None
        volume = await self._workers.run(self._volumes.place, put.study, self._catalogue.volume_of)
        incoming = Incoming(self._workers, self._volumes, volume, data[: put.offset])
        incoming.feed(memoryview(data)[put.offset :])
        return await self._checked(incoming, put)

    async def _fetch(self, entry: Entry, put: Put) -> Location:
        incoming = await self._peering.fetch(entry.seq, put.study)
        try:
            return await self._checked(incoming, put)
        except FetchFailed:
            self._peering.suspect(entry.seq)
            raise

    async def _checked(self, incoming: Incoming, put: Put) -> Location:
        try:
            await incoming.finish()
        except (OSError, NoRoom):
            await incoming.discard()
            raise
        except asyncio.CancelledError:
            self._peering.discard_soon(incoming)
            raise
        if not _fits(incoming, put):
            await incoming.discard()
            raise FetchFailed("what came isn't what the entry names")
        self._volumes.on_their_way.discard(incoming)  # its entry names it from here on
        return incoming.location

    def lies_here(self, entry: Entry, put: Put) -> Location | None:
        """A good file in its place in the tree that the catalogue doesn't name. Blocks."""
        if self._catalogue.leavings(1):
            return None  # what lies there may be on its way out
        path = self._catalogue.path_of(entry, {})
        for volume in self._volumes:
            location = Location(volume.id, f"{ADOPTED}{entry.seq}", path)
            try:
                name = volume.locate(location)
                good = name and holds(volume, name, put)
                if good and not self._belongs_to_another(entry, put):
                    return location
            except OSError:
                continue
        return None

    def _belongs_to_another(self, entry: Entry, put: Put) -> bool:
        """What lies in this place is the copy of an older entry, at least until a deletion is carried out."""
        known = self._catalogue.instance(put.sop_instance)
        coming = [kept.operation for kept, _ in list(self.entries.values()) if kept.seq != entry.seq]
        return (
            (known is not None and known.seq != entry.seq)
            or bool(self._catalogue.leavings(1))
            or any(
                isinstance(one, Delete) or (isinstance(one, Put) and one.sop_instance == put.sop_instance)
                for one in coming
            )
        )


def _fits(incoming: Incoming, put: Put) -> bool:
    """What came is what the entry names."""
    return (incoming.digest, incoming.length, incoming.offset) == (put.digest, put.length, put.offset)
