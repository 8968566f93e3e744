"""What we can do, as tables: SOP classes by service, and their information models. The conformance statement is made of
these."""

from dataclasses import dataclass
from typing import Final

from pydicom.uid import UID_dictionary  # type: ignore[attr-defined]
from pynetdicom import AllStoragePresentationContexts

from conf.settings import DicomSettings

VERIFICATION: Final = "1.2.840.10008.1.1"
COMMITMENT: Final = "1.2.840.10008.1.20.1"
COMMITMENT_INSTANCE: Final = "1.2.840.10008.1.20.1.1"

EXPLICIT_LITTLE: Final = "1.2.840.10008.1.2.1"
IMPLICIT_LITTLE: Final = "1.2.840.10008.1.2"
EXPLICIT_BIG: Final = "1.2.840.10008.1.2.2"
DEFLATED: Final = "1.2.840.10008.1.2.1.99"
UNCOMPRESSED: Final = (EXPLICIT_LITTLE, IMPLICIT_LITTLE, EXPLICIT_BIG)

Encoding = tuple[bool, bool, bool]  # implicit VR, little endian, deflated
_DEFLATED: Final = frozenset((DEFLATED, "1.2.840.10008.1.2.4.95", "1.2.840.10008.1.2.4.205"))
# No encodings of data sets, or of none that we could read: MIME, XML, Papyrus, and those of real-time video (SMPTE).
_NOT_DATA_SETS: Final = ("1.2.840.10008.1.2.6.", "1.2.840.10008.1.2.7.", "1.2.840.10008.1.20")
# Private ones whose encoding is known. GE's differs from implicit VR little endian in the pixels' byte order alone.
PRIVATE_SYNTAXES: Final[dict[str, Encoding]] = {
    "1.2.840.113619.5.2": (True, True, False),  # GE: Implicit VR Little Endian, big endian pixels
    "1.3.46.670589.33.1.4.1": (False, True, False),  # Philips: CT private compression, explicit VR little endian
    "1.2.826.0.1.3680043.2.494.1.1": (False, True, False),  # encrypted explicit VR little endian is still one
}
TRANSFER_SYNTAXES: Final = (
    *(
        uid
        for uid, (_, kind, *_rest) in UID_dictionary.items()
        if kind == "Transfer Syntax" and not uid.startswith(_NOT_DATA_SETS)
    ),
    *PRIVATE_SYNTAXES,
)
_KNOWN_SYNTAXES: Final = frozenset(TRANSFER_SYNTAXES)

# pynetdicom's table, and the retired classes that old machines still send. What has neither patient nor study (hanging
# protocols, palettes, implant templates) isn't of it.
STORAGE_CLASSES: Final = frozenset(str(one.abstract_syntax) for one in AllStoragePresentationContexts) | frozenset(
    uid
    for uid, (name, kind, *_rest) in UID_dictionary.items()
    if kind == "SOP Class"
    and "Storage" in name
    and uid.startswith(("1.2.840.10008.5.1.4.1.1.", "1.2.840.10008.5.1.1.", "1.2.840.10008.5.1.4.34."))
    and not uid.startswith(("1.2.840.10008.5.1.4.1.1.200.", "1.2.840.10008.5.1.4.1.1.201."))
)


@dataclass(frozen=True)
class Model:
    """A query/retrieve information model (PS3.4 C.6)."""

    name: str
    levels: tuple[str, ...]


PATIENT_ROOT: Final = Model("Patient Root", ("PATIENT", "STUDY", "SERIES", "IMAGE"))
STUDY_ROOT: Final = Model("Study Root", ("STUDY", "SERIES", "IMAGE"))
PATIENT_STUDY_ONLY: Final = Model("Patient/Study Only", ("PATIENT", "STUDY"))
_QR: Final = "1.2.840.10008.5.1.4.1.2"
FIND_MODELS: Final = {
    f"{_QR}.1.1": PATIENT_ROOT,
    f"{_QR}.2.1": STUDY_ROOT,
    f"{_QR}.3.1": PATIENT_STUDY_ONLY,
}
MOVE_MODELS: Final = {f"{_QR}.1.2": PATIENT_ROOT, f"{_QR}.2.2": STUDY_ROOT, f"{_QR}.3.2": PATIENT_STUDY_ONLY}
GET_MODELS: Final = {f"{_QR}.1.3": PATIENT_ROOT, f"{_QR}.2.3": STUDY_ROOT, f"{_QR}.3.3": PATIENT_STUDY_ONLY}
QUERY_RETRIEVE: Final = frozenset((*FIND_MODELS, *MOVE_MODELS, *GET_MODELS))
NOT_STORAGE: Final = QUERY_RETRIEVE | {VERIFICATION, COMMITMENT}


def is_storage_class(uid: str, settings: DicomSettings) -> bool:
    """One that is stored: in the tables, or any that isn't another service where the settings say so."""
    return uid in STORAGE_CLASSES or (settings.any_sop_class and uid not in NOT_STORAGE)


def is_transfer_syntax(uid: str, settings: DicomSettings) -> bool:
    """One that is stored: its encoding is known, or taken for explicit VR little endian where the settings say so."""
    return uid in _KNOWN_SYNTAXES or settings.any_transfer_syntax


def encoding_of(transfer_syntax: str) -> Encoding:
    """How a data set is encoded. What isn't one of three is explicit VR little endian (PS3.5 annex A.4)."""
    private = PRIVATE_SYNTAXES.get(transfer_syntax)
    if private is not None:
        return private
    return transfer_syntax == IMPLICIT_LITTLE, transfer_syntax != EXPLICIT_BIG, transfer_syntax in _DEFLATED


def is_encapsulated(transfer_syntax: str) -> bool:
    """Its pixels must be decoded before they can be had uncompressed."""
    return transfer_syntax not in (*UNCOMPRESSED, DEFLATED)


def name_of(uid: str) -> str:
    """The Standard's name, or the UID."""
    known = UID_dictionary.get(uid)
    return known[0] if known else uid
