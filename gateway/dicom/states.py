"""The states of an association (PS3.8 9.2, table 9-10), of both sides, as data. Names are the Standard's."""

from enum import Enum, IntEnum
from typing import Final


class State(Enum):
    STA2 = "transport open, waiting for A-ASSOCIATE-RQ"
    STA3 = "waiting for the local answer to the association request"
    STA5 = "waiting for the answer to our association request"
    STA6 = "association established"
    STA7 = "waiting for A-RELEASE-RP"
    STA8 = "waiting for the local A-RELEASE response"
    STA13 = "waiting for the transport to close"


class PduType(IntEnum):
    ASSOCIATE_RQ = 0x01
    ASSOCIATE_AC = 0x02
    ASSOCIATE_RJ = 0x03
    DATA_TF = 0x04
    RELEASE_RQ = 0x05
    RELEASE_RP = 0x06
    ABORT = 0x07


class Action(Enum):
    ASSOCIATE = "AE-6: hand the request to the user"
    ACCEPTED = "AE-3: tell the user that the association was accepted"
    REJECTED = "AE-4: tell the user that it was rejected"
    DATA = "DT-2: hand the data to the user"
    RELEASE = "AR-2: hand the release to the user"
    RELEASED = "AR-3: tell the user, close"
    COLLISION = "AR-8: both sides release; answer, and go on waiting"
    ABORTED = "AA-3: the other side aborted"
    CLOSED = "AA-2/AA-6: nothing more to say"
    ABORT = "AA-1/AA-8: abort, unexpected PDU"


_ANY: Final = tuple(PduType)


def _row(default: Action, **actions: Action) -> dict[PduType, Action]:
    return {pdu: actions.get(pdu.name, default) for pdu in _ANY}


TRANSITIONS: Final[dict[State, dict[PduType, Action]]] = {
    State.STA2: _row(Action.ABORT, ASSOCIATE_RQ=Action.ASSOCIATE, ABORT=Action.CLOSED),
    State.STA3: _row(Action.ABORT, ABORT=Action.ABORTED),
    State.STA6: _row(Action.ABORT, DATA_TF=Action.DATA, RELEASE_RQ=Action.RELEASE, ABORT=Action.ABORTED),
    State.STA5: _row(Action.ABORT, ASSOCIATE_AC=Action.ACCEPTED, ASSOCIATE_RJ=Action.REJECTED, ABORT=Action.ABORTED),
    State.STA7: _row(
        Action.ABORT,
        DATA_TF=Action.DATA,
        RELEASE_RP=Action.RELEASED,
        RELEASE_RQ=Action.COLLISION,
        ABORT=Action.ABORTED,
    ),
    State.STA8: _row(Action.ABORT, ABORT=Action.ABORTED),
    State.STA13: _row(Action.CLOSED),
}
