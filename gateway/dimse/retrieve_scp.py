"""C-GET and C-MOVE as services: sub-operations with their counts, cancel, and the list of what failed."""

import asyncio
import time
from collections import deque
from collections.abc import Callable
from typing import ClassVar, Final

import msgspec
import structlog
from pydicom import Dataset

from gateway.archive.destinations import Destination
from gateway.archive.select import Wanted, instances, wanted
from gateway.dicom.dimse import Status, encode_response
from gateway.dicom.identifiers import BadQuery, encode_identifier
from gateway.dicom.sop_classes import GET_MODELS, MOVE_MODELS
from gateway.dimse.context import Context
from gateway.dimse.delivery import Delivery, Sending, Tally
from gateway.dimse.moving import Move
from gateway.dimse.service import Collector
from storage.state.model import Instance, Task
from storage.store import NotServing

log = structlog.get_logger()

MOVE_TASK: Final = "move"
MOVE_PATIENCE_S: Final = 3600.0  # for a destination that doesn't take what a C-MOVE without requester sends
FIRST_RETRY_S: Final = 2.0
RETRY_S_MAX: Final = 60.0


class MoveBody(msgspec.Struct, frozen=True):
    """What a C-MOVE promised."""

    destination: str
    level: str
    keys: dict[str, tuple[str, ...]]
    priority: int
    originator: str
    message_id: int


class Retriever(Collector):
    """What C-GET and C-MOVE have in common."""

    models: ClassVar = {**GET_MODELS, **MOVE_MODELS}

    async def respond(self) -> None:
        call = self.call
        try:
            asked = await self._read(wanted, self.models[call.abstract_syntax])
        except BadQuery as error:
            call.answer(Status.DATA_SET_MISMATCH, str(error))
            return
        await self._context.store.settled()
        try:
            found = await _found(self._context, asked)
        except BadQuery as error:
            call.answer(Status.DATA_SET_MISMATCH, str(error))
            return
        if not self._context.store.may_read:  # looked at after reading: a stopped process must not tell old news
            raise NotServing("no longer the primary")
        await self._retrieve(asked, found)

    async def _retrieve(self, asked: Wanted, found: list[Instance]) -> None:
        raise NotImplementedError

    def _pending(self, tally: Tally) -> None:
        """How far it is, after each that isn't the last."""
        if tally.remaining and self.call.peer.may_send:
            response = encode_response(self.call.request, Status.PENDING, counts=tally.counts)
            self._tell(self.call.context_id, response)

    def _tell(self, context_id: int, response: bytes) -> None:
        self.call.peer.send(context_id, response)

    def _stop(self) -> bool:
        return self._cancelled() or not self._context.store.may_read

    def _cancelled(self) -> bool:
        return self.call.peer.cancelled(self.call.request.message_id)

    def _final(self, tally: Tally) -> None:
        status, comment = Status.SUCCESS, ""
        if self._cancelled() and tally.remaining:
            status = Status.CANCEL
        elif tally.failed and not (tally.completed or tally.warning):
            status, comment = Status.CANNOT_PERFORM, "no sub-operation succeeded"
        elif tally.failed or tally.warning:
            status = Status.SUB_OPERATIONS_FAILED
        data = None
        if tally.failed_uids:
            failed = Dataset()
            failed.FailedSOPInstanceUIDList = tally.failed_uids
            data = encode_identifier(failed, self.call.transfer_syntax)
        response = encode_response(
            self.call.request, status, has_data=data is not None, comment=comment, counts=tally.counts
        )
        self.call.outcome.count = tally.completed + tally.warning
        self.call.respond(status, response, data, comment)


class Getter(Retriever):
    """C-GET: over the association that asked, on the contexts for which it took the SCP's part."""

    def _tell(self, context_id: int, response: bytes) -> None:
        self.call.peer.send_soon(context_id, response)

    async def _retrieve(self, asked: Wanted, found: list[Instance]) -> None:
        peer, context, tally = self.call.peer, self._context, Tally(len(found))
        contexts = {
            (context.abstract_syntax, context.transfer_syntax): number
            for number, context in peer.contexts.items()
            if context.may_store
        }
        delivery = Delivery(peer, contexts, 1, context.settings.message_timeout_s, self.call.request.priority, None)
        sending, todo = Sending(delivery, context, tally, self._stop, lambda: self._pending(tally)), deque(found)
        await sending.run(todo)
        if not context.store.may_read:
            raise NotServing("no longer the primary")
        if not self._cancelled():
            for instance in todo:
                tally.fail(instance.put.sop_instance)
        self._final(tally)


class Mover(Retriever):
    """C-MOVE: to a configured destination. The promise is in the replicated log, a failover doesn't end it."""

    async def _retrieve(self, asked: Wanted, found: list[Instance]) -> None:
        request, context = self.call.request, self._context
        destination = context.destinations.get(request.move_destination)
        if destination is None:
            self.call.answer(Status.MOVE_DESTINATION_UNKNOWN, "not in the settings: dicom.destinations")
            return
        if why := context.jobs.refuses(self.call.peer.calling_ae):
            self.call.answer(Status.CANNOT_PERFORM, why)
            return
        tally = Tally(len(found))
        body = MoveBody(
            destination.aet,
            asked.level,
            dict(asked.keys),
            request.priority,
            self.call.peer.calling_ae,
            request.message_id,
        )
        jobs, task = context.jobs, None
        if found and context.store.may_serve:  # a standby serves it without a promise
            task = await jobs.begin(MOVE_TASK, self.call.peer.calling_ae, msgspec.msgpack.encode(body))
        try:
            await _moved(context, destination, body, found, tally, self._stop, lambda: self._pending(tally))
            if not context.store.may_read:
                raise NotServing("no longer the primary")
            if task:
                await jobs.end(task, _outcome(tally))
        except BaseException:
            if task:
                jobs.leave(task)
            raise
        self._final(tally)


def lane_of(task: Task) -> str:
    """One C-MOVE that nobody waits for at a time to each destination."""
    return f"move to {msgspec.msgpack.decode(task.body, type=MoveBody).destination}"


async def finish_move(context: Context, task: Task) -> str:
    """Do a C-MOVE whose requestor, or whose primary, is gone. What was sent before is sent again."""
    body = msgspec.msgpack.decode(task.body, type=MoveBody)
    destination = context.destinations.get(body.destination)
    if destination is None:
        return "the destination isn't in the settings any more"
    left = await _found(context, Wanted(body.level, body.keys))
    pause, ends, sent = FIRST_RETRY_S, time.time() + MOVE_PATIENCE_S, 0
    while True:
        tally = Tally(len(left))
        await _moved(context, destination, body, left, tally, lambda: not context.store.may_serve, lambda: None)
        if not context.store.may_serve:
            raise NotServing("no longer the primary")
        sent += tally.completed + tally.warning
        failed = set(tally.failed_uids)
        left = [one for one in left if one.put.sop_instance in failed]
        if not left or time.time() > ends:
            return f"{sent} sent, {len(left)} failed"
        await asyncio.sleep(pause)
        pause = min(pause * 2, RETRY_S_MAX)


def _outcome(tally: Tally) -> str:
    return f"{tally.completed + tally.warning} sent, {tally.failed} failed, {tally.remaining} not tried"


async def _found(context: Context, asked: Wanted) -> list[Instance]:
    loop, rows = asyncio.get_running_loop(), context.store.rows
    return await loop.run_in_executor(context.executor, lambda: list(instances(rows, asked)))


async def _moved(
    context: Context,
    destination: Destination,
    body: MoveBody,
    found: list[Instance],
    tally: Tally,
    stop: Callable[[], bool],
    progress: Callable[[], None],
) -> None:
    originator = (body.originator, body.message_id)
    await Move(context, destination, body.priority, originator, tally, stop, progress).run(found)
