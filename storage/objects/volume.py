"""A volume: a directory on one disk, with a marker that says it is ours.

    tandem-volume.json    marker: the volume's UUID; without it the volume is offline, so that an unmounted disk never
                          fills the system disk
    spool/                objects between their first byte and their publication
    archive/              the readable tree, published objects only
    quarantine/           what was refused, replaced, deleted or found damaged, each beside a .json that says why
    deletions.jsonl       what was deleted, on whichever disk it lay: for the day when nothing else knows it any more

All methods block and are called from worker threads. Files are named relative to the volume ("spool/x",
"archive/patient/..."). Durability comes in two steps: `Spooled.finish` makes the bytes durable, `sync_spool` the names
in the spool folder. Publication is a rename that may be lost in a power cut; the log says what to do again.
"""

import errno
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Final, Protocol

from storage.objects.blob_store import BlobStore
from storage.state.model import Location

NO_ROOM: Final = (errno.ENOSPC, errno.EDQUOT)  # a disk is full: no fault of it
MARKER: Final = "tandem-volume.json"
DELETIONS: Final = "deletions.jsonl"
FOLDERS: Final = ("spool", "archive", "quarantine")


class NoRoom(Exception):
    """No volume is online with room for another object."""


class VolumeOffline(Exception):
    """The marker is missing or isn't ours."""


class NotAsked(OSError):
    """A volume wasn't asked to sync: this process lacks what that takes, or has closed it. The disk may be well."""


class Volume(BlobStore, Protocol):
    """A store of objects with a readable tree and a quarantine."""

    path: Path
    draining: bool  # nothing new is put here

    def sync_spool(self) -> None: ...
    def publish(self, spool: str, relative: str) -> set[str]:
        """Move a spooled object to its place in the tree; repeatable. Returns the directories to sync some time."""
        ...

    def sync_directories(self, directories: Iterable[str]) -> None: ...
    def locate(self, location: Location) -> str | None:
        """The file of an object that may or may not have been published."""
        ...

    def amend(self, name: str, at: int, block: bytes, *, sync: bool = False) -> None:
        """Write over bytes of a file, durably if `sync`; nothing is done where they are what they should be."""
        ...

    def note_deletions(self, lines: Sequence[bytes]) -> None:
        """Add lines to those that tell of deletions, durably."""
        ...

    def deletions(self) -> list[bytes]:
        """These lines."""
        ...

    def quarantine(self, name: str, reason: str, detail: dict[str, str]) -> None:
        """Move a file out of the way, with its reason; durable after `sync_quarantine`."""
        ...

    def sync_quarantine(self) -> None: ...
    def spooled(self) -> list[str]: ...
    def archived(self) -> Iterator[str]:
        """Every file of the readable tree, below `archive/`."""
        ...

    def set_draining(self, draining: bool) -> None: ...


def set_aside(volume: Volume, name: str, reason: str, detail: dict[str, str]) -> None:
    """Move one file to quarantine, durably. Raises OSError."""
    volume.quarantine(name, reason, detail)
    volume.sync_quarantine()
