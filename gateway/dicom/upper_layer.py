"""The DICOM upper layer (PS3.8), of the side that asks and of the side that accepts, without input or output.

Bytes in, events out: `receive(view)` yields events; fragments of P-DATA carry views into the caller's buffer and are
to be used before it is reused. Messages out: methods return the bytes to send. Whatever comes in, the
result is an event or a `ProtocolError`, never another exception; after a ProtocolError send `abort(...)` and close.
"""

import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final, TypeVar

from gateway.dicom.associate import (
    DEFAULT_PDU_BYTES,
    PDU_BYTES_MAX,
    AssociateAccept,
    AssociateRequest,
    Malformed,
    decode_accept,
    decode_request,
)
from gateway.dicom.states import TRANSITIONS, Action, PduType, State

T = TypeVar("T")
PDU_HEADER: Final = struct.Struct(">BxL")
PDV_HEADER: Final = struct.Struct(">LBB")
TOLERANCE_BYTES: Final = 16  # some senders count the PDU header in the maximum length
UNLIMITED_PDU_BYTES: Final = 1 << 20

# A-ABORT reasons of the service provider (PS3.8 table 9-26).
NOT_SPECIFIED, UNRECOGNIZED_PDU, UNEXPECTED_PDU, INVALID_PARAMETER = 0, 1, 2, 6


class ProtocolError(Exception):
    """The other side broke PS3.8 (or PS3.7). `reason` goes into the A-ABORT."""

    def __init__(self, message: str, reason: int = NOT_SPECIFIED) -> None:
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True)
class AssociationRequested:
    request: AssociateRequest


@dataclass(frozen=True)
class AssociationAccepted:
    response: AssociateAccept


@dataclass(frozen=True)
class AssociationRejected:
    """PS3.8 table 9-21."""

    result: int
    source: int
    reason: int


@dataclass(frozen=True)
class Fragment:
    """Part of a presentation data value. `last` marks the end of the command set or data set."""

    context_id: int
    is_command: bool
    last: bool
    data: memoryview


@dataclass(frozen=True)
class ReleaseRequested:
    pass


@dataclass(frozen=True)
class Released:
    """The other side agreed to end the association."""


@dataclass(frozen=True)
class Collided:
    """Both sides release at the same time; the response is to be sent."""

    response: bytes


@dataclass(frozen=True)
class Aborted:
    source: int
    reason: int


Event = (
    AssociationRequested
    | AssociationAccepted
    | AssociationRejected
    | Fragment
    | ReleaseRequested
    | Released
    | Collided
    | Aborted
)


class UpperLayer:
    def __init__(self, max_pdu_bytes: int) -> None:
        self.state = State.STA2
        self._max_pdu_bytes = max_pdu_bytes
        self.peer_max_pdu_bytes = DEFAULT_PDU_BYTES
        self._head = bytearray()  # of a PDU, of a PDV, or a whole small PDU
        self._want = PDU_HEADER.size
        self._body_type: PduType | None = None  # a PDU that is collected whole
        self._data_left: int | None = None  # of the P-DATA-TF PDU under way
        self._pdv_left = 0
        self._pdv = (0, 0)

    @property
    def mid_pdu(self) -> bool:
        """Part of a PDU has come and the rest not."""
        return bool(self._head) or self._data_left is not None or self._body_type is not None

    # -- in ----------------------------------------------------------------------------------------------------

    def receive(self, view: memoryview) -> Iterator[Event]:
        """Raises ProtocolError."""
        while view:
            if self._data_left is not None and self._pdv_left:
                size = min(self._pdv_left, len(view))
                yield self._fragment(view[:size])
                view = view[size:]
                continue
            size = min(self._want - len(self._head), len(view))
            self._head += view[:size]
            view = view[size:]
            if len(self._head) < self._want:
                return
            head, self._head = self._head, bytearray()
            if self._body_type is not None:
                body_type, self._body_type = self._body_type, None
                self._want = PDU_HEADER.size
                event = self._body(body_type, bytes(head))
                if event:
                    yield event
            elif self._data_left is not None:
                empty = self._start_pdv(head)
                if empty:
                    yield empty
            else:
                self._start_pdu(head)

    def _start_pdu(self, head: bytearray) -> None:
        code, length = PDU_HEADER.unpack(head)
        if self.state is State.STA13:
            self._want = PDU_HEADER.size
            return
        try:
            pdu_type = PduType(code)
        except ValueError:
            raise ProtocolError(f"unknown PDU type 0x{code:02x} in {self.state.name}", UNRECOGNIZED_PDU) from None
        if TRANSITIONS[self.state][pdu_type] is Action.ABORT:
            raise ProtocolError(f"{pdu_type.name} in {self.state.name}", UNEXPECTED_PDU)
        if pdu_type is PduType.DATA_TF:
            if not PDV_HEADER.size <= length <= self._max_pdu_bytes + TOLERANCE_BYTES:
                raise ProtocolError(f"P-DATA-TF of {length} bytes", INVALID_PARAMETER)
            self._data_left = length
            self._want = PDV_HEADER.size
            return
        limit = PDU_BYTES_MAX if pdu_type in (PduType.ASSOCIATE_RQ, PduType.ASSOCIATE_AC) else 4
        if length > limit or length < 4:
            raise ProtocolError(f"{pdu_type.name} of {length} bytes", INVALID_PARAMETER)
        self._body_type = pdu_type
        self._head = head
        self._want = PDU_HEADER.size + length

    def _start_pdv(self, head: bytearray) -> Fragment | None:
        length, context_id, control = PDV_HEADER.unpack(head)
        left = (self._data_left or 0) - PDV_HEADER.size
        self._pdv_left = length - 2
        if length < 2 or self._pdv_left > left:
            raise ProtocolError(f"PDV of {length} bytes in what is left, {left}", INVALID_PARAMETER)
        if context_id % 2 == 0:
            raise ProtocolError(f"presentation context ID {context_id}", INVALID_PARAMETER)
        self._data_left = left
        self._pdv = (context_id, control)
        return None if self._pdv_left else self._fragment(memoryview(b""))

    def _fragment(self, data: memoryview) -> Fragment:
        context_id, control = self._pdv
        self._pdv_left -= len(data)
        left = (self._data_left or 0) - len(data)
        if self._pdv_left == 0 and left == 0:
            self._data_left = None
            self._want = PDU_HEADER.size
        else:
            if self._pdv_left == 0 and left < PDV_HEADER.size:
                raise ProtocolError(f"{left} stray bytes at the end of a P-DATA-TF", INVALID_PARAMETER)
            self._data_left = left
        return Fragment(context_id, bool(control & 1), bool(control & 2) and self._pdv_left == 0, data)

    def _body(self, pdu_type: PduType, pdu: bytes) -> Event | None:
        match TRANSITIONS[self.state][pdu_type]:
            case Action.ASSOCIATE:
                self.state = State.STA3
                return AssociationRequested(_decoded(decode_request, pdu))
            case Action.ACCEPTED:
                response = _decoded(decode_accept, pdu)
                self.state = State.STA6
                said = response.user.max_pdu_bytes
                self._limit(DEFAULT_PDU_BYTES if said is None else said)
                return AssociationAccepted(response)
            case Action.REJECTED:
                self.state = State.STA13
                return AssociationRejected(pdu[7], pdu[8], pdu[9])
            case Action.RELEASED:
                self.state = State.STA13
                return Released()
            case Action.COLLISION:
                return Collided(_RELEASE_RP)
            case Action.RELEASE:
                self.state = State.STA8
                return ReleaseRequested()
            case Action.ABORTED | Action.CLOSED:
                self.state = State.STA13
                return Aborted(pdu[8], pdu[9])
            case _:
                return None

    # -- out ---------------------------------------------------------------------------------------------------

    def accept(self, response: bytes, peer_max_pdu_bytes: int) -> bytes:
        """`response` is an encoded A-ASSOCIATE-AC; 0 means that the other side sets no limit."""
        self._expect(State.STA3)
        self.state = State.STA6
        self._limit(peer_max_pdu_bytes)
        return response

    def _limit(self, peer_max_pdu_bytes: int) -> None:
        self.peer_max_pdu_bytes = min(peer_max_pdu_bytes or UNLIMITED_PDU_BYTES, UNLIMITED_PDU_BYTES)

    def request(self, encoded: bytes) -> bytes:
        """Ask for an association; `encoded` is an A-ASSOCIATE-RQ."""
        self._expect(State.STA2)
        self.state = State.STA5
        return encoded

    def release_request(self) -> bytes:
        self._expect(State.STA6)
        self.state = State.STA7
        return struct.pack(">BxLxxxx", PduType.RELEASE_RQ, 4)

    def reject(self, result: int, source: int, reason: int) -> bytes:
        """A-ASSOCIATE-RJ (PS3.8 table 9-21)."""
        self._expect(State.STA3)
        self.state = State.STA13
        return struct.pack(">BxLxBBB", PduType.ASSOCIATE_RJ, 4, result, source, reason)

    def release_response(self) -> bytes:
        self._expect(State.STA8)
        self.state = State.STA13
        return _RELEASE_RP

    def abort(self, source: int, reason: int) -> bytes:
        """A-ABORT; source 0 is the service user, 2 the provider."""
        self.state = State.STA13
        return struct.pack(">BxLxxBB", PduType.ABORT, 4, source, reason)

    def data(self, context_id: int, is_command: bool, payload: bytes | memoryview, *, last: bool = True) -> bytes:
        """P-DATA-TF PDUs that carry `payload`, see `parts`."""
        return b"".join(self.parts(context_id, is_command, payload, last=last))

    def parts(
        self, context_id: int, is_command: bool, payload: bytes | memoryview, *, last: bool = True
    ) -> list[bytes | memoryview]:
        """P-DATA-TF PDUs that carry `payload`, each within the other side's maximum length, in parts, no copies;
        `last` ends the command set or data set."""
        room = max(self.peer_max_pdu_bytes - PDV_HEADER.size, 2)
        parts = [payload[start : start + room] for start in range(0, len(payload), room)] or [b""]
        out: list[bytes | memoryview] = []
        for number, part in enumerate(parts):
            control = (1 if is_command else 0) | (2 if last and number == len(parts) - 1 else 0)
            out.append(PDU_HEADER.pack(PduType.DATA_TF, len(part) + PDV_HEADER.size))
            out.append(PDV_HEADER.pack(len(part) + 2, context_id, control))
            out.append(part)
        return out

    def _expect(self, state: State) -> None:
        if self.state is not state:
            raise RuntimeError(f"in {self.state.name}, not {state.name}")


_RELEASE_RP: Final = struct.pack(">BxLxxxx", PduType.RELEASE_RP, 4)


def _decoded(decode: Callable[[bytes], T], pdu: bytes) -> T:
    try:
        return decode(pdu)
    except Malformed as error:
        raise ProtocolError(f"malformed association PDU: {error}", INVALID_PARAMETER) from error
