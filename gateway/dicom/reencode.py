"""A data set in another uncompressed transfer syntax, element by element (PS3.5 7).

Values are never decoded: their bytes are copied, and turned round where the byte order differs. What can't be said in
the new encoding as what it is, is said as UN with the same bytes (PS3.5 6.2.2), or not at all: `CannotConvert`.
"""

import struct
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from pydicom.datadict import dictionary_VR

from gateway.dicom.scan import ITEM, ITEM_END, LONG_VRS, SEQUENCE_END, SHORT_VRS, UNDEFINED
from gateway.dicom.sop_classes import Encoding

DEPTH_MAX: Final = 64
PIXEL_DATA: Final = 0x7FE00010
BITS_ALLOCATED: Final = 0x00280100
PIXEL_REPRESENTATION: Final = 0x00280103
_WORDS: Final = {  # bytes of what is turned round
    **dict.fromkeys((b"US", b"SS", b"OW", b"AT"), 2),
    **dict.fromkeys((b"UL", b"SL", b"FL", b"OF", b"OL"), 4),
    **dict.fromkeys((b"FD", b"OD", b"OV", b"SV", b"UV"), 8),
}
_CODES: Final = {2: "H", 4: "I", 8: "Q"}


class CannotConvert(Exception):
    """This data set can't be had in that transfer syntax here."""


@dataclass(frozen=True)
class Element:
    tag: int
    vr: bytes  # b"" in implicit VR
    value: memoryview
    items: tuple[memoryview, ...] | None  # of a sequence of undefined length


class _Layout:
    """How tags and lengths lie in an encoding."""

    def __init__(self, encoding: Encoding) -> None:
        self.implicit, self.little, _ = encoding
        order = "<" if self.little else ">"
        self.tag = struct.Struct(f"{order}HH")
        self.long = struct.Struct(f"{order}L")
        self.short = struct.Struct(f"{order}H")


class _Reader(_Layout):
    def elements(self, data: memoryview, depth: int = 0) -> Iterator[Element]:
        """Raises CannotConvert."""
        at, size = 0, len(data)
        while at < size:
            tag, vr, length, at = self._header(data, at)
            if tag >> 16 == 0xFFFE:
                raise CannotConvert("a delimiter where an element should be")
            if length == UNDEFINED:
                if vr == b"UN" or (tag == PIXEL_DATA and vr in (b"OB", b"OW")):
                    raise CannotConvert("encapsulated, or UN of undefined length")
                items, at = self._items(data, at, depth)
                yield Element(tag, vr or b"SQ", data[at:at], items)
                continue
            if length > size - at:
                raise CannotConvert("an element ends behind the data set")
            yield Element(tag, vr, data[at : at + length], None)
            at += length

    def _header(self, data: memoryview, at: int) -> tuple[int, bytes, int, int]:
        """(tag, VR, length, where the value begins)."""
        if len(data) - at < 8:
            raise CannotConvert("the data set ends in the middle of an element")
        group, element = self.tag.unpack_from(data, at)
        tag = group << 16 | element
        if self.implicit or group == 0xFFFE:
            return tag, b"", self.long.unpack_from(data, at + 4)[0], at + 8
        vr = bytes(data[at + 4 : at + 6])
        if vr in SHORT_VRS:
            return tag, vr, self.short.unpack_from(data, at + 6)[0], at + 8
        if vr not in LONG_VRS or len(data) - at < 12:
            raise CannotConvert("an element without a VR")
        return tag, vr, self.long.unpack_from(data, at + 8)[0], at + 12

    def _items(self, data: memoryview, at: int, depth: int) -> tuple[tuple[memoryview, ...], int]:
        """(contents of the items, where the sequence ends)."""
        if depth >= DEPTH_MAX:
            raise CannotConvert("sequences nested too deep")
        items = list[memoryview]()
        while True:
            tag, _, length, at = self._header(data, at)
            if tag == SEQUENCE_END:
                return tuple(items), at
            if tag != ITEM:
                raise CannotConvert("a sequence holds something else than items")
            end = self._item_end(data, at, depth) if length == UNDEFINED else at + length
            if end > len(data):
                raise CannotConvert("an item ends behind the data set")
            items.append(data[at:end])
            at = end + 8 if length == UNDEFINED else end

    def _item_end(self, data: memoryview, at: int, depth: int) -> int:
        """Where the content of an item of undefined length ends."""
        while True:
            start = at
            tag, vr, length, at = self._header(data, at)
            if tag == ITEM_END:
                return start
            if length == UNDEFINED:
                if vr == b"UN":
                    raise CannotConvert("UN of undefined length")
                _, at = self._items(data, at, depth + 1)
            else:
                at += length

    def items_of(self, value: memoryview, depth: int) -> tuple[memoryview, ...]:
        """The items of a sequence of defined length; raises CannotConvert unless they fill it exactly."""
        items, at = list[memoryview](), 0
        while at < len(value):
            tag, _, length, at = self._header(value, at)
            if tag != ITEM:
                raise CannotConvert("a sequence holds something else than items")
            end = self._item_end(value, at, depth) if length == UNDEFINED else at + length
            if end > len(value):
                raise CannotConvert("an item ends behind its sequence")
            items.append(value[at:end])
            at = end + 8 if length == UNDEFINED else end
        return tuple(items)


class _Writer(_Layout):
    def element(self, tag: int, vr: bytes, value: bytes | memoryview) -> list[bytes | memoryview]:
        head = self.tag.pack(tag >> 16, tag & 0xFFFF)
        if self.implicit:
            return [head, self.long.pack(len(value)), value]
        if vr in SHORT_VRS and len(value) > 0xFFFE:
            vr = b"UN"  # PS3.5 6.2.2: too long for its VR
        if vr in SHORT_VRS:
            return [head, vr, self.short.pack(len(value)), value]
        return [head, vr, b"\0\0", self.long.pack(len(value)), value]

    def item(self, content: bytes) -> bytes:
        return self.tag.pack(0xFFFE, 0xE000) + self.long.pack(len(content)) + content


def reencode(data: bytes | memoryview, source: Encoding, target: Encoding) -> bytes:
    """The same data set in another encoding; neither may be deflated. Lengths of groups are left out (they are retired,
    PS3.5 7.2). Raises CannotConvert."""
    if source[2] or target[2]:
        raise CannotConvert("deflated")
    return b"".join(_data_set(memoryview(data), _Reader(source), _Writer(target), {}, 0))


def _data_set(
    data: memoryview, reader: _Reader, writer: _Writer, above: dict[int, int], depth: int
) -> list[bytes | memoryview]:
    """`above`: numbers of the data set around this item, on which ambiguous VRs depend."""
    if depth > DEPTH_MAX:
        raise CannotConvert("sequences nested too deep")
    out: list[bytes | memoryview] = []
    numbers = dict(above)
    for element in reader.elements(data, depth):
        if element.tag & 0xFFFF == 0:
            continue
        if element.tag in (BITS_ALLOCATED, PIXEL_REPRESENTATION) and len(element.value) == 2:
            numbers[element.tag] = reader.short.unpack(element.value)[0]
        out += _element(element, reader, writer, numbers, depth)
    return out


def _element(
    element: Element, reader: _Reader, writer: _Writer, numbers: dict[int, int], depth: int
) -> list[bytes | memoryview]:
    vr = element.vr or _vr_of(element.tag, numbers)
    items = element.items
    if items is None and vr == b"SQ":
        try:
            items = reader.items_of(element.value, depth)
            for one in items:
                for _ in reader.elements(one, depth + 1):
                    pass
        except CannotConvert:
            if reader.implicit and not writer.implicit and writer.little:
                # The dictionary says sequence, the bytes don't.
                return writer.element(element.tag, b"UN", element.value)
            raise
    if items is not None:
        encoded = [writer.item(b"".join(_data_set(one, reader, writer, numbers, depth + 1))) for one in items]
        return writer.element(element.tag, b"SQ", b"".join(encoded))
    size = _WORDS.get(vr)
    if size is None:
        return writer.element(element.tag, vr, element.value)
    if reader.little is writer.little:
        return writer.element(element.tag, vr, element.value)
    if len(element.value) % size:
        raise CannotConvert("a value isn't of whole words")
    words = array(_CODES[size])
    words.frombytes(element.value)
    words.byteswap()
    return writer.element(element.tag, vr, words.tobytes())


def _vr_of(tag: int, numbers: dict[int, int]) -> bytes:
    """The VR of an element in implicit VR (PS3.5 annex A.1, PS3.6); UN for what isn't known."""
    group = tag >> 16
    if group % 2:
        return b"LO" if 0x10 <= tag & 0xFFFF <= 0xFF else b"UN"
    try:
        vr = dictionary_VR(tag)
    except KeyError:
        return b"UN"
    if vr == "OB or OW":
        return b"OW" if tag != PIXEL_DATA or numbers.get(BITS_ALLOCATED, 16) > 8 else b"OB"
    if vr.startswith("US or"):
        if "SS" not in vr or tag in (0x00281201, 0x00281202, 0x00281203, 0x00283006):
            return b"OW" if "OW" in vr else b"US"
        return b"SS" if numbers.get(PIXEL_REPRESENTATION, 0) == 1 else b"US"
    return vr.encode("ascii")
