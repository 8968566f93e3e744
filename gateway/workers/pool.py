"""Worker processes, started when they are first needed, killed when they hang, started anew when they have ended."""

import asyncio
import contextlib
import os
import sys
from collections.abc import Awaitable, Callable
from typing import Any, Final

import msgspec
import structlog

from gateway.workers.process import READY

log = structlog.get_logger()

START_S: Final = 60.0
END_S: Final = 5.0
ANSWER_BYTES_MAX: Final = 1 << 30
WAITING_MAX: Final = 256


class WorkFailed(Exception):
    """`kind`: "unreadable", "cannot", or "failed" for a worker that crashed, hung, or ran out of memory."""

    def __init__(self, kind: str, why: str) -> None:
        super().__init__(why)
        self.kind = kind


class NotDone(WorkFailed):
    """The worker couldn't be started, or hasn't answered in time."""

    def __init__(self, why: str) -> None:
        super().__init__("failed", why)


Help = Callable[..., Awaitable[Any]]


class Worker:
    """One process, `python -m` a module."""

    def __init__(self, module: str = "gateway.workers.worker") -> None:
        self._module = module
        self._process: asyncio.subprocess.Process | None = None

    async def ask(self, job: bytes, timeout_s: float, help_with: Help | None = None) -> Any:
        """`help_with(*question)` answers what the worker asks meanwhile. Raises WorkFailed."""
        try:
            process = await self._started()
        except (OSError, TimeoutError, EOFError) as error:
            await self.stop()
            raise NotDone("no worker process can be started") from error
        except BaseException:
            await self.stop()  # what it says when it is ready would be taken for an answer
            raise
        try:
            async with asyncio.timeout(timeout_s):
                answer = await self._exchange(process, job, help_with)
        except TimeoutError:
            await self.stop()
            raise NotDone(f"it takes longer than {timeout_s:.0f} s") from None
        except (OSError, EOFError, msgspec.DecodeError) as error:
            await self.stop()
            raise WorkFailed("failed", f"the worker process ended over it ({process.returncode})") from error
        except BaseException:
            await self.stop()  # nobody wants the answer, and it would be taken for that of the next job
            raise
        if answer[0] == "ok":
            return answer[1]
        raise WorkFailed(answer[1], answer[2])

    async def _started(self) -> asyncio.subprocess.Process:
        if self._process is None or self._process.returncode is not None:
            self._process = await asyncio.create_subprocess_exec(
                sys.executable,
                *("-m", self._module),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.DEVNULL,
                env={**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
            )
            assert self._process.stdout is not None
            async with asyncio.timeout(START_S):
                await self._process.stdout.readexactly(len(READY))
        return self._process

    async def _exchange(self, process: asyncio.subprocess.Process, job: bytes, help_with: Help | None) -> Any:
        assert process.stdin is not None
        assert process.stdout is not None
        while True:
            process.stdin.write(len(job).to_bytes(4, "big") + job)
            await process.stdin.drain()
            size = int.from_bytes(await process.stdout.readexactly(4), "big")
            if size > ANSWER_BYTES_MAX:
                raise EOFError
            answer = msgspec.msgpack.decode(await process.stdout.readexactly(size))
            if answer[0] != "asks" or help_with is None:
                return answer
            job = msgspec.msgpack.encode(await help_with(*answer[1:]))

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.returncode is None

    async def stop(self) -> None:
        process, self._process = self._process, None
        if process is not None and process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            with contextlib.suppress(TimeoutError):  # one that a disk holds ends when that answers
                async with asyncio.timeout(END_S):
                    await process.wait()


class Pool:
    """`ask` waits for a free worker; jobs beyond WAITING_MAX are turned down at once."""

    def __init__(self, count: int) -> None:
        self._all = [Worker() for _ in range(count)]
        self._free: asyncio.Queue[Worker] = asyncio.Queue()
        for worker in self._all:
            self._free.put_nowait(worker)
        self._waiting = 0

    async def ask(self, name: str, *arguments: Any, timeout_s: float = 30.0) -> Any:
        """Raises WorkFailed."""
        if self._waiting >= WAITING_MAX:
            raise WorkFailed("failed", "too much is waiting to be read")
        self._waiting += 1
        try:
            worker = await self._free.get()
        finally:
            self._waiting -= 1
        try:
            return await worker.ask(msgspec.msgpack.encode([name, arguments]), timeout_s)
        except WorkFailed as error:
            if error.kind == "failed":
                log.error("worker.failed", job=name, why=str(error))
            raise
        finally:
            self._free.put_nowait(worker)

    @property
    def waiting(self) -> int:
        """Jobs for which no worker is free."""
        return self._waiting

    async def stop(self) -> None:
        for worker in self._all:
            await worker.stop()
