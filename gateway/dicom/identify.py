"""Reads who an instance is, and its query keys, from its data set.

`Identifier` looks on while the bytes come in, for a bounded price. What it can't read (odd encodings, deflated ones,
very many elements) is read by `identify`, which takes as long as it takes and belongs in a worker.
"""

import re
import struct
import time
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, BinaryIO, Final

from pydicom.charset import convert_encodings, decode_bytes
from pydicom.datadict import dictionary_VR
from pydicom.filereader import data_element_generator
from pydicom.valuerep import PN_DELIMS, TEXT_VR_DELIMS

from gateway.dicom.scan import GiveUp, Scanner
from gateway.dicom.sop_classes import encoding_of
from gateway.dicom.uids import is_uid
from storage.state import keys
from storage.state.model import Put

READ_BYTES: Final = 256 << 10
INFLATED_BYTES_MAX: Final = 1 << 30  # of one data set, in a worker; nothing of it is kept
ELEMENTS_LOOKED_AT: Final = 4096  # while the bytes come in; some milliseconds
VALUE_CHARS_MAX: Final = 1024
SPECIFIC_CHARACTER_SET: Final = 0x00080005
NEEDED: Final = frozenset((0x00080016, 0x00080018, 0x0020000D, 0x0020000E))
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

    def problem(self, *, lenient: bool) -> str:
        """Which UID is none, "" if all are."""
        uids = {"SOP": self.sop_instance, "Study": self.study, "Series": self.series}
        wrong = next((name for name, uid in uids.items() if not is_uid(uid, lenient=lenient)), "")
        return f"{wrong} Instance UID is missing or isn't a UID" if wrong else ""

    def record(
        self, transfer_syntax: str, digest: bytes, length: int, offset: int, calling_ae: str = "", blocks: bytes = b""
    ) -> Put:
        """What is stored of it, received now; the arguments are those of `Put`."""
        return Put(
            sop_instance=self.sop_instance,
            sop_class=self.sop_class,
            study=self.study,
            series=self.series,
            transfer_syntax=transfer_syntax,
            digest=digest,
            length=length,
            offset=offset,
            keys=self.keys,
            calling_ae=calling_ae,
            received=time.time(),
            blocks=blocks,
        )


class Identifier:
    """`default_set` is the Specific Character Set of a data set that names none."""

    def __init__(self, transfer_syntax: str, default_set: str = "") -> None:
        implicit, self._little, deflated = encoding_of(transfer_syntax)
        self._default_set = default_set
        self._scanner = _scanner(implicit, self._little, ELEMENTS_LOOKED_AT)
        if deflated:
            self._scanner.why = "deflated"

    def feed(self, view: memoryview) -> None:
        self._scanner.feed(view)

    @property
    def study(self) -> str:
        """The Study Instance UID, "" while it isn't known."""
        found = self._scanner.found.get(0x0020000D)
        return found[1].decode("latin-1").strip(" \0") if found else ""

    def identity(self) -> Identity | None:
        """When the last byte was fed. None if it must be read anew by `identify`."""
        try:
            return _identity(self._scanner.end(), self._little, self._default_set)
        except GiveUp:
            return None


def _scanner(implicit: bool, little: bool, elements_max: int) -> Scanner:
    return Scanner(_WANTED, NEEDED, keys.LAST_TAG, implicit=implicit, little=little, elements_max=elements_max)


def identify(source: BinaryIO, transfer_syntax: str, default_set: str = "") -> Identity:
    """Identity of a data set, from its first byte to its last if need be. `source` must be seekable. Blocks, perhaps
    for long. Raises Unreadable."""
    implicit, little, deflated = encoding_of(transfer_syntax)
    scanner = _scanner(implicit, little, 1 << 62)
    start = source.tell()
    try:
        for block in _inflated(source) if deflated else iter(lambda: source.read(READ_BYTES), b""):
            scanner.feed(block)
            if scanner.over:
                break
        return _identity(scanner.end(), little, default_set)
    except GiveUp as error:
        if deflated:
            raise Unreadable(f"the data set can't be read: {error}") from error
    except OSError as error:
        raise Unreadable(f"the data set can't be read: {error.strerror}") from error
    source.seek(start)
    return _parsed(source, implicit, little, default_set)


def _inflated(source: BinaryIO) -> Iterator[bytes]:
    """Raises Unreadable for what isn't deflated, or is so much that nobody needs it."""
    inflater, total = zlib.decompressobj(-zlib.MAX_WBITS), 0
    try:
        while not inflater.eof and (block := inflater.unconsumed_tail or source.read(READ_BYTES)):
            out = inflater.decompress(block, READ_BYTES)
            total += len(out)
            if total > INFLATED_BYTES_MAX:
                raise Unreadable("the deflated data set is too long")
            yield out
    except zlib.error as error:
        raise Unreadable("the deflated data set can't be inflated") from error


def _parsed(source: BinaryIO, implicit: bool, little: bool, default_set: str) -> Identity:
    """With pydicom's parser, which knows about odd encodings."""
    found: dict[int, tuple[bytes, bytes]] = {}
    try:
        elements: Iterator[Any] = data_element_generator(source, implicit, little, defer_size=1 << 16)
        for element in elements:
            if element.tag > keys.LAST_TAG and found.keys() >= NEEDED:
                break
            tag, value = int(element.tag), element.value
            if tag in _WANTED and isinstance(value, bytes | str):
                raw = value if isinstance(value, bytes) else value.encode("utf-8")
                found.setdefault(tag, ((element.VR or "").encode(), raw))
    except Exception as error:  # whatever a malformed data set leads the parser to, RecursionError included
        raise Unreadable(f"the data set can't be read: {type(error).__name__}") from error
    return _identity(found, little, default_set)


def _identity(found: dict[int, tuple[bytes, bytes]], little_endian: bool, default_set: str) -> Identity:
    """Raises Unreadable."""
    character_set = found.get(SPECIFIC_CHARACTER_SET, (b"", b""))[1].strip(b" \0").decode("ascii", "replace")
    encodings = _encodings(character_set or default_set)
    values: dict[str, str] = {"SpecificCharacterSet": character_set} if character_set else {}
    try:
        for tag, (vr, value) in found.items():
            if tag != SPECIFIC_CHARACTER_SET:
                text = _text(vr.decode("latin-1"), value, tag, encodings, little_endian=little_endian)
                if text:
                    values[_TAGS[tag]] = text[:VALUE_CHARS_MAX]
    except Exception as error:  # pydicom raises whatever a broken text leads it to
        raise Unreadable(f"a key can't be read: {type(error).__name__}") from error
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
