"""A-ASSOCIATE-RQ and -AC (PS3.8 9.3.2, 9.3.3; PS3.7 annex D.3): lenient in what is taken, strict in what is sent.

What isn't known is skipped (PS3.8 9.3.1), what is too long or of the wrong size is left out, and everything is counted
before it is decoded: whatever comes in costs at most some milliseconds. Only a PDU whose items don't add up is an
error, `Malformed`.
"""

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final

from gateway.dicom.uids import APPLICATION_CONTEXT, IMPLEMENTATION_CLASS_UID, IMPLEMENTATION_VERSION, UID_CHARS_MAX

PDU_BYTES_MAX: Final = 128 << 10
CONTEXTS_MAX: Final = 128  # the odd numbers up to 255
TRANSFER_SYNTAXES_MAX: Final = 64  # of one context; what comes after them isn't looked at
ITEMS_MAX: Final = 1024  # of user information
RELATED_MAX: Final = 64  # of one common extended negotiation
AET_BYTES: Final = 16
DEFAULT_PDU_BYTES: Final = 16384  # of a peer that doesn't say

# Results of a presentation context (PS3.8 table 9-18).
ACCEPTANCE, ABSTRACT_SYNTAX_NOT_SUPPORTED, TRANSFER_SYNTAXES_NOT_SUPPORTED = 0, 3, 4

_FIXED: Final = struct.Struct(">BxLHxx16s16s32x")
_ITEM: Final = struct.Struct(">BxH")
_SHORT: Final = struct.Struct(">H")


class Malformed(Exception):
    """Items that are longer than what holds them."""


@dataclass(frozen=True)
class Proposed:
    """A presentation context as it is asked for."""

    context_id: int
    abstract_syntax: str  # "" if there was none that can be one
    transfer_syntaxes: tuple[str, ...]


@dataclass(frozen=True)
class Result:
    """The answer to one presentation context; `transfer_syntax` counts only with ACCEPTANCE."""

    context_id: int
    result: int
    transfer_syntax: str = ""


@dataclass(frozen=True)
class UserIdentity:
    """PS3.7 D.3.3.7: type 1 is a user name, 2 a name with a passcode, others tokens."""

    kind: int
    response_requested: bool
    primary: bytes
    secondary: bytes


@dataclass(frozen=True)
class CommonExtended:
    """PS3.7 D.3.3.6: a SOP class and the general ones that it may be treated as."""

    sop_class: str
    service_class: str
    related: tuple[str, ...]


@dataclass(frozen=True)
class UserInformation:
    """What both sides say of themselves. `max_pdu_bytes` 0: no limit; None: not said."""

    max_pdu_bytes: int | None = None
    implementation_class: str = ""
    implementation_version: str = ""
    window: tuple[int, int] | None = None  # operations invoked, performed; 0: any number
    roles: dict[str, tuple[bool, bool]] = field(default_factory=dict)  # SOP class -> (as SCU, as SCP)
    extended: dict[str, bytes] = field(default_factory=dict)  # SOP class -> service class application information
    common: tuple[CommonExtended, ...] = ()
    identity: UserIdentity | None = None
    identity_response: bytes | None = None  # of an acceptor


@dataclass(frozen=True)
class AssociateRequest:
    called_aet: str
    calling_aet: str
    contexts: tuple[Proposed, ...]
    user: UserInformation = UserInformation()
    application_context: str = APPLICATION_CONTEXT
    protocol_version: int = 1
    titles: bytes = b""  # both AE titles as they came, 32 bytes; an answer repeats them


@dataclass(frozen=True)
class AssociateAccept:
    results: tuple[Result, ...]
    user: UserInformation = UserInformation()


# -- in ----------------------------------------------------------------------------------------------------------------


def decode_request(pdu: bytes) -> AssociateRequest:
    """A whole A-ASSOCIATE-RQ PDU. Raises Malformed."""
    version, called, calling, items = _opened(pdu)
    application, user = "", UserInformation()
    contexts: dict[int, Proposed] = {}
    for kind, value in items:
        if kind == 0x10:
            application = _uid(value)
        elif kind == 0x20 and len(contexts) < CONTEXTS_MAX:
            context = _proposed(value)
            if context and context.context_id % 2:  # another one can't be answered
                contexts.setdefault(context.context_id, context)
        elif kind == 0x50:
            user = _user_information(value)
    return AssociateRequest(
        _aet(called), _aet(calling), tuple(contexts.values()), user, application, version, called + calling
    )


def decode_accept(pdu: bytes) -> AssociateAccept:
    """A whole A-ASSOCIATE-AC PDU. Raises Malformed."""
    _, _, _, items = _opened(pdu)
    user = UserInformation()
    results: dict[int, Result] = {}
    for kind, value in items:
        if kind == 0x21 and len(value) >= 4 and len(results) < CONTEXTS_MAX:
            inner = [uid for inside, raw in _items(value[4:]) if inside == 0x40 and (uid := _uid(raw))]
            results.setdefault(value[0], Result(value[0], value[2], inner[0] if inner else ""))
        elif kind == 0x50:
            user = _user_information(value)
    return AssociateAccept(tuple(results.values()), user)


def _opened(pdu: bytes) -> tuple[int, bytes, bytes, Iterator[tuple[int, memoryview]]]:
    """(protocol version, called and calling AE title, items)."""
    if len(pdu) < _FIXED.size:
        raise Malformed(f"{len(pdu)} bytes are too few")
    _, _, version, called, calling = _FIXED.unpack_from(pdu)
    return version, called, calling, _items(memoryview(pdu)[_FIXED.size :])


def _items(view: memoryview) -> Iterator[tuple[int, memoryview]]:
    """(type, value) of each item; fewer than four bytes at the end are padding."""
    at, end = 0, len(view)
    while end - at >= _ITEM.size:
        kind, length = _ITEM.unpack_from(view, at)
        at += _ITEM.size
        if length > end - at:
            raise Malformed(f"an item of type {kind:02X}H is longer than what holds it")
        yield kind, view[at : at + length]
        at += length


def _aet(raw: bytes) -> str:
    """Up to a NUL; what isn't a character of an AE title is shown as one that is."""
    text = raw.partition(b"\0")[0].decode("latin-1").strip()
    return "".join(char if " " <= char <= "~" else "?" for char in text)


def _text(view: memoryview) -> str:
    text = bytes(view).partition(b"\0")[0].decode("latin-1").strip()
    return "".join(char if " " <= char <= "~" else "?" for char in text)


def _uid(view: memoryview) -> str:
    """ "" for one that is too long to be any."""
    return "" if len(view) > UID_CHARS_MAX + 1 else _text(view)


def _proposed(value: memoryview) -> Proposed | None:
    if len(value) < 4:
        return None
    abstract, transfer, seen = "", [], 0
    for kind, raw in _items(value[4:]):
        if kind == 0x30 and not abstract:
            abstract = _uid(raw)
        elif kind == 0x40:
            seen += 1
            if seen > TRANSFER_SYNTAXES_MAX:
                break
            if uid := _uid(raw):
                transfer.append(uid)
    return Proposed(value[0], abstract, tuple(transfer))


def _user_information(value: memoryview) -> UserInformation:
    max_pdu_bytes, window, identity, response = None, None, None, None
    implementation, version = "", ""
    roles: dict[str, tuple[bool, bool]] = {}
    extended: dict[str, bytes] = {}
    common: list[CommonExtended] = []
    for number, (kind, raw) in enumerate(_items(value)):
        if number >= ITEMS_MAX:
            break
        if kind == 0x51 and len(raw) == 4:
            max_pdu_bytes = int.from_bytes(raw, "big")
        elif kind == 0x52:
            implementation = _uid(raw)
        elif kind == 0x53 and len(raw) == 4:
            window = (int.from_bytes(raw[:2], "big"), int.from_bytes(raw[2:], "big"))
        elif kind == 0x54 and (found := _after_uid(raw)) and len(found[1]) >= 2:
            roles.setdefault(found[0], (found[1][0] == 1, found[1][1] == 1))
        elif kind == 0x55:
            version = _text(raw)
        elif kind == 0x56 and (found := _after_uid(raw)):
            extended.setdefault(found[0], bytes(found[1][:64]))
        elif kind == 0x57 and (one := _common(raw)):
            common.append(one)
        elif kind == 0x58:
            identity = _identity(raw)
        elif kind == 0x59 and (given := _sized(raw)):
            response = bytes(given[0])
    return UserInformation(
        max_pdu_bytes, implementation, version, window, roles, extended, tuple(common), identity, response
    )


def _sized(view: memoryview) -> tuple[memoryview, memoryview] | None:
    """What follows a length of two bytes, and the rest; None where that isn't there."""
    if len(view) < 2:
        return None
    (length,) = _SHORT.unpack_from(view)
    return None if length > len(view) - 2 else (view[2 : 2 + length], view[2 + length :])


def _after_uid(view: memoryview) -> tuple[str, memoryview] | None:
    parts = _sized(view)
    uid = _uid(parts[0]) if parts else ""
    return (uid, parts[1]) if parts and uid else None


def _common(view: memoryview) -> CommonExtended | None:
    own = _after_uid(view)
    service = _sized(own[1]) if own else None
    related = _sized(service[1]) if service else None
    if not own or not service or not related:
        return None
    found: list[str] = []
    rest = related[0]
    while len(found) < RELATED_MAX and (one := _sized(rest)):
        found.append(_uid(one[0]))
        rest = one[1]
    return CommonExtended(own[0], _uid(service[0]), tuple(uid for uid in found if uid))


def _identity(view: memoryview) -> UserIdentity | None:
    primary = _sized(view[2:])
    secondary = _sized(primary[1]) if primary else None
    if primary is None:
        return None
    return UserIdentity(view[0], view[1] == 1, bytes(primary[0]), bytes(secondary[0]) if secondary else b"")


# -- out ---------------------------------------------------------------------------------------------------------------


def encode_request(request: AssociateRequest) -> bytes:
    contexts = [
        _item(
            0x20,
            struct.pack(">Bxxx", one.context_id)
            + _item(0x30, one.abstract_syntax.encode("ascii"))
            + b"".join(_item(0x40, uid.encode("ascii")) for uid in one.transfer_syntaxes),
        )
        for one in request.contexts
    ]
    titles = _padded(request.called_aet) + _padded(request.calling_aet)
    return _pdu(1, titles, contexts, request.user)


def encode_accept(request: AssociateRequest, results: Sequence[Result], user: UserInformation) -> bytes:
    """The answer to `request`. Its AE titles are repeated as they came (PS3.8 table 9-17)."""
    contexts = [
        _item(
            0x21,
            struct.pack(">BxBx", one.context_id, one.result) + _item(0x40, one.transfer_syntax.encode("ascii")),
        )
        for one in results
    ]
    titles = request.titles or _padded(request.called_aet) + _padded(request.calling_aet)
    return _pdu(2, titles, contexts, user)


def about_us(max_pdu_bytes: int) -> UserInformation:
    """What every association of ours says (PS3.7 D.3.3.1, D.3.3.2)."""
    return UserInformation(max_pdu_bytes, IMPLEMENTATION_CLASS_UID, IMPLEMENTATION_VERSION)


def _padded(aet: str) -> bytes:
    return aet.encode("ascii", "replace")[:AET_BYTES].ljust(AET_BYTES)


def _item(kind: int, value: bytes) -> bytes:
    return _ITEM.pack(kind, len(value)) + value


def _pdu(kind: int, titles: bytes, contexts: list[bytes], user: UserInformation) -> bytes:
    body = (
        struct.pack(">Hxx", 1)
        + titles
        + bytes(32)
        + _item(0x10, APPLICATION_CONTEXT.encode("ascii"))
        + b"".join(contexts)
        + _item(0x50, _encoded_user(user))
    )
    return struct.pack(">BxL", kind, len(body)) + body


def _encoded_user(user: UserInformation) -> bytes:
    out = []
    if user.max_pdu_bytes is not None:
        out.append(_item(0x51, user.max_pdu_bytes.to_bytes(4, "big")))
    if user.implementation_class:
        out.append(_item(0x52, user.implementation_class.encode("ascii")))
    if user.window:
        out.append(_item(0x53, struct.pack(">HH", *user.window)))
    for uid, (scu, scp) in user.roles.items():
        out.append(_item(0x54, _with_size(uid.encode("ascii")) + bytes((scu, scp))))
    if user.implementation_version:
        out.append(_item(0x55, user.implementation_version.encode("ascii")[:16]))
    for uid, information in user.extended.items():
        out.append(_item(0x56, _with_size(uid.encode("ascii")) + information))
    if user.identity:
        one = user.identity
        value = bytes((one.kind, one.response_requested)) + _with_size(one.primary) + _with_size(one.secondary)
        out.append(_item(0x58, value))
    if user.identity_response is not None:
        out.append(_item(0x59, _with_size(user.identity_response)))
    return b"".join(out)


def _with_size(value: bytes) -> bytes:
    return _SHORT.pack(len(value)) + value
