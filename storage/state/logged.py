"""An entry as this node's log keeps it: what it says, and where its bytes are, or the bytes themselves."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import msgspec

from storage.log.records import Record
from storage.state.model import Entry, Location, decode_entry, encode

LENGTH_BYTES: Final = 4


class _Head(msgspec.Struct, frozen=True, array_like=True):
    entry: bytes
    location: Location | None
    inline: bool


@dataclass(frozen=True)
class Logged:
    """`data` is the whole file, header and data set; None if it lies at `location`, or there is none."""

    entry: Entry
    location: Location | None
    data: bytes | None


def record_of(
    entry: Entry, location: Location | None, chunks: Sequence[bytes | bytearray | memoryview] | None = None
) -> Record:
    """`chunks`: the bytes of the file, to be kept in the log."""
    head = encode(_Head(encode(entry), location, chunks is not None))
    return Record(entry.epoch, entry.seq, len(head).to_bytes(LENGTH_BYTES, "little") + head, chunks or ())


def logged(record: Record) -> Logged:
    """Raises ValueError for a payload that isn't one."""
    end = LENGTH_BYTES + int.from_bytes(record.payload[:LENGTH_BYTES], "little")
    try:
        head = msgspec.msgpack.decode(record.payload[LENGTH_BYTES:end], type=_Head)
        entry = decode_entry(head.entry)
    except msgspec.MsgspecError as error:
        raise ValueError(f"entry {record.seq} of the log can't be read: {error}") from error
    return Logged(entry, head.location, record.payload[end:] if head.inline else None)
