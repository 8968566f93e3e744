"""`tandem rebuild-index`: a node's catalogue made anew from the files in its readable trees, or from the other node."""

import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Final

import xxhash
from pydicom.errors import InvalidDicomError
from pydicom.filereader import read_file_meta_info

from conf.settings import Settings
from gateway.dicom.identify import Identifier, Unreadable, identify
from storage.objects.volume import FOLDERS, LocalVolume, read_marker
from storage.state.catalogue import Batch, Catalogue
from storage.state.model import Entry, Location, Put
from tools.cli.options import give_to_gateway

CHUNK_FILES: Final = 64
BATCH_ENTRIES: Final = 1000
META_AT: Final = 132
READ_BYTES: Final = 1 << 20


@dataclass(frozen=True)
class Rebuilt:
    instances: int
    unreadable: list[str]  # files that aren't complete DICOM objects; they stay where they are
    seconds: float


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


def check_volumes(settings: Settings) -> None:
    """Raises VolumeOffline if one isn't there: its objects would be missing in the index."""
    for folder in settings.storage.volumes:
        read_marker(folder)


def files(settings: Settings) -> Iterator[tuple[str, str, str]]:
    """(volume id, root of its tree, path in it) of every file."""
    for folder in settings.storage.volumes:
        volume = LocalVolume(folder)
        for path in volume.archived():
            yield volume.id, str(folder / "archive"), path


def read_one(root: str, path: str) -> Put | None:
    """The record of one file, None if it isn't a complete DICOM object of ours."""
    name = os.path.join(root, path)
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
        return None
    if not identity.sop_instance or not identity.study or not identity.series:
        return None
    return Put(
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


def _read_chunk(chunk: list[tuple[str, str, str]]) -> list[tuple[str, str, Put | None]]:
    return [(volume_id, path, read_one(root, path)) for volume_id, root, path in chunk]


def from_files(settings: Settings, progress: Callable[[int, int], None], jobs: int = 2) -> Rebuilt:
    """Read every file of the readable trees and write a new log and catalogue. The gateway must not run."""
    start = time.monotonic()
    found = sorted(files(settings), key=lambda one: one[2])
    catalogue = Catalogue.open(catalogue_path(settings), settings.storage.map_size_bytes)
    chunks = (found[at : at + CHUNK_FILES] for at in range(0, len(found), CHUNK_FILES))
    unreadable: list[str] = []
    seq, done = 0, 0
    with ProcessPoolExecutor(jobs) as pool:
        results = pool.map(_read_chunk, chunks)
        while batch := list(islice(results, BATCH_ENTRIES // CHUNK_FILES)):
            rows: list[tuple[Entry, Location | None]] = []
            for volume_id, path, put in (row for chunk in batch for row in chunk):
                done += 1
                if put is None:
                    unreadable.append(path)
                    continue
                seq += 1
                rows.append((Entry(1, seq, put), Location(volume_id, f"rebuilt-{seq}", path)))
            catalogue.write(Batch(appends=rows, applies=rows, meta={"checkpoint": seq}))
            progress(done, len(found))
    catalogue.write(
        Batch(meta={"promised": 1, "volumes": sorted({volume_id for volume_id, _, _ in found}), "checkpoint": seq})
    )
    instances = catalogue.counts()["instances"]
    catalogue.close()
    made = catalogue_path(settings)
    folders = (volume / name for volume in settings.storage.volumes for name in FOLDERS)
    give_to_gateway(settings, made, *made.iterdir(), *folders)
    return Rebuilt(instances, unreadable, time.monotonic() - start)
