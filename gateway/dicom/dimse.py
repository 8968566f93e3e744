"""DIMSE messages (PS3.7): command sets in and out, and the reassembly of messages from fragments. No input or output.

`Assembler.receive` turns fragments into events: the command first, then the data set's bytes as they come, then its
end. Data sets are never collected here; the user decides what to do with the bytes.
"""

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import Final

from gateway.dicom.upper_layer import Fragment, ProtocolError

COMMAND_BYTES_MAX: Final = 64 << 10
NO_DATA_SET: Final = 0x0101
_UIDS: Final = frozenset((0x0002, 0x0003, 0x1000, 0x1001))


class Command(IntEnum):
    C_STORE_RQ = 0x0001
    C_GET_RQ = 0x0010
    C_FIND_RQ = 0x0020
    C_MOVE_RQ = 0x0021
    C_ECHO_RQ = 0x0030
    N_EVENT_REPORT_RQ = 0x0100
    N_ACTION_RQ = 0x0130
    C_CANCEL_RQ = 0x0FFF
    RESPONSE = 0x8000  # set in every response


class Status(IntEnum):
    """PS3.7 annex C, PS3.4 tables B.2-1, C.4-1 to C.4-3, and section J.3."""

    SUCCESS = 0x0000
    CANCEL = 0xFE00
    PENDING = 0xFF00
    PENDING_OPTIONAL_KEYS = 0xFF01
    SUB_OPERATIONS_FAILED = 0xB000  # done, one or more failed
    OUT_OF_RESOURCES = 0xA700
    CANNOT_PERFORM = 0xA702
    MOVE_DESTINATION_UNKNOWN = 0xA801
    DATA_SET_MISMATCH = 0xA900
    CANNOT_UNDERSTAND = 0xC000
    PROCESSING_FAILURE = 0x0110
    DUPLICATE_SOP_INSTANCE = 0x0111
    NO_SUCH_SOP_INSTANCE = 0x0112
    INVALID_ARGUMENT = 0x0115
    NO_SUCH_SOP_CLASS = 0x0118
    CLASS_INSTANCE_CONFLICT = 0x0119
    SOP_CLASS_NOT_SUPPORTED = 0x0122
    NO_SUCH_ACTION = 0x0123
    UNRECOGNIZED_OPERATION = 0x0211
    RESOURCE_LIMITATION = 0x0213


def is_failure(status: int) -> bool:
    """Neither success nor a warning (PS3.7 annex C)."""
    return not (status in (0x0000, 0x0001, 0x0107, 0x0116) or status & 0xF000 == 0xB000)


@dataclass(frozen=True)
class Request:
    """A command set. Absent UIDs are ""; `field` is what stood in Command Field."""

    field: int
    message_id: int
    sop_class: str
    sop_instance: str
    has_data: bool
    responded_to: int
    priority: int
    status: int = 0
    move_destination: str = ""
    action_type: int = 0
    comment: str = ""


@dataclass(frozen=True)
class CommandReceived:
    context_id: int
    request: Request


@dataclass(frozen=True)
class DataReceived:
    data: memoryview
    last: bool


_ELEMENT: Final = struct.Struct("<HHL")


def decode_command(data: bytes) -> Request:
    """Implicit VR little endian, group 0000 only (PS3.7 6.3.1). Raises ProtocolError."""
    elements: dict[int, bytes] = {}
    at = 0
    while at < len(data):
        if at + _ELEMENT.size > len(data):
            raise ProtocolError("command set cut short")
        group, element, length = _ELEMENT.unpack_from(data, at)
        at += _ELEMENT.size
        if group != 0 or length > len(data) - at:
            raise ProtocolError("malformed command set")
        elements[element] = data[at : at + length]
        at += length
    if 0x0100 not in elements or 0x0800 not in elements:
        raise ProtocolError("command set without Command Field or Command Data Set Type")
    return Request(
        field=_us(elements, 0x0100),
        message_id=_us(elements, 0x0110),
        sop_class=_ui(elements, 0x0002) or _ui(elements, 0x0003),
        sop_instance=_ui(elements, 0x1000) or _ui(elements, 0x1001),
        has_data=_us(elements, 0x0800) != NO_DATA_SET,
        responded_to=_us(elements, 0x0120),
        priority=_us(elements, 0x0700),
        status=_us(elements, 0x0900),
        move_destination=_ui(elements, 0x0600).strip(),
        action_type=_us(elements, 0x1008),
        comment=_ui(elements, 0x0902),
    )


def _us(elements: dict[int, bytes], element: int) -> int:
    value = elements.get(element, b"\0\0")
    if len(value) != 2:
        raise ProtocolError(f"(0000,{element:04x}) isn't a number of two bytes")
    return int.from_bytes(value, "little")


def _ui(elements: dict[int, bytes], element: int) -> str:
    return elements.get(element, b"").rstrip(b"\0 ").decode("ascii", "replace")


def encode_command(elements: Mapping[int, int | str]) -> bytes:
    """A command set: element number -> number of two bytes, or text (UIDs and others are told apart by element)."""
    body = bytearray()
    for element in sorted(elements):
        given = elements[element]
        value = given.to_bytes(2, "little") if isinstance(given, int) else given.encode("ascii", "replace")
        if len(value) % 2:
            value += b"\0" if element in _UIDS else b" "
        body += _ELEMENT.pack(0, element, len(value)) + value
    return _ELEMENT.pack(0, 0, 4) + len(body).to_bytes(4, "little") + bytes(body)


def encode_response(
    request: Request,
    status: int,
    *,
    has_data: bool = False,
    comment: str = "",
    counts: tuple[int, int, int, int] | None = None,
) -> bytes:
    """The response to `request` (PS3.7 9.3). `comment` explains a failure, no patient data in it; `counts` are the
    sub-operations remaining, completed, failed and with a warning (remaining is left out once the last is over)."""
    elements: dict[int, int | str] = {
        0x0100: request.field | Command.RESPONSE,
        0x0120: request.message_id,
        0x0800: 0x0001 if has_data else NO_DATA_SET,
        0x0900: status,
    }
    if request.sop_class:
        elements[0x0002] = request.sop_class
    if request.sop_instance:
        elements[0x1000] = request.sop_instance
    if request.action_type:
        elements[0x1008] = request.action_type
    if comment:
        elements[0x0902] = comment[:64]
    if counts is not None:
        elements |= dict(zip((0x1020, 0x1021, 0x1022, 0x1023), (min(one, 0xFFFF) for one in counts), strict=True))
        if status not in (Status.PENDING, Status.CANCEL):
            del elements[0x1020]
    return encode_command(elements)


class Assembler:
    def __init__(self) -> None:
        self._command = bytearray()
        self._context_id = 0
        self._data_of: int | None = None  # context whose data set is expected

    @property
    def mid_message(self) -> bool:
        return bool(self._command) or self._data_of is not None

    def receive(self, fragment: Fragment) -> CommandReceived | DataReceived | None:
        """Raises ProtocolError for fragments that make no message (PS3.7 annex F)."""
        if self._data_of is not None:
            if fragment.is_command or fragment.context_id != self._data_of:
                raise ProtocolError("another message begins before the data set has ended")
            if fragment.last:
                self._data_of = None
            return DataReceived(fragment.data, fragment.last)
        if not fragment.is_command:
            raise ProtocolError("data set without a command")
        if self._command and fragment.context_id != self._context_id:
            raise ProtocolError("a command set in two presentation contexts")
        if len(self._command) + len(fragment.data) > COMMAND_BYTES_MAX:
            raise ProtocolError("command set too long")
        self._context_id = fragment.context_id
        self._command += fragment.data
        if not fragment.last:
            return None
        command, self._command = bytes(self._command), bytearray()
        request = decode_command(command)
        if request.has_data:
            self._data_of = fragment.context_id
        return CommandReceived(fragment.context_id, request)
