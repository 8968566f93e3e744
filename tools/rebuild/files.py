"""What lies on the volumes, and what each file says that it is."""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Final

import xxhash
from pydicom.filereader import read_file_meta_info

from gateway.dicom.identify import Identifier, identify
from storage.objects.local_files import DIGEST_ATTRIBUTE
from storage.objects.local_volume import LocalVolume
from storage.state.description import HEAD_BYTES, Description, found_in
from storage.state.model import Location, Put

CHUNK_FILES: Final = 64
META_AT: Final = 132
READ_BYTES: Final = 1 << 20


@dataclass(frozen=True)
class Found:
    """One file: where it lies, and what it is. `put` is None for one that isn't ours."""

    location: Location
    put: Put | None
    digest: bytes = b""  # that the file itself says its data set had, b"" if it doesn't
    said: Description | None = None  # what it says besides


def files(volumes: list[LocalVolume]) -> Iterator[tuple[str, str, str, str]]:
    """(volume ID, its folder, name in the spool, path in the tree) of every file; one of the last two is empty."""
    for volume in volumes:
        for name in volume.names():
            where, _, inside = name.partition("/")
            yield volume.id, str(volume.path), *((inside, "") if where == "spool" else ("", inside))


def read_one(volume_id: str, folder: str, spool: str, path: str) -> Found:
    """What one file is. Blocks."""
    name = os.path.join(folder, "spool", spool) if spool else os.path.join(folder, "archive", path)
    location = Location(volume_id, spool, path)
    nothing = Found(location, None)
    said, wanted = None, b""
    with contextlib.suppress(OSError, ValueError):  # as older versions said it, and who isn't logged yet
        wanted = bytes.fromhex(os.getxattr(name, DIGEST_ATTRIBUTE).decode())
    try:
        with open(name, "rb", buffering=0) as file:
            said = found_in(file.read(HEAD_BYTES))
        wanted = said.digest if said else wanted
        if spool and not wanted:
            return nothing  # it was never complete
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
    if spool and wanted != digest.digest():
        return nothing  # the power went, or the process ended, while it was written
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
        said.received if said else status.st_mtime,
        "~" in os.path.basename(path),
    )
    return Found(location, put, wanted, said)


def read_chunk(chunk: list[tuple[str, str, str, str]]) -> list[Found]:
    return [read_one(*one) for one in chunk]


def chunks(found: Iterator[tuple[str, str, str, str]]) -> Iterator[list[tuple[str, str, str, str]]]:
    while chunk := list(islice(found, CHUNK_FILES)):
        yield chunk
