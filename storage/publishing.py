"""Publication: objects move from the spool folders to their places in the readable trees.

Where an object will be is recorded before it is moved, so that a copy is always at one of the two places. All of this
is done in the journal's thread.
"""

from collections.abc import Callable
from operator import methodcaller
from typing import Any

import structlog

from storage.objects.describing import describe
from storage.objects.view import Showing
from storage.objects.volume import Volume
from storage.objects.volumes import Volumes
from storage.state.catalogue import Batch, Catalogue
from storage.state.description import deletion_line
from storage.state.model import Delete, Entry, Location, Put
from storage.turns import Turns

log = structlog.get_logger()


class Publishing:
    def __init__(self, catalogue: Catalogue, volumes: Volumes, view: Showing, turns: Turns) -> None:
        self._catalogue, self._volumes, self._view, self._turns = catalogue, volumes, view, turns

    def place_all(self, batch: Batch, applied: int) -> None:
        """Say where each object will be in the tree; `applied`: the last entry that was published before."""
        if not batch.applies and not batch.moved:
            return
        fresh: dict[str, str] = {}
        taken = self._catalogue.leaving_paths()
        deleted, landed = False, {entry.seq: location for entry, location in batch.appends}
        for number, (entry, location) in enumerate(batch.applies):
            deleted = deleted or isinstance(entry.operation, Delete)
            # It may have been made again elsewhere since it was accepted, or have been landed just now.
            location = landed.get(entry.seq) or self._catalogue.location(entry.seq) or location
            batch.applies[number] = (entry, self._place(entry, location, fresh, taken, own_name=deleted))
        for seq, location in batch.moved.items():
            if seq <= max(applied, batch.applied):  # later ones may have been cut off meanwhile
                entry = self._catalogue.entry(seq)
                batch.moved[seq] = self._place(entry, location, fresh, taken) or location

    def _place(
        self,
        entry: Entry,
        location: Location | None,
        fresh: dict[str, str],
        taken: set[tuple[str, str]],
        *,
        own_name: bool = False,
    ) -> Location | None:
        if location is None or not isinstance(entry.operation, Put):
            return None
        if location.path:
            return location  # adopted where it lies
        path = self._catalogue.path_of(entry, fresh, own_name=own_name)
        if (location.volume, path) in taken:
            path = self._catalogue.path_of(entry, fresh, own_name=True)
        return Location(location.volume, location.spool, path)

    def describe(self, entry: Entry, location: Location, lineage: str, turn: int, *, sync: bool = False) -> bool:
        """Have the file of an entry say what it is. Returns whether it does. Raises LeftBehind."""

        def fill_in(volume: Volume) -> bool:
            name = volume.locate(location)
            return name is None or describe(volume, name, entry, lineage, sync=sync)

        return self._on(location.volume, turn, fill_in)

    def note_deletions(self, batch: Batch, lineage: str, turn: int) -> None:
        """On every volume: whatever is left of a node can tell of them. Raises LeftBehind."""
        lines = [deletion_line(entry, lineage) for entry, _ in batch.applies if isinstance(entry.operation, Delete)]
        for volume in list(self._volumes) if lines and lineage else ():
            self._on(volume.id, turn, methodcaller("note_deletions", lines))

    def _on(self, volume_id: str, turn: int, work: Callable[[Volume], Any]) -> bool:
        """False if that says so, or fails. Raises LeftBehind."""
        self._turns.at(turn, volume_id)
        try:
            done = work(self._volumes.get(volume_id)) is not False
        except (OSError, LookupError) as error:
            self._turns.check(turn, volume_id, error)
            log.error("volume.not_noted", volume=volume_id, error=type(error).__name__)
            if isinstance(error, OSError) and not isinstance(error, FileNotFoundError):
                self._volumes.failed(volume_id, error)
            return False
        self._turns.check(turn)
        return done

    def publish_all(self, batch: Batch, turn: int) -> None:
        """Move what was recorded. Raises LeftBehind."""
        for entry, location in batch.applies:
            if location and isinstance(entry.operation, Put):
                self.publish(location, turn)
        for location in batch.moved.values():
            if location.path:
                self.publish(location, turn)

    def publish(self, location: Location, turn: int) -> None:
        """Move one copy; what can't be moved now is found by the sweep. Raises LeftBehind."""
        folder = "/".join(location.path.split("/")[:2])
        self._turns.at(turn, location.volume)
        try:
            volume = self._volumes.get(location.volume)
            volume.publish(location.spool, location.path)
        except (OSError, LookupError) as error:
            self._turns.check(turn, location.volume, error)
            log.error("publish.failed", spool=location.spool, error=type(error).__name__)
            return
        self._turns.check(turn)
        try:
            self._view.show(folder, volume.path / "archive" / folder)
        except OSError as error:
            log.error("share.not_shown", error=error.strerror)
