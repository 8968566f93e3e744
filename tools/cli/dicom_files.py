"""DICOM files as they are found on disks and CDs: which instance, and the bytes of its data set, unchanged."""

import os
from pathlib import Path

from pydicom import dcmread
from pydicom.uid import UID

from gateway.dicom.part10 import HEADER_BYTES_MAX, MEDIA_DIRECTORY, start_of_data_set
from gateway.dicom.whole import Whole
from tools.cli.dicom_client import FileObject, Object


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
        raw = file.read(HEADER_BYTES_MAX)
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
    whole = Whole(item.transfer_syntax)
    with path.open("rb") as file:
        file.seek(item.start)
        while block := file.read(HEADER_BYTES_MAX):
            whole.feed(block)
    return whole.cut_short
