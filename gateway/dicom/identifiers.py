"""Identifiers of queries and retrieves: read, written, and checked against their information model (PS3.4 C.4, C.6)."""

from collections.abc import Iterator
from io import BytesIO
from typing import Final

from pydicom.datadict import dictionary_has_tag, dictionary_VR, keyword_for_tag
from pydicom.dataelem import DataElement, RawDataElement
from pydicom.dataset import Dataset
from pydicom.multival import MultiValue
from pydicom.uid import UID
from pydicom.valuerep import STR_VR
from pynetdicom.dsutils import decode as decode_dataset
from pynetdicom.dsutils import encode as encode_dataset

from gateway.dicom.sop_classes import Model

VALUES_MAX: Final = 4096  # of one key: a list of UIDs
VALUE_CHARS_MAX: Final = 1024
STARS_MAX: Final = 16  # in one value
ELEMENTS_MAX: Final = 200_000  # a commitment has three an instance
UNIQUE: Final = {
    "PATIENT": "PatientID",
    "STUDY": "StudyInstanceUID",
    "SERIES": "SeriesInstanceUID",
    "IMAGE": "SOPInstanceUID",
}
WILD: Final = frozenset("*?")


class BadQuery(Exception):
    """The identifier doesn't fit the SOP class (0xA900)."""


def level_of(identifier: Dataset, model: Model) -> str:
    """Raises BadQuery."""
    level = str(identifier.get("QueryRetrieveLevel", "") or "").strip().upper()
    if level not in model.levels:
        raise BadQuery(f"QueryRetrieveLevel {level[:16]!r} isn't one of {model.name}")
    return level


def values_of(identifier: Dataset, keyword: str) -> list[str]:
    """The values of a key, [] for universal matching."""
    value = identifier.get(keyword)
    parts = value if isinstance(value, list | tuple | MultiValue) else [value]
    return [text for part in parts if part is not None and (text := str(part).strip(" \0"))]


def is_single(values: list[str]) -> bool:
    """One value without wild cards."""
    return len(values) == 1 and not WILD & set(values[0])


def decode_identifier(data: bytes, transfer_syntax: str) -> Dataset:
    """Raises BadQuery."""
    syntax = UID(transfer_syntax)
    try:
        identifier: Dataset = decode_dataset(BytesIO(data), syntax.is_implicit_VR, syntax.is_little_endian)
        for count, element in enumerate(_elements(identifier)):
            _check(element, count)
        return identifier
    except BadQuery:
        raise
    except Exception as error:  # pydicom raises whatever a malformed identifier leads it to
        raise BadQuery(f"the identifier can't be read: {type(error).__name__}") from error


def _elements(identifier: Dataset) -> Iterator[DataElement]:
    """All of them, at any depth. Raises BadQuery for one that is refused for the number of its values alone: making a
    hundred thousand names of it would hold up everybody."""
    waiting = [identifier]
    while waiting:
        dataset = waiting.pop()
        for tag in list(dataset.keys()):
            raw = dataset.get_item(tag)
            if isinstance(raw, RawDataElement) and isinstance(raw.value, bytes):
                _check_raw(raw, raw.value)
            element = dataset[tag]
            yield element
            if element.VR == "SQ":
                waiting += element.value


def _check_raw(raw: RawDataElement, value: bytes) -> None:
    vr = raw.VR or (dictionary_VR(raw.tag) if dictionary_has_tag(raw.tag) else "UN")
    # A character of several bytes may contain the one that divides values: hence twice as many.
    if vr in STR_VR and value.count(b"\\") > 2 * VALUES_MAX:
        raise BadQuery(f"{keyword_for_tag(raw.tag) or raw.tag}: more than {VALUES_MAX} values")


def _check(element: DataElement, count: int) -> None:
    """Nothing that anybody means to ask is longer than this. Raises BadQuery."""
    if count > ELEMENTS_MAX:
        raise BadQuery("too many keys")
    value = element.value  # decoded on demand; what can't be read is to be found now
    values = value if isinstance(value, MultiValue | list | tuple) else [value]
    if len(values) > VALUES_MAX and element.VR != "SQ":
        raise BadQuery(f"{element.keyword or element.tag}: more than {VALUES_MAX} values")
    for one in values:
        if isinstance(one, str | bytes) and len(one) > VALUE_CHARS_MAX:
            raise BadQuery(f"{element.keyword or element.tag}: longer than {VALUE_CHARS_MAX}")
        if isinstance(one, str) and one.count("*") > STARS_MAX:
            raise BadQuery(f"{element.keyword or element.tag}: more than {STARS_MAX} wild cards")
    if element.VR == "PN" and len(str(value)) > VALUE_CHARS_MAX:
        raise BadQuery(f"{element.keyword}: longer than {VALUE_CHARS_MAX}")
    if element.VR == "UI" and any(WILD & set(str(one)) for one in values if one and str(one).strip("*")):
        raise BadQuery(f"{element.keyword}: UIDs take no wild cards")


def encode_identifier(answer: Dataset, transfer_syntax: str) -> bytes:
    """Elements that can't be written (a stored value that isn't one of its VR) are left out."""
    syntax = UID(transfer_syntax)
    encoded: bytes | None = encode_dataset(answer, syntax.is_implicit_VR, syntax.is_little_endian)
    if encoded is None:
        writable = Dataset()
        for element in answer:
            one = Dataset()
            one.add(element)
            if encode_dataset(one, syntax.is_implicit_VR, syntax.is_little_endian) is not None:
                writable.add(element)
        encoded = encode_dataset(writable, syntax.is_implicit_VR, syntax.is_little_endian)
    if encoded is None:
        raise ValueError("an answer can't be encoded")
    return encoded
