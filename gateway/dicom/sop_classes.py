"""What we can do, as tables: SOP classes by service, and their information models. The conformance statement is made of
these."""

from dataclasses import dataclass
from typing import Final

from pydicom._uid_dict import UID_dictionary
from pydicom.uid import AllTransferSyntaxes
from pynetdicom.sop_class import _STORAGE_CLASSES

from conf.settings import DicomSettings

VERIFICATION: Final = "1.2.840.10008.1.1"
COMMITMENT: Final = "1.2.840.10008.1.20.1"
COMMITMENT_INSTANCE: Final = "1.2.840.10008.1.20.1.1"

EXPLICIT_LITTLE: Final = "1.2.840.10008.1.2.1"
IMPLICIT_LITTLE: Final = "1.2.840.10008.1.2"
EXPLICIT_BIG: Final = "1.2.840.10008.1.2.2"
DEFLATED: Final = "1.2.840.10008.1.2.1.99"
UNCOMPRESSED: Final = (EXPLICIT_LITTLE, IMPLICIT_LITTLE, EXPLICIT_BIG)
TRANSFER_SYNTAXES: Final = tuple(str(uid) for uid in AllTransferSyntaxes)

# pynetdicom's table, and the retired storage classes that old machines still send.
STORAGE_CLASSES: Final = frozenset(str(uid) for uid in _STORAGE_CLASSES.values()) | frozenset(
    uid for uid, (name, kind, *_) in UID_dictionary.items() if kind == "SOP Class" and "Image Storage" in name
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


def name_of(uid: str) -> str:
    """The Standard's name, or the UID."""
    known = UID_dictionary.get(uid)
    return known[0] if known else uid
