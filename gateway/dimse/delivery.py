"""Sending instances over an association, one after the other, some read ahead; and how sub-operations are counted."""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from typing import Final, Protocol

import structlog

from conf.telling import reason_of
from gateway.archive.converting import CannotConvert
from gateway.dicom.dimse import Request, is_failure
from gateway.dicom.sop_classes import UNCOMPRESSED
from gateway.dimse.connection import AssociationEnded
from gateway.dimse.context import Context
from gateway.dimse.requestor import store_request, whole
from storage.state.model import Instance
from storage.store import Unavailable

log = structlog.get_logger()

READ_AHEAD: Final = 2
# Of an object on its way out, whatever its length: what goes out, what comes after that, and what is read meanwhile.
IN_MEMORY_BYTES: Final = 12 << 20


@dataclass
class Tally:
    """Sub-operations, as the responses count them."""

    remaining: int
    completed: int = 0
    failed: int = 0
    warning: int = 0
    failed_uids: list[str] = field(default_factory=list)

    @property
    def counts(self) -> tuple[int, int, int, int]:
        return self.remaining, self.completed, self.failed, self.warning

    def fail(self, uid: str) -> None:
        self.remaining -= 1
        self.failed += 1
        self.failed_uids.append(uid)

    def answered(self, uid: str, status: int) -> None:
        if is_failure(status):
            self.fail(uid)
            return
        self.remaining -= 1
        if status:
            self.warning += 1
        else:
            self.completed += 1


class Sender(Protocol):
    @property
    def may_send(self) -> bool: ...
    async def invoke(
        self, context_id: int, elements: dict[int, int | str], data: AsyncIterator[memoryview], timeout_s: float
    ) -> Request: ...


@dataclass(frozen=True)
class Delivery:
    """How instances go over one association."""

    sender: Sender
    contexts: Mapping[tuple[str, str], int]  # (SOP class, transfer syntax) -> presentation context
    window: int  # requests under way at once
    timeout_s: float
    priority: int
    originator: tuple[str, int] | None

    def context_of(self, sop_class: str, transfer_syntax: str) -> tuple[int, str] | None:
        """(context, transfer syntax): as stored if that was agreed on, or else something to convert to."""
        for syntax in (transfer_syntax, *UNCOMPRESSED):
            number = self.contexts.get((sop_class, syntax))
            if number is not None:
                return number, syntax
        return None


class Sending:
    """Sends instances over an association until it has ended or `stop()` says so."""

    def __init__(
        self,
        delivery: Delivery,
        context: Context,
        tally: Tally,
        stop: Callable[[], bool],
        progress: Callable[[], None],
    ) -> None:
        self._delivery, self._context = delivery, context
        self._tally, self._stop, self._progress = tally, stop, progress
        self._turn = asyncio.Semaphore(delivery.window)
        self._ahead = asyncio.Semaphore(delivery.window + READ_AHEAD)
        self.ended = False
        self.got_through = False
        self._todo: deque[Instance] = deque()

    async def run(self, todo: deque[Instance]) -> None:
        """Take from `todo`, as others may; what was neither sent nor failed is there again afterwards."""
        self._todo = todo
        async with asyncio.TaskGroup() as group:
            while todo:
                await self._ahead.acquire()
                if self.ended or self._stop() or not todo:
                    return
                group.create_task(self._one(todo.popleft()))

    async def _one(self, instance: Instance) -> None:
        put = instance.put
        try:
            agreed = self._delivery.context_of(put.sop_class, put.transfer_syntax)
            if agreed is None:
                self._failed(put.sop_instance, "no presentation context for it was agreed on")
                return
            async with self._context.memory.taken(min(put.length, IN_MEMORY_BYTES)):
                await self._read_and_send(instance, *agreed)
        except (Unavailable, CannotConvert, OSError) as error:
            self._failed(put.sop_instance, reason_of(error))
        finally:
            self._ahead.release()
        self._progress()

    async def _read_and_send(self, instance: Instance, context_id: int, syntax: str) -> None:
        put = instance.put
        as_stored = syntax == put.transfer_syntax
        source = await self._context.store.open(instance, whole=not as_stored)
        data = source.blocks() if as_stored else whole(await self._context.converter.convert(source, syntax))
        async with self._turn:
            if self.ended or self._stop():
                self._todo.appendleft(instance)
                return
            await self._send(context_id, put.sop_class, put.sop_instance, data)

    async def _send(self, context_id: int, sop_class: str, sop_instance: str, data: AsyncIterator[memoryview]) -> None:
        delivery = self._delivery
        command = store_request(sop_class, sop_instance, delivery.priority, delivery.originator)
        try:
            answer = await delivery.sender.invoke(context_id, command, data, delivery.timeout_s)
        except (AssociationEnded, OSError, Unavailable) as error:
            # A data set that broke off, if not before any of it was sent; or an answer that may come late: start anew.
            is_late = isinstance(error, TimeoutError) and error.errno is None  # else it is the disk's
            self.ended |= is_late or not delivery.sender.may_send
            self._failed(sop_instance, reason_of(error))
            return
        if is_failure(answer.status):
            log.warning("retrieve.refused", status=f"0x{answer.status:04X}")
        self.got_through |= not is_failure(answer.status)
        self._tally.answered(sop_instance, answer.status)

    def _failed(self, sop_instance: str, why: str) -> None:
        log.warning("retrieve.failed", sop_instance=sop_instance, why=why)
        self._tally.fail(sop_instance)
