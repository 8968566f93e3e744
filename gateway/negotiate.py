"""Association negotiation: who is let in, and which presentation contexts. Codecs and tables are pynetdicom's."""

from dataclasses import dataclass
from typing import Any, Final

from pydicom._uid_dict import UID_dictionary
from pydicom.uid import UID, AllTransferSyntaxes
from pynetdicom.pdu import A_ASSOCIATE_AC, A_ASSOCIATE_RQ
from pynetdicom.pdu_primitives import (
    A_ASSOCIATE,
    ImplementationClassUIDNotification,
    ImplementationVersionNameNotification,
    MaximumLengthNotification,
    SCP_SCU_RoleSelectionNegotiation,
)
from pynetdicom.presentation import build_context, negotiate_as_acceptor
from pynetdicom.sop_class import (
    _STORAGE_CLASSES,
    StudyRootQueryRetrieveInformationModelFind,
    Verification,
)

from conf import VERSION
from conf.settings import DicomSettings

IMPLEMENTATION_CLASS_UID: Final = UID("2.25.191406830207312346718502370431184295617")
IMPLEMENTATION_VERSION: Final = f"TANDEM_{VERSION}"[:16]

# pynetdicom's table, and the retired storage classes that old machines still send.
STORAGE_CLASSES: Final = frozenset(str(uid) for uid in _STORAGE_CLASSES.values()) | frozenset(
    uid for uid, (name, kind, *_) in UID_dictionary.items() if kind == "SOP Class" and "Image Storage" in name
)
VERIFICATION: Final = str(Verification)
STUDY_ROOT_FIND: Final = str(StudyRootQueryRetrieveInformationModelFind)
UNCOMPRESSED: Final = ("1.2.840.10008.1.2.1", "1.2.840.10008.1.2", "1.2.840.10008.1.2.2")
TRANSFER_SYNTAXES: Final = frozenset(str(uid) for uid in AllTransferSyntaxes)


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
class Negotiated:
    response: bytes
    calling_ae: str
    peer_max_pdu_bytes: int
    contexts: dict[int, tuple[str, str]]  # accepted: ID -> (abstract syntax, transfer syntax)


def is_storage_class(uid: str, settings: DicomSettings) -> bool:
    return uid in STORAGE_CLASSES or (settings.any_sop_class and uid not in (VERIFICATION, STUDY_ROOT_FIND))


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
    proposed = asked.presentation_context_definition_list
    supported: dict[str, list[str]] = {}
    for context in proposed:
        abstract = str(context.abstract_syntax)
        known = supported.setdefault(abstract, [])
        known += [str(uid) for uid in context.transfer_syntax if _takes(abstract, str(uid), settings)]
    ours = [build_context(abstract, transfer) for abstract, transfer in supported.items() if transfer]
    roles = {
        str(item.sop_class_uid): (item.scu_role, item.scp_role)
        for item in asked.user_information
        if isinstance(item, SCP_SCU_RoleSelectionNegotiation)
    }
    results, _ = negotiate_as_acceptor(proposed, ours, roles)
    accepted = {
        context.context_id: (str(context.abstract_syntax), str(context.transfer_syntax[0]))
        for context in results
        if context.result == 0
    }
    peer_max = next(
        (
            item.maximum_length_received
            for item in asked.user_information
            if isinstance(item, MaximumLengthNotification)
        ),
        16384,
    )
    return Negotiated(_response(asked, results, settings), calling, peer_max, accepted)


def _takes(abstract: str, transfer: str, settings: DicomSettings) -> bool:
    if abstract in (VERIFICATION, STUDY_ROOT_FIND):
        return transfer in UNCOMPRESSED
    return is_storage_class(abstract, settings) and (transfer in TRANSFER_SYNTAXES or settings.any_sop_class)


def _response(asked: A_ASSOCIATE, results: list[Any], settings: DicomSettings) -> bytes:
    answer = A_ASSOCIATE()
    answer.application_context_name = asked.application_context_name
    answer.calling_ae_title, answer.called_ae_title = asked.calling_ae_title, asked.called_ae_title
    answer.result, answer.result_source = 0, 1
    answer.presentation_context_definition_results_list = results
    length = MaximumLengthNotification()
    length.maximum_length_received = settings.max_pdu_bytes
    uid = ImplementationClassUIDNotification()
    uid.implementation_class_uid = IMPLEMENTATION_CLASS_UID
    version = ImplementationVersionNameNotification()
    version.implementation_version_name = IMPLEMENTATION_VERSION
    answer.user_information = [length, uid, version]
    pdu = A_ASSOCIATE_AC()
    pdu.from_primitive(answer)
    encoded: bytes = pdu.encode()
    return encoded
