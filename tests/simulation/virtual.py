"""An asyncio loop in virtual time, with processes that can be killed (-9) and stopped (SIGSTOP).

Every callback belongs to the process whose context it was scheduled in. A stopped process's callbacks are parked; a
dead one's are dropped, `finally` blocks included, as the kernel would.
"""

import asyncio
import contextvars
import selectors
from collections.abc import Callable, Coroutine
from typing import Any


class Process:
    def __init__(self, name: str) -> None:
        self.name = name
        self.dead = False
        self.stopped = False
        self.parked: list[tuple[Callable[..., Any], tuple[Any, ...], contextvars.Context]] = []


_process: contextvars.ContextVar[Process | None] = contextvars.ContextVar("process", default=None)


class _NoSockets(selectors.BaseSelector):
    """Waiting is done by moving the clock."""

    def __init__(self) -> None:
        self.loop: VirtualLoop | None = None
        self._keys: dict[Any, selectors.SelectorKey] = {}

    def register(self, fileobj: Any, events: int, data: Any = None) -> selectors.SelectorKey:
        self._keys[fileobj] = selectors.SelectorKey(fileobj, 0, events, data)
        return self._keys[fileobj]

    def unregister(self, fileobj: Any) -> selectors.SelectorKey:
        return self._keys.pop(fileobj)

    def select(self, timeout: float | None = None) -> list[Any]:
        if timeout is None:
            raise RuntimeError("nothing will ever happen again")
        if self.loop and timeout > 0:
            self.loop.now += timeout
        return []

    def get_map(self) -> Any:
        return self._keys


class VirtualLoop(asyncio.SelectorEventLoop):
    def __init__(self) -> None:
        selector = _NoSockets()
        self.now = 1000.0
        super().__init__(selector)
        selector.loop = self
        self.set_exception_handler(self._failed)
        self.failures: list[BaseException] = []

    def time(self) -> float:
        return self.now

    def _failed(self, _loop: Any, context: dict[str, Any]) -> None:
        error = context.get("exception")
        if error is not None and type(error).__name__ != "PowerCut":
            self.failures.append(error)

    def _asyncgen_finalizer_hook(self, agen: Any) -> None:
        """What a dead process was iterating over is dropped, not closed."""

    def call_soon(self, callback: Any, *args: Any, context: Any = None) -> Any:
        context = context or contextvars.copy_context()
        process = context.get(_process)
        if process is not None:
            args, callback = (process, callback, args, context), self._gated
        return super().call_soon(callback, *args, context=context)

    def call_soon_threadsafe(self, callback: Any, *args: Any, context: Any = None) -> Any:
        return self.call_soon(callback, *args, context=context)  # there is one thread

    def call_at(self, when: float, callback: Any, *args: Any, context: Any = None) -> Any:
        context = context or contextvars.copy_context()
        process = context.get(_process)
        if process is not None:
            args, callback = (process, callback, args, context), self._gated
        return super().call_at(when, callback, *args, context=context)

    def _gated(self, process: Process, callback: Any, args: tuple[Any, ...], context: contextvars.Context) -> None:
        if process.dead:
            return
        if process.stopped:
            process.parked.append((callback, args, context))
            return
        callback(*args)

    def resume(self, process: Process) -> None:
        process.stopped = False
        parked, process.parked = process.parked, []
        for callback, args, context in parked:
            super().call_soon(self._gated, process, callback, args, context, context=context)

    def within(self, process: Process | None) -> contextvars.Context:
        context = contextvars.copy_context()
        context.run(_process.set, process)
        return context

    def spawn(self, process: Process, coroutine: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        task = self.create_task(coroutine, context=self.within(process))
        task._log_destroy_pending = False  # type: ignore[attr-defined]  # killed processes leave theirs behind
        return task

    def post(self, process: Process | None, delay_s: float, callback: Callable[..., Any], *args: Any) -> None:
        """Run `callback` in `process` after `delay_s`."""
        self.call_at(self.now + delay_s, callback, *args, context=self.within(process))
