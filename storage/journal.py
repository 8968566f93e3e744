"""From the log to the state: what was logged goes into the catalogue and, once it is committed, into the readable tree.

An entry counts as durable with its record in the log. Catalogue and tree follow in batches, off the path of those who
wait for that: when a reader waits, after a moment, or when many have gathered. Bytes that the log took are written to
a volume then, and stay in the log until a checkpoint has made that volume durable.
"""

import asyncio
import contextlib
import errno
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Final

import structlog

from conf.telling import reason_of
from storage import crash
from storage.appending import Appending, Ready
from storage.checkpoints import Checkpoints
from storage.log.folder import LogDamaged
from storage.log.log import Log
from storage.objects.incoming import Incoming
from storage.objects.view import Showing
from storage.objects.volume import NoRoom
from storage.objects.volumes import Volumes
from storage.publishing import Publishing
from storage.state.catalogue import Batch, Catalogue, same_copy
from storage.state.description import packed
from storage.state.kv import CatalogueDamaged, Kv
from storage.state.logged import Logged, logged
from storage.state.model import Entry, Location, Put
from storage.state.transfer import Head, StateUnusable
from storage.turns import Turns
from storage.workers import Threads, WorkersFactory

log = structlog.get_logger()

BATCH_ENTRIES_MAX: Final = 256
STATE_DELAY_S: Final = 0.2
WAITING_MAX: Final = 256
UNLANDED_BYTES: Final = 32 << 20  # in memory and in the log, and on no volume yet: then the next batch begins,
UNLANDED_BYTES_MAX: Final = 128 << 20  # and then bytes go to their volume first
BUSY_S: Final = 0.25


@dataclass
class Work:
    """What the journal's thread does in one go."""

    ready: list[Ready]
    batch: Batch
    waiters: list["asyncio.Future[None]"]
    committed: bool = False


class Journal:
    """`on_durable(seq)` and `on_applied(seq)` are called on the event loop, in order."""

    def __init__(
        self,
        catalogue: Catalogue,
        kept: Log,
        volumes: Volumes,
        view: Showing,
        workers: WorkersFactory,
        *,
        on_durable: Callable[[int], None],
        on_applied: Callable[[int], None],
        on_failed: Callable[[BaseException], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`kept`: the log, which ends where the catalogue does."""
        self._catalogue, self._log, self._volumes = catalogue, kept, volumes
        self._turns = Turns(volumes, clock)
        self._tree = Publishing(catalogue, volumes, view, self._turns)
        self._on_durable, self._on_applied = on_durable, on_applied
        self._on_failed = on_failed
        self._workers = workers
        self._thread: Threads = workers(1, "journal")
        self._reading: Threads = workers(1, "log-read")  # not behind a volume that hangs
        self._appending = Appending(kept, workers, on_logged=self._logged, on_failed=self._fail, clock=clock)
        self._work: Work | None = None  # under way
        self._durable: list[Ready] = []  # in the log, not in the catalogue yet
        self._applies: list[tuple[Entry, Location | None]] = []
        self._next = Batch()  # what else the next transaction is to do
        self._waiters: list[asyncio.Future[None]] = []
        self._running = False
        self._due = False  # what is committed is to be published with the next batch
        self._broken: BaseException | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._apart: set[asyncio.Future[None]] = set()  # what the thread does besides its batches
        self._checkpoints = Checkpoints(
            catalogue,
            kept,
            volumes,
            workers,
            self._reading,
            self,
            logged_bytes=self._logged_bytes,
            trim=self._appending.trim,
        )
        self._unlanded_bytes = 0
        self._appended_at = float("-inf")
        self.applied = int(catalogue.meta("applied", 0))
        self.heard: dict[str, float] = {}  # AE title -> wall clock of its newest image, since this process started

    @property
    def idle(self) -> bool:
        """Nothing is being written to the log or waits to be."""
        return self._appending.idle

    @property
    def busy(self) -> bool:
        """Images came in just now: work that can wait gives way."""
        return asyncio.get_running_loop().time() - self._appended_at < BUSY_S

    def close(self) -> None:
        self._appending.stop()
        self._thread.stop()
        self._reading.leave()
        self._checkpoints.close()

    @property
    def behind(self) -> bool:
        """Something logged or committed isn't in the catalogue yet."""
        return bool(self._applies or self._durable) or self._running

    # -- what is asked of it -----------------------------------------------------------------------------------

    def append(self, entry: Entry, location: Location | None) -> None:
        """Log an entry whose bytes are durable, once all those before it are logged."""
        self._append(Ready(entry, location))

    def append_inline(self, entry: Entry, incoming: Incoming, landed: Callable[[Location], None]) -> bool:
        """Log an entry together with its bytes, if they aren't too long: the shortest way. `landed(location)` is called
        in the journal's thread when they lie on a volume as well."""
        chunks = incoming.inline() if self.takes_inline else None
        if chunks is None:
            return False
        self._volumes.on_their_way.discard(incoming)  # the journal has it from here
        self._append(Ready(entry, None, chunks, incoming, landed, incoming.attempt))
        return True

    @property
    def takes_inline(self) -> bool:
        """The volumes keep up with the log: otherwise they are asked first, and who sends waits for them."""
        return self._unlanded_bytes < UNLANDED_BYTES_MAX and self._log.used < 1

    def _append(self, ready: Ready) -> None:
        if isinstance(ready.entry.operation, Put):
            self._appended_at = asyncio.get_running_loop().time()
        self._appending.append(ready)

    def _logged(self, readies: list[Ready]) -> None:
        for ready in readies:
            self._catalogue.tail[ready.entry.seq] = (ready.entry, ready.location)
            self._unlanded_bytes += ready.incoming.length if ready.incoming else 0
        self._durable += readies
        self._set_timer()
        self._on_durable(readies[-1].entry.seq)
        self._kick()

    @property
    def handed(self) -> int:
        """The last entry that is durable or being written."""
        return self._appending.handed

    def forget_early(self) -> None:
        """Forget what waits for earlier entries; what was handed over is still being written."""
        self._appending.forget_early()

    def rewind(self, seq: int) -> None:
        """The log ends at `seq` now, and nothing is being written."""
        self._appending.rewind(seq)

    def spools(self) -> set[str]:
        """Spool files of entries that the catalogue doesn't name yet."""
        readies = [*self._durable, *(self._work.ready if self._work else ())]
        return {ready.incoming.spool for ready in readies if ready.incoming and ready.incoming.written}

    async def logged_bytes(self, seq: int) -> bytes | None:
        """The file of an entry, header and data set, if the log still has it."""
        return await self._reading.run(self._logged_bytes, seq)

    def _logged_bytes(self, seq: int) -> bytes | None:
        found = self.logged_now(seq)
        return found.data if found else None

    def logged_now(self, seq: int) -> Logged | None:
        """What the log still has of an entry. Blocks."""
        try:
            return logged(self._log.read(seq))
        except (KeyError, ValueError):
            return None
        except LogDamaged as error:
            log.error("log.damaged", seq=seq, error=str(error))
            return None

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

    async def forget_bytes(self, numbers: list[int]) -> None:
        """The bytes of these inodes were removed."""
        self._next.bytes_gone.extend(numbers)
        await self._flushed()

    async def quiet(self, at_most_s: float) -> None:
        """Return when no images have come in for a moment, or after so long."""
        loop = asyncio.get_running_loop()
        until = loop.time() + at_most_s
        while (rest := min(self._appended_at + BUSY_S, until) - loop.time()) > 0:  # noqa: ASYNC110 - appends move it
            await asyncio.sleep(rest)

    async def record(self, truncate_after: int | None = None, **meta: Any) -> None:
        """Write facts (and drop the log's tail, while nothing is being logged) durably."""
        if truncate_after is not None:
            # The log first: if the power goes in between, the catalogue's tail is the log's again (`recovery`).
            await self._flushed()
            await self._appending.cut(truncate_after)
            self._next.truncate_after = truncate_after
        self._next.meta.update(meta)
        await self._flushed()

    async def publish_again(self, location: Location) -> None:
        """Move a copy into the tree that is recorded there and wasn't moved. Raises OSError if its disk hangs."""
        await self._beside(self._thread.run(self._publish_again, location, self._turns.now))

    async def _beside(self, job: "asyncio.Future[None]") -> None:
        """What the thread does besides its batches isn't done anew where the thread is left behind."""
        self._apart.add(job)
        try:
            await job
        finally:
            self._apart.discard(job)

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
        """Make the volumes durable up to what is applied, so that recovery is short."""
        await self.record()
        await self._checkpoints.now()

    async def become(self, new: Kv, head: Head) -> None:
        """The catalogue is to be a state that was taken from the other node, and the log begins anew behind it. Nothing
        is being logged, and all that is logged is applied. Raises StateUnusable, OSError if nothing has changed,
        CatalogueDamaged if that isn't known."""
        await self.settle()
        await self._beside(self._thread.run(self._become, new, head, self._turns.now))
        try:
            await self._appending.begin(head.epochs)
        except OSError as error:  # the next start begins it
            raise CatalogueDamaged(f"the log can't be begun anew: {error.strerror}") from error
        self._on_applied(head.applied)

    async def settle(self) -> None:
        """Have all copies durable on their volumes, so that the log is needed no more. Raises StateUnusable."""
        await self.checkpoint()
        if self._checkpoints.upto < self.applied:
            raise StateUnusable("not all copies of this node are durable now")

    def _become(self, new: Kv, head: Head, turn: int) -> None:
        self._turns.check(turn)
        crash.point("journal.before_become")
        self._catalogue.become(new, head, lambda: self._turns.committing(turn))
        self.applied = head.applied  # at once: what is moved from here on has its place in the tree
        self._checkpoints.begin(head.applied)
        self._turns.done(turn)
        crash.point("journal.after_become")

    # -- the loop's side ---------------------------------------------------------------------------------------

    def _set_timer(self) -> None:
        if (self._applies or self._durable) and self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(STATE_DELAY_S, self._apply_now)

    def _apply_now(self) -> None:
        self._timer = None
        self._due = True
        self._kick()

    def _kick(self) -> None:
        many = len(self._applies) >= WAITING_MAX or len(self._durable) >= WAITING_MAX
        many = many or self._unlanded_bytes >= UNLANDED_BYTES
        apply = self._due or bool(self._waiters) or many
        if self._running or self._broken or not (self._waiters or (apply and (self._applies or self._durable))):
            return
        self._running = True
        self._due = apply and len(self._applies) > BATCH_ENTRIES_MAX
        batch, self._next = self._next, Batch()
        batch.applies = self._applies[:BATCH_ENTRIES_MAX]
        del self._applies[:BATCH_ENTRIES_MAX]
        work = Work(self._durable, batch, self._waiters)
        self._durable, self._waiters = [], []
        self._hand_over(work)

    def _hand_over(self, work: Work) -> None:
        turn, self._work = self._turns.now, work
        job = self._thread.run(self._write, work, turn)
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
            for waiter in work.waiters:
                if not waiter.done():
                    waiter.set_exception(error)
            self._fail(error)
            return
        self._completed(work)

    def _fail(self, error: BaseException) -> None:
        """What comes later may not become durable in the place of what is lost."""
        self._broken = error
        for waiter in self._waiters:
            if not waiter.done():
                waiter.set_exception(error)
        self._on_failed(error)

    def _completed(self, work: Work) -> None:
        for waiter in work.waiters:
            if not waiter.done():
                waiter.set_result(None)
        for ready in work.ready:
            self._catalogue.tail.pop(ready.entry.seq, None)
            self._unlanded_bytes -= ready.incoming.length if ready.incoming else 0
        if work.batch.applies:
            self.applied = max(self.applied, work.batch.applied)
            self._on_applied(self.applied)
        self._checkpoints.soon()
        self._kick()
        self._set_timer()

    # -- disks that hang ---------------------------------------------------------------------------------------

    def hangs(self, seconds: float) -> str | None:
        """What has held a thread for so long: a volume, "" for the disks of log and catalogue; None for nothing."""
        return "" if self._appending.held(seconds) else self._turns.held(seconds)

    def leave_thread(self, seconds: float) -> None:
        """The volume that has held the thread for so long is out of service: another thread does the work anew without
        it."""
        work = self._work
        if not self._turns.next(seconds):
            return
        log.error("journal.left_thread", entries=len(work.ready) if work else 0)
        self._thread.leave()
        self._thread = self._workers(1, "journal")
        for job in self._apart:
            if not job.done():
                job.set_exception(OSError(errno.ETIMEDOUT, "the disk doesn't answer"))
        self._apart.clear()
        if work is None:
            return
        if work.committed:  # only names in the tree are still to be made; the sweep makes them
            self._running, self._work = False, None
            self._completed(work)
            return
        batch = replace(work.batch, appends=[], moved=dict(work.batch.moved), meta=dict(work.batch.meta))
        for ready in work.ready:
            if ready.incoming:
                with contextlib.suppress(NoRoom):  # then the log goes on having it
                    ready.attempt = ready.incoming.restart()
        self._hand_over(Work(work.ready, batch, work.waiters))

    # -- the thread's side -------------------------------------------------------------------------------------

    def _write(self, work: Work, turn: int) -> None:
        batch, lineage = work.batch, str(self._catalogue.meta("lineage", ""))
        self._land(work, lineage, turn)
        self._turns.at(turn, "")
        self._tree.place_all(batch, self.applied)
        self._tree.note_deletions(batch, lineage, turn)
        crash.point("journal.before_commit")
        with self._turns.committing(turn):
            self._catalogue.write(batch)
            work.committed = True
        crash.point("journal.after_commit")
        self._tree.publish_all(batch, turn)
        self._turns.done(turn)
        crash.point("journal.after_publish")

    def _publish_again(self, location: Location, turn: int) -> None:
        self._tree.publish(location, turn)
        self._turns.done(turn)

    def _aim(self, ready: Ready) -> None:
        """To where the rest of its study lies."""
        if ready.incoming and isinstance(put := ready.entry.operation, Put):
            with contextlib.suppress(OSError, NoRoom):  # `land_here` tells of it
                ready.incoming.aim(self._volumes.place(put.study, self._catalogue.volume_of), ready.attempt)

    def _land(self, work: Work, lineage: str, turn: int) -> None:
        """Write to a volume what the log took. Where none takes it now, healing has it from the log. Each file says
        which entry it is before the catalogue names it."""
        described = True
        for seq, moved in work.batch.moved.items():
            for entry in self._catalogue.entries(seq, 1):  # none if it was cut off meanwhile
                if entry.seq == seq:
                    described &= self._tree.describe(entry, moved, lineage, turn, sync=True)
        for ready in work.ready:
            location = ready.location
            if location and self._volumes.has_failed(location.volume):  # perhaps after its copies were written off
                work.batch.lost[ready.entry.seq] = ("its disk failed", location)
            elif location:
                described &= self._tree.describe(ready.entry, location, lineage, turn)
            if ready.incoming:
                self._aim(ready)
                described &= bool(lineage) and ready.incoming.describe(packed(ready.entry, lineage))
                self._turns.at(turn, ready.incoming.volume.id)
                try:
                    ready.incoming.land_here(ready.attempt, sync=False)
                    location = ready.incoming.location
                    ready.landed(location)
                except (OSError, NoRoom) as error:
                    self._turns.check(turn)  # `land_here` has told of it
                    log.error("entry.not_landed", seq=ready.entry.seq, error=reason_of(error))
                self._turns.check(turn)
            work.batch.appends.append((ready.entry, location))
        if not described:
            work.batch.meta["undescribed"] = True
