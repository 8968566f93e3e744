"""What a file says of itself, so that an archive can be made anew from files alone: the digest of its data set, and
which entry of which log it is. And what a volume says of deletions.

It is the Private Information (0002,0102) of the File Meta Information (PS3.10 7.1), the last element before the data
set. Whoever writes the header leaves room for it (`BLANK`); it is filled in when the file's entry is logged.
"""

import contextlib
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

import msgspec
import xxhash

from storage.state.model import Delete, Entry, Put

CREATOR: Final = "2.25.231840057193340614860287452706339183421"  # Private Information Creator UID (0002,0100)
_LAYOUT: Final = struct.Struct("<8s16s16sQQd8s")  # magic, digest, lineage, epoch, seq, received, checksum
MAGIC: Final = b"TANDEM\0\1"
SIZE: Final = _LAYOUT.size
BLANK: Final = MAGIC + bytes(SIZE - len(MAGIC))
HEAD_BYTES: Final = 1024  # of a file, in which it stands
_SUM_BYTES: Final = 8
_GROUP_LENGTH_AT, _GROUP_LENGTH_END = 140, 144  # of (0002,0000), behind 128 bytes of preamble and "DICM"


@dataclass(frozen=True)
class Description:
    """`digest`: xxh3-128 of the data set. `lineage`: which log it is, by `lineage_of`. `received`: wall clock."""

    digest: bytes
    lineage: bytes
    epoch: int
    seq: int
    received: float


def lineage_of(name: str) -> bytes:
    """The name of a log in 16 bytes."""
    return xxhash.xxh3_128_digest(name.encode())


def packed(entry: Entry, lineage: str) -> bytes:
    """That of an entry's file."""
    put = entry.operation
    if not isinstance(put, Put):
        raise TypeError("only instances have files")
    whole = _LAYOUT.pack(MAGIC, put.digest, lineage_of(lineage), entry.epoch, entry.seq, put.received, b"")
    return whole[:-_SUM_BYTES] + xxhash.xxh3_64_digest(whole[:-_SUM_BYTES])


def has_room(header: bytes) -> bool:
    """What stands before a data set ends with a description, or with room for one."""
    return header[-SIZE:].startswith(MAGIC) and len(header) >= SIZE


def with_description(header: bytes, packed: bytes) -> bytes:
    """What stands before a data set, filled in; as it is if there is no room for it."""
    return header[:-SIZE] + packed if has_room(header) else header


def unpacked(block: bytes) -> Description | None:
    """None for room that isn't filled in, and for what isn't a description."""
    if len(block) != SIZE or block[-_SUM_BYTES:] != xxhash.xxh3_64_digest(block[:-_SUM_BYTES]):
        return None
    magic, digest, lineage, epoch, seq, received, _ = _LAYOUT.unpack(block)
    return Description(digest, lineage, epoch, seq, received) if magic == MAGIC else None


def found_in(head: bytes) -> Description | None:
    """That of a file, by its first `HEAD_BYTES` bytes."""
    if head[128:132] != b"DICM" or len(head) < _GROUP_LENGTH_END:
        return None
    end = _GROUP_LENGTH_END + int.from_bytes(head[_GROUP_LENGTH_AT:_GROUP_LENGTH_END], "little")
    return unpacked(head[end - SIZE : end]) if SIZE <= end <= len(head) else None


class Deletion(msgspec.Struct, frozen=True):
    """What a volume keeps of a deletion, as a line of JSON. `lineage` in hexadecimal digits."""

    lineage: str
    seq: int
    study: str
    series: str
    sop_instance: str
    reason: str
    at: float

    def takes(self, put: Put, said: Description | None) -> bool:
        """It came after this instance, and names it. Of files of another log, or that don't say it, the wall clock
        tells."""
        if said is not None and said.lineage.hex() == self.lineage:
            return names(self, put) and said.seq < self.seq
        return names(self, put) and (said.received if said else put.received) < self.at


def names(gone: Delete | Deletion, put: Put) -> bool:
    """A deletion is of this instance, whenever either came."""
    return gone.study == put.study and gone.series in ("", put.series) and gone.sop_instance in ("", put.sop_instance)


_deletion = msgspec.json.Decoder(Deletion)


def deletion_line(entry: Entry, lineage: str) -> bytes:
    """The line of an entry that is a deletion."""
    gone = entry.operation
    if not isinstance(gone, Delete):
        raise TypeError("not a deletion")
    name = lineage_of(lineage).hex()
    return msgspec.json.encode(
        Deletion(name, entry.seq, gone.study, gone.series, gone.sop_instance, gone.reason, gone.at)
    )


def deletions_of(lines: Iterable[bytes]) -> list[Deletion]:
    """Those that can be read: the last line may be torn."""
    found = []
    for line in lines:
        with contextlib.suppress(msgspec.MsgspecError):
            found.append(_deletion.decode(line))
    return found
