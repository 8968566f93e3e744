"""What we write before a received data set: preamble and File Meta Information (PS3.10 7.1)."""

import struct

from gateway.dicom.uids import IMPLEMENTATION_CLASS_UID, IMPLEMENTATION_VERSION
from storage.state import description


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
