"""`tandem rebuild-index`: a node's catalogue made anew from its own files, or from the other node.

From files: every file of the readable trees, and what is complete in the spool folders (acknowledged and not yet
published). What a file should be says the old catalogue, where it can still be read, or else the file's own attribute;
one that is something else now isn't taken for the truth: its entry stays, and its copy is missing. What the old
catalogue knows to be deleted, or on its way out, stays so. The log that is made is a new one and never joins another.

The new catalogue is made beside the old one and takes its place when it is complete: whatever ends the tool before
leaves the old one where it was.
"""

import contextlib
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Final

import lmdb
import msgspec
import xxhash
from pydicom.filereader import read_file_meta_info

from conf.settings import Settings
from gateway.dicom.identify import Identifier, identify
from storage.environment import NEW_FOLDER
from storage.objects.volume import (
    DIGEST_ATTRIBUTE,
    FOLDERS,
    LocalVolume,
    Volume,
    exchange,
    fsync_directory,
    read_marker,
)
from storage.state.catalogue import TABLES, Batch, Catalogue
from storage.state.formats import FORMAT
from storage.state.kv import Transaction
from storage.state.model import Entry, Location, Put, decode_instance, decode_leaving
from tools.cli.options import give_to_gateway

CHUNK_FILES: Final = 64
BATCH_CHUNKS: Final = 16
META_AT: Final = 132
READ_BYTES: Final = 1 << 20
OLD_MAP_BYTES: Final = 1 << 40
COPIED: Final = ("tombstone", "task")  # tables of the old catalogue that go over as they are
UNFINISHED: Final = "unfinished"  # a file that is there while a catalogue is being made


@dataclass
class Rebuilt:
    """`unreadable`: files that aren't complete DICOM objects of ours; they stay where they are. `damaged`: those whose
    bytes aren't what was stored; `deleted`: those that the old catalogue knows to be deleted."""

    instances: int = 0
    unreadable: list[str] = field(default_factory=list)
    damaged: int = 0
    deleted: int = 0
    seconds: float = 0.0
    old_catalogue: bool = False  # it could be asked


@dataclass(frozen=True)
class Found:
    """One file: where it lies, and what it is. `put` is None for one that isn't ours."""

    location: Location
    put: Put | None
    attribute: bytes  # digest that the file itself says it had, b"" if it doesn't


class Old:
    """The catalogue that is replaced, as far as it can be read."""

    def __init__(self, path: Path | None) -> None:
        self._env: lmdb.Environment | None = None
        if path is not None and (path / "data.mdb").exists():
            with contextlib.suppress(lmdb.Error, OSError):
                self._env = lmdb.open(
                    str(path), map_size=OLD_MAP_BYTES, max_dbs=len(TABLES), readonly=True, lock=False, create=False
                )

    @property
    def known(self) -> bool:
        return self._env is not None

    def _get(self, table: str, key: bytes) -> bytes | None:
        if self._env is None:
            return None
        try:
            database = self._env.open_db(table.encode(), create=False)
            with self._env.begin(database) as txn:
                value: bytes | None = txn.get(key)
            return value
        except lmdb.Error:
            return None

    def put(self, sop_instance: str) -> Put | None:
        """The record of an instance."""
        raw = self._get("instance", sop_instance.encode())
        with contextlib.suppress(Exception):  # whatever a damaged row leads to: then it isn't known
            return decode_instance(raw).put if raw is not None else None
        return None

    def is_deleted(self, sop_instance: str) -> bool:
        return self._get("tombstone", sop_instance.encode()) is not None

    def volume_paths(self) -> list[Path]:
        """Folders of the volumes that were added while the gateway ran."""
        raw = self._get("meta", b"volume_paths")
        with contextlib.suppress(msgspec.MsgspecError, TypeError):
            return [Path(path) for path in msgspec.msgpack.decode(raw)] if raw is not None else []
        return []

    def rows(self, table: str) -> Iterator[tuple[bytes, bytes]]:
        """As many as can be read."""
        if self._env is None:
            return
        try:
            database = self._env.open_db(table.encode(), create=False)
            with self._env.begin(database) as txn, txn.cursor() as cursor:
                yield from cursor
        except lmdb.Error:
            return

    def leaving(self) -> set[tuple[str, str]]:
        """(volume, file) of what is on its way out."""
        found = set()
        for _, value in self.rows("leaving"):
            with contextlib.suppress(Exception):
                location = decode_leaving(value).location
                found |= {(location.volume, location.spool), (location.volume, location.path)}
        return found

    def close(self) -> None:
        if self._env is not None:
            self._env.close()


def catalogue_path(settings: Settings) -> Path:
    return settings.storage.state / "catalogue"


def set_aside(settings: Settings) -> Path | None:
    """Move the catalogue out of the way, so that the node begins anew; returns where it is now. Raises OSError."""
    path = catalogue_path(settings)
    _clear(path.with_name(NEW_FOLDER))
    if not path.exists():
        return None
    aside = _aside(path)
    path.rename(aside)
    fsync_directory(path.parent)
    return aside


def _aside(path: Path) -> Path:
    return path.with_name(f"catalogue.before-{time.strftime('%Y%m%dT%H%M%S')}-{os.urandom(2).hex()}")


def open_volumes(settings: Settings) -> list[LocalVolume]:
    """Those of the settings and those added while the gateway ran, for this process alone. Raises VolumeOffline if one
    isn't there: its objects would be missing in the index; InUse while a gateway has it."""
    old = Old(catalogue_path(settings))
    try:
        folders = list(dict.fromkeys((*settings.storage.volumes, *old.volume_paths())))
    finally:
        old.close()
    for folder in folders:
        read_marker(folder)
    return [LocalVolume(folder) for folder in folders]


def files(volumes: list[LocalVolume]) -> Iterator[tuple[str, str, str, str]]:
    """(volume ID, its folder, name in the spool, path in the tree) of every file; one of the last two is empty."""
    for volume in volumes:
        for path in volume.archived():
            yield volume.id, str(volume.path), "", path
        for name in sorted(volume.spooled()):
            yield volume.id, str(volume.path), name, ""


def read_one(volume_id: str, folder: str, spool: str, path: str) -> Found:
    """What one file is. Blocks."""
    name = os.path.join(folder, "spool", spool) if spool else os.path.join(folder, "archive", path)
    location = Location(volume_id, spool, path)
    nothing = Found(location, None, b"")
    attribute = b""
    with contextlib.suppress(OSError, ValueError):
        attribute = bytes.fromhex(os.getxattr(name, DIGEST_ATTRIBUTE).decode())
    if spool and not attribute:
        return nothing  # it was never complete
    try:
        meta = read_file_meta_info(name)
        offset = META_AT + 12 + int(meta.FileMetaInformationGroupLength)
        digest = xxhash.xxh3_128()
        syntax = str(meta.TransferSyntaxUID)
        identifier = Identifier(syntax)
        with open(name, "rb", buffering=0) as file:
            status = os.fstat(file.fileno())
            file.seek(offset)
            while block := file.read(READ_BYTES):
                digest.update(block)
                identifier.feed(memoryview(block))
            identity = identifier.identity()
            if identity is None:
                file.seek(offset)
                identity = identify(file, syntax)
    except Exception:  # whatever bytes lead to, in this code or in a library's: the file isn't a whole object of ours
        return nothing
    if not identity.sop_instance or not identity.study or not identity.series:
        return nothing
    put = Put(
        identity.sop_instance,
        identity.sop_class,
        identity.study,
        identity.series,
        syntax,
        digest.digest(),
        status.st_size,
        offset,
        identity.keys,
        str(meta.get("SourceApplicationEntityTitle", "")),
        status.st_mtime,
        "~" in os.path.basename(path),
    )
    return Found(location, put, attribute)


def _read_chunk(chunk: list[tuple[str, str, str, str]]) -> list[Found]:
    return [read_one(*one) for one in chunk]


def _chunks(found: Iterator[tuple[str, str, str, str]]) -> Iterator[list[tuple[str, str, str, str]]]:
    while chunk := list(islice(found, CHUNK_FILES)):
        yield chunk


class Rebuilding:
    """Writes the new log and catalogue, entry by entry."""

    def __init__(self, catalogue: Catalogue, volumes: list[LocalVolume], old: Old) -> None:
        self._catalogue, self._old = catalogue, old
        self._volumes: dict[str, Volume] = {volume.id: volume for volume in volumes}
        self._leaving = old.leaving()
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
        if is_leaving or self._old.is_deleted(put.sop_instance):
            self.result.deleted += 1  # the next scrub moves the file to quarantine
            return
        known = self._old.put(put.sop_instance)
        before = self._catalogue.instance(put.sop_instance)
        digest = known.digest if known and known.length == put.length else one.attribute
        copy: Location | None = location
        if digest and digest != put.digest:
            if known is not None and before is None and known.digest == digest:
                put, copy = known, None  # rot: the entry stays, its copy is missing
            self.result.damaged += 1
            if copy is not None:
                return
        elif before is not None and not self._is_newer(put, location, before.put):
            return
        self._seq += 1
        if copy is not None and location.spool:
            entry = Entry(1, self._seq, put)
            copy = Location(location.volume, location.spool, self._path_of(entry, location.volume))
            self.spooled.append(copy)
            self._aimed.add((copy.volume, copy.path))
        elif copy is not None:
            copy = Location(location.volume, f"rebuilt-{self._seq}", location.path)
        rows.append((Entry(1, self._seq, put), copy))

    def _path_of(self, entry: Entry, volume_id: str) -> str:
        """Where it belongs in the tree; under a name of its own if something lies there that was told of before."""
        path = self._catalogue.path_of(entry, {})
        there = self._volumes[volume_id].locate(Location(volume_id, "", path)) is not None
        taken = there or (volume_id, path) in self._aimed
        return self._catalogue.path_of(entry, {}, own_name=True) if taken else path

    def _is_newer(self, put: Put, location: Location, before: Put) -> bool:
        """Two files of one instance: the version that replaced the other has the greater number in its name."""
        known = self._old.put(put.sop_instance)
        if known is not None:
            return known.digest == put.digest and before.digest != put.digest
        return put.replaces and (put.received > before.received or not before.replaces)

    def finish(self, lineage: str) -> Rebuilt:
        """What the old catalogue knows besides, and the facts of the new log."""

        for table in COPIED:
            self._catalogue.kv.update(partial(_put_all, table=table, rows=list(self._old.rows(table))))
        self._catalogue.write(
            Batch(
                meta={
                    "promised": 1,
                    "volumes": sorted(self._volumes),
                    "volume_paths": [str(path) for path in self._old.volume_paths()],
                    "checkpoint": self._seq,
                    "lineage": lineage,
                    "format": FORMAT,
                }
            )
        )
        self.result.instances = self._catalogue.counts()["instances"]
        return self.result


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
            chunks = _chunks(files(volumes))
            while batch := list(islice(chunks, BATCH_CHUNKS)):
                work.take([one for chunk in pool.map(_read_chunk, batch) for one in chunk])
                progress(sum(len(chunk) for chunk in batch))
        for volume in volumes:
            _sync(volume)
        return work.finish(str(uuid.uuid4())), work.spooled
    finally:
        catalogue.close()


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
