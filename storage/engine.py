"""The storage engine of one node: its parts, their role in the pair, and the effects of the core.

Writing: `begin` an object, feed it, `put` it. `put` returns when the object is durable on every in-sync node,
committed and visible; anything else is an exception. Reading: `settled()` and then the catalogue, while `may_serve`.
"""

import asyncio
import contextlib
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import msgspec
import structlog

from conf.settings import Settings
from conf.telling import reason_of
from storage import crash
from storage.control import Report, Tell
from storage.environment import Surroundings, real
from storage.ingest import NotServing, Proposal
from storage.objects.upload import Upload
from storage.objects.volume import NoRoom
from storage.parts import DISK_THREADS, Parts
from storage.replication.effects import (
    Adopt,
    DropLink,
    Effect,
    InvariantBroken,
    Persist,
    Publish,
    Send,
    SteppedDown,
    Transmit,
)
from storage.replication.messages import KNOWS_FILES, Ack, AnyMessage, Pong
from storage.replication.pending import Pending, Pendings
from storage.state.file_model import BeginWriting, Change
from storage.state.formats import bring_up_to_date
from storage.state.model import Delete, Files, Forget, Put, Task, TaskDone
from storage.state.soundness import closed
from storage.upkeep.disks import LOOK_THREADS
from storage.upkeep.recovery import recover
from storage.workers import within

log = structlog.get_logger()

TICK_S: Final = 0.1
STATE_LOOK_TICKS: Final = 10
STATE_RESERVE_BYTES: Final = 48 << 20  # kept free where catalogue and log are
LAPSED_S: Final = 2.0
SETTLE_S: Final = 0.02  # between two looks whether what was proposed is committed


class Engine(Parts):
    def __init__(self, settings: Settings, surroundings: Surroundings | None = None) -> None:
        """Raises InUse, CatalogueDamaged, LogDamaged, FormatUnknown, OSError."""
        around = surroundings or real(settings)
        self._lock = around.lock()  # before anything is opened: nobody else may have it
        self.settings, self.clock = settings, around.clock
        self.told = Tell("follow")
        self.fatal: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.on_change: Callable[[], None] = lambda: None
        self.on_stepped_down: Callable[[], None] = lambda: None
        self.on_drain: Callable[[], None] = lambda: None
        self._state_full = False
        self._lapsed_at: float | None = None
        self.free_state_bytes = around.free_state_bytes
        self._barriers: list[tuple[int, asyncio.Future[None]]] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._pendings = Pendings()
        self.catalogue = around.open_catalogue()
        self.cluster_id = str(self.catalogue.meta("cluster_id", ""))
        bring_up_to_date(self.catalogue, self.cluster_id)
        self.pair_seq = int(self.catalogue.meta("pair_seq", 0))
        self.pair_with = str(self.catalogue.meta("pair_with", ""))  # store of the other node that `pair_seq` is about
        self.peer_missing = int(self.catalogue.meta("peer_missing", 0))  # copies that it said it lacks, when last heard
        self.volumes = self._open_volumes(around)
        view = around.view([volume.path / "archive" for volume in self.volumes])
        self.log = around.open_log(self.catalogue)
        recovered = recover(self.catalogue, self.log, self.volumes, verify=settings.storage.verify_tail)
        self.disk = around.workers(DISK_THREADS, "disk")
        self.looking = around.workers(LOOK_THREADS, "look")
        self.asking = around.workers(1, "lookup")
        self.core = self._new_core(recovered.whole)
        self._furnish(around, view, recovered.away)
        self._queued = self.journal.applied
        self._standing = self.duty.standing()

    # -- life --------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        self.mirror.propose = self._propose_if_leading
        self.peering.on_progress = lambda: self.core.progress(self.clock())
        self._queue_applies(self.core.commit)
        if self.settings.cluster:
            await self.peering.start()
        else:
            await self._lead_alone()
        self._spawn(self._ticking())
        self._spawn(self.healing.run())
        self._spawn(self.disks.run())
        self._spawn(self.tidying.run())
        self._spawn(self.scrub.run())
        self._spawn(self.forgetting.run())
        self._spawn(self.share_copies.run())

    async def _lead_alone(self) -> None:
        """Without another node this one is primary for ever, in a new epoch after each start and each failure."""
        lineage = self.core.lineage or str(uuid.uuid4())
        epoch = self.core.promised + 1
        self.tell(Tell("lead", epoch, (self.core.node,), serve_until=float("inf"), lineage=lineage))
        await self.duty.led()

    async def stop(self) -> None:
        for task in list(self._tasks):
            task.cancel()
        await self.peering.stop()
        await self.mirror.keeper.stop()
        self.share_disk.stop()
        if not self.fatal.done():
            await self.journal.checkpoint()
        self.journal.close()
        self.log.close()
        self.disk.stop()
        self.looking.leave()
        self.asking.stop()
        self.catalogue.close()
        closed(self.settings.storage.state / "catalogue")
        self.volumes.close()
        if self._lock:
            self._lock.close()

    def _spawn(self, coroutine: Any) -> None:
        task: asyncio.Task[None] = asyncio.ensure_future(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._task_done)

    def _task_done(self, task: "asyncio.Task[None]") -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()):
            self._die(error)

    def _die(self, error: BaseException) -> None:
        """This process must not go on; the HA agent or systemd starts it anew and recovery looks at what is there."""
        log.critical("store.fatal", error=f"{type(error).__name__}: {error}")
        if not self.fatal.done():
            self.fatal.set_exception(error)

    async def _ticking(self) -> None:
        count = 0
        while True:
            self.core.peer_unfit = self._peer_info().get("usable", 1) == 0
            self.core.counted = min(self.catalogue.tail, default=self.core.durable + 1) - 1
            self.core.missing, self.core.instances, self.core.rows = self.catalogue.sizes()
            self._note_pair()
            if self.peering.heard():
                self.core.alive(self.clock())
            self.core.tick(self.clock())
            self.flush()
            self._fail_without_authority()
            count += 1
            if count % STATE_LOOK_TICKS == 0:
                self.peering.expire()
                self.state_giver.expire()
                self._spawn(self._look_at_state())
            if count % 2 == 0:
                self.on_change()
            await asyncio.sleep(TICK_S)

    async def _look_at_state(self) -> None:
        """Nothing new is taken while the disk of catalogue and log is nearly full: what was taken must find room."""
        try:
            free = await within(self.disk.run(self.free_state_bytes), self.settings.storage.hang_s)
        except OSError as error:
            log.error("state.not_looked_at", error=error.strerror)
            return
        full = free < self.state_reserve_bytes
        if full != self._state_full:
            log.error("state.full", free_bytes=free) if full else log.info("state.has_room", free_bytes=free)
        self._state_full = full
        if full:
            self.state_giver.close()  # which keeps what was freed from being used again
        if not full:
            await self.disk.run(self.catalogue.kv.keep_reserve)

    @property
    def state_reserve_bytes(self) -> int:
        """Kept free where catalogue and log are."""
        return STATE_RESERVE_BYTES + self.log.segment_bytes

    def _fail_without_authority(self) -> None:
        """A primary whose lease has run out, and that nobody else can help, answers those who wait: what becomes of
        their objects isn't known."""
        core = self.core
        if not core.leading or core.peer is None or not self.duty.serving or self.duty.may_serve:
            self._lapsed_at = None
        elif self._lapsed_at is None:
            self._lapsed_at = self.clock()
        elif self.clock() - self._lapsed_at > LAPSED_S:
            self._pendings.fail(NoRoom("neither the other node nor etcd answers; send it again"))

    # -- role --------------------------------------------------------------------------------------------------

    @property
    def may_serve(self) -> bool:
        """This node is the primary and may answer now."""
        return self.duty.may_serve

    @property
    def may_read(self) -> bool:
        """Queries and retrieves may be answered here: as the primary, or as a standby that follows one."""
        return self.duty.may_read

    def tell(self, tell: Tell) -> None:
        drain, self.told = tell.drain and not self.told.drain, tell
        if drain:
            self.on_drain()
        if tell.cluster_id and not self.cluster_id:
            self.cluster_id = tell.cluster_id
            self._spawn(self.journal.record(cluster_id=tell.cluster_id))
        self.duty.tell(tell)
        self.on_change()

    def report(self) -> Report:
        return self.duty.report(self.cluster_id)

    # -- writing -----------------------------------------------------------------------------------------------

    def begin(self, header: bytes) -> Upload:
        """Start an object. `header` is what precedes the data set. Raises NotServing or NoRoom."""
        return self.ingest.begin(header)

    async def put(self, upload: Upload, make: Callable[[bytes, int], Put]) -> bool:
        """Commit a finished object, see `Ingest.put`."""
        return await self.ingest.put(upload, make)

    async def delete(self, delete: Delete) -> int:
        """Delete a study, series or instance on both nodes. Returns how many instances it was when it was asked for.
        Raises NotServing."""
        await self.settled()
        count = await self.disk.run(self.catalogue.count_matching, delete)
        await self.ingest.commit(delete)
        await self.settled()
        return count

    async def commit(self, operation: Task | TaskDone) -> None:
        """Have both nodes note a task, or its end. Raises NotServing."""
        await self.ingest.commit(operation)

    def propose_files(self, change: Change) -> Proposal:
        """Put a change of the share's files behind all others in the log. Raises NotServing."""
        return self.ingest.propose_files(change)

    def _propose_if_leading(self, change: Change) -> None:
        with contextlib.suppress(NotServing):
            self.propose_files(change)

    async def settle_files(self) -> None:
        """Wait until all that was ever proposed is in the catalogue: then a writer of the share may begin, the only one
        there is, and while this node leads. Raises NotServing."""
        await self.mirror.keeper.at_rest()
        proposed = self.core.accepted
        while True:
            await self.settled()
            if not self.may_serve:
                raise NotServing("not the primary")
            if self.journal.applied >= proposed:
                return
            await asyncio.sleep(SETTLE_S)

    async def _commit_forget(self, forget: Forget) -> None:
        with contextlib.suppress(NotServing):
            await self.ingest.commit(forget)

    def _peer_info(self) -> dict[str, Any]:
        """What the peer last said of its volumes."""
        return msgspec.msgpack.decode(self.core.peer_info) if self.core.peer_info else {}

    async def take_volume(self, path: Path) -> str:
        """Take a volume into service while running; returns its UUID. Raises OSError or VolumeOffline."""
        volume = await self.disk.run(self.volumes.add, path)
        paths = {str(slot.path) for slot in self.volumes.slots}
        known = self.catalogue.known_volumes | {volume.id}
        await self.journal.record(volume_paths=sorted(paths), volumes=sorted(known))
        return volume.id

    def _spools_in_use(self) -> set[str]:
        named = [location for _, location in list(self.follower.entries.values())] + self._pendings.locations()
        coming = {incoming.spool for incoming in list(self.volumes.on_their_way) if incoming.written}
        return (
            {location.spool for location in named if location} | coming | self.healing.in_flight | self.journal.spools()
        )

    # -- reading -----------------------------------------------------------------------------------------------

    async def settled(self) -> None:
        """Wait until everything committed up to now is in the catalogue and the tree."""
        commit = self.core.commit
        if self.journal.applied >= commit:
            return
        barrier: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._barriers.append((commit, barrier))
        self.journal.hurry()
        await barrier

    # -- effects of the core -----------------------------------------------------------------------------------

    def flush(self) -> None:
        for effect in self.core.take():
            self._carry_out(effect)
        self.mirror.look()
        standing = self.duty.standing()
        if standing != self._standing:
            self._standing = standing
            self.on_change()

    def _carry_out(self, effect: Effect) -> None:
        match effect:
            case Send(message):
                self.peering.send(self._with_info(message))
            case Transmit():
                self.transmitting.send(effect)
            case Persist():
                self.follower.persist(effect)
            case Adopt():
                self._spawn(self._adopt(effect))
            case Publish(seq):
                self._publish(seq)
            case SteppedDown():
                self._stepped_down()
            case DropLink(reason):
                self.peering.drop(reason)

    def _with_info(self, message: AnyMessage) -> AnyMessage:
        if isinstance(message, Ack):
            crash.point("standby.before_ack")
        if not isinstance(message, Pong):
            return message
        info = {
            "room": self.volumes.free_bytes(),
            "usable": 0 if self.disks.state_hangs else self.volumes.usable,
            "volumes": self.volumes.status(),
            **self.catalogue.counts(),
        }
        return msgspec.structs.replace(message, info=msgspec.msgpack.encode(info))

    async def _adopt(self, effect: Adopt) -> None:
        facts: dict[str, Any] = {"promised": max(effect.epoch, self.core.promised)}
        if effect.lineage and not self.core.lineage:
            facts["lineage"] = effect.lineage
        await self.journal.record(truncate_after=effect.match, **facts)
        self._forget_after(effect.match)
        state = await self._take_state(effect.match) if effect.state else None
        self.core.adopted(effect.epoch, effect.match, state)
        self.flush()
        await self.healing.check_whole()

    async def _take_state(self, match: int) -> tuple[tuple[int, int], ...] | None:
        await self.settled()
        if self.journal.applied < match:
            return None
        state = await self.state_taker.take(match)
        if state is not None:
            self._queued = self.journal.applied
            self.follower.entries.clear()
            self.share_copies.again()
            self.core.forgotten = int(self.catalogue.meta("forgotten", 0))
        return state

    def _publish(self, upto: int) -> None:
        self._queue_applies(upto)
        self._pendings.committed(upto)

    def _queue_applies(self, upto: int) -> None:
        for seq in range(self._queued + 1, upto + 1):
            pending = self._pendings.get(seq)
            if pending is None:
                followed = self.follower.entries.pop(seq, None)
                entry, location = followed or (self.catalogue.entry(seq), self.catalogue.location(seq))
                # Until it is in the catalogue, a repeated UID must find it here, also what an earlier leader committed.
                pending = Pending(entry, location)
                self._pendings.add(pending)
            if isinstance(pending.entry.operation, Forget):
                self.core.forget(pending.entry.operation.upto, self.clock())
            elif isinstance(pending.entry.operation, Files):
                self.core.need(KNOWS_FILES)
                if isinstance(pending.entry.operation.change, BeginWriting):
                    self.share_copies.again()
            self.journal.apply(pending.entry, pending.location)
            self._queued = seq

    def _stepped_down(self) -> None:
        self.duty.stepped_down()
        self._pendings.fail(NotServing("another node has taken over"))
        self.peering.release()
        self._spawn(self._abandon_soon())
        self.on_stepped_down()
        if self.settings.cluster is None:
            self._spawn(self._lead_alone())

    # -- what happened -----------------------------------------------------------------------------------------

    def _durable(self, seq: int) -> None:
        self.core.persisted(seq)
        self.flush()
        if not (self.core.whole or self.core.leading):  # a leader's turn comes with each round of healing
            self._spawn(self.healing.check_whole())

    def _applied(self, seq: int) -> None:
        self._pendings.forget_upto(seq)
        still = []
        for wanted, barrier in self._barriers:
            if wanted > seq:
                still.append((wanted, barrier))
            elif not barrier.done():
                barrier.set_result(None)
        self._barriers = still
        self._note_pair()

    def _note_pair(self) -> None:
        """Remember up to where which store of the other node holds everything, for the count of single copies."""
        cluster, hello = self.settings.cluster, self.core.peer_hello
        if cluster is None or hello is None:
            return
        both = (
            self.core.commit
            if not self.core.leading or cluster.peer in self.core.in_sync.confirmed
            else self.core.peer_acked
        )
        other = hello.store_id != self.pair_with
        lacks = self.core.peer_lacks
        if other or both > self.pair_seq or lacks != self.peer_missing:
            self.pair_with, self.pair_seq = hello.store_id, both if other else max(both, self.pair_seq)
            self.peer_missing = lacks
            self.journal.note(pair_seq=self.pair_seq, pair_with=self.pair_with, peer_missing=lacks)

    def _abandon(self) -> None:
        """Give up entries of a lost leader that can't be completed, once the journal is at rest."""
        if self.core.leading or self.core.idle:
            return
        if self.journal.idle:
            self._forget_after(self.core.durable)
            self.core.abandon()

    def _forget_after(self, seq: int) -> None:
        """Entries after `seq` are no longer in the log."""
        self.journal.rewind(seq)
        self.follower.restart(seq)
        for stream in self._pendings.forget_after(seq):
            self.peering.abort_stream(stream)

    def _not_kept(self, seq: int, error: Exception) -> None:
        """No disk of this node takes the bytes of an entry. A leader stops: it will lead again without the entry, or
        the other node with it. A follower stops following, and is out of the set unless it soon does better."""
        log.error("entry.not_kept", seq=seq, error=reason_of(error))
        if self.core.leading:
            self.core.follow()
            self.flush()
        else:
            self._stuck(reason_of(error))

    def _stuck(self, why: str) -> None:
        self.peering.drop(f"an entry can't be kept here: {why}")

    # -- link --------------------------------------------------------------------------------------------------

    def _link_up(self) -> None:
        log.info("link.up")
        self.core.linked_up(self.clock())
        self.flush()

    def _link_down(self, why: str) -> None:
        log.warning("link.down", why=why)
        self.state_giver.close()
        self.core.unlinked(self.clock())
        if not self.core.leading:
            self.follower.restart(self.core.durable)
        self._spawn(self._abandon_soon())
        self.flush()

    async def _abandon_soon(self) -> None:
        while not self.core.leading and not self.core.idle and not self.core.joined:
            self._abandon()
            self.flush()
            await asyncio.sleep(0.02)

    def _message(self, message: AnyMessage) -> None:
        try:
            self.core.receive(message, self.clock())
            self.flush()
        except InvariantBroken as error:
            self._die(error)
