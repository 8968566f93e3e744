"""The head of a data set: its elements before the pixels, but for bulk; from the first bytes of a file, or kept."""

import struct
import zlib
from collections.abc import Iterator, Set
from io import BytesIO
from itertools import takewhile
from typing import Final, NamedTuple

from pydicom import Dataset
from pydicom.datadict import dictionary_has_tag, dictionary_VR
from pydicom.filereader import read_dataset

from gateway.dicom.scan import LONG_VRS, SHORT_VRS
from gateway.dicom.sop_classes import encoding_of
from storage.state.model import Kept

HEAD_BYTES_MAX: Final = 4 << 20  # read, and inflated
HEAD_BYTES_USUAL: Final = 32 << 10
PIXELS: Final = 0x7FE00008  # the first element that may be pixels
TEXT_BYTES_MAX: Final = 64 << 10  # of an element of a head: texts and sequences
BULK_BYTES_MAX: Final = 4 << 10  # of any other
UNDEFINED: Final = 0xFFFFFFFF
ITEM, ITEM_END, SEQUENCE_END = 0xFFFEE000, 0xFFFEE00D, 0xFFFEE0DD
# What it takes to read others: the character set, and by what pydicom decides whether a number has a sign, and how long
# the entries of a table are.
NEEDED: Final = frozenset((0x00080005, 0x00280100, 0x00280103, 0x00281101, 0x00281102, 0x00281103, 0x00283002))
BULK_VRS: Final = frozenset(("OB", "OD", "OF", "OL", "OV", "OW", "UN"))
ALL: Final = 0  # in place of the tags that were left out: nothing is known of it


class Odd(Exception):
    """It can't be taken apart at a glance: cut off, or not to the letter of the Standard."""


class Element(NamedTuple):
    """Of the outermost data set: where it begins and ends. `vr`: "" in implicit VR."""

    tag: int
    vr: str
    start: int
    end: int


def elements(data: bytes, *, implicit: bool, little: bool, all_there: bool) -> Iterator[Element]:
    """Those before the pixels. `all_there`: the data set has no more bytes than these. Raises Odd, also where they end
    before it is known that all came."""
    order = "<" if little else ">"
    header, long = struct.Struct(f"{order}HHL").unpack_from, struct.Struct(f"{order}L").unpack_from
    short = struct.Struct(f"{order}H").unpack_from
    at, before, size = 0, -1, len(data)
    try:
        while at < size:
            group, number, length = header(data, at)
            tag, vr, value = group << 16 | number, "", at + 8
            if tag >> 16 == PIXELS >> 16 and tag >= PIXELS:
                return
            if tag <= before:
                raise Odd("elements out of order")
            if not implicit:
                raw = data[at + 4 : at + 6]
                if raw in SHORT_VRS:
                    (length,) = short(data, at + 6)
                elif raw in LONG_VRS:
                    (length,), value = long(data, at + 8), at + 12
                else:
                    raise Odd("an element without a VR")
                vr = raw.decode()
            end = value + length if length != UNDEFINED else _sequence_end(data, value, order, implicit or vr == "UN")
            if end > size:
                raise Odd("cut off")
            yield Element(tag, vr, at, end)
            at, before = end, tag
        if not all_there:
            raise Odd("cut off")
    except struct.error:
        raise Odd("cut off") from None


def _sequence_end(data: bytes, at: int, order: str, implicit: bool) -> int:
    """Behind the delimiter of a sequence of undefined length; nothing is recursive. Raises Odd, struct.error."""
    header, long = struct.Struct(f"{order}HHL").unpack_from, struct.Struct(f"{order}L").unpack_from
    short = struct.Struct(f"{order}H").unpack_from
    within: list[tuple[bool, bool]] = [(True, implicit)]  # open sequences and items: (is a sequence, is implicit VR)
    while within:
        in_sequence, implicit = within[-1]
        group, number, length = header(data, at)
        tag, at = group << 16 | number, at + 8
        if tag in (ITEM_END, SEQUENCE_END):
            if in_sequence != (tag == SEQUENCE_END):
                raise Odd("a delimiter where none should be")
            within.pop()
            continue
        if in_sequence != (tag == ITEM):
            raise Odd("no item where one should be")
        vr = b""
        if not in_sequence and not implicit:
            vr = data[at - 4 : at - 2]
            if vr in SHORT_VRS:
                (length,) = short(data, at - 2)
            elif vr in LONG_VRS:
                (length,), at = long(data, at), at + 4
            else:
                raise Odd("an element without a VR")
        if length == UNDEFINED:
            within.append((not in_sequence, implicit or vr == b"UN"))
        else:
            at += length
    return at


def inflated(raw: bytes) -> bytes:
    """The beginning of a deflated data set. Raises Odd."""
    try:
        return zlib.decompressobj(-zlib.MAX_WBITS).decompress(raw, HEAD_BYTES_MAX)
    except zlib.error:
        raise Odd("not deflated") from None


def head_of(raw: bytes, transfer_syntax: str, *, all_there: bool) -> Kept:
    """From the beginning of a data set, or all of it. Raises Odd."""
    implicit, little, deflated = encoding_of(transfer_syntax)
    data = inflated(raw) if deflated else raw
    all_there = all_there and len(data) < HEAD_BYTES_MAX
    kept: list[bytes] = []
    left_out: list[int] = []
    for one in elements(data, implicit=implicit, little=little, all_there=all_there):
        if one.end - one.start <= _bytes_max(one):
            kept.append(data[one.start : one.end])
        else:
            left_out.append(one.tag)
    return Kept(b"".join(kept), tuple(left_out))


def _bytes_max(element: Element) -> int:
    vr = element.vr or (dictionary_VR(element.tag) if dictionary_has_tag(element.tag) else "UN")
    return BULK_BYTES_MAX if any(one in BULK_VRS for one in vr.split(" or ")) else TEXT_BYTES_MAX


def chosen(head: Kept, transfer_syntax: str, tags: Set[int]) -> Dataset | None:
    """Some elements of a head, and what it takes to read them; None if they aren't all known from it."""
    if any(tag >= PIXELS for tag in tags):  # it may stand behind the pixels
        return None
    if head.left_out and (ALL in head.left_out or not tags.isdisjoint(head.left_out)):
        return None
    implicit, little, _ = encoding_of(transfer_syntax)
    groups = {tag >> 16 for tag in tags if tag >> 16 & 1}
    last = max(*tags, *NEEDED)
    try:
        parts = [
            head.data[one.start : one.end]
            for one in takewhile(
                lambda one: one.tag <= last, elements(head.data, implicit=implicit, little=little, all_there=True)
            )
            if one.tag in tags or one.tag in NEEDED or (one.tag >> 16 in groups and one.tag & 0xFFFF <= 0xFF)
        ]
        return read_dataset(BytesIO(b"".join(parts)), implicit, little)
    except Exception:  # pydicom raises whatever a strange data set leads it to
        return None


def is_whole(raw: bytes, offset: int, transfer_syntax: str) -> bool:
    """The beginning of a file goes as far as its pixels; False also where that can't be told at a glance."""
    implicit, little, deflated = encoding_of(transfer_syntax)
    if deflated:
        return False
    try:
        for _ in elements(raw[offset:], implicit=implicit, little=little, all_there=False):
            pass
    except Odd:
        return False
    return True


def read_head(raw: bytes, offset: int, transfer_syntax: str) -> Dataset | None:
    """`raw`: the beginning of a file, whose data set is at `offset`. None if it can't be read. Blocks."""
    implicit, little, deflated = encoding_of(transfer_syntax)
    try:
        data = inflated(raw[offset:]) if deflated else raw[offset:]
        return read_dataset(
            BytesIO(data),
            implicit,
            little,
            stop_when=lambda tag, vr, length: int(tag) >= PIXELS and int(tag) >> 16 == PIXELS >> 16,
            defer_size=None,
        )
    except Exception:  # pydicom raises whatever a strange data set leads it to; then it has no such attributes
        return None
