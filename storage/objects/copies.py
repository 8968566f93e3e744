"""This node's copy of each entry: where it is, whether it is all there, and reading it."""

from collections.abc import Callable
from typing import Final

import msgspec

from storage.objects.blob_store import holds
from storage.objects.volume import Volume, set_aside
from storage.objects.volumes import Volumes
from storage.replication.pending import Pendings
from storage.state.catalogue import Catalogue, same_copy
from storage.state.file_images import is_of_file
from storage.state.model import Entry, Location, Put, Void
from storage.workers import Threads

LISTING_ENTRIES: Final = 200
LOOKS: Final = 3


class Row(msgspec.Struct, frozen=True, array_like=True):
    """One entry of a node's log. `copy`: "good", "there" (not read), "bad", "missing", "" for none."""

    seq: int
    epoch: int
    kind: str  # "put", "delete", "void", "task", "taskdone"
    sop_instance: str
    digest: bytes
    copy: str


class Copies:
    def __init__(
        self,
        catalogue: Catalogue,
        volumes: Volumes,
        workers: Threads,
        pendings: Pendings,
        awaited: Callable[[Entry], bool],
        of_file: Callable[[int], tuple[Volume, str, Put] | None] = lambda seq: None,
    ) -> None:
        """`awaited(entry)`: it isn't committed, and a sender may still hear of Success once it is. `of_file(seq)`: what
        `find` says of an instance that lies in a file of the share."""
        self._catalogue, self._volumes, self._workers, self._pendings = catalogue, volumes, workers, pendings
        self._awaited, self._of_file = awaited, of_file

    def entry(self, seq: int) -> Entry | None:
        """The entry with this number, logged or on its way."""
        pending = self._pendings.get(seq)
        if pending is not None:
            return pending.entry
        found = self._catalogue.entries(seq, 1)
        return found[0] if found and found[0].seq == seq else None

    def length(self, seq: int) -> int:
        """Of the file that an entry brings, in bytes; 0 for none."""
        entry = self.entry(seq)
        return entry.operation.length if entry and isinstance(entry.operation, Put) else 0

    def location(self, seq: int) -> Location | None:
        pending = self._pendings.get(seq)
        return self._catalogue.location(seq) or (pending.location if pending else None)

    def find(self, seq: int) -> tuple[Volume, str, Put] | None:
        """(volume, file, record) of this node's copy, None if there is none now. Blocks."""
        if is_of_file(seq):
            return self._of_file(seq)
        entry, location = self.entry(seq), self.location(seq)
        if entry is None or location is None or not isinstance(entry.operation, Put):
            return None
        try:
            volume = self._volumes.get(location.volume)
            name = volume.locate(location) or volume.locate(self._catalogue.location(seq) or location)
        except (OSError, LookupError):
            return None
        return (volume, name, entry.operation) if name else None

    def lacks(self, seq: int) -> bool:
        """There is no copy here and won't be one soon: it is lost, or no longer wanted since something later deleted or
        replaced it. An entry just proposed isn't lacking, its bytes may land in a moment. Blocks."""
        entry = self.entry(seq)
        if entry is None:
            return False
        return isinstance(entry.operation, Void) or (not self._awaited(entry) and self._catalogue.is_missing(seq))

    def good(self, seq: int) -> bool | None:
        """The copy's bytes are those of the record; None if there is no copy. Blocks. Raises OSError."""
        for _ in range(LOOKS):
            found = self.find(seq)
            if found is None:
                return None
            volume, name, put = found
            try:
                return holds(volume, name, put)
            except FileNotFoundError:
                continue  # moved between the look and the opening, into the tree perhaps
        return None

    def set_aside(self, seq: int, location: Location, reason: str) -> None:
        """Move a bad copy to quarantine, durably, if it is still the one at `location`. Blocks. Raises OSError."""
        found, now = self.find(seq), self.location(seq)
        if found and now and same_copy(now, location):
            volume, name, put = found
            set_aside(volume, name, reason, {"sop_instance": put.sop_instance})

    def listing(self, start: int, read: bool, only: tuple[int, ...] = ()) -> list[Row]:
        """Entries from seq `start` on, or `only` some, each with the state of its copy. Blocks."""
        if only:
            return [self._row(entry, read) for seq in only if (entry := self.entry(seq))]
        return [self._row(entry, read) for entry in self._catalogue.entries(start, LISTING_ENTRIES)]

    def _row(self, entry: Entry, read: bool) -> Row:
        put = entry.operation
        if not isinstance(put, Put):
            return Row(entry.seq, entry.epoch, type(put).__name__.lower(), "", b"", "")
        try:
            if read:
                copy = {True: "good", False: "bad", None: "missing"}[self.good(entry.seq)]
            else:
                copy = "there" if self.find(entry.seq) else "missing"
        except OSError:
            copy = "missing"
        return Row(entry.seq, entry.epoch, "put", put.sop_instance, put.digest, copy)

    async def intact(self, seq: int, length: int) -> bool:
        """A copy is there in full length. Saying Success on a mere record would be a lie."""

        def look() -> bool:
            found = self.find(seq)
            try:
                return found is not None and found[0].size(found[1]) == length
            except OSError:
                return False

        return await self._workers.run(look)
