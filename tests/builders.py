"""Small data sets and PDUs as tests need them."""

import struct
from itertools import count

from pydicom import Dataset
from pydicom.filebase import DicomBytesIO
from pydicom.filewriter import write_dataset
from pydicom.uid import UID, CTImageStorage, ExplicitVRLittleEndian, generate_uid

from tools.cli.dicom_client import Object

_numbers = count(1)
PREFIX = "1.2.826.0.1.3680043.8.498."


def dataset(**values: object) -> Dataset:
    """A small CT image; `values` override by keyword, None removes."""
    made = Dataset()
    made.SOPClassUID, made.SOPInstanceUID = CTImageStorage, generate_uid()
    made.StudyInstanceUID, made.SeriesInstanceUID = generate_uid(), generate_uid()
    made.PatientName, made.PatientID, made.Modality = "Test^Patient", "T1", "CT"
    made.StudyDate, made.SeriesNumber, made.InstanceNumber = "20260102", 1, next(_numbers)
    made.Rows = made.Columns = 8
    made.BitsAllocated = 16
    made.PixelData = bytes(128)
    for keyword, value in values.items():
        if value is None:
            delattr(made, keyword)
        else:
            setattr(made, keyword, value)
    return made


def encoded(source: Dataset, transfer_syntax: str = ExplicitVRLittleEndian) -> bytes:
    buffer = DicomBytesIO()
    syntax = UID(transfer_syntax)
    buffer.is_little_endian, buffer.is_implicit_VR = syntax.is_little_endian, syntax.is_implicit_VR
    write_dataset(buffer, source)
    return buffer.getvalue()


def item(**values: object) -> Object:
    made = dataset(**values)
    uid = str(made.get("SOPInstanceUID", "1.2.3"))
    return Object(str(made.get("SOPClassUID", CTImageStorage)), uid, str(ExplicitVRLittleEndian), encoded(made))


def uid_of(data: bytes, tag: int) -> str:
    """The value of a UID in a data set of explicit VR, little endian."""
    element = struct.pack("<HH2s", tag >> 16, tag & 0xFFFF, b"UI")
    at = data.index(element) + len(element)
    length = int.from_bytes(data[at : at + 2], "little")
    return data[at + 2 : at + 2 + length].rstrip(b"\0").decode()


def pdu(kind: int, body: bytes) -> bytes:
    return struct.pack(">BxL", kind, len(body)) + body


def pdv(context_id: int, control: int, data: bytes) -> bytes:
    return struct.pack(">LBB", len(data) + 2, context_id, control) + data
