"""Reads who an instance is, and its query keys, from the head of its data set."""

import re
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from io import BytesIO
from typing import Any, BinaryIO, Final

from pydicom.charset import convert_encodings, decode_bytes
from pydicom.datadict import dictionary_VR
from pydicom.filereader import data_element_generator
from pydicom.uid import UID
from pydicom.valuerep import PN_DELIMS, TEXT_VR_DELIMS

from gateway.dicom.scan import GiveUp, Scanner
from storage.state import keys

INFLATED_BYTES_MAX: Final = 4 << 20
VALUE_CHARS_MAX: Final = 1024
SPECIFIC_CHARACTER_SET: Final = 0x00080005
_ESCAPES: Final = re.compile(r"\x1b\$?[()\-][0-9A-Z]")
_TAGS: Final = {tag: keyword for keyword, tag in keys.ALL.items()}
_WANTED: Final = frozenset((*_TAGS, SPECIFIC_CHARACTER_SET))
_NUMBERS: Final = {"US": "H", "SS": "h", "UL": "L", "SL": "l"}
_TEXT: Final = frozenset(("PN", "LO", "SH", "LT", "ST", "UC", "UT"))


class Unreadable(Exception):
    """The data set can't be parsed, or lacks what identifies it."""


@dataclass(frozen=True)
class Identity:
    sop_class: str
    sop_instance: str
    study: str
    series: str
    keys: dict[str, str]  # DICOM keyword -> text, several values joined by a backslash


def identify(
    source: bytes | bytearray | memoryview | BinaryIO, transfer_syntax: str, *, whole: bool, default_set: str = ""
) -> Identity | None:
    """Identity of a data set. With `whole` false the source is only its beginning, and None means that more is needed.

    `default_set` is the Specific Character Set of a data set that names none. Raises Unreadable.
    """
    implicit, little, deflated = _encoding(transfer_syntax)
    if not deflated and isinstance(source, bytes | bytearray | memoryview):
        try:
            scanner = Scanner(source, implicit=implicit, little=little)
            return _identity(scanner.find(_WANTED, keys.LAST_TAG), little, default_set)
        except GiveUp:
            pass
    return _parse(source, UID(transfer_syntax), default_set, whole=whole)


@lru_cache(maxsize=256)
def _encoding(transfer_syntax: str) -> tuple[bool, bool, bool]:
    """(implicit VR, little endian, deflated)."""
    syntax = UID(transfer_syntax)
    return syntax.is_implicit_VR, syntax.is_little_endian, syntax.is_deflated


def _parse(
    source: bytes | bytearray | memoryview | BinaryIO, syntax: UID, default_set: str, *, whole: bool
) -> Identity | None:
    """The thorough way, with pydicom's parser."""
    stream = BytesIO(source) if isinstance(source, bytes | bytearray | memoryview) else source
    if syntax.is_deflated:
        stream = BytesIO(_inflate(stream.read(INFLATED_BYTES_MAX)))
    found: dict[int, tuple[bytes, bytes]] = {}
    complete = whole
    try:
        for element in _elements(stream, syntax):
            if element.tag > keys.LAST_TAG:
                complete = True
                break
            tag, value = int(element.tag), element.value
            if tag in _WANTED and isinstance(value, bytes | str):
                raw = value if isinstance(value, bytes) else value.encode("utf-8")
                found[tag] = ((element.VR or "").encode(), raw)
    except (EOFError, struct.error, ValueError, KeyError, NotImplementedError, OSError, TypeError) as error:
        if whole:
            raise Unreadable(f"the data set can't be read: {type(error).__name__}") from error
        return None
    if not complete:
        return None
    return _identity(found, syntax.is_little_endian, default_set)


def _elements(stream: BinaryIO, syntax: UID) -> Iterator[Any]:
    yield from data_element_generator(
        stream,
        syntax.is_implicit_VR,
        syntax.is_little_endian,
        stop_when=None,
        defer_size=1 << 16,
        specific_tags=None,
    )


def _inflate(data: bytes) -> bytes:
    try:
        return zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, INFLATED_BYTES_MAX)
    except zlib.error as error:
        raise Unreadable("the deflated data set can't be inflated") from error


def _identity(found: dict[int, tuple[bytes, bytes]], little_endian: bool, default_set: str) -> Identity:
    character_set = found.pop(SPECIFIC_CHARACTER_SET, (b"", b""))[1].strip(b" \0").decode("ascii", "replace")
    encodings = _encodings(character_set or default_set)
    values: dict[str, str] = {"SpecificCharacterSet": character_set} if character_set else {}
    for tag, (vr, value) in found.items():
        text = _text(vr.decode(), value, tag, encodings, little_endian=little_endian)
        if text:
            values[_TAGS[tag]] = text[:VALUE_CHARS_MAX]
    return Identity(
        values.pop("SOPClassUID", ""),
        values.pop("SOPInstanceUID", ""),
        values.get("StudyInstanceUID", ""),
        values.get("SeriesInstanceUID", ""),
        values,
    )


def without_escapes(text: str) -> str:
    """pydicom leaves the escape sequences of some sets (ISO 2022 IR 58) in the text that it has decoded by them."""
    return _ESCAPES.sub("", text) if "\x1b" in text else text


@lru_cache(maxsize=64)
def _encodings(character_set: str) -> tuple[str, ...]:
    """Python's names of the encodings; Latin-1, in which every byte is a character, for what isn't known."""
    if not character_set:
        return ("iso8859",)
    try:
        return tuple(convert_encodings([part.strip() for part in character_set.split("\\")]))
    except (LookupError, ValueError):
        return ("iso8859",)


def _text(vr: str, value: bytes, tag: int, encodings: tuple[str, ...], *, little_endian: bool) -> str:
    if not value:
        return ""
    if vr in ("", "UN"):
        vr = dictionary_VR(tag)
    if vr in _NUMBERS:
        code = ("<" if little_endian else ">") + _NUMBERS[vr]
        size = struct.calcsize(code)
        return str(struct.unpack_from(code, value)[0]) if len(value) >= size else ""
    if vr in _TEXT and not (value.isascii() and b"\x1b" not in value):
        try:
            return _decoded(vr, value, encodings).strip(" \0")
        except (LookupError, UnicodeError):
            pass
    return value.decode("latin-1").strip(" \0")


def _decoded(vr: str, value: bytes, encodings: tuple[str, ...]) -> str:
    """Code extensions end at delimiters (PS3.5 6.1.2.5.3); in names those of components and groups count as well."""
    if vr != "PN":
        return without_escapes(str(decode_bytes(value, encodings, TEXT_VR_DELIMS)))
    return without_escapes("=".join(str(decode_bytes(group, encodings, PN_DELIMS)) for group in value.split(b"=")))
