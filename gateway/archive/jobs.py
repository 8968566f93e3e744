"""Work that was promised to a client: it stands in the replicated log until it is over, and the primary of the day does
it. A C-MOVE under way and a commitment that is to be reported survive a failover like this.
"""

import asyncio
import time
import uuid
from collections.abc import Awaitable, Callable
from typing import Final

import structlog

from conf.telling import place_of
from storage.state.model import Task, TaskDone
from storage.store import NotServing, Store

log = structlog.get_logger()

POLL_S: Final = 1.0
ATTEMPTS: Final = 6
RETRY_S: Final = 5.0

Handler = Callable[[Task], Awaitable[str]]  # returns the outcome, for the log


class Jobs:
    def __init__(self, store: Store) -> None:
        self._store = store
        self._handlers: dict[str, Handler] = {}
        self._running: dict[str, asyncio.Task[None]] = {}
        self._attended: set[str] = set()
        self._wake = asyncio.Event()

    def handle(self, kind: str, handler: Handler) -> None:
        self._handlers[kind] = handler

    async def begin(self, kind: str, by: str, body: bytes) -> Task:
        """Promise something, on both nodes. The caller sees to it until it says `end` or `leave`. Raises NotServing."""
        task = Task(str(uuid.uuid4()), kind, by, body, time.time())
        self._attended.add(task.id)
        try:
            await self._store.commit(task)
        except BaseException:
            self._attended.discard(task.id)
            raise
        return task

    def leave(self, task: Task) -> None:
        """The association that saw to it is gone: the work goes on without."""
        self._attended.discard(task.id)
        self._wake.set()

    async def end(self, task: Task, outcome: str) -> None:
        """Raises NotServing; then the next primary does it again."""
        await self._store.commit(TaskDone(task.id, outcome))
        await self._store.settled()  # or it would be found once more
        self._attended.discard(task.id)
        log.info("task.done", kind=task.kind, by=task.by, outcome=outcome)

    async def run(self) -> None:
        """Start what is promised and not being done, as long as this node is the primary."""
        while True:
            self._wake.clear()
            if self._store.may_serve:
                await self._store.settled()
                for task in self._store.rows.tasks():
                    self._start(task)
            elif self._running:
                for running in self._running.values():
                    running.cancel()
            try:
                await asyncio.wait_for(self._wake.wait(), POLL_S)
            except TimeoutError:
                continue

    def _start(self, task: Task) -> None:
        if task.id in self._running or task.id in self._attended or task.kind not in self._handlers:
            return
        running = asyncio.get_running_loop().create_task(self._do(task))
        self._running[task.id] = running
        running.add_done_callback(lambda _: self._running.pop(task.id, None))

    async def _do(self, task: Task) -> None:
        for attempt in range(ATTEMPTS):
            try:
                await self.end(task, await self._handlers[task.kind](task))
                return
            except NotServing:
                return  # the next primary does it
            except Exception as error:  # a broken task must not stop the others, nor be tried for ever
                log.error("task.failed", kind=task.kind, attempt=attempt, error=place_of(error))
            await asyncio.sleep(RETRY_S * 2**attempt)
        await self._given_up(task)

    async def _given_up(self, task: Task) -> None:
        try:
            await self.end(task, "given up")
        except NotServing:
            return
