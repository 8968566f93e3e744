"""The volumes of one node: which are online, which has room, which failed, which is slow or being emptied."""

import errno
import os
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import structlog

from storage.objects.incoming import Incoming
from storage.objects.volume import LocalVolume, NoRoom, Volume, VolumeOffline

log = structlog.get_logger()

LOOK_INTERVAL_S: Final = 0.2
FULL_FOR_S: Final = 10.0  # a disk that refused a write is taken for full that long, whatever it says of itself
SLOW_FOR_S: Final = 600.0  # a disk that was slow is avoided that long

# Errors that say nothing of a disk: a file was moved just now, or this process has run out of something.
NOT_THE_DISK: Final = (errno.ENOENT, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EAGAIN)

OpenVolume = Callable[[Path], Volume]


@dataclass
class Slot:
    """A configured volume and how it is."""

    path: Path
    volume: Volume | None
    state: str  # "online", "offline: ...", "failed: ...", "full", "slow", "draining"
    free_bytes: int = 0
    looked_at: float = float("-inf")
    slow_until: float = float("-inf")
    failed: bool = False  # for good; only another slot takes its place
    why: str = ""

    @property
    def usable(self) -> bool:
        """Its objects can be read and, unless it is full, new ones written."""
        return self.volume is not None and not self.failed


class Volumes:
    def __init__(
        self,
        paths: Sequence[Path],
        reserve_bytes: int,
        *,
        slow_io_s: float = 5.0,
        open_volume: OpenVolume = LocalVolume,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._reserve_bytes, self._slow_io_s = reserve_bytes, slow_io_s
        self._open, self._clock = open_volume, clock
        self.slots: list[Slot] = [self._opened(path) for path in paths]
        self._by_id = {slot.volume.id: slot for slot in self.slots if slot.volume}
        self.on_their_way: weakref.WeakSet[Incoming] = weakref.WeakSet()  # objects not yet named by any entry
        self.on_failed: Callable[[str], None] = lambda volume_id: None

    def _opened(self, path: Path) -> Slot:
        try:
            volume = self._open(path)
            return Slot(path, volume, "draining" if volume.draining else "online")
        except VolumeOffline as error:
            log.error("volume.offline", path=str(path), why="no marker; `tandem volume add` makes a volume")
            return Slot(path, None, f"offline: {error}")
        except OSError as error:
            log.error("volume.offline", path=str(path), why=os.strerror(error.errno or 0))
            return Slot(path, None, f"failed: {error.strerror}")

    def add(self, path: Path) -> Volume:
        """Take a volume into service while running, or one that failed once more. Raises OSError or VolumeOffline."""
        volume = self._open(path)
        volume.check()
        for known in self.slots:
            if known.path == path and known.usable and known.volume:
                if known.volume.id == volume.id:
                    return known.volume
                self.failed(known.volume.id, OSError(errno.ENODEV, "another disk is in its place"))
        if volume.id in self._by_id and self._by_id[volume.id].path != path:
            raise FileExistsError(errno.EEXIST, "this volume is in service under another path")
        slot = Slot(path, volume, "draining" if volume.draining else "online")
        self.slots = [known for known in self.slots if known.path != path] + [slot]
        self._by_id[volume.id] = slot
        return volume

    def retire(self, volume_id: str) -> None:
        """Out of service for good."""
        slot = self._by_id.pop(volume_id)
        self.slots.remove(slot)

    def __iter__(self) -> Iterator[Volume]:
        return iter([slot.volume for slot in self.slots if slot.volume and slot.usable])

    def get(self, volume_id: str) -> Volume:
        """Raises LookupError for a volume that isn't there now."""
        slot = self._by_id.get(volume_id)
        if slot is None or slot.volume is None or not slot.usable:
            raise LookupError(f"volume {volume_id} is offline")
        return slot.volume

    def choose(self, prefer: str = "") -> Volume:
        """The preferred volume if it has room, else the one with the most; a slow one last. Raises NoRoom."""
        best: tuple[bool, int, Volume] | None = None
        for slot in self.slots:
            if slot.volume is None or not slot.usable or slot.volume.draining:
                continue
            try:
                free = self._free(slot) - self._reserve_bytes
            except OSError as error:
                self.failed(slot.volume.id, error)
                continue
            slow = self._clock() < slot.slow_until
            slot.state = "full" if free <= 0 else "slow" if slow else "online"
            if free > 0 and slot.volume.id == prefer and not slow:
                return slot.volume
            if free > 0 and (best is None or (not slow, free) > best[:2]):
                best = (not slow, free, slot.volume)
        if best is None:
            raise NoRoom("no volume is online with room")
        return best[2]

    def _free(self, slot: Slot) -> int:
        """Free bytes, asked of the disk a few times a second at most. Raises OSError."""
        now = self._clock()
        if slot.volume is not None and now - slot.looked_at > LOOK_INTERVAL_S:
            slot.free_bytes, slot.looked_at = slot.volume.free_bytes(), now
        return slot.free_bytes

    @property
    def usable(self) -> int:
        """Volumes in service, full ones included."""
        return sum(slot.usable for slot in self.slots)

    def free_bytes(self) -> int:
        """Largest room on one volume, 0 if there is none."""
        try:
            volume = self.choose()
            return max(0, volume.free_bytes() - self._reserve_bytes)
        except (NoRoom, OSError):
            return 0

    # -- what happened to them; called from any thread -------------------------------------------------------------

    def failed(self, volume_id: str, error: OSError) -> None:
        """Take a volume out of service, except where it is only full: a failed sync must never be tried again."""
        slot = self._by_id.get(volume_id)
        if slot is None or not slot.usable:
            return
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            slot.state, slot.free_bytes, slot.looked_at = "full", 0, self._clock() + FULL_FOR_S
            log.warning("volume.full", volume=volume_id)
            return
        if error.errno in NOT_THE_DISK:
            log.error("volume.error", volume=volume_id, error=error.strerror)
            return
        slot.failed, slot.why = True, f"failed: {error.strerror or error}"
        log.error("volume.failed", volume=volume_id, error=error.strerror or str(error))
        self.on_failed(volume_id)

    def took(self, volume_id: str, seconds: float) -> None:
        """How long the disk took for one object; a slow one is avoided for a while."""
        slot = self._by_id.get(volume_id)
        if slot is not None and seconds > self._slow_io_s:
            log.warning("volume.slow", volume=volume_id, seconds=round(seconds, 1))
            slot.slow_until = self._clock() + SLOW_FOR_S

    def check(self) -> None:
        """Look at each disk as a whole: marker, read-only remount, I/O errors. Takes what failed out of service."""
        for slot in list(self.slots):
            if slot.volume is None:
                self._reopen(slot)
            if slot.volume is None or not slot.usable:
                continue
            try:
                slot.volume.check()
            except VolumeOffline as error:
                cause = error.__cause__
                if not (isinstance(cause, OSError) and cause.errno in NOT_THE_DISK[1:]):
                    self.failed(slot.volume.id, OSError(errno.ENODEV, str(error)))
            except OSError as error:
                if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                    self.failed(slot.volume.id, error)

    def _reopen(self, slot: Slot) -> None:
        """A disk that wasn't there at the start may have been mounted since."""
        try:
            volume = self._open(slot.path)
        except (OSError, VolumeOffline):
            return
        slot.volume, slot.state = volume, "draining" if volume.draining else "online"
        self._by_id[volume.id] = slot
        log.info("volume.back", volume=volume.id)

    def status(self) -> list[dict[str, Any]]:
        result = []
        for slot in self.slots:
            row: dict[str, Any] = {"path": str(slot.path), "state": slot.why or slot.state}
            if slot.volume:
                row["id"] = slot.volume.id
                try:
                    row |= {"free": slot.volume.free_bytes(), "total": slot.volume.total_bytes()}
                except OSError as error:
                    row["state"] = slot.why or f"failed: {error.strerror}"
            result.append(row)
        return result
