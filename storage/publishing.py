"""Publication: objects move from the spool folders to their places in the readable trees.

Where an object will be is recorded before it is moved, so that a copy is always at one of the two places. All of this
is done in the journal's thread.
"""

from dataclasses import replace

import structlog

from storage.objects.view import Showing
from storage.objects.volumes import Volumes
from storage.state.catalogue import Batch, Catalogue
from storage.state.model import Delete, Entry, Location, Put
from storage.turns import Turns

log = structlog.get_logger()


class Publishing:
    def __init__(self, catalogue: Catalogue, volumes: Volumes, view: Showing, turns: Turns) -> None:
        self._catalogue, self._volumes, self._view, self._turns = catalogue, volumes, view, turns
        self._touched: dict[str, set[str]] = {}  # volume -> directories to be synced
        self._syncing: dict[str, set[str]] = {}  # those that a batch under way syncs

    def place_all(self, batch: Batch, applied: int) -> None:
        """Say where each object will be in the tree; `applied`: the last entry that was published before."""
        if not batch.applies and not batch.moved:
            return
        fresh: dict[str, str] = {}
        taken = self._catalogue.leaving_paths()
        deleted = False
        for number, (entry, location) in enumerate(batch.applies):
            deleted = deleted or isinstance(entry.operation, Delete)
            location = self._catalogue.location(entry.seq) or location  # it may have been made again elsewhere
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
            touched = volume.publish(location.spool, location.path)
        except (OSError, LookupError) as error:
            self._turns.check(turn, location.volume, error)
            log.error("publish.failed", spool=location.spool, error=type(error).__name__)
            return
        self._turns.check(turn)
        self._touched.setdefault(location.volume, set()).update(touched)
        try:
            self._view.show(folder, volume.path / "archive" / folder)
        except OSError as error:
            log.error("share.not_shown", error=error.strerror)

    # -- checkpoints -------------------------------------------------------------------------------------------

    def sync(self, turn: int) -> None:
        """All renames of applied entries were done before; after this recovery needn't look at them again. Raises
        LeftBehind."""
        touched, self._touched = self._touched, {}
        self._syncing = touched
        for volume_id, directories in touched.items():
            self._turns.at(turn, volume_id)
            try:
                self._volumes.get(volume_id).sync_directories(directories)
            except (OSError, LookupError) as error:
                self._turns.check(turn, volume_id, error)
                # A dead disk: its copies are noted as lost and made again; until then nothing on it is relied on.
                log.error("tree.not_synced", volume=volume_id, error=type(error).__name__)
                if isinstance(error, OSError):
                    self._volumes.failed(volume_id, error)

    def synced(self) -> None:
        """The checkpoint is committed."""
        self._syncing = {}

    def sync_again(self, batch: Batch) -> Batch:
        """A copy of a batch whose checkpoint was left: the next one has all that was to be synced for it."""
        meta = dict(batch.meta)
        if meta.pop("checkpoint", None) is not None:
            for volume_id, directories in self._syncing.items():
                self._touched.setdefault(volume_id, set()).update(directories)
        return replace(batch, appends=[], moved=dict(batch.moved), meta=meta)
