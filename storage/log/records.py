"""Records as they lie in a segment: head, payload, and zeros up to the next multiple of 8 bytes.

The head says where in the log the record is and carries a hash of all that came before it in its segment, itself
included. So a record counts only where it was written: what an earlier use of the file has left behind a torn tail
never fits. A checksum of its own lets each record be read without those before it.
"""

import struct
from dataclasses import dataclass
from typing import Final

import xxhash

ENTRY, MARK = b"TLR1", b"TLM1"  # a mark only makes what follows a tail of its own, by bytes made by chance
HEAD: Final = struct.Struct("<4sIQQ16sQ")  # kind, payload bytes, epoch, seq, chain, checksum
PAYLOAD_BYTES_MAX: Final = 8 << 20
_PLACE: Final = struct.Struct("<QQ")


@dataclass(frozen=True)
class Record:
    """An entry of the log. What the payload means is nobody's business here."""

    epoch: int
    seq: int
    payload: bytes


@dataclass(frozen=True)
class Head:
    """What stands before a payload, as it was read."""

    kind: bytes
    length: int
    epoch: int
    seq: int
    chain: bytes
    checksum: int


def size_of(length: int) -> int:
    """Bytes that a record with a payload of `length` bytes takes."""
    return HEAD.size + (length + 7) // 8 * 8


def pack(record: Record, before: bytes, kind: bytes = ENTRY) -> tuple[bytes, bytes]:
    """(the record, its chain); `before`: the chain of the record before it, or of the segment."""
    chain = _chain(record, before)
    head = HEAD.pack(kind, len(record.payload), record.epoch, record.seq, chain, _checksum(record, chain))
    return head + record.payload + bytes(-len(record.payload) % 8), chain


def unpack_head(raw: bytes) -> Head | None:
    """None for what isn't the head of a record."""
    if len(raw) < HEAD.size:
        return None
    head = Head(*HEAD.unpack_from(raw))
    return head if head.kind in (ENTRY, MARK) and head.length <= PAYLOAD_BYTES_MAX else None


def unpack(head: Head, payload: bytes) -> Record | None:
    """None if the record isn't as it was written."""
    record = Record(head.epoch, head.seq, payload)
    return record if len(payload) == head.length and head.checksum == _checksum(record, head.chain) else None


def follows(head: Head, record: Record, before: bytes) -> bool:
    """The record was written right behind what has the chain `before`."""
    return head.chain == _chain(record, before)


def _chain(record: Record, before: bytes) -> bytes:
    digest = xxhash.xxh3_128(before)
    digest.update(_PLACE.pack(record.epoch, record.seq))
    digest.update(record.payload)
    return digest.digest()


def _checksum(record: Record, chain: bytes) -> int:
    digest = xxhash.xxh3_64(chain)
    digest.update(_PLACE.pack(record.epoch, record.seq))
    digest.update(record.payload)
    return digest.intdigest()
