"""What each change does to the tables of the catalogue, inside a transaction."""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any, Final

import msgspec

from storage.state import entries, file_images, files, instances, places, rows
from storage.state.entries import seq_key
from storage.state.file_model import Change, Drop, Flush, Link, MarkDirty, Remove, Rename
from storage.state.file_rows import FileRefused
from storage.state.kv import Transaction
from storage.state.model import (
    Delete,
    Entry,
    Files,
    Forget,
    IndexFile,
    Instance,
    Leaving,
    Location,
    Put,
    Task,
    TaskDone,
    Tombstone,
    decode_entry,
    encode,
)

NOT_HERE_YET: Final = b"no copy yet"  # why a copy is missing that was never here
ADOPTED: Final = "adopted-"  # instead of a spool name: a file that was taken over where it lay
DIVERGED: Final = "diverged: prepared here and not committed"
# A file may be another image, or none, after these.
SEEN_IN_BYTES: Final = (MarkDirty, Flush, Remove, Rename, Link, Drop)


def same_copy(one: Location, other: Location) -> bool:
    """The same file, published or not."""
    return (one.volume, one.spool) == (other.volume, other.spool)


def meta(txn: Transaction, name: str, default: Any) -> Any:
    value = txn.get("meta", name.encode())
    return default if value is None else msgspec.msgpack.decode(value)


def put_meta(txn: Transaction, meta: Mapping[str, Any]) -> None:
    for name, value in meta.items():
        txn.put("meta", name.encode(), msgspec.msgpack.encode(value))


def below(txn: Transaction, table: str, prefix: bytes) -> Iterator[bytes]:
    for key, _ in txn.scan(table, prefix):
        if not key.startswith(prefix):
            return
        yield key


def locate(txn: Transaction, entry: Entry, location: Location | None) -> None:
    if location is not None:
        places.put(txn, entry.seq, location)
    elif isinstance(entry.operation, Put):
        txn.put("missing", seq_key(entry.seq), NOT_HERE_YET)


def leave(txn: Transaction, location: Location, sop_instance: str, reason: str, *, keep: bool = True) -> None:
    leaving = Leaving(location, sop_instance, reason, keep)
    txn.put("leaving", f"{location.volume}/{location.spool}".encode(), encode(leaving))


def withdraw(txn: Transaction, seq: int, sop_instance: str, reason: str) -> None:
    """This node's copy of an entry is no longer wanted."""
    location = places.remove(txn, seq)
    if location is not None:
        leave(txn, location, sop_instance, reason)
    txn.delete("missing", seq_key(seq))


def truncate(txn: Transaction, after: int) -> None:
    dropped = [decode_entry(value) for _, value in txn.scan("entries", seq_key(after + 1))]
    for entry in dropped:
        if isinstance(entry.operation, Put):
            withdraw(txn, entry.seq, entry.operation.sop_instance, DIVERGED)
        txn.delete("entries", seq_key(entry.seq))


def lose(txn: Transaction, seq: int, why: str, was: Location) -> None:
    """The copy of an entry that was at a certain place is gone."""
    now = places.get(txn, seq)
    if not entries.is_put(txn, seq):
        return  # deleted or cut off meanwhile
    if now is not None and not same_copy(now, was):
        return  # it was made again elsewhere meanwhile
    places.remove(txn, seq)
    # Where it was: on a disk that comes back it is found again.
    txn.put("missing", seq_key(seq), encode(was) if was.volume else why.encode())


def move(txn: Transaction, seq: int, location: Location) -> None:
    operation = entries.operation_of(txn, seq)
    if not isinstance(operation, Put):
        if not location.spool.startswith(ADOPTED):  # that one's place may be somebody else's by now
            leave(txn, location, "", "deleted while it was being copied")
        return
    before = places.get(txn, seq) or location
    if before.spool != location.spool and (before.volume, before.path) != (location.volume, location.path):
        leave(txn, before, operation.sop_instance, "copied to another volume", keep=False)
    places.put(txn, seq, location)
    txn.delete("missing", seq_key(seq))


def apply(txn: Transaction, entry: Entry, location: Location | None) -> int:
    """Returns by how many bytes the archive grew."""
    operation = entry.operation
    if isinstance(operation, Put):
        return apply_put(txn, entry.seq, operation, location)
    if isinstance(operation, Delete):
        return apply_delete(txn, entry.seq, operation)
    if isinstance(operation, Task):
        txn.put("task", operation.id.encode(), encode(operation))
    elif isinstance(operation, TaskDone):
        txn.delete("task", operation.id.encode())
    elif isinstance(operation, Forget):
        forget(txn, operation.upto)
    elif isinstance(operation, Files):
        apply_files(txn, entry.seq, operation.change)
    elif isinstance(operation, IndexFile):
        file_images.indexed(txn, entry.seq, operation)
    return 0


def apply_files(txn: Transaction, seq: int, change: Change) -> None:
    with contextlib.suppress(FileRefused):  # who proposed it asked before; in any case both nodes say the same
        done = files.apply(txn, change)
        if done.gone:
            copies = b",".join(generation.encode() for _, generation in done.gone)
            txn.put("file_gone", seq_key(done.gone[0][0]), copies)
        if isinstance(change, SEEN_IN_BYTES):
            flushed = isinstance(change, Flush)
            moved = isinstance(change, Link) or (isinstance(change, Rename) and change.parent != change.to_parent)
            for number in filter(None, (done.inode, done.replaced)):
                file_images.changed(txn, seq, number, flushed=flushed, moved=moved)


def over(txn: Transaction, upto: int) -> Iterator[bytes]:
    """Keys of applied entries up to `upto` that say nothing any more once both nodes have them."""
    end = seq_key(upto + 1)
    for key, raw in txn.scan("entries"):
        if key >= end:
            return
        operation = decode_entry(raw).operation
        if not isinstance(operation, Task) or txn.get("task", operation.id.encode()) is None:
            yield key


def forget(txn: Transaction, upto: int) -> None:
    """What both nodes know to be over is kept no longer. Tombstones are: a file on a disk that was away, or an object
    that waits to be offered again, may still turn up."""
    for key in list(over(txn, upto)):
        txn.delete("entries", key)
    put_meta(txn, {"forgotten": max(upto, meta(txn, "forgotten", 0))})


def apply_put(txn: Transaction, seq: int, put: Put, location: Location | None) -> int:
    old = instances.get(txn, instances.key_of(put.sop_instance))
    grown = put.length
    if old is not None and old.seq != seq:
        grown -= _removed(txn, old)
        supersede(txn, old.seq, old.put, "replaced by a newer version")
        if file_images.is_of_file(old.seq):
            file_images.replaced(txn, old)
        if not rows.says_the_same(old.put, put):
            rows.made_anew(txn, old.put.study)
    rows.add(txn, seq, put)
    entries.applied(txn, seq, put)
    if location is not None and txn.get("missing", seq_key(seq)) is None:
        places.put(txn, seq, location)
    txn.delete("tombstone", put.sop_instance.encode())
    return grown


def apply_delete(txn: Transaction, seq: int, delete: Delete) -> int:
    shrunk = 0
    for old in rows.matching(txn, delete):
        shrunk += _removed(txn, old)
        file_images.deleted(txn, old)
        supersede(txn, old.seq, old.put, f"deleted: {delete.reason}")
        txn.put("tombstone", old.put.sop_instance.encode(), encode(Tombstone(seq, delete.reason, delete.at)))
    rows.made_anew(txn, delete.study)
    return -shrunk


def _removed(txn: Transaction, old: Instance) -> int:
    """Returns the bytes that the archive has had of it."""
    length = rows.remove(txn, old.put)
    return 0 if file_images.is_of_file(old.seq) else length


def supersede(txn: Transaction, seq: int, put: Put, reason: str) -> None:
    withdraw(txn, seq, put.sop_instance, reason)
    entries.void(txn, seq)
