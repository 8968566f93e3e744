"""The log of one node: entries by number, in segment files, durable with one sync however many are appended at once.

A segment is a file of fixed size whose blocks are there before it is used, so a sync writes data and nothing else. When
it is full, or when the log is cut off behind an entry, the next one begins: its head says from which number on it
counts. What isn't needed any more goes segment by segment, and the files are used again.

One thread appends, cuts off and trims. Others may read, and make spare files (`prepare`, `release`).
"""

import os
import threading
from collections.abc import Iterable, Iterator, Sequence
from typing import Final

import structlog

from storage.log.folder import File, Folder, LogDamaged
from storage.log.records import HEAD, MARK, PAYLOAD_BYTES_MAX, Bytes, Record, pack, size_of, unpack_head
from storage.log.segment import EPOCHS_MAX, HEAD_BYTES, Segment, SegmentHead, pack_head, unpack_segment_head

log = structlog.get_logger()

SEGMENT_BYTES: Final = 64 << 20
SPARES: Final = 2
FILES: Final = 8
SEGMENT, SPARE = ".log", "spare-"
SECTOR_BYTES: Final = 512  # written by a disk as a whole or not at all
MARK_PAYLOAD_BYTES: Final = 16
MARK_BYTES: Final = size_of(MARK_PAYLOAD_BYTES)


class Broken(Exception):
    """A write or a sync has failed: what is on the disk isn't known, and nothing is appended until the log was opened
    anew."""


class Log:
    """`last` is (epoch, seq) of the last entry, `first` the oldest seq that is kept; `lineage` is "" for none yet."""

    def __init__(
        self, folder: Folder, segment_bytes: int = SEGMENT_BYTES, spares: int = SPARES, files: int = FILES
    ) -> None:
        """Opens what is there: a torn tail is cut off. `spares` files are made before they are needed, and up to
        `files` of both kinds are used again. Raises OSError, LogDamaged."""
        self._folder, self._segment_bytes, self._spares_wanted, self._files = folder, segment_bytes, spares, files
        self._gate = threading.Lock()  # of the lists, not of the disk
        self._segments: list[Segment] = []
        self._spares: list[str] = []
        self._number = 0  # the greatest that a segment has
        self._broken = False
        self._marked = False  # what a power cut left behind the tail can't follow what is appended
        try:
            self._find()
        except BaseException:
            self.close()
            raise

    # -- opening -----------------------------------------------------------------------------------------------

    def _find(self) -> None:
        found: dict[int, Segment] = {}
        unreadable: dict[int, tuple[str, int, bytes]] = {}  # number -> name, size, and how the file begins
        for name in self._folder.names():
            number = _number(name)
            if number is None and not name.startswith(SPARE):
                continue
            file = self._folder.open(name)
            try:
                raw = file.read(0, HEAD_BYTES + HEAD.size)
            except LogDamaged:
                file.close()
                if number is not None:
                    raise
                self._folder.remove(name)  # nothing is in it
                continue
            head = unpack_segment_head(raw)
            if number is not None and head is not None and head.number == number:
                found[number] = Segment(name, file, head)
                self._segments = list(found.values())  # to be closed, whatever is found
            else:
                file.close()
                if number is None:
                    self._keep_or_remove(name, file.size)
                else:
                    unreadable[number] = (name, file.size, raw)
        newest = max(found, default=0)
        for number, (name, size, raw) in unreadable.items():
            blank = not any(raw[:SECTOR_BYTES])  # never used, or wiped when it was trimmed
            followed = unpack_head(raw[HEAD_BYTES:]) is not None  # by an entry: it isn't one that the power has torn
            if not blank and (number < newest or followed):
                raise LogDamaged(f"{name}: its head can't be read")
            self._keep_or_remove(name, size)
        kept: list[Segment] = []
        at = newest
        while at in found:
            segment = found.pop(at)
            kept.append(segment)
            at = 0 if segment.head.begins else at - 1
        for segment in found.values():  # trimmed, or of a log that was begun anew; the rename was undone
            segment.file.close()
            self._keep_or_remove(segment.name, segment.file.size)
        self._segments = kept[::-1]
        if self._segments:
            last = self._segments[-1]
            self._number = last.head.number
            last.scan()
            last.check_tail()
            # What a kill or an error left unsynced was read from memory: it counts once it is on the disk.
            last.file.write(0, [last.file.read(0, last.end)])
            last.file.sync()
            self._folder.sync()

    def _keep_or_remove(self, name: str, size: int) -> None:
        """A file of no use now; one of another size was being made when the power went, or by other settings."""
        if size == self._segment_bytes and len(self._spares) < self._files:
            file = self._folder.open(name)
            _wipe(file)
            file.close()
            spare = _spare_name()
            self._folder.rename(name, spare)
            self._spares.append(spare)
        else:
            self._folder.remove(name)

    def close(self) -> None:
        for segment in self._segments:
            segment.file.close()
        self._segments = []

    # -- what is there -----------------------------------------------------------------------------------------

    @property
    def lineage(self) -> str:
        segments = self._segments
        return segments[-1].head.lineage if segments else ""

    @property
    def last(self) -> tuple[int, int]:
        """(0, 0) for an empty log."""
        epochs = self.epochs
        return epochs[-1] if epochs else (0, 0)

    @property
    def first(self) -> int:
        """The oldest entry that is kept; one more than the last if there is none."""
        segments = self._segments
        return segments[0].head.first if segments else 1

    @property
    def epochs(self) -> tuple[tuple[int, int], ...]:
        """(epoch, its last seq), in order; the oldest may have been forgotten."""
        segments = self._segments
        return tuple(segments[-1].epochs) if segments else ()

    def read(self, seq: int) -> Record:
        """Raises KeyError for one that isn't kept, OSError, LogDamaged."""
        with self._gate:
            segments = list(self._segments)
            if not (segments and segments[0].head.first <= seq <= self.last[1]):
                raise KeyError(seq)
        segment = next(one for one in reversed(segments) if one.head.first <= seq)
        try:
            if not segment.scanned:
                self._scan(segment)
            if seq >= segment.next_seq:
                raise LogDamaged(f"{segment.name} ends at entry {segment.next_seq - 1}, and {seq} was written to it")
            return segment.read(seq)
        except (OSError, LogDamaged):
            if seq < self.first:
                raise KeyError(seq) from None  # trimmed at this moment
            raise

    def records(self, start: int, end: int | None = None) -> Iterator[Record]:
        """From `start` to `end`, both included. Raises as `read`."""
        for seq in range(start, (self.last[1] if end is None else end) + 1):
            yield self.read(seq)

    def _scan(self, segment: Segment) -> None:
        """Two threads that come at once do it twice, each on its own."""
        found = Segment(segment.name, segment.file, segment.head)
        found.scan()
        segment.offsets, segment.end, segment.chain, segment.epochs = (
            found.offsets,
            found.end,
            found.chain,
            found.epochs,
        )
        segment.scanned = True

    # -- writing -----------------------------------------------------------------------------------------------

    def begin(self, lineage: str, epochs: Sequence[tuple[int, int]] = ()) -> None:
        """Begin a log, or begin it anew behind what `epochs` tells of; nothing that was kept counts any more. Raises
        OSError."""
        self._whole()
        first = (epochs[-1][1] if epochs else 0) + 1
        before = self._segments
        self._roll(lineage, first, tuple(epochs), begins=True)
        self.release(before)

    def append(self, records: Iterable[Record]) -> None:
        """Make entries durable. Raises ValueError for what isn't the next one and OSError (ENOSPC) without room:
        none of them counts then, and the log goes on. Any other OSError: which of them count is known once the log was
        opened anew; until then it raises Broken."""
        self._whole()
        records = list(records)
        self._check(records)
        self._make_room(records)
        try:
            self._write(records)
        except OSError:
            self._broken = True
            raise

    def _check(self, records: Sequence[Record]) -> None:
        epoch, seq = self.last
        if not self._segments:
            raise ValueError("the log isn't begun")
        for record in records:
            if record.seq != seq + 1 or record.epoch < epoch or record.length > PAYLOAD_BYTES_MAX:
                raise ValueError(f"({record.epoch}, {record.seq}) doesn't follow ({epoch}, {seq}), or is too long")
            epoch, seq = record.epoch, record.seq

    def _make_room(self, records: Sequence[Record]) -> None:
        """As many spare files as these entries need: a full disk is noticed before anything is written."""
        wanted, left = 0, self._segments[-1].file.size - self._segments[-1].end
        left -= 0 if self._marked else MARK_BYTES
        for record in records:
            size = size_of(record.length)
            if size > left:
                wanted, left = wanted + 1, self._segment_bytes - HEAD_BYTES
            if size > left:
                raise ValueError("an entry is longer than a segment")
            left -= size
        while len(self._spares) < wanted:
            self._make_spare()

    def _write(self, records: Sequence[Record]) -> None:
        segment, synced = self._segments[-1], self.last[1]
        self._mark(segment)
        out, noted, chain, at = list[Bytes](), list[tuple[Record, bytes]](), segment.chain, segment.end
        for record in records:
            if at + size_of(record.length) > segment.file.size:
                self._flush(segment, out, noted)
                segment = self._roll(segment.head.lineage, record.seq, tuple(segment.epochs))
                out, noted, chain, at = [], [], segment.chain, segment.end
            packed, chain = pack(record, chain, segment.head.chain, synced=synced)
            out += packed
            noted.append((record, chain))
            at += size_of(record.length)
        self._flush(segment, out, noted)

    def _mark(self, segment: Segment) -> None:
        """Once after the log was opened: what was being written when the power went stays behind, even if what comes
        now begins with the same entries."""
        if self._marked:
            return
        epoch, seq = self.last
        mark = Record(epoch, seq, os.urandom(MARK_PAYLOAD_BYTES))
        packed, chain = pack(mark, segment.chain, segment.head.chain, kind=MARK)
        if segment.end + MARK_BYTES <= segment.file.size:
            segment.file.write(segment.end, packed)
            segment.note_mark(mark.length, chain)
        self._marked = True  # without room for it the next segment begins, with a chain of its own

    def _flush(self, segment: Segment, out: Sequence[Bytes], noted: Sequence[tuple[Record, bytes]]) -> None:
        if not noted:
            return
        segment.file.write(segment.end, out)
        segment.file.sync()
        with self._gate:
            for record, chain in noted:
                segment.note(record, chain)

    def _roll(self, lineage: str, first: int, epochs: tuple[tuple[int, int], ...], *, begins: bool = False) -> Segment:
        """The next segment; what was written to the one before is durable. Raises OSError."""
        if not self._spares:
            self._make_spare()
        with self._gate:
            spare = self._spares.pop()
            number = self._number + 1
        name = f"{number:016x}{SEGMENT}"
        try:
            self._folder.rename(spare, name)
            self._folder.sync()  # before anything in it counts
            file = self._folder.open(name)
            head = SegmentHead(lineage, number, first, begins, os.urandom(16), epochs[-EPOCHS_MAX:])
            file.write(0, [pack_head(head)])
            file.sync()
        except OSError:
            self._broken = True
            raise
        segment = Segment(name, file, head)
        segment.scanned = self._marked = True
        with self._gate:
            self._number = number
            self._segments = [segment] if begins else [*self._segments, segment]
        return segment

    def cut(self, after: int) -> None:
        """Forget all entries behind `after`, durably; what the log has forgotten before that stays so. Raises OSError,
        Broken."""
        self._whole()
        if after >= self.last[1]:
            return
        epochs = tuple((epoch, min(last, after)) for epoch, last in self._epochs_upto(after))
        if after < self.first - 1:
            self.begin(self.lineage, epochs)
            return
        self._roll(self.lineage, after + 1, epochs)

    def _epochs_upto(self, after: int) -> Iterator[tuple[int, int]]:
        start = 0
        for epoch, last in self.epochs:
            if start < after:
                yield epoch, last
            start = last

    def _whole(self) -> None:
        if self._broken:
            raise Broken("a write to the log failed")

    # -- room --------------------------------------------------------------------------------------------------

    def trim(self, upto: int) -> int:
        """Forget whole segments in which nothing behind `upto` counts; returns how many. Raises OSError."""
        gone = self.detach(upto)
        self.release(gone)
        return len(gone)

    def detach(self, upto: int) -> list[Segment]:
        """Forget them, and leave it to `release` to have their files used again. Raises Broken."""
        self._whole()
        with self._gate:
            count = 0
            while count + 1 < len(self._segments) and self._segments[count + 1].head.first - 1 <= upto:
                count += 1
            gone, self._segments = self._segments[:count], self._segments[count:]
        return gone

    def release(self, gone: Sequence[Segment]) -> None:
        """Their files are used again, or go; any thread may do it. If a power cut undoes the rename of one it is found
        to be of no use: what is kept begins behind it. Raises OSError."""
        for segment in gone:
            _wipe(segment.file)
            segment.file.close()
            with self._gate:
                kept = len(self._segments) + len(self._spares)
                spare = _spare_name() if kept < self._files and segment.file.size == self._segment_bytes else ""
            if spare:
                self._folder.rename(segment.name, spare)
                with self._gate:
                    self._spares.append(spare)
            else:
                self._folder.remove(segment.name)

    @property
    def broken(self) -> bool:
        """A write or a sync has failed: it must be opened anew."""
        return self._broken

    @property
    def segment_bytes(self) -> int:
        return self._segment_bytes

    @property
    def wants_spares(self) -> bool:
        """`prepare` would make some."""
        return len(self._spares) < self._spares_wanted

    def prepare(self) -> None:
        """Make spare files for what comes, off the path of those who wait. Raises OSError."""
        while len(self._spares) < self._spares_wanted:
            self._make_spare()

    def _make_spare(self) -> None:
        name = _spare_name()
        self._folder.create(name, self._segment_bytes).close()
        with self._gate:
            self._spares.append(name)

    @property
    def used(self) -> float:
        """Share of the files that hold entries; above 1 the log is larger than it should be."""
        return len(self._segments) / self._files

    @property
    def bytes_kept(self) -> int:
        """On the disk, spare files included."""
        with self._gate:
            return (len(self._segments) + len(self._spares)) * self._segment_bytes


def _wipe(file: File) -> None:
    """What isn't needed any more is neither a segment any more, nor one whose head was damaged. Raises OSError."""
    file.write(0, [bytes(SECTOR_BYTES)])
    file.sync()
    file.write(SECTOR_BYTES, [bytes(HEAD_BYTES - SECTOR_BYTES + HEAD.size)])
    file.sync()


def _spare_name() -> str:
    return SPARE + os.urandom(8).hex()


def _number(name: str) -> int | None:
    if not name.endswith(SEGMENT):
        return None
    try:
        return int(name.removesuffix(SEGMENT), 16)
    except ValueError:
        return None
