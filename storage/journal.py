"""Group commit: many entries share one sync of the spool folders and one transaction.

Entries become durable in the order of their seq. Publication (the rename into the readable tree and the catalogue
rows) comes in batches of its own rhythm: when a reader waits, after a moment, or when many have gathered.
"""

import asyncio
import errno
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import structlog

from storage import crash
from storage.objects.incoming import Incoming
from storage.objects.view import Showing
from storage.objects.volume import NoRoom
from storage.objects.volumes import Volumes
from storage.publishing import Publishing
from storage.state.catalogue import Batch, Catalogue, same_copy
from storage.state.model import Entry, Location, Put
from storage.turns import Turns
from storage.workers import Threads, WorkersFactory

log = structlog.get_logger()

BATCH_ENTRIES_MAX: Final = 256
APPLY_DELAY_S: Final = 0.02
APPLIES_WAITING_MAX: Final = 64
CHECKPOINT_INTERVAL_S: Final = 5.0
BUSY_S: Final = 0.25

Land = Callable[[int], Location]


@dataclass
class Ready:
    """An entry to be written. `land(attempt)`, if it is given, makes its bytes durable first, in the journal's
    thread."""

    entry: Entry
    location: Location | None
    land: Land | None = None
    aim: Callable[[], str] | None = None  # the volume on which `land` would put it now
    restart: Callable[[], int] | None = None  # the next attempt, on another volume; raises OSError, NoRoom
    attempt: int = 0  # of landing it: what an earlier one does, in a thread that was left behind, is for nothing


@dataclass
class Work:
    """What the journal's thread does in one go."""

    ready: list[Ready]
    batch: Batch
    waiters: list["asyncio.Future[None]"]
    stuck: tuple[int, Exception] | None = None
    committed: bool = False


class Journal:
    """One writer thread. `on_durable(seq)` and `on_applied(seq)` are called on the event loop, in order."""

    def __init__(
        self,
        catalogue: Catalogue,
        volumes: Volumes,
        view: Showing,
        workers: WorkersFactory,
        *,
        on_durable: Callable[[int], None],
        on_applied: Callable[[int], None],
        on_stuck: Callable[[int, Exception], None],
        on_failed: Callable[[BaseException], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`on_stuck(seq, error)`: no disk took the bytes of this entry; it and those after it are forgotten."""
        self._catalogue, self._volumes = catalogue, volumes
        self._turns = Turns(volumes, clock)
        self._tree = Publishing(catalogue, volumes, view, self._turns)
        self._on_durable, self._on_applied = on_durable, on_applied
        self._on_stuck, self._on_failed = on_stuck, on_failed
        self._workers = workers
        self._thread: Threads = workers(1, "journal")
        self._work: Work | None = None  # under way
        self._appends: list[Ready] = []
        self._early: dict[int, Ready] = {}  # bytes are durable, an entry before it isn't
        self._next_seq = catalogue.epochs.last[1] + 1
        self._applies: list[tuple[Entry, Location | None]] = []
        self._next = Batch()  # what else the next transaction is to do
        self._waiters: list[asyncio.Future[None]] = []
        self._running = False
        self._due = False  # what is committed is to be published with the next batch
        self._broken: BaseException | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._publishing: set[asyncio.Future[None]] = set()  # one by one, beside the batches
        self._checkpointed_at = 0.0
        self._appended_at = float("-inf")
        self._checkpointed = 0
        self.applied = int(catalogue.meta("applied", 0))
        self.heard: dict[str, float] = {}  # AE title -> wall clock of its newest image, since this process started

    @property
    def idle(self) -> bool:
        """Nothing is being written or waits to be; then the next entry may bring its bytes along."""
        return not self._running and not self._appends

    @property
    def busy(self) -> bool:
        """Images came in just now: work that can wait gives way."""
        return asyncio.get_running_loop().time() - self._appended_at < BUSY_S

    def close(self) -> None:
        self._thread.stop()

    @property
    def behind(self) -> bool:
        """Something committed isn't in the catalogue yet."""
        return bool(self._applies) or self._running

    # -- what is asked of it -----------------------------------------------------------------------------------

    def append(self, entry: Entry, location: Location | None) -> None:
        """Write an entry whose bytes are durable, once all those before it are written."""
        self._append(Ready(entry, location))

    def append_landing(self, entry: Entry, incoming: Incoming, landed: Callable[[Location], None]) -> None:
        """Land the bytes and write the entry in one go: the shortest way while the journal has nothing else to do.
        `landed(location)` is called in the journal's thread."""

        def land(attempt: int) -> Location:
            incoming.land_here(attempt)
            landed(incoming.location)
            return incoming.location

        self._append(Ready(entry, None, land, lambda: incoming.volume.id, incoming.restart, incoming.attempt))

    def _append(self, ready: Ready) -> None:
        self._early[ready.entry.seq] = ready
        self._appended_at = asyncio.get_running_loop().time()
        while self._next_seq in self._early:
            self._appends.append(self._early.pop(self._next_seq))
            self._next_seq += 1
        self._kick()

    @property
    def handed(self) -> int:
        """The last entry that is durable or being written."""
        return self._next_seq - 1

    def forget_early(self) -> None:
        """Forget what waits for earlier entries; what was handed over is still being written."""
        self._early.clear()

    def rewind(self, seq: int) -> None:
        """The log ends at `seq` now, and nothing is being written."""
        self._early.clear()
        self._next_seq = seq + 1

    def apply(self, entry: Entry, location: Location | None) -> None:
        """Publish a committed entry some time soon."""
        self._applies.append((entry, location))
        if isinstance(entry.operation, Put):
            self.heard[entry.operation.calling_ae] = entry.operation.received
        self._set_timer()

    def hurry(self) -> None:
        """Somebody waits for what was committed to be in the catalogue."""
        self._due = True
        self._kick()

    def note(self, **meta: Any) -> None:
        """Write facts with the next batch; nobody waits for them."""
        self._next.meta.update(meta)

    async def forget_leavings(self, keys: list[str]) -> None:
        """These files are out of the way."""
        self._next.gone.extend(keys)
        await self._flushed()

    async def quiet(self) -> None:
        """Return when no images have come in for a moment."""
        loop = asyncio.get_running_loop()
        while (rest := self._appended_at + BUSY_S - loop.time()) > 0:  # noqa: ASYNC110 - each append moves the time
            await asyncio.sleep(rest)

    async def record(self, truncate_after: int | None = None, **meta: Any) -> None:
        """Write facts (and drop the log's tail) durably."""
        self._next.meta.update(meta)
        if truncate_after is not None:
            self._next.truncate_after = truncate_after
        await self._flushed()

    async def publish_again(self, location: Location) -> None:
        """Move a copy into the tree that is recorded there and wasn't moved. Raises OSError if its disk hangs."""
        job = self._thread.run(self._publish_again, location, self._turns.now)
        self._publishing.add(job)
        try:
            await job
        finally:
            self._publishing.discard(job)

    async def lose(self, lost: dict[int, tuple[str, Location]]) -> None:
        """Note that copies of this node are gone: seq -> (why, where it was)."""
        self._next.lost.update(lost)
        await self._flushed()

    async def move(self, moved: dict[int, Location]) -> set[int]:
        """Note where copies lie from now on; their bytes are durable there. Returns those for which that is so now: not
        the ones whose disk failed at the last moment, or that were deleted meanwhile."""
        self._next.moved.update(moved)
        await self._flushed()
        now = {seq: self._catalogue.location(seq) for seq in moved}
        return {seq for seq, found in now.items() if found is not None and same_copy(found, moved[seq])}

    async def _flushed(self) -> None:
        if self._broken:
            raise self._broken
        future = asyncio.get_running_loop().create_future()
        self._waiters.append(future)
        self._kick()
        await future

    async def checkpoint(self) -> None:
        """Make the tree durable up to what is applied, so that recovery is short."""
        self._checkpointed_at = float("-inf")
        await self.record()

    # -- the loop's side ---------------------------------------------------------------------------------------

    def _set_timer(self) -> None:
        if self._applies and self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(APPLY_DELAY_S, self._apply_now)

    def _apply_now(self) -> None:
        self._timer = None
        self._due = True
        self._kick()

    def _kick(self) -> None:
        apply = self._due or bool(self._waiters) or len(self._applies) >= APPLIES_WAITING_MAX
        wanted = self._appends or self._waiters or (apply and self._applies)
        if self._running or self._broken or not wanted:
            return
        self._running = True
        self._due = apply and len(self._applies) > BATCH_ENTRIES_MAX
        batch, self._next = self._next, Batch()
        if apply:
            batch.applies = self._applies[:BATCH_ENTRIES_MAX]
            del self._applies[:BATCH_ENTRIES_MAX]
        work = Work(self._appends[:BATCH_ENTRIES_MAX], batch, self._waiters)
        del self._appends[:BATCH_ENTRIES_MAX]
        self._waiters = []
        loop = asyncio.get_running_loop()
        if self._checkpointed < self.applied and loop.time() - self._checkpointed_at > CHECKPOINT_INTERVAL_S:
            self._checkpointed_at = loop.time()
            batch.meta["checkpoint"] = self._checkpointed = self.applied
        self._hand_over(work, loop)

    def _hand_over(self, work: Work, loop: asyncio.AbstractEventLoop) -> None:
        turn, self._work = self._turns.now, work
        job = self._thread.run(self._write, work, loop, turn)
        job.add_done_callback(lambda done: self._written(done, work, turn))

    def _written(self, job: "asyncio.Future[None]", work: Work, turn: int) -> None:
        if turn != self._turns.now:
            if not job.cancelled():
                job.exception()  # left behind; what it did is done anew
            return
        self._running, self._work = False, None
        if job.cancelled():
            return
        if error := job.exception():
            self._broken = error  # what came before may be lost: nothing later may become durable in its place
            for waiter in [*work.waiters, *self._waiters]:
                if not waiter.done():
                    waiter.set_exception(error)
            self._on_failed(error)
            return
        self._completed(work)

    def _completed(self, work: Work) -> None:
        for waiter in work.waiters:
            if not waiter.done():
                waiter.set_result(None)
        if work.batch.applies:
            self.applied = max(self.applied, work.batch.applied)
            self._on_applied(self.applied)
        if work.stuck:
            self._appends.clear()
            self.rewind(work.stuck[0] - 1)
            self._on_stuck(*work.stuck)
        self._kick()
        self._set_timer()

    # -- disks that hang ---------------------------------------------------------------------------------------

    def hangs(self, seconds: float) -> str | None:
        """What has held the thread for so long: a volume, "" for the disk of the state folder; None for nothing."""
        return self._turns.held(seconds)

    def leave_thread(self, seconds: float) -> None:
        """The volume that has held the thread for so long is out of service: another thread does the work anew without
        it."""
        work = self._work
        if not self._turns.next(seconds):
            return
        log.error("journal.left_thread", entries=len(work.ready) if work else 0)
        self._thread.leave()
        self._thread = self._workers(1, "journal")
        for job in self._publishing:
            if not job.done():
                job.set_exception(OSError(errno.ETIMEDOUT, "the disk doesn't answer"))
        self._publishing.clear()
        if work is None:
            return
        loop = asyncio.get_running_loop()
        if work.committed:  # only names in the tree are still to be made; the sweep makes them
            self._running, self._work = False, None
            self._completed(work)
            return
        batch = self._tree.sync_again(work.batch)
        if "checkpoint" in work.batch.meta:
            self._checkpointed, self._checkpointed_at = 0, float("-inf")
        again = Work(work.ready, batch, work.waiters)
        for number, ready in enumerate(work.ready):
            try:
                self._ready_again(ready)
            except (OSError, NoRoom) as error:
                again.ready, again.stuck = work.ready[:number], (ready.entry.seq, error)
                break
        self._hand_over(again, loop)

    def _ready_again(self, ready: Ready) -> None:
        """Raises OSError or NoRoom if its bytes can't be had any more."""
        if ready.restart:
            ready.attempt = ready.restart()
        elif ready.location:
            try:
                self._volumes.get(ready.location.volume)
            except LookupError as error:
                raise OSError(errno.ETIMEDOUT, "its disk doesn't answer") from error

    # -- the thread's side -------------------------------------------------------------------------------------

    def _write(self, work: Work, loop: asyncio.AbstractEventLoop, turn: int) -> None:
        self._land(work, turn)
        batch = work.batch
        self._sync_names(work, turn)
        self._turns.at(turn, "")
        self._tree.place_all(batch, self.applied)
        if "checkpoint" in batch.meta:
            self._tree.sync(turn)
        crash.point("journal.before_commit")
        with self._turns.committing(turn):
            self._catalogue.write(batch)
            work.committed = True
            self._tree.synced()
        crash.point("journal.after_commit")
        if batch.appends:
            loop.call_soon_threadsafe(self._on_durable, batch.appends[-1][0].seq)
        self._tree.publish_all(batch, turn)
        self._turns.done(turn)
        crash.point("journal.after_publish")

    def _publish_again(self, location: Location, turn: int) -> None:
        self._tree.publish(location, turn)
        self._turns.done(turn)

    def _land(self, work: Work, turn: int) -> None:
        for ready in work.ready:
            self._turns.at(turn, self._volume_of(ready))
            try:
                location = ready.land(ready.attempt) if ready.land else ready.location
            except (OSError, NoRoom) as error:
                self._turns.check(turn)  # `land` has told of it
                work.stuck = (ready.entry.seq, error)
                return
            self._turns.check(turn)
            work.batch.appends.append((ready.entry, location))

    def _volume_of(self, ready: Ready) -> str:
        return ready.location.volume if ready.location else ready.aim() if ready.aim else "?"

    def _sync_names(self, work: Work, turn: int) -> None:
        batch = work.batch
        named = [location for _, location in batch.appends if location] + list(batch.moved.values())
        for volume_id in {location.volume for location in named}:
            self._turns.at(turn, volume_id)
            try:
                self._volumes.get(volume_id).sync_spool()
            except (OSError, LookupError) as error:
                self._turns.check(turn, volume_id, error)
                failure = OSError(errno.EIO, "the volume is out of service")
                if isinstance(error, OSError):  # otherwise it only hangs or is away, and may come back
                    failure = error
                    self._volumes.failed(volume_id, failure)
                self._without(work, volume_id, failure)
        self._turns.check(turn)

    def _without(self, work: Work, volume_id: str, error: OSError) -> None:
        """A disk failed between bytes and names: nothing on it counts."""
        batch = work.batch
        batch.moved = {seq: location for seq, location in batch.moved.items() if location.volume != volume_id}
        for number, (entry, location) in enumerate(batch.appends):
            if location and location.volume == volume_id:
                work.stuck = (entry.seq, error)
                del batch.appends[number:]
                return
