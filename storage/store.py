"""The store as the gateway may use it; nothing else of `storage` is for it but the records.

Writing: `begin` an object, feed it, `put` it. `put` returns when the object is durable on every in-sync node,
committed and visible; anything else is an exception. Reading: `settled()` and then the rows, while `may_read`.
"""

import asyncio
from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from pathlib import Path
from typing import Any, Protocol, TypeVar

from storage.engine import Engine
from storage.ingest import Conflict, NotServing
from storage.objects.file_copies import data_digests
from storage.objects.reading import Source, Unavailable
from storage.objects.upload import Upload
from storage.objects.volume import NoRoom
from storage.replication.peering import FetchFailed
from storage.state.file_images import Unlooked, is_of_file
from storage.state.indexes import Range
from storage.state.model import IndexFile, Instance, Put, Task, TaskDone
from storage.state.rows import Identity, SeriesRow, StudyRow, belongs, identity_of, same_patient
from storage.status import mode, node_status
from storage.upkeep.quarantine import DIVERGED, amend, kept, purge
from storage.workers import within

__all__ = [
    "Conflict",
    "Identity",
    "NoRoom",
    "NotServing",
    "Rows",
    "SeriesRow",
    "Source",
    "Store",
    "StudyRow",
    "Unavailable",
    "Unlooked",
    "Upload",
    "belongs",
    "identity_of",
    "same_patient",
]

T = TypeVar("T")


class Rows(Protocol):
    """What the catalogue knows. Every method blocks, some for as long as there are rows."""

    def instance(self, sop_instance: str) -> Instance | None: ...
    def is_deleted(self, sop_instance: str) -> bool:
        """It was deleted and not stored again since."""
        ...

    def patients(self) -> Iterator[tuple[str, list[str]]]:
        """(Patient ID, Study Instance UIDs in which it is named), whatever its issuer."""
        ...

    def studies(self, patient_id: str | None = None) -> Iterator[tuple[str, StudyRow]]:
        """(Study Instance UID, row) of all studies, or of one patient's."""
        ...

    def numbers(self, asked: Range) -> Iterator[bytes | None]:
        """Of studies that an index finds, see `state.indexes`; the same one more than once, perhaps. None now and
        then: a moment for others."""
        ...

    def with_part(self, part: bytes) -> Iterator[bytes | None]:
        """Numbers of studies with this somewhere in their folded texts. None now and then: a moment for others."""
        ...

    def modalities(self) -> list[str]:
        """Those that there are."""
        ...

    def numbered(self, numbers: Iterable[bytes]) -> list[tuple[str, StudyRow]]:
        """(Study Instance UID, row) of those of these that are there."""
        ...

    def study(self, uid: str) -> StudyRow | None: ...
    def studies_of_series(self, series: str) -> list[str]: ...
    def series_of(self, study: str) -> Iterator[tuple[str, SeriesRow]]:
        """(Series Instance UID, row) of a study."""
        ...

    def instances_of(self, study: str, series: str) -> Iterator[Instance]: ...
    def count_instances(self, study: str, series: str | None = None) -> int: ...
    def sop_classes(self, study: str) -> set[str]:
        """SOP Class UIDs of a study's instances."""
        ...

    def task_ids(self) -> list[str]:
        """Of those that were promised and aren't over."""
        ...

    def task_count(self) -> int: ...
    def task(self, task_id: str) -> Task | None: ...


class Store:
    """One node's store. Its methods are called on the event loop."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    # -- standing ----------------------------------------------------------------------------------------------

    @property
    def serving(self) -> bool:
        """This node is the primary, whether or not it may answer at this moment."""
        return self._engine.duty.serving

    @property
    def may_serve(self) -> bool:
        """This node is the primary and may answer now."""
        return self._engine.may_serve

    @property
    def may_read(self) -> bool:
        """Queries and retrieves may be answered here: as the primary, or as a standby that follows one."""
        return self._engine.may_read

    @property
    def follows(self) -> bool:
        """This node is a complete standby that hears its primary."""
        return self._engine.duty.follows

    @property
    def draining(self) -> bool:
        """A switchover is near: nothing new is to be taken."""
        return self._engine.told.drain

    @property
    def mode(self) -> str:
        """One word for the state of this node, as `tandem status` shows it."""
        return mode(self._engine)

    @property
    def lag(self) -> int:
        """Entries of the log that aren't visible to readers yet."""
        return self._engine.core.accepted - self._engine.journal.applied

    @property
    def waiting(self) -> int:
        """Jobs on disks for which no thread is free."""
        return self._engine.disk.waiting

    def status(self) -> dict[str, Any]:
        return node_status(self._engine)

    def serve(self, *, stepped_down: Callable[[], None], drain: Callable[[], None], busy: Callable[[], int]) -> None:
        """Who answers clients: called when another node has taken over, and when a switchover is near; `busy()` counts
        the requests that are under way."""
        self._engine.on_stepped_down, self._engine.on_drain = stepped_down, drain
        self._engine.duty.busy = busy

    def measure(self, *, commit: Callable[[float], object], sync: Callable[[float], object]) -> None:
        """Both are called with seconds: from the proposal of an entry until both nodes have it, on the event loop; for
        the sync of an object's file, in any thread."""
        self._engine.ingest.on_commit, self._engine.volumes.on_sync = commit, sync

    @property
    def uncommitted(self) -> int:
        """Entries of the log that not every node in sync has yet."""
        return self._engine.core.accepted - self._engine.core.commit

    def note_drained(self) -> None:
        """The last request that a switchover waits for has ended."""
        if not self._engine.duty.busy():
            self._engine.on_change()

    # -- writing -----------------------------------------------------------------------------------------------

    def begin(self, header: bytes) -> Upload:
        """Start an object. `header` is what precedes the data set. Raises NotServing or NoRoom."""
        return self._engine.begin(header)

    async def put(self, upload: Upload, make: Callable[[bytes, int], Put]) -> bool:
        """Commit a finished object. `make(digest, length)` gives its record.

        Returns True if it is stored now, False if the same object was there already. Raises Conflict, NotServing,
        NoRoom, or OSError when this node's disk failed."""
        return await self._engine.put(upload, make)

    async def commit(self, operation: Task | TaskDone) -> None:
        """Have both nodes note a task, or its end. Raises NotServing."""
        await self._engine.commit(operation)

    # -- reading -----------------------------------------------------------------------------------------------

    async def settled(self) -> None:
        """Wait until everything committed up to now is in the catalogue and the tree."""
        await self._engine.settled()

    @property
    def rows(self) -> Rows:
        return self._engine.catalogue

    async def open(self, instance: Instance, *, whole: bool = False) -> Source:
        """A copy that is checked as it is read, from this node or made again from the other one; `whole`: all of it is
        checked now. Raises Unavailable."""
        return await self._engine.reading.open(instance, whole=whole)

    def for_other_processes(self) -> tuple[str, int]:
        """(folder of the catalogue, for `storage.state.other_process`; its generation: with another one it is another
        catalogue). Raises NotServing while another one takes its place."""
        generation = self._engine.catalogue.generation
        if generation % 2:
            raise NotServing("the state of the other node is being taken")
        return str(self._engine.settings.storage.state / "catalogue"), generation

    @property
    def applied(self) -> int:
        """The number of the last entry of the log that is in the catalogue."""
        return self._engine.journal.applied

    async def state_room(self) -> tuple[int, int]:
        """(bytes that are free where catalogue and log are, how many of these are kept for what was taken). Raises
        OSError."""
        engine = self._engine
        looking = engine.disk.run(engine.free_state_bytes)
        return await within(looking, engine.settings.storage.hang_s), engine.state_reserve_bytes

    @property
    def usable_volumes(self) -> list[tuple[str, str]]:
        """(UUID, folder) of this node's volumes that are in service."""
        slots = self._engine.volumes.slots
        return [(slot.volume.id, str(slot.path)) for slot in slots if slot.usable and slot.volume]

    def forget_readers(self) -> None:
        """A process that read the catalogue may have been killed in the middle of it."""
        self._engine.catalogue.kv.forget_readers()

    async def beginning(self, seq: int, bytes_max: int) -> bytes | None:
        """The first bytes of this node's copy of an instance, file meta and all, unchecked; None if there is none now,
        or its disk doesn't answer."""
        engine = self._engine
        try:
            return await within(engine.disk.run(self._beginning, seq, bytes_max), engine.settings.storage.hang_s)
        except OSError:
            return None

    def _beginning(self, seq: int, bytes_max: int) -> bytes | None:
        found = self._engine.copies.find(seq)
        if found is None:
            return None
        volume, name, _ = found
        try:
            file = volume.open(name)
            try:
                return file.read(bytes_max)
            finally:
                file.close()
        except OSError:
            return None

    @property
    def unreadable(self) -> Set[int]:
        """Instances, by their numbers, of which neither node has a good copy now, as far as is known."""
        return self._engine.healing.unreadable

    def run(self, function: Callable[..., T], *args: Any) -> "asyncio.Future[T]":
        """Do something that blocks in a thread for disks."""
        return self._engine.disk.run(function, *args)

    async def proven(self, instances: Sequence[Instance]) -> set[str]:
        """The SOP Instance UIDs of those whose copies, on each node, were read now and are what was stored. A bad copy
        is made again meanwhile. What lies in a file of the share nobody can promise to keep."""
        engine = self._engine
        instances = [instance for instance in instances if not is_of_file(instance.seq)]
        seqs = tuple(instance.seq for instance in instances)
        if not seqs:
            return set()
        try:
            theirs = await engine.peering.listing(0, read=True, only=seqs) if engine.core.peer else None
        except FetchFailed:
            return set()
        rows = None if theirs is None else {row.seq: row for row in theirs}
        found: set[str] = set()
        for instance in instances:
            if not await engine.healing.examine(instance.seq):
                continue
            row = rows.get(instance.seq) if rows is not None else None
            if rows is None or (row is not None and row.copy == "good" and row.digest == instance.put.digest):
                found.add(instance.put.sop_instance)
            else:
                engine.peering.suspect(instance.seq)
        return found

    # -- what lies in the share's files ------------------------------------------------------------------------

    async def unlooked(self, limit: int, after: int = 0) -> list[Unlooked]:
        """Files of the share that were written and closed, and of which nobody has said yet what they are; of the inode
        numbers behind one."""
        return await self.run(self._engine.file_copies.unlooked, limit, after)

    async def shared_folders(self, paths: Iterable[str]) -> dict[str, int]:
        """The inode numbers of those of these folders of the share that are there."""
        return await self.run(self._engine.file_copies.folders, paths)

    async def shared_file(self, number: int) -> Path | None:
        """Where this node's copy of a file of the share lies, None if it holds none now."""
        found = await self.run(self._engine.file_copies.find, number)
        return found[0].path / found[1] if found else None

    def is_archived(self, sop_instance: str) -> bool:
        """The archive has it, and not only a file of the share."""
        row = self._engine.catalogue.instance(sop_instance)
        return row is not None and not is_of_file(row.seq)

    async def digests(self, path: Path, start: int, feed: Callable[[bytes], None]) -> tuple[bytes, bytes, int]:
        """(digest, digests of its blocks, length of the file) of the data set that begins at byte `start` of a file.
        `feed` is given all of it, in a thread. Raises OSError."""
        return await self.run(data_digests, path, start, feed)

    async def index_file(self, file: Unlooked, put: Put | None) -> None:
        """Say what a file is: an instance, or none. It counts if the file is still as it was. Raises NotServing."""
        await self._engine.ingest.index_file(IndexFile(file.number, file.since, put))

    # -- what diverged -----------------------------------------------------------------------------------------

    async def diverged(self) -> list[dict[str, Any]]:
        """Quarantined objects that this node had prepared and the pair never committed."""
        rows = await self.run(kept, self._engine.volumes)
        return [row for row in rows if row["reason"] == DIVERGED]

    async def amend(self, one: dict[str, Any], **more: str) -> None:
        """Add to the note of a quarantined object."""
        await self.run(lambda: amend(one, **more))

    async def purge(self, one: dict[str, Any]) -> None:
        """Delete a quarantined object for good."""
        await self.run(purge, one)
