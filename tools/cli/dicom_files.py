"""DICOM files as they are found on disks and CDs: which instance, and the bytes of its data set, unchanged."""

import os
import zlib
from pathlib import Path
from typing import Final

from pydicom import dcmread
from pydicom.uid import UID

from gateway.dicom.scan import Scanner
from tools.cli.dicom_client import FileObject, Object

HEAD_BYTES: Final = 1 << 20  # group 0002 ends within it
MEDIA_DIRECTORY: Final = "1.2.840.10008.1.3.10"
DEFLATED: Final = "1.2.840.10008.1.2.1.99"
NEVER_FOUND: Final = frozenset({0xFFFF_FFFF})  # so all of it is looked through
PADDING_BYTES: Final = 8
_LONG_VRS: Final = (b"OB", b"OW", b"SQ", b"UN", b"UT")


class NotAnInstance(Exception):
    """Nothing that could be stored; the text says why."""


class MediaDirectory(NotAnInstance):
    """It only says what else is there."""


def read_object(path: Path) -> Object:
    """An instance with the bytes of its data set, see `open_object`. Raises NotAnInstance or OSError."""
    found = open_object(path)
    return Object(found.sop_class, found.sop_instance, found.transfer_syntax, path.read_bytes()[found.start :])


def open_object(path: Path) -> FileObject:
    """An instance, to be sent from its file. SOP class and UID are those of the data set; a transfer syntax that the
    file doesn't name is found from the data. Raises NotAnInstance or OSError."""
    with path.open("rb") as file:
        raw = file.read(HEAD_BYTES)
        size = os.fstat(file.fileno()).st_size
    try:
        return _opened(path, raw, size)
    except (NotAnInstance, OSError):
        raise
    except Exception as error:  # pydicom raises whatever a file that isn't DICOM leads it to
        raise NotAnInstance("not a DICOM file") from error


def _opened(path: Path, raw: bytes, size: int) -> FileObject:
    head = dcmread(path, force=True, stop_before_pixels=True, specific_tags=["SOPClassUID", "SOPInstanceUID"])
    sop_class, sop_instance = str(head.get("SOPClassUID", "")), str(head.get("SOPInstanceUID", ""))
    implicit, little = head.original_encoding
    if str(head.file_meta.get("MediaStorageSOPClassUID", "")) == MEDIA_DIRECTORY:
        raise MediaDirectory("a DICOMDIR")
    if not sop_class or not sop_instance:
        raise NotAnInstance("not a DICOM file" if raw[128:132] != b"DICM" else "no SOP Class or SOP Instance UID")
    guessed = "1.2.840.10008.1.2" if implicit else "1.2.840.10008.1.2.1" if little else "1.2.840.10008.1.2.2"
    syntax = str(head.file_meta.get("TransferSyntaxUID", "") or guessed)
    if not (UID(sop_class).is_valid and UID(syntax).is_valid):
        raise NotAnInstance("SOP Class UID or Transfer Syntax UID isn't a UID")
    start = start_of_data_set(raw)
    if start >= size:
        raise NotAnInstance("no data set, or it begins beyond the first megabyte")
    return FileObject(sop_class, sop_instance, syntax, path, start, size - start)


def is_cut_short(path: Path) -> bool:
    """The data set ends in the middle of an element: whoever copied the file was cut off. False for what can't be told.
    Raises NotAnInstance or OSError."""
    item = open_object(path)
    implicit, big = item.transfer_syntax == "1.2.840.10008.1.2", item.transfer_syntax == "1.2.840.10008.1.2.2"
    scanner = Scanner((), NEVER_FOUND, 0, implicit=implicit, little=not big)
    deflated = zlib.decompressobj(-zlib.MAX_WBITS) if item.transfer_syntax == DEFLATED else None
    last = b""
    with path.open("rb") as file:
        file.seek(item.start)
        try:
            while step := file.read(HEAD_BYTES):
                while step:
                    last = deflated.decompress(step, HEAD_BYTES) if deflated else step
                    scanner.feed(last)
                    step = deflated.unconsumed_tail if deflated else b""
        except zlib.error:
            return True
    if deflated is not None and not deflated.eof:
        return True
    padded = not any(last[-PADDING_BYTES:])  # behind the data set, perhaps
    return not scanner.why and (scanner.in_value or not (scanner.at_rest or padded))


def start_of_data_set(raw: bytes) -> int:
    """After preamble and group 0002, whatever its group length says."""
    at = 132 if raw[128:132] == b"DICM" else 0
    while raw[at : at + 2] == b"\2\0":
        long_form = raw[at + 4 : at + 6] in _LONG_VRS
        length = raw[at + 8 : at + 12] if long_form else raw[at + 6 : at + 8]
        at += (12 if long_form else 8) + int.from_bytes(length, "little")
    return at
