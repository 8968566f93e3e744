"""When heads are kept: soon after an object came, a quarter of a core at most; all are gone through now and then."""

import asyncio
from typing import Any, Final

import msgspec
import structlog

from gateway.archive.head_process import Done, Task
from gateway.workers.pool import Worker, WorkFailed
from storage.store import NotServing, Store

log = structlog.get_logger()

FIRST_S: Final = 30.0  # after the start of the gateway
LOOK_S: Final = 5.0
SWEEP_S: Final = 900.0  # from the end of one pass through all to the next
IDLE_S: Final = 60.0  # then the process is ended
HUNG_S: Final = 60.0
FAILED_S: Final = 300.0
REST: Final = 3.0  # times as long as it worked


class HeadKeeping:
    def __init__(self, store: Store) -> None:
        self._store, self._worker = store, Worker("gateway.archive.head_process")
        self._seen = 0  # the last entry when nothing newer was left to be looked at

    async def run(self) -> None:
        """Until it is cancelled."""
        try:
            await asyncio.sleep(FIRST_S)
            while True:
                try:
                    await self._tail()
                    await self._sweep()
                except WorkFailed as error:
                    log.error("heads.not_kept", why=str(error))
                    self._store.forget_readers()
                    await asyncio.sleep(FAILED_S)
                except NotServing:
                    await asyncio.sleep(LOOK_S)
        finally:
            await self._worker.stop()

    async def _tail(self) -> None:
        """What is new, until there is time for a pass through all."""
        loop = asyncio.get_running_loop()
        began = worked = loop.time()
        while loop.time() - began < SWEEP_S:
            applied = self._store.applied
            if applied != self._seen:
                worked = loop.time()
                done = await self._ask("keep", 0)
                while done.next:
                    done = await self._ask("keep", done.next)
                self._seen = applied
            elif loop.time() - worked > IDLE_S:
                await self._worker.stop()
            await asyncio.sleep(LOOK_S)

    async def _sweep(self) -> None:
        """Forget what is gone, and see to what couldn't be read when it came."""
        done = await self._ask("keep", 1)
        kept, gone = done.kept, done.gone
        while done.next:
            done = await self._ask("keep", done.next)
            kept, gone = kept + done.kept, gone + done.gone
        done = await self._ask("prune", 0)
        while done.after:
            done = await self._ask("prune", 0, done.after)
        if kept or gone:
            log.info("heads.swept", kept=kept, gone=gone)

    async def _ask(self, verb: str, start: int, after: bytes = b"") -> Done:
        task = Task(self._store.for_other_processes(), self._store.usable_volumes, start, after)
        found: Any = await self._worker.ask(msgspec.msgpack.encode((verb, task)), HUNG_S)
        done = msgspec.convert(found, Done)
        await asyncio.sleep(REST * done.took_s)
        return done
