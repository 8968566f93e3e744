"""`tandem rebuild-index`: a node's catalogue made anew from its own files, or from the other node.

From files: every file of the readable trees, and what is complete in the spool folders (acknowledged and not yet
published). What a file should be says the old catalogue, where it can still be read, or else the file's own attribute;
one that is something else now isn't taken for the truth: its entry stays, and its copy is missing. What the old
catalogue knows to be deleted, or on its way out, stays so. The log that is made is a new one and never joins another.
"""

import contextlib
import os
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
import xxhash
from pydicom.errors import InvalidDicomError
from pydicom.filereader import read_file_meta_info

from conf.settings import Settings
from gateway.dicom.identify import Identifier, Unreadable, identify
from storage.objects.volume import DIGEST_ATTRIBUTE, FOLDERS, LocalVolume, Volume, read_marker
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
    """Move the catalogue out of the way, so that the node begins anew; returns where it is now."""
    path = catalogue_path(settings)
    if not path.exists():
        return None
    aside = path.with_name(f"catalogue.before-{time.strftime('%Y%m%dT%H%M%S')}-{os.urandom(2).hex()}")
    path.rename(aside)
    return aside


def open_volumes(settings: Settings) -> list[LocalVolume]:
    """All of them, for this process alone. Raises VolumeOffline if one isn't there: its objects would be missing in the
    index; InUse while a gateway has it."""
    for folder in settings.storage.volumes:
        read_marker(folder)
    return [LocalVolume(folder) for folder in settings.storage.volumes]


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
    except (OSError, Unreadable, InvalidDicomError, AttributeError, ValueError, EOFError, NotImplementedError):
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
        self.result = Rebuilt(old_catalogue=old.known)

    def take(self, found: list[Found]) -> None:
        """One batch."""
        rows: list[tuple[Entry, Location | None]] = []
        for one in found:
            self._take(one, rows)
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
            copy = Location(location.volume, location.spool, self._catalogue.path_of(entry, {}))
            self._volumes[location.volume].publish(copy.spool, copy.path)
        elif copy is not None:
            copy = Location(location.volume, f"rebuilt-{self._seq}", location.path)
        rows.append((Entry(1, self._seq, put), copy))

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
    aside: Path | None,
    progress: Callable[[int], None],
    jobs: int = 2,
) -> Rebuilt:
    """Read every file and write a new log and catalogue; `aside` is the old one. The gateway must not run. Raises
    OSError, CatalogueDamaged."""
    start = time.monotonic()
    catalogue = Catalogue.open(catalogue_path(settings), settings.storage.map_size_bytes)
    old = Old(aside)
    try:
        work = Rebuilding(catalogue, volumes, old)
        with ProcessPoolExecutor(jobs) as pool:
            chunks = _chunks(files(volumes))
            while batch := list(islice(chunks, BATCH_CHUNKS)):
                work.take([one for chunk in pool.map(_read_chunk, batch) for one in chunk])
                progress(sum(len(chunk) for chunk in batch))
        for volume in volumes:
            _sync(volume)
        result = work.finish(str(uuid.uuid4()))
    finally:
        old.close()
        catalogue.close()
    made = catalogue_path(settings)
    folders = (volume.path / name for volume in volumes for name in FOLDERS)
    give_to_gateway(settings, made, *made.iterdir(), *folders)
    result.seconds = time.monotonic() - start
    return result


def _sync(volume: LocalVolume) -> None:
    """All names of a volume, before the new log says that nothing of it need be looked at again. Raises OSError."""
    fd = os.open(volume.path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
    volume.sync_spool()
    for folder, _, _ in os.walk(volume.path / "archive"):
        volume.sync_directories([os.path.relpath(folder, volume.path)])
