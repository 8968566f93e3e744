"""Writing on the primary: from the first byte of an object to its commit on both nodes.

The entry is proposed, and the peer asked to prepare it, as soon as the object is complete in memory: this node's disk
and the peer's work at the same time. An object too long for that is made durable here first. Either way the commit
needs both. Should this node's last disk fail then, it stops leading, and whoever leads next decides about the entry.
"""

import asyncio
import errno
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from typing import Final

import msgspec

from conf.settings import ClusterSettings
from storage import crash
from storage.journal import Journal
from storage.objects.copies import Copies
from storage.objects.incoming import Incoming, seen
from storage.objects.lookups import Lookups
from storage.objects.upload import Upload
from storage.objects.volume import NoRoom
from storage.objects.volumes import Volumes
from storage.replication.duty import Duty
from storage.replication.messages import KNOWS_FILES, PLACES_STREAMS
from storage.replication.peering import Peering
from storage.replication.pending import Pending, Pendings
from storage.replication.replica import Replica
from storage.state.catalogue import Catalogue
from storage.state.file_images import is_of_file
from storage.state.file_model import Change
from storage.state.model import Delete, Entry, Files, Forget, IndexFile, Operation, Put, Task, TaskDone
from storage.workers import Threads

COMMIT_S: Final = 60.0  # longer than any change of the in-sync set takes


class NotServing(Exception):
    """This node isn't the primary, or may not act as it now. Whether the object was stored is not known."""


class Conflict(Exception):
    """The SOP Instance UID is taken by other bytes; the newcomer is in quarantine."""


@dataclass(frozen=True)
class Proposal:
    """An entry on its way. `seq`: its number in the log."""

    seq: int
    _waiting: "asyncio.Future[None]"
    _committed: "Callable[[asyncio.Future[None]], Awaitable[None]]"

    async def committed(self) -> None:
        """Wait until both nodes will carry it out. Raises NotServing; then it isn't known whether they will."""
        try:
            await self._committed(self._waiting)
        except NoRoom as error:
            raise NotServing(str(error)) from error


class Ingest:
    def __init__(
        self,
        core: Replica,
        duty: Duty,
        cluster: ClusterSettings | None,
        catalogue: Catalogue,
        volumes: Volumes,
        disk: Threads,
        lookups: Lookups,
        peering: Peering,
        journal: Journal,
        pendings: Pendings,
        copies: Copies,
        *,
        peer_room: Callable[[], int],
        flush: Callable[[], None],
        clock: Callable[[], float],
        duplicates: str,
        examine: Callable[[int], Awaitable[bool]],
        not_kept: Callable[[int, Exception], None],
        state_is_full: Callable[[], bool],
    ) -> None:
        """`examine(seq)` reads this node's copy of an entry, sets a bad one aside and says whether it was good;
        `not_kept(seq, error)`: no disk of this node takes the bytes of an entry that was proposed."""
        self._core, self._duty, self._cluster = core, duty, cluster
        self._catalogue, self._volumes, self._disk, self._lookups = catalogue, volumes, disk, lookups
        self._peering, self._journal, self._pendings, self._copies = peering, journal, pendings, copies
        self._peer_room, self._flush, self._clock, self._duplicates = peer_room, flush, clock, duplicates
        self._examine, self._not_kept = examine, not_kept
        self._state_is_full = state_is_full
        self.on_commit: Callable[[float], object] = lambda seconds: None

    def begin(self, header: bytes) -> Upload:
        """Start an object. `header` is what precedes the data set. Raises NotServing or NoRoom."""
        if not self._duty.may_serve:
            raise NotServing("not the primary")
        if self._peer_is_full() or self._degraded():
            raise NoRoom("the second copy can't be kept now")
        if self._state_is_full():
            raise NoRoom("the disk of the catalogue is full")
        volume = self._volumes.choose()
        stream = self._peering.open_stream(header) if self._core.live else 0
        tee = (lambda chunk: self._peering.chunk(stream, chunk)) if stream else None
        return Upload(Incoming(self._disk, self._volumes, volume, header, tee), stream, self._peering, self._place)

    def _place(self, incoming: Incoming, stream: int, study: str) -> None:
        """Put an object where the rest of its study lies, if there is room and nothing was written yet."""
        self._lookups.place(incoming, study)
        peer = self._core.peer_hello
        if peer is not None and peer.features >= PLACES_STREAMS:
            self._peering.place_stream(stream, study)

    def _peer_is_full(self) -> bool:
        return self._core.peer in self._core.in_sync.required and self._peer_room() <= 0

    def _degraded(self) -> bool:
        cluster = self._cluster
        return cluster is not None and cluster.degraded == "refuse" and self._core.in_sync.alone

    async def commit(self, operation: Delete | Task | TaskDone | Forget) -> None:
        """Commit a change that brings no bytes; returns when both nodes will carry it out. Raises NotServing."""
        await self.propose(operation).committed()

    def propose(self, operation: Delete | Task | TaskDone | Forget | Files | IndexFile) -> "Proposal":
        """Put a change that brings no bytes behind all others in the log. Raises NotServing."""
        if not self._duty.may_serve:
            raise NotServing("not the primary")
        pending, waiting = self._pend(operation, 0)
        self._journal.append(pending.entry, None)
        self._flush()
        return Proposal(pending.entry.seq, waiting, self._committed)

    def propose_files(self, change: Change) -> "Proposal":
        """The same for a change of the share's files. Raises NotServing."""
        core = self._core
        if core.peer_hello is not None and core.peer_hello.features < KNOWS_FILES:
            raise NotServing(f"node {core.peer} runs a version that doesn't know the share's files: upgrade it")
        core.need(KNOWS_FILES)
        return self.propose(Files(change))

    async def index_file(self, operation: IndexFile) -> None:
        """Have both nodes know what a file of the share is. Raises NotServing, NoRoom."""
        if operation.put is not None and self._state_is_full():
            raise NoRoom("the disk of the catalogue is full")
        await self.propose(operation).committed()

    async def put(self, upload: Upload, make: Callable[[bytes, int], Put]) -> bool:
        """Commit a finished object. `make(digest, length)` gives its record.

        Returns True if it is stored now, False if the same object was there already. Raises Conflict, NotServing,
        NoRoom, or OSError when this node's disk failed. What isn't kept is discarded; nobody waits for that.
        """
        try:
            return await self._put(upload, make)
        finally:
            upload.discard_soon()

    async def _put(self, upload: Upload, make: Callable[[bytes, int], Put]) -> bool:
        incoming = upload.incoming
        upload.complete()
        is_inline = self._journal.takes_inline and incoming.inline() is not None
        digest = incoming.digest_at_once() if self._asks_early() or is_inline else None
        if digest is None:
            digest = await incoming.finish()
        put = make(digest, incoming.length)
        if incoming.blocks:
            put = msgspec.structs.replace(put, blocks=incoming.blocks)
        await self._lookups.warm(put.sop_instance)
        known = self._known(put)
        if known is not None:
            await incoming.finish()
            if not self._replaces(put, known[0]) and not await self._again(upload, put, *known):
                return False
            put = msgspec.structs.replace(put, replaces=True)
        if not self._duty.may_serve:
            raise NotServing("no longer the primary")
        upload.keep()
        start = self._clock()
        try:
            await self._propose(put, upload)
            self.on_commit(self._clock() - start)
        finally:
            if incoming.waits:  # its sender has gone, and its entry still needs it
                incoming.begin_finish().add_done_callback(lambda _: self._volumes.on_their_way.discard(incoming))
            else:
                self._volumes.on_their_way.discard(incoming)
        return True

    def _asks_early(self) -> bool:
        """The peer may be asked while this node's own disk still works: it keeps the object whatever happens here."""
        return self._core.live and self._core.peer in self._core.in_sync.required

    def _known(self, put: Put) -> tuple[Put, int] | None:
        """(record, seq) of an instance with this UID that is published or on its way."""
        pending = self._pendings.find(put.sop_instance)
        if pending is not None and isinstance(pending.entry.operation, Put):
            known, seq = pending.entry.operation, pending.entry.seq
        else:
            found = self._catalogue.instance(put.sop_instance)
            if found is None or is_of_file(found.seq):  # what lies in a file of the share may be gone any moment
                return None
            known, seq = found.put, found.seq
        return None if self._pendings.deletes(known, seq) else (known, seq)

    def _replaces(self, put: Put, known: Put) -> bool:
        """The newcomer takes the place of what is stored under its UID: other bytes, and the policy allows it."""
        if _same_bytes(put, known) or self._duplicates == "refuse":
            return False
        same_source = (put.calling_ae, put.study, put.series) == (known.calling_ae, known.study, known.series)
        return same_source or self._duplicates == "replace"

    async def _again(self, upload: Upload, put: Put, known: Put, seq: int) -> bool:
        """What is stored came again, or other bytes that mayn't take its place. Returns whether it must take the place
        of what is stored after all: no copy of that is good, and the two files differ before the data set."""
        if not _same_bytes(put, known):
            await upload.set_aside("SOP Instance UID is taken by other bytes", put.sop_instance)
            raise Conflict(put.sop_instance)
        pending = self._pendings.get(seq)
        if pending and pending.waiting:
            await asyncio.wait([pending.waiting])
            if self._core.commit < seq:
                raise NotServing("no longer the primary")
        if await self._copies.intact(seq, known.length) or await self._examine(seq):
            return False
        if put.offset != known.offset:
            return True  # another version has written what comes before the data set
        upload.keep_here()  # it came just in time: these bytes become this node's copy, and not the peer's
        if not await self._journal.move({seq: upload.incoming.location}):
            raise OSError(errno.EIO, "the disk failed at the last moment")
        return False

    async def _propose(self, put: Put, upload: Upload) -> None:
        pending, waiting = self._pend(put, upload.stream)
        incoming = upload.incoming
        if self._journal.append_inline(pending.entry, incoming, partial(setattr, pending, "location")):
            pass  # log and volume have it from here
        elif incoming.begin_finish().done():
            self._landed(pending, incoming)
        else:
            incoming.begin_finish().add_done_callback(lambda _: self._landed(pending, incoming))
        crash.point("primary.before_prepare")
        self._flush()
        await self._committed(waiting)
        crash.point("primary.before_answer")

    async def _committed(self, waiting: "asyncio.Future[None]") -> None:
        """Wait for a commit, within bounds. Whatever is raised, the outcome isn't known. Raises NotServing, NoRoom."""
        try:
            async with asyncio.timeout(COMMIT_S):
                await asyncio.shield(waiting)
        except TimeoutError:
            raise NoRoom("not committed in time; send it again") from None
        core = self._core
        if core.peer is not None and core.in_sync.alone and not self._duty.may_serve:
            # Nobody else has it, and by now another node may have taken over without it.
            raise NotServing("the lease ran out before it could be acknowledged")

    def _pend(self, operation: Operation, stream: int) -> "tuple[Pending, asyncio.Future[None]]":
        """Propose an entry. Its bytes are still to land, and the effects to be carried out."""
        seq = self._core.propose(self._clock())
        waiting: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        waiting.add_done_callback(seen)  # whoever waits may have given up before
        pending = Pending(Entry(self._core.epoch, seq, operation), None, stream, waiting)
        self._pendings.add(pending)
        return pending, waiting

    def _landed(self, pending: Pending, incoming: Incoming) -> None:
        """The bytes of a proposed entry are durable here, or will never be."""
        if self._pendings.get(pending.entry.seq) is not pending:
            return  # given up meanwhile; the sweep sets the bytes aside
        error = incoming.begin_finish().exception()
        if error is None and self._volumes.has_failed(incoming.volume.id):
            error = OSError(errno.EIO, "its disk failed just now")
        if isinstance(error, OSError | NoRoom):
            self._not_kept(pending.entry.seq, error)
        elif error:
            raise error
        else:
            pending.location = incoming.location
            self._journal.append(pending.entry, pending.location)


def _same_bytes(put: Put, known: Put) -> bool:
    return (known.digest, known.length - known.offset) == (put.digest, put.length - put.offset)
