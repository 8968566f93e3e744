"""Data sets in another transfer syntax, for those who take nothing else. What is stored is never changed."""

from array import array
from io import BytesIO
from typing import Final

from pydicom import Dataset, dcmread
from pydicom.filebase import DicomBytesIO
from pydicom.filewriter import write_dataset
from pydicom.uid import UID

from gateway.dicom.part10 import file_header
from gateway.dicom.sop_classes import DEFLATED, UNCOMPRESSED

WORD_CODES: Final = {"OW": "H", "OF": "I", "OL": "I", "OD": "Q", "OV": "Q"}  # VRs of words, as array type codes
TEXT_VRS: Final = frozenset(("PN", "LO", "SH", "LT", "ST", "UC", "UT"))
TARGETS: Final = UNCOMPRESSED


class CannotConvert(Exception):
    """This data set can't be had in that transfer syntax here."""


def convert(data: bytes, sop_class: str, sop_instance: str, stored: str, wanted: str) -> bytes:
    """A data set in `wanted`, one of TARGETS. Raises CannotConvert."""
    try:
        whole = file_header(sop_class, sop_instance, stored, "") + data
        found: Dataset = dcmread(BytesIO(whole))
        if UID(stored).is_compressed and stored != DEFLATED:
            found.decompress(generate_instance_uid=False)
            was_little = True
        else:
            was_little = UID(stored).is_little_endian
        _check_texts(found)
        syntax = UID(wanted)
        if was_little != syntax.is_little_endian:
            _swap(found)
        return _encode(found, syntax)
    except Exception as error:  # decoders and parsers raise whatever damaged or unusual data leads them to
        raise CannotConvert(f"{type(error).__name__}: {error}"[:200]) from error


def _check_texts(found: Dataset) -> None:
    """Converting reads all texts and writes them anew: those that aren't in their character set would come out as
    others. Raises ValueError."""
    sets = found.get("SpecificCharacterSet") or ""
    if "ISO 2022 IR 58" in (sets if isinstance(sets, str) else list(sets)):
        raise ValueError("ISO 2022 IR 58 isn't written as it was read")
    for element in found.iterall():
        if element.VR in TEXT_VRS and "\ufffd" in str(element.value):
            raise ValueError("a text isn't in its character set")


def _encode(found: Dataset, syntax: UID) -> bytes:
    buffer = DicomBytesIO()
    buffer.is_little_endian, buffer.is_implicit_VR = syntax.is_little_endian, syntax.is_implicit_VR
    write_dataset(buffer, found)
    encoded: bytes = buffer.getvalue()
    return encoded


def _swap(found: Dataset) -> None:
    """Turn the bytes round in the words that pydicom leaves as they are."""
    for element in found.iterall():
        code = WORD_CODES.get(element.VR)
        if code and isinstance(element.value, bytes) and element.value:
            words = array(code)
            if len(element.value) % words.itemsize == 0:
                words.frombytes(element.value)
                words.byteswap()
                element.value = words.tobytes()
