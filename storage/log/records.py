"""Records as they lie in a segment: head, payload, and zeros up to the next multiple of 8 bytes.

The head says where in the log the record is and carries a hash of all that came before it in its segment, itself
included. So a record counts only where it was written: what an earlier use of the file has left behind a torn tail
never fits. A checksum of its own, made with the segment's first hash, tells a head of this segment from any other
bytes, and a digest of the payload lets each record be read without those before it.
"""

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import xxhash

ENTRY, MARK = b"TLR2", b"TLM2"  # a mark only makes what follows a tail of its own, by bytes made by chance
HEAD: Final = struct.Struct("<4sIQQQ16s16sQ")  # kind, payload bytes, epoch, seq, synced, digest, chain, checksum
PAYLOAD_BYTES_MAX: Final = 8 << 20
ALIGNMENT: Final = 8
_SUM_BYTES: Final = 8
_PLACE: Final = struct.Struct("<QQ")

Bytes = bytes | bytearray | memoryview


@dataclass(frozen=True)
class Record:
    """An entry of the log. What the payload means is nobody's business here. `more` goes on with it, uncopied, in a
    record that is to be written; in one that was read it is empty."""

    epoch: int
    seq: int
    payload: bytes
    more: Sequence[Bytes] = ()

    @property
    def length(self) -> int:
        """Of the payload, in bytes."""
        return len(self.payload) + sum(map(len, self.more))


@dataclass(frozen=True)
class Head:
    """What stands before a payload, as it was read. `synced`: the last entry that was durable when it was written."""

    kind: bytes
    length: int
    epoch: int
    seq: int
    synced: int
    digest: bytes
    chain: bytes
    checksum: int


def size_of(length: int) -> int:
    """Bytes that a record with a payload of `length` bytes takes."""
    return HEAD.size + (length + ALIGNMENT - 1) // ALIGNMENT * ALIGNMENT


def pack(
    record: Record, before: bytes, salt: bytes, *, synced: int = 0, kind: bytes = ENTRY
) -> tuple[list[Bytes], bytes]:
    """(what is to be written, its chain); `before`: the chain of the record before it, or the segment's, which is the
    `salt` too."""
    parts: list[Bytes] = [record.payload, *record.more]
    digest = xxhash.xxh3_128()
    for part in parts:
        digest.update(part)
    length, digested = record.length, digest.digest()
    chain = _chain(record.epoch, record.seq, digested, before)
    head = HEAD.pack(kind, length, record.epoch, record.seq, synced, digested, chain, 0)[:-_SUM_BYTES]
    head += xxhash.xxh3_64_digest(salt + head)[::-1]
    return [head, *parts, bytes(-length % ALIGNMENT)], chain


def unpack_head(raw: Bytes) -> Head | None:
    """None for what doesn't look like the head of a record."""
    if len(raw) < HEAD.size:
        return None
    head = Head(*HEAD.unpack_from(raw))
    return head if head.kind in (ENTRY, MARK) and head.length <= PAYLOAD_BYTES_MAX else None


def is_of(head: Head, salt: bytes) -> bool:
    """The head is as it was written, to the segment with this first hash."""
    packed = HEAD.pack(head.kind, head.length, head.epoch, head.seq, head.synced, head.digest, head.chain, 0)
    return head.checksum == xxhash.xxh3_64_intdigest(salt + packed[:-_SUM_BYTES])


def unpack(head: Head, payload: bytes) -> Record | None:
    """None if the payload isn't what was written."""
    whole = len(payload) == head.length and xxhash.xxh3_128_digest(payload) == head.digest
    return Record(head.epoch, head.seq, payload) if whole else None


def follows(head: Head, before: bytes) -> bool:
    """The record was written right behind what has the chain `before`."""
    return head.chain == _chain(head.epoch, head.seq, head.digest, before)


def _chain(epoch: int, seq: int, digest: bytes, before: bytes) -> bytes:
    return xxhash.xxh3_128_digest(before + _PLACE.pack(epoch, seq) + digest)
