"""Where this node's copies lie: table `location`, by the entry's number; table `placed` has the same by volume, and
`copies` how many lie on each.

Volumes and folders stand in a row by number (`words`), and a file's name only if it isn't that of its instance, as
nearly all in the tree are.
"""

import uuid
from collections.abc import Iterator
from typing import Any, Final

import msgspec

from storage.state import instances
from storage.state.entries import seq_key, seq_of
from storage.state.kv import CatalogueDamaged, Transaction
from storage.state.model import Location, decode_location

COUNT_BYTES: Final = 8
NUMBER_BYTES: Final = 4
SUFFIX: Final = ".dcm"
WORD_BYTES_MAX: Final = 400  # as long as a key may be; a longer folder stands in the row itself
_TEXT, _NUMBER = b"t", b"n"  # in `words`: text -> number, number -> text


class _Row(msgspec.Struct, frozen=True, array_like=True):
    """`folder`: its number, 0 for none. `name`: of the file, or its whole path if it has no folder; None if it is that
    of the instance."""

    volume: int
    spool: str
    folder: int
    name: str | None


class _OldRow(msgspec.Struct, frozen=True, array_like=True):
    """Of format 4. `volume`: its UUID, as bytes if it is one. `path` ends with a slash if the file has the instance's
    name."""

    volume: Any
    spool: str
    path: str


_row = msgspec.msgpack.Decoder(_Row)
_old_row = msgspec.msgpack.Decoder(_OldRow)
_encode = msgspec.msgpack.Encoder().encode
_older = msgspec.msgpack.Decoder(Location)  # a row of formats 1 to 3


def get(txn: Transaction, seq: int) -> Location | None:
    """Where this node's copy of an entry lies. Raises CatalogueDamaged."""
    raw = txn.get("location", seq_key(seq))
    return None if raw is None else decode(txn, seq_key(seq), raw)


def decode(txn: Transaction, key: bytes, raw: bytes) -> Location:
    """A row. Raises CatalogueDamaged, msgspec.DecodeError."""
    row = _row.decode(raw)
    name = _own_name(txn, key) if row.name is None else row.name
    return Location(_word(txn, row.volume), row.spool, f"{_word(txn, row.folder)}/{name}" if row.folder else name)


def put(txn: Transaction, seq: int, location: Location) -> None:
    """It lies there from now on, and nowhere else."""
    key = seq_key(seq)
    before = txn.get("location", key)
    volume = _number_of(txn, location.volume)
    if before is not None and (was := _row.decode(before).volume) != volume:
        _unplace(txn, was, key)
        before = None
    if before is None:
        txn.append("placed", _key(volume) + key, b"")
        _count(txn, location.volume, 1)
    folder, name = _named(txn, key, location.path)
    txn.append("location", key, _encode(_Row(volume, location.spool, folder, name)))


def remove(txn: Transaction, seq: int) -> Location | None:
    """Returns where it lay."""
    before = get(txn, seq)
    if before is not None:
        _unplace(txn, _number_of(txn, before.volume), seq_key(seq))
        txn.delete("location", seq_key(seq))
    return before


def on_volume(txn: Transaction, volume: str, start: int = 0) -> Iterator[tuple[int, Location]]:
    """(seq, where it lies) of the copies on a volume, from entry `start` on."""
    raw = txn.get("words", _TEXT + volume.encode())
    if raw is None:
        return
    for key, _ in txn.scan("placed", raw + seq_key(start)):
        if not key.startswith(raw):
            return
        seq = seq_of(key[NUMBER_BYTES:])
        location = get(txn, seq)
        if location is not None:
            yield seq, location


def is_at(location: Location | None, key: str) -> bool:
    """A copy is the file "volume/spool name"."""
    return location is not None and f"{location.volume}/{location.spool}" == key


def was_at(raw: bytes | None) -> Location | None:
    """Where a missing copy lay before, by its row in `missing`; None if that isn't known."""
    if raw is None:
        return None
    try:
        return decode_location(raw)
    except msgspec.DecodeError:
        return None  # a reason in words


def naming(txn: Transaction, files: dict[str, int]) -> dict[str, Location | None]:
    """Those of these files, "volume/spool name", that a copy of an entry has, or had and may have again (None); each
    with the entry before which there is none. Looks at all copies from there on of their volumes."""
    found: dict[str, Location | None] = {}
    if not files:
        return found
    for _, raw in txn.scan("missing", seq_key(min(files.values()))):
        if (was := was_at(raw)) and (key := f"{was.volume}/{was.spool}") in files:
            found[key] = None
    for volume in {key.partition("/")[0] for key in files}:
        start = min(start for key, start in files.items() if key.startswith(f"{volume}/"))
        for _, location in on_volume(txn, volume, start):
            if (key := f"{volume}/{location.spool}") in files:
                found[key] = location
    return found


def convert(txn: Transaction, key: bytes, raw: bytes) -> None:
    """A row of an older format, unless it was converted before."""
    if raw.startswith(b"\x94"):
        return
    location = _older.decode(raw) if not raw.startswith(b"\x93") else _of_format_4(txn, key, raw)
    txn.delete("location", key)
    put(txn, seq_of(key), location)


def _of_format_4(txn: Transaction, key: bytes, raw: bytes) -> Location:
    row = _old_row.decode(raw)
    volume = str(row.volume if isinstance(row.volume, str) else uuid.UUID(bytes=row.volume))
    return Location(volume, row.spool, row.path + (_own_name(txn, key) if row.path.endswith("/") else ""))


def copy(txn: Transaction, key: bytes, raw: bytes) -> None:
    """A row of another catalogue whose `words` are here too; it isn't counted."""
    txn.append("location", key, raw)
    txn.append("placed", _key(_row.decode(raw).volume) + key, b"")


def counts(txn: Transaction) -> dict[str, int]:
    """Copies on each volume, by its UUID."""
    return {key.decode(): int.from_bytes(value, "big") for key, value in txn.scan("copies")}


def count_anew(txn: Transaction) -> None:
    """From the locations themselves."""
    found: dict[int, int] = {}
    for _, raw in txn.scan("location"):
        volume = _row.decode(raw).volume
        found[volume] = found.get(volume, 0) + 1
    for key in [key for key, _ in txn.scan("copies")]:
        txn.delete("copies", key)
    for volume, count in found.items():
        txn.put("copies", _word(txn, volume).encode(), count.to_bytes(COUNT_BYTES, "big"))


def _named(txn: Transaction, key: bytes, path: str) -> tuple[int, str | None]:
    """(number of the folder, name) of a path in the tree."""
    folder, _, name = path.rpartition("/")
    if not folder or len(folder.encode()) > WORD_BYTES_MAX:
        return 0, path
    kept = txn.get("kept", key)
    is_instances = kept is not None and name == instances.uid_of(kept) + SUFFIX
    return _number_of(txn, folder), None if is_instances else name


def _own_name(txn: Transaction, key: bytes) -> str:
    kept = txn.get("kept", key)
    if kept is None:
        raise CatalogueDamaged(f"the instance of log entry {seq_of(key)} is missing")
    return instances.uid_of(kept) + SUFFIX


def _unplace(txn: Transaction, volume: int, key: bytes) -> None:
    txn.delete("placed", _key(volume) + key)
    _count(txn, _word(txn, volume), -1)


def _number_of(txn: Transaction, word: str) -> int:
    key = _TEXT + word.encode()
    raw = txn.get("words", key)
    if raw is None:
        last = next(txn.scan_back("words", _TEXT), None)
        raw = _key(int.from_bytes(last[0][1:], "big") + 1 if last else 1)
        txn.put("words", key, raw)
        txn.put("words", _NUMBER + raw, word.encode())
    return int.from_bytes(raw, "big")


def _word(txn: Transaction, number: int) -> str:
    raw = txn.get("words", _NUMBER + _key(number))
    if raw is None:
        raise CatalogueDamaged(f"a place that a copy lies at is missing: {number}")
    return raw.decode()


def _key(number: int) -> bytes:
    return number.to_bytes(NUMBER_BYTES, "big")


def _count(txn: Transaction, volume: str, more: int) -> None:
    key = volume.encode()
    count = int.from_bytes(txn.get("copies", key) or b"", "big") + more
    if count:
        txn.put("copies", key, count.to_bytes(COUNT_BYTES, "big"))
    else:
        txn.delete("copies", key)
