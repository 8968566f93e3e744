"""Makes the copies again that this node has lost: newest first, from the peer, giving way to what comes in.

A copy that is lost or no good is noted in `missing`; whatever is there is fetched, checked by digest and placed on any
volume with room. A volume that fails is written off: all that lay on it is missing from then on.
"""

import asyncio
import errno
from collections.abc import Callable, Set
from typing import Final

import structlog

from conf.telling import reason_of
from storage import crash
from storage.journal import Journal
from storage.objects.blob_store import holds
from storage.objects.copies import Copies
from storage.objects.reading import SLOWEST_BYTES_S
from storage.objects.volume import NoRoom
from storage.objects.volumes import Volumes
from storage.replication.follower import Follower
from storage.replication.peering import FetchFailed, Peering, PeerLacksIt
from storage.replication.replica import Replica
from storage.state.catalogue import Catalogue, same_copy
from storage.state.model import Location, Put
from storage.workers import Threads, within

log = structlog.get_logger()

BATCH: Final = 128
WRITE_OFF_BATCH: Final = 2000
POLL_S: Final = 0.5
RETRY_S: Final = 5.0
LOOK_AGAIN_S: Final = 60.0
SKIPPED: Final = -1  # there was nothing to do in this part of the list
BUSY_SHARE: Final = 3.0  # while images come in: this much rest for each second of healing
RATE_WINDOW_S: Final = 30.0


class Healing:
    def __init__(
        self,
        core: Replica,
        catalogue: Catalogue,
        volumes: Volumes,
        journal: Journal,
        follower: Follower,
        peering: Peering,
        copies: Copies,
        workers: Threads,
        *,
        clock: Callable[[], float],
        away: frozenset[str],
        reprotect_after_s: float,
        not_kept: Callable[[int, Exception], None],
        hang_s: float,
    ) -> None:
        """`away`: volumes that hold objects and weren't there at the start; written off after `reprotect_after_s`.
        `not_kept(seq, error)`: this node has lost the bytes of an entry before it was committed."""
        self._core, self._catalogue, self._volumes, self._journal = core, catalogue, volumes, journal
        self._follower, self._peering, self._copies, self._workers = follower, peering, copies, workers
        self._clock, self._not_kept, self._hang_s = clock, not_kept, hang_s
        self._away_until = dict.fromkeys(away, clock() + reprotect_after_s)
        self._noted_whole = bool(catalogue.meta("whole", True))
        self._lost: set[str] = set()  # failed while running, still to be written off
        self._suspects: set[int] = set()
        self._retry_at: dict[int, float] = {}
        self._healed: list[tuple[float, int]] = []
        self._before, self._newest = 0, False
        self._looked_alone: tuple[frozenset[str], int] | None = None
        self._look_again_at = 0.0
        self._being_recorded: frozenset[int] = frozenset()
        self._recording: asyncio.Future[int] | None = None
        self._unreadable: set[int] = set()  # copies that the peer lacks as well
        self.in_flight: set[str] = set()  # spool files of copies that were made and aren't recorded yet
        self._wake = asyncio.Event()
        loop = asyncio.get_running_loop()

        def failed(volume_id: str) -> None:
            loop.call_soon_threadsafe(self._volume_failed, volume_id)

        volumes.on_failed = failed

    # -- what happened -----------------------------------------------------------------------------------------

    def _volume_failed(self, volume_id: str) -> None:
        self._lost.add(volume_id)
        self._wake.set()

    def suspect(self, seq: int) -> None:
        """The peer says that this node's copy isn't what the record says."""
        self._suspects.add(seq)
        self._wake.set()

    async def check_whole(self) -> None:
        """A copy is whole again when it has followed a leader up to all that was committed when it joined. That of a
        leader, whose log is the log, is so once it lacks no bytes."""
        core = self._core
        if self._noted_whole and core.whole:
            return
        followed = core.whole_at is not None and core.durable >= core.whole_at
        if followed or (core.leading and not self._lost and not self._away_until and not await self._lacks_some()):
            await self._journal.record(whole=True)
            core.whole = self._noted_whole = True
            log.info("copy.whole")

    async def _lacks_some(self) -> bool:
        return bool(await self._workers.run(self._catalogue.missing, 0, 1))

    @property
    def unreadable(self) -> Set[int]:
        """Entries of whose bytes neither node has a good copy now."""
        return self._unreadable

    @property
    def rate(self) -> float:
        """Copies made again a second, over the last half minute."""
        return sum(count for _, count in self._healed) / RATE_WINDOW_S

    # -- work --------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        while True:
            suspects, self._suspects = self._suspects, set()
            for seq in sorted(suspects):
                await self.examine(seq)
            await self._write_off_lost()
            await self.check_whole()
            healed = await self._heal_some()
            if healed:
                continue
            self._wake.clear()
            try:
                await asyncio.wait_for(self._wake.wait(), POLL_S)
            except TimeoutError:
                continue

    async def note_new_volumes(self) -> None:
        """One that was mounted since brings files that the catalogue doesn't name yet."""
        known = self._catalogue.known_volumes
        if new := {volume.id for volume in self._volumes} - known:
            await self._journal.record(volumes=sorted(known | new))

    async def examine(self, seq: int) -> bool:
        """Read a copy; if it isn't good it is set aside and made again. Returns whether it was good."""
        before = await self._workers.run(self._copies.location, seq)
        try:
            good = await self._read(seq, before)
            if good is None and (now := self._copies.location(seq)) != before:  # moved, into the tree perhaps
                before = now
                good = await self._read(seq, before)
        except OSError:
            return False
        if good:
            return True
        location = self._copies.location(seq)
        if location is None or not self._is_online(location):
            return False  # its volume is dealt with as a whole
        if before is None or not same_copy(location, before):
            return False  # made again meanwhile
        why = "damaged" if good is False else "the file is gone"
        log.error("copy.bad", seq=seq, why=why)
        try:
            if good is False:
                await self._workers.run(self._copies.set_aside, seq, before, why)
        except OSError as error:
            self._volumes.failed(location.volume, error)
            return False
        await self._journal.lose({seq: (why, before)})
        self._wake.set()
        return False

    async def now(self, seq: int) -> None:
        """Somebody wants to read a copy that isn't there or isn't good: make it again at once, if that can be done."""
        if await self.examine(seq):
            return
        _, location = await self._heal(seq)
        if location is not None:
            await self._record({seq: location})

    async def _read(self, seq: int, location: Location | None) -> bool | None:
        """`Copies.good`; a long object of a slow disk isn't one of a disk that hangs. Raises OSError, also when it
        goes out of service meanwhile, and says so of it."""
        job = self._workers.run(self._copies.good, seq)
        until = self._clock() + self._hang_s + self._copies.length(seq) / SLOWEST_BYTES_S
        while True:
            try:
                return await within(job, self._hang_s)
            except OSError as error:
                if job.done() and location:
                    self._volumes.failed(location.volume, error)
                if job.done() or location is None or not self._is_online(location):
                    raise
                if self._clock() > until:
                    self._volumes.hangs(location.volume)
                    raise

    def _is_online(self, location: Location) -> bool:
        try:
            self._volumes.get(location.volume)
        except LookupError:
            return False
        return True

    async def _write_off_lost(self) -> None:
        now = self._clock()
        online = {volume.id for volume in self._volumes}
        self._away_until = {one: until for one, until in self._away_until.items() if one not in online}
        if self._core.peer is None:
            return  # alone there is nowhere to heal from; the disk may come back
        due = self._lost | {volume_id for volume_id, until in self._away_until.items() if until <= now}
        if due:
            await self._recorded()
        for volume_id in sorted(due):
            await self._write_off(volume_id)
            self._lost.discard(volume_id)
            self._away_until.pop(volume_id, None)

    async def _write_off(self, volume_id: str) -> None:
        count, start = 0, 0
        await self._journal.record()  # what was on its way to the disk when it failed is in the catalogue, or given up
        while True:
            found = await self._workers.run(self._catalogue.locations_on, volume_id, start, WRITE_OFF_BATCH)
            lost = {seq: ("its disk failed", location) for seq, location in found}
            if lost:
                await self._not_kept_any_more([seq for seq in lost if seq > self._core.commit])
                await self._journal.lose(lost)
                count += len(lost)
            if len(found) < WRITE_OFF_BATCH:
                break
            start = found[-1][0] + 1
        known = (self._catalogue.known_volumes - {volume_id}) | {volume.id for volume in self._volumes}
        gone = [key for key, _ in await self._workers.run(self._catalogue.leavings, 1 << 30, volume_id)]
        await self._journal.forget_leavings(gone)
        await self._journal.record(volumes=sorted(known))
        log.warning("volume.written_off", volume=volume_id, copies=count)

    async def _not_kept_any_more(self, uncommitted: list[int]) -> None:
        for seq in uncommitted:
            if self._core.leading and await self._journal.logged_bytes(seq) is None:
                self._not_kept(seq, OSError(errno.EIO, "the disk of an entry that isn't committed failed"))
                return

    # -- healing -----------------------------------------------------------------------------------------------

    async def _heal_some(self) -> int:
        """One batch; returns how many copies were made, 0 if there is nothing to do now. Without the other node only
        those are had again that lie here, on a disk that came back."""
        now = self._clock()
        self._retry_at = {seq: at for seq, at in self._retry_at.items() if at > now}
        alone = self._alone_with()
        if alone and alone == self._looked_alone and now < self._look_again_at:
            return 0
        # In turn the newest, and what comes next in the round: none that fails holds up the others.
        self._newest = not self._newest
        start = 0 if self._newest else self._before
        known = self._being_recorded
        wanted = await self._workers.run(self._catalogue.newest_missing, start, BATCH + len(known))
        wanted = [seq for seq in wanted if seq not in known][:BATCH]
        due = [seq for seq in wanted if seq not in self._retry_at]
        if not self._newest:
            self._before = wanted[-1] if len(wanted) == BATCH else 0
            if self._before == 0:
                self._looked_alone, self._look_again_at = alone, now + LOOK_AGAIN_S
        if not wanted and not start and not known:
            self._unreadable.clear()
        made = 0
        for group in self._groups(due) if due else ():
            began = self._clock()
            found = await asyncio.gather(*(self._heal(seq) for seq in group))
            made += await self._recorded()
            moved = {seq: location for seq, location in found if location is not None}
            self._being_recorded = frozenset(moved)
            self._recording = asyncio.ensure_future(self._record(moved))
            if self._journal.busy:
                await asyncio.sleep(min(1.0, BUSY_SHARE * (self._clock() - began)))
        if self._before == 0 or not due or self._journal.busy:
            made += await self._recorded()
        return made or (0 if not wanted or (self._before == 0 and not self._newest) else SKIPPED)

    def _alone_with(self) -> tuple[frozenset[str], int] | None:
        """Without the other node: the volumes, and how many copies are missing. What was looked for in vain with these
        needn't be looked for at once again."""
        if self._peer_is_there():
            return None
        return frozenset(volume.id for volume in self._volumes), self._core.missing

    def _peer_is_there(self) -> bool:
        return self._peering.link is not None and self._core.linked

    def _groups(self, due: list[int]) -> list[list[int]]:
        """While images come in: one copy at a time."""
        return [due[at : at + 1] for at in range(len(due))] if self._journal.busy else [due]

    async def _recorded(self) -> int:
        """Wait for the copies whose record is being written while the next ones are fetched; returns how many."""
        recording, self._recording = self._recording, None
        try:
            return await recording if recording else 0
        finally:
            self._being_recorded = frozenset()

    async def _record(self, moved: dict[int, Location]) -> int:
        if not moved:
            return 0
        crash.point("heal.before_move")
        count = len(await self._journal.move(moved))
        self.in_flight -= {location.spool for location in moved.values()}
        now = self._clock()
        self._healed = [(at, some) for at, some in self._healed if at > now - RATE_WINDOW_S] + [(now, count)]
        return count

    def _lies_where_it_was(self, seq: int, put: Put) -> Location | None:
        """The copy that was lost with its disk, on that disk, as good as it was. Blocks."""
        was = self._catalogue.was_at(seq)
        if was is None:
            return None
        try:
            volume = self._volumes.get(was.volume)
            name = volume.locate(was)
            return was if name and holds(volume, name, put) else None
        except (OSError, LookupError):
            return None

    async def _heal(self, seq: int) -> tuple[int, Location | None]:
        entry = await self._workers.run(self._copies.entry, seq)
        if entry is None or not isinstance(entry.operation, Put):
            return seq, None
        try:
            # The log first: what a disk that failed shows may be in memory only.
            if (logged := await self._follower.from_log(entry, entry.operation)) is not None:
                self.in_flight.add(logged.spool)
                return seq, logged
            found = await self._workers.run(self._lies_where_it_was, seq, entry.operation)
            found = found or await self._follower.lying_here(entry, entry.operation)
            if found is not None:
                return seq, found
            if not self._peer_is_there():
                self._retry_at[seq] = self._clock() + RETRY_S
                return seq, None
            location = await self._follower.fetched(entry, entry.operation)
            self._unreadable.discard(seq)
            self.in_flight.add(location.spool)
            return seq, location
        except PeerLacksIt:
            if seq not in self._unreadable:
                log.error("copy.unreadable", seq=seq, sop_instance=entry.operation.sop_instance, why="no node has it")
            self._unreadable.add(seq)
        except (FetchFailed, OSError, NoRoom) as error:
            log.warning("heal.failed", seq=seq, error=reason_of(error))
        self._retry_at[seq] = self._clock() + RETRY_S
        return seq, None
