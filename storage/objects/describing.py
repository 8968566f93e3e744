"""Files that say what they are, see `storage.state.description`. All of it blocks and raises OSError."""

from collections.abc import Iterable

from storage.objects.blob_store import BlobStore
from storage.objects.volume import Volume
from storage.state import description
from storage.state.description import Description
from storage.state.model import Entry, Put


def describe(volume: Volume, name: str, entry: Entry, lineage: str, *, sync: bool = False) -> bool:
    """Have the file of an entry of the log `lineage` say so, durably if `sync`. Returns whether it does: there may be
    no room for it, in a file of an older version."""
    put = entry.operation
    if not isinstance(put, Put):
        return True
    if not lineage or not description.has_room(_begin(volume, name, put.offset)):
        return False
    volume.amend(name, put.offset - description.SIZE, description.packed(entry, lineage), sync=sync)
    return True


def description_of(store: BlobStore, name: str) -> Description | None:
    """What a file says, None if it says nothing."""
    return description.found_in(_begin(store, name, description.HEAD_BYTES))


def said_in_spool(volume: Volume, names: Iterable[str]) -> dict[str, Description | None]:
    """What files of a spool folder say, by "volume/spool name"; those that have gone meanwhile are left out."""
    found: dict[str, Description | None] = {}
    for name in names:
        try:
            found[f"{volume.id}/{name}"] = description_of(volume, f"spool/{name}")
        except FileNotFoundError:
            continue
        except OSError:  # a folder, another user's, a bad sector: nothing of ours depends on that
            found[f"{volume.id}/{name}"] = None
    return found


def _begin(store: BlobStore, name: str, size: int) -> bytes:
    file = store.open(name)
    try:
        return file.read(size)
    finally:
        file.close()
