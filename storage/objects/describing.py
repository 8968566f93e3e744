"""Files that say what they are, see `storage.state.description`. All of it blocks and raises OSError."""

import contextlib
from collections.abc import Iterable

from storage.objects.blob_store import BlobStore
from storage.objects.volume import Volume
from storage.state import description
from storage.state.description import Description
from storage.state.model import Entry, Put


def describe(volume: Volume, name: str, entry: Entry, lineage: str, *, sync: bool = False) -> None:
    """Have the file of an entry of the log `lineage` say so, durably if `sync`, if there is room for it."""
    put = entry.operation
    if not isinstance(put, Put) or not lineage:
        return
    header = _begin(volume, name, put.offset)
    if description.has_room(header):
        volume.amend(name, put.offset - description.SIZE, description.packed(entry, lineage), sync=sync)


def description_of(store: BlobStore, name: str) -> Description | None:
    """What a file says, None if it says nothing."""
    return description.found_in(_begin(store, name, description.HEAD_BYTES))


def said_in_spool(volume: Volume, names: Iterable[str]) -> dict[str, Description | None]:
    """What files of a spool folder say, by "volume/spool name"; those that have gone meanwhile are left out."""
    found = {}
    for name in names:
        with contextlib.suppress(FileNotFoundError):
            found[f"{volume.id}/{name}"] = description_of(volume, f"spool/{name}")
    return found


def _begin(store: BlobStore, name: str, size: int) -> bytes:
    file = store.open(name)
    try:
        return file.read(size)
    finally:
        file.close()
