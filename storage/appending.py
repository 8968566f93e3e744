"""Group commit: entries wait for one sync of the log, however many have gathered, in the order of their seq.

One thread has the log. What an entry brings is durable with its record, in it or before it.
"""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import structlog

from conf.telling import reason_of
from storage import crash
from storage.log.log import Log
from storage.objects.incoming import Incoming
from storage.objects.volume import NO_ROOM
from storage.state.logged import record_of
from storage.state.model import Entry, Location
from storage.workers import WorkersFactory

log = structlog.get_logger()

BATCH_ENTRIES_MAX: Final = 256
FULL_RETRY_S: Final = 1.0

Chunks = Sequence[bytes | bytearray]


@dataclass
class Ready:
    """An entry to be written. Its bytes are durable at `location`, or go into the log as `chunks` and are landed on a
    volume later, by `incoming`."""

    entry: Entry
    location: Location | None
    chunks: Chunks | None = None
    incoming: Incoming | None = None
    landed: Callable[[Location], None] = lambda location: None
    attempt: int = 0  # of landing it: what an earlier one does, in a thread that was left behind, is for nothing


class Appending:
    """`on_logged(entries)` is called on the event loop, in order, when they are durable."""

    def __init__(
        self,
        log: Log,
        workers: WorkersFactory,
        *,
        on_logged: Callable[[list[Ready]], None],
        on_failed: Callable[[BaseException], None],
        clock: Callable[[], float],
    ) -> None:
        self._log, self._on_logged, self._on_failed, self._clock = log, on_logged, on_failed, clock
        self._thread = workers(1, "log")
        self._beside = workers(1, "log-spares")
        self._preparing: asyncio.Future[None] | None = None
        self._waiting: list[Ready] = []
        self._early: dict[int, Ready] = {}  # an entry before it isn't here yet
        self._next_seq = log.last[1] + 1
        self._running = False
        self._broken = False
        self._since: float | None = None  # when the thread began with what it is at

    @property
    def idle(self) -> bool:
        """Nothing is being written or waits to be."""
        return not self._running and not self._waiting

    @property
    def handed(self) -> int:
        """The last entry that is durable or being written."""
        return self._next_seq - 1

    def held(self, seconds: float) -> bool:
        """The disk of the log has held the thread for so long."""
        since = self._since
        return since is not None and self._clock() - since > seconds

    def append(self, ready: Ready) -> None:
        self._early[ready.entry.seq] = ready
        while self._next_seq in self._early:
            self._waiting.append(self._early.pop(self._next_seq))
            self._next_seq += 1
        self._kick()

    def forget_early(self) -> None:
        """Forget what waits for earlier entries; what was handed over is still being written."""
        self._early.clear()

    def rewind(self, seq: int) -> None:
        """The log ends at `seq` now, and nothing is being written."""
        self._early.clear()
        self._next_seq = seq + 1

    async def cut(self, after: int) -> None:
        """Forget the log's entries behind `after`, durably; nothing is being written. Raises OSError."""
        await self._thread.run(self._log.cut, after)

    async def begin(self, epochs: tuple[tuple[int, int], ...]) -> None:
        """Begin the log anew behind what `epochs` tells of; nothing is being written. Raises OSError."""
        await self._thread.run(self._log.begin, self._log.lineage, epochs)
        self.rewind(epochs[-1][1] if epochs else 0)

    async def trim(self, upto: int) -> None:
        """What entries up to `upto` say and bring is durable elsewhere. Raises OSError."""
        if gone := await self._thread.run(self._log.detach, upto):
            await self._beside.run(self._log.release, gone)

    def stop(self) -> None:
        self._thread.stop()
        self._beside.stop()

    def _again(self) -> None:
        self._running = False
        self._kick()

    def _prepare(self) -> None:
        """Have room for what comes, before anybody waits for it."""
        if not self._log.wants_spares or (self._preparing and not self._preparing.done()):
            return
        self._preparing = self._beside.run(self._log.prepare)
        self._preparing.add_done_callback(_prepared)

    def _kick(self) -> None:
        if self._running or self._broken or not self._waiting:
            return
        self._running = True
        batch = self._waiting[:BATCH_ENTRIES_MAX]
        del self._waiting[:BATCH_ENTRIES_MAX]
        self._thread.run(self._write, batch).add_done_callback(lambda job: self._written(job, batch))

    def _write(self, batch: list[Ready]) -> None:
        self._since = self._clock()
        crash.point("log.before_append")
        try:
            self._log.append([record_of(one.entry, one.location, one.chunks) for one in batch])
        except OSError as error:
            if error.errno in NO_ROOM:
                self._since = None  # it answers
            raise
        self._since = None
        crash.point("log.after_append")

    def _written(self, job: "asyncio.Future[None]", batch: list[Ready]) -> None:
        if job.cancelled():
            return
        error = job.exception()
        if isinstance(error, OSError) and error.errno in NO_ROOM and not self._log.broken:
            log.error("log.full")  # nothing of it was written, and those who wait do so until there is room
            self._waiting[:0] = batch
            asyncio.get_running_loop().call_later(FULL_RETRY_S, self._again)
            return
        if error:
            self._broken = True  # what came before may be lost: nothing later may become durable in its place
            self._on_failed(error)
            return
        self._running = False
        self._on_logged(batch)
        self._kick()
        self._prepare()


def _prepared(job: "asyncio.Future[None]") -> None:
    if not job.cancelled() and isinstance(error := job.exception(), OSError):
        log.warning("log.no_spares", error=reason_of(error))  # a full disk is told of where it matters
