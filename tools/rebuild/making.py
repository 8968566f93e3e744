"""`tandem rebuild-index`: a node's catalogue made anew from its own files, or from the other node.

From files: every file of the readable trees, what is complete in the spool folders (acknowledged and not yet
published), and what only the log has. What a file should be says the old catalogue, where it can still be read, or else
the file itself; one that is something else now isn't taken for the truth: its entry stays, and its copy is missing,
unless the log has it. What the old catalogue, or a volume's list of deletions, knows to be deleted, or on its way out,
stays so. The log that is made is a new one and never joins another.

The new catalogue is made beside the old one and takes its place when it is complete: whatever ends the tool before
leaves the old one where it was.
"""

import contextlib
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Final

import click

from conf.settings import Settings
from storage.environment import NEW_FOLDER
from storage.files.local import has_files
from storage.log.folder import LocalFolder, LogDamaged
from storage.log.salvage import Salvaged, set_aside_before
from storage.objects.blob_store import holds
from storage.objects.describing import description_of
from storage.objects.local_files import exchange, fsync_directory
from storage.objects.local_volume import LocalVolume, read_marker
from storage.objects.volume import FOLDERS, Volume, VolumeOffline
from storage.state.catalogue import MADE_BY, Batch, Catalogue
from storage.state.description import Deletion, Description, deletions_of, names
from storage.state.file_model import Change
from storage.state.kv import Transaction
from storage.state.logged import logged
from storage.state.model import Delete, Entry, Files, Instance, Location, Put, Tombstone, encode
from tools.cli.options import give_to_gateway
from tools.rebuild.files import Found, chunks, files, read_chunk
from tools.rebuild.old import Old
from tools.rebuild.share import take_names

BATCH_CHUNKS: Final = 16
COPIED: Final = ("tombstone", "task")  # tables of the old catalogue that go over as they are
UNFINISHED: Final = "unfinished"  # a file that is there while a catalogue is being made


@dataclass
class Rebuilt:
    """`unreadable`: files that aren't complete DICOM objects of ours; they stay where they are. `damaged`: those whose
    bytes aren't what was stored; `deleted`: those that the old catalogue, or a volume, knows to be deleted."""

    instances: int = 0
    unreadable: list[str] = field(default_factory=list)
    damaged: int = 0
    deleted: int = 0
    seconds: float = 0.0
    old_catalogue: bool = False  # it could be asked
    names: int = 0  # of the share's files
    names_lost: bool = False  # there were some, and they can't be read


def catalogue_path(settings: Settings) -> Path:
    return settings.storage.state / "catalogue"


def set_aside(settings: Settings) -> Path | None:
    """Move the catalogue out of the way, so that the node begins anew; returns where it is now. What only the log has
    goes to a spool folder, and from there to quarantine, unless the other node has it too. Raises OSError."""
    path = catalogue_path(settings)
    _clear(path.with_name(NEW_FOLDER))
    if not path.exists():
        return None
    _save_logged(settings)
    aside = _aside(path)
    path.rename(aside)
    fsync_directory(path.parent)
    return aside


def _save_logged(settings: Settings) -> None:
    """As far as log and disks allow: what stays in the log is set aside with it."""
    folder, old = settings.storage.log_folder, Old(catalogue_path(settings))
    volumes = []
    for path in _volume_folders(settings, old):
        with contextlib.suppress(VolumeOffline, OSError):
            volumes.append(LocalVolume(path))
    try:
        if volumes and folder.exists():
            kept = Salvaged(LocalFolder(folder))
            for found in (logged(record) for record in kept.records() if record.seq > old.checkpoint):
                if found.data is not None and isinstance(put := found.entry.operation, Put):
                    location = written(volumes, put.digest, found.data)
                    volume = next(one for one in volumes if one.id == location.volume)
                    give_to_gateway(settings, volume.path / "spool" / location.spool)
            kept.close()
    except (OSError, LogDamaged) as error:
        click.echo(f"not all that only the log has was taken from it, it stays there: {error}", err=True)
    finally:
        for volume in volumes:
            volume.close()
        old.close()


def _aside(path: Path) -> Path:
    return path.with_name(f"catalogue.before-{time.strftime('%Y%m%dT%H%M%S')}-{os.urandom(2).hex()}")


def _volume_folders(settings: Settings, old: Old) -> list[Path]:
    """Those of the settings and those added while the gateway ran."""
    return list(dict.fromkeys((*settings.storage.volumes, *old.volume_paths())))


def open_volumes(settings: Settings) -> list[LocalVolume]:
    """Those of the settings and those added while the gateway ran, for this process alone. Raises VolumeOffline if one
    isn't there: its objects would be missing in the index; InUse while a gateway has it."""
    old = Old(catalogue_path(settings))
    try:
        folders = _volume_folders(settings, old)
    finally:
        old.close()
    for folder in folders:
        read_marker(folder)
    return [LocalVolume(folder) for folder in folders]


class Rebuilding:
    """Writes the new log and catalogue, entry by entry."""

    def __init__(self, catalogue: Catalogue, volumes: list[LocalVolume], old: Old) -> None:
        self._catalogue, self._old = catalogue, old
        self._volumes: dict[str, Volume] = {volume.id: volume for volume in volumes}
        self._leaving = old.leaving()
        self._deletions: dict[str, list[Deletion]] = {}  # by study
        for one in deletions_of(line for volume in volumes for line in volume.deletions()):
            self._deletions.setdefault(one.study, []).append(one)
        self._gone: dict[str, Tombstone] = {}
        self._changes: list[Change] = []  # of the share's names, after those that the old catalogue has
        self._seq = 0
        self.spooled: list[Location] = []  # to be moved into the tree
        self._aimed: set[tuple[str, str]] = set()  # volume, path: where these go
        self.result = Rebuilt(old_catalogue=old.known)

    def take(self, found: list[Found]) -> None:
        """One batch."""
        rows: list[tuple[Entry, Location | None]] = []
        there: set[str] = set()
        for one in found:
            uid = one.put.sop_instance if one.put else ""
            if uid and uid in there:  # what came before of it must be in the catalogue
                self._write(rows)
                rows, there = [], set()
            self._take(one, rows)
            there.add(uid)
        self._write(rows)

    def _write(self, rows: list[tuple[Entry, Location | None]]) -> None:
        if rows:
            self._catalogue.write(Batch(appends=rows, applies=rows))

    def _take(self, one: Found, rows: list[tuple[Entry, Location | None]]) -> None:
        put, location = one.put, one.location
        name = location.path or f"spool/{location.spool}"
        if put is None:
            self.result.unreadable.append(name)
            return
        is_leaving = (location.volume, location.path or location.spool) in self._leaving
        known = self._old.put(put.sop_instance)
        gone = self._deletion_of(put, one.said) if known is None else None
        if is_leaving or gone or self._old.is_deleted(put.sop_instance):
            self.result.deleted += 1  # the next scrub moves the file to quarantine
            if gone:
                self._gone[put.sop_instance] = Tombstone(0, gone.reason, gone.at)
            return
        before = self._catalogue.instance(put.sop_instance)
        digest = known.digest if known and known.length == put.length else one.digest
        copy: Location | None = location
        if digest and digest != put.digest:
            if known is not None and before is None and known.digest == digest:
                put, copy = known, None  # rot: the entry stays, its copy is missing
            self.result.damaged += 1
            if copy is not None:
                return
        elif before is not None and not self._is_newer(put, one.said, before):
            return
        self._seq += 1
        if copy is not None and location.spool:
            copy = self._to_be_moved(location, Entry(1, self._seq, put))
        elif copy is not None:
            copy = Location(location.volume, f"rebuilt-{self._seq}", location.path)
        rows.append((Entry(1, self._seq, put), copy))

    def _to_be_moved(self, location: Location, entry: Entry) -> Location:
        """Into the tree, once the catalogue is in its place."""
        copy = Location(location.volume, location.spool, self._path_of(entry, location.volume))
        self.spooled.append(copy)
        self._aimed.add((copy.volume, copy.path))
        return copy

    def take_logged(self, kept: Salvaged, give: Callable[[Path], None]) -> None:
        """Bytes that only the log has: they were acknowledged, and never on a disk for certain. `give(file)` is called
        for each that is made of them. Raises OSError, LogDamaged."""
        newest: dict[str, tuple[int, Put]] = {}
        for record in kept.records():
            match logged(record).entry.operation:
                case Put() as put:
                    newest[put.sop_instance] = record.seq, put
                case Delete() as gone:
                    newest = {uid: found for uid, found in newest.items() if not names(gone, found[1])}
                case Files(change) if kept.lineage == self._old.log and record.seq > self._old.applied:
                    self._changes.append(change)
        own = not self._old.known or kept.lineage == self._old.log
        for seq, put in sorted(newest.values(), key=lambda found: found[0]):
            newer = own and seq > self._old.applied
            if not self._is_wanted(put, newer=newer):
                continue
            found = logged(kept.read(seq))
            if found.data is not None:
                location = written(self._volumes.values(), put.digest, found.data)
                give(self._volumes[location.volume].path / "spool" / location.spool)
                self._add(put, location)
            elif newer and found.location is not None and self._lies_at(found.location, put):
                self._add(put, found.location)

    def _lies_at(self, location: Location, put: Put) -> bool:
        """A file that was never published, and that the old catalogue knows nothing of."""
        volume = self._volumes.get(location.volume)
        try:
            return volume is not None and holds(volume, f"spool/{location.spool}", put)
        except OSError:
            return False

    def _add(self, put: Put, location: Location) -> None:
        """As an entry, or as the copy of one that has none."""
        there = self._catalogue.instance(put.sop_instance)
        if there is not None and there.put.digest == put.digest:
            copy = self._to_be_moved(location, Entry(1, there.seq, there.put))
            self._catalogue.write(Batch(moved={there.seq: copy}))
            return
        self._seq += 1
        entry = Entry(1, self._seq, put)
        self._write([(entry, self._to_be_moved(location, entry))])

    def _is_wanted(self, put: Put, *, newer: bool) -> bool:
        """`newer` than all that the old catalogue shows."""
        there = self._catalogue.instance(put.sop_instance)
        if there is not None and there.put.digest == put.digest:
            return self._catalogue.is_missing(there.seq)
        if newer:
            return True
        known = self._old.put(put.sop_instance)
        return not self._old.is_deleted(put.sop_instance) and (known is None or known.digest == put.digest)

    def _path_of(self, entry: Entry, volume_id: str) -> str:
        """Where it belongs in the tree; under a name of its own if something lies there that was told of before."""
        path = self._catalogue.path_of(entry, {})
        there = self._volumes[volume_id].locate(Location(volume_id, "", path)) is not None
        taken = there or (volume_id, path) in self._aimed
        return self._catalogue.path_of(entry, {}, own_name=True) if taken else path

    def _deletion_of(self, put: Put, said: Description | None) -> Deletion | None:
        """What the volumes know of its deletion."""
        return next((one for one in self._deletions.get(put.study, ()) if one.takes(put, said)), None)

    def _is_newer(self, put: Put, said: Description | None, before: Instance) -> bool:
        """Two files of one instance: which is the later version, as the old catalogue or they themselves say."""
        known = self._old.put(put.sop_instance)
        if known is not None:
            return known.digest == put.digest and before.put.digest != put.digest
        other = self._said_of(before.seq)
        if said and other and said.lineage == other.lineage:
            return said.seq > other.seq
        return put.replaces and (put.received > before.put.received or not before.put.replaces)

    def _said_of(self, seq: int) -> Description | None:
        location = self._catalogue.location(seq)
        volume = self._volumes.get(location.volume) if location else None
        if location is None or volume is None:
            return None
        with contextlib.suppress(OSError):
            name = volume.locate(location)
            return description_of(volume, name) if name else None
        return None

    def _is_there(self, table: str, key: bytes) -> bool:
        """It was stored again after it was deleted, and only the log had it."""
        return table == "tombstone" and self._catalogue.instance(key.decode()) is not None

    def finish(self, lineage: str, taken: str) -> Rebuilt:
        """What the old catalogue knows besides, and the facts of the new log; `taken`: the log that need not be kept
        any more."""
        for table in COPIED:
            rows = [(key, value) for key, value in self._old.rows(table) if not self._is_there(table, key)]
            self._catalogue.kv.update(partial(_put_all, table=table, rows=rows))
        gone = [(uid.encode(), encode(one)) for uid, one in self._gone.items()]
        gone = [row for row in gone if not self._is_there("tombstone", row[0])]
        self._catalogue.kv.update(partial(_put_all, table="tombstone", rows=gone))
        self._catalogue.write(
            Batch(
                meta={
                    "promised": 1,
                    "volumes": sorted(self._volumes),
                    "volume_paths": [str(path) for path in self._old.volume_paths()],
                    "checkpoint": self._seq,
                    "lineage": lineage,
                    "log_taken": taken,
                    **MADE_BY,
                    "undescribed": True,  # files don't say which entries of this log they are
                }
            )
        )
        self.result.instances = self._catalogue.counts()["instances"]
        found = take_names(self._catalogue, self._old, self._changes)
        self.result.names = found or 0
        lie_here = any(has_files(volume.path) for volume in self._volumes.values())
        self.result.names_lost = found is None or (not found and lie_here)
        return self.result


def written(volumes: Iterable[Volume], digest: bytes, data: bytes) -> Location:
    """Bytes of the log, durable in the spool folder of the volume with the most room. Raises OSError."""
    volume = max(volumes, key=lambda one: one.free_bytes())
    spooled = volume.create()
    spooled.write([data])
    spooled.finish(digest)
    volume.sync_spool()
    return Location(volume.id, spooled.name, "")


def _put_all(txn: Transaction, table: str, rows: list[tuple[bytes, bytes]]) -> None:
    for key, value in rows:
        txn.put(table, key, value)


def from_files(
    settings: Settings,
    volumes: list[LocalVolume],
    progress: Callable[[int], None],
    jobs: int = 2,
) -> tuple[Rebuilt, Path | None]:
    """Read every file, write a new log and catalogue and put it in the place of the old one; returns also where that is
    now. The gateway must not run. Whatever is raised, the old one is where it was; for files: OSError,
    CatalogueDamaged, BrokenProcessPool."""
    start = time.monotonic()
    made = catalogue_path(settings).with_name(NEW_FOLDER)
    _clear(made)
    old = Old(catalogue_path(settings))
    try:
        result, spooled = _make(settings, made, volumes, old, progress, jobs)
        folders = (volume.path / name for volume in volumes for name in FOLDERS)
        give_to_gateway(settings, made, *made.iterdir(), *folders)
        (made / UNFINISHED).unlink()
        fsync_directory(made)
    except BaseException:
        shutil.rmtree(made, ignore_errors=True)
        raise
    finally:
        old.close()
    aside = _put_in_place(made, catalogue_path(settings))
    _publish(settings, volumes, spooled)
    result.seconds = time.monotonic() - start
    return result, aside


def _clear(made: Path) -> None:
    """What an earlier run left: an unfinished one goes; a catalogue that was on its way in or out is kept aside."""
    if (made / UNFINISHED).exists():
        shutil.rmtree(made)
    elif made.exists():
        made.rename(_aside(made))


def _make(
    settings: Settings, made: Path, volumes: list[LocalVolume], old: Old, progress: Callable[[int], None], jobs: int
) -> tuple[Rebuilt, list[Location]]:
    """The new catalogue, in a folder of its own, and what is still to be moved out of the spool folders."""
    made.mkdir(parents=True)
    (made / UNFINISHED).touch()
    catalogue = Catalogue.open(made, settings.storage.map_size_bytes)
    try:
        work = Rebuilding(catalogue, volumes, old)
        with ProcessPoolExecutor(jobs) as pool:
            todo = chunks(files(volumes))
            while batch := list(islice(todo, BATCH_CHUNKS)):
                work.take([one for chunk in pool.map(read_chunk, batch) for one in chunk])
                progress(sum(len(chunk) for chunk in batch))
        taken = _take_logs(settings, work)
        for volume in volumes:
            _sync(volume)
        return work.finish(str(uuid.uuid4()), taken), work.spooled
    finally:
        catalogue.close()


def _take_logs(settings: Settings, work: Rebuilding) -> str:
    """From those that were set aside, and the log; returns which this is, "" for a damaged one. Raises OSError,
    LogDamaged."""
    path = settings.storage.log_folder
    if not path.exists():
        return ""
    folder = LocalFolder(path)
    lineage = ""
    for prefix in (*set_aside_before(folder), ""):
        kept = Salvaged(folder, prefix)
        try:
            work.take_logged(kept, partial(give_to_gateway, settings))
            lineage = kept.lineage if kept.is_whole else ""
        finally:
            kept.close()
    folder.close()
    give_to_gateway(settings, path, *path.iterdir())
    return lineage


def _put_in_place(made: Path, path: Path) -> Path | None:
    """In one step, so that there is a complete catalogue in its place at any time; returns where the old one is."""
    aside = None
    if path.exists():
        aside = _aside(path)
        exchange(made, path)
        fsync_directory(path.parent)
        made.rename(aside)
    else:
        made.rename(path)
    fsync_directory(path.parent)
    return aside


def _publish(settings: Settings, volumes: list[LocalVolume], spooled: list[Location]) -> None:
    """Move what the spool folders held to where the new catalogue says that it is. What can't be moved now, the gateway
    moves later."""
    by_id = {volume.id: volume for volume in volumes}
    for location in spooled:
        volume = by_id[location.volume]
        with contextlib.suppress(OSError):
            touched = volume.publish(location.spool, location.path)
            folders = [parent for parent in Path(location.path).parents if parent.name]
            give_to_gateway(settings, *(volume.path / "archive" / folder for folder in folders))
            volume.sync_directories(touched)


def _sync(volume: LocalVolume) -> None:
    """All names of a volume, before the new log says that nothing of it need be looked at again. Raises OSError."""
    fsync_directory(volume.path)
    volume.sync_spool()
    for folder, _, _ in os.walk(volume.path / "archive"):
        volume.sync_directories([os.path.relpath(folder, volume.path)])
