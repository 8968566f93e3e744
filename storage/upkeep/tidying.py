"""Moves files out of the way that the catalogue no longer names: replaced, deleted, damaged, diverged, moved.

Each disk is asked by itself and within bounds: one that hangs is passed over until it has answered.
"""

import asyncio
import contextlib
from collections.abc import Callable
from typing import Any, Final, TypeVar

import structlog

from storage import crash
from storage.files.local import name_of
from storage.journal import Journal
from storage.objects.describing import said_in_spool
from storage.objects.volume import Volume, set_aside
from storage.objects.volumes import Volumes
from storage.state.catalogue import Catalogue
from storage.state.description import Description
from storage.state.model import Leaving
from storage.workers import Threads, within

log = structlog.get_logger()

T = TypeVar("T")

BATCH: Final = 1000
POLL_S: Final = 0.5
SWEEP_S: Final = 20.0


class Tidying:
    def __init__(
        self,
        catalogue: Catalogue,
        volumes: Volumes,
        journal: Journal,
        workers: Threads,
        in_use: Callable[[], set[str]],
        clock: Callable[[], float],
        hang_s: float,
    ) -> None:
        """`in_use()`: spool files of entries that are on their way."""
        self._catalogue, self._volumes, self._journal, self._workers = catalogue, volumes, journal, workers
        self._in_use, self._clock, self._hang_s = in_use, clock, hang_s
        self._held: dict[str, asyncio.Future[Any]] = {}  # volume -> a job that took too long
        self._swept_at = clock()
        self._left: set[str] = set()
        self._present: set[str] = set()

    async def run(self) -> None:
        while True:
            await self.tidy()
            if self._clock() - self._swept_at > SWEEP_S:
                await self.sweep()
                self._swept_at = self._clock()
            await asyncio.sleep(POLL_S)

    async def sweep(self) -> None:
        """Set aside what lies in a spool folder since the last sweep and belongs to nobody: its sender went away, or
        its entry was given up when the primary changed."""
        present: set[str] = set()
        for volume in list(self._volumes):
            found = await self._on(volume.id, self._spooled, volume)
            present |= _of(volume.id, self._present) if found is None else found
        # Under load there is always something in the spool; only what stays there is worth looking for.
        in_use = self._in_use()
        stayed = {key for key in present & self._present if key.partition("/")[2] not in in_use}
        self._present = present
        said: dict[str, Description | None] = {}
        for volume in list(self._volumes):
            said |= await self._on(volume.id, self._said, volume, _of(volume.id, stayed)) or {}
        named = await self._workers.run(self._catalogue.named, said) if said else {}
        unpublished = [location for location in named.values() if location and location.path]
        for location in unpublished:
            try:
                await self._journal.publish_again(location)
            except OSError as error:
                log.warning("publish.again_failed", volume=location.volume, error=error.strerror)
        in_use = self._in_use()
        forgotten = {key for key in said.keys() - named.keys() if key.partition("/")[2] not in in_use}
        gone = forgotten & self._left
        for volume_id in sorted({key.partition("/")[0] for key in gone}):
            await self._on(volume_id, self._set_aside, _of(volume_id, gone))
        self._left = forgotten - gone

    async def _on(self, volume_id: str, function: Callable[..., T], *args: Any) -> T | None:
        """What a job on one disk gives; None while that doesn't answer. The job goes on then."""
        before = self._held.get(volume_id)
        if before is not None and not before.done():
            return None
        job = self._workers.run(function, *args)
        try:
            return await within(job, self._hang_s)
        except OSError as error:
            self._held[volume_id] = job
            log.warning("tidying.held_up", volume=volume_id, error=error.strerror)
            return None

    def _spooled(self, volume: Volume) -> set[str]:
        """volume/name of what lies in a spool folder. Blocks."""
        try:
            return {f"{volume.id}/{name}" for name in volume.spooled()}
        except OSError as error:
            self._volumes.failed(volume.id, error)
            return set()

    def _said(self, volume: Volume, keys: set[str]) -> dict[str, Description | None]:
        """What files of a spool folder say that they are. Blocks."""
        try:
            return said_in_spool(volume, (key.partition("/")[2] for key in keys))
        except OSError as error:
            self._volumes.failed(volume.id, error)
            return {}

    def _set_aside(self, keys: set[str]) -> None:
        for key in sorted(keys):
            volume_id, _, name = key.partition("/")
            try:
                set_aside(self._volumes.get(volume_id), f"spool/{name}", "given up: no entry names it", {})
            except (OSError, LookupError) as error:
                log.warning("sweep.failed", volume=volume_id, error=type(error).__name__)

    async def tidy(self) -> None:
        """One round. A power cut in between repeats it."""
        done = []
        for volume in list(self._volumes):  # those of a disk that is away wait without holding up the others
            leavings = await self._workers.run(self._catalogue.leavings, BATCH, volume.id)
            if leavings:
                done += await self._on(volume.id, self._move_away, leavings) or []
        if done:
            await self._journal.forget_leavings(done)
        await self._remove_bytes()

    async def _remove_bytes(self) -> None:
        """Those of the share's files that are no more; once all disks are there, as any of them may have some."""
        gone = await self._workers.run(self._catalogue.files_gone, BATCH)
        volumes = list(self._volumes)
        if not gone or len(volumes) < len(self._volumes.slots):
            return
        space = await self._workers.run(self._catalogue.files_space)
        removed = [await self._on(volume.id, self._remove, volume, space, gone) for volume in volumes]
        if all(removed):
            await self._journal.forget_bytes(list(gone))

    def _remove(self, volume: Volume, space: str, gone: dict[int, list[str]]) -> bool:
        names = [name_of(space, number, copy) for number, copies in gone.items() for copy in copies]
        try:
            for name in names:
                volume.remove(name)
            for folder in {name.rpartition("/")[0] for name in names}:
                with contextlib.suppress(FileNotFoundError):  # none of them ever lay on this volume
                    volume.sync_directories([folder])
        except OSError as error:
            self._volumes.failed(volume.id, error)
            return False
        return True

    def _move_away(self, leavings: list[tuple[str, Leaving]]) -> list[str]:
        done, touched = [], set()
        for key, leaving in leavings:
            try:
                volume = self._volumes.get(leaving.location.volume)
            except LookupError:
                continue  # until the disk is back
            try:
                name = volume.locate(leaving.location)
                if name and leaving.keep:
                    volume.quarantine(name, leaving.reason, {"sop_instance": leaving.sop_instance})
                elif name:
                    volume.remove(name)
            except FileNotFoundError:
                continue  # moved just now; the next round finds it
            except OSError as error:
                log.error("leaving.failed", volume=volume.id, error=error.strerror)
                self._volumes.failed(volume.id, error)
                continue
            touched.add(volume)
            done.append(key)
        crash.point("leaving.after_move")
        for volume in touched:
            try:
                volume.sync_quarantine()
            except OSError as error:  # with the disk goes what was to be moved on it
                self._volumes.failed(volume.id, error)
        return done


def _of(volume_id: str, keys: set[str]) -> set[str]:
    """Those of one volume."""
    return {key for key in keys if key.startswith(f"{volume_id}/")}
