"""Data elements written without pydicom: values that are plainly what their VR says. No input or output."""

import re
import struct
from typing import Final

_SHORT: Final = struct.Struct("<HHL")
_LONG_VRS: Final = frozenset(("UC", "UR", "UT"))  # of those below
_BYTES_MAX: Final = 0xFFFE  # of all others
_NUMBERS: Final = {"US": struct.Struct("<H")}
# What pydicom would write in the same way.
_PLAIN: Final = {
    "AE": re.compile(r"[ -\[\]-~]{0,16}"),
    "AS": re.compile(r"([0-9]{3}[DWMY])?"),
    "CS": re.compile(r"([A-Z0-9_]([A-Z0-9 _]{0,14}[A-Z0-9_])?(\\[A-Z0-9_]([A-Z0-9 _]{0,14}[A-Z0-9_])?)*)?"),
    "DA": re.compile(r"([0-9]{8})?"),
    "DS": re.compile(r"(-?[0-9]{1,8}(\.[0-9]{1,6})?)?"),
    "IS": re.compile(r"(0|-?[1-9][0-9]{0,8})?"),
    "TM": re.compile(r"(([01][0-9]|2[0-3])[0-5][0-9]([0-5][0-9](\.[0-9]{1,6})?)?)?"),
    "UI": re.compile(r"([0-9.]{1,64}(\\[0-9.]{1,64})*)?"),
    "US": re.compile(r"([0-9]{1,4})?"),
}
_TEXT: Final = re.compile(r"([^\x00-\x1f\x7f-\x9f\\ ]([^\x00-\x1f\x7f-\x9f\\]*[^\x00-\x1f\x7f-\x9f\\ ])?)?")
_CHARS_MAX: Final = {"SH": 16, "LO": 64, "PN": 64, "ST": 1024, "LT": 10240, "UT": 10240}


def encoded_text(vr: str, text: str) -> bytes | None:
    """The value of an element, even in length, texts in UTF-8; None for one that isn't plainly one of its VR, or is too
    long for it."""
    plain = _PLAIN.get(vr)
    if plain is not None:
        if not plain.fullmatch(text):
            return None
    elif vr not in _CHARS_MAX or len(text) > _CHARS_MAX[vr] or not _TEXT.fullmatch(text) or text.endswith("="):
        return None
    if text and (number := _NUMBERS.get(vr)):
        return number.pack(int(text))
    try:
        value = text.encode()
    except UnicodeEncodeError:
        return None
    value += b"" if len(value) % 2 == 0 else b"\0" if vr == "UI" else b" "
    return value if len(value) <= _BYTES_MAX or vr in _LONG_VRS else None


def encoded_element(tag: int, vr: str, value: bytes, *, implicit: bool) -> bytes:
    """In little endian; the value's length is even."""
    if implicit:
        return _SHORT.pack(tag >> 16, tag & 0xFFFF, len(value)) + value
    head = struct.pack("<HH", tag >> 16, tag & 0xFFFF) + vr.encode()
    if vr in _LONG_VRS:
        return head + b"\0\0" + len(value).to_bytes(4, "little") + value
    return head + len(value).to_bytes(2, "little") + value
