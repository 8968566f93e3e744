"""The parts of a store, each with what it works with. `engine.py` gives them life."""

import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from conf.settings import Settings
from storage.environment import Surroundings
from storage.files.copies import CopyStore
from storage.files.keeper import Keeper
from storage.files.mirror import Mirror
from storage.ingest import Ingest
from storage.journal import Journal
from storage.log.log import Log
from storage.objects.copies import Copies
from storage.objects.file_copies import FileCopies
from storage.objects.lookups import Lookups
from storage.objects.reading import Reading
from storage.objects.view import Showing
from storage.objects.volume import Volume
from storage.objects.volumes import Volumes
from storage.replication.duty import Duty
from storage.replication.effects import (
    Limits,
)
from storage.replication.epochs import Epochs
from storage.replication.follower import Follower
from storage.replication.messages import KNOWS_FILES, AnyMessage
from storage.replication.network import Network
from storage.replication.peering import Peering
from storage.replication.pending import Pendings
from storage.replication.replica import Replica
from storage.replication.state_transfer import StateGiver, StateTaker
from storage.replication.transmitting import Transmitting
from storage.state.catalogue import Batch, Catalogue
from storage.state.file_images import is_of_file
from storage.state.model import Entry, Forget, Put
from storage.upkeep.disks import DiskWatch
from storage.upkeep.draining import Draining
from storage.upkeep.forgetting import Forgetting
from storage.upkeep.healing import Healing
from storage.upkeep.scrub import Scrub
from storage.upkeep.share_copies import ShareCopies
from storage.upkeep.tidying import Tidying
from storage.workers import Threads

DISK_THREADS: Final = 16
SHARE_THREADS: Final = 8


class Parts:
    """Made once, at the start of a process. What the parts call when something happened is for the engine to say."""

    settings: Settings
    clock: Callable[[], float]
    catalogue: Catalogue
    log: Log
    volumes: Volumes
    disk: Threads
    looking: Threads
    asking: Threads
    core: Replica
    _pendings: Pendings
    _state_full: bool

    def _open_volumes(self, around: Surroundings) -> Volumes:
        """Those of the settings, and those added while running."""
        storage = self.settings.storage
        added = [Path(path) for path in self.catalogue.meta("volume_paths", ())]
        return Volumes(
            list(dict.fromkeys((*storage.volumes, *added))),
            storage.reserve_bytes,
            slow_io_s=storage.slow_io_s,
            open_volume=around.open_volume,
            clock=around.clock,
        )

    def _furnish(self, around: Surroundings, view: Showing, away: frozenset[str]) -> None:
        """The parts, each with what it works with."""
        storage = self.settings.storage
        kept = (self.catalogue, self.volumes)
        self.journal = Journal(
            self.catalogue,
            self.log,
            self.volumes,
            view,
            around.workers,
            on_durable=self._durable,
            on_applied=self._applied,
            on_failed=self._die,
            clock=self.clock,
        )
        self.lookups = Lookups(*kept, self.asking, storage.hang_s)
        self.file_copies = FileCopies(*kept, self.settings.node.name)
        self.copies = Copies(*kept, self.disk, self._pendings, self._is_awaited, self.file_copies.instance)
        self.peering = self._new_peering(around.networks)
        self.follower = Follower(self.peering, self.journal, *kept, self.disk, self._stuck)
        self.transmitting = Transmitting(
            self.core, self.peering, self._pendings, self.catalogue, self.disk, self._spawn
        )
        self.state_giver = StateGiver(self.catalogue, self.disk, self.clock)
        self.peering.give_state = self.state_giver.part
        self.state_taker = StateTaker(self.peering, self.catalogue, self.journal, self.disk, around.free_state_bytes)
        self.healing = Healing(
            self.core,
            *kept,
            self.journal,
            self.follower,
            self.peering,
            self.copies,
            self.disk,
            clock=self.clock,
            away=away,
            reprotect_after_s=storage.reprotect_after_s,
            not_kept=self._not_kept,
            hang_s=storage.hang_s,
        )
        self._furnish_share(around)
        self._furnish_upkeep()

    def _furnish_share(self, around: Surroundings) -> None:
        storage = self.settings.storage

        def open_copies() -> CopyStore:
            kept, draining = self.share_volumes()
            complete = len(kept) == len(self.volumes.slots)
            return around.open_copies(kept, storage.reserve_bytes, draining, complete=complete)

        self.share_disk = around.workers(SHARE_THREADS, "share")
        keeper = Keeper(open_copies, self.share_disk, storage.hang_s, self.known_of_volumes)
        self.mirror = Mirror(self.core, self.peering, keeper)
        self.open_copies = open_copies
        self.share_copies = ShareCopies(
            self.catalogue,
            self.volumes,
            open_copies,
            self.share_disk,
            node=self.settings.node.name,
            clock=self.clock,
            on_lost=self.mirror.lost,
            log_end=self._log_end,
        )

    def share_volumes(self) -> tuple[list[Path], list[Path]]:
        """Those that may have copies of the share's files: all but those given up; and which of them take nothing."""
        slots = [slot for slot in self.volumes.slots if not slot.failed]
        return [slot.path for slot in slots], [
            slot.path for slot in slots if slot.volume is None or slot.volume.draining
        ]

    def _log_end(self) -> int | None:
        """Up to which entry the log goes, as far as this node can know."""
        if self.core.leading:
            return self.core.accepted
        return self.core.commit if self.duty.follows else None

    def known_of_volumes(self) -> object:
        """All that counts for who uses them: another value when that has changed."""
        return [
            (slot.path, slot.volume and (slot.volume.id, slot.volume.draining), slot.usable, slot.failed)
            for slot in self.volumes.slots
        ]

    def _furnish_upkeep(self) -> None:
        storage, kept = self.settings.storage, (self.catalogue, self.volumes)
        self.reading = Reading(self.copies, self._remake, self.disk, storage.hang_s)
        self.disks = DiskWatch(
            self.volumes,
            self.disk,
            self.looking,
            clock=self.clock,
            hang_s=storage.hang_s,
            give_up_s=storage.reprotect_after_s,
            journal_hangs=self.journal.hangs,
            leave_thread=self.journal.leave_thread,
            checked=lambda: self._spawn(self.healing.note_new_volumes()),
        )
        self.scrub = Scrub(
            *kept, self.journal, self.copies, self.healing, self.disk, storage.scrub_days, self.mirror.lost
        )
        self.tidying = Tidying(
            *kept, self.journal, self.disk, in_use=self._spools_in_use, clock=self.clock, hang_s=storage.hang_s
        )
        self.draining = Draining(
            *kept, self.journal, self.copies, self.healing, self.mirror, self.disk, node=self.settings.node.name
        )
        self._furnish_service()

    def _furnish_service(self) -> None:
        storage, kept = self.settings.storage, (self.catalogue, self.volumes)
        self.duty = Duty(
            self.core,
            clock=self.clock,
            persist_promise=lambda epoch: self.journal.record(promised=epoch),
            abandon=self._abandon,
            flush=self.flush,
            fit=lambda: self.volumes.usable > 0 and not self.disks.state_hangs,
            standby_reads=self.settings.dicom.standby_reads,
            isolated_reads=self.settings.dicom.isolated_reads,
        )
        self.duty.note_lineage = lambda lineage: self.journal.note(lineage=lineage)
        self.ingest = Ingest(
            self.core,
            self.duty,
            self.settings.cluster,
            *kept,
            self.disk,
            self.lookups,
            self.peering,
            self.journal,
            self._pendings,
            self.copies,
            peer_room=lambda: int(self._peer_info().get("room", 1)),
            flush=self.flush,
            clock=self.clock,
            duplicates=storage.duplicates,
            examine=self.healing.examine,
            not_kept=self._not_kept,
            state_is_full=lambda: self._state_full,
        )
        self.forgetting = Forgetting(
            self.core,
            self.duty,
            self.catalogue,
            self.disk,
            applied=lambda: self.journal.applied,
            commit=self._commit_forget,
        )

    def _new_core(self, whole: bool) -> Replica:
        store_id = self.catalogue.meta("store_id", "") or str(uuid.uuid4())
        incarnation = int(self.catalogue.meta("incarnation", 0)) + 1
        self.catalogue.write(Batch(meta={"store_id": store_id, "incarnation": incarnation}))
        cluster = self.settings.cluster
        limits = Limits()
        if cluster:
            limits = Limits(
                peer_timeout_s=cluster.peer_timeout_s,
                ack_timeout_s=cluster.ack_timeout_s,
                state_after=cluster.state_after,
            )
        core = Replica(
            self.settings.node.name,
            cluster.peer if cluster else None,
            cluster.name if cluster else "",
            store_id,
            incarnation,
            int(self.catalogue.meta("promised", 0)),
            Epochs(self.catalogue.epochs.pairs),
            self.catalogue.epochs.last[1],
            int(self.catalogue.meta("applied", 0)),
            whole or cluster is None,  # alone there is no better copy to follow; what is lost is in log and status
            limits,
            str(self.catalogue.meta("lineage", "")),
        )
        core.forgotten = int(self.catalogue.meta("forgotten", 0))
        with self.catalogue.kv.read() as txn:
            core.need(KNOWS_FILES if txn.count("file_counters") else 0)
        if cluster:
            core.grants.given_until = self.clock() + limits.grant_s  # a promise given before a restart still holds
        return core

    def _is_awaited(self, entry: Entry) -> bool:
        """Its sender waits here. One of an earlier epoch was told that the outcome isn't known."""
        inherited = self.core.leading and entry.epoch < self.core.epoch
        return entry.seq > self.core.commit and not inherited

    def _new_peering(self, networks: tuple[Network, ...]) -> Peering:
        cluster = self.settings.cluster
        return Peering(
            dial=cluster is not None and self.settings.node.name < cluster.peer,
            networks=networks,
            volumes=self.volumes,
            workers=self.disk,
            find=self.copies.find,
            lacks=self.copies.lacks,
            list_copies=self.copies.listing,
            on_up=self._link_up,
            on_down=self._link_down,
            on_message=self._message,
            on_suspect=lambda seq: self.healing.suspect(seq),
            lookups=self.lookups,
            from_log=self._from_log,
            look=self._look,
        )

    async def _remake(self, seq: int) -> None:
        """A copy isn't good: of an entry it is made again now, of a file of the share once it is certain."""
        if is_of_file(seq):
            self._spawn(self.scrub.check_file(seq))
        else:
            await self.healing.now(seq)

    def _from_log(self, seq: int) -> tuple[Put, bytes] | None:
        """An entry's bytes that are on no volume yet, or not any more. Blocks."""
        entry = self.copies.entry(seq)
        if entry is None or not isinstance(entry.operation, Put):
            return None
        kept = self.journal.logged_now(seq)
        return None if kept is None or kept.data is None else (entry.operation, kept.data)

    def _look(self, seq: int) -> tuple[Volume, str, Put] | None:
        """A copy of a missing entry that lies here all the same. Blocks."""
        entry = self.copies.entry(seq)
        if entry is None or not isinstance(entry.operation, Put) or not self.catalogue.is_missing(seq):
            return None
        try:
            location = self.follower.lies_here(entry, entry.operation)
            volume = self.volumes.get(location.volume) if location else None
            name = volume.locate(location) if volume and location else None
        except (OSError, LookupError):
            return None
        return (volume, name, entry.operation) if volume and name else None

    def _spawn(self, coroutine: Any) -> None:
        raise NotImplementedError

    def flush(self) -> None:
        raise NotImplementedError

    async def _commit_forget(self, forget: Forget) -> None:
        raise NotImplementedError

    def _durable(self, seq: int) -> None:
        raise NotImplementedError

    def _applied(self, seq: int) -> None:
        raise NotImplementedError

    def _not_kept(self, seq: int, error: Exception) -> None:
        raise NotImplementedError

    def _die(self, error: BaseException) -> None:
        raise NotImplementedError

    def _stuck(self, why: str) -> None:
        raise NotImplementedError

    def _abandon(self) -> None:
        raise NotImplementedError

    def _peer_info(self) -> dict[str, Any]:
        raise NotImplementedError

    def _spools_in_use(self) -> set[str]:
        raise NotImplementedError

    def _link_up(self) -> None:
        raise NotImplementedError

    def _link_down(self, why: str) -> None:
        raise NotImplementedError

    def _message(self, message: AnyMessage) -> None:
        raise NotImplementedError
