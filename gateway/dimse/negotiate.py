"""Association negotiation: who is let in, and on which terms."""

from dataclasses import dataclass, field
from typing import Final

from conf.settings import DicomSettings
from gateway.archive.find import Extended
from gateway.dicom.associate import (
    ABSTRACT_SYNTAX_NOT_SUPPORTED,
    ACCEPTANCE,
    DEFAULT_PDU_BYTES,
    TRANSFER_SYNTAXES_NOT_SUPPORTED,
    AssociateRequest,
    Proposed,
    Result,
    UserIdentity,
    UserInformation,
    about_us,
    encode_accept,
)
from gateway.dicom.sop_classes import (
    COMMITMENT,
    FIND_MODELS,
    NOT_STORAGE,
    QUERY_RETRIEVE,
    STORAGE_CLASSES,
    UNCOMPRESSED,
    VERIFICATION,
    is_storage_class,
    is_transfer_syntax,
)
from gateway.dicom.uids import APPLICATION_CONTEXT

PEER_PDU_BYTES_MIN: Final = 256  # cutting data sets smaller would hold up everybody else
WINDOW_MAX: Final = 4  # requests that are taken before the first is answered; they are answered in their order
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
DRAINING = Rejection(2, 3, 1, "switching over")
BUSY = Rejection(2, 3, 2, "association limit reached")
NOT_LET_IN = Rejection(1, 1, 1, "user name or passcode isn't right")


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

    @property
    def stores(self) -> bool:
        """C-STORE requests may come."""
        return any(one.abstract_syntax not in NOT_STORAGE and not one.may_store for one in self.contexts.values())


def refusal(request: AssociateRequest, settings: DicomSettings) -> Rejection | None:
    """Why a request is turned down before anything costly is looked at, None if it isn't."""
    if not request.protocol_version & 1:
        return Rejection(1, 2, 2, f"protocol version {request.protocol_version}")
    if request.application_context != APPLICATION_CONTEXT:
        return Rejection(1, 1, 2, "application context name not supported")
    if settings.require_called_aet and request.called_aet != settings.aet:
        return Rejection(1, 1, 7, f"called AE title {request.called_aet!r} isn't ours")
    if settings.calling_aets and request.calling_aet not in settings.calling_aets:
        return Rejection(1, 1, 3, f"calling AE title {request.calling_aet!r} isn't let in")
    length = request.user.max_pdu_bytes
    if length is not None and 0 < length < PEER_PDU_BYTES_MIN:
        return Rejection(1, 2, 1, f"maximum PDU length of {length} bytes")
    return None


def negotiate(request: AssociateRequest, settings: DicomSettings) -> Negotiated | Rejection:
    """Answer an association request by the AE title rules and our presentation contexts. Who logs in was looked at
    before."""
    if refused := refusal(request, settings):
        return refused
    user = request.user
    specialized = frozenset(_specialized(user))
    contexts: dict[int, Presentation] = {}
    results: list[Result] = []
    roles: dict[str, tuple[bool, bool]] = {}
    for proposed in request.contexts:
        result = _result(proposed, settings, specialized)
        results.append(result)
        if result.result == ACCEPTANCE:
            abstract = proposed.abstract_syntax
            as_scu, as_scp = user.roles.get(abstract, (True, False))
            takes_roles = abstract not in NOT_STORAGE or abstract == COMMITMENT
            if takes_roles and abstract in user.roles:
                roles[abstract] = (as_scu, as_scp)
            contexts[proposed.context_id] = Presentation(abstract, result.transfer_syntax, takes_roles and as_scp)
    extended = _extended(user)
    ours = about_us(settings.max_pdu_bytes)
    answer = UserInformation(
        ours.max_pdu_bytes,
        ours.implementation_class,
        ours.implementation_version,
        window=_window(user),
        roles=roles,
        extended=_extended_answers(user, extended, specialized),
        identity_response=_identity_answer(user.identity),
    )
    return Negotiated(
        response=encode_accept(request, results, answer),
        calling_ae=request.calling_aet,
        peer_max_pdu_bytes=DEFAULT_PDU_BYTES if user.max_pdu_bytes is None else user.max_pdu_bytes,
        contexts=contexts,
        extended=extended,
        specialized=specialized,
        user=user_of(user.identity),
        implementation=user.implementation_version,
    )


def wants_to_read(request: AssociateRequest) -> bool:
    """It proposes to query or retrieve, which a standby does as well, or only asks whether we are there."""
    wanted = {context.abstract_syntax for context in request.contexts}
    return not wanted.isdisjoint(QUERY_RETRIEVE) or wanted == {VERIFICATION}


def wants_to_store(request: AssociateRequest, settings: DicomSettings) -> bool:
    """It proposes storage contexts, and none to retrieve by."""
    wanted = {context.abstract_syntax for context in request.contexts}
    return wanted.isdisjoint(QUERY_RETRIEVE) and any(is_storage_class(uid, settings) for uid in wanted)


# -- presentation contexts ---------------------------------------------------------------------------------------------


def _result(proposed: Proposed, settings: DicomSettings, specialized: frozenset[str]) -> Result:
    """The first transfer syntax in the sender's order that we take."""
    abstract = proposed.abstract_syntax
    other = abstract in NOT_STORAGE
    if not (other or is_storage_class(abstract, settings) or abstract in specialized) or not abstract:
        return Result(proposed.context_id, ABSTRACT_SYNTAX_NOT_SUPPORTED)
    for uid in proposed.transfer_syntaxes:
        if uid in UNCOMPRESSED if other else is_transfer_syntax(uid, settings):
            return Result(proposed.context_id, ACCEPTANCE, uid)
    return Result(proposed.context_id, TRANSFER_SYNTAXES_NOT_SUPPORTED)


def _specialized(user: UserInformation) -> list[str]:
    """SOP class common extended negotiation (PS3.7 D.3.3.6): classes that may be treated as a general one we store."""
    return [
        one.sop_class
        for one in user.common
        if one.sop_class not in NOT_STORAGE and not STORAGE_CLASSES.isdisjoint(one.related)
    ]


# -- other items -------------------------------------------------------------------------------------------------------


def _extended(user: UserInformation) -> dict[str, Extended]:
    """What is agreed on: whatever was asked for that we do."""
    agreed = {}
    for uid, information in user.extended.items():
        if uid in QUERY_RETRIEVE:
            wanted = [bool(byte & 1) for byte in information[:3]]
            relational, date_time, fuzzy = (*wanted, False, False, False)[:3]
            is_find = uid in FIND_MODELS
            agreed[uid] = Extended(relational, date_time and is_find, fuzzy and is_find)
    return agreed


def _extended_answers(
    user: UserInformation, extended: dict[str, Extended], specialized: frozenset[str]
) -> dict[str, bytes]:
    answers = {}
    for uid in user.extended:
        if uid in extended:
            one = extended[uid]
            said = bytes((one.relational, one.date_time, one.fuzzy_names))
            answers[uid] = said if uid in FIND_MODELS else said[:1]
        elif uid in STORAGE_CLASSES or uid in specialized:
            answers[uid] = STORAGE_SUPPORT
    return answers


def _window(user: UserInformation) -> tuple[int, int] | None:
    """Requests may come before earlier ones are answered; we send at most as many as the other side performs."""
    if user.window is None:
        return None
    return min(user.window[0] or WINDOW_MAX, WINDOW_MAX), 1


def user_of(identity: UserIdentity | None) -> str:
    if identity is None or identity.kind not in (1, 2):
        return ""
    return identity.primary.decode("utf-8", "replace")[:64]


def _identity_answer(identity: UserIdentity | None) -> bytes | None:
    return b"" if identity and identity.response_requested and identity.kind in (1, 2) else None
