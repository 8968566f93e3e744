"""Association negotiation: who is let in, and on which terms. Codecs and tables are pynetdicom's."""

import hashlib
import hmac
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Final

from pynetdicom.pdu import A_ASSOCIATE_AC, A_ASSOCIATE_RQ
from pynetdicom.pdu_primitives import (
    A_ASSOCIATE,
    AsynchronousOperationsWindowNegotiation,
    ImplementationClassUIDNotification,
    ImplementationVersionNameNotification,
    MaximumLengthNotification,
    SCP_SCU_RoleSelectionNegotiation,
    SOPClassCommonExtendedNegotiation,
    SOPClassExtendedNegotiation,
    UserIdentityNegotiation,
)
from pynetdicom.presentation import build_context, negotiate_as_acceptor
from pynetdicom.sop_class import Verification

from conf.settings import DicomSettings
from gateway.archive.find import Extended
from gateway.dicom.sop_classes import (
    COMMITMENT,
    FIND_MODELS,
    NOT_STORAGE,
    QUERY_RETRIEVE,
    STORAGE_CLASSES,
    TRANSFER_SYNTAXES,
    UNCOMPRESSED,
    is_storage_class,
)
from gateway.dicom.uids import IMPLEMENTATION_CLASS_UID, IMPLEMENTATION_VERSION

PEER_PDU_BYTES_MIN: Final = 256  # cutting data sets smaller would hold up everybody else
WINDOW_MAX: Final = 16  # requests that are taken before the first is answered; they are answered in their order
# PS3.4 table B.3-3: all attributes kept (level 2), digital signatures kept bit for bit (3), nothing coerced (0).
STORAGE_SUPPORT: Final = bytes((2, 0, 3, 0, 0, 0))


@dataclass(frozen=True)
class Rejection:
    """PS3.8 table 9-21."""

    result: int
    source: int
    reason: int
    why: str


NOT_NOW = Rejection(2, 3, 1, "not the primary")
BUSY = Rejection(2, 3, 2, "association limit reached")


@dataclass(frozen=True)
class Presentation:
    """An accepted presentation context. `may_store`: the other side takes C-STORE requests on it (C-GET)."""

    abstract_syntax: str
    transfer_syntax: str
    may_store: bool


@dataclass(frozen=True)
class Negotiated:
    response: bytes
    calling_ae: str
    peer_max_pdu_bytes: int
    contexts: dict[int, Presentation]
    extended: dict[str, Extended] = field(default_factory=dict)  # by SOP class
    specialized: frozenset[str] = frozenset()  # private SOP classes whose general class is a storage class
    user: str = ""
    implementation: str = ""


def negotiate(request: A_ASSOCIATE_RQ, settings: DicomSettings) -> Negotiated | Rejection:
    """Answer an association request by the AE title rules and our presentation contexts."""
    asked: A_ASSOCIATE = request.to_primitive()
    called, calling = asked.called_ae_title.strip(), asked.calling_ae_title.strip()
    if str(asked.application_context_name) != "1.2.840.10008.3.1.1.1":
        return Rejection(1, 1, 2, "application context name not supported")
    if settings.require_called_aet and called != settings.aet:
        return Rejection(1, 1, 7, f"called AE title {called!r} isn't ours")
    if settings.calling_aets and calling not in settings.calling_aets:
        return Rejection(1, 1, 3, f"calling AE title {calling!r} isn't let in")
    items = asked.user_information
    lengths = [item.maximum_length_received for item in items if isinstance(item, MaximumLengthNotification)]
    if lengths and 0 < lengths[0] < PEER_PDU_BYTES_MIN:
        return Rejection(1, 2, 1, f"maximum PDU length of {lengths[0]} bytes")
    identity = next((item for item in items if isinstance(item, UserIdentityNegotiation)), None)
    user = _user_of(identity)
    if settings.users and not _is_known(identity, settings.users):
        return Rejection(1, 1, 1, f"user {user!r} isn't let in")
    specialized = frozenset(_specialized(items))
    results, roles = _contexts(asked, settings, specialized)
    accepted = {
        context.context_id: Presentation(
            str(context.abstract_syntax), str(context.transfer_syntax[0]), bool(context.as_scu)
        )
        for context in results
        if context.result == 0
    }
    extended = _extended(items, settings)
    names = [
        item.implementation_version_name for item in items if isinstance(item, ImplementationVersionNameNotification)
    ]
    answers = [*roles, *_extended_answers(items, extended, specialized), *_window(items), *_identity_answer(identity)]
    return Negotiated(
        response=_response(asked, results, answers, settings),
        calling_ae=calling,
        peer_max_pdu_bytes=lengths[0] if lengths else 16384,
        contexts=accepted,
        extended=extended,
        specialized=specialized,
        user=user,
        implementation=str(names[0]) if names else "",
    )


def wants_to_read(request: A_ASSOCIATE_RQ) -> bool:
    """It proposes to query or retrieve, which a standby does as well, or only asks whether we are there."""
    contexts = request.to_primitive().presentation_context_definition_list
    wanted = {str(context.abstract_syntax) for context in contexts}
    return not wanted.isdisjoint(QUERY_RETRIEVE) or wanted == {Verification}


# -- presentation contexts ---------------------------------------------------------------------------------------------


def _contexts(asked: A_ASSOCIATE, settings: DicomSettings, specialized: frozenset[str]) -> tuple[list[Any], list[Any]]:
    """(results, answers to the role selection)."""
    proposed = asked.presentation_context_definition_list
    taken: dict[int, list[str]] = {}
    supported: dict[str, list[str]] = {}
    for context in proposed:
        abstract = str(context.abstract_syntax)
        syntaxes = [str(uid) for uid in context.transfer_syntax if _takes(abstract, str(uid), settings, specialized)]
        taken[context.context_id] = syntaxes
        supported.setdefault(abstract, []).extend(syntaxes)
    ours = []
    for abstract, transfer in supported.items():
        if transfer:
            context = build_context(abstract, transfer)
            if abstract not in NOT_STORAGE or abstract == COMMITMENT:
                context.scu_role = context.scp_role = True  # whichever roles the other side proposes
            ours.append(context)
    roles = {
        str(item.sop_class_uid): (item.scu_role, item.scp_role)
        for item in asked.user_information
        if isinstance(item, SCP_SCU_RoleSelectionNegotiation)
    }
    results, answers = negotiate_as_acceptor(proposed, ours, roles)
    for result in results:
        if result.result == 0:  # the first in the sender's order
            result.transfer_syntax = [taken[result.context_id][0]]
    return results, list(answers)


def _takes(abstract: str, transfer: str, settings: DicomSettings, specialized: frozenset[str]) -> bool:
    if abstract in NOT_STORAGE:
        return transfer in UNCOMPRESSED
    storage = is_storage_class(abstract, settings) or abstract in specialized
    return storage and (transfer in TRANSFER_SYNTAXES or settings.any_sop_class)


def _specialized(items: list[Any]) -> list[str]:
    """SOP class common extended negotiation (PS3.7 D.3.3.6): classes that may be treated as a general one we store."""
    return [
        str(item.sop_class_uid)
        for item in items
        if isinstance(item, SOPClassCommonExtendedNegotiation)
        and str(item.sop_class_uid) not in NOT_STORAGE
        and any(str(uid) in STORAGE_CLASSES for uid in item.related_general_sop_class_identification)
    ]


# -- other items -------------------------------------------------------------------------------------------------------


def _extended(items: list[Any], settings: DicomSettings) -> dict[str, Extended]:
    """What is agreed on: whatever was asked for that we do."""
    agreed = {}
    for item in items:
        if isinstance(item, SOPClassExtendedNegotiation) and str(item.sop_class_uid) in QUERY_RETRIEVE:
            wanted = [bool(byte & 1) for byte in (item.service_class_application_information or b"")[:3]]
            relational, date_time, fuzzy = (*wanted, False, False, False)[:3]
            is_find = str(item.sop_class_uid) in FIND_MODELS
            agreed[str(item.sop_class_uid)] = Extended(relational, date_time and is_find, fuzzy and is_find)
    return agreed


def _extended_answers(items: list[Any], extended: dict[str, Extended], specialized: frozenset[str]) -> list[Any]:
    answers = []
    for item in items:
        if not isinstance(item, SOPClassExtendedNegotiation):
            continue
        uid = str(item.sop_class_uid)
        if uid in extended:
            one = extended[uid]
            said = (
                bytes((one.relational, one.date_time, one.fuzzy_names))
                if uid in FIND_MODELS
                else bytes((one.relational,))
            )
        elif uid in STORAGE_CLASSES or uid in specialized:
            said = STORAGE_SUPPORT
        else:
            continue
        answer = SOPClassExtendedNegotiation()
        answer.sop_class_uid, answer.service_class_application_information = uid, said
        answers.append(answer)
    return answers


def _window(items: list[Any]) -> list[Any]:
    """Requests may come before earlier ones are answered; we send at most as many as the other side performs."""
    for item in items:
        if isinstance(item, AsynchronousOperationsWindowNegotiation):
            answer = AsynchronousOperationsWindowNegotiation()
            answer.maximum_number_operations_invoked = min(
                item.maximum_number_operations_invoked or WINDOW_MAX, WINDOW_MAX
            )
            answer.maximum_number_operations_performed = 1
            return [answer]
    return []


def _user_of(identity: UserIdentityNegotiation | None) -> str:
    if identity is None or identity.user_identity_type not in (1, 2):
        return ""
    name: bytes = identity.primary_field or b""
    return name.decode("utf-8", "replace")[:64]


def _is_known(identity: UserIdentityNegotiation | None, users: dict[str, str]) -> bool:
    if identity is None or identity.user_identity_type != 2:
        return False
    given = identity.secondary_field or b""
    return is_password(given, users.get(_user_of(identity), ""))


def _identity_answer(identity: UserIdentityNegotiation | None) -> list[Any]:
    if identity is None or not identity.positive_response_requested or identity.user_identity_type not in (1, 2):
        return []
    answer = UserIdentityNegotiation()
    answer.server_response = b""
    return [answer]


def hash_password(password: bytes, salt: bytes) -> str:
    """What stands in the settings for a password."""
    return f"scrypt${salt.hex()}${hashlib.scrypt(password, salt=salt, n=1 << 14, r=8, p=1).hex()}"


@lru_cache(maxsize=256)
def is_password(password: bytes, kept: str) -> bool:
    """`kept` is from `hash_password`; anything else matches nothing."""
    method, _, rest = kept.partition("$")
    salt, _, _ = rest.partition("$")
    try:
        return method == "scrypt" and hmac.compare_digest(hash_password(password, bytes.fromhex(salt)), kept)
    except ValueError:
        return False


def about_us(max_pdu_bytes: int) -> list[Any]:
    """The items of every association of ours: maximum length, implementation (PS3.7 annex D.3.3.1, D.3.3.2)."""
    length = MaximumLengthNotification()
    length.maximum_length_received = max_pdu_bytes
    uid = ImplementationClassUIDNotification()
    uid.implementation_class_uid = IMPLEMENTATION_CLASS_UID
    version = ImplementationVersionNameNotification()
    version.implementation_version_name = IMPLEMENTATION_VERSION
    return [length, uid, version]


def _response(asked: A_ASSOCIATE, results: list[Any], answers: list[Any], settings: DicomSettings) -> bytes:
    answer = A_ASSOCIATE()
    answer.application_context_name = asked.application_context_name
    answer.calling_ae_title, answer.called_ae_title = asked.calling_ae_title, asked.called_ae_title
    answer.result, answer.result_source = 0, 1
    answer.presentation_context_definition_results_list = results
    answer.user_information = [*about_us(settings.max_pdu_bytes), *answers]
    pdu = A_ASSOCIATE_AC()
    pdu.from_primitive(answer)
    encoded: bytes = pdu.encode()
    return encoded
