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

OPEN_MAX: Final = 1000
OPEN_OF_ONE_MAX: Final = 100  # of one client
RUNNING_MAX: Final = 32

Handler = Callable[[Task], Awaitable[str]]  # returns the outcome, for the log
Lane = Callable[[Task], str]


class Jobs:
    def __init__(self, store: Store) -> None:
        self._store = store
        self._handlers: dict[str, tuple[Handler, Lane]] = {}
        self._running: dict[str, asyncio.Task[None]] = {}
        self._lanes: dict[str, str] = {}  # of those that are running: lane -> task
        self._owners: dict[str, str] = {}  # of those that are open, as far as was looked: task -> who it is for
        self._attended: set[str] = set()
        self._wake = asyncio.Event()

    def handle(self, kind: str, handler: Handler, lane: Lane = lambda task: "") -> None:
        """`lane(task)`: of those with the same lane one is done at a time; "" for none."""
        self._handlers[kind] = (handler, lane)

    def refuses(self, by: str) -> str:
        """Why nothing more can be promised now, to anybody or to this client; "" if it can."""
        if self._store.rows.task_count() >= OPEN_MAX:
            return "too many requests are still open"
        if sum(owner == by for owner in self._owners.values()) >= OPEN_OF_ONE_MAX:
            return "too many requests of yours are still open"
        return ""

    async def begin(self, kind: str, by: str, body: bytes) -> Task:
        """Promise something, on both nodes. The caller sees to it until it says `end` or `leave`. Raises NotServing."""
        task = Task(str(uuid.uuid4()), kind, by, body, time.time())
        self._attended.add(task.id)
        self._owners[task.id] = by
        try:
            await self._store.commit(task)
        except BaseException:
            self._attended.discard(task.id)
            self._owners.pop(task.id, None)
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
        self._owners.pop(task.id, None)
        log.info("task.done", kind=task.kind, by=task.by, outcome=outcome)

    async def run(self) -> None:
        """Start what is promised and not being done, as long as this node is the primary."""
        while True:
            self._wake.clear()
            if self._store.may_serve:
                try:
                    await self._start_what_is_open()
                except Exception as error:  # top of the loop: what was promised is looked at again
                    log.error("tasks.not_read", error=place_of(error))
            elif self._running:
                for running in self._running.values():
                    running.cancel()
            try:
                await asyncio.wait_for(self._wake.wait(), POLL_S)
            except TimeoutError:
                continue

    async def _start_what_is_open(self) -> None:
        await self._store.settled()
        open_now = await self._store.run(self._store.rows.task_ids)
        self._owners = {one: self._owners.get(one, "") for one in (*open_now, *self._attended)}
        for task_id in open_now:
            if len(self._running) >= RUNNING_MAX:
                return
            if task_id in self._running or task_id in self._attended:
                continue
            task = await self._store.run(self._store.rows.task, task_id)
            if task is not None:
                self._start(task)

    def _start(self, task: Task) -> None:
        self._owners[task.id] = task.by
        if task.id in self._running or task.id in self._attended or task.kind not in self._handlers:
            return
        lane = self._handlers[task.kind][1](task)
        if lane in self._lanes:
            return
        if lane:
            self._lanes[lane] = task.id
        running = asyncio.get_running_loop().create_task(self._do(task))
        self._running[task.id] = running

        def ended(done: "asyncio.Task[None]") -> None:
            self._running.pop(task.id, None)
            self._lanes.pop(lane, None)
            self._wake.set()
            if not done.cancelled() and (error := done.exception()):
                log.error("task.failed", kind=task.kind, error=place_of(error))

        running.add_done_callback(ended)

    async def _do(self, task: Task) -> None:
        for attempt in range(ATTEMPTS):
            try:
                await self.end(task, await self._handlers[task.kind][0](task))
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
