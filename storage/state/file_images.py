"""Which of the share's files are DICOM instances: those stand in the catalogue, and are read where they lie.

file_unlooked  number -> seq       to be looked at, since this entry of the log
file_images    number -> Image     an instance
file_same      digest of a SOP Instance UID, number -> nothing
file_doubles   number -> nothing   an instance that the catalogue has by other bytes, of the archive or of another file

What is flushed and closed is to be looked at. Who does so reads it, and has `IndexFile` logged; that counts if nothing
was written to the file since. A file that is written to, or has no name any more, is none of the catalogue's from that
very entry of the log on. What was stored in the archive goes before what lies in a file.

The row of such an instance has a number of its own (`seq_of`) instead of an entry's: the archive has no copy of it, so
nothing that heals, lists or checks the archive's copies finds any.
"""

import stat
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import msgspec
import xxhash

from storage.state import file_rows, instances, rows
from storage.state.file_model import ROOT, Inode, decode_inode
from storage.state.file_rows import number_key, number_of
from storage.state.kv import KeyValues, Transaction
from storage.state.model import IndexFile, Instance

TABLES: Final = ("file_unlooked", "file_images", "file_same", "file_doubles")
FIRST_SEQ: Final = 1 << 62  # no log has so many entries
DIGEST_BYTES: Final = 16
FOLDERS_DEEP_MAX: Final = 1000


class Image(msgspec.Struct, frozen=True, array_like=True):
    """`blocks`: as `Put.blocks`."""

    sop_instance: str
    blocks: bytes


@dataclass(frozen=True)
class Unlooked:
    """A file that is to be looked at since the entry `since`. `folders`: inode numbers, from the one in which it got
    its name up to the topmost."""

    number: int
    since: int
    size: int
    mtime: int  # ns
    folders: tuple[int, ...]


_encode = msgspec.msgpack.Encoder().encode
_image = msgspec.msgpack.Decoder(Image)


def seq_of(number: int) -> int:
    """What stands in a catalogue's row in the place of an entry's number."""
    return FIRST_SEQ + number


def is_of_file(seq: int) -> bool:
    return seq >= FIRST_SEQ


def file_of(seq: int) -> int:
    """The inode number."""
    return seq - FIRST_SEQ


def image(txn: KeyValues, number: int) -> Image | None:
    raw = txn.get("file_images", number_key(number))
    return None if raw is None else _image.decode(raw)


def is_double(txn: KeyValues, number: int) -> bool:
    return txn.get("file_doubles", number_key(number)) is not None


def count_listed(txn: Transaction) -> int:
    """Instances that stand in the catalogue by the bytes of a file."""
    return txn.count("file_images") - txn.count("file_doubles")


def numbers(txn: Transaction, start: int) -> Iterator[int]:
    """What stands in the place of entries' numbers in the rows of instances of files, from `start` on."""
    first = max(0, file_of(start))
    return (seq_of(number_of(key)) for key, _ in txn.scan("file_images", number_key(first)))


def unlooked(txn: KeyValues, after: int = 0) -> Iterator[Unlooked]:
    """Of the numbers behind one."""
    for key, since in txn.scan("file_unlooked", number_key(after + 1)):
        row = _inode(txn, number_of(key))
        if row is not None:
            yield Unlooked(number_of(key), number_of(since), row.size, row.mtime, _above(txn, row.parent))


# -- changes -----------------------------------------------------------------------------------------------------------


def changed(txn: Transaction, seq: int, number: int, *, flushed: bool = False, moved: bool = False) -> None:
    """Entry `seq` has done something to a file: it was `flushed`, or `moved` into another folder."""
    row = _inode(txn, number)
    if row is not None and not stat.S_ISREG(row.mode):
        return
    rests = row is not None and row.nlink > 0 and not file_rows.is_dirty(txn, number)
    if flushed or not rests:
        _drop(txn, seq, number)
    if not rests:
        txn.delete("file_unlooked", number_key(number))
    elif row is not None and row.size and (flushed or moved):
        _queue(txn, seq, number)


def indexed(txn: Transaction, seq: int, operation: IndexFile) -> None:
    """A file was looked at, as entry `seq` says."""
    number, put = operation.number, operation.put
    key = number_key(number)
    if txn.get("file_unlooked", key) != number_key(operation.since):
        return  # it was written to since
    txn.delete("file_unlooked", key)
    _drop(txn, seq, number)
    if put is None:
        return
    txn.put("file_images", key, _encode(Image(put.sop_instance, put.blocks)))
    txn.put("file_same", _digest(put.sop_instance) + key, b"")
    if instances.get(txn, instances.key_of(put.sop_instance)) is not None:
        txn.put("file_doubles", key, b"")
        return
    rows.add(txn, seq_of(number), msgspec.structs.replace(put, blocks=b""))
    txn.delete("tombstone", put.sop_instance.encode())


def look_at_all(txn: Transaction) -> None:
    """Nobody has looked at any file of these rows."""
    for key, raw in list(txn.scan("file_inodes")):
        row = decode_inode(raw)
        if stat.S_ISREG(row.mode) and row.size and row.nlink and not file_rows.is_dirty(txn, number_of(key)):
            _queue(txn, 0, number_of(key))


def replaced(txn: Transaction, old: Instance) -> None:
    """The archive has an instance now that stood in the catalogue by the bytes of a file; its row is gone."""
    txn.put("file_doubles", number_key(file_of(old.seq)), b"")


def deleted(txn: Transaction, sop_instance: str) -> None:
    """An instance's row was deleted. Files that are that instance stay, and are none of the catalogue's until they are
    written to."""
    same = _digest(sop_instance)
    for number in _with(txn, same):
        for table, before in (("file_images", b""), ("file_doubles", b""), ("file_same", same)):
            txn.delete(table, before + number_key(number))


def _drop(txn: Transaction, seq: int, number: int) -> None:
    found = image(txn, number)
    if found is None:
        return
    key, same = number_key(number), _digest(found.sop_instance)
    txn.delete("file_images", key)
    txn.delete("file_same", same + key)
    if txn.delete("file_doubles", key):
        return
    row = instances.get(txn, instances.key_of(found.sop_instance))
    if row is not None and row.seq == seq_of(number):
        rows.remove(txn, row.put)
        rows.made_anew(txn, row.put.study)
    for other in _with(txn, same):
        _queue(txn, seq, other)  # one of them takes its place


def _queue(txn: Transaction, seq: int, number: int) -> None:
    txn.put("file_unlooked", number_key(number), number_key(seq))


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
    for key, raw in txn.scan("file_images"):
        number, one = number_of(key), _image.decode(raw)
        row_there = instances.get(txn, instances.key_of(one.sop_instance))
        if (row_there is not None and row_there.seq == seq_of(number)) == is_double(txn, number):
            yield f"inode {number} is an image, and stands in the catalogue or doesn't"
        if txn.get("file_same", _digest(one.sop_instance) + number_key(number)) is None:
            yield f"inode {number} isn't found by what it is"
