"""What stands before a data set in a file: preamble and File Meta Information (PS3.10 7.1)."""

import struct
from dataclasses import dataclass
from typing import Final

from gateway.dicom.uids import IMPLEMENTATION_CLASS_UID, IMPLEMENTATION_VERSION
from storage.state import description

MEDIA_DIRECTORY: Final = "1.2.840.10008.1.3.10"  # SOP class of a DICOMDIR
HEADER_BYTES_MAX: Final = 1 << 20  # of a file; group 0002 ends within it
PREAMBLE: Final = 128
_LONG_VRS: Final = (b"OB", b"OW", b"SQ", b"UN", b"UT")


@dataclass(frozen=True)
class Header:
    """`start`: where the data set begins, bytes."""

    start: int
    sop_class: str
    transfer_syntax: str


def read_header(raw: bytes) -> Header | None:
    """What a file's first bytes say, None if they aren't those of a DICOM file."""
    if raw[PREAMBLE : PREAMBLE + 4] != b"DICM":
        return None
    start, values = _group_2(raw)
    sop_class, syntax = values.get(0x0002, b""), values.get(0x0010, b"")
    return Header(start, *(value.decode("latin-1").strip(" \0") for value in (sop_class, syntax)))


def start_of_data_set(raw: bytes) -> int:
    """After preamble and group 0002, whatever its group length says."""
    return _group_2(raw)[0]


def _group_2(raw: bytes) -> tuple[int, dict[int, bytes]]:
    """Where it ends, and its values by element."""
    at = PREAMBLE + 4 if raw[PREAMBLE : PREAMBLE + 4] == b"DICM" else 0
    values: dict[int, bytes] = {}
    while raw[at : at + 2] == b"\2\0":
        element = int.from_bytes(raw[at + 2 : at + 4], "little")
        long_form = raw[at + 4 : at + 6] in _LONG_VRS
        length = int.from_bytes(raw[at + 8 : at + 12] if long_form else raw[at + 6 : at + 8], "little")
        at += 12 if long_form else 8
        values[element] = raw[at : at + length]
        at += length
    return at, values


def file_header(sop_class: str, sop_instance: str, transfer_syntax: str, source_ae: str) -> bytes:
    """128 bytes of preamble, DICM, group 0002 in explicit VR little endian, with room for what storage says of it."""
    body = b"".join(
        (
            struct.pack("<HH2sxxL", 2, 1, b"OB", 2) + b"\0\1",
            _element(0x0002, b"UI", sop_class, b"\0"),
            _element(0x0003, b"UI", sop_instance, b"\0"),
            _element(0x0010, b"UI", transfer_syntax, b"\0"),
            _element(0x0012, b"UI", str(IMPLEMENTATION_CLASS_UID), b"\0"),
            _element(0x0013, b"SH", IMPLEMENTATION_VERSION, b" "),
            _element(0x0016, b"AE", source_ae, b" "),
            _element(0x0100, b"UI", description.CREATOR, b"\0"),
            struct.pack("<HH2sxxL", 2, 0x0102, b"OB", description.SIZE) + description.BLANK,
        )
    )
    length = struct.pack("<HH2sHL", 2, 0, b"UL", 4, len(body))
    return bytes(128) + b"DICM" + length + body


def _element(element: int, vr: bytes, text: str, padding: bytes) -> bytes:
    value = text.encode("ascii", "replace")
    if len(value) % 2:
        value += padding
    return struct.pack("<HH2sH", 2, element, vr, len(value)) + value
