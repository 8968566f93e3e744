"""Data sets in another transfer syntax, for those who take nothing else. What is stored is never changed.

Blocks, and decodes what strangers have sent: call it in a worker.
"""

import zlib
from io import BytesIO
from typing import Final

from pydicom import Dataset, dcmread
from pydicom.filebase import DicomBytesIO
from pydicom.filewriter import write_dataset

from gateway.dicom.part10 import file_header
from gateway.dicom.reencode import CannotConvert, reencode
from gateway.dicom.sop_classes import DEFLATED, EXPLICIT_LITTLE, UNCOMPRESSED, encoding_of, is_encapsulated

__all__ = ["TARGETS", "CannotConvert", "convert"]

TARGETS: Final = UNCOMPRESSED
CONVERTED_BYTES_MAX: Final = 1 << 29
_INFLATE_STEP: Final = 1 << 20


def convert(data: bytes, sop_class: str, sop_instance: str, stored: str, wanted: str) -> bytes:
    """A data set in `wanted`, one of TARGETS. Raises CannotConvert."""
    try:
        encoding = encoding_of(stored)
        if stored == DEFLATED:
            data, encoding = _inflated(data), (False, True, False)
        elif is_encapsulated(stored):
            data, encoding = _decompressed(data, sop_class, sop_instance, stored), encoding_of(EXPLICIT_LITTLE)
        return reencode(data, encoding, encoding_of(wanted))
    except CannotConvert:
        raise
    except Exception as error:  # decoders and parsers raise whatever damaged or unusual data leads them to
        raise CannotConvert(type(error).__name__) from error


def _inflated(data: bytes) -> bytes:
    inflater, out, total = zlib.decompressobj(-zlib.MAX_WBITS), list[bytes](), 0
    while not inflater.eof and data:
        part = inflater.decompress(data, _INFLATE_STEP)
        data = inflater.unconsumed_tail
        total += len(part)
        if total > CONVERTED_BYTES_MAX:
            raise CannotConvert("too long when inflated")
        out.append(part)
    return b"".join(out)


def _decompressed(data: bytes, sop_class: str, sop_instance: str, stored: str) -> bytes:
    """In explicit VR little endian. Elements that aren't the pixels' are written as they were read."""
    found: Dataset = dcmread(BytesIO(file_header(sop_class, sop_instance, stored, "") + data))
    _check_size(found)
    found.decompress(generate_instance_uid=False)
    buffer = DicomBytesIO()
    buffer.is_little_endian, buffer.is_implicit_VR = True, False
    write_dataset(buffer, found)
    encoded: bytes = buffer.getvalue()
    return encoded


def _check_size(found: Dataset) -> None:
    """What the decoders would allocate, by what is declared."""
    declared = [int(found.get(name) or 1) for name in ("Rows", "Columns", "NumberOfFrames", "SamplesPerPixel")]
    size = (int(found.get("BitsAllocated") or 8) + 7) // 8
    for number in declared:
        if number < 0:
            raise CannotConvert("a negative size is declared")
        size *= number
    if size > CONVERTED_BYTES_MAX:
        raise CannotConvert(f"{size} bytes of pixels are too many to be converted")
