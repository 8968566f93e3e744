"""Queries, answered by processes of their own: a scan holds up neither the gateway's event loop nor its interpreter."""

import asyncio
import os
from collections.abc import Coroutine
from itertools import count
from typing import Any, Final

import msgspec
import structlog

from conf.telling import place_of
from gateway.archive.asked import Asked, Batch
from gateway.archive.keeping import KeptHeads
from gateway.dicom.identifiers import BadQuery
from gateway.workers.pool import Worker, WorkFailed
from storage.store import NotServing, Store

log = structlog.get_logger()

HUNG_S: Final = 30.0  # for a moment's work


class QueryFailed(Exception):
    """It can't be answered; asked again it may be."""


class QueryProcess:
    """One, that has any number of queries under way."""

    def __init__(self, store: Store, kept: KeptHeads) -> None:
        self._store, self._kept, self._worker = store, kept, Worker("gateway.archive.query_process")
        self._stopped = False
        self._turn = asyncio.Lock()
        self._tasks: set[asyncio.Task[Any]] = set()
        self.running = 0
        self.waiting = 0

    async def ask(self, *job: Any) -> Any:
        """Raises WorkFailed. The process goes on with it also if whoever asked has gone."""
        return await asyncio.shield(self._spawn(self._ask(job)))

    def tell(self, *job: Any) -> None:
        """If it is there."""
        if self._worker.running and not self._stopped:
            self._spawn(self._ask(job))

    def _spawn(self, coroutine: Coroutine[Any, Any, Any]) -> "asyncio.Task[Any]":
        task = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: "asyncio.Task[Any]") -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()  # whoever asked hears of it, if he is there

    async def _ask(self, job: tuple[Any, ...]) -> Any:
        self.waiting += 1
        try:
            await self._turn.acquire()
        finally:
            self.waiting -= 1
        try:
            if self._stopped:
                raise WorkFailed("failed", "the gateway stops")
            return await self._worker.ask(msgspec.msgpack.encode(job), HUNG_S, self._help)
        except WorkFailed:
            if not self._worker.running:
                self._kept.doubt()
                self._store.forget_readers()
            raise
        finally:
            self._turn.release()

    async def _help(self, what: str, seq: int, bytes_max: int) -> bytes | bool | None:
        """What only the gateway knows. Never fails: whoever asks is in the middle of a query."""
        try:
            if what == "unreadable":
                return seq in self._store.unreadable
            return await self._store.beginning(seq, bytes_max)
        except Exception as error:
            log.error("query.help", error=place_of(error))
            return None

    async def stop(self) -> None:
        self._stopped = True
        for task in list(self._tasks):
            task.cancel()
        await self._worker.stop()


class Running:
    """A query under way. A process that ends over it is tried once more, as long as nothing was answered."""

    _numbers = count(1)

    def __init__(self, process: QueryProcess, store: Store, asked: Asked) -> None:
        self._process, self._store, self._asked = process, store, asked
        self._number = 0  # 0: not begun
        self._answered = self._tried_again = self.ended = False
        process.running += 1

    async def more(self) -> Batch:
        """The next answers; none, perhaps, before the end. Raises BadQuery, QueryFailed, NotServing."""
        try:
            batch = await self._batch()
        except WorkFailed as error:
            if error.kind == "bad":
                raise BadQuery(str(error)) from None
            if self._answered or self._tried_again:
                raise QueryFailed(str(error)) from error
            self._tried_again, self._number = True, 0
            self._asked = msgspec.structs.replace(self._asked, heads=False)
            return await self.more()
        if self._store.for_other_processes() != self._asked.catalogue:
            raise NotServing("the state of the other node was taken meanwhile")
        for why in batch.odd:
            log.error("query.answer", error=why)
        self._answered |= bool(batch.answers)
        self.ended = batch.ended
        return batch

    async def _batch(self) -> Batch:
        if self._number:
            found = await self._process.ask("more", self._number)
        else:
            self._number = next(self._numbers)
            found = await self._process.ask("begin", self._number, self._asked)
        return msgspec.convert(found, Batch)

    def close(self) -> None:
        self._process.running -= 1
        if self._number and not self.ended:
            self._process.tell("end", self._number)


def default_processes() -> int:
    return max(1, len(os.sched_getaffinity(0)) // 2)


class Queries:
    def __init__(self, store: Store, processes: int, kept: KeptHeads) -> None:
        """`processes`: 0 for one for two cores. They are started when they are first needed."""
        self._store, self.kept = store, kept
        self._processes = [QueryProcess(store, kept) for _ in range(processes or default_processes())]

    def begin(self, asked: Asked) -> Running:
        """To be closed."""
        return Running(min(self._processes, key=lambda one: one.running), self._store, asked)

    @property
    def waiting(self) -> int:
        """Moments of queries for which no process has time just now."""
        return sum(one.waiting for one in self._processes)

    async def stop(self) -> None:
        for one in self._processes:
            await one.stop()
