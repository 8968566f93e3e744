"""Checkpoints: the volumes are made durable up to an entry, that is recorded, and the log forgets what came before."""

import asyncio
import errno
from collections.abc import Awaitable, Callable
from itertools import takewhile
from typing import Any, Final, Protocol

import structlog

from conf.telling import reason_of
from storage.log.log import Log
from storage.objects.volume import NotAsked, Volume
from storage.objects.volumes import Volumes
from storage.state.catalogue import Catalogue
from storage.state.model import Location
from storage.workers import Threads, WorkersFactory

log = structlog.get_logger()

CHECKPOINT_INTERVAL_S: Final = 5.0
LOG_USED: Final = 0.4  # share of the log's files; above it checkpoints come ten times as often
MISSING_AT_ONCE: Final = 256
SYNC_THREADS: Final = 8
SYNC_LOOK_S: Final = 1.0


class Records(Protocol):
    """The journal, which writes to the catalogue."""

    applied: int

    async def record(self, truncate_after: int | None = None, **meta: Any) -> None: ...
    async def lose(self, lost: dict[int, tuple[str, Location]]) -> None: ...


class Checkpoints:
    def __init__(
        self,
        catalogue: Catalogue,
        kept: Log,
        volumes: Volumes,
        workers: WorkersFactory,
        reading: Threads,
        records: Records,
        *,
        logged_bytes: Callable[[int], bytes | None],
        trim: Callable[[int], Awaitable[None]],
    ) -> None:
        """`logged_bytes(seq)`: what the log has of an entry; it blocks, and is asked in `reading`."""
        self._catalogue, self._log, self._volumes, self._records = catalogue, kept, volumes, records
        self._syncing: Threads = workers(SYNC_THREADS, "sync")
        self._reading, self._logged_bytes, self._trim = reading, logged_bytes, trim
        self._checkpointed = int(catalogue.meta("checkpoint", 0))
        self._at = asyncio.get_running_loop().time()
        self._task: asyncio.Task[None] | None = None
        self._sync_jobs: dict[Volume, asyncio.Future[bool]] = {}

    @property
    def upto(self) -> int:
        """The last entry that is covered."""
        return self._checkpointed

    def begin(self, upto: int) -> None:
        """The catalogue is another one, which is covered up to there."""
        self._checkpointed = upto

    def close(self) -> None:
        self._syncing.leave()

    async def now(self) -> None:
        """One that covers all that is applied."""
        self._at = float("-inf")
        self.soon()
        if self._task:
            await self._task

    def soon(self) -> None:
        """Begin one, if it is time."""
        now = asyncio.get_running_loop().time()
        wait = CHECKPOINT_INTERVAL_S if self._log.used < LOG_USED else CHECKPOINT_INTERVAL_S / 10
        due = self._checkpointed < self._records.applied and now - self._at > wait
        if due and (self._task is None or self._task.done()):
            self._at = now
            self._task = asyncio.ensure_future(self._checkpoint())
            self._task.add_done_callback(_told)

    async def _checkpoint(self) -> None:
        """Volumes first, then the record of it, then the log may forget."""
        applied = self._records.applied
        placed = await self._syncing.run(self._placed_since, applied)
        volumes = sorted({location.volume for _, location in placed})
        done = await asyncio.gather(*(self._synced(volume_id) for volume_id in volumes))
        synced = {volume_id for volume_id, good in zip(volumes, done, strict=True) if good}
        only_here = {
            seq: ("its disk failed before it was synced", location)
            for seq, location in placed
            if location.volume not in synced and await self._reading.run(self._logged_bytes, seq) is not None
        }
        upto = min([applied, *(seq - 1 for seq in (*only_here, *await self._reading.run(self._only_logged, applied)))])
        if lost := {seq: row for seq, row in only_here.items() if self._volumes.has_failed(row[1].volume)}:
            await self._records.lose(lost)  # healing has them from the log
        if upto > self._checkpointed:
            # On a disk that wasn't synced, files needn't say for certain what they are.
            doubt = {"undescribed": True} if len(synced) < len(volumes) else {}
            await self._records.record(checkpoint=upto, **doubt)
            self._checkpointed = upto
            await self._trim(upto)

    def _placed_since(self, applied: int) -> list[tuple[int, Location]]:
        """Copies that the last checkpoint doesn't cover."""
        rows = self._catalogue.locations(self._checkpointed + 1)
        return list(takewhile(lambda row: row[0] <= applied, rows))

    def _only_logged(self, applied: int) -> list[int]:
        """The first entry whose bytes are nowhere on this node but in the log."""
        start = self._checkpointed + 1
        while found := [seq for seq in self._catalogue.missing(start, MISSING_AT_ONCE) if seq <= applied]:
            for seq in found:
                if self._logged_bytes(seq) is not None:
                    return [seq]
            start = found[-1] + 1
        return []

    async def _synced(self, volume_id: str) -> bool:
        """One that goes out of service meanwhile isn't waited for, and not asked again before it has answered."""
        try:
            volume = self._volumes.get(volume_id)
        except LookupError:
            return False
        before = self._sync_jobs.get(volume)
        if before and not await self._answered(volume, before):
            return False
        job = self._sync_jobs[volume] = self._syncing.run(self._sync, volume)
        return await self._answered(volume, job) and job.result()

    async def _answered(self, volume: Volume, job: "asyncio.Future[bool]") -> bool:
        while not job.done():
            if not self._is_in_service(volume):
                return False
            await asyncio.wait([job], timeout=SYNC_LOOK_S)
        self._sync_jobs.pop(volume, None)
        return True

    def _is_in_service(self, volume: Volume) -> bool:
        """This one, and not another disk or another try with the same one."""
        try:
            return self._volumes.get(volume.id) is volume
        except LookupError:
            return False

    def _sync(self, volume: Volume) -> bool:
        try:
            volume.sync_all()
        except NotAsked:
            return False
        except OSError as error:
            log.error("volume.not_synced", volume=volume.id, error=reason_of(error))
            if self._is_in_service(volume):
                # Whatever it was: the kernel tells of it once, and what it couldn't write is gone.
                self._volumes.failed(volume.id, OSError(errno.EIO, f"not synced: {error.strerror}"))
            return False
        return True


def _told(task: "asyncio.Task[None]") -> None:
    if not task.cancelled() and (error := task.exception()):
        log.error("checkpoint.failed", why=f"{type(error).__name__}: {error}")
