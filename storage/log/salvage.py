"""What a log still says that can't be opened, or isn't this node's any more, and moving it out of the way."""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from storage.log.folder import Folder, LogDamaged
from storage.log.log import SEGMENT
from storage.log.records import HEAD, Record, unpack, unpack_head
from storage.log.segment import HEAD_BYTES, Segment, unpack_segment_head

ASIDE: Final = "aside-"


@dataclass(frozen=True)
class _Place:
    segment: Segment
    at: int
    rank: tuple[bool, int, int]  # of two records with one number the greater counts


class Salvaged:
    """The readable records of the segments whose names begin with `prefix`, by number: of what was cut off, or torn,
    nothing if there is something else in its place."""

    def __init__(self, folder: Folder, prefix: str = "") -> None:
        """Raises OSError."""
        self._places: dict[int, _Place] = {}
        segments, unreadable = _segments(folder, prefix)
        self._segments = segments
        self.lineage = segments[-1].head.lineage if segments else ""
        self.is_whole = not unreadable  # and nothing lies behind what can't be read
        for segment in segments:
            self._take(segment)

    def _take(self, segment: Segment) -> None:
        first = 0 if segment.head.begins else segment.head.first
        for seq in [seq for seq in self._places if seq >= first]:
            del self._places[seq]
        for at, head, is_sure in segment.salvage():
            place = _Place(segment, at, (is_sure, head.epoch, head.synced))
            self.is_whole = self.is_whole and is_sure
            before = self._places.get(head.seq)
            if head.seq >= segment.head.first and (before is None or place.rank > before.rank):
                self._places[head.seq] = place

    def records(self) -> Iterator[Record]:
        """In the order of their numbers. Raises OSError, LogDamaged."""
        for seq in sorted(self._places):
            yield self.read(seq)

    def read(self, seq: int) -> Record:
        """Raises KeyError, OSError, LogDamaged."""
        place = self._places[seq]
        head = unpack_head(place.segment.file.read(place.at, HEAD.size))
        record = unpack(head, place.segment.file.read(place.at + HEAD.size, head.length)) if head else None
        if record is None:
            raise LogDamaged(f"entry {seq} in {place.segment.name} has changed meanwhile")
        return record

    def close(self) -> None:
        for segment in self._segments:
            segment.file.close()


def lineage_of(folder: Folder) -> str:
    """Of the log whose segments are there, "" if there is none. Raises OSError."""
    segments, _ = _segments(folder, "")
    for segment in segments:
        segment.file.close()
    return segments[-1].head.lineage if segments else ""


def _segments(folder: Folder, prefix: str) -> tuple[list[Segment], int]:
    """Those whose heads can be read, in order, and how many the disk doesn't give."""
    found, unreadable = [], 0
    for name in folder.names():
        if name.startswith(prefix) and name.endswith(SEGMENT) and "-" not in name[len(prefix) :]:
            file = folder.open(name)
            try:
                head = unpack_segment_head(file.read(0, HEAD_BYTES))
            except LogDamaged:
                head, unreadable = None, unreadable + 1
            if head is None:
                file.close()
            else:
                found.append(Segment(name, file, head))
    return sorted(found, key=lambda segment: segment.head.number), unreadable


def set_aside(folder: Folder) -> str:
    """Keep the segments under other names, so that another log can begin; returns what these begin with, "" if there
    are none. Raises OSError."""
    prefix = f"{ASIDE}{time.strftime('%Y%m%dT%H%M%S')}-"
    names = [name for name in folder.names() if name.endswith(SEGMENT) and not name.startswith(ASIDE)]
    while any(name.startswith(prefix) for name in folder.names()):
        prefix = f"{prefix[:-1]}x-"
    for name in names:
        folder.rename(name, prefix + name)
    folder.sync()
    return prefix if names else ""


def set_aside_before(folder: Folder) -> list[str]:
    """What the names of earlier logs begin with, the oldest first. Raises OSError."""
    return sorted({name[: name.rindex("-") + 1] for name in folder.names() if name.startswith(ASIDE)})
