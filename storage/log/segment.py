"""A segment: one file of the log, of fixed size, with a head and records behind it."""

from array import array
from collections.abc import Iterator
from typing import Final

import msgspec
import xxhash

from storage.log.folder import File, LogDamaged, LogUnknown
from storage.log.records import (
    ALIGNMENT,
    ENTRY,
    HEAD,
    MARK,
    Head,
    Record,
    follows,
    is_of,
    size_of,
    unpack,
    unpack_head,
)

HEAD_BYTES: Final = 4096
KIND: Final = b"TLS"
MAGIC: Final = KIND + b"1"  # and the format's number
SUM_BYTES: Final = 8
SCAN_BYTES: Final = 1 << 20
SALVAGE_BYTES, PAGE_BYTES = 64 << 10, 4 << 10
EPOCHS_MAX: Final = 100  # that a head names; a log of more takeovers is matched from where they begin


class SegmentHead(msgspec.Struct, frozen=True, array_like=True):
    """`first` is the seq that follows what the segments before hold: less than their last one + 1 where the log was cut
    off. `chain` is made by chance. `epochs`: (epoch, its last seq) of the log before `first`."""

    lineage: str
    number: int
    first: int
    begins: bool  # nothing of the segments before counts
    chain: bytes
    epochs: tuple[tuple[int, int], ...]


def pack_head(head: SegmentHead) -> bytes:
    raw = msgspec.msgpack.encode(head)
    body = len(raw).to_bytes(4, "little") + raw
    packed = MAGIC + xxhash.xxh3_64_digest(body) + body
    if len(packed) > HEAD_BYTES:
        raise ValueError("the head of a segment is too long")
    return packed.ljust(HEAD_BYTES, b"\0")


def unpack_segment_head(raw: bytes) -> SegmentHead | None:
    """None for a file that is no segment yet, or none any more. Raises LogUnknown."""
    at = len(MAGIC) + SUM_BYTES
    if len(raw) < HEAD_BYTES or raw[: len(KIND)] != KIND:
        return None
    body = raw[at : at + 4 + int.from_bytes(raw[at : at + 4], "little")]
    if xxhash.xxh3_64_digest(body) != raw[len(MAGIC) : at]:
        return None
    if raw[: len(MAGIC)] != MAGIC:  # whatever a newer one changes, its heads are checked like this
        raise LogUnknown(raw[len(KIND) : len(MAGIC)].decode("ascii", "replace"))
    try:
        return msgspec.msgpack.decode(body[4:], type=SegmentHead)
    except msgspec.DecodeError:
        return None


class Segment:
    def __init__(self, name: str, file: File, head: SegmentHead) -> None:
        self.name, self.file, self.head = name, file, head
        self.offsets = array("I")  # of the records, the first one being `head.first`
        self.end = HEAD_BYTES  # behind the last record
        self.chain = head.chain
        self.epochs: list[tuple[int, int]] = list(head.epochs)  # with those of its own records
        self.scanned = False

    @property
    def next_seq(self) -> int:
        """That a record appended here would have. Known once it is scanned."""
        return self.head.first + len(self.offsets)

    def note(self, record: Record, chain: bytes) -> None:
        """A record is at the end now."""
        self.offsets.append(self.end)
        self.end += size_of(record.length)
        self.chain = chain
        if self.epochs and self.epochs[-1][0] == record.epoch:
            self.epochs[-1] = (record.epoch, record.seq)
        else:
            self.epochs.append((record.epoch, record.seq))

    def note_mark(self, length: int, chain: bytes) -> None:
        """A mark is at the end now."""
        self.end += size_of(length)
        self.chain = chain

    def scan(self) -> None:
        """Find the records, up to the first that isn't whole or doesn't follow. Raises OSError."""
        if self.scanned:
            return
        for head, record in self._records():
            if not follows(head, self.chain):
                break
            if head.kind == MARK:
                self.note_mark(head.length, head.chain)
            elif head.seq == self.next_seq:
                self.note(record, head.chain)
            else:
                break
        self.scanned = True

    def _records(self) -> Iterator[tuple[Head, Record]]:
        """Those that lie one behind the other, from the end on."""
        at, buffer, start = self.end, b"", self.end
        while True:
            if len(buffer) - (at - start) < HEAD.size:
                buffer, start = self.file.read(at, SCAN_BYTES), at
            head = unpack_head(buffer[at - start : at - start + HEAD.size])
            if head is None or not is_of(head, self.head.chain):
                return
            if len(buffer) - (at - start) < size_of(head.length):
                buffer, start = self.file.read(at, max(SCAN_BYTES, size_of(head.length))), at
            begin = at - start + HEAD.size
            record = unpack(head, buffer[begin : begin + head.length])
            if record is None:
                return
            yield head, record
            at += size_of(head.length)

    def check_tail(self) -> None:
        """What the power has torn was never durable. A record behind the end that says it was, means that the disk has
        lost it since. Once it is scanned. Raises OSError, LogDamaged."""
        for at in range(self.end, self.file.size, SCAN_BYTES):
            part = self.file.read(at, SCAN_BYTES + HEAD.size)  # a head may lie across the border
            found = part.find(ENTRY)
            while found >= 0:
                head = unpack_head(part[found : found + HEAD.size]) if found % ALIGNMENT == 0 else None
                if head and is_of(head, self.head.chain) and head.synced >= self.next_seq:
                    raise LogDamaged(
                        f"{self.name}: entry {self.next_seq} can't be read, and was durable before {head.seq}"
                    )
                found = part.find(ENTRY, found + 1)

    def salvage(self) -> Iterator[tuple[int, Head, bool]]:
        """(place, head, it follows those before it) of whatever can still be read, also behind what can't. Raises
        OSError."""
        raw, at, chain, is_sure = self._whatever_can_be_read(), HEAD_BYTES, self.head.chain, True
        while 0 <= at < len(raw):
            head = unpack_head(raw[at : at + HEAD.size])
            if head is None or not is_of(head, self.head.chain):
                is_sure, at = False, raw.find(ENTRY, at + ALIGNMENT)
                continue
            is_sure = is_sure and follows(head, chain)
            chain = head.chain
            if head.kind == ENTRY and unpack(head, raw[at + HEAD.size : at + HEAD.size + head.length]):
                yield at, head, is_sure
            elif head.kind == ENTRY:
                is_sure = False
            at += size_of(head.length)

    def _whatever_can_be_read(self) -> bytes:
        """The file, with zeros for what can't."""
        return b"".join(
            self._read_or_zeros(at, min(SALVAGE_BYTES, self.file.size - at))
            for at in range(0, self.file.size, SALVAGE_BYTES)
        )

    def _read_or_zeros(self, at: int, length: int) -> bytes:
        try:
            return self.file.read(at, length)
        except LogDamaged:
            if length <= PAGE_BYTES:
                return bytes(length)
        parts = range(at, at + length, PAGE_BYTES)
        return b"".join(self._read_or_zeros(part, min(PAGE_BYTES, at + length - part)) for part in parts)

    def read(self, seq: int) -> Record:
        """Raises OSError, LogDamaged."""
        at = self.offsets[seq - self.head.first]
        head = unpack_head(self.file.read(at, HEAD.size))
        record = None
        if head and head.seq == seq and is_of(head, self.head.chain):
            record = unpack(head, self.file.read(at + HEAD.size, head.length))
        if record is None:
            raise LogDamaged(f"entry {seq} in {self.name} isn't what was written")
        return record
