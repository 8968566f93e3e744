"""The volumes of one node: which are online, which has room, which failed, which is slow or being emptied."""

import errno
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import structlog

from conf.telling import reason_of
from storage.objects.incoming import Incoming
from storage.objects.local_volume import LocalVolume
from storage.objects.locks import InUse
from storage.objects.placement import LiesOn, Studies, least_loaded
from storage.objects.volume import NO_ROOM, NoRoom, Volume, VolumeOffline

log = structlog.get_logger()

LOOK_INTERVAL_S: Final = 0.4
FULL_FOR_S: Final = 10.0  # a disk that refused a write is taken for full that long, whatever it says of itself
SLOW_FOR_S: Final = 600.0  # a disk that was slow is avoided that long

# Errors that say nothing of a disk: a file was moved just now, or this process has run out of something.
NOT_THE_DISK: Final = (errno.ENOENT, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EAGAIN)
NOT_ALLOWED: Final = (errno.EACCES, errno.EPERM)  # of one folder perhaps; whether of the whole disk the next look says

OpenVolume = Callable[[Path], Volume]


class TwoOfOne(OSError):
    """Two folders with the marker of one volume: a disk that was cloned, or listed twice."""

    def __init__(self, first: Path, second: Path) -> None:
        why = f"{first} and {second} are the same volume, or one is a clone of the other; list only one"
        super().__init__(errno.EEXIST, why)


@dataclass
class Slot:
    """A configured volume and how it is."""

    path: Path
    volume: Volume | None
    state: str  # "online", "offline: ...", "failed: ...", "full", "slow", "draining"
    free_bytes: int = 0
    total_bytes: int = 0
    looked_at: float = float("-inf")
    slow_until: float = float("-inf")
    failed: bool = False  # for good; only another slot takes its place
    hung: bool = False  # it doesn't answer; it may again
    away: bool = False  # its marker isn't there, unmounted perhaps; it may come back
    since: float = 0.0  # it is hung or away
    why: str = ""

    @property
    def usable(self) -> bool:
        """Its objects can be read and, unless it is full, new ones written."""
        return self.volume is not None and not (self.failed or self.hung or self.away)


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
        self._studies = Studies(clock)
        self._placing = threading.Lock()
        self._by_id: dict[str, Slot] = {}
        for slot in self.slots:
            if slot.volume and (twin := self._by_id.setdefault(slot.volume.id, slot)) is not slot:
                raise TwoOfOne(twin.path, slot.path)
        self.on_sync: Callable[[float], object] = lambda seconds: None  # in the thread that has synced an object
        self.on_their_way: weakref.WeakSet[Incoming] = weakref.WeakSet()  # objects not yet named by any entry
        self.on_failed: Callable[[str], None] = lambda volume_id: None
        self.on_out: Callable[[str], None] = lambda volume_id: None  # hung or away: it may come back

    def _opened(self, path: Path) -> Slot:
        try:
            volume = self._open(path)
            free, total = volume.free_bytes(), volume.total_bytes()
            return Slot(path, volume, "draining" if volume.draining else "online", free, total)
        except InUse:
            raise
        except VolumeOffline as error:
            log.error("volume.offline", path=str(path), why="no marker; `tandem volume add` makes a volume")
            return Slot(path, None, f"offline: {error}")
        except OSError as error:
            log.error("volume.offline", path=str(path), why=os.strerror(error.errno or 0))
            return Slot(path, None, f"failed: {error.strerror}")

    def add(self, path: Path) -> Volume:
        """Take a volume into service while running, or one that failed once more. Raises OSError or VolumeOffline."""
        for known in self.slots:
            if known.path == path and known.volume:
                if known.usable and self._still_there(known):
                    return known.volume
                known.volume.close()
        volume = self._open(path)
        volume.check()
        twin = self._by_id.get(volume.id)
        if twin is not None and twin.path != path and twin.usable:
            volume.close()
            raise TwoOfOne(twin.path, path)
        slot = Slot(path, volume, "draining" if volume.draining else "online")
        slot.free_bytes, slot.total_bytes = volume.free_bytes(), volume.total_bytes()
        self._by_id[volume.id] = slot
        self.slots = [known for known in self.slots if known.path != path] + [slot]
        return volume

    def _still_there(self, slot: Slot) -> bool:
        try:
            if slot.volume:
                slot.volume.check()
        except (OSError, VolumeOffline):
            self.failed(slot.volume.id if slot.volume else "", OSError(errno.ENODEV, "another disk is in its place"))
            return False
        return True

    def retire(self, volume_id: str) -> None:
        """Out of service for good."""
        slot = self._by_id.pop(volume_id)
        self.slots.remove(slot)
        if slot.volume:
            slot.volume.close()

    def close(self) -> None:
        """Leave all of them to others."""
        for slot in self.slots:
            if slot.volume:
                slot.volume.close()

    def __iter__(self) -> Iterator[Volume]:
        return iter([slot.volume for slot in self.slots if slot.volume and slot.usable])

    def get(self, volume_id: str) -> Volume:
        """Raises LookupError for a volume that isn't there now."""
        slot = self._by_id.get(volume_id)
        if slot is None or slot.volume is None or not slot.usable:
            raise LookupError(f"volume {volume_id} is offline")
        return slot.volume

    def choose(self, prefer: str = "", avoid: str = "") -> Volume:
        """The preferred volume if it has room, else the one with least to do for its room, but for `avoid`; a slow one
        last. Raises NoRoom."""
        fast, slow, found = dict[str, int](), dict[str, int](), dict[str, Volume]()  # volume -> free bytes
        for slot in self.slots:
            if slot.volume is None or not slot.usable or slot.volume.draining or slot.volume.id == avoid:
                continue
            free = slot.free_bytes - self._reserve_bytes
            is_slow = self._clock() < slot.slow_until
            slot.state = "full" if free <= 0 else "slow" if is_slow else "online"
            if free > 0:
                (slow if is_slow else fast)[slot.volume.id] = free
                found[slot.volume.id] = slot.volume
        if not (fast or slow):
            raise NoRoom("no volume is online with room")
        usable = fast or slow
        return found[prefer if prefer in usable else least_loaded(usable, self._studies.active())]

    def knows(self, study: str) -> bool:
        """`place` needn't ask the catalogue for this study."""
        return self._studies.is_looked_up(study)

    def place(self, study: str, lies_on: LiesOn | None = None) -> Volume:
        """The volume for an object of a study; `lies_on` as in `Studies`. Raises NoRoom."""
        before = self._studies.known(study)
        found = self._studies.volume_of(study, lies_on)
        with self._placing:
            now = self._studies.known(study)
            volume = self.choose(found if now == before else now)  # another thread may have decided meanwhile
            self._studies.note(study, volume.id, looked_up=lies_on is not None)
        return volume

    def serves(self, volume_id: str) -> bool:
        """It is in service, full perhaps."""
        slot = self._by_id.get(volume_id)
        return slot is not None and slot.usable

    def has_failed(self, volume_id: str) -> bool:
        """It is out of service for good, or unknown."""
        slot = self._by_id.get(volume_id)
        return slot is None or slot.failed

    @property
    def usable(self) -> int:
        """Volumes in service, full ones included."""
        return sum(slot.usable for slot in self.slots)

    def free_bytes(self) -> int:
        """Largest room on one volume, 0 if there is none."""
        return max(0, *(slot.free_bytes - self._reserve_bytes for slot in self.slots if slot.usable), 0)

    # -- what happened to them; called from any thread -------------------------------------------------------------

    def failed(self, volume_id: str, error: OSError) -> None:
        """Take a volume out of service, except where it is only full: a failed sync must never be tried again."""
        slot = self._by_id.get(volume_id)
        if slot is None or slot.volume is None or slot.failed:
            return
        if error.errno in NO_ROOM:
            slot.state, slot.free_bytes, slot.looked_at = "full", 0, self._clock() + FULL_FOR_S
            log.warning("volume.full", volume=volume_id)
            return
        if error.errno in NOT_THE_DISK or error.errno in NOT_ALLOWED:
            log.error("volume.error", volume=volume_id, error=reason_of(error))
            return
        self._fails(slot, slot.volume, error)

    def _fails(self, slot: Slot, volume: Volume, error: OSError) -> None:
        slot.failed, slot.why = True, f"failed: {error.strerror or error}"
        slot.hung = slot.away = False
        volume.close()  # so that it can be unmounted
        log.error("volume.failed", volume=volume.id, error=reason_of(error))
        self.on_failed(volume.id)

    def hangs(self, volume_id: str) -> None:
        """A disk that doesn't answer counts as one that fails, but for coming back by itself when it answers again."""
        slot = self._by_id.get(volume_id)
        if slot is not None and slot.usable:
            slot.hung, slot.since, slot.why = True, self._clock(), "hung: it doesn't answer"
            log.error("volume.hangs", volume=volume_id)
            self.on_out(volume_id)

    def _is_away(self, slot: Slot, why: str) -> None:
        if slot.usable and slot.volume:
            slot.away, slot.since, slot.why = True, self._clock(), f"offline: {why}"
            log.error("volume.away", volume=slot.volume.id)
            self.on_out(slot.volume.id)

    def _answers(self, slot: Slot) -> None:
        """What was hung or away is there again."""
        if (slot.hung or slot.away) and not slot.failed:
            slot.hung = slot.away = False
            slot.why = ""
            log.info("volume.back", volume=slot.volume.id if slot.volume else "")

    def out(self) -> dict[str, float]:
        """Volumes that are hung or away, and since when."""
        return {slot.volume.id: slot.since for slot in self.slots if slot.volume and (slot.hung or slot.away)}

    def give_up(self, volume_id: str) -> None:
        """What has been out of service for too long isn't waited for any more."""
        slot = self._by_id.get(volume_id)
        if slot is not None and not slot.failed:
            slot.hung = slot.away = False
            self.failed(volume_id, OSError(errno.ETIMEDOUT, slot.why or "it was out of service for too long"))

    def took(self, volume_id: str, seconds: float) -> None:
        """How long the disk took for one object; a slow one is avoided for a while."""
        self.on_sync(seconds)
        slot = self._by_id.get(volume_id)
        if slot is not None and seconds > self._slow_io_s:
            log.warning("volume.slow", volume=volume_id, seconds=round(seconds, 1))
            slot.slow_until = self._clock() + SLOW_FOR_S

    def to_check(self) -> list[Slot]:
        """Each of them is to be looked at by `check_one`, in a thread: one that hangs holds up none of the others."""
        return list(self.slots)

    def check_one(self, slot: Slot) -> None:
        """Look at one disk as a whole: marker, read-only remount, I/O errors. Takes what failed out of service."""
        if slot.volume is None:
            self._reopen(slot)
        if slot.volume is None or slot.failed:
            return
        try:
            slot.volume.check()
        except VolumeOffline as error:
            cause = error.__cause__
            if isinstance(cause, OSError) and cause.errno in NOT_THE_DISK[1:]:
                return
            if isinstance(cause, FileNotFoundError):
                self._is_away(slot, "its marker isn't there; is it mounted?")
            else:
                self.failed(slot.volume.id, OSError(errno.ENODEV, "another disk is in its place, or it can't be read"))
        except OSError as error:
            if error.errno in NOT_ALLOWED:
                self._fails(slot, slot.volume, error)
            elif error.errno not in NO_ROOM:
                slot.hung = slot.away = False
                self.failed(slot.volume.id, error)
        else:
            self._answers(slot)

    def _reopen(self, slot: Slot) -> None:
        """A disk that wasn't there at the start may have been mounted since."""
        try:
            volume = self._open(slot.path)
        except (OSError, VolumeOffline):
            return
        if volume.id in self._by_id and self._by_id[volume.id] is not slot:
            volume.close()
            return  # a clone of one that is in service
        slot.volume, slot.state, slot.why = volume, "draining" if volume.draining else "online", ""
        self._by_id[volume.id] = slot
        log.info("volume.back", volume=volume.id)

    def status(self) -> list[dict[str, Any]]:
        result = []
        for slot in self.slots:
            row: dict[str, Any] = {"path": str(slot.path), "state": slot.why or slot.state}
            if slot.volume:
                row |= {"id": slot.volume.id, "free": slot.free_bytes, "total": slot.total_bytes}
            result.append(row)
        return result

    def measure(self, slot: Slot) -> None:
        """Ask a disk how much room it has. Blocks; everybody else goes by what was found then."""
        now = self._clock()
        if slot.volume is not None and slot.usable and now >= slot.looked_at:
            slot.looked_at = now + LOOK_INTERVAL_S
            try:
                slot.free_bytes, slot.total_bytes = slot.volume.free_bytes(), slot.volume.total_bytes()
            except OSError as error:
                self.failed(slot.volume.id, error)
