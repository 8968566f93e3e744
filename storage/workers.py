"""Threads for work that blocks, with a lighter hand-over than `run_in_executor`: it is paid for every object."""

import asyncio
import errno
import threading
import time
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any, Final, Protocol, TypeVar

T = TypeVar("T")
THREADS_MAX: Final = 256
STOP_S: Final = 30.0
_Job = tuple[asyncio.AbstractEventLoop, "asyncio.Future[Any]", Callable[..., Any], tuple[Any, ...]]


class Threads(Protocol):
    """Where blocking work is done."""

    def run(self, function: Callable[..., T], *args: Any) -> "asyncio.Future[T]": ...
    def stop(self) -> None: ...
    @property
    def waiting(self) -> int:
        """Jobs for which no thread is free."""
        ...

    def leave(self) -> None:
        """End the threads some time; nobody waits for the one that a disk holds."""
        ...

    def reinforce(self, stuck_s: float) -> int:
        """Replace threads that have been at one job for so long, as a disk that hangs has them; returns how many."""
        ...


WorkersFactory = Callable[[int, str], Threads]  # (number of threads, name)


class Workers:
    """`run` is called on an event loop; its future is resolved there, in the order in which jobs end."""

    def __init__(self, count: int, name: str) -> None:
        self._jobs: SimpleQueue[_Job | None] = SimpleQueue()
        self._count, self._name = count, name
        self._threads: list[threading.Thread] = []
        self._since: dict[int, float] = {}  # thread -> when it began the job that it is at
        for _ in range(count):
            self._add()

    def _add(self) -> None:
        thread = threading.Thread(target=self._work, name=f"{self._name}-{len(self._threads)}", daemon=True)
        self._threads.append(thread)
        thread.start()

    def reinforce(self, stuck_s: float) -> int:
        now = time.monotonic()
        stuck = sum(now - since > stuck_s for since in list(self._since.values()))
        while len(self._threads) - stuck < self._count and len(self._threads) < THREADS_MAX:
            self._add()
        return stuck

    def run(self, function: Callable[..., T], *args: Any) -> "asyncio.Future[T]":
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()
        self._jobs.put((loop, future, function, args))
        return future

    @property
    def waiting(self) -> int:
        return self._jobs.qsize()

    def stop(self) -> None:
        """Let the jobs that were handed over end, then the threads. One that a disk holds isn't waited for."""
        self.leave()
        deadline = time.monotonic() + STOP_S
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))

    def leave(self) -> None:
        for _ in self._threads:
            self._jobs.put(None)

    def _work(self) -> None:
        me = threading.get_ident()
        while (job := self._jobs.get()) is not None:
            loop, future, function, args = job
            self._since[me] = time.monotonic()
            try:
                result, error = function(*args), None
            except BaseException as raised:  # whatever it is belongs to whoever waits for the job
                result, error = None, raised
            del self._since[me]
            try:
                loop.call_soon_threadsafe(resolve, future, result, error)
            except RuntimeError:
                return  # the loop is closed: nobody waits any more
            del job, future, result, error


async def within(job: "asyncio.Future[T]", seconds: float) -> T:
    """The result of a job that a disk may hold for ever. Raises OSError (ETIMEDOUT) when it takes too long; the job
    itself goes on."""
    try:
        async with asyncio.timeout(seconds):  # not wait_for: before Python 3.12 that may swallow a cancellation
            return await asyncio.shield(job)
    except TimeoutError:
        raise OSError(errno.ETIMEDOUT, "the disk doesn't answer") from None
    finally:  # it was too late, or whoever waited was cancelled: nobody looks at it any more
        job.add_done_callback(lambda done: done.cancelled() or done.exception())


def resolve(future: "asyncio.Future[Any]", result: Any, error: BaseException | None) -> None:
    """Tell whoever waits for a job how it ended, unless he gave up."""
    if future.done():
        return
    if error is None:
        future.set_result(result)
    else:
        future.set_exception(error)
