"""Makes an incomplete copy whole again, and sets aside what must not be served."""

import asyncio

import structlog

from storage.catalogue import Catalogue
from storage.follower import Follower
from storage.journal import Journal
from storage.model import Entry, Put
from storage.peering import FetchFailed
from storage.recovery import Recovered
from storage.replica import Replica
from storage.volume import NoRoom
from storage.volumes import Volumes
from storage.workers import Workers

log = structlog.get_logger()


class Healing:
    def __init__(
        self,
        core: Replica,
        catalogue: Catalogue,
        volumes: Volumes,
        journal: Journal,
        follower: Follower,
        workers: Workers,
        recovered: Recovered,
    ) -> None:
        self._core, self._catalogue, self._volumes, self._journal = core, catalogue, volumes, journal
        self._follower, self._workers = follower, workers
        self._missing = list(recovered.missing)
        self._away = recovered.away
        self._checking = asyncio.Lock()

    @property
    def missing(self) -> int:
        """Published entries whose bytes this node still lacks."""
        return len(self._missing)

    async def check(self) -> None:
        """A copy is whole when it holds all that was committed when it joined, old losses included."""
        if not self._checking.locked():
            async with self._checking:
                await self._check()

    async def _check(self) -> None:
        core = self._core
        lost = [entry.seq for entry in self._missing]
        while self._missing and core.joined:
            if not await self._heal(self._missing[-1]):
                return
            self._missing.pop()
        reached = core.whole_at is not None and core.durable >= core.whole_at
        if core.whole or not reached or self._missing or self._away:
            return
        if lost:
            while self._journal.behind:
                await self._journal.set()
            await self._journal.checkpoint()  # what was healed is synced before it is no longer noted as missing
            await self._journal.set(missing=[])
        core.whole = True
        log.info("copy.whole")

    async def _heal(self, entry: Entry) -> bool:
        put = entry.operation
        try:
            location = await self._follower.obtain(put)
        except (FetchFailed, OSError, NoRoom) as error:
            log.warning("heal.failed", sop_instance=put.sop_instance, error=str(error))
            return False
        if location != self._catalogue.location(put.sop_instance):
            await self._set_aside(put, "damaged copy")
            if self._catalogue.instance(put.sop_instance) is not None:
                self._journal.apply(entry, location)
                self._journal.hurry()
            else:
                await self._journal.relocate(put.sop_instance, location)
        return True

    async def set_tail_aside(self, match: int) -> None:
        """Entries after `match` that the leader doesn't have were never acknowledged; their objects are kept."""
        self._missing = [entry for entry in self._missing if entry.seq <= match]
        for seq in range(match + 1, self._catalogue.epochs.last[1] + 1):
            put = self._catalogue.entry(seq).operation
            if self._catalogue.instance(put.sop_instance) is None:
                await self._set_aside(put, "diverged: prepared here and not committed")

    async def _set_aside(self, put: Put, reason: str) -> None:
        location = self._catalogue.location(put.sop_instance)
        if location is None:
            return
        try:
            volume = self._volumes.get(location.volume)
            path = volume.locate(location.spool, location.path)
            if path:
                detail = {"sop_instance": put.sop_instance}
                await self._workers.run(volume.quarantine, path, reason, detail)
        except (OSError, LookupError) as error:
            log.error("quarantine.failed", sop_instance=put.sop_instance, error=str(error))
