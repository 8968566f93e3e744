"""A small blocking DICOM sender for the bench and the tests: one association, C-ECHO and C-STORE, exact timing.

It sends bytes as they are given, so tests can send what a proper toolkit refuses to.
"""

import socket
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self

from pydicom.uid import UID
from pynetdicom.pdu import A_ASSOCIATE_AC, A_ASSOCIATE_RQ
from pynetdicom.pdu_primitives import (
    A_ASSOCIATE,
    ImplementationClassUIDNotification,
    MaximumLengthNotification,
    SCP_SCU_RoleSelectionNegotiation,
    UserIdentityNegotiation,
)
from pynetdicom.presentation import build_context

MAX_PDU_BYTES: Final = 131072
PDUS_AT_ONCE: Final = 8
PENDING: Final = (0xFF00, 0xFF01)
_ELEMENT: Final = struct.Struct("<HHL")


class AssociationFailed(Exception):
    """Rejected, aborted or closed."""


class NotLetIn(AssociationFailed):
    """Rejected for good (PS3.8 9.3.4, result 1): by who serves, because of who asked."""


REASONS: Final = {
    1: "nobody may without logging in (TANDEM_USER and TANDEM_PASSWORD), or these aren't right",
    3: "our AE title isn't let in",
    7: "the AE title called isn't theirs",
}


@dataclass(frozen=True)
class Object:
    """A data set ready to be sent."""

    sop_class: str
    sop_instance: str
    transfer_syntax: str
    data: bytes

    def renamed(self, sop_instance: str) -> "Object":
        """The same object under another SOP Instance UID of the same length."""
        old, new = self.sop_instance.encode(), sop_instance.encode()
        if len(old) != len(new):
            raise ValueError("the new UID must have the length of the old one")
        return Object(self.sop_class, sop_instance, self.transfer_syntax, self.data.replace(old, new))

    @property
    def length(self) -> int:
        """Of the data set, in bytes."""
        return len(self.data)

    def blocks(self, size: int) -> Iterator[bytes]:
        """The data set in pieces of `size` bytes."""
        return (self.data[at : at + size] for at in range(0, len(self.data), size))


class Unreadable(Exception):
    """A file can't be read to its end."""


@dataclass(frozen=True)
class FileObject:
    """One instance in a file, which is read when it is sent: however long it is, little of it is in memory."""

    sop_class: str
    sop_instance: str
    transfer_syntax: str
    path: Path
    start: int  # where the data set begins
    length: int  # of the data set, in bytes

    def blocks(self, size: int) -> Iterator[bytes]:
        """The data set in pieces of `size` bytes. Raises Unreadable."""
        try:
            with self.path.open("rb") as file:
                file.seek(self.start)
                left = self.length
                while left:
                    block = file.read(min(size, left))
                    if not block:
                        raise Unreadable("the file became shorter while it was read")
                    left -= len(block)
                    yield block
        except OSError as error:  # not to be taken for one of the connection
            raise Unreadable(error.strerror or "can't be read") from error


class DicomClient:
    """Raises AssociationFailed or OSError."""

    def __init__(
        self,
        host: str,
        port: int,
        called: str,
        contexts: Sequence[tuple[str, str]],
        timeout_s: float,
        connect_s: float | None = None,
        *,
        calling: str = "BENCH",
        user: tuple[str, str] | None = None,
        roles: Sequence[str] = (),
    ) -> None:
        """`timeout_s` for each answer, `connect_s` for the connection if that is to be shorter; `user`: name and
        password to log in with; `roles`: SOP classes of which we are the SCP."""
        self._user, self._roles = user, roles
        self._socket = socket.create_connection((host, port), timeout=connect_s or timeout_s)
        self._socket.settimeout(timeout_s)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._message_id = 0
        self.contexts: dict[tuple[str, str], int] = {}
        self._peer_max = 16384
        try:
            self._associate(calling, called, list(dict.fromkeys(contexts)))
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._socket.close()

    def _associate(self, calling: str, called: str, contexts: list[tuple[str, str]]) -> None:
        request = A_ASSOCIATE()
        request.application_context_name = "1.2.840.10008.3.1.1.1"
        request.calling_ae_title, request.called_ae_title = calling, called
        request.presentation_context_definition_list = []
        for number, (abstract, transfer) in enumerate(contexts):
            context = build_context(abstract, transfer)
            context.context_id = 2 * number + 1
            request.presentation_context_definition_list.append(context)
        length = MaximumLengthNotification()
        length.maximum_length_received = MAX_PDU_BYTES
        implementation = ImplementationClassUIDNotification()
        implementation.implementation_class_uid = "1.2.3.4"
        request.user_information = [length, implementation]
        if self._user:
            identity = UserIdentityNegotiation()
            identity.user_identity_type = 2
            identity.primary_field, identity.secondary_field = (part.encode() for part in self._user)
            request.user_information.append(identity)
        for sop_class in self._roles:
            role = SCP_SCU_RoleSelectionNegotiation()
            role.sop_class_uid, role.scu_role, role.scp_role = UID(sop_class), False, True
            request.user_information.append(role)
        pdu = A_ASSOCIATE_RQ()
        pdu.from_primitive(request)
        self.send_raw(pdu.encode())
        kind, body = self.read_pdu()
        if kind == 3 and body[1:3] == b"\1\1":
            why = REASONS.get(body[3], "for good")
            raise NotLetIn(f"rejected (PDU 3, {body[:8].hex()}): {why}; we call as {calling}")
        if kind != 2:
            raise AssociationFailed(f"no association: PDU {kind}, {body[:8].hex()}")
        answer = A_ASSOCIATE_AC()
        answer.decode(struct.pack(">BxL", kind, len(body)) + body)
        primitive = answer.to_primitive()
        results = primitive.presentation_context_definition_results_list
        accepted = {context.context_id for context in results if not context.result}
        self.contexts = {pair: 2 * n + 1 for n, pair in enumerate(contexts) if 2 * n + 1 in accepted}
        self._peer_max = primitive.maximum_length_received or MAX_PDU_BYTES

    def send_raw(self, data: bytes) -> None:
        self._socket.sendall(data)

    def _read(self, size: int) -> bytes:
        """Up to `size` bytes, fewer only at the end.

        Each part is acknowledged at once: a server that answers in two writes (Orthanc does) would otherwise wait 40 ms
        for our delayed acknowledgement, and a bench would measure the two kernels instead of the server.
        """
        parts = bytearray()
        while len(parts) < size:
            part = self._socket.recv(size - len(parts))
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)
            if not part:
                break
            parts += part
        return bytes(parts)

    def read_pdu(self) -> tuple[int, bytes]:
        """(PDU type, body)."""
        head = self._read(6)
        if len(head) < 6:
            raise AssociationFailed("the connection was closed")
        kind, length = struct.unpack(">BxL", head)
        body = self._read(length)
        if len(body) < length:
            raise AssociationFailed("the connection was closed in the middle of a message")
        return kind, body

    @property
    def _room(self) -> int:
        """Bytes of a message that fit into a PDU."""
        return min(self._peer_max, MAX_PDU_BYTES) - 6

    def pdvs(self, context_id: int, payload: bytes, *, command: bool, last: bool = True) -> bytes:
        """A message, or with `last` False what comes before its last part."""
        room = self._room
        out = bytearray()
        for start in range(0, len(payload), room):
            part = payload[start : start + room]
            control = (1 if command else 0) | (2 if last and start + room >= len(payload) else 0)
            out += struct.pack(">BxLLBB", 4, len(part) + 6, len(part) + 2, context_id, control)
            out += part
        return bytes(out)

    def status(self) -> int:
        """Status of the next response."""
        kind, body = self.read_pdu()
        if kind != 4:
            raise AssociationFailed(f"PDU {kind} instead of a response")
        return status_of(body[6:])

    def store(self, item: Object | FileObject) -> int:
        """C-STORE; returns the status. Raises Unreadable; the association is of no use then."""
        context_id = self.contexts[item.sop_class, item.transfer_syntax]
        self._message_id = self._message_id % 0xFFFF + 1
        command = store_command(self._message_id, item.sop_class, item.sop_instance)
        out, left = self.pdvs(context_id, command, command=True), item.length
        for block in item.blocks(PDUS_AT_ONCE * self._room):
            left -= len(block)
            self.send_raw(out + self.pdvs(context_id, block, command=False, last=not left))
            out = b""
        return self.status()

    def find(
        self, context_id: int, sop_class: str, identifier: bytes, heard: Callable[[int], object] = lambda count: None
    ) -> tuple[int, int]:
        """C-FIND; returns how many answers came, and the last status. `heard(count)` after each answer."""
        self._message_id = self._message_id % 0xFFFF + 1
        command = find_command(self._message_id, sop_class)
        self.send_raw(self.pdvs(context_id, command, command=True) + self.pdvs(context_id, identifier, command=False))
        count = 0
        while True:
            kind, body = self.read_pdu()
            if kind != 4:
                raise AssociationFailed(f"PDU {kind} instead of a response")
            at = 0
            while at < len(body):
                length = int.from_bytes(body[at : at + 4], "big")
                if body[at + 5] & 1:
                    status = status_of(body[at + 6 : at + 4 + length])
                    if status not in PENDING:
                        return count, status
                    count += 1
                    heard(count)
                at += 4 + length

    def release(self) -> None:
        self.send_raw(struct.pack(">BxLxxxx", 5, 4))
        self.read_pdu()
        self.close()


def status_of(command: bytes) -> int:
    at = 0
    while at + 8 <= len(command):
        _group, element, length = _ELEMENT.unpack_from(command, at)
        if element == 0x0900:
            return int.from_bytes(command[at + 8 : at + 10], "little")
        at += 8 + length
    raise AssociationFailed("a response without status")


def store_command(message_id: int, sop_class: str, sop_instance: str) -> bytes:
    body = _text(0x0002, sop_class) + _number(0x0100, 1) + _number(0x0110, message_id) + _number(0x0700, 0)
    return _command(body + _number(0x0800, 0) + _text(0x1000, sop_instance))


def find_command(message_id: int, sop_class: str) -> bytes:
    return _query_command(0x20, message_id, sop_class)


def get_command(message_id: int, sop_class: str) -> bytes:
    return _query_command(0x10, message_id, sop_class)


def _query_command(field: int, message_id: int, sop_class: str) -> bytes:
    body = _text(0x0002, sop_class) + _number(0x0100, field) + _number(0x0110, message_id)
    return _command(body + _number(0x0700, 0) + _number(0x0800, 0))


def _command(body: bytes) -> bytes:
    return _ELEMENT.pack(0, 0, 4) + len(body).to_bytes(4, "little") + body


def _text(element: int, value: str) -> bytes:
    raw = value.encode() + (b"\0" if len(value) % 2 else b"")
    return _ELEMENT.pack(0, element, len(raw)) + raw


def _number(element: int, value: int) -> bytes:
    return _ELEMENT.pack(0, element, 2) + value.to_bytes(2, "little")
