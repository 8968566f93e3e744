"""Threads for work that blocks, with a lighter hand-over than `run_in_executor`: it is paid for every object."""

import asyncio
import threading
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any, Protocol, TypeVar

T = TypeVar("T")
_Job = tuple[asyncio.AbstractEventLoop, "asyncio.Future[Any]", Callable[..., Any], tuple[Any, ...]]


class Threads(Protocol):
    """Where blocking work is done."""

    def run(self, function: Callable[..., T], *args: Any) -> "asyncio.Future[T]": ...
    def stop(self) -> None: ...


WorkersFactory = Callable[[int, str], Threads]  # (number of threads, name)


class Workers:
    """`run` is called on an event loop; its future is resolved there, in the order in which jobs end."""

    def __init__(self, count: int, name: str) -> None:
        self._jobs: SimpleQueue[_Job | None] = SimpleQueue()
        self._threads = [
            threading.Thread(target=self._work, name=f"{name}-{number}", daemon=True) for number in range(count)
        ]
        for thread in self._threads:
            thread.start()

    def run(self, function: Callable[..., T], *args: Any) -> "asyncio.Future[T]":
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()
        self._jobs.put((loop, future, function, args))
        return future

    def stop(self) -> None:
        """Let the jobs that were handed over end, then the threads."""
        for _ in self._threads:
            self._jobs.put(None)
        for thread in self._threads:
            thread.join()

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            loop, future, function, args = job
            try:
                result, error = function(*args), None
            except BaseException as raised:  # whatever it is belongs to whoever waits for the job
                result, error = None, raised
            try:
                loop.call_soon_threadsafe(resolve, future, result, error)
            except RuntimeError:
                return  # the loop is closed: nobody waits any more
            del job, future, result, error


def resolve(future: "asyncio.Future[Any]", result: Any, error: BaseException | None) -> None:
    """Tell whoever waits for a job how it ended, unless he gave up."""
    if future.done():
        return
    if error is None:
        future.set_result(result)
    else:
        future.set_exception(error)
