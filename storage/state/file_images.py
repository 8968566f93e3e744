"""Which of the share's files are DICOM instances: those stand in the catalogue, and are read where they lie.

file_unlooked  number -> since, flushed   to be looked at, since an entry of the log; flushed by an entry
file_images    number -> Image            an instance
file_same      digest of a SOP Instance UID, number -> nothing
file_entries   entry -> number            the instance that the catalogue has by this `IndexFile`
file_doubles   number -> nothing          an instance that the catalogue has by other bytes

What is flushed and closed is to be looked at. Who does so reads it, and has `IndexFile` logged; that counts if nothing
was written to the file since. A file that is written to, or has no name any more, is none of the catalogue's from that
very entry of the log on. What was stored in the archive goes before what lies in a file, and what was deleted from the
catalogue after a file was flushed isn't there again before the file is written to.

In the place of an entry's number the row of such an instance has one made of its `IndexFile` entry's (`seq_of`): so a
number means the same bytes for ever, and nothing that heals, lists or checks the archive's copies finds any.
"""

import stat
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import msgspec
import xxhash

from storage.state import file_rows, instances, rows
from storage.state.file_model import ROOT, Inode, decode_inode
from storage.state.file_rows import NUMBER_BYTES, number_key, number_of
from storage.state.kv import KeyValues, Transaction
from storage.state.model import IndexFile, Instance, Tombstone

TABLES: Final = ("file_unlooked", "file_images", "file_same", "file_entries", "file_doubles")
FIRST_SEQ: Final = 1 << 62  # no log has so many entries
DIGEST_BYTES: Final = 16
FOLDERS_DEEP_MAX: Final = 1000


class Image(msgspec.Struct, frozen=True, array_like=True):
    """`blocks`: as `Put.blocks`. `flushed`: by which entry the file was. `entry`: by which the catalogue has it, 0 if
    it hasn't: it has other bytes, or was told to have none."""

    sop_instance: str
    blocks: bytes
    flushed: int
    entry: int = 0


@dataclass(frozen=True)
class Unlooked:
    """A file that is to be looked at since the entry `since`. `folders`: inode numbers, from the one in which it got
    its name last up to the topmost."""

    number: int
    since: int
    size: int
    mtime: int  # ns
    folders: tuple[int, ...]


_encode = msgspec.msgpack.Encoder().encode
_image = msgspec.msgpack.Decoder(Image)
_tombstone = msgspec.msgpack.Decoder(Tombstone)


def seq_of(entry: int) -> int:
    """What stands in a catalogue's row in the place of an entry's number."""
    return FIRST_SEQ + entry


def is_of_file(seq: int) -> bool:
    return seq >= FIRST_SEQ


def file_of(txn: KeyValues, seq: int) -> int | None:
    """The inode number; None if the catalogue has no such instance any more."""
    raw = txn.get("file_entries", number_key(seq - FIRST_SEQ))
    return None if raw is None else number_of(raw)


def image(txn: KeyValues, number: int) -> Image | None:
    raw = txn.get("file_images", number_key(number))
    return None if raw is None else _image.decode(raw)


def count_listed(txn: Transaction) -> int:
    """Instances that stand in the catalogue by the bytes of a file."""
    return txn.count("file_entries")


def numbers(txn: Transaction, start: int) -> Iterator[int]:
    """What stands in the place of entries' numbers in the rows of instances of files, from `start` on."""
    first = max(0, start - FIRST_SEQ)
    return (seq_of(number_of(key)) for key, _ in txn.scan("file_entries", number_key(first)))


def unlooked(txn: KeyValues, after: int = 0) -> Iterator[Unlooked]:
    """Of the numbers behind one."""
    for key, queued in txn.scan("file_unlooked", number_key(after + 1)):
        row = _inode(txn, number_of(key))
        if row is not None:
            since = number_of(queued[:NUMBER_BYTES])
            yield Unlooked(number_of(key), since, row.size, row.mtime, _above(txn, row.parent))


# -- changes -----------------------------------------------------------------------------------------------------------


def changed(txn: Transaction, seq: int, number: int, *, flushed: bool = False, moved: bool = False) -> None:
    """Entry `seq` has done something to a file: it was `flushed`, or got a name (`moved`) in a folder."""
    row = _inode(txn, number)
    if row is not None and not stat.S_ISREG(row.mode):
        return
    rests = row is not None and row.nlink > 0 and not file_rows.is_dirty(txn, number)
    if flushed or not rests:
        _drop(txn, seq, number)
    if not rests:
        txn.delete("file_unlooked", number_key(number))
    elif row is not None and row.size and (flushed or moved):
        _queue(txn, seq, number, seq if flushed else _flushed(txn, number))


def indexed(txn: Transaction, seq: int, operation: IndexFile) -> None:
    """A file was looked at, as entry `seq` says."""
    number, put = operation.number, operation.put
    key = number_key(number)
    queued = txn.get("file_unlooked", key)
    if queued is None or queued[:NUMBER_BYTES] != number_key(operation.since):
        return  # it was written to, or moved, since
    flushed = number_of(queued[NUMBER_BYTES:])
    txn.delete("file_unlooked", key)
    _drop(txn, seq, number)
    if put is None:
        return
    found = Image(put.sop_instance, put.blocks, flushed)
    if instances.get(txn, instances.key_of(put.sop_instance)) is not None:
        txn.put("file_doubles", key, b"")
    elif not _was_deleted(txn, put.sop_instance, flushed):
        found = msgspec.structs.replace(found, entry=seq)
        txn.put("file_entries", number_key(seq), key)
        rows.add(txn, seq_of(seq), msgspec.structs.replace(put, blocks=b""))
    txn.put("file_images", key, _encode(found))
    txn.put("file_same", _digest(put.sop_instance) + key, b"")


def look_at_all(txn: Transaction) -> None:
    """Nobody has looked at any file of these rows."""
    for key, raw in list(txn.scan("file_inodes")):
        row = decode_inode(raw)
        if stat.S_ISREG(row.mode) and row.size and row.nlink and not file_rows.is_dirty(txn, number_of(key)):
            _queue(txn, 0, number_of(key), 0)


def replaced(txn: Transaction, old: Instance) -> None:
    """The archive has an instance now that stood in the catalogue by the bytes of a file; its row is gone."""
    number = _unlisted(txn, old.seq)
    if number is not None:
        txn.put("file_doubles", number_key(number), b"")


def deleted(txn: Transaction, old: Instance) -> None:
    """An instance's row was deleted. Files that are that instance stay, and are none of the catalogue's until they are
    written to."""
    if is_of_file(old.seq):
        _unlisted(txn, old.seq)
    for number in _with(txn, _digest(old.put.sop_instance)):
        txn.delete("file_doubles", number_key(number))


def _unlisted(txn: Transaction, seq: int) -> int | None:
    """The catalogue has a file no longer; returns its number."""
    number = file_of(txn, seq)
    txn.delete("file_entries", number_key(seq - FIRST_SEQ))
    found = image(txn, number) if number is not None else None
    if number is not None and found is not None:
        txn.put("file_images", number_key(number), _encode(msgspec.structs.replace(found, entry=0)))
    return number


def _drop(txn: Transaction, seq: int, number: int) -> None:
    """What was seen of a file counts no longer."""
    found = image(txn, number)
    if found is None:
        return
    key, same = number_key(number), _digest(found.sop_instance)
    txn.delete("file_images", key)
    txn.delete("file_same", same + key)
    txn.delete("file_doubles", key)
    if not found.entry:
        return
    txn.delete("file_entries", number_key(found.entry))
    row = instances.get(txn, instances.key_of(found.sop_instance))
    if row is not None and row.seq == seq_of(found.entry):
        rows.remove(txn, row.put)
        rows.one_less(txn, row.put)
    for other in _with(txn, same):
        _queue(txn, seq, other, _flushed(txn, other))  # one of them takes its place


def _queue(txn: Transaction, seq: int, number: int, flushed: int) -> None:
    txn.put("file_unlooked", number_key(number), number_key(seq) + number_key(flushed))


def _flushed(txn: Transaction, number: int) -> int:
    """By which entry a file was flushed that rests, 0 if that isn't known."""
    queued, found = txn.get("file_unlooked", number_key(number)), image(txn, number)
    if queued is not None:
        return number_of(queued[NUMBER_BYTES:])
    return found.flushed if found is not None else 0


def _was_deleted(txn: Transaction, sop_instance: str, flushed: int) -> bool:
    """By an entry behind that which flushed the file."""
    raw = txn.get("tombstone", sop_instance.encode())
    return raw is not None and _tombstone.decode(raw).seq > flushed


def _with(txn: Transaction, same: bytes) -> list[int]:
    found = []
    for key, _ in txn.scan("file_same", same):
        if not key.startswith(same):
            break
        found.append(number_of(key[DIGEST_BYTES:]))
    return found


def _inode(txn: KeyValues, number: int) -> Inode | None:
    raw = txn.get("file_inodes", number_key(number))
    return None if raw is None else decode_inode(raw)


def _above(txn: KeyValues, number: int) -> tuple[int, ...]:
    found = [number]
    while number != ROOT and (row := _inode(txn, number)) is not None and len(found) < FOLDERS_DEEP_MAX:
        number = row.parent
        found.append(number)
    return tuple(found)


def _digest(sop_instance: str) -> bytes:
    return xxhash.xxh3_128_digest(sop_instance.encode())


def broken(txn: Transaction) -> Iterator[str]:
    """What contradicts itself. Reads all of it."""
    for table in ("file_unlooked", "file_images", "file_doubles"):
        for key, _ in txn.scan(table):
            row = _inode(txn, number_of(key))
            if row is None or not row.nlink or file_rows.is_dirty(txn, number_of(key)):
                yield f"inode {number_of(key)} is in {table}, and is written to, or gone"
    if txn.count("file_same") != txn.count("file_images"):
        yield f"{txn.count('file_images')} images, and {txn.count('file_same')} rows by what they are"
    listed = 0
    for key, raw in txn.scan("file_images"):
        number, one = number_of(key), _image.decode(raw)
        row_there = instances.get(txn, instances.key_of(one.sop_instance))
        if one.entry and (row_there is None or row_there.seq != seq_of(one.entry)):
            yield f"inode {number} is an image, and the catalogue hasn't got it"
        if one.entry and (file_of(txn, seq_of(one.entry)) != number or txn.get("file_doubles", key) is not None):
            yield f"inode {number} isn't found by its entry, or counts as a double"
        if txn.get("file_same", _digest(one.sop_instance) + key) is None:
            yield f"inode {number} isn't found by what it is"
        listed += bool(one.entry)
    if listed != txn.count("file_entries"):
        yield f"the catalogue has {listed} files, and {txn.count('file_entries')} rows say so"
