"""Where this node's copies lie: table `location`, by the entry's number, and how many lie on each volume.

A row has the folder only of a file that is called after its instance, as nearly all in the tree are.
"""

import uuid
from typing import Any, Final

import msgspec

from storage.state import instances
from storage.state.entries import seq_key
from storage.state.kv import CatalogueDamaged, Transaction
from storage.state.model import Location

COUNT_BYTES: Final = 8
SUFFIX: Final = ".dcm"


class _Row(msgspec.Struct, frozen=True, array_like=True):
    """`volume`: its UUID, as bytes if it is one. `path` ends with a slash if the file has the instance's name."""

    volume: Any
    spool: str
    path: str


_row = msgspec.msgpack.Decoder(_Row)
_encode = msgspec.msgpack.Encoder().encode
decode_old = msgspec.msgpack.Decoder(Location).decode  # a row of formats 1 to 3


def get(txn: Transaction, seq: int) -> Location | None:
    raw = txn.get("location", seq_key(seq))
    return None if raw is None else decode(txn, seq_key(seq), raw)


def decode(txn: Transaction, key: bytes, raw: bytes) -> Location:
    """A row. Raises CatalogueDamaged, msgspec.DecodeError."""
    row = _row.decode(raw)
    path = row.path
    if path.endswith("/"):
        kept = txn.get("kept", key)
        if kept is None:
            raise CatalogueDamaged(f"the instance of log entry {int.from_bytes(key, 'big')} is missing")
        path += instances.uid_of(kept) + SUFFIX
    return Location(_text_of(row.volume), row.spool, path)


def spool_of(raw: bytes) -> str:
    """ "volume/spool name" of a row."""
    row = _row.decode(raw)
    return f"{_text_of(row.volume)}/{row.spool}"


def put(txn: Transaction, seq: int, location: Location) -> None:
    """It lies there from now on, and nowhere else."""
    key = seq_key(seq)
    before = txn.get("location", key)
    volume = _text_of(_row.decode(before).volume) if before is not None else ""
    if volume != location.volume:
        if volume:
            _count(txn, volume, -1)
        _count(txn, location.volume, 1)
    txn.append("location", key, _encoded(txn, key, location))


def remove(txn: Transaction, seq: int) -> Location | None:
    """Returns where it lay."""
    before = get(txn, seq)
    if before is not None:
        _count(txn, before.volume, -1)
        txn.delete("location", seq_key(seq))
    return before


def convert(txn: Transaction, key: bytes, raw: bytes) -> None:
    """A row of an older format, unless it was converted before."""
    if not raw.startswith(b"\x93"):
        txn.put("location", key, _encoded(txn, key, decode_old(raw)))


def counts(txn: Transaction) -> dict[str, int]:
    """Copies on each volume, by its UUID."""
    return {key.decode(): int.from_bytes(value, "big") for key, value in txn.scan("copies")}


def count_anew(txn: Transaction) -> None:
    """From the locations themselves."""
    found: dict[str, int] = {}
    for _, raw in txn.scan("location"):
        volume = _text_of(_row.decode(raw).volume)
        found[volume] = found.get(volume, 0) + 1
    for key in [key for key, _ in txn.scan("copies")]:
        txn.delete("copies", key)
    for volume, count in found.items():
        txn.put("copies", volume.encode(), count.to_bytes(COUNT_BYTES, "big"))


def _encoded(txn: Transaction, key: bytes, location: Location) -> bytes:
    path = location.path
    if path.endswith(SUFFIX) and (kept := txn.get("kept", key)) is not None:
        folder, _, name = path.rpartition("/")
        if folder and name == instances.uid_of(kept) + SUFFIX:
            path = folder + "/"
    return _encode(_Row(_bytes_of(location.volume), location.spool, path))


def _bytes_of(volume: str) -> bytes | str:
    try:
        found = uuid.UUID(volume)
    except ValueError:
        return volume
    return found.bytes if str(found) == volume else volume


def _text_of(volume: Any) -> str:
    return str(volume if isinstance(volume, str) else uuid.UUID(bytes=volume))


def _count(txn: Transaction, volume: str, more: int) -> None:
    key = volume.encode()
    count = int.from_bytes(txn.get("copies", key) or b"", "big") + more
    if count:
        txn.put("copies", key, count.to_bytes(COUNT_BYTES, "big"))
    else:
        txn.delete("copies", key)
