"""Group commit: many entries share one sync of the spool folders and one LMDB transaction.

Entries become durable in the order of their seq. Publication (the rename into the readable tree and the catalogue
rows) comes in batches of its own rhythm: when a reader waits, after a moment, or when many have gathered.
"""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import structlog

from storage.catalogue import Batch, Catalogue
from storage.model import Entry, Location, Put
from storage.view import View
from storage.volume import NoRoom, Volume
from storage.workers import Workers

log = structlog.get_logger()

BATCH_ENTRIES_MAX: Final = 256
APPLY_DELAY_S: Final = 0.02
APPLIES_WAITING_MAX: Final = 64
CHECKPOINT_INTERVAL_S: Final = 5.0

Land = Callable[[], Location]


@dataclass
class Ready:
    """An entry to be written. `land`, if it is given, makes its bytes durable first, in the journal's thread."""

    entry: Entry
    location: Location | None
    land: Land | None = None


@dataclass
class Work:
    """What the journal's thread does in one go."""

    ready: list[Ready]
    batch: Batch
    waiters: list["asyncio.Future[None]"]
    stuck: tuple[int, Exception] | None = field(default=None)


class Journal:
    """One writer thread. `on_durable(seq)` and `on_applied(seq)` are called on the event loop, in order."""

    def __init__(
        self,
        catalogue: Catalogue,
        volumes: Callable[[str], Volume],
        view: View,
        on_durable: Callable[[int], None],
        on_applied: Callable[[int], None],
        on_stuck: Callable[[int, Exception], None],
        on_failed: Callable[[BaseException], None],
    ) -> None:
        """`on_stuck(seq, error)`: no disk took the bytes of this entry; it and those after it are forgotten."""
        self._catalogue, self._volumes, self._view = catalogue, volumes, view
        self._on_durable, self._on_applied = on_durable, on_applied
        self._on_stuck, self._on_failed = on_stuck, on_failed
        self._thread = Workers(1, "journal")
        self._appends: list[Ready] = []
        self._early: dict[int, Ready] = {}  # bytes are durable, an entry before it isn't
        self._next_seq = catalogue.epochs.last[1] + 1
        self._applies: list[tuple[Entry, Location]] = []
        self._meta: dict[str, Any] = {}
        self._relocations: dict[str, Location] = {}
        self._notes: dict[str, Any] = {}
        self._waiters: list[asyncio.Future[None]] = []
        self._truncate: int | None = None
        self._running = False
        self._due = False  # what is committed is to be published with the next batch
        self._broken: BaseException | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._touched: dict[str, set[Path]] = {}
        self._checkpointed_at = 0.0
        self._checkpointed = 0
        self.applied = int(catalogue.meta("applied", 0))

    @property
    def idle(self) -> bool:
        """Nothing is being written or waits to be; then the next entry may bring its bytes along."""
        return not self._running and not self._appends

    def close(self) -> None:
        self._thread.stop()

    @property
    def behind(self) -> bool:
        """Something committed isn't in the catalogue yet."""
        return bool(self._applies) or self._running

    def append(self, entry: Entry, location: Location) -> None:
        """Write an entry whose bytes are durable, once all those before it are written."""
        self._append(Ready(entry, location))

    def append_landing(self, entry: Entry, land: Land) -> None:
        """Land the bytes and write the entry in one go: the shortest way while the journal has nothing else to do."""
        self._append(Ready(entry, None, land))

    def _append(self, ready: Ready) -> None:
        self._early[ready.entry.seq] = ready
        while self._next_seq in self._early:
            self._appends.append(self._early.pop(self._next_seq))
            self._next_seq += 1
        self._kick()

    def restart(self, durable: int) -> None:
        """Forget what waits for earlier entries; those after `durable` come anew."""
        self._early.clear()
        self._next_seq = durable + 1

    def apply(self, entry: Entry, location: Location) -> None:
        self._applies.append((entry, location))
        self._set_timer()

    def _set_timer(self) -> None:
        if self._applies and self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(APPLY_DELAY_S, self._apply_now)

    def _apply_now(self) -> None:
        self._timer = None
        self._due = True
        self._kick()

    def hurry(self) -> None:
        """Somebody waits for what was published to be in the catalogue."""
        self._due = True
        self._kick()

    async def relocate(self, sop_instance: str, location: Location) -> None:
        """Note durably where an object lies that isn't published yet."""
        self._relocations[sop_instance] = location
        await self.set()

    def note(self, **meta: Any) -> None:
        """Write facts with the next batch; nobody waits for them."""
        self._notes.update(meta)

    async def set(self, truncate_after: int | None = None, **meta: Any) -> None:
        """Write facts (and drop the log's tail) durably."""
        if self._broken:
            raise self._broken
        future = asyncio.get_running_loop().create_future()
        self._meta.update(meta)
        if truncate_after is not None:
            self._truncate = truncate_after
        self._waiters.append(future)
        self._kick()
        await future

    def _kick(self) -> None:
        apply = self._due or bool(self._waiters) or len(self._applies) >= APPLIES_WAITING_MAX
        wanted = self._appends or self._meta or self._waiters or (apply and self._applies)
        if self._running or self._broken or not wanted:
            return
        self._running = True
        self._due = apply and len(self._applies) > BATCH_ENTRIES_MAX
        applies = self._applies[:BATCH_ENTRIES_MAX] if apply else []
        del self._applies[: len(applies)]
        loop = asyncio.get_running_loop()
        batch = Batch(
            [],
            applies,
            self._relocations,
            {**self._notes, **self._meta},
            self._truncate,
        )
        self._relocations = {}
        work = Work(self._appends[:BATCH_ENTRIES_MAX], batch, self._waiters)
        del self._appends[:BATCH_ENTRIES_MAX]
        self._waiters, self._meta, self._notes, self._truncate = [], {}, {}, None
        if self._checkpointed < self.applied and loop.time() - self._checkpointed_at > CHECKPOINT_INTERVAL_S:
            self._checkpointed_at = loop.time()
            batch.meta["checkpoint"] = self._checkpointed = self.applied
        job = self._thread.run(self._write, work, loop)
        job.add_done_callback(lambda done: self._written(done, work))

    def _land(self, work: Work) -> None:
        for ready in work.ready:
            try:
                location = ready.location or (ready.land and ready.land())
            except (OSError, NoRoom) as error:
                work.stuck = (ready.entry.seq, error)
                return
            if location is None:
                raise RuntimeError("an entry without bytes")
            work.batch.appends.append((ready.entry, location))

    def _write(self, work: Work, loop: asyncio.AbstractEventLoop) -> None:
        self._land(work)
        batch = work.batch
        named = [location for _, location in batch.appends]
        for volume in {location.volume for location in (*named, *batch.relocations.values())}:
            self._volumes(volume).sync_spool()
        fresh: dict[str, str] = {}
        batch.applies[:] = [(entry, self._place(entry, location, fresh)) for entry, location in batch.applies]
        if "checkpoint" in batch.meta:
            # All of these renames were done before; after this sync recovery needn't look at them again.
            touched, self._touched = self._touched, {}
            for volume, directories in touched.items():
                self._volumes(volume).sync_directories(directories)
        self._catalogue.write(batch)
        if batch.appends:
            loop.call_soon_threadsafe(self._on_durable, batch.appends[-1][0].seq)
        for entry, location in batch.applies:
            self._publish(entry.operation, location)

    def _place(self, entry: Entry, location: Location, fresh: dict[str, str]) -> Location:
        """Where the object will be in the tree. Until it is moved there it is found in the spool."""
        study, series = self._catalogue.folders(entry.operation, fresh)
        return Location(location.volume, location.spool, f"{study}/{series}/{entry.operation.sop_instance}.dcm")

    def _publish(self, put: Put, location: Location) -> None:
        study = "/".join(location.path.split("/")[:2])
        try:
            volume = self._volumes(location.volume)
            touched = volume.publish(location.spool, location.path)
        except (OSError, LookupError) as error:
            log.error("publish.failed", sop_instance=put.sop_instance, error=type(error).__name__)
            return
        self._touched.setdefault(location.volume, set()).update(touched)
        try:
            self._view.show(study, volume.path / "archive" / study)
        except OSError as error:
            log.error("share.not_shown", study=put.study, error=error.strerror)

    def _written(self, job: "asyncio.Future[None]", work: Work) -> None:
        self._running = False
        batch, waiters = work.batch, work.waiters
        if error := job.exception():
            self._broken = error  # what came before may be lost: nothing later may become durable in its place
            for waiter in [*waiters, *self._waiters]:
                if not waiter.done():
                    waiter.set_exception(error)
            self._on_failed(error)
            return
        for waiter in waiters:
            if not waiter.done():
                waiter.set_result(None)
        if batch.applies:
            self.applied = max(self.applied, batch.applied)
            self._on_applied(self.applied)
        if work.stuck:
            self._appends.clear()
            self.restart(work.stuck[0] - 1)
            self._on_stuck(*work.stuck)
        self._kick()
        self._set_timer()

    async def checkpoint(self) -> None:
        """Make the tree durable up to what is applied, so that recovery is short."""
        self._checkpointed_at = float("-inf")
        await self.set()
