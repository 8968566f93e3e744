"""Which service deals with a request. A refusal still reads the data set to its end."""

from gateway.dicom.dimse import Command, Status
from gateway.dicom.sop_classes import COMMITMENT, FIND_MODELS, GET_MODELS, MOVE_MODELS, VERIFICATION
from gateway.dimse.commitment_scp import Committer
from gateway.dimse.context import Context
from gateway.dimse.find_scp import Finder
from gateway.dimse.retrieve_scp import Getter, Mover
from gateway.dimse.service import Call, Receiver, Refuser
from gateway.dimse.store_scp import storer

READERS = {
    Command.C_FIND_RQ: (FIND_MODELS, Finder),
    Command.C_GET_RQ: (GET_MODELS, Getter),
    Command.C_MOVE_RQ: (MOVE_MODELS, Mover),
}


def receiver(call: Call, context: Context) -> Receiver:
    request = call.request
    if request.field == Command.C_ECHO_RQ and call.abstract_syntax == VERIFICATION:
        return Refuser(call, Status.SUCCESS)
    if request.field == Command.C_STORE_RQ:
        return storer(call, context)
    reader = READERS.get(request.field)  # type: ignore[call-overload]
    if reader and call.abstract_syntax in reader[0]:
        return _reader(call, context, reader[1])
    if request.field == Command.N_ACTION_RQ and call.abstract_syntax == COMMITMENT:
        if not request.has_data:
            return Refuser(call, Status.INVALID_ARGUMENT, "no action information")
        if not context.store.may_serve:
            return Refuser(call, Status.PROCESSING_FAILURE, "not the primary now")
        return Committer(call, context)
    return Refuser(call, Status.UNRECOGNIZED_OPERATION, "not a service of this presentation context")


def _reader(call: Call, context: Context, service: type[Finder | Getter | Mover]) -> Receiver:
    if not call.request.has_data:
        return Refuser(call, Status.DATA_SET_MISMATCH, "no identifier")
    if call.request.sop_class != call.abstract_syntax:
        return Refuser(call, Status.SOP_CLASS_NOT_SUPPORTED, "SOP Class UID doesn't fit the presentation context")
    if not context.store.may_read:
        return Refuser(call, Status.OUT_OF_RESOURCES, "not the primary now")
    return service(call, context)
