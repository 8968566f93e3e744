"""Storage Commitment, push model (PS3.4 annex J).

A request is promised on both nodes before it is answered. Success is reported only for instances of which both copies
were read and checked against their digest for this request. The report goes over the association that asked, if it is
still there and quiet, or else over a new one to the AE as the settings know it, and is tried again until it is taken.
"""

import asyncio
import time
from collections.abc import Iterable
from concurrent.futures import Executor
from typing import Final

import msgspec
import structlog
from pydicom import Dataset
from pydicom.sequence import Sequence

from gateway.archive.destinations import Destinations
from gateway.archive.live import Live
from gateway.dicom.dimse import Status, is_failure
from gateway.dicom.identifiers import encode_identifier
from gateway.dicom.sop_classes import COMMITMENT, COMMITMENT_INSTANCE, UNCOMPRESSED
from gateway.dimse.connection import AssociationEnded
from gateway.dimse.peer import Peer
from gateway.dimse.requestor import Requestor, Unreachable, event_report, whole
from storage.state.model import Instance, Task
from storage.store import NotServing, Store

log = structlog.get_logger()

COMMITMENT_TASK: Final = "commitment"
ALL_COMMITTED, SOME_FAILED = 1, 2  # event types
ITEMS_MAX: Final = 20000
CHECK_BATCH: Final = 50
FIRST_RETRY_S: Final = 2.0
RETRY_S_MAX: Final = 300.0
ANSWER_S: Final = 30.0
CHECKS_AT_ONCE: Final = 2
DAY_S: Final = 86400.0

Reference = tuple[str, str]  # (SOP class, SOP instance)
Failed = dict[Reference, int]  # with the failure reason


class CommitmentBody(msgspec.Struct, frozen=True):
    """What was asked for. `ends` is when a missing second copy is no longer waited for, wall clock."""

    transaction: str
    items: tuple[Reference, ...]
    ends: float


class Commitments:
    """Checks what is to be committed and reports it, as the tasks of the log say."""

    def __init__(self, store: Store, live: Live, destinations: Destinations, executor: Executor) -> None:
        self._store, self._live, self._destinations, self._executor = store, live, destinations, executor
        self._askers: dict[str, tuple[Peer, int]] = {}
        self._checking = asyncio.Semaphore(CHECKS_AT_ONCE)

    def remember(self, task: Task, peer: Peer, context_id: int) -> None:
        """The association that asked, as long as it lasts."""
        self._askers[task.id] = (peer, context_id)

    async def carry_out(self, task: Task) -> str:
        """Check, then report. Returns the outcome; raises NotServing."""
        try:
            return await self._carry_out(task)
        finally:
            self._askers.pop(task.id, None)

    async def _carry_out(self, task: Task) -> str:
        body = msgspec.msgpack.decode(task.body, type=CommitmentBody)
        store = self._store
        async with self._checking:
            failed = await self._check(store, body)
        ends = task.at + self._live.dicom.report_days * DAY_S
        pause = FIRST_RETRY_S
        while True:
            if not store.may_serve:
                raise NotServing("no longer the primary")
            if await self._tell_asker(task, body, failed) or await self._tell(task.by, body, failed):
                return f"{len(body.items) - len(failed)} committed, {len(failed)} not"
            if task.id not in self._askers and self._destinations.get(task.by) is None:
                log.warning("commitment.unknown_requester", by=task.by, hint="name it in dicom.destinations")
                return "checked, and the requester is gone and in no setting"
            if time.time() > ends:
                log.error("commitment.not_reported", by=task.by, transaction=body.transaction)
                return "checked, and nobody took the report"
            await asyncio.sleep(pause)
            pause = min(pause * 2, RETRY_S_MAX)

    # -- checking ----------------------------------------------------------------------------------------------

    async def _check(self, store: Store, body: CommitmentBody) -> Failed:
        """Failure reason (PS3.3 C.14.1.1) of each item that can't be committed."""
        await store.settled()
        uids = [uid for _, uid in body.items]
        found = await store.run(lambda: {uid: one for uid in uids if (one := store.rows.instance(uid))})
        failed: dict[Reference, int] = {}
        waiting: dict[Reference, Instance] = {}
        for item in body.items:
            instance = found.get(item[1])
            if instance is None:
                failed[item] = Status.NO_SUCH_SOP_INSTANCE
            elif instance.put.sop_class != item[0]:
                failed[item] = Status.CLASS_INSTANCE_CONFLICT
            else:
                waiting[item] = instance
        pause = FIRST_RETRY_S
        while waiting:
            for item in await self._safe(store, waiting):
                del waiting[item]
            if waiting and time.time() > body.ends:
                break
            if waiting:
                if not store.may_serve:
                    raise NotServing("no longer the primary")
                await asyncio.sleep(pause)
                pause = min(pause * 2, RETRY_S_MAX)
        return failed | dict.fromkeys(waiting, int(Status.PROCESSING_FAILURE))

    async def _safe(self, store: Store, waiting: dict[Reference, Instance]) -> list[Reference]:
        """Those whose copies, on each node, are what was stored. A bad one is made again meanwhile."""
        found: list[Reference] = []
        items = list(waiting.items())
        for at in range(0, len(items), CHECK_BATCH):
            batch = items[at : at + CHECK_BATCH]
            proven = await store.proven([instance for _, instance in batch])
            found += [item for item, instance in batch if instance.put.sop_instance in proven]
        return found

    # -- reporting ---------------------------------------------------------------------------------------------

    async def _tell_asker(self, task: Task, body: CommitmentBody, failed: Failed) -> bool:
        """Over the association that asked, if nothing else happens there now."""
        peer, context_id = self._askers.get(task.id, (None, 0))
        if peer is None:
            return False
        if not peer.may_send:
            self._askers.pop(task.id, None)
            return False
        if not peer.quiet:
            return False
        return await self._send(peer, context_id, peer.contexts[context_id].transfer_syntax, body, failed)

    async def _tell(self, aet: str, body: CommitmentBody, failed: Failed) -> bool:
        destination = self._destinations.get(aet)
        if destination is None:
            return False
        contexts = [(COMMITMENT, UNCOMPRESSED)]
        try:
            association = await Requestor.associate(self._live.dicom.aet, destination, contexts, as_scp=True)
        except Unreachable as error:
            log.warning("commitment.unreachable", by=aet, why=str(error))
            return False
        try:
            context_id = association.context_for(COMMITMENT)
            if context_id is None:
                log.warning("commitment.refused", by=aet, why="no presentation context")
                return False
            return await self._send(association, context_id, association.contexts[context_id][1], body, failed)
        finally:
            await association.release()

    async def _send(
        self, sender: Peer | Requestor, context_id: int, syntax: str, body: CommitmentBody, failed: Failed
    ) -> bool:
        """Whether the report was taken."""
        loop, aet = asyncio.get_running_loop(), self._live.dicom.aet
        data = await loop.run_in_executor(self._executor, lambda: encode_identifier(_report(body, failed, aet), syntax))
        event = event_report(COMMITMENT, COMMITMENT_INSTANCE, SOME_FAILED if failed else ALL_COMMITTED)
        try:
            answer = await sender.invoke(context_id, event, whole(data), ANSWER_S)
        except (AssociationEnded, TimeoutError):
            return False
        return not is_failure(answer.status)


def _report(body: CommitmentBody, failed: Failed, aet: str) -> Dataset:
    """The event information (PS3.4 table J.3-2)."""
    report = Dataset()
    report.TransactionUID = body.transaction
    report.RetrieveAETitle = aet
    good = [item for item in body.items if item not in failed]
    if good:
        report.ReferencedSOPSequence = _items(good)
    if failed:
        report.FailedSOPSequence = _items(list(failed))
        for item, reason in zip(report.FailedSOPSequence, failed.values(), strict=True):
            item.FailureReason = int(reason)
    return report


def _items(references: Iterable[Reference]) -> Sequence:
    items = []
    for sop_class, sop_instance in references:
        item = Dataset()
        item.ReferencedSOPClassUID, item.ReferencedSOPInstanceUID = sop_class, sop_instance
        items.append(item)
    return Sequence(items)
