"""The volumes of one node: which are online, which has room, which failed."""

import errno
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import structlog

from storage.volume import LocalVolume, NoRoom, Volume, VolumeOffline

log = structlog.get_logger()

LOOK_INTERVAL_S: Final = 0.2


@dataclass
class Slot:
    """A configured volume and how it is."""

    path: Path
    volume: Volume | None
    state: str  # "online", "offline: ...", "failed: ...", "full"
    free_bytes: int = 0
    looked_at: float = float("-inf")


class Volumes:
    def __init__(self, paths: Sequence[Path], reserve_bytes: int) -> None:
        self._reserve_bytes = reserve_bytes
        self.slots: list[Slot] = []
        for path in paths:
            try:
                self.slots.append(Slot(path, LocalVolume(path), "online"))
            except VolumeOffline as error:
                log.error("volume.offline", path=str(path), why="no marker; `tandem volume add` makes a volume")
                self.slots.append(Slot(path, None, f"offline: {error}"))
            except OSError as error:
                log.error("volume.offline", path=str(path), why=os.strerror(error.errno or 0))
                self.slots.append(Slot(path, None, f"failed: {error.strerror}"))
        self._by_id = {slot.volume.id: slot for slot in self.slots if slot.volume}

    def __iter__(self) -> Iterator[Volume]:
        return iter([slot.volume for slot in self.slots if slot.volume])

    def get(self, volume_id: str) -> Volume:
        """Raises LookupError for a volume that isn't there now."""
        slot = self._by_id.get(volume_id)
        if slot is None or slot.volume is None:
            raise LookupError(f"volume {volume_id} is offline")
        return slot.volume

    def choose(self, prefer: str = "") -> Volume:
        """The preferred volume if it has room, else the one with the most; raises NoRoom."""
        best: tuple[int, Volume] | None = None
        for slot in self.slots:
            if slot.volume is None or slot.state.startswith("failed"):
                continue
            try:
                free = self._free(slot) - self._reserve_bytes
            except OSError as error:
                self.failed(slot.volume.id, error)
                continue
            slot.state = "online" if free > 0 else "full"
            if free > 0 and slot.volume.id == prefer:
                return slot.volume
            if free > 0 and (best is None or free > best[0]):
                best = (free, slot.volume)
        if best is None:
            raise NoRoom("no volume is online with room")
        return best[1]

    def _free(self, slot: Slot) -> int:
        """Free bytes, asked of the disk a few times a second at most. Raises OSError."""
        now = time.monotonic()
        if slot.volume is not None and now - slot.looked_at > LOOK_INTERVAL_S:
            slot.free_bytes, slot.looked_at = slot.volume.free_bytes(), now
        return slot.free_bytes

    @property
    def usable(self) -> int:
        """Volumes in service, full ones included."""
        return sum(slot.volume is not None and not slot.state.startswith("failed") for slot in self.slots)

    def free_bytes(self) -> int:
        """Largest room on one volume, 0 if there is none."""
        try:
            volume = self.choose()
            return max(0, volume.free_bytes() - self._reserve_bytes)
        except (NoRoom, OSError):
            return 0

    def failed(self, volume_id: str, error: OSError) -> None:
        """Take a volume out of service, except where it is only full: a failed sync must never be tried again."""
        slot = self._by_id[volume_id]
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            slot.state = "full"
        else:
            slot.state = f"failed: {error.strerror}"
            log.error("volume.failed", volume=volume_id, error=error.strerror)

    def status(self) -> list[dict[str, object]]:
        result = []
        for slot in self.slots:
            row: dict[str, object] = {"path": str(slot.path), "state": slot.state}
            if slot.volume:
                try:
                    row |= {"id": slot.volume.id, "free": slot.volume.free_bytes(), "total": slot.volume.total_bytes()}
                except OSError as error:
                    row["state"] = f"failed: {error.strerror}"
            result.append(row)
        return result
