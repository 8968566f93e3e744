"""N-ACTION of storage commitment (PS3.4 J.3.2): a promise, answered at once."""

import time

import msgspec
from pydicom import Dataset
from pydicom.sequence import Sequence

from gateway.dicom.dimse import Status
from gateway.dicom.identifiers import BadQuery
from gateway.dicom.sop_classes import COMMITMENT_INSTANCE
from gateway.dimse.commitments import COMMITMENT_TASK, ITEMS_MAX, CommitmentBody
from gateway.dimse.service import Collector

ACTION_REQUEST = 1


class Committer(Collector):
    """N-ACTION on the push model's well-known instance."""

    bytes_max = ITEMS_MAX * 256

    async def respond(self) -> None:
        call, context = self.call, self._context
        request = call.request
        if request.action_type != ACTION_REQUEST:
            call.answer(Status.NO_SUCH_ACTION, "action type 1 is the only one")
            return
        if request.sop_instance != COMMITMENT_INSTANCE:
            call.answer(Status.NO_SUCH_SOP_INSTANCE, "not the push model's instance")
            return
        if why := context.jobs.refuses(call.peer.calling_ae):
            call.answer(Status.RESOURCE_LIMITATION, why)
            return
        try:
            body = await self._read(read_request, context.settings.commitment_wait_s)
        except BadQuery as error:
            call.answer(Status.INVALID_ARGUMENT, str(error))
            return
        call.outcome.count = len(body.items)
        task = await context.jobs.begin(COMMITMENT_TASK, call.peer.calling_ae, msgspec.msgpack.encode(body))
        context.commitments.remember(task, call.peer, call.context_id)
        call.answer(Status.SUCCESS)
        context.jobs.leave(task)


def read_request(information: Dataset, wait_s: float) -> CommitmentBody:
    """The action information (PS3.4 table J.3-1). Raises BadQuery."""
    transaction = str(information.get("TransactionUID", "") or "")
    references = information.get("ReferencedSOPSequence") or ()
    if not isinstance(references, Sequence):
        raise BadQuery("Referenced SOP Sequence isn't a sequence")
    items = tuple(
        (str(item.get("ReferencedSOPClassUID", "") or ""), str(item.get("ReferencedSOPInstanceUID", "") or ""))
        for item in references
    )
    if not transaction:
        raise BadQuery("no Transaction UID")
    if not items or len(items) > ITEMS_MAX or not all(instance for _, instance in items):
        raise BadQuery(f"Referenced SOP Sequence: 1 to {ITEMS_MAX} items, each with its UIDs")
    return CommitmentBody(transaction, items, time.time() + wait_s)
