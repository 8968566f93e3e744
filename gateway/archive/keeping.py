"""When heads are kept: soon after an object came, a quarter of a core at most; all are gone through now and then."""

import asyncio
import shutil
from pathlib import Path
from typing import Any, Final

import msgspec
import structlog

from conf.telling import reason_of
from gateway.archive.head_process import Done, Task
from gateway.workers.pool import NotDone, Worker, WorkFailed
from storage.heads import FOLDER
from storage.store import NotServing, Store

log = structlog.get_logger()

FIRST_S: Final = 30.0  # after the start of the gateway
LOOK_S: Final = 5.0
SWEEP_S: Final = 900.0  # from the end of one pass through all to the next, and
SWEEPS: Final = 10.0  # times as long as it took
IDLE_S: Final = 60.0  # then the process is ended
HUNG_S: Final = 60.0
FAILED_S: Final = 300.0
REST: Final = 3.0  # times as long as it worked
ROOM: Final = 4  # times what the catalogue's disk must keep free, for heads to be kept


class KeptHeads:
    """Whether they may be used."""

    def __init__(self, wanted: bool) -> None:
        self.wanted, self.sound = wanted, True

    @property
    def usable(self) -> bool:
        return self.wanted and self.sound

    def doubt(self) -> None:
        """A process that may have read them has ended unasked."""
        self.sound = False


class HeadKeeping:
    def __init__(self, store: Store, kept: KeptHeads) -> None:
        self._store, self._kept, self._worker = store, kept, Worker("gateway.archive.head_process")
        self._seen = 0  # the last entry when nothing newer was left to be looked at
        self._no_room = False
        self._found_sound = False  # by the last check, since which not all were gone through
        self._condemned = False

    async def run(self) -> None:
        """Until it is cancelled."""
        try:
            if not self._kept.wanted:
                await self._discard("dicom.keep_heads is false")
                return
            await asyncio.sleep(FIRST_S)
            while True:
                await self._try()
        finally:
            await self._worker.stop()

    async def _try(self) -> None:
        """As long as all goes well."""
        try:
            while True:
                await self._look_after_new_ones(SWEEP_S)
                loop = asyncio.get_running_loop()
                begun = loop.time()
                await self._sweep()
                await self._look_after_new_ones(SWEEPS * (loop.time() - begun))
        except (WorkFailed, OSError) as error:
            log.error("heads.not_kept", why=reason_of(error) if isinstance(error, OSError) else str(error))
            if isinstance(error, WorkFailed) and error.kind == "failed" and not isinstance(error, NotDone):
                self._kept.doubt()
                self._condemned = self._found_sound  # they make trouble, though nothing was found that is wrong
            self._store.forget_readers()
            await asyncio.sleep(FAILED_S)
        except NotServing:
            await asyncio.sleep(LOOK_S)

    async def _look_after_new_ones(self, seconds: float) -> None:
        loop = asyncio.get_running_loop()
        until, worked = loop.time() + seconds, loop.time()
        while loop.time() < until:
            if await self._new_ones():
                worked = loop.time()
            elif loop.time() - worked > IDLE_S:
                await self._worker.stop()
            await asyncio.sleep(LOOK_S)

    async def _new_ones(self) -> bool:
        """Whether there were any."""
        if not self._kept.sound:
            await self._check()
        applied, start, worked = self._store.applied, 0, False
        while await self._has_room() and applied != self._seen:
            start, worked = (await self._ask("keep", start)).next, True
            if not start:
                self._seen = applied
        return worked

    async def _sweep(self) -> None:
        """Forget what is gone, and see to what couldn't be read when it came. New ones don't wait for its end."""
        kept = gone = 0
        start = 1
        while start:
            await self._new_ones()
            if self._no_room:  # it has looked last of all
                return
            done = await self._ask("keep", start)
            start, kept, gone = done.next, kept + done.kept, gone + done.gone
        done = await self._ask("prune", 0)
        while done.after:
            done = await self._ask("prune", 0, done.after)
        self._found_sound = False
        if kept or gone:
            log.info("heads.swept", kept=kept, gone=gone)

    async def _check(self) -> None:
        """Those in which something is wrong are begun anew, and those that make trouble though nothing is found."""
        try:
            if self._condemned:
                raise WorkFailed("failed", "they make trouble, though nothing is found that is wrong with them")
            done = await self._ask("check", 1)
            while done.next:
                done = await self._ask("check", done.next)
            done = await self._ask("check", 0)
            while done.after:
                done = await self._ask("check", 0, done.after)
            self._found_sound = True
        except NotDone:
            raise
        except WorkFailed as error:
            if error.kind != "failed":
                raise
            await self._discard(str(error))
            self._found_sound = self._condemned = False
        self._kept.sound = True

    async def _has_room(self) -> bool:
        """What was taken comes first. Where it is really narrow, they make room."""
        free, least = await self._store.state_room()
        if (free < ROOM * least) != self._no_room:
            self._no_room = not self._no_room
            log.warning("heads.room", kept=not self._no_room, free_bytes=free)
        if free < ROOM * least / 2:
            await self._discard("the disk of the catalogue is nearly full")
        return not self._no_room

    async def _discard(self, why: str) -> None:
        await self._worker.stop()
        folder = Path(self._store.for_other_processes()[0]).parent / FOLDER
        if folder.exists():
            log.warning("heads.discarded", why=why)
            await asyncio.to_thread(shutil.rmtree, folder, True)
        self._seen = 0

    async def _ask(self, verb: str, start: int, after: bytes = b"") -> Done:
        task = Task(self._store.for_other_processes(), self._store.usable_volumes, start, after)
        found: Any = await self._worker.ask(msgspec.msgpack.encode((verb, task)), HUNG_S)
        done = msgspec.convert(found, Done)
        await asyncio.sleep(REST * done.took_s)
        return done
